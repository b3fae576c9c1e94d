//! Q1: under limits that stand, no tenant has more requests open, or accepted in a time, than they allow, whoever leads.

use std::collections::{BTreeMap, BTreeSet};

use baton_coordinator::state::{Ledger, Limits};
use baton_core::RequestId;

use super::{Invariant, Look};

const MINUTE_MS: u64 = 60_000;

#[derive(Default)]
pub(super) struct Quotas {
    looked: BTreeMap<String, u64>,
    tenants: BTreeMap<String, Tenant>,
}

/// A tenant since its limits were last changed.
struct Tenant {
    limits: Limits,
    /// Ledger time when they were seen first; the change itself was then or before.
    since_ms: u64,
    /// The latest ledger time: what was accepted was accepted by then, and nodes that come back are behind for a while.
    latest_ms: u64,
    accepted: BTreeSet<RequestId>,
}

impl Quotas {
    fn look(&mut self, ledger: &Ledger) -> Result<(), String> {
        for (name, account) in ledger.tenants() {
            let now_ms = ledger.time_ms();
            let (limits, since_ms) = (&account.limits, now_ms);
            let fresh = || Tenant { limits: limits.clone(), since_ms, latest_ms: since_ms, accepted: BTreeSet::new() };
            let tenant = self.tenants.entry(name.clone()).or_insert_with(fresh);
            if tenant.since_ms > now_ms {
                // The ledger of a node that is behind.
                continue;
            }
            if tenant.limits != account.limits {
                *tenant = fresh();
            }
            tenant.latest_ms = tenant.latest_ms.max(now_ms);
            let since_ms = tenant.since_ms;
            let own = ledger.open().filter(|(_, open)| open.tenant == *name && open.accepted_ms > since_ms);
            let open: Vec<RequestId> = own.map(|(request, _)| *request).collect();
            tenant.accepted.extend(&open);
            tenant.check(name, open.len() as u64)?;
        }
        Ok(())
    }
}

impl Tenant {
    fn check(&self, name: &str, open: u64) -> Result<(), String> {
        let Limits { requests_open_max, requests_per_minute, .. } = self.limits;
        if requests_open_max > 0 && open > requests_open_max {
            return Err(format!("{name} has {open} requests open and may have {requests_open_max}"));
        }
        let (accepted, passed_ms) = (self.accepted.len() as u64, self.latest_ms - self.since_ms);
        let may = requests_per_minute * (MINUTE_MS + passed_ms);
        if requests_per_minute > 0 && accepted * MINUTE_MS > may {
            return Err(format!("{name} asked {accepted} times in {passed_ms} ms, at {requests_per_minute} a minute"));
        }
        Ok(())
    }
}

impl Invariant for Quotas {
    fn name(&self) -> &'static str {
        "Q1 quotas hold"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        for (host, observer) in &look.world.seen().coordinators {
            let Some(index) = observer.index() else { continue };
            if self.looked.insert(host.clone(), index) != Some(index) {
                observer.read(|ledger| self.look(ledger)).unwrap_or(Ok(()))?;
            }
        }
        Ok(())
    }
}
