//! One attempt: a task that takes it from its assignment, or from what an earlier agent left of it, to its removal.
//!
//! Order that matters, and why: the assignment is on disk before anything happens (a new agent can go on); the report is
//! on disk before the workdir goes (a new agent can repeat it); the workdir is gone before the report is said (nobody
//! sees a terminal state and a workdir). Every await may be the last: a wish to remove drops the task's life
//! wherever it is, and `Attempt::remove` then finds out from the disk what there is to kill.

mod again;
pub mod environment;
mod finish;
mod follow;
mod image;
pub mod outputs;
mod prepare;
mod push;
pub mod record;
mod seal;
pub mod silence;
pub mod workdir;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use helix_agent_core::{Assignment, Death, Event, Found, PlatformImage, Report, StopCause, Verdict};
use helix_common::wall;
use helix_model::{AttemptKey, Reason};
use helix_runner::journal::{self, Journal};
use helix_runner::{AttemptDir, AttemptState, Outcome, SpoolWriter, Stream, Sweep};
use rustix::io::Errno;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

pub(crate) use self::again::store_again;
pub(crate) use self::prepare::shell_path;
use self::silence::LastOutput;
use self::workdir::{Workdir, remove_tree};
use crate::blocking::blocking;
use crate::services::Services;
use crate::stores::live::Progress;

/// How long processes of a dead runner may take to die before they are looked for again.
const SWEEP_PATIENCE: Duration = Duration::from_secs(10);

/// Between two tries of what must succeed in the end.
const RETRY: Duration = Duration::from_secs(1);

/// Looks in a row at an attempt whose directory does not tell what runs, before that is taken for an answer.
const BLIND_LOOKS_MAX: u32 = 10;

/// What the agent wants of an attempt; only ever more.
#[derive(Clone, Default, Debug)]
pub struct Wishes {
    /// The commit to build.
    pub commit: Option<String>,
    /// The images whose index it pushes; none, if somebody else does.
    pub images: Option<Vec<PlatformImage>>,
    /// It is to end.
    pub stop: Option<StopCause>,
    /// Nothing of it is wanted any more.
    pub remove: bool,
}

/// From where an attempt is taken on.
#[derive(Debug)]
pub enum Begin {
    /// From its assignment.
    Fresh(Box<Assignment>),
    /// From its directory.
    Found,
}

/// An attempt's task, as the agent holds it.
#[derive(Debug)]
pub struct Handle {
    /// What is wanted.
    pub wishes: watch::Sender<Wishes>,
    /// When it last printed something.
    pub last_output: LastOutput,
    task: AbortOnDropHandle<()>,
}

impl Handle {
    /// Whether the task is over, as it should be only after a removal.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.task.is_finished()
    }
}

/// Starts an attempt's task. It says what happens on `events`.
#[must_use]
pub fn start(services: Arc<Services>, key: AttemptKey, begin: Begin, events: mpsc::Sender<Event>) -> Handle {
    let (wishes, wished) = watch::channel(Wishes::default());
    let last_output = LastOutput::now();
    let attempt = Attempt {
        dir: services.data.attempt(&key),
        workdir: Workdir::new(&services.work_root, &key),
        services,
        key,
        wished,
        events,
        progress: watch::Sender::new(Progress::default()),
        last_output: last_output.clone(),
        runner: None,
        push: None,
        over_store: Arc::default(),
        steps: TaskTracker::new(),
    };
    Handle { wishes, last_output, task: AbortOnDropHandle::new(tokio::spawn(attempt.run(begin))) }
}

/// What lies in an attempt's directory: `None` when nothing was promised of it yet. Blocks.
///
/// # Errors
/// Those of the file system.
pub fn classify(dir: &AttemptDir) -> io::Result<Option<Found>> {
    let journal = Journal::read(dir)?;
    if let Some(report) = record::report(&journal)? {
        return Ok(Some(Found::Reported(Box::new(report))));
    }
    if record::assignment(&journal)?.is_none() {
        return Ok(None);
    }
    Ok(Some(if journal.is_ordered() { Found::Started } else { Found::Unstarted }))
}

/// What there may be of an attempt whose task is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Left {
    /// Its directory alone: its runner told how it ended, and the workdir was removed.
    Directory,
    /// Anything: the disk tells.
    Unknown,
}

/// How far an attempt is when its task begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Progressed {
    /// It is to be prepared.
    Assigned,
    /// Its order was written: a runner has it, or had it.
    Ordered,
    /// It was assigned to an earlier life of this host and never begun.
    Outlived,
}

/// How the part of an attempt that needs processes came to its end.
#[derive(Debug)]
enum Ending {
    /// Before any command ran, as far as is known.
    NotRun(Verdict, Death),
    /// With the runner's result.
    Ran(Outcome),
    /// With a runner that died.
    RunnerLost(Death),
}

struct Attempt {
    services: Arc<Services>,
    key: AttemptKey,
    dir: AttemptDir,
    workdir: Workdir,
    wished: watch::Receiver<Wishes>,
    events: mpsc::Sender<Event>,
    progress: watch::Sender<Progress>,
    last_output: LastOutput,
    /// The connection that a runner was started with, until it is followed.
    runner: Option<std::os::unix::net::UnixStream>,
    /// Pushes the live log; ends with this task.
    push: Option<AbortOnDropHandle<()>>,
    /// Rung when it takes more of the store of images than it may: its runner is told by who follows it.
    over_store: Arc<Notify>,
    /// What the agent itself runs for it, besides its command.
    steps: TaskTracker,
}

impl Attempt {
    async fn run(mut self, begin: Begin) {
        let mut wished = self.wished.clone();
        let left = tokio::select! {
            left = self.live(begin) => {
                // Its report is repeated by the agent until nothing of it is wanted.
                wished.wait_for(|wishes| wishes.remove).await.map(|_| left)
            }
            removal = async { wished.wait_for(|wishes| wishes.remove).await.map(drop) } => removal.map(|()| Left::Unknown),
        };
        // Nobody wishes any more when the agent ends: what there is stays, for the next one.
        let Ok(left) = left else { return };
        self.push = None;
        // A runner makes its socket when nobody holds this any more.
        self.runner = None;
        let death = self.remove(left).await;
        self.say(Event::AttemptRemoved(self.key.clone(), death)).await;
    }

    async fn live(&mut self, begin: Begin) -> Left {
        let (assignment, progressed) = match begin {
            Begin::Fresh(assignment) => match self.begin(&assignment).await {
                Ok(()) => {
                    self.tell_previous(&assignment).await;
                    (*assignment, Progressed::Assigned)
                }
                Err(error) => {
                    self.clear_half_begun().await;
                    self.tell_previous(&assignment).await;
                    self.end_unbegun(&error, Death::Proven).await;
                    return Left::Unknown;
                }
            },
            Begin::Found => match self.read_back().await {
                Ok(Some(found)) => found,
                Ok(None) => return Left::Unknown,
                Err(error) => {
                    let death = self.kill_until_dead().await;
                    self.end_unbegun(&error, death).await;
                    return Left::Unknown;
                }
            },
        };
        let ending = match self.process(&assignment, progressed).await {
            Ok(ending) => ending,
            Err(error) => {
                // What cannot be followed may run on: it is not reported as ended before it has.
                let death = self.kill_until_dead().await;
                let reason = crate::source::reason_of(&error);
                Ending::NotRun(Verdict::Failed { reason, message: format!("the agent cannot run it: {error}") }, death)
            }
        };
        let left = if matches!(ending, Ending::Ran(_)) { Left::Directory } else { Left::Unknown };
        self.finish(&assignment, ending).await;
        left
    }

    /// Goes as far as the end of all processes, from wherever the attempt stands.
    async fn process(&mut self, assignment: &Assignment, progressed: Progressed) -> io::Result<Ending> {
        let prepared = match progressed {
            Progressed::Ordered => {
                // What an earlier agent saw of its log is not known.
                self.progress.send_modify(|progress| progress.grown += 1);
                self.start_push();
                Ok(())
            }
            Progressed::Assigned => self.prepare(assignment).await,
            // With that life the registry ended it, as dead: begun now, it would run beside another attempt.
            Progressed::Outlived => {
                let message = "its host booted before it began".to_owned();
                Err(Verdict::Failed { reason: Reason::Internal, message })
            }
        };
        if let Err(verdict) = prepared {
            return Ok(Ending::NotRun(verdict, Death::Proven));
        }
        self.last_output.note();
        self.say(Event::CommandStarted(self.key.clone())).await;
        let _watch = self.watch_store(assignment);
        self.follow().await
    }

    /// Writes the assignment, if there is room for what it assigns; room is made for it if there is not.
    async fn begin(&self, assignment: &Assignment) -> io::Result<()> {
        match self.write_assignment(assignment).await {
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                crate::disk::collect::collect(&self.services).await;
                self.write_assignment(assignment).await
            }
            other => other,
        }
    }

    async fn write_assignment(&self, assignment: &Assignment) -> io::Result<()> {
        let (services, dir, assignment) = (Arc::clone(&self.services), self.dir.clone(), assignment.clone());
        blocking(move || {
            services.disks.admit(&services.work_root, assignment.spec.resources.disk_bytes)?;
            crate::data_dir::make_private(dir.root())?;
            record::write_assignment(&dir, &assignment, services.data.instance())
        })
        .await
    }

    /// Reads the assignment of an attempt that was found, and how far it is; `None` when its report was
    /// made already, and all that is left was done here.
    async fn read_back(&mut self) -> io::Result<Option<(Assignment, Progressed)>> {
        let dir = self.dir.clone();
        let journal = blocking(move || Journal::read(&dir)).await?;
        if let Some(report) = record::report(&journal)? {
            self.remove_workdir().await;
            self.progress.send_modify(|progress| progress.grown += 1);
            self.start_push();
            self.seal_behind(report).await;
            return Ok(None);
        }
        let gone = || io::Error::new(io::ErrorKind::NotFound, "its assignment is gone");
        let assignment = record::assignment(&journal)?.ok_or_else(gone)?;
        let outlived = record::is_outlived(&journal, self.services.data.instance())?;
        let progressed = match (journal.is_ordered(), outlived) {
            // The host booted before any runner took the order: none may any more.
            (true, true) if !journal.is_taken() => {
                let dir = self.dir.clone();
                let withdrawn = blocking(move || journal::withdraw(&dir)).await?;
                if withdrawn { Progressed::Outlived } else { Progressed::Ordered }
            }
            (true, _) => Progressed::Ordered,
            (false, true) => Progressed::Outlived,
            (false, false) => Progressed::Assigned,
        };
        Ok(Some((assignment, progressed)))
    }

    /// Half a directory of an attempt that never began would be taken for one that did.
    async fn clear_half_begun(&self) {
        let root = self.dir.root().to_owned();
        let cleared = blocking(move || {
            remove_tree(&root)?;
            crate::data_dir::make_private(&root)
        });
        if let Err(error) = cleared.await {
            tracing::warn!(attempt = %self.key, %error, "an attempt that cannot begin has no directory");
        }
    }

    /// Ends an attempt of which nothing ran, or whose directory does not tell what did. Its log says why, and is sealed as
    /// any other is; where even that cannot be written, an empty one is: the registry waits for a log of every end.
    async fn end_unbegun(&mut self, error: &io::Error, death: Death) {
        tracing::error!(attempt = %self.key, %error, "an attempt cannot begin");
        let message = format!("the agent cannot begin it: {error}");
        let verdict = Verdict::Failed { reason: crate::source::reason_of(error), message };
        self.start_push();
        self.report(Report { death, ..Report::bare(verdict) }, None).await;
    }

    /// The log opens with what came before it.
    async fn tell_previous(&self, assignment: &Assignment) {
        if !assignment.previous.is_empty() {
            self.log_line(assignment.previous.clone()).await;
        }
    }

    async fn say(&self, event: Event) {
        // The agent is ending when nobody listens; the next one finds out from the disk.
        let _ = self.events.send(event).await;
    }

    /// Adds a line of our own to the log. Only while no runner writes it. Waits for no coordinator: what is cut off has last
    /// words, too, and its workdir goes only behind them.
    async fn log_line(&self, text: impl Into<String>) {
        let (dir, text) = (self.dir.clone(), text.into());
        let said = self.services.stores.nodes().settings_known().map(|settings| settings.log_bytes_max);
        let written = blocking(move || {
            let log_bytes_max = said.unwrap_or_else(|| record::log_bytes_max(&dir));
            let mut writer = SpoolWriter::open(&dir, log_bytes_max)?;
            for line in text.lines() {
                writer.append(wall::now_ms(), Stream::System, line.as_bytes());
            }
            writer.flush()
        });
        if let Err(error) = written.await {
            tracing::warn!(attempt = %self.key, %error, "a line of the log could not be written");
        }
        self.progress.send_modify(|progress| progress.grown += 1);
    }

    fn start_push(&mut self) {
        if self.push.is_none() {
            let live = self.services.live.clone();
            let push = live.push(self.key.clone(), self.dir.clone(), self.progress.subscribe());
            self.push = Some(AbortOnDropHandle::new(tokio::spawn(push)));
        }
    }

    fn note_output(&self) {
        self.last_output.note();
        self.progress.send_modify(|progress| progress.grown += 1);
    }

    async fn stop_wished(&self) -> StopCause {
        let mut wished = self.wished.clone();
        loop {
            if let Some(cause) = wished.borrow_and_update().stop {
                return cause;
            }
            if wished.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Removes the workdir and the secrets, whatever it takes.
    async fn remove_workdir(&self) {
        self.remove_secrets().await;
        loop {
            let workdir = self.workdir.clone();
            match blocking(move || workdir.remove()).await {
                Ok(()) => return,
                Err(error) => {
                    tracing::error!(attempt = %self.key, %error, "the workdir cannot be removed; trying again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Removes the secrets, whatever it takes.
    async fn remove_secrets(&self) {
        loop {
            let (services, key) = (Arc::clone(&self.services), self.key.clone());
            match blocking(move || services.secrets.remove(&key)).await {
                Ok(()) => return,
                Err(error) => {
                    tracing::error!(attempt = %self.key, %error, "secrets cannot be removed; trying again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Kills what runs and removes all there is.
    async fn remove(&self, left: Left) -> Death {
        self.steps_are_dead().await;
        let death = match left {
            Left::Directory => Death::Proven,
            Left::Unknown => {
                let death = self.kill_until_dead().await;
                self.sweep_podman().await;
                self.remove_workdir().await;
                death
            }
        };
        loop {
            let root: PathBuf = self.dir.root().to_owned();
            match blocking(move || remove_tree(&root)).await {
                Ok(()) => return death,
                Err(error) => {
                    tracing::error!(attempt = %self.key, %error, "an attempt's directory cannot be removed; trying again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Sees to it that no process of the attempt is left: for as long as one is seen to live, and for a while where the
    /// attempt's directory cannot be read. What it does not tell by then it never will, and nothing is proven.
    async fn kill_until_dead(&self) -> Death {
        let mut blind = 0;
        loop {
            let error = match self.kill().await {
                Ok(death) => return death,
                Err(error) => error,
            };
            blind = if is_blind(&error) { blind + 1 } else { 0 };
            if blind == BLIND_LOOKS_MAX {
                tracing::error!(attempt = %self.key, %error, "that all processes of an attempt are dead is not proven");
                return Death::Unproven;
            }
            tracing::error!(attempt = %self.key, %error, "an attempt cannot be killed; trying again");
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Sees to it that no process of the attempt is left.
    async fn kill(&self) -> io::Result<Death> {
        loop {
            let dir = self.dir.clone();
            match blocking(move || helix_runner::inspect(&dir)).await? {
                // An order that nobody took must not be taken any more; who is about to take it has the lock.
                AttemptState::NotStarted => {
                    let dir = self.dir.clone();
                    if blocking(move || journal::withdraw(&dir)).await? {
                        return Ok(Death::Proven);
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                AttemptState::Ended(_) => return Ok(Death::Proven),
                AttemptState::Running { .. } => {
                    let told = follow::stop_and_wait(&self.dir, Reason::Cancelled, 0).await;
                    told.map_err(|error| {
                        io::Error::new(io::ErrorKind::WouldBlock, format!("a runner lives: {error}"))
                    })?;
                }
                AttemptState::RunnerDied => return self.sweep().await,
            }
        }
    }

    async fn sweep(&self) -> io::Result<Death> {
        let dir = self.dir.clone();
        match blocking(move || helix_runner::sweep(&dir, SWEEP_PATIENCE)).await? {
            Sweep::Proven { .. } => Ok(Death::Proven),
            Sweep::Unproven { .. } => Ok(Death::Unproven),
        }
    }
}

/// Whether an error says that an attempt's directory does not tell what runs: not where something is seen to live, and not where
/// the host is short of something, which passes.
fn is_blind(error: &io::Error) -> bool {
    use io::ErrorKind::{OutOfMemory, ResourceBusy, StorageFull, TimedOut, WouldBlock};
    let short = [Errno::MFILE, Errno::NFILE].map(|errno| Some(errno.raw_os_error())).contains(&error.raw_os_error());
    !short && !matches!(error.kind(), TimedOut | WouldBlock | ResourceBusy | OutOfMemory | StorageFull)
}
