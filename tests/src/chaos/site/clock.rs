//! Wall clocks of nodes that can be moved, each alone.
//!
//! The kernel has one wall clock for all processes (time namespaces know monotonic ones alone), so that a small library is put
//! before each node's C library: `clock.c`, built when a run begins. The programs are those that everybody runs.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::chaos::site::run;

/// Names the file of a process's clock.
pub(super) const VARIABLE: &str = "CHAOS_CLOCK";

const SOURCE: &str = include_str!("clock.c");

/// Builds the library.
pub(super) fn build(directory: &Path) -> anyhow::Result<PathBuf> {
    let (source, library) = (directory.join("clock.c"), directory.join("clock.so"));
    std::fs::write(&source, SOURCE)?;
    run(Command::new("cc").args(["-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o"]).args([&library, &source]))?;
    Ok(library)
}

/// A node's clock: its offset and how often it was asked while there was one, in a file that the library maps.
pub(in crate::chaos) struct Clock {
    file: File,
    /// Where it is.
    pub(super) path: PathBuf,
}

impl Clock {
    pub(super) fn make(path: PathBuf) -> io::Result<Self> {
        let file = File::options().create(true).truncate(true).read(true).write(true).open(&path)?;
        file.write_all_at(&[0; 16], 0)?;
        Ok(Self { file, path })
    }

    /// Moves the clock to so many seconds from the true time.
    pub(in crate::chaos) fn set(&self, offset_s: i64) -> io::Result<()> {
        self.file.write_all_at(&offset_s.to_ne_bytes(), 0)
    }

    /// How often a wrong time was read, ever.
    pub(in crate::chaos) fn answered(&self) -> io::Result<u64> {
        let mut count = [0; 8];
        self.file.read_exact_at(&mut count, 8)?;
        Ok(u64::from_ne_bytes(count))
    }
}
