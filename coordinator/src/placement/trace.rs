//! What a placement looked at, kept as numbers and told as text only when a person asks.

use baton_core::WorkerId;

/// Candidates of one role kept in a trace; the cheapest.
pub const TRACED_MAX: usize = 8;
/// Terms a cost has at most.
pub(super) const TERMS_MAX: usize = 7;

/// Microseconds by term, in the order of the role's names.
pub(super) type Terms = [u64; TERMS_MAX];
pub(super) const DECODE_TERMS: [&str; TERMS_MAX] = [
    "steps shared with others",
    "queue ahead",
    "not in its cache",
    "blocks",
    "beyond the ITL target",
    "stale",
    "suspect",
];
pub(super) const PREFILL_TERMS: [&str; TERMS_MAX] =
    ["queue ahead", "not in its cache", "link to decode", "beyond the TTFT target", "stale", "suspect", ""];

/// One candidate's cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scored {
    pub worker: WorkerId,
    /// Microseconds, and more where a target is missed.
    pub cost: u64,
    pub(super) terms: Terms,
}

/// The cheapest candidates with their terms, those that were set aside, and the word that decided.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    pub decode: Vec<Scored>,
    /// As priced for the chosen decode worker.
    pub prefill: Vec<Scored>,
    /// Candidates beyond TRACED_MAX, by role.
    pub(super) decode_more: usize,
    pub(super) prefill_more: usize,
    pub aside: Vec<(WorkerId, &'static str)>,
    pub(super) aside_more: usize,
    pub verdict: String,
}

impl Trace {
    pub(super) fn set_aside(&mut self, worker: &WorkerId, why: &'static str) {
        if self.aside.len() < TRACED_MAX {
            self.aside.push((worker.clone(), why));
        } else {
            self.aside_more += 1;
        }
    }

    /// The verdict, then one line per candidate and one per term of its cost that is not zero.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![self.verdict.clone()];
        tell(&mut lines, "decode", &self.decode, &DECODE_TERMS, self.decode_more);
        tell(&mut lines, "prefill", &self.prefill, &PREFILL_TERMS, self.prefill_more);
        lines.extend(self.aside.iter().map(|(worker, why)| format!("set aside {worker}: {why}")));
        if self.aside_more > 0 {
            lines.push(format!("set aside {} more", self.aside_more));
        }
        lines
    }
}

fn tell(lines: &mut Vec<String>, role: &str, scored: &[Scored], names: &[&str], more: usize) {
    for one in scored {
        lines.push(format!("{role} {} costs {} us", one.worker, one.cost));
        let terms = names.iter().zip(one.terms).filter(|(_, us)| *us > 0);
        lines.extend(terms.map(|(name, us)| format!("{role} {}: {name} {us} us", one.worker)));
    }
    if more > 0 {
        lines.push(format!("{role}: {more} more, each at least as dear"));
    }
}
