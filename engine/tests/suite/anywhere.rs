//! Random requests to random models, each by a random way: in company, in chunks, with few blocks, behind a prefix that is there
//! already, with drafts, by a group of ranks, prefilled by one group and decoded by another, and gone on with elsewhere after
//! any token. Every way gives the tokens and the bits of the request alone. A thousand cases; a hundred times as many with
//! `BATON_TEST_LONG=1`; those of one model again with `BATON_TEST_MODEL=N`.

use baton_core::{KvDtype, Request, Rng};
use baton_engine::testing::{TinyModel, drain, request, work};
use baton_engine::{Choice, Engine, EngineConfig, Goal, LoadOptions, Loaded, ModelSpec, Work};
use baton_kernels::Quantize;

use crate::common::{CONFIG, Choices, bits, carry, load_tiny_as, model_engine, prefill, prompt};

const MODELS: u64 = 20;
const CASES: u64 = 50;
const ROOMY: EngineConfig = EngineConfig { blocks: 512, batch_tokens_max: 512, ..CONFIG };
/// Which of a model's groups computes; large ones are slow on few cores.
const GROUPS: [usize; 12] = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4];
const ID: u128 = 1 << 64;

fn among<T: Copy>(rng: &mut Rng, values: &[T]) -> T {
    values[rng.below(values.len() as u64) as usize]
}

/// A model, and what it is loaded with: weights and caches of every kind.
fn random_model(rng: &mut Rng) -> (TinyModel, LoadOptions) {
    let families = TinyModel::families();
    let family = families[rng.below(families.len() as u64) as usize].clone();
    // Blocks of 32 columns are cut between ranks only where heads have as many.
    let quantize = among(rng, &[None, None, None, Some(Quantize::Q8_0), Some(Quantize::Q4_0)]);
    let tiny = TinyModel {
        hidden: among(rng, &[32, 64, 80]),
        intermediate: if quantize.is_some() { 300 } else { 64 + rng.below(80) as usize },
        layers: 1 + rng.below(3) as usize,
        heads: 8,
        kv_heads: among(rng, &[1, 2, 4, 8]),
        head_dim: if quantize.is_some() { 32 } else { among(rng, &[8, 10, 16]) },
        vocab: 90 + rng.below(120) as usize,
        experts: if family.experts > 0 { 2 + rng.below(6) as usize } else { 0 },
        ..family
    };
    let kv_dtype = among(
        rng,
        &[KvDtype::Bf16, KvDtype::Bf16, KvDtype::Bf16, KvDtype::F32, KvDtype::Int8, KvDtype::Int8, KvDtype::Fp8],
    );
    (tiny, LoadOptions { quantize, kv_dtype, ..LoadOptions::default() })
}

/// The model alone, and groups of other sizes.
fn load(index: u64, tiny: &TinyModel, options: LoadOptions) -> Vec<Loaded> {
    let of = |(ranks, threads): (usize, usize)| {
        let options = LoadOptions { ranks, threads, ..options };
        load_tiny_as(&format!("anywhere-{index}-{ranks}-{threads}"), tiny, options)
    };
    [(1, 1), (1, 2), (2, 2), (4, 4), (8, 8)].into_iter().map(of).collect()
}

fn random_request(rng: &mut Rng, id: u128, vocab: usize) -> Request {
    let len = 1 + rng.below(60) as usize;
    let mut tokens = prompt(rng.below(6), len, vocab);
    if rng.below(3) == 0 {
        // Something to draft from.
        tokens = tokens[..len.min(7)].repeat(1 + rng.below(6) as usize);
    }
    let mut asked = request(id, &tokens, 1 + rng.below(16) as u32);
    asked.ignore_eos = rng.below(2) == 0;
    asked.tokens_min = rng.below(4) as u32;
    asked.logprobs = among(rng, &[None, Some(0), Some(3)]);
    asked.prompt_logprobs = among(rng, &[None, None, Some(1)]);
    asked.choices = among(rng, &[1, 1, 1, 2, 3]);
    asked.stop_tokens = (0..rng.below(3)).map(|_| rng.below(vocab as u64) as u32).collect();
    if rng.below(3) > 0 {
        asked.sampling.temperature = among(rng, &[0.5, 1.0, 1.7]);
        asked.sampling.seed = rng.below(1 << 40);
        asked.sampling.top_p = among(rng, &[1.0, 0.9]);
        asked.sampling.top_k = among(rng, &[0, 20]);
        asked.sampling.repetition_penalty = among(rng, &[1.0, 1.2]);
        asked.sampling.presence_penalty = among(rng, &[0.0, 0.4]);
    }
    asked
}

fn random_engine(rng: &mut Rng, spec: &ModelSpec) -> Engine {
    let config = EngineConfig {
        blocks: among(rng, &[16, 40, 512]),
        batch_tokens_max: among(rng, &[4, 13, 40, 512]),
        sequences_max: among(rng, &[4, 8, 64]),
        queue_max: 128,
        prefix_cache: rng.below(4) > 0,
        draft_tokens_max: among(rng, &[0, 0, 1, 5]),
    };
    model_engine(spec, config)
}

/// Admits others beside the request; many of them have a prefix in common with it.
fn accompany(rng: &mut Rng, engine: &mut Engine, vocab: usize) {
    for other in 0..among(rng, &[0, 0, 0, 1, 1, 2, 2, 4, 7, 63]) {
        engine.admit(work(&random_request(rng, other, vocab))).expect("room");
    }
}

/// How a choice goes on behind the tokens that were emitted elsewhere.
fn emitted(rng: &mut Rng, whole: &Choices, choices: u32) -> Vec<Choice> {
    let cut = rng.below(2) == 0;
    let so_far = |index: u32| {
        let ids = whole.ids(ID, index);
        let len = if cut { rng.below(ids.len() as u64) as usize } else { 0 };
        Choice { index, so_far: ids[..len].to_vec() }
    };
    (0..choices).map(so_far).collect()
}

#[test]
fn any_way_gives_the_bits_of_the_request_alone() {
    let long = if std::env::var_os("BATON_TEST_LONG").is_some() { 100 } else { 1 };
    let only =
        std::env::var_os("BATON_TEST_MODEL").map(|index| index.to_string_lossy().parse::<u64>().expect("a number"));
    for index in (0..MODELS * long).filter(|index| only.is_none_or(|only| only == *index)) {
        let mut rng = Rng::new(index);
        let (tiny, options) = random_model(&mut rng);
        let mut groups = load(index, &tiny, options);
        let spec = groups[0].spec.clone();
        for case in 0..CASES {
            let asked = random_request(&mut rng, ID, spec.vocab);
            let mut alone = model_engine(&spec, ROOMY);
            alone.admit(work(&asked)).expect("room");
            let whole = Choices::of(drain(&mut alone, &mut groups[0].model));

            let choices = emitted(&mut rng, &whole, asked.choices);
            let (from, to) = (among(&mut rng, &GROUPS), among(&mut rng, &GROUPS));
            let handed_over = rng.below(2) == 0;
            let mut engine = random_engine(&mut rng, &spec);
            accompany(&mut rng, &mut engine, spec.vocab);
            let mut found = Choices::default();
            if handed_over {
                let mut first = model_engine(&spec, EngineConfig { batch_tokens_max: 3 + case as usize, ..ROOMY });
                let goal = Goal::Prefill { skip_blocks: 0, on_device: false };
                let given = Work { goal, choices: choices.clone(), ..work(&asked) };
                let handed = prefill(&mut first, &mut groups[from].model, given);
                // The company needs blocks, too: it goes first where there are few.
                found.add(drain(&mut engine, &mut groups[to].model));
                let filled = Some(carry(&engine, &handed, engine.cache().lookup(&[])));
                engine.admit(Work { filled, choices: choices.clone(), ..work(&asked) }).expect("room");
                accompany_later(&mut rng, &mut engine, spec.vocab);
            } else {
                engine.admit(Work { choices: choices.clone(), ..work(&asked) }).expect("room");
            }
            found.add(drain(&mut engine, &mut groups[to].model));
            for Choice { index: choice, so_far } in &choices {
                let (found, expected) = (found.sampled(ID, *choice), &whole.sampled(ID, *choice)[so_far.len()..]);
                assert_eq!(
                    bits(found),
                    bits(expected),
                    "model {index} ({}, {:?}), case {case}, choice {choice}, group {from} to {to}, handed over: {handed_over}",
                    tiny.architecture,
                    options.kv_dtype
                );
            }
            if choices.iter().all(|choice| choice.so_far.is_empty()) {
                let (found, whole) = (found.prompts.get(&asked.id), whole.prompts.get(&asked.id));
                assert_eq!(found, whole, "model {index}, case {case}: the prompt's");
            }
        }
    }
}

/// As `accompany`, under names that were not used before.
fn accompany_later(rng: &mut Rng, engine: &mut Engine, vocab: usize) {
    for other in 0..among(rng, &[0, 3]) {
        engine.admit(work(&random_request(rng, 1000 + other, vocab))).expect("room");
    }
}
