//! Every durable step of the programs, with a real process killed exactly there, or failed by its disk.
//!
//! A point (`helix_failpoint::Point`) is armed for a whole cluster; builds of every kind are submitted until some process takes it; that
//! process is seen dead, started again, and then everything that was promised is looked for. A point that nobody
//! comes to fails the test. `HELIX_POINT=NAME` leaves all others out.

#[path = "failpoints/beginnings.rs"]
mod beginnings;
#[path = "failpoints/builds.rs"]
mod builds;
#[path = "failpoints/leftovers.rs"]
mod leftovers;
#[path = "failpoints/scenes.rs"]
mod scenes;
#[path = "failpoints/site.rs"]
mod site;

use helix_failpoint::{Action, Point};

use self::site::{Case, Site};

/// Where a point is come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Scene {
    /// In a coordinator while builds of every kind run.
    Coordinator,
    /// In an agent or a runner while they do.
    Agent,
    /// In a coordinator that comes back so late that it is sent a snapshot.
    Latecomer,
    /// In a former leader, when it gives up what nobody else has.
    Deposed,
    /// In a coordinator that seals the log of a lost worker.
    LostWorker,
    /// In an agent that takes an order back.
    Withdrawal,
    /// In a program that writes one of its small files for the first time.
    Beginning,
}

/// Every point has its scene: without one this does not compile.
fn scene(point: Point) -> Scene {
    use Point as P;
    match point {
        P::FileWrite | P::FileWritten | P::FileSynced | P::FileRenamed => Scene::Beginning,
        P::LogAppend | P::LogAppended | P::LogFlush | P::LogFlushed | P::VoteSave | P::VoteSaved => Scene::Coordinator,
        P::LogTruncate | P::LogTruncated => Scene::Deposed,
        P::LogPurge | P::LogPurged | P::StoreWrite | P::StoreWritten | P::StoreSync => Scene::Coordinator,
        P::StoreSynced | P::SnapshotFinish | P::SnapshotWritten | P::SnapshotSynced => Scene::Coordinator,
        P::SnapshotRenamed | P::SnapshotRetain => Scene::Coordinator,
        P::SnapshotReceive | P::SnapshotReceived | P::SnapshotTake | P::SnapshotTaken => Scene::Latecomer,
        P::StoreImported | P::StoreSwitched => Scene::Latecomer,
        P::SegmentBegun | P::SegmentWrite | P::SegmentWritten | P::SegmentSynced | P::SegmentDrop => Scene::Coordinator,
        P::BlobWrite | P::BlobTable | P::BlobWritten | P::BlobSynced => Scene::Coordinator,
        P::BlobRenamed | P::BlobStored => Scene::Coordinator,
        P::LiveWrite | P::LiveWritten | P::LiveRemove => Scene::Coordinator,
        P::LiveSealed | P::LiveStored => Scene::LostWorker,
        P::AppendAnswer | P::VoteAnswer | P::ForwardAnswer | P::SubmitAnswer => Scene::Coordinator,
        P::AssignSend | P::AssignSent | P::ReportAnswer | P::LinesAnswer => Scene::Coordinator,
        P::AssignmentWrite | P::AssignmentWritten | P::OrderWrite | P::OrderWritten => Scene::Agent,
        P::WithdrawalWrite | P::WithdrawalWritten => Scene::Withdrawal,
        P::RunnerWrite | P::RunnerWritten | P::CommandWrite | P::CommandWritten => Scene::Agent,
        P::ResultWrite | P::ResultWritten | P::ReportWrite | P::ReportWritten => Scene::Agent,
        P::SpoolWrite | P::SpoolWritten | P::SpoolRotate | P::SpoolRotated => Scene::Agent,
        P::SealWrite | P::LinesSend | P::SmallSend | P::SmallSent | P::UploadSend | P::UploadSent => Scene::Agent,
        P::ReportSend | P::ReportSent | P::MirrorMade | P::MirrorFetched | P::WorkdirMade => Scene::Agent,
        P::WorkdirRemove | P::WorkdirRemoved | P::WorkdirKept | P::TreeEmptied => Scene::Agent,
    }
}

/// The point that was asked for, and the passage of it at which it acts.
fn asked() -> Option<(Point, u32)> {
    let asked = std::env::var("HELIX_POINT").ok()?;
    let (name, passage) = asked.split_once('@').unwrap_or((&asked, "1"));
    let known = Point::named(name).zip(passage.parse().ok().filter(|passage| *passage > 0));
    Some(known.unwrap_or_else(|| panic!("HELIX_POINT: {asked:?} is not NAME or NAME@PASSAGE")))
}

fn passage() -> u32 {
    asked().map_or(1, |(_, passage)| passage)
}

/// A death at each point of a scene, or at the one that was asked for.
fn deaths(of: Scene) -> Vec<Case> {
    let asked = asked().map(|(point, _)| point);
    let points = Point::all().filter(|point| scene(*point) == of && asked.is_none_or(|asked| asked == *point));
    points.map(|point| Case { point, action: Action::Kill }).collect()
}

/// A failure of the disk at each point of a scene that may fail: by turns that it is full, and that it is broken.
fn failures(of: Scene) -> Vec<Case> {
    let fail = deaths(of).into_iter().filter(|case| case.point.may_fail());
    let actions = [Action::FullDisk, Action::FailedDisk].into_iter().cycle();
    fail.zip(actions).map(|(case, action)| Case { action, ..case }).collect()
}

/// Has each of these happen while builds run: one to a coordinator and one to a host at a time.
fn strike_all(coordinators: &[Case], agents: &[Case]) {
    let longest = coordinators.len().max(agents.len());
    if longest == 0 {
        return;
    }
    let mut site = Site::start(3, 2);
    for place in 0..longest {
        let cases: Vec<Case> = coordinators.get(place).into_iter().chain(agents.get(place)).copied().collect();
        site.strike(&cases);
    }
    site.end();
}

#[test]
fn processes_die_at_each_point_and_keep_what_they_promised() {
    strike_all(&deaths(Scene::Coordinator), &deaths(Scene::Agent));
}

#[test]
fn disks_fail_at_each_point_and_nothing_is_called_done_that_is_not() {
    strike_all(&failures(Scene::Coordinator), &failures(Scene::Agent));
}
