//! How fast assignments are: one process holds 1 or 3 coordinators on real files and TCP, and clients that assign and
//! finish one request after another over gRPC; then as gateways do it, many on a few streams; then how many commands a
//! second many in one call reach.
//! Usage: assign_speed NODES CLIENTS SECONDS [DIRECTORY]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use baton_coordinator::placement::Policy;
use baton_coordinator::{Config, Running};
use baton_core::{Env, NodeId, Process, Rng, SystemClock};
use baton_proto::v1::coordinator_client::CoordinatorClient;
use baton_proto::{TcpNet, WIRE_VERSION, v1};
use tokio::time::Instant;
use tonic::transport::Channel;

type Client = CoordinatorClient<Channel>;

/// Connections that the clients share, as the requests of a few gateways do.
const CONNECTIONS: usize = 8;
/// Ends in one call of the batched measurement.
const FINISHES: u64 = 512;
/// Streams, and requests without an answer on each.
const STREAMS: u64 = 4;
const OUTSTANDING: usize = 1024;

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
    let connections: Vec<Client> = (0..CONNECTIONS).map(|_| connect(&leader)).collect();
    let connection = |id: u64| connections[id as usize % CONNECTIONS].clone();
    let calls = (0..clients).map(|id| tokio::spawn(call(connection(id), id, until)));
    let mut latencies: Vec<f64> = Vec::new();
    let mut refused = 0;
    for calls in futures::future::join_all(calls).await {
        let calls = calls.expect("a client");
        latencies.extend(calls.latencies);
        refused += calls.refused;
    }
    latencies.sort_by(f64::total_cmp);
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize];
    println!(
        "{clients} clients: {:.0} assignments/s (each also finished), assign p50 {:.2} ms, p99 {:.2} ms, {refused} refused",
        latencies.len() as f64 / seconds as f64,
        at(0.5),
        at(0.99)
    );
    let until = Instant::now() + Duration::from_secs(seconds);
    let calls = (0..STREAMS).map(|id| tokio::spawn(stream(connection(id), 1 << 32 | id, until)));
    let ended: u64 = futures::future::join_all(calls).await.into_iter().map(|ended| ended.expect("a stream")).sum();
    println!(
        "{STREAMS} streams of {OUTSTANDING} outstanding: {:.0} assignments/s (each also finished)",
        ended as f64 / seconds as f64
    );
    let until = Instant::now() + Duration::from_secs(seconds);
    let calls = (0..4).map(|id| tokio::spawn(finish_many(connection(id), id, until)));
    let ended: u64 = futures::future::join_all(calls).await.into_iter().map(|ended| ended.expect("a client")).sum();
    println!("{FINISHES} ends in a call: {:.0} commands/s", ended as f64 / seconds as f64);
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
            policy: Policy { queue_max: u64::MAX, decode_waiting_max: u64::MAX, ..Policy::default() },
            entries: baton_coordinator::state::VERSION,
        };
        let env =
            Env { net: Arc::new(TcpNet), clock: Arc::new(SystemClock), rng: Rng::new(node.0), process: Process::own() };
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
                ..Default::default()
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

struct Calls {
    /// Of assignments, in milliseconds.
    latencies: Vec<f64>,
    /// Answers other than an assignment; a call that is too late among them.
    refused: u64,
}

/// Assigns and finishes until the time is up.
async fn call(mut client: Client, id: u64, until: Instant) -> Calls {
    let mut calls = Calls { latencies: Vec::new(), refused: 0 };
    for serial in 1.. {
        if Instant::now() >= until {
            break;
        }
        let start = Instant::now();
        let reply = client.assign(request(id + 1, serial)).await.map(|reply| reply.into_inner().outcome);
        let Ok(Some(v1::assign_reply::Outcome::Assignment(assigned))) = reply else {
            calls.refused += 1;
            continue;
        };
        calls.latencies.push(start.elapsed().as_secs_f64() * 1e3);
        let requests = vec![finished(assigned.request, assigned.epoch)];
        drop(client.finish(v1::FinishRequest { requests, ..Default::default() }).await);
    }
    calls
}

/// Keeps many requests outstanding on one stream and ends them as they are assigned; returns how many.
async fn stream(mut client: Client, id: u64, until: Instant) -> u64 {
    let (say, said) = tokio::sync::mpsc::channel::<v1::AssignBatch>(4);
    let incoming = tokio_stream::wrappers::ReceiverStream::new(said);
    let mut serial = 0;
    let mut batch = |count: usize| {
        let requests = (0..count).map(|_| {
            serial += 1;
            request(id, serial)
        });
        v1::AssignBatch { requests: requests.collect(), ..Default::default() }
    };
    say.send(batch(OUTSTANDING)).await.expect("open");
    let mut replies = client.assignments(incoming).await.expect("a stream").into_inner();
    let mut ended = 0;
    while Instant::now() < until {
        let replies = replies.message().await.expect("answers").expect("an open stream").replies;
        let assigned = replies.into_iter().filter_map(|reply| match reply.reply?.outcome? {
            v1::assign_reply::Outcome::Assignment(assigned) => Some(finished(assigned.request, assigned.epoch)),
            v1::assign_reply::Outcome::Refused(refused) => panic!("{refused:?}"),
        });
        let requests: Vec<_> = assigned.collect();
        ended += requests.len() as u64;
        say.send(batch(requests.len())).await.expect("open");
        client.finish(v1::FinishRequest { requests, ..Default::default() }).await.expect("finished");
    }
    ended
}

/// Ends requests that never were, many in a call; returns how many.
async fn finish_many(mut client: Client, id: u64, until: Instant) -> u64 {
    let mut ended = 0;
    while Instant::now() < until {
        let name = |serial: u64| format!("{:032x}", u128::from(id + 1) << 96 | u128::from(ended + serial));
        let requests = (0..FINISHES).map(|serial| finished(name(serial), 0)).collect();
        if client.finish(v1::FinishRequest { requests, ..Default::default() }).await.is_ok() {
            ended += FINISHES;
        }
    }
    ended
}

fn finished(request: String, epoch: u64) -> v1::FinishedRequest {
    v1::FinishedRequest { request, epoch, outcome: "complete".into(), ..Default::default() }
}

fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}
