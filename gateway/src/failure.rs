//! Why an attempt failed, and what the next one does without.

use baton_core::{Aborted, Refused};
use baton_proto::v1::{self, WorkerLife, WorkerPair};
use baton_proto::{BadMessage, convert};

use crate::error::ApiError;

/// Why an attempt failed.
pub(crate) struct Failure {
    pub error: ApiError,
    pub reason: &'static str,
    pub blame: Blame,
    /// Another attempt would end the same way.
    pub last: bool,
}

/// Whom the next attempt does without.
pub(crate) enum Blame {
    /// The decode worker, for the next attempt only: it had no room, or gave up without fault.
    Busy,
    /// The decode worker: the stream to it was lost.
    Decode,
    /// The decode worker, whose life ended.
    DecodeDied,
    /// A prefill worker, as the decode worker says; it may have died under the request.
    Life { life: WorkerLife, died: bool },
    /// The way between two workers.
    Pair(WorkerPair),
}

/// The stream to the decode worker ended, or could not be had.
pub(crate) fn lost(blame: Blame) -> Failure {
    let reason = Aborted::DecodeLost;
    let error = ApiError::aborted(reason, "the stream to its decode worker was lost");
    Failure { error, reason: reason.as_str(), blame, last: false }
}

/// A worker gave up.
pub(crate) fn aborted(abort: v1::Abort) -> Failure {
    let reason = convert::aborted(&abort);
    let error = ApiError::aborted(reason, &abort.detail);
    let blame = match (abort.failed_pair, abort.failed) {
        (Some(pair), _) => Blame::Pair(pair),
        (None, Some(life)) => Blame::Life { life, died: reason == Aborted::PrefillLost },
        (None, None) => Blame::Busy,
    };
    Failure { error, reason: reason.as_str(), blame, last: matches!(reason, Aborted::Deadline | Aborted::Superseded) }
}

/// A worker did not begin.
pub(crate) fn refused(refusal: v1::Refusal) -> Failure {
    let reason = convert::refused(&refusal);
    let error = ApiError::refused(reason, &refusal.detail, refusal.retry_after_ms);
    let last = matches!(reason, Refused::TooLarge | Refused::UnknownModel | Refused::Incompatible);
    Failure { error, reason: reason.as_str(), blame: Blame::Busy, last }
}

/// A worker says what cannot be.
pub(crate) fn broken(bad: BadMessage) -> Failure {
    let error = ApiError::aborted(Aborted::Internal, &bad.to_string());
    Failure { error, reason: Aborted::Internal.as_str(), blame: Blame::Decode, last: false }
}
