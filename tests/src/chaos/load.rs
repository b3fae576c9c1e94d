//! Streams that keep running, each compared with what the undisturbed fleet gave for the same request: greedy and sampled,
//! several choices, penalties, stop strings, log-probabilities, prompts that are prefilled apart and prompts that hit.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Draw;
use crate::client::{Events, NotOpened};
use crate::{Client, Streamed};

/// Different requests; each is answered once undisturbed, then asked for again and again.
pub const REQUESTS: usize = 48;
/// A stream that is silent for so long hangs.
pub(super) const HUNG: Duration = Duration::from_secs(30);
pub(super) const PATH: &str = "/v1/chat/completions";

/// A request by its number. A `salt` keeps it from hitting blocks that others left; the answer is the same.
pub fn body(number: usize, salt: Option<u64>) -> Value {
    let lines = [4, 12, 20, 30][number % 4];
    let line = |i: usize| format!("{} and the {i}th of them went up to the mountain, saying, ", number * 31 + i);
    let tokens = [32, 48, 64, 40, 160][number % 5];
    let mut body = json!({
        "model": "baton-3m", "messages": [{"role": "user", "content": (0..lines).map(line).collect::<String>()}],
        "temperature": 0.8, "seed": number, "max_tokens": tokens, "ignore_eos": true,
    });
    let more = match number % 6 {
        0 => json!({"temperature": 0, "logprobs": true, "top_logprobs": 2}),
        1 => json!({"top_p": 0.9, "logprobs": true}),
        2 => json!({"n": 2, "presence_penalty": 0.4, "frequency_penalty": 0.3, "logprobs": true}),
        3 => json!({"stop": [" and", "the LORD"], "logprobs": true}),
        4 => json!({"n": 3, "repetition_penalty": 1.1, "logit_bias": {"40": 1.5}}),
        _ => json!({"temperature": 0}),
    };
    for (key, value) in more.as_object().into_iter().flatten() {
        body[key] = value.clone();
    }
    if let Some(salt) = salt {
        body["cache_salt"] = salt.to_string().into();
    }
    body
}

/// How a stream ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Same,
    /// A choice has more text than the undisturbed one.
    Doubled(String),
    Wrong(String),
    /// A typed error, before the stream or in it.
    Failed(String),
    /// The connection ended without finish or error.
    Lost,
    Hung,
}

/// One stream as its client saw it.
#[derive(Clone, Debug)]
pub struct Observed {
    pub number: usize,
    /// The answer's id; empty before anything came.
    pub answer: String,
    pub started: Instant,
    /// When each event with something in it came.
    pub moments: Vec<Instant>,
    pub ended: Instant,
    pub verdict: Verdict,
}

impl Observed {
    pub fn open_at(&self, moment: Instant) -> bool {
        self.started < moment && moment < self.ended
    }

    /// The first event came before `moment`.
    pub fn streaming_at(&self, moment: Instant) -> bool {
        self.open_at(moment) && self.moments.first().is_some_and(|first| *first < moment)
    }

    /// The longest silence that begins or goes on within `window` after `moment`, counted from `moment` at the earliest.
    pub fn silence_after(&self, moment: Instant, window: Duration) -> Duration {
        let points = || std::iter::once(self.started).chain(self.moments.iter().copied());
        let pairs = points().zip(points().skip(1).chain([self.ended]));
        let near = pairs.filter(|(from, to)| *to > moment && *from < moment + window);
        near.map(|(from, to)| to - from.max(moment)).max().unwrap_or_default()
    }
}

/// What the fleet answers undisturbed, by number.
pub type Expected = Arc<Vec<Streamed>>;

/// Asks for every request once.
///
/// # Panics
/// If one does not end well.
pub async fn expected(client: &Client) -> Expected {
    let mut expected = Vec::new();
    for number in 0..REQUESTS {
        let streamed = client.stream(PATH, &body(number, None)).await.joined();
        let whole = streamed.done && streamed.error.is_none() && streamed.finish.iter().all(Option::is_some);
        assert!(whole, "request {number} does not end well undisturbed: {streamed:?}");
        expected.push(streamed);
    }
    Arc::new(expected)
}

/// One stream from its start to its end.
pub async fn observe(client: &Client, expected: &Expected, number: usize, salt: Option<u64>) -> Observed {
    observe_told(client, expected, number, salt, None).await
}

/// The same of a client that comes again when a 503 tells it to, which `told` counts.
pub(super) async fn observe_told(
    client: &Client,
    expected: &Expected,
    number: usize,
    salt: Option<u64>,
    told: Option<&AtomicUsize>,
) -> Observed {
    let started = Instant::now();
    let (mut moments, mut answer) = (Vec::new(), String::new());
    let verdict = match open(client, &body(number, salt), told).await {
        Ok(events) => read(events, &expected[number], (&mut moments, &mut answer)).await,
        Err(verdict) => verdict,
    };
    Observed { number, answer, started, moments, ended: Instant::now(), verdict }
}

async fn open(client: &Client, request: &Value, told: Option<&AtomicUsize>) -> Result<Events, Verdict> {
    let started = Instant::now();
    loop {
        match (tokio::time::timeout(HUNG, client.try_open(PATH, request)).await, told) {
            (Err(_), _) => return Err(Verdict::Hung),
            (Ok(Ok(events)), _) => return Ok(events),
            (Ok(Err(NotOpened::Refused { status: 503, retry_after: Some(pause), .. })), Some(told))
                if started.elapsed() < HUNG =>
            {
                told.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(pause).await;
            }
            (Ok(Err(error @ NotOpened::Refused { .. })), _) => return Err(Verdict::Failed(error.to_string())),
            (Ok(Err(NotOpened::Unreachable(_))), _) => return Err(Verdict::Lost),
        }
    }
}

async fn read(mut events: Events, expected: &Streamed, (moments, answer): (&mut Vec<Instant>, &mut String)) -> Verdict {
    loop {
        match tokio::time::timeout(HUNG, events.advance()).await {
            Err(_) => return Verdict::Hung,
            Ok(false) => break,
            Ok(true) => moments.push(Instant::now()),
        }
    }
    *answer = events.answer.take().unwrap_or_default();
    judge(events.so_far.joined(), expected)
}

/// How a stream that has come to its end compares with the undisturbed one.
pub(super) fn judge(streamed: Streamed, expected: &Streamed) -> Verdict {
    if streamed == *expected {
        return Verdict::Same;
    }
    if let Some(error) = &streamed.error {
        return Verdict::Failed(error.to_string());
    }
    if !streamed.done {
        return Verdict::Lost;
    }
    let longer = streamed.text.iter().zip(&expected.text).any(|(got, expected)| got.len() > expected.len());
    let difference = format!("got {streamed:?}, expected {expected:?}");
    if longer { Verdict::Doubled(difference) } else { Verdict::Wrong(difference) }
}

/// Streams kept running until they are told to end.
pub struct Load {
    running: JoinSet<()>,
    end: watch::Sender<bool>,
    observed: Arc<Mutex<Vec<Observed>>>,
}

impl Load {
    /// So many at any time, spread over the gateways.
    pub fn start(clients: &[Client], expected: &Expected, streams: usize, seed: u64) -> Load {
        let (clients, expected) = (clients.to_vec(), expected.clone());
        Load::of(streams, seed, move |nth, number, salt| {
            let (client, expected) = (clients[nth % clients.len()].clone(), expected.clone());
            async move { observe(&client, &expected, number, salt).await }
        })
    }

    /// So many at any time; `ask` asks for a request by its number, for the nth of them.
    pub fn of<A, F>(streams: usize, seed: u64, ask: A) -> Load
    where
        A: Fn(usize, usize, Option<u64>) -> F + Send + Sync + 'static,
        F: Future<Output = Observed> + Send,
    {
        let (end, observed) = (watch::Sender::new(false), Arc::new(Mutex::new(Vec::new())));
        let (mut running, ask) = (JoinSet::new(), Arc::new(ask));
        for nth in 0..streams {
            let (ask, ended, observed) = (ask.clone(), end.subscribe(), observed.clone());
            let mut draw = Draw::new(seed.wrapping_mul(1_000_003).wrapping_add(nth as u64));
            running.spawn(async move {
                while !*ended.borrow() {
                    let number = draw.below(REQUESTS as u64) as usize;
                    let salt = (draw.below(4) > 0).then(|| draw.number());
                    let stream = ask(nth, number, salt).await;
                    // Whoever is refused does not come again at once.
                    let refused = stream.verdict != Verdict::Same;
                    observed.lock().expect("no panic while held").push(stream);
                    if refused {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
            });
        }
        Load { running, end, observed }
    }

    /// Streams that have ended so far.
    pub fn ended(&self) -> usize {
        self.observed.lock().expect("no panic while held").len()
    }

    /// Lets what runs come to its end; gives all that was seen.
    pub async fn finish(mut self) -> Vec<Observed> {
        self.end.send_replace(true);
        while let Some(ended) = self.running.join_next().await {
            ended.expect("a stream's reader does not panic");
        }
        std::mem::take(&mut *self.observed.lock().expect("no panic while held"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(moments: &[u64], ended: u64) -> (Instant, Observed) {
        let zero = Instant::now();
        let at = |ms: &u64| zero + Duration::from_millis(*ms);
        let moments = moments.iter().map(at).collect();
        let answer = String::new();
        (zero, Observed { number: 0, answer, started: zero, moments, ended: at(&ended), verdict: Verdict::Same })
    }

    #[test]
    fn silence_is_counted_from_the_fault() {
        let (zero, stream) = observed(&[10, 20, 500, 510, 3_000], 3_010);
        let after = |ms, window| {
            let silence = stream.silence_after(zero + Duration::from_millis(ms), Duration::from_millis(window));
            silence.as_millis()
        };
        assert_eq!(after(15, 100), 480, "the silence that the fault is in, or one soon after");
        assert_eq!(after(100, 100), 400, "only what lies after the fault");
        assert_eq!(after(495, 10), 10);
        assert_eq!(after(495, 100), 2_490);
        assert!(stream.streaming_at(zero + Duration::from_millis(11)));
        assert!(!stream.streaming_at(zero + Duration::from_millis(9)));
        assert!(!stream.open_at(zero + Duration::from_millis(3_011)));
    }

    #[test]
    fn what_differs_is_told_apart() {
        let text = |text: &str| Streamed { text: vec![text.into()], done: true, ..Streamed::default() };
        let judged = |streamed| judge(streamed, &text("abc"));
        assert_eq!(judged(text("abc")), Verdict::Same);
        assert!(matches!(judged(text("ababc")), Verdict::Doubled(_)));
        assert!(matches!(judged(text("abd")), Verdict::Wrong(_)));
        assert_eq!(judged(Streamed { done: false, ..text("ab") }), Verdict::Lost);
        let failed = Streamed { error: Some(json!({"code": 500})), ..text("ab") };
        assert!(matches!(judged(failed), Verdict::Failed(_)));
    }
}
