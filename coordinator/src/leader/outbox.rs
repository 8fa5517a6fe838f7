//! What is on its way to one agent: a bounded queue, and how the session's stream ends.
//!
//! Nobody waits for an agent here: a message that finds the queue full is not taken, and the session ends.
//! Invariant: after [`Outbox::end`] nothing more is queued; what was queued before is still delivered if the agent reads.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use futures::Stream;
use helix_proto::agent;
use helix_proto::agent::coordinator_message::Message;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::Status;

/// Messages queued for one agent: an assignment for each of its slots, and room for the rest.
pub(crate) const QUEUED_MAX: usize = 512;

/// The sending side; clones share one queue.
#[derive(Clone, Debug)]
pub(crate) struct Outbox {
    queue: mpsc::Sender<Message>,
    ended: CancellationToken,
    status: Arc<OnceLock<Status>>,
}

/// The message found no room, or the stream is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct NotQueued;

/// The stream that the agent reads.
pub struct Outgoing {
    queue: mpsc::Receiver<Message>,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    status: Arc<OnceLock<Status>>,
    finished: bool,
}

/// A new session's two sides.
pub(crate) fn outbox() -> (Outbox, Outgoing) {
    let (sender, queue) = mpsc::channel(QUEUED_MAX);
    let ended = CancellationToken::new();
    let status = Arc::new(OnceLock::new());
    let outgoing = Outgoing {
        queue,
        ended: Box::pin(ended.clone().cancelled_owned()),
        status: Arc::clone(&status),
        finished: false,
    };
    (Outbox { queue: sender, ended, status }, outgoing)
}

impl Outbox {
    /// Queues a message, at once or not at all.
    pub(crate) fn send(&self, message: Message) -> Result<(), NotQueued> {
        if self.ended.is_cancelled() {
            return Err(NotQueued);
        }
        self.queue.try_send(message).map_err(|_| NotQueued)
    }

    /// Places left in the queue.
    pub(crate) fn room(&self) -> usize {
        self.queue.capacity()
    }

    /// Ends the session; the first caller's status is the one that is sent, after what is queued.
    pub(crate) fn end(&self, status: Option<Status>) {
        if let Some(status) = status.filter(|_| !self.ended.is_cancelled()) {
            // A second status loses: the stream can end only once.
            let _ = self.status.set(status);
        }
        self.ended.cancel();
    }

    /// Resolves once the session was ended here, or the agent's side of the stream is gone.
    pub(crate) async fn over(&self) {
        tokio::select! {
            () = self.ended.cancelled() => {}
            () = self.queue.closed() => {}
        }
    }
}

impl Stream for Outgoing {
    type Item = Result<agent::CoordinatorMessage, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.finished {
            return Poll::Ready(None);
        }
        loop {
            match self.queue.poll_recv(cx) {
                Poll::Ready(Some(message)) => {
                    return Poll::Ready(Some(Ok(agent::CoordinatorMessage { message: Some(message) })));
                }
                Poll::Ready(None) => {
                    self.finished = true;
                    return Poll::Ready(self.status.get().cloned().map(Err));
                }
                Poll::Pending => {}
            }
            if self.queue.is_closed() || self.ended.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            // Closing keeps what is queued: the loop hands it out, then the status.
            self.queue.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt;

    #[tokio::test]
    async fn what_was_queued_is_delivered_then_the_first_status() {
        let (outbox, mut outgoing) = outbox();
        outbox.send(Message::DetachAck(agent::DetachAck {})).unwrap();
        outbox.end(Some(Status::unavailable("first")));
        outbox.end(Some(Status::internal("second")));
        assert_eq!(outbox.send(Message::DetachAck(agent::DetachAck {})), Err(NotQueued));
        assert!(outgoing.next().await.unwrap().is_ok());
        assert_eq!(outgoing.next().await.unwrap().unwrap_err().message(), "first");
        assert!(outgoing.next().await.is_none());
    }

    #[tokio::test]
    async fn a_full_queue_takes_no_more_and_nobody_waits() {
        let (outbox, outgoing) = outbox();
        for _ in 0..QUEUED_MAX {
            outbox.send(Message::DetachAck(agent::DetachAck {})).unwrap();
        }
        assert_eq!(outbox.send(Message::DetachAck(agent::DetachAck {})), Err(NotQueued));
        drop(outgoing);
        outbox.over().await;
    }
}
