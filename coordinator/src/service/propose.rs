//! Gathers commands into entries: one write takes along whatever queued while earlier ones were under way.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};

use super::lead::Lead;
use crate::raft::{Node, ProposeError};
use crate::state::{Batch, COMMANDS_MAX, Command, Outcome};

/// Commands that may wait; more are refused at once.
const QUEUE_MAX: usize = 8192;
/// Commands in one entry.
const BATCH_MAX: usize = 1024;
/// Entries under way at a time: the next one is gathered while these replicate.
const WRITES_MAX: usize = 4;

const _: () = assert!(BATCH_MAX <= COMMANDS_MAX);

type Waiting = (Command, oneshot::Sender<Result<Outcome, SubmitError>>);

/// Why a command has no outcome.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SubmitError {
    #[error("{QUEUE_MAX} commands wait already")]
    Full,
    #[error(transparent)]
    Propose(#[from] ProposeError),
}

/// Where commands are handed in.
#[derive(Clone)]
pub(crate) struct Proposer {
    queue: mpsc::Sender<Waiting>,
}

impl Proposer {
    /// The proposer and the loop that serves it, which ends when every proposer is dropped.
    pub(crate) fn new(node: Arc<Node>, lead: Arc<Lead>) -> (Proposer, impl Future<Output = ()> + Send) {
        let (queue, waiting) = mpsc::channel(QUEUE_MAX);
        (Proposer { queue }, run(node, lead, waiting))
    }

    /// Commits one command together with others and says what became of it.
    pub(crate) async fn submit(&self, command: Command) -> Result<Outcome, SubmitError> {
        let (tell, told) = oneshot::channel();
        self.queue.try_send((command, tell)).map_err(|_| SubmitError::Full)?;
        told.await.unwrap_or_else(|_| Err(ProposeError::Unknown("stopping".into()).into()))
    }

    /// Commits one command and does not ask what became of it.
    pub(crate) fn submit_unheard(&self, command: Command) {
        let (tell, _) = oneshot::channel();
        if self.queue.try_send((command, tell)).is_err() {
            tracing::warn!("the queue of commands is full; the next round tries again");
        }
    }
}

async fn run(node: Arc<Node>, lead: Arc<Lead>, mut queue: mpsc::Receiver<Waiting>) {
    let mut writes = FuturesUnordered::new();
    let mut open = true;
    while open || !writes.is_empty() {
        let mut batch = Vec::new();
        tokio::select! {
            biased;
            Some(()) = writes.next(), if !writes.is_empty() => {}
            count = queue.recv_many(&mut batch, BATCH_MAX), if open && writes.len() < WRITES_MAX => {
                open = count > 0;
                if open {
                    writes.push(write(&node, &lead, batch));
                }
            }
        }
    }
}

async fn write(node: &Node, lead: &Lead, waiting: Vec<Waiting>) {
    let (commands, tells): (Vec<Command>, Vec<_>) = waiting.into_iter().unzip();
    metrics::histogram!("baton_coordinator_batch_commands").record(commands.len() as f64);
    let outcomes = match lead.stamp() {
        Some(time_ms) => node.propose(&Batch { time_ms, commands }).await,
        None => Err(ProposeError::NotLeader),
    };
    match outcomes {
        Ok(outcomes) => tells.into_iter().zip(outcomes).for_each(|(tell, outcome)| drop(tell.send(Ok(outcome)))),
        Err(error) => tells.into_iter().for_each(|tell| drop(tell.send(Err(error.clone().into())))),
    }
}
