//! How fast assignments are: one process holds 1 or 3 coordinators on real files and TCP, and clients that assign and
//! finish one request after another over gRPC. Usage: assign_speed NODES CLIENTS SECONDS [DIRECTORY]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use baton_coordinator::placement::Policy;
use baton_coordinator::{Config, Running};
use baton_core::{Env, NodeId, Rng, SystemClock};
use baton_proto::v1::coordinator_client::CoordinatorClient;
use baton_proto::{TcpNet, WIRE_VERSION, v1};
use tokio::time::Instant;
use tonic::transport::Channel;

type Client = CoordinatorClient<Channel>;

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |at: usize, default: u64| arguments.get(at).map_or(default, |text| text.parse().expect("a number"));
    let (nodes, clients, seconds) = (number(1, 1), number(2, 1), number(3, 5));
    let directory = arguments.get(4).map_or_else(|| std::env::temp_dir().join("baton-assign-speed"), PathBuf::from);
    drop(std::fs::remove_dir_all(&directory));

    let started = Instant::now();
    let running = start(nodes, &directory).await;
    let (leader, mut client) = find_leader(&running).await;
    println!("{nodes} nodes, leader after {:.1} ms", started.elapsed().as_secs_f64() * 1e3);
    let lives = register(&mut client).await;
    let beating = tokio::spawn(beat(client.clone(), lives));

    let until = Instant::now() + Duration::from_secs(seconds);
    let calls = (0..clients).map(|id| tokio::spawn(call(leader.clone(), id, until)));
    let mut latencies: Vec<f64> = Vec::new();
    for calls in futures::future::join_all(calls).await {
        latencies.extend(calls.expect("a client"));
    }
    latencies.sort_by(f64::total_cmp);
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize];
    println!(
        "{clients} clients: {:.0} assignments/s (each also finished), assign p50 {:.2} ms, p99 {:.2} ms",
        latencies.len() as f64 / seconds as f64,
        at(0.5),
        at(0.99)
    );
    println!("resident {:.1} MiB, clients included", resident_mib());
    beating.abort();
    for node in running {
        node.stop().await;
    }
    drop(std::fs::remove_dir_all(&directory));
}

async fn start(nodes: u64, directory: &std::path::Path) -> Vec<Running> {
    let peers: Vec<_> = (1..=nodes).map(|node| (NodeId(node), format!("127.0.0.1:{}", 17400 + node))).collect();
    let mut running = Vec::new();
    for (node, address) in &peers {
        let config = Config {
            node: *node,
            listen: address.clone(),
            data: directory.join(node.to_string()),
            peers: peers.clone(),
            advertise: String::new(),
            cluster: None,
            policy: Policy { queue_max: u64::MAX, ..Policy::default() },
        };
        let env = Env { net: Arc::new(TcpNet), clock: Arc::new(SystemClock), rng: Rng::new(node.0) };
        running.push(baton_coordinator::start(config, env).await.expect("a coordinator"));
    }
    running
}

fn connect(address: &str) -> Client {
    CoordinatorClient::new(baton_proto::channel(Arc::new(TcpNet), address).expect("an address"))
}

async fn find_leader(running: &[Running]) -> (String, Client) {
    loop {
        for node in running {
            let mut client = connect(&node.address());
            let probe = v1::AssignRequest { request: "0".repeat(32), ..request(0, 0) };
            let reply = client.assign(probe).await.map(|reply| reply.into_inner().outcome);
            if let Ok(Some(v1::assign_reply::Outcome::Refused(refused))) = reply
                && refused.reason == "no_workers"
            {
                return (node.address(), client);
            }
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn member(id: &str, role: v1::Role) -> v1::Member {
    let model = v1::ModelSummary {
        name: "m".into(),
        block_tokens: 16,
        positions_max: 4096,
        blocks_total: 1 << 30,
        ..Default::default()
    };
    v1::Member {
        id: id.into(),
        role: role.into(),
        address: format!("{id}:1"),
        model: Some(model),
        ..Default::default()
    }
}

async fn register(client: &mut Client) -> Vec<(v1::Member, u64)> {
    let mut lives = Vec::new();
    for (id, role) in
        [("p0", v1::Role::Prefill), ("p1", v1::Role::Prefill), ("d0", v1::Role::Decode), ("d1", v1::Role::Decode)]
    {
        let member = member(id, role);
        let request = v1::RegisterRequest {
            cluster: String::new(),
            wire_version: WIRE_VERSION,
            member: Some(member.clone()),
            process_key: "k".into(),
        };
        let reply = client.register(request).await.expect("registered").into_inner();
        let Some(v1::register_reply::Outcome::Registered(registered)) = reply.outcome else { panic!("{reply:?}") };
        lives.push((member, registered.incarnation));
    }
    lives
}

async fn beat(mut client: Client, lives: Vec<(v1::Member, u64)>) {
    for sequence in 1.. {
        for (member, incarnation) in &lives {
            let load = v1::Load { blocks_free: 1 << 30, ..Default::default() };
            let request = v1::HeartbeatRequest {
                id: member.id.clone(),
                incarnation: *incarnation,
                sequence,
                load: Some(load),
                member: Some(member.clone()),
            };
            drop(client.heartbeat(request).await);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn request(client: u64, serial: u64) -> v1::AssignRequest {
    v1::AssignRequest {
        request: format!("{:032x}", u128::from(client) << 64 | u128::from(serial)),
        attempt: 1,
        model: "m".into(),
        prompt_tokens: 500,
        tokens_max: 100,
        choices: 1,
        deadline_ms: 60_000,
        gateway: "g".into(),
        ..Default::default()
    }
}

/// Assigns and finishes until the time is up; returns the assignments' latencies in milliseconds.
async fn call(leader: String, id: u64, until: Instant) -> Vec<f64> {
    let mut client = connect(&leader);
    let mut latencies = Vec::new();
    for serial in 1.. {
        if Instant::now() >= until {
            break;
        }
        let start = Instant::now();
        let reply = client.assign(request(id + 1, serial)).await.expect("an answer").into_inner();
        let Some(v1::assign_reply::Outcome::Assignment(assigned)) = reply.outcome else { panic!("{reply:?}") };
        latencies.push(start.elapsed().as_secs_f64() * 1e3);
        let finished = v1::FinishedRequest {
            request: assigned.request,
            epoch: assigned.epoch,
            outcome: "complete".into(),
            ..Default::default()
        };
        client.finish(v1::FinishRequest { requests: vec![finished] }).await.expect("finished");
    }
    latencies
}

fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}
