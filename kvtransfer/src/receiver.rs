//! The decode side: grants blocks, takes what senders write into them, and says when a transfer is complete.
//!
//! One task accepts, one per connection reads and writes, and one keeps the alarms, so that a receiver that is busy or
//! full still cleans up. What is done about an event is decided in `transfer`; this file carries it out.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_core::limits::{
    HANDOFF_ACK_BYTES, HANDOFF_BACKOFF_MS, HANDOFF_CONNECT_MS, HANDOFF_LINKS_MAX, REQUEST_DEADLINE_MS,
};
use baton_core::{Aborted, Arena, BlockId, Epoch, Listener, Net, RequestId, Stream, TransferId};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::counters::{Counters, Counts, Dropped};
use crate::frames::{Frames, ReadError};
use crate::link::{LinkId, Peer};
use crate::outbox::{Outbox, write_all};
use crate::transfer::{Action, Event, Received, Transfer, refuse};
use crate::wire::{self, BadFrame, Body, Header, Kind, Message, Tag};
use crate::{Grant, TransferError, extent};

type Guard = Box<dyn Any + Send>;
type Outcome = Result<(Guard, Received), TransferError>;

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
        if !extent::fits(arena.layout()) {
            let text = format!("blocks of {} do not fit the wire's frames", arena.layout().describe());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let listener = net.listen(address).await?;
        let shared = Arc::new(Shared {
            address: listener.address(),
            compatibility: wire::compatibility(arena.layout(), model),
            arena,
            registry: Mutex::default(),
            alarm_set: Notify::new(),
            closing: Notify::new(),
            counts: Counts::default(),
        });
        let accepting = tokio::spawn(accept(shared.clone(), listener));
        let alarms = tokio::spawn(ring(shared.clone()));
        Ok(Receiver { shared, accepting, alarms })
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
        let (grant, done) = self.shared.grant(request, epoch, blocks, deadline, Box::new(guard));
        let incoming = Incoming { shared: self.shared.clone(), transfer: grant.transfer, done, guard: PhantomData };
        (grant, incoming)
    }

    pub fn counters(&self) -> Counters {
        let registry = self.shared.registry();
        self.shared.counts.snapshot(registry.transfers.len(), registry.links.len())
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
        self.shared.close();
        self.accepting.abort();
        self.alarms.abort();
    }
}

/// A transfer that was granted. Dropping it aborts the transfer.
pub struct Incoming<G> {
    shared: Arc<Shared>,
    transfer: TransferId,
    done: oneshot::Receiver<Outcome>,
    guard: PhantomData<fn() -> G>,
}

impl<G: 'static> Incoming<G> {
    /// Returns the guard once every layer of every block has arrived, verified, and the sender has committed to
    /// exactly that.
    pub async fn wait(mut self) -> Result<(G, Received), TransferError> {
        let outcome = (&mut self.done).await.unwrap_or(Err(TransferError::Aborted(Aborted::Draining)));
        let (guard, received) = outcome?;
        Ok((*guard.downcast().expect("`open` stored a G"), received))
    }
}

impl<G> Drop for Incoming<G> {
    fn drop(&mut self) {
        self.shared.step(self.transfer, LinkId::NONE, Event::Dropped);
    }
}

/// What the tasks, the grants and the local senders share.
pub(crate) struct Shared {
    pub(crate) address: String,
    pub(crate) compatibility: String,
    arena: Arc<Arena>,
    registry: Mutex<Registry>,
    alarm_set: Notify,
    closing: Notify,
    counts: Counts,
}

#[derive(Default)]
struct Registry {
    transfers: BTreeMap<TransferId, Held>,
    links: BTreeMap<LinkId, Arc<dyn Peer>>,
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
    guard: Option<Guard>,
    done: Option<oneshot::Sender<Outcome>>,
}

impl Shared {
    fn grant(
        &self,
        request: RequestId,
        epoch: Epoch,
        blocks: Vec<BlockId>,
        deadline: Duration,
        guard: Guard,
    ) -> (Grant, oneshot::Receiver<Outcome>) {
        let (done, waiting) = oneshot::channel();
        let deadline = deadline.min(Duration::from_millis(REQUEST_DEADLINE_MS));
        let (address, layout, deadline_ms) = (self.address.clone(), *self.arena.layout(), deadline.as_millis() as u64);
        let mut registry = self.registry();
        registry.transfers_granted += 1;
        let transfer = TransferId(registry.transfers_granted);
        let grant = Grant { transfer, attempt: 1, epoch, request, address, layout, blocks, deadline_ms };
        let pending = Pending { transfer: Transfer::new(grant.clone()), guard: Some(guard), done: Some(done) };
        let alarm = Instant::now() + deadline;
        registry.transfers.insert(transfer, Held { pending: Arc::new(Mutex::new(pending)), alarm });
        registry.alarms.insert((alarm, transfer));
        let closed = registry.closed;
        drop(registry);
        self.counts.granted.add(1);
        self.alarm_set.notify_one();
        if closed {
            self.step(transfer, LinkId::NONE, Event::Closed);
        }
        (grant, waiting)
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
                let (guard, done) = lock(pending).take();
                if let (Some(guard), Some(done)) = (guard, done) {
                    let _ = done.send(Ok((guard, received)));
                }
            }
            Action::Release => {
                self.forget(tag.transfer);
                let guard = lock(pending).guard.take();
                drop(guard);
            }
            Action::Fail(error) => {
                self.counts.failed.add(1);
                tracing::debug!(transfer = tag.transfer.0, %error, "transfer failed");
                let done = lock(pending).done.take();
                if let Some(done) = done {
                    let _ = done.send(Err(error));
                }
            }
        }
    }

    /// Takes a DATA frame: what may be written is written, what may not is counted.
    pub(crate) fn data(&self, link: LinkId, header: &Header, payload: &[u8]) {
        let id = header.tag.transfer;
        let Some(pending) = self.pending(id) else {
            return self.counts.drop(Dropped::Unknown);
        };
        let damaged = lock(&pending).store(&self.arena, &self.counts, link, header, payload).err();
        if let Some(event) = damaged {
            self.counts.drop(Dropped::Damaged);
            self.step(id, link, event);
        }
    }

    /// Takes a sender's message about a transfer. An error is a message that no sender says.
    pub(crate) fn hear(&self, link: LinkId, message: Message) -> Result<(), BadFrame> {
        let tag = message.tag;
        let event = match message.body {
            Body::Open { request, grant } => Event::Open { tag, request, grant },
            Body::Commit(summary) => Event::Commit { tag, summary },
            Body::Abort { reason, quiesced } => Event::Abort { reason, quiesced },
            Body::Aborted { quiesced: true } => Event::Quiesced,
            Body::Aborted { quiesced: false } | Body::Ping => return Ok(()),
            body => return Err(BadFrame::Shape(body.kind())),
        };
        self.step(tag.transfer, link, event);
        Ok(())
    }

    /// A new link, to the peer that `peer` makes for its number.
    pub(crate) fn join(&self, peer: impl FnOnce(LinkId) -> Arc<dyn Peer>) -> LinkId {
        let mut registry = self.registry();
        registry.links_joined += 1;
        let link = LinkId(registry.links_joined);
        registry.links.insert(link, peer(link));
        link
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
    }

    fn tell(&self, link: LinkId, tag: Tag, body: Body) {
        if let Some(peer) = self.peer(link) {
            peer.tell(tag, body);
        }
    }

    fn peer(&self, link: LinkId) -> Option<Arc<dyn Peer>> {
        self.registry().links.get(&link).cloned()
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
    /// Writes the extents of a frame; an error is what the damage means for the transfer.
    fn store(
        &mut self,
        arena: &Arena,
        counts: &Counts,
        link: LinkId,
        header: &Header,
        payload: &[u8],
    ) -> Result<(), Event> {
        if let Err(reason) = self.transfer.admit(link, header) {
            counts.drop(reason);
            return Ok(());
        }
        let (layer, layer_bytes) = (header.layer as u32, arena.layout().layer_bytes());
        let extents = wire::extents(header, payload, layer_bytes);
        for (entry, bytes) in extents.map_err(|_| Event::Damaged { layer, position: 0 })? {
            if let Err(reason) = self.transfer.expects(layer, &entry) {
                counts.drop(reason);
                continue;
            }
            if !self.transfer.intact(layer, &entry, bytes) {
                return Err(Event::Damaged { layer, position: entry.position });
            }
            extent::store(arena, entry.block, layer, bytes);
            self.transfer.arrived(layer, &entry, layer_bytes);
            counts.extents.add(1);
            counts.bytes.add(layer_bytes as u64);
        }
        Ok(())
    }

    fn take(&mut self) -> (Option<Guard>, Option<oneshot::Sender<Outcome>>) {
        (self.guard.take(), self.done.take())
    }
}

/// Accepts connections until the receiver closes, and then ends them. Aborting it aborts them.
async fn accept(shared: Arc<Shared>, mut listener: Box<dyn Listener>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(stream) if connections.len() < HANDOFF_LINKS_MAX => {
                    connections.spawn(serve(shared.clone(), stream));
                }
                Ok(_) => tracing::warn!("more than {HANDOFF_LINKS_MAX} links: connection refused"),
                Err(error) => {
                    tracing::warn!(%error, "accept on the handoff address");
                    sleep(Duration::from_millis(HANDOFF_BACKOFF_MS)).await;
                }
            },
            Some(_) = connections.join_next() => {}
            () = shared.closing.notified() => return connections.shutdown().await,
        }
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

/// One connection, from its greeting to its end.
async fn serve(shared: Arc<Shared>, stream: Stream) {
    let (read, mut write) = tokio::io::split(stream);
    let mut frames = Frames::new(read);
    let greeting = greet(&shared, &mut frames, &mut write);
    match timeout(Duration::from_millis(HANDOFF_CONNECT_MS), greeting).await {
        Ok(Ok(true)) => {}
        _ => return,
    }
    frames.widen();
    let outbox = Arc::new(Outbox::new());
    let link = shared.join(|_| outbox.clone());
    let cause = tokio::select! {
        cause = read_all(&shared, link, &outbox, &mut frames) => cause,
        cause = outbox.write(&mut write) => cause.into(),
        cause = outbox.closed() => cause.into(),
    };
    tracing::debug!(%cause, "link closed");
    shared.leave(link);
}

/// Compares the two ends' texts before anything else is looked at. False: they do not fit, and the sender knows.
async fn greet<R, W>(shared: &Shared, frames: &mut Frames<R>, to: &mut W) -> Result<bool, ReadError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let ours = shared.compatibility.clone();
    let fits = match frames.message().await {
        Ok(Message { body: Body::Hello(theirs), .. }) => theirs == ours,
        Err(ReadError::Frame(BadFrame::Version { .. })) => false,
        Ok(message) => return Err(BadFrame::Shape(message.body.kind()).into()),
        Err(error) => return Err(error),
    };
    let body = if fits { Body::Hello(ours) } else { Body::Mismatch(ours) };
    write_all(to, &Message { tag: Tag::default(), body }.encode()).await?;
    to.flush().await?;
    if !fits {
        shared.counts.mismatched.add(1);
        to.shutdown().await?;
    }
    Ok(fits)
}

/// Takes frames until the link fails.
async fn read_all<R: AsyncRead + Unpin>(
    shared: &Shared,
    link: LinkId,
    outbox: &Outbox,
    frames: &mut Frames<R>,
) -> ReadError {
    let (mut taken, mut acknowledged) = (0, 0);
    loop {
        let (header, payload) = match frames.next().await {
            Ok(frame) => frame,
            Err(error) => return error,
        };
        if header.kind != Kind::Data {
            let heard = Message::decode(&header, payload).and_then(|message| shared.hear(link, message));
            match heard {
                Ok(()) => continue,
                Err(error) => return error.into(),
            }
        }
        if header.sequence > taken {
            return BadFrame::Gap { expected: taken, found: header.sequence }.into();
        }
        if header.sequence < taken {
            shared.counts.drop(Dropped::Replayed);
            continue;
        }
        shared.data(link, &header, payload);
        taken += header.length as u64;
        if taken - acknowledged >= HANDOFF_ACK_BYTES as u64 {
            acknowledged = taken;
            outbox.ack(taken);
            tokio::task::yield_now().await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
