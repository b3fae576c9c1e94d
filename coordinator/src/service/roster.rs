//! What this node has heard: load, liveness and prefix index from heartbeats, gateways, and what the leader promised
//! since. Soft state, the same on every node; never written to the log and never a proof of anything.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_core::limits::WORKER_LEASE_MS;
use baton_core::{BlockHash, Incarnation, RequestId, WorkerId};
use baton_proto::v1;
use tokio::time::Instant;
use xxhash_rust::xxh3::Xxh3;

use super::pairs::{Health, Pair, PairIndex, Pairs};
use super::progress::Progress;
use super::promises::{Promise, Promises};
use crate::placement::{ALONE, Candidate, Decision, Load, Pools, PrefixIndex, WorkerIndex};
use crate::state::{Ledger, Life, Order, WORKERS_MAX, Worker};

/// (block, holder) pairs remembered, about 48 bytes each.
const PREFIX_INDEX_MAX: usize = 200_000;
/// Gateways known at a time.
pub(crate) const GATEWAYS_MAX: usize = 1024;
/// Stuck processes remembered between two of their lives.
const LEFT_STUCK_MAX: usize = 256;
/// Kinds of workers whose lists' versions are remembered.
const RECEIVERS_KINDS_MAX: usize = 64;
/// A new worker is used like the others after so long, though no canary has come back from it: where all are busy none does.
const UNPROVEN: Duration = Duration::from_secs(2);
/// A gateway silent for so long is forgotten.
const GATEWAY_FORGET: Duration = Duration::from_millis(10 * WORKER_LEASE_MS);

/// Everything heard.
pub(crate) struct Roster {
    workers: BTreeMap<WorkerId, Heard>,
    gateways: BTreeMap<String, Gateway>,
    prefix: PrefixIndex,
    /// The last index given to a life.
    indexes: WorkerIndex,
    pairs: Pairs,
    /// Of the list of decode workers for each (numerics, layout), until one comes, goes or changes: thousands of heartbeats a
    /// second ask for it.
    receivers_versions: BTreeMap<(String, String), u64>,
    /// Processes whose last life was stuck, with its steps: their next life is so too until it makes one.
    left_stuck: BTreeMap<WorkerId, (u32, Progress)>,
}

/// One life of a worker.
pub(crate) struct Heard {
    incarnation: Incarnation,
    sequence: u64,
    /// Without the index lists.
    pub(crate) load: v1::Load,
    pub(crate) member: v1::Member,
    pub(crate) at: Instant,
    /// When this life was first heard of.
    since: Instant,
    index: WorkerIndex,
    suspect: bool,
    progress: Progress,
    promises: Promises,
}

pub(crate) struct Gateway {
    pub(crate) member: v1::Member,
    pub(crate) at: Instant,
}

/// One heartbeat, checked.
pub(crate) struct Beat {
    pub(crate) worker: WorkerId,
    pub(crate) incarnation: Incarnation,
    pub(crate) sequence: u64,
    pub(crate) load: v1::Load,
    pub(crate) member: v1::Member,
    pub(crate) added: Vec<BlockHash>,
    pub(crate) removed: Vec<BlockHash>,
}

/// The heartbeat is older than one already heard.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Old;

impl Roster {
    pub(crate) fn new() -> Roster {
        let prefix = PrefixIndex::new(PREFIX_INDEX_MAX);
        let (workers, gateways) = (BTreeMap::new(), BTreeMap::new());
        let (pairs, receivers_versions, left_stuck) = Default::default();
        Roster { workers, gateways, prefix, indexes: ALONE, pairs, receivers_versions, left_stuck }
    }

    /// The worker as last heard in this life.
    pub(crate) fn worker(&self, id: &WorkerId, incarnation: Incarnation) -> Option<&Heard> {
        self.workers.get(id).filter(|heard| heard.incarnation == incarnation)
    }

    /// Where decode workers take a model's blocks, with the version of that list; the list is left out if it has been `seen`.
    pub(crate) fn receivers(&mut self, model: &v1::ModelSummary, seen: u64) -> (u64, Vec<String>) {
        let fits = |theirs: &v1::ModelSummary| theirs.numerics == model.numerics && theirs.layout == model.layout;
        let takes = |heard: &&Heard| {
            let member = &heard.member;
            member.role() == v1::Role::Decode
                && !member.kv_address.is_empty()
                && member.model.as_ref().is_some_and(fits)
        };
        let all = || self.workers.values().filter(takes).map(|heard| &heard.member.kv_address);
        let kind = (model.numerics.clone(), model.layout.clone());
        let version = self.receivers_versions.get(&kind).copied().unwrap_or_else(|| version(all()));
        if self.receivers_versions.len() < RECEIVERS_KINDS_MAX {
            self.receivers_versions.insert(kind, version);
        }
        (version, if version == seen { Vec::new() } else { all().cloned().collect() })
    }

    /// Whether a heartbeat of this worker may be taken in, if the ledger does not know it.
    pub(crate) fn has_room_for(&self, id: &WorkerId) -> bool {
        self.workers.contains_key(id) || self.workers.len() < WORKERS_MAX
    }

    pub(crate) fn gateways(&self) -> impl Iterator<Item = (&String, &Gateway)> {
        self.gateways.iter()
    }

    /// Takes a heartbeat in. True: the whole index is wanted with the next one.
    pub(crate) fn beat(&mut self, beat: Beat, now: Instant) -> Result<bool, Old> {
        let known = self.workers.get(&beat.worker);
        let fresh = known.is_none_or(|heard| beat.incarnation > heard.incarnation);
        let old = known.is_some_and(|heard| {
            beat.incarnation < heard.incarnation
                || (beat.incarnation == heard.incarnation && beat.sequence <= heard.sequence)
        });
        if old {
            return Err(Old);
        }
        let heard = if fresh { self.begin(&beat, now) } else { self.workers.get_mut(&beat.worker).expect("known") };
        let reset = beat.load.index_reset;
        let gap = beat.sequence != heard.sequence.saturating_add(1);
        heard.sequence = beat.sequence;
        heard.progress.report(&beat.load, now);
        heard.load = v1::Load { blocks_added: vec![], blocks_removed: vec![], ..beat.load };
        let moved = heard.member.kv_address != beat.member.kv_address || heard.member.model != beat.member.model;
        heard.member = beat.member;
        heard.at = now;
        heard.suspect = false;
        heard.promises.seen(now);
        let index = heard.index;
        if moved {
            self.receivers_versions.clear();
        }
        if reset {
            self.prefix.clear(index);
        }
        self.prefix.remove(index, beat.removed);
        self.prefix.add(index, beat.added);
        metrics::gauge!("baton_coordinator_prefix_index_blocks").set(self.prefix.len() as f64);
        metrics::gauge!("baton_coordinator_prefix_index_dropped").set(self.prefix.dropped() as f64);
        Ok(gap && !reset)
    }

    /// A worker that has just registered counts as heard, so that its lease starts then.
    pub(crate) fn registered(&mut self, member: v1::Member, now: Instant) {
        let load = v1::Load { blocks_total: blocks(&member), blocks_free: blocks(&member), ..Default::default() };
        let (worker, incarnation) = (WorkerId(member.id.as_str().into()), Incarnation(member.incarnation));
        if self.workers.get(&worker).is_some_and(|heard| heard.incarnation >= incarnation) {
            return;
        }
        let beat = Beat { worker, incarnation, sequence: 0, load, member, added: vec![], removed: vec![] };
        self.begin(&beat, now);
    }

    fn begin(&mut self, beat: &Beat, now: Instant) -> &mut Heard {
        self.forget(&beat.worker);
        self.receivers_versions.clear();
        self.indexes += 1;
        let before = self.left_stuck.remove(&beat.worker).filter(|(pid, _)| *pid == beat.member.pid);
        let progress = before.map_or(Progress::new(now), |(_, progress)| progress.go_on(now));
        let heard = Heard {
            incarnation: beat.incarnation,
            sequence: 0,
            load: beat.load.clone(),
            member: beat.member.clone(),
            at: now,
            since: now,
            index: self.indexes,
            suspect: false,
            progress,
            promises: Promises::default(),
        };
        self.workers.entry(beat.worker.clone()).insert_entry(heard).into_mut()
    }

    fn forget(&mut self, worker: &WorkerId) {
        if let Some(heard) = self.workers.remove(worker) {
            self.prefix.clear(heard.index);
            self.pairs.forget(heard.index);
            self.receivers_versions.clear();
            if heard.progress.stuck().is_some() && self.left_stuck.len() < LEFT_STUCK_MAX {
                self.left_stuck.insert(worker.clone(), (heard.member.pid, heard.progress));
            }
        }
    }

    /// Forgets what no longer lives or no longer holds. True: a watcher wants to know.
    pub(crate) fn sweep(&mut self, ledger: &Ledger, now: Instant) -> bool {
        let replaced = |id: &WorkerId, heard: &Heard| match ledger.worker(id) {
            Some(worker) => {
                worker.incarnation > heard.incarnation || (worker.incarnation == heard.incarnation && !worker.live)
            }
            None => heard.at + GATEWAY_FORGET < now,
        };
        let gone: Vec<WorkerId> =
            self.workers.iter().filter(|(id, heard)| replaced(id, heard)).map(|(id, _)| id.clone()).collect();
        gone.iter().for_each(|id| self.forget(id));
        let before = self.gateways.len();
        self.gateways.retain(|_, gateway| gateway.at + GATEWAY_FORGET > now);
        let retried = self.pairs.sweep(now);
        retried || before != self.gateways.len()
    }

    /// Takes a gateway in. None: there are too many. True: it is new.
    pub(crate) fn gateway(&mut self, member: v1::Member, now: Instant) -> Option<bool> {
        let new = self.gateways.get(&member.id).is_none_or(|known| known.member != member);
        if !self.gateways.contains_key(&member.id) && self.gateways.len() >= GATEWAYS_MAX {
            return None;
        }
        self.gateways.insert(member.id.clone(), Gateway { member, at: now });
        Some(new)
    }

    pub(crate) fn gateway_left(&mut self, id: &str) -> bool {
        self.gateways.remove(id).is_some()
    }

    /// Somebody could not use this life; others are preferred until it is heard of again.
    pub(crate) fn suspect(&mut self, id: &WorkerId, incarnation: Incarnation) {
        if let Some(heard) = self.workers.get_mut(id).filter(|heard| heard.incarnation == incarnation) {
            heard.suspect = true;
        }
    }

    /// Counts an assignment on its workers until they report it themselves.
    pub(crate) fn promise(&mut self, request: RequestId, decision: &Decision, now: Instant) {
        let local = decision.prefill.is_none();
        let decode_tokens = if local { decision.prefill_tokens } else { 0 };
        let promise = Promise { at: now, blocks: decision.blocks, tokens: decode_tokens };
        self.promise_to(&decision.decode, request, promise);
        if let Some(prefill) = &decision.prefill {
            self.promise_to(prefill, request, Promise { at: now, blocks: 0, tokens: decision.prefill_tokens });
        }
    }

    fn promise_to(&mut self, (id, incarnation): &(WorkerId, Incarnation), request: RequestId, promise: Promise) {
        if let Some(heard) = self.workers.get_mut(id).filter(|heard| heard.incarnation == *incarnation) {
            heard.promises.insert(request, promise);
        }
    }

    /// The request is not on this worker, or no longer.
    pub(crate) fn release(&mut self, request: RequestId, worker: &WorkerId) {
        if let Some(heard) = self.workers.get_mut(worker) {
            heard.promises.remove(request);
        }
    }

    /// A handoff of a request between these two failed. True: they leave placement now.
    pub(crate) fn pair_failed(&mut self, prefill: &Life, decode: &Life, now: Instant) -> bool {
        self.judge(Some(prefill), decode, Health::Broken("a request's handoff failed".into()), now)
    }

    /// Takes a verdict on a pair in, or on a decode worker by itself, unless one of the lives is over. True: placement
    /// changes by it.
    pub(super) fn judge(&mut self, prefill: Option<&Life>, decode: &Life, health: Health, now: Instant) -> bool {
        let index = |(id, incarnation): &Life| self.worker(id, *incarnation).map(|heard| heard.index);
        let pair = (prefill.map_or(Some(ALONE), index), index(decode));
        match pair {
            (Some(prefill), Some(decode)) => self.pairs.judge((prefill, decode), health, now),
            _ => false,
        }
    }

    pub(super) fn pairs(&self) -> &Pairs {
        &self.pairs
    }

    /// Takes over what the leader knows of pairs. True: placement would change by it.
    pub(super) fn adopt(&mut self, told: Vec<(PairIndex, Pair)>) -> bool {
        self.pairs.adopt(told)
    }

    /// The ledger's live workers with what was heard of them, for placement. Both are in the order of their ids.
    pub(crate) fn pools<'a>(&'a self, ledger: &'a Ledger, chain: &[BlockHash], now: Instant) -> Pools<'a> {
        let hits = self.prefix.hits(chain);
        let mut heard = self.workers.iter().peekable();
        let mut candidates = Vec::with_capacity(self.workers.len());
        let mut lost = Vec::new();
        for (id, worker) in ledger.workers() {
            if !worker.live {
                lost.push(worker.model.name.as_str());
                continue;
            }
            while let Some((_, left)) = heard.next_if(|(other, _)| *other < id) {
                lost.extend(left.model());
            }
            let of_life =
                |(other, heard): &(&WorkerId, &Heard)| *other == id && heard.incarnation == worker.incarnation;
            candidates.push(match heard.next_if(of_life) {
                Some((_, heard)) => Candidate {
                    unproven: now < heard.since + UNPROVEN && !self.pairs.is_proven(heard.index),
                    ..heard.candidate(id, worker, hits.get(&heard.index).copied().unwrap_or(0), now)
                },
                None => unheard(id, worker),
            });
        }
        // Who has left in good order is in no ledger, and is remembered here for a while.
        lost.extend(heard.filter_map(|(_, left)| left.model()));
        Pools { candidates, lost, broken: self.pairs.broken() }
    }
}

impl Heard {
    /// How long it has had work and made no step.
    pub(crate) fn stuck(&self) -> Option<Duration> {
        self.progress.stuck()
    }

    fn model(&self) -> Option<&str> {
        self.member.model.as_ref().map(|model| model.name.as_str())
    }

    /// Why it takes no requests, for a person; empty: it does.
    pub(super) fn trouble(&self, pairs: &Pairs) -> String {
        match () {
            () if self.stuck().is_some() => "has work and makes no step".into(),
            () if pairs.is_alone_broken(self.index) => "its canary fails".into(),
            () if self.suspect => "a request could not reach it".into(),
            () => String::new(),
        }
    }

    /// Whether requests wait there for others.
    pub(super) fn has_queue(&self) -> bool {
        self.load.sequences_waiting > 0 || self.load.tokens_waiting > 0
    }

    pub(super) fn index(&self) -> WorkerIndex {
        self.index
    }

    fn candidate<'a>(&self, id: &'a WorkerId, worker: &'a Worker, hits: u64, now: Instant) -> Candidate<'a> {
        Candidate {
            index: self.index,
            load: Load { draining: self.load.draining || worker.wanted() != Order::Serve, ..self.load_now(now) },
            hits,
            suspect: self.suspect,
            stuck: self.stuck().is_some(),
            ..unheard(id, worker)
        }
    }

    /// Load as reported, plus the promises it cannot have seen.
    fn load_now(&self, now: Instant) -> Load {
        let available = self.load.blocks_free.saturating_add(self.load.blocks_cached);
        let waiting = u64::from(self.load.sequences_waiting);
        let begun = u64::from(self.load.sequences_running) + self.promises.len();
        let beyond = match u64::from(self.load.sequences_max) {
            0 => 0,
            most => begun.saturating_sub(most),
        };
        Load {
            blocks_available: available.saturating_sub(self.promises.blocks),
            running: u64::from(self.load.sequences_running),
            waiting: waiting + self.promises.len(),
            over: waiting + beyond,
            tokens_waiting: self.load.tokens_waiting.saturating_add(self.promises.tokens),
            prefill_rate: self.load.prefill_tokens_per_s,
            step_us: self.progress.step_us(),
            age_ms: (now - self.at).as_millis() as u64,
            draining: self.load.draining,
        }
    }
}

/// Of a list of addresses; 0: it is empty.
fn version<'a>(addresses: impl Iterator<Item = &'a String>) -> u64 {
    let mut hash = Xxh3::new();
    let mut any = false;
    for address in addresses {
        any = true;
        hash.update(address.as_bytes());
        hash.update(&[0]);
    }
    if any { hash.digest().max(1) } else { 0 }
}

/// A worker that a new leader has not heard of yet: nothing is known of its load, so it counts as the others do.
fn unheard<'a>(id: &'a WorkerId, worker: &'a Worker) -> Candidate<'a> {
    let blocks_available = worker.model.blocks_total;
    Candidate {
        worker: id,
        index: ALONE,
        incarnation: worker.incarnation,
        role: worker.role,
        model: &worker.model,
        address: &worker.address,
        pid: worker.pid,
        load: Load {
            blocks_available,
            age_ms: WORKER_LEASE_MS,
            draining: worker.wanted() != Order::Serve,
            ..Load::default()
        },
        hits: 0,
        suspect: false,
        stuck: false,
        unproven: false,
    }
}

fn blocks(member: &v1::Member) -> u64 {
    member.model.as_ref().map_or(0, |model| model.blocks_total)
}

#[cfg(test)]
mod tests {
    use super::super::promises::PROMISE_SEEN;
    use super::*;
    use crate::state::{Batch, Command, Outcome, Registration};

    fn beat(incarnation: u64, sequence: u64, added: Vec<BlockHash>) -> Beat {
        let load = v1::Load { blocks_free: 100, ..Default::default() };
        let (worker, incarnation) = (WorkerId("d".into()), Incarnation(incarnation));
        Beat { worker, incarnation, sequence, load, member: v1::Member::default(), added, removed: vec![] }
    }

    /// Prefill workers hear of every decode worker that takes their blocks, and of each list once.
    #[test]
    fn receivers_are_those_of_the_model() {
        let (mut roster, now) = (Roster::new(), Instant::now());
        let model = |layout: &str| v1::ModelSummary { layout: layout.into(), ..Default::default() };
        let mut sequence = 0;
        let mut hear = |id: &str, role: v1::Role, layout: &str, kv_address: &str| {
            let (role, layout, kv_address) = (role.into(), Some(model(layout)), kv_address.into());
            let member = v1::Member { role, model: layout, kv_address, ..Default::default() };
            sequence += 1;
            let heard = Beat { worker: WorkerId(id.into()), member, ..beat(1, sequence, vec![]) };
            roster.beat(heard, now).unwrap();
            roster.receivers(&model("a"), 0)
        };
        assert_eq!(hear("p", v1::Role::Prefill, "a", "p:2"), (0, vec![]));
        let (one, list) = hear("d", v1::Role::Decode, "a", "d:2");
        assert_eq!(list, ["d:2"]);
        assert_eq!(hear("of another model", v1::Role::Decode, "b", "x:2"), (one, list.clone()));
        assert_eq!(hear("of an earlier release", v1::Role::Decode, "a", ""), (one, list));
        assert_eq!(hear("d", v1::Role::Decode, "a", "d:3").1, ["d:3"], "it listens elsewhere");
        assert_eq!(hear("d", v1::Role::Decode, "a", "d:2").0, one);
        let (two, list) = hear("e", v1::Role::Decode, "a", "e:2");
        assert_eq!(list, ["d:2", "e:2"]);
        assert_ne!(two, one);
        assert_eq!(roster.receivers(&model("a"), two), (two, vec![]));
        assert_eq!(roster.receivers(&model("a"), one), (two, list));
        assert_eq!(roster.receivers_versions.len(), 1, "the version is kept");
        roster.forget(&WorkerId("e".into()));
        assert_eq!(roster.receivers(&model("a"), two), (one, vec!["d:2".into()]));
    }

    /// A ledger with the one worker `d`, and its incarnation.
    fn ledger() -> (Ledger, Incarnation) {
        let registration = Registration {
            worker: WorkerId("d".into()),
            role: baton_core::Role::Decode,
            address: "d:1".into(),
            pid: 1,
            version: String::new(),
            model: crate::state::Model { blocks_total: 100, ..Default::default() },
            process_key: "k".into(),
        };
        let mut ledger = Ledger::default();
        let batch = Batch { time_ms: 0, commands: vec![Command::Register(registration)] };
        match ledger.apply(1, batch).pop() {
            Some(Outcome::Registered { incarnation }) => (ledger, incarnation),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn older_heartbeats_are_refused_and_a_gap_asks_for_the_whole_index() {
        let (mut roster, now) = (Roster::new(), Instant::now());
        assert_eq!(roster.beat(beat(5, 1, vec![]), now), Ok(false));
        assert_eq!(roster.beat(beat(5, 1, vec![]), now), Err(Old));
        assert_eq!(roster.beat(beat(4, 9, vec![]), now), Err(Old));
        assert_eq!(roster.beat(beat(5, 3, vec![]), now), Ok(true));
        let mut reset = beat(5, 7, vec![]);
        reset.load.index_reset = true;
        assert_eq!(roster.beat(reset, now), Ok(false));
        assert_eq!(roster.beat(beat(6, 1, vec![]), now), Ok(false), "a later life starts anew");
        assert_eq!(roster.beat(beat(7, u64::MAX, vec![]), now), Ok(true));
        assert_eq!(roster.beat(beat(7, u64::MAX, vec![]), now), Err(Old));
    }

    #[tokio::test]
    async fn promises_count_until_they_are_reported_or_released() {
        let (ledger, incarnation) = ledger();
        let (mut roster, start) = (Roster::new(), Instant::now());
        roster.beat(beat(incarnation.0, 1, vec![]), start).unwrap();
        let decision = Decision {
            holder: None,
            decode: (WorkerId("d".into()), incarnation),
            prefill: None,
            blocks: 10,
            prefill_tokens: 160,
            explanation: String::new(),
            trace: crate::placement::Trace::default(),
        };
        let load = |roster: &Roster| roster.pools(&ledger, &[], start).candidates[0].load;
        let seen = |load: Load| (load.blocks_available, load.waiting, load.tokens_waiting);
        (1..=3).for_each(|request| roster.promise(RequestId(request), &decision, start));
        roster.promise(RequestId(3), &decision, start);
        assert_eq!(seen(load(&roster)), (70, 3, 480));
        roster.release(RequestId(2), &WorkerId("d".into()));
        assert_eq!(seen(load(&roster)), (80, 2, 320));
        roster.beat(beat(incarnation.0, 2, vec![]), start).unwrap();
        assert_eq!(seen(load(&roster)), (80, 2, 320), "too young to be part of the report");
        roster.beat(beat(incarnation.0, 3, vec![]), start + PROMISE_SEEN).unwrap();
        assert_eq!(seen(load(&roster)), (100, 0, 0));
    }

    /// The model of a worker that has left is known for a while, so that its clients are told to come again.
    #[tokio::test]
    async fn what_a_worker_served_that_has_left_is_remembered() {
        let ((mut ledger, incarnation), now) = (ledger(), Instant::now());
        let mut roster = Roster::new();
        let model = Some(v1::ModelSummary { name: "m".into(), ..Default::default() });
        let heard = beat(incarnation.0, 1, vec![]);
        roster.beat(Beat { member: v1::Member { model, ..heard.member }, ..heard }, now).unwrap();
        assert!(roster.pools(&ledger, &[], now).lost.is_empty());
        let leave = Command::Leave { worker: WorkerId("d".into()), incarnation };
        ledger.apply(2, Batch { time_ms: 0, commands: vec![leave] });
        roster.sweep(&ledger, now);
        assert_eq!(roster.pools(&ledger, &[], now).lost, ["m"]);
        roster.sweep(&ledger, now + 2 * GATEWAY_FORGET);
        assert!(roster.pools(&ledger, &[], now).lost.is_empty());
    }

    /// A worker that has just come waits for its first canary, but not for ever.
    #[tokio::test]
    async fn a_new_worker_is_unproven_until_its_canary_or_for_a_moment() {
        let (ledger, incarnation) = ledger();
        let (mut roster, now) = (Roster::new(), Instant::now());
        let unproven = |roster: &Roster, at: Instant| roster.pools(&ledger, &[], at).candidates[0].unproven;
        roster.beat(beat(incarnation.0, 1, vec![]), now).unwrap();
        assert!(unproven(&roster, now) && !unproven(&roster, now + UNPROVEN));
        let index = roster.workers[&WorkerId("d".into())].index;
        roster.pairs.judge((index + 1, index), Health::Good, now);
        assert!(!unproven(&roster, now));
    }

    #[tokio::test]
    async fn prefix_hits_and_suspicion_belong_to_one_life() {
        let (ledger, incarnation) = ledger();
        let (mut roster, now) = (Roster::new(), Instant::now());
        let chain = BlockHash::chain("", &(0..64).collect::<Vec<_>>(), 16);
        let candidate = |roster: &Roster| {
            let candidate = roster.pools(&ledger, &chain, now).candidates.remove(0);
            (candidate.hits, candidate.suspect)
        };
        roster.beat(beat(incarnation.0, 1, chain[..3].to_vec()), now).unwrap();
        roster.suspect(&WorkerId("d".into()), incarnation);
        assert_eq!(candidate(&roster), (3, true));
        roster.beat(beat(incarnation.0, 2, vec![]), now).unwrap();
        assert_eq!(candidate(&roster), (3, false));
        roster.beat(beat(incarnation.0 + 1, 1, vec![]), now).unwrap();
        assert_eq!(candidate(&roster), (0, false), "the ledger's life is not the one heard last");
    }
}
