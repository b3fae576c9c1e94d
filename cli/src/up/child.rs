//! One child process: its lives, one after another, and what it says.

use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{ChildStderr, ChildStdout, Command};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::cluster_file::Process;
use super::log_file::LogFile;
use super::plan::Plan;
use crate::event::Event;
use crate::process;

/// First wait before a second try, doubled with each further one up to `BACKOFF_MAX`.
const BACKOFF: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A child that has served for so long counts as healthy again: its next death is its first.
const HEALTHY: Duration = Duration::from_secs(10);

/// What the lives report to the supervisor.
#[derive(Debug)]
pub(crate) enum Notice {
    Said { child: usize, event: Event },
    Ended { child: usize, how: String, code: Option<u8> },
}

/// What the supervisor tells a life.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    Terminate,
    Kill,
}

/// Where a child is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Starting,
    Ready,
    Down,
}

impl State {
    fn as_str(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Ready => "ready",
            State::Down => "down",
        }
    }
}

/// One planned process and the life it is living.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) plan: Plan,
    pub(crate) state: State,
    pub(crate) pid: u32,
    pub(crate) address: String,
    metrics: Option<String>,
    /// Processes of its further ranks.
    ranks: Vec<u32>,
    /// (done, total) of the model.
    pub(crate) loaded: (u64, u64),
    /// The reason it gave before it ended.
    pub(crate) failure: Option<String>,
    pub(crate) served: bool,
    /// It has said that it drains: it is not started again when it has ended as it should.
    drained: bool,
    restarts: u32,
    /// Deaths since it was last healthy.
    pub(crate) deaths: u32,
    /// The last death: when, and in words.
    pub(crate) death: Option<(Instant, String)>,
    ready_at: Option<Instant>,
    pub(crate) start_at: Instant,
    /// It waits for others to serve before its first life.
    held: bool,
    orders: Option<mpsc::Sender<Order>>,
    life: Option<JoinHandle<()>>,
}

impl Child {
    pub(crate) fn new(plan: Plan) -> Child {
        Child {
            plan,
            state: State::Down,
            pid: 0,
            address: String::new(),
            metrics: None,
            ranks: Vec::new(),
            loaded: (0, 0),
            failure: None,
            served: false,
            drained: false,
            restarts: 0,
            deaths: 0,
            death: None,
            ready_at: None,
            start_at: Instant::now(),
            held: false,
            orders: None,
            life: None,
        }
    }

    /// Begins a life. Its notices carry `child` as the name.
    pub(crate) fn start(&mut self, child: usize, logs: &Path, notices: mpsc::Sender<Notice>) -> anyhow::Result<()> {
        let log = LogFile::open(&logs.join(format!("{}.log", self.plan.id)))?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(&self.plan.arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        process::bind_to_parent(&mut command);
        let process = command.spawn()?;
        let (orders, inbox) = mpsc::channel(4);
        self.pid = process.id().unwrap_or(0);
        self.state = State::Starting;
        self.failure = None;
        self.orders = Some(orders);
        self.life = Some(tokio::spawn(live(child, process, log, inbox, notices)));
        Ok(())
    }

    pub(crate) fn serves(&mut self, address: String, metrics: Option<String>, ranks: Vec<u32>) {
        self.state = State::Ready;
        self.served = true;
        self.address = address;
        self.metrics = metrics;
        self.ranks = ranks;
        self.ready_at = Some(Instant::now());
    }

    /// A life of the worker in it ends: the process does too after a drain, else it will serve again.
    pub(crate) fn ends_life(&mut self, how: &str) {
        self.state = State::Starting;
        self.drained = how == "drained";
    }

    /// Whether a process that has ended so did what it was to do.
    pub(crate) fn is_dismissed(&self, code: Option<u8>) -> bool {
        self.drained && code == Some(0)
    }

    /// Keeps it from being started, until `release`.
    pub(crate) fn hold(&mut self) {
        self.held = true;
    }

    /// Lets one that was held be started.
    pub(crate) fn release(&mut self) {
        self.held = false;
    }

    /// Whether it is to be started as soon as it may be.
    pub(crate) fn waits(&self) -> bool {
        !self.alive() && !self.held
    }

    /// Notes a death and when the next life may begin.
    pub(crate) fn died(&mut self, how: String) {
        let healthy = self.ready_at.take().is_some_and(|since| since.elapsed() >= HEALTHY);
        self.deaths = if healthy { 1 } else { self.deaths + 1 };
        self.state = State::Down;
        self.drained = false;
        self.restarts += 1;
        self.start_at = Instant::now() + backoff(self.deaths);
        self.death = Some((Instant::now(), format!("{} (pid {}) {how}", self.plan.id, self.pid)));
        self.pid = 0;
        self.address.clear();
        self.metrics = None;
        self.ranks.clear();
        self.orders = None;
    }

    /// Passes an order on; a life that has ended does not mind.
    pub(crate) fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            let _ = orders.try_send(order);
        }
    }

    pub(crate) fn alive(&self) -> bool {
        self.state != State::Down
    }

    /// Its row in the cluster file.
    pub(crate) fn row(&self) -> Process {
        Process {
            role: self.plan.role,
            id: self.plan.id.clone(),
            pid: self.pid,
            address: self.address.clone(),
            metrics: self.metrics.clone(),
            ranks: self.ranks.clone(),
            state: self.state.as_str().to_string(),
            restarts: self.restarts,
        }
    }
}

/// At once after the first death, then doubling.
fn backoff(deaths: u32) -> Duration {
    match deaths {
        0 | 1 => Duration::ZERO,
        n => BACKOFF.saturating_mul(1 << (n - 2).min(16)).min(BACKOFF_MAX),
    }
}

/// One life, from its start until it has ended and all it said is read.
async fn live(
    child: usize,
    mut process: tokio::process::Child,
    log: LogFile,
    mut orders: mpsc::Receiver<Order>,
    notices: mpsc::Sender<Notice>,
) {
    let (stdout, stderr) = (process.stdout.take(), process.stderr.take());
    let end = async {
        loop {
            tokio::select! {
                ended = process.wait() => return ended,
                Some(order) = orders.recv() => match (order, process.id()) {
                    (Order::Terminate, Some(pid)) => process::terminate(pid),
                    (Order::Kill, _) => drop(process.start_kill()),
                    (Order::Terminate, None) => {}
                },
            }
        }
    };
    let (ended, (), ()) = tokio::join!(end, listen(child, stdout, &notices), record(stderr, log));
    let (how, code) = describe(ended);
    let _ = notices.send(Notice::Ended { child, how, code }).await;
}

async fn listen(child: usize, stdout: Option<ChildStdout>, notices: &mpsc::Sender<Notice>) {
    let Some(stdout) = stdout else { return };
    let mut lines = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match serde_json::from_str(&line) {
            Ok(event) => drop(notices.send(Notice::Said { child, event }).await),
            Err(_) => tracing::warn!("not an event: {line}"),
        }
    }
}

async fn record(stderr: Option<ChildStderr>, mut log: LogFile) {
    let Some(mut stderr) = stderr else { return };
    let mut bytes = vec![0; 8 << 10];
    while let Ok(count) = stderr.read(&mut bytes).await {
        if count == 0 {
            return;
        }
        if let Err(error) = log.write(&bytes[..count]) {
            tracing::warn!("a log cannot be written: {error}");
        }
    }
}

/// A death in words, and the exit code if it chose one.
fn describe(ended: std::io::Result<ExitStatus>) -> (String, Option<u8>) {
    use std::os::unix::process::ExitStatusExt;
    match ended {
        Err(error) => (format!("is lost: {error}"), None),
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => (format!("ended with exit code {code}"), Some(code as u8)),
            (None, Some(signal)) => (format!("died of signal {signal}"), None),
            (None, None) => ("ended".to_string(), None),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_is_held_waits_until_it_is_released() {
        let plan = Plan { role: baton_core::Role::Prefill, id: "prefill-0".to_string(), arguments: Vec::new() };
        let mut child = Child::new(plan);
        assert!(child.waits());
        child.hold();
        assert!(!child.waits() && !child.alive());
        child.release();
        assert!(child.waits());
    }

    #[test]
    fn backoff_starts_at_nothing_and_is_bounded() {
        let ms: Vec<_> = [1, 2, 3, 4, 8, 40].map(backoff).iter().map(Duration::as_millis).collect();
        assert_eq!(ms, [0, 100, 200, 400, 5000, 5000]);
    }
}
