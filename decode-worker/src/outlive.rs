//! The two tasks of a kept request: one drives it to its end and writes down what is said of it, whoever listens; one
//! passes that on to the stream that reads it now.

use std::sync::Arc;
use std::time::Duration;

use baton_core::{Aborted, Refused};
use baton_proto::convert::{abort, refusal, request_id};
use baton_proto::v1::request_output::Output;
use baton_proto::v1::{Refusal, RequestOutput, Resumed, Start};
use baton_worker::metrics;
use baton_worker::outlet::{Inlet, outlet};
use tokio::sync::mpsc;

use crate::Decode;
use crate::answers::output;
use crate::kept::{Kept, NOTE_BYTES_MAX, Reader, WINDOW_MS_MAX};
use crate::request::serve;
use crate::stream::STEPS_UNREAD_MAX;

/// Begins a request that may outlive its gateway's stream, and reads it.
pub(crate) fn begin(decode: &Arc<Decode>, start: Start) -> Result<(Arc<Kept>, Reader), Refusal> {
    let bad = |what: &str| {
        metrics::count_refused(Refused::Incompatible);
        refusal(Refused::Incompatible, what)
    };
    let (assignment, request) = (start.assignment.clone(), start.request.clone());
    let (Some(assignment), Some(request)) = (assignment, request) else {
        return Err(bad("assignment or request is missing"));
    };
    if start.note.len() > NOTE_BYTES_MAX {
        return Err(bad("the note is too long"));
    }
    let id = request_id(&request.id).map_err(|error| bad(&error.to_string()))?;
    let window = Duration::from_millis(start.resumable_ms.min(WINDOW_MS_MAX));
    let (epoch, tenant) = (assignment.epoch, request.tenant.clone());
    let frame = Resumed {
        assignment: Some(assignment),
        request: Some(request),
        note: start.note.clone(),
        choices: start.choices.clone(),
        ..Resumed::default()
    };
    let kept = Kept::new(id, epoch, tenant, window, frame);
    let reader = kept.read();
    decode.keeper.keep(kept.clone(), drive(decode.clone(), kept.clone(), start))?;
    Ok((kept, reader))
}

/// Serves the request while it is wanted, then keeps what it said while that is wanted.
async fn drive(decode: Arc<Decode>, kept: Arc<Kept>, start: Start) {
    // A drain waits for whoever comes for the rest, as it waits for what runs.
    let hold = decode.shell.hold();
    let (outlet, inlet) = outlet(STEPS_UNREAD_MAX);
    let (said, ends) = mpsc::channel(1);
    let serving = serve(decode.clone(), outlet, said, kept.unwanted_choices.subscribe(), start);
    tokio::select! {
        _ = async { tokio::join!(serving, record(&kept, inlet, ends)) } => {}
        () = kept.unwanted() => kept.give_up(),
        () = decode.shell.closed() => kept.say(Output::Aborted(abort(Aborted::Draining, "the worker is stopping"))),
    }
    kept.end();
    tokio::select! {
        () = kept.heard() => {}
        () = kept.unwanted() => {}
        () = decode.shell.evicted() => {}
    }
    drop(hold);
    tokio::select! {
        () = kept.unwanted() => {}
        () = decode.shell.closed() => {}
    }
    decode.keeper.forget(&kept);
}

/// Writes down the engine's notes, then how the request ended if the engine never had it.
async fn record(kept: &Kept, mut inlet: Inlet, mut ends: mpsc::Receiver<RequestOutput>) {
    while let Some(notes) = inlet.next().await {
        notes.into_iter().filter_map(|(_, note)| output(note)).for_each(|output| kept.say(output));
    }
    while let Some(end) = ends.recv().await {
        end.output.into_iter().for_each(|output| kept.say(output));
    }
}

/// Passes on what the request says, until its end or until another stream reads it. Returns the handle.
pub(crate) async fn pass(
    mut reader: Reader,
    first: Option<Output>,
    handle: u32,
    said: mpsc::Sender<RequestOutput>,
) -> u32 {
    let mut next: Vec<Output> = first.into_iter().collect();
    loop {
        for output in next {
            if said.send(RequestOutput { handle, output: Some(output) }).await.is_err() {
                return handle;
            }
        }
        match reader.next().await {
            Some(new) => next = new,
            None if reader.is_replaced() => {
                let aborted = Output::Aborted(abort(Aborted::Superseded, "another gateway has taken the stream over"));
                let _ = said.send(RequestOutput { handle, output: Some(aborted) }).await;
                return handle;
            }
            None => return handle,
        }
    }
}
