//! Durations and sizes as people write them: `1h30m`, `10GiB`.

use crate::error::InvalidField;

/// Reads a duration such as `250ms`, `90s`, `1h30m`, `7d` into milliseconds. Units descend and none repeats.
///
/// # Errors
/// [`InvalidField`] naming `field`.
pub fn duration_ms(field: &'static str, text: &str) -> Result<u64, InvalidField> {
    let wrong = || InvalidField::new(field, format!("{text:?} is not a duration such as 250ms, 90s, 1h30m or 7d"));
    let units = [("d", 86_400_000u64), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];
    let mut rest = text;
    let mut total = 0u64;
    let mut next_unit = 0;
    if text.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let letters = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let unit = &rest[..letters];
        rest = &rest[letters..];
        let place = units[next_unit..].iter().position(|(name, _)| *name == unit).ok_or_else(wrong)? + next_unit;
        let ms = number.checked_mul(units[place].1).ok_or_else(wrong)?;
        total = total.checked_add(ms).ok_or_else(wrong)?;
        next_unit = place + 1;
    }
    Ok(total)
}

/// Prints milliseconds as [`duration_ms`] reads them.
#[must_use]
pub fn duration_text(ms: u64) -> String {
    let mut rest = ms;
    let mut out = String::new();
    for (name, unit) in [("d", 86_400_000u64), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)] {
        if rest >= unit {
            out.push_str(&format!("{}{name}", rest / unit));
            rest %= unit;
        }
    }
    if out.is_empty() { "0s".to_owned() } else { out }
}

/// Reads a size such as `512`, `64KiB`, `10GiB`, `1GB` into bytes.
///
/// # Errors
/// [`InvalidField`] naming `field`.
pub fn size_bytes(field: &'static str, text: &str) -> Result<u64, InvalidField> {
    let wrong = || InvalidField::new(field, format!("{text:?} is not a size such as 512, 64KiB or 10GiB"));
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let unit = match &text[digits..] {
        "" | "B" => 1u64,
        "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "KiB" | "K" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        "TiB" | "T" => 1 << 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, ms) in [("250ms", 250), ("90s", 90_000), ("1h30m", 5_400_000), ("7d", 604_800_000), ("0s", 0)] {
            assert_eq!(duration_ms("timeout", text), Ok(ms), "{text}");
        }
        for bad in ["", "5", "s", "1m1h", "1s1s", "-1s", "1.5s", "99999999999999999999d", "1 s"] {
            assert!(duration_ms("timeout", bad).is_err(), "{bad}");
        }
        for ms in [0, 1, 999, 1000, 61_001, 5_400_000, 90_061_001] {
            assert_eq!(duration_ms("timeout", &duration_text(ms)), Ok(ms));
        }
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [("0", 0), ("512", 512), ("64KiB", 65_536), ("10GiB", 10 << 30), ("1GB", 1_000_000_000)] {
            assert_eq!(size_bytes("disk", text), Ok(bytes), "{text}");
        }
        for bad in ["", "GiB", "1 GiB", "1gib", "-1", "99999999999TiB"] {
            assert!(size_bytes("disk", bad).is_err(), "{bad}");
        }
    }
}
