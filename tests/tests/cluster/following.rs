//! Who follows a build goes on when the coordinator it is attached to is killed: every line once, in order, and the build's end.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use helix_tests::cluster::{Cluster, Member, PATIENCE, Shape, wait_for};

/// The build that is followed.
const ID: &str = "followed";
/// What it exits with.
const CODE: i32 = 7;
/// Lines that it may say before the kill, and in all.
const LINES: [usize; 2] = [400, 600];
/// Of the first, how many everybody has seen at the kill: the others are on their way.
const SEEN: usize = 50;
/// Clients that ask any coordinator, of one kind, before one is attached to the right one: each is with one chance in three.
const TRIES: usize = 60;

/// A build that says as many lines as the gate lets through, and waits to be let on or to end.
struct Gated {
    gate: PathBuf,
    finish: PathBuf,
}

impl Gated {
    fn new(root: &Path) -> Self {
        let gated = Self { gate: root.join("gate"), finish: root.join("finish") };
        gated.let_through(0);
        gated
    }

    fn line(&self) -> String {
        format!(
            "i=0; while [ ! -e {} ]; do read upto < {}; \
             while [ $i -lt $upto ]; do i=$((i+1)); echo line $i; sleep 0.01; done; sleep 0.05; done; exit {CODE}",
            self.finish.display(),
            self.gate.display(),
        )
    }

    fn let_through(&self, upto: usize) {
        let next = self.gate.with_extension("next");
        fs::write(&next, format!("{upto}\n")).unwrap();
        fs::rename(next, &self.gate).unwrap();
    }
}

/// A client that shows the log, or waits for the end.
struct Client {
    child: Child,
    name: String,
    /// Exit code that the build's end means for it.
    code: i32,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Client {
    fn start(cluster: &Cluster, name: String, mut command: Command, code: i32) -> Self {
        let [stdout, stderr] = ["out", "err"].map(|end| cluster.root().join(format!("client-{name}.{end}")));
        command.stdout(File::create(&stdout).unwrap()).stderr(File::create(&stderr).unwrap());
        Self { child: command.spawn().unwrap(), name, code, stdout, stderr }
    }

    fn shown(&self) -> String {
        fs::read_to_string(&self.stdout).unwrap()
    }

    fn lines(&self) -> usize {
        self.shown().lines().count()
    }

    /// Waits until so many lines were shown; a client that ended instead has failed.
    fn wait_lines(&mut self, count: usize) {
        wait_for(&format!("{count} lines of {}", self.name), PATIENCE, || {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "{} ended: {ended:?} {:?}", self.name, fs::read_to_string(&self.stderr));
            (self.lines() >= count).then_some(())
        });
    }

    fn is_attached_to(&self, coordinator: &Member) -> bool {
        let port = coordinator.grpc.as_deref().and_then(|endpoint| endpoint.rsplit(':').next()?.parse().ok());
        is_connected(self.child.id(), port.unwrap())
    }
}

/// Whether a process has a connection to a port, of IPv4.
fn is_connected(pid: u32, port: u16) -> bool {
    let sockets = fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    let (to, established) = (format!(":{port:04X}"), "01");
    let inodes = sockets.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_it = fields.get(2)?.ends_with(&to) && *fields.get(3)? == established;
        is_it.then(|| format!("socket:[{}]", fields[9]))
    });
    let inodes: Vec<String> = inodes.collect();
    let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    open.filter_map(|entry| fs::read_link(entry.path()).ok())
        .any(|target| inodes.iter().any(|it| target == Path::new(it)))
}

/// Starts clients that may ask any coordinator until one of them is attached to this one. Returns all.
fn until_attached(cluster: &Cluster, kind: &str, to: &Member, arguments: &[&str], code: i32) -> Vec<Client> {
    let mut clients = Vec::new();
    for number in 0..TRIES {
        let client = Client::start(cluster, format!("{kind}-{number}"), cluster.command(arguments), code);
        let (id, attached) = wait_for("a client to be attached", PATIENCE, || {
            let attached: Vec<Member> =
                cluster.all("coordinator").into_iter().filter(|it| client.is_attached_to(it)).collect();
            // Between two calls there may be none, or for a moment two to the same.
            attached.first().map(|it| (it.id.clone(), attached.len()))
        });
        clients.push(client);
        if id == to.id && attached == 1 {
            return clients;
        }
    }
    panic!("no client of {TRIES} came to coordinator {}", to.id);
}

/// What is old of the attempt that runs says nothing of the next one.
#[test]
fn a_tail_is_of_what_is_there_and_later_attempts_are_shown_whole() {
    let cluster = Cluster::start(&Shape { coordinators: 1, agents: 1, ..Shape::default() }).unwrap();
    let gate = cluster.root().join("gate");
    let old = format!("until test -e {}; do echo old; sleep 0.05; done; exit 1", gate.display());
    let line = format!("if test $HELIX_ATTEMPT = 1; then {old}; fi; echo new 1; echo new 2");
    let submit = ["submit", "--id", ID, "--no-output", "--retries", "1", "--", &line];
    assert_eq!(cluster.helix(&submit).code, 0);
    let arguments = ["logs", "-f", "--tail", "0", ID];
    let mut tail = Client::start(&cluster, "tail".to_owned(), cluster.command(&arguments), 0);
    tail.wait_lines(1);
    fs::write(&gate, "").unwrap();
    wait_for("the client to end", PATIENCE, || tail.child.try_wait().unwrap());
    let shown = tail.shown();
    assert!(shown.contains("new 1\nnew 2\n"), "{shown}");
}

/// The log as it must be shown.
fn whole(count: usize) -> Vec<String> {
    (1..=count).map(|number| format!("line {number}")).collect()
}

/// The coordinator that takes the build's lines from its agent.
fn taker(cluster: &Cluster) -> Member {
    let takes = |member: &Member| {
        let entries = fs::read_dir(member.data_dir.join("logs")).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(ID)).any(|entry| entry.path().is_file())
    };
    wait_for("somebody to take the log", PATIENCE, || cluster.all("coordinator").into_iter().find(takes))
}

/// Kills a coordinator while a build says lines and clients of all kinds follow it there, elsewhere, and there alone.
fn followers_outlive(victim: impl Fn(&Cluster) -> Member) {
    let cluster = Cluster::start(&Shape::default()).unwrap();
    let gated = Gated::new(cluster.root());
    let line = gated.line();
    let submit = ["submit", "--id", ID, "--no-output"];
    let said = cluster.helix(&[&submit[..], &["--", &line]].concat());
    assert_eq!(said.code, 0, "{}", said.stderr);
    gated.let_through(1);
    let victim = victim(&cluster);

    // Under the same id it is the same build.
    let follow = [&submit[..], &["--follow", "--", &line]].concat();
    let mut elsewhere = until_attached(&cluster, "submit", &victim, &follow, CODE);
    elsewhere.extend(until_attached(&cluster, "logs", &victim, &["logs", "-f", ID], 0));
    let waiting = until_attached(&cluster, "wait", &victim, &["wait", ID], CODE);
    let mut there_alone = Vec::new();
    for member in cluster.all("coordinator") {
        // Who knows this one alone has to wait until it is back, however slow this machine is.
        let arguments = ["logs", "-f", ID, "--connect-timeout", "10m"];
        let command = cluster.command_with(&cluster.context_of(&member), &arguments);
        let client = Client::start(&cluster, format!("only-{}", member.id), command, 0);
        if member.id == victim.id { there_alone.push(client) } else { elsewhere.push(client) }
    }

    gated.let_through(LINES[0]);
    elsewhere.iter_mut().chain(&mut there_alone).for_each(|client| client.wait_lines(SEEN));
    for kind in ["submit", "logs", "wait"] {
        let of_kind = || elsewhere.iter().chain(&waiting).filter(|client| client.name.starts_with(kind));
        wait_for(&format!("{kind} to be attached"), PATIENCE, || {
            of_kind().any(|it| it.is_attached_to(&victim)).then_some(())
        });
    }
    cluster.kill(&victim);
    gated.let_through(LINES[1]);
    elsewhere.iter_mut().for_each(|client| client.wait_lines(LINES[1]));
    cluster.start_again(&victim);
    there_alone.iter_mut().for_each(|client| client.wait_lines(LINES[1]));

    fs::write(&gated.finish, "").unwrap();
    for client in elsewhere.into_iter().chain(there_alone) {
        let (name, shown) = ended(client);
        let (own, ours): (Vec<&str>, Vec<&str>) = shown.lines().partition(|line| !line.starts_with("helix: "));
        assert_eq!(own, whole(LINES[1]), "{name}");
        assert!(ours.len() == 1 && ours[0].contains("exit"), "{name} was told more than the end: {ours:?}");
    }
    for client in waiting {
        let (name, shown) = ended(client);
        assert!(shown.is_empty(), "{name}: {shown}");
    }
    let status = cluster.json(&["status", ID]);
    assert_eq!(
        (status["attempt"].as_u64(), status["exit_code"].as_i64()),
        (Some(1), Some(i64::from(CODE))),
        "{status}"
    );
}

/// Waits for a client's end, which must be the build's, told in no other words than on a good day; gives what it showed.
fn ended(mut client: Client) -> (String, String) {
    let status = wait_for(&format!("{} to end", client.name), PATIENCE, || client.child.try_wait().unwrap());
    let errors = fs::read_to_string(&client.stderr).unwrap();
    assert_eq!(status.code(), Some(client.code), "{}: {errors}", client.name);
    let verdict = format!("build {ID} failed: exit {CODE}: the command ended with exit code {CODE}");
    let quiet = [format!("build {ID}"), verdict];
    for line in errors.lines() {
        assert!(quiet.iter().any(|known| known == line), "{} said: {errors}", client.name);
    }
    (client.name.clone(), client.shown())
}

#[test]
fn followers_outlive_the_leader_that_they_are_attached_to() {
    followers_outlive(Cluster::leader);
}

#[test]
fn followers_outlive_the_coordinator_that_takes_the_log() {
    followers_outlive(taker);
}

#[test]
fn followers_outlive_a_coordinator_that_only_passes_the_log_on() {
    followers_outlive(|cluster| {
        let (leader, taker) = (cluster.leader().id, taker(cluster).id);
        cluster.all("coordinator").into_iter().find(|member| member.id != leader && member.id != taker).unwrap()
    });
}

/// Takes connections and drops them at once, as long as something is done that is told how many there were; gives what was done.
fn while_hanging_up<R>(listener: &TcpListener, work: impl FnOnce(&AtomicUsize) -> R) -> R {
    let (stop, taken) = (AtomicBool::new(false), AtomicUsize::new(0));
    listener.set_nonblocking(true).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok(_) => drop(taken.fetch_add(1, Ordering::Relaxed)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(2)),
                    Err(error) => panic!("{error}"),
                }
            }
        });
        // A test that fails in here must not wait for a listener that goes on for ever.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&taken)));
        stop.store(true, Ordering::Relaxed);
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[test]
fn a_command_tries_a_dead_coordinator_once_and_not_with_each_of_its_calls() {
    let cluster = Cluster::start(&Shape { coordinators: 1, agents: 1, ..Shape::default() }).unwrap();
    assert_eq!(cluster.helix(&["submit", "--id", "said", "--no-output", "--wait", "--", "echo said"]).code, 0);
    let dead = TcpListener::bind("127.0.0.1:0").unwrap();
    let alive = cluster.member("coordinator", "1");
    let both =
        format!("endpoints = [\"https://{}\", {:?}]", dead.local_addr().unwrap(), alive.grpc.as_deref().unwrap());
    let text = fs::read_to_string(cluster.context()).unwrap();
    let lines: Vec<&str> =
        text.lines().map(|line| if line.starts_with("endpoints") { both.as_str() } else { line }).collect();
    let context = cluster.root().join("context-both.toml");
    fs::write(&context, lines.join("\n")).unwrap();
    while_hanging_up(&dead, |taken| {
        // Which of the two is tried first is chance.
        for _ in 0..TRIES {
            let said = cluster.helix_with(&context, &["logs", "said"]);
            assert!(said.code == 0 && said.stdout == "said\n", "{said:?}");
            match taken.load(Ordering::Relaxed) {
                0 => {}
                1 => return,
                more => panic!("it was tried {more} times by one command"),
            }
        }
        panic!("it was never tried: this shows nothing");
    });
}
