//! The model of all simulated workers: a hash in place of weights, and bytes for tokens.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use baton_core::{BlockLayout, KvDtype, NumericsClass};
use baton_engine::{Backend, Batch, HashBackend, ModelSpec, Output};
use baton_proto::v1::ModelCard;
use baton_worker::LoadedModel;
use serde_json::json;
use tokio::time::Instant;

pub const NAME: &str = "hash";
pub const VOCAB: u32 = 257;
pub const POSITIONS_MAX: usize = 512;
pub const BLOCK_TOKENS: u32 = 4;

/// What the arithmetic of the other version of the model adds to its hashes.
const OTHER_SALT: u64 = 1 << 40;

pub fn spec() -> ModelSpec {
    let layout = BlockLayout { layers: 2, kv_heads: 1, head_dim: 4, block_tokens: BLOCK_TOKENS, dtype: KvDtype::Bf16 };
    ModelSpec {
        name: NAME.to_string(),
        layout,
        vocab: VOCAB as usize,
        positions_max: POSITIONS_MAX,
        eos: Vec::new(),
        weights_hash: "hash".to_string(),
        numerics: NumericsClass::new("hash", "hash", "bf16"),
        parameters: 0,
    }
}

/// A model whose steps take the time that `pace` says. `other`: of a version with other arithmetic.
pub fn loaded(pace: Pace, other: bool) -> LoadedModel {
    let (mut spec, mut card) = (spec(), card());
    let mut backend = HashBackend::new(spec.vocab);
    if other {
        spec.numerics = NumericsClass::new("hash", "other", "bf16");
        card.numerics.clone_from(&spec.numerics.0);
        backend = backend.salted(OTHER_SALT);
    }
    LoadedModel { spec, backend: Box::new(Paced { backend, pace }), card }
}

fn card() -> ModelCard {
    static TOKENIZER: OnceLock<String> = OnceLock::new();
    let tokenizer = TOKENIZER.get_or_init(tokenizer_json);
    ModelCard {
        name: NAME.into(),
        hash: "card".into(),
        tokenizer_json: tokenizer.clone().into(),
        positions_max: POSITIONS_MAX as u64,
        block_tokens: BLOCK_TOKENS,
        vocab: u64::from(VOCAB),
        numerics: spec().numerics.0,
        ..ModelCard::default()
    }
}

/// A byte-level tokenizer: token ids are bytes, and one end token that nothing generates as an end.
fn tokenizer_json() -> String {
    let printable = |b: u32| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = 0x100u32..;
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u32 {
        let code = if printable(byte) { byte } else { others.next().expect("endless") };
        vocab.insert(char::from_u32(code).expect("below the surrogates").to_string(), byte.into());
    }
    let end = json!({"id": 256, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [end], "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    })
    .to_string()
}

/// How long a worker's steps take. Clones are the same worker's.
#[derive(Clone)]
pub struct Pace {
    step: Duration,
    row: Duration,
    start: Instant,
    /// Until when steps do not end, in milliseconds after `start`.
    hung_ms: Arc<AtomicU64>,
    begun: Arc<AtomicU64>,
    /// How many steps had begun when one ended last.
    ended: Arc<AtomicU64>,
}

impl Pace {
    /// Made inside the worker's host, whose clock it reads.
    pub fn new(step: Duration, row: Duration) -> Pace {
        Pace { step, row, start: Instant::now(), hung_ms: Arc::default(), begun: Arc::default(), ended: Arc::default() }
    }

    /// Steps that begin from now on take at least so long; of several hangs the longest counts.
    pub fn hang(&self, now_ms: u64, for_ms: u64) {
        self.hung_ms.fetch_max(now_ms + for_ms, Ordering::Relaxed);
    }

    /// How many steps have begun, and how many had when one ended last: equal between steps.
    pub fn steps(&self) -> (u64, u64) {
        (self.begun.load(Ordering::Relaxed), self.ended.load(Ordering::Relaxed))
    }

    fn of(&self, rows: usize) -> Duration {
        let hung = Duration::from_millis(self.hung_ms.load(Ordering::Relaxed));
        (self.step + self.row * rows as u32).max(hung.saturating_sub(self.start.elapsed()))
    }
}

/// The hash backend with a pace.
struct Paced {
    backend: HashBackend,
    pace: Pace,
}

impl Backend for Paced {
    fn run(&mut self, batch: &Batch, layers: &mut dyn FnMut(usize)) -> Output {
        self.pace.ended.store(self.pace.begun.load(Ordering::Relaxed), Ordering::Relaxed);
        self.backend.run(batch, layers)
    }

    fn inline_delay(&self, rows: usize) -> Option<Duration> {
        // A step has rows; without, it is only asked whether time is simulated.
        if rows > 0 {
            self.pace.begun.fetch_add(1, Ordering::Relaxed);
        }
        Some(self.pace.of(rows))
    }
}
