//! The sender's end of one link, which carries many transfers: their bytes, or over shared memory where they are. Over the network it
//! may have several connections, its lanes: DATA takes the first that has room, and the link ends with the first that fails.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_core::limits::{HANDOFF_CONNECT_MS, HANDOFF_CREDIT_BYTES};
use baton_core::{BlockId, Net, Refused, Stream, TransferId};
use tokio::io::{AsyncRead, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout};

use crate::TransferError;
use crate::counters::LinkKind;
use crate::extent::{self, Data, Sent};
use crate::frames::{Frames, ReadError};
use crate::loan::Borrowed;
use crate::outbox::{Outbox, PLACES, write_all};
use crate::sending::Sending;
use crate::sums::Sums;
use crate::tls::{self, Tls};
use crate::wire::{
    BY_REFERENCE, BadFrame, Body, ENTRY_BYTES, FEATURE_DEVICE, FEATURE_LANES, FEATURE_SHARED, FEATURE_TICKETS,
    FEATURE_UCX, Header, LinkKey, Message, ON_DEVICE, Tag, VERSION,
};

/// Frames by reference of a link that are under way: they take no memory, and the more there are the fewer times either
/// end has to wake the other.
const REFERENCES: usize = 64;

/// A link that is up.
pub(crate) struct Connection {
    peer: String,
    by: By,
    /// What both ends can do (`wire::FEATURE_*`).
    features: u16,
    /// Its connections. All but DATA and what acknowledges it goes over the first one.
    lanes: Vec<Lane>,
    /// Payload bytes that may still be sent before the receiver acknowledges some.
    credits: Semaphore,
    /// None once the connection is dead.
    sending: Mutex<Option<BTreeMap<TransferId, Arc<Sending>>>>,
}

/// One connection of a link.
struct Lane {
    outbox: Outbox,
    /// DATA payload bytes that the receiver has taken.
    acknowledged: watch::Sender<u64>,
}

impl Lane {
    fn new(places: usize) -> Lane {
        Lane { outbox: Outbox::new(places), acknowledged: watch::Sender::new(0) }
    }
}

/// What a connection goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    Tcp,
    Tls,
    /// The receiver copies extents out of our arena.
    Reference,
    Ucx,
}

/// A greeted stream.
pub(crate) struct Greeted {
    frames: Frames<ReadHalf<Stream>>,
    write: WriteHalf<Stream>,
    /// What both ends can do (`wire::FEATURE_*`).
    pub(crate) features: u16,
    /// Where the receiver can be found by a process of its host, if it said so.
    pub(crate) offer: Option<String>,
    /// The port at which the receiver is reached over UCX, and the one it listens on, if it said so.
    pub(crate) harbour: Option<(u16, u16)>,
    /// What further connections of the link are to name, if it may have some.
    pub(crate) key: Option<LinkKey>,
    pub(crate) by: By,
}

/// What an end says of itself when it greets.
pub(crate) struct Hello<'a> {
    pub(crate) text: &'a str,
    /// What this end can do (`wire::FEATURE_*`).
    pub(crate) features: u16,
    /// The link that a further connection is for, and its number.
    pub(crate) joins: Option<(LinkKey, u32)>,
}

/// Connects, under TLS if there is one, and compares texts.
pub(crate) async fn connect(
    net: &dyn Net,
    tls: Option<&Tls>,
    address: &str,
    hello: Hello<'_>,
) -> Result<Greeted, TransferError> {
    let lost = |cause: String| TransferError::Lost { peer: address.to_string(), cause };
    let connecting = async {
        let stream = net.connect(address).await.map_err(|error| lost(format!("connect: {error}")))?;
        let Some(tls) = tls else { return greet(stream, address, hello).await };
        let greeted = greet(tls.connect(stream, address).await?, address, hello).await?;
        Ok(Greeted { by: By::Tls, ..greeted })
    };
    within(address, connecting).await
}

/// Bounds what a peer may take to greet.
pub(crate) async fn within<T>(
    address: &str,
    greeting: impl Future<Output = Result<T, TransferError>>,
) -> Result<T, TransferError> {
    let silent = |_| TransferError::Lost {
        peer: address.to_string(),
        cause: format!("no greeting in wire version {VERSION} within {HANDOFF_CONNECT_MS} ms"),
    };
    timeout(Duration::from_millis(HANDOFF_CONNECT_MS), greeting).await.map_err(silent)?
}

/// The sender's side of a greeting over a new stream.
pub(crate) async fn greet(stream: Stream, address: &str, hello: Hello<'_>) -> Result<Greeted, TransferError> {
    let Hello { text: ours, features, joins } = hello;
    let lost = |cause: String| TransferError::Lost { peer: address.to_string(), cause };
    let (read, mut write) = tokio::io::split(stream);
    let tag = joins.map_or(Tag::default(), |(link, lane)| link.tag(lane));
    let hello = Message { tag, body: Body::Hello { text: ours.to_string(), features } };
    let said = async {
        write_all(&mut write, &hello.encode()).await?;
        write.flush().await
    };
    said.await.map_err(|error| lost(format!("greet: {error}")))?;
    let mut frames = Frames::new(read);
    let (theirs, common, tag) = match frames.message().await {
        Ok(Message { body: Body::Hello { text, features: theirs }, tag }) => (text, features & theirs, tag),
        Ok(Message { body: Body::Mismatch(theirs), tag }) => (theirs, 0, tag),
        Err(ReadError::Frame(BadFrame::Version { theirs })) => (format!("wire {theirs}"), 0, Tag::default()),
        Ok(message) => return Err(lost(format!("greeted with {:?}", message.body.kind()))),
        // Only the first answer tells whether the receiver takes this end's certificate.
        Err(ReadError::Io(error)) => {
            return Err(tls::refused(address, &error).unwrap_or_else(|| lost(format!("greeting: {error}"))));
        }
        Err(error) => return Err(lost(format!("greeting: {error}"))),
    };
    if theirs != ours {
        return Err(TransferError::Incompatible { ours: ours.to_string(), theirs });
    }
    let mut offer = None;
    if common & FEATURE_SHARED != 0 {
        match frames.message().await {
            Ok(Message { body: Body::Offer(name), .. }) => offer = Some(name),
            Ok(message) => return Err(lost(format!("offered {:?}", message.body.kind()))),
            Err(error) => return Err(lost(format!("offer: {error}"))),
        }
    }
    let mut harbour = None;
    if common & FEATURE_UCX != 0 {
        match frames.message().await {
            Ok(Message { body: Body::Offer(ports), .. }) => {
                let both = ports.split_once(' ').map(|(over_ucx, here)| (over_ucx.parse(), here.parse()));
                harbour = both.and_then(|(over_ucx, here)| Some((over_ucx.ok()?, here.ok()?)));
            }
            Ok(message) => return Err(lost(format!("offered {:?}", message.body.kind()))),
            Err(error) => return Err(lost(format!("offer: {error}"))),
        }
    }
    let key = (common & FEATURE_LANES != 0).then(|| LinkKey::of(tag).0);
    Ok(Greeted { frames, write, features: common, offer, harbour, key, by: By::Tcp })
}

/// What one `send` has under way.
#[derive(Default)]
pub(crate) struct Flight {
    borrowed: Borrowed,
    /// DATA payload bytes of the last frame's connection up to its end.
    end: u64,
}

impl Connection {
    /// Of so many connections.
    pub(crate) fn new(peer: &str, by: By, features: u16, lanes: usize) -> Connection {
        let places = if by == By::Reference { REFERENCES } else { PLACES };
        Connection {
            peer: peer.to_string(),
            by,
            features,
            lanes: (0..lanes.max(1)).map(|_| Lane::new(places)).collect(),
            credits: Semaphore::new(HANDOFF_CREDIT_BYTES),
            sending: Mutex::new(Some(BTreeMap::new())),
        }
    }

    /// Reads and writes one of its connections until that fails, and says why.
    pub(crate) async fn run(&self, lane: usize, greeted: Greeted) -> String {
        let Greeted { mut frames, mut write, .. } = greeted;
        let outbox = &self.lanes[lane].outbox;
        tokio::select! {
            cause = self.read(lane, &mut frames) => cause.to_string(),
            cause = outbox.write(&mut write) => cause.to_string(),
            cause = outbox.closed() => cause.to_string(),
        }
    }

    pub(crate) fn tell(&self, tag: Tag, body: Body) {
        self.lanes[0].outbox.tell(tag, body);
    }

    /// Makes the receiver wait, before it takes what is told next, for what has been queued on the other connections.
    pub(crate) fn tell_barrier(&self) {
        let sent = self.lanes.iter().enumerate().skip(1).map(|(at, lane)| (at as u32, lane));
        let awaited = sent.map(|(at, lane)| (at, lane.outbox.sequence(), *lane.acknowledged.borrow()));
        let awaited = awaited.filter(|(_, sent, taken)| sent > taken).map(|(at, sent, _)| (at, sent));
        let awaited: Vec<(u32, u64)> = awaited.collect();
        if !awaited.is_empty() {
            self.tell(Tag::default(), Body::Barrier(awaited));
        }
    }

    /// Fails every transfer of the connection.
    pub(crate) fn fail(&self, cause: &str) {
        let sending = self.sending().take().unwrap_or_default();
        for transfer in sending.values() {
            transfer.fail(self.lost(cause));
        }
        self.credits.close();
        self.lanes.iter().for_each(|lane| lane.outbox.close());
    }

    pub(crate) fn enrol(&self, transfer: TransferId) -> Result<Arc<Sending>, TransferError> {
        let mut sending = self.sending();
        let Some(transfers) = sending.as_mut() else {
            return Err(self.lost("closed"));
        };
        if transfers.contains_key(&transfer) {
            return Err(TransferError::Refused(Refused::Stale));
        }
        let new = Arc::new(Sending::new());
        transfers.insert(transfer, new.clone());
        Ok(new)
    }

    pub(crate) fn strike(&self, transfer: TransferId) {
        if let Some(transfers) = self.sending().as_mut() {
            transfers.remove(&transfer);
        }
    }

    pub(crate) fn by(&self) -> By {
        self.by
    }

    pub(crate) fn kind(&self) -> LinkKind {
        match self.by {
            By::Tcp => LinkKind::Tcp,
            By::Tls => LinkKind::Tls,
            By::Reference if self.reads_device() => LinkKind::Gpu,
            By::Reference => LinkKind::Shm,
            By::Ucx => LinkKind::Ucx,
        }
    }

    pub(crate) fn takes_tickets(&self) -> bool {
        self.features & FEATURE_TICKETS != 0
    }

    pub(crate) fn by_reference(&self) -> bool {
        self.by == By::Reference
    }

    /// The receiver has mapped this end's memory on a device.
    pub(crate) fn reads_device(&self) -> bool {
        self.by_reference() && self.features & FEATURE_DEVICE != 0
    }

    /// Sends one frame once there are a place and credit for it; of several transfers the one that is `due` first. Its source blocks
    /// are read until the flight has `landed` or is dropped. What it has is added to `sent`.
    pub(crate) async fn send(
        &self,
        sending: &Sending,
        due: Instant,
        frame: Frame<'_>,
        flight: &mut Flight,
        sent: &mut Vec<Sent>,
    ) -> Result<(), TransferError> {
        tokio::select! {
            biased;
            error = sending.failed() => Err(error),
            pushed = self.send_when_possible(sending, due, frame, flight, sent) => pushed,
        }
    }

    /// Nothing is lost or held when the future is dropped.
    async fn send_when_possible(
        &self,
        sending: &Sending,
        due: Instant,
        frame: Frame<'_>,
        flight: &mut Flight,
        sent: &mut Vec<Sent>,
    ) -> Result<(), TransferError> {
        let layer_bytes = if self.by_reference() { 0 } else { frame.arena.layout().layer_bytes() };
        let bytes = frame.blocks.len() * (ENTRY_BYTES + layer_bytes);
        // The first that has a place; while none has, the one for which fewest wait.
        let lane = self.lanes.iter().min_by_key(|lane| lane.outbox.waiting()).expect("a link has a connection");
        let Some(place) = lane.outbox.place(due).await else { return Err(self.lost("closed")) };
        let Ok(credit) = self.credits.acquire_many(bytes as u32).await else {
            return Err(self.lost("closed"));
        };
        let mut data = Data::default();
        let header = frame.gather(&mut data, self.by_reference(), sent);
        let pushed = sending.writing(|| {
            credit.forget();
            lane.outbox.push(place, header, data)
        });
        let (loan, end) = pushed?;
        flight.borrowed.push(loan);
        flight.end = end;
        Ok(())
    }

    /// Returns when the source blocks of a flight are not read any more: written, or by reference copied.
    pub(crate) async fn landed(&self, sending: &Sending, flight: &Flight) -> Result<(), TransferError> {
        let landing = async {
            if !self.by_reference() {
                return flight.borrowed.written().await;
            }
            let mut acknowledged = self.lanes[0].acknowledged.subscribe();
            // It ends with the connection, which fails the transfer.
            let _ = acknowledged.wait_for(|bytes| *bytes >= flight.end).await;
        };
        tokio::select! {
            biased;
            () = landing => Ok(()),
            error = sending.failed() => Err(error),
        }
    }

    async fn read<R: AsyncRead + Unpin>(&self, lane: usize, frames: &mut Frames<R>) -> ReadError {
        loop {
            let message = match frames.message().await {
                Ok(message) => message,
                Err(error) => return error,
            };
            if let Err(error) = self.hear(lane, message) {
                return error.into();
            }
        }
    }

    fn hear(&self, lane: usize, message: Message) -> Result<(), BadFrame> {
        let Message { tag, body } = message;
        let Lane { outbox, acknowledged: told } = &self.lanes[lane];
        match body {
            Body::Ack(bytes) => {
                let (sent, acknowledged) = (outbox.sequence(), *told.borrow());
                if !(acknowledged..=sent).contains(&bytes) {
                    return Err(BadFrame::Acknowledged { acknowledged: bytes, sent });
                }
                self.credits.add_permits((bytes - acknowledged) as usize);
                told.send_replace(bytes);
            }
            Body::Ping => {}
            body if lane > 0 => return Err(BadFrame::Shape(body.kind())),
            Body::Opened | Body::Committed(_) | Body::Refused(_) | Body::Resend(_) => self.hear_about(tag, body),
            Body::Abort { .. } => {
                self.hear_about(tag, body);
                self.tell(tag, Body::Aborted { quiesced: true });
            }
            body => return Err(BadFrame::Shape(body.kind())),
        }
        Ok(())
    }

    fn hear_about(&self, tag: Tag, body: Body) {
        let sending = self.sending().as_ref().and_then(|transfers| transfers.get(&tag.transfer).cloned());
        if let Some(sending) = sending {
            sending.hear(body);
        }
    }

    fn lost(&self, cause: &str) -> TransferError {
        TransferError::Lost { peer: self.peer.clone(), cause: cause.to_string() }
    }

    fn sending(&self) -> MutexGuard<'_, Option<BTreeMap<TransferId, Arc<Sending>>>> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one DATA frame is gathered from.
pub(crate) struct Frame<'a> {
    pub(crate) arena: &'a baton_core::Arena,
    pub(crate) grant: &'a crate::Grant,
    pub(crate) digest: u128,
    pub(crate) layer: usize,
    pub(crate) blocks: &'a [(usize, BlockId)],
    /// Checksums from earlier transfers, of the blocks that do not change.
    pub(crate) sums: &'a Sums,
    /// So many of the grant's blocks, from the first on, do not change.
    pub(crate) settled: usize,
    /// Out of the memory on a device: the unbound checksums of the blocks in their order.
    pub(crate) on_device: Option<&'a [u64]>,
}

impl Frame<'_> {
    fn gather(&self, data: &mut Data, by_reference: bool, sent: &mut Vec<Sent>) -> Header {
        let Frame { arena, grant, digest, layer, blocks, .. } = *self;
        let mut after = blocks.iter().skip(1).map(|(_, block)| block.index);
        let contents = |position: usize, block: BlockId| {
            let next = after.next();
            let compute = || extent::content(arena, block.index, layer, next);
            if position < self.settled { self.sums.of(layer, block, compute) } else { compute() }
        };
        let from = extent::Layer { arena, grant, digest, layer, blocks };
        match self.on_device {
            Some(known) => {
                let mut known = known.iter();
                let next = |_, _| *known.next().expect("a checksum for each block");
                data.enter(&from, BY_REFERENCE | ON_DEVICE, next, sent)
            }
            None => data.enter(&from, if by_reference { BY_REFERENCE } else { 0 }, contents, sent),
        }
    }
}
