//! Which requests this worker may serve: those assigned to this life of it, under the newest epoch it has seen.

use std::collections::{BTreeMap, VecDeque};

use baton_core::planted::{self, Bug};
use baton_core::{Epoch, Refused, RequestId};

/// Requests whose newest epoch is remembered. A request forgotten after so many others would have to send an older
/// epoch to get in wrongly, long after its own deadline.
const EPOCHS_MAX: usize = 65_536;

/// The newest epoch of each request seen lately.
#[derive(Default)]
pub(crate) struct Epochs {
    newest: BTreeMap<RequestId, Epoch>,
    /// Oldest first.
    order: VecDeque<RequestId>,
}

impl Epochs {
    /// Lets a request in unless a newer epoch of it has been here.
    pub(crate) fn enter(&mut self, request: RequestId, epoch: Epoch) -> Result<(), Refused> {
        match self.newest.get_mut(&request) {
            Some(newest) if epoch < *newest && !planted::is(Bug::SkipEpochCheck) => return Err(Refused::Stale),
            Some(newest) => *newest = epoch,
            None => self.remember(request, epoch),
        }
        Ok(())
    }

    /// The newest epoch of each request that is remembered.
    pub(crate) fn newest(&self) -> Vec<(RequestId, Epoch)> {
        self.newest.iter().map(|(request, epoch)| (*request, *epoch)).collect()
    }

    fn remember(&mut self, request: RequestId, epoch: Epoch) {
        if self.order.len() == EPOCHS_MAX {
            let oldest = self.order.pop_front();
            oldest.and_then(|oldest| self.newest.remove(&oldest));
        }
        self.newest.insert(request, epoch);
        self.order.push_back(request);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_only_grow() {
        let mut epochs = Epochs::default();
        let mut check = |request, epoch, expected| {
            assert_eq!(epochs.enter(RequestId(request), Epoch(epoch)), expected);
        };
        check(1, 5, Ok(()));
        check(1, 5, Ok(()));
        check(1, 4, Err(Refused::Stale));
        check(1, 9, Ok(()));
        check(1, 5, Err(Refused::Stale));
        check(2, 1, Ok(()));
    }

    #[test]
    fn memory_is_bounded_and_forgets_the_oldest() {
        let mut epochs = Epochs::default();
        for request in 0..EPOCHS_MAX as u128 + 1 {
            assert_eq!(epochs.enter(RequestId(request), Epoch(7)), Ok(()));
        }
        assert_eq!(epochs.newest.len(), EPOCHS_MAX);
        assert_eq!(epochs.enter(RequestId(1), Epoch(6)), Err(Refused::Stale));
        assert_eq!(epochs.enter(RequestId(0), Epoch(6)), Ok(()));
    }
}
