//! Blocks that come too late: what a prefill worker sends after its transfer was given up, or after it was stopped, fenced
//! and woken, is refused, counted and never used.

use std::time::Duration;

use baton_tests::cluster::wait_for;
use baton_tests::{Client, Fault, Fleet, Shape, Streamed, Way};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::serving::{CHAT, chat, long_prompt};

const ROUNDS: usize = 40;
const PREFILL: &str = "prefill-0";
const DECODE: &str = "decode-0";
/// What the proxy holds bytes back by: longer than an abort takes, shorter than a link may be silent.
const LATE: Duration = Duration::from_millis(300);

/// A prompt that is prefilled apart and handed over, with a salt that keeps it from being found in a cache.
fn request(number: usize, salt: usize) -> Value {
    let mut body = chat(&long_prompt(number), 24);
    for (key, value) in [("temperature", json!(0.8)), ("seed", json!(number)), ("cache_salt", json!(salt.to_string()))]
    {
        body[key] = value;
    }
    body
}

async fn expected(client: &Client) -> Vec<Streamed> {
    let mut expected = Vec::new();
    for number in 0..4 {
        expected.push(client.stream(CHAT, &request(number, number)).await.joined());
    }
    expected
}

/// Goal: frames that are on their way when their transfer is given up are dropped and counted, and the blocks they were meant
/// for serve others rightly. Method: a proxy that delays the KV port, clients that leave, a prefill worker that is stopped
/// and woken.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_after_the_end_of_their_transfer_are_dropped_and_counted() {
    let fleet = Fleet::start(&Shape { proxied: true, ..Shape::default() }).await;
    let client = fleet.client(0);
    let expected = expected(&client).await;
    let proxy = &fleet.handoff[DECODE];
    let dropped = || fleet.metric(DECODE, "baton_worker_transfer_dropped_total", "");
    let mut salt = 1_000;
    for round in 0.. {
        assert!(round < ROUNDS, "no frame came late; it says nothing");
        proxy.set(Way::Up, Fault::Delay(LATE));
        let before = proxy.bytes(Way::Up);
        let leaving: Vec<_> = (0..4)
            .map(|number| {
                salt += 1;
                let (client, body) = (client.clone(), request(number, salt));
                tokio::spawn(async move { client.stream(CHAT, &body).await })
            })
            .collect();
        // Keys and values are under way: more than any greeting or ping.
        let _sent_or_not = timeout(Duration::from_secs(2), async {
            while proxy.bytes(Way::Up) < before + (64 << 10) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        fleet.signal(PREFILL, libc::SIGSTOP);
        leaving.iter().for_each(tokio::task::JoinHandle::abort);
        fleet.signal(PREFILL, libc::SIGCONT);
        fleet.quiet().await;
        proxy.heal();
        let number = round % 4;
        salt += 1;
        assert_eq!(client.stream(CHAT, &request(number, salt)).await.joined(), expected[number]);
        if dropped().await > 0.0 {
            break;
        }
    }
    fleet.quiet().await;
}

/// Goal: a prefill worker that is stopped in the middle of a handoff is fenced, its streams go on with the same bytes, and
/// nothing that it had under way counts when it wakes. Method: SIGSTOP while keys and values flow, SIGCONT after the fence.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_worker_stopped_in_a_handoff_is_fenced_and_wakes_as_another() {
    let mut fleet = Fleet::start(&Shape { proxied: true, ..Shape::default() }).await;
    let client = fleet.client(0);
    let expected = expected(&client).await;
    let failed = async |fleet: &Fleet| fleet.metric(DECODE, "baton_worker_transfers_total", "failed").await;
    let life = async |fleet: &Fleet| {
        let status = fleet.status().await?;
        let row = status["workers"].as_array()?.iter().find(|row| row["id"] == PREFILL)?.clone();
        Some((row["live"] == true, row["incarnation"].as_u64()?))
    };
    let mut salt = 2_000;
    for round in 0.. {
        assert!(round < ROUNDS, "no stop met a handoff; it says nothing");
        fleet.whole().await;
        let (_, before) = wait_for("the worker's life", || life(&fleet)).await;
        let (bytes, failures) = (fleet.handoff[DECODE].bytes(Way::Up), failed(&fleet).await);
        // Slow enough that a stop finds a handoff under way.
        fleet.handoff[DECODE].set(Way::Up, Fault::Delay(Duration::from_millis(20)));
        let running: Vec<_> = (0..8)
            .map(|nth| {
                salt += 1;
                let (client, body) = (client.clone(), request(nth % 4, salt));
                tokio::spawn(async move { client.stream(CHAT, &body).await.joined() })
            })
            .collect();
        let _sent_or_not = timeout(Duration::from_secs(2), async {
            while fleet.handoff[DECODE].bytes(Way::Up) < bytes + (64 << 10) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        fleet.signal(PREFILL, libc::SIGSTOP);
        wait_for("the stopped worker to be fenced", || fleet.fenced(PREFILL)).await;
        for (nth, running) in running.into_iter().enumerate() {
            assert_eq!(running.await.expect("the stream ends"), expected[nth % 4], "beside a stopped worker");
        }
        fleet.handoff[DECODE].heal();
        let met = failed(&fleet).await > failures;
        fleet.signal(PREFILL, libc::SIGCONT);
        wait_for("the woken worker to serve as another life", || async {
            life(&fleet).await.is_some_and(|(live, now)| live && now > before).then_some(())
        })
        .await;
        for (number, expected) in expected.iter().enumerate() {
            salt += 1;
            assert_eq!(client.stream(CHAT, &request(number, salt)).await.joined(), *expected, "after it woke");
        }
        fleet.quiet().await;
        if met {
            break;
        }
    }
    assert!(!fleet.ended(PREFILL), "it goes on in the same process");
    let fenced = fleet.metric("coordinator-1", "baton_coordinator_fenced_total", "reason=\"silent\"").await;
    assert!(fenced >= 1.0, "{fenced} fenced lives are counted");
}
