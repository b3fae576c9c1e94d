//! A request that kills whatever worker runs it: after three deaths it is refused and kept out, and the pool lives.

use baton_proto::v1::ExplainRequest;
use baton_proto::v1::admin_client::AdminClient;
use baton_proto::{TcpNet, channel};
use baton_tests::client::Events;
use baton_tests::cluster::wait_for;
use baton_tests::{Client, Fleet, Shape, Streamed};
use serde_json::{Value, json};
use std::sync::Arc;

use crate::serving::{CHAT, chat, long_prompt};

/// Kills of one request. Three in time are enough; one that came late on a busy machine begins the count anew.
const KILLS_MAX: usize = 6;
/// Times the request is sent.
const TRIES_MAX: usize = 5;

fn poison(seed: u64) -> Value {
    let mut body = chat(&long_prompt(500), 1500);
    body["temperature"] = 0.8.into();
    body["seed"] = seed.into();
    body
}

fn innocent(number: usize) -> Value {
    let mut body = chat(&long_prompt(number), 120);
    for (key, value) in [("temperature", json!(0.8)), ("seed", json!(number)), ("n", json!(2))] {
        body[key] = value;
    }
    body
}

/// The decode worker of each assignment of a request so far.
async fn assigned(fleet: &Fleet, request: &str) -> Vec<String> {
    let address = fleet.address("coordinator-1");
    let mut admin = AdminClient::new(channel(Arc::new(TcpNet), &address).expect("an address"));
    let reply = admin.explain(ExplainRequest { request: request.into() }).await.expect("the leader answers");
    let decisions = reply.into_inner().decisions.into_iter().filter(|decision| decision.outcome == "assigned");
    // "decode decode-0 holds …": the verdict is the first line.
    let worker = |lines: Vec<String>| Some(lines.first()?.split(' ').nth(1)?.to_string());
    decisions.filter_map(|decision| worker(decision.lines)).collect()
}

/// Kills each worker that the request is assigned to, as soon as it is; returns its error, and how many died.
async fn run_into_death(fleet: &mut Fleet, client: &Client) -> (Option<Value>, usize) {
    // A resumable stream tells its request's id before its first token.
    let mut events: Events = client.with("x-baton-resumable", "60").open(CHAT, &poison(1)).await;
    let request = events.headers["x-baton-stream"].to_str().expect("a name").to_string();
    let reading = tokio::spawn(async move {
        while events.advance().await {}
        events.so_far
    });
    let mut kills = 0;
    while kills < KILLS_MAX && !reading.is_finished() {
        let victims = assigned(fleet, &request).await;
        let Some(victim) = victims.get(kills) else {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            continue;
        };
        fleet.kill(victim).await;
        kills += 1;
        fleet.restart(victim).await;
    }
    (reading.await.expect("the stream ends").error, kills)
}

/// Goal: a request under which workers die again and again ends with 500 `poisoned`, is refused from then on whoever sends
/// it, and everybody else's streams end with the same bytes. Method: kill -9 of the worker it is assigned to, each time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poisoned_request_is_refused_and_the_pool_lives() {
    let mut fleet = Fleet::start(&Shape { prefill: 1, decode: 3, ..Shape::default() }).await;
    let client = fleet.client(0);
    let mut expected = Vec::new();
    for number in 0..2 {
        expected.push(client.stream(CHAT, &innocent(number)).await.joined());
    }
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let innocents = (0..2).map(|number| {
        let (client, stopped) = (client.clone(), stopped.clone());
        tokio::spawn(async move {
            let mut streams: Vec<Streamed> = Vec::new();
            while !*stopped.borrow() {
                streams.push(client.stream(CHAT, &innocent(number)).await.joined());
            }
            streams
        })
    });
    let innocents: Vec<_> = innocents.collect();

    let mut seen = Vec::new();
    let mut poisoned = false;
    for _ in 0..TRIES_MAX {
        let (error, kills) = run_into_death(&mut fleet, &client).await;
        fleet.whole().await;
        poisoned = error.as_ref().is_some_and(|error| error["code"] == "poisoned");
        assert!(!poisoned || kills >= 3, "refused after {kills} deaths");
        seen.push((error, kills));
        if poisoned {
            break;
        }
    }
    assert!(poisoned, "never refused: {seen:?}");

    for seed in [1, 2] {
        let again = client.post(CHAT, &poison(seed)).await;
        let body = again.json();
        assert_eq!((again.status, body["error"]["code"].as_str()), (500, Some("poisoned")), "{body}");
    }
    let counted = fleet.metric("coordinator-1", "baton_coordinator_refused_total", "reason=\"poisoned\"").await;
    assert!(counted >= 3.0, "once for its deaths and twice for its content, counted {counted}");
    stop.send_replace(true);
    for (number, innocent) in innocents.into_iter().enumerate() {
        for streamed in innocent.await.expect("the streams end") {
            assert_eq!(streamed, expected[number], "an innocent request");
        }
    }
    let workers = fleet.ids("decode");
    wait_for("all workers to be live", || async {
        let status = fleet.status().await?;
        let rows = status["workers"].as_array()?.clone();
        let live = |id: &String| rows.iter().any(|row| row["id"] == id.as_str() && row["live"] == true);
        workers.iter().all(live).then_some(())
    })
    .await;
    assert_eq!(client.stream(CHAT, &innocent(0)).await.joined(), expected[0]);
    fleet.quiet().await;
}
