//! The GPU's backend, whole: the promises that the CPU's backend keeps (models.rs), and tokens that are about as likely as
//! the CPU says. Over kernels that this machine's CPU emulates, or, where `BATON_TEST_GPU` names a folder for compiled
//! kernels, on GPU 0 (tests/gpu/run.sh).

use std::path::Path;

use baton_core::{Request, SampledToken, TokenId};
use baton_engine::cuda::LoadedGpu;
use baton_engine::testing::{TinyModel, drain, request, work};
use baton_engine::{Backend, Choice, Engine, EngineConfig, Filled, Goal, ModelSpec, Work};
use baton_kernels::cuda::{Cubins, Gpu};

use crate::common::{CONFIG, Choices, bits, carry, dir, in_company, load_tiny, model_engine, prefill, prompt};

const TOKENS: u32 = 6;

/// What these tests run on.
pub(crate) fn opened() -> Gpu {
    match std::env::var_os("BATON_TEST_GPU") {
        Some(cubins) => Gpu::open(0, &Cubins::new(cubins)).expect("a GPU"),
        None => Gpu::emulated(Path::new(env!("CARGO_TARGET_TMPDIR"))).expect("a C++ compiler builds the emulation"),
    }
}

/// Experts are narrow, since the emulation takes its time for each.
fn families() -> Vec<TinyModel> {
    let narrow = |tiny: TinyModel| match tiny.experts {
        0 => tiny,
        _ => TinyModel { intermediate: 40, ..tiny },
    };
    TinyModel::families().into_iter().map(narrow).collect()
}

fn load(name: &str, tiny: &TinyModel) -> LoadedGpu {
    let dir = dir(name);
    tiny.write(&dir, 7).expect("write a model");
    LoadedGpu::on(opened(), &dir, 1, &mut |_| {}).expect("load")
}

fn asking(id: u128, prompt: &[TokenId]) -> Request {
    let mut request = Request { logprobs: Some(2), ..request(id, prompt, TOKENS) };
    request.ignore_eos = true;
    if id % 2 == 1 {
        request.sampling.temperature = 0.8;
        request.sampling.seed = id as u64;
        request.sampling.repetition_penalty = 1.1;
        request.sampling.top_p = 0.95;
    }
    request
}

fn alone(model: &mut dyn Backend, spec: &ModelSpec, request: &Request) -> Vec<SampledToken> {
    let mut engine = model_engine(spec, CONFIG);
    engine.admit(work(request)).expect("room");
    Choices::of(drain(&mut engine, model)).sampled(request.id.0, 0).to_vec()
}

/// Alone, among others, in chunks, behind a prefix hit, and preempted: the same bits.
#[test]
fn bits_do_not_depend_on_company() {
    for (index, tiny) in families().iter().enumerate() {
        let LoadedGpu { mut model, spec } = load(&format!("gpu-company-{index}"), tiny);
        let requests: Vec<Request> =
            (0..4).map(|id| asking(id, &prompt(id as u64 % 3, 40 + id as usize, spec.vocab))).collect();
        let expected: Vec<_> = requests.iter().map(|request| alone(&mut model, &spec, request)).collect();
        for (blocks, batch_tokens_max) in [(64, 33), (6, 20)] {
            in_company(&mut model, &spec, EngineConfig { blocks, batch_tokens_max, ..CONFIG }, &requests, &expected);
        }
    }
}

/// Blocks that leave one GPU layer by layer through the host's arena and reach another one's the same way carry the
/// sequence on with the same bits, its choices' shared blocks included.
#[test]
fn handed_over_equals_local() {
    for (index, tiny) in families().iter().enumerate() {
        let LoadedGpu { model: mut first, spec } = load(&format!("gpu-from-{index}"), tiny);
        let LoadedGpu { model: mut second, .. } = load(&format!("gpu-to-{index}"), tiny);
        for (len, choices) in [(31, 1), (33, 3)] {
            let request = Request { choices, prompt_logprobs: Some(1), ..asking(1, &prompt(2, len, spec.vocab)) };
            let mut local = model_engine(&spec, CONFIG);
            local.admit(work(&request)).expect("room");
            let expected = Choices::of(drain(&mut local, &mut first));
            let all: Vec<Choice> = (0..choices).map(|index| Choice { index, so_far: Vec::new() }).collect();
            let (mut here, mut there) = (model_engine(&spec, CONFIG), model_engine(&spec, CONFIG));
            // A worker that has prefilled before sends blocks that it finds in its cache.
            for round in 0..2 {
                let goal = Goal::Prefill { skip_blocks: 0, on_device: false };
                let asked = Work { choices: all.clone(), goal, ..work(&request) };
                let handed = prefill(&mut here, &mut first, asked);
                let filled = Some(carry(&there, &handed, there.cache().lookup(&[])));
                there.admit(Work { choices: all.clone(), filled, ..work(&request) }).expect("room");
                let found = Choices::of(drain(&mut there, &mut second));
                for choice in 0..choices {
                    let (found, expected) = (found.sampled(1, choice), expected.sampled(1, choice));
                    assert_eq!(bits(found), bits(expected), "{} round {round}", tiny.architecture);
                }
                assert_eq!(found.prompts, expected.prompts);
            }
        }
    }
}

/// Blocks that go from one GPU's memory straight into another's, as links between GPUs copy them, carry the sequence on with the
/// same bits; neither host's arena has a byte of them.
#[test]
fn handed_over_from_gpu_to_gpu_equals_local() {
    let tiny = &families()[0];
    let LoadedGpu { model: mut first, spec } = load("gpu-direct-from", tiny);
    let LoadedGpu { model: mut second, .. } = load("gpu-direct-to", tiny);
    for (len, choices) in [(31, 1), (33, 3)] {
        let request = Request { choices, prompt_logprobs: Some(1), ..asking(1, &prompt(2, len, spec.vocab)) };
        let mut local = model_engine(&spec, CONFIG);
        local.admit(work(&request)).expect("room");
        let expected = Choices::of(drain(&mut local, &mut first));
        let all: Vec<Choice> = (0..choices).map(|index| Choice { index, so_far: Vec::new() }).collect();
        let (mut here, mut there) = (model_engine(&spec, CONFIG), model_engine(&spec, CONFIG));
        for (engine, model) in [(&here, &mut first), (&there, &mut second)] {
            engine.cache().computes_elsewhere();
            model.prepare(engine.cache().arena());
            engine.cache().arena().attach(model.device().expect("a GPU's memory"));
        }
        let device = |engine: &Engine| engine.cache().arena().device().expect("attached").clone();
        let source = device(&there).map(device(&here).descriptor().expect("shared"), here.cache().arena().bytes());
        let source = source.expect("mapped");
        for round in 0..2 {
            let goal = Goal::Prefill { skip_blocks: 0, on_device: true };
            let handed = prefill(&mut here, &mut first, Work { choices: all.clone(), goal, ..work(&request) });
            assert!(handed.blocks.are_on_device() && !handed.blocks.are_present(), "round {round}");
            assert!(handed.announced.iter().all(|(_, _, bytes)| bytes.iter().all(|byte| *byte == 0)), "on the host");
            let reserved = there.cache().reserve(handed.blocks.len()).expect("room");
            let pairs: Vec<(u32, u32)> =
                handed.blocks.ids().iter().zip(reserved.ids()).map(|(from, to)| (from.index, to.index)).collect();
            for layer in 0..spec.layout.layers as usize {
                let (from, to) = (here.cache().arena().extents(layer), there.cache().arena().extents(layer));
                // SAFETY: `reserved` holds the blocks.
                let sums = unsafe { source.fetch(&from, &to, &pairs) }.and_then(|arriving| arriving.wait());
                let announced = device(&here).sum(&from, &pairs.iter().map(|pair| pair.0).collect::<Vec<_>>());
                assert_eq!(sums.expect("copied"), announced.and_then(|arriving| arriving.wait()).expect("summed"));
            }
            reserved.ids().into_iter().for_each(|block| there.cache().arena().left_on_device(block));
            let blocks = reserved.fill(&[]);
            assert!(blocks.are_on_device() && !blocks.are_present(), "round {round}");
            let (first_tokens, prompt_logprobs) = (handed.first.clone(), handed.prompt_logprobs.clone());
            let filled = Filled { blocks, tokens: handed.tokens, first: first_tokens, prompt_logprobs };
            there.admit(Work { choices: all.clone(), filled: Some(filled), ..work(&request) }).expect("room");
            let found = Choices::of(drain(&mut there, &mut second));
            for choice in 0..choices {
                assert_eq!(bits(found.sampled(1, choice)), bits(expected.sampled(1, choice)), "round {round}");
            }
        }
    }
}

/// Along the CPU's own tokens, log-probabilities agree as two roundings of one model do: also where only some layers have experts
/// and their weights are a softmax over all.
#[test]
fn says_about_what_the_cpu_says() {
    let some = TinyModel {
        architecture: "Qwen3MoeForCausalLM",
        layers: 3,
        experts: 3,
        mlp_layers: &[0, 2],
        config: serde_json::json!({"norm_topk_prob": false}),
        ..TinyModel::llama()
    };
    for (index, tiny) in families().iter().chain([&some]).enumerate() {
        let mut cpu = load_tiny(&format!("gpu-cpu-{index}"), tiny, 1);
        let LoadedGpu { model: mut gpu, spec } = load(&format!("gpu-gpu-{index}"), tiny);
        assert_eq!(spec.weights_hash, cpu.spec.weights_hash);
        assert_ne!(spec.numerics, cpu.spec.numerics);
        let request = Request { prompt_logprobs: Some(1), ..asking(1, &prompt(1, 90, spec.vocab)) };
        let given = |model: &mut dyn Backend| -> Vec<f32> {
            let mut engine = model_engine(&spec, EngineConfig { batch_tokens_max: 100, ..CONFIG });
            engine.admit(work(&request)).expect("room");
            let prompts = Choices::of(drain(&mut engine, model)).prompts;
            prompts[&request.id].iter().flatten().map(|token| token.logprob).collect()
        };
        let (here, there) = (given(&mut cpu.model), given(&mut gpu));
        let apart: f32 = here.iter().zip(&there).map(|(a, b)| (a - b).abs()).sum::<f32>() / here.len() as f32;
        assert!(here.len() == 89 && apart < 0.05, "{}: {apart}", tiny.architecture);
    }
}
