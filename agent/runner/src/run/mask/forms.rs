//! The forms in which a secret may show: as it is, each of its lines, and as base64 wherever in a text it was encoded.
//!
//! A form has no line ends. Whoever wants a secret out can always say it otherwise; this is against accidents.

use std::collections::BTreeSet;

use helix_model::limits::SECRET_BYTES_MIN;

pub(super) const STANDARD: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const FOR_URLS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// All forms of a value.
pub(super) fn of(value: &[u8]) -> BTreeSet<Vec<u8>> {
    let trimmed = value.trim_ascii_end();
    let mut forms = BTreeSet::from([solid(trimmed)]);
    forms.extend(trimmed.split(|byte| *byte == b'\n').map(|line| line.trim_ascii().to_vec()));
    let with_line_end = [trimmed, b"\n"].concat();
    for alphabet in [STANDARD, FOR_URLS] {
        for whole in [value, trimmed, &with_line_end] {
            let encoded = base64(whole, alphabet);
            let bare: Vec<u8> = encoded.iter().copied().filter(|byte| *byte != b'=').collect();
            forms.extend([encoded, bare]);
        }
        for before in 0..3 {
            forms.extend(base64_within(trimmed, before, alphabet));
        }
    }
    forms.retain(|form| form.len() >= SECRET_BYTES_MIN);
    forms
}

fn solid(value: &[u8]) -> Vec<u8> {
    value.iter().copied().filter(|byte| !matches!(byte, b'\n' | b'\r')).collect()
}

pub(super) fn base64(value: &[u8], alphabet: &[u8; 64]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len().div_ceil(3) * 4);
    for group in value.chunks(3) {
        let byte = |at: usize| u32::from(group.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for at in 0..4 {
            let index = bits >> (18 - 6 * at) & 63;
            out.push(if at as usize <= group.len() { alphabet[index as usize] } else { b'=' });
        }
    }
    out
}

/// The characters that do not depend on what else is encoded, when that is so many bytes (modulo 3) before the value, and
/// behind it anything, nothing, or a line end.
fn base64_within(value: &[u8], before: usize, alphabet: &[u8; 64]) -> [Vec<u8>; 3] {
    let first = (before * 8).div_ceil(6);
    let whole = |behind: &[u8]| base64(&[&[0; 2][..before], value, behind].concat(), alphabet);
    let own = (before + value.len()) * 8 / 6;
    let anything = whole(b"").get(first..own).unwrap_or_default().to_vec();
    let [nothing, line_end] =
        [&b""[..], b"\n"].map(|behind| whole(behind).into_iter().skip(first).filter(|byte| *byte != b'=').collect());
    [anything, nothing, line_end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_what_others_make() {
        for (value, encoded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")] {
            assert_eq!(base64(value.as_bytes(), STANDARD), encoded.as_bytes());
        }
        assert_eq!(base64(&[0xfb, 0xff], FOR_URLS), b"-_8=");
        // Of "x:secret" and "xy:secret", what depends on neither neighbour.
        assert_eq!(base64_within(b"secret", 2, STANDARD), [&b"zZWNyZX"[..], b"zZWNyZXQ", b"zZWNyZXQK"]);
        assert_eq!(base64_within(b"secret", 0, STANDARD), [&b"c2VjcmV0"[..], b"c2VjcmV0", b"c2VjcmV0Cg"]);
    }

    #[test]
    fn nothing_short_is_searched_for() {
        let forms = of(b"ab\n{\nlonger line\n");
        assert!(forms.iter().all(|form| form.len() >= SECRET_BYTES_MIN) && forms.contains(&b"longer line"[..]));
    }
}
