//! This build computes on the CPU only.

use std::path::{Path, PathBuf};

use baton_engine::{Backend, ModelSpec, Progress};

use tokio::runtime::Runtime;

use crate::bench::engine::EngineFlags;
use crate::bench::figure::Figure;
use crate::doctor::DoctorFlags;
use crate::exit::Failure;
use crate::role::worker::Room;

const ADVICE: &str = "this build has no GPU support; build it with `cargo build --release --features cuda`, which needs no CUDA installed";

/// A model on GPU `index`, with memory for its KV blocks: those asked for, or no more than fit.
pub(crate) fn read(
    _directory: &Path,
    _index: usize,
    _threads: usize,
    _room: Room,
    _progress: &mut dyn FnMut(Progress),
) -> anyhow::Result<(Box<dyn Backend>, ModelSpec, u64)> {
    anyhow::bail!("{ADVICE}; or compute on the CPU with --device cpu")
}

/// `baton bench engine` on a GPU.
pub(crate) fn bench(_flags: &EngineFlags, _directory: &Path, _index: usize, _threads: usize) -> Result<(), Failure> {
    Err(Failure::refuse(ADVICE))
}

/// `baton bench transfer` on GPUs.
pub(crate) fn transfer(_from: usize, _to: usize, _rounds: u32, _runtime: &Runtime) -> Result<Vec<Figure>, Failure> {
    Err(Failure::refuse(ADVICE))
}

/// Its second process.
pub(crate) fn send(_from: usize, _runtime: &Runtime) -> Result<(), Failure> {
    Err(Failure::refuse(ADVICE))
}

/// What `baton doctor` says in its line about GPUs.
pub(crate) fn finding() -> String {
    "not used: this build computes on the CPU (feature cuda)".to_string()
}

/// `baton doctor --gpu`.
pub(crate) fn doctor(_flags: &DoctorFlags, _cubins: PathBuf) -> Result<(), Failure> {
    Err(Failure::refuse(ADVICE))
}
