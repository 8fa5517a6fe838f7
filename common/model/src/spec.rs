//! What a client submits, its validation, and the canonical bytes whose sha256 tells whether two specs are the same.

use std::collections::{BTreeMap, BTreeSet};

use crate::digest::Digest;
use crate::error::InvalidField;
use crate::limits::{LABEL_BYTES_MAX, MAP_ENTRIES_MAX, OUTPUTS_MAX, SPEC_BYTES_MAX, TASKS_PER_BUILD_MAX};
use crate::platform::Platform;

/// How a build is run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Executor {
    /// A command in a fresh workdir.
    Exec,
    /// A container image, built by podman.
    Podman,
}

impl Executor {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Podman => "podman",
        }
    }

    /// Reads the word.
    ///
    /// # Errors
    /// [`InvalidField`] for any other word.
    pub fn parse(text: &str) -> Result<Self, InvalidField> {
        match text {
            "exec" => Ok(Self::Exec),
            "podman" => Ok(Self::Podman),
            _ => Err(InvalidField::new("executor", format!("{text:?} is neither exec nor podman"))),
        }
    }
}

/// What an exec build runs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// A line for the agent's shell: `SHELL -c LINE`.
    Shell(String),
    /// A program and its arguments, as they are.
    Argv(Vec<String>),
}

/// An uploaded source: a blob that holds a zstd-compressed tar.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Source {
    /// The blob's sha256.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// What a build must leave behind to succeed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Outputs {
    /// The agent's `output_name`, by default `artifact.out`.
    #[default]
    Default,
    /// These paths, relative to the workdir; files or directories.
    Named(Vec<String>),
    /// Nothing: exit 0 alone is a success.
    None,
}

/// What becomes of a task whose worker is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnWorkerLoss {
    /// It runs again elsewhere, within the infrastructure retry budget.
    #[default]
    Rerun,
    /// It fails as `worker_lost`.
    Fail,
}

/// What can be asked for beside a slot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Measure {
    /// Thousandths of a CPU.
    Cpu,
    /// Bytes of memory.
    Memory,
    /// Bytes of disk.
    Disk,
}

impl Measure {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Cpu, Self::Memory, Self::Disk];

    /// The word in every output.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Disk => "disk",
        }
    }

    /// An amount of it for people: `1.5`, `4 GiB`.
    #[must_use]
    pub fn text(self, amount: u64) -> String {
        if self == Self::Cpu {
            return tenths(amount, 1_000);
        }
        let units = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        match units.into_iter().find(|(size, _)| amount >= *size) {
            Some((size, unit)) => format!("{} {unit}", tenths(amount, size)),
            None => format!("{amount} B"),
        }
    }
}

/// `amount / unit`, rounded down to a tenth, without a needless `.0`.
fn tenths(amount: u64, unit: u64) -> String {
    let (whole, tenth) = (amount / unit, (u128::from(amount % unit) * 10 / u128::from(unit)));
    if tenth == 0 { whole.to_string() } else { format!("{whole}.{tenth}") }
}

impl std::str::FromStr for Measure {
    type Err = InvalidField;

    fn from_str(text: &str) -> Result<Self, InvalidField> {
        let found = Self::ALL.into_iter().find(|measure| measure.as_str() == text);
        found.ok_or_else(|| InvalidField::new("resource", format!("{text:?} is none of cpu, memory, disk")))
    }
}

/// What an attempt needs beside its slot; 0 means nothing in particular. Of a worker, what it has; 0 means it does not say.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Resources {
    /// Thousandths of a CPU.
    pub cpu_milli: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes of disk.
    pub disk_bytes: u64,
}

impl Resources {
    /// How much of one of them.
    #[must_use]
    pub fn get(&self, measure: Measure) -> u64 {
        match measure {
            Measure::Cpu => self.cpu_milli,
            Measure::Memory => self.memory_bytes,
            Measure::Disk => self.disk_bytes,
        }
    }

    /// The same, with each amount as `amount` says.
    #[must_use]
    pub fn of(mut amount: impl FnMut(Measure) -> u64) -> Self {
        let (cpu_milli, memory_bytes) = (amount(Measure::Cpu), amount(Measure::Memory));
        Self { cpu_milli, memory_bytes, disk_bytes: amount(Measure::Disk) }
    }
}

/// A build's description. Build it, then [`BuildSpec::validate`]; nothing unvalidated goes further than the RPC layer.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BuildSpec {
    /// Repository URL; empty for none.
    pub repo_url: String,
    /// Branch, tag or commit; empty means the repository's default branch.
    pub git_ref: String,
    /// An uploaded source instead of a repository.
    pub source: Option<Source>,
    /// The executor; `None` only before defaults are applied.
    pub executor: Option<Executor>,
    /// Dockerfile, relative to the source; empty for podman's default.
    pub dockerfile_path: String,
    /// The Dockerfile's stage to build; empty for the last.
    pub target: String,
    /// Build args: podman's `--build-arg`, or environment variables of an exec build.
    pub build_args: BTreeMap<String, String>,
    /// One task each; empty means one task on any platform.
    pub platforms: Vec<Platform>,
    /// What must exist at the end.
    pub outputs: Outputs,
    /// Environment variables.
    pub env: BTreeMap<String, String>,
    /// The submitter's labels, for filters.
    pub labels: BTreeMap<String, String>,
    /// Labels a worker must carry.
    pub requires: BTreeMap<String, String>,
    /// Ids of secrets configured on the agent.
    pub secrets: BTreeSet<String>,
    /// Wall-clock limit of an attempt in milliseconds; 0 for the policy's default.
    pub timeout_ms: u64,
    /// Longest silence of an attempt in milliseconds; 0 for none.
    pub silence_timeout_ms: u64,
    /// Higher goes first.
    pub priority: i32,
    /// What it needs beside a slot.
    pub resources: Resources,
    /// Wait even if no worker could run it today.
    pub park: bool,
    /// Retries after failures that are the user's fault.
    pub retries: u32,
    /// What a lost worker means.
    pub on_worker_loss: OnWorkerLoss,
    /// Where to push the image; empty for nowhere.
    pub push: String,
    /// How long a failed workdir is kept, in milliseconds.
    pub keep_workdir_ms: u64,
    /// What to run; `None` leaves it to the agent's own command.
    pub command: Option<Command>,
}

impl BuildSpec {
    /// Checks every field. A spec that passes can be run by some agent, as far as the spec alone can tell.
    ///
    /// # Errors
    /// [`InvalidField`] for the first field that is wrong.
    pub fn validate(&self) -> Result<(), InvalidField> {
        if self.repo_url.is_empty() && self.source.is_none() && self.command.is_none() {
            let why = "nothing to build: give a repository URL, an uploaded source or a command";
            return Err(InvalidField::new("repo_url", why));
        }
        if !self.repo_url.is_empty() && self.source.is_some() {
            return Err(InvalidField::new("source", "a build has a repository or an uploaded source, not both"));
        }
        check_repo_url(&self.repo_url)?;
        check_git_ref(&self.git_ref)?;
        check_relative_path("dockerfile_path", &self.dockerfile_path)?;
        check_word("target", &self.target)?;
        check_variables("build_args", &self.build_args)?;
        check_variables("env", &self.env)?;
        check_labels("labels", &self.labels)?;
        check_labels("requires", &self.requires)?;
        check_platforms(&self.platforms)?;
        check_outputs(&self.outputs)?;
        for secret in &self.secrets {
            check_name("secrets", secret)?;
        }
        check_word("push", &self.push)?;
        check_command(self.command.as_ref())?;
        if self.executor == Some(Executor::Podman) && self.command.is_some() {
            return Err(InvalidField::new("command", "a podman build runs its Dockerfile; it takes no command"));
        }
        let size = self.canonical_bytes().len();
        if size > SPEC_BYTES_MAX {
            return Err(InvalidField::new("spec", format!("{size} bytes; at most {SPEC_BYTES_MAX} are allowed")));
        }
        Ok(())
    }

    /// How many tasks the build has: one per platform, and one when none is named.
    #[must_use]
    pub fn task_count(&self) -> usize {
        self.platforms.len().max(1)
    }

    /// Whether its images are pushed together with an index that names those of all platforms.
    #[must_use]
    pub fn pushes_index(&self) -> bool {
        self.executor == Some(Executor::Podman) && !self.push.is_empty() && self.task_count() > 1
    }

    /// The spec as bytes that are equal exactly when the specs are; their sha256 is the spec's digest.
    ///
    /// Every field is written in a fixed order, lengths before contents, so no two specs share an encoding.
    /// The form is versioned by its first byte and never stored.
    #[must_use]
    pub fn canonical_bytes(&self) -> Vec<u8> {
        let mut out = Canonical(vec![1]);
        out.text(&self.repo_url);
        out.text(&self.git_ref);
        match &self.source {
            None => out.number(0),
            Some(source) => {
                out.number(1);
                out.0.extend_from_slice(&source.digest.0);
                out.number(source.size);
            }
        }
        out.text(self.executor.map_or("", Executor::as_str));
        out.text(&self.dockerfile_path);
        out.text(&self.target);
        out.map(&self.build_args);
        out.list(self.platforms.iter().map(Platform::as_str));
        match &self.outputs {
            Outputs::Default => out.number(0),
            Outputs::None => out.number(1),
            Outputs::Named(paths) => {
                out.number(2);
                out.list(paths.iter().map(String::as_str));
            }
        }
        out.map(&self.env);
        out.map(&self.labels);
        out.map(&self.requires);
        out.list(self.secrets.iter().map(String::as_str));
        out.number(self.timeout_ms);
        out.number(self.silence_timeout_ms);
        out.number(u64::from(self.priority.cast_unsigned()));
        out.number(self.resources.cpu_milli);
        out.number(self.resources.memory_bytes);
        out.number(self.resources.disk_bytes);
        out.number(u64::from(self.park));
        out.number(u64::from(self.retries));
        out.number(match self.on_worker_loss {
            OnWorkerLoss::Rerun => 0,
            OnWorkerLoss::Fail => 1,
        });
        out.text(&self.push);
        out.number(self.keep_workdir_ms);
        match &self.command {
            None => out.number(0),
            Some(Command::Shell(line)) => {
                out.number(1);
                out.text(line);
            }
            Some(Command::Argv(words)) => {
                out.number(2);
                out.list(words.iter().map(String::as_str));
            }
        }
        out.0
    }
}

struct Canonical(Vec<u8>);

impl Canonical {
    fn number(&mut self, number: u64) {
        self.0.extend_from_slice(&number.to_be_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.extend_from_slice(text.as_bytes());
    }

    fn list<'a>(&mut self, items: impl ExactSizeIterator<Item = &'a str>) {
        self.number(items.len() as u64);
        items.for_each(|item| self.text(item));
    }

    fn map(&mut self, map: &BTreeMap<String, String>) {
        self.number(map.len() as u64);
        for (key, value) in map {
            self.text(key);
            self.text(value);
        }
    }
}

/// A URL that git fetches and cannot take for an option, a transport helper or a place with a password in it.
fn check_repo_url(url: &str) -> Result<(), InvalidField> {
    let wrong = |why: &str| Err(InvalidField::new("repo_url", format!("{url:?} {why}")));
    if url.is_empty() {
        return Ok(());
    }
    if url.len() > 2048 || url.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return wrong("has white space or control characters, or over 2048 bytes");
    }
    let Some((scheme, rest)) = url.split_once("://") else {
        return wrong("has no scheme: use https://, ssh:// (ssh://git@host/path for git@host:path) or file://");
    };
    if !["https", "http", "ssh", "file"].contains(&scheme) {
        return wrong("has a scheme that is not https, http, ssh or file");
    }
    let authority = rest.split('/').next().unwrap_or_default();
    let (user, host) = authority.rsplit_once('@').unwrap_or(("", authority));
    if user.contains(':') {
        return wrong("carries a password, which would be stored: configure credentials on the agent");
    }
    if host.starts_with('-') || user.starts_with('-') {
        return wrong("has a host or user that begins with a dash");
    }
    match scheme {
        "file" if !authority.is_empty() || rest.len() < 2 => wrong("is not file:///PATH"),
        "https" | "http" | "ssh" if host.is_empty() || rest.len() <= authority.len() + 1 => {
            wrong("lacks a host or a path")
        }
        _ => Ok(()),
    }
}

/// What `git check-ref-format` allows, or a commit; never an option.
fn check_git_ref(git_ref: &str) -> Result<(), InvalidField> {
    let wrong = |why: &str| Err(InvalidField::new("ref", format!("{git_ref:?} {why}")));
    if git_ref.is_empty() {
        return Ok(());
    }
    let banned = |c: char| c.is_control() || c.is_whitespace() || "~^:?*[\\".contains(c);
    if git_ref.len() > 255 || git_ref.chars().any(banned) {
        return wrong("has characters that git does not allow in a ref, or over 255 bytes");
    }
    if git_ref.starts_with(['-', '/']) || git_ref.ends_with(['/', '.']) || git_ref.ends_with(".lock") {
        return wrong("begins or ends as no ref does");
    }
    if git_ref.contains("..") || git_ref.contains("//") || git_ref.contains("@{") || git_ref == "@" {
        return wrong("is not a branch, tag or commit");
    }
    Ok(())
}

/// A path inside the workdir: relative, without `..`, NUL or newline; empty is allowed.
fn check_relative_path(field: &'static str, path: &str) -> Result<(), InvalidField> {
    let wrong = |why: &str| Err(InvalidField::new(field, format!("{path:?} {why}")));
    if path.starts_with('/') {
        return wrong("is absolute: give it relative to the workdir");
    }
    if path.len() > 1024 || path.chars().any(char::is_control) {
        return wrong("has control characters, or over 1024 bytes");
    }
    if path.split('/').any(|part| part == "..") {
        return wrong("leaves the workdir");
    }
    Ok(())
}

fn check_word(field: &'static str, text: &str) -> Result<(), InvalidField> {
    if text.starts_with('-') || text.len() > 1024 || text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(InvalidField::new(field, format!("{text:?} begins with a dash, has white space or is too long")));
    }
    Ok(())
}

fn check_name(field: &'static str, text: &str) -> Result<(), InvalidField> {
    let fine = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if text.is_empty() || text.len() > 128 || text.starts_with('-') || !text.bytes().all(fine) {
        return Err(InvalidField::new(field, format!("{text:?} is not 1 to 128 characters of [A-Za-z0-9._-]")));
    }
    Ok(())
}

/// Names a shell could hold, none of ours and none that changes what our own programs load.
fn check_variables(field: &'static str, map: &BTreeMap<String, String>) -> Result<(), InvalidField> {
    if map.len() > MAP_ENTRIES_MAX {
        return Err(InvalidField::new(field, format!("{} entries; at most {MAP_ENTRIES_MAX}", map.len())));
    }
    for (name, value) in map {
        let head = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
        let tail = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !head || !tail || name.len() > 256 {
            return Err(InvalidField::new(
                field,
                format!("{name:?} is not a variable's name ([A-Za-z_][A-Za-z0-9_]*)"),
            ));
        }
        if name.starts_with("HELIX_") || name.starts_with("LD_") {
            return Err(InvalidField::new(field, format!("{name} is reserved: HELIX_* and LD_* cannot be set")));
        }
        if value.contains('\0') {
            return Err(InvalidField::new(field, format!("the value of {name} has a NUL byte")));
        }
    }
    Ok(())
}

fn check_labels(field: &'static str, map: &BTreeMap<String, String>) -> Result<(), InvalidField> {
    if map.len() > MAP_ENTRIES_MAX {
        return Err(InvalidField::new(field, format!("{} entries; at most {MAP_ENTRIES_MAX}", map.len())));
    }
    for (key, value) in map {
        if key.is_empty() || key.len() > LABEL_BYTES_MAX || key.contains('=') || key.chars().any(char::is_control) {
            return Err(InvalidField::new(field, format!("{key:?} is not a label's key")));
        }
        if value.len() > LABEL_BYTES_MAX || value.chars().any(char::is_control) {
            return Err(InvalidField::new(field, format!("the value of {key} has control characters or is too long")));
        }
    }
    Ok(())
}

fn check_platforms(platforms: &[Platform]) -> Result<(), InvalidField> {
    if platforms.len() > TASKS_PER_BUILD_MAX {
        let why = format!("{} platforms; at most {TASKS_PER_BUILD_MAX}", platforms.len());
        return Err(InvalidField::new("platforms", why));
    }
    let distinct: BTreeSet<_> = platforms.iter().collect();
    if distinct.len() != platforms.len() {
        return Err(InvalidField::new("platforms", "a platform is named twice"));
    }
    Ok(())
}

fn check_outputs(outputs: &Outputs) -> Result<(), InvalidField> {
    let Outputs::Named(paths) = outputs else { return Ok(()) };
    if paths.is_empty() || paths.len() > OUTPUTS_MAX {
        return Err(InvalidField::new("outputs", format!("{} outputs; 1 to {OUTPUTS_MAX}", paths.len())));
    }
    for path in paths {
        check_relative_path("outputs", path)?;
        if path.is_empty() || path.split('/').any(|part| part.is_empty() || part == ".") {
            return Err(InvalidField::new("outputs", format!("{path:?} is not a plain relative path")));
        }
    }
    let distinct: BTreeSet<_> = paths.iter().collect();
    if distinct.len() != paths.len() {
        return Err(InvalidField::new("outputs", "an output is named twice"));
    }
    Ok(())
}

fn check_command(command: Option<&Command>) -> Result<(), InvalidField> {
    let wrong = |why: &str| Err(InvalidField::new("command", why));
    match command {
        None => Ok(()),
        Some(Command::Shell(line)) if line.trim().is_empty() => wrong("is empty: there is nothing to run"),
        Some(Command::Shell(line)) if line.contains('\0') => wrong("has a NUL byte"),
        Some(Command::Argv(words)) if words.first().is_none_or(String::is_empty) => wrong("names no program"),
        Some(Command::Argv(words)) if words.iter().any(|word| word.contains('\0')) => wrong("has a NUL byte"),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(line: &str) -> BuildSpec {
        BuildSpec { command: Some(Command::Shell(line.to_owned())), ..BuildSpec::default() }
    }

    fn field_of(spec: &BuildSpec) -> &'static str {
        spec.validate().map_or_else(|e| e.field, |()| "ok")
    }

    #[test]
    fn something_to_build_is_needed() {
        assert_eq!(field_of(&BuildSpec::default()), "repo_url");
        assert_eq!(field_of(&shell("true")), "ok");
        assert_eq!(field_of(&shell("  ")), "command");
        assert_eq!(field_of(&BuildSpec { command: Some(Command::Argv(vec![])), ..shell("") }), "command");
    }

    #[test]
    fn repository_urls_that_git_could_misread_are_refused() {
        let with = |url: &str| BuildSpec { repo_url: url.to_owned(), ..BuildSpec::default() };
        for good in ["https://h/p", "ssh://git@h:22/p", "file:///srv/x.git", "https://user@h/p", "http://127.0.0.1:8/p"]
        {
            assert_eq!(field_of(&with(good)), "ok", "{good}");
        }
        for bad in [
            "--upload-pack=x",
            "ext::sh -c x",
            "h/p",
            "git@h:p",
            "https://u:p@h/p",
            "ssh://-oProxyCommand=x/p",
            "file://h/p",
            "https://h",
            "https://",
            "https://h/\np",
            "ftp://h/p",
        ] {
            assert_eq!(field_of(&with(bad)), "repo_url", "{bad}");
        }
    }

    #[test]
    fn refs_paths_variables_labels() {
        let repo = BuildSpec { repo_url: "https://h/p".to_owned(), ..BuildSpec::default() };
        for bad in ["-x", "a..b", "a b", "a~1", "x.lock", "a@{1}", "/a", "a/"] {
            assert_eq!(field_of(&BuildSpec { git_ref: bad.to_owned(), ..repo.clone() }), "ref", "{bad}");
        }
        for bad in ["../x", "/x", "a/../../b", "a\nb", "a//b", "./a", ""] {
            let outputs = Outputs::Named(vec![bad.to_owned()]);
            assert_eq!(field_of(&BuildSpec { outputs, ..shell("x") }), "outputs", "{bad}");
        }
        for bad in ["HELIX_X", "LD_PRELOAD", "1A", "A B", "A=B", ""] {
            let env = BTreeMap::from([(bad.to_owned(), String::new())]);
            assert_eq!(field_of(&BuildSpec { env, ..shell("x") }), "env", "{bad}");
        }
        let labels = BTreeMap::from([(String::new(), String::new())]);
        assert_eq!(field_of(&BuildSpec { labels, ..shell("x") }), "labels");
        assert_eq!(field_of(&shell(&"x".repeat(SPEC_BYTES_MAX))), "spec");
    }

    #[test]
    fn equal_bytes_mean_equal_specs() {
        let a = BuildSpec { env: BTreeMap::from([("A".to_owned(), "BC".to_owned())]), ..shell("x") };
        let b = BuildSpec { env: BTreeMap::from([("AB".to_owned(), "C".to_owned())]), ..shell("x") };
        assert_ne!(a.canonical_bytes(), b.canonical_bytes());
        assert_eq!(a.canonical_bytes(), a.clone().canonical_bytes());
    }
}
