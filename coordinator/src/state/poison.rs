//! Requests that kill the workers they run on. A worker's death alone does not say whose fault it was, so blame is
//! narrowed before anybody is refused:
//!
//! ```text
//! strike      a life ended under the request before it gained a token there, or within BLAME_MS of its assignment, or
//!             while it ran nothing else
//! first       a life that ended later than that, among others: the count begins again at one, or stays at
//!             SUSPECT_STRIKES if it is at least the LATE_SUSPECT-th that ended under the request
//! struck too  a suspect, by every such life: a suspect shares none with another one
//! suspect     from SUSPECT_STRIKES on; no two suspects share a life, and they run alone where a worker is empty
//! bystander   not struck by the end of a life that had a suspect on it
//! poisoned    at POISON_STRIKES if the last life ran nothing else, at POISON_STRIKES_CROWDED anyhow
//! ```
//!
//! So an innocent request that runs alone once is never refused: nothing but itself could end that life.

use std::collections::{BTreeMap, BTreeSet};

use baton_core::{Incarnation, Place, RequestId, WorkerId};
use serde::{Deserialize, Serialize};

use super::command::{Proposed, Terms};
use super::{Ledger, OpenRequest};

pub const SUSPECT_STRIKES: u32 = 2;
pub const POISON_STRIKES: u32 = 3;
/// For a request that found no empty worker to be tried on.
pub const POISON_STRIKES_CROWDED: u32 = 4;
/// Lives that ended under one request and make a suspect of it, however late and among however many others they ended.
const LATE_SUSPECT: usize = 3;
/// A request among others that gained tokens on a life for longer than this is not what ended it, more likely than not.
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

/// How to place a request while there are suspects. A suspect is prefilled where it is decoded, wants a worker of its
/// own, and never gets one that another suspect is on; others stay away from suspects while there is anywhere else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Apart {
    pub is_suspect: bool,
    /// Not there if it can be helped.
    pub wanted: BTreeSet<Life>,
    /// Not there at all.
    pub needed: BTreeSet<Life>,
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
    fn suspected_lives(&self, but: RequestId) -> BTreeSet<Life> {
        let others = self.poison.suspects.iter().filter(|id| **id != but).filter_map(|id| self.open.get(id));
        let lives = |open: &OpenRequest| {
            let places = open.prefill.iter().chain([&open.decode]);
            places.map(|p| (p.worker.clone(), p.incarnation)).collect::<Vec<_>>()
        };
        others.flat_map(lives).collect()
    }

    /// Lives with an open request on them, `but` this one.
    fn occupied_lives(&self, but: RequestId) -> BTreeSet<Life> {
        let others = self.open.iter().filter(|(id, _)| **id != but);
        let places = others.flat_map(|(_, open)| open.prefill.iter().chain([&open.decode]));
        places.map(|p| (p.worker.clone(), p.incarnation)).collect()
    }

    /// Which lives a request must stay away from while some are suspected of killing their workers; None: nobody is.
    /// Looks at every open request if this one is a suspect.
    pub fn apart(&self, request: RequestId, attempt: u32, killed: &[Life]) -> Option<Apart> {
        let suspected = self.suspected_lives(request);
        let is_suspect = self.suspects_after(request, attempt, killed);
        match (suspected.is_empty(), is_suspect) {
            (true, false) => None,
            (false, false) => Some(Apart { is_suspect, wanted: suspected, needed: BTreeSet::new() }),
            (_, true) => Some(Apart { is_suspect, wanted: self.occupied_lives(request), needed: suspected }),
        }
    }

    /// Whether another suspect is on this life already.
    pub(super) fn suspected(&self, request: RequestId, life: &Life) -> bool {
        let mut others = self.poison.suspects.iter().filter(|id| **id != request);
        others.any(|id| self.open.get(id).is_some_and(|open| runs_on(open, life)))
    }

    /// Whether the request is a suspect once this attempt's report of deaths has been counted.
    fn suspects_after(&self, request: RequestId, attempt: u32, killed: &[Life]) -> bool {
        if killed.is_empty() {
            return self.is_suspect(request);
        }
        let strikes = self.open.get(&request).map(|open| match open.reported < attempt {
            true => open.strikes + killed.iter().filter(|life| runs_on(open, life)).count() as u32,
            false => open.strikes,
        });
        let often = || killed.iter().collect::<BTreeSet<_>>().len() >= LATE_SUSPECT;
        strikes.is_some_and(|strikes| strikes >= SUSPECT_STRIKES || often())
    }

    /// Counts the ends of lives that a new attempt reports against its request, once per attempt. Only lives of the
    /// assignment in force count.
    pub(super) fn blame(&mut self, p: &Proposed, terms: Terms) -> Verdict {
        let Proposed { request, attempt, prompt_tokens, ref killed, .. } = *p;
        let Some(open) = self.open.get(&request).filter(|open| open.reported < attempt) else {
            return Verdict::GoesOn;
        };
        let lives: BTreeSet<Life> = killed.iter().filter(|life| runs_on(open, life)).cloned().collect();
        let soon = self.time_ms - open.assigned_ms <= BLAME_MS;
        let gained = prompt_tokens > open.prompt_tokens;
        let often = killed.iter().collect::<BTreeSet<_>>().len() >= LATE_SUSPECT;
        let (mut strikes, mut alone) = (open.strikes, false);
        for life in lives {
            self.record_death(&life);
            let death = &self.poison.deaths[&life];
            let accused = death.suspects.iter().any(|suspect| *suspect != request);
            if accused && strikes < SUSPECT_STRIKES {
                continue;
            }
            alone = death.requests <= 1;
            strikes = match terms {
                _ if soon || !gained => strikes + 1,
                Terms::Version3 => 1,
                Terms::After(_) if alone || death.suspects.contains(&request) => strikes + 1,
                Terms::After(_) if often => SUSPECT_STRIKES,
                Terms::After(_) => 1,
            };
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

#[cfg(test)]
mod tests {
    use baton_core::limits::ATTEMPTS_MAX;
    use baton_core::{Epoch, Refused};
    use proptest::prelude::*;

    use super::super::tests::{Shape, shaped};
    use super::super::{Batch, Command, Finished, Outcome};
    use super::*;

    /// Decode workers that restart when they die, and requests, some of which kill the worker they are on.
    struct World {
        ledger: Ledger,
        workers: Vec<Life>,
        requests: BTreeMap<u128, Run>,
        deaths: u32,
        /// Entries are those of version 3.
        old: bool,
    }

    #[derive(Clone, Default)]
    struct Run {
        poison: bool,
        attempt: u32,
        on: Option<Life>,
        killed: Vec<Life>,
        epoch: u64,
        /// Ends of lives that it was on.
        deaths: u32,
        end: Option<&'static str>,
    }

    impl World {
        fn new(workers: usize, requests: &[bool]) -> World {
            let mut world =
                World { ledger: Ledger::default(), workers: vec![], requests: BTreeMap::new(), deaths: 0, old: false };
            for worker in 0..workers {
                let life = world.register(worker);
                world.workers.push(life);
            }
            for (id, poison) in (1..).zip(requests) {
                world.requests.insert(id, Run { poison: *poison, ..Run::default() });
            }
            world
        }

        fn apply(&mut self, command: Command) -> Outcome {
            let index = self.ledger.index() + 1;
            self.ledger.apply(index, Batch { time_ms: index, commands: vec![command] }).pop().unwrap()
        }

        fn register(&mut self, worker: usize) -> Life {
            let registration = Shape { id: format!("d{worker}"), key: self.deaths.to_string() }.registration();
            let id = registration.worker.clone();
            match self.apply(Command::Register(registration)) {
                Outcome::Registered { incarnation } => (id, incarnation),
                other => panic!("{other:?}"),
            }
        }

        /// Places a request that is on no worker, as the leader does. False: it has to wait.
        fn place(&mut self, id: u128, choice: usize) -> bool {
            let run = self.requests[&id].clone();
            let killed = run.killed.clone();
            let apart = self.ledger.apart(RequestId(id), run.attempt + 1, &killed);
            let free = |avoid: &BTreeSet<Life>| {
                let free: Vec<&Life> = self.workers.iter().filter(|life| !avoid.contains(life)).collect();
                (!free.is_empty()).then(|| free[choice % free.len()].clone())
            };
            let life = match &apart {
                None => free(&BTreeSet::new()),
                Some(apart) => {
                    let both = apart.wanted.union(&apart.needed).cloned().collect();
                    free(&both).or_else(|| free(&apart.needed))
                }
            };
            let Some(life) = life else { return false };
            let p = Proposed { decode: life.clone(), killed, fingerprint: id, attempt: run.attempt + 1, ..shaped(id) };
            let outcome = match self.old {
                true => self.apply(Command::Assign(Box::new(p))),
                false => self.apply(Command::AssignAfter { proposed: Box::new(p), previous: Epoch(run.epoch) }),
            };
            let run = self.requests.get_mut(&id).unwrap();
            match outcome {
                Outcome::Assigned(assigned) => {
                    *run = Run { attempt: run.attempt + 1, on: Some(life), epoch: assigned.epoch.0, ..run.clone() };
                }
                Outcome::Refused(Refused::Poisoned) => run.end = Some("poisoned"),
                Outcome::Refused(Refused::Expired) => run.end = Some("out of attempts"),
                other => panic!("{other:?}"),
            }
            true
        }

        /// A poison that runs kills its worker, which restarts; all that were on it have to be placed again.
        fn kill(&mut self, id: u128) {
            let Some(life) = self.requests[&id].on.clone().filter(|_| self.requests[&id].poison) else { return };
            self.deaths += 1;
            for run in self.requests.values_mut().filter(|run| run.on.as_ref() == Some(&life)) {
                run.killed.extend(run.on.take());
                run.deaths += 1;
            }
            let worker = self.workers.iter().position(|known| *known == life).unwrap();
            self.workers[worker] = self.register(worker);
        }

        fn finish(&mut self, id: u128) {
            let run = self.requests[&id].clone();
            if run.on.is_none() || run.poison {
                return;
            }
            let finished = Finished {
                request: RequestId(id),
                epoch: Epoch(run.epoch),
                outcome: "complete".into(),
                prompt_tokens: 1,
                cached_tokens: 0,
                generated_tokens: 1,
            };
            assert_eq!(self.apply(Command::Finish(finished)), Outcome::Ended);
            *self.requests.get_mut(&id).unwrap() = Run { on: None, end: Some("complete"), ..run };
        }

        fn step(&mut self, event: (u8, u128, usize)) {
            let (what, id, choice) = event;
            let Some(run) = self.requests.get(&id).filter(|run| run.end.is_none()) else { return };
            match (what, run.on.is_some()) {
                (_, false) => drop(self.place(id, choice)),
                (0, true) => self.finish(id),
                (_, true) => self.kill(id),
            }
        }
    }

    /// Goal: the poison is refused after three deaths, whoever ran beside it goes on, and its content is refused for a
    /// while. Method: one poison among requests on three workers.
    #[test]
    fn a_poison_is_refused_after_three_deaths() {
        let mut world = World::new(3, &[true, false, false]);
        for id in [1, 2, 3] {
            assert!(world.place(id, 0), "all on one worker");
        }
        while world.requests[&1].end.is_none() {
            world.kill(1);
            for id in [2, 3, 1] {
                if world.requests[&id].on.is_none() {
                    assert!(world.place(id, 1));
                }
            }
        }
        assert_eq!((world.deaths, world.requests[&1].end), (POISON_STRIKES, Some("poisoned")));
        assert!(world.requests.values().filter(|run| !run.poison).all(|run| run.on.is_some()));
        let now = world.ledger.time_ms();
        assert!(world.ledger.quarantined(1, now) && !world.ledger.quarantined(2, now));
        assert!(!world.ledger.quarantined(1, now + QUARANTINE_MS), "for ten minutes");
        let again = world.apply(Command::Assign(Box::new(Proposed { fingerprint: 1, ..shaped(9) })));
        assert_eq!(again, Outcome::Refused(Refused::Poisoned));
    }

    impl World {
        /// Lets all of them run for long and gain tokens, then kills the life that the request is on.
        fn kill_late(&mut self, id: u128) {
            let time_ms = self.ledger.time_ms() + 10 * BLAME_MS;
            self.ledger.apply(self.ledger.index() + 1, Batch { time_ms, commands: vec![] });
            // More tokens so far than in the attempt before.
            self.ledger.open.values_mut().for_each(|open| open.prompt_tokens = 0);
            let poison = std::mem::replace(&mut self.requests.get_mut(&id).unwrap().poison, true);
            self.kill(id);
            self.requests.get_mut(&id).unwrap().poison = poison;
        }

        fn place_all(&mut self, choice: usize) {
            let ids: Vec<u128> = self.requests.keys().copied().collect();
            for id in ids {
                if self.requests[&id].on.is_none() && self.requests[&id].end.is_none() {
                    self.place(id, choice);
                }
            }
        }

        fn convicted(&self) -> usize {
            self.requests.values().filter(|run| run.end == Some("poisoned")).count()
        }
    }

    /// Goal: entries of earlier versions are judged as they were then. Method: one request alone, whose workers die late.
    #[test]
    fn entries_of_version_3_blame_nobody_for_late_deaths() {
        let mut world = World { old: true, ..World::new(1, &[true]) };
        for attempt in 1..ATTEMPTS_MAX {
            assert!(world.place(1, 0), "attempt {attempt}");
            world.kill_late(1);
        }
        assert_eq!(world.requests[&1].end, None);
        assert_eq!(world.ledger.open[&RequestId(1)].strikes, 1);
    }

    /// Goal: a request that kills whatever runs it, however late and however much it has gained, is refused after three
    /// deaths where it ran alone.
    #[test]
    fn a_late_poison_alone_is_refused_after_three_deaths() {
        let mut world = World::new(2, &[true]);
        while world.requests[&1].end.is_none() {
            assert!(world.place(1, world.deaths as usize));
            world.kill_late(1);
            if world.deaths == POISON_STRIKES {
                world.place(1, 0);
            }
        }
        assert_eq!((world.deaths, world.requests[&1].end), (POISON_STRIKES, Some("poisoned")));
        assert!(world.ledger.quarantined(1, world.ledger.time_ms()));
    }

    /// Goal: among others a late poison becomes a suspect by its third death and is refused by the next one, alone, and
    /// nobody with it. Method: twenty requests on one of three workers, the poison among them.
    #[test]
    fn a_late_poison_among_others_is_refused_alone() {
        let mut world = World::new(3, &[&[true][..], &[false; 19][..]].concat());
        while world.requests[&1].end.is_none() && world.deaths < ATTEMPTS_MAX {
            // All on one worker, as long as nobody is suspected.
            world.place_all(0);
            if world.requests[&1].on.is_some() {
                world.kill_late(1);
            }
        }
        assert_eq!((world.requests[&1].end, world.convicted()), (Some("poisoned"), 1));
        assert_eq!(world.deaths as usize, LATE_SUSPECT + 1);
    }

    /// Goal: workers that die by bad luck with twenty requests on them convict none. Method: two deaths of all of them,
    /// late, and more that hit whoever is left on a worker.
    #[test]
    fn bad_luck_convicts_nobody() {
        let mut world = World::new(4, &[false; 20]);
        for _ in 0..2 {
            world.place_all(0);
            world.kill_late(1);
        }
        world.place_all(1);
        assert!(world.ledger.poison.suspects.is_empty(), "two late deaths suspect nobody");
        assert_eq!((world.requests.values().filter(|run| run.on.is_some()).count(), world.convicted()), (20, 0));
    }

    proptest! {
        /// An innocent request is refused only after dying beside others once more often than a poison by itself may,
        /// that is, if it never found an empty worker; nobody kills for ever.
        #[test]
        fn bystanders_are_not_convicted(
            workers in 1usize..5,
            poisons in proptest::collection::vec(any::<bool>(), 1..7),
            events in proptest::collection::vec((0u8..3, 1u128..7, 0usize..8), 0..200),
        ) {
            let mut world = World::new(workers, &poisons);
            events.into_iter().for_each(|event| world.step(event));
            for (id, run) in &world.requests {
                let convicted = !run.poison && run.end == Some("poisoned");
                prop_assert!(!convicted || run.deaths >= POISON_STRIKES_CROWDED, "{id} after {} deaths", run.deaths);
            }
            prop_assert!(world.deaths <= ATTEMPTS_MAX * poisons.iter().filter(|poison| **poison).count() as u32);
        }
    }
}
