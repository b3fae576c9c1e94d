//! The knobs of placement.

use baton_core::limits::WORKER_QUEUE_MAX;
use serde::Deserialize;

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Prompt tokens missing on the decode worker from which a prefill worker is used. Default 64.
    pub prefill_tokens_min: u64,
    /// Prompt tokens queued on the best prefill worker beyond which an idle decode worker prefills. Default 8192.
    pub prefill_backlog_max: u64,
    /// Requests that may wait on a worker before it counts as full. Default: the bound of the worker itself.
    pub queue_max: u64,
    /// What sharing a decode worker's steps with one more sequence is worth, in prompt tokens. Default 32.
    pub sequence_cost_tokens: u64,
    /// What taking all of a decode worker's available blocks is worth, in prompt tokens. Default 1024.
    pub pressure_cost_tokens: u64,
    /// Prompt tokens per second of a prefill worker that has not measured itself yet. Default 1000.
    pub prefill_rate_assumed: u64,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            prefill_tokens_min: 64,
            prefill_backlog_max: 8192,
            queue_max: WORKER_QUEUE_MAX as u64,
            sequence_cost_tokens: 32,
            pressure_cost_tokens: 1024,
            prefill_rate_assumed: 1000,
        }
    }
}
