//! kill -9 of a gateway under load: its clients' connections break, what they held is given back, and streams of the
//! other gateway go on untouched.

use tokio::time::Instant;

use super::load::{self, Load, Verdict};
use super::report::quantile;
use super::workers::go_on;
use super::{Draw, Extent, Report};
use crate::{Fleet, Shape};

const STREAMS_EACH: usize = 30;
/// Requests of a dead gateway are ended within.
const ENDED_MS: f64 = 2_000.0;

pub async fn run(extent: Extent) -> Report {
    let mut fleet = Fleet::start(&Shape { decode: 2, gateways: 2, ..Shape::default() }).await;
    let expected = load::expected(&fleet.client(0)).await;
    let mut draw = Draw::new(extent.seed);
    let (mut untouched, mut freed, mut broken) = (Vec::new(), Vec::new(), 0);
    for _ in 0..extent.times {
        let victim = draw.below(2) as usize;
        let clients = [fleet.client(victim), fleet.client(1 - victim)];
        let dying = Load::start(&clients[..1], &expected, extent.streams, draw.number());
        let other = Load::start(&clients[1..], &expected, 2, draw.number());
        go_on(&dying, STREAMS_EACH).await;
        fleet.kill(&format!("gateway-{victim}")).await;
        let killed = Instant::now();
        untouched.extend(other.finish().await);
        let seen = dying.finish().await;
        broken += seen.iter().filter(|stream| stream.verdict == Verdict::Lost).count();
        fleet.quiet().await;
        freed.push(killed.elapsed().as_secs_f64() * 1e3);
        fleet.restart(&format!("gateway-{victim}")).await;
        fleet.whole().await;
    }
    let mut report = Report::new("gateway killed", extent.times, &untouched);
    report.expect_whole();
    report.gaps(freed);
    report.at_most("all given back p99", quantile(&report.gaps_ms, 0.99), "ms", ENDED_MS);
    let orphans = fleet.metric("coordinator-1", "baton_coordinator_orphans_total", "").await;
    report.at_least("orphans counted", orphans, "requests", 1.0);
    // Kills that meet no stream show nothing.
    report.at_least("connections broken", broken as f64, "streams", 1.0);
    report
}
