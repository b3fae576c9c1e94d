//! A prefill worker dies in the middle of a handoff: what had arrived whole stays, and the next attempt brings or computes
//! the rest only. And what decode refuses is held by nobody.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use baton_core::net::BoxFuture;
use baton_core::{Aborted, Listener, Net, Refused, Stream};
use baton_engine::testing::{hash_spec, request};
use baton_engine::{EngineConfig, HashBackend};
use baton_proto::TcpNet;
use baton_worker::testing::hash_model;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::cluster::{Cluster, SIZES, eventually};
use crate::gate::Point;
use crate::gateway::{Gateway, Order, alone};

/// Where the decode worker listens for blocks on this net, and where it says it can be reached: elsewhere, as behind a
/// mapped port, so that the bytes come over the net and not by shared memory.
const KV: (&str, Option<&str>) = ("kv:0", Some("kv:1"));

/// TCP that counts what the receiver of blocks has read.
#[derive(Clone, Default)]
struct Watched {
    address: Arc<Mutex<String>>,
    read: Arc<AtomicUsize>,
    /// PINGs since anything else came.
    pings: Arc<AtomicUsize>,
}

/// What a link says when it has had nothing to say for a while (`HANDOFF_PING_MS`): a header and no more.
fn is_ping(bytes: &[u8]) -> bool {
    bytes.len() == 64 && bytes[..4] == *b"bKVh" && bytes[5] == 12
}

impl Watched {
    fn read(&self) -> usize {
        self.read.load(SeqCst)
    }

    /// Resolves when so many bytes have been read and looked at, and the sender has nothing more to say.
    async fn taken(&self, bytes: usize) {
        eventually("the blocks have come", || self.read() >= bytes && self.pings.load(SeqCst) >= 2).await;
    }
}

impl Net for Watched {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        let address = if address == "kv:1" { self.address.lock().unwrap().clone() } else { address.to_string() };
        Box::pin(async move { TcpNet.connect(&address).await })
    }

    fn listen<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        Box::pin(async move {
            if address != "kv:0" {
                return TcpNet.listen(address).await;
            }
            let listener = TcpNet.listen("127.0.0.1:0").await?;
            *self.address.lock().unwrap() = listener.address();
            Ok(Box::new(Counting { listener, net: self.clone() }) as Box<dyn Listener>)
        })
    }
}

struct Counting {
    listener: Box<dyn Listener>,
    net: Watched,
}

impl Listener for Counting {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Stream>> {
        let net = self.net.clone();
        Box::pin(async move { Ok(Box::new(Counted { stream: self.listener.accept().await?, net }) as Stream) })
    }

    fn address(&self) -> String {
        self.listener.address()
    }
}

struct Counted {
    stream: Stream,
    net: Watched,
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        let new = &buf.filled()[before..];
        self.net.read.fetch_add(new.len(), SeqCst);
        match is_ping(new) {
            true => self.net.pings.fetch_add(1, SeqCst),
            false => self.net.pings.swap(0, SeqCst),
        };
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

fn expected(order: &Order) -> std::collections::BTreeMap<u32, Vec<baton_proto::v1::Token>> {
    let spec = hash_spec();
    alone(spec.clone(), SIZES, &mut HashBackend::new(spec.vocab), order)
}

/// Blocks have four tokens and steps sixteen.
const PROMPT: usize = 8 * 16 + 5;
/// Blocks that arrive before the prefill worker dies.
const SENT: usize = 5 * 4;

/// A cluster whose first prefill worker has died after it had sent twenty of 34 blocks; the request's tokens if nothing
/// had died, and the order.
async fn died_in_the_middle(prefix_cache: bool) -> (Watched, Cluster, Gateway, Order, usize) {
    let net = Watched::default();
    let sizes = EngineConfig { prefix_cache, ..SIZES };
    let mut cluster = Cluster::over(Arc::new(net.clone()), KV, 2, 1, sizes, hash_model).await;
    let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| (i * 13 + 5) % 1000).collect();
    let order = Order::new(request(1, &prompt, 40), &cluster.decodes[0], Some(&cluster.prefills[0]));
    cluster.prefills[0].gate.hold(Point::After(cluster.prefills[0].gate.steps() + 5));
    let mut gateway = Gateway::connect(&cluster, &cluster.decodes[0]).await;
    let handle = gateway.start(&order);
    cluster.prefills[0].gate.held().await;
    let block = cluster.decodes[0].running.shell().spec.layout.block_bytes();
    net.taken(SENT * block).await;
    cluster.prefills[0].kill();
    assert_eq!(gateway.finish(handle).await.aborted(), Aborted::PrefillLost);
    cluster.prefills[0].gate.open();
    cluster.prefills.remove(0);
    cluster.is_clean().await;
    (net, cluster, gateway, order, block)
}

/// Another prefill worker sends what is lacking, and nothing else.
#[tokio::test]
async fn another_prefill_worker_sends_what_did_not_arrive() {
    let (net, cluster, mut gateway, order, block) = died_in_the_middle(true).await;
    assert_eq!(cluster.decodes[0].stats().cached, SENT, "{:?}", cluster.decodes[0].stats());
    let before = net.read();
    let again = Order { prefill: Some(cluster.prefills[0].place()), epoch: 2, ..order.clone() };
    let told = gateway.run(&again).await;
    let brought = net.read() - before;
    let lacking = PROMPT.div_ceil(4) - SENT;
    let layers = cluster.decodes[0].running.shell().spec.layout.layers as usize;
    // A header and an entry for each extent at most, and a few messages.
    let most = lacking * (block + layers * 88) + 1024;
    assert!((lacking * block..most).contains(&brought), "{brought} bytes, {block} a block");
    assert_eq!(told.tokens, expected(&order));
    cluster.is_clean().await;
}

/// The decode worker computes what is lacking by itself.
#[tokio::test]
async fn the_decode_worker_computes_what_did_not_arrive() {
    let (net, cluster, mut gateway, order, _) = died_in_the_middle(true).await;
    let (before, steps) = (net.read(), cluster.decodes[0].gate.steps());
    let told = gateway.run(&Order { prefill: None, epoch: 2, ..order.clone() }).await;
    assert!(net.read() - before < 1024, "only pings");
    // Four steps for 53 tokens, the last of which brings the first token; one for each of the others.
    assert_eq!(cluster.decodes[0].gate.steps() - steps, 4 + 39);
    assert_eq!(told.tokens, expected(&order));
    cluster.is_clean().await;
}

/// Without a prefix cache nothing has a name, so nothing stays.
#[tokio::test]
async fn without_a_prefix_cache_nothing_stays() {
    let (_, cluster, mut gateway, order, _) = died_in_the_middle(false).await;
    assert_eq!(cluster.decodes[0].stats().free, cluster.decodes[0].stats().total);
    let again = Order { prefill: Some(cluster.prefills[0].place()), epoch: 2, ..order.clone() };
    assert_eq!(gateway.run(&again).await.tokens, expected(&order));
    cluster.is_clean().await;
}

/// Another system's prefill worker computed, and kept for ever the blocks of a request that decode then refused before
/// admitting it. Here decode decides first: of a request that it refuses the prefill worker never hears.
#[tokio::test]
async fn blocks_are_not_stranded_when_decode_refuses_before_admission() {
    let sizes = EngineConfig { blocks: 12, ..SIZES };
    let cluster = Cluster::of(1, 1, sizes, hash_model).await;
    let order = |id: u128, tokens: u32| {
        let prompt: Vec<u32> = (0..tokens).map(|i| (i * 7 + id as u32 * 31) % 1000).collect();
        Order::new(request(id, &prompt, 8), &cluster.decodes[0], Some(&cluster.prefills[0]))
    };
    // One request has eight of decode's twelve blocks while its prefill stands still.
    cluster.prefills[0].gate.hold(Point::Step);
    let mut gateway = Gateway::connect(&cluster, &cluster.decodes[0]).await;
    let first = gateway.start(&order(1, 32));
    cluster.prefills[0].gate.held().await;
    let (steps, used) = (cluster.prefills[0].gate.steps(), cluster.prefills[0].stats());
    for id in 2..40 {
        assert_eq!(gateway.run(&order(id, 25)).await.refused(), Refused::NoCapacity);
    }
    assert_eq!((cluster.prefills[0].gate.steps(), cluster.prefills[0].stats()), (steps, used));
    cluster.prefills[0].gate.open();
    assert_eq!(gateway.finish(first).await.tokens[&0].len(), 8);
    cluster.is_clean().await;
    assert_eq!(gateway.run(&order(99, 25)).await.tokens[&0].len(), 8);
    cluster.is_clean().await;
}
