//! Many assignments on one stream. What has arrived is looked at together; answers leave when they are ready, gathered.

use std::sync::Arc;

use baton_core::Refused;
use baton_proto::convert::refusal;
use baton_proto::v1;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, Stream, StreamExt};
use tokio::time::Instant;
use tonic::Status;

use super::Shared;
use super::ask::Ask;
use super::assign::{Answer, Fate, count};

/// Requests of one stream that may be without an answer; the next message is read when there are fewer.
const UNANSWERED_MAX: usize = 8192;
/// Requests committed together, though they came in several messages.
const GROUP_MAX: usize = 512;
/// Requests in one message.
const MESSAGE_MAX: usize = 4096;
/// Answers in one message.
const GATHERED_MAX: usize = 1024;

/// Which request an answer is for.
struct Key {
    request: String,
    attempt: u32,
    since: Instant,
}

impl Key {
    fn answered(self, answer: Answer) -> v1::Assigned {
        use v1::assign_reply::Outcome;
        count(&answer, self.since);
        let outcome = match answer {
            Ok(assignment) => Outcome::Assignment(assignment),
            Err(refused) => Outcome::Refused(refused),
        };
        let reply = Some(v1::AssignReply { outcome: Some(outcome) });
        v1::Assigned { request: self.request, attempt: self.attempt, reply }
    }
}

/// Answers to what comes in, until it ends or breaks; what waits then leaves the queue.
pub(super) fn assignments<S>(
    shared: Arc<Shared>,
    incoming: S,
) -> impl Stream<Item = Result<v1::AssignedBatch, Status>> + Send
where
    S: Stream<Item = Result<v1::AssignBatch, Status>> + Send + Unpin + 'static,
{
    let conversation = Conversation {
        shared,
        incoming: Some(incoming),
        groups: FuturesUnordered::new(),
        followed: FuturesUnordered::new(),
        unanswered: 0,
        ready: Vec::new(),
        failed: None,
    };
    futures::stream::unfold(Some(conversation), |conversation| async move {
        let mut conversation = conversation?;
        match conversation.next().await? {
            Ok(replies) => Some((Ok(v1::AssignedBatch { replies }), Some(conversation))),
            Err(status) => Some((Err(status), None)),
        }
    })
}

struct Conversation<S> {
    shared: Arc<Shared>,
    /// None once the caller has said all.
    incoming: Option<S>,
    groups: FuturesUnordered<BoxFuture<'static, Vec<(Key, Fate)>>>,
    /// Those that took more than one look.
    followed: FuturesUnordered<BoxFuture<'static, (Key, Answer)>>,
    unanswered: usize,
    ready: Vec<v1::Assigned>,
    /// Why it breaks, once what was ready has been said.
    failed: Option<Status>,
}

impl<S> Conversation<S>
where
    S: Stream<Item = Result<v1::AssignBatch, Status>> + Send + Unpin + 'static,
{
    /// Answers that are ready, at least one. None: all has been said.
    async fn next(&mut self) -> Option<Result<Vec<v1::Assigned>, Status>> {
        if let Some(status) = self.failed.take() {
            return Some(Err(status));
        }
        while self.ready.is_empty() {
            if self.incoming.is_none() && self.unanswered == 0 {
                return None;
            }
            if let Err(status) = self.step().await {
                return Some(Err(status));
            }
        }
        while self.ready.len() < GATHERED_MAX {
            match self.step().now_or_never() {
                Some(Ok(())) if self.incoming.is_some() || self.unanswered > 0 => {}
                Some(Err(status)) => {
                    self.failed = Some(status);
                    break;
                }
                _ => break,
            }
        }
        self.unanswered -= self.ready.len();
        Some(Ok(std::mem::take(&mut self.ready)))
    }

    /// Takes in whatever happens next.
    async fn step(&mut self) -> Result<(), Status> {
        let reads = self.unanswered < UNANSWERED_MAX;
        let pending = std::future::pending();
        tokio::select! {
            biased;
            Some(fates) = self.groups.next(), if !self.groups.is_empty() => self.take(fates),
            Some((key, answer)) = self.followed.next(), if !self.followed.is_empty() => {
                self.ready.push(key.answered(answer));
            }
            message = async {
                match &mut self.incoming {
                    Some(incoming) if reads => incoming.next().await,
                    _ => pending.await,
                }
            } => self.hear(message)?,
        }
        Ok(())
    }

    fn take(&mut self, fates: Vec<(Key, Fate)>) {
        for (key, fate) in fates {
            match fate {
                Fate::Answered(answer) => self.ready.push(key.answered(answer)),
                fate => {
                    let shared = self.shared.clone();
                    self.followed.push(async move { (key, shared.follow(fate).await) }.boxed());
                }
            }
        }
    }

    /// The questions of a message. Those of another cluster's gateway are refused.
    fn of_cluster(&mut self, batch: v1::AssignBatch) -> Vec<v1::AssignRequest> {
        let Err(foreign) = self.shared.of_cluster("assign", &batch.cluster) else { return batch.requests };
        let since = Instant::now();
        let refused = batch.requests.into_iter().map(|request| {
            let key = Key { request: request.request, attempt: request.attempt, since };
            key.answered(Err(foreign.clone()))
        });
        let refused: Vec<_> = refused.collect();
        self.unanswered += refused.len();
        self.ready.extend(refused);
        Vec::new()
    }

    fn hear(&mut self, message: Option<Result<v1::AssignBatch, Status>>) -> Result<(), Status> {
        let Some(message) = message else {
            self.incoming = None;
            return Ok(());
        };
        let mut requests = self.of_cluster(message?);
        while requests.len() < GROUP_MAX
            && let Some(incoming) = &mut self.incoming
            && let Some(more) = incoming.next().now_or_never()
        {
            match more {
                Some(more) => requests.append(&mut self.of_cluster(more?)),
                None => self.incoming = None,
            }
        }
        if requests.len() > MESSAGE_MAX + GROUP_MAX {
            return Err(Status::invalid_argument(format!("more than {MESSAGE_MAX} requests in one message")));
        }
        self.unanswered += requests.len();
        let since = Instant::now();
        let (mut keys, mut asks) = (Vec::with_capacity(requests.len()), Vec::with_capacity(requests.len()));
        for request in requests {
            let key = Key { request: request.request.clone(), attempt: request.attempt, since };
            match Ask::new(request) {
                Ok(ask) => {
                    keys.push(key);
                    asks.push(ask);
                }
                Err(bad) => self.ready.push(key.answered(Err(refusal(Refused::Incompatible, bad.to_string())))),
            }
        }
        if !asks.is_empty() {
            let shared = self.shared.clone();
            let group = async move { keys.into_iter().zip(shared.assign_group(asks).await).collect() };
            self.groups.push(group.boxed());
        }
        Ok(())
    }
}
