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

/// Places that podman takes images from besides registries. They are paths of this host.
const TRANSPORTS: [&str; 9] = [
    "containers-storage:",
    "dir:",
    "docker-archive:",
    "docker-daemon:",
    "oci-archive:",
    "oci:",
    "ostree:",
    "sif:",
    "tarball:",
];

/// Options of `RUN --mount` by which podman changes files of this host, or how they are mounted, before its guard is asked.
const MOUNT_OPTIONS: [&str; 6] = ["U", "chown", "z", "Z", "relabel", "bind-propagation"];

/// Flags of `RUN` that widen what a step may do: some that podman of today does not know and a later one may, some that have
/// podman itself touch the host; and images that are no registry's, where they can be told: podman has a policy against the
/// others.
fn check(text: &str, network: &str) -> Result<(), String> {
    // Which of the two escapes counts, a directive says; a flag that only one of them shows is one.
    for escape in ['\\', '`'] {
        for line in instructions(text, escape) {
            // podman takes quotation marks and escapes out of flags.
            let plain = line.replace(['"', '\'', '\\'], "");
            let mut words = plain.split_whitespace().peekable();
            while words.peek().is_some_and(|word| word.eq_ignore_ascii_case("ONBUILD")) {
                words.next();
            }
            let verb = words.next().unwrap_or_default().to_ascii_uppercase();
            let mut flags: Vec<&str> = std::iter::from_fn(|| words.next_if(|word| word.starts_with("--"))).collect();
            let whole = whole_flags(&line);
            flags.extend(whole.iter().map(String::as_str));
            let mut images: Vec<&str> = match verb.as_str() {
                "FROM" => words.next().into_iter().collect(),
                "COPY" => flags.iter().filter_map(|flag| flag.strip_prefix("--from=")).collect(),
                _ => Vec::new(),
            };
            images.retain(|image| TRANSPORTS.iter().any(|place| image.starts_with(place)));
            if let Some(image) = images.first() {
                return Err(format!("the image {image} is no registry's, and not allowed on this agent"));
            }
            if verb != "RUN" {
                continue;
            }
            for flag in flags {
                if flag.starts_with("--security") {
                    return Err(format!("RUN {flag} is not allowed on this agent"));
                }
                if flag.starts_with("--mount") {
                    check_mount(flag)?;
                }
                if flag.starts_with("--network") && !flag.ends_with("=none") && network != "host" {
                    return Err(format!("RUN {flag} is not allowed on this agent (podman.network)"));
                }
            }
        }
    }
    Ok(())
}

/// Options that have podman change what is mounted, and caches whose directory would be another than their own: podman makes that,
/// and gives it away, before its guard is asked.
fn check_mount(flag: &str) -> Result<(), String> {
    for option in flag.split_once('=').map_or("", |(_, options)| options).split(',') {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let (name, value) = (name.trim(), value.trim());
        let leads_out = match name {
            "id" => value.starts_with('/') || value.split('/').any(|part| part == ".."),
            "target" | "dst" | "destination" => value.split('/').any(|part| part == ".."),
            _ => false,
        };
        if leads_out || MOUNT_OPTIONS.contains(&name) {
            return Err(format!("RUN --mount with {option:?} is not allowed on this agent"));
        }
    }
    Ok(())
}

/// The flags of an instruction, as podman takes them apart: blanks between quotation marks are part of a flag.
fn whole_flags(line: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut letters = line.chars().peekable();
    loop {
        while letters.next_if(|letter| letter.is_whitespace()).is_some() {}
        let (mut word, mut quotation) = (String::new(), None);
        while let Some(letter) = letters.next_if(|letter| quotation.is_some() || !letter.is_whitespace()) {
            match letter {
                '\\' => word.extend(letters.next()),
                '"' | '\'' if quotation.is_none() => quotation = Some(letter),
                end if quotation == Some(end) => quotation = None,
                other => word.push(other),
            }
        }
        // The instruction's own name comes first, behind ONBUILD perhaps.
        if word.starts_with("--") {
            found.push(word);
        } else if word.is_empty()
            || !(found.is_empty()
                && ["ONBUILD", "RUN", "COPY", "ADD", "FROM"].iter().any(|verb| word.eq_ignore_ascii_case(verb)))
        {
            return found;
        }
    }
}

/// The instructions of a Dockerfile, as podman puts them together: a line that ends with the escape goes on in the next, without
/// anything between them; comments and empty lines in between are passed over.
fn instructions(text: &str, escape: char) -> Vec<String> {
    let mut found = Vec::new();
    let mut current: Option<String> = None;
    for line in text.lines() {
        let goes_on = current.is_some();
        if line.trim_start().starts_with('#') || (goes_on && line.trim().is_empty()) {
            continue;
        }
        let mut whole = current.take().unwrap_or_default();
        match line.trim_end().strip_suffix(escape) {
            Some(part) => {
                whole.push_str(part);
                current = Some(whole);
            }
            None => {
                whole.push_str(line);
                found.push(whole);
            }
        }
    }
    found.extend(current);
    found
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
            ("FROM a\nRUN --net\\\nwork=host id", "", false),
            ("FROM a\nRUN --net\\ \n # not this\n\nwork=host id", "", false),
            ("# escape=`\nFROM a\nRUN --net`\nwork=host id", "", false),
            ("FROM a\nRUN --\"net\"work=host id", "", false),
            ("FROM a\nRUN echo \\\n --network=host", "", true),
            ("FROM a\nONBUILD RUN --network=default id", "none", false),
            ("FROM a\nRUN --security=insecure id", "host", false),
            ("FROM a\nRUN \\  \n# a comment\n\n --network=host id", "", false),
            ("FROM a\nRUN `\r\n--security=insecure id", "", false),
            ("FROM a\nONBUILD ONBUILD RUN --security=insecure id", "", false),
            ("FROM a\nRUN --mount=type=cache,target=/c \\", "", true),
            ("FROM --platform=linux/amd64 dir:/etc", "", false),
            ("from oci-archive:x AS y\nRUN true", "host", false),
            ("FROM a\nCOPY --from=oci:x /x /y", "", false),
            ("FROM docker://h/a:1\nCOPY --from=h:5000/x dir:x /y", "", true),
            ("FROM a\nRUN --mount=type=bind,target=/m,U ls", "", false),
            ("FROM a\nRUN --mount=type=cache,target=/m,U=true ls", "", false),
            ("FROM a\nRUN --mount=type=cache,target=/m,chown=true ls", "", false),
            ("FROM a\nRUN --network=none --mount=type=bind,Z,target=/m ls", "", false),
            ("FROM a\nRUN --mount=z,type=bind,target=/m ls", "", false),
            ("FROM a\nRUN --mount=type=bind,target=/m,bind-propagation=x ls", "", false),
            ("FROM a\nRUN --mount=type=cache,id=..,target=/m ls", "", false),
            ("FROM a\nRUN --mount=type=cache,id=a/../../b,target=/m ls", "", false),
            ("FROM a\nRUN --mount=type=cache,\\\"id=/etc\\\",target=/m ls", "", false),
            ("FROM a\nRUN --mount=type=cache,target=../../x ls", "", false),
            ("FROM a\nRUN --mount=\"type=cache,id=a b,U\",target=/m ls", "", false),
            ("FROM a\nRUN --mount=type=cache,id=a\\ b,U,target=/m ls", "", false),
            ("FROM a\nONBUILD RUN --mount=type=cache,'id'=..,target=/m ls", "", false),
            ("FROM a\nRUN --mount=type=cache,target=/m,i\\\nd=.. ls", "", false),
            ("FROM a\nRUN --mount=type=cache,id=a..b,target=/m,uid=1,sharing=locked ls", "", true),
            ("FROM a\nRUN --mount=type=bind,from=b,source=/x,target=/m,rw ls --mount=U", "", true),
            ("FROM a\nRUN --network=none id", "", true),
            ("FROM a\nRUN --network=host id", "host", true),
            ("FROM a\nRUN curl --network=host", "", true),
        ] {
            assert_eq!(check(text, network).is_ok(), fine, "{text}");
        }
    }
}
