//! Commands for the engine thread. Bounded: admissions by `WORKER_QUEUE_MAX`, everything else by the admissions that
//! it follows. A cancellation is therefore never refused, and no sender ever waits.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};

use baton_core::limits::WORKER_QUEUE_MAX;
use baton_core::{Aborted, Refused};
use baton_engine::Work;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::outlet::{Outlet, Phases};

/// One piece of submitted work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key(pub(crate) u64);

pub(crate) enum Command {
    Admit(Box<Admit>),
    /// Nobody waits for the work any more.
    Cancel(Key),
    /// Nobody waits for these choices of the work any more.
    CancelChoices(Key, Vec<u32>),
    /// Ends the work and says why.
    Abort(Key, Aborted),
    /// What the engine computes with is broken for good.
    Break,
}

/// Work on its way into the engine.
pub(crate) struct Admit {
    pub(crate) key: Key,
    pub(crate) work: Work,
    pub(crate) outlet: Outlet,
    pub(crate) tag: u32,
    pub(crate) phases: Phases,
    pub(crate) started: Instant,
    /// Dropped when the engine holds nothing of the work any more.
    pub(crate) end: oneshot::Sender<()>,
}

#[derive(Default)]
struct Queue {
    commands: VecDeque<Command>,
    admits: usize,
    /// Something changed that only the engine can act on, for example blocks became free.
    woken: bool,
    stopped: bool,
}

impl Queue {
    fn is_idle(&self) -> bool {
        !self.stopped && !self.woken && self.commands.is_empty()
    }
}

#[derive(Default)]
pub(crate) struct Inbox {
    queue: Mutex<Queue>,
    /// Wakes an engine that has a thread.
    wake: Condvar,
    /// Wakes an engine that is a task.
    notify: Notify,
}

impl Inbox {
    pub(crate) fn admit(&self, admit: Admit) -> Result<(), Refused> {
        let mut queue = self.lock();
        if queue.stopped {
            return Err(Refused::Draining);
        }
        if queue.admits >= WORKER_QUEUE_MAX {
            return Err(Refused::NoCapacity);
        }
        queue.admits += 1;
        queue.commands.push_back(Command::Admit(Box::new(admit)));
        self.notify();
        Ok(())
    }

    /// Cancels or aborts something that was admitted.
    pub(crate) fn push(&self, command: Command) {
        let mut queue = self.lock();
        if !queue.stopped {
            queue.commands.push_back(command);
            self.notify();
        }
    }

    pub(crate) fn wake(&self) {
        self.lock().woken = true;
        self.notify();
    }

    /// Ends the engine thread and refuses everything from now on.
    pub(crate) fn stop(&self) {
        let refused = {
            let mut queue = self.lock();
            queue.stopped = true;
            std::mem::take(&mut queue.commands)
        };
        self.notify();
        // Dropped without the lock: guards in the work give blocks back, which wakes this inbox.
        drop(refused);
    }

    /// What has come, at once; None after `stop`.
    pub(crate) fn take(&self) -> Option<VecDeque<Command>> {
        taken(&mut self.lock())
    }

    /// What has come, as soon as there is something; None after `stop`.
    pub(crate) fn wait(&self) -> Option<VecDeque<Command>> {
        let idle = |queue: &mut Queue| queue.is_idle();
        let mut queue = self.wake.wait_while(self.lock(), idle).unwrap_or_else(|poisoned| poisoned.into_inner());
        taken(&mut queue)
    }

    /// As `wait`, for an engine that is a task.
    pub(crate) async fn come(&self) -> Option<VecDeque<Command>> {
        loop {
            {
                let mut queue = self.lock();
                if !queue.is_idle() {
                    return taken(&mut queue);
                }
            }
            self.notify.notified().await;
        }
    }

    fn notify(&self) {
        self.wake.notify_one();
        self.notify.notify_one();
    }

    /// A poisoned lock means that a thread panicked between two consistent states; going on is safe.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn taken(queue: &mut Queue) -> Option<VecDeque<Command>> {
    if queue.stopped {
        return None;
    }
    queue.admits = 0;
    queue.woken = false;
    Some(std::mem::take(&mut queue.commands))
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox").field("commands", &self.lock().commands.len()).finish()
    }
}
