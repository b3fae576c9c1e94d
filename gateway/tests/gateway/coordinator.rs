//! Coordinators that assign the first worker there is. One of them leads; the others say which.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use baton_proto::v1::coordinator_server::Coordinator;
use baton_proto::v1::*;
use futures::StreamExt;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tonic::{Request, Response, Status, Streaming};

use crate::worker::{Answer, Events};
use crate::world::Seen;

/// What all coordinators share.
pub(crate) struct FakeLedger {
    pub seen: Arc<watch::Sender<Seen>>,
    pub view: watch::Sender<ClusterView>,
    pub access: watch::Sender<Access>,
    /// Answers to questions for workers before workers are given out, the last one first.
    pub refusals: Mutex<Vec<Refusal>>,
    /// Which coordinator leads.
    pub leader: watch::Sender<usize>,
    /// While true, questions for workers, and for a request of another gateway, are heard and not answered.
    pub holds: watch::Sender<bool>,
    /// Grows when every stream of questions is to break.
    pub cuts: watch::Sender<u64>,
    pub addresses: Mutex<Vec<String>>,
    assigned: Mutex<BTreeMap<(String, u32), Assignment>>,
}

impl FakeLedger {
    pub(crate) fn new(seen: Arc<watch::Sender<Seen>>, view: ClusterView) -> FakeLedger {
        FakeLedger {
            seen,
            view: watch::Sender::new(view),
            access: watch::Sender::new(Access { open: true, ..Access::default() }),
            refusals: Mutex::default(),
            leader: watch::Sender::new(0),
            holds: watch::Sender::new(false),
            cuts: watch::Sender::new(0),
            addresses: Mutex::default(),
            assigned: Mutex::default(),
        }
    }

    /// The same question gets the same answer.
    fn assign(&self, request: &AssignRequest) -> assign_reply::Outcome {
        if let Some(refusal) = self.refusals.lock().unwrap().pop() {
            return assign_reply::Outcome::Refused(refusal);
        }
        let key = (request.request.clone(), request.attempt);
        let mut assigned = self.assigned.lock().unwrap();
        if let Some(assignment) = assigned.get(&key) {
            return assign_reply::Outcome::Assignment(assignment.clone());
        }
        let view = self.view.borrow();
        let excluded = |m: &Member| request.exclude.iter().any(|e| e.id == m.id && e.incarnation == m.incarnation);
        let live = view.members.iter().filter(|m| m.live).filter_map(|m| m.member.as_ref());
        let Some(worker) = live.into_iter().find(|m| m.role() == Role::Decode && !excluded(m)) else {
            return assign_reply::Outcome::Refused(Refusal { reason: "no_workers".into(), ..Default::default() });
        };
        let assignment = Assignment {
            holder: None,
            request: request.request.clone(),
            attempt: request.attempt,
            epoch: assigned.len() as u64 + 1,
            decode: Some(Place {
                worker: worker.id.clone(),
                incarnation: worker.incarnation,
                address: worker.address.clone(),
            }),
            prefill: None,
            lease_ms: 10_000,
            explanation: "first".into(),
            cluster: String::new(),
        };
        assigned.insert(key, assignment.clone());
        assign_reply::Outcome::Assignment(assignment)
    }

    fn locate(&self, request: &LocateRequest) -> locate_reply::Outcome {
        let assigned = self.assigned.lock().unwrap();
        let mut of_request = assigned.iter().filter(|((name, _), _)| *name == request.request);
        match of_request.next_back() {
            Some((_, assignment)) => locate_reply::Outcome::Assignment(assignment.clone()),
            None => locate_reply::Outcome::Refused(Refusal { reason: "unknown".into(), ..Default::default() }),
        }
    }
}

/// One coordinator.
#[derive(Clone)]
pub(crate) struct CoordinatorService {
    pub ledger: Arc<FakeLedger>,
    pub node: usize,
    pub tasks: Arc<Mutex<JoinSet<()>>>,
}

impl CoordinatorService {
    fn not_leader(&self) -> Option<Refusal> {
        let leader = *self.ledger.leader.borrow();
        let leader_address = self.ledger.addresses.lock().unwrap()[leader].clone();
        (leader != self.node).then(|| Refusal { reason: "not_leader".into(), leader_address, ..Default::default() })
    }

    fn outcome(&self, request: &AssignRequest) -> assign_reply::Outcome {
        match self.not_leader() {
            Some(refusal) => assign_reply::Outcome::Refused(refusal),
            None => self.ledger.assign(request),
        }
    }

    async fn answer(self, mut batches: Streaming<AssignBatch>, replies: mpsc::Sender<Result<AssignedBatch, Status>>) {
        let mut cuts = self.ledger.cuts.subscribe();
        let mut holds = self.ledger.holds.subscribe();
        let mut held = Vec::new();
        loop {
            tokio::select! {
                batch = batches.message() => match batch {
                    Ok(Some(batch)) => held.push(self.replies(batch)),
                    _ => return,
                },
                _ = holds.changed() => {}
                _ = cuts.changed() => return,
            }
            if !*holds.borrow_and_update() {
                for batch in held.drain(..) {
                    let _ = replies.send(Ok(batch)).await;
                }
            }
        }
    }

    fn replies(&self, batch: AssignBatch) -> AssignedBatch {
        self.ledger.seen.send_modify(|seen| seen.batches.push((self.node, batch.requests.len())));
        let reply = |request: AssignRequest| {
            let outcome = Some(self.outcome(&request));
            let (name, attempt) = (request.request.clone(), request.attempt);
            if self.not_leader().is_none() {
                self.ledger.seen.send_modify(|seen| seen.assigns.push(request));
            }
            Assigned { request: name, attempt, reply: Some(AssignReply { outcome }) }
        };
        AssignedBatch { replies: batch.requests.into_iter().map(reply).collect() }
    }
}

#[tonic::async_trait]
impl Coordinator for CoordinatorService {
    async fn register(&self, request: Request<RegisterRequest>) -> Answer<RegisterReply> {
        let member = request.into_inner().member.unwrap_or_default();
        self.ledger.seen.send_modify(|seen| seen.registered.push(member));
        let registered = Registered { incarnation: 7, heartbeat_ms: 250, ..Default::default() };
        Ok(Response::new(RegisterReply { outcome: Some(register_reply::Outcome::Registered(registered)) }))
    }

    async fn heartbeat(&self, _: Request<HeartbeatRequest>) -> Answer<HeartbeatReply> {
        self.ledger.seen.send_modify(|seen| seen.heartbeats.push(self.node));
        let coordinators = self.ledger.addresses.lock().unwrap().clone();
        let accepted = HeartbeatAccepted { leader: true, coordinators, ..Default::default() };
        Ok(Response::new(HeartbeatReply { outcome: Some(heartbeat_reply::Outcome::Accepted(accepted)) }))
    }

    type HeartbeatsStream = Events<HeartbeatReply>;

    async fn heartbeats(&self, beats: Request<Streaming<HeartbeatRequest>>) -> Answer<Self::HeartbeatsStream> {
        let fake = self.clone();
        let answer = move |beat: Result<HeartbeatRequest, Status>| {
            let fake = fake.clone();
            async move { fake.heartbeat(Request::new(beat?)).await.map(Response::into_inner) }
        };
        Ok(Response::new(beats.into_inner().then(answer).boxed()))
    }

    async fn leave(&self, _: Request<LeaveRequest>) -> Answer<LeaveReply> {
        Ok(Response::new(LeaveReply {}))
    }

    async fn assign(&self, _: Request<AssignRequest>) -> Answer<AssignReply> {
        Err(Status::unimplemented("gateways ask in batches"))
    }

    async fn finish(&self, request: Request<FinishRequest>) -> Answer<FinishReply> {
        self.ledger.seen.send_modify(|seen| seen.finishes.extend(request.into_inner().requests));
        Ok(Response::new(FinishReply { outcome: Some(finish_reply::Outcome::Finished(Finished {})) }))
    }

    type AssignmentsStream = Events<AssignedBatch>;

    async fn assignments(&self, batches: Request<Streaming<AssignBatch>>) -> Answer<Self::AssignmentsStream> {
        let (replies, outgoing) = mpsc::channel(64);
        self.tasks.lock().unwrap().spawn(self.clone().answer(batches.into_inner(), replies));
        Ok(Response::new(ReceiverStream::new(outgoing).boxed()))
    }

    async fn locate(&self, request: Request<LocateRequest>) -> Answer<LocateReply> {
        let request = request.into_inner();
        self.ledger.seen.send_modify(|seen| seen.locates.push(request.clone()));
        if !request.gateway.is_empty() {
            let _ = self.ledger.holds.subscribe().wait_for(|holds| !holds).await;
            self.ledger.seen.send_modify(|seen| seen.adopted.push(request.request.clone()));
        }
        let outcome = Some(match self.not_leader() {
            Some(refusal) => locate_reply::Outcome::Refused(refusal),
            None => self.ledger.locate(&request),
        });
        Ok(Response::new(LocateReply { outcome }))
    }

    type WatchAccessStream = Events<Access>;

    async fn watch_access(&self, _: Request<WatchRequest>) -> Answer<Self::WatchAccessStream> {
        Ok(Response::new(WatchStream::new(self.ledger.access.subscribe()).map(Ok).boxed()))
    }

    type WatchStream = Events<ClusterView>;

    async fn watch(&self, _: Request<WatchRequest>) -> Answer<Self::WatchStream> {
        Ok(Response::new(WatchStream::new(self.ledger.view.subscribe()).map(Ok).boxed()))
    }
}
