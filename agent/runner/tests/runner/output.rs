//! What the command says and what is kept of it.

use std::time::Instant;

use helix_model::limits::LOG_LINE_BYTES_MAX;
use helix_runner::control::{Event, Request};
use helix_runner::{End, Growth, Stream};

use crate::support::{Attempt, records, text, until};

#[test]
fn lines_are_numbered_in_order_and_kept_as_they_were() {
    let (outcome, lines) = Attempt::run(r"printf 'a\r\n\n\377\000x\nlast'; printf 'err\n' >&2");
    assert_eq!(outcome.end, End::Exited(0));
    let numbers: Vec<u64> = lines.iter().map(|line| line.seq).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5]);
    let of = |stream| lines.iter().filter(move |line| line.stream == stream).map(|line| line.bytes.as_slice());
    let stdout: Vec<&[u8]> = of(Stream::Stdout).collect();
    assert_eq!(stdout, [b"a\r", &b""[..], b"\xff\0x", b"last"]);
    assert_eq!(of(Stream::Stderr).collect::<Vec<_>>(), [b"err"]);
    assert_eq!((outcome.log.last_seq, outcome.log.bytes), (5, 2 + 3 + 4 + 3));
    let (start, end) = (outcome.started_at_ms, outcome.ended_at_ms);
    assert!(lines.iter().all(|line| (start..=end).contains(&line.time_ms)));
}

#[test]
fn a_hundred_thousand_lines_arrive_once_each_in_order() {
    let (_, lines) = Attempt::run("i=0; while [ $i -lt 100000 ]; do echo $i; i=$((i+1)); done");
    assert_eq!(lines.len(), 100_000);
    for (index, line) in lines.iter().enumerate() {
        assert_eq!((line.seq, &line.bytes), (index as u64 + 1, &index.to_string().into_bytes()));
    }
}

#[test]
fn lines_at_the_limit_are_whole_and_longer_ones_are_split() {
    let script = format!(
        "head -c {LOG_LINE_BYTES_MAX} /dev/zero; echo; head -c {} /dev/zero; echo; echo end",
        LOG_LINE_BYTES_MAX + 1
    );
    let (_, lines) = Attempt::run(&script);
    let lengths: Vec<usize> = lines.iter().map(|line| line.bytes.len()).collect();
    assert_eq!(lengths, [LOG_LINE_BYTES_MAX, LOG_LINE_BYTES_MAX, 1, 3]);
}

/// The most memory that a process ever had, in KiB.
fn peak_kib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

fn stays_small(script: &str, bytes: u64) {
    // The script's end waits for us, so that the runner can be measured when all is said.
    let mut attempt = Attempt::new(&format!("{script}; echo said; read line < gate")).with(|order| {
        order.log_bytes_max = 8 << 30;
    });
    let gate = attempt.workdir.join("gate");
    rustix::fs::mknodat(rustix::fs::CWD, &gate, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    attempt = attempt.start();
    let mut client = attempt.connect();
    until("all of the log", || (client.status().log.bytes >= bytes).then_some(()));
    let peak = until("its memory", || peak_kib(attempt.runner_pid()));
    std::fs::write(gate, "go\n").unwrap();
    let outcome = attempt.outcome();
    assert_eq!((outcome.end, outcome.log.dropped_lines), (End::Exited(0), 0));
    eprintln!("{script}: peak {peak} KiB");
    assert!(peak < 16 * 1024, "{peak} KiB");
}

#[test]
fn a_hundred_megabytes_of_lines_need_little_memory() {
    stays_small("yes 0123456789012345678901234567890123456789 | head -c 100000000", 97_000_000);
}

#[test]
fn a_line_of_a_hundred_megabytes_needs_little_memory() {
    stays_small("head -c 100000000 /dev/zero; echo", 100_000_000);
}

#[test]
fn a_flood_of_empty_lines_needs_little_memory() {
    stays_small("yes '' | head -c 2000000 >&2; yes '' | head -c 2000000", 0);
}

#[test]
fn a_line_is_told_of_at_once() {
    let mut attempt = Attempt::new("echo ready; read x < gate; echo now; sleep 1000");
    let gate = attempt.workdir.join("gate");
    rustix::fs::mknodat(rustix::fs::CWD, &gate, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    attempt = attempt.start();
    attempt.says("ready");
    let mut client = attempt.connect();
    client.send(Request::Watch);
    assert_eq!(client.event(), Some(Event::Grew { last_seq: 1 }));
    let asked = Instant::now();
    std::fs::write(gate, "go\n").unwrap();
    assert_eq!(client.event(), Some(Event::Grew { last_seq: 2 }));
    let waited = asked.elapsed();
    assert_eq!(text(&records(&attempt.dir, Growth::Open), Stream::Stdout), ["ready", "now"]);
    // Generous for a machine that compiles beside us; by itself it is well under a millisecond.
    assert!(waited.as_millis() < 500, "{waited:?}");
    eprintln!("a line was told of after {waited:?}");
    client.stop(helix_model::Reason::Cancelled, 0);
    attempt.outcome();
}

#[test]
fn beyond_its_limit_head_and_tail_are_kept_and_the_loss_is_told() {
    let limit = 1 << 20;
    let mut attempt = Attempt::new("i=0; while [ $i -lt 200000 ]; do echo line $i; i=$((i+1)); done").with(|order| {
        order.log_bytes_max = limit;
    });
    attempt = attempt.start();
    let outcome = attempt.outcome();
    let lines = attempt.records();
    // 200,000 lines and the notice that the limit is near.
    assert_eq!(outcome.log.last_seq, 200_001);
    assert!(outcome.log.dropped_lines > 100_000, "{:?}", outcome.log);
    let on_disk: u64 = [attempt.dir.log_head(), attempt.dir.log_tail(), attempt.dir.log_tail_old()]
        .iter()
        .map(|path| path.metadata().unwrap().len())
        .sum();
    assert!(on_disk <= limit, "{on_disk}");
    assert_eq!(lines[0].bytes, b"line 0");
    assert_eq!(lines.last().unwrap().bytes, b"line 199999");
    let system: Vec<usize> = (0..lines.len()).filter(|at| lines[*at].stream == Stream::System).collect();
    let [near, gap] = system[..] else { panic!("{system:?}") };
    assert_eq!(gap, near + 1);
    let told = String::from_utf8_lossy(&lines[gap].bytes).into_owned();
    let expected = format!("{} lines ({} bytes) were", outcome.log.dropped_lines, outcome.log.dropped_bytes);
    assert!(told.starts_with(&expected), "{told}, expected {expected}");
    // Numbers and content agree on both sides of the gap, and the gap is as large as it says.
    for line in &lines[..near] {
        assert_eq!(line.bytes, format!("line {}", line.seq - 1).into_bytes());
    }
    for line in &lines[gap + 1..] {
        assert_eq!(line.bytes, format!("line {}", line.seq - 2).into_bytes());
    }
    assert_eq!(lines[gap].seq - lines[near].seq, outcome.log.dropped_lines);
    assert_eq!(lines[gap + 1].seq, lines[gap].seq + 1);
    // While it ran only the head was to be seen.
    assert_eq!(records(&attempt.dir, Growth::Open).len(), near + 1);
}

#[test]
fn what_was_said_just_before_being_killed_is_kept() {
    let (outcome, lines) = Attempt::run("echo before; printf half; kill -9 $$");
    assert_eq!(outcome.end, End::Signaled(9));
    assert_eq!(outcome.stopped, None);
    assert_eq!(text(&lines, Stream::Stdout), ["before", "half"]);
}

#[test]
fn output_of_a_pipe_that_outlives_the_command_is_waited_for() {
    let mut attempt = Attempt::new("(read x < gate; echo late) & echo early").with(|order| order.leftover_ms = 60_000);
    let gate = attempt.workdir.join("gate");
    rustix::fs::mknodat(rustix::fs::CWD, &gate, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    attempt = attempt.start();
    let mut client = attempt.connect();
    until("the command's end", || (client.status().command_pid == 0).then_some(()));
    std::fs::write(gate, "go\n").unwrap();
    let outcome = attempt.outcome();
    assert_eq!((outcome.end, outcome.leftovers_killed), (End::Exited(0), 0));
    assert_eq!(text(&attempt.records(), Stream::Stdout), ["early", "late"]);
}

#[test]
fn a_flood_of_binary_output_is_bounded_on_disk_and_in_memory_and_keeps_both_ends() {
    // A quarter of a gigabyte without a single line end, beside ordinary words at the beginning and at the end.
    let limit = 2 << 20;
    let script = "echo first; head -c 250000000 /dev/urandom | tr '\\n' x; echo; echo last; read x < gate";
    let mut attempt = Attempt::new(script).with(|order| order.log_bytes_max = limit);
    let gate = attempt.workdir.join("gate");
    rustix::fs::mknodat(rustix::fs::CWD, &gate, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    attempt = attempt.start();
    let mut client = attempt.connect();
    until("all of it", || (client.status().log.bytes >= 250_000_000 + 9).then_some(()));
    let peak = until("its memory", || peak_kib(attempt.runner_pid()));
    assert!(peak < 16 * 1024, "{peak} KiB");
    let on_disk: u64 = [attempt.dir.log_head(), attempt.dir.log_tail(), attempt.dir.log_tail_old()]
        .iter()
        .filter_map(|path| path.metadata().ok())
        .map(|data| data.len())
        .sum();
    assert!(on_disk <= limit, "{on_disk}");
    std::fs::write(gate, "go\n").unwrap();
    let outcome = attempt.outcome();
    let lines = attempt.records();
    assert_eq!((&lines[0].bytes[..], &lines.last().unwrap().bytes[..]), (&b"first"[..], &b"last"[..]));
    let kept: u64 = lines.iter().filter(|line| line.stream == Stream::Stdout).map(|line| line.bytes.len() as u64).sum();
    assert_eq!(kept + outcome.log.dropped_bytes, 250_000_000 + 9, "{:?}", outcome.log);
    assert!(
        lines
            .iter()
            .any(|line| line.stream == Stream::System && line.bytes.windows(12).any(|words| words == b"dropped here")),
        "it is not told"
    );
}
