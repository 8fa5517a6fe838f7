//! The log on disk: growth, torn ends, damage, and several writers one after the other.

use helix_model::Reason;
use helix_runner::{AttemptDir, End, Growth, LOG_BYTES_MIN, Outcome, SpoolError, SpoolReader, SpoolWriter, Stream};

use crate::skip::skip;
use crate::support::{Attempt, records, text};

fn directory() -> (tempfile::TempDir, AttemptDir) {
    let temporary = tempfile::tempdir().unwrap();
    let dir = AttemptDir::new(temporary.path());
    (temporary, dir)
}

fn written(dir: &AttemptDir, lines: &[&str]) -> SpoolWriter {
    let mut writer = SpoolWriter::open(dir, LOG_BYTES_MIN).unwrap();
    for line in lines {
        writer.append(7, Stream::Stdout, line.as_bytes());
    }
    writer.flush().unwrap();
    writer
}

#[test]
fn a_reader_follows_a_writer() {
    let (_temporary, dir) = directory();
    let mut reader = SpoolReader::new(&dir);
    assert_eq!(reader.next_record(Growth::Open).unwrap(), None);
    let mut writer = written(&dir, &["a"]);
    assert_eq!(reader.next_record(Growth::Open).unwrap().unwrap().bytes, b"a");
    assert_eq!(reader.next_record(Growth::Open).unwrap(), None);
    let place = reader.position();
    writer.append(8, Stream::Stderr, b"b");
    assert_eq!(reader.next_record(Growth::Open).unwrap(), None, "not flushed yet");
    writer.flush().unwrap();
    for reader in [&mut reader, &mut SpoolReader::resume(&dir, place)] {
        let record = reader.next_record(Growth::Open).unwrap().unwrap();
        assert_eq!((record.seq, record.time_ms, record.stream, record.bytes), (2, 8, Stream::Stderr, b"b".to_vec()));
        assert_eq!(reader.next_record(Growth::Ended).unwrap(), None);
    }
}

#[test]
fn a_torn_end_is_cut_wherever_it_is_torn() {
    let (_temporary, dir) = directory();
    written(&dir, &["first", "second"]);
    let whole = std::fs::read(dir.log_head()).unwrap();
    let first_end = whole.len() - (25 + "second".len());
    for cut in 0..whole.len() {
        std::fs::write(dir.log_head(), &whole[..cut]).unwrap();
        let expected = if cut >= first_end { 1 } else { 0 };
        assert_eq!(records(&dir, Growth::Open).len(), expected, "cut to {cut}");
        assert_eq!(records(&dir, Growth::Ended).len(), expected, "cut to {cut}");
        written(&dir, &["after"]);
        let lines = records(&dir, Growth::Ended);
        assert_eq!(lines.last().unwrap().bytes, b"after", "cut to {cut}");
        assert_eq!(lines.len(), expected + 1);
        assert!(lines.iter().map(|line| line.seq).eq(1..=lines.len() as u64));
    }
}

#[test]
fn any_flipped_bit_is_damage_or_a_torn_end_and_never_another_line() {
    let (_temporary, dir) = directory();
    written(&dir, &["first", "second", "third"]);
    let whole = std::fs::read(dir.log_head()).unwrap();
    let good = records(&dir, Growth::Ended);
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x10;
        std::fs::write(dir.log_head(), &damaged).unwrap();
        let mut reader = SpoolReader::new(&dir);
        let mut read = Vec::new();
        let error = loop {
            match reader.next_record(Growth::Ended) {
                Ok(Some(record)) => read.push(record),
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        assert!(read.len() < good.len(), "byte {at} went unnoticed");
        assert_eq!(read, good[..read.len()], "byte {at}");
        match error {
            Some(SpoolError::Damaged { .. }) => assert!(SpoolWriter::open(&dir, LOG_BYTES_MIN).is_err()),
            Some(SpoolError::Io(error)) => panic!("{error}"),
            // A length that became larger looks like a torn end; the file's end is then missing, never wrong.
            None => assert!(at >= 32, "byte {at}"),
        }
    }
}

#[test]
fn agent_and_runner_write_one_log() {
    let mut attempt = Attempt::new("echo from the command");
    written(&attempt.dir, &["fetching", "fetched"]);
    attempt = attempt.start();
    assert_eq!(attempt.outcome().log.last_seq, 3);
    written(&attempt.dir, &["uploaded"]);
    let lines = attempt.records();
    assert_eq!(text(&lines, Stream::Stdout), ["fetching", "fetched", "from the command", "uploaded"]);
    assert!(lines.iter().map(|line| line.seq).eq(1..=4));
}

#[test]
fn a_writer_that_returns_to_a_clipped_log_goes_on_behind_it() {
    let (_temporary, dir) = directory();
    let long = "x".repeat(1000);
    let mut writer = written(&dir, &[]);
    let mut before = Vec::new();
    for round in 0..40 {
        for _ in 0..100 {
            writer.append(7, Stream::Stdout, long.as_bytes());
        }
        writer.flush().unwrap();
        let totals = writer.totals();
        drop(writer);
        writer = SpoolWriter::open(&dir, LOG_BYTES_MIN).unwrap();
        assert_eq!(writer.totals(), totals, "round {round}");
        let lines = records(&dir, Growth::Ended);
        assert_eq!(lines.last().unwrap().seq, totals.last_seq);
        assert!(lines.windows(2).all(|pair| pair[0].seq < pair[1].seq));
        before.push(lines.len());
    }
    assert_eq!(before[0], 100);
    assert!(*before.last().unwrap() < 1100, "{before:?}");
    let mut reader = SpoolReader::new(&dir);
    while reader.next_record(Growth::Ended).unwrap().is_some() {}
    assert_eq!(reader.totals(), writer.totals());
}

#[test]
fn a_tail_that_cannot_be_moved_loses_nothing() {
    let (_temporary, dir) = directory();
    let long = "x".repeat(1000);
    let mut writer = written(&dir, &[]);
    // In the way of the tail's old name: moving it there fails.
    std::fs::create_dir(dir.log_tail_old()).unwrap();
    let failed = (0..1000).find_map(|_| {
        writer.append(7, Stream::Stdout, long.as_bytes());
        writer.flush().err()
    });
    assert!(failed.is_some(), "the tail was never to be moved");
    assert!(writer.flush().is_err(), "what was in the way is gone, or the tail");
    std::fs::remove_dir(dir.log_tail_old()).unwrap();
    writer.flush().unwrap();
    let lines = records(&dir, Growth::Ended);
    assert!(lines.iter().map(|line| line.seq).eq(1..=writer.last_seq()), "lines are lost");
    assert_eq!(writer.totals().dropped_lines, 0);
}

#[test]
fn lines_that_were_given_up_show_as_a_gap() {
    let (_temporary, dir) = directory();
    let mut writer = written(&dir, &["a"]);
    writer.append(7, Stream::Stdout, &vec![b'b'; 60_000]);
    assert_eq!(writer.pending_bytes(), 60_025);
    writer.discard_pending();
    assert_eq!((writer.totals().dropped_lines, writer.totals().dropped_bytes), (1, 60_000));
    writer.append(9, Stream::Stdout, b"c");
    writer.flush().unwrap();
    let lines = records(&dir, Growth::Ended);
    assert_eq!(text(&lines, Stream::System), ["1 lines were lost here: the disk stayed full"]);
    assert_eq!(lines.iter().map(|line| line.seq).collect::<Vec<_>>(), [1, 2, 3]);
}

#[test]
fn a_full_disk_ends_the_build_with_that_reason_and_leaves_a_result() {
    let attempt = Attempt::new("yes a line of some length; echo not reached");
    attempt.write_order();
    // The attempt's directory on a disk of one megabyte, in a mount namespace of its own.
    let script =
        "mount -t tmpfs -o size=1m none \"$1\" && cp \"$2\" \"$1/journal\" && \"$0\" \"$1\"; cp -r \"$1\" \"$3\"";
    let small = attempt.workdir.join("small");
    let copy = attempt.workdir.join("copy");
    std::fs::create_dir(&small).unwrap();
    let program = env!("CARGO_BIN_EXE_helix-runner");
    let done = std::process::Command::new("unshare")
        .args(["-rm", "sh", "-c", script, program])
        .args([&small, &attempt.dir.journal(), &copy])
        .status();
    let outcome = Outcome::read(&AttemptDir::new(&copy)).ok().flatten();
    let Some(outcome) = outcome else {
        assert!(!rustix::process::geteuid().is_root(), "{done:?}");
        return skip("a_full_disk_ends_the_build", format!("no mount namespaces here ({done:?})"));
    };
    assert_eq!((outcome.end, outcome.stopped), (End::Signaled(9), Some(Reason::DiskFull)));
    let lines = records(&AttemptDir::new(&copy), Growth::Ended);
    assert!(lines.len() > 10_000 && lines.iter().all(|line| line.bytes == b"a line of some length"));
    assert_eq!(lines.len() as u64 + outcome.log.dropped_lines, outcome.log.last_seq);
}
