//! Who may call what: one row for every RPC on every port. What has no row is refused.
//!
//! A test walks the proto descriptors, so a new RPC without a row fails it. Whose build or attempt it is, is not
//! decided here but where the build is known. Paths are compared byte for byte: another case is another path.

use helix_common::identity::Role;
use helix_common::identity::Role::{Agent, Client, Coordinator, Operator};

type Rows = &'static [(&'static str, &'static [(&'static str, &'static [Role])])];

const ANYBODY: &[Role] = &[Coordinator, Agent, Client, Operator];
const PEOPLE: &[Role] = &[Client, Operator];
const OPERATORS: &[Role] = &[Operator];
const AGENTS: &[Role] = &[Agent];
const BYTES: &[Role] = &[Agent, Client, Operator];
const COORDINATORS: &[Role] = &[Coordinator];

/// Port 7420: clients, operators and agents.
const CLIENT_PORT: Rows = &[
    (
        "helix.v1.BuildService",
        &[
            ("SubmitBuild", PEOPLE),
            ("GetBuildStatus", PEOPLE),
            ("StreamBuildLogs", PEOPLE),
            ("CancelBuild", PEOPLE),
            ("SubmitBuilds", PEOPLE),
            ("ListBuilds", PEOPLE),
            ("WaitBuild", PEOPLE),
            ("ResolveBuild", PEOPLE),
            ("RetryBuild", PEOPLE),
            ("ExplainBuild", PEOPLE),
            ("ReadLog", PEOPLE),
            ("PurgeBuilds", OPERATORS),
            ("PinBuild", PEOPLE),
            ("RegisterArtifact", PEOPLE),
            ("GetArtifacts", PEOPLE),
        ],
    ),
    (
        "helix.v1.WorkerService",
        &[
            ("ListWorkers", PEOPLE),
            ("GetWorker", PEOPLE),
            ("DrainWorker", OPERATORS),
            ("UndrainWorker", OPERATORS),
            ("RemoveWorker", OPERATORS),
            ("GetTotals", PEOPLE),
        ],
    ),
    (
        "helix.v1.ClusterService",
        &[
            ("GetClusterStatus", PEOPLE),
            ("GetPolicy", PEOPLE),
            ("SetPolicy", OPERATORS),
            ("AddMember", OPERATORS),
            ("RemoveMember", OPERATORS),
            ("TransferLeader", OPERATORS),
            ("SaveSnapshot", OPERATORS),
        ],
    ),
    (
        "helix.v1.BlobService",
        &[
            ("HeadBlobs", BYTES),
            ("PutBlob", BYTES),
            ("PutSmallBlobs", BYTES),
            ("UploadOffset", BYTES),
            ("GetBlob", BYTES),
        ],
    ),
    ("helix.agent.v1.AgentService", &[("Session", AGENTS), ("PushLogs", AGENTS)]),
    ("grpc.health.v1.Health", &[("Check", ANYBODY), ("Watch", ANYBODY)]),
    ("grpc.reflection.v1.ServerReflection", &[("ServerReflectionInfo", PEOPLE)]),
    ("grpc.reflection.v1alpha.ServerReflection", &[("ServerReflectionInfo", PEOPLE)]),
];

/// Port 7421: coordinators among themselves.
const PEER_PORT: Rows = &[
    (
        "helix.raft.v1.RaftService",
        &[
            ("Append", COORDINATORS),
            ("Heartbeat", COORDINATORS),
            ("Vote", COORDINATORS),
            ("InstallSnapshot", COORDINATORS),
            ("TransferLeader", COORDINATORS),
            ("Identify", COORDINATORS),
        ],
    ),
    (
        "helix.peer.v1.PeerService",
        &[("Propose", COORDINATORS), ("ReadIndex", COORDINATORS), ("Liveness", COORDINATORS)],
    ),
    ("helix.v1.ClusterService", &[("GetClusterStatus", COORDINATORS)]),
    (
        "helix.peer.v1.MemberService",
        &[
            ("Introduce", COORDINATORS),
            ("Dismiss", COORDINATORS),
            ("HoldBlobs", COORDINATORS),
            ("LeasedBlobs", COORDINATORS),
            ("FetchBlobs", COORDINATORS),
        ],
    ),
    ("helix.peer.v1.LogPeerService", &[("LogHead", COORDINATORS), ("ReadLiveLog", COORDINATORS)]),
    (
        "helix.v1.BlobService",
        &[
            ("HeadBlobs", COORDINATORS),
            ("PutBlob", COORDINATORS),
            ("PutSmallBlobs", COORDINATORS),
            ("UploadOffset", COORDINATORS),
            ("GetBlob", COORDINATORS),
        ],
    ),
];

/// The roles that may call `path` on port 7420; `None` for what is not there.
#[must_use]
pub fn client_port(path: &str) -> Option<&'static [Role]> {
    look_up(CLIENT_PORT, path)
}

/// The roles that may call `path` on port 7421; `None` for what is not there.
#[must_use]
pub fn peer_port(path: &str) -> Option<&'static [Role]> {
    look_up(PEER_PORT, path)
}

fn look_up(rows: Rows, path: &str) -> Option<&'static [Role]> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    let (_, methods) = rows.iter().find(|(name, _)| *name == service)?;
    methods.iter().find(|(name, _)| *name == method).map(|(_, roles)| *roles)
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;
    use prost_types::FileDescriptorSet;
    use std::collections::BTreeSet;

    fn described() -> BTreeSet<String> {
        let set = FileDescriptorSet::decode(helix_proto::DESCRIPTORS).unwrap();
        let paths = set.file.iter().flat_map(|file| {
            file.service.iter().flat_map(move |service| {
                service
                    .method
                    .iter()
                    .map(move |method| format!("/{}.{}/{}", file.package(), service.name(), method.name()))
            })
        });
        paths.collect()
    }

    fn rows(rows: Rows) -> BTreeSet<String> {
        let paths = rows
            .iter()
            .flat_map(|(service, methods)| methods.iter().map(move |(method, _)| format!("/{service}/{method}")));
        paths.collect()
    }

    #[test]
    fn every_rpc_has_a_row_and_every_row_an_rpc() {
        let rows: BTreeSet<_> = rows(CLIENT_PORT).union(&rows(PEER_PORT)).cloned().collect();
        let ours: BTreeSet<_> = rows.iter().filter(|path| path.starts_with("/helix.")).cloned().collect();
        assert_eq!(ours, described());
    }

    #[test]
    fn ports_and_roles_do_not_mix() {
        for path in rows(PEER_PORT) {
            assert_eq!(peer_port(&path), Some(COORDINATORS), "{path}");
        }
        for path in rows(CLIENT_PORT).iter().filter(|path| !path.starts_with("/grpc.health.")) {
            let roles = client_port(path).unwrap();
            assert!(!roles.contains(&Coordinator), "{path}");
            assert!(!(roles.contains(&Agent) && path.starts_with("/helix.v1.Build")), "{path}");
        }
        assert_eq!(client_port("/helix.v1.BuildService/SubmitBuild"), Some(PEOPLE));
        assert_eq!(client_port("/helix.raft.v1.RaftService/Vote"), None);
    }

    #[test]
    fn variants_of_a_path_are_other_paths() {
        for path in [
            "/helix.v1.buildservice/SubmitBuild",
            "/helix.v1.BuildService/submitbuild",
            "helix.v1.BuildService/SubmitBuild",
            "//helix.v1.BuildService/SubmitBuild",
            "/helix.v1.BuildService/SubmitBuild/",
            "/helix.v1.BuildService//SubmitBuild",
            "/helix.v1.BuildService/SubmitBuild?x",
            "/helix.v1.BuildService/%53ubmitBuild",
            "/",
            "",
        ] {
            assert_eq!(client_port(path), None, "{path}");
        }
    }
}
