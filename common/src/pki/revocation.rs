//! Revoked certificates: a text file of serial numbers, one in hex a line.
//!
//! The list is read whole and fails closed: a line that cannot be read makes the list unusable, and whoever
//! reloads keeps the former one. Revoking appends a line, so that two at once lose nothing.

use std::collections::HashSet;
use std::fmt;
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use helix_model::InvalidField;

use super::PkiError;
use crate::files::sync_directory;

/// The list's name in an authority's directory.
pub const REVOKED_FILE: &str = "revoked.txt";

/// A certificate's serial number: lower-case hex, without leading zeros.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Serial(Arc<str>);

impl Serial {
    /// From the bytes in the certificate.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Self(Arc::from(hex.trim_start_matches('0')))
    }

    /// The hex text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Serial {
    type Err = InvalidField;

    /// Takes upper case, leading zeros and colons too, as other tools print them.
    fn from_str(text: &str) -> Result<Self, InvalidField> {
        let hex: String = text.trim().chars().filter(|c| *c != ':').map(|c| c.to_ascii_lowercase()).collect();
        if hex.is_empty() || hex.len() > 42 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(InvalidField::new("serial", format!("{text:?} is not a serial number in hex")));
        }
        Ok(Self(Arc::from(hex.trim_start_matches('0'))))
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A list of revoked serial numbers.
#[derive(Clone, Default, Debug)]
pub struct Revoked(HashSet<Serial>);

impl Revoked {
    /// Reads a list. Empty lines, and what follows a `#`, are comments.
    ///
    /// # Errors
    /// When the file cannot be read or a line is no serial number; the message names the line.
    pub fn load(path: &Path) -> Result<Self, PkiError> {
        let text = std::fs::read_to_string(path).map_err(|source| PkiError::File { path: path.to_owned(), source })?;
        let mut serials = HashSet::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let serial = line.parse().map_err(|wrong: InvalidField| PkiError::Malformed {
                path: path.to_owned(),
                why: format!("line {}: {}", index + 1, wrong.why),
            })?;
            serials.insert(serial);
        }
        Ok(Self(serials))
    }

    /// Whether the list has this serial.
    #[must_use]
    pub fn contains(&self, serial: &Serial) -> bool {
        self.0.contains(serial)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Adds a serial to `revoked.txt` in an authority's directory, fsynced. Returns whether it was not there before.
/// Members of the cluster refuse it once they have the new file and reloaded it.
///
/// # Errors
/// When the list cannot be read or written.
pub fn revoke(directory: &Path, serial: &Serial) -> Result<bool, PkiError> {
    let path = directory.join(REVOKED_FILE);
    let failed = |source| PkiError::File { path: path.clone(), source };
    let mut file = OpenOptions::new().read(true).append(true).create(true).open(&path).map_err(failed)?;
    if Revoked::load(&path)?.contains(serial) {
        return Ok(false);
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(failed)?;
    // A line that a crash cut short must not swallow this one.
    let gap = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    file.write_all(format!("{gap}{serial}\n").as_bytes()).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    sync_directory(directory).map_err(failed)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_are_read_in_any_spelling() {
        let serial = Serial::from_bytes(&[0, 0x0a, 0xbc]);
        for text in ["abc", "0ABC", "00:0A:BC", " abc "] {
            assert_eq!(text.parse::<Serial>().unwrap(), serial, "{text}");
        }
        for text in ["", "xyz", "0x1", &"a".repeat(43)] {
            assert!(text.parse::<Serial>().is_err(), "{text}");
        }
    }

    #[test]
    fn revoking_appends_once_even_behind_a_torn_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(REVOKED_FILE);
        std::fs::write(&path, "# stolen laptop\n0aa\nbb").unwrap();
        let serial = "cc".parse().unwrap();
        assert!(revoke(directory.path(), &serial).unwrap());
        assert!(!revoke(directory.path(), &serial).unwrap());
        let list = Revoked::load(&path).unwrap();
        assert_eq!(list.len(), 3);
        assert!(list.contains(&serial) && list.contains(&"bb".parse().unwrap()));
    }

    #[test]
    fn a_malformed_list_is_an_error_that_names_the_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(REVOKED_FILE);
        std::fs::write(&path, "aa\nnot hex\n").unwrap();
        let error = Revoked::load(&path).unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
        assert!(Revoked::load(&directory.path().join("none")).is_err());
    }
}
