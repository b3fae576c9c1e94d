//! How a transfer ends when it does not complete.

use baton_core::{Aborted, Refused};

use crate::counters::Untrusted;

/// The end of a transfer that did not complete; none of its blocks counts as filled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// The two caches cannot exchange blocks.
    #[error("cannot pair: here {ours}, there {theirs}; pair workers of one model, block layout and wire version")]
    Incompatible { ours: String, theirs: String },
    /// The receiver knows no such transfer (any more), or not under this epoch.
    #[error("the receiver refused the transfer: {0}")]
    Refused(Refused),
    /// The link died or fell silent.
    #[error("link with {peer} lost: {cause}; the prefill must be assigned again")]
    Lost { peer: String, cause: String },
    /// One of the two ends does not trust the other's certificate.
    #[error("no TLS with {peer}: {cause}; give every worker a certificate of the same authority, for its host")]
    Untrusted { peer: String, reason: Untrusted, cause: String },
    /// One of the two ends gave up.
    #[error("the transfer was aborted: {0}")]
    Aborted(Aborted),
    #[error("the transfer's deadline passed")]
    Deadline,
    /// Bytes that are not what was sent.
    #[error("layer {layer} of block {position} arrived damaged")]
    Corrupt { layer: u32, position: u32 },
    /// The sender committed before everything had arrived.
    #[error("{arrived} of {expected} extents had arrived at the commit")]
    Incomplete { arrived: u64, expected: u64 },
    /// The sender committed something else than what arrived.
    #[error("the commit names other contents than those that arrived")]
    Digest,
}

impl TransferError {
    /// The word for the answer upwards.
    pub fn reason(&self) -> Aborted {
        match self {
            TransferError::Aborted(reason) => *reason,
            TransferError::Deadline => Aborted::Deadline,
            _ => Aborted::TransferFailed,
        }
    }
}
