//! SIGSTOP of a worker under load: it is fenced, its streams go on elsewhere, and what it says after SIGCONT counts for
//! nothing.

use tokio::time::Instant;

use super::load::{self, Load};
use super::report::quantile;
use super::workers::{MORE_MAX, calm_moments, extra, go_on, repeated, silences};
use super::{Draw, Extent, Report};
use crate::cluster::{alive, wait_for};
use crate::{Fleet, Shape};

const FENCED_MS: f64 = 3_000.0;
const STREAMS_EACH: usize = 40;

async fn life(fleet: &Fleet, worker: &str) -> Option<(bool, u64)> {
    let status = fleet.status().await?;
    let row = status["workers"].as_array()?.iter().find(|w| w["id"] == worker)?.clone();
    Some((row["live"].as_bool()?, row["incarnation"].as_u64()?))
}

pub async fn run(extent: Extent) -> Report {
    let mut fleet = Fleet::start(&Shape { prefill: 2, decode: 2, ..Shape::default() }).await;
    let client = fleet.client(0);
    let expected = load::expected(&client).await;
    let load = Load::start(std::slice::from_ref(&client), &expected, extent.streams, extent.seed);
    let started = Instant::now();
    go_on(&load, STREAMS_EACH).await;
    let calm = calm_moments(started, Instant::now());
    let workers = [fleet.ids("decode"), fleet.ids("prefill")].concat();
    let (mut draw, mut stops, mut fenced) = (Draw::new(extent.seed), Vec::new(), Vec::new());
    let (before_all, mut touched) = (repeated(&fleet).await, 0);
    while stops.len() < extent.times || (touched == 0 && stops.len() < extent.times + MORE_MAX) {
        let victim = draw.choose(&workers).clone();
        let pid = fleet.pid(&victim);
        let before = wait_for("the worker's life", || life(&fleet, &victim)).await;
        let stopped = Instant::now();
        fleet.signal(&victim, libc::SIGSTOP);
        stops.push(stopped);
        wait_for("the stopped worker to be fenced", || fleet.fenced(&victim)).await;
        fenced.push(stopped.elapsed().as_secs_f64() * 1e3);
        go_on(&load, STREAMS_EACH).await;
        fleet.signal(&victim, libc::SIGCONT);
        // It ends when it hears that its life is over, or has taken a new one.
        let ended = wait_for("the woken worker to notice", || async {
            let ended = !alive(pid);
            let back = life(&fleet, &victim).await.is_some_and(|(live, now)| live && now >= before.1);
            (back || ended).then_some(ended)
        })
        .await;
        if ended {
            fleet.restart(&victim).await;
        }
        fleet.whole().await;
        go_on(&load, STREAMS_EACH / 2).await;
        touched = repeated(&fleet).await - before_all;
    }
    let observed = load.finish().await;
    fleet.quiet().await;

    let mut report = Report::new("worker stopped, woken", stops.len(), &observed);
    report.expect_whole();
    report.gaps(extra(&silences(&observed, &stops), &silences(&observed, &calm)));
    report.at_most("fenced, longest", fenced.iter().copied().fold(0.0, f64::max), "ms", FENCED_MS);
    // Stops that meet no stream show nothing.
    report.at_least("attempts that lost a worker", touched as f64, "attempts", 1.0);
    report.tell("extra gap p99", quantile(&report.gaps_ms, 0.99), "ms");
    report
}
