//! Groups of 1, 2, 4 and 8 ranks: equal tokens, log-probability bits and KV, in company and handed over between groups of
//! different sizes; numbers of ranks that cannot be are refused; a rank that breaks ends its group soon.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use baton_core::{Request, SampledToken};
use baton_engine::testing::{Fault, TinyModel, drain, faulty_group, request, step, work};
use baton_engine::{CpuModel, Engine, EngineConfig, Goal, LoadOptions, Loaded, ModelSpec, Work, load, load_ranks};
use serde_json::json;

use crate::common::{Bits, CONFIG, Choices, bits, carry, dir, load_tiny_as, model_engine, prefill, prompt};

pub(crate) const ROOMY: EngineConfig =
    EngineConfig { blocks: 256, batch_tokens_max: 1024, sequences_max: 64, ..CONFIG };

/// Every family with heads for eight ranks, kv heads for as many, fewer and one, and widths that nothing divides.
fn models() -> Vec<TinyModel> {
    let of = |(index, model): (usize, TinyModel)| TinyModel {
        heads: 8,
        kv_heads: [2, 8, 4, 1, 4, 2][index],
        head_dim: [8, 16, 8, 10, 8, 16][index],
        intermediate: [96, 101, 77, 130, 70, 99][index],
        vocab: [128, 131, 200, 97, 128, 111][index],
        ..model
    };
    let biased = TinyModel { config: json!({"attention_bias": false, "mlp_bias": false}), ..TinyModel::llama() };
    let plain = TinyModel { heads: 8, kv_heads: 2, head_dim: 8, layers: 3, ..biased };
    TinyModel::families().into_iter().enumerate().map(of).chain([plain]).collect()
}

fn options(ranks: usize, threads: usize) -> LoadOptions {
    LoadOptions { ranks, threads, ..LoadOptions::default() }
}

fn asking(id: u128, len: usize, vocab: usize) -> Request {
    let mut request = Request { logprobs: Some(3), ..request(id, &prompt(id as u64, len, vocab), 12) };
    request.ignore_eos = true;
    if id % 2 == 1 {
        request.sampling.temperature = 0.8;
        request.sampling.seed = id as u64;
    }
    Request { prompt_logprobs: (id.is_multiple_of(3)).then_some(2), ..request }
}

fn name(test: &str, index: usize, ranks: usize) -> String {
    format!("{test}-{index}-{ranks}")
}

/// Everything a group says about a few requests together: each choice's tokens and bits, and the prompts'.
pub(crate) fn said(loaded: &mut Loaded, config: EngineConfig) -> Vec<(Vec<Bits>, Vec<Bits>)> {
    let Loaded { model, spec } = loaded;
    answers(&mut model_engine(spec, config), model, spec)
}

/// The same over an engine that is there.
pub(crate) fn answers(engine: &mut Engine, model: &mut CpuModel, spec: &ModelSpec) -> Vec<(Vec<Bits>, Vec<Bits>)> {
    let requests: Vec<Request> = (0..5).map(|id| asking(id, 9 + 17 * id as usize, spec.vocab)).collect();
    requests.iter().for_each(|request| engine.admit(work(request)).expect("room"));
    let choices = Choices::of(drain(engine, model));
    let of = |request: &Request| {
        let given = choices.prompts.get(&request.id).into_iter().flatten().flatten();
        (bits(choices.sampled(request.id.0, 0)), bits(&given.cloned().collect::<Vec<SampledToken>>()))
    };
    requests.iter().map(of).collect()
}

#[test]
fn groups_of_any_size_give_the_same_bits() {
    for (index, tiny) in models().iter().enumerate() {
        let mut whole = load_tiny_as(&name("group", index, 1), tiny, options(1, 2));
        let expected = said(&mut whole, ROOMY);
        for (ranks, threads) in [(2, 1), (2, 4), (4, 1), (8, 1)] {
            let mut group = load_tiny_as(&name("group", index, ranks), tiny, options(ranks, threads));
            assert_eq!(group.model.ranks(), ranks);
            assert_eq!((&group.spec.numerics, group.spec.parameters), (&whole.spec.numerics, whole.spec.parameters));
            for config in [ROOMY, EngineConfig { blocks: 16, batch_tokens_max: 13, ..CONFIG }] {
                let same = said(&mut group, config) == expected;
                assert!(same, "{} with {ranks} ranks, {config:?}", tiny.architecture);
            }
        }
    }
}

/// Prefill in a group of one size, decode in a group of another: the bits of one place.
#[test]
fn groups_of_different_sizes_hand_over() {
    for (index, tiny) in models().iter().enumerate() {
        let mut whole = load_tiny_as(&name("hand", index, 1), tiny, options(1, 1));
        let request = asking(3, 40, whole.spec.vocab);
        let mut engine = model_engine(&whole.spec, ROOMY);
        engine.admit(work(&request)).expect("room");
        let expected = Choices::of(drain(&mut engine, &mut whole.model));
        let mut groups: Vec<Loaded> =
            [2, 4].map(|ranks| load_tiny_as(&name("hand", index, ranks), tiny, options(ranks, 1))).into();
        groups.push(whole);
        for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 1)] {
            let spec = &groups[from].spec;
            let config = EngineConfig { batch_tokens_max: 13, ..CONFIG };
            let (mut here, mut there) = (model_engine(spec, config), model_engine(spec, config));
            let goal = Goal::Prefill { skip_blocks: 0, on_device: false };
            let handed = prefill(&mut here, &mut groups[from].model, Work { goal, ..work(&request) });
            let filled = Some(carry(&there, &handed, there.cache().lookup(&[])));
            there.admit(Work { filled, ..work(&request) }).expect("room");
            let found = Choices::of(drain(&mut there, &mut groups[to].model));
            assert_eq!(bits(found.sampled(3, 0)), bits(expected.sampled(3, 0)), "{}", tiny.architecture);
            assert_eq!(found.prompts, expected.prompts);
        }
    }
}

#[test]
fn ranks_that_cannot_share_a_model_are_refused() {
    let three_kv = TinyModel { heads: 6, kv_heads: 3, ..TinyModel::llama() };
    let narrow = TinyModel { heads: 8, kv_heads: 8, head_dim: 8, intermediate: 9, ..TinyModel::llama() };
    let cases = [
        (TinyModel::llama(), 3, "1, 2, 4 and 8 are possible"),
        (TinyModel::llama(), 0, "1, 2, 4 and 8 are possible"),
        (TinyModel::llama(), 16, "1, 2, 4 and 8 are possible"),
        (TinyModel::llama(), 8, "do not divide the model's 4 attention heads"),
        (three_kv, 2, "neither divide the model's 3 kv heads"),
        (narrow, 8, "an inner width of 9 leaves nothing for some"),
    ];
    for (index, (model, ranks, reason)) in cases.into_iter().enumerate() {
        let dir = dir(&name("refused", index, ranks));
        model.write(&dir, 7).expect("write a model");
        let error = load(&dir, options(ranks, 1), &mut |_| {}).err().expect("refused").to_string();
        assert!(error.contains(reason) && error.contains("--tp"), "{error}");
    }
}

/// A rank that panics, or does not come any more, in the middle of its work: rank 0 hears of it within the time it is
/// willing to wait, and nobody is left who could write.
#[test]
fn a_rank_that_breaks_ends_its_group() {
    for (ranks, hangs) in [(2, false), (4, false), (2, true)] {
        let dir = dir(&format!("breaks-{ranks}-{hangs}"));
        TinyModel::llama().write(&dir, 7).expect("write a model");
        let (group, spec) = load_ranks(&dir, options(ranks, 1), &mut |_| {}).expect("load");
        let (_keep, fault): (_, Fault) = match hangs {
            true => hanging(),
            false => (None, Fault::Panics),
        };
        let mut model = faulty_group(group, ranks - 1, 2, fault).expect("threads");
        let (done, ended) = sync_channel(1);
        let thread = std::thread::Builder::new().spawn(move || {
            let mut engine = model_engine(&spec, ROOMY);
            engine.admit(work(&asking(1, 20, spec.vocab))).expect("room");
            let mut events = Vec::new();
            let steps = (0..9).take_while(|_| {
                let stepped = catch_unwind(AssertUnwindSafe(|| step(&mut engine, &mut model, &mut events)));
                stepped.is_ok()
            });
            let steps = steps.count();
            drop(model);
            done.send(steps).expect("the test waits");
        });
        let steps = ended.recv_timeout(Duration::from_secs(30)).expect("nothing hangs");
        assert_eq!(steps, 2, "{ranks} ranks");
        thread.expect("a thread").join().expect("no panic");
    }
}

fn hanging() -> (Option<SyncSender<()>>, Fault) {
    let (sender, until): (_, Receiver<()>) = sync_channel(0);
    (Some(sender), Fault::Hangs(until))
}
