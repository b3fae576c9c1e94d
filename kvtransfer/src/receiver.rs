//! The decode side: grants blocks, takes what senders write into them, and says when a transfer is complete.
//!
//! One task accepts, one per connection reads and writes (`serving`), and one keeps the alarms, so that a receiver that is busy or
//! full still cleans up. What is done about an event is decided in `transfer`; this file carries it out.

mod flight;
mod incoming;
mod landing;
mod lanes;
mod serving;

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use baton_core::arena::DeviceSource;
use baton_core::limits::REQUEST_DEADLINE_MS;
use baton_core::planted::{self, Bug};
use baton_core::{Arena, BlockId, BlockLayout, Epoch, Net, RequestId, TransferId};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use self::incoming::Waits;
pub use self::incoming::{Incoming, Partial};
use self::lanes::Lanes;
pub(crate) use self::serving::serve;
use crate::counters::{Counters, Counts, Dropped};
use crate::link::{Link, LinkId, Peer};
use crate::links::{Preferred, Ways};
use crate::sums::Sums;
use crate::ticket::Tickets;
use crate::transfer::{Action, Event, Received, Transfer, refuse};
use crate::wire::{self, BadFrame, Body, Entry, LinkKey, Message, Tag};
use crate::{Grant, HeadSlice, Links, TransferError, extent};

type Guard = Box<dyn Any + Send>;
type Outcome = Result<(Guard, Received), TransferError>;
/// What is left of a transfer that failed: its grant, what it wrote, the guard, and by position the blocks that arrived
/// whole.
type Remains = (Grant, Arc<Arena>, Guard, Vec<bool>);

/// Takes blocks for one arena. Dropping it ends its links and aborts its transfers.
pub struct Receiver {
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
    alarms: JoinHandle<()>,
}

impl Receiver {
    /// Listens at `address` for senders that serve the same `model` with the arena's block layout. `model` is the text
    /// of whatever two workers must share for their blocks to mean the same (the numerics class).
    pub async fn listen(net: Arc<dyn Net>, address: &str, arena: Arc<Arena>, model: &str) -> io::Result<Receiver> {
        Receiver::with(net, address, arena, model, Ways::default()).await
    }

    /// The same for senders that come by these ways. If UCX is preferred and there is none, the error says why.
    pub async fn with(
        net: Arc<dyn Net>,
        address: &str,
        arena: Arc<Arena>,
        model: &str,
        ways: Ways,
    ) -> io::Result<Receiver> {
        let kv_heads = arena.layout().kv_heads;
        Receiver::make(net, address, arena, kv_heads, model, ways).await
    }

    /// A rank's receiver, whose arena holds some of the model's `kv_heads`.
    pub async fn of_rank(
        net: Arc<dyn Net>,
        address: &str,
        arena: Arc<Arena>,
        kv_heads: u32,
        model: &str,
    ) -> io::Result<Receiver> {
        Receiver::make(net, address, arena, kv_heads, model, Ways::default()).await
    }

    async fn make(
        net: Arc<dyn Net>,
        address: &str,
        arena: Arc<Arena>,
        kv_heads: u32,
        model: &str,
        ways: Ways,
    ) -> io::Result<Receiver> {
        if !extent::fits(arena.layout()) {
            let text = format!("blocks of {} do not fit the wire's frames", arena.layout().describe());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let listener = net.listen(address).await?;
        let shared = Arc::new(Shared {
            address: listener.address(),
            compatibility: wire::compatibility(&BlockLayout { kv_heads, ..*arena.layout() }, model),
            is_part: arena.layout().kv_heads != kv_heads,
            sums: Arc::new(Sums::new(arena.layout(), arena.blocks())),
            arena,
            registry: Mutex::default(),
            alarm_set: Notify::new(),
            closing: Notify::new(),
            counts: Counts::default(),
            tickets: OnceLock::new(),
            ways,
            #[cfg(target_os = "linux")]
            porch: Mutex::default(),
            #[cfg(target_os = "linux")]
            harbour: Mutex::default(),
        });
        let accepting = tokio::spawn(serving::accept(shared.clone(), listener));
        let alarms = tokio::spawn(ring(shared.clone()));
        let receiver = Receiver { shared, accepting, alarms };
        receiver.open_harbour(&*net).await?;
        Ok(receiver)
    }

    /// Asks senders for tickets, which are made with `secret`, for every grant from here on. One that knows no tickets, of
    /// an earlier release, is served only if they are not `required`; what anybody else says without a valid one closes
    /// its link and is counted.
    pub fn issue_tickets(&self, secret: [u8; 32], required: bool) {
        let _ = self.shared.tickets.set(Tickets::new(secret, required));
    }

    /// Lets senders come over UCX, at the same host. If it was asked for, an error says why there is none.
    #[cfg(target_os = "linux")]
    async fn open_harbour(&self, net: &dyn Net) -> io::Result<()> {
        let is_asked_for = match (self.shared.ways.preferred, &self.shared.ways.tls) {
            (Preferred::Ucx, Some(_)) => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "UCX does not encrypt: not beside TLS"));
            }
            (Preferred::Ucx, None) => true,
            (Preferred::Best, None) if net.shares_memory() && crate::ucx::is_better() => false,
            _ => return Ok(()),
        };
        match crate::ucx::Harbour::open(&self.shared).await {
            Ok(harbour) => *lock(&self.shared.harbour) = Some(harbour),
            Err(error) if is_asked_for => return Err(io::Error::other(format!("UCX: {error}"))),
            Err(error) => tracing::warn!(%error, "RDMA devices are of no use to handoffs without UCX"),
        }
        Ok(())
    }

    #[cfg(not(target_os = "linux"))]
    async fn open_harbour(&self, _: &dyn Net) -> io::Result<()> {
        match self.shared.ways.preferred {
            Preferred::Ucx => Err(io::Error::other("UCX: Linux only")),
            Preferred::Best | Preferred::Tcp => Ok(()),
        }
    }

    /// Links that send out of the arena that blocks come into, by the same ways. They know the checksums of what has come in.
    pub fn links(&self, net: Arc<dyn Net>) -> Links {
        let Shared { arena, compatibility, is_part, sums, ways, .. } = &*self.shared;
        Links::over(net, arena.clone(), compatibility.clone(), *is_part, sums.clone(), ways.clone())
    }

    /// Where senders find it.
    pub fn address(&self) -> String {
        self.shared.address.clone()
    }

    /// Grants `blocks` to whoever holds the grant, until `deadline` from now. `guard` is what keeps the blocks
    /// reserved; it comes back from `Incoming::wait`, or is dropped once nothing can write the blocks any more.
    pub fn open<G: Send + 'static>(
        &self,
        request: RequestId,
        epoch: Epoch,
        blocks: Vec<BlockId>,
        deadline: Duration,
        guard: G,
    ) -> (Grant, Incoming<G>) {
        let wanted = Wanted { request, epoch, blocks, deadline };
        let (grant, waits) = self.shared.grant(wanted, None, self.shared.arena.clone(), None, Box::new(guard));
        let incoming = Incoming::new(self.shared.clone(), &grant, waits);
        (grant, incoming)
    }

    /// The same for some heads of the blocks: those from `first` on, as many as `heads`, which are a slice of the sender's.
    /// None: there are no such heads here.
    pub(crate) fn open_slice<G: Send + 'static>(
        &self,
        wanted: Wanted,
        slice: HeadSlice,
        first: u32,
        heads: u32,
        guard: G,
    ) -> Option<(Grant, Incoming<G>)> {
        let arena = self.shared.arena.view(self.shared.layout().kv_heads, first..first.checked_add(heads)?)?;
        let (grant, waits) = self.shared.grant(wanted, None, Arc::new(arena), Some(slice), Box::new(guard));
        let incoming = Incoming::new(self.shared.clone(), &grant, waits);
        Some((grant, incoming))
    }

    /// Grants what a failed transfer still lacks to another sender: the same transfer, its next attempt, with only the
    /// blocks that did not arrive whole. Frames of earlier attempts are stale from here on.
    ///
    /// # Panics
    /// If nothing is lacking.
    pub fn resume<G: Send + 'static>(
        &self,
        partial: Partial<G>,
        epoch: Epoch,
        deadline: Duration,
    ) -> (Grant, Incoming<G>) {
        let blocks = partial.lacking();
        assert!(!blocks.is_empty(), "a transfer that lacks nothing has completed");
        let wanted = Wanted { request: partial.grant.request, epoch, blocks, deadline };
        let before = Some((partial.grant.transfer, partial.grant.attempt));
        let (arena, slice) = (partial.arena, partial.grant.slice);
        let (grant, waits) = self.shared.grant(wanted, before, arena, slice, Box::new(partial.guard));
        let incoming = Incoming::new(self.shared.clone(), &grant, waits);
        (grant, incoming)
    }

    pub fn counters(&self) -> Counters {
        let registry = self.shared.registry();
        self.shared.counts.snapshot(registry.transfers.len(), registry.links.len())
    }

    /// Ends all links and aborts all transfers; nothing comes in any more.
    pub fn end(&self) {
        self.shared.close();
        self.accepting.abort();
        self.alarms.abort();
    }

    /// Ends all links, aborts all transfers, and returns when no task is left.
    pub async fn close(mut self) {
        self.shared.close();
        self.alarms.abort();
        let _ = (&mut self.accepting).await;
        let _ = (&mut self.alarms).await;
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the tasks, the grants and the local senders share.
pub(crate) struct Shared {
    pub(crate) address: String,
    pub(crate) compatibility: String,
    /// The arena holds some of the model's heads.
    is_part: bool,
    arena: Arc<Arena>,
    /// Of what has come in whole.
    sums: Arc<Sums>,
    registry: Mutex<Registry>,
    alarm_set: Notify,
    closing: Notify,
    counts: Counts,
    tickets: OnceLock<Tickets>,
    ways: Ways,
    /// Where senders of this host bring their arenas.
    #[cfg(target_os = "linux")]
    porch: Mutex<Option<crate::shm::Porch>>,
    /// Where senders come over UCX.
    #[cfg(target_os = "linux")]
    harbour: Mutex<Option<crate::ucx::Harbour>>,
}

#[derive(Default)]
struct Registry {
    transfers: BTreeMap<TransferId, Held>,
    links: BTreeMap<LinkId, Arc<dyn Peer>>,
    /// Links that further connections may join.
    lanes: BTreeMap<LinkKey, Arc<Lanes>>,
    keys_made: u64,
    alarms: BTreeSet<(Instant, TransferId)>,
    transfers_granted: u64,
    links_joined: u64,
    closed: bool,
}

struct Held {
    pending: Arc<Mutex<Pending>>,
    alarm: Instant,
}

struct Pending {
    transfer: Transfer,
    /// What is written: the receiver's arena, or some heads of it.
    arena: Arc<Arena>,
    guard: Option<Guard>,
    done: Option<oneshot::Sender<Outcome>>,
    remains: Option<oneshot::Sender<Remains>>,
    /// Copies that our device is making into the blocks.
    flying: usize,
    /// The blocks are let go when the last of them has ended.
    is_due: bool,
}

/// What a grant is asked for.
pub(crate) struct Wanted {
    pub(crate) request: RequestId,
    pub(crate) epoch: Epoch,
    pub(crate) blocks: Vec<BlockId>,
    pub(crate) deadline: Duration,
}

impl Shared {
    /// Grants blocks of `arena`. `before` names the attempt that this one goes on from.
    fn grant(
        &self,
        wanted: Wanted,
        before: Option<(TransferId, u32)>,
        arena: Arc<Arena>,
        slice: Option<HeadSlice>,
        guard: Guard,
    ) -> (Grant, Waits) {
        let (done, done_waits) = oneshot::channel();
        let (remains, remains_wait) = oneshot::channel();
        let deadline = wanted.deadline.min(Duration::from_millis(REQUEST_DEADLINE_MS));
        let mut registry = self.registry();
        let (transfer, attempt) = match before {
            Some((transfer, attempt)) => (transfer, attempt + 1),
            None => {
                registry.transfers_granted += 1;
                (TransferId(registry.transfers_granted), 1)
            }
        };
        let Wanted { request, epoch, blocks, .. } = wanted;
        let (address, layout, deadline_ms) = (self.address.clone(), *arena.layout(), deadline.as_millis() as u64);
        let ticket = 0;
        let mut grant =
            Grant { transfer, attempt, epoch, request, address, layout, slice, blocks, deadline_ms, ticket };
        grant.ticket = self.tickets.get().map_or(0, |tickets| tickets.of(&grant));
        let transfer = Transfer::new(grant.clone());
        let (guard, done, remains) = (Some(guard), Some(done), Some(remains));
        let pending = Pending { transfer, arena, guard, done, remains, flying: 0, is_due: false };
        let alarm = Instant::now() + deadline;
        registry.transfers.insert(grant.transfer, Held { pending: Arc::new(Mutex::new(pending)), alarm });
        registry.alarms.insert((alarm, grant.transfer));
        let closed = registry.closed;
        drop(registry);
        self.counts.granted.add(1);
        self.alarm_set.notify_one();
        if closed {
            self.step(grant.transfer, LinkId::NONE, Event::Closed);
        }
        (grant, Waits { done: done_waits, remains: remains_wait })
    }

    /// Lets the transfer decide about an event, and does what it says.
    pub(crate) fn step(&self, id: TransferId, link: LinkId, event: Event) {
        let Some(pending) = self.pending(id) else {
            return self.step_unknown(id, link, event);
        };
        let (tag, actions) = {
            let mut pending = lock(&pending);
            (pending.transfer.grant.tag(), pending.transfer.step(link, event))
        };
        actions.into_iter().for_each(|action| self.act(tag, &pending, action));
    }

    fn step_unknown(&self, id: TransferId, link: LinkId, event: Event) {
        let actions = match event {
            Event::Open { .. } => refuse(link, Dropped::Unknown),
            Event::Commit { .. } => vec![Action::Count(Dropped::Unknown)],
            _ => Vec::new(),
        };
        for action in actions {
            match action {
                Action::Count(reason) => self.counts.drop(reason),
                Action::Tell(link, body) => self.tell(link, Tag { transfer: id, ..Tag::default() }, body),
                _ => unreachable!("refusals count and tell"),
            }
        }
    }

    fn act(&self, tag: Tag, pending: &Mutex<Pending>, action: Action) {
        match action {
            Action::Tell(link, body) => self.tell(link, tag, body),
            Action::Count(reason) => self.counts.drop(reason),
            Action::Alarm(after) => self.set_alarm(tag.transfer, after),
            Action::CloseLink(link) => {
                self.counts.unquiesced.add(1);
                if let Some(peer) = self.peer(link) {
                    peer.close();
                }
            }
            Action::Complete(received) => {
                self.forget(tag.transfer);
                self.counts.completed.add(1);
                let (guard, done) = {
                    let mut pending = lock(pending);
                    (pending.guard.take(), pending.done.take())
                };
                if let (Some(guard), Some(done)) = (guard, done) {
                    let _ = done.send(Ok((guard, received)));
                }
            }
            Action::Release => {
                {
                    let mut pending = lock(pending);
                    if pending.flying > 0 {
                        pending.is_due = true;
                        return;
                    }
                }
                self.release(tag.transfer, pending);
            }
            Action::Again(extents) => self.counts.again.add(extents),
            Action::Fail(error) => {
                self.counts.failed.add(1);
                tracing::debug!(transfer = tag.transfer.0, %error, "transfer failed");
                let done = lock(pending).done.take();
                if let Some(done) = done {
                    let _ = done.send(Err(error));
                }
                if planted::is(Bug::FreeEarly) {
                    let freed = lock(pending).part();
                    drop(freed);
                }
            }
        }
    }

    /// Nothing can write the blocks any more.
    fn release(&self, id: TransferId, pending: &Mutex<Pending>) {
        self.forget(id);
        let kept = lock(pending).part();
        // Whoever did not stay for it drops the guard here, outside the lock.
        if planted::is(Bug::LeakOnAbort) {
            return std::mem::forget(kept);
        }
        if let Some((tell, remains)) = kept {
            let _ = tell.send(remains);
        }
    }

    /// Maps a sender's memory for this arena's device to read.
    pub(crate) fn map_device(&self, descriptor: OwnedFd, bytes: usize) -> io::Result<Arc<dyn DeviceSource>> {
        let none = || io::Error::other("this end has no device");
        self.arena.device().ok_or_else(none)?.map(descriptor, bytes)
    }

    /// Takes a sender's message about a transfer. An error is a message that no sender says.
    pub(crate) fn hear(&self, link: &Link, message: Message) -> Result<(), BadFrame> {
        let tag = message.tag;
        match message.body {
            Body::Open { ticket, .. } => self.check_ticket(link, tag, ticket)?,
            Body::Ping => {}
            _ => self.refuse_forged(link, tag)?,
        }
        let event = match message.body {
            Body::Open { request, grant, .. } => Event::Open { tag, request, grant, resends: link.resends() },
            Body::Commit(summary) => Event::Commit { tag, summary },
            Body::Abort { reason, quiesced } => Event::Abort { reason, quiesced },
            Body::Aborted { quiesced: true } => Event::Quiesced,
            Body::Aborted { quiesced: false } | Body::Ping => return Ok(()),
            body => return Err(BadFrame::Shape(body.kind())),
        };
        self.step(tag.transfer, link.id, event);
        Ok(())
    }

    /// An OPEN of what was granted, by somebody who was not given the ticket. One of what is over is refused as ever.
    fn check_ticket(&self, link: &Link, tag: Tag, shown: Option<u128>) -> Result<(), BadFrame> {
        let (Some(tickets), Some(pending)) = (self.tickets.get(), self.pending(tag.transfer)) else { return Ok(()) };
        let admitted = {
            let grant = &lock(&pending).transfer.grant;
            // A grant without a ticket is older than the tickets.
            grant.tag() != tag || grant.ticket == 0 || tickets.admit(link, grant, shown)
        };
        if admitted { Ok(()) } else { self.forged() }
    }

    /// Anything else about a transfer, by somebody who has not opened it.
    fn refuse_forged(&self, link: &Link, tag: Tag) -> Result<(), BadFrame> {
        let (Some(_), Some(pending)) = (self.tickets.get(), self.pending(tag.transfer)) else { return Ok(()) };
        let is_forged = lock(&pending).transfer.is_forged(link.id, tag);
        if is_forged { self.forged() } else { Ok(()) }
    }

    fn forged(&self) -> Result<(), BadFrame> {
        self.counts.drop(Dropped::Forged);
        Err(BadFrame::Forged)
    }

    /// A new link, to the peer that `peer` makes for its number.
    pub(crate) fn join(&self, peer: impl FnOnce(LinkId) -> Arc<dyn Peer>) -> LinkId {
        let link = self.new_link();
        self.join_as(link, peer(link));
        link
    }

    fn join_as(&self, link: LinkId, peer: Arc<dyn Peer>) {
        self.registry().links.insert(link, peer);
    }

    /// A number for a link that is about to join.
    fn new_link(&self) -> LinkId {
        let mut registry = self.registry();
        registry.links_joined += 1;
        LinkId(registry.links_joined)
    }

    /// The link is closed: nothing more comes over it.
    pub(crate) fn leave(&self, link: LinkId) {
        let transfers: Vec<TransferId> = {
            let mut registry = self.registry();
            registry.links.remove(&link);
            registry.transfers.keys().copied().collect()
        };
        transfers.into_iter().for_each(|id| self.step(id, link, Event::LinkClosed));
    }

    fn close(&self) {
        let transfers: Vec<TransferId> = {
            let mut registry = self.registry();
            registry.closed = true;
            registry.transfers.keys().copied().collect()
        };
        transfers.into_iter().for_each(|id| self.step(id, LinkId::NONE, Event::Closed));
        self.closing.notify_one();
        #[cfg(target_os = "linux")]
        {
            drop(lock(&self.porch).take());
            drop(lock(&self.harbour).take());
        }
    }

    /// The name under which a process of this host finds this receiver.
    #[cfg(target_os = "linux")]
    fn offer(self: &Arc<Self>) -> Option<String> {
        if self.registry().closed || self.ways.preferred == Preferred::Tcp {
            return None;
        }
        let mut porch = lock(&self.porch);
        if porch.is_none() {
            let made = crate::shm::Porch::open(self);
            *porch = made.inspect_err(|error| tracing::warn!(%error, "no socket for senders of this host")).ok();
        }
        let port = self.address.rsplit(':').next().unwrap_or_default();
        porch.as_ref().map(|porch| format!("{} {port}", porch.name()))
    }

    #[cfg(not(target_os = "linux"))]
    fn offer(self: &Arc<Self>) -> Option<String> {
        None
    }

    /// The port at which senders come over UCX, and the one at which they are now.
    #[cfg(target_os = "linux")]
    fn harbour(&self) -> Option<String> {
        let here = self.address.rsplit(':').next().unwrap_or_default();
        lock(&self.harbour).as_ref().map(|harbour| format!("{} {here}", harbour.port()))
    }

    #[cfg(not(target_os = "linux"))]
    fn harbour(&self) -> Option<String> {
        None
    }

    pub(crate) fn layout(&self) -> BlockLayout {
        *self.arena.layout()
    }

    fn tell(&self, link: LinkId, tag: Tag, body: Body) {
        if let Some(peer) = self.peer(link) {
            peer.tell(tag, body);
        }
    }

    fn peer(&self, link: LinkId) -> Option<Arc<dyn Peer>> {
        self.registry().links.get(&link).cloned()
    }

    /// What a transfer moves.
    fn moving(&self, id: TransferId) -> Option<(BlockLayout, Option<HeadSlice>)> {
        let pending = self.pending(id)?;
        let grant = &lock(&pending).transfer.grant;
        Some((grant.layout, grant.slice))
    }

    fn pending(&self, id: TransferId) -> Option<Arc<Mutex<Pending>>> {
        self.registry().transfers.get(&id).map(|held| held.pending.clone())
    }

    fn forget(&self, id: TransferId) {
        let mut registry = self.registry();
        if let Some(held) = registry.transfers.remove(&id) {
            registry.alarms.remove(&(held.alarm, id));
        }
    }

    fn set_alarm(&self, id: TransferId, after: Duration) {
        let mut registry = self.registry();
        let Registry { transfers, alarms, .. } = &mut *registry;
        let Some(held) = transfers.get_mut(&id) else {
            return;
        };
        alarms.remove(&(held.alarm, id));
        held.alarm = Instant::now() + after;
        alarms.insert((held.alarm, id));
        drop(registry);
        self.alarm_set.notify_one();
    }

    fn next_alarm(&self) -> Option<(Instant, TransferId)> {
        self.registry().alarms.first().copied()
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        lock(&self.registry)
    }
}

impl Pending {
    fn arrived(&mut self, counts: &Counts, layer: u32, entry: &Entry) {
        let bytes = self.transfer.grant.layout.layer_bytes();
        self.transfer.arrived(layer, entry, bytes);
        counts.extents.add(1);
        counts.bytes.add(bytes as u64);
    }

    /// The guard and what arrived, for whoever waits for them.
    fn part(&mut self) -> Option<(oneshot::Sender<Remains>, Remains)> {
        let (tell, guard) = (self.remains.take()?, self.guard.take()?);
        let grant = self.transfer.grant.clone();
        let whole = (0..grant.blocks.len()).map(|position| self.transfer.whole(position)).collect();
        Some((tell, (grant, self.arena.clone(), guard, whole)))
    }
}

/// Rings the transfers' alarms.
async fn ring(shared: Arc<Shared>) {
    loop {
        let Some((at, id)) = shared.next_alarm() else {
            shared.alarm_set.notified().await;
            continue;
        };
        if timeout_at(at, shared.alarm_set.notified()).await.is_err() {
            let still_set = shared.registry().alarms.remove(&(at, id));
            if still_set {
                shared.step(id, LinkId::NONE, Event::Alarm);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
