//! What happened, in order: always as a digest, and in words where somebody wants to read it.
//!
//! Two runs that agree on the digest did the same: it takes in every event, its time, the place of the random numbers
//! after it, and every line.

use std::fmt::{self, Write};

/// One happening, in words.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    /// Virtual milliseconds from the start.
    pub at_ms: u64,
    /// What happened.
    pub text: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>4}.{:03} s  {}", self.at_ms / 1_000, self.at_ms % 1_000, self.text)
    }
}

/// Whether the words are kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Keep {
    Digest,
    Words,
}

pub(super) struct Trace {
    digest: Fnv,
    lines: Option<Vec<Line>>,
}

impl Trace {
    pub(super) fn new(keep: Keep) -> Self {
        Self { digest: Fnv(0xcbf2_9ce4_8422_2325), lines: (keep == Keep::Words).then(Vec::new) }
    }

    pub(super) fn note(&mut self, at_ms: u64, what: fmt::Arguments<'_>) {
        self.digest.take(&at_ms.to_be_bytes());
        // Taking in text cannot fail.
        let _ = self.digest.write_fmt(what);
        if let Some(lines) = &mut self.lines {
            lines.push(Line { at_ms, text: what.to_string() });
        }
    }

    /// Takes in an event without words.
    pub(super) fn fold(&mut self, numbers: [u64; 3]) {
        for number in numbers {
            self.digest.take(&number.to_be_bytes());
        }
    }

    pub(super) fn digest(&self) -> u64 {
        self.digest.0
    }

    pub(super) fn into_lines(self) -> Vec<Line> {
        self.lines.unwrap_or_default()
    }
}

/// FNV-1a, 64 bits: the same on every machine and for ever.
struct Fnv(u64);

impl Fnv {
    fn take(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

impl Write for Fnv {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.take(text.as_bytes());
        Ok(())
    }
}
