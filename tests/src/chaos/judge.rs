//! What must be true of builds, looked at when nothing is broken.

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

/// What was judged so far.
#[derive(Default)]
pub(super) struct Judge {
    /// Builds that need not be looked at again.
    judged: BTreeSet<String>,
    ends: BTreeMap<String, End>,
    wrong: Vec<String>,
}

impl Judge {
    /// Waits until the builds that were tried before some time have ended, and looks at what is kept of them. How many.
    ///
    /// # Errors
    /// When the cluster cannot be asked.
    pub(super) fn look(
        &mut self,
        runtime: &Runtime,
        site: &Site,
        load: &Load,
        before: Duration,
        patience: Duration,
    ) -> anyhow::Result<usize> {
        let endpoints = site.endpoints()?;
        let tried: Vec<String> = load.history().tried_before(before);
        let ids: Vec<String> = tried.into_iter().filter(|id| !self.judged.contains(id)).collect();
        let deadline = Instant::now() + patience;
        let looked = futures::stream::iter(&ids)
            .map(|id| {
                let endpoints = &endpoints;
                async move { (id, judge_one(load, endpoints, id, deadline).await) }
            })
            .buffer_unordered(AT_ONCE);
        for (id, found) in runtime.block_on(looked.collect::<Vec<_>>()) {
            match found {
                Ok(end) => self.ends.extend(end.map(|end| (id.clone(), end))),
                Err(Flaw::Live(seen)) => {
                    let explained = site.helix(&["explain", id]).unwrap_or_else(|error| error.to_string());
                    self.wrong.push(format!(
                        "{id}: it has not ended after {patience:?} without faults: {seen:?}; {explained}"
                    ));
                }
                Err(Flaw::Other(end, why)) => {
                    self.ends.extend(end.map(|end| (id.clone(), end)));
                    self.wrong.push(format!("{id}: {why}"));
                }
            }
            self.judged.insert(id.clone());
        }
        Ok(ids.len())
    }

    /// Everything that is wrong, once everything was looked at.
    ///
    /// # Errors
    /// When the cluster cannot be asked.
    pub(super) fn conclude(mut self, site: &Site, load: &Load) -> anyhow::Result<Vec<String>> {
        self.wrong.extend(load.history().check());
        self.wrong.extend(dated(load));
        self.wrong.extend(load.refused());
        self.wrong.extend(phantoms(site, load)?);
        self.wrong.extend(counted(site, &self.ends)?);
        Ok(self.wrong)
    }
}

/// What is wrong with a build.
enum Flaw {
    /// It does not end.
    Live(Seen),
    /// In words.
    Other(Option<End>, String),
}

/// Waits for a build's end, if it has ever begun, and looks at what is kept of it.
async fn judge_one(load: &Load, endpoints: &Endpoints, id: &str, deadline: Instant) -> Result<Option<End>, Flaw> {
    let end = loop {
        match load.look(endpoints, id).await {
            Ok(Seen::Ended { end, .. }) => break end,
            // Never acknowledged, and never there. The history says if somebody was told otherwise.
            Ok(Seen::Absent) => return Ok(None),
            Ok(other) if Instant::now() > deadline => return Err(Flaw::Live(other)),
            Ok(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            Err(why) => return Err(Flaw::Other(None, format!("nobody tells of it: {why}"))),
        }
    };
    match whole(endpoints, id, &end).await {
        Ok(()) => Ok(Some(end)),
        Err(why) => Err(Flaw::Other(Some(end), why)),
    }
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
fn phantoms(site: &Site, load: &Load) -> anyhow::Result<Vec<String>> {
    let tried = load.history().tried_before(Duration::MAX);
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
