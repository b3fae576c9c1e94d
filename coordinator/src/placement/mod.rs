//! Which workers serve a request: a pure function of pools, load, prefix hits, request and policy. Costs are whole
//! numbers of prompt tokens' worth of work, so that equal inputs decide equally on every machine.
//!
//! ```text
//! decode   lowest of: steps shared with others + prompt tokens queued there + prompt tokens it does not hold + block pressure
//! prefill  lowest of: prompt tokens queued there + prompt tokens it does not hold, over its measured rate
//! none     the part decode does not hold is short, nobody can pair, decode has no block free now, or prefill is far behind
//! ```

mod policy;
mod prefix;

#[cfg(test)]
mod tests;

use baton_core::{Incarnation, NumericsClass, Refused, Role, WorkerId};

pub use policy::Policy;
pub use prefix::{PrefixIndex, WorkerIndex};

use crate::state::Model;

/// A live worker as placement sees it.
#[derive(Clone, Debug)]
pub struct Candidate<'a> {
    pub worker: &'a WorkerId,
    pub incarnation: Incarnation,
    pub role: Role,
    pub model: &'a Model,
    pub load: Load,
    /// Leading blocks of this prompt that it holds.
    pub hits: u64,
    /// Somebody could not reach it since its last heartbeat.
    pub suspect: bool,
}

/// What a worker said last, plus what was assigned to it since.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Free or evictable, less what is promised to assignments that the worker has not reported yet.
    pub blocks_available: u64,
    pub running: u64,
    pub waiting: u64,
    /// Prompt tokens still to prefill.
    pub tokens_waiting: u64,
    /// Measured prompt tokens per second; 0 is unknown.
    pub prefill_rate: u64,
    pub draining: bool,
}

/// What placement needs to know of a request.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    pub model: &'a str,
    /// Prompt plus tokens so far.
    pub prompt_tokens: u64,
    /// Still to generate, per choice.
    pub tokens_max: u64,
    pub choices: u64,
    /// Every prompt position must be computed: prefix hits do not count.
    pub full_prefill: bool,
    /// Lives that failed this request.
    pub exclude: &'a [(WorkerId, Incarnation)],
    /// Class of the attempt before, to stay inside it.
    pub numerics: Option<&'a NumericsClass>,
}

/// The chosen lives, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub decode: (WorkerId, Incarnation),
    pub prefill: Option<(WorkerId, Incarnation)>,
    /// Blocks that decode will take at once.
    pub blocks: u64,
    /// Prompt tokens that whoever prefills has to compute.
    pub prefill_tokens: u64,
    pub explanation: String,
}

/// Nobody can take it now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declined {
    pub reason: Refused,
    pub detail: String,
    /// When it is worth another try; 0 if waiting does not help.
    pub retry_after_ms: u64,
}

/// Chooses workers among the live ones.
pub fn place(question: &Question, candidates: &[Candidate], policy: &Policy) -> Result<Decision, Declined> {
    let usable = |c: &&Candidate| !c.load.draining && !excluded(question, c);
    let of_model = || candidates.iter().filter(|c| c.model.name == question.model);
    let decodes: Vec<&Candidate> = of_model().filter(|c| c.role == Role::Decode).filter(usable).collect();
    if decodes.is_empty() {
        return Err(nobody(question, candidates));
    }
    let fitting: Vec<&Candidate> = decodes.iter().copied().filter(|c| fits(question, c)).collect();
    if fitting.is_empty() {
        return Err(too_large(question, &decodes));
    }
    let (fitting, class_kept) = of_class(question, fitting);
    let open: Vec<&Candidate> = fitting.iter().copied().filter(|c| c.load.waiting < policy.queue_max).collect();
    let best = open.iter().min_by_key(|c| (decode_cost(question, c, policy), c.worker, c.incarnation));
    let Some(decode) = best else {
        return Err(full(&fitting));
    };
    let prefills: Vec<&Candidate> = of_model().filter(|c| c.role == Role::Prefill).filter(usable).collect();
    let (prefill, why) = choose_prefill(question, decode, &prefills, policy);
    let class_note = if class_kept { "" } else { "; numerics class changed" };
    let who = prefill.map_or(format!("{} prefills", decode.worker), |p| format!("{} prefills", p.worker));
    let explanation = format!(
        "decode {} holds {}/{} blocks, {} running, {} waiting; {who}: {why}{class_note}",
        decode.worker,
        hits(question, decode),
        prompt_blocks(question, decode),
        decode.load.running,
        decode.load.waiting,
    );
    Ok(Decision {
        decode: life(decode),
        prefill: prefill.map(life),
        blocks: blocks_now(question, decode),
        prefill_tokens: uncached(question, prefill.unwrap_or(decode)),
        explanation,
    })
}

/// A prefill worker that pairs with `decode`, or none, and why.
fn choose_prefill<'a>(
    question: &Question,
    decode: &Candidate,
    prefills: &[&'a Candidate<'a>],
    policy: &Policy,
) -> (Option<&'a Candidate<'a>>, String) {
    let missing = uncached(question, decode);
    if missing < policy.prefill_tokens_min {
        return (None, format!("{missing} tokens uncached, under {}", policy.prefill_tokens_min));
    }
    if decode.load.blocks_available < blocks_now(question, decode) {
        return (None, "no blocks free for a handoff now".into());
    }
    let pairs = prefills.iter().filter(|p| pairs(p, decode) && p.load.waiting < policy.queue_max);
    let Some(prefill) = pairs.min_by_key(|p| (prefill_cost(question, p, policy), p.worker, p.incarnation)) else {
        return (None, "no prefill worker that can pair is free".into());
    };
    let idle = decode.load.running + decode.load.waiting == 0;
    if idle && prefill.load.tokens_waiting > policy.prefill_backlog_max {
        return (None, format!("{} tokens queue for prefill and decode is idle", prefill.load.tokens_waiting));
    }
    let held = hits(question, prefill);
    (Some(prefill), format!("holds {held} blocks, {} tokens queued", prefill.load.tokens_waiting))
}

/// Blocks can pass only between equal layouts of the same weights under the same arithmetic.
fn pairs(prefill: &Candidate, decode: &Candidate) -> bool {
    let (p, d) = (prefill.model, decode.model);
    p.layout == d.layout && p.numerics == d.numerics && p.card_hash == d.card_hash
}

fn decode_cost(question: &Question, c: &Candidate, policy: &Policy) -> u64 {
    let shared = (c.load.running + c.load.waiting) * policy.sequence_cost_tokens;
    let needed = blocks_now(question, c);
    let short = needed.saturating_sub(c.load.blocks_available);
    let pressure = policy.pressure_cost_tokens * needed / c.load.blocks_available.max(1).max(needed);
    let queue_for_blocks = short * u64::from(c.model.block_tokens);
    shared + c.load.tokens_waiting + uncached(question, c) + pressure + queue_for_blocks + suspicion(c)
}

fn prefill_cost(question: &Question, c: &Candidate, policy: &Policy) -> u64 {
    let tokens = c.load.tokens_waiting + uncached(question, c);
    let rate = if c.load.prefill_rate == 0 { policy.prefill_rate_assumed } else { c.load.prefill_rate };
    tokens.saturating_mul(1_000_000) / rate.max(1) + suspicion(c)
}

fn suspicion(c: &Candidate) -> u64 {
    if c.suspect { 1 << 40 } else { 0 }
}

fn excluded(question: &Question, c: &Candidate) -> bool {
    question.exclude.iter().any(|(id, incarnation)| id == c.worker && *incarnation == c.incarnation)
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

/// Whether the worker could ever hold it: in its model's length and, alone, in all of its blocks.
fn fits(question: &Question, c: &Candidate) -> bool {
    let tokens = question.prompt_tokens.saturating_add(question.tokens_max);
    let own = question.tokens_max.div_ceil(block_tokens(c)).saturating_add(1);
    let blocks = prompt_blocks(question, c).saturating_add(own.saturating_mul(question.choices));
    tokens <= c.model.positions_max && blocks <= c.model.blocks_total
}

fn life(c: &Candidate) -> (WorkerId, Incarnation) {
    (c.worker.clone(), c.incarnation)
}

fn nobody(question: &Question, candidates: &[Candidate]) -> Declined {
    let known = candidates.iter().any(|c| c.model.name == question.model);
    if known || candidates.is_empty() {
        let detail = format!("no live decode worker serves {:?}", question.model);
        return Declined { reason: Refused::NoWorkers, detail, retry_after_ms: 1_000 };
    }
    let detail = format!("no worker serves {:?}", question.model);
    Declined { reason: Refused::UnknownModel, detail, retry_after_ms: 0 }
}

fn too_large(question: &Question, decodes: &[&Candidate]) -> Declined {
    let positions = decodes.iter().map(|c| c.model.positions_max).max().unwrap_or(0);
    let tokens = decodes.iter().map(|c| c.model.blocks_total * block_tokens(c)).max().unwrap_or(0);
    let detail = format!(
        "{} prompt tokens and up to {} more for each of {} choices; the largest worker holds {tokens} tokens in all and {positions} of one sequence",
        question.prompt_tokens, question.tokens_max, question.choices,
    );
    Declined { reason: Refused::TooLarge, detail, retry_after_ms: 0 }
}

/// Every queue is at its bound. The shortest of them, at its own pace, says when to come back.
fn full(decodes: &[&Candidate]) -> Declined {
    const WAITING_MS: u64 = 50;
    let wait_ms =
        |c: &&Candidate| c.load.tokens_waiting * 1_000 / c.load.prefill_rate.max(1_000) + c.load.waiting * WAITING_MS;
    let retry_after_ms = decodes.iter().map(wait_ms).min().unwrap_or(0).clamp(100, 10_000);
    let waiting = decodes.iter().map(|c| c.load.waiting).min().unwrap_or(0);
    let detail = format!("all {} decode workers are full; the shortest queue holds {waiting}", decodes.len());
    Declined { reason: Refused::NoCapacity, detail, retry_after_ms }
}
