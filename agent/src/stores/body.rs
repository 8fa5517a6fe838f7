//! Bytes that can be read again from any offset, so that an upload can be hashed first and resumed later, without
//! ever being in memory whole or on disk twice.

use std::fs::File;
use std::io::{self, Read as _, Write};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use bytes::Bytes;
use helix_common::sha256::Sha256;
use helix_model::Digest;
use helix_model::limits::{CHUNK_BYTES, SMALL_BLOB_BYTES_MAX};
use rustix::fd::OwnedFd;
use rustix::fs::{FileType, Mode, OFlags, openat};

use crate::attempt::outputs::{Why, walk};

/// Where bytes come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Memory.
    Memory(Bytes),
    /// A file, from its start.
    File(Arc<File>),
    /// A directory, as a tar that is the same whenever its contents are.
    Tree(Arc<OwnedFd>),
}

/// A blob to be stored.
#[derive(Clone, Debug)]
pub struct Body {
    /// Its sha256.
    pub digest: Digest,
    /// Its size.
    pub size: u64,
    /// Its bytes.
    pub source: Source,
}

impl Body {
    /// Hashes what is in memory.
    #[must_use]
    pub fn of_bytes(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        let digest = Sha256::digest(&bytes);
        Self { digest, size: bytes.len() as u64, source: Source::Memory(bytes) }
    }

    /// Reads it all once to learn its digest and size. What is small stays in memory. Blocks.
    ///
    /// # Errors
    /// When it cannot be read, or is larger than `bytes_max`: then nothing beyond that is read.
    pub fn measure(source: Source, bytes_max: u64) -> io::Result<Self> {
        let mut sink = Hashing { hasher: Sha256::new(), small: Some(Vec::new()), size: 0, bytes_max };
        source.write_to(&mut sink)?;
        let digest = sink.hasher.finalize();
        let source = sink.small.map_or(source, |bytes| Source::Memory(Bytes::from(bytes)));
        Ok(Self { digest, size: sink.size, source })
    }

    /// Gives the bytes from an offset on, in chunks; ends early when `give` refuses. Blocks.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn chunks_from(&self, offset: u64, give: &mut dyn FnMut(Bytes) -> bool) -> io::Result<()> {
        let mut sink = Chunks { skip: offset, pending: Vec::with_capacity(CHUNK_BYTES), over: false, give };
        match &self.source {
            Source::Memory(bytes) => {
                sink.skip = 0;
                let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                return sink.write_all(&bytes[from..]).or_else(stopped).and_then(|()| sink.flush().or_else(stopped));
            }
            Source::File(file) => {
                sink.skip = 0;
                copy_file(file, offset, &mut sink).or_else(stopped)?;
            }
            Source::Tree(_) => self.source.write_to(&mut sink).or_else(stopped)?,
        }
        sink.flush().or_else(stopped)
    }
}

/// The text of the error by which a receiver ends a read early.
const STOPPED: &str = "the receiver needs no more";

fn stopped(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::ConnectionAborted { Ok(()) } else { Err(error) }
}

impl Source {
    fn write_to(&self, to: &mut dyn Write) -> io::Result<()> {
        match self {
            Self::Memory(bytes) => to.write_all(bytes),
            Self::File(file) => copy_file(file, 0, to),
            Self::Tree(dir) => write_tar(dir, to),
        }
    }
}

fn copy_file(file: &File, mut offset: u64, to: &mut dyn Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match file.read_at(&mut buffer, offset)? {
            0 => return Ok(()),
            count => {
                to.write_all(&buffer[..count])?;
                offset += count as u64;
            }
        }
    }
}

/// Writes a directory as a tar: names sorted, no times, no owners, modes reduced to whether a file is executable.
fn write_tar(dir: &OwnedFd, to: &mut dyn Write) -> io::Result<()> {
    let mut builder = tar::Builder::new(to);
    let mut failed: Option<io::Error> = None;
    let walked = walk(dir, &mut |entry, stat| {
        append(&mut builder, entry, stat).map_err(|error| {
            let why = Why::System(error.to_string());
            failed = Some(error);
            why
        })
    });
    if let Some(error) = failed {
        return Err(error);
    }
    walked.map_err(|why| match why {
        Why::System(text) => io::Error::other(text),
        other => io::Error::other(format!("{other:?}")),
    })?;
    builder.finish()
}

fn append(
    builder: &mut tar::Builder<&mut dyn Write>,
    entry: &crate::attempt::outputs::Entry<'_>,
    stat: &rustix::fs::Stat,
) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt as _;
    let path = std::path::Path::new(std::ffi::OsStr::from_bytes(entry.path));
    let mut header = tar::Header::new_gnu();
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(0o755);
            builder.append_data(&mut header, path, io::empty())
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(entry.dir, entry.name, Vec::new())?;
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_mode(0o777);
            builder.append_link(&mut header, path, std::path::Path::new(std::ffi::OsStr::from_bytes(target.to_bytes())))
        }
        FileType::RegularFile => {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = File::from(openat(entry.dir, entry.name, flags, Mode::empty())?);
            let size = file.metadata()?.len();
            header.set_entry_type(tar::EntryType::Regular);
            header.set_mode(if stat.st_mode & 0o111 == 0 { 0o644 } else { 0o755 });
            header.set_size(size);
            builder.append_data(&mut header, path, file.take(size))
        }
        _ => {
            let text = format!("{} is neither a file nor a directory nor a link", path.display());
            Err(io::Error::new(io::ErrorKind::Unsupported, text))
        }
    }
}

struct Hashing {
    hasher: Sha256,
    /// All bytes, as long as they are few.
    small: Option<Vec<u8>>,
    size: u64,
    bytes_max: u64,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.size += bytes.len() as u64;
        if self.size > self.bytes_max {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than the cluster stores"));
        }
        self.hasher.update(bytes);
        if self.size > SMALL_BLOB_BYTES_MAX {
            self.small = None;
        }
        if let Some(small) = &mut self.small {
            small.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Cuts what is written into chunks.
struct Chunks<'a> {
    skip: u64,
    pending: Vec<u8>,
    /// The receiver refused; a tar's end is still written after that.
    over: bool,
    give: &'a mut dyn FnMut(Bytes) -> bool,
}

impl Write for Chunks<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
        self.skip -= skipped as u64;
        let mut rest = &bytes[skipped..];
        while !rest.is_empty() {
            let room = CHUNK_BYTES - self.pending.len();
            let (now, later) = rest.split_at(room.min(rest.len()));
            self.pending.extend_from_slice(now);
            rest = later;
            if self.pending.len() == CHUNK_BYTES {
                self.flush()?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::replace(&mut self.pending, Vec::with_capacity(CHUNK_BYTES));
        self.over = self.over || !(self.give)(Bytes::from(chunk));
        if !self.over { Ok(()) } else { Err(io::Error::new(io::ErrorKind::ConnectionAborted, STOPPED)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    fn from(body: &Body, offset: u64) -> Vec<u8> {
        let mut all = Vec::new();
        body.chunks_from(offset, &mut |chunk| {
            assert!(chunk.len() <= CHUNK_BYTES);
            all.extend_from_slice(&chunk);
            true
        })
        .unwrap();
        all
    }

    #[test]
    fn every_kind_reads_the_same_from_any_offset() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..CHUNK_BYTES * 2 + 77).map(|at| u8::try_from(at % 251).unwrap()).collect();
        fs::write(dir.path().join("f"), &bytes).unwrap();
        let file = Source::File(Arc::new(File::open(dir.path().join("f")).unwrap()));
        let tree = Source::Tree(Arc::new(File::open(dir.path()).unwrap().into()));
        for source in [Source::Memory(Bytes::from(bytes.clone())), file, tree] {
            let body = Body::measure(source, u64::MAX).unwrap();
            let whole = from(&body, 0);
            assert_eq!((whole.len() as u64, Body::of_bytes(whole.clone()).digest), (body.size, body.digest));
            for offset in [1, CHUNK_BYTES, CHUNK_BYTES + 1, whole.len()] {
                assert!(from(&body, offset as u64) == whole[offset..], "from {offset}");
            }
            let mut count = 0;
            body.chunks_from(0, &mut |_| {
                count += 1;
                false
            })
            .unwrap();
            assert_eq!(count, 1);
        }
    }

    #[test]
    fn small_files_stay_in_memory_and_large_ones_are_refused_early() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("f"), "abc").unwrap();
        let open = || Source::File(Arc::new(File::open(dir.path().join("f")).unwrap()));
        let body = Body::measure(open(), 3).unwrap();
        assert!(matches!(body.source, Source::Memory(ref bytes) if bytes == "abc"));
        assert_eq!(Body::measure(open(), 2).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }

    #[test]
    fn a_tree_is_the_same_bytes_whenever_its_contents_are() {
        let digest = |order: [&str; 2], age: u64| {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("sub")).unwrap();
            for name in order {
                fs::write(dir.path().join("sub").join(name), name).unwrap();
            }
            symlink("a", dir.path().join("sub/link")).unwrap();
            fs::set_permissions(dir.path().join("sub/a"), fs::Permissions::from_mode(0o700)).unwrap();
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(age);
            File::open(dir.path().join("sub/a")).unwrap().set_modified(time).unwrap();
            Body::measure(Source::Tree(Arc::new(File::open(dir.path()).unwrap().into())), u64::MAX).unwrap().digest
        };
        assert_eq!(digest(["a", "b"], 1000), digest(["b", "a"], 2000));
        assert_ne!(digest(["a", "b"], 1000), digest(["a", "c"], 1000));
    }

    #[test]
    fn a_tree_with_a_fifo_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, dir.path().join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        let error =
            Body::measure(Source::Tree(Arc::new(File::open(dir.path()).unwrap().into())), u64::MAX).unwrap_err();
        assert!(error.to_string().contains("fifo"), "{error}");
    }
}
