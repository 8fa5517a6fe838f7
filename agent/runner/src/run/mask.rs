//! Keeping secrets out of the log: what a command says is searched for them as it comes, in whatever pieces.
//!
//! All forms of all secrets are searched for at once (Aho and Corasick, "Efficient string matching", 1975). Line ends
//! count for nothing within a form, so that a value of several lines, or one that somebody folded, is found as well. What may
//! be the beginning of a form is held back until it is known whether it is one; at a line end only if it is long enough
//! not to be there by chance, so that ordinary lines do not wait for the next one.

mod forms;

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::Path;
use std::rc::Rc;

/// What stands in a secret's place.
const INSTEAD: &[u8] = b"***";

/// Bytes of all secrets of an attempt, at most: the search keeps a few dozen times as much in memory.
const ALL_BYTES_MAX: u64 = 256 * 1024;

/// A beginning that goes over a line end has at least so many bytes.
const HELD_OVER_LINE_MIN: u32 = 4;

/// Bytes held back beyond the longest form, at most: line ends within it.
const HELD_LINE_ENDS_MAX: usize = 4096;

/// A state of the search: a beginning of at least one form.
#[derive(Default, Debug)]
struct State {
    byte: u8,
    child: u32,
    sibling: u32,
    /// The state of the longest end of this beginning that is a beginning itself.
    fallback: u32,
    depth: u32,
    /// The longest form that ends here; 0 for none.
    found: u32,
}

/// What to search for.
#[derive(Debug)]
pub(crate) struct Mask {
    /// The first is that of nothing.
    states: Vec<State>,
    /// The states of single bytes, 0 for none.
    first: [u32; 256],
    longest: usize,
}

impl Mask {
    /// Reads the secrets in a directory. Fails rather than to miss one.
    pub(crate) fn load(dir: &Path) -> io::Result<Self> {
        let mut values = Vec::new();
        let mut total = 0;
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            total += fs::metadata(&path)?.len();
            if total > ALL_BYTES_MAX {
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the secrets are too large to be masked"));
            }
            values.push(fs::read(path)?);
        }
        Ok(Self::new(&values))
    }

    /// Searches for every form of these values.
    pub(crate) fn new(values: &[Vec<u8>]) -> Self {
        let mut mask = Self { states: vec![State::default()], first: [0; 256], longest: 0 };
        for value in values {
            for form in forms::of(value) {
                mask.add(&form);
            }
        }
        mask.link();
        mask
    }

    fn add(&mut self, form: &[u8]) {
        let mut at = 0;
        for byte in form {
            at = match self.child(at, *byte) {
                0 => self.grow(at, *byte),
                child => child,
            };
        }
        let end = &mut self.states[at as usize];
        end.found = end.depth;
        self.longest = self.longest.max(form.len());
    }

    fn grow(&mut self, at: u32, byte: u8) -> u32 {
        let new = u32::try_from(self.states.len()).expect("a few dozen times the secrets' bytes");
        let parent = &mut self.states[at as usize];
        let (sibling, depth) = (parent.child, parent.depth + 1);
        parent.child = new;
        if at == 0 {
            self.first[usize::from(byte)] = new;
        }
        self.states.push(State { byte, sibling, depth, ..State::default() });
        new
    }

    /// The state after one more byte that some form has there; 0 for none.
    fn child(&self, at: u32, byte: u8) -> u32 {
        if at == 0 {
            return self.first[usize::from(byte)];
        }
        let mut child = self.states[at as usize].child;
        while child != 0 && self.states[child as usize].byte != byte {
            child = self.states[child as usize].sibling;
        }
        child
    }

    /// Finds the fallbacks, shorter beginnings first.
    fn link(&mut self) {
        let mut queue = VecDeque::from([0]);
        while let Some(at) = queue.pop_front() {
            let mut child = self.states[at as usize].child;
            while child != 0 {
                let State { byte, sibling, found, .. } = self.states[child as usize];
                let fallback = if at == 0 { 0 } else { self.next(self.states[at as usize].fallback, byte) };
                let inherited = self.states[fallback as usize].found;
                let state = &mut self.states[child as usize];
                state.fallback = fallback;
                state.found = found.max(inherited);
                queue.push_back(child);
                child = sibling;
            }
        }
    }

    /// The longest beginning that the input ends with after one more byte.
    fn next(&self, mut at: u32, byte: u8) -> u32 {
        loop {
            match self.child(at, byte) {
                0 if at == 0 => return 0,
                0 => at = self.states[at as usize].fallback,
                child => return child,
            }
        }
    }
}

/// The search in one stream.
#[derive(Debug)]
pub(crate) struct Masking {
    mask: Rc<Mask>,
    at: u32,
    /// What may be the beginning of a form, and whether it is to be hidden already.
    held: VecDeque<(u8, bool)>,
    /// Of these, how many are no line ends.
    held_solid: u32,
    /// The last byte that went out was hidden.
    hiding: bool,
}

impl Masking {
    pub(crate) fn new(mask: Rc<Mask>) -> Self {
        Self { mask, at: 0, held: VecDeque::new(), held_solid: 0, hiding: false }
    }

    /// Takes what was said; appends to `out` what of it, and of what was held back, may be shown.
    pub(crate) fn push(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) {
        while let Some(byte) = bytes.first() {
            if self.held.is_empty() {
                let plain = bytes.iter().position(|byte| self.mask.first[usize::from(*byte)] != 0);
                let plain = plain.unwrap_or(bytes.len());
                if plain > 0 {
                    out.extend_from_slice(&bytes[..plain]);
                    self.hiding = false;
                    bytes = &bytes[plain..];
                    continue;
                }
            }
            self.step(*byte);
            self.release(out);
            bytes = &bytes[1..];
        }
    }

    /// Nothing more comes: appends what was held back.
    pub(crate) fn finish(&mut self, out: &mut Vec<u8>) {
        self.at = 0;
        self.release(out);
    }

    fn step(&mut self, byte: u8) {
        self.held.push_back((byte, false));
        let state = &self.mask.states[self.at as usize];
        if is_line_end(byte) {
            if state.depth < HELD_OVER_LINE_MIN || self.held.len() > self.mask.longest + HELD_LINE_ENDS_MAX {
                self.at = 0;
            }
            return;
        }
        self.held_solid += 1;
        self.at = self.mask.next(self.at, byte);
        let mut hide = self.mask.states[self.at as usize].found;
        for (byte, hidden) in self.held.iter_mut().rev() {
            if hide == 0 {
                break;
            }
            if !is_line_end(*byte) {
                *hidden = true;
                hide -= 1;
            }
        }
    }

    /// Lets go of what is no beginning any more.
    fn release(&mut self, out: &mut Vec<u8>) {
        let keep = self.mask.states[self.at as usize].depth;
        while let Some((byte, hidden)) = self.held.front().copied() {
            if is_line_end(byte) && (keep == 0 || self.held_solid == keep) || self.held_solid > keep {
                self.held.pop_front();
            } else {
                break;
            }
            if !is_line_end(byte) {
                self.held_solid -= 1;
            }
            if hidden && !self.hiding {
                out.extend_from_slice(INSTEAD);
            } else if !hidden {
                out.push(byte);
            }
            self.hiding = hidden;
        }
    }
}

fn is_line_end(byte: u8) -> bool {
    matches!(byte, b'\n' | b'\r')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masked_in_pieces(values: &[&str], said: &str, piece: usize) -> String {
        let values: Vec<Vec<u8>> = values.iter().map(|value| value.as_bytes().to_vec()).collect();
        let mut masking = Masking::new(Rc::new(Mask::new(&values)));
        let mut out = Vec::new();
        for bytes in said.as_bytes().chunks(piece) {
            masking.push(bytes, &mut out);
        }
        masking.finish(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[track_caller]
    fn check(values: &[&str], said: &str, expected: &str) {
        for piece in 1..=said.len() {
            assert_eq!(masked_in_pieces(values, said, piece), expected, "in pieces of {piece}");
        }
    }

    #[test]
    fn values_are_hidden_wherever_the_pieces_end() {
        check(&["hunter2"], "the password is hunter2.\n", "the password is ***.\n");
        check(&["hunter2\n"], "hunter2hunter2 hunterhunter2 hunter\n", "*** hunter*** hunter\n");
        check(&["abab"], "ababab xababx aba\n", "*** x***x aba\n");
        check(&["secret-one", "one-and-two"], "secret-one-and-two\n", "***\n");
        check(&["abcdWXYZ", "bcde"], "abcde abcdWXY abcdWXYZ\n", "a*** abcdWXY ***\n");
    }

    #[test]
    fn values_of_several_lines_and_folded_ones_are_found() {
        let value = "-----BEGIN KEY-----\nMIIabcdefgh\nxy\n-----END KEY-----\n";
        check(&[value], value, "***\n***\n***\n***\n");
        check(&[value], "only MIIabcdefgh here\n", "only *** here\n");
        check(&["hunter2hunter2"], "hunte\nr2hun\r\nter2\n", "***\n***\r\n***\n");
        check(&["{\n  \"user\": \"me\",\n  \"k\": 1\n}"], "\"user\": \"me\",\n}\n", "***\n}\n");
    }

    #[test]
    fn encoded_values_are_found() {
        // echo -n, echo, and behind `user:`.
        check(&["open sesame"], "b3BlbiBzZXNhbWU= b3BlbiBzZXNhbWUK\n", "*** ***\n");
        check(
            &["open sesame"],
            "dXNlcjpvcGVuIHNlc2FtZQ== or dXNlcjpvcGVuIHNlc2FtZSBhbmQ\n",
            "dXNlcjp***== or dXNlcjp***SBhbmQ\n",
        );
        // As base64(1) folds it.
        let long = "0123456789".repeat(12);
        let encoded = String::from_utf8(forms::base64(long.as_bytes(), forms::STANDARD)).unwrap();
        let folded = format!("{}\n{}\n{}\n", &encoded[..76], &encoded[76..152], &encoded[152..]);
        check(&[&long], &folded, "***\n***\n***\n");
    }

    #[test]
    fn lines_do_not_wait_for_the_next_one_without_need() {
        let mut masking = Masking::new(Rc::new(Mask::new(&[b"t-for-token".to_vec()])));
        let mut out = Vec::new();
        masking.push(b"two tests\nall t\n", &mut out);
        assert_eq!(out, b"two tests\nall t\n");
        // But a long beginning is held, and what never becomes a secret is said as it was.
        masking.push(b"t-for-to\n\n", &mut out);
        assert_eq!(out, b"two tests\nall t\n");
        masking.push(b"day\n", &mut out);
        assert_eq!(out, b"two tests\nall t\nt-for-to\n\nday\n");
    }

    #[test]
    fn what_is_held_back_is_bounded() {
        let mut masking = Masking::new(Rc::new(Mask::new(&[b"hunter2".to_vec()])));
        let mut out = Vec::new();
        masking.push(b"hunter", &mut out);
        for _ in 0..HELD_LINE_ENDS_MAX * 3 {
            masking.push(b"\n", &mut out);
        }
        assert!(masking.held.len() <= HELD_LINE_ENDS_MAX + 100);
        masking.finish(&mut out);
        assert_eq!(out.len(), 6 + HELD_LINE_ENDS_MAX * 3);
    }

    #[test]
    fn secrets_that_cannot_be_read_stop_everything() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Mask::load(&dir.path().join("none")).is_err());
        fs::create_dir(dir.path().join("directory")).unwrap();
        assert!(Mask::load(dir.path()).is_err());
    }
}
