//! The byte form of everything the agent and its runners tell each other: little-endian integers, strings with a
//! length before them, and an envelope for files.
//!
//! The envelope is what makes a half-written or damaged file recognisable: a magic word that names the kind of
//! file, a version, the length of the body and its CRC. Nothing here trusts a length it has read.

use std::io;

/// Why bytes could not be understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FormatError {
    /// Fewer bytes than the form needs.
    Short,
    /// Not the kind of file or message that was expected.
    Foreign,
    /// Written by a version that this one does not know.
    Version(u32),
    /// The checksum does not match.
    Checksum,
    /// A value is outside of its range; names the field.
    Value(&'static str),
}

impl std::fmt::Display for FormatError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Short => f.write_str("it ends too early"),
            Self::Foreign => f.write_str("it is of another kind"),
            Self::Version(version) => write!(f, "it has the unknown version {version}"),
            Self::Checksum => f.write_str("its checksum does not match"),
            Self::Value(field) => write!(f, "its field {field} is out of range"),
        }
    }
}

impl std::error::Error for FormatError {}

impl From<FormatError> for io::Error {
    fn from(error: FormatError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// Collects fields in order.
#[derive(Default)]
pub(crate) struct Encoder {
    bytes: Vec<u8>,
}

impl Encoder {
    pub(crate) fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes.push(value);
        self
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn bytes(&mut self, value: &[u8]) -> &mut Self {
        self.u32(u32::try_from(value.len()).expect("a field is far below 4 GiB"));
        self.bytes.extend_from_slice(value);
        self
    }

    pub(crate) fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

/// Takes fields in the order in which they were put.
pub(crate) struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], FormatError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(FormatError::Short)?;
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(self.take(1)?[0])
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FormatError> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FormatError> {
        let low = u64::from(self.u32()?);
        let high = u64::from(self.u32()?);
        Ok(high << 32 | low)
    }

    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], FormatError> {
        let length = self.u32()?;
        self.take(usize::try_from(length).map_err(|_| FormatError::Short)?)
    }

    pub(crate) fn text(&mut self, field: &'static str) -> Result<&'a str, FormatError> {
        std::str::from_utf8(self.bytes()?).map_err(|_| FormatError::Value(field))
    }

    /// Whether nothing is left to take.
    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Every byte must have been taken: a longer message is another message.
    pub(crate) fn end(self) -> Result<(), FormatError> {
        if self.rest.is_empty() { Ok(()) } else { Err(FormatError::Foreign) }
    }
}

/// The kind of a file and the newest version of it that this program writes and reads.
pub(crate) struct Kind {
    pub(crate) magic: &'static [u8; 8],
    pub(crate) version: u32,
}

const ENVELOPE_BYTES: usize = 8 + 4 + 4 + 4;

/// Wraps a body: magic, version, length, CRC of all of that and the body.
pub(crate) fn seal(kind: &Kind, body: &[u8]) -> Vec<u8> {
    let mut file = Vec::with_capacity(ENVELOPE_BYTES + body.len());
    file.extend_from_slice(kind.magic);
    file.extend_from_slice(&kind.version.to_le_bytes());
    file.extend_from_slice(&u32::try_from(body.len()).expect("a file of ours is far below 4 GiB").to_le_bytes());
    let crc = checksum(&file, body);
    file.extend_from_slice(&crc.to_le_bytes());
    file.extend_from_slice(body);
    file
}

/// Unwraps what [`seal`] made. Bytes behind the body are ignored: a file may have been preallocated.
pub(crate) fn unseal<'a>(kind: &Kind, file: &'a [u8]) -> Result<&'a [u8], FormatError> {
    let (head, rest) = file.split_at_checked(ENVELOPE_BYTES).ok_or(FormatError::Short)?;
    let mut fields = Decoder::new(head);
    if fields.take(8)? != kind.magic {
        return Err(FormatError::Foreign);
    }
    let version = fields.u32()?;
    let length = usize::try_from(fields.u32()?).map_err(|_| FormatError::Short)?;
    let crc = fields.u32()?;
    let body = rest.get(..length).ok_or(FormatError::Short)?;
    if checksum(&head[..16], body) != crc {
        return Err(FormatError::Checksum);
    }
    // Only now: a flipped bit in the version is damage, not another version.
    if version != kind.version {
        return Err(FormatError::Version(version));
    }
    Ok(body)
}

fn checksum(head: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(body);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind { magic: b"HLXTEST\0", version: 3 };

    #[test]
    fn any_flipped_bit_is_noticed() {
        let sealed = seal(&KIND, b"some body");
        assert_eq!(unseal(&KIND, &sealed), Ok(&b"some body"[..]));
        for at in 0..sealed.len() {
            for bit in 0..8 {
                let mut damaged = sealed.clone();
                damaged[at] ^= 1 << bit;
                assert!(unseal(&KIND, &damaged).is_err(), "byte {at} bit {bit}");
            }
            assert!(unseal(&KIND, &sealed[..at]).is_err(), "cut to {at}");
        }
    }

    #[test]
    fn another_version_says_so() {
        let newer = seal(&Kind { magic: KIND.magic, version: 4 }, b"");
        assert_eq!(unseal(&KIND, &newer), Err(FormatError::Version(4)));
    }

    #[test]
    fn fields_read_back_and_absurd_lengths_do_not() {
        let bytes = Encoder::default().u8(1).u32(2).u64(u64::MAX - 1).bytes(b"x").finish();
        let mut fields = Decoder::new(&bytes);
        assert_eq!((fields.u8(), fields.u32(), fields.u64()), (Ok(1), Ok(2), Ok(u64::MAX - 1)));
        assert_eq!(fields.bytes(), Ok(&b"x"[..]));
        assert_eq!(fields.end(), Ok(()));
        assert_eq!(Decoder::new(&[0xff; 8]).bytes(), Err(FormatError::Short));
    }
}
