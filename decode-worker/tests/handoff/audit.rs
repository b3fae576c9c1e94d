//! Blocks that change in a worker's memory after they were written are found when they are used again, and computed anew.

use baton_core::TokenId;
use baton_engine::HashBackend;
use baton_engine::testing::{hash_spec, request};

use crate::cluster::{Cluster, SIZES, Worker};
use crate::gateway::{Gateway, Order, Told, alone};

fn prompt(seed: u32, len: u32) -> Vec<TokenId> {
    (0..len).map(|i| (seed * 17 + i * 5 + i * i) % 1000).collect()
}

fn is_right(order: &Order, told: &Told) {
    let spec = hash_spec();
    let expected = alone(spec.clone(), SIZES, &mut HashBackend::new(spec.vocab), order);
    assert!(told.is_over() && told.aborted.is_none() && told.refused.is_none(), "{told:?}");
    assert_eq!(told.tokens, expected);
}

/// Flips one bit of the last cached block of these tokens, as bad memory would, and says how many of their blocks are cached.
fn flip(worker: &Worker, tokens: &[TokenId]) -> usize {
    let cache = worker.running.shell().engine.cache();
    let names = baton_core::BlockHash::chain("salt", tokens, cache.arena().layout().block_tokens as usize);
    let held = cache.lookup(&names);
    let block = held.ids().last().expect("it is cached").index;
    let mut bytes = baton_engine::testing::layer_of(cache.arena(), block, 1);
    bytes[3] ^= 0x10;
    // SAFETY: no request is under way, so nobody else reads or writes the block.
    unsafe { cache.arena().write_layer(block, 1, &bytes) };
    held.len()
}

/// At the decode worker, which was sent the block. The tokens are right, and the block is sent once more.
#[tokio::test]
async fn a_reused_block_that_has_changed_is_computed_again() {
    let cluster = Cluster::start(1, 1).await;
    let (prefill, decode) = (&cluster.prefills[0], &cluster.decodes[0]);
    let mut gateway = Gateway::connect(&cluster, decode).await;
    let long = prompt(3, 120);
    let first = Order::new(request(1, &long[..80], 6), decode, Some(prefill));
    is_right(&first, &gateway.run(&first).await);
    cluster.is_clean().await;

    let cached = flip(decode, &long[..80]);
    let second = Order::new(request(2, &long, 6), decode, Some(prefill));
    let told = gateway.run(&second).await;
    is_right(&second, &told);
    // The prefill worker has what it sent the first time.
    assert_eq!((cached, told.admitted.unwrap().cached_tokens), (80 / hash_spec().layout.block_tokens as usize, 80));
    cluster.is_clean().await;
}

/// The same where a second decode worker is sent what the first one was: the prefill worker computes the damaged block again.
#[tokio::test]
async fn a_damaged_block_is_not_sent_to_the_next_worker() {
    let cluster = Cluster::start(1, 2).await;
    let prefill = &cluster.prefills[0];
    let long = prompt(5, 64);
    for (at, decode) in cluster.decodes.iter().enumerate() {
        let mut gateway = Gateway::connect(&cluster, decode).await;
        let order = Order::new(request(at as u128 + 1, &long, 6), decode, Some(prefill));
        let told = gateway.run(&order).await;
        is_right(&order, &told);
        let block_tokens = hash_spec().layout.block_tokens as u64;
        let held = (64 - 1) / block_tokens * block_tokens;
        let expected = if at == 0 { 0 } else { held - block_tokens };
        assert_eq!(told.admitted.unwrap().cached_tokens, expected, "all but the last one");
        cluster.is_clean().await;
        flip(prefill, &long[..held as usize]);
    }
}

/// What the decode worker goes on writing is not taken for damaged when it is full: a stream that is continued finds it.
#[tokio::test]
async fn a_block_that_was_completed_here_is_not_damaged() {
    let cluster = Cluster::start(1, 1).await;
    let (prefill, decode) = (&cluster.prefills[0], &cluster.decodes[0]);
    let mut gateway = Gateway::connect(&cluster, decode).await;
    for (id, len) in [(1, 33), (2, 34), (3, 35)] {
        let order = Order::new(request(id, &prompt(id as u32, len), 20), decode, Some(prefill));
        let told = gateway.run(&order).await;
        is_right(&order, &told);
        // Its own tokens as the next prompt: all full blocks are there, and stay there.
        let mut longer = prompt(id as u32, len);
        longer.extend(told.ids()[&0].iter());
        let held = decode.stats().cached;
        let order = Order::new(request(id + 10, &longer, 4), decode, Some(prefill));
        let told = gateway.run(&order).await;
        is_right(&order, &told);
        let blocks = (longer.len() - 1) / hash_spec().layout.block_tokens as usize;
        assert!(told.admitted.unwrap().local_prefill, "it is nearly held");
        assert!(decode.stats().cached >= held && held >= blocks);
        cluster.is_clean().await;
    }
}
