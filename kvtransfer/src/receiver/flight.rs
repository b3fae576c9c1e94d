//! Extents that this end's device copies out of a sender's. The device works beside the runtime: frames are given to it as they
//! come, and a thread of the link waits for what they brought, checks it and counts it. While a copy is under way its transfer's
//! guard is not let go, whatever happens to the transfer: nothing is written into a block that has been given to somebody else.

use std::sync::{Arc, Mutex};

use baton_core::Arena;
use baton_core::arena::Arriving;
use baton_core::planted::{self, Bug};
use tokio::sync::{mpsc, oneshot};

use super::{Pending, Shared, lock};
use crate::counters::Dropped;
use crate::extent;
use crate::frames::ReadError;
use crate::link::{Link, LinkId};
use crate::wire::{BadFrame, Entry, Header, Kind};

/// Frames of a link that the device is given before the first of them is waited for.
const FLIGHTS_MAX: usize = 32;

/// One frame's extents on their way. Dropping it waits for them.
pub(super) struct Flight {
    shared: Arc<Shared>,
    link: LinkId,
    header: Header,
    pending: Arc<Mutex<Pending>>,
    entries: Vec<Entry>,
    /// The grant's.
    digest: u128,
    /// None once they have landed.
    arriving: Option<Box<dyn Arriving>>,
}

impl Shared {
    /// Has the device begin to copy what may be written of a frame's extents; `source` says where they lie in the sender's memory.
    /// None: nothing of it may.
    pub(super) fn take_off(
        self: &Arc<Self>,
        link: &Link,
        header: &Header,
        mut entries: Vec<Entry>,
        source: &Arena,
    ) -> Result<Option<Flight>, ReadError> {
        let Some(device) = &link.device else { return Err(BadFrame::Shape(Kind::Data).into()) };
        let Some(pending) = self.pending(header.tag.transfer) else {
            entries.iter().for_each(|_| self.counts.drop(Dropped::Unknown));
            return Ok(None);
        };
        let layer = u32::from(header.layer);
        let mut outside = None;
        let digest;
        let arriving = {
            let mut pending = lock(&pending);
            let transfer = &pending.transfer;
            digest = transfer.digest();
            let admitted = transfer.admit(link.id, header);
            entries.retain(|entry| match admitted.and_then(|()| transfer.expects(layer, entry)) {
                Ok(()) if (entry.source as usize) < source.blocks() => true,
                Ok(()) => {
                    outside = Some(entry.position);
                    false
                }
                Err(reason) => {
                    self.counts.drop(reason);
                    false
                }
            });
            let begin = || extent::take_off(&**device, source, &pending.arena, layer, &entries);
            let arriving = (!entries.is_empty()).then(begin).transpose();
            if let Ok(Some(_)) = &arriving {
                pending.flying += 1;
            }
            arriving
        };
        if let Some(position) = outside {
            self.spoil(link.id, header, position);
        }
        let Some(arriving) = arriving? else { return Ok(None) };
        let (shared, arriving) = (self.clone(), Some(arriving));
        Ok(Some(Flight { shared, link: link.id, header: header.clone(), pending, entries, digest, arriving }))
    }
}

impl Flight {
    /// Waits, and counts the extents that are what was announced.
    fn land(&mut self) {
        let Some(arriving) = self.arriving.take() else { return };
        let sums = arriving.wait().unwrap_or_else(|error| {
            tracing::warn!(%error, "the device that blocks are brought to fails");
            Vec::new()
        });
        let layer = u32::from(self.header.layer);
        // Before the lock is taken, for which the next frame waits.
        let skips = planted::is(Bug::SkipChecksum);
        let is_announced = |(i, entry): (usize, &Entry)| {
            let found = sums.get(i).map(|sum| extent::bind(*sum, self.digest, layer, entry.position));
            found == Some(entry.sum) || skips
        };
        let announced: Vec<bool> = self.entries.iter().enumerate().map(is_announced).collect();
        let (mut spoiled, mut arrived) = (Vec::new(), 0);
        let (is_due, bytes) = {
            let mut pending = lock(&self.pending);
            pending.flying -= 1;
            let bytes = pending.transfer.grant.layout.layer_bytes();
            let admitted = pending.transfer.admit(self.link, &self.header);
            for (entry, is_announced) in self.entries.iter().zip(announced) {
                // It may have ended meanwhile, or a frame beside this one has brought the same.
                if let Err(reason) = admitted.and_then(|()| pending.transfer.expects(layer, entry)) {
                    self.shared.counts.drop(reason);
                } else if is_announced {
                    pending.transfer.arrived(layer, entry, bytes);
                    arrived += 1;
                } else {
                    spoiled.push(entry.position);
                }
            }
            (pending.flying == 0 && pending.is_due, bytes)
        };
        self.shared.counts.extents.add(arrived);
        self.shared.counts.bytes.add(arrived * bytes as u64);
        for position in spoiled {
            self.shared.spoil(self.link, &self.header, position);
        }
        if is_due {
            self.shared.release(self.header.tag.transfer, &self.pending);
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.land();
    }
}

/// What the link's thread is told, in order.
enum Told {
    Land(Flight),
    Say(oneshot::Sender<()>),
}

/// The flights of a link, and the thread that waits for them, made for the first. Dropping it ends the thread after the last.
#[derive(Default)]
pub(super) struct Landings {
    queue: Option<mpsc::Sender<Told>>,
    /// Flights are under way.
    are_any: bool,
}

impl Landings {
    /// Waits for a place if there are too many.
    pub(super) async fn follow(&mut self, flight: Flight) {
        let queue = self.queue.get_or_insert_with(|| {
            let (queue, told) = mpsc::channel(FLIGHTS_MAX);
            tokio::task::spawn_blocking(move || follow_all(told));
            queue
        });
        self.are_any = true;
        // Refused or given up on the way, it is dropped, which waits for it.
        let _ = queue.send(Told::Land(flight)).await;
    }

    /// Returns when everything that was followed so far has landed.
    pub(super) async fn all_have_landed(&mut self) -> Result<(), oneshot::error::RecvError> {
        let Some(queue) = self.queue.as_ref().filter(|_| self.are_any) else { return Ok(()) };
        let (say, said) = oneshot::channel();
        let _ = queue.send(Told::Say(say)).await;
        said.await?;
        self.are_any = false;
        Ok(())
    }
}

fn follow_all(mut told: mpsc::Receiver<Told>) {
    while let Some(told) = told.blocking_recv() {
        match told {
            Told::Land(mut flight) => flight.land(),
            Told::Say(say) => drop(say.send(())),
        }
    }
}
