//! Paths between processes cut, stalled, reset and damaged by proxies, on coordinators' and workers' gRPC ports and on KV
//! ports: streams end as the undisturbed ones, and nothing of a damaged block is ever used.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::load::{self, Load};
use super::report::quantile;
use super::workers::{MORE_MAX, calm_moments, extra, go_on, repeated, silences};
use super::{Draw, Extent, Report};
use crate::{Fault, Fleet, Proxy, Shape, Way};

const STREAMS_EACH: usize = 30;
/// How long a fault stays.
const HELD: Duration = Duration::from_millis(2_500);
/// A flip meets a byte this near: within what one handoff moves.
const FLIP_BYTES: u64 = 64 << 10;

/// Does something bad to a path. Resets and flips are over at once, the rest stays until healed. Bits are flipped where
/// blocks pass only: gRPC relies on TCP's own checksum.
fn harm(proxy: &Proxy, blocks: bool, draw: &mut Draw) {
    match draw.below(7) {
        1 if blocks => proxy.flip(Way::Up, draw.below(FLIP_BYTES)),
        0 | 1 => proxy.reset(),
        2 => proxy.set_both(Fault::Stall),
        3 => proxy.set(Way::Up, Fault::Stall),
        4 => proxy.set(Way::Down, Fault::Stall),
        5 => proxy.set_both(Fault::Swallow),
        _ => proxy.set_both(Fault::Delay(Duration::from_millis(20 + draw.below(80)))),
    }
}

pub async fn run(extent: Extent) -> Report {
    let shape = Shape { coordinators: 3, prefill: 2, decode: 2, ..Shape::default() };
    let fleet = Fleet::start(&Shape { proxied: true, coordinators_proxied: true, ..shape }).await;
    let client = fleet.client(0);
    let expected = load::expected(&client).await;
    // A leader that nobody reaches, and that reaches the others, leads on: who asks meanwhile is told when to come again.
    let told = Arc::new(AtomicUsize::new(0));
    let (tell, asked) = (told.clone(), (client.clone(), expected.clone()));
    let load = Load::of(extent.streams, extent.seed, move |_, number, salt| {
        let (told, (client, expected)) = (tell.clone(), asked.clone());
        async move { load::observe_told(&client, &expected, number, salt, Some(&told)).await }
    });
    let started = Instant::now();
    go_on(&load, STREAMS_EACH).await;
    let calm = calm_moments(started, Instant::now());
    let (coordinators, decode) = (fleet.ids("coordinator"), fleet.ids("decode"));
    let workers = [decode.clone(), fleet.ids("prefill")].concat();
    let mut coordinators_cut = 0;
    let (mut draw, mut cuts) = (Draw::new(extent.seed), Vec::new());
    let (before, mut touched) = (repeated(&fleet).await, 0);
    while cuts.len() < extent.times || (touched == 0 && cuts.len() < extent.times + MORE_MAX) {
        let target = draw.below(3);
        let proxy = match target {
            0 => &fleet.handoff[draw.choose(&decode)],
            1 => &fleet.control[draw.choose(&workers)],
            _ => &fleet.control[draw.choose(&coordinators)],
        };
        coordinators_cut += usize::from(target == 2);
        cuts.push(Instant::now());
        harm(proxy, target == 0, &mut draw);
        tokio::time::sleep(HELD).await;
        proxy.heal();
        fleet.whole().await;
        go_on(&load, STREAMS_EACH).await;
        touched = repeated(&fleet).await - before;
    }
    let observed = load.finish().await;
    fleet.quiet().await;

    let mut report = Report::new("path cut or damaged", cuts.len(), &observed);
    report.expect_whole();
    report.gaps(extra(&silences(&observed, &cuts), &silences(&observed, &calm)));
    // Faults that meet no stream show nothing.
    report.at_least("attempts that lost their path", touched as f64, "attempts", 1.0);
    report.tell("cuts before a coordinator", coordinators_cut as f64, "cuts");
    report.tell("clients told to come again", told.load(Ordering::Relaxed) as f64, "times");
    report.tell("extra gap p99", quantile(&report.gaps_ms, 0.99), "ms");
    report
}
