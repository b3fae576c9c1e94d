//! The same request gives the same tokens and the same logprobs wherever it is prefilled.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use baton_core::{Request, Sampling, TokenId};
use baton_engine::testing::{ZeroBlock, hash_spec, request};
use baton_engine::{Choice, EngineConfig, HashBackend};
use baton_worker::LoadedModel;
use baton_worker::testing::hash_model;

use crate::cluster::{Cluster, SIZES};
use crate::gateway::{Gateway, Order, Told, alone};

fn prompt(seed: u32, len: u32) -> Vec<TokenId> {
    (0..len).map(|i| (seed * 31 + i * 7 + i * i) % 1000).collect()
}

fn sampled(request: Request, seed: u64) -> Request {
    Request { sampling: Sampling { temperature: 0.7, seed, ..Sampling::default() }, ..request }
}

fn check(order: &Order, told: &Told) {
    let spec = hash_spec();
    let expected = alone(spec.clone(), SIZES, &mut HashBackend::new(spec.vocab), order);
    assert!(told.is_over() && told.aborted.is_none() && told.refused.is_none(), "{told:?}");
    assert_eq!(told.tokens, expected);
}

#[tokio::test]
async fn prefilled_elsewhere_or_here() {
    let cluster = Cluster::start(1, 1).await;
    let (prefill, decode) = (&cluster.prefills[0], &cluster.decodes[0]);
    let mut gateway = Gateway::connect(&cluster, decode).await;
    for (id, len) in [1, 3, 4, 5, 31, 32, 33, 200].into_iter().enumerate() {
        let request = request(id as u128 + 1, &prompt(id as u32, len), 12);
        let order = Order::new(request, decode, Some(prefill));
        let told = gateway.run(&order).await;
        check(&order, &told);
        assert!(!told.admitted.unwrap().local_prefill);
        let steps = prefill.gate.steps();
        let local = Order {
            prefill: None,
            request: Request { id: baton_core::RequestId(1000 + id as u128), ..order.request.clone() },
            ..order
        };
        let told = gateway.run(&local).await;
        check(&local, &told);
        assert!(told.admitted.unwrap().local_prefill && prefill.gate.steps() == steps);
    }
    cluster.is_clean().await;
}

/// Blocks of different sizes at the two ends, in both directions, or larger ones at both: prompts that fill them and that do not, and
/// prompts of which the decode worker holds the beginning.
#[tokio::test]
async fn with_blocks_of_other_sizes() {
    let mut id = 0;
    for block_tokens in [[4, 8], [8, 4], [8, 8], [4, 16], [32, 4]] {
        let cluster = Cluster::unlike(block_tokens).await;
        let (prefill, decode) = (&cluster.prefills[0], &cluster.decodes[0]);
        assert_eq!(decode.running.shell().spec.layout.block_tokens, block_tokens[1]);
        let mut gateway = Gateway::connect(&cluster, decode).await;
        for len in [1, 3, 4, 5, 8, 9, 12, 31, 32, 33, 100] {
            id += 1;
            let order = Order::new(request(id, &prompt(id as u32, len), 12), decode, Some(prefill));
            let told = gateway.run(&order).await;
            check(&order, &told);
            assert!(!told.admitted.unwrap().local_prefill);
        }
        let long = prompt(99, 180);
        for len in [50, 100, 180] {
            id += 1;
            let order = Order::new(request(id, &long[..len], 6), decode, Some(prefill));
            let told = gateway.run(&order).await;
            check(&order, &told);
            let cached = told.admitted.unwrap().cached_tokens;
            assert_eq!(cached > 0, len > 50, "{block_tokens:?}: {cached} of {len} were there");
        }
        let sent = prefill.running.shell().links().counters();
        assert!(sent.shm == 14 && sent.failed == 0, "{}", sent.describe());
        assert_eq!(decode.running.shell().receiver().counters().dropped_total(), 0);
        cluster.is_clean().await;
    }
}

#[tokio::test]
async fn thirty_two_at_once() {
    let cluster = Cluster::of(1, 1, EngineConfig { blocks: 2048, ..SIZES }, hash_model).await;
    let (prefill, decode) = (&cluster.prefills[0], &cluster.decodes[0]);
    let mut gateway = Gateway::connect(&cluster, decode).await;
    let order = |id: u32| {
        let request = sampled(request(id as u128 + 1, &prompt(id, 10 + id * 3), 20), id as u64);
        Order::new(request, decode, (!id.is_multiple_of(4)).then_some(prefill))
    };
    let orders: Vec<Order> = (0..32).map(order).collect();
    let handles: Vec<u32> = orders.iter().map(|order| gateway.start(order)).collect();
    for (order, handle) in orders.iter().zip(handles) {
        check(order, &gateway.finish(handle).await);
    }
    // One message carries a step's tokens of all sequences.
    assert!(gateway.messages < 32 * 20, "{} messages", gateway.messages);
    cluster.is_clean().await;
}

#[tokio::test]
async fn several_choices_share_one_prefill() {
    let cluster = Cluster::start(1, 1).await;
    let (prefill, decode) = (&cluster.prefills[0], &cluster.decodes[0]);
    let mut gateway = Gateway::connect(&cluster, decode).await;
    for (id, len) in [(1, 30), (2, 32)] {
        let request = Request { choices: 5, ..sampled(request(id, &prompt(id as u32, len), 12), 3) };
        for prefill in [Some(prefill), None] {
            let order = Order { epoch: 1, ..Order::new(request.clone(), decode, prefill) };
            let told = gateway.run(&order).await;
            check(&order, &told);
            assert_eq!(told.tokens.len(), 5);
            assert_ne!(told.tokens[&0], told.tokens[&1]);
        }
    }
    cluster.is_clean().await;
}

#[tokio::test]
async fn every_pair_of_two_and_two() {
    let cluster = Cluster::start(2, 2).await;
    let mut id = 0;
    for decode in &cluster.decodes {
        let mut gateway = Gateway::connect(&cluster, decode).await;
        for prefill in &cluster.prefills {
            id += 1;
            let order = Order::new(sampled(request(id, &prompt(7, 61), 15), 9), decode, Some(prefill));
            check(&order, &gateway.run(&order).await);
        }
    }
    cluster.is_clean().await;
}

/// A prompt that shares its beginning with an earlier one: decode is sent only what it lacks, prefill computes only
/// what it lacks, and a prompt that decode holds nearly whole needs no prefill worker.
#[tokio::test]
async fn prefix_hits_change_no_byte() {
    let cluster = Cluster::start(1, 1).await;
    let (prefill, decode) = (&cluster.prefills[0], &cluster.decodes[0]);
    let mut gateway = Gateway::connect(&cluster, decode).await;
    let long = prompt(3, 120);
    let order = |id, prompt: &[TokenId]| Order::new(request(id, prompt, 6), decode, Some(prefill));
    let first = order(1, &long[..80]);
    check(&first, &gateway.run(&first).await);
    let second = order(2, &long);
    let told = gateway.run(&second).await;
    check(&second, &told);
    assert_eq!(told.admitted.unwrap().cached_tokens, 80);
    assert_eq!(told.finished[&0].cached_tokens, 80);
    let again = order(3, &long);
    let told = gateway.run(&again).await;
    check(&again, &told);
    assert!(told.admitted.unwrap().local_prefill);
    // Other salts share nothing.
    let other = Order { request: Request { cache_salt: "other".into(), ..order(4, &long).request }, ..order(4, &long) };
    let told = gateway.run(&other).await;
    check(&other, &told);
    assert_eq!((told.admitted.unwrap().cached_tokens, told.finished[&0].cached_tokens), (0, 0));
    cluster.is_clean().await;
}

/// Another decode worker continues a stream that broke after so many tokens, with and without a prefill worker.
#[tokio::test]
async fn continued_after_any_token() {
    let cluster = Cluster::start(1, 2).await;
    let mut gateway = Gateway::connect(&cluster, &cluster.decodes[1]).await;
    for choices in [1, 3] {
        let id = choices as u128;
        let request = Request { choices, ..sampled(request(id, &prompt(5, 37), 10), 4) };
        let whole = Order::new(request, &cluster.decodes[1], Some(&cluster.prefills[0]));
        let spec = hash_spec();
        let expected = alone(spec.clone(), SIZES, &mut HashBackend::new(spec.vocab), &whole);
        for (epoch, so_far) in [0, 1, 4, 9].into_iter().enumerate() {
            for prefill in [true, false] {
                let so_far = |index: &u32| expected[index][..so_far].iter().map(|token| token.id).collect();
                let choices = expected.keys().map(|index| Choice { index: *index, so_far: so_far(index) }).collect();
                let prefill = whole.prefill.clone().filter(|_| prefill);
                let order = Order { choices, prefill, epoch: epoch as u64 + 1, ..whole.clone() };
                let told = gateway.run(&order).await;
                for choice in &order.choices {
                    assert_eq!(told.tokens[&choice.index], expected[&choice.index][choice.so_far.len()..], "{order:?}");
                    assert_eq!(told.finished[&choice.index].generated_tokens, 10);
                }
            }
        }
    }
    cluster.is_clean().await;
}

#[tokio::test]
async fn prompt_logprobs_come_from_wherever_it_is_prefilled() {
    let cluster = Cluster::start(1, 1).await;
    let (prefill, decode) = (&cluster.prefills[0], &cluster.decodes[0]);
    let mut gateway = Gateway::connect(&cluster, decode).await;
    let request = Request { prompt_logprobs: Some(2), ..request(1, &prompt(2, 41), 3) };
    let mut told = Vec::new();
    for (epoch, prefill) in [Some(prefill), None, Some(prefill)].into_iter().enumerate() {
        let order = Order { epoch: epoch as u64 + 1, ..Order::new(request.clone(), decode, prefill) };
        told.push(gateway.run(&order).await);
        check(&order, &told[epoch]);
        assert_eq!(told[epoch].prompt_logprobs.len(), 41);
        assert!(told[epoch].prompt_logprobs[0].token.is_none() && told[epoch].prompt_logprobs[1].token.is_some());
        assert_eq!(told[epoch].prompt_logprobs, told[0].prompt_logprobs);
    }
    cluster.is_clean().await;
}

/// Every block counts: with one of them zeroed at the decode worker the answer is another one.
#[tokio::test]
async fn a_zeroed_block_is_noticed() {
    for block in 0..9 {
        let spoiled = || {
            let model = hash_model();
            let block = Arc::new(AtomicUsize::new(block));
            LoadedModel { backend: Box::new(ZeroBlock { backend: model.backend, block }), ..model }
        };
        let cluster = Cluster::of(1, 1, SIZES, spoiled).await;
        let mut gateway = Gateway::connect(&cluster, &cluster.decodes[0]).await;
        let order = Order::new(request(1, &prompt(1, 37), 8), &cluster.decodes[0], Some(&cluster.prefills[0]));
        let told = gateway.run(&order).await;
        let spec = hash_spec();
        let expected = alone(spec.clone(), SIZES, &mut HashBackend::new(spec.vocab), &order);
        // Prefill samples the first token, before the block is lost.
        assert_eq!(told.tokens[&0][0], expected[&0][0]);
        assert_ne!(told.tokens[&0][1..], expected[&0][1..]);
    }
}
