//! Settings of a coordinator.

use std::collections::BTreeMap;
use std::path::PathBuf;

use baton_core::NodeId;
use serde::Deserialize;

use crate::placement::Policy;
use crate::state::{VERSION, VERSION_MIN};

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// This node's number in the group, from 1. Never given to another node, nor to this one after it lost its data.
    #[serde(default = "first")]
    pub node: NodeId,
    /// Address to listen on, `host:port`. Default 127.0.0.1:7400; port 0 takes a free one (a group of one only).
    #[serde(default = "listen")]
    pub listen: String,
    /// Directory of the ledger's log. One coordinator each.
    pub data: PathBuf,
    /// All coordinators as (node, address), this one included. Empty: a group of one.
    #[serde(default)]
    pub peers: Vec<(NodeId, String)>,
    /// Address at which others reach this node. Empty: as in `peers`, or the one listened on.
    #[serde(default)]
    pub advertise: String,
    /// Name of the cluster. None: the first leader draws one.
    #[serde(default)]
    pub cluster: Option<String>,
    #[serde(default)]
    pub policy: Policy,
    /// Version of the ledger's entries that this node writes and at most takes: that of this binary, or an earlier one while
    /// the group is to have a way back to that one's.
    #[serde(default = "entries")]
    pub entries: u16,
}

fn entries() -> u16 {
    VERSION
}

fn first() -> NodeId {
    NodeId(1)
}

fn listen() -> String {
    "127.0.0.1:7400".into()
}

/// A setting that cannot work.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    #[error("node is 0: nodes are numbered from 1")]
    NodeZero,
    #[error("{0} coordinators in peers: one, three or five can form a group")]
    Count(usize),
    #[error("peers does not name this node, {0}")]
    Absent(NodeId),
    #[error("peers names node {0} twice")]
    Twice(NodeId),
    #[error("cluster {0:?} is not 1 to 64 letters, digits, '-', '_' or '.'")]
    Cluster(String),
    #[error("entries of version {0}: this binary writes versions {VERSION_MIN} to {VERSION}")]
    Entries(u16),
}

impl Config {
    /// Addresses of the group as configured; empty for a group of one that names none.
    pub(crate) fn group(&self) -> Result<BTreeMap<u64, String>, ConfigError> {
        if self.node == NodeId(0) {
            return Err(ConfigError::NodeZero);
        }
        if !matches!(self.peers.len(), 0 | 1 | 3 | 5) {
            return Err(ConfigError::Count(self.peers.len()));
        }
        let mut group = BTreeMap::new();
        for (node, address) in &self.peers {
            if group.insert(node.0, address.clone()).is_some() {
                return Err(ConfigError::Twice(*node));
            }
        }
        if !group.is_empty() && !group.contains_key(&self.node.0) {
            return Err(ConfigError::Absent(self.node));
        }
        Ok(group)
    }

    /// What does not concern the group.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        if !(VERSION_MIN..=VERSION).contains(&self.entries) {
            return Err(ConfigError::Entries(self.entries));
        }
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        match &self.cluster {
            Some(name) if !(1..=64).contains(&name.len()) || !name.bytes().all(plain) => {
                Err(ConfigError::Cluster(name.clone()))
            }
            _ => Ok(()),
        }
    }
}
