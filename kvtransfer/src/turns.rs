//! Places in a link's outbox, given to whoever is due first. Who waits behind an earlier deadline is not passed over for long: deadlines
//! do not move, so everybody's turn comes.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;
use tokio::time::Instant;

/// Who waits: when it is due, and as the how manieth it came.
type Turn = (Instant, u64);

pub(crate) struct Turns {
    state: Mutex<State>,
}

struct State {
    /// Places that nobody has; 0 while somebody waits.
    free: usize,
    waiting: BTreeMap<Turn, oneshot::Sender<()>>,
    came: u64,
    closed: bool,
}

impl Turns {
    pub(crate) fn new(places: usize) -> Turns {
        let (waiting, came) = Default::default();
        Turns { state: Mutex::new(State { free: places, waiting, came, closed: false }) }
    }

    /// Returns once there is a place; false after `close`. Nothing is held if the future is dropped before.
    pub(crate) async fn take(&self, due: Instant) -> bool {
        let (turn, mut told) = {
            let mut state = self.lock();
            if state.closed {
                return false;
            }
            if state.free > 0 {
                state.free -= 1;
                return true;
            }
            state.came += 1;
            let (turn, (tell, told)) = ((due, state.came), oneshot::channel());
            state.waiting.insert(turn, tell);
            (turn, told)
        };
        let mut waits = Waits { turns: self, turn: Some(turn) };
        let is_given = (&mut told).await.is_ok();
        waits.turn = None;
        is_given
    }

    /// Gives a place back.
    pub(crate) fn leave(&self) {
        let mut state = self.lock();
        while let Some((_, next)) = state.waiting.pop_first() {
            // Who has gone since has left the queue, or passes the place on.
            if next.send(()).is_ok() {
                return;
            }
        }
        state.free += 1;
    }

    /// How long the queue is that the next one joins, himself included; 0: there is a place.
    pub(crate) fn waiting(&self) -> usize {
        let state = self.lock();
        if state.free > 0 { 0 } else { state.waiting.len() + 1 }
    }

    /// Everybody who waits or comes later gets false.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.waiting.clear();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody in the queue. Dropped before his turn he leaves it; a place that he was just given goes to the next one.
struct Waits<'a> {
    turns: &'a Turns,
    turn: Option<Turn>,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        let Some(turn) = self.turn else { return };
        let waited = {
            let mut state = self.turns.lock();
            state.closed || state.waiting.remove(&turn).is_some()
        };
        if !waited {
            self.turns.leave();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Future, poll_fn};
    use std::pin::{Pin, pin};
    use std::task::Poll;
    use std::time::Duration;

    use super::*;

    async fn poll(taking: Pin<&mut impl Future<Output = bool>>) -> Option<bool> {
        let mut taking = Some(taking);
        poll_fn(move |cx| {
            Poll::Ready(match taking.take().expect("polled once").poll(cx) {
                Poll::Ready(given) => Some(given),
                Poll::Pending => None,
            })
        })
        .await
    }

    /// Whoever is due first goes first, and among equals whoever came first.
    #[tokio::test]
    async fn the_earliest_goes_first() {
        let (turns, now) = (Turns::new(1), Instant::now());
        let due = |ms| now + Duration::from_millis(ms);
        assert!(turns.take(due(9)).await);
        let (mut late, mut soon, mut soon_too) =
            (pin!(turns.take(due(5))), pin!(turns.take(due(2))), pin!(turns.take(due(2))));
        assert_eq!(
            (poll(late.as_mut()).await, poll(soon.as_mut()).await, poll(soon_too.as_mut()).await),
            (None, None, None)
        );
        turns.leave();
        assert_eq!(
            (poll(soon_too.as_mut()).await, poll(late.as_mut()).await, poll(soon.as_mut()).await),
            (None, None, Some(true))
        );
        turns.leave();
        assert_eq!((poll(late.as_mut()).await, poll(soon_too.as_mut()).await), (None, Some(true)));
        turns.leave();
        assert_eq!(poll(late.as_mut()).await, Some(true));
    }

    /// No place is lost with somebody who gives up, before his turn or just after it.
    #[tokio::test]
    async fn who_gives_up_leaves_his_place() {
        let (turns, due) = (Turns::new(1), Instant::now());
        assert!(turns.take(due).await);
        for given in [false, true] {
            let mut waits = Box::pin(turns.take(due));
            assert_eq!(poll(waits.as_mut()).await, None);
            let mut next = Box::pin(turns.take(due));
            assert_eq!(poll(next.as_mut()).await, None);
            if given {
                turns.leave();
                drop(waits);
            } else {
                drop(waits);
                turns.leave();
            }
            assert_eq!(poll(next.as_mut()).await, Some(true));
        }
        turns.leave();
        assert!(turns.take(due).await);
        let mut waits = Box::pin(turns.take(due));
        assert_eq!(poll(waits.as_mut()).await, None);
        turns.close();
        assert_eq!(poll(waits.as_mut()).await, Some(false));
        assert!(!turns.take(due).await);
    }
}
