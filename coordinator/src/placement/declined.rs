//! Why nobody can take a request now.

use baton_core::{Refused, Role};

use super::cost::{Mean, backlog_ms};
use super::{Candidate, Pools, Priced, Question, Trace, block_tokens};

/// How long a worker that fails, or is not there, may take to come back.
const RETRY_NOBODY_MS: u64 = 1_000;
/// What one waiting request is thought to take.
const WAITING_MS: u64 = 50;

/// Nobody can take it now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declined {
    pub reason: Refused,
    pub detail: String,
    /// When it is worth another try; 0 if waiting does not help.
    pub retry_after_ms: u64,
    pub trace: Box<Trace>,
}

impl Declined {
    fn new(reason: Refused, detail: String, retry_after_ms: u64, aside: Trace) -> Declined {
        let trace = Box::new(Trace { verdict: detail.clone(), ..aside });
        Declined { reason, detail, retry_after_ms, trace }
    }

    pub(super) fn nobody(question: &Question, pools: &Pools, aside: Trace) -> Declined {
        let model = question.model;
        let of_model = || pools.candidates.iter().filter(|c| c.model.name == model);
        let lost = pools.lost.contains(&model);
        if of_model().next().is_none() && !pools.candidates.is_empty() && !lost {
            return Declined::new(Refused::UnknownModel, format!("no worker serves {model:?}"), 0, aside);
        }
        let detail = match of_model().filter(|c| c.role == Role::Decode).count() {
            0 => format!("no live decode worker serves {model:?}"),
            live => format!("none of {live} live decode workers of {model:?} can be used"),
        };
        Declined::new(Refused::NoWorkers, detail, RETRY_NOBODY_MS, aside)
    }

    pub(super) fn too_large(question: &Question, decodes: &[&Candidate]) -> Declined {
        let positions = decodes.iter().map(|c| c.model.positions_max).max().unwrap_or(0);
        let tokens = decodes.iter().map(|c| c.model.blocks_total * block_tokens(c)).max().unwrap_or(0);
        let detail = format!(
            "{} prompt tokens and up to {} more for each of {} choices; the largest worker holds {tokens} tokens in all and {positions} of one sequence",
            question.prompt_tokens, question.tokens_max, question.choices,
        );
        Declined::new(Refused::TooLarge, detail, 0, Trace::default())
    }

    /// Every prefill worker has as many prompts waiting as may wait there.
    pub(super) fn behind(prefills: &[Priced], mean: &Mean, aside: Trace) -> Declined {
        let backlog_ms = prefills.iter().map(|p| backlog_ms(p.candidate, mean)).min().unwrap_or(0);
        let detail =
            format!("all {} prefill workers are behind; the shortest queue takes {backlog_ms} ms", prefills.len());
        Declined::new(Refused::NoCapacity, detail, backlog_ms.clamp(100, 10_000), aside)
    }

    /// Every queue is at its bound. The shortest of them, at its own pace, says when to come back.
    pub(super) fn full(decodes: &[&Candidate], aside: Trace) -> Declined {
        let wait_ms = |c: &&Candidate| {
            c.load.tokens_waiting * 1_000 / c.load.prefill_rate.max(1_000) + c.load.waiting * WAITING_MS
        };
        let retry_after_ms = decodes.iter().map(wait_ms).min().unwrap_or(0).clamp(100, 10_000);
        let waiting = decodes.iter().map(|c| c.load.waiting).min().unwrap_or(0);
        let detail = format!("all {} decode workers are full; the shortest queue holds {waiting}", decodes.len());
        Declined::new(Refused::NoCapacity, detail, retry_after_ms, aside)
    }
}
