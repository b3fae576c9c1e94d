//! Questions for assignments, on one stream to the leading coordinator. What waits goes out together; answers come in
//! any order. When the stream is lost, or another coordinator leads, every question without an answer is asked again
//! there: (request, attempt) names it, so that the ledger answers it once.
//!
//! ```text
//! ask ─┐                                   ┌─► answer
//! ask ─┼─► open questions ─► stream ─► ... ┼─► answer
//! ask ─┘        ▲  lost, not_leader │      └─► nobody waits for it any more: forgotten
//!               └───────────────────┘
//! ```
//! Whoever asks and leaves before the answer ends the request himself (`Serving`'s drop): the ledger takes that end
//! whether it comes before or after the assignment.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use baton_core::Refused;
use baton_proto::convert;
use baton_proto::v1::{self, AssignBatch, AssignRequest, Assigned, assign_reply::Outcome};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;

use crate::coordinators::{Client, Coordinators, Refusal, deadline};
use crate::measure;

/// Questions that have not been taken up yet.
const QUEUE_MAX: usize = 8192;
/// Questions in one message.
const BATCH_MAX: usize = 1024;
/// Bytes of one message, about; a question that is larger goes alone.
const BATCH_BYTES_MAX: usize = 1 << 20;
/// Bytes of a question without its block hashes, and of one hash, about.
const QUESTION_BYTES: usize = 512;
const HASH_BYTES: usize = 18;
/// Coordinators tried in a row beyond one visit to each: redirects point back to some.
const REDIRECTS_MAX: usize = 2;

type Answer = Result<v1::Assignment, Refusal>;

/// Where questions are handed in.
#[derive(Clone)]
pub(crate) struct Assigner(mpsc::Sender<Question>);

/// The other end, to be run until every `Assigner` is gone.
pub(crate) struct Asking {
    questions: mpsc::Receiver<Question>,
    /// Taken up and not answered yet, by request and attempt.
    open: BTreeMap<(String, u32), Question>,
}

struct Question {
    request: AssignRequest,
    asked: Instant,
    /// How often it was sent. A coordinator that was left without an answer may still have it granted.
    sent: u32,
    answer: oneshot::Sender<Answer>,
}

/// Why a stream is left.
enum Left {
    /// Every `Assigner` is gone.
    Over,
    /// What has been said there last, and who leads instead, if known.
    Elsewhere(Refusal, Option<String>),
    /// It takes no stream.
    Unreached(Refusal),
}

pub(crate) fn questions() -> (Assigner, Asking) {
    let (sender, questions) = mpsc::channel(QUEUE_MAX);
    (Assigner(sender), Asking { questions, open: BTreeMap::new() })
}

impl Assigner {
    /// Asks for workers. Without a leader within one round over the coordinators the answer is a refusal that may be
    /// asked again.
    pub(crate) async fn ask(&self, request: AssignRequest) -> Answer {
        let (answer, answered) = oneshot::channel();
        let question = Question { request, asked: Instant::now(), sent: 0, answer };
        if self.0.try_send(question).is_err() {
            return Err(Refusal::unavailable("too many questions wait for a coordinator"));
        }
        answered.await.unwrap_or_else(|_| Err(Refusal::unavailable("the gateway is ending")))
    }
}

impl Asking {
    pub(crate) async fn run(mut self, coordinators: Arc<Coordinators>) {
        loop {
            if self.open.is_empty() {
                match self.questions.recv().await {
                    Some(question) => self.open(question),
                    None => return,
                }
            }
            match self.round(&coordinators).await {
                Left::Over => return,
                Left::Elsewhere(refusal, _) | Left::Unreached(refusal) => self.give_up(&refusal),
            }
        }
    }

    /// One visit to each coordinator, the presumed leader first and redirects followed. A stream that answered begins the
    /// round anew.
    async fn round(&mut self, coordinators: &Coordinators) -> Left {
        let mut queue = coordinators.order();
        let mut visits_left = queue.len() + REDIRECTS_MAX;
        let mut last = Left::Unreached(Refusal::unavailable("no coordinator is configured"));
        let mut unreached = BTreeSet::new();
        while let Some(address) = queue.pop() {
            if visits_left == 0 {
                break;
            }
            visits_left -= 1;
            let Some(client) = coordinators.client(&address) else { continue };
            let answered = self.visit(&address, client, coordinators).await;
            coordinators.forget_leader(&address);
            let (answered, refusal, leader) = match answered {
                (_, Left::Over) => return Left::Over,
                (answered, Left::Elsewhere(refusal, leader)) => (answered, refusal, leader),
                (answered, Left::Unreached(refusal)) => {
                    unreached.insert(address.clone());
                    (answered, refusal, None)
                }
            };
            tracing::debug!(coordinator = %address, %refusal, open = self.open.len(), "assignments lost");
            if answered {
                queue = coordinators.order();
                visits_left = queue.len() + REDIRECTS_MAX;
            }
            // One that is gone is still named as the leader until the others have noticed.
            if let Some(leader) = &leader
                && *leader != address
                && !unreached.contains(leader)
            {
                queue.retain(|a| a != leader);
                queue.push(leader.clone());
            }
            last = Left::Elsewhere(refusal, leader);
            if self.open.is_empty() {
                break;
            }
        }
        last
    }

    /// A stream to one coordinator until it is lost or another one leads. Returns whether it gave a real answer.
    async fn visit(&mut self, address: &str, mut client: Client, coordinators: &Coordinators) -> (bool, Left) {
        let elsewhere = |problem: &str, leader| {
            Left::Elsewhere(Refusal::unavailable(format!("coordinator {address}: {problem}")), leader)
        };
        let mut unsent: VecDeque<AssignRequest> = self.ask_again();
        // One message at a time waits for the stream; whatever comes meanwhile goes with the next.
        let (outgoing, messages) = mpsc::channel(1);
        let mut answers = match deadline(client.assignments(ReceiverStream::new(messages))).await {
            Ok(answers) => answers,
            Err(status) => {
                let refusal = Refusal::unavailable(format!("coordinator {address}: {}", status.message()));
                return (false, Left::Unreached(refusal));
            }
        };
        let mut leader = coordinators.watch_leader();
        let mut answered = false;
        let mut taken = Vec::new();
        loop {
            tokio::select! {
                count = self.questions.recv_many(&mut taken, BATCH_MAX), if unsent.len() < BATCH_MAX => {
                    if count == 0 {
                        return (answered, Left::Over);
                    }
                    unsent.extend(taken.drain(..).map(|question| self.take_up(question)));
                }
                permit = outgoing.reserve(), if !unsent.is_empty() => match permit {
                    Ok(permit) => permit.send(batch(&mut unsent, coordinators.cluster())),
                    Err(_) => return (answered, elsewhere("the stream does not take questions", None)),
                },
                message = answers.message() => match message {
                    Ok(Some(batch)) => {
                        let mut elsewhere = None;
                        for reply in batch.replies {
                            match self.answer(reply) {
                                Ok(()) => answered = true,
                                Err(left) => elsewhere = Some(left),
                            }
                        }
                        if answered {
                            coordinators.led_by(address);
                        }
                        if let Some(left) = elsewhere {
                            return (answered, left);
                        }
                    }
                    Ok(None) => return (answered, elsewhere("it ended the stream", None)),
                    Err(status) => return (answered, elsewhere(status.message(), None)),
                },
                Ok(()) = leader.changed() => {
                    let leader = leader.borrow_and_update().clone();
                    if leader.as_ref().is_some_and(|leader| leader != address) {
                        return (answered, elsewhere("another coordinator leads", leader));
                    }
                }
            }
        }
    }

    fn open(&mut self, question: Question) {
        self.open.insert((question.request.request.clone(), question.request.attempt), question);
    }

    /// Notes a question and gives back what to send.
    fn take_up(&mut self, question: Question) -> AssignRequest {
        let request = question.request.clone();
        self.open(Question { sent: 1, ..question });
        request
    }

    /// What is open, as it is asked now; what nobody waits for is forgotten.
    fn ask_again(&mut self) -> VecDeque<AssignRequest> {
        self.open.retain(|_, question| !question.answer.is_closed());
        let again = |question: &mut Question| {
            question.sent += 1;
            let waited_ms = question.asked.elapsed().as_millis() as u64;
            let deadline_ms = question.request.deadline_ms.saturating_sub(waited_ms);
            AssignRequest { deadline_ms, ..question.request.clone() }
        };
        self.open.values_mut().map(again).collect()
    }

    /// Hands an answer on. Err: it is none, and the question stays open for another coordinator.
    fn answer(&mut self, reply: Assigned) -> Result<(), Left> {
        let key = (reply.request, reply.attempt);
        let Some(question) = self.open.remove(&key) else { return Ok(()) };
        let outcome = reply.reply.and_then(|reply| reply.outcome);
        let refused =
            outcome.unwrap_or_else(|| Outcome::Refused(convert::refusal(Refused::Unavailable, "an empty answer")));
        match refused {
            Outcome::Assignment(assignment) => {
                // Whoever asked and left has ended the request.
                let _ = question.answer.send(Ok(assignment));
                Ok(())
            }
            Outcome::Refused(refusal) => {
                let leader = Some(refusal.leader_address.clone()).filter(|address| !address.is_empty());
                let refusal = Refusal::from(refusal);
                if matches!(refusal.reason, Refused::NotLeader | Refused::Unavailable | Refused::Foreign) {
                    self.open.insert(key, question);
                    return Err(Left::Elsewhere(refusal, leader));
                }
                // Whoever asked and left needs no refusal.
                let _ = question.answer.send(Err(Refusal { unsettled: question.sent > 1, ..refusal }));
                Ok(())
            }
        }
    }

    /// Answers all that is open: the callers decide whether to ask again.
    fn give_up(&mut self, refusal: &Refusal) {
        if !self.open.is_empty() {
            measure::assignments_given_up(self.open.len() as u64);
        }
        for (_, question) in std::mem::take(&mut self.open) {
            let _ = question.answer.send(Err(refusal.clone()));
        }
    }
}

/// The first questions that fit in one message.
fn batch(unsent: &mut VecDeque<AssignRequest>, cluster: String) -> AssignBatch {
    let mut requests = Vec::new();
    let mut bytes = 0;
    while let Some(next) = unsent.front() {
        bytes += QUESTION_BYTES + HASH_BYTES * next.block_hashes.len();
        if requests.len() == BATCH_MAX || (bytes > BATCH_BYTES_MAX && !requests.is_empty()) {
            break;
        }
        requests.extend(unsent.pop_front());
    }
    AssignBatch { requests, cluster }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_holds_what_fits_and_at_least_one_question() {
        let question = |hashes: usize| AssignRequest {
            block_hashes: vec![bytes::Bytes::from_static(&[0; 16]); hashes],
            ..AssignRequest::default()
        };
        let sizes = |hashes: &[usize]| {
            let mut unsent: VecDeque<_> = hashes.iter().map(|count| question(*count)).collect();
            let mut sizes = Vec::new();
            while !unsent.is_empty() {
                sizes.push(batch(&mut unsent, String::new()).requests.len());
            }
            sizes
        };
        assert_eq!(sizes(&[1; 1500]), [1024, 476]);
        assert_eq!(sizes(&[100_000, 1, 100_000, 30_000, 20_000, 20_000]), [1, 1, 1, 2, 1]);
    }
}
