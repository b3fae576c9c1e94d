//! What an operator can set on a gateway.

use std::collections::BTreeMap;

use baton_core::limits;
use serde::Deserialize;

/// A gateway's configuration. Unknown keys are refused.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// This gateway's name, unique in the cluster (`gateway-0`).
    pub id: String,
    /// HTTP address, `host:port`; port 0 takes a free one.
    pub listen: String,
    /// Addresses of coordinators, `host:port`, at least one; the leader among them is found by redirect.
    pub coordinators: Vec<String>,
    /// Further names under which models answer: name → model. Default: none.
    #[serde(default)]
    pub aliases: BTreeMap<String, String>,
    /// Requests worked on at a time; more are refused with 429. Default: 4096.
    #[serde(default = "requests_max")]
    pub requests_max: usize,
    /// Milliseconds a request may take before it ends with an error. Default: 600000.
    #[serde(default = "deadline_ms")]
    pub deadline_ms: u64,
    /// Serve other machines although the cluster has no keys: whoever reaches the address may ask. Default: false.
    #[serde(default)]
    pub open: bool,
}

fn requests_max() -> usize {
    limits::GATEWAY_REQUESTS_MAX
}

fn deadline_ms() -> u64 {
    limits::REQUEST_DEADLINE_MS
}

impl Config {
    /// A configuration with the defaults.
    pub fn new(id: &str, listen: &str, coordinators: Vec<String>) -> Config {
        Config {
            id: id.into(),
            listen: listen.into(),
            coordinators,
            aliases: BTreeMap::new(),
            requests_max: requests_max(),
            deadline_ms: deadline_ms(),
            open: false,
        }
    }
}
