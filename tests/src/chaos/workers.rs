//! kill -9 of prefill and decode workers under load: every stream ends as the undisturbed one, after a short silence.

use std::time::Duration;

use tokio::time::Instant;

use super::load::{self, Load, Observed};
use super::report::{quantile, sorted};
use super::{Draw, Extent, Report};
use crate::{Client, Fleet, Shape};

/// Silences are looked for so long after a kill.
const WINDOW: Duration = Duration::from_secs(2);
/// Streams that must end before the first kill and between kills: 200 kills over 10,000 streams.
const STREAMS_EACH: usize = 50;
const CALM_STREAMS: usize = 2 * STREAMS_EACH;
/// Kills beyond those asked for, until one has met a stream.
pub(super) const MORE_MAX: usize = 20;
const GAP_P50_MS: f64 = 300.0;
const GAP_P99_MS: f64 = 1_500.0;

/// Silences after each moment, of the streams open then.
pub(super) fn silences(observed: &[Observed], moments: &[Instant]) -> Vec<f64> {
    let open = |moment: Instant| observed.iter().filter(move |stream| stream.open_at(moment));
    let of = |moment: Instant| open(moment).map(move |s| s.silence_after(moment, WINDOW).as_secs_f64() * 1e3);
    sorted(moments.iter().flat_map(|moment| of(*moment)))
}

/// The part of silences that the faults caused: beyond the undisturbed median, of streams that are silent for longer than
/// nearly any undisturbed one. Streams that the fault did not touch are left out, so that they do not flatter.
pub(super) fn extra(disturbed: &[f64], undisturbed: &[f64]) -> Vec<f64> {
    let (usual, longest) = (quantile(undisturbed, 0.5), quantile(undisturbed, 0.99));
    disturbed.iter().filter(|silence| **silence > longest).map(|silence| silence - usual).collect()
}

/// Silences beyond the undisturbed median, of every stream that lost a worker, by its gateway's word. One that began after
/// the last kill, and was assigned to a worker that was no more, is counted from its begin.
fn extra_of(touched: &[&Observed], kills: &[Instant], undisturbed: &[f64]) -> Vec<f64> {
    let usual = quantile(undisturbed, 0.5);
    let silence = |stream: &&Observed| {
        let kills = kills.iter().copied().filter(|kill| stream.open_at(*kill));
        let longest = kills.map(|kill| stream.silence_after(kill, WINDOW)).max();
        longest.unwrap_or_else(|| stream.silence_after(stream.started, WINDOW)).as_secs_f64() * 1e3
    };
    touched.iter().map(|stream| (silence(stream) - usual).max(0.0)).collect()
}

/// Waits until so many more streams have ended.
pub(super) async fn go_on(load: &Load, streams: usize) {
    let until = load.ended() + streams;
    while load.ended() < until {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Moments of a stretch of time without faults, to measure it by.
pub(super) fn calm_moments(from: Instant, to: Instant) -> Vec<Instant> {
    (1..20).map(|n| from + (to - from) * n / 20).collect()
}

/// Attempts that gateways had to repeat elsewhere so far.
pub(super) async fn repeated(fleet: &Fleet) -> usize {
    let mut count = 0.0;
    for gateway in fleet.ids("gateway") {
        count += fleet.metric(&gateway, "baton_gateway_attempts_failed_total", "").await;
    }
    count as usize
}

pub async fn run(extent: Extent) -> Report {
    let mut fleet = Fleet::start(&Shape { prefill: 2, decode: 2, gateways: 2, ..Shape::default() }).await;
    let clients: Vec<Client> = vec![fleet.client(0), fleet.client(1)];
    let expected = load::expected(&clients[0]).await;
    let load = Load::start(&clients, &expected, extent.streams, extent.seed);
    let started = Instant::now();
    go_on(&load, CALM_STREAMS).await;
    let calm = calm_moments(started, Instant::now());
    let workers = [fleet.ids("prefill"), fleet.ids("decode")].concat();
    let (mut draw, mut kills) = (Draw::new(extent.seed), Vec::new());
    let (before, mut touched) = (repeated(&fleet).await, 0);
    while kills.len() < extent.times || (touched == 0 && kills.len() < extent.times + MORE_MAX) {
        tokio::time::sleep(Duration::from_millis(draw.below(100))).await;
        let victim = draw.choose(&workers).clone();
        kills.push(Instant::now());
        fleet.kill(&victim).await;
        fleet.restart(&victim).await;
        go_on(&load, STREAMS_EACH).await;
        fleet.whole().await;
        touched = repeated(&fleet).await - before;
    }
    let observed = load.finish().await;
    fleet.quiet().await;

    let mut report = Report::new("worker killed", kills.len(), &observed);
    report.expect_whole();
    let undisturbed = silences(&observed, &calm);
    let repeated = fleet.repeated();
    let lost = |stream: &&Observed| repeated.iter().any(|id| stream.answer.ends_with(id.as_str()));
    let streams_touched: Vec<&Observed> = observed.iter().filter(lost).collect();
    report.gaps(extra_of(&streams_touched, &kills, &undisturbed));
    report.at_most("extra gap p50", quantile(&report.gaps_ms, 0.5), "ms", GAP_P50_MS);
    report.at_most("extra gap p99", quantile(&report.gaps_ms, 0.99), "ms", GAP_P99_MS);
    report.tell("silence p50 undisturbed", quantile(&undisturbed, 0.5), "ms");
    // Kills that meet no stream show nothing.
    report.at_least("attempts that lost a worker", touched as f64, "attempts", 1.0);
    report.at_least("streams that lost a worker", report.gaps_ms.len() as f64, "streams", 1.0);
    // Another way to see it, without asking the gateways: the longest silences of all streams, whatever they are of.
    let longest = sorted(extra(&silences(&observed, &kills), &undisturbed));
    report.tell("silences beyond 99 % of the undisturbed", longest.len() as f64, "silences");
    report.tell("extra gap p50 of those", quantile(&longest, 0.5), "ms");
    report
}
