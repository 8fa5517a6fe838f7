//! What stays here of a blob that went to the bucket: `offloaded/ab/HEX`, with all that is needed to check what comes back.
//!
//! ```text
//! marker  table and footer as in the file, number of the object u64, crc32 of all before u32, magic "HELIXOBJ"
//! ```
//! Each object has a name of its own, made of digest and a random number: whatever comes late to one that was given up, a put
//! or a removal, never meets the next.

use std::io;
use std::path::Path;
use std::time::SystemTime;

use bytes::Bytes;
use helix_common::files::{Durability, write_atomic};
use helix_model::Digest;

use super::format::Tail;

const MAGIC: &[u8; 8] = b"HELIXOBJ";
const OWN_BYTES: usize = 20;

/// See the module.
pub(super) struct Marker {
    pub(super) object: u64,
    pub(super) tail: Tail,
}

impl Marker {
    /// Reads one. Blocks.
    pub(super) fn read(path: &Path) -> io::Result<Self> {
        let bytes = Bytes::from(std::fs::read(path)?);
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "the marker is damaged");
        let tail_bytes = bytes.len().checked_sub(OWN_BYTES).ok_or_else(wrong)?;
        let own = bytes.slice(tail_bytes..);
        let (object, crc) = (own.first_chunk::<8>().ok_or_else(wrong)?, &own[8..12]);
        if own[12..] != *MAGIC || crc32fast::hash(&bytes[..tail_bytes + 8]).to_le_bytes() != crc {
            return Err(wrong());
        }
        Ok(Self { object: u64::from_le_bytes(*object), tail: Tail::parse(bytes.slice(..tail_bytes))? })
    }

    /// Writes one, durably, or leaves what was there. Blocks.
    pub(super) fn write(path: &Path, object: u64, tail: &Tail, stored_at: SystemTime) -> io::Result<()> {
        let mut bytes = tail.bytes().to_vec();
        bytes.extend_from_slice(&object.to_le_bytes());
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes.extend_from_slice(MAGIC);
        write_atomic(path, &bytes, 0o600, Durability::Synced)?;
        // The age of the blob. Where that fails it is younger than it was, and stays a little longer.
        let _ = std::fs::File::options().append(true).open(path).and_then(|file| file.set_modified(stored_at));
        Ok(())
    }
}

/// The name of a blob's object, below what is this node's.
pub(in crate::blobs) fn object_name(digest: &Digest, object: u64) -> String {
    let hex = digest.to_string();
    format!("sha256/{}/{hex}.{object:016x}", &hex[..2])
}

/// What an object's name says.
pub(in crate::blobs) fn parse_object_name(name: &str) -> Option<(Digest, u64)> {
    let (hex, object) = name.rsplit('/').next()?.split_once('.')?;
    let parsed = (Digest::parse(hex).ok()?, u64::from_str_radix(object, 16).ok()?);
    (object_name(&parsed.0, parsed.1) == name).then_some(parsed)
}
