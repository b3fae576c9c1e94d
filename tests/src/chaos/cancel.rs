//! Clients that leave at random phases of their requests: everything they held is given back soon, and nothing stays.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::load::{self, REQUESTS};
use super::report::quantile;
use super::{Draw, Extent, Report};
use crate::{Client, Fleet, Shape};

/// Clients that leave in one round; after it everything must be given back.
const ROUND: usize = 50;
const FREED_P99_MS: f64 = 1_000.0;
/// A client waits for the head of its answer at most so long before it leaves, or reads so many events.
const HEAD_US_MAX: u64 = 60_000;
const EVENTS_MAX: u64 = 40;

/// Opens a stream and leaves it; returns when.
async fn leave(client: Client, number: usize, salt: u64, mut draw: Draw) -> Instant {
    let body = load::body(number, Some(salt));
    let early = draw.below(2) == 0;
    let patience = if early { draw.below(HEAD_US_MAX) } else { 30_000_000 };
    let opening = client.try_open("/v1/chat/completions", &body);
    if let Ok(Ok(mut events)) = tokio::time::timeout(Duration::from_micros(patience), opening).await {
        for _ in 0..draw.below(EVENTS_MAX) {
            if !events.advance().await {
                break;
            }
        }
    }
    Instant::now()
}

pub async fn run(extent: Extent) -> Report {
    let fleet = Fleet::start(&Shape { prefill: 1, decode: 2, ..Shape::default() }).await;
    let client = fleet.client(0);
    let expected = load::expected(&client).await;
    fleet.quiet().await;
    let (mut draw, mut freed) = (Draw::new(extent.seed), Vec::new());
    for _ in 0..extent.times.div_ceil(ROUND) {
        let mut leaving = JoinSet::new();
        for _ in 0..ROUND {
            // No more than `streams` at a time.
            if leaving.len() >= extent.streams {
                leaving.join_next().await;
            }
            let number = draw.below(REQUESTS as u64) as usize;
            leaving.spawn(leave(client.clone(), number, draw.number(), Draw::new(draw.number())));
        }
        let left = leaving.join_all().await.into_iter().max().unwrap_or_else(Instant::now);
        fleet.quiet().await;
        freed.push(left.elapsed().as_secs_f64() * 1e3);
    }
    let mut after = Vec::new();
    for number in 0..REQUESTS {
        after.push(load::observe(&client, &expected, number, None).await);
    }
    fleet.quiet().await;

    let mut report = Report::new("client left", extent.times, &after);
    report.expect_whole();
    report.gaps(freed);
    report.at_most("all freed p99", quantile(&report.gaps_ms, 0.99), "ms", FREED_P99_MS);
    report.at_most("blocks held after", fleet.blocks_held().await.unwrap_or(u64::MAX) as f64, "blocks", 0.0);
    report
}
