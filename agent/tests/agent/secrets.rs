//! Secrets and policy on a real host: a build gets what it may have, and the value shows nowhere.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use helix_model::BuildSpec;
use helix_proto::agent::AttemptId;

use super::World;
use super::cluster::line;
use super::host::eventually;
use super::skip::skip;

const VALUE: &str = "s3cr3t-4f1b-value";

/// An agent whose operator configured secrets and policy.
async fn configured(extra: &str) -> World {
    let mut world = World::new().await;
    world.host.kill();
    let path = world.dir().join("agent.toml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(world.dir().join("token"), format!("{VALUE}\n")).unwrap();
    fs::write(path, format!("{text}{}", extra.replace("DIR", world.dir().to_str().unwrap()))).unwrap();
    world.host.start();
    world.hellos(2).await;
    world
}

fn with_secret(name: &str, text: &str) -> BuildSpec {
    BuildSpec { secrets: BTreeSet::from([name.to_owned()]), ..line(text) }
}

/// Every file below a directory that holds the value.
fn holders(dir: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            holders(&path, found);
        } else if fs::read(&path).is_ok_and(|bytes| contains(&bytes)) {
            found.push(path.display().to_string());
        }
    }
}

fn contains(bytes: &[u8]) -> bool {
    bytes.windows(VALUE.len()).any(|window| window == VALUE.as_bytes())
}

/// Processes that were given the value in a way that others can see.
fn processes_that_show_it() -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        for part in ["cmdline", "environ"] {
            let path = entry.path().join(part);
            if fs::read(&path).is_ok_and(|bytes| contains(&bytes)) {
                found.push(path.display().to_string());
            }
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_a_file_in_memory_and_shows_nowhere() {
    let mut world = configured("[secrets.token]\nfile = 'DIR/token'\nrepositories = ['*']\n").await;
    let (shown, gate) = (world.dir().join("shown"), world.dir().join("gate"));
    let script = format!(
        "cat \"$HELIX_SECRETS/token\"; stat -c '%a %F' \"$HELIX_SECRETS/token\"; stat -f -c %T \"$HELIX_SECRETS\"; \
         cat \"$HELIX_SECRETS/token\" >&2; echo \"$HELIX_SECRETS\" > {}; \
         while [ ! -e {} ]; do sleep 0.05; done; base64 < \"$HELIX_SECRETS/token\"; cat \"$HELIX_SECRETS/token\"; exit 3",
        shown.display(),
        gate.display()
    );
    let id = world.cluster.assign("secret", &with_secret("token", &script)).await;
    eventually("it runs", || fs::read_to_string(&shown).is_ok_and(|text| text.ends_with('\n'))).await;
    let dir = fs::read_to_string(&shown).unwrap();
    let dir = Path::new(dir.trim_end());
    assert!(contains(&fs::read(dir.join("token")).unwrap()));
    assert_eq!(processes_that_show_it(), [] as [String; 0]);
    // The agent dies and another takes over; what the build says from now on is masked all the same.
    world.host.kill();
    world.host.start();
    world.hellos(3).await;
    fs::write(&gate, "").unwrap();
    let finished = world.cluster.finished(&id).await;
    assert_eq!((finished.reason.as_str(), finished.exit_code), ("exit", Some(3)), "{finished:?}");
    assert!(!dir.exists(), "the secret outlives its build");
    let mut found = Vec::new();
    holders(&world.dir().join("data"), &mut found);
    assert_eq!(found, [] as [String; 0], "on the disk");
    assert!(!contains(world.host.log().as_bytes()), "in the agent's log");
    let sealed = world.cluster.sealed_log(&id).await;
    let said: Vec<&str> = sealed.iter().map(String::as_str).filter(|line| !line.starts_with("failed")).collect();
    let mut sorted = said.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, ["***", "***", "***", "***", "400 regular file", "tmpfs"], "{said:?}");
    assert!(!contains(format!("{finished:?} {:?}", world.cluster.live_lines(&id)).as_bytes()));
    world.forget(&id).await;
}

/// Whether an agent can isolate builds here.
fn can_isolate() -> bool {
    let user = if rustix::process::geteuid().is_root() { "--pid" } else { "--map-root-user" };
    let tried = Command::new("unshare").args([user, "--mount", "--fork", "true"]).stderr(Stdio::null()).status();
    tried.is_ok_and(|status| status.success())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_isolated_build_is_shown_its_secrets_and_nobody_elses() {
    if !can_isolate() {
        return skip("an_isolated_build_is_shown_its_secrets_and_nobody_elses", "a mount namespace cannot be made");
    }
    let mut world = configured("[secrets.token]\nfile = 'DIR/token'\nrepositories = ['*']\n").await;
    world.host.kill();
    let path = world.dir().join("agent.toml");
    let text = fs::read_to_string(&path).unwrap().replace("isolation = 'none'", "isolation = 'namespaces'");
    fs::write(path, text).unwrap();
    world.host.start();
    world.hellos(3).await;
    let script = "echo \"$HELIX_SECRETS\"; cat \"$HELIX_SECRETS/token\"; ls -A /dev/shm; rm -f /run/secrets/token; ls /run/secrets";
    let id = world.cluster.assign("with", &with_secret("token", script)).await;
    let finished = world.cluster.finished(&id).await;
    let sealed = world.cluster.sealed_log(&id).await;
    let out: Vec<&str> = sealed.iter().map(String::as_str).filter(|line| !line.contains("cannot remove")).collect();
    assert_eq!(out, ["/run/secrets", "***", "token"], "{finished:?}");
    let id = world.cluster.assign("without", &line("ls -A /run /dev/shm; echo \"none: $HELIX_SECRETS\"")).await;
    world.cluster.finished(&id).await;
    assert_eq!(world.cluster.sealed_log(&id).await.join(" "), "/dev/shm:  /run: none: ");
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_go_with_builds_that_are_cancelled_or_keep_their_workdir() {
    let world = configured("[secrets.token]\ncommand = 'cat DIR/token'\nrepositories = ['*']\n").await;
    let shown = world.dir().join("shown");
    let script = format!("echo \"$HELIX_SECRETS\" > {}; exit 1", shown.display());
    let id =
        world.cluster.assign("kept", &BuildSpec { keep_workdir_ms: 3_600_000, ..with_secret("token", &script) }).await;
    world.cluster.finished(&id).await;
    assert!(!Path::new(fs::read_to_string(&shown).unwrap().trim_end()).exists());
    let script = format!("echo \"$HELIX_SECRETS\" > {}; sleep 1000", shown.display());
    fs::remove_file(&shown).unwrap();
    let id = world.cluster.assign("removed", &with_secret("token", &script)).await;
    eventually("it runs", || fs::read_to_string(&shown).is_ok_and(|text| text.ends_with('\n'))).await;
    let dir = fs::read_to_string(&shown).unwrap();
    world.forget(&id).await;
    assert!(!Path::new(dir.trim_end()).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_owner_does_not_allow_ends_as_policy_and_names_the_key() {
    let extra = "[secrets.theirs]\nfile = 'DIR/token'\nrepositories = ['https://example.com/theirs/*']\n\
                 [policy]\nrepositories = ['https://example.com/ours/*', 'https://example.com/theirs/*']\npush = []\n";
    let world = configured(extra).await;
    let ours = || BuildSpec { repo_url: "https://example.com/ours/app".to_owned(), ..line("true") };
    let table = [
        ("upload", line("true"), "policy.repositories"),
        (
            "others",
            BuildSpec { repo_url: "https://example.com/other/app".to_owned(), ..line("true") },
            "policy.repositories",
        ),
        (
            "dots",
            BuildSpec { repo_url: "https://example.com/ours/../other".to_owned(), ..line("true") },
            "policy.repositories",
        ),
        ("push", BuildSpec { push: "registry.example.com/app".to_owned(), ..ours() }, "policy.push"),
        ("unknown", BuildSpec { secrets: ["x".to_owned()].into(), ..ours() }, "secrets.x"),
        ("theirs", BuildSpec { secrets: ["theirs".to_owned()].into(), ..ours() }, "secrets.theirs.repositories"),
    ];
    for (build, spec, key) in table {
        let id: AttemptId = world.cluster.assign(build, &spec).await;
        let finished = world.cluster.finished(&id).await;
        assert_eq!((finished.outcome.as_str(), finished.reason.as_str()), ("failed", "policy"), "{finished:?}");
        assert!(finished.message.contains(&format!("({key})")), "{finished:?}");
        world.forget(&id).await;
    }
    assert!(world.host.workdirs().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn policy_and_secrets_are_read_again_and_a_bad_file_changes_nothing() {
    let world = configured("[secrets.token]\nfile = 'DIR/token'\nrepositories = ['*']\n").await;
    let path = world.dir().join("agent.toml");
    let first = fs::read_to_string(&path).unwrap();
    let offered = |seen: &super::cluster::Seen| {
        let offer = seen.hellos.last().and_then(|hello| hello.offer.clone()).unwrap_or_default();
        offer.secrets.unwrap_or_default().restricted.into_iter().collect::<Vec<_>>()
    };
    assert_eq!(world.cluster.wait_for("an offer", |seen| Some(offered(seen))).await, [("token".to_owned(), false)]);

    // A build that runs goes on with what it was given.
    let (shown, gate) = (world.dir().join("shown"), world.dir().join("gate"));
    let script = format!(
        "echo > {}; while [ ! -e {} ]; do sleep 0.05; done; cat \"$HELIX_SECRETS/token\"",
        shown.display(),
        gate.display()
    );
    let runs = world.cluster.assign("runs", &with_secret("token", &script)).await;
    eventually("it runs", || shown.exists()).await;

    // A mistake in one table keeps all of it out, and is named.
    fs::write(
        &path,
        format!("{first}[secrets.other]\nfile = 'x'\nrepositories = ['*']\n[policy]\npush = ['nonsense']\n"),
    )
    .unwrap();
    world.host.reload();
    eventually("the mistake is named", || world.host.log().contains("`policy.push`")).await;
    let id = world.cluster.assign("other", &with_secret("other", "true")).await;
    assert_eq!(world.cluster.finished(&id).await.reason, "policy", "a file that is refused counts in part");

    let more =
        "[secrets.theirs]\nfile = 'token'\nrepositories = ['https://example.com/theirs/*']\n[policy]\npush = []\n";
    fs::write(
        &path,
        first.replace("[secrets.token]", "[secrets.renamed]").replace("capacity = 8", "capacity = 9") + more,
    )
    .unwrap();
    world.host.reload();
    world.hellos(3).await;
    let names = [("renamed".to_owned(), false), ("theirs".to_owned(), true)];
    assert_eq!(world.cluster.wait_for("an offer", |seen| Some(offered(seen))).await, names);
    eventually("what waits is named", || world.host.log().contains("capacity")).await;
    let id = world.cluster.assign("renamed", &with_secret("renamed", "cat \"$HELIX_SECRETS/renamed\"")).await;
    assert_eq!(world.cluster.finished(&id).await.outcome, "succeeded");
    assert_eq!(world.cluster.sealed_log(&id).await, ["***"]);
    let push = BuildSpec { push: "registry.example.com/app".to_owned(), ..line("true") };
    let id = world.cluster.assign("push", &push).await;
    assert!(world.cluster.finished(&id).await.message.contains("policy.push"));
    let id = world.cluster.assign("gone", &with_secret("token", "true")).await;
    assert_eq!(world.cluster.finished(&id).await.reason, "policy");
    fs::write(&gate, "").unwrap();
    assert_eq!(world.cluster.finished(&runs).await.outcome, "succeeded");
    assert_eq!(world.cluster.sealed_log(&runs).await, ["***"]);
    assert!(world.host.log().contains("count after a restart"));
}
