//! Requests that kill the workers they run on. A worker's death alone does not say whose fault it was, so blame is
//! narrowed before anybody is refused:
//!
//! ```text
//! strike      a life ended under the request before it gained a token there, or within BLAME_MS of its assignment
//! first       a life that ended later than that: the count begins again at one
//! suspect     from SUSPECT_STRIKES on; no two suspects share a life, and they run alone where a worker is empty
//! bystander   not struck by the end of a life that had a suspect on it
//! poisoned    at POISON_STRIKES if the last life ran nothing else, at POISON_STRIKES_CROWDED anyhow
//! ```
//!
//! So an innocent request that runs alone once is never refused: nothing but itself could end that life.

use std::collections::{BTreeMap, BTreeSet};

use baton_core::{Incarnation, Place, RequestId, WorkerId};
use serde::{Deserialize, Serialize};

use super::{Ledger, OpenRequest};

pub const SUSPECT_STRIKES: u32 = 2;
pub const POISON_STRIKES: u32 = 3;
/// For a request that found no empty worker to be tried on.
pub const POISON_STRIKES_CROWDED: u32 = 4;
/// A request that gained tokens on a life for longer than this is not what ended it, more likely than not.
pub const BLAME_MS: u64 = 1_000;
/// How long a poisoned fingerprint is refused, ledger time.
pub const QUARANTINE_MS: u64 = 600_000;
/// Fingerprints refused at a time; the one nearest its end is let go first.
pub(super) const QUARANTINE_MAX: usize = 1024;
/// Deaths remembered; the oldest is forgotten first.
pub(super) const DEATHS_MAX: usize = 256;

const _: () = assert!(SUSPECT_STRIKES < POISON_STRIKES && POISON_STRIKES <= POISON_STRIKES_CROWDED);
const _: () = assert!(POISON_STRIKES_CROWDED < baton_core::limits::ATTEMPTS_MAX);

/// One life of a worker.
pub type Life = (WorkerId, Incarnation);

/// What the ledger knows of deaths and whose fault they were.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Poison {
    /// Open requests with at least SUSPECT_STRIKES.
    suspects: BTreeSet<RequestId>,
    deaths: BTreeMap<Life, Death>,
    /// Until when a fingerprint is refused, ledger time.
    quarantine: BTreeMap<u128, u64>,
}

/// Who was on a life when it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Death {
    at_ms: u64,
    /// Requests open on it.
    requests: u64,
    suspects: Vec<RequestId>,
}

/// What a report of deaths makes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    GoesOn,
    Poisoned,
}

/// Whether the request has this life's blocks or steps.
fn runs_on(open: &OpenRequest, life: &Life) -> bool {
    let is = |place: &Place| place.worker == life.0 && place.incarnation == life.1;
    is(&open.decode) || open.prefill.as_ref().is_some_and(is)
}

impl Ledger {
    /// Whether requests of this fingerprint are refused now. 0 is no fingerprint.
    pub fn quarantined(&self, fingerprint: u128, now_ms: u64) -> bool {
        fingerprint != 0 && self.poison.quarantine.get(&fingerprint).is_some_and(|until| *until > now_ms)
    }

    pub fn quarantine_len(&self) -> usize {
        self.poison.quarantine.len()
    }

    pub fn is_suspect(&self, request: RequestId) -> bool {
        self.poison.suspects.contains(&request)
    }

    /// Lives on which a suspect is open, `but` this request.
    pub fn suspected_lives(&self, but: RequestId) -> BTreeSet<Life> {
        let others = self.poison.suspects.iter().filter(|id| **id != but).filter_map(|id| self.open.get(id));
        let lives = |open: &OpenRequest| {
            let places = open.prefill.iter().chain([&open.decode]);
            places.map(|p| (p.worker.clone(), p.incarnation)).collect::<Vec<_>>()
        };
        others.flat_map(lives).collect()
    }

    /// Lives with an open request on them, `but` this one. Looks at every open request.
    pub fn occupied_lives(&self, but: RequestId) -> BTreeSet<Life> {
        let others = self.open.iter().filter(|(id, _)| **id != but);
        let places = others.flat_map(|(_, open)| open.prefill.iter().chain([&open.decode]));
        places.map(|p| (p.worker.clone(), p.incarnation)).collect()
    }

    /// Whether another suspect is on this life already.
    pub(super) fn suspected(&self, request: RequestId, life: &Life) -> bool {
        let mut others = self.poison.suspects.iter().filter(|id| **id != request);
        others.any(|id| self.open.get(id).is_some_and(|open| runs_on(open, life)))
    }

    /// Whether the request is a suspect once this attempt's report of deaths has been counted.
    pub fn suspects_after(&self, request: RequestId, attempt: u32, killed: &[Life]) -> bool {
        if killed.is_empty() {
            return self.is_suspect(request);
        }
        let strikes = self.open.get(&request).map(|open| match open.reported < attempt {
            true => open.strikes + killed.iter().filter(|life| runs_on(open, life)).count() as u32,
            false => open.strikes,
        });
        strikes.is_some_and(|strikes| strikes >= SUSPECT_STRIKES)
    }

    /// Counts the ends of lives that a new attempt reports against its request, once per attempt. Only lives of the
    /// assignment in force count.
    pub(super) fn blame(&mut self, request: RequestId, attempt: u32, prompt_tokens: u64, killed: &[Life]) -> Verdict {
        let Some(open) = self.open.get(&request).filter(|open| open.reported < attempt) else {
            return Verdict::GoesOn;
        };
        let lives: BTreeSet<Life> = killed.iter().filter(|life| runs_on(open, life)).cloned().collect();
        let soon = self.time_ms - open.assigned_ms <= BLAME_MS;
        let gained = prompt_tokens > open.prompt_tokens;
        let (mut strikes, mut alone) = (open.strikes, false);
        for life in lives {
            self.record_death(&life);
            let death = &self.poison.deaths[&life];
            let accused = death.suspects.iter().any(|suspect| *suspect != request);
            if accused && strikes < SUSPECT_STRIKES {
                continue;
            }
            strikes = if soon || !gained { strikes + 1 } else { 1 };
            alone = death.requests <= 1;
        }
        let open = self.open.get_mut(&request).expect("looked up above");
        open.reported = attempt;
        open.strikes = strikes;
        match strikes >= SUSPECT_STRIKES {
            true => drop(self.poison.suspects.insert(request)),
            false => self.unsuspect(request),
        }
        let poisoned = strikes >= POISON_STRIKES_CROWDED || (strikes >= POISON_STRIKES && alone);
        if poisoned { Verdict::Poisoned } else { Verdict::GoesOn }
    }

    /// Writes down who is on a life at its end; the first word of it counts.
    pub(super) fn record_death(&mut self, life: &Life) {
        if self.poison.deaths.contains_key(life) {
            return;
        }
        let on_it = || self.open.iter().filter(|(_, open)| runs_on(open, life)).map(|(id, _)| *id);
        let suspects = on_it().filter(|id| self.poison.suspects.contains(id)).collect();
        let death = Death { at_ms: self.time_ms, requests: on_it().count() as u64, suspects };
        if self.poison.deaths.len() >= DEATHS_MAX {
            let oldest = self.poison.deaths.iter().min_by_key(|(life, death)| (death.at_ms, *life));
            let oldest = oldest.map(|(life, _)| life.clone());
            oldest.map(|life| self.poison.deaths.remove(&life));
        }
        self.poison.deaths.insert(life.clone(), death);
    }

    pub(super) fn quarantine(&mut self, fingerprint: u128) {
        let (now, quarantine) = (self.time_ms, &mut self.poison.quarantine);
        if fingerprint == 0 {
            return;
        }
        quarantine.retain(|_, until| *until > now);
        if quarantine.len() >= QUARANTINE_MAX {
            let first = quarantine.iter().min_by_key(|(print, until)| (**until, **print)).map(|(print, _)| *print);
            first.map(|print| quarantine.remove(&print));
        }
        quarantine.insert(fingerprint, now + QUARANTINE_MS);
    }

    pub(super) fn unsuspect(&mut self, request: RequestId) {
        self.poison.suspects.remove(&request);
    }
}
