//! The production code on a simulated network, driven by a seed. Nobody imports this crate but the binary.
#![deny(unsafe_code)]

mod compound;
pub mod draw;
mod faults;
pub mod handoff;
pub mod host;
pub mod invariant;
mod machine;
mod members;
pub mod memory;
pub mod model;
mod moment;
pub mod net;
mod network;
pub mod oracle;
pub mod plan;
pub mod planted;
pub mod profile;
pub mod record;
pub mod run;
pub mod scenario;
pub mod show;
pub mod shrink;
mod skew;
pub mod stalls;
mod story;
pub mod topology;
pub mod workload;

pub use net::TurmoilNet;
pub use plan::{Plan, PlanError};
pub use profile::{Profile, UnknownProfile};
pub use record::Detail;
pub use run::{Report, Violation, run, run_with};

#[cfg(not(tokio_unstable))]
compile_error!(
    "without `--cfg tokio_unstable` turmoil does not seed its runtimes and no run would repeat: build inside the workspace, and do not set RUSTFLAGS"
);
