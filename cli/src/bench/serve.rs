//! `baton bench serve`: load on an OpenAI-compatible endpoint, closed-loop or Poisson, and what its clients saw.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use baton_core::Rng;
use baton_proto::TcpNet;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::figure::{self, Figure};
use super::percentile::Distribution;
use crate::exit::Failure;
use crate::http::{Client, HttpError};
use crate::out::say;
use crate::table;

/// Which of OpenAI's endpoints is asked.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Endpoint {
    Chat,
    Completions,
}

/// Measure an OpenAI-compatible endpoint.
///
/// Prompts are random words, different in every request, whose number is tuned by one request before the measurement
/// until the endpoint counts --prompt-tokens. The answers' lengths are what the model gives, at most --max-tokens.
#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes:\n  0  every request succeeded\n  1  at least one request failed\n  2  bad flags, or no endpoint there"
)]
pub(crate) struct ServeFlags {
    /// Address of the endpoint, with or without /v1
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    /// Model to ask for [default: the first the endpoint lists]
    #[arg(long)]
    model: Option<String>,
    /// Which API to use
    #[arg(long, value_enum, default_value = "chat")]
    endpoint: Endpoint,
    /// Requests to send in total
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    requests: u64,
    /// Closed loop: so many requests are open at any time [default: 8]
    #[arg(long, conflicts_with = "rate", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    concurrency: Option<u64>,
    /// Open loop: so many requests a second on average, at Poisson-distributed moments
    #[arg(long)]
    rate: Option<f64>,
    /// Prompt tokens of each request, about
    #[arg(long, default_value_t = 128)]
    prompt_tokens: u64,
    /// Tokens to generate at most in each request
    #[arg(long, default_value_t = 64)]
    max_tokens: u64,
    /// Generate --max-tokens even after the model's end of text (vLLM's and Baton's `ignore_eos`)
    #[arg(long)]
    ignore_eos: bool,
    /// Sampling temperature
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Fixes prompts and arrival times [default: random, and printed]
    #[arg(long)]
    seed: Option<u64>,
    /// Seconds after which a request counts as failed
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Key to send as bearer token [default: OPENAI_API_KEY, if set]
    #[arg(long)]
    api_key: Option<String>,
    /// Print one JSON object a line for each figure instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(flags: ServeFlags) -> Result<(), Failure> {
    let bad_rate = flags.rate.is_some_and(|rate| !(rate.is_finite() && rate > 0.0));
    if bad_rate {
        return Err(Failure::refuse("--rate must be above 0"));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(measure(flags))
}

async fn measure(flags: ServeFlags) -> Result<(), Failure> {
    let seed = crate::seed::seed(flags.seed)?;
    let mut rng = Rng::new(seed);
    let key = flags.api_key.clone().or_else(|| crate::surroundings::variable("OPENAI_API_KEY"));
    let client = Client::new(Arc::new(TcpNet), &flags.url, key).map_err(Failure::refused)?;
    let model = match &flags.model {
        Some(model) => model.clone(),
        None => client
            .first_model()
            .await
            .map_err(Failure::refused)?
            .ok_or_else(|| Failure::refuse(format!("{} lists no model; name one with --model", flags.url)))?,
    };
    let mut load = Load { client, flags, model, words: 0 };
    load.words = load.tune(&mut rng).await.map_err(Failure::refused)?;

    let load = Arc::new(load);
    let started = Instant::now();
    let outcomes = load.clone().drive(&mut rng).await;
    let report = Report::new(&outcomes, started.elapsed());
    eprintln!("seed {seed}");
    match load.flags.json {
        true => figure::print(&report.figures()),
        false => say!("{}", report.text()),
    }
    match report.failed() {
        0 => Ok(()),
        failed => Err(anyhow::anyhow!("{failed} of {} requests failed", outcomes.len()).into()),
    }
}

/// What is sent, and to whom.
struct Load {
    client: Client,
    flags: ServeFlags,
    model: String,
    /// Words that make `--prompt-tokens` tokens.
    words: u64,
}

/// What one request's client saw.
#[derive(Clone, Debug, PartialEq)]
struct Sample {
    ttft: Duration,
    /// Between one event with text and the next.
    gaps: Vec<Duration>,
    total: Duration,
    prompt_tokens: u64,
    cached_tokens: u64,
    tokens: u64,
}

/// A request that failed, by kind.
#[derive(Clone, Debug, PartialEq)]
struct Failed(String);

type Outcome = Result<Sample, Failed>;

impl Load {
    /// Asks with a guess and corrects it by what the endpoint counted.
    async fn tune(&self, rng: &mut Rng) -> Result<u64, HttpError> {
        let wanted = self.flags.prompt_tokens.max(1);
        let mut words = wanted.div_ceil(2);
        for _ in 0..3 {
            let mut body = self.body(words, rng);
            body["max_tokens"] = 1.into();
            body["stream"] = false.into();
            body.as_object_mut().expect("a body is an object").remove("stream_options");
            let answer = self.client.json(self.path(), Some(&body)).await?;
            let Some(counted) = answer["usage"]["prompt_tokens"].as_u64().filter(|&n| n > 0) else { return Ok(wanted) };
            words = (words * wanted / counted).max(1);
        }
        Ok(words)
    }

    fn path(&self) -> &'static str {
        match self.flags.endpoint {
            Endpoint::Chat => "/v1/chat/completions",
            Endpoint::Completions => "/v1/completions",
        }
    }

    fn body(&self, words: u64, rng: &mut Rng) -> Value {
        let text = prompt(words, rng);
        let mut body = json!({
            "model": self.model,
            "max_tokens": self.flags.max_tokens,
            "temperature": self.flags.temperature,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        match self.flags.endpoint {
            Endpoint::Chat => body["messages"] = json!([{"role": "user", "content": text}]),
            Endpoint::Completions => body["prompt"] = text.into(),
        }
        if self.flags.ignore_eos {
            body["ignore_eos"] = true.into();
        }
        body
    }

    async fn drive(self: Arc<Load>, rng: &mut Rng) -> Vec<Outcome> {
        let bar = progress(self.flags.requests);
        let outcomes = match self.flags.rate {
            Some(rate) => self.open_loop(rate, rng, &bar).await,
            None => self.closed_loop(rng, &bar).await,
        };
        bar.finish_and_clear();
        outcomes
    }

    /// Starts a request whenever one has ended.
    async fn closed_loop(self: Arc<Load>, rng: &mut Rng, bar: &ProgressBar) -> Vec<Outcome> {
        let limit = self.flags.concurrency.unwrap_or(8) as usize;
        let (mut open, mut outcomes) = (JoinSet::new(), Vec::new());
        for _ in 0..self.flags.requests {
            if open.len() == limit {
                outcomes.extend(next(&mut open, bar).await);
            }
            open.spawn(self.clone().ask(rng.fork()));
        }
        outcomes.extend(rest(open, bar).await);
        outcomes
    }

    /// Starts requests at moments whose distances are exponentially distributed, whatever has ended by then.
    async fn open_loop(self: Arc<Load>, rate: f64, rng: &mut Rng, bar: &ProgressBar) -> Vec<Outcome> {
        let (mut open, mut outcomes) = (JoinSet::new(), Vec::new());
        let mut moment = Instant::now();
        for _ in 0..self.flags.requests {
            moment += Duration::from_secs_f64(-(1.0 - rng.f64()).ln() / rate);
            while tokio::time::timeout_at(moment, next(&mut open, bar)).await.is_ok_and(|outcome| {
                let more = outcome.is_some();
                outcomes.extend(outcome);
                more
            }) {}
            tokio::time::sleep_until(moment).await;
            open.spawn(self.clone().ask(rng.fork()));
        }
        outcomes.extend(rest(open, bar).await);
        outcomes
    }

    async fn ask(self: Arc<Load>, mut rng: Rng) -> Outcome {
        let body = self.body(self.words, &mut rng);
        let limit = Duration::from_secs(self.flags.timeout);
        tokio::time::timeout(limit, self.stream(&body)).await.unwrap_or_else(|_| Err(Failed("timeout".into())))
    }

    async fn stream(&self, body: &Value) -> Outcome {
        let started = Instant::now();
        let broken = |error: HttpError| Failed(error.kind());
        let mut answer = self.client.open(self.path(), Some(body)).await.map_err(broken)?;
        let mut reading = Reading::default();
        while let Some(event) = answer.event().await.map_err(broken)? {
            reading.take(&event, started.elapsed())?;
        }
        reading.sample(started.elapsed())
    }
}

async fn next(open: &mut JoinSet<Outcome>, bar: &ProgressBar) -> Option<Outcome> {
    let ended = open.join_next().await?;
    bar.inc(1);
    Some(ended.unwrap_or_else(|_| Err(Failed("the benchmark itself failed".into()))))
}

async fn rest(mut open: JoinSet<Outcome>, bar: &ProgressBar) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    while let Some(outcome) = next(&mut open, bar).await {
        outcomes.push(outcome);
    }
    outcomes
}

/// One stream's events as they come.
#[derive(Debug, Default)]
struct Reading {
    /// When each event with text came.
    moments: Vec<Duration>,
    usage: Option<Value>,
    finished: bool,
    done: bool,
}

impl Reading {
    fn take(&mut self, event: &str, at: Duration) -> Result<(), Failed> {
        if event == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let event: Value = serde_json::from_str(event).map_err(|_| Failed("event no JSON".into()))?;
        if let Some(error) = event.get("error") {
            let kind = error["code"].as_str().or(error["type"].as_str()).unwrap_or("unknown");
            return Err(Failed(format!("stream error: {kind}")));
        }
        if let Some(usage) = event.get("usage").filter(|usage| usage.is_object()) {
            self.usage = Some(usage.clone());
        }
        for choice in event["choices"].as_array().into_iter().flatten() {
            let text = choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
            if !text.is_empty() {
                self.moments.push(at);
            }
            self.finished |= choice["finish_reason"].is_string();
        }
        Ok(())
    }

    fn sample(self, total: Duration) -> Outcome {
        if !(self.done && self.finished) {
            return Err(Failed("stream cut short".into()));
        }
        let usage = self.usage.unwrap_or_default();
        let count = |value: &Value| value.as_u64();
        Ok(Sample {
            ttft: self.moments.first().copied().unwrap_or(total),
            gaps: self.moments.windows(2).map(|pair| pair[1] - pair[0]).collect(),
            total,
            prompt_tokens: count(&usage["prompt_tokens"]).unwrap_or(0),
            cached_tokens: count(&usage["prompt_tokens_details"]["cached_tokens"]).unwrap_or(0),
            tokens: count(&usage["completion_tokens"]).unwrap_or(self.moments.len() as u64),
        })
    }
}

/// Random words, so that no two requests share a prefix.
fn prompt(words: u64, rng: &mut Rng) -> String {
    const WORDS: [&str; 32] = [
        "river", "stone", "lantern", "quiet", "seven", "garden", "paper", "winter", "copper", "morning", "bridge",
        "letter", "harbor", "silver", "window", "forest", "candle", "market", "shadow", "orange", "thunder", "meadow",
        "castle", "pocket", "needle", "basket", "island", "mirror", "ribbon", "violet", "hammer", "saddle",
    ];
    let word = |rng: &mut Rng| WORDS[rng.below(WORDS.len() as u64) as usize];
    (0..words).map(|_| word(rng)).collect::<Vec<_>>().join(" ")
}

fn progress(requests: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} requests, {elapsed} elapsed, {eta} left");
    ProgressBar::new(requests).with_style(style.expect("the template is well-formed"))
}

/// The figures of a run.
struct Report {
    elapsed: Duration,
    requests: usize,
    errors: BTreeMap<String, usize>,
    prompt_tokens: u64,
    cached_tokens: u64,
    tokens: u64,
    /// (name, what people call it, milliseconds)
    latencies: [(&'static str, &'static str, Distribution); 4],
}

impl Report {
    fn new(outcomes: &[Outcome], elapsed: Duration) -> Report {
        let samples = || outcomes.iter().flatten();
        let mut errors = BTreeMap::new();
        for Failed(kind) in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
            *errors.entry(kind.clone()).or_default() += 1;
        }
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let decode = |s: &Sample| ms(s.total - s.ttft) / (s.tokens - 1) as f64;
        Report {
            elapsed,
            requests: outcomes.len(),
            errors,
            prompt_tokens: samples().map(|s| s.prompt_tokens).sum(),
            cached_tokens: samples().map(|s| s.cached_tokens).sum(),
            tokens: samples().map(|s| s.tokens).sum(),
            latencies: [
                ("ttft", "time to first token", samples().map(|s| ms(s.ttft)).collect()),
                ("itl", "inter-token latency", samples().flat_map(|s| s.gaps.iter().map(|gap| ms(*gap))).collect()),
                ("tpot", "time per output token", samples().filter(|s| s.tokens > 1).map(decode).collect()),
                ("e2e", "end to end", samples().map(|s| ms(s.total)).collect()),
            ],
        }
    }

    fn failed(&self) -> usize {
        self.errors.values().sum()
    }

    fn per_second(&self, count: f64) -> f64 {
        count / self.elapsed.as_secs_f64().max(1e-9)
    }

    fn totals(&self) -> Vec<Figure> {
        let complete = self.requests - self.failed();
        vec![
            Figure::new("requests", self.requests as f64, "requests"),
            Figure {
                ok: self.failed() == 0,
                target: Some(0.0),
                ..Figure::new("failed", self.failed() as f64, "requests")
            },
            Figure::new("duration", self.elapsed.as_secs_f64(), "s"),
            Figure::new("request_throughput", self.per_second(complete as f64), "requests/s"),
            Figure::new("output_throughput", self.per_second(self.tokens as f64), "tokens/s"),
            Figure::new("total_throughput", self.per_second((self.tokens + self.prompt_tokens) as f64), "tokens/s"),
            Figure::new("prompt_tokens", self.prompt_tokens as f64, "tokens"),
            Figure::new("cached_tokens", self.cached_tokens as f64, "tokens"),
            Figure::new("output_tokens", self.tokens as f64, "tokens"),
        ]
    }

    fn figures(&self) -> Vec<Figure> {
        let mut figures = self.totals();
        for (kind, count) in &self.errors {
            figures.push(Figure { ok: false, ..Figure::new(format!("failed: {kind}"), *count as f64, "requests") });
        }
        for (name, _, values) in &self.latencies {
            for (column, value) in columns(values) {
                figures.extend(value.map(|value| Figure::new(format!("{name}_{column}"), value, "ms")));
            }
        }
        figures
    }

    fn text(&self) -> String {
        let number = |value: f64| if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") };
        let totals: Vec<_> =
            self.totals().iter().map(|f| vec![f.name.replace('_', " "), number(f.value), f.unit.to_string()]).collect();
        let errors: Vec<_> = self.errors.iter().map(|(kind, count)| vec![kind.clone(), count.to_string()]).collect();
        let latencies: Vec<_> = self
            .latencies
            .iter()
            .map(|(_, title, values)| {
                let cells = columns(values).map(|(_, value)| value.map_or("-".to_string(), |v| format!("{v:.2}")));
                std::iter::once(title.to_string()).chain(cells).collect()
            })
            .collect();
        let mut text = table::render(&["TOTAL", "VALUE", "UNIT"], &totals) + "\n";
        text += &table::render(&["MILLISECONDS", "MEAN", "P50", "P90", "P99", "MAX"], &latencies);
        if !errors.is_empty() {
            text += &format!("\n{}", table::render(&["FAILED BECAUSE", "REQUESTS"], &errors));
        }
        text
    }
}

fn columns(values: &Distribution) -> [(&'static str, Option<f64>); 5] {
    [
        ("mean", values.mean()),
        ("p50", values.percentile(50.0)),
        ("p90", values.percentile(90.0)),
        ("p99", values.percentile(99.0)),
        ("max", values.max()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn read(events: &[(&str, u32)]) -> Outcome {
        let mut reading = Reading::default();
        for (event, at) in events {
            reading.take(event, MS * *at)?;
        }
        reading.sample(MS * 100)
    }

    const ROLE: &str = r#"{"choices":[{"delta":{"role":"assistant"}}]}"#;
    const A: &str = r#"{"choices":[{"delta":{"content":"a"}}]}"#;
    const END: &str = r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#;
    const USAGE: &str = r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4,"prompt_tokens_details":{"cached_tokens":3}}}"#;

    #[test]
    fn a_stream_becomes_a_sample() {
        let sample = read(&[(ROLE, 5), (A, 10), (A, 12), (A, 20), (END, 20), (USAGE, 21), ("[DONE]", 21)]).unwrap();
        assert_eq!((sample.ttft, sample.gaps), (MS * 10, vec![MS * 2, MS * 8]));
        assert_eq!((sample.prompt_tokens, sample.cached_tokens, sample.tokens), (9, 3, 4));
    }

    #[test]
    fn a_stream_that_does_not_end_well_is_a_failure() {
        let kind = |events: &[(&str, u32)]| read(events).unwrap_err().0;
        assert_eq!(kind(&[(A, 1)]), "stream cut short");
        assert_eq!(kind(&[(A, 1), ("[DONE]", 2)]), "stream cut short");
        assert_eq!(kind(&[(r#"{"error":{"type":"server_error","code":"aborted"}}"#, 1)]), "stream error: aborted");
        assert_eq!(kind(&[("{", 1)]), "event no JSON");
    }

    #[test]
    fn figures_count_failures_by_kind() {
        let sample = read(&[(A, 10), (A, 20), (END, 30), (USAGE, 30), ("[DONE]", 30)]);
        let cut = || Err(Failed("http 429".to_string()));
        let report = Report::new(&[sample, cut(), cut()], Duration::from_secs(2));
        let figures = report.figures();
        let value = |name: &str| figures.iter().find(|f| f.name == name).map(|f| (f.value, f.ok));
        assert_eq!(value("failed"), Some((2.0, false)));
        assert_eq!(value("failed: http 429"), Some((2.0, false)));
        assert_eq!(value("request_throughput"), Some((0.5, true)));
        assert_eq!(value("output_throughput"), Some((2.0, true)));
        assert_eq!(value("ttft_p50"), Some((10.0, true)));
        assert_eq!(value("tpot_mean"), Some((30.0, true)));
        assert!(report.text().contains("http 429"));
    }

    #[test]
    fn prompts_differ_from_request_to_request_and_repeat_with_the_seed() {
        let first = prompt(20, &mut Rng::new(1));
        assert_eq!(first, prompt(20, &mut Rng::new(1)));
        assert_ne!(first, prompt(20, &mut Rng::new(2)));
        assert_eq!(first.split(' ').count(), 20);
    }
}
