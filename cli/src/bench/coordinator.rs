//! `baton bench coordinator`: coordinators in processes of their own, fsync on, and how fast they assign and write.

mod drive;
mod group;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use self::drive::Timed;
use self::group::Group;
use super::figure::{self, Figure};
use super::percentile::Distribution;
use crate::exit::Failure;
use crate::out::say;

/// Batched assignments a second that three nodes must reach on two cores.
const ASSIGNMENTS_PER_S: f64 = 40_000.0;
/// Milliseconds one assignment may take when nothing else is asked.
const ASSIGN_P50_MS: f64 = 2.0;
/// Streams of batched assignments, as so many gateways hold, and requests in one message of each.
const STREAMS: usize = 4;
const BATCH: usize = 256;

/// Measure coordinators: assignments and ledger writes per second, and how long one takes.
///
/// Starts the nodes as processes on this machine, with fsync, and ends them afterwards. Nothing of a running cluster is
/// touched.
#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes:\n  0  measured; whether targets are met is in the output\n  1  a node or a measurement failed\n  2  bad flags, or the directory cannot be used"
)]
pub(crate) struct CoordinatorFlags {
    /// Coordinators: 1, 3 or 5
    #[arg(long, default_value = "3", value_parser = ["1", "3", "5"])]
    nodes: String,
    /// Clients of the measurement with one ledger entry a call
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    clients: u64,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Where the nodes keep their logs: the disk that is measured [default: a new directory among temporary files]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Print one JSON object a line for each figure instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(flags: CoordinatorFlags) -> Result<(), Failure> {
    crate::process::raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(measure(flags))
}

async fn measure(flags: CoordinatorFlags) -> Result<(), Failure> {
    let nodes = flags.nodes.parse().map_err(Failure::refused)?;
    let group = Group::start(nodes, flags.data.as_deref()).await?;
    let seconds = Duration::from_secs(flags.seconds);
    let alone = drive::assign_alone(group.leader(), seconds).await?;
    let batched = drive::assign_batched(group.leader(), STREAMS, BATCH, seconds).await?;
    let writes = drive::write(group.leader(), flags.clients as usize, seconds).await?;
    group.end().await;

    let figures = figures(&alone, &batched, &writes, flags.clients);
    match flags.json {
        true => figure::print(&figures),
        false => say!("{}", text(nodes, &figures)),
    }
    Ok(())
}

fn figures(alone: &Timed, batched: &Timed, writes: &Timed, clients: u64) -> Vec<Figure> {
    let percentile = |timed: &Timed, percent: f64| {
        let milliseconds: Distribution = timed.milliseconds.iter().copied().collect();
        milliseconds.percentile(percent).unwrap_or(f64::NAN)
    };
    let per_s = |timed: &Timed| timed.count as f64 / timed.took.as_secs_f64();
    let (p50, rate) = (percentile(alone, 50.0), per_s(batched));
    vec![
        Figure {
            target: Some(ASSIGN_P50_MS),
            ok: p50 <= ASSIGN_P50_MS,
            ..Figure::new("assign p50, one client", p50, "ms")
        },
        Figure::new("assign p99, one client", percentile(alone, 99.0), "ms"),
        Figure {
            target: Some(ASSIGNMENTS_PER_S),
            ok: rate >= ASSIGNMENTS_PER_S,
            ..Figure::new("assignments, batched", rate, "1/s")
        },
        Figure::new(format!("a batch of {BATCH} p50"), percentile(batched, 50.0), "ms"),
        Figure::new(format!("a batch of {BATCH} p99"), percentile(batched, 99.0), "ms"),
        Figure::new(format!("ledger writes, {clients} clients"), per_s(writes), "1/s"),
        Figure::new(format!("ledger write p50, {clients} clients"), percentile(writes, 50.0), "ms"),
        Figure::new(format!("ledger write p99, {clients} clients"), percentile(writes, 99.0), "ms"),
    ]
}

fn text(nodes: usize, figures: &[Figure]) -> String {
    let target = |figure: &Figure| match figure.target {
        None => String::new(),
        Some(target) => format!("{} ({target})", if figure.ok { "met" } else { "missed" }),
    };
    let row = |f: &Figure| vec![f.name.clone(), format!("{:.2}", f.value), f.unit.to_string(), target(f)];
    let rows: Vec<_> = figures.iter().map(row).collect();
    format!("{nodes} coordinators, fsync on\n{}", crate::table::render(&["FIGURE", "VALUE", "UNIT", "TARGET"], &rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_targets_are_told() {
        let timed = |count, milliseconds: &[f64]| Timed {
            count,
            took: Duration::from_secs(2),
            milliseconds: milliseconds.to_vec(),
        };
        let figures = figures(&timed(2, &[1.0, 3.0]), &timed(79_998, &[5.0]), &timed(10, &[4.0]), 7);
        let of = |name: &str| figures.iter().find(|f| f.name == name).unwrap_or_else(|| panic!("no {name}"));
        assert_eq!((of("assign p50, one client").value, of("assign p50, one client").ok), (2.0, true));
        assert_eq!((of("assignments, batched").value, of("assignments, batched").ok), (39_999.0, false));
        assert_eq!(of("ledger writes, 7 clients").value, 5.0);
        assert!(text(3, &figures).contains("missed (40000)"));
    }
}
