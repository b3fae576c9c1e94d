//! Blocks from worker to worker outside a handoff. A request whose assignment names a holder is *pulled*: this worker
//! grants blocks, the holder lends what it has under the names asked for, by the same links, frames and checks as a
//! handoff. Whatever goes wrong, or takes longer than computing, means that the blocks are computed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use baton_core::limits::{LENDS_MAX, LINGER_MS, MESSAGE_BYTES_MAX, PULL_MS};
use baton_core::{BlockHash, BlockId, Holder, Place, Refused, RequestId};
use baton_engine::{Blocks, Reserved};
use baton_kvtransfer::{Links, Receiver, TransferError};
use baton_proto::BadMessage;
use baton_proto::convert::{abort, block_hash, block_hash_bytes, refusal, request_id, required};
use baton_proto::v1::lend_reply::Outcome;
use baton_proto::v1::worker_client::WorkerClient;
use baton_proto::v1::{Abort, LendRequest, Lent, Refusal};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use crate::assigned::Assigned;
use crate::channels::Channels;
use crate::grant;
use crate::metrics;
use crate::shell::{Lease, Shell};
use crate::worth::{self, Meter, Offer};

/// Both ends of this worker's transfers.
pub(crate) struct Peers {
    pub(crate) receiver: Receiver,
    pub(crate) links: Links,
    /// Where others reach the receiver.
    pub(crate) kv_address: String,
    pub(crate) channels: Channels,
    /// Whether blocks are pulled at all.
    pub(crate) pulls: bool,
    speed: Mutex<Meter>,
    lending: Semaphore,
    /// Requests that were told to go on elsewhere, until their blocks have been fetched.
    lingering: Mutex<BTreeMap<RequestId, Lease>>,
}

/// How a pull ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pull {
    Fetched,
    /// Computing is faster, as measured.
    NotWorth,
    /// There was no room for the blocks.
    NoRoom,
    /// The holder does not have them any more, or is busy.
    Refused,
    /// The holder, or the way to it, failed.
    Failed,
}

impl Pull {
    /// The word used in metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Pull::Fetched => "fetched",
            Pull::NotWorth => "not_worth",
            Pull::NoRoom => "no_room",
            Pull::Refused => "refused",
            Pull::Failed => "failed",
        }
    }
}

/// Why a holder lends nothing.
enum Denied {
    Refused(Refusal),
    Aborted(Abort),
}

impl From<BadMessage> for Denied {
    fn from(bad: BadMessage) -> Denied {
        Denied::Refused(refusal(Refused::Incompatible, bad.to_string()))
    }
}

impl From<TransferError> for Denied {
    fn from(error: TransferError) -> Denied {
        Denied::Aborted(abort(error.reason(), error.to_string()))
    }
}

impl Peers {
    pub(crate) fn new(receiver: Receiver, links: Links, kv_address: String, channels: Channels, pulls: bool) -> Peers {
        let (speed, lingering) = Default::default();
        Peers { receiver, links, kv_address, channels, pulls, speed, lending: Semaphore::new(LENDS_MAX), lingering }
    }

    /// Fetches the blocks of these names, all of them or none.
    async fn pull(
        &self,
        shell: &Shell,
        assigned: &Assigned,
        holder: &Holder,
        names: &[BlockHash],
    ) -> Result<Blocks, Pull> {
        let bytes = names.len() as u64 * shell.spec.layout.block_bytes() as u64;
        let tokens = names.len() as u64 * u64::from(shell.spec.layout.block_tokens);
        let offer = Offer { bytes, bytes_per_s: lock(&self.speed).per_second() };
        // Whoever computes a stream's blocks again holds up those that decode there.
        if !holder.moves && !worth::is_cheaper(offer, tokens, shell.engine.prefill_tokens_per_s()) {
            return Err(Pull::NotWorth);
        }
        let room = shell.engine.cache().reserve(names.len()).map_err(|_| Pull::NoRoom)?;
        let began = Instant::now();
        let patience = assigned.left().min(Duration::from_millis(PULL_MS));
        let ids = shell.units.of(&room.ids());
        let fetched = timeout(patience, self.fetch(assigned, &holder.place, names, (ids, room), patience)).await;
        let room = fetched.unwrap_or(Err(Pull::Failed))?;
        lock(&self.speed).add(bytes, began.elapsed());
        Ok(room.fill(names))
    }

    /// Grants the room to the holder, and waits for its word and for the blocks.
    async fn fetch(
        &self,
        assigned: &Assigned,
        from: &Place,
        names: &[BlockHash],
        (ids, room): (Vec<BlockId>, Reserved),
        patience: Duration,
    ) -> Result<Reserved, Pull> {
        let (request, epoch) = (assigned.request.id, assigned.assignment.epoch);
        let (mut grant, incoming) = self.receiver.open(request, epoch, ids, patience, room);
        grant.address.clone_from(&self.kv_address);
        let ask = LendRequest {
            lender: Some(from.into()),
            request: request.to_string(),
            blocks: names.iter().copied().map(block_hash_bytes).collect(),
            grant: Some(grant::to_wire(grant)),
        };
        let channel = self.channels.get(&from.address).map_err(|_| Pull::Failed)?;
        let mut client = WorkerClient::new(channel).max_encoding_message_size(MESSAGE_BYTES_MAX);
        let reply = client.lend(ask).await.map_err(|_| Pull::Failed)?.into_inner();
        match reply.outcome {
            Some(Outcome::Lent(Lent {})) => incoming.wait().await.map(|(room, _)| room).map_err(|_| Pull::Failed),
            Some(Outcome::Refused(_)) => Err(Pull::Refused),
            Some(Outcome::Aborted(_)) | None => Err(Pull::Failed),
        }
    }

    /// Keeps the worker there, within bounds, for whoever goes on with a request that ends here.
    fn linger(&self, request: RequestId, lease: Lease) {
        lock(&self.lingering).insert(request, lease);
    }

    fn leave(&self, request: RequestId) {
        let lease = lock(&self.lingering).remove(&request);
        // Dropped without the lock.
        drop(lease);
    }
}

impl Shell {
    /// The longest leading run of `names` that is here, in lower tiers, or with the holder that the assignment names, as
    /// far as bringing it takes less time than computing it.
    pub async fn bring(&self, assigned: &Assigned, names: &[BlockHash]) -> Blocks {
        let mut held = self.recall(names).await;
        let Some(holder) = assigned.assignment.holder.as_ref().filter(|_| self.peers.pulls) else { return held };
        let end = names.len().min(usize::try_from(holder.blocks).unwrap_or(usize::MAX));
        let myself = holder.place.worker == self.id && holder.place.incarnation == self.incarnation;
        if held.len() >= end || myself {
            return held;
        }
        let pulled = self.peers.pull(self, assigned, holder, &names[held.len()..end]).await;
        let how = pulled.as_ref().map_or_else(|failed| *failed, |_| Pull::Fetched);
        metrics::count_pull(how, end - held.len());
        tracing::debug!(request = %assigned.request.id, holder = %holder.place.worker, blocks = end - held.len(),
            how = how.as_str(), "pulled");
        if let Ok(blocks) = pulled {
            held.append(blocks);
        }
        metrics::record_transfers(&self.peers.receiver.counters());
        held
    }

    /// Where this worker takes blocks.
    pub fn receiver(&self) -> &Receiver {
        &self.peers.receiver
    }

    /// Where others reach `receiver`.
    pub fn kv_address(&self) -> &str {
        &self.peers.kv_address
    }

    /// How this worker's blocks get to others.
    pub fn links(&self) -> &Links {
        &self.peers.links
    }

    /// The request goes on elsewhere: a drain waits a little for whoever comes for its blocks.
    pub fn linger(self: &Arc<Shell>, request: RequestId) {
        if !self.peers.pulls {
            return;
        }
        self.peers.linger(request, self.hold());
        let shell = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(LINGER_MS)) => {}
                () = shell.closed() => {}
            }
            shell.peers.leave(request);
        });
    }

    /// Sends blocks to whoever has granted room for them.
    pub(crate) async fn lend(self: &Arc<Shell>, ask: LendRequest) -> Outcome {
        let began = Instant::now();
        let _lease = self.hold();
        let lent = self.send(ask).await;
        metrics::record_links(&self.peers.links.counters());
        let (outcome, how) = match lent {
            Ok(()) => (Outcome::Lent(Lent {}), "lent"),
            Err(Denied::Refused(refusal)) => (Outcome::Refused(refusal), "refused"),
            Err(Denied::Aborted(abort)) => (Outcome::Aborted(abort), "failed"),
        };
        metrics::count_lend(how);
        tracing::debug!(how, took_us = began.elapsed().as_micros() as u64, "lent");
        outcome
    }

    async fn send(&self, ask: LendRequest) -> Result<(), Denied> {
        let lender = Place::from(required("lend.lender", ask.lender)?);
        let (request, grant) = (request_id(&ask.request)?, grant::from_wire(ask.grant)?);
        let denied = |reason, detail: &str| Denied::Refused(refusal(reason, detail));
        if lender.worker != self.id || lender.incarnation != self.incarnation {
            return Err(denied(Refused::Stale, "meant for another life of this worker"));
        }
        let count = ask.blocks.len();
        let units = count * self.units.each();
        if count == 0 || count > self.config.blocks || grant.blocks.len() != units || grant.request != request {
            return Err(denied(Refused::Incompatible, "the grant does not fit the blocks"));
        }
        let names = ask.blocks.iter().map(|name| block_hash(name)).collect::<Result<Vec<_>, _>>()?;
        let permit = self.peers.lending.try_acquire();
        let _permit = permit.map_err(|_| denied(Refused::NoCapacity, "it lends to others"))?;
        // The guard is the lease: none of the blocks is evicted before the receiver has them all.
        let held = self.recall(&names).await;
        let on_device = held.are_on_device();
        if held.len() < count || !(on_device || held.are_present()) {
            return Err(denied(Refused::Unavailable, "it does not have them all any more"));
        }
        let blocks: Vec<(usize, BlockId)> = self.units.of(held.ids()).into_iter().enumerate().collect();
        let links = &self.peers.links;
        let mut outgoing = if on_device { links.open_from_device(grant).await? } else { links.open(grant).await? };
        if on_device && !outgoing.is_from_device() {
            return Err(denied(Refused::Unavailable, "they are on its GPU, which whoever asks cannot read"));
        }
        for layer in 0..self.spec.layout.layers as usize {
            outgoing.send(layer, &blocks).await?;
        }
        outgoing.commit().await?;
        self.peers.leave(request);
        Ok(())
    }
}

/// Whether a request that had to leave another worker goes on from its blocks, or computes them again.
pub fn count_move(holder: &Holder, computed_again: bool) {
    if holder.moves {
        metrics::count_moved(if computed_again { "recompute" } else { "kv" });
    }
}

/// A poisoned lock means that a thread panicked between two consistent states; going on is safe.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
