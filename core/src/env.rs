//! What a role is handed at its start instead of reaching for it.

use std::sync::Arc;

use crate::{Clock, Net, Rng};

/// The world of one process: production makes it in `cli`, the simulator per host.
pub struct Env {
    pub net: Arc<dyn Net>,
    pub clock: Arc<dyn Clock>,
    pub rng: Rng,
    pub process: Process,
}

/// The process a role runs in: one of the operating system, or one of many that the simulator runs as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// The operating system's number of it.
    pub id: u32,
    /// Whether work that takes long leaves the async threads.
    pub threads: bool,
}

impl Process {
    /// The one this runs in.
    pub fn own() -> Process {
        Process { id: std::process::id(), threads: true }
    }
}
