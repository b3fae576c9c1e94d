//! The engine thread and the handle that tasks submit work by. The thread owns engine and backend, parks while there
//! is nothing to do, and is joined when its owner goes.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use baton_core::{Aborted, Refused};
use baton_engine::{Backend, Cache, Engine, Load, Work};
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

use crate::error::Error;
use crate::inbox::{Admit, Command, Inbox, Key};
use crate::outlet::{Outlet, Phases};
use crate::pace::Pace;
use crate::pulse::Pulse;
use crate::steps::{Published, Steps};

/// How long the step that is being computed may still take when the engine shall end.
const JOIN: Duration = Duration::from_secs(10);

/// Submits work to the engine thread. Clones are the same engine.
#[derive(Clone)]
pub struct EngineHandle {
    inbox: Arc<Inbox>,
    published: Arc<Published>,
    cache: Cache,
    keys: Arc<AtomicU64>,
    /// Changes each time blocks are given back.
    freed: Arc<watch::Sender<()>>,
}

/// Work for the engine, and where its notes go.
pub struct Submission {
    pub work: Work,
    pub outlet: Outlet,
    /// Stands at each of its notes.
    pub tag: u32,
    pub phases: Phases,
    /// When the request reached this worker.
    pub started: Instant,
}

impl EngineHandle {
    /// Queues work. Whether the engine takes it comes as a note.
    pub fn submit(&self, submission: Submission) -> Result<Admission, Refused> {
        let Submission { work, outlet, tag, phases, started } = submission;
        let key = Key(self.keys.fetch_add(1, Ordering::Relaxed));
        let (end, ended) = oneshot::channel();
        self.inbox.admit(Admit { key, work, outlet, tag, phases, started, end })?;
        Ok(Admission { key, ended: Some(ended), inbox: self.inbox.clone() })
    }

    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    pub fn load(&self) -> Load {
        self.published.get().0
    }

    /// Grows while there is work and the engine gets on with it.
    pub(crate) fn progress(&self) -> u64 {
        let load = self.load();
        let has_work = load.running + load.waiting > 0;
        load.steps + self.published.pulse.beats(has_work, Instant::now())
    }

    /// How much longer than it should the engine's step has taken; zero when it gets on.
    pub(crate) fn stuck(&self) -> Duration {
        self.published.pulse.stuck(Instant::now())
    }

    /// Resolves when nobody reads or writes a block any more.
    pub(crate) async fn unread(&self) {
        let mut freed = self.freed.subscribe();
        loop {
            let stats = self.cache.stats();
            if stats.used + stats.in_flight == 0 {
                return;
            }
            if freed.changed().await.is_err() {
                return;
            }
        }
    }

    /// Prompt tokens computed per second lately; 0: unknown.
    pub fn prefill_tokens_per_s(&self) -> u64 {
        self.published.get().1
    }
}

/// A guard on submitted work: dropping it cancels.
#[derive(Debug)]
pub struct Admission {
    key: Key,
    /// None once it has ended.
    ended: Option<oneshot::Receiver<()>>,
    inbox: Arc<Inbox>,
}

impl Admission {
    /// Resolves when the engine holds nothing of the work any more; its last notes have been sent by then.
    /// Waiting may be given up and begun anew.
    pub async fn ended(&mut self) {
        if let Some(ended) = &mut self.ended {
            // The sender is dropped, never used.
            let _ = ended.await;
        }
        self.ended = None;
    }

    /// Ends these choices without a word; the work ends with the last of its choices.
    pub fn cancel_choices(&self, choices: Vec<u32>) {
        self.inbox.push(Command::CancelChoices(self.key, choices));
    }

    /// Ends the work with a note that says why.
    pub fn abort(&self, reason: Aborted) {
        self.inbox.push(Command::Abort(self.key, reason));
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        if self.ended.is_some() {
            self.inbox.push(Command::Cancel(self.key));
        }
    }
}

/// What drives the engine: a thread where steps block, a task where their time is simulated.
enum Driver {
    Thread(JoinHandle<Box<dyn Backend>>),
    Task(tokio::task::JoinHandle<Box<dyn Backend>>),
}

/// Owns the driver; dropping it stops and joins.
pub(crate) struct EngineThread {
    handle: EngineHandle,
    driver: Option<Driver>,
    died: oneshot::Receiver<()>,
}

impl EngineThread {
    /// `canary`: how fast the backend's steps were so far.
    pub(crate) fn start(engine: Engine, mut backend: Box<dyn Backend>, canary: Pace) -> io::Result<EngineThread> {
        let (inbox, published) = (Arc::new(Inbox::default()), Arc::new(Published::default()));
        let handle = EngineHandle {
            inbox: inbox.clone(),
            published: published.clone(),
            cache: engine.cache().clone(),
            keys: Arc::default(),
            freed: Arc::new(watch::Sender::new(())),
        };
        // Blocks that a handoff gives back may be what a waiting sequence needs.
        let (waker, freed) = (Arc::downgrade(&inbox), Arc::downgrade(&handle.freed));
        engine.cache().on_freed(move || {
            if let Some(inbox) = waker.upgrade() {
                inbox.wake();
            }
            if let Some(freed) = freed.upgrade() {
                freed.send_replace(());
            }
        });
        // An engine that computes nothing hears of it as well, so that its worker ends before somebody asks in vain.
        let breaking = Arc::downgrade(&inbox);
        backend.on_broken(Box::new(move || {
            if let Some(inbox) = breaking.upgrade() {
                inbox.push(Command::Break);
            }
        }));
        let (alive, died) = oneshot::channel();
        let alive = Alive { inbox: inbox.clone(), _end: alive };
        let inline = backend.inline_delay(0).is_some();
        let steps = Steps::new(engine, backend, published.clone(), canary);
        let driver = match inline {
            true => Driver::Task(tokio::spawn(async move {
                let _alive = alive;
                drive_inline(steps, &inbox, &published.pulse).await
            })),
            false => Driver::Thread(thread::Builder::new().name("engine".into()).spawn(move || {
                let _alive = alive;
                drive(steps, &inbox, &published.pulse)
            })?),
        };
        Ok(EngineThread { handle, driver: Some(driver), died })
    }

    pub(crate) fn handle(&self) -> &EngineHandle {
        &self.handle
    }

    /// Resolves when the thread has ended without being asked to: it panicked.
    pub(crate) async fn died(&mut self) {
        // The sender is dropped, never used. Once it has, `self.died` stays resolved.
        let _ = (&mut self.died).await;
    }

    /// Ends the thread once its step is computed, and gives the backend back. A thread that is stuck for good is left
    /// to the end of the process, one that panicked has lost its backend.
    pub(crate) async fn finish(mut self) -> Result<Box<dyn Backend>, Error> {
        self.handle.inbox.stop();
        let Some(driver) = self.driver.take() else { return Err(Error::EngineDied) };
        // A task that is stuck is ended, a thread is left to the end of the process.
        let _ended = match &driver {
            Driver::Task(task) => Some(Ended(task.abort_handle())),
            Driver::Thread(_) => None,
        };
        let joining = async {
            match driver {
                Driver::Thread(thread) => tokio::task::spawn_blocking(move || thread.join()).await.ok()?.ok(),
                Driver::Task(task) => task.await.ok(),
            }
        };
        match timeout(JOIN, joining).await {
            Ok(backend) => backend.ok_or(Error::EngineDied),
            Err(_) => Err(Error::EngineStuck),
        }
    }

    fn join(&mut self) {
        self.handle.inbox.stop();
        match self.driver.take() {
            // A panic has been reported by its own message and by `died`.
            Some(Driver::Thread(thread)) => drop(thread.join()),
            Some(Driver::Task(task)) => task.abort(),
            None => {}
        }
    }
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        self.join();
    }
}

/// Ends a task when dropped.
struct Ended(AbortHandle);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Whatever ends the thread, nobody may go on submitting to it.
struct Alive {
    inbox: Arc<Inbox>,
    _end: oneshot::Sender<()>,
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.inbox.stop();
    }
}

/// Until the inbox is stopped; returns the backend.
fn drive(mut steps: Steps, inbox: &Inbox, pulse: &Pulse) -> Box<dyn Backend> {
    let mut busy = true;
    loop {
        if !busy {
            pulse.rest(Instant::now());
        }
        let Some(commands) = (if busy { inbox.take() } else { inbox.wait() }) else { break };
        pulse.begin(Instant::now());
        if !commands.is_empty() {
            steps.apply(commands);
        }
        busy = steps.step();
    }
    pulse.rest(Instant::now());
    steps.into_backend()
}

/// The same as a task: a step is planned, takes its time, and is computed at the end of it.
async fn drive_inline(mut steps: Steps, inbox: &Inbox, pulse: &Pulse) -> Box<dyn Backend> {
    let mut busy = true;
    loop {
        if !busy {
            pulse.rest(Instant::now());
        }
        let Some(commands) = (if busy { inbox.take() } else { inbox.come().await }) else { break };
        pulse.begin(Instant::now());
        if !commands.is_empty() {
            steps.apply(commands);
        }
        busy = steps.step_inline().await;
    }
    pulse.rest(Instant::now());
    steps.into_backend()
}
