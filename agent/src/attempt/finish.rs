//! From the end of all processes to a report that is said: the verdict, the outputs, the log, the workdir's end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use helix_agent_core::{Artifact, Assignment, Death, Event, Report, SealedLog, StopCause, Verdict};
use helix_common::wall;
use helix_model::parse::duration_text;
use helix_model::{BuildSpec, Measure, Outputs, Reason, Room};
use helix_runner::{AttemptDir, End, MemoryKill, Outcome};

use super::outputs::{self, Output, Unusable, Why};
use super::prepare::stopped;
use super::{Attempt, Ending, image, record, seal};
use crate::blocking::blocking;
use crate::services::Services;
use crate::stores::StoreError;
use crate::stores::body::{Body, Source};

/// Outputs of one attempt that are stored at once.
const UPLOADS_MAX: usize = 4;

/// A failure: why, and in words.
pub(crate) type Failure = (Reason, String);

impl Attempt {
    /// Makes the report, clears up, says it, and sees to the log.
    pub(super) async fn finish(&mut self, assignment: &Assignment, ending: Ending) {
        let podman = image::is_podman(assignment);
        let (mut ending, mut why) = (ending, None);
        if let Ending::Ran(outcome) = &mut ending
            && podman
        {
            why = self.why_podman_failed(outcome).await;
            let mark = image::own_limit_mark(&self.dir);
            if outcome.stopped == Some(Reason::DiskFull) && blocking(move || mark.try_exists()).await.unwrap_or(false) {
                outcome.room = Room::Own;
            }
        }
        let (mut report, ran_well) = self.judge(ending);
        if let Verdict::Failed { reason, message } = &mut report.verdict {
            message.push_str(&limit_text(*reason, &assignment.spec));
        }
        if let (Verdict::Failed { reason: Reason::Exit, .. }, Some(why)) = (&report.verdict, why) {
            report.verdict = why;
        }
        if ran_well && podman {
            self.say(Event::CommandEnded(self.key.clone())).await;
            match self.deliver_all(assignment).await {
                Ok((delivered, log)) => {
                    let image_tag = crate::executor::podman::build::image_tag(assignment);
                    report.verdict = Verdict::Succeeded { image_tag };
                    (report.artifacts, report.log) = (delivered.artifacts, Some(log));
                    (report.image, report.index) = (Some(delivered.image), delivered.index);
                }
                Err(verdict) => report.verdict = verdict,
            }
        } else if ran_well {
            self.say(Event::CommandEnded(self.key.clone())).await;
            match self.store_all(assignment).await {
                Ok((artifacts, log)) => {
                    let image_tag = artifacts.first().map_or_else(String::new, |first| {
                        format!("helix/{}@sha256:{}", self.key.build, first.blob.digest)
                    });
                    report.verdict = Verdict::Succeeded { image_tag };
                    (report.artifacts, report.log) = (artifacts, Some(log));
                }
                Err(verdict) => report.verdict = verdict,
            }
        }
        let keep_until_ms = self.keep_until_ms(assignment, &report.verdict);
        if podman {
            self.sweep_podman().await;
        }
        self.report(report, keep_until_ms).await;
    }

    /// Writes the report and the log's last words, clears up, says it, and sees to the log.
    pub(super) async fn report(&mut self, report: Report, keep_until_ms: Option<u64>) {
        if report.log.is_none() {
            if let Some(until_ms) = keep_until_ms {
                let kept = self.workdir.kept(&self.services.work_root, until_ms);
                self.log_line(format!("the workdir is kept on {} in {}", self.services.config.name, kept.display()))
                    .await;
            }
            self.log_line(last_words(&report)).await;
        }
        self.progress.send_modify(|progress| progress.ended = true);
        match keep_until_ms {
            None => self.report_and_clear(&report).await,
            Some(until_ms) => {
                self.write_report(&report).await;
                self.keep_workdir(until_ms).await;
                self.remove_workdir().await;
            }
        }
        self.say(Event::AttemptEnded(self.key.clone(), Box::new(report.clone()))).await;
        self.seal_behind(report).await;
    }

    /// What follows from how the processes ended; whether the outputs are to be looked at.
    fn judge(&self, ending: Ending) -> (Report, bool) {
        let stop = self.wished.borrow().stop;
        match ending {
            Ending::NotRun(verdict, death) => {
                let room = match verdict {
                    Verdict::Failed { reason: Reason::DiskFull, .. } => self.services.limiter.full(&self.workdir),
                    _ => Room::Host,
                };
                (Report { death, room, ..Report::bare(verdict) }, false)
            }
            Ending::RunnerLost(death) => {
                let verdict = match stop {
                    Some(StopCause::Registry(_)) => Verdict::Stopped,
                    Some(StopCause::Drained | StopCause::CutOff { .. }) | None => {
                        let message = format!("the runner died; {}", proof(death));
                        Verdict::Failed { reason: Reason::Internal, message }
                    }
                };
                (Report { death, ..Report::bare(verdict) }, false)
            }
            Ending::Ran(outcome) => {
                let (exit_code, signal) = codes(&outcome.end);
                let verdict = verdict(&outcome, stop);
                let ran_well = verdict.is_none();
                // Replaced once the outputs are stored.
                let verdict = verdict.unwrap_or(Verdict::Stopped);
                (Report { exit_code, signal, room: outcome.room, ..Report::bare(verdict) }, ran_well)
            }
        }
    }

    /// Stores outputs and log of a command that ended well, within the time that the policy gives.
    async fn store_all(&self, assignment: &Assignment) -> Result<(Vec<Artifact>, SealedLog), Verdict> {
        let store = async {
            let deadline = self.services.stores.nodes().settings().await.store_deadline;
            let late = |_| (Reason::Artifact, format!("outputs and log could not be stored within {deadline:?}"));
            let both = async { tokio::try_join!(self.store_outputs(assignment), self.store_log()) };
            tokio::time::timeout(deadline, both).await.map_err(late)?
        };
        // The wait for settings included: an agent that starts while it is cut off has none.
        tokio::select! {
            cause = self.stop_wished() => Err(stopped(cause)),
            stored = store => stored.map_err(|(reason, message)| Verdict::Failed { reason, message }),
        }
    }

    async fn store_outputs(&self, assignment: &Assignment) -> Result<Vec<Artifact>, Failure> {
        let names = match &assignment.spec.outputs {
            Outputs::Default => vec![self.services.config.exec.output_name.clone()],
            Outputs::Named(names) => names.clone(),
            Outputs::None => return Ok(Vec::new()),
        };
        let limit = self.services.stores.nodes().settings().await.blob_bytes_max;
        // All of them are found before the first is sent: a missing one fails the build at once.
        let work = self.workdir.work();
        let opened = blocking(move || {
            let open = |name: String| Ok((outputs::open(&work, &name)?, name));
            let opened: Result<Vec<_>, Unusable> = names.into_iter().map(open).collect();
            let checked = opened.and_then(|opened| {
                for (output, name) in &opened {
                    check_output(&work, output, name, limit)?;
                }
                Ok(opened)
            });
            Ok(checked)
        });
        let internal = |error: io::Error| (Reason::Internal, format!("cannot look for the outputs: {error}"));
        let opened = opened.await.map_err(internal)?.map_err(missing)?;
        let uploads = opened.into_iter().map(|(output, name)| self.store_output(output, name, limit));
        stream::iter(uploads).buffered(UPLOADS_MAX).try_collect().await
    }

    async fn store_output(&self, output: Output, name: String, limit: u64) -> Result<Artifact, Failure> {
        let source = match output {
            Output::File { fd, .. } => Source::File(Arc::new(fd.into())),
            Output::Directory(fd) => Source::Tree(Arc::new(fd)),
        };
        let body = blocking(move || Body::measure(source, limit)).await.map_err(|error| match error.kind() {
            io::ErrorKind::FileTooLarge => missing(Unusable { path: name.clone(), why: Why::TooLarge(limit) }),
            _ => missing(Unusable { path: name.clone(), why: Why::System(error.to_string()) }),
        })?;
        match self.services.stores.put(&body).await {
            Ok(blob) => Ok(Artifact { name, blob }),
            Err(error @ StoreError::Refused(_)) => Err((Reason::Policy, format!("the output {name:?}: {error}"))),
            Err(StoreError::Changed(_)) => Err(missing(Unusable { path: name, why: Why::Changed })),
            Err(error) => Err((Reason::Artifact, format!("the output {name:?}: {error}"))),
        }
    }

    pub(super) async fn store_log(&self) -> Result<SealedLog, Failure> {
        store_log(&self.services, self.dir.clone()).await
    }

    async fn write_report(&self, report: &Report) {
        let (dir, key, copy) = (self.dir.clone(), self.key.clone(), report.clone());
        self.note_written(blocking(move || record::write_report(&dir, &key, &copy)).await);
    }

    fn note_written(&self, written: io::Result<()>) {
        if let Err(error) = written {
            // It is still said now; only an agent that starts again would judge anew, without the workdir.
            tracing::error!(attempt = %self.key, %error, "the report cannot be written to the spool");
        }
    }

    /// Writes the report, and then removes the secrets and the workdir, in one go where nothing is in the way.
    async fn report_and_clear(&self, report: &Report) {
        let (dir, key, copy) = (self.dir.clone(), self.key.clone(), report.clone());
        let (services, workdir) = (Arc::clone(&self.services), self.workdir.clone());
        let done = blocking(move || {
            let written = record::write_report(&dir, &key, &copy);
            let cleared = services.secrets.remove(&key).and_then(|()| workdir.remove());
            Ok((written, cleared))
        });
        match done.await {
            Ok((written, Ok(()))) => self.note_written(written),
            Ok((written, Err(_))) => {
                self.note_written(written);
                self.remove_workdir().await;
            }
            Err(error) => {
                self.note_written(Err(error));
                self.remove_workdir().await;
            }
        }
    }

    /// Until when the workdir is kept, if it is, within what the agent's owner allows.
    fn keep_until_ms(&self, assignment: &Assignment, verdict: &Verdict) -> Option<u64> {
        let config = self.services.disks.config();
        let keep_ms = assignment.spec.keep_workdir_ms.min(config.kept_ms_max);
        let wanted = keep_ms > 0 && config.kept_max > 0 && matches!(verdict, Verdict::Failed { .. });
        wanted.then(|| wall::now_ms().saturating_add(keep_ms))
    }

    async fn keep_workdir(&self, until_ms: u64) {
        let (workdir, root) = (self.workdir.clone(), self.services.work_root.clone());
        let most = self.services.disks.config().kept_max;
        let kept = blocking(move || {
            let kept = workdir.keep(&root, until_ms)?;
            crate::disk::kept::trim(&root, most)?;
            Ok(kept)
        });
        match kept.await {
            Ok(kept) => {
                tracing::info!(attempt = %self.key, path = %kept.display(), "the workdir is kept for a while")
            }
            Err(error) => tracing::warn!(attempt = %self.key, %error, "the workdir cannot be kept"),
        }
    }

    /// Seals the log of an attempt whose report went without it, for as long as that takes.
    pub(super) async fn seal_behind(&self, mut report: Report) {
        self.progress.send_modify(|progress| progress.ended = true);
        if report.log.is_some() {
            return;
        }
        let mut wait = Duration::from_secs(1);
        loop {
            match self.store_log().await {
                Ok(log) => {
                    report.log = Some(log.clone());
                    self.write_report(&report).await;
                    return self.say(Event::LogSealed(self.key.clone(), log)).await;
                }
                Err((_, message)) => tracing::warn!(attempt = %self.key, message, "trying again"),
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_secs(60));
        }
    }
}

/// Seals what an attempt's spool has of its log, and stores that.
pub(crate) async fn store_log(services: &Services, dir: AttemptDir) -> Result<SealedLog, Failure> {
    let sealed = blocking(move || seal::seal(&dir)).await;
    let (body, lines) =
        sealed.map_err(|error| (crate::source::reason_of(&error), format!("the log cannot be sealed: {error}")))?;
    let stored = services.stores.put(&body).await;
    stored
        .map(|blob| SealedLog { blob, lines })
        .map_err(|error| (Reason::Artifact, format!("the log cannot be stored: {error}")))
}

fn check_output(work: &std::path::Path, output: &Output, name: &str, limit: u64) -> Result<(), Unusable> {
    let unusable = |why| Unusable { path: name.to_owned(), why };
    match output {
        Output::File { size, .. } if *size > limit => Err(unusable(Why::TooLarge(limit))),
        Output::File { .. } => Ok(()),
        Output::Directory(fd) => outputs::check_links(work, fd).map_err(unusable),
    }
}

fn missing(unusable: Unusable) -> Failure {
    let reason = if matches!(unusable.why, Why::TooLarge(_)) { Reason::Policy } else { Reason::ArtifactMissing };
    (reason, unusable.to_string())
}

fn codes(end: &End) -> (Option<i32>, Option<i32>) {
    match end {
        End::Exited(code) => (Some(i32::from(*code)), None),
        End::Signaled(signal) => (None, Some(*signal)),
        End::NotStarted { errno, .. } => (shell_code(*errno), None),
    }
}

/// The code a shell ends with when it cannot start a program.
fn shell_code(errno: i32) -> Option<i32> {
    match errno {
        libc::ENOENT | libc::ENOTDIR => Some(127),
        libc::EACCES | libc::ENOEXEC | libc::EISDIR => Some(126),
        _ => None,
    }
}

/// The verdict on a result; `None` when the command ended well and nobody wanted otherwise.
fn verdict(outcome: &Outcome, stop: Option<StopCause>) -> Option<Verdict> {
    let failed = |reason, message: String| Some(Verdict::Failed { reason, message });
    match (outcome.stopped, stop) {
        (Some(Reason::Timeout), None) => return failed(Reason::Timeout, "the time limit was reached".to_owned()),
        (Some(Reason::Silence), None) => {
            return failed(Reason::Silence, "nothing was printed for longer than the silence limit".to_owned());
        }
        (_, Some(cause)) => return Some(stopped(cause)),
        // An earlier agent stopped it, or somebody its runner.
        (Some(Reason::Drained), None) => return Some(stopped(StopCause::Drained)),
        (Some(Reason::DiskFull), None) => {
            let message = match outcome.room {
                Room::Host => "the host's disk was full, or had too little room left for the build",
                Room::Own => {
                    "the build filled all of the disk that it may fill (--disk, or what its agent gives to each)"
                }
            };
            return failed(Reason::DiskFull, message.to_owned());
        }
        (Some(Reason::Internal), None) => {
            return failed(Reason::Internal, "its log could not be written".to_owned());
        }
        (Some(_), None) => return Some(Verdict::Stopped),
        (None, None) => {}
    }
    match &outcome.end {
        End::Exited(0) => None,
        _ if outcome.memory_kill == MemoryKill::Counted => failed(Reason::Oom, "memory ran out".to_owned()),
        End::Exited(code) => failed(Reason::Exit, format!("the command ended with exit code {code}")),
        End::Signaled(signal) => failed(Reason::Signal, format!("the command was killed by signal {signal}")),
        End::NotStarted { errno, error } => {
            let reason = if shell_code(*errno).is_some() { Reason::Exit } else { Reason::Internal };
            failed(reason, format!("the command could not be started: {error}"))
        }
    }
}

/// The limit that was met, where the build named it; to stand behind the words on it.
fn limit_text(reason: Reason, spec: &BuildSpec) -> String {
    match reason {
        Reason::Timeout if spec.timeout_ms > 0 => format!(": {}", duration_text(spec.timeout_ms)),
        Reason::Silence if spec.silence_timeout_ms > 0 => format!(": {}", duration_text(spec.silence_timeout_ms)),
        Reason::Oom if spec.resources.memory_bytes > 0 => {
            format!(": the build asked for {}", Measure::Memory.text(spec.resources.memory_bytes))
        }
        _ => String::new(),
    }
}

/// What is known of the processes of an attempt whose runner died.
fn proof(death: Death) -> &'static str {
    match death {
        Death::Proven => "all processes are dead",
        Death::Unproven => "no process of it was found, and one that hid may still run",
    }
}

/// The log's last line where a build did not succeed.
fn last_words(report: &Report) -> String {
    match &report.verdict {
        Verdict::Failed { reason, message } => format!("failed ({reason}): {message}"),
        Verdict::Stopped => format!("stopped: {}", proof(report.death)),
        Verdict::Succeeded { .. } => "succeeded".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use helix_runner::LogTotals;

    fn outcome(end: End, stopped: Option<Reason>) -> Outcome {
        Outcome {
            started_at_ms: 1,
            ended_at_ms: 2,
            end,
            stopped,
            room: Room::Host,
            leftovers_killed: 0,
            memory_kill: MemoryKill::NotSeen,
            log: LogTotals::default(),
        }
    }

    #[test]
    fn verdicts() {
        let reason = |outcome: &Outcome, stop| match verdict(outcome, stop) {
            None => "well".to_owned(),
            Some(Verdict::Stopped) => "stopped".to_owned(),
            Some(Verdict::Failed { reason, .. }) => reason.to_string(),
            Some(Verdict::Succeeded { .. }) => panic!(),
        };
        let registry = Some(StopCause::Registry(Reason::Cancelled));
        let drained = Some(StopCause::Drained);
        let cut_off = Some(StopCause::CutOff { limit_ms: 90_000 });
        let not_started = |errno| End::NotStarted { errno, error: "x".to_owned() };
        let killed = Some(Reason::Cancelled);
        for (end, stopped, stop, expected) in [
            (End::Exited(0), None, None, "well"),
            (End::Exited(3), None, None, "exit"),
            (End::Signaled(11), None, None, "signal"),
            (not_started(libc::ENOENT), None, None, "exit"),
            (not_started(libc::ENOMEM), None, None, "internal"),
            (End::Signaled(15), Some(Reason::Timeout), None, "timeout"),
            (End::Signaled(15), Some(Reason::Silence), None, "silence"),
            (End::Signaled(15), killed, registry, "stopped"),
            (End::Signaled(15), killed, None, "stopped"),
            (End::Signaled(9), Some(Reason::DiskFull), None, "disk_full"),
            (End::Signaled(9), Some(Reason::DiskFull), registry, "stopped"),
            (End::Exited(0), None, registry, "stopped"),
            (End::Exited(0), None, drained, "drained"),
            (End::Signaled(9), Some(Reason::Drained), None, "drained"),
            (End::Signaled(9), Some(Reason::Drained), cut_off, "drained"),
            (End::Exited(0), None, cut_off, "drained"),
            (End::Signaled(15), Some(Reason::Timeout), registry, "stopped"),
        ] {
            assert_eq!(reason(&outcome(end.clone(), stopped), stop), expected, "{end:?} {stopped:?} {stop:?}");
        }
        let report = Report::bare(verdict(&outcome(End::Signaled(9), Some(Reason::Drained)), cut_off).unwrap());
        let words =
            "failed (drained): the agent was cut off from all coordinators for 1m30s (policy.stop_cut_off_after_ms)";
        assert_eq!(last_words(&report), words);
        let spec = BuildSpec { timeout_ms: 90_000, ..BuildSpec::default() };
        assert_eq!(limit_text(Reason::Timeout, &spec), ": 1m30s");
        assert_eq!(limit_text(Reason::Silence, &spec) + &limit_text(Reason::Exit, &spec), "");
        let oom = Outcome { memory_kill: MemoryKill::Counted, ..outcome(End::Exited(137), None) };
        assert_eq!(reason(&oom, None), "oom");
        assert_eq!(codes(&not_started(libc::ENOENT)), (Some(127), None));
        assert_eq!(codes(&End::Signaled(9)), (None, Some(9)));
    }
}
