//! Identifiers. Each is its own type, so that an epoch cannot be passed where an incarnation is meant.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::de::{Deserializer, Error, Visitor};
use serde::{Deserialize, Serialize};

/// Index of a token in the model's vocabulary.
pub type TokenId = u32;

/// Names one request for ever: 128 random bits, written as 32 hexadecimal digits.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub u128);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that should have been 32 hexadecimal digits.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a request id (32 hexadecimal digits)")]
pub struct BadRequestId(pub String);

impl FromStr for RequestId {
    type Err = BadRequestId;

    fn from_str(text: &str) -> Result<RequestId, BadRequestId> {
        let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        match u128::from_str_radix(text, 16) {
            Ok(id) if digits => Ok(RequestId(id)),
            _ => Err(BadRequestId(text.to_string())),
        }
    }
}

/// A worker's name, chosen by its operator (`prefill-0`) and unique in the cluster. Copies are cheap: an assignment names
/// its workers in many places.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct WorkerId(pub Arc<str>);

impl<'de> Deserialize<'de> for WorkerId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<WorkerId, D::Error> {
        deserializer.deserialize_str(Name)
    }
}

struct Name;

impl Visitor<'_> for Name {
    type Value = WorkerId;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a worker's name")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<WorkerId, E> {
        Ok(WorkerId(name.into()))
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number!(
    /// A coordinator in the Raft group. Never reused.
    NodeId
);
number!(
    /// Grows whenever the owner of something may have changed; older epochs are refused. Granted by the ledger.
    Epoch
);
number!(
    /// Which life of a worker this is. Granted by the ledger at registration; a later life fences the earlier ones.
    Incarnation
);
number!(
    /// One handoff's passage over a link; unique within the receiving worker's incarnation.
    TransferId
);

/// What a process does in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Coordinator,
    Prefill,
    Decode,
    Gateway,
}

impl Role {
    /// The word used in metrics, logs and `baton status`.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Coordinator => "coordinator",
            Role::Prefill => "prefill",
            Role::Decode => "decode",
            Role::Gateway => "gateway",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_id_round_trips_and_refuses_other_text() {
        let id = RequestId(0x0123_4567_89ab_cdef);
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in ["", "12", "zz", &"g".repeat(32), &"0".repeat(33), "+123456789abcdef0123456789abcdef"] {
            assert_eq!(bad.parse::<RequestId>(), Err(BadRequestId(bad.to_string())));
        }
    }
}
