//! Secrets: values that this agent's operator configured, laid out in memory for one attempt at a time.
//!
//! A value goes from where the operator keeps it into a file on a tmpfs, mode 0400, in a directory that only the build's user
//! may enter; the runner masks what it finds there. It is in no argument, no variable, no order, no log line, and on no
//! disk, and it goes with the attempt's workdir. A host without a tmpfs gives no secrets.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use helix_model::limits::{MAP_ENTRIES_MAX, SECRET_BYTES_MAX, SECRET_BYTES_MIN};
use helix_model::{AttemptKey, BuildSpec, Instance, Reason};
use helix_runner::Order;
use helix_runner::isolation::{Absence, Access, Entry};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

use crate::attempt::workdir::remove_tree;
use crate::config::{Config, ConfigWrong};
use crate::policy;

/// Where an isolated build sees its secrets.
const SEEN_AT: &str = "/run/secrets";

/// Where secrets may lie: the first that is a tmpfs.
const IN_MEMORY: [&str; 3] = ["/dev/shm", "/run/shm", "/run"];

/// How often an attempt's directory is tried to be made while others remove what it lies in: each try takes two calls.
const MAKE_TRIES: u32 = 100;

/// How long a command may take to give a secret.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);

/// A secret: where its value is, and whom it is for. Exactly one place is named.
#[derive(Clone, PartialEq, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct SecretConfig {
    /// A file, read anew for each attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// A variable of the agent's own environment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub environment: Option<String>,
    /// A line for `sh` that prints it, run anew for each attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Patterns of the repositories whose builds may have it.
    pub repositories: Vec<String>,
}

impl SecretConfig {
    /// Whether builds of all repositories, and of none, may have it.
    #[must_use]
    pub fn is_for_all(&self) -> bool {
        self.repositories.iter().any(|pattern| pattern == policy::ANY)
    }
}

/// Checks all configured secrets, and makes their files' paths absolute.
///
/// # Errors
/// What is wrong with the first that cannot be used.
pub fn check(secrets: &mut BTreeMap<String, SecretConfig>, directory: &Path) -> Result<(), ConfigWrong> {
    if secrets.len() > MAP_ENTRIES_MAX {
        let why = format!("{} of them: at most {MAP_ENTRIES_MAX} can be offered", secrets.len());
        return Err(ConfigWrong { key: "secrets", why });
    }
    for (name, secret) in secrets {
        let wrong = |why: String| Err(ConfigWrong { key: "secrets", why: format!("{name}: {why}") });
        // As builds name it; and it becomes a file's name.
        let spec = BuildSpec { repo_url: "https://h/p".into(), secrets: [name.clone()].into(), ..BuildSpec::default() };
        if let Err(invalid) = spec.validate() {
            return wrong(invalid.why);
        }
        if name.starts_with('.') {
            return wrong("a secret's name does not begin with a dot".to_owned());
        }
        let places = [secret.file.is_some(), secret.environment.is_some(), secret.command.is_some()];
        if places.iter().filter(|named| **named).count() != 1 {
            return wrong("name exactly one of file, environment, command".to_owned());
        }
        let text = secret.environment.iter().chain(&secret.command);
        if text.clone().any(|text| text.trim().is_empty() || text.contains('\0')) {
            return wrong("an empty environment or command names nothing".to_owned());
        }
        if secret.repositories.is_empty() {
            return wrong("repositories is empty: name the patterns of those that may have it, or *".to_owned());
        }
        policy::check_repositories("secrets", &secret.repositories)
            .map_err(|pattern| ConfigWrong { why: format!("{name}: repositories: {}", pattern.why), ..pattern })?;
        if let Some(file) = &mut secret.file {
            *file = directory.join(&*file);
        }
    }
    Ok(())
}

/// Where this agent lays out secrets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Secrets {
    /// Named after the agent's data; `None` on a host that has no memory to put it in.
    root: Option<PathBuf>,
}

/// An attempt's secrets as they lie there.
#[derive(Debug)]
pub struct LaidOut {
    dir: PathBuf,
    names: Vec<String>,
}

impl Secrets {
    /// Those of the agent with this instance. Touches nothing.
    #[must_use]
    pub fn of(instance: &Instance) -> Self {
        let base = IN_MEMORY.iter().map(Path::new).find(|path| is_in_memory(path));
        let id: String = instance.as_str().chars().take(8).collect();
        Self { root: base.map(|base| base.join(format!("helix-agent-{id}"))) }
    }

    /// Gets the secrets that a spec names, which policy has allowed, and lays them out. `None` when it names none.
    ///
    /// # Errors
    /// Why they cannot be had.
    pub async fn lay_out(
        &self,
        config: &Config,
        spec: &BuildSpec,
        key: &AttemptKey,
    ) -> Result<Option<LaidOut>, (Reason, String)> {
        if spec.secrets.is_empty() {
            return Ok(None);
        }
        let mut values = Vec::with_capacity(spec.secrets.len());
        for name in &spec.secrets {
            let Some(secret) = config.secrets.get(name) else {
                return Err((Reason::Policy, format!("the secret {name:?} is not configured on this agent")));
            };
            let value = value_of(secret).await;
            let value =
                value.map_err(|error| (Reason::Internal, format!("cannot get the secret {name:?}: {error}")))?;
            // Said by the agent, so nothing of it may be in the words.
            if value.trim_ascii_end().len() < SECRET_BYTES_MIN {
                let why = format!("the secret {name:?} has fewer than {SECRET_BYTES_MIN} bytes and cannot be masked");
                return Err((Reason::Policy, why));
            }
            values.push((name.clone(), value));
        }
        let Some(root) = self.root.clone() else {
            return Err((Reason::Policy, format!("this host gives no secrets: none of {IN_MEMORY:?} is a tmpfs")));
        };
        let dir = root.join(key.to_string());
        let names = values.iter().map(|(name, _)| name.clone()).collect();
        let laid_out = LaidOut { dir: dir.clone(), names };
        let written = crate::blocking::blocking(move || write(&root, &dir, &values)).await;
        written.map_err(|error| (Reason::Internal, format!("cannot lay out secrets: {error}")))?;
        Ok(Some(laid_out))
    }

    /// Removes an attempt's secrets; that there are none is fine. Blocks.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(&self, key: &AttemptKey) -> io::Result<()> {
        let Some(root) = &self.root else { return Ok(()) };
        if !root.exists() {
            return Ok(());
        }
        remove_tree(&root.join(key.to_string()))?;
        // Empty, or another attempt's are there.
        let _ = fs::remove_dir(root);
        Ok(())
    }

    /// Removes what lies there for nobody: of attempts that an agent before this one forgot. Blocks.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn sweep<'a>(&self, alive: impl Iterator<Item = &'a AttemptKey>) -> io::Result<()> {
        let Some(root) = &self.root else { return Ok(()) };
        let entries = match fs::read_dir(root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let alive: Vec<String> = alive.map(ToString::to_string).collect();
        for entry in entries {
            let entry = entry?;
            if !alive.iter().any(|key| entry.file_name() == key.as_str()) {
                remove_tree(&entry.path())?;
            }
        }
        let _ = fs::remove_dir(root);
        Ok(())
    }
}

impl LaidOut {
    /// Has an order show them to its command, under the variable `HELIX_SECRETS`, and mask them. Blocks.
    ///
    /// # Errors
    /// When they cannot be given to the command's user.
    pub fn show(&self, order: &mut Order) -> io::Result<()> {
        if let Some(user) = order.user {
            for path in self.names.iter().map(|name| self.dir.join(name)).chain([self.dir.clone()]) {
                chown(path, Some(user.uid), Some(user.gid))?;
            }
        }
        let seen = match &mut order.isolation {
            None => self.dir.clone(),
            Some(isolation) => {
                let (source, target) = (self.dir.clone(), PathBuf::from(SEEN_AT));
                let (access, absence) = (Access::Read, Absence::Fails);
                isolation.view.push(Entry::Bind { source, target: target.clone(), access, absence });
                target
            }
        };
        order.environment.push(("HELIX_SECRETS".into(), seen.into()));
        order.secrets = Some(self.dir.clone());
        Ok(())
    }

    /// What `podman build` is told of them: where they lie, and never what they are.
    #[must_use]
    pub fn podman_arguments(&self) -> Vec<OsString> {
        let argument = |name: &String| {
            let mut argument = OsString::from(format!("--secret=id={name},src="));
            argument.push(self.dir.join(name));
            argument
        };
        self.names.iter().map(argument).collect()
    }
}

fn is_in_memory(path: &Path) -> bool {
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    // The field's type differs between architectures.
    #[allow(clippy::unnecessary_cast, clippy::cast_possible_wrap, clippy::cast_lossless)]
    let is = rustix::fs::statfs(path).is_ok_and(|found| matches!(found.f_type as i64, TMPFS | RAMFS));
    is
}

/// Writes values into a directory of their own, which nobody else may enter.
fn write(root: &Path, dir: &Path, values: &[(String, Vec<u8>)]) -> io::Result<()> {
    // An attempt that goes takes the root along if it finds it empty, between any two of our steps.
    let mut tries = 1;
    while let Err(error) = make_dir(root, dir) {
        if error.kind() != io::ErrorKind::NotFound || tries == MAKE_TRIES {
            return Err(error);
        }
        tries += 1;
    }
    for (name, value) in values {
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o400).open(dir.join(name))?;
        file.write_all(value)?;
    }
    Ok(())
}

/// Makes the attempt's directory, and what it lies in.
fn make_dir(root: &Path, dir: &Path) -> io::Result<()> {
    let mut private = DirBuilder::new();
    private.mode(0o700);
    match private.create(root) {
        Ok(()) => {}
        // Everybody may make directories beside it: it has to be ours.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let there = fs::symlink_metadata(root)?;
            if !there.is_dir() || there.uid() != rustix::process::geteuid().as_raw() || there.mode() & 0o077 != 0 {
                return Err(io::Error::other(format!("{} is not a private directory of ours", root.display())));
            }
        }
        Err(error) => return Err(error),
    }
    // Of an agent that died before it started a runner.
    remove_tree(dir)?;
    private.create(dir)
}

async fn value_of(secret: &SecretConfig) -> io::Result<Vec<u8>> {
    let value = match secret {
        SecretConfig { file: Some(file), .. } => {
            let file = file.clone();
            let read = move || {
                let mut value = Vec::new();
                fs::File::open(file)?.take(SECRET_BYTES_MAX as u64 + 1).read_to_end(&mut value)?;
                Ok(value)
            };
            crate::blocking::blocking(read).await?
        }
        SecretConfig { environment: Some(variable), .. } => {
            let value = std::env::var_os(variable);
            let missing = || io::Error::other(format!("the agent's environment has no {variable}"));
            value.map(OsString::into_encoded_bytes).ok_or_else(missing)?
        }
        SecretConfig { command: Some(line), .. } => said_by(line).await?,
        SecretConfig { .. } => return Err(io::Error::other("it names no place")),
    };
    if value.len() > SECRET_BYTES_MAX {
        return Err(io::Error::other(format!("it has more than {SECRET_BYTES_MAX} bytes")));
    }
    Ok(value)
}

/// What a command prints. What it says on its standard error may hold anything, and is not kept.
async fn said_by(line: &str) -> io::Result<Vec<u8>> {
    let mut command = Command::new("sh");
    command.args(["-c", line]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn()?;
    let mut value = Vec::new();
    let all = async {
        if let Some(stdout) = child.stdout.take() {
            stdout.take(SECRET_BYTES_MAX as u64 + 1).read_to_end(&mut value).await?;
        }
        child.wait().await
    };
    let late = || io::Error::new(io::ErrorKind::TimedOut, format!("its command took longer than {COMMAND_LIMIT:?}"));
    let status = tokio::time::timeout(COMMAND_LIMIT, all).await.map_err(|_| late())??;
    if status.success() { Ok(value) } else { Err(io::Error::other(format!("its command failed: {status}"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_file(path: &Path) -> SecretConfig {
        SecretConfig { file: Some(path.to_owned()), repositories: vec!["*".to_owned()], ..SecretConfig::default() }
    }

    fn naming(names: &[&str]) -> BuildSpec {
        BuildSpec { secrets: names.iter().map(|&name| name.to_owned()).collect(), ..BuildSpec::default() }
    }

    #[tokio::test]
    async fn values_lie_in_memory_for_one_attempt_and_go_with_it() {
        let base = tempfile::tempdir().unwrap();
        let mut config = crate::testing::config(base.path());
        fs::write(base.path().join("value"), "hunter2\n").unwrap();
        config.secrets.insert("file".to_owned(), of_file(&base.path().join("value")));
        let said = SecretConfig { command: Some("printf 'said %s' it".to_owned()), ..SecretConfig::default() };
        config.secrets.insert("said".to_owned(), said);
        let secrets = Secrets { root: Some(base.path().join("memory")) };
        let key: AttemptKey = "b.0.1".parse().unwrap();
        assert!(secrets.lay_out(&config, &naming(&[]), &key).await.unwrap().is_none());
        let laid_out = secrets.lay_out(&config, &naming(&["file", "said"]), &key).await.unwrap().unwrap();
        let dir = base.path().join("memory/b.0.1");
        assert_eq!(fs::read(dir.join("file")).unwrap(), b"hunter2\n");
        assert_eq!(fs::read(dir.join("said")).unwrap(), b"said it");
        assert_eq!(fs::metadata(dir.join("file")).unwrap().mode() & 0o777, 0o400);
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
        let arguments = laid_out.podman_arguments();
        assert_eq!(arguments[0], *format!("--secret=id=file,src={}", dir.join("file").display()));
        // Again, as after an agent that died in between; then a sweep that leaves the living.
        secrets.lay_out(&config, &naming(&["said"]), &key).await.unwrap();
        assert!(!dir.join("file").exists());
        secrets.sweep([&key].into_iter()).unwrap();
        assert!(dir.exists());
        let other: AttemptKey = "c.0.1".parse().unwrap();
        secrets.lay_out(&config, &naming(&["said"]), &other).await.unwrap();
        secrets.remove(&key).unwrap();
        secrets.remove(&key).unwrap();
        assert!(!dir.exists() && base.path().join("memory/c.0.1").exists());
        secrets.sweep([].into_iter()).unwrap();
        assert!(!base.path().join("memory").exists());
    }

    #[test]
    fn those_that_come_and_those_that_go_do_not_disturb_each_other() {
        let base = tempfile::tempdir().unwrap();
        let secrets = Secrets { root: Some(base.path().join("memory")) };
        let come_and_go = |key: &str| {
            let key: AttemptKey = key.parse().unwrap();
            let root = secrets.root.as_ref().unwrap();
            let dir = root.join(key.to_string());
            for _ in 0..3000 {
                write(root, &dir, &[("name".to_owned(), b"a value".to_vec())]).unwrap();
                assert_eq!(fs::read(dir.join("name")).unwrap(), b"a value");
                secrets.remove(&key).unwrap();
            }
        };
        std::thread::scope(|scope| {
            for key in ["a.0.1", "b.0.1", "c.0.1"] {
                scope.spawn(move || come_and_go(key));
            }
        });
        assert!(!base.path().join("memory").exists());
    }

    #[tokio::test]
    async fn what_cannot_be_had_or_masked_is_said_without_the_value() {
        let base = tempfile::tempdir().unwrap();
        let mut config = crate::testing::config(base.path());
        fs::write(base.path().join("short"), "abc\n").unwrap();
        fs::write(base.path().join("long"), vec![b'x'; SECRET_BYTES_MAX + 1]).unwrap();
        for name in ["short", "long", "missing"] {
            config.secrets.insert(name.to_owned(), of_file(&base.path().join(name)));
        }
        let failing = SecretConfig { command: Some("echo hunter2; exit 3".to_owned()), ..SecretConfig::default() };
        config.secrets.insert("failing".to_owned(), failing);
        let unset = SecretConfig { environment: Some("HELIX_TEST_UNSET".to_owned()), ..SecretConfig::default() };
        config.secrets.insert("unset".to_owned(), unset);
        let secrets = Secrets { root: Some(base.path().join("memory")) };
        let key: AttemptKey = "b.0.1".parse().unwrap();
        let table = [
            ("short", Reason::Policy, "cannot be masked"),
            ("long", Reason::Internal, "more than 65536 bytes"),
            ("missing", Reason::Internal, "No such file"),
            ("failing", Reason::Internal, "its command failed"),
            ("unset", Reason::Internal, "has no HELIX_TEST_UNSET"),
            ("unknown", Reason::Policy, "not configured"),
        ];
        for (name, reason, words) in table {
            let (found, message) = secrets.lay_out(&config, &naming(&[name]), &key).await.unwrap_err();
            assert_eq!(found, reason, "{name}: {message}");
            assert!(message.contains(words) && !message.contains("hunter2") && !message.contains("abc"), "{message}");
        }
        let nowhere = Secrets { root: None };
        fs::write(base.path().join("short"), "long enough").unwrap();
        let (_, message) = nowhere.lay_out(&config, &naming(&["short"]), &key).await.unwrap_err();
        assert!(message.contains("tmpfs"), "{message}");
        // A directory that somebody else put there is not used.
        std::os::unix::fs::symlink(base.path(), base.path().join("memory")).unwrap();
        let (_, message) = secrets.lay_out(&config, &naming(&["short"]), &key).await.unwrap_err();
        assert!(message.contains("not a private directory"), "{message}");
    }

    #[test]
    fn a_secret_has_a_name_one_place_and_somebody_it_is_for() {
        let good = of_file(Path::new("token"));
        let checked = |name: &str, change: &dyn Fn(&mut SecretConfig)| {
            let mut secret = good.clone();
            change(&mut secret);
            let mut secrets = BTreeMap::from([(name.to_owned(), secret)]);
            check(&mut secrets, Path::new("/etc/helix")).map(|()| secrets).map_err(|wrong| wrong.to_string())
        };
        let secrets = checked("token", &|_| {}).unwrap();
        assert_eq!(secrets["token"].file.as_deref(), Some(Path::new("/etc/helix/token")));
        for name in ["", "..", ".x", "a/b", "a b"] {
            assert!(checked(name, &|_| {}).is_err(), "{name:?}");
        }
        assert!(checked("t", &|secret| secret.file = None).unwrap_err().contains("exactly one"));
        assert!(checked("t", &|secret| secret.command = Some("x".to_owned())).unwrap_err().contains("exactly one"));
        assert!(checked("t", &|secret| secret.repositories.clear()).unwrap_err().contains("t: repositories"));
        let error = checked("t", &|secret| secret.repositories.push("team".to_owned())).unwrap_err();
        assert!(error.starts_with("`secrets`: t: repositories"), "{error}");
    }
}
