//! Disks that fill up, small and real: before a build, during one, and after; and that all is well again when there is room.

use std::path::{Path, PathBuf};

use helix_model::{BuildSpec, Outputs};
use helix_proto::agent::{Finished, agent_message};

use super::cluster::{Cluster, Seen, line};
use super::host::{Host, eventually};

/// A small file system of its own, with nothing else on it than one agent's data.
struct Disk {
    path: PathBuf,
}

impl Disk {
    /// `None` where nothing may be mounted: the test can show nothing, says so, and fails where skips are forbidden.
    fn mount(path: PathBuf, options: &str, test: &str) -> Option<Self> {
        std::fs::create_dir(&path).unwrap();
        let options = std::ffi::CString::new(options).unwrap();
        match rustix::mount::mount("tmpfs", &path, "tmpfs", rustix::mount::MountFlags::empty(), options.as_c_str()) {
            Ok(()) => Some(Self { path }),
            Err(error) => {
                super::skip::skip(test, format!("cannot mount: {error}"));
                None
            }
        }
    }

    /// Fills it but for so many bytes.
    fn fill(&self, left: u64) {
        let stat = rustix::fs::statvfs(&self.path).unwrap();
        let bytes = (stat.f_bavail * stat.f_frsize).checked_sub(left).unwrap();
        let file = std::fs::File::create(self.path.join("ballast")).unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes).unwrap();
    }

    fn empty(&self) {
        std::fs::remove_file(self.path.join("ballast")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.path, rustix::mount::UnmountFlags::DETACH);
    }
}

struct World {
    cluster: Cluster,
    // Ends before its disk goes.
    host: Host,
    disk: Disk,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new(test: &str, options: &str, more: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::mount(dir.path().join("data"), options, test)?;
        let cluster = Cluster::start(dir.path()).await;
        let host = Host::with(dir.path(), &cluster, more);
        cluster.wait_for("a hello", |seen| (!seen.hellos.is_empty()).then_some(())).await;
        Some(Self { cluster, host, disk, _dir: dir })
    }

    /// Waits until the agent says that this is short.
    async fn pressure(&self, expected: &str) {
        let newest = |seen: &Seen| {
            let beat = seen.messages.iter().rev().find_map(|message| match message {
                agent_message::Message::Heartbeat(beat) => Some(beat.pressure.clone()),
                _ => None,
            });
            (beat.as_deref() == Some(expected)).then_some(())
        };
        self.cluster.wait_for(&format!("pressure {expected:?}"), newest).await;
    }

    async fn run(&self, build: &str, spec: &BuildSpec) -> Finished {
        let id = self.cluster.assign(build, spec).await;
        self.cluster.finished(&id).await
    }

    /// Tells the agent that nothing more of an attempt is wanted, and waits until nothing of it is left.
    async fn forget(&self, finished: &Finished) {
        let forget = helix_proto::agent::Forget { id: finished.id.clone() };
        self.cluster.say(helix_proto::agent::coordinator_message::Message::Forget(forget)).await;
        let build = &finished.id.as_ref().unwrap().build_id;
        let gone = || !self.host.names_in("attempts").iter().any(|name| name.starts_with(build.as_str()));
        eventually("the attempt's directory is removed", gone).await;
    }

    fn kept(&self) -> Vec<PathBuf> {
        let roots = std::fs::read_dir(self.disk.path.join("work")).unwrap();
        let kept = roots.flat_map(|root| std::fs::read_dir(root.unwrap().path().join(".kept")).into_iter().flatten());
        kept.map(|entry| entry.unwrap().path()).collect()
    }
}

const SMALL_RESERVE: &str = "[disk]\nreserve_bytes = 8000000\nreserve_inodes = 100\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_room_says_so_runs_nothing_and_recovers_by_itself() {
    let Some(world) = World::new("without_room", "size=64m,nr_inodes=2000", SMALL_RESERVE).await else { return };
    assert_eq!(world.run("before", &line("true")).await.outcome, "succeeded");
    world.disk.fill(4 << 20);
    world.pressure("disk").await;
    let finished = world.run("without", &line("true")).await;
    assert_eq!((finished.outcome.as_str(), finished.reason.as_str()), ("failed", "disk_full"), "{finished:?}");
    assert!(finished.message.contains("short of disk"), "{finished:?}");
    // Its log says so, and is sealed: the registry waits for one of every end.
    let log = world.cluster.sealed_log(finished.id.as_ref().unwrap()).await;
    assert!(matches!(log.as_slice(), [line] if line.contains("short of disk")), "{log:?}");
    world.forget(&finished).await;
    assert!(world.host.workdirs().is_empty());
    // Not one byte left: the agent lives, and goes on saying so.
    world.disk.empty();
    world.disk.fill(0);
    world.cluster.seen().messages.clear();
    world.pressure("disk").await;
    let finished = world.run("full", &line("true")).await;
    assert_eq!(finished.reason, "disk_full");
    world.cluster.sealed_log(finished.id.as_ref().unwrap()).await;
    world.forget(&finished).await;
    world.disk.empty();
    world.pressure("").await;
    assert_eq!(world.run("after", &line("true")).await.outcome, "succeeded");
    assert_eq!(world.cluster.seen().hellos.len(), 1, "it was started anew");
    // The same with inodes.
    for number in 0..2000 {
        if std::fs::write(world.disk.path.join(format!("file{number}")), "").is_err() {
            break;
        }
    }
    world.pressure("inodes").await;
    assert_eq!(world.run("inodes", &line("true")).await.reason, "disk_full");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_fills_the_disk_is_told_from_one_that_fails_and_its_neighbours_go_on() {
    // Without a reserve there is nothing between the build and the end of the disk.
    let none = "[disk]\nreserve_bytes = 0\nreserve_inodes = 0\n";
    let Some(world) = World::new("fills_the_disk", "size=64m", none).await else { return };
    let gate = world._dir.path().join("gate");
    let neighbour =
        format!("i=0; while ! test -e {}; do echo line $i; i=$((i+1)); sleep 0.02; done; echo last", gate.display());
    let neighbour = world.cluster.assign("neighbour", &line(&neighbour)).await;
    world.cluster.wait_for("its first line", |seen| (!seen.lines.is_empty()).then_some(())).await;
    for (build, script) in [
        ("gives-up", "cat /dev/zero > f"),
        ("does-not", "while :; do cat /dev/zero >> f; done 2> /dev/null"),
        ("talks", "yes 'a line that fills the spool of the log with what it says again and again' | cat"),
    ] {
        let finished = world.run(build, &line(script)).await;
        assert_eq!((finished.outcome.as_str(), finished.reason.as_str()), ("failed", "disk_full"), "{finished:?}");
        assert!(!world.host.workdirs().iter().any(|name| name.starts_with(build)));
        world.forget(&finished).await;
    }
    std::fs::write(&gate, "").unwrap();
    let finished = world.cluster.finished(&neighbour).await;
    assert_eq!(finished.outcome, "succeeded", "{finished:?}");
    let log = world.cluster.sealed_log(&neighbour).await;
    for (number, said) in log.iter().take(log.len() - 1).enumerate() {
        assert_eq!(said, &format!("line {number}"));
    }
    assert_eq!(log.last().unwrap(), "last");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_workdir_is_kept_for_its_time_and_given_up_first() {
    let Some(world) = World::new("kept", "size=64m", &format!("{SMALL_RESERVE}kept_max = 2\n")).await else { return };
    let repository = world._dir.path().join("repository");
    let git = |args: &[&str]| {
        let mut git = std::process::Command::new("git");
        git.args(["-c", "user.name=t", "-c", "user.email=t@t"]).args(args).env("GIT_CONFIG_GLOBAL", "/dev/null");
        assert!(git.output().unwrap().status.success());
    };
    git(&["init", "-q", "-b", "main", &repository.display().to_string()]);
    git(&["-C", &repository.display().to_string(), "commit", "-q", "--allow-empty", "-m", "one"]);
    let head = std::fs::read_to_string(repository.join(".git/refs/heads/main")).unwrap();
    let keep = BuildSpec { keep_workdir_ms: 3_600_000, ..line("head -c 4000000 /dev/zero > big; exit 3") };
    for build in ["first", "second", "third"] {
        let id = world.cluster.assign(build, &keep).await;
        assert_eq!(world.cluster.finished(&id).await.exit_code, Some(3));
        let log = world.cluster.sealed_log(&id).await;
        let said = log.iter().find_map(|line| line.strip_prefix("the workdir is kept on w1 in ")).unwrap();
        assert!(Path::new(said).join("work/big").exists(), "{said}");
    }
    let names = |kept: &[PathBuf]| -> Vec<String> {
        let mut names: Vec<String> =
            kept.iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    };
    let kept = names(&world.kept());
    assert!(kept.len() == 2 && kept[0].starts_with("second") && kept[1].starts_with("third"), "{kept:?}");
    // A success keeps nothing.
    let keeps = BuildSpec { keep_workdir_ms: 3_600_000, outputs: Outputs::None, ..line("true") };
    assert_eq!(world.run("well", &keeps).await.outcome, "succeeded");
    assert_eq!(names(&world.kept()), kept);
    // One mirror, and too little room for it and the kept ones.
    let with_source = BuildSpec { repo_url: format!("file://{}", repository.display()), ..line("true") };
    let id = world.cluster.assign("mirror", &with_source).await;
    let resolved = |seen: &Seen| {
        seen.messages.iter().any(|message| matches!(message, agent_message::Message::SourceResolved(_))).then_some(())
    };
    world.cluster.wait_for("the commit", resolved).await;
    let commit = helix_proto::agent::Commit { id: Some(id.clone()), commit: head.trim().to_owned() };
    world.cluster.say(helix_proto::agent::coordinator_message::Message::Commit(commit)).await;
    assert_eq!(world.cluster.finished(&id).await.outcome, "succeeded");
    let mirrors = || world.host.names_in("mirrors").iter().filter(|name| name.ends_with(".git")).count();
    assert_eq!(mirrors(), 1);
    // Less than is kept: with what is kept gone, there is enough, and the mirror stays.
    world.disk.fill(10_000_000);
    eventually("the kept ones are given up", || world.kept().is_empty()).await;
    assert_eq!(mirrors(), 1);
    world.disk.empty();
    world.disk.fill(9_000_000);
    eventually("the mirror is given up", || mirrors() == 0).await;
}
