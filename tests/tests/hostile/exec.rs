//! Exec builds under an agent that isolates: the attacks, on one cluster, beside a build that has something to lose.

use std::fs;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::chown;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use helix_tests::cluster::{Cluster, PATIENCE, Shape, signal, wait_for};
use helix_tests::skip::skip;
use rustix::process::{Signal, geteuid};

use crate::attacks;
use crate::cases::{BREACH, Case, Places};
use crate::traces::{self, user_of};

/// One test at a time: what one's builds do, another would take for what its own left.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A cluster with one agent that isolates its builds; `None` where this machine cannot.
fn isolating(test: &str, tool: &str) -> Option<Cluster> {
    if !geteuid().is_root() {
        skip(test, "it gives builds other users, which only root can");
        return None;
    }
    let settings = [
        format!("isolation={tool}"),
        "exec.network=none".to_owned(),
        "limits.processes=100".to_owned(),
        "limits.open_files=1024".to_owned(),
    ];
    let shape = Shape { coordinators: 1, agents: 1, capacity: 6, settings: settings.into() };
    match Cluster::start(&shape) {
        Ok(cluster) => Some(cluster),
        Err(error) if format!("{error:#}").contains("cannot be used on this host") => {
            skip(test, format!("{error:#}"));
            None
        }
        Err(error) => panic!("{error:#}"),
    }
}

fn data_dir(cluster: &Cluster) -> PathBuf {
    cluster.member("agent", "agent-1").data_dir
}

/// The workdir of a build that runs.
fn workdir(cluster: &Cluster, id: &str) -> PathBuf {
    wait_for("the build's workdir", PATIENCE, || {
        let roots = fs::read_dir(data_dir(cluster).join("work")).ok()?.flatten();
        roots.map(|root| root.path().join(format!("{id}.0.1/work"))).find(|work| work.join("started").exists())
    })
}

/// A build with a secret, which runs until it is told to end.
pub(crate) fn start_victim(cluster: &Cluster) -> PathBuf {
    let line =
        "echo s3cret > secret; touch started; until [ -e go ]; do sleep 0.05; done; [ ! -e planted ] && cat secret";
    submit(cluster, "victim", &["--no-output", "--env", "VICTIM=secret"], line);
    workdir(cluster, "victim")
}

fn submit(cluster: &Cluster, id: &str, flags: &[&str], line: &str) {
    let mut arguments = vec!["submit", "-o", "quiet", "--id", id];
    arguments.extend(flags);
    arguments.extend(["--", line]);
    let said = cluster.helix(&arguments);
    assert_eq!(said.code, 0, "{id}: {}", said.stderr);
}

pub(crate) fn places(cluster: &Cluster, victim: &std::path::Path) -> Places {
    let grpc = cluster.all("coordinator")[0].grpc.clone().unwrap();
    Places {
        key: cluster.root().join("pki/agent-agent-1-key.pem").display().to_string(),
        data_dir: data_dir(cluster).display().to_string(),
        victim: victim.display().to_string(),
        grpc_port: grpc.rsplit(':').next().unwrap().to_owned(),
    }
}

/// What is wrong with how a case ended.
pub(crate) fn complaint(cluster: &Cluster, case: &Case) -> Option<String> {
    let status = cluster.json(&["status", case.name]);
    let log = cluster.helix(&["logs", case.name]);
    let log = log.stdout + &log.stderr;
    let state = status["state"].as_str().unwrap_or_default();
    let ended = if state == "succeeded" { state } else { status["reason"].as_str().unwrap_or(state) };
    let tail: String = log.chars().rev().take(600).collect::<Vec<_>>().into_iter().rev().collect();
    if log.contains(BREACH) {
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(BREACH)).collect();
        return Some(format!("{}: {lines:?}", case.name));
    }
    if ended != case.ends {
        return Some(format!("{}: ended as {ended:?}, not {:?}: {tail}", case.name, case.ends));
    }
    if let Some(wordless) = wordless(cluster, case, &status, ended) {
        return Some(wordless);
    }
    (!log.contains(case.says)).then(|| format!("{}: its log does not say {:?}: {tail}", case.name, case.says))
}

/// Where a failure is not told in words: by status and by explain, beside its reason.
fn wordless(cluster: &Cluster, case: &Case, status: &serde_json::Value, ended: &str) -> Option<String> {
    if ended == "succeeded" {
        return None;
    }
    let words = status["message"].as_str().unwrap_or_default();
    if words.split_whitespace().count() < 2 {
        return Some(format!("{}: {words:?} does not tell why it ended as {ended}", case.name));
    }
    ["status", "explain"].into_iter().find_map(|verb| {
        let said = cluster.helix(&[verb, case.name]).stdout;
        let tells = said.contains(words) && said.contains(ended);
        (!tells).then(|| format!("{}: {verb} does not tell {ended:?} and {words:?}: {said}", case.name))
    })
}

/// Listens under a name that only the host's network knows; another test may do so already.
fn listen_abstractly() -> Option<UnixListener> {
    UnixListener::bind_addr(&SocketAddr::from_abstract_name("helix-hostile-test").ok()?).ok()
}

fn run_suite(test: &str, tool: &str, cases: &[Case]) {
    let Some(cluster) = isolating(test, tool) else { return };
    // A name that only the host's network knows.
    let _listener = listen_abstractly();
    let host_name = rustix::system::uname().nodename().to_owned();
    let victim = start_victim(&cluster);
    let places = places(&cluster, &victim);
    assert!(PathBuf::from(&places.key).exists() && victim.join("secret").exists(), "there is something to lose");
    for case in cases {
        let mut flags = case.flags.to_vec();
        if !flags.contains(&"--output") {
            flags.push("--no-output");
        }
        submit(&cluster, case.name, &flags, &places.fill(&case.script));
    }
    for case in cases {
        cluster.helix(&["wait", case.name]);
    }
    let complaints: Vec<String> = cases.iter().filter_map(|case| complaint(&cluster, case)).collect();
    assert!(complaints.is_empty(), "{} of {}:\n{}", complaints.len(), cases.len(), complaints.join("\n"));
    assert_eq!(rustix::system::uname().nodename(), host_name.as_c_str());
    fs::write(victim.join("go"), "").unwrap();
    assert_eq!(cluster.helix(&["wait", "victim"]).code, 0, "{}", cluster.helix(&["logs", "victim"]).stdout);
    let mut builds: Vec<String> = cases.iter().map(|case| case.name.to_owned()).collect();
    builds.push("victim".to_owned());
    let data_dir = data_dir(&cluster);
    let mut left = Vec::new();
    wait_for("a clean host", PATIENCE, || {
        left = traces::left(&data_dir, &builds);
        left.is_empty().then_some(())
    });
}

#[test]
fn hostile_builds_in_namespaces_end_as_they_must_and_leave_nothing() {
    let _alone = alone();
    let cases = attacks::all();
    assert!(cases.len() >= 50, "{}", cases.len());
    run_suite("hostile builds in namespaces", "namespaces", &cases);
}

#[test]
fn hostile_builds_under_bubblewrap_end_as_they_must_and_leave_nothing() {
    let _alone = alone();
    // Its init belongs to the build's own user, which may look into it: a weakness of that tool, and within the build's walls.
    let looks_into_init = |case: &Case| matches!(case.name, "trace-the-init" | "others-descriptors" | "root-of-init");
    // It tells a death by signal as shells do, and ends daemons with the command itself.
    let cases = attacks::all().into_iter().filter(|case| !looks_into_init(case)).map(|case| match case.name {
        "kills-everything" => Case { ends: "exit", ..case },
        "daemon" => Case { says: "", ..case },
        _ => case,
    });
    run_suite("hostile builds under bubblewrap", "bubblewrap", &cases.collect::<Vec<_>>());
}

/// The attacks that only look, on a host as it is: an agent that is root and isolates nothing gives all of it away. So what
/// they find under an isolation is found out, and not missed.
#[test]
fn without_isolation_the_attacks_that_look_get_through() {
    let _alone = alone();
    if !geteuid().is_root() {
        return skip("attacks without isolation", "only root may see everything");
    }
    let shape = Shape { coordinators: 1, agents: 1, capacity: 6, settings: vec!["isolation=none".to_owned()] };
    let cluster = Cluster::start(&shape).unwrap();
    let victim = start_victim(&cluster);
    let places = places(&cluster, &victim);
    let looking =
        ["agents-key", "others-workdir", "others-environment", "home-and-run", "devices-of-the-host", "coordinator"];
    let cases: Vec<Case> = attacks::all().into_iter().filter(|case| looking.contains(&case.name)).collect();
    assert_eq!(cases.len(), looking.len());
    for case in &cases {
        submit(&cluster, case.name, &["--no-output"], &places.fill(&case.script));
        cluster.helix(&["wait", case.name]);
        let complaint = complaint(&cluster, case);
        assert!(complaint.is_some_and(|complaint| complaint.contains(BREACH)), "{} was not noticed", case.name);
    }
    fs::write(victim.join("go"), "").unwrap();
}

#[test]
fn memory_and_disk_beyond_what_was_asked_end_a_build_for_that_reason() {
    let _alone = alone();
    let test = "memory and disk beyond what was asked";
    let Some(cluster) = isolating(test, "namespaces") else { return };
    let limits = cluster.json(&["workers", "show", "agent-1"]).to_string();
    submit(
        &cluster,
        "disk-hog",
        &["--no-output", "--disk", "20MiB"],
        "head -c 200000000 /dev/zero > fill; exec sleep 1000",
    );
    let mut expected = vec![("disk-hog", "disk_full")];
    if limits.contains("memory cgroup") {
        submit(&cluster, "memory-hog", &["--no-output", "--memory", "64MiB"], "perl -e '$x = \"x\" x 1000000000'");
        expected.push(("memory-hog", "oom"));
    } else {
        skip(test, "this host limits no memory");
    }
    for (id, reason) in &expected {
        cluster.helix(&["wait", id]);
        let status = cluster.json(&["status", id]);
        let log = cluster.helix(&["logs", id]).stdout;
        assert_eq!(status["reason"], *reason, "{log}");
        // What a build asked for itself is the same elsewhere.
        assert_eq!(status["tasks"][0]["attempts"].as_array().unwrap().len(), 1, "{log}");
    }
    let log = cluster.helix(&["logs", "disk-hog"]).stdout;
    assert!(log.contains("all of the disk that it may fill"), "{log}");
    if limits.contains("disk watched") {
        skip(test, "no wall can be put around a workdir here");
    } else {
        assert!(log.contains("No space left on device") || log.contains("quota exceeded"), "{limits}: {log}");
    }
    let builds: Vec<String> = expected.iter().map(|(id, _)| (*id).to_owned()).collect();
    let data_dir = data_dir(&cluster);
    wait_for("a clean host", PATIENCE, || traces::left(&data_dir, &builds).is_empty().then_some(()));
}

#[test]
fn what_would_trick_the_environment_is_refused_at_submit() {
    let _alone = alone();
    let Some(cluster) = isolating("tricks with the environment", "namespaces") else { return };
    for flags in [
        ["--env", "LD_PRELOAD=/tmp/x.so"],
        ["--env", "HELIX_WORKDIR=/etc"],
        ["--build-arg", "LD_LIBRARY_PATH=/tmp"],
        ["--output", "../out"],
        ["--output", "/etc/passwd"],
        ["--output", "a/../../b"],
        ["--repo", "ext::sh -c id"],
        ["--repo", "--upload-pack=id"],
    ] {
        let said = cluster.helix(&["submit", flags[0], flags[1], "--", "true"]);
        assert_ne!(said.code, 0, "{flags:?}: {}", said.stdout);
    }
}

#[test]
fn the_look_for_traces_notices_each_kind() {
    let _alone = alone();
    let Some(cluster) = isolating("the look for traces", "namespaces") else { return };
    let data_dir = data_dir(&cluster);
    let builds = ["planted".to_owned()];
    let look = || traces::left(&data_dir, &builds);
    wait_for("a clean host", PATIENCE, || look().is_empty().then_some(()));

    let mut process = Command::new("sleep").arg("1000").uid(user_of("planted.0.1")).spawn().unwrap();
    assert!(look().iter().any(|line| line.starts_with("process")), "{:?}", look());
    signal(i32::try_from(process.id()).unwrap(), Signal::KILL);
    process.wait().unwrap();

    let root = fs::read_dir(data_dir.join("work")).unwrap().flatten().next().unwrap().path();
    fs::create_dir(root.join("planted.0.1")).unwrap();
    assert!(look().iter().any(|line| line.starts_with("workdir")), "{:?}", look());
    let mut process = Command::new("sleep").arg("1000").current_dir(root.join("planted.0.1")).spawn().unwrap();
    assert!(look().iter().any(|line| line.contains("in a workdir")), "{:?}", look());
    signal(i32::try_from(process.id()).unwrap(), Signal::KILL);
    process.wait().unwrap();

    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "planted"]).arg(root.join("planted.0.1")).status().unwrap();
    assert!(mounted.success());
    let noticed = look();
    assert!(Command::new("umount").arg(root.join("planted.0.1")).status().unwrap().success());
    assert!(noticed.iter().any(|line| line.starts_with("mount")), "{noticed:?}");
    fs::remove_dir(root.join("planted.0.1")).unwrap();

    fs::write(root.join("planted"), vec![0; 1 << 20]).unwrap();
    let attached = Command::new("losetup").args(["--find", "--show"]).arg(root.join("planted")).output().unwrap();
    let device = String::from_utf8(attached.stdout).unwrap();
    if attached.status.success() {
        let noticed = look();
        assert!(Command::new("losetup").args(["--detach", device.trim()]).status().unwrap().success());
        assert!(noticed.iter().any(|line| line.starts_with("loop device")), "{noticed:?}");
    } else {
        skip("the look for loop devices", "there are none here");
    }
    fs::remove_file(root.join("planted")).unwrap();
    wait_for("the loop device to be gone", PATIENCE, || look().is_empty().then_some(()));

    let file = PathBuf::from(format!("/dev/shm/helix-planted-{}", std::process::id()));
    fs::write(&file, "").unwrap();
    chown(&file, Some(user_of("planted.0.1")), None).unwrap();
    let noticed = look();
    fs::remove_file(&file).unwrap();
    assert!(noticed.iter().any(|line| line.starts_with("file")), "{noticed:?}");

    if let Some(base) = fs::read_dir("/sys/fs/cgroup").ok().and_then(|mut trees| {
        trees.find_map(|tree| {
            let group = tree.ok()?.path().join("helix-test-planted.0.1");
            fs::create_dir(&group).ok()?;
            group.join("cgroup.procs").exists().then_some(group)
        })
    }) {
        let noticed = look();
        fs::remove_dir(&base).unwrap();
        assert!(noticed.iter().any(|line| line.starts_with("control group")), "{noticed:?}");
    }
    assert!(look().is_empty(), "{:?}", look());
}

#[test]
fn an_isolated_build_outlives_its_agent_and_its_runners_death_is_proof() {
    let _alone = alone();
    let Some(cluster) = isolating("an isolated build and its agent's death", "namespaces") else { return };
    assert_eq!(cluster.json(&["workers", "show", "agent-1"])["isolation"], "namespaces");
    let line = "touch started; i=0; until [ -e go ]; do i=$((i+1)); echo line $i; sleep 0.02; done; echo end $i";
    submit(&cluster, "outlives", &["--no-output", "--disk", "32MiB"], line);
    let work = workdir(&cluster, "outlives");
    let agent = cluster.member("agent", "agent-1");
    cluster.kill(&agent);
    cluster.start_again(&agent);
    fs::write(work.join("go"), "").unwrap();
    assert_eq!(cluster.helix(&["wait", "outlives"]).code, 0);
    let log = cluster.helix(&["logs", "outlives"]).stdout;
    let numbers: Vec<usize> = log.lines().filter_map(|line| line.strip_prefix("line ")?.parse().ok()).collect();
    assert_eq!(numbers, (1..=numbers.len()).collect::<Vec<_>>());

    submit(
        &cluster,
        "orphaned",
        &["--no-output", "--disk", "32MiB"],
        "touch started; setsid sleep 1000 & exec sleep 1000",
    );
    workdir(&cluster, "orphaned");
    let runner = wait_for("the runner", PATIENCE, || {
        let line = traces::left(&data_dir(&cluster), &[]).into_iter().find(|line| line.starts_with("runner"))?;
        line.split(' ').nth(1)?.parse().ok()
    });
    signal(runner, Signal::KILL);
    let first = wait_for("the first attempt's end", PATIENCE, || {
        let status = cluster.json(&["status", "orphaned"]);
        let attempt = status["tasks"][0]["attempts"][0].clone();
        attempt["reason"].is_string().then_some(attempt)
    });
    assert_eq!(first["reason"], "internal", "{first}");
    // A failure's log may come after the failure.
    wait_for("the proof in its log", PATIENCE, || {
        let log = cluster.helix(&["logs", "orphaned", "--attempt", "1"]);
        (log.stdout + &log.stderr).contains("all processes are dead").then_some(())
    });
    // Tried again, as what its host did to it; that one is not waited for.
    cluster.helix(&["cancel", "orphaned"]);
    wait_for("a clean host", PATIENCE, || traces::left(&data_dir(&cluster), &[]).is_empty().then_some(()));
}
