//! The Dockerfile of a build, looked at before podman sees it: it is there, it lies in the source, and it asks for nothing
//! that only the host's owner may allow.
//!
//! podman itself keeps `COPY` and `ADD` inside the context: there a link out of it leads to nothing.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use helix_model::Reason;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2};
use rustix::io::Errno;

/// A Dockerfile's bytes, at most.
const DOCKERFILE_BYTES_MAX: u64 = 1 << 20;

/// What podman takes without `-f`, in this order.
const DEFAULTS: [&str; 2] = ["Containerfile", "Dockerfile"];

/// Finds the Dockerfile: `wanted`, relative to the source, or the first of podman's defaults. Links are followed as long
/// as they stay in the source. Blocks.
///
/// # Errors
/// The reason and one line for people.
pub fn dockerfile(work: &Path, wanted: &str, network: &str) -> Result<PathBuf, (Reason, String)> {
    let source = |message: String| (Reason::Source, message);
    let candidates = if wanted.is_empty() { DEFAULTS.to_vec() } else { vec![wanted] };
    for name in &candidates {
        // podman would run the C preprocessor on it, whose #include reads any file of the host.
        if name.ends_with(".in") {
            return Err(source(format!("the Dockerfile {name:?} would be preprocessed (.in): rename it")));
        }
        // podman takes several files in one argument, separated so.
        if work.join(name).to_string_lossy().contains([',', '"']) {
            return Err(source(format!("the path of the Dockerfile {name:?} has a comma or a quotation mark")));
        }
        match read(work, name) {
            Ok(text) => {
                check(&text, network).map_err(|message| (Reason::Policy, message))?;
                return Ok(work.join(name));
            }
            Err(Errno::NOENT | Errno::NOTDIR) if wanted.is_empty() => {}
            Err(error) => return Err(source(format!("the Dockerfile {name:?} {}", words(error)))),
        }
    }
    Err(source(format!("the source has no {}", candidates.join(" and no "))))
}

fn words(error: Errno) -> String {
    match error {
        Errno::NOENT | Errno::NOTDIR => "does not exist".to_owned(),
        Errno::XDEV => "lies outside of the source, or behind a symbolic link that leads out of it".to_owned(),
        Errno::LOOP => "lies behind symbolic links that lead nowhere".to_owned(),
        Errno::ISDIR => "is no regular file".to_owned(),
        Errno::FBIG => format!("has more than {DOCKERFILE_BYTES_MAX} bytes"),
        other => format!("cannot be read: {}", std::io::Error::from(other)),
    }
}

/// Reads a file beneath a directory; a link or a `..` that leads out of it ends in `XDEV`.
fn read(work: &Path, name: &str) -> Result<String, Errno> {
    let top = openat(CWD, work, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // Not to wait for a FIFO's other end.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = openat2(&top, name, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS)?;
    let stat = fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Errno::ISDIR);
    }
    let mut bytes = Vec::new();
    let mut limited = std::fs::File::from(file).take(DOCKERFILE_BYTES_MAX + 1);
    limited.read_to_end(&mut bytes).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    if bytes.len() as u64 > DOCKERFILE_BYTES_MAX {
        return Err(Errno::FBIG);
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Flags of `RUN` that widen what a step may do. podman of today knows neither; a later one may.
fn check(text: &str, network: &str) -> Result<(), String> {
    for instruction in instructions(text) {
        let mut words = instruction.split_whitespace().peekable();
        while words.peek().is_some_and(|word| word.eq_ignore_ascii_case("ONBUILD")) {
            words.next();
        }
        if !words.next().is_some_and(|word| word.eq_ignore_ascii_case("RUN")) {
            continue;
        }
        for flag in words.take_while(|word| word.starts_with("--")) {
            if flag.starts_with("--security") {
                return Err(format!("RUN {flag} is not allowed on this agent"));
            }
            if flag.starts_with("--network") && !flag.ends_with("=none") && network != "host" {
                return Err(format!("RUN {flag} is not allowed on this agent (podman.network)"));
            }
        }
    }
    Ok(())
}

/// The instructions of a Dockerfile, a line each. A line that ends with an escape goes on in the next, over comments and
/// empty lines; either character that can be the escape counts as one.
fn instructions(text: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut open: Option<String> = None;
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (part, goes_on) = match line.strip_suffix(['\\', '`']) {
            Some(part) => (part, true),
            None => (line, false),
        };
        let mut whole = open.take().unwrap_or_default();
        whole.push_str(part);
        whole.push(' ');
        if goes_on { open = Some(whole) } else { all.push(whole) }
    }
    all.extend(open);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_a_file_in_the_source_is_a_dockerfile() {
        let base = tempfile::tempdir().unwrap();
        let work = base.path().join("work");
        std::fs::create_dir_all(work.join("dir")).unwrap();
        std::fs::create_dir_all(work.join("x,/etc")).unwrap();
        std::fs::write(work.join("x,/etc/passwd"), "FROM scratch\n").unwrap();
        std::fs::write(base.path().join("outside"), "FROM scratch\n").unwrap();
        symlink("../outside", work.join("out")).unwrap();
        symlink(base.path().join("outside"), work.join("absolute")).unwrap();
        symlink("..", work.join("up")).unwrap();
        symlink("loop", work.join("loop")).unwrap();
        symlink("dir/real", work.join("inside")).unwrap();
        rustix::fs::mknodat(CWD, work.join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        std::fs::write(work.join("dir/real"), "FROM scratch\n").unwrap();
        std::fs::write(work.join("x.in"), "FROM scratch\n").unwrap();
        std::fs::write(work.join("big"), vec![b'#'; (1 << 20) + 1]).unwrap();

        assert_eq!(dockerfile(&work, "dir/real", "").unwrap(), work.join("dir/real"));
        assert_eq!(dockerfile(&work, "inside", "").unwrap(), work.join("inside"));
        for (name, told) in [
            ("missing", "does not exist"),
            ("dir/real/below", "does not exist"),
            ("out", "leads out of it"),
            ("absolute", "leads out of it"),
            ("up/outside", "leads out of it"),
            ("../outside", "leads out of it"),
            ("/etc/passwd", "leads out of it"),
            ("loop", "lead nowhere"),
            ("dir", "no regular file"),
            ("fifo", "no regular file"),
            ("x.in", "preprocessed"),
            ("x,/etc/passwd", "a comma"),
            ("big", "more than"),
            ("", "no Containerfile and no Dockerfile"),
        ] {
            let (reason, message) = dockerfile(&work, name, "").unwrap_err();
            assert_eq!(reason, Reason::Source, "{name}");
            assert!(message.contains(told), "{name}: {message}");
        }
        std::fs::write(work.join("Dockerfile"), "FROM scratch\n").unwrap();
        assert_eq!(dockerfile(&work, "", "").unwrap(), work.join("Dockerfile"));
        std::fs::write(work.join("Containerfile"), "FROM scratch\n").unwrap();
        assert_eq!(dockerfile(&work, "", "").unwrap(), work.join("Containerfile"));
    }

    #[test]
    fn steps_cannot_widen_their_rights() {
        for (text, network, fine) in [
            ("FROM a\nRUN --network=host id", "", false),
            ("FROM a\nrun --mount=type=cache,target=/c \\\n --network=host id", "", false),
            ("FROM a\nONBUILD RUN --network=default id", "none", false),
            ("FROM a\nRUN --security=insecure id", "host", false),
            ("FROM a\nRUN \\  \n# a comment\n\n --network=host id", "", false),
            ("FROM a\nRUN `\r\n--security=insecure id", "", false),
            ("FROM a\nRUN --mount=type=cache,target=/c \\", "", true),
            ("FROM a\nRUN --network=none id", "", true),
            ("FROM a\nRUN --network=host id", "host", true),
            ("FROM a\nRUN curl --network=host", "", true),
        ] {
            assert_eq!(check(text, network).is_ok(), fine, "{text}");
        }
    }
}
