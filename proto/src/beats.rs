//! Heartbeats to one coordinator: messages of one call that stays open, each with its answer. A coordinator of an earlier
//! release knows no such call; it is told each by a call of its own.

use std::pin::Pin;
use std::task::{Context, Waker};

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Response, Status, Streaming};

use crate::v1::coordinator_client::CoordinatorClient;
use crate::v1::{HeartbeatReply, HeartbeatRequest};

/// Whoever tells one coordinator of its health.
#[derive(Debug)]
pub struct Beats {
    client: CoordinatorClient<Channel>,
    /// None while it is used, or there is none yet.
    call: Option<Call>,
    /// The coordinator does not know the call.
    singly: bool,
}

#[derive(Debug)]
struct Call {
    beats: mpsc::Sender<HeartbeatRequest>,
    answers: Streaming<HeartbeatReply>,
}

impl Beats {
    pub fn new(client: CoordinatorClient<Channel>) -> Beats {
        Beats { client, call: None, singly: false }
    }

    /// Tells one heartbeat and waits for its answer. What fails, or is given up before its answer, ends the call; the next
    /// heartbeat begins another.
    pub async fn tell(&mut self, beat: HeartbeatRequest) -> Result<HeartbeatReply, Status> {
        if self.singly {
            let told = self.client.heartbeat(beat).await.map(Response::into_inner);
            // One that was gone may have come back as a later release.
            self.singly = told.is_ok();
            return told;
        }
        let beat = match self.call.take().and_then(Call::going_on) {
            Some(call) => match call.beats.try_send(beat) {
                Ok(()) => return self.answer(call).await,
                Err(ended) => ended.into_inner(),
            },
            None => beat,
        };
        let (beats, told) = mpsc::channel(1);
        let told = ReceiverStream::new(told);
        beats.try_send(beat.clone()).map_err(|_| Status::internal("a new call takes no heartbeat"))?;
        match self.client.heartbeats(told).await {
            Ok(answers) => self.answer(Call { beats, answers: answers.into_inner() }).await,
            Err(status) if status.code() == Code::Unimplemented => {
                self.singly = true;
                self.client.heartbeat(beat).await.map(Response::into_inner)
            }
            Err(status) => Err(status),
        }
    }

    async fn answer(&mut self, mut call: Call) -> Result<HeartbeatReply, Status> {
        let answer = call.answers.message().await?;
        let answer = answer.ok_or_else(|| Status::unavailable("the coordinator has ended the call"))?;
        self.call = Some(call);
        Ok(answer)
    }
}

impl Call {
    /// Itself, unless it has ended, as far as is known: nobody speaks on it unasked.
    fn going_on(mut self) -> Option<Call> {
        let mut nobody = Context::from_waker(Waker::noop());
        Pin::new(&mut self.answers).poll_next(&mut nobody).is_pending().then_some(self)
    }
}
