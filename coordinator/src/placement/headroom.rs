//! N+1: whether each pool could lose its largest worker and carry what it carries now.

use baton_core::Role;

use super::{Candidate, Policy};

/// One pool's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Headroom {
    pub role: Role,
    pub model: String,
    pub workers: usize,
    /// True: any one worker may be lost.
    pub holds: bool,
    /// Why, for a person.
    pub line: String,
}

/// Whether every pool of a role could lose any one worker; not where the role has no pool.
pub fn holds(pools: &[Headroom], role: Role) -> bool {
    let mut of_role = pools.iter().filter(|pool| pool.role == role).peekable();
    of_role.peek().is_some() && of_role.all(|pool| pool.holds)
}

/// Every pool's headroom, in the order of role and model.
pub fn headroom(candidates: &[Candidate], policy: &Policy) -> Vec<Headroom> {
    let mut pools: Vec<(Role, &str)> = candidates.iter().map(|c| (c.role, c.model.name.as_str())).collect();
    pools.sort_unstable();
    pools.dedup();
    let of_pool = |(role, model): (Role, &str)| {
        let pool: Vec<&Candidate> =
            candidates.iter().filter(|c| c.role == role && c.model.name == model && c.serves()).collect();
        let (holds, why) = match role {
            _ if pool.len() < 2 => (false, "has no second worker".to_string()),
            Role::Decode => decode(&pool),
            _ => prefill(&pool, policy),
        };
        let can = if holds { "can lose any one" } else { "cannot lose one" };
        let line = format!("{role} {model}: {} workers, {can}: {why}", pool.len());
        Headroom { role, model: model.to_string(), workers: pool.len(), holds, line }
    };
    pools.into_iter().map(of_pool).collect()
}

/// Blocks in use must fit without the worker that has most of them.
fn decode(pool: &[&Candidate]) -> (bool, String) {
    let total: u64 = pool.iter().map(|c| c.model.blocks_total).sum();
    let largest = pool.iter().map(|c| c.model.blocks_total).max().unwrap_or(0);
    let used: u64 = pool.iter().map(|c| c.model.blocks_total.saturating_sub(c.load.blocks_available)).sum();
    let left = total - largest;
    (used <= left, format!("{used} blocks in use, {left} without the largest"))
}

/// What waits must be computed within the interactive target without the fastest worker.
fn prefill(pool: &[&Candidate], policy: &Policy) -> (bool, String) {
    let rate = |c: &&Candidate| match c.load.prefill_rate {
        0 => policy.prefill_rate_assumed.max(1),
        known => known,
    };
    let total = pool.iter().map(rate).fold(0, u64::saturating_add);
    let left = (total - pool.iter().map(rate).max().unwrap_or(0)).max(1);
    let waiting = pool.iter().map(|c| c.load.tokens_waiting).fold(0, u64::saturating_add);
    let wait_ms = waiting.saturating_mul(1_000) / left;
    let target_ms = policy.interactive.ttft_ms;
    (wait_ms <= target_ms, format!("its queue would take {wait_ms} ms of {target_ms} without the fastest"))
}
