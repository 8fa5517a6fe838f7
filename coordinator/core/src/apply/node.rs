//! Coordinators make themselves known, and leave. An id belongs for ever to the data directory that came with it first,
//! and to nobody once that was removed.

use helix_model::LogTime;

use crate::command::{RegisterNode, RetireNode};
use crate::effect::Effect;
use crate::record::{Applied, NodeRecord, Row, RowChange};
use crate::reply::{Rejection, Reply};
use crate::state::State;

use super::Outcome;

pub(super) fn register_node(state: &mut State, c: &RegisterNode, out: &mut Applied) -> Outcome {
    let record = NodeRecord {
        id: c.node,
        epoch: c.epoch,
        grpc: c.grpc.clone(),
        version: c.version.clone(),
        format: c.format,
        removed_at: None,
    };
    match state.nodes.get(&c.node) {
        Some(known) if known.removed_at.is_some() => return Err(Rejection::NodeRemoved { node: c.node }),
        Some(known) if known.epoch != c.epoch => return Err(Rejection::NodeEpochTaken { node: c.node }),
        Some(known) if *known == record => return Ok(Reply::Unchanged),
        Some(_) | None => {}
    }
    put_node(state, record, out);
    Ok(Reply::Done)
}

pub(super) fn retire_node(state: &mut State, at: LogTime, c: &RetireNode, out: &mut Applied) -> Outcome {
    if state.voters().contains(&c.node) {
        return Err(Rejection::NodeVotes { node: c.node });
    }
    // One that never made itself known has used its id all the same.
    let known = state.nodes.get(&c.node).cloned();
    let known = known.unwrap_or_else(|| NodeRecord {
        id: c.node,
        epoch: 0,
        grpc: String::new(),
        version: String::new(),
        format: 0,
        removed_at: None,
    });
    if known.removed_at.is_some() {
        return Ok(Reply::Unchanged);
    }
    put_node(state, NodeRecord { removed_at: Some(at), ..known }, out);
    Ok(Reply::Done)
}

fn put_node(state: &mut State, record: NodeRecord, out: &mut Applied) {
    state.nodes.insert(record.id, record.clone());
    out.rows.push(RowChange::Put(Row::Node(record)));
    out.effects.push(Effect::NodeChanged);
}
