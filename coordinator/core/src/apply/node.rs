//! A coordinator makes itself known. An id belongs for ever to the data directory that came with it first.

use crate::command::RegisterNode;
use crate::effect::Effect;
use crate::record::{Applied, NodeRecord, Row, RowChange};
use crate::reply::{Rejection, Reply};
use crate::state::State;

use super::Outcome;

pub(super) fn register_node(state: &mut State, c: &RegisterNode, out: &mut Applied) -> Outcome {
    let record =
        NodeRecord { id: c.node, epoch: c.epoch, grpc: c.grpc.clone(), version: c.version.clone(), format: c.format };
    match state.nodes.get(&c.node) {
        Some(known) if known.epoch != c.epoch => return Err(Rejection::NodeEpochTaken { node: c.node }),
        Some(known) if *known == record => return Ok(Reply::Unchanged),
        Some(_) | None => {}
    }
    state.nodes.insert(c.node, record.clone());
    out.rows.push(RowChange::Put(Row::Node(record)));
    out.effects.push(Effect::NodeChanged);
    Ok(Reply::Done)
}
