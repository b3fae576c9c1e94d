//! The chaos program: `cargo run --release -p baton-tests --bin chaos -- --long`. Each trial starts a fleet of its own, so
//! that `--only` repeats any part of a run by itself.

use std::path::PathBuf;
use std::process::ExitCode;

use baton_tests::chaos::{self, Extent, Report, print_figures, print_table};
use clap::{Parser, ValueEnum};

/// Kill, stop, cut and overload a fleet of real processes under load, and compare every stream with the undisturbed run.
///
/// Needs target/release/baton. A short form of each trial is part of the tests.
#[derive(Parser, Debug)]
#[command(after_help = "Exit codes:\n  0  every target is met\n  1  one is missed; the table says which")]
struct Flags {
    /// These trials only
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Trial>,
    /// Run each trial as long as its targets are stated for: 200 kills, 10,000 streams, 10,000 cancels, 60 s of overload, 10 rounds
    #[arg(long)]
    long: bool,
    /// Kills, stops, cancels, seconds or rounds of each trial, instead
    #[arg(long)]
    times: Option<usize>,
    /// Streams kept running
    #[arg(long, default_value_t = 12)]
    streams: usize,
    /// Fixes the plan of faults and the order of requests
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Begin the rolling trial as another build's binary: it upgrades the cluster to this one
    #[arg(long, value_name = "PATH")]
    other_binary: Option<PathBuf>,
    /// Print one JSON object a line for each figure after the table
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Trial {
    Leader,
    Follower,
    Workers,
    Stop,
    Cut,
    Gateway,
    Cancel,
    Overload,
    Rolling,
}

impl Trial {
    /// (short, long)
    fn times(self) -> (usize, usize) {
        match self {
            Trial::Leader | Trial::Workers => (3, 200),
            Trial::Follower => (2, 30),
            Trial::Stop => (2, 30),
            Trial::Cut => (2, 30),
            Trial::Gateway => (2, 30),
            Trial::Cancel => (100, 10_000),
            Trial::Overload => (8, 60),
            Trial::Rolling => (1, 10),
        }
    }

    async fn run(self, extent: Extent) -> Report {
        match self {
            Trial::Leader => chaos::leader::run(extent, true).await,
            Trial::Follower => chaos::leader::run(extent, false).await,
            Trial::Workers => chaos::workers::run(extent).await,
            Trial::Stop => chaos::stop::run(extent).await,
            Trial::Cut => chaos::cut::run(extent).await,
            Trial::Gateway => chaos::gateway::run(extent).await,
            Trial::Cancel => chaos::cancel::run(extent).await,
            Trial::Overload => chaos::overload::run(extent).await,
            Trial::Rolling => chaos::rolling::run(extent).await,
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let flags = Flags::parse();
    let all = Trial::value_variants();
    let mut reports = Vec::new();
    for trial in all.iter().filter(|trial| flags.only.is_empty() || flags.only.contains(trial)) {
        let (short, long) = trial.times();
        let times = flags.times.unwrap_or(if flags.long { long } else { short });
        eprintln!("{trial:?}, {times} times, seed {}", flags.seed);
        reports.push(
            trial
                .run(Extent { times, streams: flags.streams, seed: flags.seed, other: flags.other_binary.clone() })
                .await,
        );
    }
    print_table(&reports);
    if flags.json {
        print_figures(&reports);
    }
    if reports.iter().all(Report::is_ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
