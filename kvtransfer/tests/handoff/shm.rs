//! The shared-memory link: within this process, and from another one that is killed or stopped in the middle.

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use baton_core::{Arena, BlockLayout, Epoch, KvDtype, RequestId, Rng, TransferId};
use baton_kvtransfer::wire::{BY_REFERENCE, Body, Kind, Tag};
use baton_kvtransfer::{Fallback, Grant, Links, Preferred, Receiver, TransferError, Ways};

use crate::net::Loopback;
use crate::raw::Raw;
use crate::world::{EPOCH, LAYOUT, MODEL, REQUEST, World, fill, ids, pairs, until};

/// Slices of whole stripes and of others, so that both ways of copying are taken.
pub(crate) const LAYOUTS: [BlockLayout; 4] = [
    LAYOUT,
    BlockLayout { layers: 2, kv_heads: 8, head_dim: 128, block_tokens: 16, dtype: KvDtype::Bf16 },
    BlockLayout { layers: 2, kv_heads: 3, head_dim: 5, block_tokens: 7, dtype: KvDtype::F32 },
    BlockLayout { layers: 2, kv_heads: 3, head_dim: 6, block_tokens: 7, dtype: KvDtype::Int8 },
];

/// Bytes arrive identical, no byte of a block goes over a connection, and nothing is a fallback.
#[tokio::test]
async fn blocks_arrive_by_reference() {
    for layout in LAYOUTS {
        let world = World::shared(layout, 40).await;
        let (targets, sources) = (ids(0..32), ids((0..32).map(|i| 39 - i)));
        let (grant, incoming) = world.grant(&targets);
        let mut outgoing = world.links.open(grant).await.unwrap();
        for layer in 0..layout.layers as usize {
            outgoing.send(layer, &pairs(&sources)).await.unwrap();
        }
        let committed = outgoing.commit().await.unwrap();
        let (_guard, received) = incoming.wait().await.unwrap();
        assert_eq!(committed, received);
        assert!(world.equal((0..32).map(|i| (39 - i, i))));
        let counters = world.links.counters();
        assert_eq!((counters.shm, counters.tcp, counters.connected), (1, 0, 1));
        assert!(Fallback::ALL.iter().all(|reason| counters.fallbacks(*reason) == 0));
        assert_eq!(world.counters().dropped_total(), 0);
    }
}

/// An arena of this process's own memory goes by tcp, and so does a shared one to a receiver of the first release; both
/// are counted with their reasons.
#[tokio::test]
async fn fallbacks_are_counted() {
    let world = World::new(4).await;
    let (grant, _incoming) = world.grant_first(4);
    drop(world.links.open(grant).await.unwrap());
    assert_eq!((world.links.counters().tcp, world.links.counters().fallbacks(Fallback::NotShared)), (1, 1));

    let net = Loopback;
    let mut old = baton_core::Net::listen(&net, "127.0.0.1:0").await.unwrap();
    let links = Links::new(Arc::new(net), Arc::new(Arena::shared(LAYOUT, 4).unwrap()), MODEL);
    links.connect(&old.address());
    let mut raw = Raw::new(old.accept().await.unwrap());
    let Body::Hello { text, features } = raw.hear().await.unwrap().body else { panic!("not greeted") };
    assert_ne!(features, 0);
    raw.say(Tag::default(), Body::Hello { text, features: 0 }).await;
    until(|| links.counters().fallbacks(Fallback::NotOffered) == 1).await;
}

/// An offer that leads nowhere (the receiver is on another host, or in another network namespace).
#[tokio::test]
async fn an_offer_that_leads_nowhere_falls_back() {
    let net = Loopback;
    let mut far = baton_core::Net::listen(&net, "127.0.0.1:0").await.unwrap();
    let links = Links::new(Arc::new(net), Arc::new(Arena::shared(LAYOUT, 4).unwrap()), MODEL);
    links.connect(&far.address());
    let mut raw = Raw::new(far.accept().await.unwrap());
    let hello = raw.hear().await.unwrap();
    raw.say(hello.tag, hello.body).await;
    let port = far.address().rsplit(':').next().unwrap().to_string();
    raw.say(Tag::default(), Body::Offer(format!("baton-kv-nobody {port}"))).await;
    until(|| links.counters().fallbacks(Fallback::Unreachable) == 1).await;
    until(|| links.counters().connected == 1).await;
}

/// A relay in front of a receiver of this host: the bytes go through it, as whoever put it there expects.
#[tokio::test]
async fn a_relay_is_not_gone_round() {
    let world = World::shared(LAYOUT, 4).await;
    let net = Loopback;
    let mut relay = baton_core::Net::listen(&net, "127.0.0.1:0").await.unwrap();
    let behind = world.receiver.address();
    let address = relay.address();
    tokio::spawn(async move {
        let mut near = relay.accept().await.unwrap();
        let mut far = baton_core::Net::connect(&Loopback, &behind).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
    });
    let (grant, incoming) = world.grant_first(4);
    let mut outgoing = world.links.open(Grant { address, ..grant }).await.unwrap();
    for layer in 0..3 {
        outgoing.send(layer, &pairs(&ids(0..4))).await.unwrap();
    }
    outgoing.commit().await.unwrap();
    incoming.wait().await.unwrap();
    let counters = world.links.counters();
    assert_eq!((counters.tcp, counters.shm, counters.fallbacks(Fallback::Relayed)), (1, 0, 1));
}

/// A frame by reference from a sender that has brought no arena ends its link.
#[tokio::test]
async fn a_reference_without_an_arena_closes_the_link() {
    let world = World::new(4).await;
    let (grant, incoming) = world.grant_first(4);
    let mut raw = Raw::opened(&Loopback, &grant).await;
    let mut frame = crate::raw::Frame::new(&world.source, &grant, 0, &pairs(&ids(0..1)));
    assert_eq!(frame.header.kind, Kind::Data);
    frame.payload.truncate(24);
    (frame.header.flags, frame.header.length) = (BY_REFERENCE, 24);
    raw.data(frame).await;
    assert!(matches!(incoming.wait().await.err(), Some(TransferError::Lost { .. })));
    assert_eq!(world.counters().extents, 0);
}

/// A source block that its sender gives away while it is fetched shows in the checksum: the extent never counts, and
/// when it is asked for again the sender notices that it is another one.
#[tokio::test]
async fn a_source_block_that_changes_never_counts() {
    let world = World::shared(LAYOUTS[1], 4).await;
    let (grant, incoming) = world.grant_first(4);
    let mut outgoing = world.links.open(grant).await.unwrap();
    // Stalls the receiver's task, which shares this thread, until the block has been given away.
    let blocks = pairs(&ids(0..4));
    {
        let mut sending = std::pin::pin!(outgoing.send(0, &blocks));
        assert!(std::future::poll_fn(|cx| std::task::Poll::Ready(sending.as_mut().poll(cx).is_pending())).await);
        // SAFETY: the receiver has not run since the frame was queued.
        unsafe { world.source.write_layer(2, 0, &vec![9; LAYOUTS[1].layer_bytes()]) };
        sending.await.unwrap();
    }
    outgoing.send(1, &pairs(&ids(0..4))).await.unwrap();
    assert_eq!(outgoing.commit().await, Err(TransferError::Corrupt { layer: 0, position: 2 }));
    assert!(incoming.wait().await.is_err());
    assert_eq!(world.counters().dropped(baton_kvtransfer::Dropped::Damaged), 1);
    until(|| world.held.count() == 0).await;
}

/// Another process, which has the same source arena as `World` fills.
pub(crate) struct Sender(Child);

impl Sender {
    fn start(grant: &Grant, layers: usize) -> Sender {
        Sender::spawn(grant, layers, "shm", None)
    }

    /// From a device, with other bytes than those of the arena.
    pub(crate) fn from_device(grant: &Grant, layers: usize) -> Sender {
        Sender::spawn(grant, layers, "device", None)
    }

    /// Over UCX, which uses these transports at its end.
    pub(crate) fn over_ucx(grant: &Grant, layers: usize, transports: &str) -> Sender {
        Sender::spawn(grant, layers, "ucx", Some(transports))
    }

    fn spawn(grant: &Grant, layers: usize, link: &str, ucx: Option<&str>) -> Sender {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "shm::other_process", "--ignored", "--nocapture"])
            .envs(ucx.map(|transports| ("UCX_TLS", transports)))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let line = format!("{} {} {} {layers} {link}\n", grant.address, grant.transfer.0, grant.blocks.len());
        child.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
        Sender(child)
    }

    pub(crate) fn signal(&self, signal: libc::c_int) {
        // SAFETY: a signal to a child that has not been waited for.
        unsafe { libc::kill(self.0.id() as libc::pid_t, signal) };
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Not a test: the body of the other process. Sends so many layers of the granted blocks, commits if those are all, and
/// otherwise waits to be killed.
#[tokio::test]
#[ignore = "the other process of the tests below"]
async fn other_process() {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [address, transfer, blocks, layers, link] = fields[..] else { panic!("{line}") };
    let mut source = Arena::shared(LAYOUTS[1], 64).unwrap();
    assert!(!source.bytes_mut().is_empty());
    fill(&source, &mut Rng::new(1));
    if link == "device" {
        source.attach(Arc::new(crate::device::Device::filled(LAYOUTS[1], 64)));
    }
    let preferred = if link == "ucx" { Preferred::Ucx } else { Preferred::Best };
    let links =
        Links::with(Arc::new(Loopback), Arc::new(source), MODEL, Ways { preferred, tls: None, ..Ways::default() });
    let (transfer, blocks) = (TransferId(transfer.parse().unwrap()), ids(0..blocks.parse().unwrap()));
    let (address, layout, deadline_ms) = (address.to_string(), LAYOUTS[1], 60_000);
    let grant = Grant {
        transfer,
        attempt: 1,
        epoch: EPOCH,
        request: REQUEST,
        address,
        layout,
        slice: None,
        blocks,
        deadline_ms,
        ticket: 0,
    };
    let pairs = pairs(&grant.blocks);
    let mut outgoing = links.open_from_device(grant).await.unwrap();
    assert_eq!(outgoing.is_from_device(), link == "device");
    let layers = layers.parse().unwrap();
    for layer in 0..layers {
        outgoing.send(layer, &pairs).await.unwrap();
    }
    let counters = links.counters();
    let taken = match link {
        "ucx" => counters.ucx,
        "device" => counters.gpu,
        _ => counters.shm,
    };
    assert_eq!(taken, 1);
    match layers as u32 == LAYOUTS[1].layers {
        true => drop(outgoing.commit().await.unwrap()),
        false => std::future::pending().await,
    }
}

async fn receiving() -> World {
    World::with_layout(LAYOUTS[1], 64).await
}

#[tokio::test]
async fn another_process_hands_off() {
    let world = receiving().await;
    let (grant, incoming) = world.grant_first(48);
    let _sender = Sender::start(&grant, 2);
    incoming.wait().await.unwrap();
    assert!(world.equal((0..48).map(|i| (i, i))));
}

/// Killed after the first layer: the blocks are free at once, and nothing counts as complete.
#[tokio::test]
async fn a_killed_sender_leaves_nothing() {
    let world = receiving().await;
    let (grant, incoming) = world.grant_first(48);
    let sender = Sender::start(&grant, 1);
    until(|| world.counters().extents == 48).await;
    drop(sender);
    assert!(matches!(incoming.wait().await.err(), Some(TransferError::Lost { .. })));
    until(|| world.held.count() == 0 && world.counters().links == 0).await;
    assert_eq!(world.counters().completed, 0);
}

/// Stopped in the middle of a transfer that is then aborted: it cannot write, so its blocks are free as soon as its link
/// is closed, used by another transfer, and untouched when it goes on.
#[tokio::test]
async fn a_stopped_sender_cannot_write_late() {
    let world = receiving().await;
    let (grant, incoming) = world.grant_first(48);
    let sender = Sender::start(&grant, 1);
    until(|| world.counters().extents == 48).await;
    sender.signal(libc::SIGSTOP);
    drop(incoming);
    until(|| world.held.count() == 0 && world.counters().links == 0).await;
    let local = Links::new(Arc::new(Loopback), world.source.clone(), MODEL);
    local.add_local(&world.receiver);
    let (next, incoming) = world.receiver.open(RequestId(8), Epoch(6), ids(0..48), crate::world::DEADLINE, ());
    let mut outgoing = local.open(next).await.unwrap();
    for layer in 0..2 {
        outgoing.send(layer, &pairs(&ids((0..48).map(|i| 63 - i)))).await.unwrap();
    }
    outgoing.commit().await.unwrap();
    incoming.wait().await.unwrap();
    // That it has gone on shows in its connecting again.
    sender.signal(libc::SIGCONT);
    until(|| world.counters().links == 1).await;
    drop(sender);
    assert!(world.equal((0..48).map(|i| (63 - i, i))));
}

/// A receiver that closes takes its socket and its links with it.
#[tokio::test]
async fn a_closed_receiver_ends_its_links() {
    let world = World::shared(LAYOUT, 4).await;
    let (grant, incoming) = world.grant_first(4);
    let outgoing = world.links.open(grant).await.unwrap();
    assert_eq!(world.links.counters().shm, 1);
    let World { receiver, held, .. } = world;
    Receiver::close(receiver).await;
    assert!(incoming.wait().await.is_err());
    assert!(outgoing.commit().await.is_err());
    assert_eq!(held.count(), 0);
}
