//! The scheduler over a backend whose tokens are a hash of the whole prefix as it stands in the arena: any lost, stale
//! or foreign block changes every token after it, so equal tokens mean that all blocks were right.

use baton_core::{Finish, Lane, Refused, RequestId, SampledToken, TokenId};
use baton_engine::testing::{drain, request, step, work};
use baton_engine::{Choice, Engine, EngineConfig, Event, Filled, Goal, HashBackend, Work};

use crate::common::{CONFIG, Choices, hash_engine, prompt};

fn backend() -> HashBackend {
    HashBackend::new(1000)
}

/// What a request gives on an engine of its own, computed in one chunk.
fn alone(prompt: &[TokenId], tokens_max: u32) -> Vec<TokenId> {
    let config = EngineConfig { blocks: 256, batch_tokens_max: 1024, ..CONFIG };
    let mut engine = hash_engine(config);
    engine.admit(work(&request(1, prompt, tokens_max))).expect("room");
    Choices::of(drain(&mut engine, &mut backend())).ids(1, 0)
}

fn assert_idle(engine: &Engine) {
    let stats = engine.cache().stats();
    assert_eq!((stats.used, stats.in_flight), (0, 0), "something is still held");
    assert_eq!(stats.free + stats.cached, stats.total);
    assert_eq!((engine.load().running, engine.load().waiting), (0, 0));
}

/// Chunked prefill, decode and the length limit: the tokens do not depend on the chunks.
#[test]
fn one_request_ends_at_its_limit() {
    let prompt = prompt(1, 50, 1000);
    let expected = alone(&prompt, 9);
    for batch_tokens_max in [1, 3, 7, 64] {
        let mut engine = hash_engine(EngineConfig { batch_tokens_max, ..CONFIG });
        engine.admit(work(&request(1, &prompt, 9))).expect("room");
        let choices = Choices::of(drain(&mut engine, &mut backend()));
        assert_eq!(choices.ids(1, 0), expected);
        assert_eq!(choices.ends[&(RequestId(1), 0)].0, Finish::Length);
        assert_idle(&engine);
    }
}

/// Many requests with common prefixes in a cache that is too small for them: preempted, resumed, evicted, all the same.
#[test]
fn crowded_requests_equal_lone_ones() {
    for blocks in [16, 20, 33, 64] {
        let mut engine = hash_engine(EngineConfig { blocks, ..CONFIG });
        let prompts: Vec<Vec<TokenId>> = (0..12).map(|i| prompt(i % 4, 10 + 3 * i as usize, 1000)).collect();
        for (id, prompt) in prompts.iter().enumerate() {
            engine.admit(work(&request(id as u128, prompt, 14))).expect("room");
        }
        let choices = Choices::of(drain(&mut engine, &mut backend()));
        for (id, prompt) in prompts.iter().enumerate() {
            assert_eq!(choices.ids(id as u128, 0), alone(prompt, 14), "request {id} with {blocks} blocks");
        }
        assert_eq!(blocks < 64, engine.load().preemptions > 0, "{blocks} blocks");
        assert_idle(&engine);
    }
}

/// The second of two equal requests computes its last block only.
#[test]
fn an_equal_prompt_is_found_in_the_cache() {
    let prompt = prompt(3, 40, 1000);
    let mut engine = hash_engine(CONFIG);
    for (id, cached) in [(1, 0), (2, 36)] {
        engine.admit(work(&request(id, &prompt, 5))).expect("room");
        let choices = Choices::of(drain(&mut engine, &mut backend()));
        assert_eq!(choices.ids(id, 0), alone(&prompt, 5));
        assert_eq!(choices.ends[&(RequestId(id), 0)].1.cached_tokens, cached);
    }
    let salted = baton_core::Request { cache_salt: "other".into(), ..request(3, &prompt, 5) };
    engine.admit(work(&salted)).expect("room");
    let choices = Choices::of(drain(&mut engine, &mut backend()));
    assert_eq!(choices.ends[&(RequestId(3), 0)].1.cached_tokens, 0, "another tenant's blocks");
}

fn sampled(id: u128, prompt: &[TokenId], choices: u32) -> baton_core::Request {
    let mut request = baton_core::Request { choices, ..request(id, prompt, 11) };
    request.sampling.temperature = 1.0;
    request.sampling.seed = 99;
    request
}

/// Choices of one request equal the same choices asked one by one, also when their common tail is partly filled and
/// when blocks are scarce.
#[test]
fn choices_together_equal_choices_apart() {
    for (len, blocks) in [(8, 64), (9, 64), (10, 16), (11, 12)] {
        let prompt = prompt(5, len, 1000);
        let request = sampled(1, &prompt, 4);
        let mut engine = hash_engine(EngineConfig { blocks, ..CONFIG });
        engine.admit(work(&request)).expect("room");
        let together = Choices::of(drain(&mut engine, &mut backend()));
        for index in 0..4 {
            let mut lone = hash_engine(CONFIG);
            let choices = vec![Choice { index, so_far: Vec::new() }];
            lone.admit(Work { choices, ..work(&request) }).expect("room");
            let apart = Choices::of(drain(&mut lone, &mut backend()));
            assert_eq!(together.ids(1, index), apart.ids(1, index), "choice {index} of prompt {len}");
        }
        assert_idle(&engine);
    }
}

/// A request that goes on from any of its tokens gives the rest of the same stream.
#[test]
fn resumed_from_any_token_equals_undisturbed() {
    let prompt = prompt(6, 13, 1000);
    let request = sampled(1, &prompt, 2);
    let mut engine = hash_engine(CONFIG);
    engine.admit(work(&request)).expect("room");
    let whole = Choices::of(drain(&mut engine, &mut backend()));
    for cut in 0..=11 {
        let so_far = |index, cut: usize| Choice { index, so_far: whole.ids(1, index)[..cut].to_vec() };
        let mut engine = hash_engine(CONFIG);
        let choices = vec![so_far(0, cut), so_far(1, 11 - cut)];
        engine.admit(Work { choices, ..work(&request) }).expect("room");
        let rest = Choices::of(drain(&mut engine, &mut backend()));
        assert_eq!(rest.ids(1, 0), whole.ids(1, 0)[cut..], "cut at {cut}");
        assert_eq!(rest.ids(1, 1), whole.ids(1, 1)[11 - cut..], "cut at {cut}");
        assert_eq!(rest.ends[&(RequestId(1), 0)].0, Finish::Length);
        assert_idle(&engine);
    }
}

/// What a prefill hands over, with the blocks as they lie in its arena.
pub(crate) struct Handed {
    pub(crate) first: Vec<(u32, SampledToken)>,
    pub(crate) prompt_logprobs: Vec<Option<SampledToken>>,
    pub(crate) tokens: usize,
    pub(crate) exported: Vec<(usize, baton_core::BlockId)>,
    pub(crate) blocks: baton_engine::Blocks,
}

/// Prefills on `engine` and collects the exports as the worker would.
pub(crate) fn prefill(engine: &mut Engine, backend: &mut dyn baton_engine::Backend, work: Work) -> Handed {
    engine.admit(work).expect("room");
    let (mut exported, mut events) = (Vec::new(), Vec::new());
    while let Some(batch) = engine.plan() {
        let output = backend.run(&batch, &mut |_| {});
        exported.extend(batch.exports().iter().flat_map(|export| export.blocks.clone()));
        engine.commit(batch, output, &mut events);
    }
    let Some(Event::Prefilled { first, prompt_logprobs, blocks, tokens, .. }) = events.pop() else {
        panic!("no handoff")
    };
    Handed { first, prompt_logprobs, tokens, exported, blocks }
}

/// Copies the exported blocks into blocks of another engine, after the `skip` that it has already.
pub(crate) fn carry(from: &Engine, to: &Engine, handed: &Handed, mut held: baton_engine::Blocks) -> Filled {
    let skip = held.len();
    let indices: Vec<usize> = handed.exported.iter().map(|block| block.0).collect();
    assert_eq!(indices, (skip..handed.blocks.len()).collect::<Vec<_>>(), "each block announced once, in order");
    let reserved = to.cache().reserve(indices.len()).expect("room");
    let bytes = from.cache().arena().layout().block_bytes();
    for ((_, source), target) in handed.exported.iter().zip(reserved.ids()) {
        let (from, to) = (from.cache().arena().block(source.index), to.cache().arena().block(target.index));
        // SAFETY: `handed` holds the source, `reserved` the target.
        unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
    }
    held.append(reserved.fill(&[]));
    let (first, prompt_logprobs) = (handed.first.clone(), handed.prompt_logprobs.clone());
    Filled { blocks: held, tokens: handed.tokens, first, prompt_logprobs }
}

/// Prefill here, decode there, with copied blocks: the same tokens as in one place, for all lengths around a block, with
/// blocks that the receiver had before, and with tokens emitted before.
#[test]
fn handed_over_equals_local() {
    for len in 4..13 {
        for (skip, emitted) in [(0, 0), (1, 0), (0, 3), (1, 3)] {
            let prompt = prompt(8, len, 1000);
            let request = sampled(1, &prompt, 1);
            let mut local = hash_engine(CONFIG);
            local.admit(work(&request)).expect("room");
            let expected = Choices::of(drain(&mut local, &mut backend())).ids(1, 0);

            let (mut here, mut there) = (hash_engine(CONFIG), hash_engine(CONFIG));
            there.admit(work(&baton_core::Request { tokens_max: 1, ..request.clone() })).expect("room");
            drain(&mut there, &mut backend());
            let hashes = baton_core::BlockHash::chain("salt", &prompt, 4);
            let held = there.cache().lookup(&hashes[..skip]);
            assert_eq!(held.len(), skip);
            let choices = vec![Choice { index: 0, so_far: expected[..emitted].to_vec() }];
            let prefill_work =
                Work { choices: choices.clone(), goal: Goal::Prefill { skip_blocks: skip }, ..work(&request) };
            let handed = prefill(&mut here, &mut backend(), prefill_work);
            let filled = Some(carry(&here, &there, &handed, held));
            drop(handed);
            assert_idle(&here);
            there.admit(Work { choices, filled, ..work(&request) }).expect("room");
            let tokens = Choices::of(drain(&mut there, &mut backend())).ids(1, 0);
            assert_eq!(tokens, expected[emitted..], "prompt {len}, {skip} blocks skipped, {emitted} tokens emitted");
            assert_idle(&there);
        }
    }
}

/// First tokens of a handoff come out before any step, and the end too when one token was asked.
#[test]
fn first_tokens_need_no_step() {
    let prompt = prompt(8, 9, 1000);
    let request = request(1, &prompt, 1);
    let (mut here, mut there) = (hash_engine(CONFIG), hash_engine(CONFIG));
    let goal = Goal::Prefill { skip_blocks: 0 };
    let handed = prefill(&mut here, &mut backend(), Work { goal, ..work(&request) });
    let filled = Some(carry(&here, &there, &handed, there.cache().lookup(&[])));
    there.admit(Work { filled, ..work(&request) }).expect("room");
    let mut events = Vec::new();
    there.take_events(&mut events);
    let choices = Choices::of(events);
    assert_eq!(choices.ids(1, 0), alone(&prompt, 1));
    assert_eq!(choices.ends.len(), 1);
    assert!(there.plan().is_none());
    assert_idle(&there);
}

/// Interactive requests are served before batch ones that came earlier, and take their blocks if they must.
#[test]
fn the_interactive_lane_goes_first() {
    let mut engine = hash_engine(EngineConfig { blocks: 16, ..CONFIG });
    let batch = baton_core::Request { lane: Lane::Batch, ..request(1, &prompt(1, 50, 1000), 10) };
    engine.admit(work(&batch)).expect("room");
    let mut events = Vec::new();
    for _ in 0..5 {
        step(&mut engine, &mut backend(), &mut events);
    }
    engine.admit(work(&request(2, &prompt(2, 30, 1000), 10))).expect("room");
    events.extend(drain(&mut engine, &mut backend()));
    let ends: Vec<u128> = events
        .iter()
        .filter_map(|event| match event {
            Event::Finished { request, .. } => Some(request.0),
            _ => None,
        })
        .collect();
    assert_eq!(ends, [2, 1]);
    assert_eq!(engine.load().preemptions, 1);
    let choices = Choices::of(events);
    assert_eq!(choices.ids(1, 0), alone(&batch.prompt, 10));
}

/// Refusals hold nothing.
#[test]
fn what_cannot_be_done_is_refused() {
    let mut engine = hash_engine(EngineConfig { blocks: 8, queue_max: 2, ..CONFIG });
    let refused = |engine: &mut Engine, request: baton_core::Request| engine.admit(work(&request)).err();
    assert_eq!(refused(&mut engine, request(1, &prompt(1, 30, 1000), 4)), Some(Refused::TooLarge));
    assert_eq!(refused(&mut engine, request(1, &[], 4)), Some(Refused::Incompatible));
    assert_eq!(refused(&mut engine, request(1, &[1000], 4)), Some(Refused::Incompatible));
    let many = baton_core::Request { choices: 9, ..request(1, &[1], 4) };
    assert_eq!(refused(&mut engine, many), Some(Refused::TooLarge));
    for id in 0..2 {
        assert_eq!(refused(&mut engine, request(id, &[1], 4)), None);
    }
    assert_eq!(refused(&mut engine, request(1, &[1], 4)), Some(Refused::NoCapacity));
    drain(&mut engine, &mut backend());
    assert_idle(&engine);
}

/// A cancelled request gives everything back, whether it waits, runs, or is in the batch being run.
#[test]
fn cancel_frees_everything() {
    for steps in 0..9 {
        for during in [false, true] {
            let mut engine = hash_engine(CONFIG);
            let request = sampled(1, &prompt(4, 30, 1000), 3);
            engine.admit(work(&request)).expect("room");
            let mut events = Vec::new();
            for _ in 0..steps {
                step(&mut engine, &mut backend(), &mut events);
            }
            let batch = if during { engine.plan() } else { None };
            engine.cancel(RequestId(1));
            engine.cancel(RequestId(1));
            if let Some(batch) = batch {
                let output = baton_engine::Backend::run(&mut backend(), &batch, &mut |_| {});
                engine.commit(batch, output, &mut events);
            }
            events.extend(drain(&mut engine, &mut backend()));
            let choices = Choices::of(events);
            assert_eq!(choices.aborted, [RequestId(1)], "after {steps} steps");
            assert_eq!(choices.ends.len(), 0);
            assert_idle(&engine);
        }
    }
}
