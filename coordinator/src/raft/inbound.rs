//! Raft's messages from the other coordinators, and what they ask this one.

use std::fmt::Display;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use baton_proto::v1::{Blob, raft_server};
use futures::future::ready;
use futures::{Stream, StreamExt};
use openraft::raft::{AppendEntriesResponse, StreamAppendError};
use openraft::storage::Snapshot;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

use super::ask::{Known, Question};
use super::envelope::Envelope;
use super::network::{Append, Appended, SnapshotMessage};
use super::types::{Raft, scoped};
use super::wire::decode;

/// Answers to a stream of appends that may wait for a slow leader.
const APPEND_ANSWERS_MAX: usize = 64;

/// Bytes of a snapshot that are taken in: far more than the ledger's limits let it grow to.
const SNAPSHOT_BYTES_MAX: usize = 1 << 30;

/// What this node knows of another one.
pub(super) type Tell = Box<dyn Fn(u64) -> Known + Send + Sync>;

/// When a leader last spoke to this node.
pub(super) type Heard = Arc<Mutex<Option<Instant>>>;

/// What peers call on this node.
pub(crate) struct RaftService {
    raft: Raft,
    envelope: Envelope,
    /// Seed for what openraft spawns on a caller's behalf.
    seed: u64,
    tell: Tell,
    heard: Heard,
    stopping: watch::Receiver<bool>,
}

impl RaftService {
    /// Streams that peers have open end when `stopping` turns true.
    pub(super) fn new(
        raft: Raft,
        envelope: Envelope,
        seed: u64,
        tell: Tell,
        heard: Heard,
        stopping: watch::Receiver<bool>,
    ) -> RaftService {
        RaftService { raft, envelope, seed, tell, heard, stopping }
    }

    fn asked<T: DeserializeOwned>(&self, request: Request<Blob>) -> Result<T, Status> {
        self.envelope.open(request.into_inner())
    }

    fn blob<T: Serialize>(&self, answer: &T) -> Blob {
        self.envelope.seal(0, answer)
    }

    fn answered<T: Serialize>(&self, result: Result<T, impl Display>) -> Result<Response<Blob>, Status> {
        Ok(Response::new(self.blob(&result.map_err(refused)?)))
    }
}

fn hear(heard: &Heard) {
    *heard.lock().expect("heard lock") = Some(Instant::now());
}

fn refused(error: impl Display) -> Status {
    Status::internal(error.to_string())
}

/// None ends the stream: it broke, or the peer sent what is not for this node, of which it is told.
fn appended(envelope: &Envelope, blob: Result<Blob, Status>, refusal: &Mutex<Option<Status>>) -> Option<Append> {
    let opened = envelope.open(blob.ok()?);
    opened.map_err(|status| *refusal.lock().expect("refusal lock") = Some(status)).ok()
}

#[tonic::async_trait]
impl raft_server::Raft for RaftService {
    type StreamAppendStream = Pin<Box<dyn Stream<Item = Result<Blob, Status>> + Send>>;

    async fn append(&self, request: Request<Blob>) -> Result<Response<Blob>, Status> {
        let append = self.asked(request)?;
        let answer = scoped(self.seed, self.raft.append_entries(append)).await;
        if let Ok(answer) = &answer
            && !matches!(answer, AppendEntriesResponse::HigherVote(_))
        {
            hear(&self.heard);
        }
        self.answered(answer)
    }

    async fn vote(&self, request: Request<Blob>) -> Result<Response<Blob>, Status> {
        let vote = self.asked(request)?;
        self.answered(scoped(self.seed, self.raft.vote(vote)).await)
    }

    async fn pre_vote(&self, request: Request<Blob>) -> Result<Response<Blob>, Status> {
        let vote = self.asked(request)?;
        self.answered(scoped(self.seed, self.raft.pre_vote(vote)).await)
    }

    async fn snapshot(&self, request: Request<Streaming<Blob>>) -> Result<Response<Blob>, Status> {
        let mut parts = request.into_inner();
        let mut message = Vec::new();
        while let Some(part) = parts.message().await? {
            message.extend(self.envelope.open_bytes(part)?);
            if message.len() > SNAPSHOT_BYTES_MAX {
                return Err(Status::out_of_range(format!("a snapshot of more than {SNAPSHOT_BYTES_MAX} bytes")));
            }
        }
        let decoded = decode(&message).map_err(|error| Status::invalid_argument(error.to_string()))?;
        drop(message);
        let (vote, meta, snapshot): SnapshotMessage = decoded;
        let install = self.raft.install_full_snapshot(vote, Snapshot { meta, snapshot });
        self.answered(scoped(self.seed, install).await)
    }

    async fn transfer(&self, request: Request<Blob>) -> Result<Response<Blob>, Status> {
        let transfer = self.asked(request)?;
        self.answered(scoped(self.seed, self.raft.handle_transfer_leader(transfer)).await)
    }

    async fn ask(&self, request: Request<Blob>) -> Result<Response<Blob>, Status> {
        let Question { node } = self.asked(request)?;
        Ok(Response::new(self.blob(&(self.tell)(node))))
    }

    async fn stream_append(
        &self,
        request: Request<Streaming<Blob>>,
    ) -> Result<Response<Self::StreamAppendStream>, Status> {
        let mut stopping = self.stopping.clone();
        let stopped = async move { drop(stopping.wait_for(|stopping| *stopping).await) };
        let (opened, sealed) = (self.envelope.clone(), self.envelope.clone());
        let refusal = Arc::new(Mutex::new(None));
        let refused_append = refusal.clone();
        let appends = request.into_inner().map(move |blob| appended(&opened, blob, &refused_append));
        let appends = appends.take_while(|append| ready(append.is_some())).filter_map(ready);
        let appends = appends.take_until(Box::pin(stopped));
        let (raft, heard) = (self.raft.clone(), self.heard.clone());
        let (tell, told) = tokio::sync::mpsc::channel(APPEND_ANSWERS_MAX);
        // Ends with the caller's stream, whose end is the end of `appends`.
        tokio::spawn(scoped(self.seed, async move {
            let mut answers = Box::pin(raft.stream_append(Box::pin(appends)));
            while let Some(answer) = answers.next().await {
                let answer: Result<Appended, _> = answer;
                if !matches!(answer, Err(_) | Ok(Err(StreamAppendError::HigherVote(_)))) {
                    hear(&heard);
                }
                if tell.send(answer.map(|a| sealed.seal(0, &a)).map_err(refused)).await.is_err() {
                    return;
                }
            }
            let refusal = refusal.lock().expect("refusal lock").take();
            if let Some(status) = refusal {
                drop(tell.send(Err(status)).await);
            }
        }));
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(told))))
    }
}
