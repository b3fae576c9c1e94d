//! The prefill side of one transfer.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use baton_core::arena::Arriving;
use baton_core::limits::{HANDOFF_CONNECT_MS, REQUEST_DEADLINE_MS};
use baton_core::{Aborted, Arena, BlockId};
use tokio::time::{Instant, timeout, timeout_at};

use crate::connection::{By, Connection, Flight, Frame, Sent};
use crate::extent;
use crate::link::{Link, LinkId, Peer};
use crate::links::Source;
use crate::receiver::Shared;
use crate::sending::Sending;
use crate::sums::Sums;
use crate::transfer::Event;
use crate::wire::{Body, FRAME_BLOCKS_MAX, Message, Summary, Tag};
use crate::{Grant, TransferError};

/// What the receiver confirmed.
pub type Committed = Summary;

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
    /// By (layer, position); empty before the first `send`.
    extents: Vec<Option<Extent>>,
    committed: bool,
}

/// What was sent, and whence.
#[derive(Clone, Copy)]
struct Extent {
    source: BlockId,
    sum: u64,
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
                By::Reference if on_device => &counts.gpu,
                By::Reference => &counts.shm,
                By::Ucx => &counts.ucx,
            },
            Path::Local { .. } => &counts.local,
        };
        count.add(1);
        let deadline = Instant::now() + Duration::from_millis(grant.deadline_ms.min(REQUEST_DEADLINE_MS));
        let (sent, settled, extents) = Default::default();
        let committed = false;
        Outgoing { source, arena, grant, digest, deadline, path, sending, sent, settled, on_device, extents, committed }
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
        if self.extents.is_empty() {
            self.extents = vec![None; self.grant.layout.layers as usize * self.grant.blocks.len()];
        }
        for Sent { position, source, sum } in self.transmit(layer, blocks, self.settled).await? {
            self.extents[layer * self.grant.blocks.len() + position as usize] = Some(Extent { source, sum });
            self.sent.digest = self.sent.digest.wrapping_add(sum);
        }
        self.sent.extents += blocks.len() as u64;
        self.sent.bytes += (blocks.len() * self.grant.layout.layer_bytes()) as u64;
        Ok(())
    }

    /// Returns once the receiver can do without the source blocks.
    async fn transmit(
        &mut self,
        layer: usize,
        blocks: &[(usize, BlockId)],
        settled: usize,
    ) -> Result<Vec<Sent>, TransferError> {
        let mut sent = Vec::with_capacity(blocks.len());
        let mut flight = Flight::default();
        let chunks: Vec<_> = match self.on_device {
            true => blocks.chunks(FRAME_BLOCKS_MAX).collect(),
            false => blocks.chunks(extent::extents_per_frame(&self.grant.layout)).collect(),
        };
        let mut contents = self.begin_sums(layer, &chunks, settled)?;
        for blocks in chunks {
            let contents = match contents.pop_front() {
                Some(found) => Some(found.wait(&self.source.sums, layer, blocks, settled).await?),
                None => None,
            };
            let (arena, sums, on_device) = (&self.arena, &self.source.sums, contents.as_deref());
            let frame =
                Frame { arena, grant: &self.grant, digest: self.digest, layer, blocks, sums, settled, on_device };
            match &mut self.path {
                Path::Connection(connection) => {
                    let sending = connection.send(&self.sending, frame, &mut flight);
                    sent.extend(timeout_at(self.deadline, sending).await.map_err(|_| TransferError::Deadline)??);
                    if connection.by_reference() {
                        // The frame leaves at once, so that the receiver copies while the next one is hashed.
                        tokio::task::yield_now().await;
                    }
                }
                Path::Local { receiver, link } => {
                    self.sending.writing(|| ())?;
                    sent.extend(receiver.fetch(*link, &frame));
                    tokio::task::yield_now().await;
                }
            }
        }
        if let Path::Connection(connection) = &self.path
            && !self.on_device
        {
            let landed = connection.landed(&self.sending, &flight);
            timeout_at(self.deadline, landed).await.map_err(|_| TransferError::Deadline)??;
        }
        Ok(sent)
    }

    /// Has the device begin with the checksums of blocks that it sends, one entry for each of `chunks`; none where the host reads
    /// them.
    fn begin_sums(
        &self,
        layer: usize,
        chunks: &[&[(usize, BlockId)]],
        settled: usize,
    ) -> Result<VecDeque<DeviceSums>, TransferError> {
        let Some(device) = self.arena.device().filter(|_| self.on_device) else { return Ok(VecDeque::new()) };
        let extents = self.arena.extents(layer);
        let begin = |blocks: &&[(usize, BlockId)]| {
            let known = |(position, block): &(usize, BlockId)| {
                self.source.sums.known(layer, *block).filter(|_| *position < settled)
            };
            let known: Vec<Option<u64>> = blocks.iter().map(known).collect();
            let unknown = blocks.iter().zip(&known).filter(|(_, known)| known.is_none());
            let unknown: Vec<u32> = unknown.map(|((_, block), _)| block.index).collect();
            let arriving = match unknown.is_empty() {
                true => None,
                false => Some(device.sum(&extents, &unknown).map_err(|error| device_failed(&error))?),
            };
            Ok(DeviceSums { known, arriving })
        };
        chunks.iter().map(begin).collect()
    }

    /// Says that everything has been sent, and waits until the receiver has confirmed exactly that. The caller holds
    /// the source blocks until this returns, so that what arrived damaged can be sent again.
    pub async fn commit(mut self) -> Result<Committed, TransferError> {
        loop {
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
            let known = |(_, position): &(u32, u32)| {
                let position = *position as usize;
                let inside = layer < self.grant.layout.layers as usize && position < self.grant.blocks.len();
                let extent = self.extents.get(layer * self.grant.blocks.len() + position).filter(|_| inside);
                extent.copied().flatten().map(|extent| (position, extent))
            };
            let Some(extents) = of_layer.iter().map(known).collect::<Option<Vec<_>>>() else {
                return Err(TransferError::Aborted(Aborted::Internal)); // Asked for what was never sent.
            };
            let blocks: Vec<_> = extents.iter().map(|(position, extent)| (*position, extent.source)).collect();
            // Whatever was known before: what lies there now.
            let sent = self.transmit(layer, &blocks, 0).await?;
            let changed = sent.iter().zip(&extents).find(|(sent, (_, extent))| sent.sum != extent.sum);
            if let Some((&Sent { position, .. }, _)) = changed {
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
            Path::Connection(connection) => self.sending.writing(|| connection.outbox.tell(tag, body)),
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
                Path::Connection(connection) => connection.outbox.tell(self.grant.tag(), abort),
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

/// Checksums of some blocks, known from before or being computed by the device.
struct DeviceSums {
    known: Vec<Option<u64>>,
    arriving: Option<Box<dyn Arriving>>,
}

impl DeviceSums {
    /// All of them, in the blocks' order. Those of settled blocks are kept.
    async fn wait(
        self,
        sums: &Sums,
        layer: usize,
        blocks: &[(usize, BlockId)],
        settled: usize,
    ) -> Result<Vec<u64>, TransferError> {
        let computed = match self.arriving {
            // A device is waited for beside the runtime.
            Some(arriving) => match tokio::task::spawn_blocking(move || arriving.wait()).await {
                Ok(computed) => computed.map_err(|error| device_failed(&error))?,
                Err(_) => return Err(TransferError::Aborted(Aborted::Internal)),
            },
            None => Vec::new(),
        };
        let mut computed = computed.into_iter();
        let mut all = Vec::with_capacity(blocks.len());
        for ((position, block), known) in blocks.iter().zip(self.known) {
            let sum = known.or_else(|| computed.next()).ok_or(TransferError::Aborted(Aborted::Internal))?;
            if known.is_none() && *position < settled {
                sums.keep(layer, *block, sum);
            }
            all.push(sum);
        }
        Ok(all)
    }
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
