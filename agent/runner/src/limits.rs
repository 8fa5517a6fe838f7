//! What an attempt may use, as its order says it: cgroups with their settings, resource limits of the process, a bound on
//! the disk. Which of these a host can enforce is found out by [`crate::cgroup::Host`].

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use helix_model::Room;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::codec::{Decoder, Encoder, FormatError};

/// Cgroups of an attempt, at most: one for each controller.
const GROUPS_MAX: u32 = 16;

/// Settings of a cgroup, at most.
const SETTINGS_MAX: u32 = 16;

/// A disk with less than this is full: whoever failed on it failed for that. Of a small one it is a share.
const FULL_BYTES: u64 = 256 * 1024;
const FULL_SHARE: u64 = 64;
const FULL_FILES: u64 = 8;

/// Whether the file system at a path is full, as far as can be known.
#[must_use]
pub fn is_full(path: &Path) -> bool {
    has_less(path, |total| FULL_BYTES.min(total / FULL_SHARE))
}

/// The same of one that ends at a wall. It refuses a large write while there is room for a small one, and has a little more
/// room than the limit says, so that nobody is stopped before it.
#[must_use]
pub fn is_at_wall(path: &Path) -> bool {
    has_less(path, |total| (total / 16).clamp(FULL_BYTES, 8 * FULL_BYTES))
}

fn has_less(path: &Path, few: impl FnOnce(u64) -> u64) -> bool {
    let Ok(stat) = rustix::fs::statvfs(path) else { return false };
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    let few = few(bytes(stat.f_blocks));
    // One that counts nothing is never full.
    (stat.f_blocks > 0 && bytes(stat.f_bavail) < few) || (stat.f_files > 0 && stat.f_favail < FULL_FILES)
}

/// A cgroup that is made for an attempt, and removed with it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Group {
    /// A directory that does not exist yet; or [`crate::Order::cgroup`], which is then made once.
    pub path: PathBuf,
    /// Files in it and what is written to them before anybody enters.
    pub settings: Vec<(String, String)>,
}

/// How much of a disk an attempt may fill.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskLimit {
    /// The directory that counts, with all in it.
    pub root: PathBuf,
    /// Allocated bytes, at most.
    pub bytes: u64,
    /// Files and directories, at most.
    pub files: u64,
    /// Whose limit the bytes are: the attempt's, or the host's, of which so much is left.
    pub room: Room,
    /// A directory whose file system ends where the limit does. Without one, what is written is counted.
    pub wall: Option<PathBuf>,
}

/// All limits of an attempt beside time and log. The default is none.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// Cgroups. One that cannot be made or set keeps the command from being started.
    pub groups: Vec<Group>,
    /// RLIMIT_NOFILE.
    pub open_files: Option<u64>,
    /// RLIMIT_NPROC: counts all processes of the user, and not for root.
    pub processes: Option<u64>,
    /// RLIMIT_AS, of each process.
    pub address_space: Option<u64>,
    /// RLIMIT_FSIZE, of each file.
    pub file_bytes: Option<u64>,
    /// What is looked at while the command runs; beyond it the command is stopped with `disk_full`.
    pub disk: Option<DiskLimit>,
}

impl Limits {
    /// Sets the resource limits of this process, which what it starts inherits. No core is ever written.
    ///
    /// # Errors
    /// Those of the system. A limit above what this process may set is lowered to that.
    pub fn set_own(&self) -> io::Result<()> {
        let wanted = [
            (Resource::Core, Some(0)),
            (Resource::Nofile, self.open_files),
            (Resource::Nproc, self.processes),
            (Resource::As, self.address_space),
            (Resource::Fsize, self.file_bytes),
        ];
        for (resource, limit) in wanted {
            if let Some(limit) = limit {
                let limit = getrlimit(resource).maximum.map_or(limit, |maximum| limit.min(maximum));
                setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) })?;
            }
        }
        Ok(())
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Encoder::default();
        out.u32(count(self.groups.len()));
        for group in &self.groups {
            out.bytes(group.path.as_os_str().as_bytes()).u32(count(group.settings.len()));
            for (file, value) in &group.settings {
                out.bytes(file.as_bytes()).bytes(value.as_bytes());
            }
        }
        for limit in [self.open_files, self.processes, self.address_space, self.file_bytes] {
            match limit {
                None => out.u8(0),
                Some(limit) => out.u8(1).u64(limit),
            };
        }
        match &self.disk {
            None => out.u8(0),
            Some(disk) => {
                out.u8(2).bytes(disk.root.as_os_str().as_bytes()).u64(disk.bytes).u64(disk.files);
                let wall = disk.wall.as_ref().map_or(&b""[..], |wall| wall.as_os_str().as_bytes());
                out.u8(u8::from(disk.room == Room::Own)).bytes(wall)
            }
        };
        out.finish()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Decoder::new(bytes);
        let groups = (0..at_most(fields.u32()?, GROUPS_MAX)?).map(|_| group(&mut fields)).collect::<Result<_, _>>()?;
        let mut limit = || match fields.u8()? {
            0 => Ok(None),
            1 => fields.u64().map(Some),
            _ => Err(FormatError::Value("limit")),
        };
        let (open_files, processes, address_space, file_bytes) = (limit()?, limit()?, limit()?, limit()?);
        let disk = match fields.u8()? {
            0 => None,
            form @ (1 | 2) => Some(disk(form, &mut fields)?),
            _ => return Err(FormatError::Value("disk")),
        };
        fields.end()?;
        Ok(Self { groups, open_files, processes, address_space, file_bytes, disk })
    }
}

/// In the first form nobody had said yet whose limit it is, and all were counted.
fn disk(form: u8, fields: &mut Decoder<'_>) -> Result<DiskLimit, FormatError> {
    let (root, bytes, files) = (path(fields)?, fields.u64()?, fields.u64()?);
    let (own, wall) = if form == 1 { (0, PathBuf::new()) } else { (fields.u8()?, path(fields)?) };
    let room = match own {
        0 => Room::Host,
        1 => Room::Own,
        _ => return Err(FormatError::Value("disk")),
    };
    Ok(DiskLimit { root, bytes, files, room, wall: (!wall.as_os_str().is_empty()).then_some(wall) })
}

fn group(fields: &mut Decoder<'_>) -> Result<Group, FormatError> {
    let path = path(fields)?;
    let count = at_most(fields.u32()?, SETTINGS_MAX)?;
    let setting = |fields: &mut Decoder<'_>| {
        let file = fields.text("setting")?.to_owned();
        // A name in the group, never a way out of it.
        if file.contains(['/', '\0']) || file.starts_with('.') {
            return Err(FormatError::Value("setting"));
        }
        Ok((file, fields.text("setting")?.to_owned()))
    };
    let settings = (0..count).map(|_| setting(fields)).collect::<Result<_, _>>()?;
    Ok(Group { path, settings })
}

fn path(fields: &mut Decoder<'_>) -> Result<PathBuf, FormatError> {
    let bytes = fields.bytes()?;
    if bytes.contains(&0) { Err(FormatError::Value("path")) } else { Ok(OsString::from_vec(bytes.to_vec()).into()) }
}

fn at_most(count: u32, most: u32) -> Result<u32, FormatError> {
    if count > most { Err(FormatError::Value("count")) } else { Ok(count) }
}

fn count(length: usize) -> u32 {
    u32::try_from(length).expect("an attempt has a handful of limits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_it_writes_and_refuses_ways_out() {
        let group = |file: &str| Group {
            path: "/sys/fs/cgroup/pids/x".into(),
            settings: vec![(file.to_owned(), "4096".to_owned()), ("b".to_owned(), String::new())],
        };
        let full = Limits {
            groups: vec![group("pids.max"), Group { path: "/y".into(), settings: vec![] }],
            open_files: Some(1024),
            processes: None,
            address_space: Some(0),
            file_bytes: Some(u64::MAX),
            disk: Some(DiskLimit { root: "/w".into(), bytes: 1, files: 2, room: Room::Own, wall: Some("/w/x".into()) }),
        };
        for limits in [full.clone(), Limits::default()] {
            assert_eq!(Limits::decode(&limits.encode()), Ok(limits));
        }
        // As an agent of before ordered it.
        let mut first = Encoder::default();
        first.u32(0).u8(0).u8(0).u8(0).u8(0).u8(1).bytes(b"/w").u64(1).u64(2);
        let counted = DiskLimit { root: "/w".into(), bytes: 1, files: 2, room: Room::Host, wall: None };
        assert_eq!(Limits::decode(&first.finish()), Ok(Limits { disk: Some(counted), ..Limits::default() }));
        for name in ["../cgroup.procs", "/etc/passwd", "."] {
            let wrong = Limits { groups: vec![group(name)], ..full.clone() };
            assert_eq!(Limits::decode(&wrong.encode()), Err(FormatError::Value("setting")));
        }
    }
}
