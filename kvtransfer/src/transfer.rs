//! The receiver's side of one transfer as a pure state machine: events in, actions out.
//!
//! ```text
//!           OPEN fits              COMMIT agrees
//! Granted ───────────► Open(link) ───────────────► Ended      complete: the guard goes to whoever waits
//!    │                   │   │ (COMMIT while extents are damaged: RESEND, stays Open, a bounded number of times)
//!    │                   │   │ COMMIT differs, the sender's last ABORT, link closed ──► Ended   failed, guard freed
//!    │                   ▼
//!    │                Quarantined(link)     deadline, dropped, damaged: ABORT is sent, the guard stays
//!    │                   │ ABORTED{quiesced}, COMMIT, the sender's last ABORT, link closed
//!    ▼                   ▼                  (no such word in time: the link is closed)
//!  Ended               Ended                guard freed
//! ```

use std::time::Duration;

use baton_core::limits::{HANDOFF_QUIESCE_MS, HANDOFF_RESENDS_MAX};
use baton_core::planted::{self, Bug};
use baton_core::{Aborted, Refused, RequestId};

use crate::TransferError;
use crate::counters::Dropped;
use crate::grant::Grant;
use crate::link::LinkId;
use crate::wire::{Body, Entry, Header, RESEND_MAX, Summary, Tag};

/// What arrived.
pub type Received = Summary;

pub(crate) struct Transfer {
    pub(crate) grant: Grant,
    digest: u128,
    state: State,
    /// One bit per (layer, position).
    arrived: Vec<u64>,
    received: Received,
    /// The sender can send extents again.
    resends: bool,
    /// Some extents arrived damaged since the last time they were asked for.
    damaged: bool,
    /// How often they were.
    asked: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Granted,
    Open(LinkId),
    Quarantined(LinkId),
    Ended,
}

#[derive(Clone, Debug)]
pub(crate) enum Event {
    Open {
        tag: Tag,
        request: RequestId,
        grant: u128,
        resends: bool,
    },
    Commit {
        tag: Tag,
        summary: Summary,
    },
    /// The sender gave up.
    Abort {
        reason: Aborted,
        quiesced: bool,
    },
    /// The sender says that it writes no more.
    Quiesced,
    LinkClosed,
    /// An extent arrived that is not what was sent.
    Damaged {
        layer: u32,
        position: u32,
    },
    /// The deadline, or in quarantine the end of patience.
    Alarm,
    /// Nobody waits for the transfer any more.
    Dropped,
    /// The receiver itself closes.
    Closed,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    Tell(LinkId, Body),
    CloseLink(LinkId),
    Count(Dropped),
    /// The guard goes to whoever waits; the transfer is over.
    Complete(Received),
    /// Nothing can write the blocks any more: the guard goes, the transfer is over.
    Release,
    /// Whoever waits is told.
    Fail(TransferError),
    /// So many extents are asked for again.
    Again(u64),
    Alarm(Duration),
}

impl Transfer {
    pub(crate) fn new(grant: Grant) -> Transfer {
        let extents = grant.blocks.len() * grant.layout.layers as usize;
        let digest = grant.digest();
        let arrived = vec![0; extents.div_ceil(64)];
        let (state, received) = (State::Granted, Received::default());
        Transfer { grant, digest, state, arrived, received, resends: false, damaged: false, asked: 0 }
    }

    fn expected(&self) -> u64 {
        self.grant.blocks.len() as u64 * self.grant.layout.layers as u64
    }

    /// What to do about `event`, which came over `link` where it came over one.
    pub(crate) fn step(&mut self, link: LinkId, event: Event) -> Vec<Action> {
        match self.state {
            State::Granted => self.step_granted(link, event),
            State::Open(writer) => self.step_open(writer, link, event),
            State::Quarantined(writer) => self.step_quarantined(writer, link, event),
            State::Ended => Vec::new(),
        }
    }

    fn step_granted(&mut self, link: LinkId, event: Event) -> Vec<Action> {
        match event {
            Event::Open { tag, request, grant, resends } => match self.fits(tag, request, grant) {
                Ok(()) => {
                    (self.state, self.resends) = (State::Open(link), resends);
                    vec![Action::Tell(link, Body::Opened)]
                }
                Err(reason) => refuse(link, reason),
            },
            Event::Alarm => self.end(Some(TransferError::Deadline), vec![]),
            Event::Dropped => self.end(Some(TransferError::Aborted(Aborted::Cancelled)), vec![]),
            Event::Closed => self.end(Some(TransferError::Aborted(Aborted::Draining)), vec![]),
            Event::LinkClosed => vec![],
            _ => vec![Action::Count(Dropped::Unknown)],
        }
    }

    fn step_open(&mut self, writer: LinkId, link: LinkId, event: Event) -> Vec<Action> {
        match event {
            Event::Open { .. } => refuse(link, Dropped::StaleAttempt),
            Event::Alarm => self.quarantine(writer, TransferError::Deadline),
            Event::Dropped => self.quarantine(writer, TransferError::Aborted(Aborted::Cancelled)),
            Event::Closed => {
                let told = Action::Tell(writer, Body::Abort { reason: Aborted::Draining, quiesced: false });
                self.end(Some(TransferError::Aborted(Aborted::Draining)), vec![told])
            }
            Event::LinkClosed if link != writer => vec![],
            _ if link != writer => vec![Action::Count(Dropped::Unknown)],
            Event::Commit { tag, summary } => self.commit(writer, tag, summary),
            Event::Damaged { layer, position } => self.quarantine(writer, TransferError::Corrupt { layer, position }),
            Event::Abort { reason, quiesced: true } => self.end(Some(TransferError::Aborted(reason)), vec![]),
            Event::Abort { reason, quiesced: false } => self.quarantine(writer, TransferError::Aborted(reason)),
            Event::Quiesced => vec![Action::Count(Dropped::Unknown)],
            Event::LinkClosed => {
                let peer = format!("the writer of request {}", self.grant.request);
                let cause = "its connection closed".to_string();
                self.end(Some(TransferError::Lost { peer, cause }), vec![])
            }
        }
    }

    /// The failure has been told; only the guard is left.
    fn step_quarantined(&mut self, writer: LinkId, link: LinkId, event: Event) -> Vec<Action> {
        match event {
            Event::Open { .. } => refuse(link, Dropped::Late),
            Event::Closed => self.end(None, vec![]),
            Event::Alarm => vec![Action::CloseLink(writer)],
            _ if link != writer => vec![],
            Event::Commit { .. } | Event::Abort { quiesced: true, .. } | Event::Quiesced | Event::LinkClosed => {
                self.end(None, vec![])
            }
            Event::Abort { .. } | Event::Damaged { .. } | Event::Dropped => vec![],
        }
    }

    fn commit(&mut self, writer: LinkId, tag: Tag, summary: Summary) -> Vec<Action> {
        if let Err(reason) = self.named(tag) {
            return vec![Action::Count(reason)];
        }
        let (arrived, expected) = (self.received.extents, self.expected());
        if planted::is(Bug::CommitEarly) {
            self.state = State::Ended;
            return vec![Action::Tell(writer, Body::Committed(summary)), Action::Complete(summary)];
        }
        if arrived != expected && self.damaged {
            return self.ask_again(writer);
        }
        let error = if arrived != expected {
            TransferError::Incomplete { arrived, expected }
        } else if summary != self.received {
            TransferError::Digest
        } else {
            self.state = State::Ended;
            let received = self.received;
            let told = Action::Tell(writer, Body::Committed(received));
            return vec![told, Action::Complete(received)];
        };
        let told = Action::Tell(writer, Body::Abort { reason: Aborted::TransferFailed, quiesced: true });
        self.end(Some(error), vec![told])
    }

    /// The commit names extents that arrived damaged: the sender has to send them again, and then commit again.
    fn ask_again(&mut self, writer: LinkId) -> Vec<Action> {
        let missing: Vec<(u32, u32)> = self.missing().take(RESEND_MAX + 1).collect();
        if self.asked == HANDOFF_RESENDS_MAX {
            let (layer, position) = missing[0];
            return self.quarantine(writer, TransferError::Corrupt { layer, position });
        }
        self.asked += 1;
        self.damaged = missing.len() > RESEND_MAX;
        let asked = missing[..missing.len().min(RESEND_MAX)].to_vec();
        vec![Action::Again(asked.len() as u64), Action::Tell(writer, Body::Resend(asked))]
    }

    /// (layer, position) of the extents that have not arrived.
    fn missing(&self) -> impl Iterator<Item = (u32, u32)> {
        let blocks = self.grant.blocks.len();
        let extents = 0..self.expected() as usize;
        let place = move |bit: usize| ((bit / blocks) as u32, (bit % blocks) as u32);
        extents.filter(|bit| !self.has(*bit)).map(place)
    }

    /// Whether every layer of the block at a position has arrived.
    pub(crate) fn whole(&self, position: usize) -> bool {
        let blocks = self.grant.blocks.len();
        (0..self.grant.layout.layers as usize).all(|layer| self.has(layer * blocks + position))
    }

    fn has(&self, bit: usize) -> bool {
        self.arrived[bit / 64] >> (bit % 64) & 1 == 1
    }

    /// An extent arrived that is not what was announced. An error is what that means for the transfer: nothing, as long
    /// as the sender can be asked again.
    pub(crate) fn spoiled(&mut self, layer: u32, position: u32) -> Result<(), Event> {
        self.damaged = true;
        if self.resends { Ok(()) } else { Err(Event::Damaged { layer, position }) }
    }

    fn quarantine(&mut self, writer: LinkId, error: TransferError) -> Vec<Action> {
        self.state = State::Quarantined(writer);
        let reason = error.reason();
        vec![
            Action::Tell(writer, Body::Abort { reason, quiesced: false }),
            Action::Fail(error),
            Action::Alarm(Duration::from_millis(HANDOFF_QUIESCE_MS)),
        ]
    }

    fn end(&mut self, error: Option<TransferError>, mut actions: Vec<Action>) -> Vec<Action> {
        self.state = State::Ended;
        actions.push(Action::Release);
        actions.extend(error.map(Action::Fail));
        actions
    }

    fn fits(&self, tag: Tag, request: RequestId, grant: u128) -> Result<(), Dropped> {
        self.named(tag)?;
        let same = request == self.grant.request && grant == self.digest;
        if same { Ok(()) } else { Err(Dropped::Foreign) }
    }

    fn named(&self, tag: Tag) -> Result<(), Dropped> {
        if tag.attempt != self.grant.attempt {
            return Err(Dropped::StaleAttempt);
        }
        if tag.epoch != self.grant.epoch {
            return Err(Dropped::StaleEpoch);
        }
        Ok(())
    }

    /// Whether a frame over `link` names this attempt though another link's sender was given it, or nobody has opened it.
    pub(crate) fn is_forged(&self, link: LinkId, tag: Tag) -> bool {
        let writer = match self.state {
            State::Granted => None,
            State::Open(writer) | State::Quarantined(writer) => Some(writer),
            State::Ended => return false,
        };
        self.named(tag).is_ok() && writer != Some(link)
    }

    /// Whether a DATA frame may be looked into.
    pub(crate) fn admit(&self, link: LinkId, header: &Header) -> Result<(), Dropped> {
        match self.state {
            State::Open(writer) if writer == link => {}
            State::Quarantined(writer) if writer == link && planted::is(Bug::FreeEarly) => {}
            State::Quarantined(_) => return Err(Dropped::Late),
            _ => return Err(Dropped::Unknown),
        }
        self.named(header.tag)?;
        if header.layer as u32 >= self.grant.layout.layers {
            return Err(Dropped::OutOfRange);
        }
        Ok(())
    }

    /// Whether an extent may be written where its entry says.
    #[inline]
    pub(crate) fn expects(&self, layer: u32, entry: &Entry) -> Result<(), Dropped> {
        let Some(granted) = self.grant.blocks.get(entry.position as usize) else {
            return Err(Dropped::OutOfRange);
        };
        if granted.index != entry.block.index {
            return Err(Dropped::WrongBlock);
        }
        if granted.generation != entry.block.generation {
            return Err(Dropped::StaleGeneration);
        }
        if self.has(self.bit(layer, entry)) {
            return Err(Dropped::Duplicate);
        }
        Ok(())
    }

    /// The grant's digest, which extents are bound to.
    pub(crate) fn digest(&self) -> u128 {
        self.digest
    }

    /// Counts an extent that `expects` allowed and that has been written and found to be the announced one.
    #[inline]
    pub(crate) fn arrived(&mut self, layer: u32, entry: &Entry, bytes: usize) {
        let bit = self.bit(layer, entry);
        self.arrived[bit / 64] |= 1 << (bit % 64);
        self.received.extents += 1;
        self.received.bytes += bytes as u64;
        self.received.digest = self.received.digest.wrapping_add(entry.sum);
    }

    fn bit(&self, layer: u32, entry: &Entry) -> usize {
        layer as usize * self.grant.blocks.len() + entry.position as usize
    }
}

/// The answer to an OPEN that does not fit.
pub(crate) fn refuse(link: LinkId, reason: Dropped) -> Vec<Action> {
    vec![Action::Count(reason), Action::Tell(link, Body::Refused(Refused::Stale))]
}

#[cfg(test)]
mod tests;
