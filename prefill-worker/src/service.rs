//! The Prefill call: checks at the door, then the handoff. Every failure is a typed answer. When the caller goes away,
//! the call's future is dropped, and with it everything it holds: the engine cancels, the transfer aborts.

use std::sync::Arc;

use baton_core::Aborted;
use baton_kvtransfer::TransferError;
use baton_proto::BadMessage;
use baton_proto::convert::{abort, refusal, required};
use baton_proto::v1::prefill_reply::Outcome;
use baton_proto::v1::prefill_server::Prefill;
use baton_proto::v1::{Abort, PrefillReply, PrefillRequest, Prefilled, Refusal};
use baton_worker::{Assigned, Shell, grant, metrics};
use tokio::time::timeout_at;

use crate::handoff;

pub(crate) struct Prefills {
    pub(crate) shell: Arc<Shell>,
}

/// Why a Prefill call brought no tokens.
pub(crate) enum Failure {
    Refused(Refusal),
    Aborted(Abort),
}

impl From<BadMessage> for Failure {
    fn from(bad: BadMessage) -> Failure {
        metrics::count_refused(baton_core::Refused::Incompatible);
        Failure::Refused(refusal(baton_core::Refused::Incompatible, bad.to_string()))
    }
}

impl From<TransferError> for Failure {
    fn from(error: TransferError) -> Failure {
        Failure::Aborted(abort(error.reason(), error.to_string()))
    }
}

impl From<Aborted> for Failure {
    fn from(reason: Aborted) -> Failure {
        Failure::Aborted(abort(reason, ""))
    }
}

#[tonic::async_trait]
impl Prefill for Prefills {
    async fn prefill(
        &self,
        request: tonic::Request<PrefillRequest>,
    ) -> Result<tonic::Response<PrefillReply>, tonic::Status> {
        let outcome = match self.serve(request.into_inner()).await {
            Ok(prefilled) => Outcome::Prefilled(prefilled),
            Err(Failure::Refused(refusal)) => Outcome::Refused(refusal),
            Err(Failure::Aborted(abort)) => {
                metrics::count_aborted(baton_proto::convert::aborted(&abort));
                Outcome::Aborted(abort)
            }
        };
        Ok(tonic::Response::new(PrefillReply { outcome: Some(outcome) }))
    }
}

impl Prefills {
    async fn serve(&self, call: PrefillRequest) -> Result<Prefilled, Failure> {
        let assigned = Assigned::parse(call.assignment, call.request, call.choices)?;
        let place = required("assignment.prefill", assigned.assignment.prefill.clone())?;
        let grant = grant::from_wire(call.grant)?;
        let deadline = assigned.deadline;
        let _lease = self.shell.enter(&place, &assigned).map_err(Failure::Refused)?;
        let handoff = handoff::run(&self.shell, assigned, grant, call.skip_blocks as usize);
        tokio::select! {
            done = timeout_at(deadline, handoff) => done.unwrap_or(Err(Aborted::Deadline.into())),
            () = self.shell.evicted() => Err(Aborted::Draining.into()),
        }
    }
}
