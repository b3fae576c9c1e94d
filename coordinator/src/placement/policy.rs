//! The knobs of placement.

use baton_core::Lane;
use baton_core::limits::WORKER_QUEUE_MAX;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Prompt tokens missing on the decode worker from which a prefill worker is used. Default 64.
    pub prefill_tokens_min: u64,
    /// Requests that may wait on a worker before it counts as full. Default: the bound of the worker itself.
    pub queue_max: u64,
    /// Requests that may wait on a decode worker for a sequence or for blocks; further ones wait with the coordinator,
    /// where lanes and tenants take turns. Default 4.
    pub decode_waiting_max: u64,
    /// Requests that may always be on a prefill worker. When there are more, and their prompts take longer than the
    /// interactive lane's TTFT, further ones wait with the coordinator. Default 64.
    pub prefill_waiting_max: u64,
    /// What sharing a decode worker's steps with one more sequence is worth, in prompt tokens. Default 32.
    pub sequence_cost_tokens: u64,
    /// What taking all of a decode worker's available blocks is worth, in prompt tokens. Default 1024.
    pub pressure_cost_tokens: u64,
    /// What each missed heartbeat of a worker is worth, in prompt tokens. Default 64.
    pub stale_cost_tokens: u64,
    /// How many more leading prompt tokens another worker must hold than the one that prefills, to be named as their holder;
    /// 0 names none. Default 64.
    pub pull_tokens_min: u64,
    /// Prompt tokens per second where no worker of a pool has measured itself yet. Default 1000.
    pub prefill_rate_assumed: u64,
    /// Bytes per microsecond between workers of one process. Default 8000.
    pub link_rate_process: u64,
    /// Bytes per microsecond between workers of one host. Default 2000.
    pub link_rate_host: u64,
    /// Bytes per microsecond between hosts. Default 1000.
    pub link_rate_network: u64,
    /// What the interactive lane aims at. Default: first token in 1000 ms, then one every 50 ms.
    pub interactive: Targets,
    /// What the batch lane aims at. Default: first token in 15 s, then one every 500 ms.
    pub batch: Targets,
    /// Milliseconds after which a pair of workers gets its next canary; 0 sends none. Default 2000.
    pub canary_ms: u64,
}

/// Latencies beyond which waiting counts more than work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Targets {
    /// Time to first token, milliseconds.
    pub ttft_ms: u64,
    /// Time between tokens, milliseconds.
    pub itl_ms: u64,
}

impl Policy {
    pub fn targets(&self, lane: Lane) -> Targets {
        match lane {
            Lane::Interactive => self.interactive,
            Lane::Batch => self.batch,
        }
    }
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            prefill_tokens_min: 64,
            queue_max: WORKER_QUEUE_MAX as u64,
            decode_waiting_max: 4,
            prefill_waiting_max: 64,
            sequence_cost_tokens: 32,
            pressure_cost_tokens: 1024,
            stale_cost_tokens: 64,
            prefill_rate_assumed: 1000,
            link_rate_process: 8000,
            link_rate_host: 2000,
            link_rate_network: 1000,
            interactive: Targets { ttft_ms: 1_000, itl_ms: 50 },
            batch: Targets { ttft_ms: 15_000, itl_ms: 500 },
            pull_tokens_min: 64,
            canary_ms: 2_000,
        }
    }
}
