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
