//! The prefill side of one transfer.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use baton_core::arena::Arriving;
use baton_core::limits::{HANDOFF_CONNECT_MS, REQUEST_DEADLINE_MS};
use baton_core::{Aborted, Arena, BlockId};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};

use crate::connection::{By, Connection, Flight, Frame};
use crate::extent::{self, Sent};
use crate::link::{Link, LinkId, Peer};
use crate::links::Source;
use crate::receiver::Shared;
use crate::sending::Sending;
use crate::transfer::Event;
use crate::wire::{Body, FRAME_BLOCKS_MAX, Message, Summary, Tag};
use crate::{Grant, TransferError};

/// What the receiver confirmed.
pub type Committed = Summary;

/// Bytes of layers that leave a device together. Each time a receiver's process copies, a sender's process on the same GPU stands
/// still while the GPU changes over, which takes as long as copying some layers does.
const GATHERED_BYTES: usize = 128 << 20;

/// A transfer that the receiver has opened. Dropping it aborts the transfer.
pub struct Outgoing {
    source: Arc<Source>,
    /// What is sent: the source's arena, or some heads of it.
    arena: Arc<Arena>,
    grant: Grant,
    digest: u128,
    deadline: Instant,
    path: Path,
    sending: Arc<Sending>,
    sent: Summary,
    /// So many of the grant's blocks, from the first on, do not change while their generation lasts.
    settled: usize,
    /// What is sent lies in the arena's memory on a device.
    on_device: bool,
    /// What was sent and whence, should some be asked for again, in its order, and where each layer's piece of it ends.
    extents: Vec<Sent>,
    pieces: Vec<(usize, usize)>,
    /// Layers out of a device that leave with the next ones, and their bytes.
    gathered: Vec<Gathered>,
    gathered_bytes: usize,
    committed: bool,
}

/// How frames get to the receiver.
enum Path {
    Connection(Arc<Connection>),
    /// The receiver is in this process: it copies out of the source arena.
    Local {
        receiver: Arc<Shared>,
        link: LinkId,
    },
}

impl Outgoing {
    pub(crate) async fn over(
        source: Arc<Source>,
        arena: Arc<Arena>,
        connection: Arc<Connection>,
        grant: Grant,
        from_device: bool,
    ) -> Result<Outgoing, TransferError> {
        let sending = connection.enrol(grant.transfer)?;
        Outgoing::new(source, arena, Path::Connection(connection), sending, grant, from_device).open().await
    }

    pub(crate) async fn to_local(
        source: Arc<Source>,
        arena: Arc<Arena>,
        receiver: Arc<Shared>,
        grant: Grant,
    ) -> Result<Outgoing, TransferError> {
        let sending = Arc::new(Sending::new());
        let peer = |link| -> Arc<dyn Peer> {
            Arc::new(LocalPeer { receiver: receiver.clone(), link, sending: sending.clone() })
        };
        let link = receiver.join(peer);
        let path = Path::Local { receiver: receiver.clone(), link };
        Outgoing::new(source, arena, path, sending, grant, false).open().await
    }

    fn new(
        source: Arc<Source>,
        arena: Arc<Arena>,
        path: Path,
        sending: Arc<Sending>,
        grant: Grant,
        from_device: bool,
    ) -> Outgoing {
        let digest = grant.digest();
        let on_device = match &path {
            Path::Connection(connection) => from_device && connection.reads_device(),
            Path::Local { .. } => false,
        };
        let counts = &source.counts;
        let count = match &path {
            Path::Connection(connection) => match connection.by() {
                By::Tcp => &counts.tcp,
                By::Tls => &counts.tls,
                By::Reference if on_device => &counts.gpu,
                By::Reference => &counts.shm,
                By::Ucx => &counts.ucx,
            },
            Path::Local { .. } => &counts.local,
        };
        count.add(1);
        let deadline = Instant::now() + Duration::from_millis(grant.deadline_ms.min(REQUEST_DEADLINE_MS));
        let (sent, settled, pieces) = Default::default();
        let extents = Vec::with_capacity(grant.layout.layers as usize * grant.blocks.len());
        let (gathered, gathered_bytes, committed) = (Vec::new(), 0, false);
        Outgoing {
            source,
            arena,
            grant,
            digest,
            deadline,
            path,
            sending,
            sent,
            settled,
            on_device,
            extents,
            pieces,
            gathered,
            gathered_bytes,
            committed,
        }
    }

    async fn open(self) -> Result<Outgoing, TransferError> {
        let takes_tickets = match &self.path {
            Path::Connection(connection) => connection.takes_tickets(),
            Path::Local { .. } => true,
        };
        let ticket = Some(self.grant.ticket).filter(|ticket| takes_tickets && *ticket != 0);
        self.tell(Body::Open { request: self.grant.request, grant: self.digest, ticket })?;
        let patience = Duration::from_millis(HANDOFF_CONNECT_MS);
        let silent = |_| TransferError::Lost {
            peer: self.grant.address.clone(),
            cause: format!("no answer to OPEN within {HANDOFF_CONNECT_MS} ms"),
        };
        timeout(patience, self.sending.opened()).await.map_err(silent)??;
        Ok(self)
    }

    /// Promises that the first `count` blocks of the grant are full: they hold the same bytes as long as their generation
    /// lasts. Their checksums are then computed once, and used again when they are sent again, to whomever; what changes
    /// them nevertheless is found by the receiver.
    pub fn settle(&mut self, count: usize) {
        // What is kept is of whole blocks; a grant of some of the heads has other sums.
        let whole = self.arena.layout() == self.source.arena.layout();
        self.settled = if whole { count } else { 0 };
    }

    /// Whether the receiver's device reads what is sent where it lies on this arena's device. The blocks need not be on the host
    /// then, but are held until `commit` returns: `send` does not wait for the receiver.
    pub fn is_from_device(&self) -> bool {
        self.on_device
    }

    /// Sends one layer of some blocks: for each its index in `grant.blocks` and the block here that holds it. Layers
    /// and blocks may come in any order, each (layer, block) once. The caller holds the source blocks as filled until
    /// this returns; nothing reads them after that, unless `commit` finds that an extent arrived damaged. It is then
    /// sent again if its block still holds what it held.
    ///
    /// # Panics
    /// If the layer or an index is not one of the grant's.
    pub async fn send(&mut self, layer: usize, blocks: &[(usize, BlockId)]) -> Result<(), TransferError> {
        assert!(layer < self.grant.layout.layers as usize, "layer {layer} of {}", self.grant.layout.layers);
        let mut extents = std::mem::take(&mut self.extents);
        let transmitted = self.transmit(layer, blocks, self.settled, &mut extents).await;
        self.extents = extents;
        transmitted?;
        self.enter(layer, blocks.len());
        Ok(())
    }

    /// The same for somebody who has more to send: out of a device, what is sent leaves together with later layers, when there is
    /// much of it or at `commit`. Its checksums begin to be computed at once.
    ///
    /// # Panics
    /// As `send`.
    pub async fn send_soon(&mut self, layer: usize, blocks: &[(usize, BlockId)]) -> Result<(), TransferError> {
        if !self.on_device {
            return self.send(layer, blocks).await;
        }
        assert!(layer < self.grant.layout.layers as usize, "layer {layer} of {}", self.grant.layout.layers);
        self.sending.writing(|| ())?;
        let newest = self.gather(layer, blocks, self.settled)?;
        self.gathered.push(newest);
        self.gathered_bytes += blocks.len() * self.grant.layout.layer_bytes();
        if self.gathered_bytes < GATHERED_BYTES {
            return Ok(());
        }
        // The device goes on with the newest one's checksums while those before it leave.
        let newest = self.gathered.pop_if(|newest| newest.is_under_way());
        self.flush().await?;
        if let Some(newest) = newest {
            self.gathered_bytes = newest.blocks.len() * self.grant.layout.layer_bytes();
            self.gathered.push(newest);
        }
        Ok(())
    }

    /// Sends what `send_soon` has gathered.
    async fn flush(&mut self) -> Result<(), TransferError> {
        self.gathered_bytes = 0;
        let gathered = std::mem::take(&mut self.gathered);
        let layers: Vec<(usize, usize)> = gathered.iter().map(|layer| (layer.layer, layer.blocks.len())).collect();
        let mut extents = std::mem::take(&mut self.extents);
        let left = self.leave(gathered, &mut extents).await;
        self.extents = extents;
        left?;
        layers.into_iter().for_each(|(layer, extents)| self.enter(layer, extents));
        Ok(())
    }

    /// Counts the next extents that were sent, at most so many, as those of a layer.
    fn enter(&mut self, layer: usize, extents: usize) {
        let from = self.pieces.last().map_or(0, |(_, end)| *end);
        // Of a `send` that was given up on the way nothing is known, and the commit will not be confirmed.
        let sent = self.extents.get(from..).unwrap_or(&[]);
        let sent = &sent[..extents.min(sent.len())];
        self.sent.digest = sent.iter().fold(self.sent.digest, |digest, extent| digest.wrapping_add(extent.sum));
        self.sent.extents += sent.len() as u64;
        self.sent.bytes += (sent.len() * self.grant.layout.layer_bytes()) as u64;
        self.pieces.push((layer, from + sent.len()));
    }

    /// Returns once the receiver can do without the source blocks, or out of a device as soon as it knows of them. What was sent is
    /// added to `extents`.
    async fn transmit(
        &mut self,
        layer: usize,
        blocks: &[(usize, BlockId)],
        settled: usize,
        extents: &mut Vec<Sent>,
    ) -> Result<(), TransferError> {
        if self.on_device {
            let gathered = self.gather(layer, blocks, settled)?;
            return self.leave(vec![gathered], extents).await;
        }
        let mut flight = Flight::default();
        for blocks in blocks.chunks(extent::extents_per_frame(&self.grant.layout)) {
            let (arena, sums, on_device) = (&self.arena, &self.source.sums, None);
            let frame =
                Frame { arena, grant: &self.grant, digest: self.digest, layer, blocks, sums, settled, on_device };
            match &mut self.path {
                Path::Connection(connection) => {
                    let sending = connection.send(&self.sending, self.deadline, frame, &mut flight, extents);
                    timeout_at(self.deadline, sending).await.map_err(|_| TransferError::Deadline)??;
                    if connection.by_reference() {
                        // The frame leaves at once, so that the receiver copies while the next one is hashed.
                        tokio::task::yield_now().await;
                    }
                }
                Path::Local { receiver, link } => {
                    self.sending.writing(|| ())?;
                    extents.extend(receiver.fetch(*link, &frame));
                    tokio::task::yield_now().await;
                }
            }
        }
        if let Path::Connection(connection) = &self.path {
            let landed = connection.landed(&self.sending, &flight);
            timeout_at(self.deadline, landed).await.map_err(|_| TransferError::Deadline)??;
        }
        Ok(())
    }

    /// Has the device begin with those checksums of a layer's blocks that are not known.
    fn gather(&self, layer: usize, blocks: &[(usize, BlockId)], settled: usize) -> Result<Gathered, TransferError> {
        let device = self.arena.device().ok_or(TransferError::Aborted(Aborted::Internal))?;
        let extents = self.arena.extents(layer);
        let known = self.source.sums.known_of(layer, blocks, settled);
        let begin = |(blocks, known): (&[(usize, BlockId)], &[Option<u64>])| {
            let unknown = blocks.iter().zip(known).filter(|(_, known)| known.is_none());
            let unknown: Vec<u32> = unknown.map(|((_, block), _)| block.index).collect();
            match unknown.is_empty() {
                true => Ok(None),
                false => device.sum(&extents, &unknown).map(Some).map_err(|error| device_failed(&error)),
            }
        };
        let frames = blocks.chunks(FRAME_BLOCKS_MAX).zip(known.chunks(FRAME_BLOCKS_MAX));
        let arriving = frames.map(begin).collect::<Result<_, _>>()?;
        Ok(Gathered { layer, blocks: blocks.to_vec(), settled, known, arriving })
    }

    /// Sends frames of layers out of the device, each as soon as its checksums are there.
    async fn leave(&mut self, mut layers: Vec<Gathered>, extents: &mut Vec<Sent>) -> Result<(), TransferError> {
        let mut flight = Flight::default();
        let mut computed = await_all(layers.iter_mut().flat_map(Gathered::take_arriving).collect());
        for Gathered { layer, blocks, settled, known, arriving } in layers {
            let frames = blocks.chunks(FRAME_BLOCKS_MAX).zip(known.chunks(FRAME_BLOCKS_MAX)).zip(arriving);
            for ((blocks, known), _) in frames {
                let new = match known.contains(&None) {
                    true => {
                        let lost = TransferError::Aborted(Aborted::Internal);
                        computed.recv().await.ok_or(lost)?.map_err(|error| device_failed(&error))?
                    }
                    false => Vec::new(),
                };
                let contents = self.source.sums.complete(layer, blocks, settled, known, &new);
                let contents = contents.ok_or(TransferError::Aborted(Aborted::Internal))?;
                let (arena, sums, on_device) = (&self.arena, &self.source.sums, Some(&contents[..]));
                let frame =
                    Frame { arena, grant: &self.grant, digest: self.digest, layer, blocks, sums, settled, on_device };
                let Path::Connection(connection) = &self.path else {
                    return Err(TransferError::Aborted(Aborted::Internal));
                };
                let sending = connection.send(&self.sending, self.deadline, frame, &mut flight, extents);
                timeout_at(self.deadline, sending).await.map_err(|_| TransferError::Deadline)??;
                // The frame leaves at once, so that the receiver copies while the next one is made.
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    /// Says that everything has been sent, and waits until the receiver has confirmed exactly that. The caller holds
    /// the source blocks until this returns, so that what arrived damaged can be sent again.
    pub async fn commit(mut self) -> Result<Committed, TransferError> {
        self.flush().await?;
        loop {
            if let Path::Connection(connection) = &self.path {
                connection.tell_barrier();
            }
            self.tell(Body::Commit(self.sent))?;
            let answer =
                timeout_at(self.deadline, self.sending.answered()).await.map_err(|_| TransferError::Deadline)??;
            match answer {
                Ok(committed) => {
                    self.committed = true;
                    self.source.counts.bytes.add(committed.bytes);
                    return Ok(committed);
                }
                Err(asked) => self.resend(&asked).await?,
            }
        }
    }

    /// Sends extents again, each only if it is what was sent the first time.
    async fn resend(&mut self, asked: &[(u32, u32)]) -> Result<(), TransferError> {
        self.source.counts.resent.add(asked.len() as u64);
        for of_layer in asked.chunk_by(|a, b| a.0 == b.0) {
            let layer = of_layer[0].0 as usize;
            let asked: BTreeSet<u32> = of_layer.iter().map(|(_, position)| *position).collect();
            let starts = std::iter::once(0).chain(self.pieces.iter().map(|(_, end)| *end));
            let pieces = self.pieces.iter().zip(starts).filter(|((of, _), _)| *of == layer);
            let sent = pieces.flat_map(|((_, end), start)| self.extents.get(start..*end).unwrap_or(&[]));
            let sent: BTreeMap<u32, (BlockId, u64)> = sent
                .filter(|extent| asked.contains(&extent.position))
                .map(|extent| (extent.position, (extent.source, extent.sum)))
                .collect();
            if sent.len() < asked.len() {
                return Err(TransferError::Aborted(Aborted::Internal)); // Asked for what was never sent.
            }
            let blocks: Vec<_> = sent.iter().map(|(position, (source, _))| (*position as usize, *source)).collect();
            // Whatever was known before: what lies there now.
            let mut again = Vec::with_capacity(blocks.len());
            self.transmit(layer, &blocks, 0, &mut again).await?;
            let is_another = |extent: &&Sent| sent.get(&extent.position).is_none_or(|(_, sum)| *sum != extent.sum);
            if let Some(&Sent { position, .. }) = again.iter().find(is_another) {
                return Err(TransferError::Corrupt { layer: layer as u32, position });
            }
        }
        Ok(())
    }

    /// Gives up; the receiver frees its blocks.
    pub async fn abort(self, reason: Aborted) {
        self.end(reason);
    }

    fn tell(&self, body: Body) -> Result<(), TransferError> {
        let tag = self.grant.tag();
        match &self.path {
            Path::Connection(connection) => self.sending.writing(|| connection.tell(tag, body)),
            Path::Local { receiver, link } => {
                self.sending.writing(|| ())?;
                let link = Link { id: *link, features: 0, source: None, device: None };
                receiver.hear(&link, Message { tag, body }).expect("a sender's message");
                Ok(())
            }
        }
    }

    /// Unless the transfer has ended, says so as the last word on it.
    fn end(&self, reason: Aborted) {
        let abort = Body::Abort { reason, quiesced: true };
        if self.sending.fail(TransferError::Aborted(reason)) {
            match &self.path {
                Path::Connection(connection) => connection.tell(self.grant.tag(), abort),
                Path::Local { receiver, link } => {
                    let event = Event::Abort { reason, quiesced: true };
                    receiver.step(self.grant.transfer, *link, event);
                }
            }
        }
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.end(Aborted::Cancelled);
        let counts = &self.source.counts;
        if self.committed { &counts.committed } else { &counts.failed }.add(1);
        match &self.path {
            Path::Connection(connection) => connection.strike(self.grant.transfer),
            Path::Local { receiver, link } => receiver.leave(*link),
        }
    }
}

/// Blocks of one layer that leave a device, and their checksums: known from before, or being computed by the device.
struct Gathered {
    layer: usize,
    blocks: Vec<(usize, BlockId)>,
    settled: usize,
    known: Vec<Option<u64>>,
    /// By frame; None where all are known, or once somebody waits for them.
    arriving: Vec<Option<Box<dyn Arriving>>>,
}

impl Gathered {
    fn is_under_way(&self) -> bool {
        self.arriving.iter().any(Option::is_some)
    }

    fn take_arriving(&mut self) -> impl Iterator<Item = Box<dyn Arriving>> {
        self.arriving.iter_mut().filter_map(Option::take)
    }
}

/// What a device computes, in order. It is waited for beside the runtime, by one thread for all of it.
fn await_all(arriving: Vec<Box<dyn Arriving>>) -> mpsc::Receiver<io::Result<Vec<u64>>> {
    let (tell, told) = mpsc::channel(arriving.len().max(1));
    if !arriving.is_empty() {
        tokio::task::spawn_blocking(move || {
            for arriving in arriving {
                // There is a place for each; whoever asked may have gone.
                let _ = tell.try_send(arriving.wait());
            }
        });
    }
    told
}

fn device_failed(error: &std::io::Error) -> TransferError {
    tracing::warn!(%error, "the device that blocks are sent from fails");
    TransferError::Aborted(Aborted::Internal)
}

/// The sender of a local transfer as its receiver sees it. It writes only inside calls into the receiver, so when it
/// has been told to stop it has stopped.
struct LocalPeer {
    receiver: Arc<Shared>,
    link: LinkId,
    sending: Arc<Sending>,
}

impl Peer for LocalPeer {
    fn tell(&self, tag: Tag, body: Body) {
        let aborted = matches!(body, Body::Abort { .. });
        self.sending.hear(body);
        if aborted {
            self.receiver.step(tag.transfer, self.link, Event::Quiesced);
        }
    }

    fn close(&self) {
        let cause = "closed by the receiver".to_string();
        self.sending.fail(TransferError::Lost { peer: self.receiver.address.clone(), cause });
    }
}
