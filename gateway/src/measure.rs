//! What the gateway measures: `baton_gateway_*` metrics, vLLM's names for those it can know, and the phases of each
//! request, which add up to its time to first token.

use std::sync::Arc;
use std::time::Duration;

use baton_core::Request;
use baton_proto::v1::Admitted;
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use tokio::time::Instant;
use tracing::{Span, debug_span};

const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const ITL_BUCKETS: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const E2E_BUCKETS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const PHASE_BUCKETS: &[f64] =
    &[0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const TOKENS_BUCKETS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 50_000.0,
    100_000.0, 200_000.0, 500_000.0,
];

/// Bucket bounds by metric name, for whoever installs the recorder.
pub const BUCKETS: &[(&str, &[f64])] = &[
    ("vllm:time_to_first_token_seconds", TTFT_BUCKETS),
    ("baton_gateway_time_to_first_token_seconds", TTFT_BUCKETS),
    ("vllm:inter_token_latency_seconds", ITL_BUCKETS),
    ("baton_gateway_inter_token_latency_seconds", ITL_BUCKETS),
    ("vllm:request_time_per_output_token_seconds", ITL_BUCKETS),
    ("vllm:e2e_request_latency_seconds", E2E_BUCKETS),
    ("baton_gateway_request_seconds", E2E_BUCKETS),
    ("vllm:request_queue_time_seconds", E2E_BUCKETS),
    ("vllm:request_prefill_time_seconds", E2E_BUCKETS),
    ("vllm:request_decode_time_seconds", E2E_BUCKETS),
    ("vllm:request_inference_time_seconds", E2E_BUCKETS),
    ("vllm:request_prompt_tokens", TOKENS_BUCKETS),
    ("vllm:request_generation_tokens", TOKENS_BUCKETS),
    ("vllm:request_params_max_tokens", TOKENS_BUCKETS),
    ("vllm:request_params_n", &[1.0, 2.0, 5.0, 10.0, 20.0]),
    ("baton_gateway_encode_seconds", PHASE_BUCKETS),
    ("baton_gateway_phase_seconds", PHASE_BUCKETS),
];

/// Time spent in the tokenizer.
pub(crate) fn encoded(time: Duration) {
    histogram!("baton_gateway_encode_seconds").record(time);
}

/// An attempt failed, for a reason of `core::Refused` or `core::Aborted`.
pub(crate) fn retried(reason: &'static str) {
    counter!("baton_gateway_attempts_failed_total", "reason" => reason).increment(1);
}

/// A request goes on at other workers, so long after an attempt failed under it.
pub(crate) fn went_on(silent: Duration) {
    histogram!("baton_gateway_failover_seconds").record(silent.as_secs_f64());
}

/// A request was refused on the word of one before it.
pub(crate) fn shed() {
    counter!("baton_gateway_shed_total").increment(1);
}

/// An HTTP request was answered.
pub(crate) fn answered(route: &'static str, status: u16) {
    counter!("baton_gateway_http_responses_total", "route" => route, "status" => status.to_string()).increment(1);
}

/// The end of a request could not be told to the ledger.
pub(crate) fn finish_lost() {
    counter!("baton_gateway_finishes_lost_total").increment(1);
}

/// As many connections are there as may be: further ones wait.
pub(crate) fn connections_full() {
    tracing::warn!("as many connections as there may be: further ones wait");
    counter!("baton_gateway_connections_full_total").increment(1);
}

/// A request goes on without being resumable.
pub(crate) fn unresumable(reason: &'static str) {
    counter!("baton_gateway_unresumable_total", "reason" => reason).increment(1);
}

/// A stream was taken over, or not.
pub(crate) fn resumed(outcome: &'static str) {
    counter!("baton_gateway_resumes_total", "outcome" => outcome).increment(1);
}

/// Questions for an assignment that no coordinator answered.
pub(crate) fn assignments_given_up(count: u64) {
    counter!("baton_gateway_assignments_given_up_total").increment(count);
}

/// A metric under Baton's name and vLLM's.
struct Both<T>(T, T);

impl Both<Histogram> {
    fn record(&self, value: f64) {
        self.0.record(value);
        self.1.record(value);
    }
}

impl Both<Counter> {
    fn add(&self, count: u64) {
        self.0.increment(count);
        self.1.increment(count);
    }
}

impl Both<Gauge> {
    fn add(&self, change: f64) {
        self.0.increment(change);
        self.1.increment(change);
    }
}

/// The metrics of one model, looked up once.
pub(crate) struct Meters {
    model: String,
    running: Both<Gauge>,
    waiting: Both<Gauge>,
    prompt_tokens: Both<Counter>,
    cached_tokens: Both<Counter>,
    generated_tokens: Both<Counter>,
    ttft: Both<Histogram>,
    itl: Both<Histogram>,
    e2e: Both<Histogram>,
}

macro_rules! both {
    ($macro:ident, $model:expr, $baton:literal, $vllm:literal) => {
        Both(
            $macro!($baton, "model" => $model.to_string()),
            $macro!($vllm, "model_name" => $model.to_string(), "engine" => "gateway"),
        )
    };
}

impl Meters {
    pub(crate) fn new(model: &str) -> Meters {
        Meters {
            model: model.to_string(),
            running: both!(gauge, model, "baton_gateway_requests_running", "vllm:num_requests_running"),
            waiting: both!(gauge, model, "baton_gateway_requests_waiting", "vllm:num_requests_waiting"),
            prompt_tokens: both!(counter, model, "baton_gateway_prompt_tokens_total", "vllm:prompt_tokens_total"),
            cached_tokens: both!(
                counter,
                model,
                "baton_gateway_cached_tokens_total",
                "vllm:prompt_tokens_cached_total"
            ),
            generated_tokens: both!(
                counter,
                model,
                "baton_gateway_generated_tokens_total",
                "vllm:generation_tokens_total"
            ),
            ttft: both!(
                histogram,
                model,
                "baton_gateway_time_to_first_token_seconds",
                "vllm:time_to_first_token_seconds"
            ),
            itl: both!(
                histogram,
                model,
                "baton_gateway_inter_token_latency_seconds",
                "vllm:inter_token_latency_seconds"
            ),
            e2e: both!(histogram, model, "baton_gateway_request_seconds", "vllm:e2e_request_latency_seconds"),
        }
    }

    fn vllm(&self, name: &'static str) -> Histogram {
        histogram!(name, "model_name" => self.model.clone(), "engine" => "gateway")
    }

    fn finished(&self, reason: &'static str) {
        let model = self.model.clone();
        counter!("vllm:request_success_total", "model_name" => model, "engine" => "gateway", "finished_reason" => reason)
            .increment(1);
    }

    fn ended(&self, outcome: String) {
        counter!("baton_gateway_requests_total", "model" => self.model.clone(), "outcome" => outcome).increment(1);
    }
}

/// Where a request's time goes. Each mark gives the time since the one before to a phase, so that the phases up to the
/// first token add up to the time to first token.
///
/// The same phases are `tracing` spans, one after the other under the request's span, so that a trace subdivides TTFT too.
pub(crate) struct Phases {
    meters: Arc<Meters>,
    span: Span,
    phase: Span,
    received: Instant,
    marked: Instant,
    parse: Duration,
    encode: Duration,
    assign: Duration,
    /// From Start until the sequence has joined the decode engine: prefill and transfer.
    handoff: Duration,
    /// From there to the first token.
    first_step: Duration,
    /// Attempts that failed before the first token.
    retries: Duration,
    admitted: Admitted,
    stage: Stage,
    first_token: Option<Instant>,
    last_token: Vec<Option<Instant>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    New,
    Waiting,
    Running,
}

impl Phases {
    /// Begins when the request's head had arrived.
    pub(crate) fn new(meters: Arc<Meters>, received: Instant) -> Phases {
        let span = debug_span!("request");
        Phases {
            meters,
            phase: debug_span!(parent: &span, "parse"),
            span,
            received,
            marked: received,
            parse: Duration::ZERO,
            encode: Duration::ZERO,
            assign: Duration::ZERO,
            handoff: Duration::ZERO,
            first_step: Duration::ZERO,
            retries: Duration::ZERO,
            admitted: Admitted::default(),
            stage: Stage::New,
            first_token: None,
            last_token: Vec::new(),
        }
    }

    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.marked, now)
    }

    /// The body had been read and checked at `at`.
    pub(crate) fn parsed(&mut self, at: Instant) {
        self.parse += at - self.marked;
        self.marked = at;
        self.phase = debug_span!(parent: &self.span, "encode");
    }

    pub(crate) fn encoded(&mut self) {
        let lap = self.lap();
        self.encode += lap;
        self.phase = debug_span!(parent: &self.span, "assign");
    }

    /// The request waits for workers from here on.
    pub(crate) fn accepted(&mut self, choices: u32) {
        self.last_token = vec![None; choices as usize];
        self.enter(Stage::Waiting);
    }

    pub(crate) fn assigned(&mut self) {
        if self.first_token.is_none() {
            let lap = self.lap();
            self.assign += lap;
            self.phase = debug_span!(parent: &self.span, "handoff");
        }
    }

    pub(crate) fn admitted(&mut self, admitted: &Admitted) {
        if self.first_token.is_none() {
            let lap = self.lap();
            self.handoff += lap;
            self.admitted = *admitted;
            self.phase = debug_span!(parent: &self.span, "first_step");
        }
        self.enter(Stage::Running);
    }

    /// An attempt failed; before the first token its time counts as retries.
    pub(crate) fn failed(&mut self) {
        if self.first_token.is_none() {
            let lap = self.lap();
            self.retries += lap;
            self.phase = debug_span!(parent: &self.span, "assign");
        }
        self.enter(Stage::Waiting);
    }

    pub(crate) fn tokens(&mut self, choice: u32, count: usize) {
        let now = Instant::now();
        if self.first_token.is_none() {
            let lap = self.lap();
            self.first_step += lap;
            self.first_token = Some(now);
            self.phase = debug_span!(parent: &self.span, "decode");
            self.meters.ttft.record(self.time_to_first_token().as_secs_f64());
            self.enter(Stage::Running);
        }
        self.meters.generated_tokens.add(count as u64);
        let Some(last) = self.last_token.get_mut(choice as usize) else { return };
        if let Some(last) = last.replace(now) {
            self.meters.itl.record((now - last).as_secs_f64());
        }
    }

    pub(crate) fn finished(&mut self, reason: &'static str) {
        self.meters.finished(reason);
    }

    fn time_to_first_token(&self) -> Duration {
        self.parse + self.encode + self.assign + self.handoff + self.first_step + self.retries
    }

    fn enter(&mut self, stage: Stage) {
        let gauge = |stage: Stage| match stage {
            Stage::New => None,
            Stage::Waiting => Some(&self.meters.waiting),
            Stage::Running => Some(&self.meters.running),
        };
        if self.stage != stage {
            gauge(self.stage).into_iter().for_each(|g| g.add(-1.0));
            gauge(stage).into_iter().for_each(|g| g.add(1.0));
            self.stage = stage;
        }
    }

    /// Records the whole request and writes its line: numbers only, never a text.
    pub(crate) fn ended(&mut self, request: &Request, outcome: &str, attempts: u32, generated: usize, cached: u64) {
        self.enter(Stage::New);
        self.phase = Span::none();
        let total = self.received.elapsed();
        let meters = &self.meters;
        meters.prompt_tokens.add(request.prompt.len() as u64);
        meters.cached_tokens.add(cached);
        meters.e2e.record(total.as_secs_f64());
        meters.ended(outcome.to_string());
        meters.vllm("vllm:request_prompt_tokens").record(request.prompt.len() as f64);
        meters.vllm("vllm:request_generation_tokens").record(generated as f64);
        meters.vllm("vllm:request_params_n").record(f64::from(request.choices));
        meters.vllm("vllm:request_params_max_tokens").record(f64::from(request.tokens_max));
        if let Some(first) = self.first_token {
            self.record_phases(first, generated);
        }
        let us = |d: Duration| d.as_micros() as u64;
        tracing::debug!(
            request = %request.id, outcome, attempts, prompt_tokens = request.prompt.len(), cached, generated,
            total_us = us(total), ttft_us = us(self.time_to_first_token()),
            parse_us = us(self.parse), encode_us = us(self.encode), assign_us = us(self.assign),
            handoff_us = us(self.handoff), first_step_us = us(self.first_step), retries_us = us(self.retries),
            prefill_queue_us = self.admitted.prefill_queue_us, prefill_compute_us = self.admitted.prefill_compute_us,
            transfer_us = self.admitted.transfer_us, local_prefill = self.admitted.local_prefill,
            "request ended"
        );
    }

    fn record_phases(&self, first: Instant, generated: usize) {
        let decode = first.elapsed();
        let queue = Duration::from_micros(self.admitted.prefill_queue_us) + self.assign + self.retries;
        let prefill = self.handoff + self.first_step;
        self.meters.vllm("vllm:request_queue_time_seconds").record(queue);
        self.meters.vllm("vllm:request_prefill_time_seconds").record(prefill);
        self.meters.vllm("vllm:request_decode_time_seconds").record(decode);
        self.meters.vllm("vllm:request_inference_time_seconds").record(prefill + decode);
        if generated > 1 {
            let per_token = decode.as_secs_f64() / (generated - 1) as f64;
            self.meters.vllm("vllm:request_time_per_output_token_seconds").record(per_token);
        }
        let phases = [
            ("parse", self.parse),
            ("encode", self.encode),
            ("assign", self.assign),
            ("handoff", self.handoff),
            ("first_step", self.first_step),
            ("retries", self.retries),
        ];
        for (phase, time) in phases {
            histogram!("baton_gateway_phase_seconds", "phase" => phase).record(time);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
    use tracing_subscriber::registry::LookupSpan;

    use super::*;

    /// Notes each span's beginning and end with the time since the first.
    struct Recorder {
        began: Instant,
        notes: Arc<Mutex<Vec<(String, u64)>>>,
    }

    impl Recorder {
        fn note(&self, note: String) {
            self.notes.lock().unwrap().push((note, self.began.elapsed().as_millis() as u64));
        }
    }

    impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Recorder {
        fn on_new_span(&self, attributes: &tracing::span::Attributes<'_>, _: &tracing::Id, _: Context<'_, S>) {
            self.note(format!("+{}", attributes.metadata().name()));
        }

        fn on_close(&self, id: tracing::Id, context: Context<'_, S>) {
            let name = context.span(&id).map_or("", |span| span.name());
            self.note(format!("-{name}"));
        }
    }

    /// Each phase's span begins where the one before ends, and those before the first token last exactly its time.
    #[tokio::test(start_paused = true)]
    async fn the_phases_tile_the_time_to_first_token() {
        let notes = Arc::new(Mutex::new(Vec::new()));
        let recorder = Recorder { began: Instant::now(), notes: notes.clone() };
        let _default = tracing::subscriber::set_default(tracing_subscriber::registry().with(recorder));
        let wait = |ms| tokio::time::advance(Duration::from_millis(ms));

        let mut phases = Phases::new(Arc::new(Meters::new("m")), Instant::now());
        wait(1).await;
        phases.parsed(Instant::now());
        wait(2).await;
        phases.encoded();
        phases.accepted(1);
        wait(4).await;
        phases.assigned();
        wait(8).await;
        phases.failed();
        wait(16).await;
        phases.assigned();
        wait(32).await;
        phases.admitted(&Admitted::default());
        wait(64).await;
        phases.tokens(0, 1);
        assert_eq!(phases.time_to_first_token(), Duration::from_millis(127));
        wait(128).await;
        drop(phases);

        let notes = notes.lock().unwrap();
        let order = ["parse", "encode", "assign", "handoff", "assign", "handoff", "first_step", "decode"];
        let ends = [1, 3, 7, 15, 31, 63, 127, 255];
        let begins = [0].into_iter().chain(ends);
        for ((name, begin), end) in order.into_iter().zip(begins).zip(ends) {
            assert!(notes.contains(&(format!("+{name}"), begin)), "{name} does not begin at {begin}: {notes:?}");
            assert!(notes.contains(&(format!("-{name}"), end)), "{name} does not end at {end}: {notes:?}");
        }
        assert_eq!(notes.iter().filter(|(note, _)| note.starts_with('+')).count(), order.len() + 1);
    }
}
