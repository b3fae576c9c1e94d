//! `baton status`: processes from the cluster file of `baton up`, everything else from a coordinator's view.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use baton_core::Role;
use baton_proto::v1::coordinator_client::CoordinatorClient;
use baton_proto::v1::{ClusterView, CoordinatorNode, Load, Member, MemberView, Order, PairView, WatchRequest};
use baton_proto::{TcpNet, channel};
use clap::Args;
use serde::Serialize;

use crate::exit::Failure;
use crate::out::{say, sayln};
use crate::table;
use crate::up::cluster_file::{ClusterFile, Process};

/// Longest wait for one coordinator's view.
const VIEW_TIMEOUT: Duration = Duration::from_secs(2);

/// Show every process, worker, pool and broken pair of a cluster, and its requests.
///
/// Reads the data directory of a `baton up` on this machine, or asks any coordinator with --coordinator.
#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes:\n  0  the cluster answered\n  1  processes are there, but no coordinator answered\n  2  there is no cluster"
)]
pub(crate) struct StatusFlags {
    /// Print one JSON object: processes, workers, pools, pairs, leader, headroom, requests_open, requests_queued
    #[arg(long)]
    json: bool,
    /// Data directory of the `baton up` to show [default: $HOME/.baton]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Ask this coordinator instead of looking for a `baton up` on this machine
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "data")]
    coordinator: Option<String>,
}

pub(crate) fn run(flags: StatusFlags) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(show(flags))
}

async fn show(flags: StatusFlags) -> Result<(), Failure> {
    let (file, coordinators) = match &flags.coordinator {
        Some(address) => (None, vec![address.clone()]),
        None => {
            let file = read(&flags.data.clone().unwrap_or_else(crate::surroundings::default_data))?;
            let coordinators = file.addresses(Role::Coordinator);
            (Some(file), coordinators)
        }
    };
    let (view, storages) = match view(&coordinators).await {
        Some(view) => {
            let (view, storages) = with_others(view).await;
            (Some(view), storages)
        }
        None => (None, Vec::new()),
    };
    if view.is_none() && file.is_none() {
        return Err(Failure::refuse(format!("no coordinator answers at {}", coordinators.join(", "))));
    }
    let answered = view.is_some();
    let status = Status { storages, ..Status::new(file, view.unwrap_or_default()) };
    match flags.json {
        true => sayln!("{}", serde_json::to_string(&status)?),
        false => say!("{}", status.text()),
    }
    match answered {
        true => Ok(()),
        false => Err(anyhow::anyhow!("no coordinator answers; what is shown comes from the cluster file").into()),
    }
}

/// The cluster that a `baton up` runs on a data directory.
pub(crate) fn read(data: &Path) -> Result<ClusterFile, Failure> {
    let nobody =
        || format!("no cluster runs on {}; start one with `baton up`, or name its --data directory", data.display());
    let file = ClusterFile::read(data).map_err(|error| Failure::refuse(format!("{} ({error})", nobody())))?;
    match file.runs() {
        true => Ok(file),
        false => Err(Failure::refuse(nobody())),
    }
}

/// The first coordinator's view that knows a leader; else the first that can be had.
async fn view(coordinators: &[String]) -> Option<ClusterView> {
    let mut leaderless = None;
    for address in coordinators {
        let asked = tokio::time::timeout(VIEW_TIMEOUT, watch_once(address)).await;
        match asked {
            Ok(Ok(view)) if view.leader != 0 => return Some(view),
            Ok(Ok(view)) => drop(leaderless.get_or_insert(view)),
            Ok(Err(error)) => tracing::debug!(address, "no view: {error:#}"),
            Err(_) => tracing::debug!(address, "no view in time"),
        }
    }
    leaderless
}

/// The view with what each of the other coordinators says of itself: its process and its storage.
async fn with_others(mut view: ClusterView) -> (ClusterView, Vec<Storage>) {
    let own = Storage { node: view.node, storage: view.storage.clone() };
    let ask = |node: CoordinatorNode| async move {
        if node.id == view.node {
            return (node, None);
        }
        let asked = tokio::time::timeout(VIEW_TIMEOUT, watch_once(&node.address)).await;
        let said = asked.ok().and_then(Result::ok).filter(|said| said.node == node.id);
        let storage = said.as_ref().map(|said| Storage { node: node.id, storage: said.storage.clone() });
        let themselves = said.and_then(|said| said.coordinators.into_iter().find(|n| n.id == node.id && n.pid != 0));
        let told = |said: CoordinatorNode| CoordinatorNode { pid: said.pid, version: said.version, ..node.clone() };
        (themselves.map_or(node.clone(), told), storage)
    };
    let asked = futures::future::join_all(std::mem::take(&mut view.coordinators).into_iter().map(ask)).await;
    let (coordinators, others): (_, Vec<_>) = asked.into_iter().unzip();
    view.coordinators = coordinators;
    let mut storages: Vec<Storage> = std::iter::once(own).chain(others.into_iter().flatten()).collect();
    storages.sort_by_key(|storage| storage.node);
    (view, storages)
}

/// What a coordinator says of its own disk: ok, full.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Storage {
    node: u64,
    storage: String,
}

async fn watch_once(address: &str) -> anyhow::Result<ClusterView> {
    let channel = channel(Arc::new(TcpNet), address)?;
    let mut views = CoordinatorClient::new(channel).watch(WatchRequest::default()).await?.into_inner();
    views.message().await?.ok_or_else(|| anyhow::anyhow!("the coordinator ended the watch"))
}

/// Everything that is shown.
#[derive(Debug, Serialize)]
struct Status {
    url: Option<String>,
    model: Option<String>,
    processes: Vec<ProcessRow>,
    workers: Vec<WorkerRow>,
    pools: Vec<Pool>,
    /// Id of the coordinator node that leads; null when nobody does.
    leader: Option<u64>,
    requests_open: u64,
    /// Waiting at the leader for a worker.
    requests_queued: u64,
    ledger_index: u64,
    pairs: Vec<PairRow>,
    /// Whether each pool could lose its largest worker, in one line.
    headroom: String,
    /// Of the coordinator that answered: ok, full.
    storage: String,
    /// Of every coordinator that answers.
    storages: Vec<Storage>,
    /// Since the last canary came back; null before the first.
    canary_age_ms: Option<u64>,
    /// Decode workers there are, and none of them works.
    broken: bool,
}

/// A prefill worker and a decode worker, by the last canary or handoff between them.
#[derive(Debug, Serialize)]
struct PairRow {
    /// Null: the decode worker by itself.
    prefill: Option<String>,
    decode: String,
    /// unknown, good or broken.
    state: String,
    reason: String,
    since_ms: u64,
    seen_ms: u64,
}

impl PairRow {
    fn of(pair: PairView) -> PairRow {
        PairRow {
            prefill: (!pair.prefill.is_empty()).then_some(pair.prefill),
            decode: pair.decode,
            state: pair.state,
            reason: pair.reason,
            since_ms: pair.since_ms,
            seen_ms: pair.seen_ms,
        }
    }
}

#[derive(Debug, Serialize)]
struct ProcessRow {
    role: String,
    id: String,
    pid: u32,
    address: String,
    metrics: Option<String>,
    /// starting, ready or down; for ranks what their worker is; for processes seen only by the coordinator: live or silent.
    state: String,
    restarts: u32,
    resident_bytes: Option<u64>,
}

#[derive(Debug, Default, Serialize)]
struct WorkerRow {
    id: String,
    role: String,
    model: String,
    address: String,
    incarnation: u64,
    live: bool,
    silent_ms: u64,
    draining: bool,
    /// What the ledger wants of it: serve, drain, become_prefill or become_decode.
    order: String,
    /// Why it takes no requests although it is live; empty: it does.
    trouble: String,
    /// Its handoffs by link, and why not by a better one; empty: none yet.
    links: String,
    #[serde(flatten)]
    work: Work,
}

/// What a worker, or a pool of them, holds and does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
struct Work {
    blocks_total: u64,
    blocks_free: u64,
    blocks_cached: u64,
    blocks_used: u64,
    blocks_in_flight: u64,
    sequences_running: u64,
    sequences_waiting: u64,
    tokens_waiting: u64,
    steps: u64,
}

impl Work {
    fn of(load: &Load) -> Work {
        Work {
            blocks_total: load.blocks_total,
            blocks_free: load.blocks_free,
            blocks_cached: load.blocks_cached,
            blocks_used: load.blocks_used,
            blocks_in_flight: load.blocks_in_flight,
            sequences_running: load.sequences_running.into(),
            sequences_waiting: load.sequences_waiting.into(),
            tokens_waiting: load.tokens_waiting,
            steps: load.steps,
        }
    }

    fn add(&mut self, other: &Work) {
        self.blocks_total += other.blocks_total;
        self.blocks_free += other.blocks_free;
        self.blocks_cached += other.blocks_cached;
        self.blocks_used += other.blocks_used;
        self.blocks_in_flight += other.blocks_in_flight;
        self.sequences_running += other.sequences_running;
        self.sequences_waiting += other.sequences_waiting;
        self.tokens_waiting += other.tokens_waiting;
        self.steps += other.steps;
    }
}

/// The workers of one role and one model.
#[derive(Debug, Serialize)]
struct Pool {
    role: String,
    model: String,
    workers: usize,
    live: usize,
    #[serde(flatten)]
    work: Work,
}

fn role_word(member: &Member) -> String {
    Role::try_from(member.role()).map_or("unknown".to_string(), |role| role.to_string())
}

fn order_word(order: Order) -> &'static str {
    match order {
        Order::Serve => "serve",
        Order::Drain => "drain",
        Order::BecomePrefill => "become_prefill",
        Order::BecomeDecode => "become_decode",
    }
}

impl WorkerRow {
    /// What it does, in a few words.
    fn state(&self) -> String {
        match () {
            () if !self.live => format!("silent for {} ms", self.silent_ms),
            () if self.order != "serve" => format!("{} ordered", self.order.replace('_', " ")),
            () if self.draining => "draining".to_string(),
            () if !self.trouble.is_empty() => self.trouble.clone(),
            () => "live".to_string(),
        }
    }

    fn of(view: &MemberView) -> Option<WorkerRow> {
        let member = view.member.as_ref()?;
        let worker = matches!(Role::try_from(member.role()), Ok(Role::Prefill | Role::Decode));
        worker.then(|| WorkerRow {
            id: member.id.clone(),
            role: role_word(member),
            model: member.model.as_ref().map_or(String::new(), |model| model.name.clone()),
            address: member.address.clone(),
            incarnation: member.incarnation,
            live: view.live,
            silent_ms: view.silent_ms,
            draining: view.load.as_ref().is_some_and(|load| load.draining),
            order: order_word(view.order()).into(),
            trouble: view.trouble.clone(),
            links: view.load.as_ref().map(|load| load.links.clone()).unwrap_or_default(),
            work: view.load.as_ref().map(Work::of).unwrap_or_default(),
        })
    }
}

impl ProcessRow {
    /// The process itself, then those of its further ranks, which serve at its address.
    fn of_file(process: Process) -> Vec<ProcessRow> {
        let rank = |(index, pid): (usize, &u32)| ProcessRow {
            role: "rank".into(),
            id: format!("{}/rank-{}", process.id, index + 1),
            pid: *pid,
            address: process.address.clone(),
            metrics: None,
            state: process.state.clone(),
            restarts: process.restarts,
            resident_bytes: crate::surroundings::resident(*pid),
        };
        let ranks: Vec<ProcessRow> = process.ranks.iter().enumerate().map(rank).collect();
        let own = ProcessRow {
            role: process.role.to_string(),
            resident_bytes: crate::surroundings::resident(process.pid),
            id: process.id,
            pid: process.pid,
            address: process.address,
            metrics: process.metrics,
            state: process.state,
            restarts: process.restarts,
        };
        std::iter::once(own).chain(ranks).collect()
    }

    fn of_member(view: &MemberView) -> Option<ProcessRow> {
        let member = view.member.as_ref()?;
        Some(ProcessRow::seen(role_word(member), member.id.clone(), member.pid, member.address.clone(), view.live))
    }

    fn seen(role: String, id: String, pid: u32, address: String, live: bool) -> ProcessRow {
        let state = if live { "live" } else { "silent" }.to_string();
        ProcessRow { role, id, pid, address, metrics: None, state, restarts: 0, resident_bytes: None }
    }
}

impl Status {
    fn new(file: Option<ClusterFile>, view: ClusterView) -> Status {
        let (url, model) = (file.as_ref().map(|f| f.url.clone()), file.as_ref().map(|f| f.model.clone()));
        let processes = match file {
            Some(file) => file.processes.into_iter().flat_map(ProcessRow::of_file).collect(),
            None => seen_by_coordinator(&view),
        };
        let workers: Vec<_> = view.members.iter().filter_map(WorkerRow::of).collect();
        Status {
            url,
            model,
            processes,
            pools: pools(&workers),
            workers,
            leader: (view.leader != 0).then_some(view.leader),
            requests_open: view.requests_open,
            requests_queued: view.requests_queued,
            ledger_index: view.ledger_index,
            pairs: view.pairs.into_iter().map(PairRow::of).collect(),
            headroom: view.headroom,
            storages: vec![Storage { node: view.node, storage: view.storage.clone() }],
            storage: view.storage,
            canary_age_ms: view.canary_age_ms,
            broken: view.broken,
        }
    }

    fn text(&self) -> String {
        let mut text = self.processes_text() + "\n" + &self.workers_text() + "\n" + &self.pools_text();
        let leader = self.leader.map_or("nobody leads".to_string(), |id| format!("coordinator {id} leads"));
        let (open, queued, index) = (self.requests_open, self.requests_queued, self.ledger_index);
        text += &format!("\n{leader}; {open} requests open, {queued} queued; ledger at {index}\n");
        text += &self.health_text();
        if let Some(url) = &self.url {
            text += &format!("API: {url}/v1\n");
        }
        text
    }

    /// What an operator should know before anything breaks, and what has.
    fn health_text(&self) -> String {
        let sent = self.workers.iter().filter(|worker| !worker.links.is_empty());
        let mut lines: Vec<String> =
            sent.map(|worker| format!("handoffs by {}: {}", worker.id, worker.links)).collect();
        if !self.headroom.is_empty() {
            lines.push(format!("headroom: {}", self.headroom));
        }
        let troubled = self.storages.iter().filter(|said| !matches!(said.storage.as_str(), "" | "ok"));
        lines.extend(troubled.map(|said| format!("storage of coordinator {}: {}", said.node, said.storage)));
        if let Some(ms) = self.canary_age_ms {
            let good = self.pairs.iter().filter(|pair| pair.state == "good").count();
            lines.push(format!("canary: the last one {ms} ms ago, {good} of {} pairs good", self.pairs.len()));
        }
        let broken = self.pairs.iter().filter(|pair| pair.state == "broken");
        lines.extend(broken.map(|pair| {
            let prefill = pair.prefill.as_deref().unwrap_or("(by itself)");
            format!("broken for {} ms: {prefill} {}: {}", pair.since_ms, pair.decode, pair.reason)
        }));
        if self.broken {
            lines.push("no decode worker works: requests are refused".into());
        }
        lines.iter().map(|line| format!("{line}\n")).collect()
    }

    fn processes_text(&self) -> String {
        let mib = |bytes: Option<u64>| bytes.map_or("-".to_string(), |b| format!("{:.0}", b as f64 / (1 << 20) as f64));
        let row = |p: &ProcessRow| {
            let (pid, restarts) = (p.pid.to_string(), p.restarts.to_string());
            vec![p.role.clone(), p.id.clone(), pid, p.address.clone(), p.state.clone(), restarts, mib(p.resident_bytes)]
        };
        let rows: Vec<_> = self.processes.iter().map(row).collect();
        table::render(&["ROLE", "ID", "PID", "ADDRESS", "STATE", "RESTARTS", "MIB"], &rows)
    }

    fn workers_text(&self) -> String {
        let row = |w: &WorkerRow| {
            let mut cells = vec![w.id.clone(), w.model.clone(), w.state()];
            cells.extend(work_cells(&w.work));
            cells
        };
        let rows: Vec<_> = self.workers.iter().map(row).collect();
        table::render(&[&["WORKER", "MODEL", "STATE"], WORK_HEAD].concat(), &rows)
    }

    fn pools_text(&self) -> String {
        let row = |p: &Pool| {
            let mut cells = vec![p.role.clone(), p.model.clone(), format!("{} of {}", p.live, p.workers)];
            cells.extend(work_cells(&p.work));
            cells
        };
        let rows: Vec<_> = self.pools.iter().map(row).collect();
        table::render(&[&["POOL", "MODEL", "LIVE"], WORK_HEAD].concat(), &rows)
    }
}

const WORK_HEAD: &[&str] = &["BLOCKS", "FREE", "CACHED", "USED", "IN FLIGHT", "RUNNING", "WAITING"];

fn work_cells(work: &Work) -> [String; 7] {
    let Work { blocks_total, blocks_free, blocks_cached, blocks_used, blocks_in_flight, .. } = work;
    [
        blocks_total,
        blocks_free,
        blocks_cached,
        blocks_used,
        blocks_in_flight,
        &work.sequences_running,
        &work.sequences_waiting,
    ]
    .map(u64::to_string)
}

fn seen_by_coordinator(view: &ClusterView) -> Vec<ProcessRow> {
    let coordinators = view.coordinators.iter().map(|node| {
        let id = format!("coordinator-{}", node.id);
        ProcessRow::seen(Role::Coordinator.to_string(), id, node.pid, node.address.clone(), true)
    });
    coordinators.chain(view.members.iter().filter_map(ProcessRow::of_member)).collect()
}

fn pools(workers: &[WorkerRow]) -> Vec<Pool> {
    let mut pools: Vec<Pool> = Vec::new();
    for worker in workers {
        let at = pools.iter().position(|p| p.role == worker.role && p.model == worker.model).unwrap_or_else(|| {
            let (role, model) = (worker.role.clone(), worker.model.clone());
            pools.push(Pool { role, model, workers: 0, live: 0, work: Work::default() });
            pools.len() - 1
        });
        let pool = &mut pools[at];
        pool.workers += 1;
        if worker.live {
            pool.live += 1;
            pool.work.add(&worker.work);
        }
    }
    pools
}

#[cfg(test)]
mod tests {
    use baton_proto::v1;

    use super::*;

    fn member(id: &str, role: v1::Role, live: bool, free: u64) -> MemberView {
        let member = Member { id: id.into(), role: role.into(), pid: 7, address: "a:1".into(), ..Default::default() };
        let load = Load { blocks_total: 10, blocks_free: free, blocks_used: 10 - free, ..Default::default() };
        MemberView { member: Some(member), live, silent_ms: 3, load: Some(load), ..Default::default() }
    }

    #[test]
    fn a_view_becomes_processes_workers_and_pools() {
        let members = vec![
            member("prefill-0", v1::Role::Prefill, true, 10),
            member("decode-0", v1::Role::Decode, true, 4),
            member("decode-1", v1::Role::Decode, false, 9),
            member("gateway", v1::Role::Gateway, true, 0),
        ];
        let coordinators = vec![v1::CoordinatorNode { id: 1, address: "c:1".into(), ..Default::default() }];
        let status = Status::new(None, ClusterView { leader: 1, members, coordinators, ..Default::default() });
        assert_eq!(status.processes.len(), 5);
        assert_eq!(status.workers.len(), 3);
        let decode = &status.pools[1];
        assert_eq!((decode.workers, decode.live, decode.work.blocks_total, decode.work.blocks_used), (2, 1, 10, 6));
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!((&json["leader"], &json["workers"][1]["blocks_used"]), (&1.into(), &6.into()));
        assert!(status.text().contains("silent for 3 ms"));
    }

    #[test]
    fn what_is_wrong_is_told() {
        let mut stuck = member("decode-0", v1::Role::Decode, true, 4);
        stuck.trouble = "has work and makes no step".into();
        stuck.load.as_mut().unwrap().links = "gpu 3 (not_on_device 1)".into();
        let mut leaves = member("prefill-0", v1::Role::Prefill, true, 4);
        leaves.order = v1::Order::BecomeDecode.into();
        let pair = |prefill: &str, state: &str| v1::PairView {
            prefill: prefill.into(),
            decode: "decode-0".into(),
            state: state.into(),
            reason: "canary wrong".into(),
            since_ms: 7,
            ..Default::default()
        };
        let status = Status::new(
            None,
            ClusterView {
                members: vec![stuck, leaves],
                pairs: vec![pair("prefill-0", "broken"), pair("", "broken"), pair("prefill-1", "good")],
                headroom: "decode m: 1 workers, cannot lose one".into(),
                node: 2,
                storage: "full".into(),
                canary_age_ms: Some(12),
                broken: true,
                ..Default::default()
            },
        );
        let text = status.text();
        for told in [
            "has work and makes no step",
            "become decode ordered",
            "handoffs by decode-0: gpu 3 (not_on_device 1)",
            "headroom: decode m: 1 workers, cannot lose one",
            "storage of coordinator 2: full",
            "canary: the last one 12 ms ago, 1 of 3 pairs good",
            "broken for 7 ms: prefill-0 decode-0: canary wrong",
            "broken for 7 ms: (by itself) decode-0: canary wrong",
            "no decode worker works",
        ] {
            assert!(text.contains(told), "{told:?} is not in\n{text}");
        }
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(
            (&json["pairs"][1]["prefill"], &json["workers"][0]["order"]),
            (&serde_json::Value::Null, &"serve".into())
        );
    }
}
