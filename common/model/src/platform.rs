//! Platforms: `os/arch` or `os/arch/variant`.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::InvalidField;

/// What a task is built for, e.g. `linux/arm64/v8`: two or three lower-case parts, none empty, at most 64 characters.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Platform(Arc<str>);

impl Platform {
    /// Checks the text and wraps it.
    ///
    /// # Errors
    /// [`InvalidField`] when the text is not two or three parts of `[a-z0-9._-]`.
    pub fn new(text: &str) -> Result<Self, InvalidField> {
        let parts = text.split('/').count();
        let fine = |part: &str| {
            !part.is_empty()
                && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
        };
        if (2..=3).contains(&parts) && text.split('/').all(fine) && text.len() <= 64 {
            Ok(Self(Arc::from(text)))
        } else {
            let why = format!("{text:?} is not os/arch or os/arch/variant in lower case, e.g. linux/arm64/v8");
            Err(InvalidField::new("platform", why))
        }
    }

    /// The text itself.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Platform {
    type Err = InvalidField;
    fn from_str(text: &str) -> Result<Self, InvalidField> {
        Self::new(text)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_have_two_or_three_lower_case_parts() {
        for good in ["linux/amd64", "linux/arm64/v8"] {
            assert_eq!(Platform::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "linux", "linux/", "/amd64", "Linux/amd64", "linux/amd64/v1/x", "linux//v8", "linux/ amd64"] {
            assert!(Platform::new(bad).is_err(), "{bad}");
        }
    }
}
