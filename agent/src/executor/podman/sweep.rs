//! What builds leave in the store when they are killed, and its removal: build containers with their mounts, lists of
//! images, and cgroups that the runtime made.
//!
//! podman does not label build containers. But it notes the cgroup that each was given, or what secrets, and that names the
//! attempt.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use helix_model::AttemptKey;
use helix_runner::cgroup::Wanted;
use helix_runner::limits::Limits;
use serde::Deserialize;
use tokio_util::task::TaskTracker;

use super::{Podman, build};
use crate::blocking::blocking;

/// How long removing containers may take.
const REMOVE_LIMIT: Duration = Duration::from_secs(120);

/// The depth to which cgroups are removed.
const GROUPS_DEPTH_MAX: u32 = 64;

/// A build container as the store has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Container {
    pub(super) id: String,
    /// The attempt that made it, where that can be told.
    pub(super) attempt: Option<AttemptKey>,
}

/// What the store notes of an image, as far as it matters here.
#[derive(Deserialize)]
struct Stored {
    #[serde(default)]
    names: Vec<String>,
}

/// What podman notes of a build container, as far as it matters here.
#[derive(Deserialize)]
struct Notes {
    #[serde(rename = "CommonBuildOpts", default)]
    options: Options,
}

#[derive(Deserialize, Default)]
struct Options {
    #[serde(rename = "CgroupParent", default)]
    cgroup: String,
    #[serde(rename = "Secrets", default)]
    secrets: Option<Vec<String>>,
}

impl Podman {
    /// Removes what attempts left that are no more. Nothing of theirs may run.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub async fn sweep(&self, tracker: &TaskTracker, dead: &BTreeSet<AttemptKey>) -> io::Result<()> {
        if !self.config.podman.enabled {
            return Ok(());
        }
        let left = |attempt: Option<&AttemptKey>| attempt.is_some_and(|key| dead.contains(key));
        // Mostly there are none, and then nobody has to wait for the lock.
        let found = self.containers().await?;
        if found.iter().any(|container| left(container.attempt.as_ref())) {
            let _share = self.share().await?;
            self.remove_containers(tracker, left).await?;
        }
        // Where podman was killed before it noted whose a container is, that container is nobody's once nothing builds. While
        // something does, it may be that build's: it waits for a later sweep.
        if found.iter().any(|container| container.attempt.is_none())
            && let Some(_alone) = self.have_alone(Duration::ZERO).await?
        {
            self.remove_containers(tracker, |attempt| attempt.is_none()).await?;
        }
        let names: BTreeSet<String> = dead.iter().map(build::list_name).collect();
        self.remove_lists(tracker, |name| names.contains(name)).await?;
        let paths: Vec<String> = dead.iter().map(|key| self.cgroup_of(key)).collect();
        blocking(move || paths.iter().try_for_each(|path| remove_cgroups(path))).await
    }

    /// Removes what every attempt but these left. Containers that tell nothing of their attempt are removed as well, if nothing
    /// builds now.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub async fn sweep_all_but(&self, tracker: &TaskTracker, alive: &BTreeSet<AttemptKey>) -> io::Result<()> {
        let ((base, prefix), living) = (self.cgroups.clone(), alive.clone());
        blocking(move || remove_stale_cgroups(&base, &prefix, &living)).await?;
        if !self.config.podman.enabled {
            return Ok(());
        }
        if alive.is_empty()
            && let Some(_alone) = self.have_alone(Duration::ZERO).await?
        {
            self.remove_containers(tracker, |_| true).await?;
            return self.remove_lists(tracker, |_| true).await;
        }
        let _share = self.share().await?;
        self.remove_containers(tracker, |attempt| attempt.is_some_and(|key| !alive.contains(key))).await
    }

    /// Removes the build containers for which `unwanted` holds. The lock is the caller's.
    pub(super) async fn remove_containers(
        &self,
        tracker: &TaskTracker,
        unwanted: impl Fn(Option<&AttemptKey>) -> bool,
    ) -> io::Result<()> {
        let all = self.containers().await?;
        let chosen: Vec<Container> = all.into_iter().filter(|found| unwanted(found.attempt.as_ref())).collect();
        if chosen.is_empty() {
            return Ok(());
        }
        tracing::info!(count = chosen.len(), "removing build containers that were left");
        let mut arguments: Vec<OsString> = vec!["rm".into(), "--force".into(), "--".into()];
        arguments.extend(chosen.iter().map(|container| container.id.clone().into()));
        let done = self.run(tracker, arguments, &self.dir, REMOVE_LIMIT).await?;
        let left = self.containers().await?;
        match chosen.iter().find(|container| left.contains(container)) {
            None => Ok(()),
            Some(container) => {
                let text = format!("the build container {} is still there: {}", container.id, done.complaint());
                Err(io::Error::other(text))
            }
        }
    }

    /// Removes the lists of images for which `unwanted` holds, by their names. Mostly there are none.
    pub(super) async fn remove_lists(&self, tracker: &TaskTracker, unwanted: impl Fn(&str) -> bool) -> io::Result<()> {
        let mut chosen = self.lists().await?;
        chosen.retain(|name| unwanted(name));
        if chosen.is_empty() {
            return Ok(());
        }
        let mut arguments: Vec<OsString> = vec!["manifest".into(), "rm".into()];
        arguments.extend(chosen.iter().map(OsString::from));
        let done = self.run(tracker, arguments, &self.dir, REMOVE_LIMIT).await?;
        let left = self.lists().await?;
        match chosen.iter().find(|name| left.contains(name)) {
            None => Ok(()),
            Some(name) => Err(io::Error::other(format!("the list {name} is still there: {}", done.complaint()))),
        }
    }

    async fn lists(&self) -> io::Result<Vec<String>> {
        let root = self.config.podman.root.clone();
        blocking(move || lists(&root)).await
    }

    async fn containers(&self) -> io::Result<Vec<Container>> {
        let root = self.config.podman.root.clone();
        let prefix = self.cgroups.1.clone();
        blocking(move || containers(&root, &prefix)).await
    }
}

/// The build containers in a store. Those of a moment ago may have no notes yet.
pub(super) fn containers(root: &Path, prefix: &str) -> io::Result<Vec<Container>> {
    let mut found = Vec::new();
    for driver in drivers(root)? {
        // DRIVER-containers/ID/userdata/buildah.json
        for container in read_dir(&root.join(format!("{driver}-containers")))? {
            let Some(id) = container.file_name().and_then(|name| name.to_str()) else { continue };
            if !container.is_dir() {
                continue;
            }
            let notes = fs::read(container.join("userdata/buildah.json")).unwrap_or_default();
            let notes: Option<Notes> = serde_json::from_slice(&notes).ok();
            let attempt = notes.and_then(|notes| attempt_of(&notes.options, prefix));
            found.push(Container { id: id.to_owned(), attempt });
        }
    }
    Ok(found)
}

/// The names of lists of images in a store.
fn lists(root: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for kind in read_dir(root)? {
        // DRIVER-images/images.json
        if !kind.file_name().is_some_and(|name| name.to_string_lossy().ends_with("-images")) {
            continue;
        }
        let text = match fs::read_to_string(kind.join("images.json")) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        // Stores are large, and there is mostly nothing in them to look for.
        if text.contains(build::LISTS) {
            let images: Vec<Stored> = serde_json::from_str(&text)?;
            let names = images.into_iter().flat_map(|image| image.names);
            found.extend(names.filter(|name| name.starts_with(build::LISTS)));
        }
    }
    Ok(found)
}

/// The storage drivers that a store has containers of.
pub(super) fn drivers(root: &Path) -> io::Result<Vec<String>> {
    let names = read_dir(root)?.into_iter().filter_map(|path| {
        path.file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_suffix("-containers"))
            .map(str::to_owned)
    });
    Ok(names.collect())
}

fn read_dir(path: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(path) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The attempt in what [`Podman::cgroup_of`] or [`Podman::mark_of`] made.
fn attempt_of(options: &Options, prefix: &str) -> Option<AttemptKey> {
    let name = options.cgroup.strip_suffix("/build").and_then(|path| path.rsplit('/').next());
    let marks = options.secrets.iter().flatten();
    let marks = marks.filter_map(|mark| mark.strip_prefix("id=")?.strip_suffix(",src=/dev/null"));
    name.into_iter().chain(marks).find_map(|name| name.strip_prefix(prefix)?.parse().ok())
}

/// A directory of the unified tree as a path in the hierarchy, without a slash at the end.
pub(super) fn in_hierarchy(base: Option<&Path>) -> String {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let inside = base.and_then(|base| cgroup_mounts(&mounts).find_map(|(mount, _)| base.strip_prefix(mount).ok()));
    inside.filter(|path| !path.as_os_str().is_empty()).map_or_else(String::new, |path| format!("/{}", path.display()))
}

/// Limits a build's containers in the trees that cgroup v1 has: the runtime puts them below the attempt's cgroup of the unified tree,
/// as a path, in every tree. Memory and processor time are one limit for podman and its containers; a container's
/// processes have one of their own, or podman itself would be short of them.
pub(super) fn limit_cgroups(path: &str, wanted: &Wanted, mut limits: Limits) -> io::Result<Limits> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let attempt = Path::new(path.trim_start_matches('/')).parent().unwrap_or(Path::new(""));
    let trees = || cgroup_mounts(&mounts).filter_map(|(mount, options)| Some((Path::new(mount), options?)));
    for group in &mut limits.groups {
        if let Some((mount, _)) = trees().find(|(mount, _)| group.path.starts_with(mount)) {
            group.path = mount.join(attempt);
            fs::create_dir_all(group.path.parent().unwrap_or(mount))?;
        }
    }
    let has_pids = |options: &str| options.split(',').any(|word| word == "pids");
    if let Some(processes) = wanted.processes
        && let Some((mount, _)) = trees().find(|(_, options)| has_pids(options))
    {
        let group = mount.join(attempt);
        fs::create_dir_all(&group)?;
        fs::write(group.join("pids.max"), processes.to_string())?;
    }
    Ok(limits)
}

/// Removes the cgroups of attempts that nobody knows any more.
fn remove_stale_cgroups(base: &str, prefix: &str, alive: &BTreeSet<AttemptKey>) -> io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for (mount, options) in cgroup_mounts(&mounts) {
        // In the unified tree the agent puts them away, and kills who is in there.
        if options.is_none() {
            continue;
        }
        let entries = fs::read_dir(Path::new(mount).join(base.trim_start_matches('/'))).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name();
            let key = name.to_str().and_then(|name| name.strip_prefix(prefix)?.parse::<AttemptKey>().ok());
            if key.is_some_and(|key| !alive.contains(&key)) {
                remove_groups(&entry.path(), GROUPS_DEPTH_MAX);
            }
        }
    }
    Ok(())
}

/// Removes a build's cgroup and the one above it from every tree: the runtime leaves them in those of cgroup v1.
pub(super) fn remove_cgroups(path: &str) -> io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for (mount, _) in cgroup_mounts(&mounts) {
        let build = Path::new(mount).join(path.trim_start_matches('/'));
        if let Some(attempt) = build.parent() {
            remove_groups(attempt, GROUPS_DEPTH_MAX);
        }
    }
    Ok(())
}

/// Removes a cgroup and those below, which the runtime and steps made. That there is none is fine, and it is mostly so; else nobody
/// is in them any more who could be hurt.
fn remove_groups(at: &Path, depth: u32) {
    if fs::remove_dir(at).is_ok() || depth == 0 {
        return;
    }
    for entry in fs::read_dir(at).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path(), depth - 1);
        }
    }
    let _ = fs::remove_dir(at);
}

/// Where cgroup trees are mounted, and the options of those of cgroup v1, controllers among them.
fn cgroup_mounts(mountinfo: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    mountinfo.lines().filter_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        match filesystem.split(' ').next()? {
            "cgroup2" => Some((point, None)),
            "cgroup" => Some((point, filesystem.split(' ').nth(2))),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_tell_whose_they_are() {
        let root = tempfile::tempdir().unwrap();
        let lay = |id: &str, notes: &str| {
            let dir = root.path().join("overlay-containers").join(id).join("userdata");
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("buildah.json"), notes).unwrap();
        };
        lay("a", r#"{"type":"buildah 0.0.1","CommonBuildOpts":{"CgroupParent":"/x/helix-1-b.0.2/build","Memory":0}}"#);
        lay("b", r#"{"CommonBuildOpts":{"CgroupParent":"/machine.slice"}}"#);
        lay("c", "half");
        let marked =
            r#"{"CommonBuildOpts":{"CgroupParent":"","Secrets":["id=x,src=/y","id=helix-1-b.0.3,src=/dev/null"]}}"#;
        lay("d", marked);
        lay("e", r#"{"CommonBuildOpts":{"CgroupParent":"","Secrets":null}}"#);
        fs::write(root.path().join("overlay-containers/containers.json"), "[]").unwrap();
        fs::create_dir_all(root.path().join("overlay-images/d")).unwrap();
        let mut found = containers(root.path(), "helix-1-").unwrap();
        found.sort_by(|a, b| a.id.cmp(&b.id));
        let container = |id: &str, attempt: Option<&str>| Container {
            id: id.to_owned(),
            attempt: attempt.map(|key| key.parse().unwrap()),
        };
        let marked = container("d", Some("b.0.3"));
        let expected =
            [container("a", Some("b.0.2")), container("b", None), container("c", None), marked, container("e", None)];
        assert_eq!(found, expected);
        assert_eq!(containers(&root.path().join("none"), "").unwrap(), []);
    }

    #[test]
    fn lists_are_found_by_name() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(lists(root.path()).unwrap(), Vec::<String>::new());
        let dir = root.path().join("overlay-images");
        fs::create_dir_all(&dir).unwrap();
        assert_eq!(lists(root.path()).unwrap(), Vec::<String>::new());
        let list = build::list_name(&"b.0.2".parse().unwrap());
        let text =
            format!(r#"[{{"id":"a","names":["localhost/x:1","{list}"]}},{{"id":"b"}},{{"names":["x/{list}"]}}]"#);
        fs::write(dir.join("images.json"), text).unwrap();
        assert_eq!(lists(root.path()).unwrap(), [list]);
    }

    #[test]
    fn finds_the_trees() {
        let text = "30 29 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                    31 29 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n\
                    32 29 0:28 / /tmp rw - tmpfs tmpfs rw\n";
        let expected = [("/sys/fs/cgroup/cpu", Some("rw,cpu,cpuacct")), ("/sys/fs/cgroup/unified", None)];
        assert_eq!(cgroup_mounts(text).collect::<Vec<_>>(), expected);
    }
}
