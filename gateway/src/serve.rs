//! One request from assignment to its last token, and the only retry loop: when a worker is lost, the request is
//! assigned anew with the tokens so far, and its events go on as if nothing had happened.
//!
//! ```text
//! assign ──► start on the decode worker ──► events ──► every choice ended
//!   ▲                                          │
//!   └── lost, aborted, refused: attempt + 1 ◄──┘      bounded by ATTEMPTS_MAX and the deadline; the first error is kept
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use baton_core::planted::{self, Bug};
use baton_core::{
    Aborted, Assignment, BlockHash, Finish, Holder, Refused, Request, SampledToken, Sampling, TokenId, limits,
};
use baton_proto::v1::request_output::Output;
use baton_proto::v1::{self, FinishedRequest, WorkerLife, WorkerPair};
use baton_proto::{BadMessage, convert};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};

use crate::assign::Assigner;
use crate::coordinators::{Coordinators, Refusal};
use crate::error::ApiError;
use crate::failure::{Blame, Failure, aborted, broken, lost, refused};
use crate::finish::Finishes;
use crate::link::{Closed, Inbox, Links};
use crate::measure::{self, Phases};
use crate::note::{Before, Look, Note};
use crate::resume::TakenOver;
use crate::shed::Shed;

/// How long a client that already has tokens waits for workers.
const NO_WORKERS_WAIT: Duration = Duration::from_millis(limits::NO_WORKERS_WAIT_MS);
/// How long one that has none does: it hears within a second that there is nobody.
const NO_WORKERS_WAIT_NEW: Duration = Duration::from_millis(700);
/// How long a request waits for a coordinator that can take it: an election is shorter, a lost quorum is not.
const COORDINATOR_WAIT: Duration = Duration::from_millis(1_000);
/// A life that is still assignable after so long without other workers is alive: only the stream to it was lost.
const EXCLUSION: Duration = Duration::from_millis(2 * limits::WORKER_LEASE_MS);
/// Tokens hashed on the async thread (some hundred microseconds of work).
const INLINE_HASHED_TOKENS_MAX: usize = 16 << 10;
const FINGERPRINT_BYTES: usize = 16;
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_millis(320);
/// The longest pause while no coordinator leads.
const BACKOFF_COORDINATOR: Duration = Duration::from_millis(40);

/// What serving a request needs of its gateway.
pub(crate) struct Servers {
    pub assigner: Assigner,
    pub coordinators: Arc<Coordinators>,
    pub links: Arc<Links>,
    pub finishes: Finishes,
    pub shed: Shed,
    pub gateway: String,
    /// The gateway is about to end; what is resumable goes on without it.
    pub leaving: AtomicBool,
}

/// What a request is served under, besides what it asks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Terms {
    /// Of the model, to name the prompt's blocks.
    pub block_tokens: usize,
    /// Id of the API key.
    pub key: String,
    /// None: the request ends with its gateway.
    pub resumable: Option<Arc<Look>>,
}

/// What happened to a request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event {
    Tokens { choice: u32, tokens: Vec<SampledToken> },
    PromptLogprobs(Vec<Option<SampledToken>>),
    Finished { choice: u32, finish: Finish },
}

/// A request being served. Dropping it cancels what is left of it, everywhere.
pub(crate) struct Serving {
    servers: Arc<Servers>,
    request: Arc<Request>,
    terms: Terms,
    fingerprint: bytes::Bytes,
    deadline: Instant,
    choices: Vec<ChoiceState>,
    attempt: u32,
    epoch: u64,
    /// An assignment was asked for whose fate is not known: it may stand in the ledger.
    asking: bool,
    /// How long this attempt goes on without a gateway.
    window_ms: u64,
    exclude: Vec<WorkerLife>,
    /// Between which a handoff failed; neither is to blame alone.
    exclude_pairs: Vec<WorkerPair>,
    /// Lives that ended while they ran this request.
    killed: Vec<WorkerLife>,
    /// Excluded from the next attempt only: workers that had no room or gave up without fault.
    busy: Vec<WorkerLife>,
    first_error: Option<ApiError>,
    /// When the attempt before failed, until the next one says something.
    broken: Option<Instant>,
    /// Where the attempt before ran, if its blocks can be fetched from there.
    holder: Option<Holder>,
    route: Option<Route>,
    ready: VecDeque<Event>,
    prompt_logprobs_seen: bool,
    cached_tokens: u64,
    phases: Phases,
    outcome: Option<String>,
    _place: OwnedSemaphorePermit,
}

#[derive(Clone, Debug, Default)]
struct ChoiceState {
    so_far: Vec<TokenId>,
    ended: bool,
    /// The same tokens with all that was said of them, and how they ended; kept for another gateway.
    said: Before,
}

/// The way of one attempt.
struct Route {
    assignment: Assignment,
    inbox: Inbox,
}

impl Serving {
    pub(crate) fn new(
        servers: Arc<Servers>,
        request: Arc<Request>,
        terms: Terms,
        mut phases: Phases,
        place: OwnedSemaphorePermit,
    ) -> Serving {
        phases.accepted(request.choices);
        Serving {
            servers,
            terms,
            fingerprint: fingerprint(&request),
            deadline: Instant::now() + Duration::from_millis(request.deadline_ms),
            choices: vec![ChoiceState::default(); request.choices as usize],
            attempt: 0,
            epoch: 0,
            asking: false,
            window_ms: 0,
            exclude: Vec::new(),
            exclude_pairs: Vec::new(),
            killed: Vec::new(),
            busy: Vec::new(),
            first_error: None,
            broken: None,
            holder: None,
            route: None,
            ready: VecDeque::new(),
            prompt_logprobs_seen: false,
            cached_tokens: 0,
            phases,
            outcome: None,
            request,
            _place: place,
        }
    }

    /// A request that another gateway began. What has been said of it comes again as its first events.
    pub(crate) fn resumed(
        servers: Arc<Servers>,
        taken: TakenOver,
        terms: Terms,
        phases: Phases,
        place: OwnedSemaphorePermit,
    ) -> Serving {
        let TakenOver { request, assignment, note, said, inbox } = taken;
        let mut serving = Serving::new(servers, request, terms, phases, place);
        serving.attempt = assignment.attempt;
        serving.epoch = assignment.epoch.0;
        serving.cached_tokens = note.cached_tokens.unwrap_or(0);
        serving.window_ms = serving.terms.resumable.as_ref().map_or(0, |look| look.window_ms);
        serving.route = Some(Route { assignment, inbox });
        for (choice, before) in note.before.into_iter().enumerate() {
            serving.replay(choice as u32, before);
        }
        if let Some(admitted) = said.admitted {
            serving.note_cached(admitted.cached_tokens);
        }
        if let Some(logprobs) = said.prompt_logprobs {
            serving.take_prompt_logprobs(logprobs);
        }
        for tokens in said.tokens {
            let choice = tokens.choice;
            let tokens = tokens.tokens.into_iter().map(SampledToken::from).collect();
            serving.replay(choice, Before { tokens, finish: None });
        }
        for finished in said.finished {
            serving.note_cached(finished.cached_tokens);
            let finish = convert::finish(&finished.reason, finished.stop_token).ok();
            serving.replay(finished.choice, Before { tokens: Vec::new(), finish });
        }
        if serving.is_complete() {
            serving.complete();
        }
        serving
    }

    /// What had been said of a choice before this gateway had it.
    fn replay(&mut self, choice: u32, before: Before) {
        let Before { tokens, finish } = before;
        let state = &mut self.choices[choice as usize];
        state.so_far.extend(tokens.iter().map(|token| token.id));
        state.said.tokens.extend(tokens.iter().cloned());
        if !tokens.is_empty() {
            self.ready.push_back(Event::Tokens { choice, tokens });
        }
        if let Some(finish) = finish {
            state.ended = true;
            state.said.finish = Some(finish);
            self.ready.push_back(Event::Finished { choice, finish });
        }
    }

    pub(crate) fn is_resumable(&self) -> bool {
        self.terms.resumable.is_some()
    }

    pub(crate) fn request(&self) -> &Request {
        &self.request
    }

    /// Prompt tokens found in a prefix cache.
    pub(crate) fn cached_tokens(&self) -> u64 {
        self.cached_tokens
    }

    /// The next event; None when every choice has ended. An error is the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, ApiError> {
        let ended = match timeout_at(self.deadline, self.advance()).await {
            Ok(Ok(event)) => return Ok(event),
            Ok(Err(error)) => error,
            Err(_) => self.first_error.take().unwrap_or_else(ApiError::deadline),
        };
        self.route = None;
        self.outcome = Some(ended.reason.to_string());
        Err(ApiError { request: Some(Box::new(self.request.id)), ..ended })
    }

    /// The gateway needs no more of this choice: its stop string is complete after `generated` tokens.
    pub(crate) fn end_choice(&mut self, choice: u32, generated: usize) {
        let state = &mut self.choices[choice as usize];
        state.so_far.truncate(generated);
        state.said.tokens.truncate(generated);
        if std::mem::replace(&mut state.ended, true) {
            return;
        }
        self.phases.finished("stop");
        if self.is_complete() {
            self.route = None;
            self.outcome = Some("complete".into());
        } else if let Some(route) = &self.route {
            route.inbox.cancel_choices(vec![choice]);
        }
    }

    fn is_complete(&self) -> bool {
        self.choices.iter().all(|c| c.ended)
    }

    /// The prompt's log-probabilities come before the tokens, in whatever order the worker sends them.
    fn awaits_prompt_logprobs(&self) -> bool {
        self.request.prompt_logprobs.is_some() && !self.prompt_logprobs_seen
    }

    async fn advance(&mut self) -> Result<Option<Event>, ApiError> {
        loop {
            let complete = self.is_complete();
            if (complete || !self.awaits_prompt_logprobs())
                && let Some(event) = self.ready.pop_front()
            {
                return Ok(Some(event));
            }
            if complete {
                return Ok(None);
            }
            let Some(route) = &mut self.route else {
                self.start().await?;
                continue;
            };
            match route.inbox.next().await {
                Ok(output) => self.take(output)?,
                Err(Closed::Overrun) => return Err(ApiError::slow_client()),
                Err(Closed::Lost) => self.fail(lost(Blame::Decode))?,
                Err(Closed::Died) => self.fail(lost(Blame::DecodeDied))?,
            }
        }
    }

    /// Assigns and starts the next attempt.
    async fn start(&mut self) -> Result<(), ApiError> {
        self.attempt += 1;
        if self.attempt > 2 {
            tokio::time::sleep(BACKOFF_MIN * self.attempt).await;
        }
        let note = self.note();
        self.window_ms =
            if note.is_empty() { 0 } else { self.terms.resumable.as_ref().map_or(0, |look| look.window_ms) };
        let mut assignment = self.assign().await?;
        if let Some(holder) = self.holder.take() {
            assignment.holder = Some(holder);
        }
        self.phases.assigned();
        self.epoch = assignment.epoch.0;
        tracing::debug!(request = %self.request.id, attempt = self.attempt, epoch = self.epoch,
            decode = %assignment.decode.worker, explanation = assignment.explanation, "assigned");
        match self.servers.links.start(&assignment.decode, self.start_message(&assignment, note)) {
            Ok(inbox) => self.route = Some(Route { assignment, inbox }),
            Err(_) => {
                self.exclude.push((&assignment.decode).into());
                self.fail_attempt(lost(Blame::Decode))?;
            }
        }
        Ok(())
    }

    /// What another gateway needs to go on with this attempt; empty when the request ends with this one.
    fn note(&self) -> bytes::Bytes {
        let Some(look) = &self.terms.resumable else { return bytes::Bytes::new() };
        let first = self.attempt == 1;
        let before = if first { Vec::new() } else { self.choices.iter().map(|c| c.said.clone()).collect() };
        let cached_tokens = (!first).then_some(self.cached_tokens);
        let note = Note { look: (**look).clone(), cached_tokens, before };
        note.to_bytes().unwrap_or_else(|| {
            measure::unresumable("note_too_large");
            bytes::Bytes::new()
        })
    }

    fn start_message(&self, assignment: &Assignment, note: bytes::Bytes) -> v1::Start {
        let less = usize::from(planted::is(Bug::DoubleToken));
        let so_far = |c: &ChoiceState| c.so_far[..c.so_far.len().saturating_sub(less)].to_vec();
        let choice = |(index, c): (usize, &ChoiceState)| v1::Choice { index: index as u32, so_far: so_far(c) };
        let open = self.choices.iter().enumerate().filter(|(_, c)| !c.ended);
        let request = v1::Request { deadline_ms: self.left_ms(), ..(&*self.request).into() };
        v1::Start {
            handle: 0,
            assignment: Some(assignment.clone().into()),
            request: Some(request),
            choices: open.map(choice).collect(),
            resumable_ms: self.window_ms,
            note,
        }
    }

    /// Asks for workers until there are some, within the bounds of waiting.
    async fn assign(&mut self) -> Result<Assignment, ApiError> {
        let started = Instant::now();
        let mut backoff = BACKOFF_MIN;
        let mut message = self.assign_message().await;
        // What was asked once may still be granted, whatever is said to it when it is asked again.
        let mut unsettled = false;
        loop {
            message.deadline_ms = self.left_ms();
            message.exclude = self.exclude.iter().chain(&self.busy).cloned().collect();
            message.exclude_pairs = self.exclude_pairs.clone();
            self.asking = true;
            let refusal = match self.servers.assigner.ask(message.clone()).await {
                Ok(assignment) => match Assignment::try_from(assignment) {
                    Ok(assignment) => {
                        self.asking = false;
                        return Ok(assignment);
                    }
                    Err(bad) => Refusal::unavailable(bad.to_string()),
                },
                Err(refusal) => refusal,
            };
            let unknown = matches!(refusal.reason, Refused::Unavailable | Refused::NotLeader);
            unsettled |= refusal.unsettled;
            self.asking = unsettled;
            if started.elapsed() >= self.patience(&refusal) {
                let refusal = self.servers.shed.refused(&self.request, refusal);
                let error = match refusal.reason {
                    // What the ledger does not know of a request that is asked for is its key.
                    Refused::Unknown if self.terms.key.is_empty() => {
                        ApiError::unauthorized("This cluster asks for an API key by now.")
                    }
                    Refused::Unknown => ApiError::unauthorized("The API key has been revoked."),
                    reason => ApiError::refused(reason, &refusal.detail, refusal.retry_after_ms),
                };
                let first = self.first_error.take().filter(|_| refusal.reason != Refused::Poisoned);
                return Err(first.unwrap_or(error));
            }
            self.busy.clear();
            if started.elapsed() > EXCLUSION {
                self.exclude.clear();
                self.exclude_pairs.clear();
            }
            // The next leader is there within a few hundred milliseconds, and a question costs it nothing.
            tokio::time::sleep(if unknown { backoff.min(BACKOFF_COORDINATOR) } else { backoff }).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// How long a refusal is worth waiting out. A client that already has tokens waits for room as for workers.
    fn patience(&self, refusal: &Refusal) -> Duration {
        let begun = self.choices.iter().any(|c| !c.so_far.is_empty());
        let full = self.first_error.as_ref().is_some_and(|e| e.reason == Refused::NoCapacity.as_str());
        match refusal.reason {
            Refused::UnknownModel | Refused::TooLarge | Refused::Incompatible | Refused::Poisoned => Duration::ZERO,
            _ if begun => NO_WORKERS_WAIT,
            Refused::NoCapacity | Refused::Quota | Refused::Overloaded | Refused::Unknown => Duration::ZERO,
            Refused::NoWorkers if full => Duration::ZERO,
            Refused::NoWorkers | Refused::Draining => NO_WORKERS_WAIT_NEW,
            Refused::Stale
            | Refused::Fenced
            | Refused::Expired
            | Refused::NotLeader
            | Refused::Unavailable
            | Refused::Foreign => COORDINATOR_WAIT,
        }
    }

    /// What all choices that still go on have in common.
    fn shared_tokens(&self) -> Vec<TokenId> {
        let mut open = self.choices.iter().filter(|c| !c.ended);
        let mut shared = self.request.prompt.to_vec();
        if let (Some(only), None) = (open.next(), open.next()) {
            shared.extend(&only.so_far);
        }
        shared
    }

    /// The question to the coordinator; deadline and exclusions are filled in when it is asked.
    async fn assign_message(&self) -> v1::AssignRequest {
        let request = &*self.request;
        let open: Vec<&ChoiceState> = self.choices.iter().filter(|c| !c.ended).collect();
        let shared = self.shared_tokens();
        let shortest = open.iter().map(|c| c.so_far.len()).min().unwrap_or(0);
        v1::AssignRequest {
            request: request.id.to_string(),
            attempt: self.attempt,
            tenant: request.tenant.clone(),
            lane: convert::lane_code(request.lane),
            model: request.model.clone(),
            prompt_tokens: shared.len() as u64,
            tokens_max: (request.tokens_max as usize).saturating_sub(shortest) as u64,
            choices: open.len() as u32,
            seed: request.sampling.seed,
            previous_epoch: self.epoch,
            prompt_logprobs: request.prompt_logprobs.is_some(),
            gateway: self.servers.gateway.clone(),
            block_hashes: block_hashes(request.cache_salt.clone(), shared, self.terms.block_tokens).await,
            resumable_ms: self.window_ms,
            killed: self.killed.clone(),
            fingerprint: self.fingerprint.clone(),
            key: self.terms.key.clone(),
            ..v1::AssignRequest::default()
        }
    }

    fn left_ms(&self) -> u64 {
        self.deadline.saturating_duration_since(Instant::now()).as_millis() as u64
    }

    /// Takes in one message of the worker.
    fn take(&mut self, output: Output) -> Result<(), ApiError> {
        let taken = match output {
            Output::Tokens(tokens) => self.take_tokens(tokens),
            Output::Finished(finished) => self.take_finished(finished),
            Output::PromptLogprobs(logprobs) => {
                self.take_prompt_logprobs(logprobs);
                Ok(())
            }
            Output::Admitted(admitted) => {
                self.note_cached(admitted.cached_tokens);
                self.phases.admitted(&admitted);
                Ok(())
            }
            Output::Resumed(_) => Err(BadMessage { field: "resumed", problem: "was not asked for" }),
            Output::Aborted(abort) => {
                self.remember_holder(&abort);
                return self.fail(aborted(abort));
            }
            Output::Refused(refusal) => return self.fail(refused(refusal)),
        };
        match taken {
            Ok(()) => Ok(()),
            Err(bad) => self.fail(broken(bad)),
        }
    }

    /// A worker that drains keeps a request's blocks for a moment, for whoever goes on with it.
    fn remember_holder(&mut self, abort: &v1::Abort) {
        let begun = self.choices.iter().any(|c| !c.so_far.is_empty());
        if convert::aborted(abort) != Aborted::Draining || abort.failed.is_some() || !begun {
            return;
        }
        // The last token's position is the next to be computed.
        let blocks = (self.shared_tokens().len() - 1) / self.terms.block_tokens.max(1);
        let place = self.route.as_ref().map(|route| route.assignment.decode.clone());
        self.holder = place.map(|place| Holder { place, blocks: blocks as u64, moves: true });
    }

    fn take_tokens(&mut self, tokens: v1::Tokens) -> Result<(), BadMessage> {
        if let Some(broken) = self.broken.take() {
            measure::went_on(broken.elapsed());
            tracing::debug!(request = %self.request.id, attempt = self.attempt,
                silent_us = broken.elapsed().as_micros() as u64, "goes on");
        }
        let keep = self.terms.resumable.is_some();
        let choice = self.open_choice(tokens.choice)?;
        let Some(state) = choice else { return Ok(()) };
        let news: Vec<SampledToken> = tokens.tokens.into_iter().map(Into::into).collect();
        state.so_far.extend(news.iter().map(|t| t.id));
        if keep {
            state.said.tokens.extend(news.iter().cloned());
        }
        if state.so_far.len() > self.request.tokens_max as usize {
            return Err(BadMessage { field: "tokens", problem: "are more than were asked for" });
        }
        self.phases.tokens(tokens.choice, news.len());
        self.ready.push_back(Event::Tokens { choice: tokens.choice, tokens: news });
        Ok(())
    }

    fn take_finished(&mut self, finished: v1::ChoiceFinished) -> Result<(), BadMessage> {
        let finish = convert::finish(&finished.reason, finished.stop_token)?;
        self.note_cached(finished.cached_tokens);
        let Some(state) = self.open_choice(finished.choice)? else { return Ok(()) };
        state.ended = true;
        state.said.finish = Some(finish);
        self.phases.finished(if finish == Finish::Length { "length" } else { "stop" });
        self.ready.push_back(Event::Finished { choice: finished.choice, finish });
        if self.is_complete() {
            self.complete();
        }
        Ok(())
    }

    /// The worker has ended every choice by itself.
    fn complete(&mut self) {
        self.outcome = Some("complete".into());
        if let Some(route) = self.route.take() {
            route.inbox.ended();
        }
    }

    fn take_prompt_logprobs(&mut self, logprobs: v1::PromptLogprobs) {
        if !std::mem::replace(&mut self.prompt_logprobs_seen, true) {
            self.ready.push_front(Event::PromptLogprobs(convert::prompt_logprobs_back(logprobs.tokens)));
        }
    }

    /// The first attempt tells what the request found in the cache; later ones find its own blocks.
    fn note_cached(&mut self, tokens: u64) {
        if self.attempt == 1 {
            self.cached_tokens = tokens.min(self.request.prompt.len() as u64);
        }
    }

    /// The state of a choice; None when the gateway has ended it already.
    fn open_choice(&mut self, choice: u32) -> Result<Option<&mut ChoiceState>, BadMessage> {
        match self.choices.get_mut(choice as usize) {
            Some(state) if state.ended => Ok(None),
            Some(state) => Ok(Some(state)),
            None => Err(BadMessage { field: "choice", problem: "was not asked for" }),
        }
    }

    /// The attempt's way has failed: chooses whom the next one avoids, or ends the request.
    fn fail(&mut self, failure: Failure) -> Result<(), ApiError> {
        if let Some(route) = self.route.take() {
            let decode = WorkerLife::from(&route.assignment.decode);
            match &failure.blame {
                Blame::Busy => self.busy.push(decode),
                Blame::Decode => self.exclude.push(decode),
                Blame::DecodeDied => {
                    self.killed.push(decode.clone());
                    self.exclude.push(decode);
                }
                Blame::Life { life, died } => {
                    self.killed.extend(died.then(|| life.clone()));
                    self.exclude.push(life.clone());
                }
                Blame::Pair(pair) => self.exclude_pairs.push(pair.clone()),
            }
            if !matches!(failure.blame, Blame::Decode | Blame::DecodeDied) {
                route.inbox.ended();
            }
        }
        self.fail_attempt(failure)
    }

    fn fail_attempt(&mut self, failure: Failure) -> Result<(), ApiError> {
        measure::retried(failure.reason);
        self.broken.get_or_insert_with(Instant::now);
        tracing::info!(request = %self.request.id, attempt = self.attempt, epoch = self.epoch,
            reason = failure.reason, error = %failure.error, "attempt failed");
        self.phases.failed();
        let first = self.first_error.get_or_insert(failure.error).clone();
        if failure.last || self.attempt >= limits::ATTEMPTS_MAX { Err(first) } else { Ok(()) }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if self.window_ms > 0
            && self.servers.leaving.load(Ordering::Relaxed)
            && let Some(route) = self.route.take()
        {
            // Whoever takes it over tells its end.
            route.inbox.ended();
            let generated = self.choices.iter().map(|c| c.so_far.len()).sum();
            self.phases.ended(&self.request, "left", self.attempt, generated, self.cached_tokens);
            return;
        }
        self.route = None;
        let outcome = self.outcome.take().unwrap_or_else(|| Aborted::Cancelled.as_str().into());
        let generated: usize = self.choices.iter().map(|c| c.so_far.len()).sum();
        self.phases.ended(&self.request, &outcome, self.attempt, generated, self.cached_tokens);
        // Epoch 0 ends the request whatever the ledger has made of it.
        let epoch = if self.asking { 0 } else { self.epoch };
        // Another gateway has taken a superseded request over, and tells its end.
        if (epoch == 0 && !self.asking) || outcome == Aborted::Superseded.as_str() {
            return;
        }
        self.servers.finishes.send(FinishedRequest {
            request: self.request.id.to_string(),
            epoch,
            outcome,
            prompt_tokens: self.request.prompt.len() as u64,
            cached_tokens: self.cached_tokens,
            generated_tokens: generated as u64,
        });
    }
}

/// Names of the full blocks of `tokens`; those of a long prompt take a while and leave the async thread.
async fn block_hashes(salt: String, tokens: Vec<TokenId>, block_tokens: usize) -> Vec<bytes::Bytes> {
    let long = tokens.len() > INLINE_HASHED_TOKENS_MAX;
    let chain = move || BlockHash::chain(&salt, &tokens, block_tokens);
    // Without hashes a request is placed as if no worker knew its prefix; only a panic could lose them.
    let hashes = if long { tokio::task::spawn_blocking(chain).await.unwrap_or_default() } else { chain() };
    hashes.into_iter().map(convert::block_hash_bytes).collect()
}

/// Names what is asked, so that it is known again whoever asks it: prompt and parameters, without the seed.
fn fingerprint(request: &Request) -> bytes::Bytes {
    let Request { model, prompt, sampling, choices, tokens_max, tokens_min, stop_tokens, ignore_eos, .. } = request;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(model.len() as u64).to_le_bytes());
    hasher.update(model.as_bytes());
    hasher.update(&(prompt.len() as u64).to_le_bytes());
    for token in prompt.iter() {
        hasher.update(&token.to_le_bytes());
    }
    let parameters =
        (&Sampling { seed: 0, ..sampling.clone() }, choices, tokens_max, tokens_min, stop_tokens, ignore_eos);
    let text = format!("{parameters:?} {:?} {:?}", request.logprobs, request.prompt_logprobs);
    hasher.update(text.as_bytes());
    bytes::Bytes::copy_from_slice(&hasher.finalize().as_bytes()[..FINGERPRINT_BYTES])
}
