//! What the cluster last said about this life of the worker: whether it goes on, what it is ordered to do, and who the
//! coordinators are.

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use baton_core::Role;
use baton_core::limits::COORDINATORS_MAX;
use baton_proto::v1;
use baton_proto::v1::HeartbeatAccepted;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// Why a life of a worker ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It was ordered to drain: it finishes or gives back what runs, leaves, and the process ends.
    Drained,
    /// The same, and then the process serves the other role with the weights it has.
    Becomes(Role),
    /// The cluster has ended it for its silence. It drops everything; the process may begin a new life.
    Fenced,
    /// No coordinator has answered for longer than the grace: likewise.
    Alone,
}

impl Ending {
    /// The word used in metrics and events.
    pub fn as_str(self) -> &'static str {
        match self {
            Ending::Drained => "drained",
            Ending::Becomes(_) => "becomes",
            Ending::Fenced => "fenced",
            Ending::Alone => "alone",
        }
    }
}

#[derive(Debug)]
pub(crate) struct Standing {
    answered: Mutex<Instant>,
    /// True once another process has this worker's name.
    superseded: watch::Sender<bool>,
    /// The first order that is not to serve, or the end that the cluster has put to this life. Stays.
    ending: watch::Sender<Option<Ending>>,
    draining: watch::Sender<bool>,
    coordinators: watch::Sender<Vec<String>>,
}

impl Standing {
    pub(crate) fn new(coordinators: Vec<String>) -> Standing {
        Standing {
            answered: Mutex::new(Instant::now()),
            superseded: watch::Sender::new(false),
            ending: watch::Sender::new(None),
            draining: watch::Sender::new(false),
            coordinators: watch::Sender::new(coordinators),
        }
    }

    /// How long no coordinator has answered.
    pub(crate) fn silence(&self) -> Duration {
        self.lock().elapsed()
    }

    /// Resolves when no coordinator has answered for `grace`.
    pub(crate) async fn alone(&self, grace: Duration) {
        loop {
            let until = *self.lock() + grace;
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }

    pub(crate) fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    pub(crate) fn drain(&self) {
        self.draining.send_replace(true);
    }

    pub(crate) fn supersede(&self) {
        self.superseded.send_replace(true);
    }

    /// Resolves when another process has this worker's name.
    pub(crate) async fn superseded(&self) {
        let mut superseded = self.superseded.subscribe();
        // The sender lives as long as `self`.
        let _ = superseded.wait_for(|superseded| *superseded).await;
    }

    pub(crate) fn fence(&self) {
        self.ending.send_replace(Some(Ending::Fenced));
    }

    /// Resolves when the cluster wants this life to end.
    pub(crate) async fn ending(&self) -> Ending {
        let mut ending = self.ending.subscribe();
        let wanted = ending.wait_for(Option::is_some).await.ok().and_then(|ending| *ending);
        wanted.unwrap_or(Ending::Fenced)
    }

    /// Resolves when the cluster has ended this life, whatever was ordered before.
    pub(crate) async fn over(&self) {
        let mut ending = self.ending.subscribe();
        let fenced = ending.wait_for(|ending| *ending == Some(Ending::Fenced));
        tokio::select! {
            _ = fenced => {}
            () = self.superseded() => {}
        }
    }

    pub(crate) fn coordinators(&self) -> watch::Receiver<Vec<String>> {
        self.coordinators.subscribe()
    }

    /// Takes in a coordinator's answer. Orders and lists count when the leader says them: a follower may be behind.
    pub(crate) fn hear(&self, accepted: &HeartbeatAccepted, role: Role) {
        *self.lock() = Instant::now();
        if !accepted.leader {
            return;
        }
        if let Some(ending) = ordered(accepted.order(), role) {
            self.ending.send_if_modified(|known| known.is_none() && known.replace(ending).is_none());
        }
        self.follow(&accepted.coordinators);
    }

    fn follow(&self, list: &[String]) {
        if list.is_empty() {
            return;
        }
        let mut list: Vec<String> = list.iter().take(COORDINATORS_MAX).cloned().collect();
        list.sort_unstable();
        list.dedup();
        self.coordinators.send_if_modified(|known| {
            let changed = *known != list;
            *known = list;
            changed
        });
    }

    fn lock(&self) -> MutexGuard<'_, Instant> {
        self.answered.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// How an order ends the life of a worker in `role`; None: it goes on.
fn ordered(order: v1::Order, role: Role) -> Option<Ending> {
    let becomes = |other| (other != role).then_some(Ending::Becomes(other));
    match order {
        v1::Order::Serve => None,
        v1::Order::Drain => Some(Ending::Drained),
        v1::Order::BecomePrefill => becomes(Role::Prefill),
        v1::Order::BecomeDecode => becomes(Role::Decode),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(leader: bool, order: v1::Order, coordinators: &[&str]) -> HeartbeatAccepted {
        let coordinators = coordinators.iter().map(|address| address.to_string()).collect();
        HeartbeatAccepted { leader, order: order.into(), coordinators, ..HeartbeatAccepted::default() }
    }

    #[test]
    fn only_the_leader_orders_and_the_first_order_stays() {
        let standing = Standing::new(vec!["a:1".into()]);
        let ending = || *standing.ending.borrow();
        standing.hear(&answer(false, v1::Order::Drain, &["b:1"]), Role::Decode);
        standing.hear(&answer(true, v1::Order::BecomeDecode, &[]), Role::Decode);
        assert_eq!((ending(), standing.coordinators().borrow().clone()), (None, vec!["a:1".to_string()]));
        standing.hear(&answer(true, v1::Order::BecomePrefill, &["c:1", "b:1", "b:1"]), Role::Decode);
        standing.hear(&answer(true, v1::Order::Drain, &[]), Role::Decode);
        assert_eq!(ending(), Some(Ending::Becomes(Role::Prefill)));
        assert_eq!(*standing.coordinators().borrow(), ["b:1", "c:1"]);
        standing.fence();
        assert_eq!(ending(), Some(Ending::Fenced));
    }

    /// Time is paused and moves only when everything waits.
    #[tokio::test(start_paused = true)]
    async fn a_worker_is_alone_once_nobody_has_answered_for_the_grace() {
        let grace = Duration::from_secs(30);
        let standing = Standing::new(Vec::new());
        let started = Instant::now();
        tokio::time::advance(Duration::from_secs(29)).await;
        assert!(tokio::time::timeout(Duration::from_millis(1), standing.alone(grace)).await.is_err());
        standing.hear(&answer(false, v1::Order::Serve, &[]), Role::Decode);
        standing.alone(grace).await;
        assert!(started.elapsed() >= Duration::from_secs(59), "{:?}", started.elapsed());
    }
}
