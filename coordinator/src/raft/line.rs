//! The stream of appends to another coordinator, which stays open. openraft begins one for every heartbeat and for every burst
//! of entries; over a line each of their appends is one message of a call that is open already, and so is its answer.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use baton_proto::v1::Blob;
use baton_proto::v1::raft_client::RaftClient;
use futures::channel::mpsc;
use futures::future::FutureExt;
use futures::{Stream, StreamExt};
use openraft::base::BoxFuture;
use openraft::raft::StreamAppendError;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::network::{Append, Appended, CallError, Peer, failed};
use super::wire::decode;

/// Before a refused line is tried again.
const REFUSED_PAUSE: Duration = Duration::from_millis(20);
/// Appends that wait for the connection.
const APPENDS_MAX: usize = 16;

/// An open call.
pub(super) struct Line {
    appends: mpsc::Sender<Blob>,
    answers: Streaming<Blob>,
}

impl Line {
    /// Opens a call with its first append.
    async fn open(mut client: RaftClient<Channel>, append: Blob, timeout: Duration) -> Result<Box<Line>, CallError> {
        let (mut appends, told) = mpsc::channel(APPENDS_MAX);
        appends.start_send(append).map_err(failed)?;
        match tokio::time::timeout(timeout, client.stream_append(told)).await.map_err(failed)? {
            Ok(answers) => Ok(Box::new(Line { appends, answers: answers.into_inner() })),
            Err(status) => {
                // Replication asks again at once, and who stands aside says no at once.
                tokio::time::sleep(REFUSED_PAUSE).await;
                Err(failed(status))
            }
        }
    }

    /// Whether the call goes on, as far as is known: nobody speaks on it unasked.
    fn is_open(&mut self) -> bool {
        self.answers.next().now_or_never().is_none()
    }
}

enum State {
    Closed,
    Opening(BoxFuture<'static, Result<Box<Line>, CallError>>),
    Open(Box<Line>),
}

/// Appends on their way over a peer's line, and their answers in order. What is dropped before its last answer, or ends with an
/// error, takes the line with it.
pub(super) struct Appends<'a, S> {
    peer: &'a mut Peer,
    /// For opening a line.
    timeout: Duration,
    /// None: there are no more.
    appends: Option<S>,
    line: State,
    unanswered: usize,
}

impl<'a, S: Stream<Item = Append> + Unpin> Appends<'a, S> {
    pub(super) fn new(peer: &'a mut Peer, timeout: Duration, appends: S) -> Appends<'a, S> {
        let line = peer.line.take().and_then(|mut line| line.is_open().then_some(line));
        let line = line.map_or(State::Closed, State::Open);
        Appends { peer, timeout, appends: Some(appends), line, unanswered: 0 }
    }

    /// Hands over what there is, as far as the line takes it; ready once a line has to be opened for it, or there is no more.
    fn send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CallError>> {
        while let Some(appends) = &mut self.appends {
            if let State::Open(line) = &mut self.line {
                // What is handed to a line that has ended is answered with its end.
                let _ = ready!(line.appends.poll_ready(cx));
            }
            let Some(append) = ready!(appends.poll_next_unpin(cx)) else {
                self.appends = None;
                break;
            };
            let blob = self.peer.blob(&append);
            self.unanswered += 1;
            if let State::Open(line) = &mut self.line {
                let _ = line.appends.start_send(blob);
            } else {
                self.line = State::Opening(Box::pin(Line::open(self.peer.client()?, blob, self.timeout)));
                break;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// None: all is answered and there is no more.
    fn answer(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Appended, CallError>>> {
        loop {
            if let State::Opening(line) = &mut self.line {
                self.line = State::Open(ready!(line.poll_unpin(cx))?);
            }
            let sent = self.send(cx)?;
            let State::Open(line) = &mut self.line else {
                match sent {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(()) if self.appends.is_none() => return Poll::Ready(None),
                    Poll::Ready(()) => continue,
                }
            };
            if self.unanswered == 0 && self.appends.is_none() {
                return Poll::Ready(None);
            }
            let answer = ready!(line.answers.poll_next_unpin(cx));
            if self.unanswered == 0 {
                // A line that ends while nothing is asked of it is no loss.
                self.line = State::Closed;
                continue;
            }
            self.unanswered -= 1;
            let ended = || Err(Status::unavailable("the stream of appends has ended"));
            let answer = answer.unwrap_or_else(ended).map_err(failed);
            return Poll::Ready(Some(answer.and_then(|blob| decode(&blob.data).map_err(failed))));
        }
    }
}

impl<S: Stream<Item = Append> + Unpin> Stream for Appends<'_, S> {
    type Item = Result<Appended, CallError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let answer = ready!(this.answer(cx));
        match &answer {
            Some(Ok(Ok(_))) => {}
            // The other side ends the call with such an answer, too.
            Some(Ok(Err(StreamAppendError::Conflict(_) | StreamAppendError::HigherVote(_))) | Err(_)) => {
                (this.appends, this.line, this.unanswered) = (None, State::Closed, 0);
            }
            None => {
                if let State::Open(line) = std::mem::replace(&mut this.line, State::Closed) {
                    this.peer.line = Some(line);
                }
            }
        }
        Poll::Ready(answer)
    }
}
