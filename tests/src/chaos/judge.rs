//! What must be true of a healed cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use helix_common::endpoints::Endpoints;
use helix_model::Digest;
use helix_proto::v1;
use helix_proto::v1::blob_service_client::BlobServiceClient;
use helix_proto::v1::build_service_client::BuildServiceClient;
use tokio::runtime::Runtime;

use crate::chaos::history::{End, Seen};
use crate::chaos::load::{LINES, Load};
use crate::chaos::site::Site;

/// How long one question may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// By how much log time may differ from the true time: clocks that agree do so within ten seconds.
const CLOCK_SLACK: Duration = Duration::from_secs(15);

/// Builds that are looked at together.
const AT_ONCE: usize = 16;

/// Ends that a command which does nothing wrong cannot have.
const IMPOSSIBLE: [&str; 9] =
    ["exit", "timeout", "silence", "oom", "no_command", "artifact_missing", "policy", "source", "disk_full"];

/// Waits until every build has ended, and judges all that is known. Gives what is wrong.
///
/// # Errors
/// When the cluster cannot be asked.
pub(super) fn judge(runtime: &Runtime, site: &Site, load: &Load, patience: Duration) -> anyhow::Result<Vec<String>> {
    let endpoints = site.endpoints()?;
    let mut wrong = Vec::new();
    let ids: Vec<String> = load.history().tried().cloned().collect();
    let mut ends: BTreeMap<String, End> = BTreeMap::new();
    let deadline = Instant::now() + patience;
    for id in &ids {
        loop {
            match runtime.block_on(load.look(&endpoints, id)) {
                Ok(Seen::Ended { end, .. }) => {
                    ends.insert(id.clone(), end);
                    break;
                }
                // Never acknowledged, and never there. The history says if somebody was told otherwise.
                Ok(Seen::Absent) => break,
                Ok(other) if Instant::now() > deadline => {
                    let explained = site.helix(&["explain", id]).unwrap_or_else(|error| error.to_string());
                    wrong.push(format!("{id}: it has not ended {patience:?} after healing: {other:?}; {explained}"));
                    break;
                }
                Ok(_) => std::thread::sleep(Duration::from_millis(100)),
                Err(why) => {
                    wrong.push(format!("{id}: nobody tells of it: {why}"));
                    break;
                }
            }
        }
    }
    wrong.extend(load.history().check());
    wrong.extend(dated(load));
    wrong.extend(phantoms(site, &ids)?);
    wrong.extend(counted(site, &ends)?);
    let looked = futures::stream::iter(&ends)
        .map(|(id, end)| {
            let endpoints = &endpoints;
            async move { whole(endpoints, id, end).await.err().map(|why| format!("{id}: {why}")) }
        })
        .buffer_unordered(AT_ONCE);
    wrong.extend(runtime.block_on(looked.filter_map(async |why| why).collect::<Vec<_>>()));
    Ok(wrong)
}

/// Ends whose time is not when they were: log time goes with the majority of clocks, whatever one of them says.
fn dated(load: &Load) -> Vec<String> {
    let slack = i64::try_from(CLOCK_SLACK.as_millis()).unwrap_or(i64::MAX);
    let first = load.wall_ms(Duration::ZERO) - slack;
    let history = load.history();
    let off = history.ends().filter(|(_, seen, end)| end.at_ms < first || end.at_ms > load.wall_ms(seen.end) + slack);
    off.map(|(id, seen, end)| format!("{id}: it is said to have ended at another time than it did: {end:?}, {seen:?}"))
        .collect()
}

/// Builds that nobody submitted.
fn phantoms(site: &Site, tried: &[String]) -> anyhow::Result<Vec<String>> {
    let listed = site.helix(&["list", "--all", "--limit", "1000000", "-o", "quiet"])?;
    let tried: BTreeSet<&str> = tried.iter().map(String::as_str).collect();
    Ok(listed.lines().filter(|id| !tried.contains(id)).map(|id| format!("{id}: it was never submitted")).collect())
}

/// What builds' side effects say: no attempt began or ended twice, and what succeeded ran to its end.
fn counted(site: &Site, ends: &BTreeMap<String, End>) -> anyhow::Result<Vec<String>> {
    let mut wrong = Vec::new();
    let read = |name: &str| fs::read_to_string(site.root().join("counts").join(name));
    let (starts, finishes) = (read("starts")?, read("ends")?);
    for (what, text) in [("began", &starts), ("ended", &finishes)] {
        let mut seen = BTreeSet::new();
        wrong.extend(text.lines().filter(|line| !seen.insert(*line)).map(|line| {
            let (id, attempt) = line.split_once(' ').unwrap_or((line, "?"));
            format!("{id}: attempt {attempt} {what} twice")
        }));
    }
    let finished: BTreeSet<&str> = finishes.lines().collect();
    for (id, end) in ends.iter().filter(|(_, end)| end.state == "succeeded") {
        if !finished.contains(format!("{id} {}", end.attempt).as_str()) {
            wrong.push(format!("{id}: it succeeded in attempt {}, which never ran to its end", end.attempt));
        }
    }
    Ok(wrong)
}

/// What is kept of a build: a reason that can be true, and of a success its log and its artifact.
async fn whole(endpoints: &Endpoints, id: &str, end: &End) -> Result<(), String> {
    let call = |channel| {
        let request = v1::GetBuildStatusRequest { build_id: id.to_owned(), stale: false };
        async move { BuildServiceClient::new(channel).get_build_status(request).await }
    };
    let status = endpoints.call(ANSWER_LIMIT, call).await.map_err(|error| error.to_string())?.into_inner();
    if IMPOSSIBLE.contains(&status.reason.as_str()) {
        return Err(format!("it failed as {:?}: {}", status.reason, status.message));
    }
    if end.state != "succeeded" {
        return Ok(());
    }
    let lines =
        tokio::time::timeout(ANSWER_LIMIT, log(endpoints, id)).await.map_err(|_| "its log takes too long")??;
    let expected: Vec<String> = (1..=LINES).map(|number| format!("line {number}")).collect();
    if lines != expected {
        return Err(format!("its log is {lines:?}"));
    }
    let bytes = tokio::time::timeout(ANSWER_LIMIT, artifact(endpoints, &status)).await;
    let bytes = bytes.map_err(|_| "its artifact takes too long")??;
    if bytes != format!("{id}\n").as_bytes() {
        return Err(format!("its artifact is {:?}", String::from_utf8_lossy(&bytes)));
    }
    Ok(())
}

/// What the command of the last attempt printed.
async fn log(endpoints: &Endpoints, id: &str) -> Result<Vec<String>, String> {
    let call = |channel| {
        let request = v1::ReadLogRequest { build_id: id.to_owned(), ..v1::ReadLogRequest::default() };
        async move { BuildServiceClient::new(channel).read_log(request).await }
    };
    let answer = endpoints.call(ANSWER_LIMIT, call).await.map_err(|error| format!("its log: {error}"))?;
    let (mut stream, mut lines, mut last) = (answer.into_inner(), Vec::new(), 0);
    while let Some(chunk) = stream.message().await.map_err(|status| format!("its log: {status}"))? {
        for record in chunk.records {
            if record.seq <= last {
                return Err(format!("line {} of its log comes after line {last}", record.seq));
            }
            last = record.seq;
            if record.stream() != v1::LogStream::System {
                lines.push(String::from_utf8_lossy(&record.data).into_owned());
            }
        }
    }
    Ok(lines)
}

async fn artifact(endpoints: &Endpoints, status: &v1::BuildStatus) -> Result<Vec<u8>, String> {
    let artifact = status.artifacts.first().ok_or("it has no artifact")?;
    let digest = Digest::parse(&artifact.digest).map_err(|error| error.to_string())?;
    let call = |channel| {
        let request = v1::GetBlobRequest { sha256: digest.0.to_vec().into(), ..v1::GetBlobRequest::default() };
        async move { BlobServiceClient::new(channel).get_blob(request).await }
    };
    let answer = endpoints.call(ANSWER_LIMIT, call).await.map_err(|error| format!("its artifact: {error}"))?;
    let (mut stream, mut bytes) = (answer.into_inner(), Vec::new());
    while let Some(part) = stream.message().await.map_err(|status| format!("its artifact: {status}"))? {
        bytes.extend(part.data);
    }
    Ok(bytes)
}
