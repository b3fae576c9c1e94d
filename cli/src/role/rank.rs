//! `baton rank`: one rank of a worker whose tensor-parallel group is of processes. The worker starts it and is the only one
//! it speaks with; it ends with the worker.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use baton_engine::RankOptions;
use baton_engine::ranks::process::serve;
use clap::Args;

use crate::bench::engine::{profile, quantize};
use crate::exit::Failure;

/// Run one tensor-parallel rank of a worker. Workers start them (--ranks processes); nobody else has a use for it.
#[derive(Args, Debug)]
pub(crate) struct RankFlags {
    /// Whose rank it is
    #[arg(long)]
    of: String,
    #[arg(long)]
    model: PathBuf,
    #[arg(long)]
    rank: usize,
    #[arg(long)]
    ranks: usize,
    /// The memory in which the group meets
    #[arg(long)]
    memory: PathBuf,
    #[arg(long)]
    threads: usize,
    #[arg(long)]
    profile: String,
    #[arg(long)]
    quantize: Option<String>,
    #[arg(long)]
    weights_cache: Option<PathBuf>,
}

/// What starts a rank of the worker `of`. No signal that is meant for the worker's terminal reaches it.
pub(crate) fn command(of: &str, model: &Path, options: &RankOptions) -> Command {
    let RankOptions { rank, ranks, memory, threads, profile, quantize, kept } = options;
    // The very file that runs, also when another one has taken its place.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("baton").arg("rank").args(["--of", of]).arg("--model").arg(model).arg("--memory").arg(memory);
    for (flag, number) in [("--rank", rank), ("--ranks", ranks), ("--threads", threads)] {
        command.arg(flag).arg(number.to_string());
    }
    command.args(["--profile", profile.as_str()]);
    if let Some(format) = quantize {
        command.args(["--quantize", format.as_str()]);
    }
    if let Some(dir) = kept {
        command.arg("--weights-cache").arg(dir);
    }
    command.process_group(0);
    command
}

pub(crate) fn run(flags: RankFlags) -> Result<(), Failure> {
    let Some(profile) = profile(Some(&flags.profile))? else { return Err(Failure::refuse("name a profile")) };
    let options = RankOptions {
        rank: flags.rank,
        ranks: flags.ranks,
        memory: flags.memory,
        threads: flags.threads,
        profile,
        quantize: quantize(flags.quantize.as_deref())?,
        kept: flags.weights_cache,
    };
    tracing::info!(of = flags.of, rank = flags.rank, ranks = flags.ranks, "rank starts");
    serve(&flags.model, &options, std::io::stdin().lock(), std::io::stdout()).map_err(Failure::refused)
}
