//! Reading and changing the cluster's policy, key by key.
//!
//! A change is made from the policy in force and refused when that was replaced meanwhile: then it is made anew, so that
//! two operators who change different keys at once both get what they asked for.

use std::collections::BTreeMap;

use helix_common::config::nearest;
use helix_common::status::{invalid, status, with_metadata};
use helix_core::command::SetPolicy;
use helix_core::policy::{OutOfRange, POLICY_KEYS, PolicyKey};
use helix_core::{Command, Policy, Rejection, Reply};
use helix_model::{ErrorCode, InvalidField};
use helix_proto::v1;
use tonic::Status;

use super::answer;
use super::services::{Services, consistency};
use crate::registry::Consistency;

/// How often a change is made anew because somebody else was faster.
const TRIES: u32 = 8;

/// Since this command format, a change says which policy it was made from.
const FORMAT_NEEDED: u32 = 3;

/// A key and a value that it may have.
type Wish = (&'static PolicyKey, u64);

/// The policy in force.
pub(super) async fn get(services: &Services, request: &v1::GetPolicyRequest) -> Result<v1::GetPolicyResponse, Status> {
    services.freshen(consistency(request.stale)).await?;
    Ok(v1::GetPolicyResponse { keys: keys(&services.registry.policy()) })
}

/// Changes keys of the policy, for somebody.
pub(super) async fn set(
    services: &Services,
    request: &v1::SetPolicyRequest,
    by: &str,
) -> Result<v1::SetPolicyResponse, Status> {
    let values = wishes(&request.values)?;
    let expected = wishes(&request.expected)?;
    if values.is_empty() {
        return Err(invalid(&InvalidField::new("values", "no key is given")));
    }
    expect_known(services)?;
    for _ in 0..TRIES {
        services.freshen(Consistency::Linearizable).await?;
        let before = services.registry.policy();
        let after = changed(&before, &values)?;
        if after != before {
            expect(&before, &expected)?;
            let command = SetPolicy { policy: after.clone(), expected: Some(before.clone()) };
            match services.propose(Command::SetPolicy(command)).await? {
                Reply::Rejected(Rejection::PolicyChanged) => continue,
                reply => answer::expect_done(&reply)?,
            }
            log(&before, &after, by);
        }
        return Ok(v1::SetPolicyResponse { before: keys(&before), after: keys(&after) });
    }
    Err(status(ErrorCode::PolicyChanged, "others kept changing the policy at the same time: try again"))
}

fn keys(policy: &Policy) -> Vec<v1::PolicyKey> {
    let default = Policy::default();
    let key = |key: &PolicyKey| v1::PolicyKey {
        name: key.name.to_owned(),
        value: key.value(policy),
        default_value: key.value(&default),
        min: key.min,
        max: key.max,
        about: key.about.to_owned(),
    };
    POLICY_KEYS.iter().map(key).collect()
}

/// All of them are known and in range, or none is taken.
// A status is what the caller answers with; boxing it would only be undone there.
#[allow(clippy::result_large_err)]
fn wishes(given: &BTreeMap<String, u64>) -> Result<Vec<Wish>, Status> {
    let wish = |(name, value): (&String, &u64)| {
        let key = PolicyKey::named(name).ok_or_else(|| unknown(name))?;
        key.check(*value).map_err(|wrong| out_of_range(&wrong))?;
        Ok((key, *value))
    };
    given.iter().map(wish).collect()
}

fn unknown(name: &str) -> Status {
    let near = nearest(name, POLICY_KEYS.iter().map(|key| key.name));
    let near = near.map_or_else(String::new, |near| format!("; the nearest is {near}"));
    let text = format!("the policy has no key {name:?}{near}");
    with_metadata(ErrorCode::InvalidField, text, [("field", name)])
}

fn out_of_range(wrong: &OutOfRange) -> Status {
    let (min, max) = (wrong.key.min.to_string(), wrong.key.max.to_string());
    let facts = [("field", wrong.key.name), ("min", &min), ("max", &max)];
    with_metadata(ErrorCode::InvalidField, wrong.to_string(), facts)
}

#[allow(clippy::result_large_err)]
fn changed(before: &Policy, values: &[Wish]) -> Result<Policy, Status> {
    let mut after = before.clone();
    for (key, value) in values {
        key.put(&mut after, *value).map_err(|wrong| out_of_range(&wrong))?;
    }
    Ok(after)
}

#[allow(clippy::result_large_err)]
fn expect(before: &Policy, expected: &[Wish]) -> Result<(), Status> {
    match expected.iter().find(|(key, value)| key.value(before) != *value) {
        None => Ok(()),
        Some((key, value)) => {
            let found = key.value(before).to_string();
            let text = format!("{} is {found}, not {value} as was expected: nothing was changed", key.name);
            Err(with_metadata(ErrorCode::PolicyChanged, text, [("field", key.name), ("found", &found)]))
        }
    }
}

/// A coordinator that does not know the command would stop at it.
#[allow(clippy::result_large_err)]
fn expect_known(services: &Services) -> Result<(), Status> {
    let voters = services.registry.voters();
    let nodes = services.registry.nodes();
    let older = nodes.iter().find(|node| voters.contains(&node.id) && node.format < FORMAT_NEEDED);
    older.map_or(Ok(()), |node| {
        let text = format!(
            "coordinator {} has version {}, which cannot follow this: upgrade it first",
            node.id.0, node.version
        );
        Err(status(ErrorCode::UpgradePending, text))
    })
}

fn log(before: &Policy, after: &Policy, by: &str) {
    for key in POLICY_KEYS {
        let (from, to) = (key.value(before), key.value(after));
        if from != to {
            tracing::info!(key = key.name, from, to, by, "the policy was changed");
        }
    }
}
