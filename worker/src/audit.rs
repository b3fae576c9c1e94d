//! Blocks that are used again, out of the cache, are now and then compared with what was known of them when they were written. One
//! that is not what it was is used by nobody any more: what needs it computes it.

use std::sync::atomic::{AtomicU64, Ordering};

use baton_engine::{Blocks, Cache};
use baton_kvtransfer::{Audited, Links};

use crate::metrics;
use crate::units::Units;

pub(crate) struct Audit {
    /// Of so many reused blocks one; 0: none.
    every: u64,
    reused: AtomicU64,
}

impl Audit {
    pub(crate) fn new(every: u32) -> Audit {
        Audit { every: u64::from(every), reused: AtomicU64::new(0) }
    }

    /// The leading run of `held` in which nothing that was looked at is damaged.
    pub(crate) fn pass(&self, cache: &Cache, links: &Links, units: Units, mut held: Blocks) -> Blocks {
        if self.every == 0 || held.is_empty() || !held.are_present() {
            return held;
        }
        let before = self.reused.fetch_add(held.len() as u64, Ordering::Relaxed);
        // The blocks at which the count passes a multiple.
        let first = (self.every - before % self.every) % self.every;
        let due = (first as usize..held.len()).step_by(self.every as usize);
        let damaged = due.into_iter().find(|at| {
            let found = units.of(&held.ids()[*at..=*at]).into_iter().filter_map(|unit| links.audit(unit)).max();
            found.into_iter().for_each(metrics::count_audit);
            found == Some(Audited::Damaged)
        });
        if let Some(at) = damaged {
            let block = held.ids()[at];
            tracing::error!(
                block = block.index,
                "a cached block has changed since it was written: check this machine's memory"
            );
            cache.disown(block);
            held.truncate(at);
        }
        held
    }
}
