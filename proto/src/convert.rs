//! Specs, attempt keys and blobs between the wire and the domain.

use helix_model::{
    AttemptKey, AttemptNumber, BuildId, BuildSpec, Command, Digest, Executor, InvalidField, OnWorkerLoss, Outputs,
    Platform, Resources, Source, TaskIndex,
};

use crate::{agent, v1};

/// A spec as the wire carries it.
#[must_use]
pub fn spec_to_wire(spec: &BuildSpec) -> v1::BuildSpec {
    v1::BuildSpec {
        repo_url: spec.repo_url.clone(),
        r#ref: spec.git_ref.clone(),
        dockerfile_path: spec.dockerfile_path.clone(),
        build_args: spec.build_args.clone(),
        details: Some(details_to_wire(spec)),
    }
}

fn details_to_wire(spec: &BuildSpec) -> v1::SpecDetails {
    let (outputs, no_output) = match &spec.outputs {
        Outputs::Default => (Vec::new(), false),
        Outputs::Named(paths) => (paths.clone(), false),
        Outputs::None => (Vec::new(), true),
    };
    v1::SpecDetails {
        executor: spec.executor.map_or_else(String::new, |executor| executor.as_str().to_owned()),
        target: spec.target.clone(),
        platforms: spec.platforms.iter().map(|platform| platform.as_str().to_owned()).collect(),
        source: spec.source.map(|source| v1::SourceBlob { sha256: source.digest.0.to_vec().into(), size: source.size }),
        outputs,
        no_output,
        env: spec.env.clone(),
        labels: spec.labels.clone(),
        requires: spec.requires.clone(),
        secrets: spec.secrets.iter().cloned().collect(),
        timeout_ms: spec.timeout_ms,
        silence_timeout_ms: spec.silence_timeout_ms,
        priority: spec.priority,
        cpu_milli: spec.resources.cpu_milli,
        memory_bytes: spec.resources.memory_bytes,
        disk_bytes: spec.resources.disk_bytes,
        park: spec.park,
        retries: spec.retries,
        on_worker_loss: match spec.on_worker_loss {
            OnWorkerLoss::Rerun => "rerun".to_owned(),
            OnWorkerLoss::Fail => "fail".to_owned(),
        },
        push: spec.push.clone(),
        keep_workdir_ms: spec.keep_workdir_ms,
        command: spec.command.as_ref().map(|command| match command {
            Command::Shell(line) => v1::spec_details::Command::Shell(line.clone()),
            Command::Argv(words) => v1::spec_details::Command::Argv(v1::Argv { words: words.clone() }),
        }),
    }
}

/// A spec from the wire. Its form is checked; call [`BuildSpec::validate`] for its sense.
///
/// # Errors
/// [`InvalidField`] for a platform, digest or word that is none.
pub fn spec_from_wire(wire: v1::BuildSpec) -> Result<BuildSpec, InvalidField> {
    let details = wire.details.unwrap_or_default();
    let outputs = match (details.no_output, details.outputs.is_empty()) {
        (true, true) => Outputs::None,
        (false, true) => Outputs::Default,
        (false, false) => Outputs::Named(details.outputs),
        (true, false) => return Err(InvalidField::new("outputs", "outputs are named although no_output is set")),
    };
    let on_worker_loss = match details.on_worker_loss.as_str() {
        "" | "rerun" => OnWorkerLoss::Rerun,
        "fail" => OnWorkerLoss::Fail,
        other => return Err(InvalidField::new("on_worker_loss", format!("{other:?} is neither rerun nor fail"))),
    };
    Ok(BuildSpec {
        repo_url: wire.repo_url,
        git_ref: wire.r#ref,
        source: details.source.map(source_from_wire).transpose()?,
        executor: if details.executor.is_empty() { None } else { Some(Executor::parse(&details.executor)?) },
        dockerfile_path: wire.dockerfile_path,
        target: details.target,
        build_args: wire.build_args,
        platforms: details.platforms.iter().map(|text| Platform::new(text)).collect::<Result<_, _>>()?,
        outputs,
        env: details.env,
        labels: details.labels,
        requires: details.requires,
        secrets: details.secrets.into_iter().collect(),
        timeout_ms: details.timeout_ms,
        silence_timeout_ms: details.silence_timeout_ms,
        priority: details.priority,
        resources: Resources {
            cpu_milli: details.cpu_milli,
            memory_bytes: details.memory_bytes,
            disk_bytes: details.disk_bytes,
        },
        park: details.park,
        retries: details.retries,
        on_worker_loss,
        push: details.push,
        keep_workdir_ms: details.keep_workdir_ms,
        command: details.command.map(|command| match command {
            v1::spec_details::Command::Shell(line) => Command::Shell(line),
            v1::spec_details::Command::Argv(argv) => Command::Argv(argv.words),
        }),
    })
}

fn source_from_wire(source: v1::SourceBlob) -> Result<Source, InvalidField> {
    Ok(Source { digest: Digest::from_slice(&source.sha256)?, size: source.size })
}

/// The spec of a submit.
///
/// # Errors
/// As [`spec_from_wire`].
pub fn spec_of_submit(request: v1::SubmitBuildRequest) -> Result<BuildSpec, InvalidField> {
    spec_from_wire(v1::BuildSpec {
        repo_url: request.repo_url,
        r#ref: request.r#ref,
        dockerfile_path: request.dockerfile_path,
        build_args: request.build_args,
        details: request.details,
    })
}

/// A submit of this spec, under `build_id` unless that is empty.
#[must_use]
pub fn submit_of_spec(spec: &BuildSpec, build_id: &str) -> v1::SubmitBuildRequest {
    let wire = spec_to_wire(spec);
    v1::SubmitBuildRequest {
        repo_url: wire.repo_url,
        r#ref: wire.r#ref,
        dockerfile_path: wire.dockerfile_path,
        build_args: wire.build_args,
        build_id: build_id.to_owned(),
        details: wire.details,
    }
}

/// An attempt's key as the wire carries it.
#[must_use]
pub fn attempt_to_wire(key: &AttemptKey) -> agent::AttemptId {
    agent::AttemptId { build_id: key.build.to_string(), task: u32::from(key.task.0), attempt: key.attempt.0 }
}

/// An attempt's key from the wire.
///
/// # Errors
/// [`InvalidField`] for a malformed build id or a task number no build has, and when it is missing.
pub fn attempt_from_wire(wire: Option<agent::AttemptId>) -> Result<AttemptKey, InvalidField> {
    let wire = wire.ok_or_else(|| InvalidField::new("id", "the attempt is missing"))?;
    let task =
        u16::try_from(wire.task).map_err(|_| InvalidField::new("task", format!("{} is too large", wire.task)))?;
    Ok(AttemptKey { build: BuildId::new(&wire.build_id)?, task: TaskIndex(task), attempt: AttemptNumber(wire.attempt) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn a_spec_survives_the_wire() {
        let spec = BuildSpec {
            repo_url: "https://h/p".to_owned(),
            git_ref: "main".to_owned(),
            executor: Some(Executor::Exec),
            dockerfile_path: "Dockerfile".to_owned(),
            target: "t".to_owned(),
            build_args: BTreeMap::from([("A".to_owned(), "1".to_owned())]),
            platforms: vec![Platform::new("linux/amd64").unwrap()],
            outputs: Outputs::Named(vec!["out".to_owned()]),
            env: BTreeMap::from([("B".to_owned(), "2".to_owned())]),
            labels: BTreeMap::from([("c".to_owned(), "3".to_owned())]),
            requires: BTreeMap::from([("d".to_owned(), "4".to_owned())]),
            secrets: BTreeSet::from(["s".to_owned()]),
            timeout_ms: 5,
            silence_timeout_ms: 6,
            priority: -7,
            resources: Resources { cpu_milli: 8, memory_bytes: 9, disk_bytes: 10 },
            park: true,
            retries: 11,
            on_worker_loss: OnWorkerLoss::Fail,
            push: "r/x".to_owned(),
            keep_workdir_ms: 12,
            command: Some(Command::Argv(vec!["a".to_owned(), "b".to_owned()])),
            source: Some(Source { digest: Digest([7; 32]), size: 13 }),
        };
        assert_eq!(spec_from_wire(spec_to_wire(&spec)).unwrap(), spec);
        assert_eq!(spec_of_submit(submit_of_spec(&spec, "x")).unwrap(), spec);
        let plain =
            BuildSpec { outputs: Outputs::None, command: Some(Command::Shell("x".to_owned())), ..BuildSpec::default() };
        assert_eq!(spec_from_wire(spec_to_wire(&plain)).unwrap(), plain);
    }
}
