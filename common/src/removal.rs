//! Removing large files without holding up everybody else's writes.
//!
//! Where a file system tells the disk what has become free (ext4 with `discard`), every fsync on it waits while a large file is removed:
//! 240 to 300 ms for one of 245 MiB on a virtual machine's disk, 5 ms when it was cut down by a mebibyte at a time. A coordinator
//! that waits for so long is taken for dead. So the name goes at once, and the bytes little by little on a thread.
//!
//! Whoever goes on reading a file after its name has gone opens it with [`open_shared`]: its bytes stay until it is closed.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// What is taken away at once.
const STEP_BYTES: u64 = 1 << 20;

/// Between two steps at least; else as long as the last one took, so that others have half of the disk's time.
const PAUSE: Duration = Duration::from_millis(1);

/// Files that wait to be cut down, each with a descriptor; one too many goes at once.
const WAITING_MAX: usize = 256;

/// Between two looks at files that somebody still reads.
const LOOK: Duration = Duration::from_millis(200);

/// Opens a file for reading. Its bytes stay until it is closed, also when it is removed by [`remove_gradually`].
///
/// # Errors
/// Those of opening it; `NotFound` where it is being removed.
pub fn open_shared(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    share(&file)?;
    Ok(file)
}

/// Does for an open file what [`open_shared`] does.
///
/// # Errors
/// `NotFound` where it is being removed.
pub fn share(file: &File) -> io::Result<()> {
    match flock(file, FlockOperation::NonBlockingLockShared) {
        Err(Errno::WOULDBLOCK) => Err(io::ErrorKind::NotFound.into()),
        // A file system without such locks: nobody can tell that it is read, and it is removed at once.
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Removes a file: its name before this returns, its bytes soon after.
///
/// # Errors
/// When the name cannot be removed.
pub fn remove_gradually(path: &Path) -> io::Result<()> {
    // What cannot be opened, or is no file, goes as it always did.
    let large = OpenOptions::new().write(true).open(path).ok().filter(is_large);
    std::fs::remove_file(path)?;
    if let Some(file) = large {
        release(file);
    }
    Ok(())
}

/// Takes away the bytes of a file that has no name any more. One that has a name, or another reader of [`open_shared`], keeps them.
pub fn release(file: File) {
    static REMOVER: OnceLock<Option<SyncSender<File>>> = OnceLock::new();
    let remover = REMOVER.get_or_init(|| {
        let (files, queue) = sync_channel(WAITING_MAX);
        let thread = std::thread::Builder::new().name("file-removal".to_owned()).spawn(move || run(&queue));
        thread.map(|_| files).ok()
    });
    // Without the thread, or with too much before it, it is closed here. Nobody waits: this may be an asynchronous task.
    let _ = remover.as_ref().map(|files| files.try_send(file));
}

fn is_large(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() > STEP_BYTES)
}

fn run(queue: &Receiver<File>) {
    let mut waiting: Vec<File> = Vec::new();
    loop {
        let next = if waiting.is_empty() {
            queue.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            queue.recv_timeout(LOOK)
        };
        match next {
            Ok(file) => waiting.push(file),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        waiting.retain(|file| !shrink(file));
    }
}

/// Takes away a file's bytes, unless somebody reads it: false then. Where that fails, closing it does.
fn shrink(file: &File) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(error) => return error != Errno::WOULDBLOCK,
    }
    let Ok(metadata) = file.metadata() else { return true };
    if metadata.nlink() > 0 {
        return true;
    }
    let mut left = metadata.len();
    while left > 0 {
        left = left.saturating_sub(STEP_BYTES);
        let began = Instant::now();
        if file.set_len(left).is_err() {
            return true;
        }
        std::thread::sleep(began.elapsed().max(PAUSE));
    }
    true
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    const BYTES: usize = 5 << 20;

    #[test]
    fn a_large_file_goes_when_nobody_reads_it_any_more() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("large");
        std::fs::write(&path, vec![7; BYTES]).unwrap();
        let mut reader = open_shared(&path).unwrap();
        let observer = File::open(&path).unwrap();
        remove_gradually(&path).unwrap();
        assert!(!path.exists());
        // Another file that was removed later is not kept by the one that is read.
        let other = directory.path().join("other");
        std::fs::write(&other, vec![7; BYTES]).unwrap();
        let gone = File::open(&other).unwrap();
        remove_gradually(&other).unwrap();
        wait_until_empty(&gone);
        let mut bytes = Vec::new();
        assert_eq!(reader.read_to_end(&mut bytes).unwrap(), BYTES);
        drop(reader);
        wait_until_empty(&observer);
    }

    fn wait_until_empty(file: &File) {
        let began = Instant::now();
        while file.metadata().unwrap().len() > 0 {
            assert!(began.elapsed() < Duration::from_secs(60), "its bytes are still there");
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_has_a_name_keeps_its_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("file"), directory.path().join("link"));
        std::fs::write(&path, vec![7; BYTES]).unwrap();
        std::fs::hard_link(&path, &other).unwrap();
        assert!(shrink(&File::options().write(true).open(&path).unwrap()));
        std::fs::remove_file(&path).unwrap();
        assert!(shrink(&File::options().write(true).open(&other).unwrap()));
        assert_eq!(std::fs::metadata(&other).unwrap().len(), BYTES as u64);
    }

    #[test]
    fn what_is_being_removed_cannot_be_opened() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "bytes").unwrap();
        let remover = File::open(&path).unwrap();
        flock(&remover, FlockOperation::NonBlockingLockExclusive).unwrap();
        assert_eq!(open_shared(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        drop(remover);
        open_shared(&path).unwrap();
        remove_gradually(&path).unwrap();
        assert_eq!(remove_gradually(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        std::fs::create_dir(&path).unwrap();
        assert!(remove_gradually(&path).is_err() && path.is_dir());
    }
}
