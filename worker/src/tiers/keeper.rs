//! What the thread of the lower tiers does: saves, recalls, and keeps the cache's knowledge of what is below right.

use std::time::Duration;

use baton_core::BlockHash;
use baton_engine::{Blocks, Cache, Reserved};
use tokio::time::Instant;

use super::disk::{Disk, Put, digest};
use super::host::{Host, Left};
use super::store::Store;
use crate::metrics;

/// How long a worker that ends goes on saving what its disk does not have yet.
const FINISH: Duration = Duration::from_millis(1_000);

pub(super) struct Keeper<S> {
    cache: Cache,
    host: Option<Host>,
    disk: Option<Disk<S>>,
    lost: u64,
}

impl<S: Store> Keeper<S> {
    /// Tells the cache what the disk has kept.
    pub(super) fn new(cache: Cache, host: Option<Host>, disk: Option<Disk<S>>) -> Keeper<S> {
        if let Some(disk) = &disk {
            disk.names().for_each(|name| cache.know(name));
            disk.found.iter().for_each(|fault| metrics::count_tier_fault("disk", *fault));
            if !disk.found.is_empty() {
                let (faults, first) = (disk.found.len(), disk.found[0].as_str());
                tracing::warn!(faults, first, "the disk tier had blocks that are not used");
            }
        }
        let keeper = Keeper { cache, host, disk, lost: 0 };
        keeper.gauge();
        keeper
    }

    pub(super) fn block_bytes(&self) -> u64 {
        self.cache.arena().layout().block_bytes() as u64
    }

    /// Saves one block of those that will be evicted next; false when all of them are.
    pub(super) fn save_next(&mut self) -> bool {
        let lost = self.cache.lost();
        metrics::count_tier_lost(lost - std::mem::replace(&mut self.lost, lost));
        let Some(saving) = self.cache.save_next() else { return false };
        let name = saving.name;
        match self.save(name, saving.bytes()) {
            Ok(()) => saving.saved(),
            Err(()) => saving.refused(),
        }
        self.gauge();
        true
    }

    fn save(&mut self, name: BlockHash, bytes: &[u8]) -> Result<(), ()> {
        let Some(host) = &mut self.host else {
            let Some(disk) = &self.disk else { return Err(()) };
            let digest = digest(disk.class(), name, bytes);
            return self.write_down(name, digest, bytes);
        };
        let memory = match host.make_room() {
            Some(Left { name, bytes, digest }) => {
                metrics::count_tier_evicted("host");
                let kept = self.write_down(name, digest, &bytes);
                if kept.is_err() {
                    self.cache.forget(name);
                }
                bytes
            }
            None => vec![0; bytes.len()].into_boxed_slice(),
        };
        if let Some(host) = &mut self.host {
            host.put(name, memory, bytes);
            metrics::count_tier_saved("host");
        }
        Ok(())
    }

    fn write_down(&mut self, name: BlockHash, digest: u128, bytes: &[u8]) -> Result<(), ()> {
        let disk = self.disk.as_mut().ok_or(())?;
        let Put { kept, gone } = disk.put(name, digest, bytes);
        if let Some(gone) = gone {
            metrics::count_tier_evicted("disk");
            self.gone(gone);
        }
        match kept {
            Ok(()) => metrics::count_tier_saved("disk"),
            Err(fault) => metrics::count_tier_fault("disk", fault),
        }
        kept.map_err(|_| ())
    }

    /// One tier does not have the name any more.
    fn gone(&self, name: BlockHash) {
        let here = self.host.as_ref().is_some_and(|host| host.has(name));
        let there = self.disk.as_ref().is_some_and(|disk| disk.has(name));
        if !here && !there {
            self.cache.forget(name);
        }
    }

    /// Brings blocks back until one is missing or cannot be trusted, and how long that took.
    pub(super) fn recall(&mut self, names: &[BlockHash], mut room: Reserved) -> (Blocks, Duration) {
        let began = Instant::now();
        let mut count = 0;
        while count < names.len() && self.bring(names[count], count, &mut room) {
            count += 1;
        }
        room.truncate(count);
        let blocks = room.fill(&names[..count]);
        self.gauge();
        (blocks, began.elapsed())
    }

    /// Copies one block into its place, after it has been verified where it came from.
    fn bring(&mut self, name: BlockHash, position: usize, room: &mut Reserved) -> bool {
        let from_host = self.host.as_mut().and_then(|host| host.get(name));
        let fault = match from_host {
            Some(Ok(bytes)) => {
                room.write(position, bytes);
                metrics::count_tier_hit("host");
                return true;
            }
            Some(Err(fault)) => Some(("host", fault)),
            None => None,
        };
        let from_disk = self.disk.as_mut().and_then(|disk| disk.get(name));
        let worse = match from_disk {
            Some(Ok(bytes)) => {
                room.write(position, bytes);
                metrics::count_tier_hit("disk");
                return true;
            }
            Some(Err(fault)) => Some(("disk", fault)),
            None => None,
        };
        for (tier, fault) in fault.into_iter().chain(worse) {
            metrics::count_tier_fault(tier, fault);
            tracing::warn!(tier, fault = fault.as_str(), "a saved block is not used");
        }
        self.gone(name);
        false
    }

    /// Saves what the disk does not have yet, for as long as there is time.
    pub(super) fn finish(mut self) {
        let until = Instant::now() + FINISH;
        if self.disk.is_none() {
            return;
        }
        while let Some(Left { name, bytes, digest }) = self.host.as_mut().and_then(Host::pop) {
            if Instant::now() >= until || self.write_down(name, digest, &bytes).is_err() {
                return;
            }
        }
        self.host = None;
        self.cache.run_ahead(usize::MAX);
        while Instant::now() < until && self.save_next() {}
    }

    #[cfg(test)]
    pub(super) fn host_mut(&mut self) -> &mut Host {
        self.host.as_mut().expect("a host tier")
    }

    fn gauge(&self) {
        let (block, host) = (self.block_bytes(), self.host.as_ref().map_or(0, Host::len));
        metrics::gauge_tier("host", host as u64, block);
        metrics::gauge_tier("disk", self.disk.as_ref().map_or(0, Disk::len) as u64, block);
    }
}
