//! Reading and changing the cluster's policy, key by key.
//!
//! A change is made from the policy in force and refused when that was replaced meanwhile: then it is made anew, so that
//! two operators who change different keys at once both get what they asked for.

use std::collections::BTreeMap;

use helix_common::config::nearest;
use helix_common::status::{invalid, status, with_metadata};
use helix_core::command::SetPolicy;
use helix_core::policy::{OutOfRange, POLICY_KEYS, Setting, check};
use helix_core::{Command, Policy, Rejection, Reply};
use helix_model::{ErrorCode, InvalidField};
use helix_proto::v1;
use tonic::Status;

use super::answer;
use super::services::{Services, consistency};
use crate::codec::policy_needs;
use crate::registry::Consistency;

/// How often a change is made anew because somebody else was faster.
const TRIES: u32 = 8;

/// Since this command format, a change says which policy it was made from.
const FORMAT_NEEDED: u32 = 3;

/// A key or a rule, and a value that it may have.
type Wish = (Setting, u64);

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
    let reset = request.reset.iter().map(|name| setting(name)).collect::<Result<Vec<_>, _>>()?;
    if values.is_empty() && reset.is_empty() {
        return Err(invalid(&InvalidField::new("values", "no key is given")));
    }
    if let Some(twice) = reset.iter().find(|setting| values.iter().any(|(other, _)| other == *setting)) {
        let why = format!("{} cannot be set and reset at once", twice.name());
        return Err(invalid(&InvalidField::new("reset", why)));
    }
    for _ in 0..TRIES {
        services.freshen(Consistency::Linearizable).await?;
        let before = services.registry.policy();
        let after = changed(&before, &values, &reset)?;
        expect_known(services, policy_needs(&before).max(policy_needs(&after)))?;
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
    let default = Policy::of_new_clusters();
    let key = |setting: Setting| {
        let key = setting.key();
        v1::PolicyKey {
            name: setting.name(),
            value: setting.value(policy).unwrap_or_default(),
            // Without a rule, its key's own value counts.
            default_value: setting.value(&default).unwrap_or_else(|| key.value(policy)),
            min: key.min,
            max: key.max,
            about: key.about.to_owned(),
        }
    };
    Setting::all(policy).map(key).collect()
}

/// All of them are known and in range, or none is taken.
// A status is what the caller answers with; boxing it would only be undone there.
#[allow(clippy::result_large_err)]
fn wishes(given: &BTreeMap<String, u64>) -> Result<Vec<Wish>, Status> {
    let wish = |(name, value): (&String, &u64)| {
        let setting = setting(name)?;
        setting.key().check(*value).map_err(|wrong| out_of_range(&wrong))?;
        Ok((setting, *value))
    };
    given.iter().map(wish).collect()
}

#[allow(clippy::result_large_err)]
fn setting(name: &str) -> Result<Setting, Status> {
    let malformed = |why: String| with_metadata(ErrorCode::InvalidField, why, [("field", name)]);
    Setting::named(name).map_err(malformed)?.ok_or_else(|| unknown(name))
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
fn changed(before: &Policy, values: &[Wish], reset: &[Setting]) -> Result<Policy, Status> {
    let mut after = before.clone();
    reset.iter().for_each(|setting| setting.reset(&mut after));
    for (setting, value) in values {
        setting.put(&mut after, *value).map_err(|wrong| out_of_range(&wrong))?;
    }
    check(&after).map_err(|why| invalid(&InvalidField::new("values", why)))?;
    Ok(after)
}

#[allow(clippy::result_large_err)]
fn expect(before: &Policy, expected: &[Wish]) -> Result<(), Status> {
    match expected.iter().find(|(setting, value)| setting.value(before) != Some(*value)) {
        None => Ok(()),
        Some((setting, value)) => {
            let found = setting.value(before).map_or_else(|| "unset".to_owned(), |found| found.to_string());
            let name = setting.name();
            let text = format!("{name} is {found}, not {value} as was expected: nothing was changed");
            Err(with_metadata(ErrorCode::PolicyChanged, text, [("field", name.as_str()), ("found", &found)]))
        }
    }
}

/// A coordinator that does not know the command would stop at it.
#[allow(clippy::result_large_err)]
fn expect_known(services: &Services, needed: u32) -> Result<(), Status> {
    let needed = needed.max(FORMAT_NEEDED);
    let voters = services.registry.voters();
    let nodes = services.registry.nodes();
    let older = nodes.iter().find(|node| voters.contains(&node.id) && node.format < needed);
    older.map_or(Ok(()), |node| {
        let text = format!(
            "coordinator {} has version {}, which cannot follow this: upgrade it first",
            node.id.0, node.version
        );
        Err(status(ErrorCode::UpgradePending, text))
    })
}

fn log(before: &Policy, after: &Policy, by: &str) {
    let named = |policy| Setting::all(policy).map(|setting| (setting.name(), setting)).collect::<BTreeMap<_, _>>();
    let mut all = named(before);
    all.extend(named(after));
    for (key, setting) in all {
        let (from, to) = (setting.value(before), setting.value(after));
        if from != to {
            tracing::info!(key, from, to, by, "the policy was changed");
        }
    }
}
