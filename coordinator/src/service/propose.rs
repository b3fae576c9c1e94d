//! Gathers commands into entries: one write takes along whatever queued while earlier ones were under way.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};

use super::Shared;
use super::lead::Lead;
use crate::raft::{Node, ProposeError};
use crate::state::{Batch, COMMANDS_MAX, Command, Outcome};

/// Commands that may wait; more are refused at once.
const QUEUE_MAX: usize = 16_384;
/// Commands of one caller that go into one entry together, and about as many go into an entry at all.
const BATCH_MAX: usize = 1024;
/// Entries under way at a time: the next one is gathered while these replicate.
const WRITES_MAX: usize = 2;

const _: () = assert!(2 * BATCH_MAX <= COMMANDS_MAX);

/// Commands of one caller, and where their outcomes go.
struct Waiting {
    commands: Vec<Command>,
    tell: oneshot::Sender<Result<Vec<Outcome>, SubmitError>>,
}

/// Why a command has no outcome.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SubmitError {
    #[error("{QUEUE_MAX} commands wait already")]
    Full,
    #[error(transparent)]
    Propose(#[from] ProposeError),
}

/// Where commands are handed in. Clones share one queue.
#[derive(Clone)]
pub(crate) struct Proposer {
    queue: mpsc::Sender<Waiting>,
    /// Commands that wait.
    commands: Arc<AtomicUsize>,
}

impl Proposer {
    /// The proposer and the loop that serves it, which ends when every proposer is dropped.
    pub(crate) fn new(node: Arc<Node>, lead: Arc<Lead>) -> (Proposer, impl Future<Output = ()> + Send) {
        let (queue, waiting) = mpsc::channel(QUEUE_MAX);
        let commands = Arc::<AtomicUsize>::default();
        (
            Proposer { queue, commands: commands.clone() },
            run(node, lead, Gather { queue: waiting, commands, open: true }),
        )
    }

    /// Commits one command together with others and says what became of it.
    pub(crate) async fn submit(&self, command: Command) -> Result<Outcome, SubmitError> {
        let outcomes = self.hand_in(vec![command])?.await;
        outcomes.unwrap_or_else(|_| Err(stopping())).map(|outcomes| outcomes.into_iter().next().expect("one each"))
    }

    /// Commits many commands and says what became of each, in order.
    pub(crate) async fn submit_many(&self, mut commands: Vec<Command>) -> Result<Vec<Outcome>, SubmitError> {
        if (1..=BATCH_MAX).contains(&commands.len()) {
            return self.hand_in(commands)?.await.unwrap_or_else(|_| Err(stopping()));
        }
        let mut told = Vec::new();
        while !commands.is_empty() {
            let rest = commands.split_off(commands.len().min(BATCH_MAX));
            told.push(self.hand_in(std::mem::replace(&mut commands, rest))?);
        }
        let mut outcomes = Vec::new();
        for told in told {
            outcomes.extend(told.await.unwrap_or_else(|_| Err(stopping()))?);
        }
        Ok(outcomes)
    }

    /// Commits one command and does not ask what became of it.
    pub(crate) fn submit_unheard(&self, command: Command) {
        if self.hand_in(vec![command]).is_err() {
            tracing::warn!("the queue of commands is full; the next round tries again");
        }
    }

    fn hand_in(
        &self,
        commands: Vec<Command>,
    ) -> Result<oneshot::Receiver<Result<Vec<Outcome>, SubmitError>>, SubmitError> {
        let (tell, told) = oneshot::channel();
        let count = commands.len();
        if self.commands.fetch_add(count, Ordering::Relaxed) + count > QUEUE_MAX
            || self.queue.try_send(Waiting { commands, tell }).is_err()
        {
            self.commands.fetch_sub(count, Ordering::Relaxed);
            return Err(SubmitError::Full);
        }
        Ok(told)
    }
}

fn stopping() -> SubmitError {
    ProposeError::Unknown("stopping".into()).into()
}

impl Shared {
    /// Tells the others what this leader's ledger was, once for every hash of it.
    pub(super) fn tell_check(&self) {
        let Some(check) = self.node.check() else { return };
        if self.checked.fetch_max(check.index, Ordering::Relaxed) < check.index {
            self.proposer.submit_unheard(Command::Check(check));
        }
    }
}

/// The other end of the queue.
struct Gather {
    queue: mpsc::Receiver<Waiting>,
    commands: Arc<AtomicUsize>,
    open: bool,
}

impl Gather {
    /// Whatever waits, up to an entry's worth; nothing once every proposer is gone.
    async fn next(&mut self) -> Vec<Waiting> {
        let Some(first) = self.queue.recv().await else {
            self.open = false;
            return Vec::new();
        };
        let mut count = first.commands.len();
        let mut batch = vec![first];
        while count < BATCH_MAX
            && let Ok(more) = self.queue.try_recv()
        {
            count += more.commands.len();
            batch.push(more);
        }
        self.commands.fetch_sub(count, Ordering::Relaxed);
        batch
    }
}

async fn run(node: Arc<Node>, lead: Arc<Lead>, mut gather: Gather) {
    let mut writes = FuturesUnordered::new();
    while gather.open || !writes.is_empty() {
        tokio::select! {
            biased;
            Some(()) = writes.next(), if !writes.is_empty() => {}
            batch = gather.next(), if gather.open && writes.len() < WRITES_MAX => {
                if !batch.is_empty() {
                    writes.push(write(&node, &lead, batch));
                }
            }
        }
    }
}

async fn write(node: &Node, lead: &Lead, waiting: Vec<Waiting>) {
    let mut commands = Vec::new();
    let mut tells = Vec::new();
    for group in waiting {
        tells.push((group.commands.len(), group.tell));
        commands.extend(group.commands);
    }
    metrics::histogram!("baton_coordinator_batch_commands").record(commands.len() as f64);
    let outcomes = match lead.stamp() {
        Some(time_ms) => node.propose(&Batch { time_ms, commands }).await,
        None => Err(ProposeError::NotLeader),
    };
    match outcomes {
        Ok(outcomes) => {
            let mut outcomes = outcomes.into_iter();
            for (count, tell) in tells {
                drop(tell.send(Ok(outcomes.by_ref().take(count).collect())));
            }
        }
        Err(error) => tells.into_iter().for_each(|(_, tell)| drop(tell.send(Err(error.clone().into())))),
    }
}
