//! The loop over the real registry: one node that votes for itself, with its log and store on disk.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use helix_common::identity::Role;
use helix_common::pki::{Authority, CA_FILE, VALID_FOR_DEFAULT};
use helix_common::tls::{TlsFiles, TlsStore};
use helix_core::command::SubmitBuild;
use helix_core::{Command, Reply};
use helix_model::{BuildId, BuildSpec, BuildState, Digest, Executor, NodeId};
use tokio_util::sync::CancellationToken;

use super::agents::{Agent, hello, succeeded};
use super::world::PATIENCE;
use crate::leader::{LeaderLoop, LivenessHandle};
use crate::node_dir::{NodeDir, init};
use crate::raft::{Options, Started, start};

async fn node(directory: &std::path::Path) -> Started {
    let authority = Authority::create("demo").unwrap();
    authority.save(directory).unwrap();
    let issued = authority.issue(Role::Coordinator, "1", &["127.0.0.1".to_owned()], VALID_FOR_DEFAULT).unwrap();
    let (cert, key) = issued.save(directory, "node").unwrap();
    let tls = TlsStore::load(TlsFiles { ca: directory.join(CA_FILE), cert, key, revoked: None }).unwrap();
    let data = directory.join("data");
    let members = BTreeMap::from([(NodeId(1), "127.0.0.1:1".to_owned())]);
    init(&data, "demo", NodeId(1), &members).unwrap();
    let options = Options { grpc: "https://127.0.0.1:2".to_owned(), ..Options::default() };
    start(Arc::new(NodeDir::open(&data).unwrap()), tls, options).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_build_goes_through_the_real_registry_and_a_stop_moves_the_agent_away() {
    let directory = tempfile::tempdir().unwrap();
    let started = node(directory.path()).await;
    let registry = started.registry.clone();
    let stop = CancellationToken::new();
    let leader = LeaderLoop::spawn(registry.clone(), stop.clone());
    let liveness = LivenessHandle::new(leader.clone(), started.peers.clone());
    let mut leadership = registry.leadership();
    let elected = leadership.wait_for(|leadership| leadership.is_leader);
    drop(tokio::time::timeout(PATIENCE, elected).await.expect("elected in time").unwrap());
    // Its first policy has been set then, of which agents would hear.
    let known = async {
        while registry.nodes().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, known).await.expect("known in time");
    let mut agent = loop {
        // The loop may hear of its election later than we do; then it sends the agent away.
        let mut agent = Agent::dial(&leader, hello("w", 1)).await;
        if let Some(Ok(_)) = agent.hear().await {
            break agent;
        }
    };
    let spec = BuildSpec { executor: Some(Executor::Exec), command: Some(command()), ..BuildSpec::default() };
    let build = BuildId::new("b").unwrap();
    let submit = SubmitBuild {
        build: build.clone(),
        spec: Arc::new(spec),
        spec_digest: Digest([1; 32]),
        submitted_by: "client/c".to_owned(),
        retry_of: None,
    };
    assert_eq!(registry.propose(Command::SubmitBuild(submit)).await.unwrap(), Reply::Submitted);
    let key = agent.assigned().await;
    assert_eq!(liveness.liveness().await.unwrap().liveness.workers.len(), 1);
    agent.finish(succeeded(&key)).await;
    assert_eq!(agent.forgotten().await, key);
    let view = registry.build(&build).await.unwrap().unwrap();
    assert_eq!(view.record.state, BuildState::Succeeded);
    stop.cancel();
    assert!(agent.ended().await.is_none());
    leader.finished().await;
    registry.transfer_leadership_and_stop(Duration::from_secs(5)).await;
    tokio::time::timeout(PATIENCE, started.task).await.expect("consensus ends").unwrap();
}

fn command() -> helix_model::Command {
    helix_model::Command::Shell("make".to_owned())
}
