//! What of the host isolated builds see: programs and libraries, the parts of `/etc` that programs need to run, and what the
//! agent's owner adds. All of it to read. Nothing of the agent's own.

use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::bail;
use helix_runner::isolation::{Absence, Access, Entry};

/// Files and directories in `/etc`: names, languages, certificates, the network. No passwords, keys, or other programs' secrets.
const ETC: &[&str] = &[
    "alternatives",
    "bash.bashrc",
    "ca-certificates",
    "ca-certificates.conf",
    "debian_version",
    "fonts",
    "gai.conf",
    "gss",
    "host.conf",
    "hosts",
    "inputrc",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "locale.alias",
    "locale.conf",
    "localtime",
    "lsb-release",
    "magic",
    "mime.types",
    "networks",
    "nsswitch.conf",
    "os-release",
    "pki/ca-trust",
    "pki/tls/cert.pem",
    "pki/tls/certs",
    "pki/tls/openssl.cnf",
    "profile",
    "profile.d",
    "protocols",
    "redhat-release",
    "resolv.conf",
    "rpc",
    "services",
    "shells",
    "skel",
    "ssl/cert.pem",
    "ssl/certs",
    "ssl/openssl.cnf",
    "terminfo",
    "timezone",
    "xattr.conf",
    "xml",
];

/// Toolchains that keep their defaults in `/etc`, under names with versions.
const ETC_PREFIXES: &[&str] = &["java", "perl", "php", "python", "R", "ruby", "crypto-policies", "maven"];

/// Directories beside `/usr` with programs and libraries; on most hosts links into it.
const ROOT: &[&str] = &["bin", "sbin", "lib", "lib32", "lib64", "libx32", "libo32"];

/// What builds see of this host as it is now, and of what the owner adds.
pub(super) fn of_host(binds: Vec<Entry>) -> Vec<Entry> {
    let mut view = vec![Entry::host("/usr")];
    for name in ROOT {
        let path = Path::new("/").join(name);
        match fs::read_link(&path) {
            Ok(to) => view.push(Entry::Link { target: path, to }),
            Err(_) if path.is_dir() => view.push(Entry::host(path)),
            Err(_) => {}
        }
    }
    let etc = Path::new("/etc");
    view.extend(ETC.iter().map(|name| etc.join(name)).filter(|path| path.exists()).map(Entry::host));
    let mut more: Vec<PathBuf> = fs::read_dir(etc)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(is_toolchain))
        .map(|entry| entry.path())
        .collect();
    more.sort();
    view.extend(more.into_iter().map(Entry::host));
    // How many processors there are, and in what order: thread pools ask.
    view.push(Entry::host("/sys/devices/system/cpu"));
    view.extend(binds);
    view
}

fn is_toolchain(name: &str) -> bool {
    ETC_PREFIXES.iter().any(|prefix| {
        let rest = name.strip_prefix(prefix);
        rest.is_some_and(|rest| rest.chars().all(|letter| !letter.is_ascii_alphabetic()) || rest.starts_with('-'))
    })
}

/// One of `exec.bind`: `SRC:DST:ro`, `SRC:DST:rw`, `SRC:DST` or `SRC`; to read unless it says otherwise.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bind {
    source: PathBuf,
    target: PathBuf,
    access: Access,
}

impl Bind {
    /// Reads one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(':').collect();
        let (source, target, access) = match parts[..] {
            [source] => (source, source, "ro"),
            [source, target] => (source, target, "ro"),
            [source, target, access] => (source, target, access),
            _ => return Err(format!("{text:?} is not SRC:DST:ro")),
        };
        let access = match access {
            "ro" => Access::Read,
            "rw" => Access::Write,
            other => return Err(format!("{text:?}: {other:?} is neither ro nor rw")),
        };
        for path in [source, target] {
            let plain =
                Path::new(path).components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
            if !path.starts_with('/') || !plain {
                return Err(format!("{text:?}: {path:?} is not an absolute path without `..`"));
            }
        }
        let taken = ["/proc", "/dev", "/tmp"];
        if target == "/" || taken.iter().any(|taken| Path::new(target).starts_with(taken)) {
            return Err(format!("{text:?}: builds have a {target} of their own"));
        }
        Ok(Self { source: source.into(), target: target.into(), access })
    }

    pub(super) fn entry(self) -> Entry {
        Entry::Bind { source: self.source, target: self.target, access: self.access, absence: Absence::Fails }
    }
}

/// Refuses a view in which something of the agent's own would be seen.
pub(super) fn check_private(view: &[Entry], private: &[&Path]) -> anyhow::Result<()> {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    for entry in view {
        let Entry::Bind { source, .. } = entry else { continue };
        let shown = real(source);
        for path in private {
            let path = real(path);
            if path.starts_with(&shown) || (path.is_dir() && shown.starts_with(&path)) {
                bail!(
                    "builds would see {}, which is the agent's own, in {}: move the one or take the other from `exec.bind`",
                    path.display(),
                    source.display()
                );
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binds_are_absolute_and_leave_the_builds_own_alone() {
        let of = |source: &str, target: &str, access| Bind { source: source.into(), target: target.into(), access };
        assert_eq!(Bind::parse("/opt/x:/x:ro"), Ok(of("/opt/x", "/x", Access::Read)));
        assert_eq!(Bind::parse("/opt/x:/x"), Ok(of("/opt/x", "/x", Access::Read)));
        assert_eq!(Bind::parse("/opt/x"), Ok(of("/opt/x", "/opt/x", Access::Read)));
        assert_eq!(Bind::parse("/c:/c:rw"), Ok(of("/c", "/c", Access::Write)));
        for wrong in
            ["", "x:/x", "/x:y", "/x:/y:z", "/x:/y:ro:ro", "/../x:/x", "/x:/proc/x", "/x:/", "/x:/tmp", "/x:/dev"]
        {
            assert!(Bind::parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn nothing_of_the_agents_own_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let (data, tools) = (root.join("data"), root.join("tools"));
        fs::create_dir_all(data.join("work")).unwrap();
        fs::create_dir(&tools).unwrap();
        fs::write(root.join("key"), "").unwrap();
        std::os::unix::fs::symlink(&data, root.join("link")).unwrap();
        let key = root.join("key");
        let check = |shown: &Path| check_private(&[Entry::host(shown)], &[&data, &key]);
        check(&tools).unwrap();
        for shown in [&root, &data, &data.join("work"), &root.join("link"), Path::new("/")] {
            assert!(check(shown).is_err(), "{}", shown.display());
        }
        assert!(of_host(Vec::new()).len() > 10);
    }

    #[test]
    fn toolchains_have_versions() {
        for (name, expected) in [
            ("python3.11", true),
            ("java-17-openjdk", true),
            ("R", true),
            ("perl", true),
            ("php", true),
            ("Rocket", false),
            ("perlsecrets", false),
        ] {
            assert_eq!(is_toolchain(name), expected, "{name}");
        }
    }
}
