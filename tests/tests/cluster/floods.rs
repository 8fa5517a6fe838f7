//! Builds that say more than their log may hold: both ends are kept, the loss is told where it is, and neither the disks nor the
//! memory of anybody pay for it.

use std::fs;
use std::path::Path;

use helix_runner::{AttemptDir, AttemptState, inspect};
use helix_tests::cluster::{Cluster, Said, Shape, alive, peak_resident_kib, wait_for};
use std::time::Duration;

/// The log's bound, as an operator sets it.
const LIMIT: u64 = 4 << 20;

/// What `helix logs` says of one build, taken apart.
struct Told {
    first: String,
    last: String,
    /// Lines of the command that are there.
    lines: u64,
    /// Lines and bytes that a line of ours says were dropped.
    dropped: (u64, u64),
    /// The number of such lines.
    gaps: usize,
    /// The command's bytes that are there, line ends left out.
    bytes: u64,
}

impl Told {
    fn of(said: &Said) -> Self {
        assert_eq!(said.code, 0, "{}", said.stderr);
        let own = |line: &&str| line.starts_with("helix: ");
        let gaps: Vec<&str> = said.stdout.lines().filter(own).filter(|line| line.contains("dropped here")).collect();
        let number = |at: usize| {
            let gap = gaps.first().copied().unwrap_or_default();
            gap.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).nth(at).unwrap_or(0)
        };
        let theirs = || said.stdout.lines().filter(|line| !own(line));
        Self {
            first: theirs().next().unwrap_or_default().to_owned(),
            last: theirs().next_back().unwrap_or_default().to_owned(),
            lines: theirs().count() as u64,
            dropped: (number(0), number(1)),
            gaps: gaps.len(),
            bytes: theirs().map(|line| line.len() as u64).sum(),
        }
    }
}

/// Bytes of all files below a directory that end so.
fn bytes_below(dir: &Path, wanted: &dyn Fn(&str) -> bool) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| {
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let named = entry.file_name().to_str().is_some_and(wanted);
        match (is_dir, named) {
            (true, _) => bytes_below(&entry.path(), wanted),
            (false, true) => entry.metadata().map_or(0, |data| data.len()),
            (false, false) => 0,
        }
    };
    entries.map(size).sum()
}

/// The most that anybody used while builds ran.
#[derive(Default, Debug)]
struct Peaks {
    spool_bytes: u64,
    live_bytes: u64,
    runner_kib: u64,
}

impl Peaks {
    fn look(&mut self, cluster: &Cluster) {
        let agent = cluster.member("agent", "agent-1");
        let coordinator = cluster.all("coordinator").remove(0);
        let spool = bytes_below(&agent.data_dir.join("attempts"), &|name| name.starts_with("log"));
        self.spool_bytes = self.spool_bytes.max(spool);
        self.live_bytes = self.live_bytes.max(bytes_below(&coordinator.data_dir.join("logs"), &|_| true));
        // A runner shows its files to nobody but root, so its attempt's directory tells which process it is.
        let attempts = fs::read_dir(agent.data_dir.join("attempts")).into_iter().flatten().flatten();
        let runner = |attempt: fs::DirEntry| match inspect(&AttemptDir::new(attempt.path())).ok()? {
            AttemptState::Running { pid } => peak_resident_kib(i32::try_from(pid).ok()?),
            _ => None,
        };
        let peak = attempts.filter_map(runner).max().unwrap_or(0);
        self.runner_kib = self.runner_kib.max(peak);
    }
}

#[test]
fn a_gigabyte_of_log_a_line_of_a_hundred_megabytes_and_binary_keep_both_ends() {
    let shape = Shape { coordinators: 1, agents: 1, capacity: 3, ..Shape::default() };
    let cluster = Cluster::start(&shape).unwrap();
    let set = cluster.helix(&["cluster", "policy", "set", &format!("log_bytes_max={LIMIT}")]);
    assert_eq!(set.code, 0, "{}", set.stderr);
    // 1,048,576 lines of 1,024 bytes.
    let flood = "echo first; yes \"$(printf '%01023d' 7)\" | head -c 1073741824; echo last; exit 3";
    let long = "echo first; head -c 100000000 /dev/zero | tr '\\0' x; echo; echo last";
    let binary =
        "echo first; head -c 60000000 /dev/urandom | tr '\\n\\r' xx; echo; echo last; echo err >&2; kill -9 $$";
    for (id, line) in [("flood", flood), ("long", long), ("binary", binary)] {
        let said = cluster.helix(&["submit", "--id", id, "--no-output", "-o", "quiet", "--", line]);
        assert_eq!(said.code, 0, "{}", said.stderr);
    }
    // Reads along, from the first line to the last.
    let mut follower = cluster.command(&["logs", "flood", "-f"]);
    let follower = std::thread::spawn(move || follower.output().unwrap());
    let mut peaks = Peaks::default();
    for (id, state, reason) in [("flood", "failed", "exit"), ("long", "succeeded", ""), ("binary", "failed", "signal")]
    {
        wait_for(&format!("the end of {id}"), Duration::from_secs(300), || {
            peaks.look(&cluster);
            let status = cluster.json(&["status", id]);
            let ended = status["state"] == state && status["reason"].as_str().unwrap_or_default() == reason;
            ended.then_some(())
        });
    }
    let told = |id: &str| Told::of(&cluster.helix(&["logs", id]));
    // A failure's log is sealed behind its end; before, it is whole at the coordinator that has it live, but for its middle.
    wait_for("sealed logs", Duration::from_secs(60), || (told("flood").last == "last").then_some(()));
    let flood = told("flood");
    assert_eq!((flood.first.as_str(), flood.last.as_str(), flood.gaps), ("first", "last", 1));
    assert_eq!(flood.lines + flood.dropped.0, 2 + (1 << 20), "a line is neither there nor told of");
    assert_eq!(flood.bytes + flood.dropped.1, 9 + (1023 << 20), "a byte is neither there nor told of");
    let long = told("long");
    assert_eq!((long.first.as_str(), long.last.as_str(), long.gaps), ("first", "last", 1));
    assert_eq!(long.bytes + long.dropped.1, 9 + 100_000_000);
    wait_for("sealed logs", Duration::from_secs(60), || (told("binary").gaps == 1).then_some(()));
    let binary = cluster.helix(&["logs", "binary"]).stdout;
    assert!(binary.starts_with("first\n") && binary.contains("\nlast\n") && binary.contains("\nerr\n"));
    let status = cluster.json(&["status", "binary"]);
    assert_eq!(status["signal"], 9);
    for told in [&flood, &long] {
        assert!((LIMIT / 2..=LIMIT).contains(&told.bytes), "{} bytes are kept", told.bytes);
    }
    let followed = follower.join().unwrap();
    let followed = Said {
        code: followed.status.code().unwrap_or(255),
        stdout: String::from_utf8_lossy(&followed.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&followed.stderr).into_owned(),
    };
    assert_eq!(
        followed.stdout,
        cluster.helix(&["logs", "flood"]).stdout,
        "who follows reads the same: {}",
        followed.stderr
    );

    let resident = |role: &str| {
        let pids = cluster.all(role).into_iter().filter_map(|member| member.pid).filter(|pid| alive(*pid));
        pids.filter_map(peak_resident_kib).max().unwrap_or(0)
    };
    let (agent_kib, coordinator_kib) = (resident("agent"), resident("coordinator"));
    eprintln!("{peaks:?}, agent {agent_kib} KiB, coordinator {coordinator_kib} KiB");
    assert!(peaks.spool_bytes <= 3 * LIMIT, "{peaks:?}");
    assert!(peaks.spool_bytes > LIMIT / 2 && peaks.runner_kib > 0, "nothing was measured: {peaks:?}");
    assert!(peaks.live_bytes <= 3 * LIMIT, "{peaks:?}");
    assert!(peaks.runner_kib < 32 << 10, "{peaks:?}");
    // A debug build of each, with all that it links.
    assert!(agent_kib < 160 << 10, "{agent_kib} KiB");
    assert!(coordinator_kib < 256 << 10, "{coordinator_kib} KiB");
    let agent = cluster.member("agent", "agent-1");
    wait_for("the spools to be removed", Duration::from_secs(60), || {
        (bytes_below(&agent.data_dir.join("attempts"), &|_| true) == 0).then_some(())
    });
}
