//! Chaos: a fleet of real processes under load, faults by a seeded plan, and every stream compared byte for byte with the
//! undisturbed run. Each trial gives one report; all of them are one table.

pub mod cancel;
pub mod cut;
pub mod draw;
pub mod gateway;
pub mod leader;
pub mod load;
pub mod moving;
pub mod overload;
pub mod report;
pub mod rolling;
pub mod stop;
pub mod workers;

use std::path::PathBuf;

pub use draw::Draw;
pub use load::{Load, Observed, Verdict};
pub use report::{Report, print_figures, print_table};

/// How much of a trial is run, and with which seed.
#[derive(Clone, Debug)]
pub struct Extent {
    /// Kills, stops, cancels or seconds, by the trial.
    pub times: usize,
    /// Streams kept running.
    pub streams: usize,
    pub seed: u64,
    /// Another build's binary, for trials that let both work together.
    pub other: Option<PathBuf>,
}
