//! Writing the store's file anew once it has grown too large, between batches.
//!
//! A copy that fails is given up, and nothing else is lost by it: it is tried again later. Only where it is not known which of two files
//! counts does the writer end.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::store::{Changes, Copy, Store, guarded};

/// Between a copy that failed and the next.
const AGAIN_AFTER: Duration = Duration::from_secs(600);

/// The longest rest: a step that a slow disk held up says little of the next.
const REST_MAX: Duration = Duration::from_millis(500);

/// When a store's file is written anew, and how hastily.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RenewWhen {
    /// It must be as large as this,
    pub from_bytes: u64,
    /// and so many times as large as it was when it was new.
    pub times: u64,
    /// A step is followed by a rest of so many times what it took: nothing waits for the copy, and all else waits for the processor.
    pub rests: u32,
}

impl RenewWhen {
    /// It is left as it is.
    pub(in crate::raft) const NEVER: Self = Self { from_bytes: u64::MAX, times: 0, rests: 0 };
}

/// Whether a copy is under way, and when the next is due.
pub(in crate::raft) struct Renewal {
    store: Arc<Store>,
    when: RenewWhen,
    copy: Option<Copy>,
    rests_until: Option<Instant>,
    not_before: Option<Instant>,
}

impl Renewal {
    pub(in crate::raft) fn new(store: Arc<Store>, when: RenewWhen) -> Self {
        Self { store, when, copy: None, rests_until: None, not_before: None }
    }

    /// How long until the next step of a copy; `None` while there is none.
    pub(in crate::raft) fn due_in(&self) -> Option<Duration> {
        let rest = |until: Instant| until.saturating_duration_since(Instant::now());
        self.copy.as_ref().map(|_| self.rests_until.map_or(Duration::ZERO, rest))
    }

    /// Looks how large the store is, and begins a copy where one is due. Returns the bytes on disk.
    pub(in crate::raft) fn look(&mut self) -> u64 {
        let (bytes, new_bytes) = self.store.sizes();
        let due = bytes >= self.when.from_bytes.max(new_bytes.saturating_mul(self.when.times));
        let early = self.not_before.is_some_and(|at| Instant::now() < at);
        if due && !early && self.copy.is_none() {
            match guarded(|| self.store.begin_copy()) {
                Ok(copy) => self.copy = Some(copy),
                Err(error) => self.put_off(&error),
            }
        }
        bytes.saturating_add(self.copy.as_ref().map_or(0, Copy::size))
    }

    /// Does to the copy what was done to the store.
    pub(in crate::raft) fn write(&mut self, changes: Changes) {
        let Some(copy) = &mut self.copy else { return };
        if let Err(error) = guarded(|| copy.write(changes)) {
            self.put_off(&error);
        }
    }

    /// Copies some more, if it is time to.
    ///
    /// # Errors
    /// When it is not known what the store is now: nothing may be written to it.
    pub(in crate::raft) fn step(&mut self) -> io::Result<()> {
        if self.due_in() != Some(Duration::ZERO) {
            return Ok(());
        }
        let Some(copy) = &mut self.copy else { return Ok(()) };
        let (store, began) = (&self.store, Instant::now());
        let step = guarded(|| Ok(copy.step(store)? && copy.finish(store).map(|()| true)?));
        self.rests_until = Instant::now().checked_add(began.elapsed().saturating_mul(self.when.rests).min(REST_MAX));
        match step {
            Ok(false) => {}
            Ok(true) => self.switch()?,
            Err(error) => self.put_off(&error),
        }
        Ok(())
    }

    fn switch(&mut self) -> io::Result<()> {
        let Some(copy) = self.copy.take() else { return Ok(()) };
        let (before, _) = self.store.sizes();
        self.store.switch_to(copy)?;
        let (after, _) = self.store.sizes();
        tracing::info!(before, after, "the registry's file was written anew");
        Ok(())
    }

    /// Gives up the copy that is under way.
    pub(in crate::raft) fn give_up(&mut self) {
        if let Some(copy) = self.copy.take() {
            copy.discard();
        }
    }

    fn put_off(&mut self, error: &io::Error) {
        tracing::warn!(%error, "the registry's file could not be written anew; it is tried again later");
        self.not_before = Instant::now().checked_add(AGAIN_AFTER);
        self.give_up();
    }
}
