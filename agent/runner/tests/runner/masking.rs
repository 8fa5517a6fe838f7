//! Secrets that a command says are not in its log, and nowhere else that the runner writes.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use helix_model::limits::LOG_LINE_BYTES_MAX;
use helix_runner::isolation::{Absence, Access, Entry, Network};
use helix_runner::{End, Stream};

use crate::isolation::tools;
use crate::support::{Attempt, text};

const TOKEN: &str = "tok-5f3a9c81e7";
const KEY: &str = "-----BEGIN KEY-----\nMIIBVAIBADANBgkq\nhkiG9w0BAQEFAASC\n-----END KEY-----\n";

/// Runs a script that finds the two values in `$S/token` and `$S/key`. Gives its log.
fn said(script: &str) -> Vec<(Stream, String)> {
    let secrets = tempfile::tempdir().unwrap();
    std::fs::write(secrets.path().join("token"), TOKEN).unwrap();
    std::fs::write(secrets.path().join("key"), KEY).unwrap();
    let mut attempt = Attempt::new(script).with(|order| {
        order.secrets = Some(secrets.path().to_owned());
        order.environment.push(("S".into(), secrets.path().into()));
    });
    attempt = attempt.start();
    let outcome = attempt.outcome();
    assert_eq!(outcome.end, End::Exited(0));
    let lines = attempt.records();
    nowhere_in(attempt.dir.root());
    lines.into_iter().map(|line| (line.stream, String::from_utf8_lossy(&line.bytes).into_owned())).collect()
}

/// Looks for the values in all that lies in a directory.
fn nowhere_in(dir: &Path) {
    let mut files = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        // The socket cannot be read.
        let Ok(bytes) = std::fs::read(&path) else { continue };
        files += 1;
        for secret in [TOKEN, "MIIBVAIBADANBgkq", "hkiG9w0BAQEFAASC"] {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "{secret} is in {}", path.display());
        }
    }
    assert!(files > 0);
}

fn lines_of(said: &[(Stream, String)], stream: Stream) -> Vec<&str> {
    said.iter().filter(|(from, _)| *from == stream).map(|(_, line)| line.as_str()).collect()
}

#[test]
fn values_are_masked_on_both_streams_however_they_are_written() {
    let script = r#"
        cat "$S/token"; echo; cat "$S/key" >&2
        t=$(cat "$S/token")
        for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14; do
            printf %s "$t" | cut -c "$i" | tr -d '\n'; sleep 0.01
            printf %s "$t" | cut -c "$i" | tr -d '\n' >&2
        done
        echo .; echo . >&2
        base64 < "$S/key" | cat; printf '%s' "$t" | base64; echo "user:$t" | base64
        sed -n 2p "$S/key"; printf '%s' "$t" | fold -w 6; echo; echo the end"#;
    let said = said(script);
    let out = lines_of(&said, Stream::Stdout);
    assert_eq!(lines_of(&said, Stream::Stderr), ["***", "***", "***", "***", "***."]);
    assert_eq!(out[..2], ["***", "***."]);
    assert_eq!(out[out.len() - 4..], ["***", "***", "***", "the end"], "{out:?}");
    let encoded = out[2..out.len() - 5].join(" ");
    assert!(encoded.replace("***", "").len() < 14, "little but stars: {encoded}");
}

#[test]
fn values_are_masked_where_long_lines_are_split() {
    let before = LOG_LINE_BYTES_MAX - 5;
    let said = said(&format!(
        "head -c {before} /dev/zero | tr '\\0' x; cat \"$S/token\"; head -c 9 /dev/zero | tr '\\0' y; echo"
    ));
    let whole: String = lines_of(&said, Stream::Stdout).concat();
    assert_eq!(whole, format!("{}***{}", "x".repeat(before), "y".repeat(9)));
}

#[test]
fn a_runner_that_cannot_read_the_secrets_starts_nothing() {
    let mut attempt = Attempt::new("echo started").with(|order| order.secrets = Some("/no/such/directory".into()));
    attempt = attempt.start();
    let End::NotStarted { error, .. } = attempt.outcome().end else { panic!("it was started") };
    assert!(error.contains("cannot read the secrets"), "{error}");
    assert!(attempt.records().iter().all(|line| line.stream == Stream::System));
}

#[test]
fn an_isolated_command_reads_its_secrets_where_it_is_shown_them_and_nothing_more() {
    for tool in tools() {
        let secrets = tempfile::tempdir().unwrap();
        let file = secrets.path().join("token");
        std::fs::write(&file, TOKEN).unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o400)).unwrap();
        let script = "stat -c '%a %u' /run/secrets/token; cat /run/secrets/token; echo; \
                      touch /run/secrets/x 2> /dev/null || echo read-only; ls /run /run/secrets | tr '\\n' ' '";
        let mut attempt = Attempt::new(script).isolated(tool.clone(), Network::Host).with(|order| {
            if let Some(user) = order.user {
                for path in [file.as_path(), secrets.path()] {
                    std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)).unwrap();
                }
            }
            order.secrets = Some(secrets.path().to_owned());
            let (source, target) = (secrets.path().to_owned(), "/run/secrets".into());
            let view = &mut order.isolation.as_mut().unwrap().view;
            view.push(Entry::Bind { source, target, access: Access::Read, absence: Absence::Fails });
        });
        attempt = attempt.start();
        let (outcome, records) = (attempt.outcome(), attempt.records());
        assert_eq!(outcome.end, End::Exited(0), "{tool:?} {records:?}");
        let said = text(&records, Stream::Stdout);
        assert_eq!(said, ["400 1000", "***", "read-only", "/run: secrets  /run/secrets: token "], "{tool:?}");
    }
}
