//! What a running build takes of the store: its containers, and the layers that were made under them since it began.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use helix_model::AttemptKey;
use serde::Deserialize;

use super::{Podman, sweep};
use crate::blocking::blocking;

/// How long counting the files of one container may take; more than that is counted next time, or is not seen.
const COUNT_LIMIT: Duration = Duration::from_secs(5);

/// What a build takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Allocated bytes.
    pub bytes: u64,
    /// Files and directories, without those of finished layers.
    pub files: u64,
}

/// A layer in the store's list.
#[derive(Deserialize)]
struct Layer {
    id: String,
    #[serde(default)]
    parent: String,
    /// Of a finished one.
    #[serde(rename = "diff-size")]
    size: Option<u64>,
}

/// A container in the store's list.
#[derive(Deserialize)]
struct Listed {
    id: String,
    #[serde(default)]
    layer: String,
}

impl Podman {
    /// What an attempt that began then takes of the store.
    ///
    /// # Errors
    /// Those of the file system.
    pub async fn usage(&self, key: &AttemptKey, since: SystemTime) -> io::Result<Usage> {
        let (root, prefix, key) = (self.config.podman.root.clone(), self.cgroups.1.clone(), key.clone());
        blocking(move || usage(&root, &prefix, &key, since)).await
    }
}

fn usage(root: &Path, prefix: &str, key: &AttemptKey, since: SystemTime) -> io::Result<Usage> {
    let own: BTreeSet<String> = sweep::containers(root, prefix)?
        .into_iter()
        .filter(|container| container.attempt.as_ref() == Some(key))
        .map(|container| container.id)
        .collect();
    let mut total = Usage::default();
    if own.is_empty() {
        return Ok(total);
    }
    for driver in sweep::drivers(root)? {
        let listed: Vec<Listed> = list(&root.join(format!("{driver}-containers/containers.json")))?;
        let layers: Vec<Layer> = list(&root.join(format!("{driver}-layers/layers.json")))?;
        let layers: BTreeMap<&str, &Layer> = layers.iter().map(|layer| (layer.id.as_str(), layer)).collect();
        let mut seen = BTreeSet::new();
        for container in listed.iter().filter(|container| own.contains(&container.id)) {
            let mut id = container.layer.as_str();
            while let Some(layer) = layers.get(id)
                && seen.insert(id)
            {
                let dir = if driver == "vfs" { root.join("vfs/dir").join(id) } else { root.join(&driver).join(id) };
                // Those below it are older still.
                if fs::metadata(&dir).and_then(|dir| dir.created()).is_ok_and(|created| created < since) {
                    break;
                }
                let (bytes, files) = match layer.size {
                    Some(size) => (size, 0),
                    None => helix_runner::disk::measure(&dir, COUNT_LIMIT).unwrap_or_default(),
                };
                total.bytes = total.bytes.saturating_add(bytes);
                total.files = total.files.saturating_add(files);
                id = &layer.parent;
            }
        }
    }
    Ok(total)
}

/// Reads a list that podman replaces as a whole; one that is not there yet is empty.
fn list<T: for<'a> Deserialize<'a>>(path: &Path) -> io::Result<Vec<T>> {
    match fs::read(path) {
        Ok(text) => Ok(serde_json::from_slice(&text)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_under_a_builds_containers_counts_if_it_is_as_young_as_the_build() {
        let base = tempfile::tempdir().unwrap();
        let root = base.path();
        let lay = |path: &str, text: &[u8]| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        lay("overlay/base/diff/x", &[0; 1 << 20]);
        let old = fs::metadata(root.join("overlay/base")).unwrap().created().unwrap();
        while SystemTime::now() <= old {}
        let since = SystemTime::now();
        let passed = |at: SystemTime| while SystemTime::now().duration_since(at).is_ok_and(|d| d.as_millis() < 20) {};
        passed(since);
        lay("overlay/step/diff/x", b"");
        lay("overlay/own/diff/x", &[1; 1 << 20]);
        lay("overlay/other/diff/x", &[1; 1 << 20]);
        for (id, attempt) in [("c1", "b.0.1"), ("c2", "b.0.2")] {
            let notes = format!(r#"{{"CommonBuildOpts":{{"CgroupParent":"/helix-1-{attempt}/build"}}}}"#);
            lay(&format!("overlay-containers/{id}/userdata/buildah.json"), notes.as_bytes());
        }
        lay("overlay-containers/containers.json", br#"[{"id":"c1","layer":"own"},{"id":"c2","layer":"other"}]"#);
        lay(
            "overlay-layers/layers.json",
            br#"[{"id":"base","diff-size":5000},{"id":"step","parent":"base","diff-size":7000},
                {"id":"own","parent":"step"},{"id":"other","parent":"step"}]"#,
        );
        let key: AttemptKey = "b.0.1".parse().unwrap();
        let found = usage(root, "helix-1-", &key, since).unwrap();
        assert!((1 << 20..(1 << 20) + 100_000).contains(&(found.bytes - 7000)) && found.files == 2, "{found:?}");
        assert_eq!(usage(root, "helix-1-", &"c.0.1".parse().unwrap(), since).unwrap(), Usage::default());
        assert_eq!(usage(&root.join("none"), "helix-1-", &key, since).unwrap(), Usage::default());
    }
}
