//! What a reader of a run wants to see between its requests and its faults: who was assigned what under which epoch, what
//! workers let in, and the blocks on their way. Looks on, and says nothing that the digest knows of.

use std::collections::{BTreeMap, BTreeSet};

use baton_core::{Epoch, RequestId};

use crate::host::World;

#[derive(Default)]
pub(crate) struct Story {
    /// Open in some ledger, under which epoch.
    open: BTreeMap<RequestId, Epoch>,
    /// Index of each coordinator's ledger.
    indices: BTreeMap<String, u64>,
    /// The newest ledger told of.
    index: u64,
    let_in: BTreeMap<String, BTreeSet<(RequestId, Epoch)>>,
    /// Blocks used and in flight.
    blocks: BTreeMap<String, (usize, usize)>,
}

impl Story {
    /// Tells what has changed.
    pub(crate) fn go_on(&mut self, world: &World) {
        let seen = world.seen();
        for (host, observer) in &seen.coordinators {
            let Some(index) = observer.index() else { continue };
            if self.indices.insert(host.clone(), index) != Some(index) && index > self.index {
                self.index = index;
                self.ledger(world, host, observer);
            }
        }
        for (host, shell) in &seen.workers {
            let now: BTreeSet<(RequestId, Epoch)> = shell.let_in().into_iter().collect();
            let before = self.let_in.entry(host.clone()).or_default();
            for (request, epoch) in now.difference(before) {
                world.record.detail(host, format!("lets {request} in, epoch {epoch}"));
            }
            *before = now;
            let stats = shell.engine.cache().stats();
            let now = (stats.used, stats.in_flight);
            let before = self.blocks.insert(host.clone(), now).unwrap_or_default();
            // What is used grows with every few tokens.
            if before.1 != now.1 || (before.0 == 0) != (now.0 == 0) {
                let free = stats.available();
                world.record.detail(host, format!("blocks: {} used, {} in flight, {free} free", now.0, now.1));
            }
        }
    }

    /// What the ledger of one that is ahead of the others says.
    fn ledger(&mut self, world: &World, host: &str, observer: &baton_coordinator::Observer) {
        let told = observer.read(|ledger| {
            let mut open = BTreeMap::new();
            for (request, now) in ledger.open() {
                open.insert(*request, now.epoch);
                if self.open.get(request) == Some(&now.epoch) {
                    continue;
                }
                let life = |place: &baton_core::Place| format!("{} (life {})", place.worker, place.incarnation);
                let prefill = now.prefill.as_ref().map_or("itself".to_string(), life);
                let (attempt, epoch, decode) = (now.attempt, now.epoch, life(&now.decode));
                let text =
                    format!("assigns {request}, attempt {attempt}: epoch {epoch}, decode {decode}, prefill {prefill}");
                world.record.detail(host, text);
            }
            for request in self.open.keys().filter(|request| !open.contains_key(request)) {
                world.record.detail(host, format!("ends {request}"));
            }
            open
        });
        self.open = told.unwrap_or_default();
    }
}
