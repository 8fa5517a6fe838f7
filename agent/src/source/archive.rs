//! Unpacking an uploaded source: a zstd-compressed tar that nobody vouches for.
//!
//! Every directory on the way is opened without following links, so that no entry can reach through one that an
//! earlier entry made. Invariant: nothing is written outside of the directory given, and no more than the bounds allow.

use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path};

use helix_common::sha256::Sha256;
use helix_model::Digest;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, mkdirat, openat, symlinkat, unlinkat};
use rustix::io::Errno;
use tar::EntryType;

use super::SourceError;

/// Bounds of what an archive may hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of all files.
    pub bytes_max: u64,
    /// Files, directories and links.
    pub entries_max: u64,
}

impl Default for Limits {
    /// More than any source tree needs, less than fills a build host.
    fn default() -> Self {
        Self { bytes_max: 32 << 30, entries_max: 2_000_000 }
    }
}

/// Unpacks a compressed archive into a directory, and checks that its bytes are those that were announced. Blocks.
///
/// # Errors
/// `source` for an archive that is damaged, hostile or too large; else this host's fault.
pub fn unpack(bytes: impl Read, expected: &Digest, into: &Path, limits: Limits) -> Result<(), SourceError> {
    let mut hashing = HashingRead { inner: bytes, hasher: Sha256::new() };
    let unpacked = unpack_stream(&mut hashing, into, limits);
    // A damaged upload is the better explanation of whatever else went wrong.
    let drained = io::copy(&mut hashing, &mut io::sink());
    drained.map_err(|error| SourceError::host("cannot fetch the uploaded source", &error))?;
    let digest = hashing.hasher.finalize();
    if digest != *expected {
        return Err(SourceError::source(format!("the uploaded source has sha256 {digest}, not {expected}")));
    }
    unpacked
}

struct HashingRead<R> {
    inner: R,
    hasher: Sha256,
}

impl<R: Read> Read for HashingRead<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

fn unpack_stream(bytes: impl Read, into: &Path, limits: Limits) -> Result<(), SourceError> {
    let damaged = |error: io::Error| SourceError::source(format!("the uploaded source is no zstd tar: {error}"));
    let host = |error: Errno| SourceError::host("cannot unpack the uploaded source", &error.into());
    let top = openat(CWD, into, DIRECTORY, Mode::empty()).map_err(host)?;
    let mut decoder = zstd::Decoder::new(bytes).map_err(damaged)?;
    // 128 MiB of window: what zstd itself allows without being asked.
    decoder.window_log_max(27).map_err(damaged)?;
    let mut archive = tar::Archive::new(decoder);
    let (mut bytes_left, mut entries_left) = (limits.bytes_max, limits.entries_max);
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        entries_left = entries_left.checked_sub(1).ok_or_else(|| {
            SourceError::source(format!("the uploaded source has more than {} entries", limits.entries_max))
        })?;
        bytes_left = bytes_left.checked_sub(entry.size()).ok_or_else(|| {
            SourceError::source(format!("the uploaded source unpacks to more than {} bytes", limits.bytes_max))
        })?;
        unpack_entry(&top, &mut entry)?;
    }
    Ok(())
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn unpack_entry<R: Read>(top: &OwnedFd, entry: &mut tar::Entry<'_, R>) -> Result<(), SourceError> {
    let kind = entry.header().entry_type();
    if matches!(kind, EntryType::XGlobalHeader | EntryType::XHeader) {
        return Ok(());
    }
    let path = entry.path().map_err(|error| refused(&error.to_string(), "cannot be read"))?.into_owned();
    let shown = path.display().to_string();
    let parts = plain_parts(&path, &shown)?;
    let Some((name, above)) = parts.split_last() else {
        // The archive's own top.
        return if kind == EntryType::Directory { Ok(()) } else { Err(refused(&shown, "names nothing")) };
    };
    let system = |error: Errno| on_system(&shown, error);
    let dir = make_dirs(top, above).map_err(system)?;
    let dir = dir.as_ref().unwrap_or(top);
    match kind {
        EntryType::Directory => match mkdirat(dir, *name, Mode::from_raw_mode(0o755)) {
            // It has to be one, not a link to one.
            Err(Errno::EXIST) => openat(dir, *name, DIRECTORY, Mode::empty()).map(drop).map_err(system),
            other => other.map_err(system),
        },
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            replace(dir, name).map_err(system)?;
            let mode = entry.header().mode().unwrap_or(0o644) & 0o755 | 0o600;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut file = File::from(openat(dir, *name, flags, Mode::from_raw_mode(mode)).map_err(system)?);
            copy(entry, &mut file, &shown)
        }
        EntryType::Symlink => {
            let target = entry.link_name_bytes().ok_or_else(|| refused(&shown, "is a link to nothing"))?;
            replace(dir, name).map_err(system)?;
            symlinkat(target.as_ref(), dir, *name).map_err(system)
        }
        EntryType::Link => {
            let target = entry.link_name().ok().flatten().ok_or_else(|| refused(&shown, "is a link to nothing"))?;
            let target_parts = plain_parts(&target, &shown)?;
            let Some((target_name, target_above)) = target_parts.split_last() else {
                return Err(refused(&shown, "is a link to nothing"));
            };
            let target_dir = open_dirs(top, target_above).map_err(system)?;
            replace(dir, name).map_err(system)?;
            linkat(target_dir.as_ref().unwrap_or(top), *target_name, dir, *name, AtFlags::empty()).map_err(system)
        }
        _ => Err(refused(&shown, "is neither a file nor a directory nor a link")),
    }
}

/// The parts of a path that stays where it is: relative, without `..`.
fn plain_parts<'a>(path: &'a Path, shown: &str) -> Result<Vec<&'a std::ffi::OsStr>, SourceError> {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(part) if !part.as_bytes().contains(&0) => parts.push(part),
            Component::CurDir => {}
            _ => return Err(refused(shown, "leaves the directory it is unpacked in")),
        }
    }
    Ok(parts)
}

fn make_dirs(top: &OwnedFd, parts: &[&std::ffi::OsStr]) -> rustix::io::Result<Option<OwnedFd>> {
    let mut at: Option<OwnedFd> = None;
    for part in parts {
        let dir = at.as_ref().unwrap_or(top);
        match mkdirat(dir, *part, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        at = Some(openat(dir, *part, DIRECTORY, Mode::empty())?);
    }
    Ok(at)
}

fn open_dirs(top: &OwnedFd, parts: &[&std::ffi::OsStr]) -> rustix::io::Result<Option<OwnedFd>> {
    let mut at: Option<OwnedFd> = None;
    for part in parts {
        at = Some(openat(at.as_ref().unwrap_or(top), *part, DIRECTORY, Mode::empty())?);
    }
    Ok(at)
}

/// A later entry of a name replaces an earlier one, as tar does.
fn replace(dir: &OwnedFd, name: &std::ffi::OsStr) -> rustix::io::Result<()> {
    match unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error),
    }
}

fn copy(from: &mut impl Read, to: &mut File, shown: &str) -> Result<(), SourceError> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = from.read(&mut buffer).map_err(|error| refused(shown, &format!("cannot be read: {error}")))?;
        if count == 0 {
            return Ok(());
        }
        let written = to.write_all(&buffer[..count]);
        written.map_err(|error| SourceError::host(&format!("cannot unpack {shown:?}"), &error))?;
    }
}

fn refused(shown: &str, why: &str) -> SourceError {
    let shown: String = shown.chars().take(200).collect();
    SourceError::source(format!("the uploaded source is refused: {shown:?} {why}"))
}

/// What the archive provoked is its own fault; the rest is this host's.
fn on_system(shown: &str, error: Errno) -> SourceError {
    match error {
        Errno::LOOP | Errno::NOTDIR => refused(shown, "lies behind a link or a file"),
        Errno::NAMETOOLONG | Errno::INVAL | Errno::NOENT | Errno::EXIST | Errno::ISDIR | Errno::PERM | Errno::MLINK => {
            refused(shown, &format!("cannot be made: {}", io::Error::from(error)))
        }
        _ => SourceError::host("cannot unpack the uploaded source", &error.into()),
    }
}

#[cfg(test)]
mod tests;
