//! `cargo demo`: a cluster with fresh certificates, real builds on it, and what it does when its leader dies.
//!
//! Uses what a machine with this toolchain and git has. Exits 0 only if every check held; leaves nothing behind.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use helix_tests::cluster::{Cluster, Shape, programs, wait_for};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// A small but real program: it counts the primes below a number with a sieve.
const PROGRAM: &str = r#"
fn main() {
    let limit = 1_000_000usize;
    let mut composite = vec![false; limit];
    let mut primes = 0;
    for number in 2..limit {
        if composite[number] {
            continue;
        }
        primes += 1;
        for multiple in (number * number..limit).step_by(number) {
            composite[multiple] = true;
        }
    }
    println!("{primes} primes below {limit}");
}
"#;

const PROGRAM_SAYS: &str = "78498 primes below 1000000\n";

/// What was shown, and whether it held.
#[derive(Default)]
struct Summary {
    lines: Vec<(bool, String)>,
}

impl Summary {
    fn step(&mut self, what: &str, step: impl FnOnce() -> anyhow::Result<String>) {
        println!("\n--- {what}");
        let (held, line) = match step() {
            Ok(line) => (true, format!("{what}: {line}")),
            Err(error) => (false, format!("{what}: {error:#}")),
        };
        println!("{line}");
        self.lines.push((held, line));
    }
}

fn main() -> ExitCode {
    println!("building the programs");
    programs();
    let started = Instant::now();
    let mut cluster = match Cluster::start(&Shape::default()) {
        Ok(cluster) => cluster,
        Err(error) => {
            println!("{error:#}");
            return ExitCode::FAILURE;
        }
    };
    println!("3 coordinators and 2 agents are ready after {} ms", started.elapsed().as_millis());
    let mut summary = Summary::default();
    summary.step("a program built from a git repository", || git_build(&cluster));
    summary.step("an uploaded directory", || uploaded(&cluster));
    summary.step("a build that fails", || failing(&cluster));
    summary.step("a build that is cancelled", || cancelled(&cluster));
    summary.step("twenty builds while the leader is killed", || fail_over(&cluster));
    summary.step("everything stopped", || cluster.stop().map(|()| "no process is left".to_owned()));
    drop(cluster);
    println!("\n=== summary");
    for (held, line) in &summary.lines {
        println!("{} {line}", if *held { "ok    " } else { "FAILED" });
    }
    if summary.lines.iter().all(|(held, _)| *held) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn git(directory: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let identity = ["-c", "user.name=demo", "-c", "user.email=demo@example.invalid", "-c", "init.defaultBranch=main"];
    let output =
        Command::new("git").current_dir(directory).args(identity).args(arguments).output().context("git runs")?;
    ensure!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The compiler itself: a build has a home of its own, where a toolchain manager's front would find nothing.
fn compiler() -> anyhow::Result<PathBuf> {
    let output = Command::new("rustc").args(["--print", "sysroot"]).output().context("rustc runs")?;
    let sysroot = String::from_utf8(output.stdout)?;
    Ok(Path::new(sysroot.trim()).join("bin/rustc"))
}

/// Follows a submit live; gives its exit code and how many lines came before the end.
fn follow(cluster: &Cluster, arguments: &[&str]) -> anyhow::Result<(i32, usize)> {
    let mut all = vec!["submit", "--follow"];
    all.extend_from_slice(arguments);
    let mut child = cluster.command(&all).stdout(Stdio::piped()).spawn()?;
    let stdout = child.stdout.take().context("stdout is piped")?;
    let mut lines = 0;
    for line in BufReader::new(stdout).lines() {
        println!("  | {}", line?);
        lines += 1;
    }
    Ok((child.wait()?.code().unwrap_or(255), lines))
}

fn sha256(path: &Path) -> anyhow::Result<String> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut fs::File::open(path)?, &mut hasher)?;
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Fetches the only artifact of the newest build; gives its path.
fn fetch(cluster: &Cluster, name: &str) -> anyhow::Result<PathBuf> {
    let path = cluster.root().join(name);
    let said = cluster.helix(&["artifacts", "get", "last", "-O", &path.display().to_string()]);
    ensure!(said.code == 0, "the artifact cannot be fetched: {}", said.stderr);
    Ok(path)
}

fn git_build(cluster: &Cluster) -> anyhow::Result<String> {
    let repository = cluster.root().join("repository");
    fs::create_dir_all(repository.join("src"))?;
    fs::write(repository.join("src/main.rs"), PROGRAM)?;
    git(&repository, &["init", "--quiet"])?;
    git(&repository, &["add", "."])?;
    git(&repository, &["commit", "--quiet", "--message", "a sieve"])?;
    let commit = git(&repository, &["rev-parse", "HEAD"])?;
    let url = format!("file://{}", repository.display());
    let line = format!(
        "{} --version && {} -O -o primes src/main.rs && echo compiled",
        compiler()?.display(),
        compiler()?.display()
    );
    let (code, lines) = follow(cluster, &["--repo", &url, "--ref", "main", "--output", "primes", "--", &line])?;
    ensure!(code == 0 && lines >= 2, "exit code {code} after {lines} lines");
    let status = cluster.json(&["status", "last"]);
    ensure!(status["commit"] == commit.as_str(), "built {} instead of {commit}", status["commit"]);
    let program = fetch(cluster, "primes")?;
    let digest = sha256(&program)?;
    ensure!(status["digest"] == digest.as_str(), "the registry says {}, the file is {digest}", status["digest"]);
    let mut permissions = fs::metadata(&program)?.permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o755);
    fs::set_permissions(&program, permissions)?;
    let said = Command::new(&program).output()?;
    let said = String::from_utf8_lossy(&said.stdout);
    ensure!(said == PROGRAM_SAYS, "the program said {said:?}");
    Ok(format!("commit {}, sha256 {}, and it says: {}", &commit[..12], &digest[..12], said.trim()))
}

fn uploaded(cluster: &Cluster) -> anyhow::Result<String> {
    let source = cluster.root().join("source");
    fs::create_dir_all(&source)?;
    fs::write(source.join("words"), "three\nshort\nwords\n")?;
    let directory = source.display().to_string();
    let (code, _) = follow(cluster, &["--source", &directory, "--", "sort words | tee \"$HELIX_OUTPUT\""])?;
    ensure!(code == 0, "exit code {code}");
    let sorted = fs::read_to_string(fetch(cluster, "sorted")?)?;
    ensure!(sorted == "short\nthree\nwords\n", "the artifact is {sorted:?}");
    Ok("sorted as it should be".to_owned())
}

fn failing(cluster: &Cluster) -> anyhow::Result<String> {
    let (code, _) = follow(cluster, &["--no-output", "--", "echo this goes wrong >&2; exit 42"])?;
    let status = cluster.json(&["status", "last"]);
    ensure!(code == 42 && status["exit_code"] == 42, "exit code {code}, the registry says {}", status["exit_code"]);
    ensure!(
        status["state"] == "failed" && status["reason"] == "exit",
        "{} because of {}",
        status["state"],
        status["reason"]
    );
    Ok("exit code 42, reason exit".to_owned())
}

fn cancelled(cluster: &Cluster) -> anyhow::Result<String> {
    let id = cluster.submit("echo $$; exec sleep 10000");
    cluster.wait_state(&id, "running");
    let pid: i32 = wait_for("the build to speak", Duration::from_secs(30), || {
        cluster.helix(&["logs", &id]).stdout.lines().find_map(|line| line.parse().ok())
    });
    ensure!(helix_tests::cluster::alive(pid), "process {pid} does not run");
    let said = cluster.helix(&["cancel", &id, "--reason", "the demo has seen enough"]);
    ensure!(said.code == 0, "{}", said.stderr);
    ensure!(!helix_tests::cluster::alive(pid), "process {pid} still runs");
    let status = cluster.json(&["status", &id]);
    ensure!(status["state"] == "cancelled" && status["verified"] == true, "{status}");
    Ok(format!("process {pid} was seen dead before the build was called cancelled"))
}

fn fail_over(cluster: &Cluster) -> anyhow::Result<String> {
    let marks = cluster.root().join("marks");
    let line = format!("echo $HELIX_BUILD_ID >> {}; sleep 1", marks.display());
    let spec = serde_json::json!({ "command": line, "no_output": true }).to_string();
    let mut child =
        cluster.command(&["submit", "--batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().context("stdin is piped")?.write_all(format!("{spec}\n").repeat(20).as_bytes())?;
    let output = child.wait_with_output()?;
    let text = String::from_utf8(output.stdout)?;
    let ids: Vec<&str> = text.lines().collect();
    ensure!(output.status.success() && ids.len() == 20, "the batch was answered: {text}");
    wait_for("builds to run", Duration::from_secs(30), || {
        (fs::read_to_string(&marks).unwrap_or_default().lines().count() >= 5).then_some(())
    });
    let leader = cluster.leader();
    cluster.kill(&leader);
    println!("killed coordinator {}, which led", leader.id);
    let next = cluster.leader();
    println!("coordinator {} leads", next.id);
    let mut wait = vec!["wait", "-o", "jsonl"];
    wait.extend_from_slice(&ids);
    let said = cluster.helix(&wait);
    let ended: Vec<Value> = said.stdout.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let succeeded = ended.iter().filter(|status| status["state"] == "succeeded").count();
    if said.code != 0 || succeeded != 20 {
        bail!("{succeeded} of 20 succeeded: {}", said.stderr);
    }
    let text = fs::read_to_string(&marks)?;
    let ran: Vec<&str> = text.lines().collect();
    let distinct: BTreeSet<&str> = ran.iter().copied().collect();
    ensure!(ran.len() == 20 && distinct.len() == 20, "{} runs of {} builds", ran.len(), distinct.len());
    cluster.start_again(&leader);
    Ok(format!("all twenty ended, each ran once; coordinator {} took over from {}", next.id, leader.id))
}
