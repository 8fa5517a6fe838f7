//! The points: each has a name that stays, and one place or one kind of place in the programs.

/// A place around a durable step.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Point {
    // Any program: a small file that is replaced whole (`files::write_atomic`).
    /// Before the bytes of the file that takes the other's place.
    FileWrite,
    /// The bytes are written, and not synced.
    FileWritten,
    /// The file is whole, under its temporary name.
    FileSynced,
    /// The file has its name, and its directory is not synced.
    FileRenamed,
    // Coordinator: the Raft log and vote.
    /// Before entries go into the log.
    LogAppend,
    /// Entries are readable, and no flush was asked for.
    LogAppended,
    /// Before a flush for all who wait.
    LogFlush,
    /// A flush has ended, and nobody was told. An error stands for a failed fsync.
    LogFlushed,
    /// Before a vote is written.
    VoteSave,
    /// A vote is synced, and was not said.
    VoteSaved,
    /// Before entries that a new leader does not have are cut off.
    LogTruncate,
    /// They are cut off in memory, and no flush was asked for.
    LogTruncated,
    /// Before entries that snapshots cover are dropped.
    LogPurge,
    /// They are dropped in memory, and no flush was asked for.
    LogPurged,
    // Coordinator: the registry's store.
    /// Before a batch of rows.
    StoreWrite,
    /// The batch is written, and rows still wait in memory as well.
    StoreWritten,
    /// Before all batches so far are synced.
    StoreSync,
    /// They are synced.
    StoreSynced,
    /// A snapshot's rows, or a copy of all, are in a file of their own, which does not count yet.
    StoreImported,
    /// That file counts, and the old one is there.
    StoreSwitched,
    // Coordinator: snapshot files.
    /// Before the end mark of a snapshot's file.
    SnapshotFinish,
    /// The file is written, and not synced.
    SnapshotWritten,
    /// The file is whole, under its temporary name.
    SnapshotSynced,
    /// The file has its name, and its directory is not synced.
    SnapshotRenamed,
    /// Before older snapshots are removed.
    SnapshotRetain,
    /// Before a chunk of a leader's snapshot is written.
    SnapshotReceive,
    /// A leader's snapshot is whole and checked, under its temporary name.
    SnapshotReceived,
    /// Before a received snapshot gets its name.
    SnapshotTake,
    /// It has its name, and its directory is not synced.
    SnapshotTaken,
    // Coordinator: small blobs.
    /// A new segment has its header, and is not synced.
    SegmentBegun,
    /// Before frames are written.
    SegmentWrite,
    /// Frames are written, and not synced. An error stands for a failed fsync.
    SegmentWritten,
    /// Frames are synced, and not in the index.
    SegmentSynced,
    /// Before the file of a segment that is dead is removed.
    SegmentDrop,
    // Coordinator: large blobs.
    /// Before a piece of a large blob is written.
    BlobWrite,
    /// All bytes are here and hashed; before their table of checksums.
    BlobTable,
    /// The table is written, and nothing is synced. An error stands for a failed fsync.
    BlobWritten,
    /// The file is whole, under its temporary name.
    BlobSynced,
    /// The file has its name, and its directory is not synced.
    BlobRenamed,
    /// The blob is durable, and not in the index.
    BlobStored,
    // Coordinator: live logs.
    /// Before pushed lines are written.
    LiveWrite,
    /// Pushed lines are written, and can not be read yet.
    LiveWritten,
    /// Before the file of a log that is sealed is removed.
    LiveRemove,
    /// A log that its agent left is in a file of its own, and was not stored.
    LiveSealed,
    /// That file is stored, and the registry does not know.
    LiveStored,
    // Coordinator: what is said.
    /// A follower has entries synced; before its leader hears.
    AppendAnswer,
    /// A vote is saved; before the candidate hears.
    VoteAnswer,
    /// Forwarded commands are committed; before the coordinator that sent them hears.
    ForwardAnswer,
    /// A submit is committed; before the client hears.
    SubmitAnswer,
    /// An assignment is committed; before it is queued for its agent.
    AssignSend,
    /// An assignment is queued for its agent.
    AssignSent,
    /// An agent's report is committed; before the agent hears.
    ReportAnswer,
    /// Lines can be read; before the agent hears.
    LinesAnswer,
    // Agent and runner: an attempt's journal. Each record has a point before it and one behind it.
    /// Before an assignment is noted.
    AssignmentWrite,
    /// An assignment is noted.
    AssignmentWritten,
    /// Before the order for a runner is written.
    OrderWrite,
    /// The order is written, and no runner was started for it.
    OrderWritten,
    /// Before an order is taken back.
    WithdrawalWrite,
    /// An order is taken back.
    WithdrawalWritten,
    /// Before a runner notes that it took the order.
    RunnerWrite,
    /// A runner took the order, and has started nothing.
    RunnerWritten,
    /// The command was made, and waits; before its process is noted.
    CommandWrite,
    /// The command's process is noted.
    CommandWritten,
    /// All processes are dead; before a runner notes how it ended.
    ResultWrite,
    /// A runner noted how it ended, and nobody heard.
    ResultWritten,
    /// Before a report is noted.
    ReportWrite,
    /// A report is noted; the workdir is there, and nobody heard.
    ReportWritten,
    // Agent and runner: an attempt's log.
    /// Before lines are written.
    SpoolWrite,
    /// Lines are written, and nobody heard.
    SpoolWritten,
    /// Before the newest part of a long log takes the place of the older one.
    SpoolRotate,
    /// It has, and there is no newest part.
    SpoolRotated,
    // Agent: bytes and reports on their way.
    /// Before a piece of a sealed log that is too large for memory.
    SealWrite,
    /// Before lines are sent to a coordinator.
    LinesSend,
    /// Before small blobs are sent.
    SmallSend,
    /// Small blobs are stored, and the attempts they belong to do not know.
    SmallSent,
    /// Before a large blob is sent.
    UploadSend,
    /// A large blob is stored, and its attempt does not know.
    UploadSent,
    /// Before a report is queued for the leader.
    ReportSend,
    /// A report is queued for the leader.
    ReportSent,
    // Agent: directories.
    /// A mirror of a repository is made, and not marked as whole.
    MirrorMade,
    /// A mirror has what was asked for, and it was not looked up.
    MirrorFetched,
    /// A workdir is made, and empty.
    WorkdirMade,
    /// Before a workdir is removed.
    WorkdirRemove,
    /// A workdir is removed.
    WorkdirRemoved,
    /// The workdir of a failed build was moved where it stays for a while.
    WorkdirKept,
    /// All in a directory is removed, and it is there.
    TreeEmptied,
}

use Point as P;

/// Every point, its name, and whether its step may fail.
const TABLE: [(Point, &str, Step); 86] = [
    (P::FileWrite, "file.write", MayFail),
    (P::FileWritten, "file.written", MayFail),
    (P::FileSynced, "file.synced", MayFail),
    (P::FileRenamed, "file.renamed", MayFail),
    (P::LogAppend, "log.append", MayFail),
    (P::LogAppended, "log.appended", Passes),
    (P::LogFlush, "log.flush", Passes),
    (P::LogFlushed, "log.flushed", MayFail),
    (P::VoteSave, "vote.save", MayFail),
    (P::VoteSaved, "vote.saved", MayFail),
    (P::LogTruncate, "log.truncate", MayFail),
    (P::LogTruncated, "log.truncated", Passes),
    (P::LogPurge, "log.purge", MayFail),
    (P::LogPurged, "log.purged", Passes),
    (P::StoreWrite, "store.write", MayFail),
    (P::StoreWritten, "store.written", Passes),
    (P::StoreSync, "store.sync", MayFail),
    (P::StoreSynced, "store.synced", Passes),
    (P::StoreImported, "store.imported", MayFail),
    (P::StoreSwitched, "store.switched", MayFail),
    (P::SnapshotFinish, "snapshot.finish", MayFail),
    (P::SnapshotWritten, "snapshot.written", MayFail),
    (P::SnapshotSynced, "snapshot.synced", MayFail),
    (P::SnapshotRenamed, "snapshot.renamed", MayFail),
    (P::SnapshotRetain, "snapshot.retain", MayFail),
    (P::SnapshotReceive, "snapshot.receive", MayFail),
    (P::SnapshotReceived, "snapshot.received", MayFail),
    (P::SnapshotTake, "snapshot.take", MayFail),
    (P::SnapshotTaken, "snapshot.taken", MayFail),
    (P::SegmentBegun, "segment.begun", MayFail),
    (P::SegmentWrite, "segment.write", MayFail),
    (P::SegmentWritten, "segment.written", MayFail),
    (P::SegmentSynced, "segment.synced", Passes),
    (P::SegmentDrop, "segment.drop", Passes),
    (P::BlobWrite, "blob.write", MayFail),
    (P::BlobTable, "blob.table", MayFail),
    (P::BlobWritten, "blob.written", MayFail),
    (P::BlobSynced, "blob.synced", Passes),
    (P::BlobRenamed, "blob.renamed", MayFail),
    (P::BlobStored, "blob.stored", Passes),
    (P::LiveWrite, "live.write", MayFail),
    (P::LiveWritten, "live.written", Passes),
    (P::LiveRemove, "live.remove", Passes),
    (P::LiveSealed, "live.sealed", MayFail),
    (P::LiveStored, "live.stored", Passes),
    (P::AppendAnswer, "append.answer", Passes),
    (P::VoteAnswer, "vote.answer", Passes),
    (P::ForwardAnswer, "forward.answer", Passes),
    (P::SubmitAnswer, "submit.answer", Passes),
    (P::AssignSend, "assign.send", Passes),
    (P::AssignSent, "assign.sent", Passes),
    (P::ReportAnswer, "report.answer", Passes),
    (P::LinesAnswer, "lines.answer", Passes),
    (P::AssignmentWrite, "assignment.write", MayFail),
    (P::AssignmentWritten, "assignment.written", Passes),
    (P::OrderWrite, "order.write", MayFail),
    (P::OrderWritten, "order.written", Passes),
    (P::WithdrawalWrite, "withdrawal.write", MayFail),
    (P::WithdrawalWritten, "withdrawal.written", Passes),
    (P::RunnerWrite, "runner.write", MayFail),
    (P::RunnerWritten, "runner.written", Passes),
    (P::CommandWrite, "command.write", MayFail),
    (P::CommandWritten, "command.written", Passes),
    (P::ResultWrite, "result.write", MayFail),
    (P::ResultWritten, "result.written", Passes),
    (P::ReportWrite, "report.write", MayFail),
    (P::ReportWritten, "report.written", Passes),
    (P::SpoolWrite, "spool.write", MayFail),
    (P::SpoolWritten, "spool.written", Passes),
    (P::SpoolRotate, "spool.rotate", MayFail),
    (P::SpoolRotated, "spool.rotated", Passes),
    (P::SealWrite, "seal.write", MayFail),
    (P::LinesSend, "lines.send", Passes),
    (P::SmallSend, "small.send", Passes),
    (P::SmallSent, "small.sent", Passes),
    (P::UploadSend, "upload.send", Passes),
    (P::UploadSent, "upload.sent", Passes),
    (P::ReportSend, "report.send", Passes),
    (P::ReportSent, "report.sent", Passes),
    (P::MirrorMade, "mirror.made", MayFail),
    (P::MirrorFetched, "mirror.fetched", MayFail),
    (P::WorkdirMade, "workdir.made", MayFail),
    (P::WorkdirRemove, "workdir.remove", MayFail),
    (P::WorkdirRemoved, "workdir.removed", Passes),
    (P::WorkdirKept, "workdir.kept", MayFail),
    (P::TreeEmptied, "tree.emptied", MayFail),
];

/// Whether a point's step can report an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// It is passed with [`crate::hit`].
    MayFail,
    /// It is passed with [`crate::pass`].
    Passes,
}

use Step::{MayFail, Passes};

impl Point {
    /// Every point.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|(point, ..)| *point)
    }

    /// The point with this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        TABLE.iter().find(|(_, known, _)| *known == name).map(|(point, ..)| *point)
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        TABLE[self as usize].1
    }

    /// Whether an error can be armed at it, and not a death alone.
    #[must_use]
    pub fn may_fail(self) -> bool {
        TABLE[self as usize].2 == MayFail
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_table_is_in_order_and_names_are_distinct_words() {
        for (place, (point, ..)) in TABLE.iter().enumerate() {
            assert_eq!(*point as usize, place, "{point:?}");
            assert_eq!(Point::named(point.name()), Some(*point));
            assert!(point.name().bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'.'));
        }
        assert_eq!(Point::all().map(Point::name).collect::<BTreeSet<_>>().len(), TABLE.len());
    }
}
