//! Large blobs of a real cluster move to a real bucket and are served from there, by every coordinator.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use helix_tests::cluster::{Cluster, Member, PATIENCE, Shape, wait_for};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::endpoint::{BUCKET, Endpoint};

/// Has every coordinator use the bucket: writes it into its configuration and starts it again.
fn use_bucket(cluster: &Cluster, endpoint: &Endpoint) {
    for member in cluster.all("coordinator") {
        cluster.kill(&member);
        let config = member.argv.last().unwrap();
        let mut file = fs::OpenOptions::new().append(true).open(config).unwrap();
        let (id, secret) = endpoint.keys();
        let keys = format!("access_key_id_file = {id:?}\nsecret_access_key_file = {secret:?}\n");
        let place = format!("bucket = {BUCKET:?}\nendpoint = {:?}\nallow_http = true\n", endpoint.url());
        writeln!(file, "\n[blobs.s3]\n{place}{keys}after = '1s'").unwrap();
        cluster.start_again(&member);
        cluster.leader();
    }
}

/// Files beneath a directory of a coordinator's blobs.
fn files(member: &Member, directory: &str) -> Vec<PathBuf> {
    fn walk(path: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() { walk(&path, found) } else { found.push(path) }
        }
    }
    let mut found = Vec::new();
    walk(&member.data_dir.join("blobs").join(directory), &mut found);
    found
}

/// Waits until so many copies are in the bucket and none is on a disk.
fn wait_until_moved(cluster: &Cluster, copies: usize) {
    let count =
        |directory| cluster.all("coordinator").iter().map(|member| files(member, directory).len()).sum::<usize>();
    wait_for("all copies to be in the bucket", PATIENCE, || {
        ((count("blobs"), count("offloaded")) == (0, copies)).then_some(())
    });
}

/// Fetches the artifact of a build through one coordinator; what the command said, and the digest of what came.
fn get(cluster: &Cluster, member: &Member, id: &str) -> (i32, String, String) {
    let path = cluster.root().join("got");
    let context = cluster.context_of(member);
    let said = cluster
        .helix_with(&context, &["artifacts", "get", id, "-O", path.to_str().unwrap(), "--connect-timeout", "3s"]);
    let digest = fs::read(&path).map(|bytes| format!("{:x}", Sha256::digest(bytes))).unwrap_or_default();
    let _ = fs::remove_file(&path);
    (said.code, said.stderr, digest)
}

#[test]
fn artifacts_move_to_the_bucket_and_come_back_through_every_coordinator() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut endpoint = runtime.block_on(Endpoint::start());
    let cluster = Cluster::start(&Shape { agents: 1, ..Shape::default() }).unwrap();
    use_bucket(&cluster, &endpoint);
    let line = "head -c 20000000 /dev/urandom > \"$HELIX_OUTPUT\"";
    let build = || {
        let said = cluster.helix(&["submit", "--wait", "-o", "quiet", "--", line]);
        assert_eq!(said.code, 0, "{}", said.stderr);
        let id = said.stdout.lines().next().unwrap().to_owned();
        let digest =
            cluster.json(&["status", &id])["digest"].as_str().unwrap().trim_start_matches("sha256:").to_owned();
        (id, digest)
    };
    let (id, digest) = build();
    wait_until_moved(&cluster, 2);
    assert_eq!(endpoint.objects().len(), 2, "each holder has an object of its own");
    for member in cluster.all("coordinator") {
        let (code, stderr, got) = get(&cluster, &member, &id);
        assert_eq!((code, &got), (0, &digest), "coordinator {}: {stderr}", member.id);
    }

    // Without the bucket builds go on, and what lies there is out of reach, not gone.
    runtime.block_on(endpoint.close());
    let (later, later_digest) = build();
    let member = cluster.leader();
    assert_eq!(get(&cluster, &member, &later).2, later_digest, "it is on a disk");
    // A peer that is slow to say what it holds may make it `artifact_unknown` once.
    wait_for("the reader to be told why", PATIENCE, || {
        let (code, stderr, got) = get(&cluster, &member, &id);
        assert!(code != 0 && got.is_empty(), "{code}: {stderr}");
        stderr.contains("bucket_unreachable").then_some(())
    });
    wait_for("a warning of it", PATIENCE, || {
        let warns = |member: &Member| {
            let said = cluster.helix_with(&cluster.context_of(member), &["cluster", "status", "-o", "json", "--stale"]);
            let status: Value = serde_json::from_str(&said.stdout).unwrap_or_default();
            status["warnings"].as_array().is_some_and(|warnings| warnings.contains(&"bucket_failing".into()))
        };
        cluster.all("coordinator").iter().any(warns).then_some(())
    });
    runtime.block_on(endpoint.reopen());
    wait_until_moved(&cluster, 4);
    for (id, digest) in [(&id, &digest), (&later, &later_digest)] {
        assert_eq!(&get(&cluster, &member, id).2, digest);
    }
}
