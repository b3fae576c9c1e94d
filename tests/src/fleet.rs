//! A cluster of role processes that the test itself starts, kills, stops and starts again: no supervisor between. Every
//! process listens where it listened before, and workers can stand behind fault proxies.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};

use crate::cluster::{PATIENCE, Scratch, binary, free_port, signal, wait_for};
use crate::{Client, Proxy};

/// Host under which proxied workers are known; they listen at the same ports of 127.0.0.1.
const PROXY_HOST: &str = "127.0.0.2";

/// How many processes of each role.
#[derive(Clone, Debug)]
pub struct Shape {
    pub coordinators: usize,
    pub prefill: usize,
    pub decode: usize,
    pub gateways: usize,
    /// Flags of every worker.
    pub worker_flags: Vec<String>,
    /// Those of prefill workers, if they are others.
    pub prefill_flags: Option<Vec<String>>,
    /// Workers are reached through proxies, by gRPC and by their KV port.
    pub proxied: bool,
    /// So are coordinators, by everything but `baton` commands.
    pub coordinators_proxied: bool,
    /// What processes are of; None: the build under test.
    pub binary: Option<PathBuf>,
}

impl Default for Shape {
    fn default() -> Shape {
        let (worker_flags, prefill_flags) = Default::default();
        let (proxied, coordinators_proxied) = (false, false);
        let binary = None;
        Shape {
            coordinators: 1,
            prefill: 1,
            decode: 1,
            gateways: 1,
            worker_flags,
            prefill_flags,
            proxied,
            coordinators_proxied,
            binary,
        }
    }
}

/// One process, running or not.
struct Member {
    role: &'static str,
    arguments: Vec<String>,
    /// Where it listens.
    address: String,
    child: Option<Child>,
    /// Where its metrics are served, once it serves.
    metrics: Option<String>,
    /// What it says on its stdout, one JSON object a line.
    events: Option<Lines<BufReader<ChildStdout>>>,
}

/// How a process ended.
#[derive(Debug)]
pub struct End {
    /// None: by a signal.
    pub code: Option<i32>,
    /// What it said last.
    pub last: Value,
}

/// Processes by name: `coordinator-1`, `prefill-0`, `decode-0`, `gateway-0`, …
pub struct Fleet {
    members: BTreeMap<String, Member>,
    /// By the process's name: its gRPC port, and a worker's KV port.
    pub control: BTreeMap<String, Proxy>,
    pub handoff: BTreeMap<String, Proxy>,
    /// Requests of which an attempt has failed, by the gateways' logs.
    repeated: Arc<Mutex<BTreeSet<String>>>,
    /// What processes that are started are of.
    binary: PathBuf,
    data: Scratch,
}

/// The model that ships.
fn model() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/baton-3m")
}

fn loopback() -> String {
    format!("127.0.0.1:{}", free_port())
}

fn flag(name: &str, value: impl Into<String>) -> [String; 2] {
    [name.to_string(), value.into()]
}

impl Fleet {
    /// Starts everything and waits until every gateway serves.
    pub async fn start(shape: &Shape) -> Fleet {
        let mut fleet = Fleet {
            members: BTreeMap::new(),
            control: BTreeMap::new(),
            handoff: BTreeMap::new(),
            repeated: Arc::default(),
            binary: shape.binary.clone().unwrap_or_else(binary),
            data: Scratch::new("fleet"),
        };
        let nodes: Vec<String> = (0..shape.coordinators).map(|_| loopback()).collect();
        let known = match shape.coordinators_proxied {
            true => fleet.proxy_coordinators(&nodes).await,
            false => nodes.clone(),
        };
        fleet.add_coordinators(&nodes, &known);
        let known: Vec<String> = known.iter().flat_map(|node| flag("--coordinator", node)).collect();
        for (role, count) in [("prefill", shape.prefill), ("decode", shape.decode)] {
            for n in 0..count {
                fleet.add_worker(role, n, shape, &known).await;
            }
        }
        for n in 0..shape.gateways {
            let (id, address) = (format!("gateway-{n}"), loopback());
            let arguments = [flag("--id", &id), flag("--listen", &address)].concat();
            fleet.add("gateway", id, address, "gateway", [arguments, known.clone()].concat());
        }
        let ids: Vec<String> = fleet.members.keys().cloned().collect();
        for id in &ids {
            fleet.spawn(id);
        }
        for id in &ids {
            fleet.ready(id).await;
        }
        fleet.whole().await;
        fleet
    }

    fn add(&mut self, role: &'static str, id: String, address: String, command: &str, flags: Vec<String>) {
        let arguments = [vec![command.to_string(), "--events".to_string()], flags].concat();
        self.members.insert(id, Member { role, arguments, address, child: None, metrics: None, events: None });
    }

    /// The addresses under which coordinators are known.
    async fn proxy_coordinators(&mut self, nodes: &[String]) -> Vec<String> {
        let mut known = Vec::new();
        for (n, node) in nodes.iter().enumerate() {
            let proxy = Proxy::to(node.clone()).await.expect("a port is free");
            known.push(proxy.address().to_string());
            self.control.insert(format!("coordinator-{}", n + 1), proxy);
        }
        known
    }

    fn add_coordinators(&mut self, nodes: &[String], known: &[String]) {
        let peers: Vec<String> =
            known.iter().enumerate().flat_map(|(n, node)| flag("--peer", format!("{}={node}", n + 1))).collect();
        for (n, node) in nodes.iter().enumerate() {
            let id = format!("coordinator-{}", n + 1);
            let data = self.data(&id).display().to_string();
            let own = [flag("--node", (n + 1).to_string()), flag("--listen", node), flag("--data", data)].concat();
            self.add("coordinator", id, node.clone(), "coordinator", [own, peers.clone()].concat());
        }
    }

    async fn add_worker(&mut self, role: &'static str, n: usize, shape: &Shape, known: &[String]) {
        let (id, ports) = (format!("{role}-{n}"), [free_port(), free_port()]);
        let [control, handoff] = ports.map(|port| format!("127.0.0.1:{port}"));
        let mut flags = [flag("--id", &id), flag("--model", model().display().to_string())].concat();
        flags.extend([flag("--listen", &control), flag("--kv-listen", &handoff)].concat());
        flags.extend(flag("--threads", "1"));
        let of_role = shape.prefill_flags.as_ref().filter(|_| role == "prefill").unwrap_or(&shape.worker_flags);
        flags.extend(of_role.iter().cloned());
        if shape.proxied {
            flags.extend(flag("--advertise-host", PROXY_HOST));
            let there = format!("{PROXY_HOST}:{}", ports[0]);
            // At another port, so that both ends know that something stands between them, and pass it the bytes.
            let blocks = format!("{PROXY_HOST}:{}", free_port());
            flags.extend(flag("--kv-advertise", &blocks));
            let proxy = Proxy::between(&there, control.clone()).await.expect("the proxy's port is free");
            self.control.insert(id.clone(), proxy);
            let proxy = Proxy::between(&blocks, handoff).await.expect("the proxy's port is free");
            self.handoff.insert(id.clone(), proxy);
        }
        let command = if role == "prefill" { "prefill-worker" } else { "decode-worker" };
        self.add(role, id, control, command, [flags, known.to_vec()].concat());
    }

    fn member(&self, id: &str) -> &Member {
        self.members.get(id).unwrap_or_else(|| panic!("no {id} in the fleet"))
    }

    fn spawn(&mut self, id: &str) {
        let member = self.members.get_mut(id).unwrap_or_else(|| panic!("no {id} in the fleet"));
        let mut command = Command::new(&self.binary);
        let loud = std::env::var_os("BATON_TEST_LOG").is_some();
        command.args(&member.arguments).stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        let read = member.role == "gateway";
        command.stderr(if read {
            Stdio::piped()
        } else if loud {
            Stdio::inherit()
        } else {
            Stdio::null()
        });
        die_with_us(&mut command);
        let mut child = command.spawn().expect("baton starts");
        member.events = Some(BufReader::new(child.stdout.take().expect("piped")).lines());
        if let Some(log) = child.stderr.take() {
            tokio::spawn(note_repeated(log, self.repeated.clone(), loud));
        }
        member.child = Some(child);
    }

    /// Processes that are started from now on are of the build under test.
    pub fn use_this_build(&mut self) {
        self.binary = binary();
    }

    /// Starts a process that was killed, without waiting for it.
    pub fn start_again(&mut self, id: &str) {
        self.spawn(id);
    }

    /// Waits until the process says that it serves.
    pub async fn ready(&mut self, id: &str) {
        let member = self.members.get_mut(id).unwrap_or_else(|| panic!("no {id} in the fleet"));
        let lines = member.events.as_mut().unwrap_or_else(|| panic!("{id} was not started"));
        let said = async {
            while let Ok(Some(line)) = lines.next_line().await {
                let event: Value = serde_json::from_str(&line).unwrap_or_default();
                match event["event"].as_str() {
                    Some("ready") => return event["metrics"].as_str().map(str::to_string),
                    Some("failed") => panic!("{id} did not start: {line}"),
                    _ => {}
                }
            }
            panic!("{id} ended before it served");
        };
        let said = tokio::time::timeout(PATIENCE, said).await;
        // A gateway serves its metrics with everything else.
        member.metrics = said.unwrap_or_else(|_| panic!("{id} was not ready in {PATIENCE:?}"));
    }

    /// Waits until all processes that run are seen by a leader, and every gateway that runs serves.
    pub async fn whole(&self) {
        wait_for("the fleet to be whole", || async {
            let status = self.status().await?;
            let workers = status["workers"].as_array()?;
            let live = |id: &str| workers.iter().any(|w| w["id"] == id && w["live"] == true);
            let running = |id: &String| self.member(id).child.is_some();
            let known = self.ids("prefill").into_iter().chain(self.ids("decode")).filter(running).all(|id| live(&id));
            for id in self.ids("gateway").into_iter().filter(running) {
                let reply = Client::new(self.address(&id)).try_get("/health").await.ok()?;
                (reply.status == 200).then_some(())?;
            }
            known.then_some(())
        })
        .await;
    }

    pub fn ids(&self, role: &str) -> Vec<String> {
        self.members.iter().filter(|(_, member)| member.role == role).map(|(id, _)| id.clone()).collect()
    }

    /// A coordinator's data directory.
    pub fn data(&self, id: &str) -> PathBuf {
        self.data.path().join(id)
    }

    pub fn address(&self, id: &str) -> String {
        self.member(id).address.clone()
    }

    /// A client of one gateway.
    pub fn client(&self, gateway: usize) -> Client {
        Client::new(self.address(&format!("gateway-{gateway}")))
    }

    /// # Panics
    /// If it does not run.
    pub fn pid(&self, id: &str) -> i32 {
        let pid = self.member(id).child.as_ref().and_then(Child::id);
        pid.unwrap_or_else(|| panic!("{id} does not run")) as i32
    }

    pub fn signal(&self, id: &str, number: i32) {
        signal(self.pid(id), number);
    }

    /// SIGKILL; returns when the process is gone.
    pub async fn kill(&mut self, id: &str) {
        let member = self.members.get_mut(id).unwrap_or_else(|| panic!("no {id} in the fleet"));
        let mut child = member.child.take().unwrap_or_else(|| panic!("{id} does not run"));
        child.kill().await.expect("a child of ours can be killed");
    }

    /// Whether the process has ended by itself.
    pub fn ended(&mut self, id: &str) -> bool {
        let child = self.members.get_mut(id).and_then(|member| member.child.as_mut());
        child.is_none_or(|child| child.try_wait().expect("a child of ours can be asked").is_some())
    }

    /// Waits until the process has ended by itself.
    pub async fn end(&mut self, id: &str) -> End {
        let member = self.members.get_mut(id).unwrap_or_else(|| panic!("no {id} in the fleet"));
        let (mut child, mut lines) = member.child.take().zip(member.events.take()).expect("it was started");
        let ending = async {
            let mut last = Value::Null;
            while let Ok(Some(line)) = lines.next_line().await {
                last = serde_json::from_str(&line).unwrap_or_default();
            }
            End { code: child.wait().await.expect("a child of ours can be waited for").code(), last }
        };
        tokio::time::timeout(PATIENCE, ending).await.unwrap_or_else(|_| panic!("{id} did not end in {PATIENCE:?}"))
    }

    /// Starts a process that was killed, or has ended, on its own data; returns when it serves.
    pub async fn restart(&mut self, id: &str) {
        self.spawn(id);
        self.ready(id).await;
    }

    /// Runs a command on this cluster to its end.
    pub async fn command(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(binary());
        command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        for id in self.ids("coordinator") {
            command.args(["--coordinator", &self.address(&id)]);
        }
        command.output().await.expect("baton starts")
    }

    /// What a command that must succeed prints.
    ///
    /// # Panics
    /// If it fails.
    pub async fn done(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).await;
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_string()
    }

    /// A process's metric, summed over the lines that hold `label`.
    pub async fn metric(&self, id: &str, name: &str, label: &str) -> f64 {
        let address = self.member(id).metrics.clone().unwrap_or_else(|| self.address(id));
        let body = Client::new(address).get("/metrics").await.body;
        let text = String::from_utf8_lossy(&body).into_owned();
        let named = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        let lines = text.lines().filter(named).filter(|line| line.contains(label));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// What `baton status --json` says, from the first coordinator that answers and knows a leader.
    pub async fn status(&self) -> Option<Value> {
        for id in self.ids("coordinator") {
            if let Some(status) = self.status_of(&id).await.filter(|status| status["leader"].is_u64()) {
                return Some(status);
            }
        }
        None
    }

    /// Ids of the requests of which an attempt has failed so far, and whose gateway has not been killed before it said so.
    pub fn repeated(&self) -> BTreeSet<String> {
        self.repeated.lock().expect("no panic while held").clone()
    }

    /// Some once the cluster says that a worker is not live, or not there; None as well where nobody answers.
    pub async fn fenced(&self, id: &str) -> Option<()> {
        let status = self.status().await?;
        let row = status["workers"].as_array()?.iter().find(|row| row["id"] == id);
        row.is_none_or(|row| row["live"] != true).then_some(())
    }

    /// What one coordinator says; None if it does not run or does not answer.
    pub async fn status_of(&self, id: &str) -> Option<Value> {
        self.member(id).child.as_ref()?;
        let mut command = Command::new(binary());
        command.args(["status", "--json", "--coordinator", &self.address(id)]).stdin(Stdio::null());
        let output = command.kill_on_drop(true).output().await.ok()?;
        serde_json::from_slice(&output.stdout).ok()
    }

    /// Waits until every coordinator that runs follows the same leader and has applied what that had when asked.
    pub async fn agreed(&self) {
        wait_for("the coordinators to agree", || async {
            let running = self.ids("coordinator").into_iter().filter(|id| self.member(id).child.is_some());
            let leader = self.status().await?;
            for id in running {
                let status = self.status_of(&id).await?;
                let caught_up = status["ledger_index"].as_u64()? >= leader["ledger_index"].as_u64()?;
                (caught_up && status["leader"] == leader["leader"]).then_some(())?;
            }
            Some(())
        })
        .await
    }

    /// The name of the coordinator that leads.
    pub async fn leader(&self) -> String {
        wait_for("a leader", || async {
            let node = self.status().await?["leader"].as_u64()?;
            let id = format!("coordinator-{node}");
            self.members.get(&id)?.child.is_some().then_some(id)
        })
        .await
    }

    /// Blocks that live workers hold for requests, as their last heartbeats told; None while nobody can say.
    pub async fn blocks_held(&self) -> Option<u64> {
        let status = self.status().await?;
        let workers = status["workers"].as_array()?;
        let live: Vec<_> = workers.iter().filter(|w| w["live"] == true).collect();
        let held = |w: &&Value| Some(w["blocks_used"].as_u64()? + w["blocks_in_flight"].as_u64()?);
        live.iter().map(held).sum()
    }

    /// Waits until no worker holds a block and no request is open.
    ///
    /// # Panics
    /// After `PATIENCE`, with what is still held.
    pub async fn quiet(&self) {
        let started = tokio::time::Instant::now();
        loop {
            let status = self.status().await.unwrap_or_default();
            if status["requests_open"] == 0 && self.blocks_held().await == Some(0) {
                return;
            }
            assert!(started.elapsed() < PATIENCE, "still held after {PATIENCE:?}: {status}");
        }
    }
}

/// Reads a gateway's log to its end.
async fn note_repeated(log: ChildStderr, repeated: Arc<Mutex<BTreeSet<String>>>, loud: bool) {
    let mut lines = BufReader::new(log).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if loud {
            eprintln!("{line}");
        }
        let request = line.split_once("attempt failed request=").and_then(|(_, rest)| rest.split(' ').next());
        if let Some(request) = request {
            repeated.lock().expect("no panic while held").insert(request.to_string());
        }
    }
}

/// The child dies with the thread that started it, however that ends.
fn die_with_us(command: &mut Command) {
    // SAFETY: between fork and exec only prctl is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        })
    };
}
