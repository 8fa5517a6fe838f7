//! The form of a backup's file: a header, the registry's snapshot, and a trailer that proves that all of it is there.
//!
//! Form: magic, version, the header's length and bytes, the body's length and bytes, the sha256 of all that, an end mark.
//! What header and body say is not known here. A file is written under another name, fsynced, renamed, and its directory
//! fsynced. Invariant: a [`Backup`] is whole: every byte was read and agreed with the trailer before it could be had.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use helix_model::Digest;
use sha2::{Digest as _, Sha256};

use crate::files::{directory_of, sync_directory, temporary_beside};

const MAGIC: &[u8; 8] = b"HELIXBAK";
const END: &[u8; 8] = b"HELIXEND";

/// The form of the file; a newer one is refused.
pub const VERSION: u32 = 1;

/// A header longer than this was not written by us.
const HEADER_BYTES_MAX: u32 = 64 << 10;
const BUFFER_BYTES: usize = 256 << 10;

/// Where a backup's directory of blobs has one: named by its sha256, below the first two digits of it.
#[must_use]
pub fn blob_path(directory: &Path, digest: &Digest) -> PathBuf {
    let name = digest.to_string();
    directory.join(&name[..2]).join(&name)
}

/// Why a file is no backup.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// Something else.
    #[error("{0} is no backup of a Helix cluster")]
    Foreign(PathBuf),
    /// A newer program wrote it.
    #[error("{path} has form {found}, and this program knows {VERSION}: use a newer one")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its form.
        found: u32,
    },
    /// Not what was written.
    #[error("{path} is cut short or damaged ({why}): nothing of it can be used; take another backup")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The system says no.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A backup being written. Dropped before [`Self::finish`] it leaves nothing.
pub struct BackupWriter {
    file: BufWriter<File>,
    hash: Sha256,
    temporary: PathBuf,
    path: PathBuf,
    left: u64,
    done: bool,
}

impl BackupWriter {
    /// Begins a file that is to be `path`, readable by its owner alone. Blocks, as all here does.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(path: &Path, header: &[u8], body_bytes: u64) -> io::Result<Self> {
        let temporary = temporary_beside(path)?;
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        let file = BufWriter::with_capacity(BUFFER_BYTES, file);
        let path = path.to_owned();
        let mut writer = Self { file, hash: Sha256::new(), temporary, path, left: body_bytes, done: false };
        let length = u32::try_from(header.len()).ok().filter(|length| *length <= HEADER_BYTES_MAX);
        let length = length.ok_or_else(|| io::Error::other("the header is too long"))?;
        writer.put(MAGIC)?;
        writer.put(&VERSION.to_be_bytes())?;
        writer.put(&length.to_be_bytes())?;
        writer.put(header)?;
        writer.put(&body_bytes.to_be_bytes())?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.file.write_all(bytes)
    }

    /// Adds bytes of the body.
    ///
    /// # Errors
    /// When they cannot be written, or are more than was announced.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let left = self.left.checked_sub(bytes.len() as u64);
        self.left = left.ok_or_else(|| io::Error::other("more bytes came than were announced"))?;
        self.put(bytes)
    }

    /// Makes the file durable and gives it its name, in place of what has it.
    ///
    /// # Errors
    /// When bytes are missing or the disk fails: then there is no such file, and a former one is as it was.
    pub fn finish(mut self) -> io::Result<()> {
        if self.left > 0 {
            return Err(io::Error::other("fewer bytes came than were announced"));
        }
        let sum = self.hash.clone().finalize();
        self.file.write_all(&sum)?;
        self.file.write_all(END)?;
        self.file.flush()?;
        // The order matters: bytes, then name, then the directory that holds the name.
        self.file.get_ref().sync_all()?;
        std::fs::rename(&self.temporary, &self.path)?;
        self.done = true;
        sync_directory(directory_of(&self.path))
    }
}

impl Drop for BackupWriter {
    fn drop(&mut self) {
        if !self.done {
            // Best effort: the error that matters is the first one.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// A whole backup.
#[derive(Debug)]
pub struct Backup {
    path: PathBuf,
    file: File,
    header: Vec<u8>,
    sha256: Digest,
    body_at: u64,
    body_bytes: u64,
}

impl Backup {
    /// Opens a file and reads it once from end to end.
    ///
    /// # Errors
    /// [`BackupError`].
    pub fn open(path: &Path) -> Result<Self, BackupError> {
        let io = |source| BackupError::Io { path: path.to_owned(), source };
        let damaged = |why| BackupError::Damaged { path: path.to_owned(), why };
        let file = File::open(path).map_err(io)?;
        let bytes = file.metadata().map_err(io)?.len();
        let mut from = Hashed { file: BufReader::with_capacity(BUFFER_BYTES, &file), hash: Sha256::new(), at: 0 };
        let cut = |error: io::Error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged("it ends too early"),
            _ => io(error),
        };
        match from.take::<8>() {
            Ok(magic) if magic == *MAGIC => {}
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(io(error)),
            Ok(_) | Err(_) => return Err(BackupError::Foreign(path.to_owned())),
        }
        let version = u32::from_be_bytes(from.take().map_err(cut)?);
        if version > VERSION {
            return Err(BackupError::Newer { path: path.to_owned(), found: version });
        }
        let length = u32::from_be_bytes(from.take().map_err(cut)?);
        if length > HEADER_BYTES_MAX {
            return Err(damaged("its header is too long"));
        }
        let mut header = vec![0; usize::try_from(length).unwrap_or(0)];
        from.fill(&mut header).map_err(cut)?;
        let body_bytes = u64::from_be_bytes(from.take().map_err(cut)?);
        let body_at = from.at;
        let whole = body_at.checked_add(body_bytes).and_then(|end| end.checked_add(32 + 8));
        match whole {
            Some(whole) if whole == bytes => {}
            Some(whole) if whole < bytes => return Err(damaged("something stands behind its end")),
            Some(_) | None => return Err(damaged("it ends too early")),
        }
        from.pass(body_bytes).map_err(cut)?;
        let expected: [u8; 32] = from.hash.clone().finalize().into();
        if from.take::<32>().map_err(cut)? != expected {
            return Err(damaged("its checksum is wrong"));
        }
        if from.take::<8>().map_err(cut)? != *END {
            return Err(damaged("its end mark is missing"));
        }
        drop(from);
        Ok(Self { path: path.to_owned(), file, header, sha256: Digest(expected), body_at, body_bytes })
    }

    /// The file's name.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What stands in front of the body.
    #[must_use]
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// Of header and body: tells it from every other.
    #[must_use]
    pub fn sha256(&self) -> Digest {
        self.sha256
    }

    /// The body, from its beginning.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn body(&self) -> io::Result<impl Read> {
        let mut file = self.file.try_clone()?;
        file.seek(SeekFrom::Start(self.body_at))?;
        Ok(BufReader::with_capacity(BUFFER_BYTES, file).take(self.body_bytes))
    }
}

struct Hashed<R> {
    file: R,
    hash: Sha256,
    at: u64,
}

impl<R: Read> Hashed<R> {
    fn fill(&mut self, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact(out)?;
        self.hash.update(&out);
        self.at += out.len() as u64;
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut out = [0; N];
        self.fill(&mut out)?;
        Ok(out)
    }

    fn pass(&mut self, mut bytes: u64) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER_BYTES];
        while bytes > 0 {
            let length = usize::try_from(bytes).unwrap_or(usize::MAX).min(buffer.len());
            self.fill(&mut buffer[..length])?;
            bytes -= length as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, body: &[u8]) {
        let mut writer = BackupWriter::create(path, b"header", body.len() as u64).unwrap();
        body.chunks(7).for_each(|chunk| writer.write(chunk).unwrap());
        writer.finish().unwrap();
    }

    fn names(directory: &Path) -> usize {
        std::fs::read_dir(directory).unwrap().count()
    }

    #[test]
    fn what_was_written_is_read() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("backup");
        write(&path, b"first");
        write(&path, &[7; 1000]);
        let backup = Backup::open(&path).unwrap();
        assert_eq!(backup.header(), b"header");
        for _ in 0..2 {
            let mut body = Vec::new();
            backup.body().unwrap().read_to_end(&mut body).unwrap();
            assert_eq!(body, [7; 1000]);
        }
        assert_eq!(names(root.path()), 1);
    }

    #[test]
    fn a_file_that_was_cut_anywhere_or_has_any_other_bit_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("backup");
        write(&path, &[7; 100]);
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let error = Backup::open(&path).unwrap_err();
            assert!(matches!(error, BackupError::Foreign(_) | BackupError::Damaged { .. }), "{length}: {error}");
        }
        for place in 0..whole.len() * 8 {
            let mut other = whole.clone();
            other[place / 8] ^= 1 << (place % 8);
            std::fs::write(&path, &other).unwrap();
            assert!(Backup::open(&path).is_err(), "bit {place}");
        }
        let mut longer = whole.clone();
        longer.push(0);
        std::fs::write(&path, &longer).unwrap();
        assert!(matches!(Backup::open(&path), Err(BackupError::Damaged { .. })));
        let mut newer = whole;
        newer[11] += 1;
        std::fs::write(&path, &newer).unwrap();
        assert!(matches!(Backup::open(&path), Err(BackupError::Newer { found: 2, .. })));
    }

    #[test]
    fn one_that_was_not_finished_leaves_nothing_and_takes_no_place() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("backup");
        write(&path, b"old");
        let mut writer = BackupWriter::create(&path, b"", 10).unwrap();
        writer.write(b"123").unwrap();
        assert!(writer.write(b"12345678").is_err(), "more than announced");
        drop(writer);
        assert!(BackupWriter::create(&path, b"", 10).unwrap().finish().is_err(), "fewer than announced");
        let mut body = Vec::new();
        Backup::open(&path).unwrap().body().unwrap().read_to_end(&mut body).unwrap();
        assert_eq!((&body[..], names(root.path())), (&b"old"[..], 1));
    }
}
