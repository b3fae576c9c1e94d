//! One assignment: place, commit, and answer; again if a chosen worker ended meanwhile.

use baton_core::{Refused, Role, WorkerId};
use baton_proto::convert::refusal;
use baton_proto::v1;
use tokio::time::Instant;

use super::ask::Ask;
use super::{Refusal, Shared, unavailable, unexpected};
use crate::placement::{self, Candidate, Decision, Declined};
use crate::state::{Assigned, Command, Ledger, Life, Limit, Outcome, OverLimit};

/// Placements of one call: each further one because a chosen worker had just been fenced.
const PLACEMENTS_MAX: usize = 4;

/// Lives that a request should not be placed on, and those that it must not.
struct Apart {
    wanted: Vec<Life>,
    needed: Vec<Life>,
}

impl Shared {
    pub(super) async fn assign(&self, ask: Ask) -> Result<v1::Assignment, Refusal> {
        self.leading().await?;
        let (request, attempt) = (ask.request, ask.attempt);
        let answer = self.assign_here(ask).await;
        let ledger_ms = self.node.ledger().time_ms();
        self.decisions.lock().expect("decisions lock").remember(request, decided(ledger_ms, attempt, &answer));
        answer
    }

    async fn assign_here(&self, ask: Ask) -> Result<v1::Assignment, Refusal> {
        if let Some(assigned) = self.repeated(&ask) {
            return Ok(granted(assigned, String::new()));
        }
        self.suspect(&ask);
        for _ in 0..PLACEMENTS_MAX {
            let decision = self.place(&ask).map_err(declined)?;
            let (lives, explanation) = (lives(&decision), decision.explanation.clone());
            match self.submit(Command::Assign(Box::new(ask.proposed(decision)))).await? {
                Outcome::Assigned(assigned) => return Ok(granted(*assigned, explanation)),
                Outcome::Misplaced => self.release(&ask, &lives),
                Outcome::Ended => {
                    self.release(&ask, &lives);
                    return Err(refusal(Refused::Stale, "the request has ended"));
                }
                Outcome::OverLimit(over) => {
                    self.release(&ask, &lives);
                    return Err(over_limit(&over));
                }
                Outcome::Refused(reason) => {
                    self.release(&ask, &lives);
                    return Err(refusal(reason, "refused by the ledger"));
                }
                other => return Err(unexpected(&other)),
            }
        }
        Err(unavailable("workers come and go faster than requests are placed"))
    }

    /// What this attempt was given when it was asked for before. It has been committed: that it is applied here says so.
    fn repeated(&self, ask: &Ask) -> Option<Assigned> {
        let now_ms = self.lead.stamp()?;
        self.node.ledger().assignment(ask.request, ask.attempt, now_ms)
    }

    fn suspect(&self, ask: &Ask) {
        let mut roster = self.roster();
        ask.exclude.iter().for_each(|(id, incarnation)| roster.suspect(id, *incarnation));
        let now = Instant::now();
        let failed = ask.exclude_pairs.iter().filter(|(prefill, decode)| roster.pair_failed(prefill, decode, now));
        let changed = failed.count() > 0;
        drop(roster);
        if changed {
            self.tell_members();
        }
    }

    /// Chooses workers and counts the request on them.
    fn place(&self, ask: &Ask) -> Result<Decision, Declined> {
        let ledger = self.node.ledger();
        let mut roster = self.roster();
        let before = ledger.request(ask.request);
        let mut question = ask.question(before.map(|open| &open.numerics));
        let now = Instant::now();
        let pools = roster.pools(&ledger, &ask.chain, now);
        let decision = match self.kept_apart(ask, &ledger, &pools.candidates) {
            None => placement::place(&question, &pools, &self.policy)?,
            Some(Apart { wanted, needed }) => {
                question.exclude = &wanted;
                placement::place(&question, &pools, &self.policy).or_else(|_| {
                    question.exclude = &needed;
                    placement::place(&question, &pools, &self.policy)
                })?
            }
        };
        roster.promise(ask.request, &decision, now);
        Ok(decision)
    }

    /// Which lives a request must stay away from while some are suspected of killing their workers. A suspect is
    /// prefilled where it is decoded, wants a worker of its own, and never gets one that another suspect is on;
    /// other requests stay away from suspects while there is anywhere else.
    fn kept_apart(&self, ask: &Ask, ledger: &Ledger, candidates: &[Candidate]) -> Option<Apart> {
        let suspected = ledger.suspected_lives(ask.request);
        let is_suspect = ledger.suspects_after(ask.request, ask.attempt, &ask.killed);
        if suspected.is_empty() && !is_suspect {
            return None;
        }
        let mut needed = ask.exclude.clone();
        let mut wanted = ask.exclude.clone();
        if is_suspect {
            let prefills = candidates.iter().filter(|c| c.role == Role::Prefill);
            needed.extend(prefills.map(|c| (c.worker.clone(), c.incarnation)));
            needed.extend(suspected);
            wanted.clone_from(&needed);
            wanted.extend(ledger.occupied_lives(ask.request));
        } else {
            wanted.extend(suspected);
        }
        Some(Apart { wanted, needed })
    }

    fn release(&self, ask: &Ask, lives: &[WorkerId]) {
        let mut roster = self.roster();
        lives.iter().for_each(|worker| roster.release(ask.request, worker));
    }
}

fn decided(ledger_ms: u64, attempt: u32, answer: &Result<v1::Assignment, Refusal>) -> v1::Decision {
    let (outcome, reason, why) = match answer {
        Ok(assignment) => ("assigned", "", &assignment.explanation),
        Err(refused) => ("refused", refused.reason.as_str(), &refused.detail),
    };
    let lines = why.lines().map(String::from).collect();
    v1::Decision { ledger_ms, attempt, outcome: outcome.into(), reason: reason.into(), lines }
}

fn declined(declined: Declined) -> Refusal {
    Refusal { retry_after_ms: declined.retry_after_ms, ..refusal(declined.reason, declined.detail) }
}

fn over_limit(over: &OverLimit) -> Refusal {
    let detail = match over.limit {
        Limit::RequestsPerMinute(limit) => format!("the tenant may ask {limit} times a minute"),
        Limit::TokensPerMinute(limit) if over.retry_after_ms == 0 => {
            format!("it could use more tokens than the {limit} a minute of its tenant: ask for fewer")
        }
        Limit::TokensPerMinute(limit) => format!("the tenant may use {limit} tokens a minute"),
        Limit::RequestsOpen(limit) => format!("the tenant has {limit} requests open, as many as it may"),
        Limit::PromptTokens(limit) => format!("the tenant's prompts may have {limit} tokens"),
        Limit::OutputTokens(limit) => format!("the tenant may ask for {limit} tokens at most"),
    };
    Refusal { retry_after_ms: over.retry_after_ms, ..refusal(over.reason, detail) }
}

fn lives(decision: &Decision) -> Vec<WorkerId> {
    let prefill = decision.prefill.iter().map(|(worker, _)| worker.clone());
    prefill.chain([decision.decode.0.clone()]).collect()
}

fn granted(assigned: Assigned, explanation: String) -> v1::Assignment {
    v1::Assignment {
        request: assigned.request.to_string(),
        attempt: assigned.attempt,
        epoch: assigned.epoch.0,
        decode: Some(assigned.decode.into()),
        prefill: assigned.prefill.map(Into::into),
        lease_ms: assigned.lease_ms,
        explanation,
    }
}

/// Counts an answered Assign.
pub(super) fn count(answer: &Result<v1::Assignment, Refusal>, since: Instant) {
    match answer {
        Ok(assignment) => {
            let prefill = if assignment.prefill.is_some() { "remote" } else { "local" };
            metrics::counter!("baton_coordinator_assignments_total", "prefill" => prefill).increment(1);
            metrics::histogram!("baton_coordinator_assign_seconds").record(since.elapsed().as_secs_f64());
            tracing::debug!(request = assignment.request, explanation = assignment.explanation, "assigned");
        }
        Err(refused) => {
            let reason = baton_proto::convert::refused(refused).as_str();
            metrics::counter!("baton_coordinator_refused_total", "reason" => reason).increment(1);
        }
    }
}
