//! kill -9 of the leading coordinator under load: running streams go on untouched, new requests wait for the next leader.

use std::time::Duration;

use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::load::{self, Expected, Load};
use super::report::{quantile, sorted};
use super::{Draw, Extent, Report};
use crate::{Client, Fleet, Shape};

/// Small requests are sent this often around each kill, for so long after it.
const PROBE_EVERY: Duration = Duration::from_millis(20);
const PROBED: Duration = Duration::from_millis(1_500);
/// Longest a new request may wait, p99 over the kills.
const WAIT_MS: f64 = 800.0;
/// How much longer than undisturbed a running stream may be silent around a kill, p99: it waits for nobody, and what is left
/// is the machine's own noise.
const SILENCE_EXTRA_MS: f64 = 300.0;

/// One small request: how long until its first event, and whether it ended well.
async fn probe(client: Client) -> (Duration, Result<(), String>) {
    let body = json!({"model": "baton-3m", "prompt": "And God said", "max_tokens": 1, "temperature": 0});
    let started = Instant::now();
    match client.try_open("/v1/completions", &body).await {
        Ok(mut events) => {
            events.until_text(1).await;
            let waited = started.elapsed();
            let streamed = events.finish().await;
            (waited, if streamed.done && streamed.error.is_none() { Ok(()) } else { Err(format!("{streamed:?}")) })
        }
        Err(error) => (started.elapsed(), Err(error.to_string())),
    }
}

/// Probes for a while; the longest wait of those that were answered, and what failed.
async fn probes(client: &Client, until: Instant) -> (f64, Vec<String>) {
    let mut open = JoinSet::new();
    while Instant::now() < until {
        open.spawn(probe(client.clone()));
        tokio::time::sleep(PROBE_EVERY).await;
    }
    let (mut longest, mut failed) = (0.0, Vec::new());
    for (waited, ended) in open.join_all().await {
        longest = f64::max(longest, waited.as_secs_f64() * 1e3);
        failed.extend(ended.err());
    }
    (longest, failed)
}

/// Kills the leader, or with `leading` false a follower.
pub async fn run(extent: Extent, leading: bool) -> Report {
    let mut fleet = Fleet::start(&Shape { coordinators: 3, ..Shape::default() }).await;
    let client = fleet.client(0);
    let expected: Expected = load::expected(&client).await;
    let load = Load::start(std::slice::from_ref(&client), &expected, extent.streams, extent.seed);
    let calm = Instant::now();
    let (undisturbed, _) = probes(&client, calm + PROBED).await;
    let mut draw = Draw::new(extent.seed);
    let (mut kills, mut waits, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..extent.times {
        let leader = fleet.leader().await;
        let others: Vec<String> = fleet.ids("coordinator").into_iter().filter(|id| *id != leader).collect();
        let victim = if leading { leader } else { draw.choose(&others).clone() };
        tokio::time::sleep(Duration::from_millis(draw.below(300))).await;
        let killed = Instant::now();
        fleet.kill(&victim).await;
        kills.push(killed);
        let (wait, errors) = probes(&client, killed + PROBED).await;
        waits.push(wait);
        failed.extend(errors);
        fleet.restart(&victim).await;
        fleet.agreed().await;
    }
    let observed = load.finish().await;
    fleet.quiet().await;

    let mut report = Report::new(if leading { "leader killed" } else { "follower killed" }, extent.times, &observed);
    report.failed += failed.len();
    failed.into_iter().for_each(|error| report.remark(format!("new request: {error}")));
    report.expect_whole();
    let silences = |moments: &[Instant]| {
        let running = |moment: Instant| observed.iter().filter(move |stream| stream.streaming_at(moment));
        let silence = |moment: Instant| running(moment).map(move |s| s.silence_after(moment, PROBED));
        sorted(moments.iter().flat_map(|moment| silence(*moment)).map(|silence| silence.as_secs_f64() * 1e3))
    };
    let waits = sorted(waits);
    report.at_most(
        "new request's wait p99",
        quantile(&waits, 0.99),
        "ms",
        if leading { WAIT_MS } else { WAIT_MS / 2.0 },
    );
    report.tell("new request's wait p50", quantile(&waits, 0.5), "ms");
    report.tell("new request's longest wait undisturbed", undisturbed, "ms");
    let (around, usual) = (silences(&kills), quantile(&silences(&[calm, calm + PROBED / 2]), 0.99));
    report.tell("running streams' silence p99 undisturbed", usual, "ms");
    report.at_most("running streams' silence p99", quantile(&around, 0.99), "ms", usual + SILENCE_EXTRA_MS);
    // Kills that meet no stream show nothing.
    report.at_least("running streams at the kills", around.len() as f64, "streams", 1.0);
    report.gaps(waits);
    report
}
