//! Who isolated builds are on the host, and handing them their directories.
//!
//! Under an agent that is root every attempt has a user of its own, derived from its key, which exists in no list of users
//! and owns nothing but its workdir. Two attempts that happen upon one number are kept apart by their namespaces all the same.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, lchown};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use helix_model::AttemptKey;
use helix_runner::User;

use crate::attempt::workdir::Workdir;
use crate::data_dir::make_private;

/// A range that nobody else gives numbers from: below it are users, subordinate users and containers, above it is nobody.
const FIRST: u32 = 0x7000_0000;
const COUNT: u32 = 0x0800_0000;
/// How many are needed at least where only some are to be had, as in a container.
const COUNT_MIN: u32 = 4096;

/// The key `exec.user`, read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum UserSetting {
    /// One for each attempt where the agent is root, else the agent's own.
    Unsaid,
    /// This one.
    Fixed(User),
}

impl UserSetting {
    /// Reads `UID`, `UID:GID`, or the name of a user in `/etc/passwd`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self::Unsaid);
        }
        let numbers = match text.split_once(':') {
            Some((uid, gid)) => uid.parse().ok().zip(gid.parse().ok()),
            None => text.parse().ok().map(|uid| (uid, uid)),
        };
        let (uid, gid) = match numbers {
            Some(numbers) => numbers,
            None => listed(text).ok_or_else(|| format!("{text:?} is neither UID:GID nor a user of this host"))?,
        };
        if uid == 0 || gid == 0 {
            return Err("builds are never run as root".to_owned());
        }
        Ok(Self::Fixed(User { uid, gid }))
    }
}

fn listed(name: &str) -> Option<(u32, u32)> {
    let users = fs::read_to_string("/etc/passwd").ok()?;
    users.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.len() >= 4 && fields[0] == name).then(|| Some((fields[2].parse().ok()?, fields[3].parse().ok()?)))?
    })
}

/// Whom attempts run as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owners {
    /// The agent's own user: it is not root and can choose no other.
    Agent,
    /// One for all.
    Fixed(User),
    /// One each, out of this range.
    Each {
        /// The lowest number.
        first: u32,
        /// How many.
        count: u32,
    },
}

impl Owners {
    /// Chooses by configuration and rights.
    ///
    /// # Errors
    /// When nobody but root could be chosen, or the wish needs root.
    pub fn choose(setting: &str) -> anyhow::Result<Self> {
        let is_root = rustix::process::geteuid().is_root();
        match UserSetting::parse(setting).map_err(anyhow::Error::msg).context("`exec.user`")? {
            UserSetting::Fixed(_) if !is_root => bail!("`exec.user`: only an agent that is root can take another user"),
            UserSetting::Fixed(user) => Ok(Self::Fixed(user)),
            UserSetting::Unsaid if !is_root => Ok(Self::Agent),
            UserSetting::Unsaid => {
                let read = |path: &str| fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
                let found = common_range(&read("/proc/self/uid_map")?, &read("/proc/self/gid_map")?);
                let (first, count) = found.context("this root has no other users to run builds as: set `exec.user`")?;
                Ok(Self::Each { first, count })
            }
        }
    }

    /// An attempt's user; `None` for the agent's own.
    #[must_use]
    pub fn of(&self, key: &AttemptKey) -> Option<User> {
        match *self {
            Self::Agent => None,
            Self::Fixed(user) => Some(user),
            Self::Each { first, count } => {
                let id = first + number_of(key) % count;
                Some(User { uid: id, gid: id })
            }
        }
    }
}

/// A number that is an attempt's for all time; another may have the same.
pub(crate) fn number_of(key: &AttemptKey) -> u32 {
    hash(key.to_string().as_bytes())
}

/// FNV-1a: the same for all time, which is all that is asked of it.
fn hash(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// Numbers that stand for both a user and a group here: the range set aside for it, else the end of the longest.
fn common_range(uid_map: &str, gid_map: &str) -> Option<(u32, u32)> {
    let (uids, gids) = (ranges(uid_map), ranges(gid_map));
    let has =
        |ranges: &[(u64, u64)], from: u64, to: u64| ranges.iter().any(|(first, end)| *first <= from && to <= *end);
    let wanted = (u64::from(FIRST), u64::from(FIRST) + u64::from(COUNT));
    if has(&uids, wanted.0, wanted.1) && has(&gids, wanted.0, wanted.1) {
        return Some((FIRST, COUNT));
    }
    // Not the last ones: nobody and its like live there.
    let (_, end) = uids.iter().max_by_key(|(first, end)| end - first)?;
    let to = end.checked_sub(u64::from(COUNT_MIN))?;
    let from = to.checked_sub(u64::from(COUNT_MIN))?;
    let usable = from >= u64::from(COUNT_MIN) && has(&uids, from, to) && has(&gids, from, to);
    usable.then_some((u32::try_from(from).ok()?, COUNT_MIN))
}

fn ranges(map: &str) -> Vec<(u64, u64)> {
    let of_line = |line: &str| {
        let mut fields = line.split_whitespace().map(str::parse::<u64>);
        let (first, _, count) = (fields.next()?.ok()?, fields.next()?.ok()?, fields.next()?.ok()?);
        Some((first, first.checked_add(count)?))
    };
    map.lines().filter_map(of_line).collect()
}

/// Gives the attempt's directories and all in them to its user. Nothing of the build has run yet, so what lies there is what
/// the agent itself put there; links are not followed, and none leads out by another name.
pub(super) fn hand_over(workdir: &Workdir, user: Option<User>) -> io::Result<()> {
    for path in [workdir.work(), workdir.home(), workdir.tmp()] {
        make_private(&path)?;
    }
    let Some(user) = user else { return Ok(()) };
    // Its own parts are the build's; the directory around them stays the agent's, so that none of them is ever replaced.
    fs::set_permissions(workdir.root(), fs::Permissions::from_mode(0o711))?;
    for path in [workdir.work(), workdir.home(), workdir.tmp()] {
        give(path, user)?;
    }
    Ok(())
}

fn give(top: PathBuf, user: User) -> io::Result<()> {
    let chown = |path: &Path| lchown(path, Some(user.uid), Some(user.gid));
    chown(&top)?;
    let mut pending = vec![top];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            chown(&entry.path())?;
            if entry.file_type()?.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_numbers_or_names_and_never_root() {
        assert_eq!(UserSetting::parse(""), Ok(UserSetting::Unsaid));
        assert_eq!(UserSetting::parse("7:8"), Ok(UserSetting::Fixed(User { uid: 7, gid: 8 })));
        assert_eq!(UserSetting::parse("7"), Ok(UserSetting::Fixed(User { uid: 7, gid: 7 })));
        for wrong in ["0", "7:0", "root", "no such user", "1:2:3", "-1"] {
            assert!(UserSetting::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_range_is_one_that_exists() {
        let whole = "         0          0 4294967295\n";
        assert_eq!(common_range(whole, whole), Some((FIRST, COUNT)));
        let container = "0 1000 1\n1 100000 65536\n";
        assert_eq!(common_range(container, container), Some((65537 - 8192, 4096)));
        assert_eq!(common_range("0 1000 1\n", "0 1000 1\n"), None);
        assert_eq!(common_range(container, "0 1000 1\n"), None);
        let each = Owners::Each { first: FIRST, count: COUNT };
        let user = |key: &str| each.of(&key.parse().unwrap()).unwrap().uid;
        assert_eq!(user("b.0.1"), user("b.0.1"));
        assert!(user("b.0.1") != user("b.0.2") && user("b.0.1") >= FIRST);
    }
}
