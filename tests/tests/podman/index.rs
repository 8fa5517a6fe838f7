//! The index that names the images of all platforms: pushed once all are there, by one of the agents, again if need be.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use helix_common::ports;
use helix_tests::cluster::{Member, PATIENCE, wait_for};
use serde_json::Value;

use crate::platforms::turn;
use crate::site::{Registry, Site, missing};

/// Nothing is run, so nothing has to be emulated.
const NOTHING_RUN: &str = "FROM scratch\nCOPY busybox /bin/busybox\n";

const PLATFORMS: [&str; 4] = ["--platform", "linux/amd64", "--platform", "linux/arm64"];

/// Two agents, each for a platform of its own.
fn two_platforms(settings: &[&str]) -> Site {
    let site = Site::start(2, settings);
    turn(&site, "agent-2", "linux/arm64");
    site
}

/// The way to a registry. While it is shut, nothing is taken under a tag that names no platform: no index.
struct Door {
    address: String,
    shut: Arc<AtomicBool>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Door {
    fn shut_before(registry: &Registry) -> Self {
        let address = format!("127.0.0.1:{}", ports::free(1).unwrap());
        let listener = TcpListener::bind(&address).unwrap();
        let (shut, ending) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
        let (door, end, to) = (Arc::clone(&shut), Arc::clone(&ending), registry.address.clone());
        let thread = std::thread::spawn(move || {
            let mut ways = Vec::new();
            while let Ok((client, _)) = listener.accept() {
                if end.load(Ordering::SeqCst) {
                    break;
                }
                // Both ends of a way are closed when either is.
                let Ok(server) = TcpStream::connect(&to) else { continue };
                let (back, front) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                let door = Arc::clone(&door);
                ways.push(std::thread::spawn(move || {
                    pass(client, server, |bytes| !door.load(Ordering::SeqCst) || !is_index(bytes))
                }));
                ways.push(std::thread::spawn(move || pass(back, front, |_| true)));
            }
            for way in ways {
                way.join().unwrap();
            }
        });
        Self { address, shut, ending, thread: Some(thread) }
    }

    fn open(&self) {
        self.shut.store(false, Ordering::SeqCst);
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(&self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Passes on what comes, as long as it may pass. A request's line comes in one piece, as clients on a loopback send it.
fn pass(mut from: TcpStream, mut to: TcpStream, may_pass: impl Fn(&[u8]) -> bool) {
    let mut buffer = [0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if !may_pass(&buffer[..count]) || to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

fn is_index(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let puts = text.split("PUT /v2/team/app/manifests/").skip(1);
    puts.filter_map(|rest| rest.split(' ').next()).any(|tag| !tag.contains("-linux-"))
}

/// No list of images is left in an agent's store.
fn assert_no_lists(site: &Site) {
    for agent in site.cluster.all("agent") {
        let said = site.podman(&agent, &["images", "--all", "--format", "{{.Repository}}"]);
        let names = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(said.status.success() && !names.contains("helix-index"), "{names}");
    }
}

/// The agent that has the task that has not ended.
fn pusher(site: &Site, id: &str) -> Member {
    let status = site.cluster.json(&["status", id]);
    let tasks = status["tasks"].as_array().unwrap();
    let running: Vec<&Value> = tasks.iter().filter(|task| task["state"] == "running").collect();
    assert_eq!(running.len(), 1, "the other has succeeded: {status}");
    site.cluster.member("agent", running[0]["worker"].as_str().unwrap())
}

/// An index is what the status says it is: one tag, both images by their digests, each with its platform.
#[test]
fn the_digest_of_a_build_for_several_platforms_is_that_of_the_pushed_index() {
    if missing("the_digest_of_a_build_for_several_platforms_is_that_of_the_pushed_index") {
        return;
    }
    let site = two_platforms(&[]);
    let registry = Registry::start(site.dir.path());
    let source = site.source("source", &[("Dockerfile", NOTHING_RUN)]);
    let reference = format!("{}/team/app:1", registry.address);
    let mut arguments = vec!["--source", source.to_str().unwrap(), "--push", &reference];
    arguments.extend(PLATFORMS);
    // The second time the tag and all layers are there already.
    for _ in 0..2 {
        let (code, status) = site.build(&arguments);
        let id = status["build_id"].as_str().unwrap();
        assert_eq!(code, 0, "{status} {}", site.log(id));
        let (digest, text) = registry.manifest("team/app", "1").unwrap();
        assert_eq!(status["digest"], digest, "{status}");
        let index: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(index["mediaType"], "application/vnd.oci.image.index.v1+json");
        let tasks = status["tasks"].as_array().unwrap();
        let listed = index["manifests"].as_array().unwrap();
        assert_eq!((listed.len(), tasks.len()), (2, 2));
        for ((listed, task), architecture) in listed.iter().zip(tasks).zip(["amd64", "arm64"]) {
            assert_eq!(listed["platform"], serde_json::json!({ "architecture": architecture, "os": "linux" }));
            let named = task["digest"].as_str().unwrap();
            assert_eq!(listed["digest"], format!("sha256:{named}"));
            let (found, manifest) = registry.manifest("team/app", &format!("sha256:{named}")).unwrap();
            assert_eq!(found, named);
            let manifest: Value = serde_json::from_str(&manifest).unwrap();
            assert_eq!(manifest["config"]["digest"], format!("sha256:{}", task["image_id"].as_str().unwrap()));
            assert_eq!(task["image_tag"], status["image_tag"]);
            assert!(task["size"].as_u64().unwrap() > 100_000, "{task}");
        }
        assert_eq!(status["image_tag"], format!("helix-build/{id}:latest"));
        let shown = site.cluster.helix(&["status", id]).stdout;
        for task in tasks {
            for fact in ["digest", "image_id", "image_tag"] {
                assert!(shown.contains(task[fact].as_str().unwrap()), "{fact} of {task}: {shown}");
            }
        }
        assert!(shown.contains(&digest), "{shown}");
        assert_no_lists(&site);
        site.assert_clean(id);
    }
    site.end();
}

/// The registry takes the images and not the index, and the agent that is to push it dies; then one that is cancelled meanwhile.
#[test]
fn an_index_is_pushed_again_until_it_is_taken_or_nobody_wants_it() {
    if missing("an_index_is_pushed_again_until_it_is_taken_or_nobody_wants_it") {
        return;
    }
    let site = two_platforms(&[]);
    let registry = Registry::start(site.dir.path());
    let door = Door::shut_before(&registry);
    let source = site.source("source", &[("Dockerfile", NOTHING_RUN)]);
    let submit = |tag: &str| {
        let reference = format!("{}/team/app:{tag}", door.address);
        let mut arguments = vec!["--source", source.to_str().unwrap(), "--push", &reference];
        arguments.extend(PLATFORMS);
        site.submit(&arguments)
    };
    let id = submit("1");
    site.wait_log(&id, "pushing the index failed");
    assert_eq!(site.cluster.helix(&["cancel", &id]).code, 0);
    assert_eq!(site.cluster.state(&id), "cancelled");
    assert!(registry.manifest("team/app", "1").is_none());
    assert_no_lists(&site);
    site.assert_clean(&id);

    let id = submit("2");
    site.wait_log(&id, "pushing the index failed");
    let agent = pusher(&site, &id);
    site.cluster.kill(&agent);
    wait_for("podman to have died with its agent", PATIENCE, || {
        let storage = agent.data_dir.join("podman/storage").display().to_string();
        site.cluster.processes().iter().all(|(_, line)| !line.contains(&storage)).then_some(())
    });
    door.open();
    assert!(registry.manifest("team/app", "2").is_none());
    let mut again = agent.clone();
    if agent.id == "agent-2" {
        again.argv.extend(["--set".to_owned(), "platforms=linux/arm64".to_owned()]);
    }
    site.cluster.start_again(&again);
    site.cluster.wait_state(&id, "succeeded");
    let status = site.cluster.json(&["status", &id]);
    assert_eq!(status["digest"], registry.manifest("team/app", "2").unwrap().0, "{status}");
    for task in status["tasks"].as_array().unwrap() {
        assert_eq!(task["attempt"], 1, "{status}");
    }
    assert_no_lists(&site);
    site.assert_clean(&id);
    site.end();
}

#[test]
fn no_index_is_left_by_a_build_that_fails() {
    if missing("no_index_is_left_by_a_build_that_fails") {
        return;
    }
    let site = two_platforms(&["podman.push_limit_s=2"]);
    let registry = Registry::start(site.dir.path());
    let door = Door::shut_before(&registry);
    // The index is never taken: the task that was to push it fails, and it alone is tried again.
    let source = site.source("source", &[("Dockerfile", NOTHING_RUN)]);
    let reference = format!("{}/team/app:1", door.address);
    let mut arguments = vec!["--source", source.to_str().unwrap(), "--push", &reference];
    arguments.extend(PLATFORMS);
    let (code, status) = site.build(&arguments);
    let id = status["build_id"].as_str().unwrap();
    let log = site.log(id);
    assert_eq!((code, status["reason"].as_str(), status["exit_code"].as_i64()), (120, Some("push"), Some(0)), "{log}");
    assert!(log.contains("the index cannot be pushed to"), "{log}");
    let mut attempts: Vec<u64> =
        status["tasks"].as_array().unwrap().iter().map(|task| task["attempt"].as_u64().unwrap()).collect();
    attempts.sort_unstable();
    assert_eq!(attempts, [1, 3], "{status}");
    assert!(registry.manifest("team/app", "1").is_none());
    assert_no_lists(&site);
    site.assert_clean(id);

    // One platform fails for good: the other has its image, and there is no index of one.
    door.open();
    let dockerfile = "FROM scratch\nARG TARGETARCH\nCOPY file-${TARGETARCH} /file\n";
    let source = site.source("halves", &[("Dockerfile", dockerfile), ("file-amd64", "x")]);
    let reference = format!("{}/team/app:2", door.address);
    let mut arguments = vec!["--source", source.to_str().unwrap(), "--push", &reference];
    arguments.extend(PLATFORMS);
    let (code, status) = site.build(&arguments);
    let id = status["build_id"].as_str().unwrap();
    assert_ne!(code, 0, "{status}");
    assert_eq!(status["state"], "failed", "{status} {}", site.log(id));
    let states: Vec<&str> =
        status["tasks"].as_array().unwrap().iter().map(|task| task["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["succeeded", "failed"], "{status} {}", site.log(id));
    assert_eq!(registry.manifest("team/app", "2-linux-amd64").unwrap().0, status["tasks"][0]["digest"]);
    assert!(registry.manifest("team/app", "2").is_none());
    site.assert_clean(id);
    site.end();
}
