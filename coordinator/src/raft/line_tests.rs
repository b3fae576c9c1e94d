//! Appends to a follower that is a fake: how many calls they take, and what becomes of a call that ends.

use std::pin::Pin;
use std::time::Duration;

use baton_proto::TcpNet;
use baton_proto::server::Bound;
use baton_proto::v1::Blob;
use baton_proto::v1::raft_server::{self, RaftServer};
use futures::{Stream, StreamExt};
use openraft::network::RPCOption;
use openraft::network::v2::RaftNetworkV2;
use openraft::raft::{AppendEntriesRequest, StreamAppendError};
use openraft::{BasicNode, RaftNetworkFactory};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::{Request, Response, Status, Streaming};

use super::network::{Append, Appended, Peer, Peers};
use super::*;

/// Agrees to every append, unless told otherwise.
#[derive(Clone, Default)]
struct Follower(Arc<Said>);

#[derive(Default)]
struct Said {
    calls: watch::Sender<usize>,
    /// Grows when the open calls are to end.
    ends: watch::Sender<usize>,
    /// The next append is not agreed to.
    conflicts: watch::Sender<bool>,
    /// While true appends are heard and not answered.
    holds: watch::Sender<bool>,
}

impl Follower {
    async fn answer(self, append: Result<Blob, Status>) -> Result<Blob, Status> {
        let append: Append = Envelope::new(2, "").open(append?)?;
        let _ = self.0.holds.subscribe().wait_for(|holds| !holds).await;
        let conflict = self.0.conflicts.send_replace(false).then(|| append.prev_log_id.expect("an entry before"));
        let answer: Appended = conflict.map_or(Ok(append.prev_log_id), |id| Err(StreamAppendError::Conflict(id)));
        Ok(Envelope::new(2, "").seal(0, &answer))
    }
}

fn unknown<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("a follower that takes appends only"))
}

#[tonic::async_trait]
impl raft_server::Raft for Follower {
    type StreamAppendStream = Pin<Box<dyn Stream<Item = Result<Blob, Status>> + Send>>;

    async fn stream_append(
        &self,
        appends: Request<Streaming<Blob>>,
    ) -> Result<Response<Self::StreamAppendStream>, Status> {
        self.0.calls.send_modify(|calls| *calls += 1);
        let mut ends = self.0.ends.subscribe();
        let (follower, ended) = (self.clone(), Box::pin(async move { drop(ends.changed().await) }));
        let answers = appends.into_inner().then(move |append| follower.clone().answer(append));
        Ok(Response::new(Box::pin(answers.take_until(ended))))
    }

    async fn append(&self, _: Request<Blob>) -> Result<Response<Blob>, Status> {
        unknown()
    }

    async fn vote(&self, _: Request<Blob>) -> Result<Response<Blob>, Status> {
        unknown()
    }

    async fn pre_vote(&self, _: Request<Blob>) -> Result<Response<Blob>, Status> {
        unknown()
    }

    async fn snapshot(&self, _: Request<Streaming<Blob>>) -> Result<Response<Blob>, Status> {
        unknown()
    }

    async fn transfer(&self, _: Request<Blob>) -> Result<Response<Blob>, Status> {
        unknown()
    }

    async fn ask(&self, _: Request<Blob>) -> Result<Response<Blob>, Status> {
        unknown()
    }
}

/// A follower, and the leader's way to it.
async fn pair(tasks: &mut JoinSet<()>) -> (Follower, Peer) {
    let (net, follower): (Arc<dyn Net>, _) = (Arc::new(TcpNet), Follower::default());
    let listener = net.listen("127.0.0.1:0").await.unwrap();
    let node = BasicNode::new(listener.address());
    let service = RaftServer::new(follower.clone());
    let served = baton_proto::server::serve(listener, Bound::uncounted(), service, std::future::pending());
    tasks.spawn(served);
    let mut peers = Peers { net, addresses: BTreeMap::new(), envelope: Envelope::new(1, "") };
    (follower, peers.new_client(2, &node).await)
}

fn append(index: u64) -> Append {
    let vote: openraft::alias::VoteOf<types::Types> = openraft::Vote::new_committed(3, 1);
    let id = openraft::LogId { leader_id: openraft::vote::RaftLeaderId::to_committed(&vote.leader_id), index };
    AppendEntriesRequest { vote, prev_log_id: Some(id), entries: Vec::new(), leader_commit: None }
}

/// One stream of appends to its end: the answers' indices, or "conflict", or the error.
async fn send(peer: &mut Peer, indices: std::ops::Range<u64>) -> Vec<Result<u64, String>> {
    let appends = futures::stream::iter(indices.map(append));
    let answers = peer.stream_append(appends, RPCOption::new(Duration::from_secs(10))).await.unwrap();
    let read = |answer: Result<Appended, _>| match answer {
        Ok(Ok(matching)) => Ok(matching.expect("an entry before").index),
        Ok(Err(_)) => Err("conflict".to_string()),
        Err(error) => Err(format!("{error}")),
    };
    answers.map(read).collect().await
}

/// Goal: streams of appends one after another are one call, each with its answers in order. Method: more of them, and longer
/// ones, than the line takes at a time.
#[tokio::test]
async fn streams_of_appends_are_one_call() {
    let mut tasks = JoinSet::new();
    let (follower, mut peer) = pair(&mut tasks).await;
    for (from, to) in (0..20).map(|n| (n, n + 1)).chain([(20, 20), (20, 400), (400, 401)]) {
        let answers = send(&mut peer, from..to).await;
        assert_eq!(answers, (from..to).map(Ok).collect::<Vec<_>>());
    }
    assert_eq!(*follower.0.calls.borrow(), 1);
}

/// Goal: whatever ends a call, the next stream begins another, and has only its own answers. Method: the follower ends it
/// between streams; it does not agree; the leader gives a stream up before its answers.
#[tokio::test]
async fn a_call_that_ended_is_followed_by_another() {
    let mut tasks = JoinSet::new();
    let (follower, mut peer) = pair(&mut tasks).await;
    assert_eq!(send(&mut peer, 0..3).await, [Ok(0), Ok(1), Ok(2)]);

    follower.0.ends.send_modify(|ends| *ends += 1);
    // Whether the end has come here by now is not known: then the stream fails, and the next one does not.
    if send(&mut peer, 3..4).await != [Ok(3)] {
        assert_eq!(send(&mut peer, 3..4).await, [Ok(3)]);
    }
    assert_eq!(*follower.0.calls.borrow(), 2);

    follower.0.conflicts.send_replace(true);
    assert_eq!(send(&mut peer, 4..7).await, [Err("conflict".to_string())]);
    assert_eq!(send(&mut peer, 5..7).await, [Ok(5), Ok(6)]);
    assert_eq!(*follower.0.calls.borrow(), 3);

    follower.0.holds.send_replace(true);
    let appends = futures::stream::iter((7..9).map(append)).chain(futures::stream::pending());
    let option = RPCOption::new(Duration::from_secs(10));
    let mut given_up = peer.stream_append(appends, option).await.unwrap();
    assert!(futures::poll!(given_up.next()).is_pending());
    drop(given_up);
    follower.0.holds.send_replace(false);
    assert_eq!(send(&mut peer, 9..11).await, [Ok(9), Ok(10)]);
    assert_eq!(*follower.0.calls.borrow(), 4);
}
