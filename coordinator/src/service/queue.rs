//! Requests that wait for room: those that stand in the queue, and the loop that gives them their turn.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use baton_core::{Lane, Refused, RequestId};
use baton_proto::convert::refusal;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::admission::{Entry, Queue, Ticket, TooLong, budget_ms};
use super::ask::Ask;
use super::assign::Placed;
use super::{Refusal, Shared, stopped, unavailable};
use crate::state::Ledger;

/// How often those that wait are looked at, while there are any, when nothing else has made room.
const ROUND: Duration = Duration::from_millis(10);
/// Turns given in one look, under one lock.
const TURNS_MAX: usize = 256;

/// The queue and whoever stands in it.
pub(super) struct Admission {
    line: Mutex<Line>,
    count: AtomicUsize,
    since: Instant,
    room: Notify,
}

#[derive(Default)]
struct Line {
    queue: Queue,
    parked: BTreeMap<Ticket, Desk>,
}

/// One who waits.
struct Desk {
    ask: Ask,
    entered: Instant,
    tell: oneshot::Sender<Result<Placed, Refusal>>,
}

/// How long somebody stood in the queue, and how that ended.
fn record_wait(end: &'static str, wait: Duration) {
    metrics::histogram!("baton_coordinator_queue_wait_seconds", "end" => end).record(wait.as_secs_f64());
}

/// A place in the queue; dropping it leaves the queue.
pub(super) struct Parked {
    ticket: Ticket,
    admission: Arc<Admission>,
    told: oneshot::Receiver<Result<Placed, Refusal>>,
}

impl Parked {
    /// Waits for the turn.
    pub(super) async fn turn(mut self) -> Result<Placed, Refusal> {
        (&mut self.told).await.unwrap_or_else(|_| Err(unavailable("the coordinator is stopping")))
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        self.admission.leave(self.ticket);
    }
}

impl Admission {
    pub(super) fn new() -> Admission {
        Admission { line: Mutex::default(), count: AtomicUsize::new(0), since: Instant::now(), room: Notify::new() }
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().expect("admission lock")
    }

    fn now_ms(&self) -> u64 {
        self.since.elapsed().as_millis() as u64
    }

    pub(super) fn waiting(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// A worker may have room now.
    pub(super) fn tell_room(&self) {
        if self.waiting() > 0 {
            self.room.notify_one();
        }
    }

    /// Whether a request that comes now finds others before it.
    pub(super) fn is_behind(&self, ask: &Ask) -> bool {
        self.waiting() > 0 && self.line().queue.is_behind(&ask.model, ask.lane)
    }

    /// Lets a request wait, or refuses it at once if that would take too long.
    pub(super) fn wait(self: &Arc<Admission>, ask: Ask, ledger: &Ledger) -> Result<Parked, Refusal> {
        // A tenant that nobody created shares its turns with all such.
        let tenant = if ledger.account(&ask.tenant).is_some() { ask.tenant.clone() } else { String::new() };
        let entry = Entry {
            request: ask.request,
            model: ask.model.clone(),
            tenant,
            lane: ask.lane,
            cost: ask.charge().tokens(),
            patience_ms: ask.deadline_ms,
        };
        let (tell, told) = oneshot::channel();
        let mut line = self.line();
        match line.queue.enter(self.now_ms(), entry) {
            Ok(ticket) => {
                line.parked.insert(ticket, Desk { ask, entered: Instant::now(), tell });
                self.count.store(line.parked.len(), Ordering::Relaxed);
                if line.parked.len() == 1 {
                    // Nobody looks at an empty queue.
                    self.room.notify_one();
                }
                Ok(Parked { ticket, admission: self.clone(), told })
            }
            Err(long) => {
                let refused = refusal(Refused::Overloaded, format!("it would wait too long: {}", long.detail));
                let TooLong { retry_after_ms, retry_step_us, .. } = long;
                Err(Refusal { retry_after_ms, retry_step_us, ..refused })
            }
        }
    }

    fn leave(&self, ticket: Ticket) {
        let mut line = self.line();
        if line.queue.leave(ticket) {
            metrics::counter!("baton_coordinator_queue_left_total").increment(1);
        }
        line.parked.remove(&ticket);
        self.count.store(line.parked.len(), Ordering::Relaxed);
    }

    pub(super) fn holds(&self, request: RequestId) -> bool {
        !self.line().queue.of_request(request).is_empty()
    }

    /// The request has ended while it waited.
    pub(super) fn cancel(&self, request: RequestId) {
        if self.waiting() == 0 {
            return;
        }
        let mut line = self.line();
        for ticket in line.queue.of_request(request) {
            line.take(ticket)
                .into_iter()
                .for_each(|desk| desk.answer(refusal(Refused::Stale, "the request has ended")));
        }
        self.count.store(line.parked.len(), Ordering::Relaxed);
    }

    /// Requests of a model have ended: so fast does the queue move.
    pub(super) fn ended(&self, model: &str, count: u64) {
        self.line().queue.ended(self.now_ms(), model, count);
    }

    fn record_length(&self) {
        let line = self.line();
        for (lane, word) in [(Lane::Interactive, "interactive"), (Lane::Batch, "batch")] {
            metrics::gauge!("baton_coordinator_queued", "lane" => word).set(line.queue.len(lane) as f64);
        }
    }

    /// Answers all that wait.
    fn send_away(&self, refused: &Refusal) {
        let mut line = self.line();
        line.queue.clear();
        std::mem::take(&mut line.parked).into_values().for_each(|desk| desk.answer(refused.clone()));
        self.count.store(0, Ordering::Relaxed);
    }
}

impl Line {
    fn take(&mut self, ticket: Ticket) -> Option<Desk> {
        self.queue.leave(ticket);
        self.parked.remove(&ticket)
    }
}

impl Desk {
    fn answer(self, refused: Refusal) {
        drop(self.tell.send(Err(refused)));
    }
}

/// Gives those that wait their turn, until this node stops.
pub(super) async fn attend(shared: Arc<Shared>) {
    let mut stopping = shared.stopping.subscribe();
    loop {
        shared.admission.record_length();
        tokio::select! {
            biased;
            () = stopped(&mut stopping) => break,
            () = shared.admission.room.notified() => {}
            () = tokio::time::sleep(ROUND), if shared.admission.waiting() > 0 => {}
        }
        if shared.admission.waiting() > 0 {
            shared.give_turns();
        }
    }
    shared.admission.send_away(&unavailable("the coordinator is stopping"));
}

impl Shared {
    fn give_turns(&self) {
        if self.lead.now().is_none() {
            let leader = self.node.standing().borrow().leader.filter(|leader| *leader != self.node.id());
            let refused = leader.map_or_else(|| unavailable("leadership is changing hands"), |l| self.not_leader(l));
            return self.admission.send_away(&refused);
        }
        let now = Instant::now();
        let ledger = self.node.ledger();
        let mut roster = self.roster();
        let admission = &self.admission;
        let mut line = admission.line();
        let now_ms = admission.now_ms();
        line.queue.pass(now_ms);
        for ticket in line.queue.overdue(now_ms) {
            let Some(desk) = line.parked.remove(&ticket) else { continue };
            record_wait("overdue", now - desk.entered);
            let retry_after_ms = line.queue.retry_after_ms(now_ms, &desk.ask.model, desk.ask.lane);
            let retry_step_us = line.queue.turn_us(now_ms, &desk.ask.model);
            let waited =
                format!("no room within the {} ms it may wait", budget_ms(desk.ask.lane).min(desk.ask.deadline_ms));
            let refused = Refusal { retry_after_ms, retry_step_us, ..refusal(Refused::Overloaded, waited) };
            let refused = self.refused(&desk.ask, self.spread(refused), None);
            desk.answer(refused);
        }
        let mut turns = 0;
        for model in line.queue.models() {
            while turns < TURNS_MAX && self.give_turn(&mut line, &model, &ledger, &mut roster, now) {
                turns += 1;
            }
        }
        admission.count.store(line.parked.len(), Ordering::Relaxed);
    }

    /// Gives a turn to the first who can be placed. False: nobody can.
    fn give_turn(
        &self,
        line: &mut Line,
        model: &str,
        ledger: &Ledger,
        roster: &mut super::roster::Roster,
        now: Instant,
    ) -> bool {
        for ticket in line.queue.heads(model) {
            let ask = &line.parked[&ticket].ask;
            match self.place(ask, ledger, roster, now) {
                Ok(decision) => {
                    line.queue.placed(self.admission.now_ms(), ticket);
                    let Desk { ask, entered, tell } = line.parked.remove(&ticket).expect("looked at above");
                    record_wait("placed", now - entered);
                    drop(tell.send(Ok(Placed { ask, decision, moving: None })));
                    return true;
                }
                Err(declined) if declined.reason == Refused::NoCapacity => {}
                Err(declined) => {
                    let desk = line.take(ticket).expect("looked at above");
                    let refused = self.declined(&desk.ask, declined);
                    desk.answer(refused);
                    return true;
                }
            }
        }
        false
    }
}
