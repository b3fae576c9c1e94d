//! Raft's messages over gRPC, both ways. Every call has a deadline.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use baton_core::Net;
use baton_core::limits::MESSAGE_BYTES_MAX;
use baton_proto::v1::Blob;
use baton_proto::v1::raft_client::RaftClient;
use baton_proto::v1::raft_server;
use futures::future::ready;
use futures::{Stream, StreamExt};
use openraft::alias::{SnapshotMetaOf, SnapshotOf, VoteOf};
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::RPCOption;
use openraft::network::v2::RaftNetworkV2;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, VoteRequest, VoteResponse,
};
use openraft::storage::Snapshot;
use openraft::{AnyError, BasicNode, OptionalSend, RaftNetworkFactory};
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

use super::types::{Raft, Types, scoped};
use super::wire::{decode, encode};

/// A snapshot of the largest ledger, over a slow link.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(20);
/// Answers to a stream of appends that may wait for a slow leader.
const APPEND_ANSWERS_MAX: usize = 64;

type CallError = RPCError<Types>;
type Append = AppendEntriesRequest<Types>;
type Appended = StreamAppendResult<Types>;
type SnapshotMessage = (VoteOf<Types>, SnapshotMetaOf<Types>, Vec<u8>);

/// Makes connections to the other coordinators.
pub(super) struct Peers {
    pub(super) net: Arc<dyn Net>,
    /// Addresses as configured; they win over those in the membership, which may be older.
    pub(super) addresses: BTreeMap<u64, String>,
}

impl RaftNetworkFactory<Types> for Peers {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        let address = self.addresses.get(&target).unwrap_or(&node.addr);
        let channel = baton_proto::channel(self.net.clone(), address).map_err(|error| error.to_string());
        let client = |channel| RaftClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        Peer(channel.map(client))
    }
}

/// One other coordinator; Err where its address is none.
pub(super) struct Peer(Result<RaftClient<Channel>, String>);

fn unreachable(error: impl Display) -> Unreachable<Types> {
    Unreachable::new(&AnyError::error(error.to_string()))
}

fn failed(error: impl Display) -> CallError {
    RPCError::Unreachable(unreachable(error))
}

impl Peer {
    fn client(&self) -> Result<RaftClient<Channel>, CallError> {
        self.0.clone().map_err(failed)
    }
}

/// Waits for a call with its deadline and decodes the answer.
async fn answer<T: DeserializeOwned>(
    call: impl Future<Output = Result<Response<Blob>, Status>>,
    timeout: Duration,
) -> Result<T, CallError> {
    let blob = tokio::time::timeout(timeout, call).await.map_err(failed)?.map_err(failed)?;
    decode(&blob.into_inner().data).map_err(failed)
}

fn blob<T: Serialize>(value: &T) -> Blob {
    Blob { data: encode(value) }
}

impl RaftNetworkV2<Types> for Peer {
    type SnapshotData = Vec<u8>;

    async fn append_entries(
        &mut self,
        rpc: Append,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, CallError> {
        answer(self.client()?.append(blob(&rpc)), option.soft_ttl()).await
    }

    async fn vote(&mut self, rpc: VoteRequest<Types>, option: RPCOption) -> Result<VoteResponse<Types>, CallError> {
        answer(self.client()?.vote(blob(&rpc)), option.soft_ttl()).await
    }

    async fn pre_vote(&mut self, rpc: VoteRequest<Types>, option: RPCOption) -> Result<VoteResponse<Types>, CallError> {
        answer(self.client()?.pre_vote(blob(&rpc)), option.soft_ttl()).await
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<Appended, CallError>>, CallError>>
    where
        S: Stream<Item = Append> + OptionalSend + Unpin + 'static,
    {
        Box::pin(async move {
            let mut client = self.client()?;
            let call = client.stream_append(input.map(|append| blob(&append)));
            let answers = tokio::time::timeout(option.soft_ttl(), call).await.map_err(failed)?.map_err(failed)?;
            let decoded = answers.into_inner().map(|answer| match answer {
                Ok(blob) => decode(&blob.data).map_err(failed),
                Err(status) => Err(failed(status)),
            });
            Ok(Box::pin(decoded) as BoxStream<'s, _>)
        })
    }

    async fn full_snapshot(
        &mut self,
        vote: VoteOf<Types>,
        snapshot: SnapshotOf<Types, Vec<u8>>,
        _cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let unreachable = |error: CallError| StreamingError::Unreachable(unreachable(error));
        let message: SnapshotMessage = (vote, snapshot.meta, snapshot.snapshot);
        let mut client = self.client().map_err(unreachable)?;
        answer(client.snapshot(blob(&message)), SNAPSHOT_TIMEOUT).await.map_err(unreachable)
    }
}

/// The other side: what peers call on this node.
pub(crate) struct RaftService {
    raft: Raft,
    /// Seed for what openraft spawns on a caller's behalf.
    seed: u64,
    stopping: watch::Receiver<bool>,
}

impl RaftService {
    /// Streams that peers have open end when `stopping` turns true.
    pub(super) fn new(raft: Raft, seed: u64, stopping: watch::Receiver<bool>) -> RaftService {
        RaftService { raft, seed, stopping }
    }
}

fn refused(error: impl Display) -> Status {
    Status::internal(error.to_string())
}

fn asked<T: DeserializeOwned>(request: Request<Blob>) -> Result<T, Status> {
    decode(&request.into_inner().data).map_err(|error| Status::invalid_argument(error.to_string()))
}

/// None ends the stream: it broke, or the peer sent what this node cannot read.
fn appended(blob: Result<Blob, Status>) -> Option<Append> {
    decode(&blob.ok()?.data).inspect_err(|error| tracing::warn!(%error, "a stream of appends ends")).ok()
}

fn answered<T: Serialize>(result: Result<T, impl Display>) -> Result<Response<Blob>, Status> {
    Ok(Response::new(blob(&result.map_err(refused)?)))
}

#[tonic::async_trait]
impl raft_server::Raft for RaftService {
    type StreamAppendStream = Pin<Box<dyn Stream<Item = Result<Blob, Status>> + Send>>;

    async fn append(&self, request: Request<Blob>) -> Result<Response<Blob>, Status> {
        let append = asked(request)?;
        answered(scoped(self.seed, self.raft.append_entries(append)).await)
    }

    async fn vote(&self, request: Request<Blob>) -> Result<Response<Blob>, Status> {
        let vote = asked(request)?;
        answered(scoped(self.seed, self.raft.vote(vote)).await)
    }

    async fn pre_vote(&self, request: Request<Blob>) -> Result<Response<Blob>, Status> {
        let vote = asked(request)?;
        answered(scoped(self.seed, self.raft.pre_vote(vote)).await)
    }

    async fn snapshot(&self, request: Request<Blob>) -> Result<Response<Blob>, Status> {
        let (vote, meta, snapshot): SnapshotMessage = asked(request)?;
        let install = self.raft.install_full_snapshot(vote, Snapshot { meta, snapshot });
        answered(scoped(self.seed, install).await)
    }

    async fn stream_append(
        &self,
        request: Request<Streaming<Blob>>,
    ) -> Result<Response<Self::StreamAppendStream>, Status> {
        let mut stopping = self.stopping.clone();
        let stopped = async move { drop(stopping.wait_for(|stopping| *stopping).await) };
        let appends = request.into_inner().map(appended).take_while(|a| ready(a.is_some())).filter_map(ready);
        let appends = appends.take_until(Box::pin(stopped));
        let raft = self.raft.clone();
        let (tell, told) = tokio::sync::mpsc::channel(APPEND_ANSWERS_MAX);
        // Ends with the caller's stream, whose end is the end of `appends`.
        tokio::spawn(scoped(self.seed, async move {
            let mut answers = Box::pin(raft.stream_append(Box::pin(appends)));
            while let Some(answer) = answers.next().await {
                if tell.send(answer).await.is_err() {
                    break;
                }
            }
        }));
        let answers = tokio_stream::wrappers::ReceiverStream::new(told);
        Ok(Response::new(Box::pin(answers.map(|answer| answer.map(|a: Appended| blob(&a)).map_err(refused)))))
    }
}
