//! The connections of one link: the first one, and those that have joined it by its key. They count as one writer, and end together.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_core::limits::HANDOFF_LANES_MAX;
use tokio::sync::watch;

use super::Shared;
use crate::link::LinkId;
use crate::outbox::Outbox;
use crate::wire::{BadFrame, Kind, LinkKey};

pub(crate) struct Lanes {
    pub(super) link: LinkId,
    state: Mutex<State>,
    /// DATA payload bytes taken, by connection.
    taken: [watch::Sender<u64>; HANDOFF_LANES_MAX],
}

struct State {
    /// By number; the first one is there once it is greeted.
    outboxes: [Option<Arc<Outbox>>; HANDOFF_LANES_MAX],
    closed: bool,
}

/// A link that others may join for as long as this is there.
pub(super) struct Offered {
    shared: Arc<Shared>,
    pub(super) key: LinkKey,
    pub(super) lanes: Arc<Lanes>,
}

impl Shared {
    /// A link that is about to come up, under a key that nobody guesses who was given none of this receiver's tickets.
    pub(super) fn offer_lanes(self: &Arc<Self>) -> Offered {
        let lanes = Arc::new(Lanes::new(self.new_link()));
        let mut registry = self.registry();
        registry.keys_made += 1;
        let count = registry.keys_made;
        let key = LinkKey(self.tickets.get().map_or(u128::from(count), |tickets| tickets.key(count)));
        registry.lanes.insert(key, lanes.clone());
        drop(registry);
        Offered { shared: self.clone(), key, lanes }
    }

    /// The link of this key, if it has room for connection `lane`.
    pub(super) fn join_lane(&self, key: LinkKey, lane: u32, outbox: &Arc<Outbox>) -> Option<Arc<Lanes>> {
        let lanes = self.registry().lanes.get(&key)?.clone();
        lanes.add(lane as usize, outbox).then_some(lanes)
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        self.lanes.close();
        self.shared.registry().lanes.remove(&self.key);
    }
}

impl Lanes {
    fn new(link: LinkId) -> Lanes {
        let state = State { outboxes: Default::default(), closed: false };
        Lanes { link, state: Mutex::new(state), taken: std::array::from_fn(|_| watch::Sender::new(0)) }
    }

    /// False: there is such a connection already, or there can be none.
    pub(super) fn add(&self, lane: usize, outbox: &Arc<Outbox>) -> bool {
        let mut state = self.lock();
        let closed = state.closed;
        let free = state.outboxes.get_mut(lane).filter(|place| place.is_none() && !closed);
        free.map(|place| *place = Some(outbox.clone())).is_some()
    }

    /// Ends all connections.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.outboxes.iter().flatten().for_each(|outbox| outbox.close());
    }

    pub(super) fn took(&self, lane: usize, bytes: u64) {
        self.taken[lane].send_replace(bytes);
    }

    /// Returns once so many bytes have been taken over each of these connections. It ends with the link at the latest: a
    /// connection that brings nothing more falls silent.
    pub(super) async fn reached(&self, awaited: &[(u32, u64)]) -> Result<(), BadFrame> {
        for (lane, bytes) in awaited {
            let joined = *lane > 0 && self.lock().outboxes.get(*lane as usize).is_some_and(Option::is_some);
            let taken = self.taken.get(*lane as usize).filter(|_| joined).ok_or(BadFrame::Shape(Kind::Barrier))?;
            let mut taken = taken.subscribe();
            let _ = taken.wait_for(|taken| taken >= bytes).await;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
