//! Storing once more what too few coordinators hold.

use std::time::Duration;

use helix_agent_core::{Report, Verdict};
use helix_model::{AttemptKey, Reason};

use super::finish::store_log;
use crate::services::Services;

/// Before anything is sent: where the registry finds too few again, it is not asked at the pace of the network.
const PAUSE: Duration = Duration::from_millis(500);

/// A report whose outputs and log were stored again. A success for which that cannot be done within the time that the policy gives is none: its
/// build ends, and its log is stored behind it.
pub(crate) async fn store_again(services: &Services, key: &AttemptKey, report: &Report) -> Report {
    tokio::time::sleep(PAUSE).await;
    let deadline = services.stores.nodes().settings().await.store_deadline;
    let mut stored = report.clone();
    let in_time = tokio::time::timeout(deadline, store(services, key, &mut stored)).await;
    if in_time.is_err() && matches!(stored.verdict, Verdict::Succeeded { .. }) {
        fail(&mut stored, format!("outputs and log could not be stored again within {deadline:?}"));
    }
    stored
}

async fn store(services: &Services, key: &AttemptKey, report: &mut Report) {
    for artifact in &mut report.artifacts {
        match services.stores.put_again(&artifact.blob).await {
            Ok(blob) => artifact.blob = blob,
            Err(error) => {
                let message = format!("the output {:?} is lost: {error}", artifact.name);
                fail(report, message);
                break;
            }
        }
    }
    if let Some(log) = &mut report.log {
        match services.stores.put_again(&log.blob).await {
            Ok(blob) => log.blob = blob,
            // Nobody has it any more, but what it was sealed from is still here.
            Err(error) => match store_log(services, services.data.attempt(key)).await {
                Ok(sealed) => *log = sealed,
                Err((_, message)) => tracing::error!(attempt = %key, %error, message, "the log is lost"),
            },
        }
    }
}

fn fail(report: &mut Report, message: String) {
    report.verdict = Verdict::Failed { reason: Reason::Artifact, message };
    report.artifacts.clear();
}
