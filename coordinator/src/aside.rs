//! What a coordinator answers while it takes no part: it says why, and tells its peers what little it knows.

use std::pin::Pin;

use baton_proto::v1::{self, Blob, coordinator_server, raft_server};
use futures::{Stream, StreamExt};
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming};

use crate::raft::{Envelope, Known, Question};

/// Why a node stands aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// No room for what it would have to write.
    Full,
    /// Its directory is empty, and whether it ever took part is not known yet.
    Empty,
}

impl Cause {
    fn text(self) -> &'static str {
        match self {
            Cause::Full => "the disk of this coordinator is full; it comes back when there is room",
            Cause::Empty => "this coordinator has an empty directory and asks the others whether it may take part",
        }
    }
}

/// Answers for a node that stands aside.
#[derive(Clone)]
pub(crate) struct Aside {
    pub(crate) cause: Cause,
    pub(crate) envelope: Envelope,
    /// What `baton status` is shown.
    pub(crate) view: v1::ClusterView,
    pub(crate) stopping: watch::Receiver<bool>,
}

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Aside {
    fn refused<T>(&self) -> Answer<T> {
        Err(Status::unavailable(self.cause.text()))
    }
}

#[tonic::async_trait]
impl raft_server::Raft for Aside {
    type StreamAppendStream = Streamed<Blob>;

    async fn append(&self, _: Request<Blob>) -> Answer<Blob> {
        self.refused()
    }

    async fn stream_append(&self, _: Request<Streaming<Blob>>) -> Answer<Self::StreamAppendStream> {
        self.refused()
    }

    async fn vote(&self, _: Request<Blob>) -> Answer<Blob> {
        self.refused()
    }

    async fn pre_vote(&self, _: Request<Blob>) -> Answer<Blob> {
        self.refused()
    }

    async fn snapshot(&self, _: Request<Streaming<Blob>>) -> Answer<Blob> {
        self.refused()
    }

    async fn transfer(&self, _: Request<Blob>) -> Answer<Blob> {
        self.refused()
    }

    async fn ask(&self, request: Request<Blob>) -> Answer<Blob> {
        let question: Question = self.envelope.open(request.into_inner())?;
        tracing::debug!(node = question.node, "asked after");
        let known = match self.cause {
            Cause::Empty => Known::nothing(),
            Cause::Full => Known { cluster: self.envelope.cluster().to_string(), ..Known::default() },
        };
        Ok(Response::new(self.envelope.seal(0, &known)))
    }
}

#[tonic::async_trait]
impl coordinator_server::Coordinator for Aside {
    type WatchStream = Streamed<v1::ClusterView>;
    type AssignmentsStream = Streamed<v1::AssignedBatch>;
    type WatchAccessStream = Streamed<v1::Access>;
    type HeartbeatsStream = Streamed<v1::HeartbeatReply>;

    async fn register(&self, _: Request<v1::RegisterRequest>) -> Answer<v1::RegisterReply> {
        self.refused()
    }

    async fn heartbeat(&self, _: Request<v1::HeartbeatRequest>) -> Answer<v1::HeartbeatReply> {
        self.refused()
    }

    async fn heartbeats(&self, _: Request<Streaming<v1::HeartbeatRequest>>) -> Answer<Self::HeartbeatsStream> {
        self.refused()
    }

    async fn leave(&self, _: Request<v1::LeaveRequest>) -> Answer<v1::LeaveReply> {
        self.refused()
    }

    async fn assign(&self, _: Request<v1::AssignRequest>) -> Answer<v1::AssignReply> {
        self.refused()
    }

    async fn assignments(&self, _: Request<Streaming<v1::AssignBatch>>) -> Answer<Self::AssignmentsStream> {
        self.refused()
    }

    async fn locate(&self, _: Request<v1::LocateRequest>) -> Answer<v1::LocateReply> {
        self.refused()
    }

    async fn watch_access(&self, _: Request<v1::WatchRequest>) -> Answer<Self::WatchAccessStream> {
        self.refused()
    }

    async fn finish(&self, _: Request<v1::FinishRequest>) -> Answer<v1::FinishReply> {
        self.refused()
    }

    /// One view, which does not change until the node takes part or ends.
    async fn watch(&self, _: Request<v1::WatchRequest>) -> Answer<Self::WatchStream> {
        let mut stopping = self.stopping.clone();
        let stopped = async move { drop(stopping.wait_for(|stopping| *stopping).await) };
        let view = futures::stream::iter([Ok(self.view.clone())]);
        Ok(Response::new(Box::pin(view.chain(futures::stream::pending()).take_until(Box::pin(stopped)))))
    }
}
