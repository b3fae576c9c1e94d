//! What stands around every message between coordinators: the cluster it comes from and the node it is for. A message
//! of another cluster, or for a node that had this address before, is refused and counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use baton_proto::v1::Blob;
use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use tonic::Status;

use super::wire::{WireError, decode, encode};

/// One node's name on the wire. Clones are the same.
#[derive(Clone)]
pub(crate) struct Envelope {
    node: u64,
    /// Unset until the cluster is founded.
    cluster: Arc<OnceLock<String>>,
    foreign: Arc<AtomicU64>,
}

impl Envelope {
    /// `cluster` may be empty: not known yet.
    pub(crate) fn new(node: u64, cluster: &str) -> Envelope {
        let envelope = Envelope { node, cluster: Arc::default(), foreign: Arc::default() };
        envelope.name(cluster);
        envelope
    }

    /// Learns the cluster's name. It never changes: the first one holds.
    pub(crate) fn name(&self, cluster: &str) {
        if !cluster.is_empty() {
            self.cluster.get_or_init(|| cluster.to_string());
        }
    }

    pub(crate) fn cluster(&self) -> &str {
        self.cluster.get().map_or("", String::as_str)
    }

    /// A message to node `to`; 0 where its number is not known.
    pub(crate) fn seal<T: Serialize>(&self, to: u64, message: &T) -> Blob {
        self.seal_bytes(to, encode(message))
    }

    /// Part of a message that is encoded already.
    pub(super) fn seal_bytes(&self, to: u64, data: Bytes) -> Blob {
        Blob { data, cluster: self.cluster().to_string(), to }
    }

    /// Reads a message that is for this node of this cluster. A sender that does not know its cluster's name yet is
    /// heard: it is one of those that found it.
    pub(crate) fn open<T: DeserializeOwned>(&self, blob: Blob) -> Result<T, Status> {
        decode(&self.open_bytes(blob)?).map_err(|error| self.unreadable(&error))
    }

    /// The same, of a part.
    pub(super) fn open_bytes(&self, blob: Blob) -> Result<Bytes, Status> {
        let own = self.cluster();
        if !own.is_empty() && !blob.cluster.is_empty() && blob.cluster != own {
            let what = format!("this is cluster {own:?}, not {:?}", blob.cluster);
            return Err(self.refuse("cluster", what));
        }
        if blob.to != 0 && blob.to != self.node {
            return Err(self.refuse("node", format!("this is node {}, not node {}", self.node, blob.to)));
        }
        Ok(blob.data)
    }

    /// What this binary cannot read, because another version wrote it or nobody of sense did.
    fn unreadable(&self, error: &WireError) -> Status {
        let kind = match error {
            WireError::Version(_) => "version",
            WireError::Empty | WireError::Damaged(_) => "damaged",
        };
        let status = self.refuse(kind, error.to_string());
        Status::invalid_argument(status.message())
    }

    fn refuse(&self, kind: &'static str, what: String) -> Status {
        metrics::counter!("baton_coordinator_foreign_messages_total", "kind" => kind).increment(1);
        // Whoever sends one sends many: the first is told, then ever fewer.
        if (self.foreign.fetch_add(1, Ordering::Relaxed) + 1).is_power_of_two() {
            tracing::warn!(
                what,
                "a message between coordinators that is not for this one is refused: check addresses and peers, and \
                 whether this directory was emptied"
            );
        }
        Status::failed_precondition(what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_messages_for_this_node_of_this_cluster_are_read() {
        let named = |node, cluster| Envelope::new(node, cluster);
        let own = named(2, "ours");
        let cases = [
            (named(1, "ours").seal(2, &7u64), true),
            (named(1, "").seal(2, &7u64), true),
            (named(1, "ours").seal(0, &7u64), true),
            (named(1, "theirs").seal(2, &7u64), false),
            (named(1, "ours").seal(3, &7u64), false),
        ];
        for (blob, read) in cases {
            assert_eq!(own.open::<u64>(blob.clone()).ok(), read.then_some(7), "{blob:?}");
        }
        assert_eq!(own.foreign.load(Ordering::Relaxed), 2);
        let unnamed = named(2, "");
        assert!(unnamed.open::<u64>(named(1, "theirs").seal(2, &7u64)).is_ok(), "nothing to tell it by yet");
        unnamed.name("ours");
        unnamed.name("theirs");
        assert_eq!(unnamed.cluster(), "ours");
        assert!(unnamed.open::<u64>(Blob { data: vec![9, 9].into(), ..Blob::default() }).is_err());
    }
}
