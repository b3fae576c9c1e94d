//! Caches of every dtype: near what they were computed with, the same bits whatever happens around a request, and in 8 bits
//! nearly twice the tokens.

use std::path::Path;

use baton_core::{BlockLayout, KvDtype, Request, SampledToken, TokenId};
use baton_engine::testing::{TinyModel, drain, request, work};
use baton_engine::{EngineConfig, LoadOptions, Loaded, load};

use crate::common::{CONFIG, Choices, bits, dir, in_company, load_tiny_as, model_engine, prompt};
use crate::quantized::{alone, asking};
use crate::references::{check_as, log_probabilities_as, relative_error};
use crate::tensor_parallel::{ROOMY, said};

fn options(kv_dtype: KvDtype) -> LoadOptions {
    LoadOptions { kv_dtype, ..LoadOptions::default() }
}

fn loaded(name: &str, tiny: &TinyModel, options: LoadOptions) -> Loaded {
    load_tiny_as(&format!("kv-{name}-{}-{}", options.kv_dtype.as_str(), options.ranks), tiny, options)
}

/// The same bits alone and among 15 others, in one chunk and in many, preempted or not, with drafts or without, on one thread
/// and on three.
#[test]
fn bits_depend_on_nothing_around() {
    for (index, tiny) in TinyModel::families().iter().enumerate() {
        let kv_dtype = [KvDtype::Int8, KvDtype::Fp8, KvDtype::F32][index % 3];
        let Loaded { mut model, spec } = loaded(&format!("around-{index}"), tiny, options(kv_dtype));
        let requests: Vec<Request> =
            (0..16).map(|id| asking(id, &prompt(id as u64 % 5, 20 + id as usize, spec.vocab))).collect();
        let expected: Vec<_> = requests.iter().map(|request| alone(&mut model, &spec, request)).collect();
        let threads = LoadOptions { threads: 3, ..options(kv_dtype) };
        let mut threaded = loaded(&format!("around-{index}-3"), tiny, threads).model;
        for (blocks, batch_tokens_max, draft_tokens_max) in [(256, 1024, 0), (9, 33, 0), (256, 40, 5)] {
            let config = EngineConfig { blocks, batch_tokens_max, draft_tokens_max, sequences_max: 32, ..CONFIG };
            in_company(&mut threaded, &spec, config, &requests, &expected);
        }
    }
}

/// What decoding said, a prefill of the same tokens says too: it sees its own chunk's keys and values as the cache has them.
#[test]
fn prefill_and_decode_agree() {
    for kv_dtype in KvDtype::ALL {
        let Loaded { mut model, spec } = loaded("agree", &TinyModel::llama(), options(kv_dtype));
        let mut tokens = prompt(5, 30, spec.vocab);
        let said = alone(&mut model, &spec, &asking(1, &tokens));
        tokens.extend(said.iter().map(|token| token.id));
        for batch_tokens_max in [1000, 7] {
            let mut engine = model_engine(&spec, EngineConfig { batch_tokens_max, ..ROOMY });
            let again = Request { prompt_logprobs: Some(3), tokens_max: 1, ..asking(2, &tokens) };
            engine.admit(work(&again)).expect("room");
            let choices = Choices::of(drain(&mut engine, &mut model));
            let given: Vec<SampledToken> = choices.prompts[&again.id][30..].iter().flatten().cloned().collect();
            assert_eq!(bits(&given), bits(&said), "{kv_dtype:?} in chunks of {batch_tokens_max}");
        }
    }
}

/// Groups of ranks, which have each head's scales with the head, say bit for bit what one rank says.
#[test]
fn groups_of_any_size_give_the_same_bits() {
    for (index, tiny) in TinyModel::families().into_iter().enumerate() {
        let tiny = TinyModel { heads: 8, kv_heads: [2, 8, 4, 1, 2, 4][index], head_dim: 10, ..tiny };
        let kv_dtype = [KvDtype::Int8, KvDtype::Fp8][index % 2];
        let name = format!("group-{index}");
        let expected = said(&mut loaded(&name, &tiny, options(kv_dtype)), ROOMY);
        for ranks in [2, 4, 8] {
            let mut group = loaded(&name, &tiny, LoadOptions { ranks, threads: ranks, ..options(kv_dtype) });
            assert!(said(&mut group, ROOMY) == expected, "{} {kv_dtype:?} with {ranks} ranks", tiny.architecture);
        }
    }
}

/// Every dtype stays near the logits of transformers in f32.
#[test]
fn every_dtype_is_near_the_reference() {
    for name in ["llama-gqa-llama3", "llama-bias-linear", "qwen2-bias-tied", "qwen3-norm-tied", "mistral-window"] {
        for (kv_dtype, limit) in
            [(KvDtype::F32, 2e-2), (KvDtype::Bf16, 2e-2), (KvDtype::Int8, 3e-2), (KvDtype::Fp8, 1e-1)]
        {
            check_as(name, options(kv_dtype), limit);
        }
    }
}

/// The model that ships, over a text of its own kind: how far the logits are from those over a cache in f32, and how often the
/// likeliest token is another. `--nocapture` prints what docs/measurements.md has.
#[test]
fn the_model_that_ships_hardly_moves() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/baton-3m");
    let fixtures = std::fs::read_to_string(dir.join("logits.json")).expect("read the fixtures");
    let fixtures: serde_json::Value = serde_json::from_str(&fixtures).expect("JSON");
    let texts: Vec<Vec<TokenId>> = fixtures["fixtures"]
        .as_array()
        .expect("fixtures")
        .iter()
        .map(|fixture| serde_json::from_value(fixture["ids"].clone()).expect("ids"))
        .collect();
    // One after another they are a long text, too.
    let texts = [texts.clone(), vec![texts.concat()]].concat();
    let rows = |kv_dtype| -> Vec<Vec<f32>> {
        texts.iter().flat_map(|tokens| log_probabilities_as(&dir, tokens, options(kv_dtype))).collect()
    };
    let best = |row: &[f32]| (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).expect("a vocabulary");
    let exact = rows(KvDtype::F32);
    // Of a hundred likeliest tokens, at most so many are others: where two are about as likely.
    for (kv_dtype, limit, others_max) in [(KvDtype::Bf16, 0.01, 2), (KvDtype::Int8, 0.015, 3), (KvDtype::Fp8, 0.05, 10)]
    {
        let found = rows(kv_dtype);
        let mut errors: Vec<f64> =
            found.iter().zip(&exact).map(|(found, exact)| relative_error(found, exact)).collect();
        let others = found.iter().zip(&exact).filter(|(found, exact)| best(found) != best(exact)).count();
        errors.sort_by(f64::total_cmp);
        let (median, worst) = (errors[errors.len() / 2], errors[errors.len() - 1]);
        println!(
            "{}: relative error of logits {median:.5} median, {worst:.5} worst of {}; likeliest token another in {others}",
            kv_dtype.as_str(),
            errors.len()
        );
        assert!(median < limit, "{kv_dtype:?}: {median}");
        assert!(others * 100 <= others_max * errors.len(), "{kv_dtype:?}: {others} of {}", errors.len());
    }
}

/// Workers of different dtypes never continue one another's sequences, and one's blocks do not fit the other.
#[test]
fn the_dtype_is_part_of_layout_and_numerics_class() {
    let specs = KvDtype::ALL.map(|kv_dtype| loaded("class", &TinyModel::llama(), options(kv_dtype)).spec);
    for (index, spec) in specs.iter().enumerate() {
        assert!(spec.numerics.0.ends_with(spec.layout.dtype.as_str()), "{}", spec.numerics);
        for other in &specs[..index] {
            assert_ne!(spec.numerics, other.numerics);
            assert_ne!(spec.layout.describe(), other.layout.describe());
            assert_eq!(spec.weights_hash, other.weights_hash);
        }
    }
}

/// Keys of more elements than whole numbers are summed over are refused as the model is loaded, in that dtype alone.
#[test]
fn heads_that_are_too_wide_are_refused() {
    let dir = dir("kv-wide");
    TinyModel { heads: 2, kv_heads: 1, head_dim: 258, ..TinyModel::llama() }.write(&dir, 7).expect("write a model");
    let error = load(&dir, options(KvDtype::Int8), &mut |_| {}).err().expect("refused").to_string();
    assert!(error.contains("258") && error.contains("--kv-dtype"), "{error}");
    assert!(load(&dir, options(KvDtype::Fp8), &mut |_| {}).is_ok());
}

/// The memory that holds so many tokens in bf16 holds nearly twice as many in 8 bits: a scale of 2 bytes for a head's key of
/// 64 or 128 elements is what is missing.
#[test]
fn eight_bits_hold_nearly_twice_the_tokens() {
    for (head_dim, least) in [(64, 1.93), (128, 1.96)] {
        let bytes =
            |dtype| BlockLayout { layers: 24, kv_heads: 2, head_dim, block_tokens: 16, dtype }.block_bytes() as f64;
        for dtype in [KvDtype::Int8, KvDtype::Fp8] {
            let ratio = bytes(KvDtype::Bf16) / bytes(dtype);
            assert!(ratio > least && ratio < 2.0, "{dtype:?}, {head_dim} dims: {ratio}");
        }
    }
    // As many sequences as fit run in memory of one size: none of them waits or is put back.
    let tiny = TinyModel { head_dim: 64, ..TinyModel::llama() };
    let mut held = Vec::new();
    for kv_dtype in [KvDtype::Bf16, KvDtype::Int8] {
        let Loaded { mut model, spec } = loaded("memory", &tiny, options(kv_dtype));
        let blocks = (256 << 10) / spec.layout.block_bytes();
        let config = EngineConfig { blocks, batch_tokens_max: 1024, sequences_max: 64, prefix_cache: false, ..CONFIG };
        let mut engine = model_engine(&spec, config);
        // Two blocks each, to their last token.
        (0..64).for_each(|id| engine.admit(work(&request(id, &prompt(id as u64, 20, spec.vocab), 12))).expect("room"));
        let mut events = Vec::new();
        let mut most = 0;
        while engine.load().running + engine.load().waiting > 0 {
            baton_engine::testing::step(&mut engine, &mut model, &mut events);
            most = most.max(engine.load().running);
        }
        held.push(most as f64);
    }
    assert!(held[1] / held[0] > 1.85, "{held:?}");
}
