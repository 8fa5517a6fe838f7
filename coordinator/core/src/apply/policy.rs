//! Replacing the cluster's policy. Values that would break the cluster are refused, and so is a change of a policy that
//! somebody else changed meanwhile.

use crate::command::SetPolicy;
use crate::policy::check;
use crate::record::{Applied, Row, RowChange};
use crate::reply::{Rejection, Reply};
use crate::state::State;

use super::Outcome;

pub(super) fn set_policy(state: &mut State, c: &SetPolicy, out: &mut Applied) -> Outcome {
    check(&c.policy).map_err(Rejection::PolicyInvalid)?;
    // Before the comparison: whoever asks again for what was done is told so.
    if state.policy == c.policy {
        return Ok(Reply::Unchanged);
    }
    if c.expected.as_ref().is_some_and(|expected| *expected != state.policy) {
        return Err(Rejection::PolicyChanged);
    }
    state.replace_policy(c.policy.clone());
    out.rows.push(RowChange::Put(Row::Policy(c.policy.clone())));
    Ok(Reply::Done)
}
