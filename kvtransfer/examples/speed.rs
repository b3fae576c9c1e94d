//! GB/s of the handoff over loopback TCP, and in one process, against a plain blocking socket in the same run.
//!
//! `cargo run --release -p baton-kvtransfer --example speed [rounds]`. Each round measures all of them in turn; the
//! figures are medians, the ratios medians of each round's ratio. Bytes are streamed from and to memory well beyond
//! the caches.
//!
//! Sketch: a plain socket copies every byte twice (in and out of the kernel). The link copies four times (the two
//! extra, gather and scatter, hit the caches) and hashes twice, on the same two cores.
#![allow(clippy::disallowed_methods)] // A benchmark: wall time, threads and sockets of its own.

#[path = "../tests/handoff/net.rs"]
#[allow(dead_code)]
mod net;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_core::{Arena, BlockId, BlockLayout, Epoch, KvDtype, RequestId};
use baton_kvtransfer::{Links, Receiver};

const TOTAL_BYTES: usize = 256 << 20;
const LAYERS: u32 = 4;
const DEADLINE: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() {
    let rounds = std::env::args().nth(1).map_or(5, |text| text.parse().expect("rounds: a number"));
    println!("{:>9} {:>9} {:>9} {:>9} {:>11} {:>11}", "extent", "socket", "tcp", "local", "tcp/socket", "local/socket");
    for (kib, kv_heads, head_dim, dtype) in [
        (16, 2, 128, KvDtype::Bf16),
        (64, 8, 128, KvDtype::Bf16),
        (256, 32, 128, KvDtype::Bf16),
        (1024, 32, 256, KvDtype::F32),
    ] {
        let layout = BlockLayout { layers: LAYERS, kv_heads, head_dim, block_tokens: 16, dtype };
        assert_eq!(layout.layer_bytes(), kib << 10);
        measure(layout, rounds).await;
    }
}

async fn measure(layout: BlockLayout, rounds: usize) {
    let blocks = TOTAL_BYTES / layout.block_bytes();
    let (source, target) = (Arc::new(Arena::new(layout, blocks)), Arc::new(Arena::new(layout, blocks)));
    let noise: Vec<u8> = (0..layout.layer_bytes()).map(|i| ((i * 31) >> 3) as u8).collect();
    for (arena, block, layer) in [&source, &target]
        .into_iter()
        .flat_map(|arena| (0..blocks as u32).flat_map(move |b| (0..LAYERS as usize).map(move |l| (arena, b, l))))
    {
        // SAFETY: nobody else has the arena yet.
        unsafe { arena.write_layer(block, layer, &noise) };
    }
    let net = Arc::new(net::Loopback);
    let receiver = Receiver::listen(net.clone(), "127.0.0.1:0", target, "speed").await.expect("listen");
    let tcp = Links::new(net.clone(), source.clone(), "speed");
    let local = Links::new(net, source, "speed");
    local.add_local(&receiver);
    handoff(&tcp, &receiver, blocks).await;
    let mut plain = Plain::new(layout.layer_bytes());
    let mut seconds = Vec::new();
    for _ in 0..rounds {
        let socket = tokio::task::block_in_place(|| plain.round());
        seconds.push([socket, handoff(&tcp, &receiver, blocks).await, handoff(&local, &receiver, blocks).await]);
    }
    let speed = |which: usize| TOTAL_BYTES as f64 / 1e9 / median(seconds.iter().map(|s| s[which]));
    let ratio = |which: usize| median(seconds.iter().map(|s| s[0] / s[which]));
    let [socket, tcp, local] = [0, 1, 2].map(speed);
    let kib = layout.layer_bytes() >> 10;
    println!("{kib:>5} KiB {socket:>9.2} {tcp:>9.2} {local:>9.2} {:>11.2} {:>11.2}", ratio(1), ratio(2));
}

/// Seconds of one transfer of all blocks, layer by layer, from its grant to the receiver's word that it is complete.
async fn handoff(links: &Links, receiver: &Receiver, blocks: usize) -> f64 {
    let start = Instant::now();
    let ids: Vec<BlockId> = (0..blocks as u32).map(|index| BlockId { index, generation: 1 }).collect();
    let (grant, incoming) = receiver.open(RequestId(1), Epoch(1), ids.clone(), DEADLINE, ());
    let pairs: Vec<(usize, BlockId)> = ids.into_iter().enumerate().collect();
    let mut outgoing = links.open(grant).await.expect("open");
    let sending = tokio::spawn(async move {
        for layer in 0..LAYERS as usize {
            outgoing.send(layer, &pairs).await.expect("send");
        }
        outgoing.commit().await.expect("commit")
    });
    incoming.wait().await.expect("arrives");
    sending.await.expect("sender");
    start.elapsed().as_secs_f64()
}

/// Blocking sockets, one thread at each end, one write and one read per extent.
struct Plain {
    stream: TcpStream,
    source: Vec<u8>,
    bytes: usize,
}

impl Plain {
    fn new(bytes: usize) -> Plain {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let stream = TcpStream::connect(listener.local_addr().expect("bound")).expect("connect");
        stream.set_nodelay(true).expect("nodelay");
        let mut far = listener.accept().expect("accept").0;
        std::thread::spawn(move || {
            let mut target = vec![1u8; TOTAL_BYTES];
            loop {
                for part in target.chunks_mut(bytes) {
                    if far.read_exact(part).is_err() {
                        return;
                    }
                }
                far.write_all(&[1]).expect("answer");
            }
        });
        let mut plain = Plain { stream, source: vec![1; TOTAL_BYTES], bytes };
        plain.round();
        plain
    }

    fn round(&mut self) -> f64 {
        let start = Instant::now();
        for part in self.source.chunks(self.bytes) {
            self.stream.write_all(part).expect("write");
        }
        self.stream.read_exact(&mut [0]).expect("answer");
        start.elapsed().as_secs_f64()
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
