//! `helix-coordinator restore` and `recover`: a registry from a backup, or from the one node that is left, becomes a new cluster's.
//!
//! Nothing runs meanwhile. What is refused says why with a stable word, and has changed nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use helix_common::backup::{Backup, BackupError};
use helix_common::files::{Durability, write_atomic};
use helix_model::{BuildId, Digest, ErrorCode, LogTime, NodeId};
use helix_proto::v1;
use prost::Message;
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;

use crate::blobs::LEASE;
use crate::blobs::store::BlobStore;
use crate::codec::ROW_FORMAT;
use crate::node_dir::{Begun, Filling, NodeIdentity, Replacing, new_epoch};
use crate::raft::offline::{Gathered, GiveError, Given, NewCluster, gather, give};

/// A list of what is missing, in the data directory.
const MISSING: &str = "missing-blobs.txt";
/// Missing blobs that are named at once.
const EXAMPLES: usize = 10;
/// Short enough to be compared by eye.
const FINGERPRINT_CHARS: usize = 16;
/// How long another coordinator may take to take a connection.
const ANSWER: Duration = Duration::from_secs(2);

/// `helix-coordinator restore`.
#[derive(Args, Debug)]
pub struct Restore {
    /// What `helix cluster snapshot save` wrote.
    #[arg(long, value_name = "FILE")]
    snapshot: PathBuf,
    /// The new cluster's name, as in its certificates: the old one's, unless --rename is given.
    #[arg(long, value_name = "NAME")]
    cluster: String,
    /// This node's number, never used in the old cluster.
    #[arg(long, value_name = "N")]
    id: u64,
    /// All members of the new cluster, this one among them, and where coordinators dial each (port 7421). Give each the
    /// same file and the same members.
    #[arg(long, value_name = "ID=HOST:PORT,...", value_delimiter = ',', required = true, value_parser = super::member)]
    members: Vec<(NodeId, String)>,
    /// The directory, empty or absent.
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// What `helix cluster snapshot save --blobs` wrote: artifacts, logs, uploaded sources.
    #[arg(long, value_name = "DIR")]
    blobs: Option<PathBuf>,
    /// The new cluster has another name than the old one.
    #[arg(long)]
    rename: bool,
}

/// `helix-coordinator recover`.
#[derive(Args, Debug)]
pub struct Recover {
    /// The data directory of the node that is left.
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Every other voter: they are lost for good, and will never run again with the data that they had.
    #[arg(long, value_name = "ID,...", value_delimiter = ',')]
    lost: Vec<u64>,
    /// Also when something answers where one of them was.
    #[arg(long)]
    sure: bool,
}

/// A refusal with a stable word; nothing was changed.
#[derive(Debug)]
struct Refused(ErrorCode, String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0, self.1)
    }
}

impl std::error::Error for Refused {}

fn refused(code: ErrorCode, why: impl Into<String>) -> anyhow::Error {
    Refused(code, why.into()).into()
}

fn of_backup(error: BackupError) -> anyhow::Error {
    match error {
        BackupError::Foreign(_) | BackupError::Damaged { .. } => refused(ErrorCode::SnapshotInvalid, error.to_string()),
        BackupError::Newer { .. } => refused(ErrorCode::VersionSkew, error.to_string()),
        BackupError::Io { .. } => error.into(),
    }
}

fn of_give(error: GiveError) -> anyhow::Error {
    match error {
        GiveError::IdUsed(..) => refused(ErrorCode::NodeIdUsed, error.to_string()),
        GiveError::Newer(_) => refused(ErrorCode::VersionSkew, error.to_string()),
        GiveError::Damaged(_) => refused(ErrorCode::SnapshotInvalid, error.to_string()),
        GiveError::Io { .. } => error.into(),
    }
}

/// Makes a node of a new cluster from a backup; what to tell people.
///
/// # Errors
/// What is wrong, and what to do about it. The directory is then as it was.
pub async fn restore(arguments: Restore) -> anyhow::Result<String> {
    helix_common::identity::Name::new("cluster", &arguments.cluster)?;
    let members = super::members(arguments.members)?;
    let node = NodeId(arguments.id);
    if !members.contains_key(&node) {
        return Err(refused(ErrorCode::InvalidField, format!("node {node} is not among --members")));
    }
    let backup = Backup::open(&arguments.snapshot).map_err(of_backup)?;
    let header = v1::BackupHeader::decode(backup.header())
        .map_err(|error| refused(ErrorCode::SnapshotInvalid, format!("its header: {error}")))?;
    check(&header, &arguments.cluster, arguments.rename)?;
    let filling = Filling::begin(&arguments.data_dir)?;
    let new = NewCluster { node, members, kept_under: None };
    let given = give(|| backup.body(), backup.path(), filling.path(), &new).await.map_err(of_give)?;
    let identity = NodeIdentity {
        cluster: arguments.cluster,
        node: node.0,
        epoch: new_epoch(),
        members: new.members.iter().map(|(id, address)| (id.0, address.clone())).collect(),
    };
    let mut told = format!(
        "node {node} of cluster {} made in {} from a backup of {}, entry {} of term {}\n",
        identity.cluster,
        arguments.data_dir.display(),
        date_text(LogTime(u64::try_from(header.taken_at_ms).unwrap_or(0))),
        header.index,
        header.term,
    );
    told.push_str(&counts(&given));
    let _ = writeln!(
        told,
        "fingerprint {}: a member whose restore tells another was given another file or other members; restore it again, into \
         an empty directory, before any of them is started",
        fingerprint(backup.sha256(), &new.members)
    );
    told.push_str(&look_after_blobs(filling.path(), given.blobs, arguments.blobs.as_deref()).await?);
    filling.finish(&identity)?;
    Ok(told)
}

fn check(header: &v1::BackupHeader, cluster: &str, rename: bool) -> anyhow::Result<()> {
    if header.row_format > ROW_FORMAT {
        let text = format!(
            "the backup was taken by version {}, whose rows have format {}, and this program knows {ROW_FORMAT}: use a \
             newer one",
            header.version, header.row_format
        );
        return Err(refused(ErrorCode::VersionSkew, text));
    }
    if header.cluster != cluster && !rename {
        let text = format!(
            "the backup is of cluster {:?}, not {cluster:?}: is it the right file? --rename restores it under another name",
            header.cluster
        );
        return Err(refused(ErrorCode::WrongCluster, text));
    }
    Ok(())
}

/// What all members of a restored cluster have to have in common. Consensus goes on from there, and takes it for granted.
fn fingerprint(backup: Digest, members: &BTreeMap<NodeId, String>) -> String {
    let mut hash = Sha256::new();
    hash.update(backup.0);
    for (id, address) in members {
        hash.update(format!("{id}={address}\n"));
    }
    let mut text = Digest(hash.finalize().into()).to_string();
    text.truncate(FINGERPRINT_CHARS);
    text
}

/// A date with its time, in UTC.
fn date_text(at: LogTime) -> String {
    let Ok(date) = OffsetDateTime::from_unix_timestamp(at.unix_s()) else { return at.to_string() };
    format!("{} {:02}:{:02}:{:02} UTC", date.date(), date.hour(), date.minute(), date.second())
}

fn counts(given: &Given) -> String {
    let Given { open, finished, workers, .. } = given;
    format!("{} builds, {open} of them not ended, and {workers} workers\n", open + finished)
}

/// Takes blobs in, and tells of those that are named and not there.
async fn look_after_blobs(
    data: &Path,
    named: BTreeMap<Digest, BuildId>,
    from: Option<&Path>,
) -> anyhow::Result<String> {
    let root = data.join("blobs");
    let (store, _) =
        BlobStore::open(&root, LEASE, None).with_context(|| format!("{} cannot be opened", root.display()))?;
    let count = named.len();
    let adopted =
        store.adopt(named, from).await.with_context(|| format!("blobs cannot be put into {}", root.display()))?;
    let mut told = format!("{count} blobs are named by builds, {} of them are here\n", adopted.held);
    if adopted.missing.is_empty() {
        return Ok(told);
    }
    let mut list = String::new();
    for (digest, build) in &adopted.missing {
        let _ = writeln!(list, "{digest} {build}");
    }
    let file = data.join(MISSING);
    write_atomic(&file, list.as_bytes(), 0o600, Durability::Synced).with_context(|| file.display().to_string())?;
    let _ = writeln!(
        told,
        "{} are missing ({} were damaged): their builds are known, and their artifacts and logs are not to be had; all are \
         listed in {}, sha256 and build:",
        adopted.missing.len(),
        adopted.damaged,
        file.display()
    );
    for line in list.lines().take(EXAMPLES) {
        let _ = writeln!(told, "  {line}");
    }
    if adopted.missing.len() > EXAMPLES {
        told.push_str("  ...\n");
    }
    Ok(told)
}

/// Makes the node that is left a cluster of one; what to tell people.
///
/// # Errors
/// What is wrong, and what to do about it. The node is then as it was.
pub async fn recover(arguments: Recover) -> anyhow::Result<String> {
    let replacing = match Replacing::begin(&arguments.data_dir)? {
        Begun::Anew(replacing) => replacing,
        Begun::Completed(aside) => {
            return Ok(format!(
                "a recovery that was cut short is complete: start the node. What was there before lies in {}\n",
                aside.display()
            ));
        }
    };
    let old = replacing.dir().identity().clone();
    let gathered = gather(replacing.dir().path(), old.id(), &replacing.scratch()).await.map_err(of_give)?;
    let own = gathered.members.get(&old.id()).or(old.members.get(&old.node)).cloned();
    let own = own.with_context(|| format!("node {} was never a member of its cluster", old.node))?;
    expect_lost(&gathered, old.id(), &arguments)?;
    let new = NewCluster {
        node: old.id(),
        members: BTreeMap::from([(old.id(), own.clone())]),
        kept_under: Some(new_epoch()),
    };
    let open = || std::fs::File::open(&gathered.file).map(std::io::BufReader::new);
    let given = give(open, &gathered.file, &replacing.new_data(), &new).await.map_err(of_give)?;
    let blobs = look_after_blobs(replacing.dir().path(), given.blobs.clone(), None).await?;
    let identity = NodeIdentity {
        epoch: new.kept_under.unwrap_or_default(),
        members: BTreeMap::from([(old.node, own)]),
        ..old.clone()
    };
    let aside = replacing.finish(&identity)?;
    let mut told = format!("node {} is a cluster of its own now, with all that it knew: start it\n", old.node);
    told.push_str(&counts(&given));
    told.push_str(&what_is_lost(&gathered, &given));
    told.push_str(&blobs);
    let _ = writeln!(
        told,
        "then `helix cluster add` others under new ids; what was there before lies in {}, and can be removed",
        aside.display()
    );
    Ok(told)
}

fn what_is_lost(gathered: &Gathered, given: &Given) -> String {
    let Gathered { last, committed, .. } = gathered;
    let ids = given.retired.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    format!(
        "kept: everything up to entry {} of term {}, of {}. An acknowledgement needs a majority, and this node was none \
         alone: what nodes {ids} acknowledged without it after that is lost (submits, cancels, ends of builds, changes of \
         policy); their clients can submit again under the same ids. Entries {} to {} were not known to be acknowledged, and \
         are kept all the same. Nodes {ids} are retired for ever\n",
        last.index,
        last.term,
        date_text(given.last_at),
        committed.index.saturating_add(1).min(last.index),
        last.index,
    )
}

/// Making two clusters of one is worse than waiting: all others must be named as lost, and none may answer.
fn expect_lost(gathered: &Gathered, own: NodeId, arguments: &Recover) -> anyhow::Result<()> {
    let others: BTreeSet<u64> = gathered.voters.iter().filter(|voter| **voter != own).map(|voter| voter.0).collect();
    let list = others.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    if others.is_empty() {
        let text = format!("node {own} is the only voter: nothing is lost; start it");
        return Err(refused(ErrorCode::QuorumMayLive, text));
    }
    let named: BTreeSet<u64> = arguments.lost.iter().copied().collect();
    if named != others {
        let text = format!(
            "this node's log ends at entry {} of term {}, and its cluster's voters are {own},{list}. As long as a majority of \
             them can be brought back, do that instead. Of several that are left, recover the one whose log has the highest \
             term, and among those the highest entry. If the others are lost for good: --lost {list}",
            gathered.last.index, gathered.last.term
        );
        return Err(refused(ErrorCode::QuorumMayLive, text));
    }
    let answers = |id: &&u64| gathered.members.get(&NodeId(**id)).is_some_and(|address| answers(address));
    if !arguments.sure
        && let Some(alive) = others.iter().find(answers)
    {
        let text = format!(
            "something answers where node {alive} was, at {}: if it is node {alive}, it is not lost; stop it for ever, or \
             say --sure",
            gathered.members.get(&NodeId(*alive)).map_or("", String::as_str)
        );
        return Err(refused(ErrorCode::QuorumMayLive, text));
    }
    Ok(())
}

fn answers(address: &str) -> bool {
    let found = address.to_socket_addrs().into_iter().flatten();
    found.take(4).any(|address| TcpStream::connect_timeout(&address, ANSWER).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_made_from_another_file_or_with_other_members_have_another_fingerprint() {
        let members = |list: &[(u64, &str)]| list.iter().map(|(id, at)| (NodeId(*id), (*at).to_owned())).collect();
        let (monday, tuesday) = (Digest([1; 32]), Digest([2; 32]));
        let two = members(&[(5, "a:1"), (6, "b:1")]);
        let all = [
            fingerprint(monday, &two),
            fingerprint(tuesday, &two),
            fingerprint(monday, &members(&[(5, "a:1")])),
            fingerprint(monday, &members(&[(5, "a:1"), (6, "b:2")])),
            fingerprint(monday, &members(&[(5, "a:1"), (7, "b:1")])),
        ];
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len(), "{all:?}");
        assert_eq!(all[0], fingerprint(monday, &two));
    }
}
