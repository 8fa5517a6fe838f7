//! How a small blob lies in a segment file, and how a segment is read back after whatever happened to it.
//!
//! ```text
//! segment  magic "HELIXSEG", version u32, then frames
//! frame    magic u32, kind u8, 3 zero bytes, length u32, crc32 of the data u32, stored at (Unix seconds) u64,
//!          digest 32 bytes, crc32 of this header u32, data
//! ```
//! All integers are little-endian.

use helix_common::sha256::Sha256;
use helix_model::Digest;
use helix_model::limits::SMALL_BLOB_BYTES_MAX;

pub(super) const SEGMENT_HEADER: &[u8; 12] = b"HELIXSEG\x01\0\0\0";
pub(super) const FRAME_HEADER_BYTES: usize = 60;

const FRAME_MAGIC: [u8; 4] = [0xb1, 0x0b, 0x5e, 0x67];

/// What a frame says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// The blob is here.
    Put,
    /// The blob was removed.
    Remove,
}

/// A frame's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct FrameHeader {
    pub(super) kind: Kind,
    pub(super) len: u32,
    pub(super) data_crc: u32,
    pub(super) stored_at_s: u64,
    pub(super) digest: Digest,
}

impl FrameHeader {
    /// The header of a put.
    pub(super) fn put(digest: Digest, data: &[u8], stored_at_s: u64) -> Self {
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        Self { kind: Kind::Put, len, data_crc: crc32fast::hash(data), stored_at_s, digest }
    }

    /// The header of a removal.
    pub(super) fn remove(digest: Digest, at_s: u64) -> Self {
        Self { kind: Kind::Remove, len: 0, data_crc: 0, stored_at_s: at_s, digest }
    }

    /// Appends the header to `out`.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&FRAME_MAGIC);
        out.extend_from_slice(&[if self.kind == Kind::Put { 1 } else { 2 }, 0, 0, 0]);
        out.extend_from_slice(&self.len.to_le_bytes());
        out.extend_from_slice(&self.data_crc.to_le_bytes());
        out.extend_from_slice(&self.stored_at_s.to_le_bytes());
        out.extend_from_slice(&self.digest.0);
        let crc = crc32fast::hash(&out[start..]);
        out.extend_from_slice(&crc.to_le_bytes());
    }

    /// Reads a header at the front of `bytes`; `None` unless it is whole and matches its checksum.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let header = bytes.get(..FRAME_HEADER_BYTES)?;
        if header[..4] != FRAME_MAGIC || crc32fast::hash(&header[..56]) != u32_at(header, 56) {
            return None;
        }
        let kind = match header[4] {
            1 => Kind::Put,
            2 => Kind::Remove,
            _ => return None,
        };
        let len = u32_at(header, 8);
        let mut digest = [0; 32];
        digest.copy_from_slice(&header[24..56]);
        let stored_at_s = u64::from(u32_at(header, 16)) | u64::from(u32_at(header, 20)) << 32;
        let header = Self { kind, len, data_crc: u32_at(header, 12), stored_at_s, digest: Digest(digest) };
        (u64::from(len) <= SMALL_BLOB_BYTES_MAX).then_some(header)
    }
}

/// What lies at a place of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Found {
    /// A sound frame; its data begins at `data_at`.
    Frame { header: FrameHeader, data_at: u64 },
    /// A frame whose data does not match its checksum.
    Damaged { header: FrameHeader, data_at: u64 },
    /// Bytes that are no frame, or none that counts, up to a sound one or the end.
    Garbage { from: u64, to: u64 },
    /// The last sound frame ends here, and what follows was never completed.
    Torn { at: u64 },
}

/// Reads a whole segment. Whatever is in it, sound frames are found and unsound ones are told apart from a torn end.
///
/// Behind a place where frames had to be searched for nothing says that they are not a blob's own bytes, which anybody may have made
/// look like frames. From there on only puts count whose data is what its name says: those are harmless wherever they come from. A
/// removal that is passed over brings back a blob that is collected again.
pub(super) fn scan(segment: &[u8], mut found: impl FnMut(Found)) {
    if !segment.starts_with(SEGMENT_HEADER) {
        // Cut while it was made; a damaged header alone does not hide the frames behind it.
        match next_header(segment, 0) {
            None => return found(Found::Torn { at: 0 }),
            Some(at) if at > SEGMENT_HEADER.len() => found(Found::Garbage { from: 0, to: at as u64 }),
            Some(_) => {}
        }
    }
    let mut at = SEGMENT_HEADER.len().min(segment.len());
    let mut searched = false;
    while at < segment.len() {
        let frame = frame_at(segment, at).filter(|(header, data)| !searched || is_named_put(header, data));
        let data_at = at + FRAME_HEADER_BYTES;
        match frame {
            Some((header, data)) if crc32fast::hash(data) == header.data_crc || header.kind == Kind::Remove => {
                found(Found::Frame { header, data_at: data_at as u64 });
                at = data_at + data.len();
            }
            Some((header, data)) => {
                found(Found::Damaged { header, data_at: data_at as u64 });
                at = data_at + data.len();
            }
            None => {
                searched = true;
                let is_put = |place| frame_at(segment, place).is_some_and(|(header, data)| is_named_put(&header, data));
                let next = next_place(segment, at + 1, is_put).unwrap_or(segment.len());
                // What was never completed has nothing behind it.
                if next == segment.len() && next_header(segment, at + 1).is_none() {
                    return found(Found::Torn { at: at as u64 });
                }
                found(Found::Garbage { from: at as u64, to: next as u64 });
                at = next;
            }
        }
    }
}

/// A sound header at this place, and what it says is its data.
fn frame_at(segment: &[u8], at: usize) -> Option<(FrameHeader, &[u8])> {
    let header = FrameHeader::parse(&segment[at..])?;
    let data_at = at + FRAME_HEADER_BYTES;
    Some((header, segment.get(data_at..data_at + header.len as usize)?))
}

fn is_named_put(header: &FrameHeader, data: &[u8]) -> bool {
    header.kind == Kind::Put && crc32fast::hash(data) == header.data_crc && Sha256::digest(data) == header.digest
}

/// Where the next sound header begins, at or behind `from`.
fn next_header(segment: &[u8], from: usize) -> Option<usize> {
    next_place(segment, from, |place| FrameHeader::parse(&segment[place..]).is_some())
}

/// The first place at or behind `from` that begins as a frame does, and of which `is` holds.
fn next_place(segment: &[u8], from: usize, is: impl Fn(usize) -> bool) -> Option<usize> {
    let rest = segment.get(from..)?;
    let places = rest.windows(4).enumerate().filter(|(_, window)| **window == FRAME_MAGIC);
    places.map(|(at, _)| from + at).find(|place| is(*place))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut out = [0; 4];
    out.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(out)
}
