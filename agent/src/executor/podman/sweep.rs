//! What builds leave in the store when they are killed, and its removal: build containers with their mounts, lists of
//! images, and cgroups that the runtime made.
//!
//! podman does not label build containers. But it notes the cgroup that each was given, and that names the attempt.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use helix_model::AttemptKey;
use helix_runner::cgroup::Wanted;
use serde::Deserialize;
use tokio_util::task::TaskTracker;

use super::{Podman, build};
use crate::blocking::blocking;

/// How long removing containers may take.
const REMOVE_LIMIT: Duration = Duration::from_secs(120);

/// A build container as the store has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Container {
    id: String,
    /// The attempt that made it, where that can be told.
    attempt: Option<AttemptKey>,
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
        if self.containers().await?.iter().any(|container| left(container.attempt.as_ref())) {
            let _share = self.share().await?;
            self.remove_containers(tracker, left).await?;
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
fn containers(root: &Path, prefix: &str) -> io::Result<Vec<Container>> {
    let mut found = Vec::new();
    for kind in read_dir(root)? {
        // DRIVER-containers/ID/userdata/buildah.json
        if !kind.file_name().is_some_and(|name| name.to_string_lossy().ends_with("-containers")) {
            continue;
        }
        for container in read_dir(&kind)? {
            let Some(id) = container.file_name().and_then(|name| name.to_str()) else { continue };
            if !container.is_dir() {
                continue;
            }
            let notes = fs::read(container.join("userdata/buildah.json")).unwrap_or_default();
            let notes: Option<Notes> = serde_json::from_slice(&notes).ok();
            let attempt = notes.and_then(|notes| attempt_of(&notes.options.cgroup, prefix));
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

fn read_dir(path: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(path) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The attempt in a name that [`Podman::cgroup_of`] made.
fn attempt_of(cgroup: &str, prefix: &str) -> Option<AttemptKey> {
    cgroup.strip_suffix("/build")?.rsplit('/').next()?.strip_prefix(prefix)?.parse().ok()
}

/// A directory of the unified tree as a path in the hierarchy, without a slash at the end.
pub(super) fn in_hierarchy(base: Option<&Path>) -> String {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let inside = base.and_then(|base| cgroup_mounts(&mounts).find_map(|(mount, _)| base.strip_prefix(mount).ok()));
    inside.filter(|path| !path.as_os_str().is_empty()).map_or_else(String::new, |path| format!("/{}", path.display()))
}

/// Makes the cgroup above a build's in the trees that cgroup v1 has, and limits it: the runtime puts containers below it, and what it
/// sets for each of them is their own.
pub(super) fn limit_cgroups(path: &str, wanted: &Wanted) -> io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let quota = wanted.cpu_milli.map(|milli| milli.saturating_mul(100).max(1000));
    let settings = [
        ("pids", "pids.max", wanted.processes),
        ("memory", "memory.limit_in_bytes", wanted.memory_bytes),
        ("cpu", "cpu.cfs_quota_us", quota),
    ];
    for (controller, file, value) in settings {
        let Some(value) = value else { continue };
        let tree = cgroup_mounts(&mounts)
            .find(|(_, options)| options.is_some_and(|options| options.split(',').any(|word| word == controller)));
        let Some((mount, _)) = tree else { continue };
        let build = Path::new(mount).join(path.trim_start_matches('/'));
        let Some(attempt) = build.parent() else { continue };
        fs::create_dir_all(attempt)?;
        fs::write(attempt.join(file), value.to_string())?;
    }
    Ok(())
}

/// Removes a build's cgroup and the one above it from every tree: the runtime leaves them in those of cgroup v1.
pub(super) fn remove_cgroups(path: &str) -> io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for (mount, _) in cgroup_mounts(&mounts) {
        let build = Path::new(mount).join(path.trim_start_matches('/'));
        for group in [Some(build.as_path()), build.parent()].into_iter().flatten() {
            match fs::remove_dir(group) {
                // One that is not there, mostly. Else nobody is in it any more who could be hurt.
                Ok(()) | Err(_) => {}
            }
        }
    }
    Ok(())
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
        fs::write(root.path().join("overlay-containers/containers.json"), "[]").unwrap();
        fs::create_dir_all(root.path().join("overlay-images/d")).unwrap();
        let mut found = containers(root.path(), "helix-1-").unwrap();
        found.sort_by(|a, b| a.id.cmp(&b.id));
        let container = |id: &str, attempt: Option<&str>| Container {
            id: id.to_owned(),
            attempt: attempt.map(|key| key.parse().unwrap()),
        };
        assert_eq!(found, [container("a", Some("b.0.2")), container("b", None), container("c", None)]);
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
