//! `helix.peer.v1.LogPeerService`: this coordinator's live logs, for the readers of others.

use std::pin::Pin;
use std::time::Duration;

use futures::{Stream, StreamExt};
use helix_common::status::{invalid, status};
use helix_model::ErrorCode;
use helix_proto::convert::attempt_from_wire;
use helix_proto::peer::log_peer_service_server::LogPeerService;
use helix_proto::peer::{LogHeadRequest, LogHeadResponse, ReadLiveLogRequest, ReadLiveLogResponse};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::LogHub;
use super::live::LiveReader;
use super::read::{LOOK_MAX, read_live};
use crate::blobs::STALL;

#[tonic::async_trait]
impl LogPeerService for LogHub {
    async fn log_head(&self, request: Request<LogHeadRequest>) -> Result<Response<LogHeadResponse>, Status> {
        let LogHeadRequest { id, wait_ms } = request.into_inner();
        let key = attempt_from_wire(id).map_err(|error| invalid(&error))?;
        let wait = Duration::from_millis(wait_ms.into()).min(LOOK_MAX);
        let head = if wait.is_zero() {
            self.inner.head(&key)
        } else {
            // What is not there within the time is not there.
            let begun = timeout(wait, self.inner.begun_here(&key)).await;
            begun.unwrap_or_else(|_| self.inner.head(&key))
        };
        Ok(Response::new(LogHeadResponse {
            last_seq: head.last_seq,
            pushing: head.pushers > 0,
            complete: head.complete,
        }))
    }

    type ReadLiveLogStream = Pin<Box<dyn Stream<Item = Result<ReadLiveLogResponse, Status>> + Send>>;

    async fn read_live_log(
        &self,
        request: Request<ReadLiveLogRequest>,
    ) -> Result<Response<Self::ReadLiveLogStream>, Status> {
        let ReadLiveLogRequest { id, from_seq, follow } = request.into_inner();
        let key = attempt_from_wire(id).map_err(|error| invalid(&error))?;
        let log = self.inner.live.get(&key);
        let log = log.ok_or_else(|| status(ErrorCode::LogUnknown, format!("no live log of {key} is here")))?;
        let (tx, rx) = mpsc::channel(2);
        let stopping = self.inner.stopping.clone();
        // Ends with its reader, with the pusher, or when this node stops.
        tokio::spawn(async move {
            let mut head = log.head();
            let mut reader = LiveReader::new(log, from_seq);
            loop {
                let now = *head.borrow_and_update();
                let message = match read_live(reader).await {
                    Ok((back, records)) => {
                        reader = back;
                        records
                    }
                    Err(error) => {
                        let _ = tx.send_timeout(Err(status(ErrorCode::Internal, error.to_string())), STALL).await;
                        return;
                    }
                };
                let drained = message.is_empty();
                let complete = drained && now.complete;
                if !drained || complete {
                    let response = ReadLiveLogResponse { records: message, complete };
                    if tx.send_timeout(Ok(response), STALL).await.is_err() {
                        return;
                    }
                }
                if drained {
                    if complete || !follow || now.pushers == 0 || now.closed {
                        return;
                    }
                    tokio::select! {
                        () = tx.closed() => return,
                        () = stopping.cancelled() => return,
                        changed = head.changed() => if changed.is_err() { return },
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(rx).boxed()))
    }
}
