//! H1: a worker that answers is not yet one that works. One whose step does not end is given nothing any more, long before
//! its requests' deadlines.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use baton_core::{Epoch, Incarnation, RequestId};

use super::{Invariant, Look};
use crate::host::Seen;

/// A step may take so many times the longest before it, and at least so long.
const TIMES: u32 = 3;
const AT_LEAST: Duration = Duration::from_secs(1);
/// So long it may take then until nobody gives the worker anything: its heartbeats say so, a leader may have to be elected.
const KNOWN: Duration = Duration::from_millis(2_500);

#[derive(Default)]
pub(super) struct Stuck {
    workers: BTreeMap<String, Worker>,
    /// Index of the ledger that was furthest, ever.
    furthest: u64,
}

struct Worker {
    life: Incarnation,
    /// Steps begun when this life was seen first: its process may have left one of an earlier life undone.
    before: u64,
    /// The step it is in, if any, and since when.
    step: Option<(u64, Duration)>,
    /// Of the steps of this life.
    longest: Duration,
    /// What it had been given when it ought to have been known; None before.
    given: Option<Given>,
}

/// What a worker has been given.
struct Given {
    requests: BTreeSet<(RequestId, Epoch)>,
    /// Index of the ledger that was furthest.
    index: u64,
}

impl Invariant for Stuck {
    fn name(&self) -> &'static str {
        "H1 what is stuck gets nothing"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        let seen = look.world.seen();
        let indices = seen.coordinators.values().filter_map(|observer| observer.read(|ledger| ledger.index()));
        self.furthest = indices.fold(self.furthest, u64::max);
        for (host, shell) in &seen.workers {
            let (begun, ended) = seen.paces.get(host).map_or((0, 0), |pace| pace.steps());
            let fresh =
                || Worker { life: shell.incarnation, before: begun, step: None, longest: Duration::ZERO, given: None };
            let worker = self.workers.entry(host.clone()).or_insert_with(fresh);
            if worker.life != shell.incarnation {
                *worker = fresh();
            }
            if let Some((_, since)) = worker.step.filter(|(step, _)| *step != begun || begun == ended) {
                worker.longest = worker.longest.max(look.now - since);
                (worker.step, worker.given) = (None, None);
            }
            if begun == ended || begun == worker.before {
                continue;
            }
            let since = worker.step.get_or_insert((begun, look.now)).1;
            let may_take = (TIMES * worker.longest).max(AT_LEAST) + KNOWN;
            if look.now < since + may_take {
                continue;
            }
            // A coordinator that catches up, or has just been started again, still has what has long ended.
            let Some(known) = &worker.given else {
                worker.given = given(&seen, host, worker.life, self.furthest);
                continue;
            };
            let Some(now) = given(&seen, host, worker.life, known.index) else { continue };
            if let Some((request, _)) = now.requests.difference(&known.requests).next() {
                let seconds = (look.now - since).as_secs_f64();
                return Err(format!("{host} has been in one step for {seconds:.1} s, and is given {request}"));
            }
        }
        Ok(())
    }
}

/// What any ledger that is as far as `from` has assigned to this life, and still has open; None if there is no such ledger.
fn given(seen: &Seen, host: &str, life: Incarnation, from: u64) -> Option<Given> {
    let mut given = None;
    for observer in seen.coordinators.values() {
        let read = observer.read(|ledger| {
            if ledger.index() < from {
                return;
            }
            let given = given.get_or_insert_with(|| Given { requests: BTreeSet::new(), index: from });
            given.index = given.index.max(ledger.index());
            for (request, open) in ledger.open() {
                let mut places = open.prefill.iter().chain([&open.decode]);
                if places.any(|place| *place.worker.0 == *host && place.incarnation == life) {
                    given.requests.insert((*request, open.epoch));
                }
            }
        });
        read.unwrap_or_default();
    }
    given
}
