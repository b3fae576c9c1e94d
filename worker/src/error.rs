//! Why a worker did not start, or stopped by itself.

use std::io;

use crate::canary::CanaryError;

/// A worker that never served.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("listen on {address}: {source}; give another address or port 0")]
    Listen { address: String, source: io::Error },
    #[error("config: {key} {problem}")]
    Config { key: &'static str, problem: &'static str },
    #[error("the disk tier in {path}: {source}")]
    Disk { path: String, source: io::Error },
    #[error("TLS on the handoff's address: {0}")]
    Tls(String),
    #[error("no memory for the cache that its ranks can share: {0}")]
    Memory(io::Error),
    #[error("start the engine thread: {0}")]
    Thread(io::Error),
    #[error(
        "the coordinator refuses this worker for good: {0}; run the same version and model everywhere, and coordinators of one cluster"
    )]
    Incompatible(String),
    #[error("the model cannot be served, it fails its canary: {0}")]
    Canary(#[from] CanaryError),
    #[error("the model cannot be served, its backend panicked at the canary; the message stands above")]
    CanaryPanicked,
}

/// The end of a worker that nobody asked to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("another process has registered under this worker's name; give one of them another --id")]
    Superseded,
    #[error("the engine does not come back from a step")]
    EngineStuck,
    #[error("the engine thread panicked; its message stands above")]
    EngineDied,
    #[error("the gRPC server ended by itself")]
    ServerEnded,
}
