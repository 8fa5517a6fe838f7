//! The sled files that a registry has had one after the other, and which of them counts.
//!
//! The first lies in `registry/` itself, each later one in `registry/N/`. The file `current` there says "N BYTES": which one counts, and
//! how large it was when it was new; without it the first counts. What does not count is half of a copy or an older prefix of the log: it
//! is removed at the next start. Invariant: a generation is whole and synced before `current` names it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use helix_common::files::{Durability, sync_directory, write_atomic};
use helix_common::removal::remove_gradually;

use super::{guarded, io_error};

const CURRENT: &str = "current";
/// Which tree counts, where an earlier program replaced all rows.
const POINTER: &[u8] = b"tree";
const FIRST_TREE: &[u8] = b"rows-0";
const OPEN_RETRY: Duration = Duration::from_secs(2);

/// One of them, open.
pub(super) struct Generation {
    db: sled::Db,
    pub(super) tree: sled::Tree,
    /// Its file once more, for fsync, which sled's flush is not on Linux: who syncs it may be slower than who removes its name.
    file: File,
    directory: PathBuf,
    number: u64,
    /// Its size when it was new; 0 for the first.
    pub(super) new_bytes: u64,
}

impl Generation {
    /// Opens the one that counts, or makes the first, and removes the others.
    pub(super) fn open_current(root: &Path, cache_bytes: u64) -> io::Result<Self> {
        let (number, new_bytes) = read_current(root)?;
        let directory = directory_of(root, number);
        // Without `current` only a store that never was has neither a file of its own nor later ones.
        if !directory.join("db").exists() && (number > 0 || has_later(root)?) {
            let why = format!("{} has no rows, or lacks what says where they are", directory.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        remove_others(root, number);
        Ok(Self { new_bytes, ..Self::open(directory, number, cache_bytes)? })
    }

    /// Makes an empty one to follow this one.
    pub(super) fn next(&self, root: &Path, cache_bytes: u64) -> io::Result<Self> {
        let number = self.number + 1;
        let directory = directory_of(root, number);
        // One that was given up, and could not be removed then.
        remove_whole(&directory)?;
        fs::create_dir(&directory)?;
        Self::open(directory, number, cache_bytes)
    }

    fn open(directory: PathBuf, number: u64, cache_bytes: u64) -> io::Result<Self> {
        let began = Instant::now();
        let db = loop {
            let config = sled::Config::new().path(&directory).cache_capacity(cache_bytes).flush_every_ms(None);
            match config.open() {
                Ok(db) => break db,
                // The former owner of sled's own lock may still be on its way out.
                Err(error) if is_locked(&error) && began.elapsed() < OPEN_RETRY => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => return Err(io_error(error)),
            }
        };
        let name = db.get(POINTER).map_err(io_error)?.unwrap_or_else(|| sled::IVec::from(FIRST_TREE));
        let tree = db.open_tree(&name).map_err(io_error)?;
        let file = File::open(directory.join("db"))?;
        Ok(Self { db, tree, file, directory, number, new_bytes: 0 })
    }

    /// Makes everything written so far survive a power cut.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.db.flush().map_err(io_error)?;
        self.file.sync_data()
    }

    /// Makes one that is new survive a power cut whole, with the names of its files.
    pub(super) fn sync_new(&self, root: &Path) -> io::Result<()> {
        self.sync()?;
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                File::open(entry.path())?.sync_all()?;
            }
        }
        sync_directory(&self.directory)?;
        sync_directory(root)
    }

    /// Makes this the one that counts.
    pub(super) fn become_current(&mut self, root: &Path) -> io::Result<()> {
        self.new_bytes = self.size();
        let text = format!("{} {}\n", self.number, self.new_bytes);
        write_atomic(&root.join(CURRENT), text.as_bytes(), 0o600, Durability::Synced)
    }

    /// Removes all others.
    pub(super) fn remove_others(&self, root: &Path) {
        remove_others(root, self.number);
    }

    /// Removes one that never counted.
    pub(super) fn discard(self) {
        let directory = self.directory.clone();
        close(self);
        if let Err(error) = remove_whole(&directory) {
            tracing::warn!(%error, "half a copy of the registry stays until the next start");
        }
    }

    /// Bytes on disk.
    pub(super) fn size(&self) -> u64 {
        self.db.size_on_disk().unwrap_or(0)
    }
}

/// Lets go of one that is not needed any more. sled panics where it cannot sync on its way out, which says nothing of what is needed.
pub(super) fn close(generation: impl Sized) {
    let closed = guarded(|| {
        drop(generation);
        Ok(())
    });
    if let Err(error) = closed {
        tracing::warn!(%error, "an old file of the registry could not be closed in order");
    }
}

fn directory_of(root: &Path, number: u64) -> PathBuf {
    if number == 0 { root.to_owned() } else { root.join(number.to_string()) }
}

fn is_locked(error: &sled::Error) -> bool {
    let text = error.to_string();
    matches!(error, sled::Error::Io(_)) && (text.contains("lock") || text.contains("WouldBlock"))
}

fn read_current(root: &Path) -> io::Result<(u64, u64)> {
    let text = match fs::read(root.join(CURRENT)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((0, 0)),
        read => String::from_utf8_lossy(&read?).into_owned(),
    };
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "what says which rows count is damaged");
    let (number, bytes) = text.strip_suffix('\n').and_then(|line| line.split_once(' ')).ok_or_else(damaged)?;
    match (number.parse(), bytes.parse()) {
        (Ok(number @ 1..), Ok(bytes)) => Ok((number, bytes)),
        _ => Err(damaged()),
    }
}

/// Whether there is one behind the first, or a part of it.
fn has_later(root: &Path) -> io::Result<bool> {
    match fs::read_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        entries => {
            let names = entries?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
            Ok(names.iter().any(|name| is_later(&name.to_string_lossy())))
        }
    }
}

fn is_later(name: &str) -> bool {
    name.parse::<u64>().is_ok()
}

/// Removes all but one. What cannot be removed now goes at a later start.
fn remove_others(root: &Path, number: u64) {
    if let Err(error) = sweep(root, number) {
        tracing::warn!(%error, "files of the registry that are not needed any more stay for now");
    }
}

/// Removes what does not belong to a generation.
fn sweep(root: &Path, number: u64) -> io::Result<()> {
    let entries = match fs::read_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    let own = number.to_string();
    for entry in entries {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        let later = is_later(&name);
        let firsts = !later && name != CURRENT;
        if (later && name != own) || (firsts && number > 0) {
            remove_whole(&root.join(&*name))?;
        }
    }
    Ok(())
}

/// Removes a file, or a directory with all that is in it, if it is there.
fn remove_whole(path: &Path) -> io::Result<()> {
    let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    match fs::symlink_metadata(path) {
        Err(error) if gone(&error) => Ok(()),
        Err(error) => Err(error),
        Ok(metadata) if metadata.is_dir() => {
            for entry in fs::read_dir(path)? {
                remove_whole(&entry?.path())?;
            }
            fs::remove_dir(path)
        }
        Ok(_) => remove_gradually(path),
    }
}
