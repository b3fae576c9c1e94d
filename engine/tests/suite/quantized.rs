//! Models whose weights are quantized as they are loaded: near what they were, and the same bits whatever happens around
//! a request.

use baton_core::{Request, SampledToken};
use baton_engine::testing::{TinyModel, drain, request, work};
use baton_engine::{CpuModel, EngineConfig, LoadOptions, ModelSpec, load};
use baton_kernels::{Profile, Quantize};

use crate::common::{CONFIG, Choices, bits, dir, in_company, load_quantized, load_tiny_as, model_engine, prompt};
use crate::references::{check_as, profiles};
use crate::tensor_parallel::{ROOMY, said};

/// A sampled request with log-probabilities.
pub(crate) fn asking(id: u128, tokens: &[u32]) -> Request {
    let mut asked = Request { logprobs: Some(3), ignore_eos: true, ..request(id, tokens, 24) };
    asked.sampling.temperature = 0.8;
    asked.sampling.seed = id as u64;
    asked
}

/// What a request that has the engine to itself gets.
pub(crate) fn alone(model: &mut CpuModel, spec: &ModelSpec, request: &Request) -> Vec<SampledToken> {
    let mut engine = model_engine(spec, ROOMY);
    engine.admit(work(request)).expect("room");
    Choices::of(drain(&mut engine, model)).sampled(request.id.0, 0).to_vec()
}

/// The same bits alone and among 15 others, in one chunk and in many, preempted or not, on one thread and on three.
#[test]
fn bits_depend_on_nothing_around() {
    for (index, tiny) in TinyModel::families().iter().enumerate() {
        let quantize = Some(Quantize::ALL[index % 2]);
        let name = |threads: usize| format!("quantized-{index}-{threads}");
        let loaded = load_quantized(&name(1), tiny, 1, quantize);
        let (mut model, spec) = (loaded.model, loaded.spec);
        let requests: Vec<Request> =
            (0..16).map(|id| asking(id, &prompt(id as u64 % 5, 20 + id as usize, spec.vocab))).collect();
        let expected: Vec<_> = requests.iter().map(|request| alone(&mut model, &spec, request)).collect();
        let mut threaded = load_quantized(&name(3), tiny, 3, quantize).model;
        for (blocks, batch_tokens_max) in [(256, 1024), (9, 33)] {
            let config = EngineConfig { blocks, batch_tokens_max, sequences_max: 32, ..CONFIG };
            in_company(&mut threaded, &spec, config, &requests, &expected);
        }
    }
}

/// What decoding said, a prefill of the same tokens says too.
#[test]
fn prefill_and_decode_agree() {
    for quantize in Quantize::ALL {
        let loaded =
            load_quantized(&format!("quantized-agree-{}", quantize.as_str()), &TinyModel::llama(), 2, Some(quantize));
        let (mut model, spec) = (loaded.model, loaded.spec);
        let mut tokens = prompt(5, 30, spec.vocab);
        let said = alone(&mut model, &spec, &asking(1, &tokens));
        tokens.extend(said.iter().map(|token| token.id));
        for batch_tokens_max in [1000, 7] {
            let mut engine = model_engine(&spec, EngineConfig { batch_tokens_max, ..ROOMY });
            let again = Request { prompt_logprobs: Some(3), tokens_max: 1, ..asking(2, &tokens) };
            engine.admit(work(&again)).expect("room");
            let choices = Choices::of(drain(&mut engine, &mut model));
            let given: Vec<SampledToken> = choices.prompts[&again.id][30..].iter().flatten().cloned().collect();
            assert_eq!(bits(&given), bits(&said), "{} in chunks of {batch_tokens_max}", quantize.as_str());
        }
    }
}

/// Groups of ranks, each with whole blocks of the columns it multiplies, say bit for bit what one rank says.
#[test]
fn groups_of_any_size_give_the_same_bits() {
    for (index, tiny) in TinyModel::families().into_iter().enumerate() {
        let tiny = TinyModel { heads: 8, kv_heads: [2, 8, 4, 1, 2, 4][index], head_dim: 32, intermediate: 300, ..tiny };
        let options = |ranks| LoadOptions { ranks, quantize: Some(Quantize::ALL[index % 2]), ..LoadOptions::default() };
        let name = |ranks: usize| format!("quantized-group-{index}-{ranks}");
        let expected = said(&mut load_tiny_as(&name(1), &tiny, options(1)), ROOMY);
        for ranks in [2, 4, 8] {
            let mut group = load_tiny_as(&name(ranks), &tiny, options(ranks));
            assert!(said(&mut group, ROOMY) == expected, "{} with {ranks} ranks", tiny.architecture);
        }
    }
}

/// Ranks whose heads, or whose part of the inner width, are not whole blocks of 32 columns cannot share a quantized model.
#[test]
fn ranks_that_would_cut_a_block_are_refused() {
    let cases = [
        (
            TinyModel { heads: 4, head_dim: 8, ..TinyModel::llama() },
            2,
            "o_proj, whose quantized weights are cut at multiples of 32",
        ),
        (
            TinyModel { heads: 8, kv_heads: 8, head_dim: 32, ..TinyModel::llama() },
            8,
            "an inner width of 96 leaves nothing",
        ),
    ];
    for (index, (model, ranks, reason)) in cases.into_iter().enumerate() {
        let dir = dir(&format!("quantized-refused-{index}"));
        model.write(&dir, 7).expect("write a model");
        let options = |quantize| LoadOptions { ranks, quantize, ..LoadOptions::default() };
        assert!(load(&dir, options(None), &mut |_| {}).is_ok());
        let error = load(&dir, options(Some(Quantize::Q8_0)), &mut |_| {}).err().expect("refused").to_string();
        assert!(error.contains(reason) && error.contains("--tp"), "{error}");
    }
}

/// Eight bits stay near the logits of transformers in f32.
#[test]
fn eight_bits_are_near_the_reference() {
    for name in ["llama-gqa-llama3", "llama-bias-linear", "qwen2-bias-tied", "qwen3-norm-tied", "mistral-window"] {
        for profile in profiles() {
            let options =
                LoadOptions { profile: Some(profile), quantize: Some(Quantize::Q8_0), ..LoadOptions::default() };
            // The worst row is off by 0.054 in f32acc, by 0.061 in bf16dp, which rounds what it multiplies.
            let limit = if profile == Profile::Bf16Dp { 7e-2 } else { 6e-2 };
            check_as(name, options, limit);
        }
    }
}

/// Quantized workers never continue sequences of others, and hold less.
#[test]
fn quantization_is_part_of_the_numerics_class() {
    let tiny = TinyModel { hidden: 256, intermediate: 512, head_dim: 64, ..TinyModel::llama() };
    let load = |name: &str, quantize| load_quantized(name, &tiny, 1, quantize);
    let (whole, eight, four) =
        (load("class-bf16", None), load("class-q8_0", Some(Quantize::Q8_0)), load("class-q4_0", Some(Quantize::Q4_0)));
    assert_eq!(whole.spec.weights_hash, eight.spec.weights_hash);
    assert!(eight.spec.numerics.0.contains("q8_0") && four.spec.numerics.0.contains("q4_0"));
    assert_ne!(whole.spec.numerics, eight.spec.numerics);
    let bytes = [&whole, &eight, &four].map(|loaded| loaded.model.weight_bytes());
    assert!(bytes[1] * 100 < bytes[0] * 54 && bytes[2] * 100 < bytes[0] * 29, "{bytes:?}");
}
