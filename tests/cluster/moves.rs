//! Blocks between workers outside a handoff: a prefix that another worker holds is fetched from it, and a stream that has to
//! leave a worker that drains takes its blocks along. The same bytes whether that works or not.

use baton_tests::cluster::wait_for;
use baton_tests::{Fault, Fleet, Shape, Streamed, Way};
use serde_json::Value;

use crate::serving::{CHAT, LONG, chat, long_prompt};

const STREAMS: usize = 3;

/// Two decode workers without a prefill worker: requests go to the first while both are idle.
fn shape(flags: &[&str]) -> Shape {
    let worker_flags = flags.iter().map(ToString::to_string).collect();
    Shape { prefill: 0, decode: 2, worker_flags, ..Shape::default() }
}

async fn text(fleet: &Fleet, request: &Value) -> String {
    let reply = fleet.client(fleet.ids("gateway").len() - 1).post(CHAT, request).await.json();
    reply["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{reply}")).to_string()
}

async fn counted(fleet: &Fleet, id: &str, name: &str, label: &str) -> f64 {
    fleet.metric(id, &format!("baton_worker_{name}_total"), label).await
}

/// Waits until the coordinator knows the worker as one that takes no more requests.
async fn draining(fleet: &Fleet, id: &str) {
    fleet.done(&["drain", id, "--no-wait"]).await;
    wait_for("the worker to drain", || async {
        let status = fleet.status().await?;
        let row = status["workers"].as_array()?.iter().find(|row| row["id"] == id)?.clone();
        (row["draining"] == true).then_some(())
    })
    .await;
}

/// Goal: a prefix is fetched from the worker that holds it, and computed where that cannot be reached. Method: the holder
/// is the only one at first, then drains, and lives on because a stream has ended there that nobody has read, so that everything new goes to the other one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefix_that_another_worker_holds_is_fetched_from_it() {
    let mut fleet = Fleet::start(&Shape { proxied: true, gateways: 2, ..shape(&["--drain-ms", "60000"]) }).await;
    let requests = [chat(&long_prompt(1), 12), chat(&long_prompt(2), 12)];
    fleet.kill("decode-1").await;
    let expected = [text(&fleet, &requests[0]).await, text(&fleet, &requests[1]).await];
    // Long enough that the gateway dies before it has read all of it, however late that is.
    let mut events = fleet.client(0).with("x-baton-resumable", "120").open(CHAT, &chat("On and on", 900)).await;
    events.until_text(1).await;
    fleet.kill("gateway-0").await;
    fleet.restart("decode-1").await;
    fleet.whole().await;
    draining(&fleet, "decode-0").await;

    assert_eq!(text(&fleet, &requests[0]).await, expected[0], "fetched");
    assert_eq!(counted(&fleet, "decode-1", "pulls", "outcome=\"fetched\"").await, 1.0);
    assert_eq!(counted(&fleet, "decode-0", "lends", "outcome=\"lent\"").await, 1.0);
    assert!(counted(&fleet, "decode-1", "tier_hits", "tier=\"peer\"").await > 0.0);

    fleet.handoff["decode-1"].refuse();
    assert_eq!(text(&fleet, &requests[1]).await, expected[1], "computed");
    // A machine that was busy during the first fetch may find that computing is faster, and not even try.
    assert_eq!(counted(&fleet, "decode-1", "pulls", "outcome=\"fetched\"").await, 1.0);
    assert_eq!(counted(&fleet, "decode-1", "pulls", "").await, 2.0);
}

/// Streams that begin at the first decode worker and are driven out of it while they run.
async fn driven_out(fleet: &mut Fleet) -> Vec<Streamed> {
    let mut running = Vec::new();
    for number in 0..STREAMS {
        let mut events = fleet.client(0).open(CHAT, &chat(&long_prompt(number), LONG)).await;
        events.until_text(1).await;
        running.push(events);
    }
    wait_for("one of them to run there", || async {
        let status = fleet.status().await?;
        let row = status["workers"].as_array()?.iter().find(|row| row["id"] == "decode-0")?.clone();
        (row["sequences_running"].as_u64()? > 0).then_some(())
    })
    .await;
    fleet.done(&["drain", "decode-0", "--no-wait"]).await;
    let mut streamed = Vec::new();
    for events in running {
        streamed.push(events.finish().await.joined());
    }
    assert_eq!(fleet.end("decode-0").await.code, Some(0));
    streamed
}

async fn undisturbed() -> Vec<Streamed> {
    let fleet = Fleet::start(&Shape { prefill: 0, ..Shape::default() }).await;
    let mut streamed = Vec::new();
    for number in 0..STREAMS {
        streamed.push(fleet.client(0).stream(CHAT, &chat(&long_prompt(number), LONG)).await.joined());
    }
    streamed
}

/// Goal: streams leave a worker that drains by their blocks, and only what was in no full block is computed again. Method:
/// a drain that waits for nothing, and the counters of the worker where the streams go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_moves_running_streams_by_their_blocks() {
    let expected = undisturbed().await;
    let mut fleet = Fleet::start(&shape(&["--drain-ms", "0"])).await;
    assert_eq!(driven_out(&mut fleet).await, expected);
    let moved = |how: &'static str| counted(&fleet, "decode-1", "moved", how);
    assert!(moved("how=\"kv\"").await >= 1.0, "no stream met the drain; it says nothing");
    assert_eq!(moved("how=\"recompute\"").await, 0.0);
    fleet.quiet().await;
}

/// Goal: a move that fails half way is a recomputation and changes no byte. Method: the blocks arrive, and the word of
/// the worker that sent them does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_fails_half_way_computes_again() {
    let expected = undisturbed().await;
    let mut fleet = Fleet::start(&Shape { proxied: true, ..shape(&["--drain-ms", "0"]) }).await;
    let proxy = &fleet.control["decode-0"];
    proxy.only_from(fleet.pid("decode-1"));
    proxy.set(Way::Down, Fault::Stall);
    assert_eq!(driven_out(&mut fleet).await, expected);
    let moved = |how: &'static str| counted(&fleet, "decode-1", "moved", how);
    assert!(moved("how=\"recompute\"").await >= 1.0, "no stream met the drain; it says nothing");
    assert_eq!(moved("how=\"kv\"").await, 0.0);
    fleet.quiet().await;
}
