//! One request, from Start to its end. Its task holds every guard, so that aborting the task frees everything.

use std::sync::Arc;

use baton_core::{Aborted, Refused};
use baton_engine::{Goal, Work};
use baton_proto::BadMessage;
use baton_proto::convert::{abort, aborted, refusal};
use baton_proto::v1::request_output::Output;
use baton_proto::v1::{Abort, Refusal, RequestOutput, Start};
use baton_worker::outlet::Outlet;
use baton_worker::{Assigned, Submission, metrics};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout_at;

use crate::Decode;
use crate::handoff::{Brought, bring};

/// A request that ended before the engine had it; afterwards the engine's notes say how it ends.
pub(crate) enum End {
    Refused(Refusal),
    Aborted(Box<Abort>),
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> End {
        End::Refused(refusal)
    }
}

impl From<Abort> for End {
    fn from(abort: Abort) -> End {
        End::Aborted(Box::new(abort))
    }
}

impl From<BadMessage> for End {
    fn from(bad: BadMessage) -> End {
        metrics::count_refused(Refused::Incompatible);
        End::Refused(refusal(Refused::Incompatible, bad.to_string()))
    }
}

/// Serves one request and returns its handle. What its engine says goes to `outlet`, what ends it before that to `said`.
/// `unwanted` grows by the choices that nobody waits for any more.
pub(crate) async fn serve(
    decode: Arc<Decode>,
    outlet: Outlet,
    said: mpsc::Sender<RequestOutput>,
    unwanted: watch::Receiver<Vec<u32>>,
    start: Start,
) -> u32 {
    let handle = start.handle;
    let Err(end) = generate(&decode, outlet, unwanted, start).await else { return handle };
    let output = match end {
        End::Refused(refusal) => Output::Refused(refusal),
        End::Aborted(abort) => {
            metrics::count_aborted(aborted(&abort));
            Output::Aborted(*abort)
        }
    };
    // Without a reader the stream is over, and so is the request.
    let _ = said.send(RequestOutput { handle, output: Some(output) }).await;
    handle
}

async fn generate(
    decode: &Decode,
    outlet: Outlet,
    mut unwanted: watch::Receiver<Vec<u32>>,
    start: Start,
) -> Result<(), End> {
    let tag = start.handle;
    let assigned = Assigned::parse(start.assignment, start.request, start.choices)?;
    let deadline = assigned.deadline;
    let _lease = decode.shell.enter(&assigned.assignment.decode, &assigned)?;
    let brought = tokio::select! {
        brought = timeout_at(deadline, bring(decode, &assigned)) => brought,
        () = decode.shell.evicted() => return Err(abort(Aborted::Draining, "during the handoff").into()),
    };
    let Brought { filled, phases } = brought.map_err(|_| abort(Aborted::Deadline, "during the handoff"))??;
    let (moved, id) = (assigned.is_moved(), assigned.request.id);
    let Assigned { request, mut choices, started, .. } = assigned;
    metrics::record_handoff(started.elapsed());
    // Together with the gateway's phases these add up to TTFT. Numbers only, never text.
    tracing::debug!(
        request = %request.id,
        prompt_tokens = request.prompt.len(),
        cached_tokens = phases.cached_tokens,
        queue_us = phases.prefill_queue.as_micros() as u64,
        prefill_us = phases.prefill_compute.as_micros() as u64,
        transfer_us = phases.transfer.as_micros() as u64,
        handoff_us = started.elapsed().as_micros() as u64,
        local_prefill = phases.local_prefill,
        "brought"
    );
    let gone = unwanted.borrow_and_update().clone();
    choices.retain(|choice| !gone.contains(&choice.index));
    if choices.is_empty() {
        return Ok(());
    }
    let work = Work { request, choices, goal: Goal::Generate, filled, moved };
    let submission = Submission { work, outlet, tag, phases, started };
    let mut admission = decode.shell.engine.submit(submission).map_err(|reason| {
        metrics::count_refused(reason);
        refusal(reason, "the engine's queue is full")
    })?;
    let reason = loop {
        tokio::select! {
            ended = timeout_at(deadline, admission.ended()) => match ended {
                Ok(()) => return Ok(()),
                Err(_) => break Aborted::Deadline,
            },
            () = decode.shell.evicted() => break Aborted::Draining,
            Ok(()) = unwanted.changed() => {}
        }
        admission.cancel_choices(unwanted.borrow_and_update().clone());
    };
    metrics::count_aborted(reason);
    if reason == Aborted::Draining {
        decode.shell.linger(id);
    }
    admission.abort(reason);
    admission.ended().await;
    Ok(())
}
