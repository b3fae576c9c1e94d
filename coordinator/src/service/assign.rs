//! Assignments: many requests are looked at under one lock and committed in one entry. One that finds no room waits in
//! the queue (`queue`), one whose worker ended meanwhile is placed again.

use baton_core::planted::{self, Bug};
use baton_core::{Refused, Role, WorkerId};
use baton_proto::convert::refusal;
use baton_proto::v1;
use tokio::time::Instant;

use super::ask::Ask;
use super::explain::Word;
use super::gateways::Move;
use super::queue::Parked;
use super::roster::Roster;
use super::{Refusal, Shared, gateways, unavailable, unexpected};
use crate::placement::{self, Candidate, Decision, Declined, Pools};
use crate::state::{Apart, Assigned, Command, Ledger, Life, Limit, OpenRequest, Outcome, OverLimit};

/// Placements of one request: each further one because a chosen worker had just been fenced.
const PLACEMENTS_MAX: usize = 4;
/// Requests looked at under one lock.
const LOOK_MAX: usize = 64;

pub(super) type Answer = Result<v1::Assignment, Refusal>;

/// What became of a request that was looked at.
pub(super) enum Fate {
    Answered(Answer),
    /// It stands in the queue.
    Waits(Parked),
    /// Its workers ended before the ledger had it.
    Again(Ask),
}

/// A request with the workers chosen for it.
pub(super) struct Placed {
    pub(super) ask: Ask,
    pub(super) decision: Decision,
    /// Of a request that was accepted before; held until the ledger has decided.
    pub(super) moving: Option<Move>,
}

enum Looked {
    /// The ledger has the answer already; it is one once this node is known to lead.
    Known(Box<Ask>),
    Fate(Box<Fate>),
    Placed(Box<Placed>),
}

impl Shared {
    pub(super) async fn assign(&self, ask: Ask) -> Answer {
        let fate = self.assign_group(vec![ask]).await.pop().expect("one each");
        self.follow(fate).await
    }

    /// Looks at all of them, commits those that can be placed, and says what became of each, in order.
    pub(super) async fn assign_group(&self, asks: Vec<Ask>) -> Vec<Fate> {
        if let Err(refused) = self.leading().await {
            return asks.iter().map(|_| Fate::Answered(Err(refused.clone()))).collect();
        }
        let mut looked = Vec::with_capacity(asks.len());
        let mut asks = asks.into_iter().peekable();
        while asks.peek().is_some() {
            self.look(asks.by_ref().take(LOOK_MAX), &mut looked);
        }
        let mut placed = Vec::new();
        let mut rest = Vec::with_capacity(looked.len());
        for looked in looked {
            match looked {
                Looked::Placed(one) => {
                    placed.push(*one);
                    rest.push(None);
                }
                looked => rest.push(Some(looked)),
            }
        }
        let known = rest.iter().any(|looked| matches!(looked, Some(Looked::Known(_))));
        let confirming = async { if known { self.confirmed().await } else { Ok(()) } };
        let (committed, confirmed) = tokio::join!(self.commit(placed), confirming);
        let mut committed = committed.into_iter();
        let fate = |looked| match looked {
            Some(Looked::Known(ask)) => match &confirmed {
                Ok(()) => self.known(&ask).map_or(Fate::Again(*ask), Fate::Answered),
                Err(refused) => Fate::Answered(Err(refused.clone())),
            },
            Some(Looked::Fate(fate)) => *fate,
            Some(Looked::Placed(_)) | None => committed.next().expect("one each"),
        };
        rest.into_iter().map(fate).collect()
    }

    /// Goes on with a request until it is answered.
    pub(super) async fn follow(&self, mut fate: Fate) -> Answer {
        for _ in 0..PLACEMENTS_MAX {
            fate = match fate {
                Fate::Answered(answer) => return answer,
                Fate::Again(ask) => self.assign_group(vec![ask]).await.pop().expect("one each"),
                Fate::Waits(parked) => match parked.turn().await {
                    Ok(placed) => self.commit(vec![placed]).await.pop().expect("one each"),
                    Err(refused) => Fate::Answered(Err(refused)),
                },
            }
        }
        match fate {
            Fate::Answered(answer) => answer,
            _ => Err(unavailable("workers come and go faster than requests are placed")),
        }
    }

    fn look(&self, asks: impl Iterator<Item = Ask>, looked: &mut Vec<Looked>) {
        let now = Instant::now();
        let ledger = self.node.ledger();
        let mut roster = self.roster();
        for ask in asks {
            if ask.gateway.is_empty() || self.asking.heard(&ask.gateway, &ledger, now) {
                looked.push(self.look_at(ask, &ledger, &mut roster, now));
                continue;
            }
            let refused = self.refused(&ask, gateways::full(), None);
            looked.push(Looked::Fate(Box::new(Fate::Answered(Err(refused)))));
        }
    }

    fn look_at(&self, ask: Ask, ledger: &Ledger, roster: &mut Roster, now: Instant) -> Looked {
        let now_ms = self.lead.stamp().unwrap_or(ledger.time_ms());
        let accepted = ledger.request(ask.request).is_some();
        if answer(&ask, ledger, now_ms).is_some() {
            return Looked::Known(Box::new(ask));
        }
        // Begun while the ledger is looked at: what moved the request before is in it.
        let moving = accepted.then(|| self.moving.begin(ask.request));
        if matches!(moving, Some(None)) {
            let busy = unavailable("another attempt or another gateway of this request is being granted just now");
            return Looked::Fate(Box::new(Fate::Answered(Err(self.refused(&ask, busy, None)))));
        }
        if let Err(refused) = acceptable(&ask, ledger, accepted, now_ms) {
            return Looked::Fate(Box::new(Fate::Answered(Err(self.refused(&ask, refused, None)))));
        }
        if !accepted && self.admission.is_behind(&ask) {
            return Looked::Fate(Box::new(self.park(ask, ledger)));
        }
        self.suspect(&ask, roster, now);
        match self.place(&ask, ledger, roster, now) {
            Ok(decision) => Looked::Placed(Box::new(Placed { ask, decision, moving: moving.flatten() })),
            // What has been accepted is not refused for want of room; its gateway asks again.
            Err(declined) if declined.reason == Refused::NoCapacity && !accepted => {
                Looked::Fate(Box::new(self.park(ask, ledger)))
            }
            Err(declined) => Looked::Fate(Box::new(Fate::Answered(Err(self.declined(&ask, declined))))),
        }
    }

    /// The answer that the ledger has; None: it is not there any more.
    fn known(&self, ask: &Ask) -> Option<Answer> {
        let answer = {
            let ledger = self.node.ledger();
            answer(ask, &ledger, self.lead.stamp().unwrap_or(ledger.time_ms()))?
        };
        Some(answer.map_err(|refused| self.refused(ask, refused, None)))
    }

    fn park(&self, ask: Ask, ledger: &Ledger) -> Fate {
        match self.admission.wait(ask.clone(), ledger) {
            Ok(parked) => Fate::Waits(parked),
            Err(refused) => Fate::Answered(Err(self.refused(&ask, self.spread(refused), None))),
        }
    }

    /// Every gateway tells its own clients when to come again, and each has its share of the turns.
    pub(super) fn spread(&self, refused: Refusal) -> Refusal {
        let gateways = self.asking.count(Instant::now()).max(1) as u64;
        Refusal { retry_step_us: refused.retry_step_us.saturating_mul(gateways), ..refused }
    }

    fn suspect(&self, ask: &Ask, roster: &mut Roster, now: Instant) {
        ask.exclude.iter().for_each(|(id, incarnation)| roster.suspect(id, *incarnation));
        let failed = ask.exclude_pairs.iter().filter(|(prefill, decode)| roster.pair_failed(prefill, decode, now));
        if failed.count() > 0 {
            self.tell_members();
        }
    }

    /// Chooses workers and counts the request on them.
    pub(super) fn place(
        &self,
        ask: &Ask,
        ledger: &Ledger,
        roster: &mut Roster,
        now: Instant,
    ) -> Result<Decision, Declined> {
        let before = ledger.request(ask.request);
        let mut question = ask.question(before.map(|open| &open.numerics));
        let policies = self.policies.of(ledger);
        let policy = if before.is_some() { &policies.accepted } else { &policies.fresh };
        let mut pools = roster.pools(ledger, &ask.chain, now);
        if let Some(open) = before {
            recall(&mut pools, open);
        }
        let decision = match ledger.apart(ask.request, ask.attempt, &ask.killed) {
            None => placement::place(&question, &pools, policy)?,
            Some(apart) => {
                let (wanted, needed) = kept_away(ask, apart, &pools);
                question.exclude = &wanted;
                placement::place(&question, &pools, policy).or_else(|_| {
                    question.exclude = &needed;
                    placement::place(&question, &pools, policy)
                })?
            }
        };
        roster.promise(ask.request, &decision, now);
        Ok(decision)
    }

    /// Has the ledger grant what was placed, all of it in one entry if it fits.
    async fn commit(&self, placed: Vec<Placed>) -> Vec<Fate> {
        if placed.is_empty() {
            return Vec::new();
        }
        let command = |placed: &Placed| Command::AssignAfter {
            proposed: Box::new(placed.ask.proposed(&placed.decision)),
            previous: placed.ask.previous,
        };
        let outcomes = self.submit_many(placed.iter().map(command).collect()).await;
        match outcomes {
            Ok(outcomes) => placed.into_iter().zip(outcomes).map(|(one, outcome)| self.fate(one, outcome)).collect(),
            Err(refused) => placed.iter().map(|_| Fate::Answered(Err(refused.clone()))).collect(),
        }
    }

    fn fate(&self, placed: Placed, outcome: Outcome) -> Fate {
        let Placed { ask, decision, moving: _moving } = placed;
        let refused = match outcome {
            Outcome::Assigned(assigned) => {
                self.remember(&ask, Word::Assigned, decision.trace);
                let (explanation, holder) = (decision.explanation, decision.holder.map(Into::into));
                return Fate::Answered(Ok(v1::Assignment {
                    explanation,
                    holder,
                    ..granted(*assigned, self.cluster())
                }));
            }
            Outcome::Misplaced => {
                self.release(&ask, &decision);
                return Fate::Again(ask);
            }
            Outcome::Ended => ended(),
            Outcome::OverLimit(over) => over_limit(&over),
            Outcome::Refused(reason) => refusal(reason, refused_because(reason)),
            other => unexpected(&other),
        };
        self.release(&ask, &decision);
        Fate::Answered(Err(self.refused(&ask, refused, Some(decision))))
    }

    fn release(&self, ask: &Ask, decision: &Decision) {
        let mut roster = self.roster();
        let lives = decision.prefill.iter().chain([&decision.decode]);
        lives.for_each(|(worker, _): &(WorkerId, _)| roster.release(ask.request, worker));
    }

    pub(super) fn declined(&self, ask: &Ask, declined: Declined) -> Refusal {
        let Declined { reason, detail, retry_after_ms, trace } = declined;
        self.remember(ask, Word::Refused(reason), *trace);
        Refusal { retry_after_ms, ..refusal(reason, detail) }
    }

    /// A refusal that placement did not decide, written down.
    pub(super) fn refused(&self, ask: &Ask, refused: Refusal, decision: Option<Decision>) -> Refusal {
        let mut trace = decision.map(|decision| decision.trace).unwrap_or_default();
        trace.verdict.clone_from(&refused.detail);
        self.remember(ask, Word::Refused(baton_proto::convert::refused(&refused)), trace);
        refused
    }
}

/// What the ledger says of a request that it has had before: what was assigned to it, or that it goes on otherwise.
fn answer(ask: &Ask, ledger: &Ledger, now_ms: u64) -> Option<Answer> {
    if ledger.has_ended(ask.request) {
        return Some(Err(ended()));
    }
    let open = ledger.request(ask.request)?;
    if !open.goes_on(ask.attempt, &ask.gateway, ask.previous) || !open.is_of(&ask.gateway) {
        return Some(Err(refusal(Refused::Stale, refused_because(Refused::Stale))));
    }
    let assigned = ledger.assignment(ask.request, ask.attempt, now_ms).filter(|_| !planted::is(Bug::ApplyTwice))?;
    Some(Ok(granted(assigned, ledger.cluster().to_string())))
}

/// Whoever prefilled the request before has computed most of it, though no heartbeat may have told so yet.
fn recall(pools: &mut Pools, before: &OpenRequest) {
    let Some(prefill) = &before.prefill else { return };
    let same = |c: &&mut Candidate| *c.worker == prefill.worker && c.incarnation == prefill.incarnation;
    if let Some(candidate) = pools.candidates.iter_mut().find(same) {
        let blocks = before.prompt_tokens / u64::from(candidate.model.block_tokens).max(1);
        candidate.hits = candidate.hits.max(blocks);
    }
}

/// Lives to exclude if there are others, and those to exclude at all; a suspect is prefilled where it is decoded.
fn kept_away(ask: &Ask, apart: Apart, pools: &Pools) -> (Vec<Life>, Vec<Life>) {
    let mut needed = ask.exclude.clone();
    needed.extend(apart.needed);
    if apart.is_suspect {
        let prefills = pools.candidates.iter().filter(|c| c.role == Role::Prefill);
        needed.extend(prefills.map(|c| (c.worker.clone(), c.incarnation)));
    }
    let wanted = needed.iter().cloned().chain(apart.wanted).collect();
    (wanted, needed)
}

/// Whether the ledger would take the request as it stands; the ledger itself has the last word.
fn acceptable(ask: &Ask, ledger: &Ledger, accepted: bool, now_ms: u64) -> Result<(), Refusal> {
    if ledger.quarantined(ask.fingerprint, now_ms) {
        return Err(refusal(Refused::Poisoned, refused_because(Refused::Poisoned)));
    }
    if !accepted && ask.key.is_empty() && !ledger.keys().open() {
        // Its gateway has not heard yet that keys are asked for.
        return Err(refusal(Refused::Unknown, "the cluster asks for an API key, and this request came without one"));
    }
    let account = ledger.account(&ask.tenant).filter(|_| !accepted);
    account.map_or(Ok(()), |account| account.check(&ask.charge(), now_ms)).map_err(|over| over_limit(&over))
}

fn ended() -> Refusal {
    refusal(Refused::Stale, "the request has ended")
}

fn refused_because(reason: Refused) -> &'static str {
    match reason {
        Refused::Poisoned => "workers died under this request; it is not tried again for ten minutes",
        Refused::Stale => "another attempt of this request is in force, or another gateway serves it",
        Refused::Expired => "its deadline has passed, or it has had all its attempts",
        Refused::Unknown => "its key has been revoked",
        Refused::NoCapacity => "as many requests are open as the cluster may have",
        _ => "refused by the ledger",
    }
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
    // What is more than a whole minute's tokens fits in no minute.
    let never = matches!(over.limit, Limit::TokensPerMinute(_)) && over.retry_after_ms == 0;
    let reason = if never { Refused::TooLarge } else { over.reason };
    Refusal { retry_after_ms: over.retry_after_ms, ..refusal(reason, detail) }
}

/// `cluster`: that assigned it.
pub(super) fn granted(assigned: Assigned, cluster: String) -> v1::Assignment {
    v1::Assignment {
        request: assigned.request.to_string(),
        attempt: assigned.attempt,
        epoch: assigned.epoch.0,
        decode: Some(assigned.decode.into()),
        prefill: assigned.prefill.map(Into::into),
        lease_ms: assigned.lease_ms,
        explanation: String::new(),
        holder: None,
        cluster,
    }
}

/// Counts an answered request.
pub(super) fn count(answer: &Answer, since: Instant) {
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
