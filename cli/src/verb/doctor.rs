//! `helix doctor`: what an operator would look at first, each with a verdict and what to do.
//!
//! Every check goes on after one that failed, as far as it makes sense: who is down is worth as much as who is up.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Args;
use futures::future::join_all;
use helix_common::channel::{self, Traffic};
use helix_common::pki;
use helix_common::tls::{TlsFiles, TlsStore};
use helix_proto::v1;
use serde_json::json;

use crate::connection::{cluster, workers};
use crate::context::{Context, ContextOptions};
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::{Format, Item, Output, size_text};

/// How long one coordinator may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Certificates that end sooner than this are worth a word.
const RENEW_BEFORE: Duration = Duration::from_secs(30 * 24 * 3600);

/// A clock this far from ours is worth a word; from the second on, certificates and log times mislead.
const SKEW_WARN: Duration = Duration::from_secs(2);
const SKEW_FAIL: Duration = Duration::from_secs(60);

/// Entries that a member may be behind the newest.
const BEHIND_MAX: u64 = 10_000;

/// `helix doctor`.
#[derive(Args)]
pub(crate) struct DoctorArguments {}

/// What a check found.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One line of the report.
#[derive(Debug)]
struct Finding {
    check: String,
    verdict: Verdict,
    /// What is the case.
    text: String,
    /// What to do; empty when nothing.
    advice: String,
}

#[derive(Default)]
struct Report(Vec<Finding>);

impl Report {
    fn note(&mut self, check: impl Into<String>, verdict: Verdict, text: impl Into<String>, advice: impl Into<String>) {
        self.0.push(Finding { check: check.into(), verdict, text: text.into(), advice: advice.into() });
    }

    fn ok(&mut self, check: impl Into<String>, text: impl Into<String>) {
        self.note(check, Verdict::Ok, text, "");
    }

    fn warn(&mut self, check: impl Into<String>, text: impl Into<String>, advice: impl Into<String>) {
        self.note(check, Verdict::Warn, text, advice);
    }

    fn fail(&mut self, check: impl Into<String>, text: impl Into<String>, advice: impl Into<String>) {
        self.note(check, Verdict::Fail, text, advice);
    }

    fn print(&self, output: &Output) {
        if output.format == Format::Table {
            for Finding { check, verdict, text, advice } in &self.0 {
                output.line(&format!("{:<5} {check}: {text}", verdict.word()));
                if !advice.is_empty() {
                    output.line(&format!("      -> {advice}"));
                }
            }
            return;
        }
        let item = |finding: &Finding| Item {
            name: format!("{} {}", finding.verdict.word(), finding.check),
            cells: Vec::new(),
            json: json!({
                "check": finding.check,
                "verdict": finding.verdict.word(),
                "text": finding.text,
                "advice": crate::output::text_json(&finding.advice),
            }),
        };
        output.items(&[], &self.0.iter().map(item).collect::<Vec<_>>());
    }

    /// 0 unless something fails; 125 when no coordinator answers.
    fn code(&self, silent: bool) -> Code {
        match self.0.iter().map(|finding| finding.verdict).max() {
            Some(Verdict::Fail) if silent => Code::UNREACHABLE,
            Some(Verdict::Fail) => Code::ERROR,
            Some(Verdict::Ok | Verdict::Warn) | None => Code::SUCCESS,
        }
    }
}

pub(crate) async fn run(_: DoctorArguments, options: &ContextOptions, output: &Output) -> Result<Code, Failure> {
    let mut report = Report::default();
    let mut silent = false;
    if let Some((context, tls)) = look_at_context(options, &mut report) {
        let answers = look_at_endpoints(&context, &tls, &mut report).await;
        silent = answers.is_empty();
        look_at_quorum(&answers, &mut report);
        look_at_workers(&answers, &tls, &mut report).await;
    }
    report.print(output);
    Ok(report.code(silent))
}

/// The context, its files, and what its certificates say. `None` when nobody can be asked with it.
fn look_at_context(options: &ContextOptions, report: &mut Report) -> Option<(Context, Arc<TlsStore>)> {
    let context = match options.load() {
        Ok(context) => context,
        Err(failure) => {
            report.fail("context", failure.message, "name a context with --context or HELIX_CONTEXT");
            return None;
        }
    };
    let count = context.endpoints.len();
    report.ok("context", format!("cluster {}, {count} endpoints", context.cluster));
    let open = std::fs::metadata(&context.key).is_ok_and(|key| key.mode() & 0o077 != 0);
    if open {
        let key = context.key.display();
        report.warn("key", format!("{key} may be read by others"), format!("chmod 0600 {key}"));
    }
    look_at_end("authority", &context.ca, "make and spread a new one: see the runbook", report);
    look_at_end("certificate", &context.cert, "issue it again with `helix pki issue --force`", report);
    let files =
        TlsFiles { ca: context.ca.clone(), cert: context.cert.clone(), key: context.key.clone(), revoked: None };
    let tls = match TlsStore::load(files) {
        Ok(tls) => tls,
        Err(error) => {
            report.fail("identity", error.to_string(), "give the context the files of one `helix pki issue`");
            return None;
        }
    };
    let own = tls.own_identity();
    if own.cluster.as_str() == context.cluster {
        report.ok("identity", own.to_string());
    } else {
        let text = format!("{own} is of another cluster than {}", context.cluster);
        report.fail("identity", text, "take the identity, or the context, of the cluster you mean");
        return None;
    }
    Some((context, tls))
}

fn look_at_end(check: &str, path: &Path, advice: &str, report: &mut Report) {
    let shown = std::fs::read_to_string(path)
        .map_err(|error| error.to_string())
        .and_then(|pem| pki::show(&pem).map_err(|error| error.to_string()));
    match shown {
        Ok(info) => note_end(check, info.not_after.into(), advice, report),
        Err(error) => report.fail(check, format!("{}: {error}", path.display()), "the context names the wrong file"),
    }
}

/// Says when a certificate ends.
fn note_end(check: &str, end: SystemTime, advice: &str, report: &mut Report) {
    let left = end.duration_since(SystemTime::now());
    match left {
        Err(_) => report.fail(check, "has expired", advice),
        Ok(left) if left < RENEW_BEFORE => {
            report.warn(check, format!("expires in {} days", left.as_secs() / 86_400), advice);
        }
        Ok(left) => report.ok(check, format!("valid for {} days", left.as_secs() / 86_400)),
    }
}

/// Of somebody else's certificate (Unix milliseconds, 0 where that is not known) only what has to be done.
fn note_end_there(check: &str, not_after_ms: i64, daemon: &str, report: &mut Report) {
    let Some(ms) = u64::try_from(not_after_ms).ok().filter(|ms| *ms > 0) else { return };
    let end = UNIX_EPOCH + Duration::from_millis(ms);
    if end < SystemTime::now() + RENEW_BEFORE {
        let advice = format!("issue it again, carry it there, reload the {daemon}");
        note_end(&format!("{check}, its certificate"), end, &advice, report);
    }
}

/// A coordinator that answered.
struct Answer {
    endpoint: String,
    status: v1::ClusterStatus,
}

async fn look_at_endpoints(context: &Context, tls: &Arc<TlsStore>, report: &mut Report) -> Vec<Answer> {
    let asked = join_all(context.endpoints.iter().map(|endpoint| async move { (endpoint, ask(endpoint, tls).await) }));
    let mut answers = Vec::new();
    for (endpoint, answer) in asked.await {
        let check = format!("endpoint {endpoint}");
        let (status, took, skew) = match answer {
            Ok(answer) => answer,
            Err(why) => {
                report.fail(check, why, "is the coordinator up, its port open, its certificate of this cluster?");
                continue;
            }
        };
        report.ok(&check, format!("coordinator {} answers in {} ms", status.node, took.as_millis()));
        let (ahead, by) = skew;
        let text = format!("its clock is {:.1} s {} ours", by.as_secs_f64(), if ahead { "ahead of" } else { "behind" });
        let advice = "synchronise the clocks of both hosts (NTP)";
        if by >= SKEW_FAIL {
            report.fail(&check, text, advice);
        } else if by >= SKEW_WARN {
            report.warn(&check, text, advice);
        }
        look_at_node(&check, &status, report);
        answers.push(Answer { endpoint: endpoint.clone(), status });
    }
    answers
}

/// What a coordinator says of itself.
fn look_at_node(check: &str, status: &v1::ClusterStatus, report: &mut Report) {
    note_end_there(check, status.certificate_not_after_ms, "coordinator", report);
    if status.free_bytes > 0 {
        let (free, reserve) = (size_text(status.free_bytes), size_text(status.reserve_bytes));
        let check = format!("{check}, its disk");
        let advice = "free some, or give it a larger one: see the runbook";
        if status.free_bytes < status.reserve_bytes {
            report.fail(check, format!("{free} free, less than the reserve of {reserve}: it takes no submits"), advice);
        } else if status.free_bytes < status.reserve_bytes.saturating_mul(2) {
            report.warn(check, format!("{free} free, and {reserve} are kept in reserve"), advice);
        } else {
            report.ok(check, format!("{free} free"));
        }
    }
    if let Some(blobs) = &status.blobs {
        let check = format!("{check}, its blobs");
        if blobs.damaged > 0 {
            let text = format!("{} are damaged on its disk, and a good copy is looked for", blobs.damaged);
            report.warn(
                &check,
                text,
                "if it stays, bring back the other coordinators; look at the disk (`dmesg`, SMART)",
            );
        }
        if blobs.lost > 0 {
            let some = blobs.lost_sha256.join(", ");
            let text = format!("{} that builds name have no good copy on any coordinator: {some}", blobs.lost);
            report.fail(&check, text, "bring back who held them: see the runbook, A blob is damaged");
        }
    }
    let told = ["disk_reserve", "blobs_damaged", "blobs_lost"];
    for warning in status.warnings.iter().filter(|warning| !told.contains(&warning.as_str())) {
        report.warn(check, format!("it warns of {warning}"), "look into its log");
    }
}

/// What a coordinator says, how long that took, and how far its clock is from ours (ahead of it or not).
type Told = (v1::ClusterStatus, Duration, (bool, Duration));

async fn ask(endpoint: &str, tls: &Arc<TlsStore>) -> Result<Told, String> {
    let asked = async {
        let channel = channel::connect(endpoint, tls, tls.expect_any(), Traffic::Control).await;
        let channel = channel.map_err(|error| error.to_string())?;
        // The answer alone is timed: a handshake would look like a clock that is behind.
        let begun = Instant::now();
        let answer = cluster(channel).get_cluster_status(v1::GetClusterStatusRequest { stale: true }).await;
        let status = answer.map_err(|status| status.message().to_owned())?.into_inner();
        Ok::<_, String>((status, begun.elapsed()))
    };
    let (status, took) = tokio::time::timeout(PATIENCE, asked)
        .await
        .map_err(|_| format!("no answer within {} s", PATIENCE.as_secs()))??;
    let skew = skew(status.now_ms, took, SystemTime::now());
    Ok((status, took, skew))
}

/// Whether a clock that said `theirs_ms` in the middle of an exchange is ahead of ours, and by how much at least.
fn skew(theirs_ms: i64, took: Duration, now: SystemTime) -> (bool, Duration) {
    let Some(theirs) = u64::try_from(theirs_ms).ok().filter(|ms| *ms > 0) else { return (false, Duration::ZERO) };
    let (theirs, ours) = (UNIX_EPOCH + Duration::from_millis(theirs), now - took / 2);
    match theirs.duration_since(ours) {
        Ok(ahead) => (true, ahead.saturating_sub(took / 2)),
        Err(behind) => (false, behind.duration().saturating_sub(took / 2)),
    }
}

/// Who leads, and how many may still be lost.
fn look_at_quorum(answers: &[Answer], report: &mut Report) {
    let Some(newest) = answers.iter().max_by_key(|answer| answer.status.term) else {
        report.fail("cluster", "no coordinator answers", "start the coordinators, or look at the way there");
        return;
    };
    let status = &newest.status;
    if status.leader == 0 {
        let advice = "a majority of the coordinators has to run and to reach each other: see the runbook, No leader";
        report.fail("leader", "there is none: nothing is decided, and builds that run go on", advice);
        return;
    }
    let others: Vec<String> = answers
        .iter()
        .filter(|answer| answer.status.leader != status.leader)
        .map(|answer| format!("{} says {}", answer.endpoint, answer.status.leader))
        .collect();
    if others.is_empty() {
        report.ok("leader", format!("coordinator {}, term {}", status.leader, status.term));
    } else {
        let text = format!("coordinator {}, but {}", status.leader, others.join(", "));
        report.warn("leader", text, "look again in a moment; if it stays, a coordinator is cut off from the others");
    }
    // Only the leader hears all members.
    let seen =
        answers.iter().find(|answer| answer.status.node == status.leader).map_or(status, |leader| &leader.status);
    look_at_members(seen, report);
}

fn look_at_members(status: &v1::ClusterStatus, report: &mut Report) {
    let voters: Vec<_> = status.members.iter().filter(|member| member.role != "learner").collect();
    let healthy = voters.iter().filter(|member| member.healthy).count();
    let needed = voters.len() / 2 + 1;
    let text = format!("{healthy} of {} voters are heard, {needed} are needed", voters.len());
    if healthy < needed {
        report.fail("quorum", text, "start those that are missing");
    } else if healthy == needed && voters.len() > 1 {
        report.warn("quorum", format!("{text}: none more may be lost"), "start those that are missing");
    } else {
        report.ok("quorum", text);
    }
    let newest = status.members.iter().map(|member| member.last_log_index).max().unwrap_or(0);
    for member in &status.members {
        let check = format!("coordinator {}", member.id);
        if !member.healthy {
            report.fail(check, format!("is not heard at {}", member.address), "start it, or look at the way there");
        } else if newest.saturating_sub(member.applied_index) > BEHIND_MAX {
            let text = format!("is {} entries behind", newest - member.applied_index);
            report.warn(check, text, "it catches up by itself unless its disk is too slow");
        }
    }
}

async fn look_at_workers(answers: &[Answer], tls: &Arc<TlsStore>, report: &mut Report) {
    let leader = answers.iter().find(|answer| answer.status.leader == answer.status.node).or(answers.first());
    let Some(answer) = leader else { return };
    let asked = async {
        let channel = channel::connect(&answer.endpoint, tls, tls.expect_any(), Traffic::Control).await;
        let channel = channel.map_err(|error| error.to_string())?;
        let found = workers(channel).list_workers(v1::ListWorkersRequest {}).await;
        found.map(|found| found.into_inner().workers).map_err(|status| status.message().to_owned())
    };
    let found = tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(|_| Err("no answer in time".to_owned()));
    match found {
        Ok(found) => judge_workers(&found, answer.status.totals.unwrap_or_default().queued, report),
        Err(why) => report.fail("workers", why, "workers are told by the leader: see above"),
    }
}

fn judge_workers(found: &[v1::WorkerStatus], queued: u64, report: &mut Report) {
    let healthy = found.iter().filter(|worker| worker.healthy).count();
    let text = format!("{healthy} of {} are connected, {queued} builds wait", found.len());
    if healthy == 0 {
        report.fail("workers", format!("{text}: nothing can run"), "start an agent, or look at its log");
    } else {
        report.ok("workers", text);
    }
    for worker in found {
        let check = format!("worker {}", worker.name);
        if worker.held {
            let text = "is held: an attempt on it ended without proof that its processes are dead";
            report.warn(&check, text, "bring its agent back, or `helix workers remove` it if the host is gone");
        } else if !worker.healthy {
            let text = if worker.standing == "detached" { "is away for an upgrade" } else { "has no session" };
            report.warn(&check, text, "look at its agent; `helix workers remove` it if the host is gone");
        }
        if worker.quarantined_until_ms > 0 {
            report.warn(&check, "is quarantined after failures of its own", "`helix workers show` names the builds");
        }
        if worker.draining {
            report.warn(&check, "is draining", "`helix workers undrain` gives it work again");
        }
        note_end_there(&check, worker.certificate_not_after_ms, "agent", report);
        if !worker.pressure.is_empty() {
            report.warn(&check, format!("is under pressure: {}", worker.pressure), "free what it lacks");
        }
    }
}

#[cfg(test)]
mod tests;
