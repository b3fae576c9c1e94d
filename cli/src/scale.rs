//! `baton scale`: how many workers a running `baton up` shall have.

use std::path::PathBuf;

use clap::Args;

use crate::exit::Failure;
use crate::out::sayln;
use crate::up::control::{self, Ask};

/// Give the cluster of a `baton up` more or fewer workers.
///
/// New workers get new ids. Surplus ones, those with the highest numbers first, drain as with `baton drain`. Requests that run
/// meanwhile go on with the same bytes. The command returns when all is as asked.
#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes:\n  0  there are as many workers as asked\n  1  some could not be started or drained\n  2  no `baton up` runs there, or it refused"
)]
pub(crate) struct ScaleFlags {
    /// Prefill workers there shall be; 0 lets decode workers prefill themselves [default: as many as there are]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(0..=64), required_unless_present = "decode")]
    prefill: Option<u64>,
    /// Decode workers there shall be [default: as many as there are]
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u64).range(1..=64))]
    decode: Option<u64>,
    /// Data directory of the `baton up` [default: $HOME/.baton]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
}

pub(crate) fn run(flags: ScaleFlags) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let data = flags.data.unwrap_or_else(crate::surroundings::default_data);
    let count = |count: Option<u64>| count.map(|count| count as usize);
    let wish = Ask::Scale { prefill: count(flags.prefill), decode: count(flags.decode) };
    let workers = runtime.block_on(control::ask(&data, &wish, |note| eprintln!("{note}")))?;
    sayln!("{workers}");
    Ok(())
}
