//! The control plane away: streams that run go on, new requests are told so soon, and what comes back serves again.

use baton_tests::cluster::wait_for;
use baton_tests::{Client, Fleet, Shape, Streamed};
use serde_json::Value;
use tokio::time::Instant;

use crate::serving::{CHAT, chat, long_prompt};

/// Long enough that it runs while the coordinators are away.
fn long() -> Value {
    let mut body = chat(&long_prompt(70), 1200);
    body["n"] = 2.into();
    body["temperature"] = 0.7.into();
    body["seed"] = 3.into();
    body
}

async fn undisturbed(client: &Client) -> Streamed {
    let streamed = client.stream(CHAT, &long()).await.joined();
    assert!(streamed.done && streamed.error.is_none(), "{streamed:?}");
    streamed
}

/// Kills `victims` while a stream runs: it must not notice. New requests must be refused soon and say when to come again.
/// Then the victims come back, and the fleet must serve as before.
async fn away(fleet: &mut Fleet, victims: &[String]) {
    let client = fleet.client(0);
    let expected = undisturbed(&client).await;
    let mut events = client.open(CHAT, &long()).await;
    events.until_text(1).await;
    for victim in victims {
        fleet.kill(victim).await;
    }
    let running = tokio::spawn(async move { events.finish().await.joined() });
    let asked = Instant::now();
    let refused = client.post(CHAT, &chat("hello", 4)).await;
    let waited = asked.elapsed();
    assert_eq!(refused.status, 503, "{}", refused.json());
    assert!(refused.headers.contains_key("retry-after"), "{:?}", refused.headers);
    // A second by design; the rest is for a busy machine.
    assert!(waited.as_secs() < 5, "refused after {waited:?} only");
    assert_eq!(running.await.expect("the stream ends"), expected, "a stream that runs does not notice");
    for victim in victims {
        fleet.restart(victim).await;
    }
    wait_for("the fleet to serve again", || async {
        (client.post(CHAT, &chat("hello", 4)).await.status == 200).then_some(())
    })
    .await;
    assert_eq!(undisturbed(&client).await, expected);
    fleet.quiet().await;
}

/// From the start of the processes to the first new success; three seconds by design, the rest is for a busy machine.
const SERVES_AGAIN_S: u64 = 20;

/// Goal: all coordinators dead at once touch no stream, and soon after they are started again new requests succeed. Method:
/// kill -9 of all three under streams.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_coordinators_die_together_and_come_back() {
    let mut fleet = Fleet::start(&Shape { coordinators: 3, ..Shape::default() }).await;
    let client = fleet.client(0);
    let expected = undisturbed(&client).await;
    let mut running = Vec::new();
    for _ in 0..3 {
        let mut events = client.open(CHAT, &long()).await;
        events.until_text(1).await;
        running.push(events);
    }
    let victims = fleet.ids("coordinator");
    for victim in &victims {
        fleet.signal(victim, libc::SIGKILL);
    }
    let running: Vec<_> = running.into_iter().map(|e| tokio::spawn(async move { e.finish().await.joined() })).collect();
    for victim in &victims {
        fleet.kill(victim).await;
    }
    let started = Instant::now();
    let (asking, serving) = (client.clone(), tokio::sync::oneshot::channel());
    let asked = tokio::spawn(async move {
        while asking.post(CHAT, &chat("hello", 4)).await.status != 200 {}
        let _ = serving.0.send(started.elapsed());
    });
    for victim in &victims {
        fleet.start_again(victim);
    }
    let serves = serving.1.await.expect("it serves again");
    println!("all coordinators killed: the first new success {} ms after they were started again", serves.as_millis());
    assert!(serves.as_secs() < SERVES_AGAIN_S, "it serves again after {serves:?} only");
    asked.await.expect("it ended");
    for stream in running {
        assert_eq!(stream.await.expect("the stream ends"), expected, "a stream that runs does not notice");
    }
    for victim in &victims {
        fleet.ready(victim).await;
    }
    assert_eq!(undisturbed(&client).await, expected);
    fleet.quiet().await;
}

const PROMPTS: usize = 16;
/// How much of the share of prompt tokens found in a cache a new leader may lose.
const SHARE_LOST_MAX: f64 = 0.05;

/// Asks for all of them once; the share of prompt tokens that were found in a cache.
async fn cached_share(client: &Client) -> f64 {
    let (mut cached, mut all) = (0, 0);
    for number in 0..PROMPTS {
        let usage = client.post(CHAT, &chat(&long_prompt(200 + number), 2)).await.json()["usage"].clone();
        cached += usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
        all += usage["prompt_tokens"].as_u64().expect("usage");
    }
    cached as f64 / all as f64
}

/// Goal: a new leader knows which worker holds what, so that prompts find their blocks as before. Method: prompts spread over
/// two workers of each kind, and kill -9 of the leader.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_leader_finds_what_the_caches_hold() {
    let mut fleet = Fleet::start(&Shape { coordinators: 3, prefill: 2, decode: 2, ..Shape::default() }).await;
    let client = fleet.client(0);
    cached_share(&client).await;
    // Heartbeats tell of new blocks.
    wait_for("the caches to be known", || async { (cached_share(&client).await > 0.8).then_some(()) }).await;
    let before = cached_share(&client).await;
    let leader = fleet.leader().await;
    fleet.kill(&leader).await;
    wait_for("a new leader", || async { (client.post(CHAT, &chat("hello", 4)).await.status == 200).then_some(()) })
        .await;
    let after = cached_share(&client).await;
    println!(
        "prompt tokens found in caches: {:.1} % before the leader was killed, {:.1} % after",
        before * 1e2,
        after * 1e2
    );
    assert!(before - after < SHARE_LOST_MAX, "{after} of the prompt tokens are found, {before} before");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_quorum_touches_no_stream_and_heals() {
    let mut fleet = Fleet::start(&Shape { coordinators: 3, ..Shape::default() }).await;
    let leader = fleet.leader().await;
    let other = fleet.ids("coordinator").into_iter().find(|id| *id != leader).expect("three of them");
    away(&mut fleet, &[leader, other]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_coordinator_dies_and_comes_back_under_a_stream() {
    let mut fleet = Fleet::start(&Shape::default()).await;
    away(&mut fleet, &["coordinator-1".to_string()]).await;
}
