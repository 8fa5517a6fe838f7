//! How durations and sizes are written in configurations: `15s`, `1GiB`. For `#[serde(with = "...")]`.

/// A `std::time::Duration` as `15s`, `1h30m`, `250ms`.
pub mod duration {
    use std::time::Duration;

    use helix_model::parse::{duration_ms, duration_text};
    use serde::{Deserialize, Deserializer, Serializer, de};

    /// Writes it.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&duration_text(u64::try_from(value.as_millis()).unwrap_or(u64::MAX)))
    }

    /// Reads it.
    ///
    /// # Errors
    /// When the text is no duration.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(from)?;
        duration_ms("duration", &text).map(Duration::from_millis).map_err(|wrong| de::Error::custom(wrong.why))
    }
}

/// An `Option<Duration>`; use with `#[serde(default, skip_serializing_if = "Option::is_none")]`.
pub mod duration_option {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    #[derive(Deserialize)]
    struct Text(#[serde(with = "super::duration")] Duration);

    /// Writes it.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(value: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => super::duration::serialize(value, to),
            None => to.serialize_none(),
        }
    }

    /// Reads it.
    ///
    /// # Errors
    /// When the text is no duration.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<Text>::deserialize(from)?.map(|Text(value)| value))
    }
}

/// Bytes (`u64`) as `64KiB`, `10GiB`, `512`.
pub mod size {
    use helix_model::parse::size_bytes;
    use serde::{Deserialize, Deserializer, Serializer, de};

    /// Writes it.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(value: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&text(*value))
    }

    /// Reads it.
    ///
    /// # Errors
    /// When the text is no size.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        size_bytes("size", &text).map_err(|wrong| de::Error::custom(wrong.why))
    }

    /// Bytes in the largest unit that divides them.
    #[must_use]
    pub fn text(bytes: u64) -> String {
        for (unit, name) in [(1u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
            if bytes > 0 && bytes.is_multiple_of(unit) {
                return format!("{}{name}", bytes / unit);
            }
        }
        bytes.to_string()
    }
}

/// An `Option<u64>` of bytes; use with `#[serde(default, skip_serializing_if = "Option::is_none")]`.
pub mod size_option {
    use serde::{Deserialize, Deserializer, Serializer};

    #[derive(Deserialize)]
    struct Text(#[serde(with = "super::size")] u64);

    /// Writes it.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(value: &Option<u64>, to: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => super::size::serialize(value, to),
            None => to.serialize_none(),
        }
    }

    /// Reads it.
    ///
    /// # Errors
    /// When the text is no size.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
        Ok(Option::<Text>::deserialize(from)?.map(|Text(value)| value))
    }
}
