//! An attempt for a test: its directory, its order, its runner, and ways to look at all of them.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::skip::skip;
use helix_runner::control::{self, Event, Frames, Request, Status};
use helix_runner::isolation::{Entry, Isolation, Network, Tool};
use helix_runner::processes::Process;
use helix_runner::{AttemptDir, Growth, Order, Outcome, Privileges, Record, SpoolReader, Stream, User, cgroup};
use rustix::process::{Pid, Signal, kill_process};

/// Longer than anything takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// Asks until there is an answer.
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whom root's isolated attempts run as.
pub const OUTSIDE: User = User { uid: 1_879_048_200, gid: 1_879_048_201 };

/// Whether attempts get a cgroup.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum With {
    Cgroup,
    TreeOnly,
}

/// Both ways to keep hold of a build, where this machine has both.
pub fn ways() -> Vec<With> {
    if cgroup::base().is_some() {
        vec![With::TreeOnly, With::Cgroup]
    } else {
        skip("a part", "no writable cgroup v2 here");
        vec![With::TreeOnly]
    }
}

pub struct Attempt {
    _temporary: tempfile::TempDir,
    pub dir: AttemptDir,
    pub workdir: PathBuf,
    pub order: Order,
    runner: Option<Child>,
}

impl Attempt {
    /// An attempt at a shell script, not started yet.
    pub fn new(script: &str) -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path().join("attempt");
        let workdir = temporary.path().join("work");
        std::fs::create_dir(&root).unwrap();
        std::fs::create_dir(&workdir).unwrap();
        let order = Order {
            argv: vec!["sh".into(), "-c".into(), script.into()],
            environment: vec![("PATH".into(), "/usr/local/bin:/usr/bin:/bin".into())],
            workdir: workdir.clone(),
            user: None,
            privileges: Privileges::NeverMore,
            cgroup: None,
            wall_ms: None,
            silence_ms: None,
            grace_ms: 0,
            leftover_ms: 0,
            log_bytes_max: 1 << 30,
            isolation: None,
            limits: helix_runner::limits::Limits::default(),
            secrets: None,
        };
        Self { _temporary: temporary, dir: AttemptDir::new(root), workdir, order, runner: None }
    }

    pub fn with(mut self, change: impl FnOnce(&mut Order)) -> Self {
        change(&mut self.order);
        self
    }

    pub fn held(self, with: With) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("helix-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        match with {
            With::Cgroup => self.with(|order| order.cgroup = cgroup::base().map(|base| base.join(name))),
            With::TreeOnly => self,
        }
    }

    /// In namespaces, as the user that an agent of this one's rights would take.
    pub fn isolated(self, tool: Tool, network: Network) -> Self {
        let is_root = rustix::process::geteuid().is_root();
        if is_root {
            std::os::unix::fs::chown(&self.workdir, Some(OUTSIDE.uid), Some(OUTSIDE.gid)).unwrap();
        }
        let mut view = vec![Entry::host("/usr"), Entry::host("/etc/ld.so.cache"), Entry::host("/nothing/here")];
        for name in ["bin", "lib", "lib64", "sbin"] {
            let path = std::path::Path::new("/").join(name);
            view.push(match std::fs::read_link(&path) {
                Ok(to) => Entry::Link { target: path, to },
                Err(_) => Entry::host(path),
            });
        }
        view.push(Entry::own(&self.workdir, &self.workdir));
        self.with(|order| {
            order.isolation = Some(Isolation { tool, network, view });
            order.user = is_root.then_some(OUTSIDE);
        })
    }

    pub fn write_order(&self) {
        self.order.write(&self.dir).unwrap();
    }

    pub fn start(mut self) -> Self {
        self.write_order();
        self.runner = Some(spawn(&self.dir));
        self
    }

    pub fn runner_pid(&self) -> u32 {
        self.runner.as_ref().unwrap().id()
    }

    /// Waits for the runner's end and reads the result.
    pub fn outcome(&mut self) -> Outcome {
        self.runner_exits();
        Outcome::read(&self.dir).unwrap().expect("a runner that ends leaves a result")
    }

    pub fn run(script: &str) -> (Outcome, Vec<Record>) {
        let mut attempt = Self::new(script).start();
        (attempt.outcome(), attempt.records())
    }

    pub fn runner_exits(&mut self) {
        let runner = self.runner.as_mut().unwrap();
        until("the runner's end", || runner.try_wait().unwrap());
    }

    pub fn kill_runner(&mut self) {
        let runner = self.runner.as_mut().unwrap();
        runner.kill().unwrap();
        runner.wait().unwrap();
    }

    pub fn records(&self) -> Vec<Record> {
        records(&self.dir, Growth::Ended)
    }

    /// Waits for the command's line.
    pub fn says(&self, line: &str) {
        until(line, || records(&self.dir, Growth::Open).iter().any(|r| r.bytes == line.as_bytes()).then_some(()));
    }

    /// A pid that the script wrote to a file in the workdir.
    pub fn pid(&self, file: &str) -> u32 {
        let path = self.workdir.join(file);
        until(file, || std::fs::read_to_string(&path).ok()?.strip_suffix('\n')?.parse().ok())
    }

    pub fn connect(&self) -> Client {
        let stream = until("the runner's socket", || control::connect(&self.dir).ok());
        Client::new(stream)
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        // A test that failed must not leave its build behind.
        if let Some(runner) = &mut self.runner
            && let Ok(None) = runner.try_wait()
        {
            if let Ok(mut stream) = control::connect(&self.dir) {
                let stop = Request::Stop { reason: helix_model::Reason::Internal, grace_ms: 0 };
                let _ = stream.write_all(&stop.encode());
            }
            let _ = runner.wait();
        }
    }
}

pub fn spawn(dir: &AttemptDir) -> Child {
    Command::new(env!("CARGO_BIN_EXE_helix-runner"))
        .arg(dir.root())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

pub fn records(dir: &AttemptDir, growth: Growth) -> Vec<Record> {
    let mut reader = SpoolReader::new(dir);
    std::iter::from_fn(|| reader.next_record(growth).unwrap()).collect()
}

pub fn text(records: &[Record], stream: Stream) -> Vec<String> {
    let of_stream = records.iter().filter(|record| record.stream == stream);
    of_stream.map(|record| String::from_utf8_lossy(&record.bytes).into_owned()).collect()
}

pub fn is_alive(pid: u32) -> bool {
    Process::read(pid).is_some_and(|process| !process.zombie)
}

pub fn kill(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
}

/// The other side of the control socket.
pub struct Client {
    pub stream: UnixStream,
    frames: Frames,
}

impl Client {
    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Self { stream, frames: Frames::default() }
    }

    pub fn send(&mut self, request: Request) {
        self.stream.write_all(&request.encode()).unwrap();
    }

    /// The next event, or `None` when the runner has closed the connection.
    pub fn event(&mut self) -> Option<Event> {
        loop {
            if let Some(payload) = self.frames.next_frame().unwrap() {
                return Some(Event::decode(&payload).unwrap());
            }
            let mut buffer = [0; 64];
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(count) => self.frames.push(&buffer[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub fn status(&mut self) -> Status {
        self.send(Request::Status);
        loop {
            if let Event::Status(status) = self.event().expect("the runner answers") {
                return status;
            }
        }
    }

    pub fn stop(&mut self, reason: helix_model::Reason, grace_ms: u64) {
        self.send(Request::Stop { reason, grace_ms });
    }
}
