//! Raft's messages to the other coordinators over gRPC. Every call has a deadline.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use baton_core::Net;
use baton_core::limits::MESSAGE_BYTES_MAX;
use baton_proto::v1::Blob;
use baton_proto::v1::raft_client::RaftClient;
use futures::Stream;
use openraft::alias::{SnapshotMetaOf, SnapshotOf, VoteOf};
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::RPCOption;
use openraft::network::v2::RaftNetworkV2;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{AnyError, BasicNode, OptionalSend, RaftNetworkFactory};
use serde::{Serialize, de::DeserializeOwned};
use tonic::transport::Channel;
use tonic::{Response, Status};

use super::envelope::Envelope;
use super::line::{Appends, Line};
use super::types::Types;
use super::wire::{decode, encode};

/// A snapshot of the largest ledger, over a slow link.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of a snapshot in one part.
const SNAPSHOT_PART_BYTES: usize = 1 << 20;

const _: () = assert!(SNAPSHOT_PART_BYTES < MESSAGE_BYTES_MAX);

pub(super) type CallError = RPCError<Types>;
pub(super) type Append = AppendEntriesRequest<Types>;
pub(super) type Appended = StreamAppendResult<Types>;
pub(super) type SnapshotMessage = (VoteOf<Types>, SnapshotMetaOf<Types>, Vec<u8>);

/// Makes connections to the other coordinators.
pub(super) struct Peers {
    pub(super) net: Arc<dyn Net>,
    /// Addresses as configured; they win over those in the membership, which may be older.
    pub(super) addresses: BTreeMap<u64, String>,
    pub(super) envelope: Envelope,
}

impl RaftNetworkFactory<Types> for Peers {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        let address = self.addresses.get(&target).unwrap_or(&node.addr);
        let channel = baton_proto::channel(self.net.clone(), address).map_err(|error| error.to_string());
        let client = |channel| RaftClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        Peer { to: target, client: channel.map(client), envelope: self.envelope.clone(), line: None }
    }
}

/// One other coordinator.
pub(super) struct Peer {
    to: u64,
    /// Err where its address is none.
    client: Result<RaftClient<Channel>, String>,
    envelope: Envelope,
    /// Where appends go, while nobody sends any.
    pub(super) line: Option<Box<Line>>,
}

fn unreachable(error: impl Display) -> Unreachable<Types> {
    Unreachable::new(&AnyError::error(error.to_string()))
}

pub(super) fn failed(error: impl Display) -> CallError {
    RPCError::Unreachable(unreachable(error))
}

impl Peer {
    pub(super) fn client(&self) -> Result<RaftClient<Channel>, CallError> {
        self.client.clone().map_err(failed)
    }

    pub(super) fn blob<T: Serialize>(&self, message: &T) -> Blob {
        self.envelope.seal(self.to, message)
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

impl RaftNetworkV2<Types> for Peer {
    type SnapshotData = Vec<u8>;

    async fn append_entries(
        &mut self,
        rpc: Append,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, CallError> {
        answer(self.client()?.append(self.blob(&rpc)), option.soft_ttl()).await
    }

    async fn vote(&mut self, rpc: VoteRequest<Types>, option: RPCOption) -> Result<VoteResponse<Types>, CallError> {
        answer(self.client()?.vote(self.blob(&rpc)), option.soft_ttl()).await
    }

    async fn pre_vote(&mut self, rpc: VoteRequest<Types>, option: RPCOption) -> Result<VoteResponse<Types>, CallError> {
        answer(self.client()?.pre_vote(self.blob(&rpc)), option.soft_ttl()).await
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<Appended, CallError>>, CallError>>
    where
        S: Stream<Item = Append> + OptionalSend + Unpin + 'static,
    {
        Box::pin(async move { Ok(Box::pin(Appends::new(self, option.soft_ttl(), input)) as BoxStream<'s, _>) })
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
        let message = encode(&message);
        let message_len = message.len();
        let (to, envelope) = (self.to, self.envelope.clone());
        let part = move |at: usize| {
            let end = message.len().min(at + SNAPSHOT_PART_BYTES);
            envelope.seal_bytes(to, message.slice(at..end))
        };
        let parts = futures::stream::iter((0..message_len).step_by(SNAPSHOT_PART_BYTES).map(part));
        let mut client = self.client().map_err(unreachable)?;
        answer(client.snapshot(parts), SNAPSHOT_TIMEOUT).await.map_err(unreachable)
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, CallError> {
        answer(self.client()?.transfer(self.blob(&request)), option.soft_ttl()).await
    }
}
