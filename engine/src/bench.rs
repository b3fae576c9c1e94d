//! How fast a loaded model prefills and decodes through the whole engine, beside what the machine can do at most in the
//! same seconds. Neighbours move both, so each round measures the limits and the engine in turn, and the best counts.

use baton_core::{Request, RequestId, Rng, TokenId};
use baton_kernels::limits::{matmul_flops, read_bandwidth};

use crate::engine::Engine;
use crate::model::CpuModel;
use crate::spec::{EngineConfig, ModelSpec};
use crate::testing::{request, step, work};

const PREFILL_TOKENS: usize = 512;
const CONTEXT_TOKENS: usize = 64;
const DECODE_BATCHES: [usize; 3] = [1, 8, 32];

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
}

impl Default for BenchOptions {
    fn default() -> BenchOptions {
        BenchOptions { rounds: 3, decode_steps: 24 }
    }
}

/// Tokens per second of prefill (one prompt of 512), decode (1, 8 and 32 sequences) and both mixed, then the shares of the
/// limits measured beside them. `seconds` is a monotonic clock.
pub fn bench(model: &mut CpuModel, spec: &ModelSpec, options: BenchOptions, seconds: &dyn Fn() -> f64) -> Vec<Figure> {
    let (threads, profile) = (model.threads(), model.cpu().profile());
    let (mut bandwidth, mut flops, mut prefill, mut mixed) = (0f64, 0f64, 0f64, 0f64);
    let mut decode = [0f64; DECODE_BATCHES.len()];
    for _ in 0..options.rounds.max(1) {
        let mut run = Run { model, spec, seconds, steps: options.decode_steps.max(1) };
        flops = flops.max(matmul_flops(threads, profile, 5) * 1e9);
        prefill = prefill.max(run.prefill());
        bandwidth = bandwidth.max(read_bandwidth(threads, 5) * 1e9);
        for (best, batch) in decode.iter_mut().zip(DECODE_BATCHES) {
            *best = best.max(run.decode(batch));
        }
        mixed = mixed.max(run.mixed());
    }
    let figure = |name: String, value: f64, unit: &'static str| Figure { name, value, unit };
    let mut figures = vec![figure(format!("prefill_{PREFILL_TOKENS}"), prefill, "tokens/s")];
    for (value, batch) in decode.iter().zip(DECODE_BATCHES) {
        figures.push(figure(format!("decode_batch_{batch}"), *value, "tokens/s"));
    }
    figures.push(figure("mixed_prefill_512_decode_8".to_string(), mixed, "tokens/s"));
    figures.push(figure("limit_flops".to_string(), flops / 1e9, "GFLOP/s"));
    figures.push(figure("limit_bandwidth".to_string(), bandwidth / 1e9, "GB/s"));
    // A multiplication and an addition per weight, and two bytes per weight.
    let prefill_share = prefill * model.layer_bytes() as f64 / flops;
    figures.push(figure(format!("prefill_{PREFILL_TOKENS}_share_of_flops"), 100.0 * prefill_share, "%"));
    let decode_share = decode[0] * (model.layer_bytes() + model.head_bytes()) as f64 / bandwidth;
    figures.push(figure("decode_batch_1_share_of_bandwidth".to_string(), 100.0 * decode_share, "%"));
    figures
}

/// One round's means.
struct Run<'a> {
    model: &'a mut CpuModel,
    spec: &'a ModelSpec,
    seconds: &'a dyn Fn() -> f64,
    steps: usize,
}

impl Run<'_> {
    fn engine(&self, sequences: usize) -> Engine {
        let per_sequence = (PREFILL_TOKENS + 4 * self.steps).div_ceil(self.spec.layout.block_tokens as usize);
        let config = EngineConfig {
            blocks: (sequences + 1) * per_sequence,
            batch_tokens_max: PREFILL_TOKENS + sequences,
            sequences_max: sequences + 1,
            queue_max: sequences + 1,
            prefix_cache: false,
        };
        Engine::new(self.spec.clone(), config)
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
        let mut engine = self.engine(1);
        admit(&mut engine, self.request(0, PREFILL_TOKENS, 1));
        PREFILL_TOKENS as f64 / self.time(&mut engine, 1)
    }

    /// An engine whose `batch` sequences all decode.
    fn decoding(&mut self, batch: usize) -> Engine {
        let mut engine = self.engine(batch);
        (0..batch).for_each(|id| admit(&mut engine, self.request(id, CONTEXT_TOKENS, 4 * self.steps)));
        while engine.load().tokens_waiting > 0 {
            self.time(&mut engine, 1);
        }
        engine
    }

    fn decode(&mut self, batch: usize) -> f64 {
        let mut engine = self.decoding(batch);
        let steps = self.steps;
        (batch * steps) as f64 / self.time(&mut engine, steps)
    }

    /// One step that prefills a prompt while 8 sequences decode.
    fn mixed(&mut self) -> f64 {
        let mut engine = self.decoding(8);
        admit(&mut engine, self.request(99, PREFILL_TOKENS, 1));
        (PREFILL_TOKENS + 8) as f64 / self.time(&mut engine, 1)
    }
}

fn admit(engine: &mut Engine, request: Request) {
    engine.admit(work(&request)).expect("the engine was made for this");
}
