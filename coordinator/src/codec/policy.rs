//! The cluster's policy to and from its durable form.

use helix_core::Policy;
use helix_core::retention::{Rule, Selector};
use helix_proto::store;

use super::CodecError;
use super::parts::{kept, parse_some};

pub(super) fn policy_wire(it: &Policy) -> store::Policy {
    store::Policy {
        worker_lease_ms: it.worker_lease_ms,
        cancel_unverified_after_ms: it.cancel_unverified_after_ms,
        detach_for_ms: it.detach_for_ms,
        infra_retries: it.infra_retries,
        retry_backoff_ms: it.retry_backoff_ms,
        queue_max: it.queue_max,
        copies: it.copies,
        store_deadline_ms: it.store_deadline_ms,
        timeout_default_ms: it.timeout_default_ms,
        timeout_grace_ms: it.timeout_grace_ms,
        retain_ms: it.retain_ms,
        retain_builds: it.retain_builds,
        tombstone_ms: it.tombstone_ms,
        blob_bytes_max: it.blob_bytes_max,
        log_bytes_max: it.log_bytes_max,
        disk_reserve_bytes: it.disk_reserve_bytes,
        quarantine_after: Some(it.quarantine_after),
        quarantine_ms: Some(it.quarantine_ms),
        retain_logs_ms: Some(it.retain_logs_ms),
        retain_artifacts_ms: Some(it.retain_artifacts_ms),
        retain_rules: it.retain_rules.iter().map(|(rule, keep_ms)| rule_wire(rule, *keep_ms)).collect(),
        seal_lost_after_ms: Some(it.seal_lost_after_ms),
        scrub_bytes: Some(it.scrub_bytes),
    }
}

pub(super) fn policy(it: &store::Policy) -> Result<Policy, CodecError> {
    let default = Policy::default();
    Ok(Policy {
        worker_lease_ms: it.worker_lease_ms,
        cancel_unverified_after_ms: it.cancel_unverified_after_ms,
        detach_for_ms: it.detach_for_ms,
        infra_retries: it.infra_retries,
        retry_backoff_ms: it.retry_backoff_ms,
        queue_max: it.queue_max,
        copies: it.copies,
        store_deadline_ms: it.store_deadline_ms,
        timeout_default_ms: it.timeout_default_ms,
        timeout_grace_ms: it.timeout_grace_ms,
        retain_ms: it.retain_ms,
        retain_builds: it.retain_builds,
        tombstone_ms: it.tombstone_ms,
        blob_bytes_max: it.blob_bytes_max,
        log_bytes_max: it.log_bytes_max,
        disk_reserve_bytes: it.disk_reserve_bytes,
        quarantine_after: it.quarantine_after.unwrap_or(default.quarantine_after),
        quarantine_ms: it.quarantine_ms.unwrap_or(default.quarantine_ms),
        retain_logs_ms: it.retain_logs_ms.unwrap_or(default.retain_logs_ms),
        retain_artifacts_ms: it.retain_artifacts_ms.unwrap_or(default.retain_artifacts_ms),
        retain_rules: it.retain_rules.iter().map(rule).collect::<Result<_, _>>()?,
        seal_lost_after_ms: it.seal_lost_after_ms.unwrap_or(default.seal_lost_after_ms),
        scrub_bytes: it.scrub_bytes.unwrap_or(default.scrub_bytes),
    })
}

/// The lowest format whose readers take the policy for what it is: those of format 3 do not know of what is not the default here,
/// and those of format 4 would take no copies for one.
pub(super) fn policy_format(it: &store::Policy) -> u32 {
    if it.copies == 0 {
        return 5;
    }
    let default = policy_wire(&Policy::default());
    let known = |given: Option<u64>, default: Option<u64>| given.is_none() || given == default;
    let old = known(it.retain_logs_ms, default.retain_logs_ms)
        && known(it.retain_artifacts_ms, default.retain_artifacts_ms)
        && known(it.seal_lost_after_ms, default.seal_lost_after_ms)
        && known(it.scrub_bytes, default.scrub_bytes)
        && it.retain_rules.is_empty();
    if old { 1 } else { 4 }
}

fn rule_wire(rule: &Rule, keep_ms: u64) -> store::RetainRule {
    let label = |(key, value): &(String, String)| store::Label { key: key.clone(), value: value.clone() };
    store::RetainRule {
        kept: rule.kept.as_str().to_owned(),
        state: rule.of.state.map(|state| state.as_str().to_owned()),
        label: rule.of.label.as_ref().map(label),
        keep_ms,
    }
}

fn rule(it: &store::RetainRule) -> Result<(Rule, u64), CodecError> {
    let label = it.label.as_ref().map(|label| (label.key.clone(), label.value.clone()));
    let of = Selector { state: parse_some(it.state.clone())?, label };
    Ok((Rule { kept: kept(&it.kept)?, of }, it.keep_ms))
}

/// The command format that all voters must know before somebody asks for this policy.
pub(crate) fn policy_needs(policy: &Policy) -> u32 {
    policy_format(&policy_wire(policy))
}
