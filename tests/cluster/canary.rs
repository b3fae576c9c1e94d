//! One prefill–decode pair that cannot pass blocks: it leaves placement, everybody else goes on, and it comes back.

use std::time::Duration;

use baton_tests::cluster::wait_for;
use baton_tests::{Fault, Fleet, Shape, Streamed};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::serving::{CHAT, chat, long_prompt};

/// Five seconds by design; the rest is for a busy machine.
const BROKEN_WITHIN: Duration = Duration::from_secs(10);
const PREFILL: &str = "prefill-0";
const DECODE: &str = "decode-0";

/// `state` of a pair in the leader's view.
async fn state(fleet: &Fleet, prefill: &str, decode: &str) -> Option<String> {
    let status = fleet.status().await?;
    let pairs = status["pairs"].as_array()?.clone();
    let pair = pairs.iter().find(|pair| pair["prefill"] == prefill && pair["decode"] == decode)?;
    Some(pair["state"].as_str()?.to_string())
}

async fn all_good(fleet: &Fleet) {
    wait_for("every pair to be good", || async {
        for prefill in fleet.ids("prefill") {
            for decode in fleet.ids("decode") {
                (state(fleet, &prefill, &decode).await? == "good").then_some(())?;
            }
        }
        Some(())
    })
    .await;
}

fn request(number: usize, salt: usize) -> Value {
    let mut body = chat(&long_prompt(number), 12);
    body["cache_salt"] = salt.to_string().into();
    body["seed"] = number.into();
    body["temperature"] = json!(0.8);
    body
}

/// Goal: a pair between which nothing passes is out of placement within 5 s, the other pairs and both its workers serve on,
/// and it is in again after the path heals. Method: a proxy before one decode worker's KV port that swallows what one
/// prefill worker says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_pair_leaves_placement_and_comes_back() {
    let fleet = Fleet::start(&Shape { prefill: 2, decode: 2, proxied: true, ..Shape::default() }).await;
    let client = fleet.client(0);
    let mut expected: Vec<Streamed> = Vec::new();
    for number in 0..4 {
        expected.push(client.stream(CHAT, &request(number, number)).await.joined());
    }
    all_good(&fleet).await;

    let proxy = &fleet.handoff[DECODE];
    proxy.only_from(fleet.pid(PREFILL));
    proxy.set_both(Fault::Swallow);
    let cut = Instant::now();
    wait_for("the cut pair to be broken", || async {
        (state(&fleet, PREFILL, DECODE).await? == "broken").then_some(())
    })
    .await;
    let took = cut.elapsed();
    println!("the pair is out of placement {} ms after the cut", took.as_millis());
    assert!(took < BROKEN_WITHIN, "seen after {took:?} only");
    for (prefill, decode) in [(PREFILL, "decode-1"), ("prefill-1", DECODE), ("prefill-1", "decode-1")] {
        let state = state(&fleet, prefill, decode).await;
        assert_ne!(state.as_deref(), Some("broken"), "{prefill} and {decode} can pass blocks");
    }

    let failed = fleet.metric("gateway-0", "baton_gateway_attempts_failed_total", "").await;
    for salt in 100..124 {
        let number = salt % 4;
        let streamed = client.stream(CHAT, &request(number, salt)).await.joined();
        assert_eq!(streamed, expected[number], "while a pair is broken");
    }
    let failed = fleet.metric("gateway-0", "baton_gateway_attempts_failed_total", "").await - failed;
    assert_eq!(failed, 0.0, "nothing is sent between the two");
    assert_eq!(state(&fleet, PREFILL, DECODE).await.as_deref(), Some("broken"), "it was cut all the while");

    proxy.heal();
    all_good(&fleet).await;
    for (number, expected) in expected.iter().enumerate() {
        assert_eq!(client.stream(CHAT, &request(number, 200 + number)).await.joined(), *expected, "after the heal");
    }
    fleet.quiet().await;
}
