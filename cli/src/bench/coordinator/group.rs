//! The coordinators of a measurement: processes of this binary, with workers that exist only in their heartbeats.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use baton_proto::v1::coordinator_client::CoordinatorClient;
use baton_proto::{TcpNet, WIRE_VERSION, v1};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::transport::Channel;

use crate::event::Event;
use crate::exit::Failure;
use crate::{process, surroundings};

const WORKERS: usize = 4;
const BEAT: Duration = Duration::from_millis(100);
/// Longest wait for nodes to serve and for one of them to lead.
const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);
/// Room that never ends: what is measured is the ledger.
const BLOCKS: u64 = 1 << 30;
/// Nothing is full, and nobody asks workers that are not there for a canary.
const CONFIG: &str = "[policy]\nqueue_max = 1073741824\ncanary_ms = 0\n";

pub(super) type Client = CoordinatorClient<Channel>;

/// Nodes that serve, one of them leading.
pub(super) struct Group {
    children: Vec<Child>,
    leader: String,
    beating: JoinHandle<()>,
    data: PathBuf,
    /// The directory is ours to remove.
    temporary: bool,
}

pub(super) fn connect(address: &str) -> anyhow::Result<Client> {
    let channel = baton_proto::channel(Arc::new(TcpNet), address)?;
    let size = baton_core::limits::MESSAGE_BYTES_MAX;
    Ok(CoordinatorClient::new(channel).max_decoding_message_size(size))
}

impl Group {
    pub(super) async fn start(nodes: usize, data: Option<&Path>) -> Result<Group, Failure> {
        let temporary = data.is_none();
        let fresh = std::env::temp_dir().join(format!("baton-bench-coordinator-{}", std::process::id()));
        let data = data.map_or(fresh, Path::to_path_buf);
        let made = std::fs::create_dir_all(&data).and_then(|()| std::fs::write(data.join("bench.toml"), CONFIG));
        made.with_context(|| format!("the directory {} cannot be used", data.display())).map_err(Failure::refused)?;
        let addresses = addresses(nodes)?;
        let mut children = Vec::new();
        for node in 1..=nodes {
            children.push(spawn(node, &addresses, &data)?);
        }
        for child in &mut children {
            tokio::time::timeout(PATIENCE, ready(child)).await.context("a coordinator is not ready in time")??;
        }
        let (leader, lives) = tokio::time::timeout(PATIENCE, register(&addresses)).await.context("nobody leads")??;
        let clients = addresses.iter().map(|address| connect(address)).collect::<anyhow::Result<Vec<_>>>()?;
        let beating = tokio::spawn(beat(clients, lives));
        Ok(Group { children, leader, beating, data, temporary })
    }

    /// Address of the node that leads.
    pub(super) fn leader(&self) -> &str {
        &self.leader
    }

    pub(super) async fn end(mut self) {
        self.beating.abort();
        for child in &mut self.children {
            // A node that has ended by itself has nothing left to end.
            let _ = child.kill().await;
        }
        if self.temporary {
            let _ = std::fs::remove_dir_all(&self.data);
        }
    }
}

fn addresses(nodes: usize) -> Result<Vec<String>, Failure> {
    let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let mut rng = crate::seed::rng(None)?;
    let mut taken = Vec::new();
    for _ in 0..nodes {
        let port = surroundings::free_port(host, &taken, &mut rng);
        taken.push(port.ok_or_else(|| Failure::refuse("no free port was found for a coordinator"))?);
    }
    Ok(taken.iter().map(|port| format!("{host}:{port}")).collect())
}

fn spawn(node: usize, addresses: &[String], data: &Path) -> anyhow::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args([
        "coordinator",
        "--log",
        "warn",
        "--events",
        "--node",
        &node.to_string(),
        "--listen",
        &addresses[node - 1],
    ]);
    command.arg("--config").arg(data.join("bench.toml"));
    command.arg("--data").arg(data.join(node.to_string()));
    for (nth, address) in addresses.iter().enumerate() {
        command.args(["--peer", &format!("{}={address}", nth + 1)]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    process::bind_to_parent(&mut command);
    Ok(command.spawn()?)
}

async fn ready(child: &mut Child) -> anyhow::Result<()> {
    let mut lines = BufReader::new(child.stdout.take().context("a child without output")?).lines();
    while let Some(line) = lines.next_line().await? {
        match serde_json::from_str(&line) {
            Ok(Event::Ready { .. }) => return Ok(()),
            Ok(Event::Failed { message, .. }) => anyhow::bail!("a coordinator did not start: {message}"),
            _ => {}
        }
    }
    anyhow::bail!("a coordinator ended before it served")
}

fn member(nth: usize) -> v1::Member {
    let model = v1::ModelSummary {
        name: super::drive::MODEL.into(),
        block_tokens: 16,
        positions_max: 4096,
        blocks_total: BLOCKS,
        ..Default::default()
    };
    v1::Member {
        id: format!("decode-{nth}"),
        role: v1::Role::Decode.into(),
        address: format!("127.0.0.1:{}", 1 + nth),
        model: Some(model),
        ..Default::default()
    }
}

/// Registers every worker at the node that leads; returns its address and the workers with their incarnations.
async fn register(addresses: &[String]) -> anyhow::Result<(String, Vec<v1::Member>)> {
    for turn in 0.. {
        let address = &addresses[turn % addresses.len()];
        let mut client = connect(address)?;
        let mut lives = Vec::new();
        for nth in 0..WORKERS {
            let request = v1::RegisterRequest {
                cluster: String::new(),
                wire_version: WIRE_VERSION,
                member: Some(member(nth)),
                process_key: format!("bench-{nth}"),
            };
            let reply = client.register(request).await.ok().and_then(|reply| reply.into_inner().outcome);
            let Some(v1::register_reply::Outcome::Registered(registered)) = reply else { break };
            lives.push(v1::Member { incarnation: registered.incarnation, ..member(nth) });
        }
        if lives.len() == WORKERS {
            return Ok((address.clone(), lives));
        }
        tokio::time::sleep(POLL).await;
    }
    unreachable!("the turns never end")
}

/// Heartbeats of every worker to every node, for ever.
async fn beat(mut clients: Vec<Client>, lives: Vec<v1::Member>) {
    let started = Instant::now();
    for sequence in 1.. {
        for life in &lives {
            let steps = started.elapsed().as_millis() as u64;
            let load = v1::Load { blocks_total: BLOCKS, blocks_free: BLOCKS, steps, ..Default::default() };
            for client in &mut clients {
                let request = v1::HeartbeatRequest {
                    id: life.id.clone(),
                    incarnation: life.incarnation,
                    sequence,
                    load: Some(load.clone()),
                    member: Some(life.clone()),
                    ..Default::default()
                };
                // The next one comes soon.
                let _ = client.heartbeat(request).await;
            }
        }
        tokio::time::sleep(BEAT).await;
    }
}
