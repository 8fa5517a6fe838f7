//! Small blobs that were stored a moment ago, and who holds them: the same bytes (an empty log, an unchanged output) are not sent
//! again. Whoever stored them was promised that they stay for an hour, so that nothing is risked.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use helix_model::{Digest, NodeId};

/// How long what was stored is taken to be there: a small part of the hour for which its coordinators keep it for us.
const RECENT_FOR: Duration = Duration::from_secs(60);

/// Blobs that are remembered.
const RECENT_MAX: usize = 1024;

/// What was stored a moment ago.
#[derive(Debug, Default)]
pub(super) struct Recent {
    known: Mutex<HashMap<Digest, Stored>>,
}

#[derive(Debug)]
struct Stored {
    at: Instant,
    copies: u32,
    holders: Vec<NodeId>,
}

impl Recent {
    /// Who holds a blob, stored for as many copies. Should they have lost it since, whoever commits the success finds too few
    /// of them and asks for it again.
    pub(super) fn holders(&self, digest: &Digest, copies: u32, now: Instant) -> Option<Vec<NodeId>> {
        let known = self.lock();
        let stored = known.get(digest).filter(|stored| stored.copies == copies && !stored.is_over(now))?;
        Some(stored.holders.clone())
    }

    /// Remembers who holds a blob that was just stored.
    pub(super) fn note(&self, digest: Digest, copies: u32, holders: &[NodeId], now: Instant) {
        let mut known = self.lock();
        if known.len() >= RECENT_MAX {
            known.retain(|_, stored| !stored.is_over(now));
        }
        if known.len() < RECENT_MAX || known.contains_key(&digest) {
            known.insert(digest, Stored { at: now, copies, holders: holders.to_vec() });
        }
    }

    /// A blob turned out to be held by nobody.
    pub(super) fn forget(&self, digest: &Digest) {
        self.lock().remove(digest);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Stored>> {
        // Nothing panics while holding it.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stored {
    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) >= RECENT_FOR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(number: usize) -> Digest {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&(number as u64).to_le_bytes());
        Digest(bytes)
    }

    #[test]
    fn what_was_stored_is_known_for_a_while_and_for_as_many_copies() {
        let (recent, now) = (Recent::default(), Instant::now());
        let holders = [NodeId(1), NodeId(3)];
        recent.note(digest(0), 2, &holders, now);
        assert_eq!(recent.holders(&digest(0), 2, now), Some(holders.to_vec()));
        assert_eq!(recent.holders(&digest(0), 3, now), None);
        assert_eq!(recent.holders(&digest(1), 2, now), None);
        assert_eq!(recent.holders(&digest(0), 2, now + RECENT_FOR), None);
    }

    #[test]
    fn it_does_not_grow_and_gives_up_what_is_over_first() {
        let (recent, now) = (Recent::default(), Instant::now());
        for number in 0..=RECENT_MAX {
            recent.note(digest(number), 1, &[], now);
        }
        assert_eq!(recent.lock().len(), RECENT_MAX);
        assert_eq!(recent.holders(&digest(RECENT_MAX), 1, now), None);
        recent.note(digest(RECENT_MAX), 1, &[], now + RECENT_FOR);
        assert_eq!(recent.lock().len(), 1);
    }
}
