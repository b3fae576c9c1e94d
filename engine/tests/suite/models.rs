//! Random small models of each family through the whole engine: equal tokens and equal log-probability bits, whatever
//! happens around a request.

use baton_core::{Request, SampledToken, TokenId};
use baton_engine::testing::{TinyModel, drain, request, work};
use baton_engine::{Backend, Choice, CpuModel, EngineConfig, Goal, ModelSpec, Work};

use crate::common::{CONFIG, Choices, bits, carry, in_company, load_tiny, model_engine, prefill, prompt};

const ROOMY: EngineConfig = EngineConfig { blocks: 256, batch_tokens_max: 1024, sequences_max: 64, ..CONFIG };

fn asking(id: u128, prompt: &[TokenId], sampled: bool) -> Request {
    let mut request = Request { logprobs: Some(3), ..request(id, prompt, 36) };
    request.ignore_eos = true;
    if sampled {
        request.sampling.temperature = 0.8;
        request.sampling.seed = id as u64;
        request.sampling.repetition_penalty = 1.1;
    }
    request
}

fn alone(model: &mut CpuModel, spec: &ModelSpec, request: &Request) -> Vec<SampledToken> {
    let mut engine = model_engine(spec, ROOMY);
    engine.admit(work(request)).expect("room");
    Choices::of(drain(&mut engine, model)).sampled(request.id.0, 0).to_vec()
}

/// The same bits alone and among 31 others, in one chunk and in many, with and without a prefix hit, preempted or not.
#[test]
fn bits_do_not_depend_on_company() {
    for (index, tiny) in TinyModel::families().iter().enumerate() {
        let loaded = load_tiny(&format!("company-{index}"), tiny, 1);
        let (mut model, spec) = (loaded.model, loaded.spec);
        let requests: Vec<Request> =
            (0..32).map(|id| asking(id, &prompt(id as u64 % 7, 20 + id as usize, spec.vocab), id % 2 == 1)).collect();
        let expected: Vec<_> = requests.iter().map(|request| alone(&mut model, &spec, request)).collect();
        for (blocks, batch_tokens_max) in [(256, 1024), (256, 40), (9, 33)] {
            let config = EngineConfig { blocks, batch_tokens_max, sequences_max: 32, ..CONFIG };
            let load = in_company(&mut model, &spec, config, &requests, &expected);
            assert_eq!(load.preemptions > 0, blocks < 100);
            assert!(load.tokens_hit > 0 || (blocks, batch_tokens_max) != (256, 40));
        }
    }
}

/// Drafts change how many steps there are and nothing else: penalties, tokens that must not come yet, ends and alternatives
/// included, alone and in company, with and without room for drafts.
#[test]
fn drafts_do_not_change_bits() {
    let (mut drafted, mut right) = (0, 0);
    for (index, tiny) in TinyModel::families().iter().enumerate() {
        let loaded = load_tiny(&format!("drafts-{index}"), tiny, 1);
        let (mut model, spec) = (loaded.model, loaded.spec);
        let again = |id: u128| prompt(id as u64, 6, spec.vocab).repeat(5);
        let mut requests: Vec<Request> =
            (0..8).map(|id| Request { tokens_max: 40, ..asking(id, &again(id), id % 4 == 3) }).collect();
        for request in &mut requests[4..] {
            (request.ignore_eos, request.tokens_min) = (false, 9);
            request.stop_tokens = (0..spec.vocab as u32 / 4).collect();
        }
        let expected: Vec<_> = requests.iter().map(|request| alone(&mut model, &spec, request)).collect();
        for (blocks, batch_tokens_max) in [(256, 1024), (256, 11), (12, 33)] {
            let config = EngineConfig { blocks, batch_tokens_max, draft_tokens_max: 5, ..CONFIG };
            let load = in_company(&mut model, &spec, config, &requests, &expected);
            assert_eq!(load.tokens_generated, expected.iter().map(Vec::len).sum::<usize>() as u64);
            (drafted, right) = (drafted + load.tokens_drafted, right + load.drafted_right);
        }
    }
    assert!(right > 100 && right < drafted, "{right} of {drafted}");
}

/// The same bits with one, two and three threads.
#[test]
fn bits_do_not_depend_on_threads() {
    for (index, tiny) in TinyModel::families().iter().enumerate() {
        let of = |threads: usize| {
            let loaded = load_tiny(&format!("threads-{index}-{threads}"), tiny, threads);
            let (mut model, spec) = (loaded.model, loaded.spec);
            let request = Request { prompt_logprobs: Some(2), ..asking(1, &prompt(1, 90, spec.vocab), true) };
            let mut engine = model_engine(&spec, ROOMY);
            engine.admit(work(&request)).expect("room");
            let choices = Choices::of(drain(&mut engine, &mut model));
            let given: Vec<SampledToken> = choices.prompts[&request.id].iter().flatten().cloned().collect();
            (spec.weights_hash, bits(choices.sampled(1, 0)), bits(&given))
        };
        let one = of(1);
        assert_eq!(one.2.len(), 89);
        assert_eq!(of(2), one);
        assert_eq!(of(3), one);
    }
}

/// What decoding said about its tokens, one row at a time, a prefill of the same tokens says too, in any chunks: equal
/// bits, for every family, so also across the edge of a sliding window.
#[test]
fn prefill_and_decode_agree() {
    for (index, tiny) in TinyModel::families().iter().enumerate() {
        let loaded = load_tiny(&format!("agree-{index}"), tiny, 2);
        let (mut model, spec) = (loaded.model, loaded.spec);
        let prompt = prompt(5, 30, spec.vocab);
        let said = alone(&mut model, &spec, &Request { tokens_max: 60, ..asking(1, &prompt, true) });
        let mut tokens = prompt;
        tokens.extend(said.iter().map(|token| token.id));
        for batch_tokens_max in [1000, 17, 3] {
            let mut engine = model_engine(&spec, EngineConfig { batch_tokens_max, ..ROOMY });
            let again = Request { prompt_logprobs: Some(3), tokens_max: 1, ..asking(2, &tokens, false) };
            engine.admit(work(&again)).expect("room");
            let choices = Choices::of(drain(&mut engine, &mut model));
            let given: Vec<SampledToken> = choices.prompts[&again.id][30..].iter().flatten().cloned().collect();
            assert_eq!(bits(&given), bits(&said), "{} in chunks of {batch_tokens_max}", tiny.architecture);
        }
    }
}

/// Prefill in one engine, decode in another with copied blocks, from the prompt's end or behind tokens emitted before:
/// the same bits as in one place.
#[test]
fn handed_over_equals_local() {
    for (index, tiny) in TinyModel::families().iter().enumerate() {
        let loaded = load_tiny(&format!("handoff-{index}"), tiny, 1);
        let (mut model, spec) = (loaded.model, loaded.spec);
        for (len, emitted, choices) in [(31, 0, 1), (32, 0, 1), (33, 5, 1), (40, 20, 1), (33, 0, 3)] {
            let prompt = prompt(2, len, spec.vocab);
            let request = Request { choices, prompt_logprobs: Some(1), ..asking(1, &prompt, true) };
            let mut local = model_engine(&spec, ROOMY);
            local.admit(work(&request)).expect("room");
            let expected = Choices::of(drain(&mut local, &mut model));
            let so_far = |index| match index {
                0 => expected.sampled(1, 0)[..emitted].iter().map(|token| token.id).collect(),
                _ => Vec::new(),
            };
            let all: Vec<Choice> = (0..choices).map(|index| Choice { index, so_far: so_far(index) }).collect();
            let config = EngineConfig { batch_tokens_max: 13, ..CONFIG };
            let (mut here, mut there) = (model_engine(&spec, config), model_engine(&spec, config));
            let goal = Goal::Prefill { skip_blocks: 0, on_device: false };
            let handed = prefill(&mut here, &mut model, Work { choices: all.clone(), goal, ..work(&request) });
            let filled = Some(carry(&there, &handed, there.cache().lookup(&[])));
            there.admit(Work { choices: all, filled, ..work(&request) }).expect("room");
            let found = Choices::of(drain(&mut there, &mut model));
            for choice in 0..choices {
                let emitted = if choice == 0 { emitted } else { 0 };
                assert_eq!(bits(found.sampled(1, choice)), bits(&expected.sampled(1, choice)[emitted..]));
            }
            assert_eq!(found.prompts.is_empty(), emitted > 0);
            if emitted == 0 {
                assert_eq!(found.prompts, expected.prompts);
            }
        }
    }
}

/// Gone on with after any number of tokens, the stream is the same, bit by bit.
#[test]
fn resumed_at_every_token_equals_undisturbed() {
    for (index, tiny) in TinyModel::families().iter().enumerate() {
        let loaded = load_tiny(&format!("resume-{index}"), tiny, 1);
        let (mut model, spec) = (loaded.model, loaded.spec);
        let request = asking(1, &prompt(3, 21, spec.vocab), true);
        let whole = alone(&mut model, &spec, &request);
        for cut in 0..whole.len() {
            let so_far = whole[..cut].iter().map(|token| token.id).collect();
            let mut engine = model_engine(&spec, EngineConfig { batch_tokens_max: 9, ..CONFIG });
            engine.admit(Work { choices: vec![Choice { index: 0, so_far }], ..work(&request) }).expect("room");
            let rest = Choices::of(drain(&mut engine, &mut model));
            assert_eq!(bits(rest.sampled(1, 0)), bits(&whole[cut..]), "cut at {cut}");
        }
    }
}

/// Three choices together equal each asked alone, and they differ from one another.
#[test]
fn choices_together_equal_choices_apart() {
    let loaded = load_tiny("choices", &TinyModel::llama(), 2);
    let (mut model, spec) = (loaded.model, loaded.spec);
    let request = Request { choices: 3, ..asking(5, &prompt(4, 37, spec.vocab), true) };
    let mut engine = model_engine(&spec, CONFIG);
    engine.admit(work(&request)).expect("room");
    let together = Choices::of(drain(&mut engine, &mut model));
    for index in 0..3 {
        let mut engine = model_engine(&spec, CONFIG);
        let choices = vec![Choice { index, so_far: Vec::new() }];
        engine.admit(Work { choices, ..work(&request) }).expect("room");
        let apart = Choices::of(drain(&mut engine, &mut model));
        assert_eq!(bits(apart.sampled(5, index)), bits(together.sampled(5, index)));
    }
    assert_ne!(together.ids(5, 0), together.ids(5, 1));
    assert_ne!(together.ids(5, 1), together.ids(5, 2));
}

/// When a layer is reported, its part of every block of the batch is what it is after the whole batch.
#[test]
fn a_reported_layer_is_complete() {
    let loaded = load_tiny("layers", &TinyModel { layers: 3, ..TinyModel::llama() }, 1);
    let (mut model, spec) = (loaded.model, loaded.spec);
    let mut engine = model_engine(&spec, ROOMY);
    engine.admit(work(&asking(1, &prompt(4, 37, spec.vocab), true))).expect("room");
    let batch = engine.plan().expect("a batch");
    let read = |layer: usize| -> Vec<Vec<u8>> {
        let read = |block: &u32| {
            let mut bytes = vec![0; spec.layout.layer_bytes()];
            // SAFETY: nothing runs beside this test.
            unsafe { batch.arena().read_layer(*block, layer, &mut bytes) };
            bytes
        };
        batch.tables.iter().map(read).collect()
    };
    let mut seen = Vec::new();
    model.run(&batch, &mut |layer| seen.push((layer, read(layer))));
    assert_eq!(seen.iter().map(|entry| entry.0).collect::<Vec<_>>(), [0, 1, 2]);
    for (layer, bytes) in seen {
        assert!(bytes == read(layer), "layer {layer} was written after it was reported");
        assert!(bytes.iter().any(|block| block.iter().any(|byte| *byte != 0)));
    }
}

/// The hash names the weights, not the files they are cut into; one bit more or another theta is another model.
#[test]
fn the_weights_hash_names_the_content() {
    let plain = TinyModel::llama();
    let hash = |name: &str, model: &TinyModel| load_tiny(name, model, 1).spec.weights_hash;
    let whole = hash("hash-whole", &plain);
    assert_eq!(hash("hash-shards", &TinyModel { shards: 4, ..plain.clone() }), whole);
    let theta = TinyModel { config: serde_json::json!({"rope_theta": 20000.0}), ..plain.clone() };
    assert_ne!(hash("hash-theta", &theta), whole);
    let dir = crate::common::dir("hash-bit");
    plain.write(&dir, 7).expect("write");
    let file = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&file).expect("read");
    *bytes.last_mut().expect("bytes") ^= 1;
    std::fs::write(&file, bytes).expect("write");
    let options = baton_engine::LoadOptions::default();
    assert_ne!(baton_engine::load(&dir, options, &mut |_| {}).expect("load").spec.weights_hash, whole);
}
