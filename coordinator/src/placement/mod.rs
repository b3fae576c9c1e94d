//! Which workers serve a request: a pure function of pools, load, prefix hits, request and policy. Costs are whole
//! microseconds of predicted latency, so that equal inputs decide equally on every machine.
//!
//! ```text
//! decode   steps shared + queue ahead + prompt not held + block pressure + beyond the ITL target + stale + suspect
//! prefill  queue ahead + prompt not held + link to decode + beyond the TTFT target + stale + suspect
//! chosen   the lowest sum of both, among the best few decode workers and every prefill worker that pairs
//! none     the part decode does not hold is short, nobody can pair, decode has no block free now, or an idle decode
//!          worker is much sooner done by itself
//! waits    where every prefill worker that pairs has more prompts waiting than the TTFT target allows
//! ```

mod cost;
mod declined;
mod headroom;
mod policy;
mod prefix;
mod trace;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use baton_core::planted::{self, Bug};
use baton_core::{Holder, Incarnation, Lane, NumericsClass, Place, Role, WorkerId};

pub use declined::Declined;
pub use headroom::{Headroom, headroom, holds};
pub use policy::{Policy, Targets};
pub use prefix::{PrefixIndex, WorkerIndex};
pub use trace::{Scored, TRACED_MAX, Trace};

use crate::state::{Life, Model};
use cost::Mean;
use trace::Terms;

/// Decode workers that are priced together with every prefill worker: those that are cheapest by themselves.
const PAIRED_MAX: usize = 4;

/// Pairs of (prefill, decode) that are not to be used; (`ALONE`, decode): the decode worker fails even by itself.
pub type BrokenPairs = BTreeSet<(WorkerIndex, WorkerIndex)>;
/// Stands for no prefill worker in `BrokenPairs`; the index of no worker.
pub const ALONE: WorkerIndex = 0;

/// Everything that can be chosen from.
#[derive(Clone, Debug)]
pub struct Pools<'a> {
    /// Live workers.
    pub candidates: Vec<Candidate<'a>>,
    /// Models of workers that are gone, one each: they were served, and may be again.
    pub lost: Vec<&'a str>,
    pub broken: &'a BrokenPairs,
}

/// A live worker as placement sees it.
#[derive(Clone, Debug)]
pub struct Candidate<'a> {
    pub worker: &'a WorkerId,
    /// Its name in `BrokenPairs`; `ALONE` before it has been heard of.
    pub index: WorkerIndex,
    pub incarnation: Incarnation,
    pub role: Role,
    pub model: &'a Model,
    /// `host:port`; workers of one host, or of one process, share a better link.
    pub address: &'a str,
    pub pid: u32,
    pub load: Load,
    /// Leading blocks of this prompt that it holds.
    pub hits: u64,
    /// Somebody could not reach it since its last heartbeat.
    pub suspect: bool,
    /// It has work and makes no step.
    pub stuck: bool,
    /// It has just come, and no blocks have passed to or from it yet: where others are known to work, they are used first.
    pub unproven: bool,
}

/// What a worker said last, plus what was assigned to it since.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Free or evictable, less what is promised to assignments that the worker has not reported yet.
    pub blocks_available: u64,
    pub running: u64,
    pub waiting: u64,
    /// Those among both that none of its sequences is left for; 0 as well when its sequences are not known.
    pub over: u64,
    /// Prompt tokens still to prefill.
    pub tokens_waiting: u64,
    /// Measured prompt tokens per second; 0 is unknown.
    pub prefill_rate: u64,
    /// Measured microseconds of one step; 0 is unknown.
    pub step_us: u64,
    /// Milliseconds since it said so.
    pub age_ms: u64,
    pub draining: bool,
}

/// What placement needs to know of a request.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    pub model: &'a str,
    pub lane: Lane,
    /// Prompt plus tokens so far.
    pub prompt_tokens: u64,
    /// Still to generate, per choice.
    pub tokens_max: u64,
    pub choices: u64,
    /// Every prompt position must be computed: prefix hits do not count.
    pub full_prefill: bool,
    /// Lives that failed this request.
    pub exclude: &'a [Life],
    /// (prefill, decode) between which a handoff of this request failed.
    pub exclude_pairs: &'a [(Life, Life)],
    /// Class of the attempt before, to stay inside it.
    pub numerics: Option<&'a NumericsClass>,
}

/// The chosen lives, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub decode: Life,
    pub prefill: Option<Life>,
    /// Blocks that decode will take at once.
    pub blocks: u64,
    /// Prompt tokens that whoever prefills has to compute.
    pub prefill_tokens: u64,
    /// Who has leading blocks that whoever prefills lacks.
    pub holder: Option<Holder>,
    /// In one line.
    pub explanation: String,
    /// In as many as there are candidates and terms; `lines()` tells it.
    pub trace: Trace,
}

impl Candidate<'_> {
    /// Whether it takes requests at all.
    pub fn serves(&self) -> bool {
        !self.load.draining && !self.stuck
    }
}

/// A candidate with its cost.
struct Priced<'a> {
    candidate: &'a Candidate<'a>,
    cost: u64,
    terms: Terms,
}

impl Priced<'_> {
    fn scored(&self) -> Scored {
        Scored { worker: self.candidate.worker.clone(), cost: self.cost, terms: self.terms }
    }
}

/// Candidates of the model by role, less those that cannot be used, and what all of a role have in common.
struct Field<'a> {
    decodes: Vec<&'a Candidate<'a>>,
    prefills: Vec<&'a Candidate<'a>>,
    decode_mean: Mean,
    prefill_mean: Mean,
    /// Some decode worker and some prefill worker are not new.
    proven: bool,
    aside: Trace,
}

/// Chooses workers among the live ones.
pub fn place(question: &Question, pools: &Pools, policy: &Policy) -> Result<Decision, Declined> {
    let mut field = field(question, pools, policy);
    if field.decodes.is_empty() {
        return Err(Declined::nobody(question, pools, field.aside));
    }
    let decodes = std::mem::take(&mut field.decodes);
    let fitting: Vec<&Candidate> = decodes.iter().copied().filter(|c| fits(question, c)).collect();
    if fitting.is_empty() {
        return Err(Declined::too_large(question, &decodes));
    }
    let (fitting, class_kept) = of_class(question, fitting);
    let decodes = by_cost(fitting.iter().copied().filter(|c| has_room(question, c, policy)), |c| {
        cost::decode_terms(question, c, &field.decode_mean, policy)
    });
    if decodes.is_empty() {
        return Err(Declined::full(&fitting, field.aside));
    }
    let open = field.prefills.iter().copied().filter(|c| c.load.waiting < policy.queue_max);
    let prefills = by_cost(open, |c| cost::prefill_terms(question, c, &field.prefill_mean, policy));
    let (mean, prefill_mean) = (&field.decode_mean, &field.prefill_mean);
    let desk = Desk { question, pools, policy, mean, prefill_mean, proven: field.proven, prefills: &prefills };
    let priced = decodes.iter().take(PAIRED_MAX).map(|decode| (decode, desk.prefill_for(decode.candidate)));
    // The first of equals: the decode workers are in order.
    let (decode, choice) = priced.min_by_key(|(decode, choice)| decode.cost.saturating_add(choice.cost)).expect("some");
    if matches!(choice.why, Why::Behind) {
        return Err(Declined::behind(&prefills, &field.prefill_mean, field.aside));
    }
    Ok(decided(&desk, (decode, choice), &decodes, class_kept, field.aside))
}

fn field<'a>(question: &Question, pools: &'a Pools<'a>, policy: &Policy) -> Field<'a> {
    let mut aside = Trace::default();
    let (mut decodes, mut prefills) = (Vec::new(), Vec::new());
    for c in pools.candidates.iter().filter(|c| c.model.name == question.model) {
        match unusable(question, pools, c) {
            Some(why) => aside.set_aside(c.worker, why),
            None if c.role == Role::Decode => decodes.push(c),
            None => prefills.push(c),
        }
    }
    let (decode_mean, prefill_mean) = (Mean::of(&decodes, policy), Mean::of(&prefills, policy));
    let proven = [&decodes, &prefills].iter().all(|workers| workers.iter().any(|c| !c.unproven));
    Field { decodes, prefills, decode_mean, prefill_mean, proven, aside }
}

/// Why a worker of the model is not to be used for this request, whatever it costs.
fn unusable(question: &Question, pools: &Pools, c: &Candidate) -> Option<&'static str> {
    if c.load.draining {
        return Some("draining");
    }
    if c.stuck {
        return Some("it has work and makes no step");
    }
    if question.exclude.iter().any(|life| is_life(life, c)) {
        return Some("it failed this request before");
    }
    let alone = c.role == Role::Decode && !pools.broken.is_empty() && pools.broken.contains(&(ALONE, c.index));
    alone.then_some("its canary fails")
}

fn by_cost<'a>(
    candidates: impl Iterator<Item = &'a Candidate<'a>>,
    terms: impl Fn(&Candidate) -> Terms,
) -> Vec<Priced<'a>> {
    let price = |candidate| {
        let terms = terms(candidate);
        Priced { candidate, cost: cost::sum(&terms), terms }
    };
    let mut priced: Vec<Priced> = candidates.map(price).collect();
    priced.sort_unstable_by(|a, b| {
        let names =
            || (a.candidate.worker, a.candidate.incarnation).cmp(&(b.candidate.worker, b.candidate.incarnation));
        a.cost.cmp(&b.cost).then_with(names)
    });
    priced
}

/// What choosing a prefill worker looks at.
struct Desk<'a> {
    question: &'a Question<'a>,
    pools: &'a Pools<'a>,
    policy: &'a Policy,
    /// Of the decode workers.
    mean: &'a Mean,
    prefill_mean: &'a Mean,
    proven: bool,
    /// By their own cost, the link not counted.
    prefills: &'a [Priced<'a>],
}

/// Who prefills for one decode worker, and what that adds to its cost.
struct Choice<'a> {
    prefill: Option<&'a Candidate<'a>>,
    cost: u64,
    why: Why,
}

enum Why {
    Short(u64),
    NoBlocks,
    NoPartner,
    /// Microseconds by itself, and with the best prefill worker.
    Sooner(u64, u64),
    Handoff,
    /// It would wait at a prefill worker, where no lane and no tenant has its turn: it waits with the coordinator.
    Behind,
}

impl<'a> Desk<'a> {
    fn prefill_for(&self, decode: &Candidate) -> Choice<'a> {
        let missing = uncached(self.question, decode);
        if missing < self.policy.prefill_tokens_min {
            return Choice { prefill: None, cost: 0, why: Why::Short(missing) };
        }
        let local = cost::ttft_local(self.question, decode, self.mean);
        // What is prefilled there holds up what decodes there.
        let disturbing = local.saturating_mul(2);
        if decode.load.blocks_available < blocks_now(self.question, decode) {
            return Choice { prefill: None, cost: disturbing, why: Why::NoBlocks };
        }
        let partners = self.prefills.iter().filter(|p| self.pairs(p.candidate, decode));
        let priced = partners.map(|p| (p, cost::paired(self.question, p.candidate, &p.terms, decode, self.policy)));
        let behind = |p: &Priced| cost::is_behind(p.candidate, self.prefill_mean, self.policy);
        let Some((prefill, terms)) = priced.min_by_key(|(p, terms)| (behind(p), cost::sum(terms))) else {
            return Choice { prefill: None, cost: disturbing, why: Why::NoPartner };
        };
        let remote = cost::ttft_remote(&terms);
        let idle = decode.load.running + decode.load.waiting == 0;
        if idle && terms[3] > 0 && local < remote / 2 {
            return Choice { prefill: None, cost: local, why: Why::Sooner(local, remote) };
        }
        if behind(prefill) {
            return Choice { prefill: None, cost: u64::MAX, why: Why::Behind };
        }
        Choice { prefill: Some(prefill.candidate), cost: cost::sum(&terms), why: Why::Handoff }
    }

    /// Blocks can pass only between equal layouts of the same weights under the same arithmetic, and where they
    /// do arrive.
    fn pairs(&self, prefill: &Candidate, decode: &Candidate) -> bool {
        let failed = |(p, d): &(Life, Life)| is_life(p, prefill) && is_life(d, decode);
        can_pair(prefill.model, decode.model)
            && !(self.proven && (prefill.unproven || decode.unproven))
            && (self.pools.broken.is_empty() || !self.pools.broken.contains(&(prefill.index, decode.index)))
            && !self.question.exclude_pairs.iter().any(failed)
    }

    /// What keeps the blocks of a prefill worker that is free from passing to this decode worker.
    fn unlike(&self, decode: &Candidate) -> Option<String> {
        let prefill = self.prefills.iter().map(|p| p.candidate).find(|p| !can_pair(p.model, decode.model))?;
        let of = |model: &'_ Model| [model.layout.clone(), model.numerics.0.clone(), model.card_hash.clone()];
        let (theirs, ours) =
            of(prefill.model).into_iter().zip(of(decode.model)).find(|(theirs, ours)| theirs != ours)?;
        Some(format!(" ({} is {theirs} and this is {ours})", prefill.worker))
    }

    /// The prefill workers as priced for the chosen decode worker, the cheapest of them.
    fn scored(&self, decode: &Candidate) -> (Vec<Scored>, usize) {
        let partners: Vec<&Priced> = self.prefills.iter().filter(|p| self.pairs(p.candidate, decode)).collect();
        let scored = partners.iter().take(TRACED_MAX).map(|p| {
            let terms = cost::paired(self.question, p.candidate, &p.terms, decode, self.policy);
            Scored { worker: p.candidate.worker.clone(), cost: cost::sum(&terms), terms }
        });
        (scored.collect(), partners.len().saturating_sub(TRACED_MAX))
    }
}

/// Whether blocks of one model can pass to the other.
pub fn can_pair(prefill: &Model, decode: &Model) -> bool {
    let same_class = prefill.numerics == decode.numerics || planted::is(Bug::IgnoreNumerics);
    prefill.layout == decode.layout && same_class && prefill.card_hash == decode.card_hash
}

fn decided(
    desk: &Desk,
    (priced, choice): (&Priced, Choice),
    decodes: &[Priced],
    class_kept: bool,
    aside: Trace,
) -> Decision {
    let (question, decode) = (desk.question, priced.candidate);
    let explanation = explanation(desk, decode, &choice, class_kept);
    let (prefill, prefill_more) = desk.scored(decode);
    let trace = Trace {
        decode: decodes.iter().take(TRACED_MAX).map(Priced::scored).collect(),
        prefill,
        decode_more: decodes.len().saturating_sub(TRACED_MAX),
        prefill_more,
        verdict: explanation.clone(),
        ..aside
    };
    let computing = choice.prefill.unwrap_or(decode);
    Decision {
        holder: holder(question, desk.pools, desk.policy, computing),
        decode: life(decode),
        prefill: choice.prefill.map(life),
        blocks: blocks_now(question, decode),
        prefill_tokens: uncached(question, computing),
        explanation,
        trace,
    }
}

/// The worker that has most leading blocks of those that could pass them to the one that computes, if they are so many more
/// that asking for them is worth a message. Whether they are then fetched, that one decides by what it has measured.
fn holder(question: &Question, pools: &Pools, policy: &Policy, computing: &Candidate) -> Option<Holder> {
    let more = policy.pull_tokens_min.div_ceil(block_tokens(computing)).max(1);
    let enough = hits(question, computing).saturating_add(more);
    let failed = |c: &Candidate| question.exclude.iter().any(|life| is_life(life, c));
    let could = |c: &&Candidate| {
        hits(question, c) >= enough
            && policy.pull_tokens_min > 0
            && !(c.stuck || c.suspect || failed(c))
            && can_pair(c.model, computing.model)
    };
    // The first of equals: the candidates are in order.
    let most = pools.candidates.iter().filter(could).max_by_key(|c| (c.hits, std::cmp::Reverse(c.worker)))?;
    let place = Place { worker: most.worker.clone(), incarnation: most.incarnation, address: most.address.to_string() };
    Some(Holder { place, blocks: most.hits, moves: false })
}

fn explanation(desk: &Desk, decode: &Candidate, choice: &Choice, class_kept: bool) -> String {
    let question = desk.question;
    let why = match (&choice.why, choice.prefill) {
        (Why::Short(missing), _) => format!("{missing} tokens uncached"),
        (Why::NoBlocks, _) => "no blocks free for a handoff now".into(),
        (Why::Sooner(local, remote), _) => format!("it is idle and takes {local} us, a prefill worker {remote} us"),
        (Why::Handoff, Some(p)) => {
            format!("holds {} blocks, {} tokens queued", hits(question, p), p.load.tokens_waiting)
        }
        (Why::NoPartner | Why::Handoff | Why::Behind, _) => {
            format!("no prefill worker that can pair is free{}", desk.unlike(decode).unwrap_or_default())
        }
    };
    let class_note = if class_kept { "" } else { "; numerics class changed" };
    format!(
        "decode {} holds {}/{} blocks, {} running, {} waiting; {} prefills: {why}{class_note}",
        decode.worker,
        hits(question, decode),
        prompt_blocks(question, decode),
        decode.load.running,
        decode.load.waiting,
        choice.prefill.unwrap_or(decode).worker,
    )
}

fn is_life(life: &Life, c: &Candidate) -> bool {
    life.0 == *c.worker && life.1 == c.incarnation
}

/// The workers of the class that served the request before, if any of them is left; else all.
fn of_class<'a>(question: &Question, workers: Vec<&'a Candidate<'a>>) -> (Vec<&'a Candidate<'a>>, bool) {
    let Some(class) = question.numerics else {
        return (workers, true);
    };
    let same: Vec<_> = workers.iter().copied().filter(|c| c.model.numerics == *class).collect();
    if same.is_empty() { (workers, false) } else { (same, true) }
}

fn block_tokens(c: &Candidate) -> u64 {
    u64::from(c.model.block_tokens).max(1)
}

fn prompt_blocks(question: &Question, c: &Candidate) -> u64 {
    question.prompt_tokens.div_ceil(block_tokens(c))
}

fn hits(question: &Question, c: &Candidate) -> u64 {
    if question.full_prefill { 0 } else { c.hits }
}

/// Prompt tokens that are not in this worker's cache; the last one is always computed.
fn uncached(question: &Question, c: &Candidate) -> u64 {
    let held = hits(question, c) * block_tokens(c);
    question.prompt_tokens.saturating_sub(held).max(1)
}

/// Blocks the request takes when it starts: its prompt and the next token, less what is there.
fn blocks_now(question: &Question, c: &Candidate) -> u64 {
    (question.prompt_tokens + 1).div_ceil(block_tokens(c)).saturating_sub(hits(question, c))
}

/// Whether a decode worker would begin soon: few are before it that have no sequence, or no blocks if those are short.
fn has_room(question: &Question, c: &Candidate, policy: &Policy) -> bool {
    let short = c.load.blocks_available < blocks_now(question, c);
    let before = if short { c.load.waiting } else { c.load.over };
    before < policy.decode_waiting_max.min(policy.queue_max)
}

/// Whether the worker could ever hold it: in its model's length and, alone, in all of its blocks.
fn fits(question: &Question, c: &Candidate) -> bool {
    let tokens = question.prompt_tokens.saturating_add(question.tokens_max);
    let own = question.tokens_max.div_ceil(block_tokens(c)).saturating_add(1);
    let blocks = prompt_blocks(question, c).saturating_add(own.saturating_mul(question.choices));
    tokens <= c.model.positions_max && blocks <= c.model.blocks_total
}

fn life(c: &Candidate) -> Life {
    (c.worker.clone(), c.incarnation)
}
