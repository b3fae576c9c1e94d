//! The sender's side of one transfer: how far it is, as told by the receiver or by the link's end.

use baton_core::Aborted;
use tokio::sync::watch;

use crate::TransferError;
use crate::wire::{Body, Summary};

#[derive(Clone, Debug)]
pub(crate) enum Progress {
    Opening,
    Open,
    /// (layer, position) of extents that the receiver wants again.
    Asked(Vec<(u32, u32)>),
    Committed(Summary),
    Failed(TransferError),
}

pub(crate) struct Sending(watch::Sender<Progress>);

impl Sending {
    pub(crate) fn new() -> Sending {
        Sending(watch::Sender::new(Progress::Opening))
    }

    /// Runs `write` unless the transfer has failed. The two cannot cross: after `fail` has returned, nothing of this
    /// transfer is written.
    pub(crate) fn writing<T>(&self, write: impl FnOnce() -> T) -> Result<T, TransferError> {
        match &*self.0.borrow() {
            Progress::Failed(error) => Err(error.clone()),
            _ => Ok(write()),
        }
    }

    /// Ends the transfer unless it has ended already; true if it had not.
    pub(crate) fn fail(&self, error: TransferError) -> bool {
        self.advance(|_| Progress::Failed(error))
    }

    /// Takes what the receiver says about the transfer.
    pub(crate) fn hear(&self, body: Body) {
        match body {
            Body::Opened => self.advance(|_| Progress::Open),
            Body::Resend(extents) => self.advance(|_| Progress::Asked(extents)),
            Body::Committed(summary) => self.advance(|_| Progress::Committed(summary)),
            Body::Refused(reason) => self.fail(TransferError::Refused(reason)),
            Body::Abort { reason, .. } => self.fail(TransferError::Aborted(reason)),
            _ => false,
        };
    }

    pub(crate) async fn opened(&self) -> Result<(), TransferError> {
        self.until(|progress| !matches!(progress, Progress::Opening)).await.map(drop)
    }

    /// The answer to a COMMIT: what was committed, or else the extents to send again before the next.
    pub(crate) async fn answered(&self) -> Result<Result<Summary, Vec<(u32, u32)>>, TransferError> {
        match self.until(|progress| matches!(progress, Progress::Committed(_) | Progress::Asked(_))).await? {
            Progress::Committed(summary) => Ok(Ok(summary)),
            Progress::Asked(extents) => {
                self.advance(|_| Progress::Open);
                Ok(Err(extents))
            }
            _ => unreachable!("waited for"),
        }
    }

    /// Returns when the transfer has failed.
    pub(crate) async fn failed(&self) -> TransferError {
        match self.until(|_| false).await {
            Err(error) => error,
            Ok(_) => unreachable!("nothing satisfies it"),
        }
    }

    async fn until(&self, reached: impl Fn(&Progress) -> bool) -> Result<Progress, TransferError> {
        let mut progress = self.0.subscribe();
        let ended = |progress: &Progress| matches!(progress, Progress::Failed(_)) || reached(progress);
        match progress.wait_for(ended).await.as_deref() {
            Ok(Progress::Failed(error)) => Err(error.clone()),
            Ok(progress) => Ok(progress.clone()),
            Err(_) => Err(TransferError::Aborted(Aborted::Internal)),
        }
    }

    fn advance(&self, next: impl FnOnce(&Progress) -> Progress) -> bool {
        self.0.send_if_modified(|progress| {
            let ended = matches!(progress, Progress::Committed(_) | Progress::Failed(_));
            if !ended {
                *progress = next(progress);
            }
            !ended
        })
    }
}
