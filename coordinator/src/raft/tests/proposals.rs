//! Proposals in pieces: how they are cut, and what is said of the whole when the pieces fare differently.

use helix_core::command::RetireNode;
use helix_core::{Command, Reply};
use helix_model::NodeId;
use tokio::task::JoinHandle;

use super::harness::{Backstage, submit_with};
use crate::registry::{ENTRY_BYTES, ENTRY_COMMANDS, ProposeError};

type Outcome = Result<Vec<Reply>, ProposeError>;

/// What was said of commands whose pieces fared so.
async fn told(pieces: &[Outcome]) -> Outcome {
    let Backstage { registry, mut proposals, .. } = Backstage::new();
    // Each is too large to share an entry with another.
    let large = |number| submit_with(&format!("b{number}"), &"x".repeat(ENTRY_BYTES));
    let commands = (0..pieces.len()).map(large).collect();
    let whole: JoinHandle<Outcome> = tokio::spawn(async move { registry.propose_forwarded(commands).await });
    for piece in pieces {
        proposals.recv().await.unwrap().reply.send(piece.clone()).unwrap();
    }
    whole.await.unwrap()
}

#[tokio::test]
async fn the_whole_is_said_to_be_refused_only_where_no_piece_is_committed() {
    let done = || Ok(vec![Reply::Done]);
    let refused = || Err(ProposeError::NoLeader { hint: None });
    let unknown = || Err(ProposeError::OutcomeUnknown);
    for (pieces, expected) in [
        (vec![done(), done()], Ok(vec![Reply::Done, Reply::Done])),
        (vec![refused(), refused()], refused()),
        (vec![done(), refused()], unknown()),
        (vec![refused(), done()], unknown()),
        (vec![done(), Err(ProposeError::ShuttingDown)], unknown()),
        (vec![refused(), unknown()], unknown()),
    ] {
        assert_eq!(told(&pieces).await, expected, "{pieces:?}");
    }
}

#[tokio::test]
async fn as_many_commands_as_a_follower_sends_on_in_one_call_are_one_piece() {
    let Backstage { registry, mut proposals, .. } = Backstage::new();
    let commands = vec![Command::RetireNode(RetireNode { node: NodeId(9) }); ENTRY_COMMANDS + 1];
    let whole = tokio::spawn(async move { registry.propose_forwarded(commands).await });
    for expected in [ENTRY_COMMANDS, 1] {
        let piece = proposals.recv().await.unwrap();
        assert_eq!(piece.commands.len(), expected);
        piece.reply.send(Ok(vec![Reply::Done; expected])).unwrap();
    }
    assert_eq!(whole.await.unwrap().unwrap().len(), ENTRY_COMMANDS + 1);
}
