//! Durable writes a second through three nodes, one entry a call, by the same gRPC client for both: etcd's KV.Put with values
//! of 200 bytes, and Baton's Coordinator.Finish with entries of that size. Prints one JSON object.
//! Usage: put_speed etcd|baton CLIENTS CONNECTIONS SECONDS ADDRESS...
//!
//! The client frames its calls itself, over HTTP/2: on two cores it shares the servers' time, and a whole client library
//! would be most of what is measured.
#![allow(clippy::disallowed_methods)] // Stands outside the product: it measures time and reads its arguments.

use std::time::{Duration, Instant};

use baton_proto::v1;
use bytes::{BufMut, Bytes, BytesMut};
use h2::client::SendRequest;
use prost::Message;
use tonic::codegen::http::{HeaderMap, HeaderValue, Request, Uri, header};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const VALUE_BYTES: usize = 200;
/// Bytes before a gRPC message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

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

/// One HTTP/2 connection, shared by many clients.
#[derive(Clone)]
struct Connection {
    requests: SendRequest<Bytes>,
    address: String,
}

/// Why a call has no answer.
type Failed = Box<dyn std::error::Error + Send + Sync>;

impl Connection {
    async fn open(address: &str) -> Result<Connection, Failed> {
        let stream = tokio::net::TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (requests, connection) = h2::client::handshake(stream).await?;
        tokio::spawn(connection);
        Ok(Connection { requests, address: address.to_string() })
    }

    /// Where a method is called.
    fn method(&self, path: &str) -> Uri {
        format!("http://{}{path}", self.address).parse().expect("an address and a path")
    }

    /// One unary gRPC call.
    async fn call<Q: Message, A: Message + Default>(&self, method: &Uri, question: &Q) -> Result<A, Failed> {
        let mut head = Request::post(method.clone()).body(())?;
        head.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        head.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
        let length = question.encoded_len();
        let mut message = BytesMut::with_capacity(PREFIX_BYTES + length);
        message.put_u8(0);
        message.put_u32(length as u32);
        question.encode(&mut message)?;

        let (answer, mut sending) = self.requests.clone().ready().await?.send_request(head, false)?;
        sending.send_data(message.freeze(), true)?;
        let answer = answer.await?;
        succeeded(answer.headers())?;
        let mut body = answer.into_body();
        let mut received = BytesMut::new();
        while let Some(part) = body.data().await {
            let part = part?;
            body.flow_control().release_capacity(part.len())?;
            received.extend_from_slice(&part);
        }
        succeeded(&body.trailers().await?.ok_or("an answer without its status")?)?;
        Ok(A::decode(received.get(PREFIX_BYTES..).ok_or("an answer without a message")?)?)
    }
}

/// Headers without a status are those of an answer that goes on.
fn succeeded(headers: &HeaderMap) -> Result<(), Failed> {
    match headers.get("grpc-status") {
        Some(status) if status != "0" => Err(format!("{headers:?}").into()),
        _ => Ok(()),
    }
}

#[derive(Clone, Copy)]
enum Peer {
    Etcd,
    Baton,
}

impl Peer {
    fn method(self, connection: &Connection) -> Uri {
        connection.method(match self {
            Peer::Etcd => "/etcdserverpb.KV/Put",
            Peer::Baton => "/baton.v1.Coordinator/Finish",
        })
    }

    async fn write(self, connection: &Connection, method: &Uri, name: u128) -> Result<(), Failed> {
        let (name, value) = (format!("{name:032x}"), "v".repeat(VALUE_BYTES));
        match self {
            Peer::Etcd => {
                let put = PutRequest { key: name.into_bytes(), value: value.into_bytes() };
                connection.call::<_, Ignored>(method, &put).await.map(drop)
            }
            Peer::Baton => {
                let entry = v1::FinishedRequest { request: name, outcome: value, ..Default::default() };
                let request = v1::FinishRequest { requests: vec![entry], ..Default::default() };
                let reply: v1::FinishReply = connection.call(method, &request).await?;
                match reply.outcome {
                    Some(v1::finish_reply::Outcome::Finished(_)) => Ok(()),
                    other => Err(format!("{other:?}").into()),
                }
            }
        }
    }

    async fn leads(self, address: &str) -> bool {
        let Ok(connection) = Connection::open(address).await else { return false };
        match self {
            Peer::Etcd => {
                let method = connection.method("/etcdserverpb.Maintenance/Status");
                let status = connection.call::<_, Status>(&method, &Ignored {}).await;
                status.is_ok_and(|status| {
                    status.leader != 0 && status.header.is_some_and(|h| h.member_id == status.leader)
                })
            }
            Peer::Baton => self.write(&connection, &self.method(&connection), u128::MAX).await.is_ok(),
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, peer, clients, connections, seconds, addresses @ ..] = arguments.as_slice() else {
        panic!("usage: put_speed etcd|baton CLIENTS CONNECTIONS SECONDS ADDRESS...")
    };
    let peer = if peer == "etcd" { Peer::Etcd } else { Peer::Baton };
    let number = |text: &String| text.parse::<u64>().expect("a number");
    let mut leader = None;
    for address in addresses {
        if peer.leads(address).await {
            leader = Some(address);
        }
    }
    let leader = leader.expect("one of the addresses leads");
    let mut open = Vec::new();
    for _ in 0..number(connections) {
        open.push(Connection::open(leader).await.expect("the leader takes connections"));
    }
    // Names differ between runs, so that each write makes something new.
    let run = u128::from(std::process::id()) << 96;
    let (started, length) = (Instant::now(), Duration::from_secs(number(seconds)));
    let mut writing = tokio::task::JoinSet::new();
    for client in 0..number(clients) {
        let connection = open[client as usize % open.len()].clone();
        let method = peer.method(&connection);
        writing.spawn(async move {
            let mut times = Vec::new();
            while started.elapsed() < length {
                let before = Instant::now();
                let name = run | u128::from(client) << 64 | times.len() as u128;
                peer.write(&connection, &method, name).await.expect("a write succeeds");
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
