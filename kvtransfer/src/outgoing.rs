//! The prefill side of one transfer.

use std::sync::Arc;
use std::time::Duration;

use baton_core::limits::{HANDOFF_CONNECT_MS, REQUEST_DEADLINE_MS};
use baton_core::{Aborted, BlockId};
use tokio::time::{Instant, timeout, timeout_at};

use crate::connection::{Connection, Frame};
use crate::extent::{self, Data};
use crate::link::{LinkId, Peer};
use crate::links::Source;
use crate::receiver::Shared;
use crate::sending::Sending;
use crate::transfer::Event;
use crate::wire::{Body, Message, Summary, Tag};
use crate::{Grant, TransferError};

/// What the receiver confirmed.
pub type Committed = Summary;

/// A transfer that the receiver has opened. Dropping it aborts the transfer.
pub struct Outgoing {
    source: Arc<Source>,
    grant: Grant,
    digest: u128,
    deadline: Instant,
    path: Path,
    sending: Arc<Sending>,
    sent: Summary,
    committed: bool,
}

/// How frames get to the receiver.
enum Path {
    Tcp(Arc<Connection>),
    /// The receiver is in this process: frames are handed to it as they are.
    Local {
        receiver: Arc<Shared>,
        link: LinkId,
        data: Data,
    },
}

impl Outgoing {
    pub(crate) async fn over_tcp(
        source: Arc<Source>,
        connection: Arc<Connection>,
        grant: Grant,
    ) -> Result<Outgoing, TransferError> {
        let sending = connection.enrol(grant.transfer)?;
        Outgoing::new(source, Path::Tcp(connection), sending, grant).open().await
    }

    pub(crate) async fn to_local(
        source: Arc<Source>,
        receiver: Arc<Shared>,
        grant: Grant,
    ) -> Result<Outgoing, TransferError> {
        let sending = Arc::new(Sending::new());
        let peer = |link| -> Arc<dyn Peer> {
            Arc::new(LocalPeer { receiver: receiver.clone(), link, sending: sending.clone() })
        };
        let link = receiver.join(peer);
        let path = Path::Local { receiver: receiver.clone(), link, data: Data::default() };
        Outgoing::new(source, path, sending, grant).open().await
    }

    fn new(source: Arc<Source>, path: Path, sending: Arc<Sending>, grant: Grant) -> Outgoing {
        let digest = grant.digest();
        match &path {
            Path::Tcp(_) => source.counts.tcp.add(1),
            Path::Local { .. } => source.counts.local.add(1),
        }
        let deadline = Instant::now() + Duration::from_millis(grant.deadline_ms.min(REQUEST_DEADLINE_MS));
        Outgoing { source, grant, digest, deadline, path, sending, sent: Summary::default(), committed: false }
    }

    async fn open(self) -> Result<Outgoing, TransferError> {
        self.tell(Body::Open { request: self.grant.request, grant: self.digest })?;
        let patience = Duration::from_millis(HANDOFF_CONNECT_MS);
        let silent = |_| TransferError::Lost {
            peer: self.grant.address.clone(),
            cause: format!("no answer to OPEN within {HANDOFF_CONNECT_MS} ms"),
        };
        timeout(patience, self.sending.opened()).await.map_err(silent)??;
        Ok(self)
    }

    /// Sends one layer of some blocks: for each its index in `grant.blocks` and the block here that holds it. Layers
    /// and blocks may come in any order, each (layer, block) once. The caller holds the source blocks as filled until
    /// this returns; bytes are copied before that.
    ///
    /// # Panics
    /// If the layer or an index is not one of the grant's.
    pub async fn send(&mut self, layer: usize, blocks: &[(usize, BlockId)]) -> Result<(), TransferError> {
        assert!(layer < self.grant.layout.layers as usize, "layer {layer} of {}", self.grant.layout.layers);
        for blocks in blocks.chunks(extent::extents_per_frame(&self.grant.layout)) {
            let frame = Frame { arena: &self.source.arena, grant: &self.grant, digest: self.digest, layer, blocks };
            let digest = match &mut self.path {
                Path::Tcp(connection) => timeout_at(self.deadline, connection.send(&self.sending, frame))
                    .await
                    .map_err(|_| TransferError::Deadline)??,
                Path::Local { receiver, link, data } => {
                    self.sending.writing(|| ())?;
                    let header = frame.gather(data);
                    receiver.data(*link, &header, data.payload());
                    tokio::task::yield_now().await;
                    data.digest
                }
            };
            self.sent.extents += blocks.len() as u64;
            self.sent.bytes += (blocks.len() * self.grant.layout.layer_bytes()) as u64;
            self.sent.digest = self.sent.digest.wrapping_add(digest);
        }
        Ok(())
    }

    /// Says that everything has been sent, and waits until the receiver has confirmed exactly that.
    pub async fn commit(mut self) -> Result<Committed, TransferError> {
        self.tell(Body::Commit(self.sent))?;
        let committed =
            timeout_at(self.deadline, self.sending.committed()).await.map_err(|_| TransferError::Deadline)??;
        self.committed = true;
        self.source.counts.bytes.add(committed.bytes);
        Ok(committed)
    }

    /// Gives up; the receiver frees its blocks.
    pub async fn abort(self, reason: Aborted) {
        self.end(reason);
    }

    fn tell(&self, body: Body) -> Result<(), TransferError> {
        let tag = self.grant.tag();
        match &self.path {
            Path::Tcp(connection) => self.sending.writing(|| connection.outbox.tell(tag, body)),
            Path::Local { receiver, link, .. } => {
                self.sending.writing(|| ())?;
                receiver.hear(*link, Message { tag, body }).expect("a sender's message");
                Ok(())
            }
        }
    }

    /// Unless the transfer has ended, says so as the last word on it.
    fn end(&self, reason: Aborted) {
        let abort = Body::Abort { reason, quiesced: true };
        if self.sending.fail(TransferError::Aborted(reason)) {
            match &self.path {
                Path::Tcp(connection) => connection.outbox.tell(self.grant.tag(), abort),
                Path::Local { receiver, link, .. } => {
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
            Path::Tcp(connection) => connection.strike(self.grant.transfer),
            Path::Local { receiver, link, .. } => receiver.leave(*link),
        }
    }
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
