//! What a `RUN` step of a podman build may see of the host, as the agent tells it to the guard before the container runtime.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

/// The variable that makes `helix-runner` a guard, and holds its rules. podman hands its environment to the runtime; steps see
/// none of it.
pub const GUARD_VARIABLE: &str = "HELIX_STEP_GUARD";

/// Whose network a step has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Network {
    /// One of its own.
    Own,
    /// The host's: its owner wants it so.
    OfHost,
}

/// The rules for the steps of one build.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rules {
    /// The runtime that follows.
    pub runtime: PathBuf,
    /// podman's store.
    pub store: PathBuf,
    /// What of it lasts until the next boot.
    pub run_store: PathBuf,
    /// Where a refusal is written: no place of these rules holds it.
    pub refusal: PathBuf,
    /// podman's directory for temporary files: of it steps may see single caches, and files that podman makes for each step.
    pub scratch: PathBuf,
    /// Whose network steps have.
    pub network: Network,
    /// Directories of the host of which steps may see anything.
    pub places: Vec<PathBuf>,
}

impl Rules {
    /// As the variable's value: one line each.
    #[must_use]
    pub fn encode(&self) -> OsString {
        let network: &[u8] = if self.network == Network::Own { b"own" } else { b"host" };
        let mut text = network.to_vec();
        let fixed = [&self.runtime, &self.store, &self.run_store, &self.refusal, &self.scratch];
        for path in fixed.into_iter().chain(&self.places) {
            text.push(b'\n');
            text.extend_from_slice(path.as_os_str().as_bytes());
        }
        OsString::from_vec(text)
    }

    /// Reads them back; `None` for what [`Self::encode`] does not write.
    #[must_use]
    pub fn decode(text: &OsStr) -> Option<Self> {
        let mut lines = text.as_bytes().split(|byte| *byte == b'\n');
        let network = match lines.next()? {
            b"own" => Network::Own,
            b"host" => Network::OfHost,
            _ => return None,
        };
        let mut paths = lines.map(|line| PathBuf::from(OsStr::from_bytes(line)));
        let (runtime, store, run_store) = (paths.next()?, paths.next()?, paths.next()?);
        let (refusal, scratch) = (paths.next()?, paths.next()?);
        Some(Self { runtime, store, run_store, refusal, scratch, network, places: paths.collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_it_writes() {
        for network in [Network::Own, Network::OfHost] {
            for places in [vec![], vec!["/a b".into(), "/c".into()]] {
                let rules = Rules {
                    runtime: "runc".into(),
                    store: "/s".into(),
                    run_store: "/s/run".into(),
                    refusal: "/r".into(),
                    scratch: "/t".into(),
                    network,
                    places: places.clone(),
                };
                assert_eq!(Rules::decode(&rules.encode()), Some(rules));
            }
        }
        for wrong in ["", "own", "own\nrunc\n/s\n/run\n/r", "else\nrunc\n/s\n/run\n/r\n/t"] {
            assert_eq!(Rules::decode(OsStr::new(wrong)), None, "{wrong:?}");
        }
    }
}
