//! What the owner of this host allows to be built on it, whatever a coordinator assigns: repositories, push targets,
//! executors, platforms, and who gets which secret; and for how long builds go on that no coordinator can reach. Whether builds
//! bring commands is `exec.allow_job_commands`.
//!
//! A pattern is text in which `*` stands for anything, but in a scheme, host or registry for nothing that would lead to
//! another: no `/` and no `@`. Invariant: what cannot be read without doubt matches no pattern but `*` alone.

use helix_agent_core::Assignment;
use helix_model::{Executor, Platform, Reason};
use serde::{Deserialize, Serialize};

use crate::config::{Config, ConfigWrong};

/// The pattern that allows everything.
pub const ANY: &str = "*";

/// As long as a build may take that names no limit, where the cluster's policy does not say otherwise: while the cluster is away, nothing is
/// lost that would not have run into its own limit, and nothing goes on for ever that nobody can stop.
const STOP_CUT_OFF_AFTER_MS: u64 = 24 * 3_600_000;

/// Longer than a change of leaders leaves an agent without one, or that would stop builds. With the slowest disks an election waits up to
/// 3.75 s, and may be held twice; of the coordinators that are then asked one may be off, which costs the 5 s that dialling may take; and
/// between two tries lie up to 2 s. It is also the lease by default: until that is over, nothing that runs here runs elsewhere.
const STOP_CUT_OFF_AFTER_MS_MIN: u64 = 15_000;

/// See [`Config::policy`]. Each list allows what it names; an empty one allows nothing.
#[derive(Clone, PartialEq, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyConfig {
    /// Patterns of repository URLs. What has no repository is allowed by `*` alone.
    pub repositories: Vec<String>,
    /// Patterns of image references that builds may push to.
    pub push: Vec<String>,
    /// `exec`, `podman`.
    pub executors: Vec<String>,
    /// Platforms, or `*`.
    pub platforms: Vec<String>,
    /// How long the agent may have no session with any leader before it stops all builds, at least 15 s; 0: for ever.
    pub stop_cut_off_after_ms: u64,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        let any = || vec![ANY.to_owned()];
        let executors = [Executor::Exec, Executor::Podman].map(|executor| executor.as_str().to_owned()).to_vec();
        Self {
            repositories: any(),
            push: any(),
            executors,
            platforms: any(),
            stop_cut_off_after_ms: STOP_CUT_OFF_AFTER_MS,
        }
    }
}

impl PolicyConfig {
    /// Checks that every entry can mean something.
    ///
    /// # Errors
    /// The key with the first that cannot.
    pub fn check(&self) -> Result<(), ConfigWrong> {
        check_repositories("policy.repositories", &self.repositories)?;
        for pattern in &self.push {
            if pattern != ANY && (pattern.contains("://") || !pattern.contains('/') || has_spaces(pattern)) {
                let why = format!("{pattern:?} is not REGISTRY/PATH, such as registry.example.com/team/*, nor *");
                return Err(ConfigWrong { key: "policy.push", why });
            }
        }
        for executor in &self.executors {
            if ![Executor::Exec, Executor::Podman].iter().any(|known| known.as_str() == executor) {
                let why = format!("{executor:?} is neither exec nor podman");
                return Err(ConfigWrong { key: "policy.executors", why });
            }
        }
        for platform in self.platforms.iter().filter(|platform| *platform != ANY) {
            let checked = Platform::new(platform);
            checked.map_err(|invalid| ConfigWrong { key: "policy.platforms", why: invalid.why })?;
        }
        if (1..STOP_CUT_OFF_AFTER_MS_MIN).contains(&self.stop_cut_off_after_ms) {
            let why = format!(
                "{} would stop builds at a mere change of leaders, which an agent may take seconds to get over: \
                 at least {STOP_CUT_OFF_AFTER_MS_MIN}, or 0 for never",
                self.stop_cut_off_after_ms
            );
            return Err(ConfigWrong { key: "policy.stop_cut_off_after_ms", why });
        }
        Ok(())
    }

    /// Whether an executor may be used.
    #[must_use]
    pub fn allows_executor(&self, executor: &str) -> bool {
        self.executors.iter().any(|allowed| allowed == executor)
    }

    /// Whether a platform may be built for.
    #[must_use]
    pub fn allows_platform(&self, platform: &str) -> bool {
        self.platforms.iter().any(|allowed| allowed == ANY || allowed == platform)
    }
}

/// Checks patterns of repositories.
///
/// # Errors
/// The key with the first pattern that could never match, or would match more than it seems to.
pub fn check_repositories(key: &'static str, patterns: &[String]) -> Result<(), ConfigWrong> {
    for pattern in patterns.iter().filter(|pattern| *pattern != ANY) {
        let whole = Url::split(pattern).is_some_and(|url| !url.path.is_empty());
        if !whole || has_spaces(pattern) {
            let why = format!(
                "{pattern:?} is not a URL with a path, such as https://example.com/team/* or git@example.com:team/*, nor *"
            );
            return Err(ConfigWrong { key, why });
        }
    }
    Ok(())
}

fn has_spaces(text: &str) -> bool {
    text.is_empty() || text.contains(|c: char| c.is_whitespace() || c.is_control())
}

/// Checks an assignment against the policy.
///
/// # Errors
/// Why it is refused, naming the key that does.
pub fn check(config: &Config, assignment: &Assignment) -> Result<(), (Reason, String)> {
    let (policy, spec) = (&config.policy, &assignment.spec);
    let refuse = |message: String| Err((Reason::Policy, message));
    let executor = spec.executor.unwrap_or(Executor::Exec).as_str();
    if !policy.allows_executor(executor) {
        return refuse(format!("this agent runs no {executor} builds (policy.executors)"));
    }
    if !allows_repository(&policy.repositories, &spec.repo_url) {
        return refuse(match spec.repo_url.as_str() {
            "" => "this agent builds nothing but certain repositories (policy.repositories)".to_owned(),
            url => format!("this agent does not build {url} (policy.repositories)"),
        });
    }
    if !spec.push.is_empty() && !policy.push.iter().any(|pattern| matches_reference(pattern, &spec.push)) {
        return refuse(format!("this agent does not push to {} (policy.push)", spec.push));
    }
    if let Some(platform) = assignment.platform.as_ref().filter(|platform| !policy.allows_platform(platform.as_str())) {
        return refuse(format!("this agent does not build for {platform} (policy.platforms)"));
    }
    for name in &spec.secrets {
        let Some(secret) = config.secrets.get(name) else {
            return refuse(format!("the secret {name:?} is not configured on this agent (secrets.{name})"));
        };
        if !allows_repository(&secret.repositories, &spec.repo_url) {
            return refuse(format!("the secret {name:?} is not for this repository (secrets.{name}.repositories)"));
        }
    }
    Ok(())
}

/// Whether one of the patterns allows a repository; an empty URL stands for a build without one.
#[must_use]
pub fn allows_repository(patterns: &[String], url: &str) -> bool {
    patterns.iter().any(|pattern| pattern == ANY || (!url.is_empty() && matches_url(pattern, url)))
}

/// A URL in two parts: who is asked, and for what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Url<'a> {
    /// Scheme and authority, or `user@host` of a path that ssh is asked for.
    authority: &'a str,
    /// Everything behind.
    path: &'a str,
}

impl<'a> Url<'a> {
    fn split(text: &'a str) -> Option<Self> {
        if let Some(scheme) = text.find("://") {
            let rest = &text[scheme + 3..];
            let end = rest.find(['/', '?', '#']).map_or(text.len(), |end| scheme + 3 + end);
            return Some(Self { authority: &text[..end], path: &text[end..] });
        }
        // As git takes it: what stands before the first colon is a host, unless a slash comes first.
        let colon = text.find(':').filter(|colon| !text[..*colon].contains('/') && *colon > 0)?;
        Some(Self { authority: &text[..=colon], path: &text[colon + 1..] })
    }

    /// Whether a server may take the path for another one than it reads.
    fn is_doubtful(&self) -> bool {
        let lower = self.path.to_ascii_lowercase();
        lower.split('/').any(|part| matches!(part, "." | ".."))
            || ["%2e", "%2f", "%5c", "%00"].iter().any(|escape| lower.contains(escape))
            || lower.contains(['\\', '?', '#'])
    }
}

fn matches_url(pattern: &str, url: &str) -> bool {
    let (Some(pattern), Some(url)) = (Url::split(pattern), Url::split(url)) else { return false };
    if url.is_doubtful() {
        return false;
    }
    let (allowed, asked) = (pattern.authority.to_ascii_lowercase(), url.authority.to_ascii_lowercase());
    let bare = |path: &'_ str| path.trim_end_matches('/').trim_end_matches(".git").to_owned();
    glob(&allowed, &asked, &['/', '@'])
        && (glob(pattern.path, url.path, &[]) || glob(&bare(pattern.path), &bare(url.path), &[]))
}

/// The registry of a reference is what stands before its first slash.
fn matches_reference(pattern: &str, reference: &str) -> bool {
    if pattern == ANY {
        return true;
    }
    match (pattern.split_once('/'), reference.split_once('/')) {
        (Some((registry, path)), Some((asked, name))) => {
            let doubtful = name.split('/').any(|part| matches!(part, "" | "." | ".."));
            !doubtful
                && glob(&registry.to_ascii_lowercase(), &asked.to_ascii_lowercase(), &['@'])
                && glob(path, name, &[])
        }
        _ => false,
    }
}

/// Whether a text is as the pattern says, where `*` stands for any characters but these.
fn glob(pattern: &str, text: &str, stops: &[char]) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut at, mut read) = (0, 0);
    // Where the last star stands, and up to where it reaches.
    let mut star: Option<(usize, usize)> = None;
    while read < text.len() {
        if pattern.get(at) == Some(&'*') {
            star = Some((at, read));
            at += 1;
        } else if pattern.get(at) == Some(&text[read]) {
            at += 1;
            read += 1;
        } else {
            match star {
                Some((place, reach)) if !stops.contains(&text[reach]) => {
                    star = Some((place, reach + 1));
                    (at, read) = (place + 1, reach + 1);
                }
                _ => return false,
            }
        }
    }
    pattern[at..].iter().all(|left| *left == '*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secrets::SecretConfig;
    use helix_model::BuildSpec;
    use std::collections::BTreeSet;
    use std::path::Path;

    #[test]
    fn repositories_are_matched_by_who_is_asked_and_for_what() {
        let table = [
            ("https://example.com/team/*", "https://example.com/team/app", true),
            ("https://example.com/team/*", "https://EXAMPLE.com/team/group/app.git", true),
            ("https://example.com/team/app", "https://example.com/team/app.git/", true),
            ("https://example.com/team/app.git", "https://example.com/team/app", true),
            ("https://*.example.com/*", "https://git.example.com/x", true),
            ("git@example.com:team/*", "git@example.com:team/app", true),
            ("ssh://git@example.com/team/*", "ssh://git@example.com/team/app", true),
            ("file:///srv/git/*", "file:///srv/git/app", true),
            ("https://example.com/team/*", "https://example.com/teams/app", false),
            ("https://example.com/team/*", "https://example.com/team/../other/app", false),
            ("https://example.com/team/*", "https://example.com/team/%2E%2e/other", false),
            ("https://example.com/team/*", "https://example.com/team/x\\..\\y", false),
            ("https://example.com/team/*", "https://example.com/team/x?service=/other", false),
            ("https://example.com/team/*", "https://example.com.evil.org/team/app", false),
            ("https://example.com/team/*", "https://example.com@evil.org/team/app", false),
            ("https://example.com/team/*", "http://example.com/team/app", false),
            ("https://*.example.com/*", "https://evil.org/.example.com/x", false),
            ("https://*.example.com/*", "https://evil.org?.example.com/x", false),
            ("https://*example.com/*", "https://x@evil.example.com/x", false),
            ("git@example.com:team/*", "https://git@example.com:team/app", false),
            ("git@example.com:team/*", "evil@example.com:team/app", false),
        ];
        for (pattern, url, expected) in table {
            assert_eq!(allows_repository(&[pattern.to_owned()], url), expected, "{pattern} {url}");
        }
        assert!(allows_repository(&["*".to_owned()], "") && allows_repository(&["*".to_owned()], "file:///x/../y"));
        assert!(!allows_repository(&["https://h/*".to_owned()], "") && !allows_repository(&[], "https://h/p"));
    }

    #[test]
    fn push_targets_are_matched_by_registry_and_name() {
        let table = [
            ("registry.example.com:5000/team/*", "registry.example.com:5000/team/app:v1", true),
            ("*/app", "anywhere.org/app", true),
            ("registry.example.com/team/*", "registry.example.com.evil.org/team/app", false),
            ("registry.example.com/team/*", "evil.org/registry.example.com/team/app", false),
            ("registry.example.com/team/*", "registry.example.com/team/../other", false),
            ("registry.example.com/team/*", "app", false),
        ];
        for (pattern, reference, expected) in table {
            assert_eq!(matches_reference(pattern, reference), expected, "{pattern} {reference}");
        }
    }

    #[test]
    fn patterns_and_limits_that_mean_nothing_are_refused() {
        let with = |change: &dyn Fn(&mut PolicyConfig)| {
            let mut policy = PolicyConfig::default();
            change(&mut policy);
            policy.check().err().map_or("", |wrong| wrong.key)
        };
        assert_eq!(with(&|_| {}), "");
        for pattern in ["", "example.com/team/*", "https://example.com", "https://h/a b", "team"] {
            assert_eq!(
                with(&|policy| policy.repositories.push(pattern.to_owned())),
                "policy.repositories",
                "{pattern}"
            );
        }
        for pattern in ["", "app", "https://registry/app", "r/a b"] {
            assert_eq!(with(&|policy| policy.push.push(pattern.to_owned())), "policy.push", "{pattern}");
        }
        assert_eq!(with(&|policy| policy.executors.push("docker".to_owned())), "policy.executors");
        assert_eq!(with(&|policy| policy.platforms.push("Linux".to_owned())), "policy.platforms");
        let key = "policy.stop_cut_off_after_ms";
        for (ms, wrong) in [(0, ""), (1, key), (14_999, key), (15_000, ""), (u64::MAX, "")] {
            assert_eq!(with(&|policy| policy.stop_cut_off_after_ms = ms), wrong, "{ms}");
        }
    }

    #[test]
    fn a_refusal_names_its_key() {
        let base = crate::testing::config(Path::new("/data"));
        let refused = |change: &dyn Fn(&mut Config), spec: BuildSpec| {
            let mut config = base.clone();
            change(&mut config);
            let (key, previous) = ("b.0.1".parse().unwrap(), String::new());
            let platform = Some(Platform::new("linux/amd64").unwrap());
            let assignment = Assignment { key, spec, commit: None, platform, previous };
            check(&config, &assignment).map_err(|(reason, message)| {
                assert_eq!(reason, Reason::Policy);
                message.rsplit_once('(').unwrap().1.trim_end_matches(')').to_owned()
            })
        };
        let spec = || BuildSpec {
            repo_url: "https://example.com/team/app".to_owned(),
            push: "registry.example.com/app".to_owned(),
            secrets: BTreeSet::from(["token".to_owned()]),
            ..BuildSpec::default()
        };
        let secret = |repositories: &[&str]| SecretConfig {
            environment: Some("TOKEN".to_owned()),
            repositories: repositories.iter().map(|&pattern| pattern.to_owned()).collect(),
            ..SecretConfig::default()
        };
        let give = |config: &mut Config, repositories: &[&str]| {
            config.secrets.insert("token".to_owned(), secret(repositories));
        };
        let team = "https://example.com/team/*";
        assert_eq!(refused(&|config| give(config, &[team]), spec()), Ok(()));
        let key = |change: &dyn Fn(&mut Config)| refused(change, spec()).unwrap_err();
        assert_eq!(key(&|_| {}), "secrets.token");
        assert_eq!(key(&|config| give(config, &["https://example.com/other/*"])), "secrets.token.repositories");
        assert_eq!(key(&|config| config.policy.repositories.clear()), "policy.repositories");
        assert_eq!(key(&|config| config.policy.push = vec!["other.org/*".to_owned()]), "policy.push");
        assert_eq!(key(&|config| config.policy.executors = vec!["podman".to_owned()]), "policy.executors");
        assert_eq!(key(&|config| config.policy.platforms = vec!["linux/arm64".to_owned()]), "policy.platforms");
        // What has no repository gets no secret of one, and is built only where all is.
        let none = || BuildSpec { repo_url: String::new(), push: String::new(), ..spec() };
        assert_eq!(refused(&|config| give(config, &[team]), none()).unwrap_err(), "secrets.token.repositories");
        let only_team = |config: &mut Config| config.policy.repositories = vec![team.to_owned()];
        assert_eq!(refused(&only_team, none()).unwrap_err(), "policy.repositories");
    }
}
