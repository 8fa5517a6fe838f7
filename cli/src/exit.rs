//! Exit codes: a contract with scripts. What each means is decided here and nowhere else.

use std::process::ExitCode;

use helix_model::Reason;
use helix_proto::v1;

/// What the command exits with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Code(pub(crate) u8);

impl Code {
    pub(crate) const SUCCESS: Self = Self(0);
    /// A plain error.
    pub(crate) const ERROR: Self = Self(1);
    /// The call itself is wrong.
    pub(crate) const USAGE: Self = Self(2);
    /// The build failed although its command did not.
    const NOT_THE_COMMAND: Self = Self(120);
    /// The infrastructure failed.
    const INFRASTRUCTURE: Self = Self(121);
    const CANCELLED: Self = Self(122);
    /// No such build, worker, artifact.
    pub(crate) const NOT_FOUND: Self = Self(123);
    const TIMED_OUT: Self = Self(124);
    /// No coordinator answers.
    pub(crate) const UNREACHABLE: Self = Self(125);
    /// What a shell says of a command that Ctrl-C ended.
    pub(crate) const INTERRUPTED: Self = Self(130);
    /// Out of memory looks like the kernel's SIGKILL.
    const OUT_OF_MEMORY: Self = Self(137);
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code.0)
    }
}

/// The exit code that stands for a build that has ended: of several tasks the first that failed, in the order given.
pub(crate) fn of_build(status: &v1::BuildStatus) -> Code {
    match status.state.as_str() {
        "succeeded" => return Code::SUCCESS,
        "cancelled" => return Code::CANCELLED,
        _ => {}
    }
    let failed = status.tasks.iter().find(|task| task.state == "failed");
    match failed {
        Some(task) => of_failure(&task.reason, task.exit_code, task.signal),
        None => of_failure(&status.reason, status.exit_code, status.signal),
    }
}

fn of_failure(reason: &str, exit_code: Option<i32>, signal: Option<i32>) -> Code {
    let Ok(reason) = reason.parse::<Reason>() else { return Code::ERROR };
    match reason {
        Reason::Exit => Code(exit_code.and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0).unwrap_or(1)),
        Reason::Signal => Code(signal.and_then(|number| u8::try_from(128 + number).ok()).unwrap_or(1)),
        Reason::Oom => Code::OUT_OF_MEMORY,
        Reason::Timeout | Reason::Silence => Code::TIMED_OUT,
        Reason::Cancelled => Code::CANCELLED,
        Reason::NoCommand
        | Reason::ArtifactMissing
        | Reason::Artifact
        | Reason::Source
        | Reason::Push
        | Reason::DiskFull
        | Reason::Policy => Code::NOT_THE_COMMAND,
        Reason::ImagePull | Reason::WorkerLost | Reason::Drained | Reason::Internal => Code::INFRASTRUCTURE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(reason: &str, exit_code: Option<i32>, signal: Option<i32>) -> u8 {
        let task =
            v1::TaskStatus { state: "failed".into(), reason: reason.into(), exit_code, signal, ..Default::default() };
        of_build(&v1::BuildStatus { state: "failed".into(), tasks: vec![task], ..Default::default() }).0
    }

    #[test]
    fn every_reason_has_the_code_that_scripts_expect() {
        assert_eq!(failed("exit", Some(7), None), 7);
        assert_eq!(failed("signal", None, Some(9)), 137);
        assert_eq!(failed("oom", None, Some(9)), 137);
        for reason in ["artifact_missing", "artifact", "source", "push", "disk_full", "policy", "no_command"] {
            assert_eq!(failed(reason, Some(0), None), 120, "{reason}");
        }
        for reason in ["image_pull", "worker_lost", "drained", "internal"] {
            assert_eq!(failed(reason, None, None), 121, "{reason}");
        }
        assert_eq!(failed("timeout", None, Some(15)), 124);
        assert_eq!(failed("silence", None, Some(15)), 124);
        let ended = |state: &str| of_build(&v1::BuildStatus { state: state.into(), ..Default::default() }).0;
        assert_eq!((ended("succeeded"), ended("cancelled")), (0, 122));
    }

    #[test]
    fn the_first_failed_task_counts() {
        let task = |state: &str, code| v1::TaskStatus {
            state: state.into(),
            reason: "exit".into(),
            exit_code: Some(code),
            ..Default::default()
        };
        let tasks = vec![task("succeeded", 0), task("failed", 3), task("failed", 4)];
        assert_eq!(of_build(&v1::BuildStatus { state: "failed".into(), tasks, ..Default::default() }).0, 3);
    }
}
