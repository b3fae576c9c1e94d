//! Every process of a cluster is started again, one after the other, as `docs/operations.md` tells an operator to: followers,
//! then the leader once another one leads, workers after a drain or by SIGTERM, gateways by SIGTERM. Clients go to another
//! gateway while theirs is away.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::Instant;

use super::load::{self, Load};
use super::moving::{Moves, Moving};
use super::report::quantile;
use super::workers::{calm_moments, extra, go_on, silences};
use super::{Extent, Report};
use crate::cluster::wait_for;
use crate::{Fleet, Shape};

const STREAMS_EACH: usize = 20;

/// What a coordinator says that meets an entry of a later version.
const OUTDATED: &str = "newer than this binary knows";

/// How workers are ended.
#[derive(Clone, Copy)]
enum How {
    Drain,
    Terminate,
}

/// Ends the process in peace and starts it again; returns when all is whole.
async fn again(fleet: &mut Fleet, id: &str, how: How) {
    match how {
        How::Drain => drop(fleet.done(&["drain", id]).await),
        How::Terminate => fleet.signal(id, libc::SIGTERM),
    }
    let end = fleet.end(id).await;
    // The last coordinator of an earlier version stops by itself once a later one leads and writes what it cannot read.
    let outdated = end.last["message"].as_str().is_some_and(|why| why.contains(OUTDATED));
    assert!(end.code == Some(0) || outdated, "{id} ends in peace: {end:?}");
    fleet.restart(id).await;
    fleet.whole().await;
}

/// Coordinators: the leader last, after another one has taken over.
async fn coordinators(fleet: &mut Fleet, load: &Load, moments: &mut Vec<Instant>) {
    let leader = fleet.leader().await;
    let mut ids = fleet.ids("coordinator");
    ids.retain(|id| *id != leader);
    ids.push(leader.clone());
    for id in ids {
        if id == leader {
            moments.push(Instant::now());
            fleet.done(&["coordinator", "transfer-leader"]).await;
            wait_for("another leader", || async { (fleet.leader().await != leader).then_some(()) }).await;
            go_on(load, STREAMS_EACH).await;
        }
        moments.push(Instant::now());
        again(fleet, &id, How::Terminate).await;
        fleet.agreed().await;
        go_on(load, STREAMS_EACH).await;
    }
}

/// `times` rounds over all processes. With `extent.other` the cluster begins as that binary, and is this one after a round.
pub async fn run(extent: Extent) -> Report {
    let shape = Shape { coordinators: 3, prefill: 2, decode: 2, gateways: 2, ..Shape::default() };
    let mut fleet = Fleet::start(&Shape { binary: extent.other.clone(), ..shape }).await;
    let gateways = [fleet.client(0), fleet.client(1)];
    let expected = load::expected(&gateways[0]).await;
    let moves = Arc::new(Moves::default());
    let asking = {
        let (expected, moves) = (expected.clone(), moves.clone());
        move |nth: usize, number, salt| {
            let mut gateways = gateways.to_vec();
            gateways.rotate_left(nth % 2);
            Moving { gateways, moves: moves.clone() }.observe(expected.clone(), number, salt)
        }
    };
    let load = Load::of(extent.streams, extent.seed, asking);
    let started = Instant::now();
    go_on(&load, 2 * STREAMS_EACH).await;
    let calm = calm_moments(started, Instant::now());
    fleet.use_this_build();
    let mut moments = Vec::new();
    for round in 0..extent.times {
        coordinators(&mut fleet, &load, &mut moments).await;
        let how = if round % 2 == 0 { How::Drain } else { How::Terminate };
        for id in [fleet.ids("prefill"), fleet.ids("decode")].concat() {
            moments.push(Instant::now());
            again(&mut fleet, &id, how).await;
            go_on(&load, STREAMS_EACH).await;
        }
        for id in fleet.ids("gateway") {
            moments.push(Instant::now());
            again(&mut fleet, &id, How::Terminate).await;
            go_on(&load, STREAMS_EACH).await;
        }
    }
    let observed = load.finish().await;
    fleet.quiet().await;

    let mut report = Report::new("all restarted in order", moments.len(), &observed);
    report.expect_whole();
    report.gaps(extra(&silences(&observed, &moments), &silences(&observed, &calm)));
    let met = observed.iter().filter(|stream| moments.iter().any(|moment| stream.streaming_at(*moment))).count();
    // Restarts that meet no stream show nothing.
    report.at_least("streams that a restart met", met as f64, "streams", 1.0);
    report.tell("extra gap p99", quantile(&report.gaps_ms, 0.99), "ms");
    report.tell("gateways not reached", moves.elsewhere.load(Ordering::Relaxed) as f64, "tries");
    report.tell("streams resumed elsewhere", moves.resumed.load(Ordering::Relaxed) as f64, "streams");
    report
}
