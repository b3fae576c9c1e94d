//! What one end of a link has yet to write. Control frames never wait: there are a few per transfer, and an
//! acknowledgement replaces the one before it. DATA frames wait for one of few places, so memory is bounded.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_core::limits::{HANDOFF_IDLE_MS, HANDOFF_PING_MS};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use crate::extent::Data;
use crate::link::Peer;
use crate::loan::Loan;
use crate::turns::Turns;
use crate::wire::{Body, Header, Message, Tag};

/// DATA frames of a link that are gathered or being written: what bounds its memory.
pub(crate) const PLACES: usize = 4;
/// Control frames a peer may leave unread before the link is closed; far more than its transfers need.
const CONTROLS_MAX: usize = 16_384;

pub(crate) struct Outbox {
    queue: Mutex<Queue>,
    wake: Notify,
    places: Turns,
    closing: Notify,
}

#[derive(Default)]
struct Queue {
    frames: VecDeque<Frame>,
    ack: Option<u64>,
    /// DATA payload bytes queued so far.
    sequence: u64,
}

enum Frame {
    Control(Vec<u8>),
    Data(Arc<Loan>),
}

impl Outbox {
    /// For so many DATA frames at a time.
    pub(crate) fn new(places: usize) -> Outbox {
        Outbox { queue: Mutex::default(), wake: Notify::new(), places: Turns::new(places), closing: Notify::new() }
    }

    pub(crate) fn tell(&self, tag: Tag, body: Body) {
        let frame = Message { tag, body }.encode();
        let mut queue = self.lock();
        if queue.frames.len() >= CONTROLS_MAX {
            drop(queue);
            return self.close();
        }
        queue.frames.push_back(Frame::Control(frame));
        drop(queue);
        self.wake.notify_one();
    }

    /// Acknowledges all DATA payload bytes up to `sequence`.
    pub(crate) fn ack(&self, sequence: u64) {
        self.lock().ack = Some(sequence);
        self.wake.notify_one();
    }

    /// A place for a frame, for whoever is `due` first; None after `close`.
    pub(crate) async fn place(&self, due: Instant) -> Option<Place<'_>> {
        self.places.take(due).await.then_some(Place(self))
    }

    /// How long the queue for a place is that the next frame joins; 0: there is a place.
    pub(crate) fn waiting(&self) -> usize {
        self.places.waiting()
    }

    /// Queues a frame. Returns it, and the DATA payload bytes up to its end.
    pub(crate) fn push(&self, place: Place<'_>, mut header: Header, mut data: Data) -> (Arc<Loan>, u64) {
        std::mem::forget(place);
        let mut queue = self.lock();
        header.sequence = queue.sequence;
        queue.sequence += header.length as u64;
        let end = queue.sequence;
        data.label(&header);
        let loan = Arc::new(Loan::new(data));
        queue.frames.push_back(Frame::Data(loan.clone()));
        drop(queue);
        self.wake.notify_one();
        (loan, end)
    }

    /// DATA payload bytes queued so far.
    pub(crate) fn sequence(&self) -> u64 {
        self.lock().sequence
    }

    /// Ends the link; `closed` returns.
    pub(crate) fn close(&self) {
        self.places.close();
        self.closing.notify_one();
    }

    pub(crate) async fn closed(&self) -> io::Error {
        self.closing.notified().await;
        io::Error::other("closed at this end")
    }

    /// Writes until the link fails.
    pub(crate) async fn write<W: AsyncWrite + Unpin>(&self, to: &mut W) -> io::Error {
        loop {
            if let Err(error) = self.write_next(to).await {
                return error;
            }
        }
    }

    async fn write_next<W: AsyncWrite + Unpin>(&self, to: &mut W) -> io::Result<()> {
        let pause = Duration::from_millis(HANDOFF_PING_MS);
        let ping = Message { tag: Tag::default(), body: Body::Ping };
        match timeout(pause, self.next()).await.unwrap_or_else(|_| Frame::Control(ping.encode())) {
            Frame::Control(bytes) => write_all(to, &bytes).await?,
            Frame::Data(loan) => {
                loan.write(to).await?;
                self.places.leave();
            }
        }
        if self.lock().is_empty() {
            to.flush().await?;
        }
        Ok(())
    }

    async fn next(&self) -> Frame {
        loop {
            if let Some(frame) = self.lock().pop() {
                return frame;
            }
            self.wake.notified().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in an outbox. Dropping it gives it back, unless a frame was pushed into it.
pub(crate) struct Place<'a>(&'a Outbox);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.places.leave();
    }
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.frames.is_empty() && self.ack.is_none()
    }

    fn pop(&mut self) -> Option<Frame> {
        let ack = self.ack.take().map(|bytes| Message { tag: Tag::default(), body: Body::Ack(bytes) });
        ack.map(|ack| Frame::Control(ack.encode())).or_else(|| self.frames.pop_front())
    }
}

impl Peer for Outbox {
    fn tell(&self, tag: Tag, body: Body) {
        Outbox::tell(self, tag, body);
    }

    fn close(&self) {
        Outbox::close(self);
    }
}

/// Writes all of `bytes`; the peer has to take some of them within the idle time.
pub(crate) async fn write_all<W: AsyncWrite + Unpin>(to: &mut W, mut bytes: &[u8]) -> io::Result<()> {
    let idle = Duration::from_millis(HANDOFF_IDLE_MS);
    while !bytes.is_empty() {
        let Ok(written) = timeout(idle, to.write(bytes)).await else {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("no byte taken for {HANDOFF_IDLE_MS} ms")));
        };
        match written? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => bytes = &bytes[n..],
        }
    }
    Ok(())
}
