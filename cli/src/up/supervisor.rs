//! Starts all children at once, or the prefill workers after the decode workers, starts again those that die, adds and drains workers on demand, and ends them all.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use baton_core::{Clock, Role, SystemClock};
use baton_proto::v1;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::child::{Child, Notice, Order, State};
use super::cluster_file::{self, ClusterFile};
use super::control::{Answer, Ask, Wish};
use super::plan::Topology;
use super::scaling::{self, Scaling};
use super::screen::Screen;
use crate::event::Event;
use crate::exit::{FAILED, Failure, REFUSED};

/// Deaths of a child that has never served, after which starting is given up.
const FIRST_TRIES: u32 = 3;
/// Longest silence of all children while the cluster starts.
const START_SILENCE: Duration = Duration::from_secs(120);
/// What the gateway may still finish, then workers and coordinators, before they are killed.
const GRACE: Duration = Duration::from_secs(4);
const KILL_GRACE: Duration = Duration::from_secs(2);

/// What the supervisor needs to know besides the plans.
#[derive(Clone, Debug)]
pub(crate) struct Cluster {
    pub(crate) data: PathBuf,
    pub(crate) url: String,
    /// `host:port` of the gateway, to ask it whether it serves.
    pub(crate) gateway: String,
    pub(crate) model: String,
}

/// Owns every child.
pub(crate) struct Supervisor {
    cluster: Cluster,
    /// By a number that is never used again.
    children: BTreeMap<usize, Child>,
    notices: mpsc::Receiver<Notice>,
    sender: mpsc::Sender<Notice>,
    screen: Screen,
    stop: Stop,
    topology: Topology,
    wishes: mpsc::Receiver<Wish>,
    scaling: Option<Scaling>,
    /// Orders on their way to the leader, each with the child it is for.
    orders: JoinSet<(usize, Result<(), Failure>)>,
    /// The next child's number.
    next: usize,
    started: Instant,
    started_unix_ms: u64,
}

/// Signals that end the cluster.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Stop {
    fn new() -> std::io::Result<Stop> {
        Ok(Stop {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}

impl Supervisor {
    pub(crate) fn new(
        cluster: Cluster,
        topology: Topology,
        wishes: mpsc::Receiver<Wish>,
        started: Instant,
    ) -> std::io::Result<Supervisor> {
        let mut children: BTreeMap<_, _> = topology.plans().into_iter().map(Child::new).enumerate().collect();
        if topology.decode_first {
            children.values_mut().filter(|child| child.plan.role == Role::Prefill).for_each(Child::hold);
        }
        let (sender, notices) = mpsc::channel(256);
        Ok(Supervisor {
            cluster,
            next: children.len(),
            children,
            notices,
            sender,
            screen: Screen::new(&topology.model),
            stop: Stop::new()?,
            topology,
            wishes,
            scaling: None,
            orders: JoinSet::new(),
            started,
            started_unix_ms: SystemClock.unix_ms(),
        })
    }

    /// Runs the cluster until it is asked to end, or cannot start. Nothing is left running either way.
    pub(crate) async fn run(mut self) -> Result<(), Failure> {
        let outcome = self.serve().await;
        self.screen.clear();
        self.end().await;
        ClusterFile::remove(&self.cluster.data);
        outcome
    }

    async fn serve(&mut self) -> Result<(), Failure> {
        if !self.start().await? {
            return Ok(());
        }
        let rows: Vec<_> = self.children.values().map(Child::row).collect();
        self.screen.announce(&self.cluster, &rows, self.started.elapsed());
        loop {
            let restart_at = self.restart_at();
            tokio::select! {
                () = self.stop.asked() => return Ok(()),
                Some(notice) = self.notices.recv() => self.take(notice),
                Some(wish) = self.wishes.recv() => self.grant(wish),
                Some(Ok((child, ordered))) = self.orders.join_next() => self.ordered(child, ordered),
                () = tokio::time::sleep_until(restart_at) => self.restart_due(),
            }
            self.settle();
        }
    }

    /// Begins what was asked over the control socket, or says why not.
    fn grant(&mut self, wish: Wish) {
        let Ask::Scale { prefill, decode } = wish.ask;
        let refuse = |why: &str| drop(wish.answers.try_send(Answer::Failed(why.to_string())));
        if self.scaling.is_some() {
            return refuse("another change is under way; try again when it is done");
        }
        if prefill.max(decode) > Some(scaling::WORKERS_MAX) || decode == Some(0) {
            return refuse("there may be 0 to 64 prefill workers and 1 to 64 decode workers");
        }
        let mut scaling = Scaling::new(wish.answers);
        for (role, wanted) in [(Role::Prefill, prefill), (Role::Decode, decode)] {
            let Some(wanted) = wanted else { continue };
            let workers = self.children.iter().map(|(child, state)| (*child, &state.plan));
            let change = scaling::change(workers, role, wanted);
            (0..change.add).for_each(|_| self.add(role, &mut scaling));
            change.drain.into_iter().for_each(|child| self.drain(child, &mut scaling));
        }
        self.scaling = Some(scaling);
        self.restart_due();
    }

    fn add(&mut self, role: Role, scaling: &mut Scaling) {
        let plan = self.topology.another(role, self.next);
        scaling.add(self.next, &plan.id);
        self.children.insert(self.next, Child::new(plan));
        self.next += 1;
    }

    /// A worker that serves is ordered to drain; one that does not yet has nothing to drain.
    fn drain(&mut self, index: usize, scaling: &mut Scaling) {
        let coordinators = self.coordinators();
        let Some(child) = self.children.get(&index) else { return };
        let worker = child.plan.id.clone();
        match child.state {
            State::Down => drop(self.children.remove(&index)),
            State::Starting => {
                scaling.drain(index, &worker);
                child.order(Order::Terminate);
            }
            State::Ready => {
                scaling.drain(index, &worker);
                let order = async move { (index, crate::order::order(&coordinators, &worker, v1::Order::Drain).await) };
                self.orders.spawn(order);
            }
        }
    }

    fn coordinators(&self) -> Vec<String> {
        let coordinators = self.children.values().filter(|child| child.plan.role == Role::Coordinator);
        coordinators.filter(|child| !child.address.is_empty()).map(|child| child.address.clone()).collect()
    }

    fn ordered(&mut self, index: usize, ordered: Result<(), Failure>) {
        let (Err(why), Some(child), Some(scaling)) = (ordered, self.children.get(&index), &mut self.scaling) else {
            return;
        };
        scaling.fail(index, format!("{} cannot be ordered to drain: {why}", child.plan.id));
    }

    /// Tells whoever asked for a change that it is done.
    fn settle(&mut self) {
        let Some(scaling) = self.scaling.take_if(|scaling| scaling.is_over()) else { return };
        let count = |role| self.children.values().filter(|child| child.plan.role == role).count();
        scaling.finish(&format!("{} prefill, {} decode", count(Role::Prefill), count(Role::Decode)));
    }

    /// Until every child serves and the gateway says so. False if asked to end before.
    async fn start(&mut self) -> Result<bool, Failure> {
        self.restart_due();
        let mut heard = Instant::now();
        while !self.children.values().all(|child| child.state == State::Ready) {
            let restart_at = self.restart_at();
            tokio::select! {
                () = self.stop.asked() => return Ok(false),
                Some(notice) = self.notices.recv() => {
                    heard = Instant::now();
                    self.give_up(&notice)?;
                    self.take(notice);
                    self.release();
                }
                () = tokio::time::sleep_until(restart_at) => self.restart_due(),
                () = tokio::time::sleep_until(heard + START_SILENCE) => return Err(self.silent()),
            }
        }
        let (gateway, model) = (self.cluster.gateway.clone(), self.cluster.model.clone());
        let mut health = pin!(super::health::wait(&gateway, &model));
        loop {
            let restart_at = self.restart_at();
            tokio::select! {
                () = self.stop.asked() => return Ok(false),
                healthy = &mut health => return healthy.map(|()| true),
                // Whoever dies meanwhile serves again, or the cluster would never be healthy.
                Some(notice) = self.notices.recv() => {
                    self.give_up(&notice)?;
                    self.take(notice);
                }
                () = tokio::time::sleep_until(restart_at) => self.restart_due(),
            }
        }
    }

    /// Lets the children be started that were to wait for the decode workers, once all of these serve.
    fn release(&mut self) {
        let decode = self.children.values().filter(|child| child.plan.role == Role::Decode).all(|child| child.served);
        if decode {
            self.children.values_mut().for_each(Child::release);
        }
    }

    fn silent(&self) -> Failure {
        let late: Vec<_> =
            self.children.values().filter(|c| c.state != State::Ready).map(|c| c.plan.id.as_str()).collect();
        let logs = self.logs();
        let silence = START_SILENCE.as_secs();
        anyhow::anyhow!("{} said nothing for {silence} s while starting; see {}", late.join(", "), logs.display())
            .into()
    }

    /// A child that refuses to start, or keeps dying before it has ever served, ends the start.
    fn give_up(&self, notice: &Notice) -> Result<(), Failure> {
        let Notice::Ended { child, how, code } = notice else { return Ok(()) };
        let Some(child) = self.children.get(child) else { return Ok(()) };
        let refused = *code == Some(REFUSED);
        if child.served || !(refused || child.deaths + 1 >= FIRST_TRIES) {
            return Ok(());
        }
        let id = &child.plan.id;
        let logs = self.logs().join(format!("{id}.log"));
        let error = match &child.failure {
            Some(message) => anyhow::anyhow!("{id}: {message}"),
            None => anyhow::anyhow!("{id} {how} before it served; see {}", logs.display()),
        };
        Err(Failure { code: if refused { REFUSED } else { FAILED }, error })
    }

    fn logs(&self) -> PathBuf {
        self.cluster.data.join("logs")
    }

    fn take(&mut self, notice: Notice) {
        match notice {
            Notice::Said { child, event } => self.hear(child, event),
            Notice::Ended { child, how, code } => self.bury(child, how, code),
        }
    }

    fn hear(&mut self, index: usize, event: Event) {
        let Some(child) = self.children.get_mut(&index) else { return };
        match event {
            Event::Loading { done, total } => {
                child.loaded = (done, total);
                let sums = self.children.values().fold((0, 0), |sum, c| (sum.0 + c.loaded.0, sum.1 + c.loaded.1));
                self.screen.loading(sums.0, sums.1);
            }
            Event::Ready { role, address, metrics, ranks, .. } => {
                if role != child.plan.role {
                    self.screen.note(&format!("{} (pid {}) serves as {role} now", child.plan.id, child.pid));
                    child.plan.take_role(role);
                }
                child.serves(address, metrics, ranks);
                if let Some(scaling) = &mut self.scaling {
                    scaling.serves(index, &child.plan.id, &child.address);
                }
                if let Some((died, words)) = child.death.take() {
                    let line = format!("{words}; restarted as pid {} in {} ms", child.pid, died.elapsed().as_millis());
                    self.screen.note(&line);
                }
                self.write();
            }
            Event::LifeEnds { how } => {
                self.screen.note(&format!("{} (pid {}) ends this life: {how}", child.plan.id, child.pid));
                child.ends_life(&how);
                self.write();
            }
            Event::Failed { message, .. } => child.failure = Some(message),
        }
    }

    fn bury(&mut self, index: usize, how: String, code: Option<u8>) {
        let Some(child) = self.children.get_mut(&index) else { return };
        if child.is_dismissed(code) || self.scaling.as_ref().is_some_and(|scaling| scaling.drains(index)) {
            let id = child.plan.id.clone();
            self.screen.note(&format!("{id} (pid {}) {how} and is gone", child.pid));
            self.children.remove(&index);
            self.scaling.iter_mut().for_each(|scaling| scaling.gone(index, &id));
            return self.write();
        }
        if let Some(scaling) = self.scaling.as_mut().filter(|scaling| scaling.adds(index))
            && (code == Some(REFUSED) || child.deaths + 1 >= FIRST_TRIES)
        {
            let why = child.failure.clone().unwrap_or(how);
            scaling.fail(index, format!("{} cannot be started: {why}", child.plan.id));
            self.children.remove(&index);
            return self.write();
        }
        let before_ready = child.state == State::Starting;
        child.died(how);
        if before_ready && let Some((_, words)) = &child.death {
            let why = child.failure.as_ref().map_or(String::new(), |why| format!(" ({why})"));
            let wait = child.start_at.saturating_duration_since(Instant::now()).as_millis();
            self.screen.note(&format!("{words} while starting{why}; next try in {wait} ms"));
        }
        self.restart_due();
        self.write();
    }

    /// When the next child is to be started; far away when all run.
    fn restart_at(&self) -> Instant {
        let waiting = self.children.values().filter(|child| child.waits()).map(|child| child.start_at);
        waiting.min().unwrap_or_else(|| Instant::now() + Duration::from_secs(3600))
    }

    fn restart_due(&mut self) {
        let (now, logs) = (Instant::now(), self.logs());
        for (index, child) in &mut self.children {
            if !child.waits() || child.start_at > now {
                continue;
            }
            if let Err(error) = child.start(*index, &logs, self.sender.clone()) {
                child.died(format!("cannot be started: {error:#}"));
            }
        }
        self.write();
    }

    fn write(&self) {
        let pid = std::process::id();
        let file = ClusterFile {
            pid,
            pid_started: cluster_file::process_started(pid),
            url: self.cluster.url.clone(),
            model: self.cluster.model.clone(),
            started_unix_ms: self.started_unix_ms,
            processes: self.children.values().map(Child::row).collect(),
        };
        if let Err(error) = file.write(&self.cluster.data) {
            tracing::warn!("the cluster file cannot be written: {error}");
        }
    }

    /// Gateway, then workers, then coordinators, so that what runs can end well; kills what does not end, and what is
    /// left when asked a second time.
    async fn end(&mut self) {
        let deadline = Instant::now() + GRACE;
        let order: [&[Role]; 3] = [&[Role::Gateway], &[Role::Prefill, Role::Decode], &[Role::Coordinator]];
        for roles in order {
            for child in self.children.values().filter(|child| roles.contains(&child.plan.role)) {
                child.order(Order::Terminate);
            }
            if !self.gone_by(deadline, roles).await {
                break;
            }
        }
        let all = [Role::Gateway, Role::Prefill, Role::Decode, Role::Coordinator];
        for child in self.children.values().filter(|child| child.alive()) {
            child.order(Order::Kill);
        }
        self.gone_by(Instant::now() + KILL_GRACE, &all).await;
    }

    /// Waits until no child of these roles lives. False when the time is up or the person is impatient.
    async fn gone_by(&mut self, deadline: Instant, roles: &[Role]) -> bool {
        while self.children.values().any(|child| child.alive() && roles.contains(&child.plan.role)) {
            tokio::select! {
                () = self.stop.asked() => return false,
                () = tokio::time::sleep_until(deadline) => return false,
                Some(notice) = self.notices.recv() => {
                    if let Notice::Ended { child, how, .. } = notice
                        && let Some(child) = self.children.get_mut(&child)
                    {
                        child.died(how);
                    }
                }
            }
        }
        true
    }
}
