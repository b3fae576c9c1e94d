//! What a candidate costs: microseconds of predicted latency, all in whole numbers.

use baton_core::limits::HEARTBEAT_MS;

use super::trace::Terms;
use super::{Candidate, Load, Policy, Question, blocks_now, uncached};

/// Heartbeats a report may be old and still count whole.
const FRESH_HEARTBEATS: u64 = 2;
/// Tokens over which a step slower than its target is counted.
const ITL_TOKENS_MAX: u64 = 64;
/// More than any latency: an unreachable worker is taken only when there is no other.
const SUSPECT_US: u64 = 1 << 50;

/// What the workers of one pool have in common: what stands in for a number that is missing or old.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mean {
    running: u64,
    waiting: u64,
    tokens_waiting: u64,
    prefill_rate: u64,
}

impl Mean {
    pub(super) fn of(pool: &[&Candidate], policy: &Policy) -> Mean {
        let fresh = || pool.iter().map(|c| &c.load).filter(|load| missed(load) == 0);
        let count = fresh().count().max(1) as u64;
        let mean = |of: fn(&Load) -> u64| fresh().map(of).fold(0, u64::saturating_add) / count;
        let rates = || pool.iter().map(|c| c.load.prefill_rate).filter(|rate| *rate > 0);
        let known = rates().count() as u64;
        let prefill_rate = match known {
            0 => policy.prefill_rate_assumed.max(1),
            _ => (rates().fold(0, u64::saturating_add) / known).max(1),
        };
        Mean {
            running: mean(|load| load.running),
            waiting: mean(|load| load.waiting),
            tokens_waiting: mean(|load| load.tokens_waiting),
            prefill_rate,
        }
    }

    /// The load with its counts drawn towards the pool's mean, by half for every heartbeat missed.
    fn decayed(&self, load: &Load) -> Load {
        let missed = missed(load);
        if missed == 0 {
            return *load;
        }
        let own = 256u64 >> missed.min(8);
        let blend = |value: u64, mean: u64| (value.saturating_mul(own).saturating_add(mean * (256 - own))) / 256;
        Load {
            running: blend(load.running, self.running),
            waiting: blend(load.waiting, self.waiting),
            tokens_waiting: blend(load.tokens_waiting, self.tokens_waiting),
            ..*load
        }
    }

    /// Microseconds that `tokens` prompt tokens take on this worker.
    fn us(&self, tokens: u64, load: &Load) -> u64 {
        let rate = if load.prefill_rate == 0 { self.prefill_rate } else { load.prefill_rate };
        tokens.saturating_mul(1_000_000) / rate
    }
}

/// Heartbeats overdue beyond those a report may be old.
fn missed(load: &Load) -> u64 {
    (load.age_ms / HEARTBEAT_MS).saturating_sub(FRESH_HEARTBEATS)
}

pub(super) fn sum(terms: &Terms) -> u64 {
    terms.iter().fold(0, |sum, term| sum.saturating_add(*term))
}

/// In the order of `DECODE_TERMS`.
pub(super) fn decode_terms(question: &Question, c: &Candidate, mean: &Mean, policy: &Policy) -> Terms {
    let load = mean.decayed(&c.load);
    let us = |tokens: u64| mean.us(tokens, &load);
    let sequences = load.running.saturating_add(load.waiting);
    let needed = blocks_now(question, c);
    let available = load.blocks_available;
    let pressure = policy.pressure_cost_tokens.saturating_mul(needed) / available.max(1).max(needed);
    let short = needed.saturating_sub(available).saturating_mul(u64::from(c.model.block_tokens));
    [
        us(sequences.saturating_mul(policy.sequence_cost_tokens)),
        us(load.tokens_waiting),
        us(uncached(question, c)),
        us(pressure.saturating_add(short)),
        beyond_itl(question, &load, policy),
        us(missed(&load).saturating_mul(policy.stale_cost_tokens)),
        suspicion(c),
    ]
}

/// Whether requests wait at a prefill worker for longer than an interactive one should: further ones wait with the
/// coordinator, where lanes and tenants take turns and budgets hold. Some may always be there, so that it has work and a crowd that comes
/// at once is taken.
pub(super) fn is_behind(c: &Candidate, mean: &Mean, policy: &Policy) -> bool {
    let load = mean.decayed(&c.load);
    load.running.saturating_add(load.waiting) >= policy.prefill_waiting_max
        && mean.us(load.tokens_waiting, &load) > policy.interactive.ttft_ms.saturating_mul(1_000)
}

/// Milliseconds until all prompts that wait at a worker are prefilled.
pub(super) fn backlog_ms(c: &Candidate, mean: &Mean) -> u64 {
    mean.us(c.load.tokens_waiting, &c.load) / 1_000
}

/// In the order of `PREFILL_TERMS`; the link and what lies beyond the target depend on the decode worker.
pub(super) fn prefill_terms(question: &Question, c: &Candidate, mean: &Mean, policy: &Policy) -> Terms {
    let load = mean.decayed(&c.load);
    let us = |tokens: u64| mean.us(tokens, &load);
    let stale = us(missed(&load).saturating_mul(policy.stale_cost_tokens));
    [us(load.tokens_waiting), us(uncached(question, c)), 0, 0, stale, suspicion(c), 0]
}

/// Completes a prefill worker's terms for one decode worker.
pub(super) fn paired(
    question: &Question,
    prefill: &Candidate,
    own: &Terms,
    decode: &Candidate,
    policy: &Policy,
) -> Terms {
    let mut terms = *own;
    let blocks = blocks_now(question, decode);
    terms[2] = blocks.saturating_mul(prefill.model.block_bytes).div_ceil(link_rate(prefill, decode, policy));
    let ttft = terms[0].saturating_add(terms[1]).saturating_add(terms[2]);
    terms[3] = ttft.saturating_sub(policy.targets(question.lane).ttft_ms.saturating_mul(1_000));
    terms
}

/// Until the first token, with a handoff: the first three prefill terms.
pub(super) fn ttft_remote(terms: &Terms) -> u64 {
    terms[0].saturating_add(terms[1]).saturating_add(terms[2])
}

/// Until the first token when the decode worker prefills: its queue and what it does not hold.
pub(super) fn ttft_local(question: &Question, c: &Candidate, mean: &Mean) -> u64 {
    let load = mean.decayed(&c.load);
    mean.us(load.tokens_waiting.saturating_add(uncached(question, c)), &load)
}

/// Bytes per microsecond of the best link between two workers.
fn link_rate(a: &Candidate, b: &Candidate, policy: &Policy) -> u64 {
    let host = |address: &str| address.rsplit_once(':').map_or(address.len(), |(host, _)| host.len());
    let same_host = a.address[..host(a.address)] == b.address[..host(b.address)];
    let rate = match same_host {
        true if a.pid == b.pid => policy.link_rate_process,
        true => policy.link_rate_host,
        false => policy.link_rate_network,
    };
    rate.max(1)
}

/// What its next step, with one sequence more, takes beyond the target, over the tokens that are asked for.
fn beyond_itl(question: &Question, load: &Load, policy: &Policy) -> u64 {
    let next = load.step_us.saturating_mul(load.running + 1) / load.running.max(1);
    let target = policy.targets(question.lane).itl_ms.saturating_mul(1_000);
    next.saturating_sub(target).saturating_mul(question.tokens_max.min(ITL_TOKENS_MAX))
}

fn suspicion(c: &Candidate) -> u64 {
    if c.suspect { SUSPECT_US } else { 0 }
}
