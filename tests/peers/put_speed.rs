//! Durable writes a second through three nodes, one entry a call, by the same gRPC client for both: etcd's KV.Put with values
//! of 200 bytes, and Baton's Coordinator.Finish with entries of that size. Prints one JSON object.
//! Usage: put_speed etcd|baton CLIENTS CONNECTIONS SECONDS ADDRESS...
#![allow(clippy::disallowed_methods)] // Stands outside the product: it measures time and reads its arguments.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::v1::coordinator_client::CoordinatorClient;
use baton_proto::{TcpNet, channel, v1};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic_prost::ProstCodec;

const VALUE_BYTES: usize = 200;

/// `etcdserverpb.PutRequest`, as far as it is needed.
#[derive(Clone, PartialEq, prost::Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// Answers whose content is not looked at.
#[derive(Clone, PartialEq, prost::Message)]
struct Ignored {}

/// `etcdserverpb.ResponseHeader`.
#[derive(Clone, PartialEq, prost::Message)]
struct Header {
    #[prost(uint64, tag = "2")]
    member_id: u64,
}

/// `etcdserverpb.StatusResponse`.
#[derive(Clone, PartialEq, prost::Message)]
struct Status {
    #[prost(message, tag = "1")]
    header: Option<Header>,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

async fn call<Q, A>(channel: Channel, path: &'static str, request: Q) -> Result<A, tonic::Status>
where
    Q: prost::Message + Send + Sync + 'static,
    A: prost::Message + Default + Send + Sync + 'static,
{
    let mut client = Grpc::new(channel);
    client.ready().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    let codec: ProstCodec<Q, A> = ProstCodec::default();
    let reply = client.unary(tonic::Request::new(request), PathAndQuery::from_static(path), codec).await?;
    Ok(reply.into_inner())
}

async fn put(channel: Channel, name: u128) -> Result<(), tonic::Status> {
    let request = PutRequest { key: format!("{name:032x}").into_bytes(), value: vec![b'v'; VALUE_BYTES] };
    call::<_, Ignored>(channel, "/etcdserverpb.KV/Put", request).await.map(drop)
}

async fn finish(channel: Channel, name: u128) -> Result<(), tonic::Status> {
    let entry =
        v1::FinishedRequest { request: format!("{name:032x}"), outcome: "v".repeat(VALUE_BYTES), ..Default::default() };
    let reply = CoordinatorClient::new(channel).finish(v1::FinishRequest { requests: vec![entry] }).await?;
    match reply.into_inner().outcome {
        Some(v1::finish_reply::Outcome::Finished(_)) => Ok(()),
        other => Err(tonic::Status::failed_precondition(format!("{other:?}"))),
    }
}

#[derive(Clone, Copy)]
enum Peer {
    Etcd,
    Baton,
}

impl Peer {
    async fn write(self, channel: Channel, name: u128) -> Result<(), tonic::Status> {
        match self {
            Peer::Etcd => put(channel, name).await,
            Peer::Baton => finish(channel, name).await,
        }
    }

    async fn leads(self, channel: Channel) -> bool {
        match self {
            Peer::Etcd => {
                let status = call::<_, Status>(channel, "/etcdserverpb.Maintenance/Status", Ignored {}).await;
                status.is_ok_and(|status| {
                    status.leader != 0 && status.header.is_some_and(|h| h.member_id == status.leader)
                })
            }
            Peer::Baton => finish(channel, u128::MAX).await.is_ok(),
        }
    }
}

fn connect(address: &str) -> Channel {
    channel(Arc::new(TcpNet), address).expect("host:port")
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, peer, clients, connections, seconds, addresses @ ..] = arguments.as_slice() else {
        panic!("usage: put_speed etcd|baton CLIENTS CONNECTIONS SECONDS ADDRESS...")
    };
    let peer = if peer == "etcd" { Peer::Etcd } else { Peer::Baton };
    let number = |text: &String| text.parse::<u64>().expect("a number");
    let mut leader = None;
    for address in addresses {
        if peer.leads(connect(address)).await {
            leader = Some(address);
        }
    }
    let leader = leader.expect("one of the addresses leads");
    let channels: Vec<Channel> = (0..number(connections)).map(|_| connect(leader)).collect();
    // Names differ between runs, so that each write makes something new.
    let run = u128::from(std::process::id()) << 96;
    let (started, length) = (Instant::now(), Duration::from_secs(number(seconds)));
    let mut writing = tokio::task::JoinSet::new();
    for client in 0..number(clients) {
        let channel = channels[client as usize % channels.len()].clone();
        writing.spawn(async move {
            let mut times = Vec::new();
            while started.elapsed() < length {
                let before = Instant::now();
                let name = run | u128::from(client) << 64 | times.len() as u128;
                peer.write(channel.clone(), name).await.expect("a write succeeds");
                times.push(before.elapsed().as_secs_f64() * 1e3);
            }
            times
        });
    }
    let mut times = writing.join_all().await.concat();
    let took = started.elapsed().as_secs_f64();
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    let line = serde_json::json!({"writes_per_s": times.len() as f64 / took, "p50_ms": at(0.5), "p99_ms": at(0.99)});
    println!("{line}");
}
