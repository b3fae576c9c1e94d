//! Ends of requests on their way to the ledger, many in one call. What cannot be told is not lost: the assignment's
//! lease runs out and the ledger ends the request itself.

use std::sync::Arc;
use std::time::Duration;

use baton_core::limits::REQUEST_DEADLINE_MS;
use baton_core::planted::{self, Bug};
use baton_proto::v1::{FinishRequest, FinishedRequest};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::coordinators::Coordinators;
use crate::measure;

const QUEUE_MAX: usize = 8192;
const BATCH_MAX: usize = 512;
/// How long the first end of a batch waits for others.
const GATHER: Duration = Duration::from_millis(2);
/// An end is told for as long as a request may last: by then the ledger has ended it by itself.
const TELL_MAX: Duration = Duration::from_millis(REQUEST_DEADLINE_MS);
/// Between tries: so much more after each, up to the maximum.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Where ends are handed in; never blocks.
#[derive(Clone)]
pub(crate) struct Finishes(mpsc::Sender<FinishedRequest>);

/// The other end, to be run until every `Finishes` is gone.
pub(crate) struct Finisher(mpsc::Receiver<FinishedRequest>);

pub(crate) fn queue() -> (Finishes, Finisher) {
    let (sender, receiver) = mpsc::channel(QUEUE_MAX);
    (Finishes(sender), Finisher(receiver))
}

impl Finishes {
    pub(crate) fn send(&self, finished: FinishedRequest) {
        if planted::is(Bug::ForgetFinish) {
            return;
        }
        if self.0.try_send(finished).is_err() {
            measure::finish_lost();
        }
    }
}

impl Finisher {
    /// `gateway`: the life whose ends these are.
    pub(crate) async fn run(mut self, coordinators: Arc<Coordinators>, gateway: String) {
        let mut requests = Vec::new();
        while self.0.recv_many(&mut requests, 1).await > 0 {
            tokio::time::sleep(GATHER).await;
            while requests.len() < BATCH_MAX
                && let Ok(finished) = self.0.try_recv()
            {
                requests.push(finished);
            }
            let requests = std::mem::take(&mut requests);
            let (cluster, gateway) = (coordinators.cluster(), gateway.clone());
            tell(&coordinators, FinishRequest { requests, cluster, gateway }).await;
        }
    }
}

async fn tell(coordinators: &Coordinators, request: FinishRequest) {
    let (since, mut pause) = (Instant::now(), PAUSE);
    while since.elapsed() < TELL_MAX {
        match coordinators.finish(request.clone()).await {
            Ok(_) => return,
            Err(refusal) => tracing::debug!(?pause, %refusal, "finish not taken"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause + PAUSE).min(PAUSE_MAX);
    }
    tracing::warn!(requests = request.requests.len(), "no coordinator took the end of requests; their leases end them");
    request.requests.iter().for_each(|_| measure::finish_lost());
}
