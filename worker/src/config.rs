//! What an operator decides about one worker.

use std::path::PathBuf;

use baton_core::limits::{AUTONOMY_GRACE_MS, DRAIN_MS, KV_DISK_BYTES};
use baton_core::{Role, WorkerId};
use baton_engine::EngineConfig;
use serde::Deserialize;

/// One worker, prefill or decode. Checked by `start`, which names the key at fault.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The worker's name, unique in the cluster (`prefill-0`). A process that registers under a name in use takes it
    /// over: the earlier life is fenced.
    pub id: WorkerId,
    /// `prefill` or `decode`.
    pub role: Role,
    /// Where gRPC listens, `host:port`; port 0 takes a free one.
    pub listen: String,
    /// Where blocks come in, `host:port`; port 0 takes a free one: handoffs at a decode worker, and at either kind what
    /// another worker holds.
    pub kv_listen: String,
    /// Where other workers reach `kv_listen`, `host:port`, if that is not its port at `advertise_host`: a mapped port, or
    /// something between that is meant to see the bytes. Handoffs that come that way never use shared memory.
    #[serde(default)]
    pub kv_advertise: Option<String>,
    /// Whether a prefill worker that knows no tickets for handoffs, of an earlier release, is turned away.
    #[serde(default)]
    pub kv_tickets_required: bool,
    /// Host under which other processes reach this worker, without a port.
    pub advertise_host: String,
    /// gRPC addresses of the coordinators, at least one.
    pub coordinators: Vec<String>,
    /// The cluster that an earlier life of this process was in; empty for the first one.
    #[serde(skip)]
    pub cluster: String,
    /// How long a worker that drains lets its requests go on before they move to other workers, in milliseconds.
    #[serde(default = "drain_ms")]
    pub drain_ms: u64,
    /// How long a worker goes on serving while no coordinator answers, in milliseconds; then it drops everything and
    /// registers anew as soon as it can.
    #[serde(default = "autonomy_ms")]
    pub autonomy_ms: u64,
    /// Whether blocks that another worker holds are fetched from it when that takes less time than computing them.
    #[serde(default = "kv_pull")]
    pub kv_pull: bool,
    /// Bytes of host memory for blocks that the cache has no room for any more; 0: none.
    #[serde(default)]
    pub kv_host_bytes: u64,
    /// Folder of this worker alone, for blocks that memory has no room for any more. They outlive the process.
    #[serde(default)]
    pub kv_disk: Option<PathBuf>,
    /// Bytes that `kv_disk` takes at most.
    #[serde(default = "kv_disk_bytes")]
    pub kv_disk_bytes: u64,
    /// Sizes of the engine.
    pub engine: EngineConfig,
}

fn kv_pull() -> bool {
    true
}

fn kv_disk_bytes() -> u64 {
    KV_DISK_BYTES
}

fn drain_ms() -> u64 {
    DRAIN_MS
}

fn autonomy_ms() -> u64 {
    AUTONOMY_GRACE_MS
}

impl Config {
    /// The address others use for a listener bound to `bound`.
    pub fn advertised(&self, bound: &str) -> String {
        let port = bound.rsplit(':').next().unwrap_or_default();
        format!("{}:{port}", self.advertise_host)
    }
}
