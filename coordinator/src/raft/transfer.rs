//! What sending and receiving a snapshot have in common: when one stands still, in what pieces it goes, how much room it wants.
//!
//! Nothing here sends or receives. A snapshot takes as long as its link makes it take: there is a limit for standing still, and none
//! for the whole.

use std::io;
use std::path::Path;
use std::time::Duration;

use helix_common::files::available_bytes;

/// Bytes in one message.
pub(super) const CHUNK_BYTES: u64 = 256 << 10;

/// Bytes that are sent before they have to be acknowledged. A ping waits behind them, and a link on which that takes more than
/// five seconds is taken for dead: so a slow one gets few at once.
pub(super) const PIECE_BYTES_MIN: u64 = 64 << 10;
const PIECE_BYTES_MAX: u64 = 4 << 20;
const QUICK: Duration = Duration::from_millis(500);
const SLOW: Duration = Duration::from_secs(2);

/// The registry's file is at most so many times as large as the snapshot that it is made from: 2.2 times where rows have a kibibyte,
/// 3.7 times where they have 150 bytes, more where they are shorter still, and some more for the index of blobs.
const IMPORTED_TIMES: u64 = 6;

/// What a snapshot leaves of the disk: for the next file of the log.
const ROOM_LEFT: u64 = 64 << 20;

/// How snapshots go from node to node; other than the default only in tests.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// One that stood still for so long is given up.
    pub stalled_after: Duration,
    /// Says how much room is left where a path is.
    pub free_bytes: fn(&Path) -> io::Result<u64>,
    /// Takes snapshots in parts; a node that plays an older version does not.
    pub takes_parts: bool,
}

impl Default for Transfer {
    fn default() -> Self {
        Self { stalled_after: Duration::from_secs(30), free_bytes: available_bytes, takes_parts: true }
    }
}

impl Transfer {
    /// Refuses a snapshot of so many bytes, of which `to_come` are not here yet, where there is too little room to install it.
    ///
    /// # Errors
    /// `StorageFull`, with what is short; or the file system does not answer.
    pub(super) fn expect_room(&self, directory: &Path, bytes: u64, to_come: u64) -> io::Result<()> {
        let (free, wanted) = ((self.free_bytes)(directory)?, room_wanted(bytes, to_come));
        if free >= wanted {
            return Ok(());
        }
        let text = format!("a snapshot of {bytes} bytes wants {wanted} free bytes, and {free} are free");
        Err(io::Error::new(io::ErrorKind::StorageFull, text))
    }
}

fn room_wanted(bytes: u64, to_come: u64) -> u64 {
    bytes.saturating_mul(IMPORTED_TIMES).saturating_add(to_come).saturating_add(ROOM_LEFT)
}

/// How much to send next, after a piece of `bytes` that was acknowledged within `took`.
pub(super) fn next_piece(bytes: u64, took: Duration) -> u64 {
    match took {
        took if took < QUICK => (bytes * 2).min(PIECE_BYTES_MAX),
        took if took > SLOW => (bytes / 2).max(PIECE_BYTES_MIN),
        _ => bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_grow_on_quick_links_and_shrink_on_slow_ones() {
        let after = |took: Duration, times: u32| (0..times).fold(PIECE_BYTES_MIN, |bytes, _| next_piece(bytes, took));
        assert_eq!(after(Duration::from_millis(1), 1), 2 * PIECE_BYTES_MIN);
        assert_eq!(after(Duration::from_millis(1), 100), PIECE_BYTES_MAX);
        assert_eq!(after(Duration::from_secs(1), 100), PIECE_BYTES_MIN);
        assert_eq!(next_piece(PIECE_BYTES_MAX, Duration::from_secs(3)), PIECE_BYTES_MAX / 2);
        assert_eq!(next_piece(PIECE_BYTES_MIN, Duration::from_secs(3)), PIECE_BYTES_MIN);
    }

    #[test]
    fn room_is_wanted_for_what_comes_for_what_is_made_of_it_and_for_the_log() {
        let wanted = room_wanted(1_000, 600);
        let with = |free_bytes| Transfer { free_bytes, ..Transfer::default() };
        assert_eq!(wanted, 6 * 1_000 + 600 + (64 << 20));
        assert!(with(|_| Ok(room_wanted(1_000, 600))).expect_room(Path::new("/"), 1_000, 600).is_ok());
        let error = with(|_| Ok(room_wanted(1_000, 600) - 1)).expect_room(Path::new("/"), 1_000, 600).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(error.to_string().contains(&wanted.to_string()), "{error}");
        assert_eq!(room_wanted(u64::MAX, 1), u64::MAX);
    }
}
