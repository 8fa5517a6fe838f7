//! sha256 digests as values. Computing them is elsewhere: this crate hashes nothing.

use std::fmt;
use std::str::FromStr;

use crate::error::InvalidField;

/// A sha256, printed and read as exactly 64 lower-case hex digits; anything else is refused, so that a
/// digest can name a file without ever being a path.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Reads 64 lower-case hex digits, with or without `sha256:` before them.
    ///
    /// # Errors
    /// [`InvalidField`] for any other text.
    pub fn parse(text: &str) -> Result<Self, InvalidField> {
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        let wrong = || InvalidField::new("digest", format!("{text:?} is not 64 lower-case hex digits"));
        if hex.len() != 64 {
            return Err(wrong());
        }
        let mut out = [0u8; 32];
        for (place, pair) in out.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let (Some(high), Some(low)) = (nibble(pair[0]), nibble(pair[1])) else { return Err(wrong()) };
            *place = high << 4 | low;
        }
        Ok(Self(out))
    }

    /// Wraps 32 raw bytes from the wire.
    ///
    /// # Errors
    /// [`InvalidField`] when there are not exactly 32.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, InvalidField> {
        let array = bytes.try_into();
        array.map(Self).map_err(|_| InvalidField::new("digest", format!("{} bytes, not 32", bytes.len())))
    }
}

fn nibble(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{self}")
    }
}

impl FromStr for Digest {
    type Err = InvalidField;
    fn from_str(text: &str) -> Result<Self, InvalidField> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lower_case_hex_of_the_right_length_is_a_digest() {
        let hex = "0123456789abcdef".repeat(4);
        assert_eq!(Digest::parse(&hex).unwrap().to_string(), hex);
        assert_eq!(Digest::parse(&format!("sha256:{hex}")).unwrap().to_string(), hex);
        for bad in ["", "..", &hex[1..], &hex.to_uppercase(), &format!("{hex}0"), &hex.replace('a', "/")] {
            assert!(Digest::parse(bad).is_err(), "{bad}");
        }
    }
}
