//! openraft's type parameters. An entry's payload is opaque bytes here: only the ledger knows what they say.

use std::fmt;

use bytes::Bytes;
use openraft_rt::deterministic_rng::DeterministicRng;
use openraft_rt_tokio::TokioRuntime;
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};

use super::machine::Machine;
use crate::state::Outcome;

/// Tokio with election jitter from the `Rng` that the process was handed: production and simulation run one type.
/// Futures that spawn or draw inside openraft run in `scoped`.
pub(super) type Runtime = DeterministicRng<TokioRuntime>;

openraft::declare_raft_types!(
    pub(crate) Types: D = Proposal, R = Reply, Node = openraft::BasicNode, AsyncRuntime = Runtime,
);

pub(super) type Raft = openraft::Raft<Types, Machine>;

/// Gives the future a seed for what it spawns and draws.
pub(super) async fn scoped<F: Future>(seed: u64, future: F) -> F::Output {
    Runtime::scope(seed, future).await
}

/// One encoded `state::Batch`.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Proposal(pub(super) Bytes);

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes of commands", self.0.len())
    }
}

impl fmt::Debug for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Proposal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Proposal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Proposal, D::Error> {
        deserializer.deserialize_bytes(ProposalVisitor)
    }
}

struct ProposalVisitor;

impl<'de> Visitor<'de> for ProposalVisitor {
    type Value = Proposal;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("bytes")
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Proposal, E> {
        Ok(Proposal(Bytes::copy_from_slice(bytes)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Proposal, A::Error> {
        let mut bytes = Vec::new();
        while let Some(byte) = seq.next_element()? {
            bytes.push(byte);
        }
        Ok(Proposal(bytes.into()))
    }
}

/// What became of an entry's commands, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Reply(pub(super) Vec<Outcome>);

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} outcomes", self.0.len())
    }
}
