//! Who waits for a worker, for how long at most, and whose turn is next. Decides from what it is told and the time it is
//! given; no IO, no clock.
//!
//! ```text
//! lanes      interactive before batch, each with a budget of waiting and a bound
//! tenants    the one that has been given the least comes next (virtual token counter, Sheng et al. 2024, section 4)
//! refused    at once when the wait it would have is over its budget, going by how fast requests end while others wait:
//!            what ends while nobody waits tells how much is asked, not how much could be served
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use baton_core::limits::{QUEUE_BATCH_MS, QUEUE_INTERACTIVE_MS, QUEUE_REQUESTS_MAX};
use baton_core::{Lane, RequestId};

/// Over how long ends of requests are counted.
const RATE_WINDOW_MS: u64 = 4_000;
/// Ends counted together.
const RATE_STEP_MS: u64 = 100;
/// Requests must have waited in so many steps before a rate is believed.
const RATE_STEPS_MIN: usize = 5;
/// Counters of tenants are forgotten when nobody has waited for so long.
const LULL_MS: u64 = 1_000;
const RETRY_MS_MIN: u64 = 100;
const RETRY_MS_MAX: u64 = 30_000;
/// Heads of lines that one look at a model's queue names.
const HEADS_MAX: usize = 16;

/// Names one waiting request; later ones are larger.
pub(super) type Ticket = u64;

/// A request that would wait.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) request: RequestId,
    pub(super) model: String,
    pub(super) tenant: String,
    pub(super) lane: Lane,
    /// Tokens it may take.
    pub(super) cost: u64,
    /// From now; its own deadline, if that is sooner than its lane's budget.
    pub(super) patience_ms: u64,
}

/// It does not come in: it would wait too long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TooLong {
    pub(super) retry_after_ms: u64,
    /// How far apart those who are refused should come again; 0: not known.
    pub(super) retry_step_us: u64,
    pub(super) detail: String,
}

struct Waiting {
    entry: Entry,
    until_ms: u64,
}

/// Those that wait for one model in one lane, by tenant, first come first.
type Line = BTreeMap<String, BTreeSet<Ticket>>;

#[derive(Default)]
pub(super) struct Queue {
    waiting: BTreeMap<Ticket, Waiting>,
    tickets: Ticket,
    lines: BTreeMap<String, [Line; 2]>,
    by_request: BTreeSet<(RequestId, Ticket)>,
    until: BTreeSet<(u64, Ticket)>,
    count: [usize; 2],
    /// Tokens each tenant has been given while others waited.
    given: BTreeMap<String, u64>,
    /// When somebody last waited.
    busy_ms: u64,
    rates: BTreeMap<String, Rate>,
}

pub(super) fn budget_ms(lane: Lane) -> u64 {
    match lane {
        Lane::Interactive => QUEUE_INTERACTIVE_MS,
        Lane::Batch => QUEUE_BATCH_MS,
    }
}

fn place_of(lane: Lane) -> usize {
    match lane {
        Lane::Interactive => 0,
        Lane::Batch => 1,
    }
}

impl Queue {
    pub(super) fn len(&self, lane: Lane) -> usize {
        self.count[place_of(lane)]
    }

    /// Models that somebody waits for.
    pub(super) fn models(&self) -> Vec<String> {
        self.lines.keys().cloned().collect()
    }

    /// Whether a request that comes now finds others before it.
    pub(super) fn is_behind(&self, model: &str, lane: Lane) -> bool {
        let Some(lines) = self.lines.get(model) else { return false };
        lines[..=place_of(lane)].iter().any(|line| !line.is_empty())
    }

    /// Lets a request wait, or says at once that it would wait too long.
    pub(super) fn enter(&mut self, now_ms: u64, entry: Entry) -> Result<Ticket, TooLong> {
        let lane = place_of(entry.lane);
        let budget_ms = budget_ms(entry.lane).min(entry.patience_ms);
        let ahead = self.ahead(&entry);
        let wait_ms = self.rates.get(&entry.model).and_then(|rate| rate.wait_ms(ahead + 1, now_ms));
        let retry_step_us = self.turn_us(now_ms, &entry.model);
        let too_long = |wait_ms: u64, detail| {
            let retry_after_ms = wait_ms.saturating_sub(budget_ms).clamp(RETRY_MS_MIN, RETRY_MS_MAX);
            Err(TooLong { retry_after_ms, retry_step_us, detail })
        };
        if let Some(wait_ms) = wait_ms.filter(|wait_ms| *wait_ms > budget_ms) {
            return too_long(wait_ms, format!("{ahead} before it, about {wait_ms} ms; it may wait {budget_ms} ms"));
        }
        if self.count[lane] >= QUEUE_REQUESTS_MAX {
            return too_long(wait_ms.unwrap_or(0) + budget_ms, format!("{QUEUE_REQUESTS_MAX} wait in its lane"));
        }
        self.forget_after_lull(now_ms);
        self.catch_up(&entry.tenant);
        self.tickets += 1;
        let (ticket, until_ms) = (self.tickets, now_ms.saturating_add(budget_ms));
        let lines = self.lines.entry(entry.model.clone()).or_default();
        lines[lane].entry(entry.tenant.clone()).or_default().insert(ticket);
        self.by_request.insert((entry.request, ticket));
        self.until.insert((until_ms, ticket));
        self.count[lane] += 1;
        self.waiting.insert(ticket, Waiting { entry, until_ms });
        Ok(ticket)
    }

    /// Requests that will have their turn before this one, if all cost the same.
    fn ahead(&self, entry: &Entry) -> u64 {
        let Some(lines) = self.lines.get(&entry.model) else { return 0 };
        let lane = place_of(entry.lane);
        let better: usize = lines[..lane].iter().flat_map(BTreeMap::values).map(BTreeSet::len).sum();
        let own = lines[lane].get(&entry.tenant).map_or(0, BTreeSet::len);
        let others = lines[lane].iter().filter(|(tenant, _)| **tenant != entry.tenant);
        let shared: usize = others.map(|(_, line)| line.len().min(own + 1)).sum();
        (better + own + shared) as u64
    }

    /// A tenant that had nothing waiting does not save up turns.
    fn catch_up(&mut self, tenant: &str) {
        let waits = |tenant: &str| self.lines.values().flatten().any(|line| line.contains_key(tenant));
        if waits(tenant) {
            return;
        }
        let least = self.lines.values().flatten().flat_map(BTreeMap::keys).filter_map(|t| self.given.get(t)).min();
        let least = least.copied().unwrap_or(0);
        let given = self.given.entry(tenant.to_string()).or_insert(least);
        *given = least.max(*given);
    }

    fn forget_after_lull(&mut self, now_ms: u64) {
        if self.waiting.is_empty() && now_ms > self.busy_ms + LULL_MS {
            self.given.clear();
        }
        self.busy_ms = self.busy_ms.max(now_ms);
    }

    /// Whose turn it is for a model: the first of each tenant, in the order in which to try them.
    pub(super) fn heads(&self, model: &str) -> Vec<Ticket> {
        let mut heads = Vec::new();
        for line in self.lines.get(model).into_iter().flatten() {
            let given = |tenant: &String| self.given.get(tenant).copied().unwrap_or(0);
            let mut tenants: Vec<(u64, Ticket)> =
                line.iter().filter_map(|(tenant, tickets)| Some((given(tenant), *tickets.first()?))).collect();
            tenants.sort_unstable();
            heads.extend(tenants.into_iter().map(|(_, ticket)| ticket));
        }
        heads.truncate(HEADS_MAX);
        heads
    }

    /// It has been given workers.
    pub(super) fn placed(&mut self, now_ms: u64, ticket: Ticket) {
        if let Some(entry) = self.remove(ticket) {
            let given = self.given.entry(entry.tenant).or_default();
            *given = given.saturating_add(entry.cost.max(1));
            self.busy_ms = self.busy_ms.max(now_ms);
        }
    }

    /// Its caller has gone away, or has been answered otherwise. False: it does not wait any more.
    pub(super) fn leave(&mut self, ticket: Ticket) -> bool {
        self.remove(ticket).is_some()
    }

    fn remove(&mut self, ticket: Ticket) -> Option<Entry> {
        let Waiting { entry, until_ms } = self.waiting.remove(&ticket)?;
        let lane = place_of(entry.lane);
        self.until.remove(&(until_ms, ticket));
        self.by_request.remove(&(entry.request, ticket));
        self.count[lane] -= 1;
        let lines = self.lines.get_mut(&entry.model).expect("those that wait stand in a line");
        let line = lines[lane].get_mut(&entry.tenant).expect("those that wait stand in a line");
        line.remove(&ticket);
        if line.is_empty() {
            lines[lane].remove(&entry.tenant);
        }
        if lines.iter().all(BTreeMap::is_empty) {
            self.lines.remove(&entry.model);
        }
        Some(entry)
    }

    /// The tickets of a request that waits.
    pub(super) fn of_request(&self, request: RequestId) -> Vec<Ticket> {
        self.by_request.range((request, 0)..=(request, Ticket::MAX)).map(|(_, ticket)| *ticket).collect()
    }

    /// Those whose budget is used up; they wait no more.
    pub(super) fn overdue(&mut self, now_ms: u64) -> Vec<Ticket> {
        let due: Vec<Ticket> =
            self.until.iter().take_while(|(until, _)| *until <= now_ms).map(|(_, ticket)| *ticket).collect();
        due.iter().for_each(|ticket| drop(self.remove(*ticket)));
        due
    }

    /// All of them; nobody waits any more.
    pub(super) fn clear(&mut self) -> Vec<Ticket> {
        let all: Vec<Ticket> = self.waiting.keys().copied().collect();
        all.iter().for_each(|ticket| drop(self.remove(*ticket)));
        all
    }

    /// Requests of this model have ended.
    pub(super) fn ended(&mut self, now_ms: u64, model: &str, count: u64) {
        if self.lines.contains_key(model) {
            self.rate(now_ms, model).ended(now_ms, count);
        }
    }

    /// Time passes while somebody waits; to be told often.
    pub(super) fn pass(&mut self, now_ms: u64) {
        for model in self.models() {
            self.rate(now_ms, &model).ended(now_ms, 0);
        }
    }

    fn rate(&mut self, now_ms: u64, model: &str) -> &mut Rate {
        if !self.rates.contains_key(model) {
            self.rates.retain(|_, rate| rate.is_recent(now_ms));
        }
        self.rates.entry(model.to_string()).or_default()
    }

    /// When a request of this lane is worth another try.
    pub(super) fn retry_after_ms(&self, now_ms: u64, model: &str, lane: Lane) -> u64 {
        let behind: usize = self
            .lines
            .get(model)
            .map_or(0, |lines| lines[..=place_of(lane)].iter().flat_map(BTreeMap::values).map(BTreeSet::len).sum());
        let wait_ms = self.rates.get(model).and_then(|rate| rate.wait_ms(behind as u64 + 1, now_ms));
        wait_ms.unwrap_or(budget_ms(lane)).clamp(RETRY_MS_MIN, RETRY_MS_MAX)
    }

    /// From one turn to the next; 0 when too little is known.
    pub(super) fn turn_us(&self, now_ms: u64, model: &str) -> u64 {
        const MANY: u64 = 1_000;
        self.rates.get(model).and_then(|rate| rate.wait_ms(MANY, now_ms)).unwrap_or(0)
    }
}

/// How many requests ended lately while others waited.
#[derive(Default)]
struct Rate {
    /// (step, ends in it) of the steps in which somebody waited, oldest first.
    steps: VecDeque<(u64, u64)>,
    sum: u64,
}

impl Rate {
    fn ended(&mut self, now_ms: u64, count: u64) {
        let step = now_ms / RATE_STEP_MS;
        match self.steps.back_mut() {
            Some((last, ends)) if *last >= step => *ends += count,
            _ => self.steps.push_back((step, count)),
        }
        self.sum += count;
        while let Some((oldest, ends)) = self.steps.front().copied()
            && oldest + RATE_WINDOW_MS / RATE_STEP_MS < step
        {
            self.steps.pop_front();
            self.sum -= ends;
        }
    }

    fn is_recent(&self, now_ms: u64) -> bool {
        self.steps.back().is_some_and(|(step, _)| now_ms < step * RATE_STEP_MS + RATE_WINDOW_MS)
    }

    /// How long until `count` more have ended; None when too little is known.
    fn wait_ms(&self, count: u64, now_ms: u64) -> Option<u64> {
        if !self.is_recent(now_ms) || self.steps.len() < RATE_STEPS_MIN {
            return None;
        }
        let span_ms = self.steps.len() as u64 * RATE_STEP_MS;
        Some(count.saturating_mul(span_ms) / self.sum.max(1))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(request: u128, tenant: &str, lane: Lane, cost: u64) -> Entry {
        Entry {
            request: RequestId(request),
            model: "m".into(),
            tenant: tenant.into(),
            lane,
            cost,
            patience_ms: 600_000,
        }
    }

    #[test]
    fn interactive_comes_before_batch_and_tenants_take_turns() {
        let mut queue = Queue::default();
        let mut enter = |request, tenant, lane| queue.enter(0, entry(request, tenant, lane, 10)).unwrap();
        let batch = enter(1, "a", Lane::Batch);
        let (a1, a2, b1) =
            (enter(2, "a", Lane::Interactive), enter(3, "a", Lane::Interactive), enter(4, "b", Lane::Interactive));
        let mut order = Vec::new();
        while let Some(ticket) = queue.heads("m").first().copied() {
            queue.placed(0, ticket);
            order.push(ticket);
        }
        assert_eq!(order, [a1, b1, a2, batch]);
        assert!(queue.waiting.is_empty() && queue.lines.is_empty());
    }

    /// Goal: who asks ten times as much is not given ten times as much. Method: two backlogs of unequal cost.
    #[test]
    fn tokens_are_shared_not_turns() {
        let mut queue = Queue::default();
        for request in 0..100 {
            queue.enter(0, entry(request, "large", Lane::Interactive, 100)).unwrap();
            queue.enter(0, entry(1000 + request, "small", Lane::Interactive, 10)).unwrap();
        }
        let mut given = BTreeMap::from([("large".to_string(), 0), ("small".to_string(), 0)]);
        for _ in 0..55 {
            let ticket = queue.heads("m")[0];
            let Entry { tenant, cost, .. } = queue.waiting[&ticket].entry.clone();
            *given.get_mut(&tenant).unwrap() += cost;
            queue.placed(0, ticket);
        }
        assert!(given["large"].abs_diff(given["small"]) <= 100, "{given:?}");
    }

    #[test]
    fn a_tenant_that_comes_late_does_not_starve_the_others() {
        let mut queue = Queue::default();
        for request in 0..20 {
            queue.enter(0, entry(request, "early", Lane::Interactive, 10)).unwrap();
        }
        (0..10).for_each(|_| queue.placed(0, queue.heads("m")[0]));
        for request in 100..120 {
            queue.enter(0, entry(request, "late", Lane::Interactive, 10)).unwrap();
        }
        let mut late = 0;
        for _ in 0..10 {
            let ticket = queue.heads("m")[0];
            late += u32::from(queue.waiting[&ticket].entry.tenant == "late");
            queue.placed(0, ticket);
        }
        assert_eq!(late, 5);
    }

    /// Goal: what would wait longer than its lane allows is refused at once. Method: ten requests end a second.
    #[test]
    fn a_wait_over_the_budget_is_refused_at_once() {
        let mut queue = Queue::default();
        queue.enter(0, entry(1_000, "t", Lane::Batch, 1)).unwrap();
        (0..40).for_each(|at| queue.ended(at * 100, "m", 1));
        let now = 4_000;
        let mut entered = 0;
        let refused = loop {
            match queue.enter(now, entry(entered, "t", Lane::Interactive, 1)) {
                Ok(_) => entered += 1,
                Err(refused) => break refused,
            }
        };
        assert!((18..=22).contains(&entered), "{entered} may wait 2 s at 10 a second");
        assert!(refused.retry_after_ms >= RETRY_MS_MIN, "{refused:?}");
        assert_eq!(refused.retry_step_us, 100_000, "the next turn is a tenth of a second later");
        assert!(queue.enter(now, entry(999, "t", Lane::Batch, 1)).is_ok(), "batch may wait longer");
        assert!(queue.enter(now, entry(998, "other", Lane::Interactive, 1)).is_ok(), "its tenant has had no turn yet");
    }

    /// Goal: a crowd that comes at once to a cluster that had little to do is not refused for how little that was.
    /// Method: one request ends a second and nobody waits; then many come.
    #[test]
    fn little_asked_is_not_little_that_can_be_served() {
        let mut queue = Queue::default();
        (0..10).for_each(|at| queue.ended(at * 1_000, "m", 1));
        for request in 0..100 {
            queue.enter(10_000, entry(request, "t", Lane::Interactive, 1)).unwrap();
        }
        (0..20).for_each(|at| queue.pass(10_000 + at * 100));
        let refused = queue.enter(12_000, entry(100, "t", Lane::Interactive, 1)).unwrap_err();
        assert!(refused.retry_after_ms > 2_000, "nothing has ended in two seconds of waiting: {refused:?}");
    }

    #[derive(Clone, Debug)]
    enum Event {
        Enter { request: u128, tenant: u8, batch: bool, cost: u64, patience_ms: u64 },
        Place,
        Leave(u64),
        Overdue,
        Ended(u64),
        Pass(u64),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            4 => (0u128..30, 0u8..3, any::<bool>(), 1u64..50, 1u64..4000).prop_map(
                |(request, tenant, batch, cost, patience_ms)| Event::Enter { request, tenant, batch, cost, patience_ms }
            ),
            2 => Just(Event::Place),
            1 => (0u64..40).prop_map(Event::Leave),
            1 => Just(Event::Overdue),
            1 => (1u64..20).prop_map(Event::Ended),
            2 => (0u64..800).prop_map(Event::Pass),
        ]
    }

    proptest! {
        /// Whatever happens: nothing waits past its budget or deadline, each leaves once, turns of one tenant and lane
        /// are first come first, batch never goes before interactive, and the counts are right.
        #[test]
        fn the_queue_keeps_its_promises(events in proptest::collection::vec(event(), 0..120)) {
            let mut queue = Queue::default();
            let (mut now, mut inside) = (0u64, BTreeMap::new());
            for event in events {
                match event {
                    Event::Enter { request, tenant, batch, cost, patience_ms } => {
                        let lane = if batch { Lane::Batch } else { Lane::Interactive };
                        let entry = Entry { patience_ms, ..entry(request, &tenant.to_string(), lane, cost) };
                        if let Ok(ticket) = queue.enter(now, entry) {
                            prop_assert!(queue.is_behind("m", Lane::Batch));
                            inside.insert(ticket, (now + patience_ms.min(budget_ms(lane)), tenant, lane));
                        }
                    }
                    Event::Place => {
                        let Some(ticket) = queue.heads("m").first().copied() else { continue };
                        queue.placed(now, ticket);
                        let (_, tenant, lane) = inside.remove(&ticket).expect("it waited");
                        let earlier = |(other, (_, t, l)): (&u64, &(u64, u8, Lane))| *other < ticket && *t == tenant && *l == lane;
                        prop_assert!(!inside.iter().any(earlier), "first come, first served");
                        prop_assert!(lane == Lane::Interactive || queue.len(Lane::Interactive) == 0);
                    }
                    Event::Leave(ticket) => prop_assert_eq!(queue.leave(ticket), inside.remove(&ticket).is_some()),
                    Event::Overdue => {
                        for ticket in queue.overdue(now) {
                            prop_assert!(inside.remove(&ticket).expect("it waited").0 <= now);
                        }
                        prop_assert!(inside.values().all(|(until, ..)| *until > now), "past its budget");
                    }
                    Event::Ended(count) => queue.ended(now, "m", count),
                    Event::Pass(ms) => now += ms,
                }
                prop_assert_eq!(queue.len(Lane::Interactive) + queue.len(Lane::Batch), inside.len());
                let lanes = inside.values().filter(|(_, _, lane)| *lane == Lane::Batch).count();
                prop_assert_eq!(queue.len(Lane::Batch), lanes);
                prop_assert_eq!((queue.until.len(), queue.by_request.len()), (inside.len(), inside.len()));
            }
            prop_assert_eq!(queue.clear().len(), inside.len());
            prop_assert!(queue.waiting.is_empty() && queue.lines.is_empty());
        }
    }
}
