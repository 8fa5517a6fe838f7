//! What a build's command sees in its environment: exactly this, and nothing of the agent's own.

use std::collections::BTreeMap;
use std::ffi::OsString;

use helix_agent_core::Assignment;
use helix_model::Outputs;

use super::workdir::Workdir;
use crate::config::Config;
use crate::source::git::Resolved;

/// A build's variables, each name once. What comes later in the contract wins, but nothing wins over `HELIX_*`.
#[must_use]
pub fn environment(
    config: &Config,
    assignment: &Assignment,
    workdir: &Workdir,
    commit: Option<&Resolved>,
) -> Vec<(OsString, OsString)> {
    let spec = &assignment.spec;
    let mut variables: BTreeMap<String, OsString> = BTreeMap::new();
    let mut put = |name: &str, value: OsString| {
        variables.insert(name.to_owned(), value);
    };
    put("PATH", config.exec.path.clone().into());
    put("HOME", workdir.home().into());
    put("TMPDIR", workdir.tmp().into());
    put("LANG", "C.UTF-8".into());
    put("CI", "true".into());
    if let Some(commit) = commit {
        put("SOURCE_DATE_EPOCH", commit.time_s.to_string().into());
    }
    for (name, value) in config.exec.env.iter().chain(&spec.build_args).chain(&spec.env) {
        put(name, value.into());
    }
    put("HELIX", "true".into());
    put("HELIX_BUILD_ID", assignment.key.build.as_str().into());
    put("HELIX_ATTEMPT", assignment.key.attempt.to_string().into());
    put("HELIX_REF", spec.git_ref.clone().into());
    put("HELIX_REPO_URL", spec.repo_url.clone().into());
    if let Some(commit) = commit {
        put("HELIX_COMMIT", commit.commit.clone().into());
    }
    put("HELIX_WORKDIR", workdir.work().into());
    put("HELIX_OUTPUT", workdir.work().join(first_output(config, &spec.outputs)).into());
    put("HELIX_WORKER", config.name.clone().into());
    let platform = assignment
        .platform
        .as_ref()
        .map_or_else(|| config.platforms.first().cloned().unwrap_or_default(), |platform| platform.as_str().to_owned());
    put("HELIX_PLATFORM", platform.into());
    variables.into_iter().map(|(name, value)| (name.into(), value)).collect()
}

/// Where the result is expected, relative to the workdir.
fn first_output<'a>(config: &'a Config, outputs: &'a Outputs) -> &'a str {
    match outputs {
        Outputs::Named(paths) => paths.first().map_or(&config.exec.output_name, |path| path),
        Outputs::Default | Outputs::None => &config.exec.output_name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use helix_model::{BuildSpec, Platform};
    use std::path::Path;

    #[test]
    fn the_contract() {
        let config = crate::testing::config(Path::new("/data"));
        let mut config = Config { name: "w1".to_owned(), ..config };
        config.exec.env = BTreeMap::from([("A".to_owned(), "agent".to_owned()), ("B".to_owned(), "agent".to_owned())]);
        let spec = BuildSpec {
            repo_url: "https://h/p".to_owned(),
            git_ref: "main".to_owned(),
            build_args: BTreeMap::from([("B".to_owned(), "arg".to_owned()), ("CI".to_owned(), "arg".to_owned())]),
            env: BTreeMap::from([("C".to_owned(), "env".to_owned()), ("HELIX_REF".to_owned(), "forged".to_owned())]),
            outputs: Outputs::Named(vec!["out/x".to_owned()]),
            ..BuildSpec::default()
        };
        let assignment = Assignment {
            key: "b.0.3".parse().unwrap(),
            spec,
            commit: None,
            platform: Some(Platform::new("linux/arm64").unwrap()),
            previous: String::new(),
        };
        let workdir = Workdir::new(Path::new("/base"), &assignment.key);
        let commit = Resolved { commit: "c0ffee".to_owned(), time_s: 77 };
        let variables = environment(&config, &assignment, &workdir, Some(&commit));
        let text: Vec<String> =
            variables.iter().map(|(name, value)| format!("{}={}", name.display(), value.display())).collect();
        let expected = [
            "A=agent",
            "B=arg",
            "C=env",
            "CI=arg",
            "HELIX=true",
            "HELIX_ATTEMPT=3",
            "HELIX_BUILD_ID=b",
            "HELIX_COMMIT=c0ffee",
            "HELIX_OUTPUT=/base/b.0.3/work/out/x",
            "HELIX_PLATFORM=linux/arm64",
            "HELIX_REF=main",
            "HELIX_REPO_URL=https://h/p",
            "HELIX_WORKDIR=/base/b.0.3/work",
            "HELIX_WORKER=w1",
            "HOME=/base/b.0.3/home",
            "LANG=C.UTF-8",
            &format!("PATH={}", config.exec.path),
            "SOURCE_DATE_EPOCH=77",
            "TMPDIR=/base/b.0.3/tmp",
        ];
        assert_eq!(text, expected);
    }
}
