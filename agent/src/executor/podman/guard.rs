//! What stands between a Dockerfile and this host: rules for the guard before the container runtime (`helix-runner`, its
//! `guard.rs`), and a policy by which base images come from registries and nowhere else.

use std::ffi::OsString;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use helix_runner::AttemptDir;
use helix_runner::step::{GUARD_VARIABLE, Network, Rules};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};
use serde_json::{Value, json};

use super::Podman;

/// The owner's own policy on images.
const POLICY_OF_HOST: &str = "/etc/containers/policy.json";

/// Bytes of a small file that are read.
const SMALL_BYTES_MAX: u64 = 64 << 10;

/// What the guard says when it refuses: in the spool, of which no step sees anything.
pub(super) fn refusal_file(dir: &AttemptDir) -> PathBuf {
    dir.root().join("refused")
}

/// The beginning of a small file that podman or its guard wrote. No link is followed, and nothing but a file is read.
///
/// # Errors
/// Those of the file system.
pub fn read_small(path: &Path) -> io::Result<String> {
    // Not to wait for a FIFO's other end.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = openat(CWD, path, flags, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{} is no regular file", path.display())));
    }
    let mut bytes = Vec::new();
    std::fs::File::from(file).take(SMALL_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What the guard refused, if it did.
///
/// # Errors
/// Those of the file system.
pub fn refusal(dir: &AttemptDir) -> io::Result<Option<String>> {
    match read_small(&refusal_file(dir)) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl Podman {
    /// The variable that makes the runner's program a guard for a build that has this directory of the host, and of podman's
    /// temporary files in `scratch` what steps need.
    pub(super) fn guard_variable(
        &self,
        runtime: &str,
        own: &Path,
        scratch: &Path,
        refusal: PathBuf,
    ) -> (OsString, OsString) {
        let config = &self.config.podman;
        let network = if config.network == "host" { Network::OfHost } else { Network::Own };
        let mut places = vec![own.to_owned()];
        places.extend(volumes(&config.build_arguments));
        let rules = Rules {
            runtime: runtime.into(),
            store: config.root.clone(),
            run_store: config.runroot.clone(),
            refusal,
            scratch: scratch.to_owned(),
            network,
            places,
        };
        (GUARD_VARIABLE.into(), rules.encode())
    }

    /// Where the policy on base images is.
    pub(super) fn image_policy(&self) -> PathBuf {
        self.dir.join("policy.json")
    }

    /// Writes the policy on base images. Blocks.
    pub(super) fn write_image_policy(&self) -> io::Result<()> {
        let host = match std::fs::read(POLICY_OF_HOST) {
            Ok(text) => Some(serde_json::from_slice(&text).map_err(|error| {
                io::Error::new(io::ErrorKind::InvalidData, format!("{POLICY_OF_HOST} cannot be read: {error}"))
            })?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        std::fs::write(self.image_policy(), image_policy(host.as_ref()).to_string())
    }
}

/// What the host's owner says of registries, and no to every other transport: those read files of the host.
fn image_policy(host: Option<&Value>) -> Value {
    let said = |path: &str| host.and_then(|host| host.pointer(path)).cloned();
    let mut registries = said("/transports/docker").unwrap_or_else(|| json!({}));
    if let Some(scopes) = registries.as_object_mut()
        && !scopes.contains_key("")
    {
        let default = said("/default").unwrap_or_else(|| json!([{"type": "insecureAcceptAnything"}]));
        scopes.insert(String::new(), default);
    }
    json!({"default": [{"type": "reject"}], "transports": {"docker": registries}})
}

/// The directories of the host that its owner shows to every step.
fn volumes(arguments: &[String]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut words = arguments.iter().map(String::as_str);
    while let Some(word) = words.next() {
        let volume = match word {
            "--volume" | "-v" => words.next(),
            _ => word.strip_prefix("--volume=").or_else(|| word.strip_prefix("-v")),
        };
        let source = volume.and_then(|volume| volume.split(':').next()).filter(|source| source.starts_with('/'));
        found.extend(source.map(PathBuf::from));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_are_as_the_owner_says_and_nothing_else_is() {
        let reject = json!([{"type": "reject"}]);
        let anything = json!([{"type": "insecureAcceptAnything"}]);
        let policy = image_policy(None);
        assert_eq!((&policy["default"], &policy["transports"]["docker"][""]), (&reject, &anything));
        let signed = json!([{"type": "signedBy"}]);
        let host = json!({"default": signed, "transports": {"docker": {"h/p": anything}, "dir": {"": anything}}});
        let policy = image_policy(Some(&host));
        assert_eq!(policy["transports"], json!({"docker": {"": signed, "h/p": anything}}));
        assert_eq!(policy["default"], reject);
        let host = json!({"default": anything, "transports": {"docker": {"": reject}}});
        assert_eq!(image_policy(Some(&host))["transports"]["docker"][""], reject);
    }

    #[test]
    fn only_the_beginning_of_a_file_is_read() {
        let base = tempfile::tempdir().unwrap();
        let dir = AttemptDir::new(base.path());
        assert_eq!(refusal(&dir).unwrap(), None);
        std::fs::write(refusal_file(&dir), "x".repeat(100_000)).unwrap();
        assert_eq!(refusal(&dir).unwrap().unwrap().len(), 64 << 10);
        std::fs::remove_file(refusal_file(&dir)).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", refusal_file(&dir)).unwrap();
        assert!(refusal(&dir).is_err());
        std::fs::remove_file(refusal_file(&dir)).unwrap();
        rustix::fs::mknodat(CWD, refusal_file(&dir), FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert!(refusal(&dir).is_err());
    }

    #[test]
    fn what_the_owner_mounts_is_known() {
        let words = ["--squash", "-v", "/a:/x", "--volume=/b:/y:ro", "-v/c:/z", "--volume", "named:/v", "--env=/d"];
        let words = words.map(str::to_owned);
        assert_eq!(volumes(&words), ["/a", "/b", "/c"].map(PathBuf::from));
    }
}
