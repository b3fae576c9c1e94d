//! A transfer as whoever granted it sees it: it waits for the blocks, or for what is left of them.

use std::marker::PhantomData;
use std::sync::Arc;

use baton_core::{Aborted, Arena, BlockId, TransferId};
use tokio::sync::oneshot;

use super::{Outcome, Remains, Shared};
use crate::link::LinkId;
use crate::transfer::{Event, Received};
use crate::{Grant, TransferError};

/// A transfer that was granted. Dropping it aborts the transfer.
pub struct Incoming<G> {
    shared: Arc<Shared>,
    transfer: TransferId,
    waits: Waits,
    /// How it failed, while its remains are awaited.
    failed: Option<TransferError>,
    guard: PhantomData<fn() -> G>,
}

/// Where a transfer's outcome and its remains are told.
pub(super) struct Waits {
    pub(super) done: oneshot::Receiver<Outcome>,
    pub(super) remains: oneshot::Receiver<Remains>,
}

/// A transfer that failed and that no sender writes any more: what it has is verified and stays.
pub struct Partial<G> {
    pub error: TransferError,
    /// What keeps the blocks reserved.
    pub guard: G,
    pub(super) grant: Grant,
    pub(super) arena: Arc<Arena>,
    whole: Vec<bool>,
}

impl<G> Partial<G> {
    /// By position in the grant: whether every layer of the block has arrived.
    pub fn whole(&self) -> &[bool] {
        &self.whole
    }

    /// The granted blocks that did not arrive whole, in order.
    pub fn lacking(&self) -> Vec<BlockId> {
        let blocks = self.grant.blocks.iter().zip(&self.whole);
        blocks.filter(|(_, whole)| !**whole).map(|(block, _)| *block).collect()
    }
}

impl<G: 'static> Incoming<G> {
    pub(super) fn new(shared: Arc<Shared>, grant: &Grant, waits: Waits) -> Incoming<G> {
        Incoming { shared, transfer: grant.transfer, waits, failed: None, guard: PhantomData }
    }

    /// Returns the guard once every layer of every block has arrived, verified, and the sender has committed to
    /// exactly that.
    pub async fn wait(mut self) -> Result<(G, Received), TransferError> {
        let outcome = (&mut self.waits.done).await.unwrap_or(Err(TransferError::Aborted(Aborted::Draining)));
        let (guard, received) = outcome?;
        Ok((*guard.downcast().expect("`open` stored a G"), received))
    }

    /// The same for a waiter who can use what had arrived when the transfer failed. It then waits until nothing can
    /// write the blocks any more, at most `HANDOFF_QUIESCE_MS` and the closing of the link. Nothing is lost when the
    /// future is dropped before it is ready; once it has been, there is nothing more to wait for.
    pub async fn wait_or_keep(&mut self) -> Result<(G, Received), Result<Partial<G>, TransferError>> {
        let outcome = match self.failed.take() {
            Some(error) => Err(error),
            None => (&mut self.waits.done).await.unwrap_or(Err(TransferError::Aborted(Aborted::Draining))),
        };
        let error = match outcome {
            Ok((guard, received)) => return Ok((*guard.downcast().expect("`open` stored a G"), received)),
            Err(error) => error,
        };
        self.failed = Some(error.clone());
        let Ok((grant, arena, guard, whole)) = (&mut self.waits.remains).await else { return Err(Err(error)) };
        let guard = *guard.downcast().expect("`open` stored a G");
        Err(Ok(Partial { error, guard, grant, arena, whole }))
    }

    /// Gives the transfer up: its sender is told to stop. What had arrived can still be waited for.
    pub fn give_up(&self) {
        self.shared.step(self.transfer, LinkId::NONE, Event::Dropped);
    }
}

impl<G> Drop for Incoming<G> {
    fn drop(&mut self) {
        self.shared.step(self.transfer, LinkId::NONE, Event::Dropped);
    }
}
