//! What the tests share: engines of a given size, and what a request's events add up to.

use std::collections::BTreeMap;
use std::path::PathBuf;

use baton_core::{Finish, Request, RequestId, SampledToken, TokenId};
use baton_engine::testing::{TinyModel, drain, hash_spec, work};
use baton_engine::{
    Backend, Blocks, Engine, EngineConfig, Event, Filled, Load, LoadOptions, Loaded, ModelSpec, Usage, Work, load,
};
use baton_kernels::Quantize;

pub(crate) const CONFIG: EngineConfig = EngineConfig {
    blocks: 64,
    batch_tokens_max: 16,
    sequences_max: 8,
    queue_max: 64,
    prefix_cache: true,
    draft_tokens_max: 0,
};

pub(crate) fn hash_engine(config: EngineConfig) -> Engine {
    Engine::new(hash_spec(), config)
}

/// An empty directory for one test.
pub(crate) fn dir(name: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("engine").join(name);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("make a directory");
    dir
}

pub(crate) fn load_tiny(name: &str, model: &TinyModel, threads: usize) -> Loaded {
    load_tiny_as(name, model, LoadOptions { threads, ..LoadOptions::default() })
}

pub(crate) fn load_quantized(name: &str, model: &TinyModel, threads: usize, quantize: Option<Quantize>) -> Loaded {
    load_tiny_as(name, model, LoadOptions { threads, quantize, ..LoadOptions::default() })
}

pub(crate) fn load_tiny_as(name: &str, model: &TinyModel, options: LoadOptions) -> Loaded {
    let dir = dir(name);
    model.write(&dir, 7).expect("write a model");
    load(&dir, options, &mut |_| {}).expect("load")
}

pub(crate) fn model_engine(spec: &ModelSpec, config: EngineConfig) -> Engine {
    Engine::new(spec.clone(), config)
}

/// Everything one choice produced.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Choices {
    pub(crate) tokens: BTreeMap<(RequestId, u32), Vec<SampledToken>>,
    pub(crate) ends: BTreeMap<(RequestId, u32), (Finish, Usage)>,
    pub(crate) prompts: BTreeMap<RequestId, Vec<Option<SampledToken>>>,
    pub(crate) aborted: Vec<RequestId>,
}

impl Choices {
    pub(crate) fn of(events: Vec<Event>) -> Choices {
        let mut all = Choices::default();
        all.add(events);
        all
    }

    pub(crate) fn add(&mut self, events: Vec<Event>) {
        for event in events {
            match event {
                Event::Tokens { request, choice, tokens } => {
                    assert!(!self.ends.contains_key(&(request, choice)), "tokens after the end");
                    self.tokens.entry((request, choice)).or_default().extend(tokens);
                }
                Event::Finished { request, choice, finish, usage } => {
                    let before = self.ends.insert((request, choice), (finish, usage));
                    assert_eq!(before, None, "a choice ends once");
                }
                Event::PromptLogprobs { request, tokens } => drop(self.prompts.insert(request, tokens)),
                Event::Aborted { request, .. } => self.aborted.push(request),
                Event::Prefilled { .. } => panic!("no prefill goal in this test"),
            }
        }
    }

    pub(crate) fn sampled(&self, request: u128, choice: u32) -> &[SampledToken] {
        self.tokens.get(&(RequestId(request), choice)).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn ids(&self, request: u128, choice: u32) -> Vec<TokenId> {
        self.sampled(request, choice).iter().map(|token| token.id).collect()
    }
}

/// (id, log-probability, alternatives), the numbers as bits.
pub(crate) type Bits = (TokenId, u32, Vec<(TokenId, u32)>);

/// Ids and log-probabilities as bits, so that a test compares bits.
pub(crate) fn bits(tokens: &[SampledToken]) -> Vec<Bits> {
    let of = |token: &SampledToken| {
        let top = token.top.iter().map(|(id, logprob)| (*id, logprob.to_bits())).collect();
        (token.id, token.logprob.to_bits(), top)
    };
    tokens.iter().map(of).collect()
}

/// Runs requests beside one another; each must say what it says alone, bit by bit. What the engine has done.
pub(crate) fn in_company(
    model: &mut dyn Backend,
    spec: &ModelSpec,
    config: EngineConfig,
    requests: &[Request],
    alone: &[Vec<SampledToken>],
) -> Load {
    let mut engine = model_engine(spec, config);
    requests.iter().for_each(|request| engine.admit(work(request)).expect("room"));
    let choices = Choices::of(drain(&mut engine, model));
    for (request, alone) in requests.iter().zip(alone) {
        let found = choices.sampled(request.id.0, 0);
        assert_eq!(bits(found), bits(alone), "{} request {}, {config:?}", spec.name, request.id);
    }
    engine.load()
}

/// Pseudo-random token ids below `vocab`.
pub(crate) fn prompt(seed: u64, len: usize, vocab: usize) -> Vec<TokenId> {
    let mut rng = baton_core::Rng::new(seed);
    (0..len).map(|_| rng.below(vocab as u64) as TokenId).collect()
}

/// What a prefill hands over, with the bytes of its blocks as they were when each layer was announced.
pub(crate) struct Handed {
    pub(crate) first: Vec<(u32, SampledToken)>,
    pub(crate) prompt_logprobs: Vec<Option<SampledToken>>,
    pub(crate) tokens: usize,
    /// Keeps the blocks, as a worker does until the handoff is done.
    pub(crate) blocks: Blocks,
    /// (index in the sequence, layer, bytes), in the order of announcement.
    pub(crate) announced: Vec<(usize, usize, Vec<u8>)>,
}

/// Prefills on `engine` and sends each layer of each announced block at once, as the worker does.
pub(crate) fn prefill(engine: &mut Engine, backend: &mut dyn Backend, work: Work) -> Handed {
    engine.admit(work).expect("room");
    let (mut announced, mut events) = (Vec::new(), Vec::new());
    while let Some(batch) = engine.plan() {
        let arena = batch.arena();
        let output = backend.run(&batch, &mut |layer| {
            for (index, block) in batch.exports().iter().flat_map(|export| &export.blocks) {
                let mut bytes = vec![0; arena.layout().layer_bytes()];
                // SAFETY: the export's guard holds the block.
                unsafe { arena.read_layer(block.index, layer, &mut bytes) };
                announced.push((*index, layer, bytes));
            }
        });
        engine.commit(batch, output, &mut events);
    }
    let Some(Event::Prefilled { first, prompt_logprobs, blocks, tokens, .. }) = events.pop() else {
        panic!("no handoff")
    };
    Handed { first, prompt_logprobs, tokens, blocks, announced }
}

/// Writes what was announced into blocks of another engine, behind those in `held` that it has already.
pub(crate) fn carry(to: &Engine, handed: &Handed, mut held: Blocks) -> Filled {
    let (skip, layout) = (held.len(), to.spec().layout);
    let reserved = to.cache().reserve(handed.blocks.len() - skip).expect("room");
    let mut written = std::collections::BTreeSet::new();
    for (index, layer, bytes) in &handed.announced {
        assert!(written.insert((*index, *layer)), "each block is announced once");
        // SAFETY: `reserved` holds the block.
        unsafe { to.cache().arena().write_layer(reserved.ids()[index - skip].index, *layer, bytes) };
    }
    assert_eq!(written.len(), reserved.ids().len() * layout.layers as usize, "all blocks are announced");
    held.append(reserved.fill(&[]));
    let (first, prompt_logprobs) = (handed.first.clone(), handed.prompt_logprobs.clone());
    Filled { blocks: held, tokens: handed.tokens, first, prompt_logprobs }
}
