//! Whose fault a failed `podman build` is, told from its exit code and its last complaint: here and nowhere else.
//!
//! A `RUN` step that fails gives its own exit code; podman itself ends with 125. What podman says is for people and changes
//! between versions, so the table errs towards `exit`, which costs nothing but a less exact word.

use std::io;

use helix_model::Reason;
use helix_runner::{AttemptDir, Growth, SpoolError, SpoolReader, Stream};

/// The exit code of podman where podman itself failed.
const PODMAN_FAILED: i32 = 125;

/// Bytes of a complaint that are reported.
const COMPLAINT_BYTES_MAX: usize = 700;

/// What podman says, and the reason that follows. The first that fits counts.
const WORDS: &[(&str, Reason)] = &[
    ("no space left on device", Reason::DiskFull),
    ("disk quota exceeded", Reason::DiskFull),
    // A `RUN` step may end with any code, 125 included.
    ("while running runtime:", Reason::Exit),
    ("is rejected by policy", Reason::Policy),
    ("creating build container:", Reason::ImagePull),
    ("initializing source docker://", Reason::ImagePull),
    ("pinging container registry", Reason::ImagePull),
    ("unable to copy from source docker://", Reason::ImagePull),
    ("was not found in the provided Dockerfile", Reason::Source),
    ("Unknown instruction:", Reason::Source),
    ("no FROM statement found", Reason::Source),
    ("FROM requires either one argument", Reason::Source),
    ("no contents in", Reason::Source),
    ("reading \"http", Reason::Source),
    ("checking on sources under", Reason::Source),
    ("error during bulk transfer for copier", Reason::Source),
    // Of a file that cannot be read, when the copier ends before it was asked.
    ("error encoding request for copier", Reason::Source),
    ("no stage or image found with that name", Reason::Source),
    ("dockerfile parse error", Reason::Source),
    ("parsing main Dockerfile", Reason::Source),
    ("mounting new container", Reason::Internal),
    ("netavark:", Reason::Internal),
    ("creating libpod runtime", Reason::Internal),
    ("configuring storage", Reason::Internal),
];

/// The reason and one line for people.
#[must_use]
pub fn classify(code: i32, complaint: Option<&str>) -> (Reason, String) {
    let Some(complaint) = complaint else {
        return (Reason::Exit, format!("podman build ended with exit code {code}"));
    };
    let reason = if code == PODMAN_FAILED && !ends_as_a_step(complaint) { told_of(complaint) } else { Reason::Exit };
    let message = match reason {
        Reason::ImagePull => format!("a base image cannot be had: {complaint}"),
        _ => format!("podman build ended with exit code {code}: {complaint}"),
    };
    (reason, shortened(&message))
}

/// Whether it is what podman says when a step's own program failed: the step's text stands before that, and counts for nothing.
fn ends_as_a_step(complaint: &str) -> bool {
    let code = complaint.trim_end().rsplit_once("while running runtime: exit status ").map(|(_, code)| code);
    code.is_some_and(|code| !code.is_empty() && code.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The reason that podman's words give. A step's text in them is the build's own, and nothing marks its end: what would be a fault
/// of ours is only told by what follows its last possible end, else a step could have us blamed.
fn told_of(complaint: &str) -> Reason {
    let step = complaint.strip_prefix("building at STEP \"");
    let (said, certain) = match step.and_then(|rest| Some((rest.split_once("\": ")?.1, rest.rsplit_once("\": ")?.1))) {
        Some(parts) => parts,
        None => (complaint, complaint),
    };
    let fits = |(words, reason): &&(&str, Reason)| {
        let of_the_build = matches!(reason, Reason::Exit | Reason::Policy | Reason::Source);
        (if of_the_build { said } else { certain }).contains(words)
    };
    WORDS.iter().find(fits).map_or(Reason::Exit, |(_, reason)| *reason)
}

/// One line of bounded length. What is left out is in the middle: causes stand at the end.
#[must_use]
pub fn shortened(text: &str) -> String {
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.len() <= COMPLAINT_BYTES_MAX {
        return line;
    }
    let head = line.floor_char_boundary(COMPLAINT_BYTES_MAX / 2);
    let tail = line.ceil_char_boundary(line.len() - COMPLAINT_BYTES_MAX / 2);
    format!("{} [...] {}", &line[..head], &line[tail..])
}

/// podman's last complaint in an ended attempt's log. Blocks.
///
/// # Errors
/// Those of the file system.
pub fn last_complaint(dir: &AttemptDir) -> io::Result<Option<String>> {
    let mut reader = SpoolReader::new(dir);
    let mut last = None;
    loop {
        match reader.next_record(Growth::Ended) {
            Ok(Some(record)) if record.stream == Stream::Stderr => {
                if let Some(complaint) = record.bytes.strip_prefix(b"Error: ") {
                    last = Some(String::from_utf8_lossy(complaint).into_owned());
                }
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(SpoolError::Damaged { .. }) => return Ok(last),
            Err(SpoolError::Io(error)) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_has_its_reason() {
        for (code, complaint, reason) in [
            (7, "building at STEP \"RUN exit 7\": while running runtime: exit status 7", Reason::Exit),
            (125, "building at STEP \"RUN exit 125\": while running runtime: exit status 125", Reason::Exit),
            (1, "building at STEP \"RUN /nosuch\": while running runtime: exit status 1", Reason::Exit),
            (125, "The target \"x\" was not found in the provided Dockerfile", Reason::Source),
            (
                125,
                "creating build container: initializing source docker://h/x:1: pinging container registry h: dial tcp",
                Reason::ImagePull,
            ),
            (
                125,
                "creating build container: initializing source docker://h/x:1: reading manifest 1 in h/x: manifest unknown",
                Reason::ImagePull,
            ),
            (
                125,
                "creating build container: short-name \"x\" did not resolve to an alias and no unqualified-search \
                 registries are defined",
                Reason::ImagePull,
            ),
            (
                125,
                "building at STEP \"COPY no /x\": checking on sources under \"/w\": copier: stat: \"/no\": no such file",
                Reason::Source,
            ),
            (125, "building at STEP \"BOGUS \": Build error: Unknown instruction: \"BOGUS\"", Reason::Source),
            (125, "no FROM statement found", Reason::Source),
            (125, "FROM requires either one argument, or three: FROM <source> [as <name>]", Reason::Source),
            (
                125,
                "building at STEP \"ADD http://h/x /x\": reading \"http://h/x\": dial tcp: connection refused",
                Reason::Source,
            ),
            (
                125,
                "creating build container: Source image rejected: Running image dir:/x is rejected by policy.",
                Reason::Policy,
            ),
            (125, "building at STEP \"RUN x\": netavark: No such file or directory (os error 2)", Reason::Internal),
            (125, "building at STEP \"COPY a /\": copying: write /a: no space left on device", Reason::DiskFull),
            (125, "building at STEP \"COPY a /\": copying: write \"/a\": no space left on device", Reason::DiskFull),
            // The build's own words decide nothing.
            (
                125,
                "building at STEP \"RUN echo \"x\": no space left on device; exit 125\": while running runtime: exit status 125",
                Reason::Exit,
            ),
            (125, "building at STEP \"COPY \"x\": netavark: /y\": some new failure", Reason::Exit),
            (
                125,
                "building at STEP \"COPY \"x\": mounting new container /y\": checking on sources under \"/w\": no such file",
                Reason::Source,
            ),
            (125, "building at STEP \"RUN creating build container:\": some new failure", Reason::Exit),
            (3, "creating build container: echoed by the build", Reason::Exit),
            (125, "some new failure", Reason::Exit),
        ] {
            assert_eq!(classify(code, Some(complaint)).0, reason, "{complaint}");
        }
        assert_eq!(classify(2, None), (Reason::Exit, "podman build ended with exit code 2".to_owned()));
    }

    #[test]
    fn long_complaints_keep_their_cause() {
        let long = format!("building: {}: no such file", "é".repeat(4000));
        let short = shortened(&long);
        assert!(short.len() < 1024 && short.starts_with("building: ") && short.ends_with(": no such file"));
        assert_eq!(shortened("a\nb"), "a b");
    }
}
