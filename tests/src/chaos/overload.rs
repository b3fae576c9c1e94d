//! Three times more requests than the fleet can serve, from clients that try again as they are told: the fleet goes on
//! serving what it can, refuses the rest at once, and is whole again soon after.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::report::sorted;
use super::{Extent, Report};
use crate::client::NotOpened;
use crate::{Client, Fleet, Shape};

/// How often a client comes again after a 429 before it gives up.
const TRIES: usize = 4;
/// Longest a client waits before it comes again, whatever it is told.
const RETRY_AFTER_MAX_S: u64 = 2;
/// The interactive lane's budget, and what an answer may take on top of it: prefill and the first token under load.
const BUDGET_MS: f64 = 2_000.0;
const SLACK_MS: f64 = 3_000.0;
const OVERLOAD: f64 = 3.0;
const GOODPUT_DURING: f64 = 0.90;
const GOODPUT_AFTER: f64 = 0.95;

/// What all clients together have seen.
#[derive(Default)]
struct Seen {
    complete: AtomicUsize,
    refused: AtomicUsize,
    gave_up: AtomicUsize,
    broken: AtomicUsize,
    ended: AtomicBool,
}

fn body(number: usize) -> Value {
    json!({
        "model": "baton-3m", "max_tokens": 32, "temperature": 0, "ignore_eos": true,
        "messages": [{"role": "user", "content": format!("{number} and the voice of the LORD came a second time, ").repeat(8)}],
    })
}

/// One request with its retries; the waits, in milliseconds, until each try was answered or refused.
async fn ask(client: &Client, number: usize, seen: &Seen) -> Vec<f64> {
    let mut waits = Vec::new();
    for _ in 0..TRIES {
        let started = Instant::now();
        let retry_after_s = match client.try_open("/v1/chat/completions", &body(number)).await {
            Ok(mut events) => {
                events.until_text(1).await;
                waits.push(started.elapsed().as_secs_f64() * 1e3);
                let streamed = events.finish().await;
                let well = streamed.done && streamed.error.is_none();
                let count = if well { &seen.complete } else { &seen.broken };
                count.fetch_add(1, Ordering::Relaxed);
                return waits;
            }
            Err(NotOpened::Refused { status: 429 | 503, retry_after_s, .. }) => retry_after_s,
            Err(_) => {
                seen.broken.fetch_add(1, Ordering::Relaxed);
                return waits;
            }
        };
        waits.push(started.elapsed().as_secs_f64() * 1e3);
        seen.refused.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(retry_after_s.unwrap_or(1).clamp(1, RETRY_AFTER_MAX_S))).await;
        if seen.ended.load(Ordering::Relaxed) {
            break;
        }
    }
    seen.gave_up.fetch_add(1, Ordering::Relaxed);
    waits
}

/// Requests complete in a second, and every try's wait.
struct Stretch {
    goodput: f64,
    waits_ms: Vec<f64>,
    seen: Arc<Seen>,
}

/// So many clients, each with one request after another.
async fn closed(client: &Client, clients: usize, length: Duration, from: usize) -> Stretch {
    let (seen, started) = (Arc::new(Seen::default()), Instant::now());
    let mut asking = JoinSet::new();
    for nth in 0..clients {
        let (client, seen) = (client.clone(), seen.clone());
        asking.spawn(async move {
            let mut waits = Vec::new();
            for turn in 0.. {
                if started.elapsed() >= length {
                    break;
                }
                waits.extend(ask(&client, from + turn * clients + nth, &seen).await);
            }
            waits
        });
    }
    tokio::time::sleep_until(started + length).await;
    let complete = seen.complete.load(Ordering::Relaxed);
    let waits_ms = sorted(asking.join_all().await.concat());
    Stretch { goodput: complete as f64 / length.as_secs_f64(), waits_ms, seen }
}

/// So many new requests a second, whatever becomes of them.
async fn open(client: &Client, per_second: f64, length: Duration, from: usize) -> Stretch {
    let (seen, started) = (Arc::new(Seen::default()), Instant::now());
    let mut asking = JoinSet::new();
    for nth in 0.. {
        let at = started + Duration::from_secs_f64(nth as f64 / per_second);
        if at >= started + length {
            break;
        }
        tokio::time::sleep_until(at).await;
        let (client, seen) = (client.clone(), seen.clone());
        asking.spawn(async move { ask(&client, from + nth, &seen).await });
    }
    let complete = seen.complete.load(Ordering::Relaxed);
    seen.ended.store(true, Ordering::Relaxed);
    let waits_ms = sorted(asking.join_all().await.concat());
    Stretch { goodput: complete as f64 / length.as_secs_f64(), waits_ms, seen }
}

/// `extent.times` are the seconds of overload.
pub async fn run(extent: Extent) -> Report {
    let fleet = Fleet::start(&Shape::default()).await;
    let client = fleet.client(0);
    let seconds = Duration::from_secs(extent.times as u64);
    closed(&client, extent.streams, seconds / 4, 0).await;
    let peak = closed(&client, extent.streams, seconds / 2, 1_000_000).await;
    let during = open(&client, OVERLOAD * peak.goodput, seconds, 2_000_000).await;
    // What is left of the overload drains in the first part; the second is measured.
    let settle = (seconds / 2).min(Duration::from_secs(20));
    closed(&client, extent.streams, settle, 3_000_000).await;
    let after = closed(&client, extent.streams, settle / 2, 4_000_000).await;
    fleet.quiet().await;

    let count = |of: fn(&Seen) -> &AtomicUsize| of(&during.seen).load(Ordering::Relaxed) as f64;
    let mut report = Report::new("overload", extent.times, &[]);
    report.streams = during.waits_ms.len();
    report.failed = count(|seen| &seen.broken) as usize;
    report.expect_whole();
    report.tell("peak goodput", peak.goodput, "requests/s");
    report.at_least("goodput during, of peak", during.goodput / peak.goodput, "", GOODPUT_DURING);
    report.at_least("goodput after, of peak", after.goodput / peak.goodput, "", GOODPUT_AFTER);
    report.tell("tries refused", count(|seen| &seen.refused), "tries");
    report.tell("clients that gave up", count(|seen| &seen.gave_up), "requests");
    report.gaps(during.waits_ms);
    report.at_most("longest wait", report.gaps_ms.last().copied().unwrap_or(0.0), "ms", BUDGET_MS + SLACK_MS);
    report
}
