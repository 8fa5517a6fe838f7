//! Repositories: a bare mirror for each URL, written by the agent alone, from which every attempt is checked out.
//!
//! A mirror has a lock that git itself holds while it fetches, so that a git which outlived its agent and the next
//! agent's never write at once. Mirrors keep what was fetched: a pinned commit stays available.

mod collect;

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use helix_failpoint::{self as failpoint, Point};
use helix_model::Digest;
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};

use super::SourceError;
use super::process::{Finished, run_git};
use crate::attempt::workdir::remove_tree;
use crate::blocking::blocking;
use crate::config::SourceConfig;
use crate::data_dir::make_private;

pub use collect::Lease;

/// How long a fetch may take.
const FETCH_LIMIT: Duration = Duration::from_secs(1800);

/// How long git may take for what needs no network.
const LOCAL_LIMIT: Duration = Duration::from_secs(600);

/// Between two looks at a lock that another process holds.
const LOCK_POLL: Duration = Duration::from_millis(50);

/// A commit of a repository that is in its mirror.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resolved {
    /// The full commit.
    pub commit: String,
    /// When it was committed, in Unix seconds.
    pub time_s: i64,
}

/// All mirrors of this agent.
#[derive(Debug)]
pub struct Mirrors {
    root: PathBuf,
    environment: Vec<(OsString, OsString)>,
    allow_file_urls: bool,
    mirrors: Mutex<HashMap<String, Arc<Mirror>>>,
}

/// In a mirror: that it is whole, and when it was last used.
const COMPLETE: &str = "helix-complete";

/// In a mirror: whoever fetches holds it.
const LOCK: &str = "helix-lock";

#[derive(Debug)]
struct Mirror {
    path: PathBuf,
    /// Held while fetching; remembers when the newest successful fetch began, and of what.
    fetch: tokio::sync::Mutex<HashMap<Vec<String>, Instant>>,
    /// Held for reading while checking out, for writing while the mirror is made anew.
    alive: tokio::sync::RwLock<()>,
}

impl Mirrors {
    /// Mirrors under `root`, with the rights that the configuration gives.
    ///
    /// # Errors
    /// When git's configuration cannot be written.
    pub fn new(root: &Path, config: &SourceConfig) -> io::Result<Self> {
        make_private(root)?;
        let (global, home) = (root.join("gitconfig"), root.join("home"));
        make_private(&home)?;
        let text = git_configuration(config);
        // A full disk must not keep an agent from starting: the rest of it makes room.
        if fs::read(&global).ok().as_deref() != Some(text.as_bytes()) {
            helix_common::files::write_atomic(
                &global,
                text.as_bytes(),
                0o600,
                helix_common::files::Durability::Unsynced,
            )?;
        }
        collect::remove_set_aside(root);
        let protocols = if config.allow_file_urls { "https:http:ssh:file" } else { "https:http:ssh" };
        let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
        let mut environment: Vec<(OsString, OsString)> = [
            ("LC_ALL", "C"),
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_TERMINAL_PROMPT", "0"),
            ("GIT_ASKPASS", "/bin/false"),
            ("SSH_ASKPASS", "/bin/false"),
            ("GIT_SSH_VARIANT", "ssh"),
            ("GIT_ALLOW_PROTOCOL", protocols),
            ("GIT_NO_LAZY_FETCH", "1"),
            ("GIT_ATTR_NOSYSTEM", "1"),
        ]
        .map(|(name, value)| (name.into(), value.into()))
        .into();
        environment.push(("PATH".into(), path));
        environment.push(("HOME".into(), home.into()));
        environment.push(("GIT_CONFIG_GLOBAL".into(), global.into()));
        environment.push(("GIT_SSH_COMMAND".into(), ssh_command(config).into()));
        let allow_file_urls = config.allow_file_urls;
        Ok(Self { root: root.to_owned(), environment, allow_file_urls, mirrors: Mutex::default() })
    }

    /// Checks that the agent's owner allows this URL.
    ///
    /// # Errors
    /// `policy` when not.
    pub fn check_url(&self, url: &str) -> Result<(), SourceError> {
        if url.starts_with("file://") && !self.allow_file_urls {
            let message = "file:// URLs are not allowed on this agent (source.allow_file_urls)";
            return Err(SourceError::policy(message));
        }
        Ok(())
    }

    /// Finds the commit that a branch, tag or commit stands for (empty: the default branch), and brings it into the
    /// mirror. A full commit that is there already costs no network.
    ///
    /// # Errors
    /// `source` when there is no such repository or ref, or it cannot be read.
    pub async fn resolve(&self, url: &str, git_ref: &str) -> Result<Resolved, SourceError> {
        self.check_url(url)?;
        let asked = Instant::now();
        let mirror = self.mirror(url);
        self.ensure(&mirror).await?;
        let full_commit = is_hex(git_ref) && matches!(git_ref.len(), 40 | 64);
        if full_commit && let Some(found) = self.look_up(&mirror, git_ref).await? {
            return Ok(found);
        }
        self.fetch(&mirror, url, refspecs(git_ref), asked).await?;
        for candidate in candidates(git_ref) {
            if let Some(found) = self.look_up(&mirror, &candidate).await? {
                return Ok(found);
            }
        }
        if full_commit {
            // Not on any branch: some servers give it when asked for it by name.
            let by_name = self.fetch(&mirror, url, vec![git_ref.to_owned()], asked).await;
            if by_name.is_ok()
                && let Some(found) = self.look_up(&mirror, git_ref).await?
            {
                return Ok(found);
            }
        }
        let what = if git_ref.is_empty() {
            "a default branch".to_owned()
        } else {
            format!("branch, tag or commit {git_ref:?}")
        };
        Err(SourceError::source(format!("{url} has no {what}")))
    }

    /// Lays out a resolved commit's files in an empty directory, without history. `index` is a scratch file's path.
    ///
    /// # Errors
    /// When git or the disk refuses.
    pub async fn check_out(
        &self,
        url: &str,
        resolved: &Resolved,
        work: &Path,
        index: &Path,
    ) -> Result<(), SourceError> {
        let mirror = self.mirror(url);
        let _alive = mirror.alive.read().await;
        let mut environment = self.environment.clone();
        environment.push(("GIT_INDEX_FILE".into(), index.into()));
        environment.push(("GIT_WORK_TREE".into(), work.into()));
        let args = git_args(&mirror, &["read-tree", "--reset", "-u", &resolved.commit]);
        let finished = run_git(&args, &environment, work, Stdio::null(), LOCAL_LIMIT).await;
        let finished = finished.map_err(|error| SourceError::host("cannot run git", &error))?;
        let _ = fs::remove_file(index);
        // Only what is collected first depends on it.
        let _ = File::open(mirror.path.join(COMPLETE)).and_then(|file| file.set_modified(std::time::SystemTime::now()));
        if finished.success { Ok(()) } else { Err(failed("cannot check out", &resolved.commit, &finished)) }
    }

    fn mirror(&self, url: &str) -> Arc<Mirror> {
        let name = Digest(Sha256::digest(url.as_bytes()).into()).to_string();
        // Nothing panics while holding it.
        let mut mirrors = self.mirrors.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.root.join(format!("{name}.git"));
        let new = || Mirror { path, fetch: tokio::sync::Mutex::default(), alive: tokio::sync::RwLock::default() };
        Arc::clone(mirrors.entry(name).or_insert_with(|| Arc::new(new())))
    }

    /// Makes the mirror if it is not there, or only half.
    async fn ensure(&self, mirror: &Mirror) -> Result<(), SourceError> {
        if mirror.path.join(COMPLETE).exists() {
            return Ok(());
        }
        let _alive = mirror.alive.write().await;
        if mirror.path.join(COMPLETE).exists() {
            return Ok(());
        }
        let path = mirror.path.clone();
        let host = |error: io::Error| SourceError::host("cannot make a mirror", &error);
        blocking(move || remove_tree(&path)).await.map_err(host)?;
        let args: Vec<OsString> = ["init", "--quiet", "--bare", "--template="].map(OsString::from).into();
        let args = [args, vec!["--".into(), mirror.path.clone().into()]].concat();
        let made = run_git(&args, &self.environment, &self.root, Stdio::null(), LOCAL_LIMIT).await.map_err(host)?;
        if !made.success {
            return Err(failed("cannot make a mirror", "", &made));
        }
        failpoint::hit(Point::MirrorMade).and_then(|()| fs::write(mirror.path.join(COMPLETE), "")).map_err(host)
    }

    /// Brings refs into the mirror. A fetch of the same refs that began after `asked` serves as well.
    async fn fetch(
        &self,
        mirror: &Mirror,
        url: &str,
        refspecs: Vec<String>,
        asked: Instant,
    ) -> Result<(), SourceError> {
        let mut fetched = mirror.fetch.lock().await;
        if fetched.get(&refspecs).is_some_and(|began| *began >= asked) {
            return Ok(());
        }
        let began = Instant::now();
        let lock = self.lock(mirror).await?;
        let mut args =
            git_args(mirror, &["fetch", "--quiet", "--force", "--prune", "--no-tags", "--no-write-fetch-head"]);
        args.extend(["--no-recurse-submodules", "--no-auto-maintenance", "--"].map(OsString::from));
        args.push(url.into());
        args.extend(refspecs.iter().map(OsString::from));
        let fetched_now = run_git(&args, &self.environment, &self.root, Stdio::from(lock), FETCH_LIMIT).await;
        match fetched_now {
            Ok(finished) if finished.success => {
                let fetched_well = failpoint::hit(Point::MirrorFetched);
                fetched_well.map_err(|error| SourceError::host("cannot run git", &error))?;
                // Only the newest of each kind matters, and there are few kinds.
                if fetched.len() > 64 {
                    fetched.clear();
                }
                fetched.insert(refspecs, began);
                Ok(())
            }
            Ok(finished) => Err(failed("cannot fetch", url, &finished)),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                Err(SourceError::source(format!("cannot fetch {url}: {error}")))
            }
            Err(error) => Err(SourceError::host("cannot run git", &error)),
        }
    }

    /// The mirror's lock, which a git of an agent that died may still hold for a while.
    async fn lock(&self, mirror: &Mirror) -> Result<File, SourceError> {
        let host = |error: io::Error| SourceError::host("cannot lock a mirror", &error);
        let path = mirror.path.join(LOCK);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let file = file.map_err(host)?;
        while let Err(error) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
            if error != rustix::io::Errno::WOULDBLOCK {
                return Err(host(error.into()));
            }
            tokio::time::sleep(LOCK_POLL).await;
        }
        // Nobody else writes now: locks that lie about are of a git that was killed.
        for name in ["packed-refs.lock", "config.lock", "HEAD.lock", "shallow.lock"] {
            let _ = fs::remove_file(mirror.path.join(name));
        }
        Ok(file)
    }

    /// The commit that a full ref name or commit stands for in the mirror.
    async fn look_up(&self, mirror: &Mirror, revision: &str) -> Result<Option<Resolved>, SourceError> {
        let args = ["log", "-1", "--no-show-signature", "--format=%H %ct", "--end-of-options"];
        let mut args = git_args(mirror, &args);
        args.push(format!("{revision}^{{commit}}").into());
        args.push("--".into());
        let found = run_git(&args, &self.environment, &self.root, Stdio::null(), LOCAL_LIMIT).await;
        let found = found.map_err(|error| SourceError::host("cannot run git", &error))?;
        if !found.success {
            return Ok(None);
        }
        let parsed = found.stdout.trim().split_once(' ').and_then(|(commit, time)| {
            let time_s = time.parse().ok()?;
            (is_hex(commit) && matches!(commit.len(), 40 | 64)).then(|| Resolved { commit: commit.to_owned(), time_s })
        });
        Ok(parsed)
    }
}

/// The refs to fetch for what a build asks for: all branches and tags, so that both are told apart here, at one time.
fn refspecs(git_ref: &str) -> Vec<String> {
    if git_ref.starts_with("refs/") && !git_ref.starts_with("refs/heads/") && !git_ref.starts_with("refs/tags/") {
        return vec![format!("+{git_ref}:{git_ref}")];
    }
    let mut refspecs = vec!["+refs/heads/*:refs/heads/*".to_owned(), "+refs/tags/*:refs/tags/*".to_owned()];
    if git_ref.is_empty() {
        refspecs.push("+HEAD:refs/helix/head".to_owned());
    }
    refspecs
}

/// What a ref may stand for, the first that exists wins.
fn candidates(git_ref: &str) -> Vec<String> {
    if git_ref.is_empty() {
        return vec!["refs/helix/head".to_owned()];
    }
    if git_ref.starts_with("refs/") {
        return vec![git_ref.to_owned()];
    }
    let mut candidates = vec![format!("refs/heads/{git_ref}"), format!("refs/tags/{git_ref}")];
    // An abbreviated commit, as people paste it.
    if is_hex(git_ref) && git_ref.len() >= 7 {
        candidates.push(git_ref.to_owned());
    }
    candidates
}

fn is_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn git_args(mirror: &Mirror, rest: &[&str]) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["--git-dir".into(), mirror.path.clone().into()];
    args.extend(rest.iter().map(OsString::from));
    args
}

/// git's last line that says something, as one line for people.
fn failed(what: &str, whom: &str, finished: &Finished) -> SourceError {
    let said = finished.stderr.lines().map(str::trim).filter(|line| !line.is_empty());
    let meant = |line: &&str| line.starts_with("fatal:") || line.starts_with("error:");
    let said = said.clone().find(meant).or_else(|| said.clone().next_back()).unwrap_or("git said nothing");
    let full = finished.stderr.contains("No space left on device");
    let reason = if full { helix_model::Reason::DiskFull } else { helix_model::Reason::Source };
    SourceError { reason, message: format!("{what} {whom}: {said}").replace("  ", " ") }
}

/// What every git of ours reads instead of the host's and the user's files: no hooks, no helpers, no upkeep.
fn git_configuration(config: &SourceConfig) -> String {
    let mut text = String::from(
        "[core]\n\thooksPath = /dev/null\n\tfsmonitor = false\n\tattributesFile = /dev/null\n\
         [gc]\n\tauto = 0\n[maintenance]\n\tauto = false\n[submodule]\n\trecurse = false\n[safe]\n\tdirectory = *\n\
         [uploadpack]\n\tallowAnySHA1InWant = true\n[http]\n\tlowSpeedLimit = 1000\n\tlowSpeedTime = 60\n\
         [protocol \"ext\"]\n\tallow = never\n[fetch]\n\twriteCommitGraph = false\n[advice]\n\tdetachedHead = false\n\
         [init]\n\tdefaultBranch = main\n",
    );
    if !config.credential_helper.is_empty() {
        let quoted = config.credential_helper.replace('\\', "\\\\").replace('"', "\\\"");
        text.push_str(&format!("[credential]\n\thelper = \"{quoted}\"\n"));
    }
    text
}

/// How git calls ssh: without prompts, with the configured key and host keys alone.
fn ssh_command(config: &SourceConfig) -> String {
    let mut command =
        "ssh -oBatchMode=yes -oStrictHostKeyChecking=yes -oConnectTimeout=20 -oForwardAgent=no".to_owned();
    if let Some(key) = &config.ssh_key {
        command.push_str(&format!(" -oIdentitiesOnly=yes -i '{}'", key.display()));
    }
    if let Some(known_hosts) = &config.known_hosts {
        command.push_str(&format!(
            " '-oUserKnownHostsFile=\"{}\"' -oGlobalKnownHostsFile=/dev/null",
            known_hosts.display()
        ));
    }
    command
}

#[cfg(test)]
mod tests;
