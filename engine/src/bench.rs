//! How fast a loaded model prefills and decodes through the whole engine, beside what the machine can do at most in the
//! same seconds. Neighbours move both, so each round measures the limits and the engine in turn, and the best counts.

use baton_core::{Request, RequestId, Rng, TokenId};
use baton_kernels::limits::{byte_operations, matmul_flops, read_bandwidth};

use crate::backend::Backend;
use crate::engine::Engine;
use crate::model::CpuModel;
use crate::spec::{EngineConfig, ModelSpec};
use crate::testing::{request, step, work};

/// Sequences that decode while a prompt is prefilled.
const MIXED_BATCH: usize = 8;

/// One measured number.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
}

/// How long to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BenchOptions {
    /// Rounds over all figures; each figure is its best.
    pub rounds: usize,
    /// Decode steps timed per round.
    pub decode_steps: usize,
    /// Length of the prompt that is prefilled, in one step.
    pub prefill_tokens: usize,
    /// Tokens that each decoding sequence has before.
    pub context_tokens: usize,
    /// Sequences that decode at a time.
    pub batches: &'static [usize],
}

impl Default for BenchOptions {
    fn default() -> BenchOptions {
        BenchOptions { rounds: 3, decode_steps: 24, prefill_tokens: 512, context_tokens: 64, batches: &[1, 8, 32] }
    }
}

/// Tokens per second, the best of all rounds.
#[derive(Clone, Debug, PartialEq)]
pub struct Rates {
    pub prefill: f64,
    /// Of each of `BenchOptions::batches`.
    pub decode: Vec<f64>,
    /// Prefill of one prompt in the step of 8 sequences that decode.
    pub mixed: f64,
}

impl Rates {
    fn none(options: &BenchOptions) -> Rates {
        Rates { prefill: 0.0, decode: vec![0.0; options.batches.len()], mixed: 0.0 }
    }

    /// Measures once more.
    fn round(&mut self, model: &mut dyn Backend, spec: &ModelSpec, options: &BenchOptions, seconds: &dyn Fn() -> f64) {
        let mut run = Run { model, spec, seconds, options };
        self.prefill = self.prefill.max(run.prefill());
        for (best, batch) in self.decode.iter_mut().zip(options.batches) {
            *best = best.max(run.decode(*batch));
        }
        self.mixed = self.mixed.max(run.mixed());
    }

    /// As figures of these names.
    pub fn figures(&self, options: &BenchOptions) -> Vec<Figure> {
        let figure = |name: String, value: f64| Figure { name, value, unit: "tokens/s" };
        let tokens = options.prefill_tokens;
        let mut figures = vec![figure(format!("prefill_{tokens}"), self.prefill)];
        for (value, batch) in self.decode.iter().zip(options.batches) {
            figures.push(figure(format!("decode_batch_{batch}"), *value));
        }
        figures.push(figure(format!("mixed_prefill_{tokens}_decode_{MIXED_BATCH}"), self.mixed));
        figures
    }
}

/// Rates of any backend. `seconds` is a monotonic clock.
pub fn rates(model: &mut dyn Backend, spec: &ModelSpec, options: &BenchOptions, seconds: &dyn Fn() -> f64) -> Rates {
    let mut rates = Rates::none(options);
    (0..options.rounds.max(1)).for_each(|_| rates.round(model, spec, options, seconds));
    rates
}

/// Tokens per second of prefill, decode and both mixed, then the shares of the limits measured beside them. `seconds` is a
/// monotonic clock.
pub fn bench(model: &mut CpuModel, spec: &ModelSpec, options: BenchOptions, seconds: &dyn Fn() -> f64) -> Vec<Figure> {
    let (threads, profile) = (model.threads(), model.cpu().profile());
    let (mut bandwidth, mut flops, mut rates) = (0f64, 0f64, Rates::none(&options));
    for _ in 0..options.rounds.max(1) {
        let measured = match model.is_quantized() {
            true => byte_operations(threads, 5),
            false => matmul_flops(threads, profile, 5),
        };
        flops = flops.max(measured * 1e9);
        rates.round(model, spec, &options, seconds);
        bandwidth = bandwidth.max(read_bandwidth(threads, 5) * 1e9);
    }
    let mut figures = rates.figures(&options);
    let figure = |name: String, value: f64, unit: &'static str| Figure { name, value, unit };
    let operations = if model.is_quantized() { "GOP/s" } else { "GFLOP/s" };
    figures.push(figure("limit_flops".to_string(), flops / 1e9, operations));
    figures.push(figure("limit_bandwidth".to_string(), bandwidth / 1e9, "GB/s"));
    // A multiplication and an addition per weight.
    let prefill_share = rates.prefill * 2.0 * model.layer_weights() as f64 / flops;
    figures.push(figure(format!("prefill_{}_share_of_flops", options.prefill_tokens), 100.0 * prefill_share, "%"));
    let decode_share = rates.decode[0] * (model.layer_bytes() + model.head_bytes()) as f64 / bandwidth;
    figures.push(figure("decode_batch_1_share_of_bandwidth".to_string(), 100.0 * decode_share, "%"));
    figures
}

/// One round's means.
struct Run<'a> {
    model: &'a mut dyn Backend,
    spec: &'a ModelSpec,
    seconds: &'a dyn Fn() -> f64,
    options: &'a BenchOptions,
}

impl Run<'_> {
    fn engine(&self, sequences: usize) -> Engine {
        let BenchOptions { prefill_tokens, context_tokens, .. } = *self.options;
        let tokens = prefill_tokens + sequences * (context_tokens + self.tokens_max());
        let block_tokens = self.spec.layout.block_tokens as usize;
        let config = EngineConfig {
            blocks: tokens.div_ceil(block_tokens) + 2 * (sequences + 1),
            batch_tokens_max: prefill_tokens + sequences,
            sequences_max: sequences + 1,
            queue_max: sequences + 1,
            prefix_cache: false,
            draft_tokens_max: 0,
        };
        Engine::new(self.spec.clone(), config)
    }

    fn tokens_max(&self) -> usize {
        4 * self.options.decode_steps.max(1)
    }

    fn request(&self, id: usize, prompt: usize, tokens_max: usize) -> Request {
        let mut rng = Rng::new(id as u64);
        let prompt: Vec<TokenId> = (0..prompt).map(|_| rng.below(self.spec.vocab as u64) as TokenId).collect();
        Request { id: RequestId(id as u128), ignore_eos: true, ..request(0, &prompt, tokens_max as u32) }
    }

    /// Seconds of `steps` steps.
    fn time(&mut self, engine: &mut Engine, steps: usize) -> f64 {
        let start = (self.seconds)();
        let mut events = Vec::new();
        for _ in 0..steps {
            step(engine, self.model, &mut events);
        }
        (self.seconds)() - start
    }

    fn prefill(&mut self) -> f64 {
        let (mut engine, tokens) = (self.engine(1), self.options.prefill_tokens);
        admit(&mut engine, self.request(0, tokens, 1));
        tokens as f64 / self.time(&mut engine, 1)
    }

    /// An engine whose `batch` sequences all decode.
    fn decoding(&mut self, batch: usize) -> Engine {
        let mut engine = self.engine(batch);
        let (context, tokens_max) = (self.options.context_tokens, self.tokens_max());
        (0..batch).for_each(|id| admit(&mut engine, self.request(id, context, tokens_max)));
        while engine.load().tokens_waiting > 0 {
            self.time(&mut engine, 1);
        }
        engine
    }

    fn decode(&mut self, batch: usize) -> f64 {
        let mut engine = self.decoding(batch);
        let steps = self.options.decode_steps.max(1);
        (batch * steps) as f64 / self.time(&mut engine, steps)
    }

    /// One step that prefills a prompt while 8 sequences decode.
    fn mixed(&mut self) -> f64 {
        let (mut engine, tokens) = (self.decoding(MIXED_BATCH), self.options.prefill_tokens);
        admit(&mut engine, self.request(99, tokens, 1));
        (tokens + MIXED_BATCH) as f64 / self.time(&mut engine, 1)
    }
}

fn admit(engine: &mut Engine, request: Request) {
    engine.admit(work(&request)).expect("the engine was made for this");
}
