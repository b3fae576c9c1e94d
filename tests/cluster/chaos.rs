//! The chaos program in short: each fault a few times, every stream compared with the undisturbed run. Targets in
//! milliseconds are for the long form on a quiet machine; here nothing may be lost, hung, doubled or wrong.

use baton_tests::chaos::{self, Extent, Report};

fn extent(times: usize, seed: u64) -> Extent {
    Extent { times, streams: 6, seed, other: None }
}

/// `failed`: whether requests may be refused with a typed error for a moment.
fn check(report: &Report, failed: bool) {
    let bad = [report.lost, report.hung, report.doubled, report.wrong];
    assert_eq!(bad, [0; 4], "lost, hung, doubled, wrong: {report:?}");
    assert!(report.compared > 0 && (failed || report.failed == 0), "{report:?}");
}

/// A fault that meets no stream shows nothing.
fn met(report: &Report, figure: &str) {
    let met = report.figures.iter().find(|told| told.name.ends_with(figure));
    assert!(met.is_some_and(|told| told.ok), "no fault met a stream: {report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_killed_under_load() {
    let report = chaos::leader::run(extent(2, 11), true).await;
    check(&report, true);
    met(&report, "running streams at the kills");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_killed_under_load() {
    check(&chaos::leader::run(extent(1, 18), false).await, false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_killed_under_load() {
    let report = chaos::workers::run(extent(4, 12)).await;
    check(&report, false);
    met(&report, "attempts that lost a worker");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_stopped_and_woken_under_load() {
    let report = chaos::stop::run(extent(1, 13)).await;
    check(&report, false);
    met(&report, "attempts that lost a worker");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paths_cut_and_damaged_under_load() {
    let report = chaos::cut::run(extent(2, 14)).await;
    check(&report, false);
    met(&report, "attempts that lost their path");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_killed_under_load() {
    let report = chaos::gateway::run(extent(1, 15)).await;
    check(&report, false);
    met(&report, "connections broken");
    met(&report, "orphans counted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_leave_free_everything() {
    check(&chaos::cancel::run(extent(50, 16)).await, false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_process_restarted_in_order_under_load() {
    let report = chaos::rolling::run(extent(1, 19)).await;
    check(&report, false);
    met(&report, "streams that a restart met");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_overloaded_fleet_refuses_and_serves_on() {
    let report = chaos::overload::run(extent(4, 17)).await;
    check(&report, false);
    met(&report, "their budget is 2 s");
    met(&report, "refusals counted by the coordinator");
    let figure = |name: &str| report.figures.iter().find(|f| f.name.ends_with(name)).map_or(0.0, |f| f.value);
    assert!(figure("tries refused") > 0.0, "nothing was too much for it: {report:?}");
    assert!(figure("goodput during, of peak") > 0.3 && figure("goodput after, of peak") > 0.3, "{report:?}");
}
