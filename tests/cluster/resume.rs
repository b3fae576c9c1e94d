//! Gateways killed under streams: what asked to be resumable goes on at another gateway with the same bytes and is billed
//! once; what did not is ended, and everything it held is free.

use std::time::Duration;

use baton_tests::client::NotOpened;
use baton_tests::cluster::wait_for;
use baton_tests::{Client, Fleet, Shape, Streamed};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::serving::{CHAT, chat, long_prompt};

const TENANT: &str = "acme";
/// What takes two seconds by design may take so long on a busy machine.
const SOON: Duration = Duration::from_secs(5);

/// Two choices, sampled, with log-probabilities; long enough that a kill lands in the middle.
fn request(number: usize) -> Value {
    let mut body = chat(&long_prompt(number), 600);
    for (key, value) in [
        ("temperature", json!(0.8)),
        ("seed", json!(number)),
        ("n", json!(2)),
        ("logprobs", json!(true)),
        ("stream_options", json!({"include_usage": true})),
    ] {
        body[key] = value;
    }
    body
}

/// (requests, prompt tokens, generated tokens) billed so far.
async fn billed(fleet: &Fleet) -> [u64; 3] {
    let list: Value = serde_json::from_str(&fleet.done(&["tenant", "list", "--json"]).await).expect("JSON");
    let row = list["tenants"].as_array().and_then(|all| all.iter().find(|t| t["name"] == TENANT).cloned());
    let row = row.unwrap_or_else(|| panic!("no {TENANT} in {list}"));
    ["requests_total", "prompt_tokens_total", "generated_tokens_total"].map(|name| row[name].as_u64().expect("a count"))
}

fn difference(after: [u64; 3], before: [u64; 3]) -> [u64; 3] {
    [after[0] - before[0], after[1] - before[1], after[2] - before[2]]
}

/// Both have the same bytes, and the same counts of what they cost; what was found in a cache depends on who asked before.
fn same(got: &Streamed, expected: &Streamed, when: &str) {
    assert_eq!(got.text, expected.text, "{when}");
    assert_eq!((&got.finish, &got.error, got.done), (&expected.finish, &expected.error, expected.done), "{when}");
    assert!(got.logprobs == expected.logprobs, "{when}: log-probabilities differ");
    let counts = |streamed: &Streamed| {
        let usage = streamed.usage.clone().unwrap_or_default();
        [usage["prompt_tokens"].clone(), usage["completion_tokens"].clone()]
    };
    assert_eq!(counts(got), counts(expected), "{when}");
}

/// What was read before and after the break, as one stream.
fn together(before: Streamed, after: Streamed) -> Streamed {
    let mut whole = before;
    let choices = whole.text.len().max(after.text.len());
    whole.text.resize(choices, String::new());
    whole.finish.resize(choices, None);
    whole.logprobs.resize(choices, Vec::new());
    for (index, text) in after.text.into_iter().enumerate() {
        whole.text[index].push_str(&text);
        whole.finish[index] = whole.finish[index].take().or(after.finish[index].clone());
        whole.logprobs[index].extend(after.logprobs[index].iter().cloned());
    }
    Streamed { usage: after.usage, error: after.error, done: after.done, ..whole }
}

async fn with_keys() -> (Fleet, Vec<Client>) {
    let fleet = Fleet::start(&Shape { decode: 2, gateways: 2, ..Shape::default() }).await;
    fleet.done(&["tenant", "create", TENANT]).await;
    let key = fleet.done(&["key", "create", "--tenant", TENANT]).await;
    let clients: Vec<Client> = (0..2).map(|gateway| fleet.client(gateway).with_key(&key)).collect();
    for client in &clients {
        wait_for("the key to be known", || async {
            let open = Client::new(client.address.clone()).get("/v1/models").await.status == 401;
            (open && client.get("/v1/models").await.status == 200).then_some(())
        })
        .await;
    }
    (fleet, clients)
}

/// Goal: kill -9 of a gateway in the middle of a resumable stream costs its client nothing but a reconnect: the other
/// gateway gives the rest, byte for byte, and the ledger bills the request once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_is_resumed_at_another_gateway() {
    let (mut fleet, clients) = with_keys().await;
    let before = billed(&fleet).await;
    let undisturbed = clients[1].stream(CHAT, &request(1)).await.joined();
    assert!(undisturbed.done && undisturbed.error.is_none() && undisturbed.usage.is_some(), "{undisturbed:?}");
    fleet.quiet().await;
    let cost = difference(billed(&fleet).await, before);
    assert_eq!((cost[0], cost[2]), (1, 1200));
    for read in [1, 300, 900] {
        let before = billed(&fleet).await;
        let dying = clients[0].with("x-baton-resumable", "60");
        let mut events = dying.open(CHAT, &request(1)).await;
        let name = events.headers["x-baton-stream"].to_str().expect("a name").to_string();
        events.until_text(read).await;
        fleet.kill("gateway-0").await;
        while events.advance().await {}
        let last = events.last_id.clone().expect("every event has an id");
        let again = clients[1].with("last-event-id", last.as_str());
        let rest = again.try_open_get(&format!("/v1/streams/{name}")).await.unwrap_or_else(|e| panic!("{e}"));
        assert!(!events.so_far.done, "the kill came too late to say anything");
        let whole = together(events.so_far.clone(), rest.finish().await).joined();
        same(&whole, &undisturbed, &format!("read {read} bytes, then killed after event {last}"));
        fleet.quiet().await;
        assert_eq!(difference(billed(&fleet).await, before), cost, "billed once, as the undisturbed one");
        let gone = again.try_open_get(&format!("/v1/streams/{name}")).await;
        assert!(matches!(gone, Err(NotOpened::Refused { status: 404, .. })), "it has ended");
        fleet.restart("gateway-0").await;
        fleet.whole().await;
    }
}

/// Goal: requests that did not ask to outlive their gateway are ended with it, and nothing of them stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_resumed_ends_with_its_gateway() {
    let (mut fleet, clients) = with_keys().await;
    let mut open = Vec::new();
    for number in 10..14 {
        let mut events = clients[0].open(CHAT, &chat(&long_prompt(number), 1500)).await;
        events.until_text(1).await;
        assert!(!events.headers.contains_key("x-baton-stream"));
        open.push(events);
    }
    let resumable = clients[0].with("x-baton-resumable", "60");
    let mut kept = resumable.open(CHAT, &request(20)).await;
    kept.until_text(1).await;
    let name = kept.headers["x-baton-stream"].to_str().expect("a name").to_string();
    fleet.kill("gateway-0").await;
    let killed = Instant::now();
    for mut events in open {
        while events.advance().await {}
        assert!(!events.so_far.done, "the kill came too late to say anything");
    }
    let ended = |open: u64| open <= 1;
    while !ended(fleet.status().await.and_then(|status| status["requests_open"].as_u64()).unwrap_or(u64::MAX)) {
        assert!(killed.elapsed() < SOON, "requests are open {:?} after their gateway's death", killed.elapsed());
    }
    println!("ended {} ms after their gateway's death", killed.elapsed().as_millis());
    let rest = clients[1].try_open_get(&format!("/v1/streams/{name}")).await.unwrap_or_else(|e| panic!("{e}"));
    let rest = rest.finish().await;
    assert!(rest.done && rest.error.is_none() && rest.finish.iter().all(Option::is_some), "{rest:?}");
    fleet.quiet().await;
}

/// Goal: a worker that drains waits for the client of a resumable stream that ended without a reader, and ends once it has
/// come. Method: the only gateway that reads it is killed at the first token, and the worker is drained after the last.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_waits_for_a_stream_that_nobody_has_read() {
    let mut fleet = Fleet::start(&Shape { gateways: 2, ..Shape::default() }).await;
    let undisturbed = fleet.client(1).stream(CHAT, &request(30)).await.joined();
    let mut events = fleet.client(0).with("x-baton-resumable", "120").open(CHAT, &request(30)).await;
    events.until_text(1).await;
    let name = events.headers["x-baton-stream"].to_str().expect("a name").to_string();
    fleet.kill("gateway-0").await;
    wait_for("the stream to end at its worker", || async {
        let status = fleet.status().await?;
        (status["requests_open"] == 1 && fleet.blocks_held().await? == 0).then_some(())
    })
    .await;
    fleet.done(&["drain", "decode-0", "--no-wait"]).await;
    wait_for("the worker to drain", || async {
        let status = fleet.status().await?;
        let row = status["workers"].as_array()?.iter().find(|row| row["id"] == "decode-0")?.clone();
        (row["draining"] == true).then_some(())
    })
    .await;
    let rest = fleet.client(1).try_open_get(&format!("/v1/streams/{name}")).await.unwrap_or_else(|e| panic!("{e}"));
    same(&rest.finish().await.joined(), &undisturbed, "after the drain was ordered");
    assert_eq!(fleet.end("decode-0").await.code, Some(0), "it ends when the stream has been read");
}

/// Goal: a gateway that was stopped while another took its stream over harms nothing when it wakes: the stream goes on, and
/// is billed once and whole. Method: SIGSTOP in the middle, the rest read at the other gateway, SIGCONT before its end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_wakes_lets_go_of_what_was_taken_over() {
    let (fleet, clients) = with_keys().await;
    let before = billed(&fleet).await;
    let undisturbed = clients[1].stream(CHAT, &request(40)).await.joined();
    assert!(undisturbed.done && undisturbed.error.is_none(), "{undisturbed:?}");
    fleet.quiet().await;
    let cost = difference(billed(&fleet).await, before);
    let before = billed(&fleet).await;
    let mut events = clients[0].with("x-baton-resumable", "60").open(CHAT, &request(40)).await;
    let name = events.headers["x-baton-stream"].to_str().expect("a name").to_string();
    events.until_text(100).await;
    fleet.signal("gateway-0", libc::SIGSTOP);
    let process = format!("/proc/{}/status", fleet.pid("gateway-0"));
    wait_for("the gateway to be stopped", || async {
        std::fs::read_to_string(&process).ok()?.contains("State:\tT").then_some(())
    })
    .await;
    let (so_far, last) = (events.so_far.clone(), events.last_id.clone().expect("every event has an id"));
    drop(events);
    let again = clients[1].with("last-event-id", last.as_str());
    let rest = again.try_open_get(&format!("/v1/streams/{name}")).await.unwrap_or_else(|e| panic!("{e}"));
    fleet.signal("gateway-0", libc::SIGCONT);
    let whole = together(so_far, rest.finish().await).joined();
    same(&whole, &undisturbed, "taken over while its gateway slept");
    wait_for("the gateway to wake", || async { (clients[0].get("/health").await.status == 200).then_some(()) }).await;
    fleet.quiet().await;
    assert_eq!(difference(billed(&fleet).await, before), cost, "billed once, as the undisturbed one");
}
