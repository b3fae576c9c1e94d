//! A stream whose gateway is gone, taken over from the worker that goes on with it: the same events, from the one after
//! the last that the client has.

use std::sync::Arc;
use std::time::Duration;

use baton_core::{Aborted, Assignment, Refused, Request, RequestId, limits};
use baton_proto::convert::request_id;
use baton_proto::v1::request_output::Output;
use baton_proto::v1::{FinishedRequest, LocateRequest, Resumed};
use tokio::time::{Instant, timeout};

use crate::access::Caller;
use crate::error::ApiError;
use crate::finish::Finishes;
use crate::generate::Gateway;
use crate::link::Inbox;
use crate::note::Note;

/// How long it is tried to find out where a stream is: an election is shorter.
const LOCATE_WAIT: Duration = Duration::from_millis(2_000);
const LOCATE_PAUSE: Duration = Duration::from_millis(50);
const ANSWER_WAIT: Duration = Duration::from_millis(limits::RPC_TIMEOUT_MS);

/// How many events of each choice, and of the end, a client has: the `id` of an event.
///
/// ```text
/// id: 4.2.0      four events of choice 0 and two of choice 1 up to this one, none of the end
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EventId {
    pub choices: Vec<u64>,
    /// The usage and `[DONE]`.
    pub end: u64,
}

impl EventId {
    pub(crate) fn start(choices: usize) -> EventId {
        EventId { choices: vec![0; choices], end: 0 }
    }

    /// None: not the id of an event of a stream with so many choices.
    pub(crate) fn parse(text: &str, choices: usize) -> Option<EventId> {
        let counts: Option<Vec<u64>> = text.split('.').map(|count| count.parse().ok()).collect();
        let mut counts = counts.filter(|counts| counts.len() == choices + 1)?;
        let end = counts.pop()?;
        Some(EventId { choices: counts, end })
    }
}

impl std::fmt::Display for EventId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for count in &self.choices {
            write!(f, "{count}.")?;
        }
        write!(f, "{}", self.end)
    }
}

/// A request taken over: what it is, how far it is, and what comes next of it.
pub(crate) struct TakenOver {
    pub request: Arc<Request>,
    pub assignment: Assignment,
    pub note: Note,
    pub said: Resumed,
    pub inbox: Inbox,
}

/// A request that the ledger gives to this gateway: unless the gateway goes on to serve it, it tells its end.
pub(crate) struct Adopted {
    finishes: Finishes,
    end: Option<FinishedRequest>,
}

impl Adopted {
    /// From now on its end is told by whoever serves it.
    pub(crate) fn served(mut self) {
        self.end = None;
    }
}

impl Drop for Adopted {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            self.finishes.send(end);
        }
    }
}

/// Makes this gateway the one that tells the end of what it has taken over. Until then whoever served it is held
/// responsible, so that a stream that cannot be taken over ends when nobody has come for it in time.
///
/// The question is asked to its end though the client goes away meanwhile: an end that is told before the ledger has taken
/// the question is one of another gateway's request, and so none, and the question is taken afterwards.
pub(crate) async fn adopt(gateway: &Arc<Gateway>, caller: &Caller, taken: &TakenOver) -> Result<Adopted, ApiError> {
    let end = FinishedRequest {
        request: taken.request.id.to_string(),
        epoch: taken.assignment.epoch.0,
        outcome: Aborted::Cancelled.as_str().to_string(),
        prompt_tokens: taken.request.prompt.len() as u64,
        generated_tokens: taken.said.tokens.iter().map(|tokens| tokens.tokens.len() as u64).sum(),
        ..FinishedRequest::default()
    };
    // Before it is asked: the ledger may take the question and its answer be lost.
    let mut adopted = Adopted { finishes: gateway.servers.finishes.clone(), end: Some(end) };
    let (gateway, caller) = (gateway.clone(), caller.clone());
    let (id, epoch) = (taken.request.id, taken.assignment.epoch);
    let asking = tokio::spawn(async move {
        let now = locate(&gateway, &caller, id, &gateway.servers.gateway).await?;
        // What was found before may come from a coordinator that had been deposed without knowing.
        if now.epoch != epoch {
            adopted.end.iter_mut().for_each(|end| end.epoch = now.epoch.0);
            return Err(ApiError::stream_lost());
        }
        Ok(adopted)
    });
    asking.await.unwrap_or_else(|error| Err(ApiError::internal(error.to_string())))
}

/// Takes over the stream called `name`, if it is this caller's.
pub(crate) async fn take_over(gateway: &Gateway, caller: &Caller, name: &str) -> Result<TakenOver, ApiError> {
    let id: RequestId = request_id(name).map_err(|_| ApiError::stream_unknown())?;
    let assignment = locate(gateway, caller, id, "").await?;
    let place = &assignment.decode;
    let inbox = gateway.servers.links.resume(place, id, &caller.tenant);
    let mut inbox = inbox.map_err(|_| ApiError::stream_lost())?;
    let said = match timeout(ANSWER_WAIT, inbox.next()).await {
        Ok(Ok(Output::Resumed(said))) => said,
        Ok(Ok(Output::Refused(refusal))) => {
            inbox.ended();
            return Err(match baton_proto::convert::refused(&refusal) {
                Refused::Unknown => ApiError::stream_unknown(),
                reason => ApiError::refused(reason, &refusal.detail, refusal.retry_after_ms),
            });
        }
        Ok(_) => return Err(ApiError::stream_lost()),
        Err(_) => return Err(ApiError::unavailable("no_answer", "The stream's worker does not answer.")),
    };
    match read(&said, assignment) {
        Some((request, assignment, note)) => Ok(TakenOver { request, assignment, note, said, inbox }),
        None => Err(ApiError::internal("The stream was begun by a gateway of another version.")),
    }
}

/// Where a request is served; `serves`: by which gateway from now on, unless empty.
async fn locate(gateway: &Gateway, caller: &Caller, id: RequestId, serves: &str) -> Result<Assignment, ApiError> {
    let until = Instant::now() + LOCATE_WAIT;
    loop {
        let coordinators = &gateway.servers.coordinators;
        let question = LocateRequest {
            request: id.to_string(),
            gateway: serves.to_string(),
            tenant: caller.tenant.clone(),
            cluster: coordinators.cluster(),
            key: caller.key.clone(),
        };
        let refusal = match coordinators.locate(question).await {
            Ok(assignment) => {
                return Assignment::try_from(assignment).map_err(|bad| ApiError::internal(bad.to_string()));
            }
            Err(refusal) => refusal,
        };
        match refusal.reason {
            Refused::Unknown => return Err(ApiError::stream_unknown()),
            Refused::Fenced if caller.key.is_empty() => {
                return Err(ApiError::unauthorized("This cluster asks for an API key by now."));
            }
            Refused::Fenced => return Err(ApiError::unauthorized("The API key has been revoked.")),
            Refused::NotLeader | Refused::Unavailable if Instant::now() < until => {
                tokio::time::sleep(LOCATE_PAUSE).await;
            }
            reason => return Err(ApiError::refused(reason, &refusal.detail, refusal.retry_after_ms)),
        }
    }
}

/// The parts of what the worker kept, if they fit together.
fn read(said: &Resumed, located: Assignment) -> Option<(Arc<Request>, Assignment, Note)> {
    let request = Request::try_from(said.request.clone()?).ok()?;
    let assignment = match said.assignment.clone() {
        Some(assignment) => Assignment::try_from(assignment).ok()?,
        None => located,
    };
    let note = Note::from_bytes(&said.note)?;
    let choices = request.choices as usize;
    let known = |choice: u32| (choice as usize) < choices;
    let fits = (note.before.is_empty() || note.before.len() == choices)
        && said.tokens.iter().all(|tokens| known(tokens.choice))
        && said.finished.iter().all(|finished| known(finished.choice));
    fits.then(|| (Arc::new(request), assignment, note))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_id_reads_back_for_its_number_of_choices_only() {
        let id = EventId { choices: vec![4, 2], end: 1 };
        assert_eq!(id.to_string(), "4.2.1");
        assert_eq!(EventId::parse("4.2.1", 2), Some(id));
        for (text, choices) in [("4.2.1", 1), ("4.2.1", 3), ("", 1), ("4", 1), ("4.-1", 1), ("4.x", 1), ("1..2", 2)] {
            assert_eq!(EventId::parse(text, choices), None, "{text:?} of {choices}");
        }
    }
}
