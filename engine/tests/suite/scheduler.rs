//! The scheduler over a backend whose tokens are a hash of the whole prefix as it stands in the arena: any lost, stale
//! or foreign block changes every token after it, so equal tokens mean that all blocks were right.

use baton_core::{Finish, Lane, Refused, Request, RequestId, TokenId};
use baton_engine::testing::{drain, request, step, work};
use baton_engine::{Backend, Choice, Engine, EngineConfig, Event, Goal, HashBackend, PromptsBeside, Work};
use proptest::prelude::*;

use crate::common::{CONFIG, Choices, carry, hash_engine, prefill, prompt};

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

/// A long prompt beside sequences that decode takes so many rows of a step as it was told, and the whole step without them.
#[test]
fn prompts_beside_decodes_are_bounded() {
    let mut engine = hash_engine(EngineConfig { blocks: 256, batch_tokens_max: 40, ..CONFIG });
    engine.prompts_beside_decodes(PromptsBeside { rows: 5, doubling: usize::MAX });
    engine.admit(work(&request(1, &prompt(1, 10, 1000), 6))).expect("room");
    let mut events = Vec::new();
    assert!(step(&mut engine, &mut backend(), &mut events));
    engine.admit(work(&request(2, &prompt(2, 200, 1000), 2))).expect("room");
    let mut sizes = Vec::new();
    while let Some(batch) = engine.plan() {
        sizes.push(batch.tokens.len());
        let output = backend().run(&batch, &mut |_| {});
        engine.commit(batch, output, &mut events);
    }
    assert_eq!(sizes, [6, 6, 6, 6, 6, 40, 40, 40, 40, 15, 1]);
    let choices = Choices::of(events);
    assert_eq!(
        [choices.ids(1, 0), choices.ids(2, 0)],
        [alone(&prompt(1, 10, 1000), 6), alone(&prompt(2, 200, 1000), 2)]
    );
}

/// The further into a prompt, the fewer of its rows a step has beside one that decodes, and two prompts share the room.
#[test]
fn rows_far_into_a_prompt_count_more() {
    let mut engine = hash_engine(EngineConfig { blocks: 256, batch_tokens_max: 90, ..CONFIG });
    engine.prompts_beside_decodes(PromptsBeside { rows: 40, doubling: 50 });
    engine.admit(work(&request(1, &prompt(1, 10, 1000), 40))).expect("room");
    let mut events = Vec::new();
    assert!(step(&mut engine, &mut backend(), &mut events));
    engine.admit(work(&request(2, &prompt(2, 150, 1000), 1))).expect("room");
    engine.admit(work(&request(3, &prompt(3, 20, 1000), 1))).expect("room");
    let mut sizes = Vec::new();
    while let Some(batch) = engine.plan() {
        sizes.push(batch.spans[1..].iter().map(|span| (span.position, span.rows)).collect::<Vec<_>>());
        let output = backend().run(&batch, &mut |_| {});
        engine.commit(batch, output, &mut events);
    }
    let expected = [
        vec![(0, 30), (0, 2)],
        vec![(30, 22), (2, 1)],
        vec![(52, 18), (3, 1)],
        vec![(70, 16)],
        vec![(86, 16)],
        vec![(102, 16)],
        vec![(118, 16)],
        vec![(134, 16)],
        vec![(4, 16)],
        vec![],
    ];
    assert_eq!(sizes[..10], expected);
    assert!(sizes[10..].iter().all(Vec::is_empty), "{sizes:?}");
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
    let salted = Request { cache_salt: "other".into(), ..request(3, &prompt, 5) };
    engine.admit(work(&salted)).expect("room");
    let choices = Choices::of(drain(&mut engine, &mut backend()));
    assert_eq!(choices.ends[&(RequestId(3), 0)].1.cached_tokens, 0, "another tenant's blocks");
}

fn sampled(id: u128, prompt: &[TokenId], choices: u32) -> Request {
    let mut request = Request { choices, ..request(id, prompt, 11) };
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

            let mut here = hash_engine(EngineConfig { batch_tokens_max: 3, ..CONFIG });
            let mut there = hash_engine(CONFIG);
            there.admit(work(&Request { tokens_max: 1, ..request.clone() })).expect("room");
            drain(&mut there, &mut backend());
            let hashes = baton_core::BlockHash::chain("salt", &prompt, 4);
            let held = there.cache().lookup(&hashes[..skip]);
            assert_eq!(held.len(), skip);
            let choices = vec![Choice { index: 0, so_far: expected[..emitted].to_vec() }];
            let prefill_work = Work {
                choices: choices.clone(),
                goal: Goal::Prefill { skip_blocks: skip, on_device: false },
                ..work(&request)
            };
            let handed = prefill(&mut here, &mut backend(), prefill_work);
            let filled = Some(carry(&there, &handed, held));
            drop(handed);
            assert_idle(&here);
            there.admit(Work { choices, filled, ..work(&request) }).expect("room");
            let tokens = Choices::of(drain(&mut there, &mut backend())).ids(1, 0);
            assert_eq!(tokens, expected[emitted..], "prompt {len}, {skip} blocks skipped, {emitted} tokens emitted");
            assert_idle(&there);
        }
    }
}

/// Blocks without first tokens, of less than the prompt, or more than it needs: what is missing is computed here.
#[test]
fn partly_filled_work_is_completed() {
    for len in 4..13 {
        let request = sampled(1, &prompt(9, len, 1000), 2);
        let mut local = hash_engine(CONFIG);
        local.admit(work(&request)).expect("room");
        let expected = Choices::of(drain(&mut local, &mut backend()));
        for (known, tokens, spare) in [(0, len, 0), (1, len, 2), (0, len / 4 * 4, 0), (2, len, 0)] {
            let (mut here, mut there) = (hash_engine(CONFIG), hash_engine(CONFIG));
            let goal = Goal::Prefill { skip_blocks: 0, on_device: false };
            let handed = prefill(&mut here, &mut backend(), Work { goal, ..work(&request) });
            let mut filled = carry(&there, &handed, there.cache().lookup(&[]));
            filled.blocks.append(there.cache().reserve(spare).expect("room").fill(&[]));
            filled.first.truncate(known);
            filled.tokens = tokens;
            if tokens < len {
                filled.blocks.truncate(tokens / 4);
                filled.first.clear();
            }
            there.admit(Work { filled: Some(filled), ..work(&request) }).expect("room");
            let found = Choices::of(drain(&mut there, &mut backend()));
            assert_eq!(found.tokens, expected.tokens, "prompt {len}, {known} first tokens, {tokens} positions");
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
    let goal = Goal::Prefill { skip_blocks: 0, on_device: false };
    let handed = prefill(&mut here, &mut backend(), Work { goal, ..work(&request) });
    let filled = Some(carry(&there, &handed, there.cache().lookup(&[])));
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
    let batch = Request { lane: Lane::Batch, ..request(1, &prompt(1, 50, 1000), 10) };
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

/// A request that another worker had is served before those that came earlier.
#[test]
fn what_was_moved_goes_first() {
    let mut engine = hash_engine(EngineConfig { sequences_max: 1, ..CONFIG });
    for id in 1..=2u64 {
        engine.admit(work(&request(id.into(), &prompt(id, 30, 1000), 4))).expect("room");
    }
    let moved = request(3, &prompt(3, 30, 1000), 6);
    let whole = alone(&moved.prompt, 6);
    let choices = vec![Choice { index: 0, so_far: whole[..2].to_vec() }];
    engine.admit(Work { choices, moved: true, ..work(&moved) }).expect("room");
    let events = drain(&mut engine, &mut backend());
    let end = |event: &Event| match event {
        Event::Finished { request, .. } => Some(request.0),
        _ => None,
    };
    assert_eq!(events.iter().filter_map(end).collect::<Vec<_>>(), [3, 1, 2]);
    assert_eq!(Choices::of(events).ids(3, 0), whole[2..]);
}

/// A moved request's step is not made longer by fresh prompts, even by one that has begun; those go on afterwards.
#[test]
fn nothing_fresh_is_computed_beside_what_was_moved() {
    let mut engine = hash_engine(EngineConfig { blocks: 64, batch_tokens_max: 32, ..CONFIG });
    let fresh = request(1, &prompt(1, 40, 1000), 4);
    engine.admit(work(&fresh)).expect("room");
    let mut events = Vec::new();
    step(&mut engine, &mut backend(), &mut events);
    let moved = request(2, &prompt(2, 20, 1000), 6);
    let whole = alone(&moved.prompt, 6);
    let choices = vec![Choice { index: 0, so_far: whole[..2].to_vec() }];
    engine.admit(Work { choices, moved: true, ..work(&moved) }).expect("room");
    let batch = engine.plan().expect("work");
    assert_eq!(batch.tokens.len(), 22);
    let output = backend().run(&batch, &mut |_| {});
    engine.commit(batch, output, &mut events);
    events.extend(drain(&mut engine, &mut backend()));
    let choices = Choices::of(events);
    assert_eq!((choices.ids(1, 0), choices.ids(2, 0)), (alone(&fresh.prompt, 4), whole[2..].to_vec()));
}

/// Of those that were moved, the ones that lack least go on first, and not in the step of one that lacks much.
#[test]
fn what_was_moved_and_lacks_little_does_not_wait_for_what_lacks_much() {
    let mut engine = hash_engine(EngineConfig { blocks: 96, batch_tokens_max: 256, ..CONFIG });
    let long = request(1, &prompt(1, 120, 1000), 6);
    let short: Vec<_> = (2..=4u64).map(|id| request(id.into(), &prompt(id, 20, 1000), 6)).collect();
    for moved in std::iter::once(&long).chain(&short) {
        let so_far = alone(&moved.prompt, 6)[..2].to_vec();
        let choices = vec![Choice { index: 0, so_far }];
        engine.admit(Work { choices, moved: true, ..work(moved) }).expect("room");
    }
    let mut events = Vec::new();
    let mut steps = Vec::new();
    for _ in 0..3 {
        let batch = engine.plan().expect("work");
        steps.push(batch.tokens.len());
        let output = backend().run(&batch, &mut |_| {});
        engine.commit(batch, output, &mut events);
    }
    assert_eq!(steps[0], 44, "two of the short ones");
    assert_eq!(steps[1], 2 + 22, "the third beside two that decode, and not the long one");
    assert_eq!(steps[2], 3 + 122);
    events.extend(drain(&mut engine, &mut backend()));
    let choices = Choices::of(events);
    for moved in std::iter::once(&long).chain(&short) {
        assert_eq!(choices.ids(moved.id.0, 0), alone(&moved.prompt, 6)[2..].to_vec());
    }
}

/// Refusals hold nothing.
#[test]
fn what_cannot_be_done_is_refused() {
    let mut engine = hash_engine(EngineConfig { blocks: 8, queue_max: 2, ..CONFIG });
    let refused = |engine: &mut Engine, request: Request| engine.admit(work(&request)).err();
    assert_eq!(refused(&mut engine, request(1, &prompt(1, 30, 1000), 4)), Some(Refused::TooLarge));
    assert_eq!(refused(&mut engine, request(1, &[], 4)), Some(Refused::Incompatible));
    assert_eq!(refused(&mut engine, request(1, &[1000], 4)), Some(Refused::Incompatible));
    let many = Request { choices: 9, ..request(1, &[1], 4) };
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
            let used = engine.cache().stats().used;
            engine.cancel(RequestId(1));
            engine.cancel(RequestId(1));
            if let Some(batch) = batch {
                assert_eq!(engine.cache().stats().used, used, "the backend writes these blocks");
                let output = Backend::run(&mut backend(), &batch, &mut |_| {});
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

/// Choices that are given up at any moment leave the other one's tokens as they are, and nothing behind.
#[test]
fn cancelled_choices_leave_the_others_alone() {
    let request = sampled(1, &prompt(4, 30, 1000), 3);
    let run = |steps: usize, during: bool, given_up: &[u32]| {
        let mut engine = hash_engine(CONFIG);
        engine.admit(work(&request)).expect("room");
        let mut events = Vec::new();
        for _ in 0..steps {
            step(&mut engine, &mut backend(), &mut events);
        }
        let batch = if during { engine.plan() } else { None };
        engine.cancel_choices(RequestId(1), given_up);
        if let Some(batch) = batch {
            let output = Backend::run(&mut backend(), &batch, &mut |_| {});
            engine.commit(batch, output, &mut events);
        }
        events.extend(drain(&mut engine, &mut backend()));
        assert_idle(&engine);
        Choices::of(events)
    };
    let whole = run(0, false, &[]);
    assert_eq!(whole.ends.len(), 3);
    for steps in 0..12 {
        for during in [false, true] {
            let rest = run(steps, during, &[0, 2]);
            assert_eq!(rest.sampled(1, 1), whole.sampled(1, 1), "after {steps} steps");
            assert!(rest.ends.contains_key(&(RequestId(1), 1)));
            assert!(run(steps, during, &[0, 1, 2]).aborted.is_empty());
        }
    }
}

/// Blocks that were announced stay as they are while the handoff holds them, though the request is cancelled and the
/// engine is busy with others.
#[test]
fn announced_blocks_outlive_their_request() {
    let mut engine = hash_engine(EngineConfig { blocks: 16, batch_tokens_max: 8, prefix_cache: false, ..CONFIG });
    let goal = Goal::Prefill { skip_blocks: 0, on_device: false };
    engine.admit(Work { goal, ..work(&request(1, &prompt(1, 40, 1000), 4)) }).expect("room");
    let batch = engine.plan().expect("a batch");
    let output = backend().run(&batch, &mut |_| {});
    let export = batch.exports()[0].clone();
    engine.commit(batch, output, &mut Vec::new());
    let read = |engine: &Engine| -> Vec<u8> {
        let arena = engine.cache().arena();
        let bytes = export.blocks.iter().flat_map(|(_, id)| {
            // SAFETY: the export's guard holds the block.
            unsafe { std::slice::from_raw_parts(arena.block(id.index), arena.layout().block_bytes()) }.to_vec()
        });
        bytes.collect()
    };
    let before = read(&engine);
    engine.cancel(RequestId(1));
    assert_eq!(engine.cache().stats().used, 2);
    engine.admit(work(&request(2, &prompt(2, 50, 1000), 6))).expect("room");
    drain(&mut engine, &mut backend());
    assert_eq!(read(&engine), before);
    drop(export);
    assert_idle(&engine);
}

/// While a handoff holds all blocks there is nothing to plan; when it lets go, the waker is called and work goes on.
#[test]
fn work_waits_for_blocks_held_outside() {
    let mut engine = hash_engine(EngineConfig { blocks: 8, ..CONFIG });
    let held = engine.cache().reserve(6).expect("room");
    engine.admit(work(&request(1, &prompt(1, 20, 1000), 4))).expect("room");
    assert!(engine.plan().is_none());
    let (sender, receiver) = std::sync::mpsc::sync_channel(16);
    engine.cache().on_freed(move || sender.send(()).expect("the test listens"));
    drop(held);
    assert_eq!(receiver.try_recv(), Ok(()));
    let choices = Choices::of(drain(&mut engine, &mut backend()));
    assert_eq!(choices.ids(1, 0), alone(&prompt(1, 20, 1000), 4));
}

/// Work that has to wait takes nothing while it does: what it took and gave back would wake the engine to plan the same
/// again, without end. Here all but the blocks that it finds in the cache are held by a handoff.
#[test]
fn what_waits_for_blocks_wakes_nobody() {
    let mut engine = hash_engine(EngineConfig { blocks: 8, ..CONFIG });
    let long = prompt(1, 24, 1000);
    engine.admit(work(&request(1, &long[..16], 1))).expect("room");
    drain(&mut engine, &mut backend());
    let stats = engine.cache().stats();
    assert_eq!((stats.free, stats.cached), (4, 4), "blocks of four tokens");
    let held = engine.cache().reserve(4).expect("room");
    let (sender, receiver) = std::sync::mpsc::sync_channel(16);
    engine.cache().on_freed(move || sender.send(()).expect("the test listens"));
    engine.admit(work(&request(2, &long, 4))).expect("room");
    assert!(engine.plan().is_none());
    assert!(receiver.try_recv().is_err(), "the engine wakes itself");
    drop(held);
    assert_eq!(receiver.try_recv(), Ok(()));
    drop(receiver);
    engine.cache().on_freed(|| {});
    let choices = Choices::of(drain(&mut engine, &mut backend()));
    assert_eq!(choices.ids(2, 0), alone(&long, 4));
}

/// Ends: the end-of-sequence token, a stop token, neither before `tokens_min`, and not at all when they are ignored.
#[test]
fn sequences_end_where_they_should() {
    let prompt = prompt(11, 9, 1000);
    let free = alone(&prompt, 8);
    let check = |request: Request, eos: &[TokenId], expected: &[TokenId], finish: Finish| {
        let spec = baton_engine::ModelSpec { eos: eos.to_vec(), ..baton_engine::testing::hash_spec() };
        let mut engine = Engine::new(spec, CONFIG);
        engine.admit(work(&request)).expect("room");
        let choices = Choices::of(drain(&mut engine, &mut backend()));
        assert_eq!((choices.ids(1, 0), choices.ends[&(RequestId(1), 0)].0), (expected.to_vec(), finish));
        choices
    };
    let plain = request(1, &prompt, 8);
    check(plain.clone(), &[free[3]], &free[..4], Finish::Eos);
    check(plain.clone(), &[free[0]], &free[..1], Finish::Eos);
    check(Request { ignore_eos: true, ..plain.clone() }, &[free[3]], &free, Finish::Length);
    check(Request { stop_tokens: vec![free[2]], ..plain.clone() }, &[free[3]], &free[..3], Finish::StopToken(free[2]));
    check(Request { tokens_min: 3, ..plain.clone() }, &[free[3]], &free[..4], Finish::Eos);
    // One more and the token cannot come at all: everything after it is different.
    let longer = Request { tokens_min: 4, ..plain.clone() };
    let spec = baton_engine::ModelSpec { eos: vec![free[3]], ..baton_engine::testing::hash_spec() };
    let mut engine = Engine::new(spec, CONFIG);
    engine.admit(work(&longer)).expect("room");
    let tokens = Choices::of(drain(&mut engine, &mut backend())).ids(1, 0);
    assert_eq!(tokens[..3], free[..3]);
    assert_ne!(tokens[3], free[3]);
}

/// A sequence ends at the model's length though the request asks for more.
#[test]
fn the_models_length_is_a_limit() {
    let spec = baton_engine::ModelSpec { positions_max: 20, ..baton_engine::testing::hash_spec() };
    let mut engine = Engine::new(spec, CONFIG);
    engine.admit(work(&request(1, &prompt(1, 15, 1000), 100))).expect("room");
    let choices = Choices::of(drain(&mut engine, &mut backend()));
    assert_eq!(choices.ids(1, 0).len(), 5);
    assert_eq!(engine.admit(work(&request(2, &prompt(1, 20, 1000), 1))), Err(Refused::TooLarge));
}

/// One request of a random workload.
#[derive(Clone, Debug)]
struct Arrival {
    prompt: (u64, usize),
    tokens_max: u32,
    choices: u32,
    batch_lane: bool,
    prompt_logprobs: bool,
    /// Steps before it comes, and steps after which it is cancelled.
    after: usize,
    cancel: Option<usize>,
    /// Tokens of its first choice that were emitted elsewhere.
    emitted: usize,
}

fn arrival() -> impl Strategy<Value = Arrival> {
    let cancel = prop_oneof![4 => Just(None), 1 => (0..12usize).prop_map(Some)];
    ((0..3u64, 1..24usize), 1..14u32, 1..4u32, any::<bool>(), 0..6u8, 0..6usize, cancel, 0..4usize).prop_map(
        |(prompt, tokens_max, choices, batch_lane, logprobs, after, cancel, emitted)| Arrival {
            prompt,
            tokens_max,
            choices,
            batch_lane,
            prompt_logprobs: logprobs == 0,
            after,
            cancel,
            emitted: emitted.min(tokens_max as usize - 1),
        },
    )
}

impl Arrival {
    fn request(&self, id: u128) -> Request {
        let mut request = sampled(id, &prompt(self.prompt.0, self.prompt.1, 1000), self.choices);
        request.lane = if self.batch_lane { Lane::Batch } else { Lane::Interactive };
        request.prompt_logprobs = self.prompt_logprobs.then_some(0);
        Request { tokens_max: self.tokens_max, ..request }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    /// Any workload on a small engine: every request ends once, with the tokens it has when alone; no block is lost.
    #[test]
    fn any_workload_gives_lone_tokens(
        arrivals in proptest::collection::vec(arrival(), 1..12),
        blocks in 12..40usize, batch_tokens_max in 4..40usize, sequences_max in 4..9usize, prefix_cache in any::<bool>(),
        draft_tokens_max in 0..7usize, vocab in prop_oneof![Just(2), Just(4), Just(1000)],
    ) {
        let config = EngineConfig { blocks, batch_tokens_max, sequences_max, queue_max: 64, prefix_cache, draft_tokens_max };
        let (mut engine, mut backend) = (hash_engine(config), HashBackend::new(vocab));
        let (mut events, mut expected, mut cancels) = (Vec::new(), Vec::new(), Vec::new());
        let mut now = 0;
        for (id, arrival) in arrivals.iter().enumerate() {
            let request = arrival.request(id as u128);
            let mut lone = hash_engine(EngineConfig { blocks: 256, ..CONFIG });
            lone.admit(work(&request)).expect("room");
            let whole = Choices::of(drain(&mut lone, &mut backend));
            for _ in 0..arrival.after {
                step(&mut engine, &mut backend, &mut events);
                now += 1;
                cancels.iter().filter(|(at, _)| *at == now).for_each(|(_, id)| engine.cancel(*id));
                let stats = engine.cache().stats();
                prop_assert_eq!(stats.free + stats.used + stats.in_flight + stats.cached, stats.total);
            }
            let mut given = work(&request);
            given.choices[0].so_far = whole.ids(id as u128, 0)[..arrival.emitted].to_vec();
            engine.admit(given).expect("room");
            cancels.extend(arrival.cancel.map(|after| (now + after + 1, request.id)));
            expected.push(whole);
        }
        while step(&mut engine, &mut backend, &mut events) {
            now += 1;
            cancels.iter().filter(|(at, _)| *at == now).for_each(|(_, id)| engine.cancel(*id));
        }
        let found = Choices::of(events);
        for (id, (arrival, whole)) in arrivals.iter().zip(&expected).enumerate() {
            let id = id as u128;
            let cancelled = found.aborted.contains(&RequestId(id));
            for choice in 0..arrival.choices {
                let emitted = if choice == 0 { arrival.emitted } else { 0 };
                let (tokens, wanted) = (found.ids(id, choice), whole.ids(id, choice)[emitted..].to_vec());
                match cancelled {
                    true => prop_assert!(wanted.starts_with(&tokens)),
                    false => prop_assert_eq!(tokens, wanted),
                }
                prop_assert!(cancelled || found.ends.contains_key(&(RequestId(id), choice)));
            }
            if arrival.prompt_logprobs && arrival.emitted == 0 && !cancelled {
                prop_assert_eq!(&found.prompts[&RequestId(id)], &whole.prompts[&RequestId(id)]);
            }
        }
        assert_idle(&engine);
    }
}
