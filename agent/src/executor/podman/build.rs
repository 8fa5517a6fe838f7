//! The command of a build, and the names of what it makes.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use helix_agent_core::Assignment;
use helix_model::{AttemptKey, BuildId};
use helix_runner::{AttemptDir, Order, Privileges};
use sha2::{Digest as _, Sha256};

use super::guard::refusal_file;
use super::{Cgroups, Facts, Podman, platform_suffix};
use crate::attempt::workdir::Workdir;

/// The longest tag.
const TAG_BYTES_MAX: usize = 128;

/// What an order needs to know of its attempt.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Where the source lies.
    pub workdir: &'a Workdir,
    /// The spool.
    pub dir: &'a AttemptDir,
    /// The cluster's name.
    pub cluster: &'a str,
    /// How podman works here.
    pub facts: &'a Facts,
}

/// What precedes the context in every order: options end here.
const AFTER_OPTIONS: usize = 2;

/// Gives a build more options, such as secrets that were laid out for it.
pub fn add_options(order: &mut Order, options: Vec<OsString>) {
    let at = order.argv.len().saturating_sub(AFTER_OPTIONS);
    order.argv.splice(at..at, options);
}

/// Where podman writes the id of what it built.
#[must_use]
pub fn id_file(dir: &AttemptDir) -> PathBuf {
    dir.root().join("image-id")
}

impl Podman {
    /// Makes an order for podman out of one for a command: limits and log stay, what runs is replaced.
    #[must_use]
    pub fn order(&self, order: Order, assignment: &Assignment, dockerfile: &Path, place: Place<'_>) -> Order {
        let mut environment = self.environment(&place.workdir.tmp());
        // By these a sweep recognises the processes of a runner that died.
        environment.push(("HELIX_BUILD_ID".into(), assignment.key.build.as_str().into()));
        environment.push(("HELIX_ATTEMPT".into(), assignment.key.attempt.to_string().into()));
        let tmp = place.workdir.tmp();
        let refusal = refusal_file(place.dir);
        environment.push(self.guard_variable(&place.facts.runtime, &place.workdir.work(), &tmp, refusal));
        Order {
            argv: self.argv(assignment, dockerfile, place),
            environment,
            workdir: place.workdir.work(),
            // Rootless podman needs newuidmap.
            privileges: Privileges::MayGain,
            // podman makes its own, and the store is the agent's.
            isolation: None,
            user: None,
            ..order
        }
    }

    fn argv(&self, assignment: &Assignment, dockerfile: &Path, place: Place<'_>) -> Vec<OsString> {
        let (config, spec, key) = (&self.config.podman, &assignment.spec, &assignment.key);
        // The lock lives as long as the build, whatever becomes of the agent.
        let mut argv: Vec<OsString> = ["flock", "--shared", "--no-fork"].map(OsString::from).to_vec();
        argv.push(self.lock_path().into());
        argv.extend(self.base());
        argv.push("build".into());
        let mut option = |name: &str, value: OsString| {
            let mut argument = OsString::from(name);
            argument.push("=");
            argument.push(value);
            argv.push(argument);
        };
        option("--tag", local_name(assignment).into());
        option("--file", dockerfile.into());
        option("--iidfile", id_file(place.dir).into());
        option("--layers", config.layers.to_string().into());
        option("--tls-verify", config.tls_verify.to_string().into());
        for (name, value) in &spec.build_args {
            option("--build-arg", format!("{name}={value}").into());
        }
        for (name, value) in &spec.env {
            option("--env", format!("{name}={value}").into());
        }
        if !spec.target.is_empty() {
            option("--target", spec.target.clone().into());
        }
        if let Some(platform) = &assignment.platform {
            option("--platform", platform.as_str().into());
        }
        for (name, value) in [
            ("helix.cluster", place.cluster.to_owned()),
            ("helix.build", key.build.to_string()),
            // With build and task in it.
            ("helix.attempt", key.to_string()),
        ] {
            option("--label", format!("{name}={value}").into());
        }
        for (name, value) in
            [("--cache-from", &config.cache_from), ("--cache-to", &config.cache_to), ("--network", &config.network)]
        {
            if !value.is_empty() {
                option(name, value.into());
            }
        }
        // The runtime's state goes with the workdir, however the build ends. Whoever can write there has the host: it is in no
        // directory of which a step may see anything.
        option(
            "--runtime-flag",
            OsString::from_iter(["root=".into(), place.workdir.root().join("runtime").into_os_string()]),
        );
        // Not the runtime itself: see `guard`.
        option("--runtime", self.config.runner_path.clone().into());
        option("--signature-policy", self.image_policy().into());
        // Whose its containers are, a sweep finds in podman's notes: by their cgroup, else by a secret that holds nothing.
        match place.facts.cgroups {
            Cgroups::OfAttempt => option("--cgroup-parent", self.cgroup_of(key).into()),
            Cgroups::OfRuntime => option("--secret", self.mark_of(key).into()),
        }
        argv.extend(config.build_arguments.iter().map(OsString::from));
        argv.push("--".into());
        argv.push(place.workdir.work().into());
        argv
    }
}

/// The tag that is reported: `helix-build/<id>:<ref or latest>`, made legal.
#[must_use]
pub fn image_tag(assignment: &Assignment) -> String {
    let git_ref = &assignment.spec.git_ref;
    format!("helix-build/{}:{}", repository(&assignment.key.build), tag(git_ref))
}

/// The name in this host's store: tasks of one build must not take each other's.
#[must_use]
pub fn local_name(assignment: &Assignment) -> String {
    let tag = image_tag(assignment);
    match &assignment.platform {
        Some(platform) if assignment.spec.task_count() > 1 => {
            let suffix = platform_suffix(platform);
            let (name, tag) = tag.split_once(':').unwrap_or((&tag, "latest"));
            let room = TAG_BYTES_MAX.saturating_sub(suffix.len() + 1).min(tag.len());
            format!("{name}:{}-{suffix}", &tag[..room])
        }
        _ => tag,
    }
}

/// What names of lists begin with in podman's store.
pub const LISTS: &str = "localhost/helix-index/";

/// The name that the list of a build's images has in this host's store while an attempt pushes it.
#[must_use]
pub fn list_name(key: &AttemptKey) -> String {
    format!("{LISTS}{}:{}.{}", repository(&key.build), key.task, key.attempt)
}

/// A build's id as part of an image's name, where separators stand alone and never at the end.
fn repository(id: &BuildId) -> String {
    let text = id.as_str();
    let separator = |byte: &u8| !byte.is_ascii_alphanumeric();
    let doubled = text.as_bytes().windows(2).any(|pair| separator(&pair[0]) && separator(&pair[1]));
    if !doubled && !text.as_bytes().last().is_some_and(separator) {
        return text.to_owned();
    }
    let words: Vec<&str> = text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).collect();
    // Another id may read the same without its separators.
    let digest = Sha256::digest(text.as_bytes());
    let hash: String = digest[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{hash}", words.join("-"))
}

/// A ref as a tag: `[A-Za-z0-9_][A-Za-z0-9._-]{0,127}`.
fn tag(git_ref: &str) -> String {
    if git_ref.is_empty() {
        return "latest".to_owned();
    }
    let legal = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let mut tag: String = git_ref.chars().map(legal).take(TAG_BYTES_MAX).collect();
    if tag.starts_with(['.', '-']) {
        tag.replace_range(..1, "_");
    }
    tag
}

/// Where one task of several pushes its image: the tag with the platform behind it. `None` where there is no tag to put
/// it behind.
#[must_use]
pub fn platform_reference(reference: &str, suffix: &str) -> Option<String> {
    let (name, tag) = split_reference(reference)?;
    let room = TAG_BYTES_MAX.saturating_sub(suffix.len() + 1).min(tag.len());
    Some(format!("{name}:{}-{suffix}", tag.get(..room)?))
}

/// A reference's repository and tag, `latest` where it has none; `None` for one with a digest.
#[must_use]
pub fn split_reference(reference: &str) -> Option<(&str, &str)> {
    if reference.contains('@') {
        return None;
    }
    match reference.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => Some((name, tag)),
        _ => Some((reference, "latest")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use helix_model::{BuildSpec, Executor, Platform};
    use std::collections::BTreeMap;

    fn assignment(id: &str, git_ref: &str) -> Assignment {
        let spec = BuildSpec {
            repo_url: "https://h/p".to_owned(),
            git_ref: git_ref.to_owned(),
            executor: Some(Executor::Podman),
            build_args: BTreeMap::from([("A".to_owned(), "--privileged".to_owned())]),
            env: BTreeMap::from([("E".to_owned(), "x".to_owned())]),
            target: "final".to_owned(),
            ..BuildSpec::default()
        };
        let key = format!("{id}.0.1").parse().unwrap();
        Assignment { key, spec, commit: None, platform: None, previous: String::new() }
    }

    #[test]
    fn names_are_legal() {
        for (id, git_ref, expected) in [
            ("b1", "", "helix-build/b1:latest"),
            ("b1", "main", "helix-build/b1:main"),
            ("a.b-c", "feature/x+y", "helix-build/a.b-c:feature-x-y"),
            ("b", "-x", "helix-build/b:_x"),
        ] {
            assert_eq!(image_tag(&assignment(id, git_ref)), expected);
        }
        let odd = image_tag(&assignment("a..b-", &"r".repeat(200)));
        assert!(odd.starts_with("helix-build/a-b-") && odd.split_once(':').unwrap().1.len() == 128, "{odd}");
        assert_ne!(odd, image_tag(&assignment("a-.b-", &"r".repeat(200))));
        let mut several = assignment("b", "main");
        let platform = |text| Platform::new(text).unwrap();
        several.platform = Some(platform("linux/arm64/v8"));
        assert_eq!(local_name(&several), "helix-build/b:main");
        several.spec.platforms = vec![platform("linux/amd64"), platform("linux/arm64/v8")];
        assert_eq!(local_name(&several), "helix-build/b:main-linux-arm64-v8");
        assert_eq!(list_name(&several.key), "localhost/helix-index/b:0.1");
    }

    #[test]
    fn references_are_taken_apart() {
        for (reference, expected) in [
            ("h:5000/a/b:1", Some("h:5000/a/b:1-linux-amd64")),
            ("h:5000/a/b", Some("h:5000/a/b:latest-linux-amd64")),
            ("h/a@sha256:00", None),
        ] {
            assert_eq!(platform_reference(reference, "linux-amd64").as_deref(), expected);
        }
    }

    #[test]
    fn what_a_build_says_is_a_value_and_never_an_option() {
        let data = tempfile::tempdir().unwrap();
        let mut config = crate::testing::config(data.path());
        config.podman.root = data.path().join("storage");
        config.podman.runroot = data.path().join("run");
        config.podman.build_arguments = vec!["--squash".to_owned()];
        let podman = Podman::new(&config, None, "helix-x-").unwrap();
        let assignment = assignment("b", "main");
        let workdir = Workdir::new(Path::new("/base"), &assignment.key);
        let dir = AttemptDir::new("/spool");
        let (version, driver) = (String::new(), String::new());
        let facts = Facts { version, driver, runtime: "runc".to_owned(), cgroups: Cgroups::OfAttempt };
        let place = Place { workdir: &workdir, dir: &dir, cluster: "c", facts: &facts };
        let argv: Vec<String> = podman
            .argv(&assignment, Path::new("/base/b.0.1/work/Dockerfile"), place)
            .iter()
            .map(|argument| argument.to_str().unwrap().to_owned())
            .collect();
        assert_eq!(argv[..3], ["flock", "--shared", "--no-fork"]);
        let build = argv.iter().position(|argument| argument == "build").unwrap();
        let expected = [
            "--tag=helix-build/b:main",
            "--file=/base/b.0.1/work/Dockerfile",
            "--iidfile=/spool/image-id",
            "--layers=true",
            "--tls-verify=true",
            "--build-arg=A=--privileged",
            "--env=E=x",
            "--target=final",
            "--label=helix.cluster=c",
            "--label=helix.build=b",
            "--label=helix.attempt=b.0.1",
            "--runtime-flag=root=/base/b.0.1/runtime",
            &format!("--runtime={}", config.runner_path.display()),
            &format!("--signature-policy={}", data.path().join("podman/policy.json").display()),
            "--cgroup-parent=/helix-x-b.0.1/build",
            "--squash",
            "--",
            "/base/b.0.1/work",
        ];
        assert_eq!(argv[build + 1..], expected);
    }
}
