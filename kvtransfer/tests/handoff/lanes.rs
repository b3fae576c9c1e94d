//! Links of several connections: frames are spread over them, what is said goes over the first one, and they end together.

use std::io;
use std::sync::{Arc, Mutex};

use baton_core::net::BoxFuture;
use baton_core::{Arena, BlockLayout, Epoch, KvDtype, Listener, Net, Stream};
use baton_kvtransfer::wire::{self, Body, FEATURE_LANES, FEATURE_RESEND, Kind, LinkKey, Message, Tag};
use baton_kvtransfer::{Committed, Dropped, Fallback, Links, Outgoing, Partial, Preferred, TransferError, Ways};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::sync::watch;

use crate::memory::Memory;
use crate::net::Loopback;
use crate::raw::{Frame, Raw};
use crate::tls::Authority;
use crate::world::{DEADLINE, EPOCH, MODEL, REQUEST, World, ids, pairs, until};

/// Layers of 64 KiB, four to a frame: a layer of 32 blocks is eight frames, of which two connections take four each.
const LAYOUT: BlockLayout =
    BlockLayout { layers: 4, kv_heads: 8, head_dim: 128, block_tokens: 16, dtype: KvDtype::Bf16 };
const BLOCKS: u32 = 32;
/// As much as a connection holds on its way: all that it carries of two layers.
const PIPE_BYTES: usize = 4 << 20;

/// Memory whose connections can be held up or cut, each by the order in which they were made.
#[derive(Clone, Default)]
struct Paths(Arc<Inner>);

#[derive(Default)]
struct Inner {
    net: Memory,
    /// Bytes that the connecting side has sent, by connection.
    carried: Mutex<Vec<usize>>,
    /// Nothing goes on over this one.
    held: watch::Sender<Option<usize>>,
    /// This one dies when the connecting side has sent so much.
    cut: Mutex<Option<(usize, usize)>>,
}

impl Paths {
    fn hold(&self, connection: Option<usize>) {
        self.0.held.send_replace(connection);
    }

    fn carried(&self) -> Vec<usize> {
        self.0.carried.lock().unwrap().clone()
    }

    /// Of the connection's bytes, those that it may still carry.
    fn allows(&self, connection: usize, bytes: usize) -> usize {
        let carried = self.0.carried.lock().unwrap()[connection];
        match *self.0.cut.lock().unwrap() {
            Some((cut, after)) if cut == connection => bytes.min(after.saturating_sub(carried)),
            _ => bytes,
        }
    }

    async fn pass(self, connection: usize, mut near: Stream, mut far: Stream) {
        let mut held = self.0.held.subscribe();
        let (mut up, mut down) = (vec![0; 64 << 10], vec![0; 4096]);
        loop {
            let _ = held.wait_for(|held| *held != Some(connection)).await;
            tokio::select! {
                read = near.read(&mut up) => {
                    let bytes = read.unwrap_or(0);
                    let _ = held.wait_for(|held| *held != Some(connection)).await;
                    let allowed = self.allows(connection, bytes);
                    let passed = far.write_all(&up[..allowed]).await;
                    self.0.carried.lock().unwrap()[connection] += allowed;
                    if bytes == 0 || allowed < bytes || passed.is_err() {
                        return;
                    }
                }
                read = far.read(&mut down) => {
                    let bytes = read.unwrap_or(0);
                    if bytes == 0 || near.write_all(&down[..bytes]).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

impl Net for Paths {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        Box::pin(async move {
            let far = self.0.net.connect(address).await?;
            let (here, near) = duplex(PIPE_BYTES);
            let connection = {
                let mut carried = self.0.carried.lock().unwrap();
                carried.push(0);
                carried.len() - 1
            };
            tokio::spawn(self.clone().pass(connection, Box::new(near), far));
            Ok(Box::new(here) as Stream)
        })
    }

    fn listen<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        self.0.net.listen(address)
    }
}

fn ways(lanes: usize) -> Ways {
    Ways { lanes, ..Ways::default() }
}

/// A world whose links have so many connections.
async fn world(net: Arc<dyn Net>, lanes: usize) -> World {
    let World { source, target, receiver, held, .. } =
        World::with(net.clone(), Arena::new(LAYOUT, BLOCKS as usize), [Preferred::Best; 2], [None, None]).await;
    let links = Links::with(net, source.clone(), MODEL, ways(lanes));
    World { source, target, receiver, links, held }
}

async fn send(mut outgoing: Outgoing) -> Result<Committed, TransferError> {
    for layer in 0..LAYOUT.layers as usize {
        outgoing.send(layer, &pairs(&ids(0..BLOCKS))).await?;
    }
    outgoing.commit().await
}

async fn completes(world: &World) {
    let (grant, incoming) = world.grant_first(BLOCKS);
    let sent = send(world.links.open(grant).await.unwrap()).await.unwrap();
    assert_eq!(incoming.wait().await.unwrap().1, sent);
    assert!(world.equal((0..BLOCKS).map(|i| (i, i))));
}

/// All connections carry frames, nothing is taken twice, and it is one link at either end.
#[tokio::test(start_paused = true)]
async fn frames_are_spread_over_the_lanes() {
    for lanes in 1..=4 {
        let net = Paths::default();
        let world = world(Arc::new(net.clone()), lanes).await;
        completes(&world).await;
        let carried = net.carried();
        assert_eq!(carried.len(), lanes);
        let each = LAYOUT.layers as usize * BLOCKS as usize * LAYOUT.layer_bytes() / lanes.min(2);
        assert!(carried[..lanes.min(2)].iter().all(|bytes| *bytes > each * 9 / 10), "{carried:?}");
        assert_eq!((world.counters().links, world.links.counters().connected), (1, 1));
        assert_eq!((world.counters().dropped_total(), world.links.counters().fallbacks(Fallback::FewerLanes)), (0, 0));
    }
}

/// The same over real sockets, in plain and under TLS, many transfers at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_transfers_share_the_lanes() {
    for encrypted in [false, true] {
        let authority = Authority::new();
        let tls = || encrypted.then(|| authority.worker());
        let (net, source) = (Arc::new(Loopback), Arena::new(LAYOUT, BLOCKS as usize));
        let made = World::with(net.clone(), source, [Preferred::Tcp; 2], [tls(), tls()]).await;
        made.receiver.issue_tickets([9; 32], true);
        let ways = Ways { preferred: Preferred::Tcp, tls: tls(), lanes: 3 };
        let links = Links::with(net, made.source.clone(), MODEL, ways);
        let world = World { links, ..made };
        let mut sending = tokio::task::JoinSet::new();
        let mut waiting = Vec::new();
        for _ in 0..8 {
            let (grant, incoming) = world.grant_first(BLOCKS);
            waiting.push(incoming);
            let links = world.links.clone();
            sending.spawn(async move { send(links.open(grant).await?).await });
        }
        while let Some(sent) = sending.join_next().await {
            sent.unwrap().unwrap();
        }
        for incoming in waiting {
            incoming.wait().await.unwrap();
        }
        assert!(world.equal((0..BLOCKS).map(|i| (i, i))));
        assert_eq!((world.counters().dropped_total(), world.counters().links), (0, 1));
    }
}

/// A commit overtakes frames that are held up on another connection: it waits for them, and so does whoever relies on it.
#[tokio::test(start_paused = true)]
async fn a_commit_waits_for_the_other_lanes() {
    let net = Paths::default();
    let world = world(Arc::new(net.clone()), 2).await;
    completes(&world).await;
    let before = world.counters();
    let (grant, incoming) = world.grant_first(BLOCKS);
    let mut outgoing = world.links.open(grant).await.unwrap();
    net.hold(Some(1));
    let said = net.carried()[0];
    for layer in 0..2 {
        outgoing.send(layer, &pairs(&ids(0..BLOCKS))).await.unwrap();
    }
    let committing = tokio::spawn(outgoing.commit());
    // Half of two layers, and a barrier and a commit behind them.
    let half = BLOCKS as usize * (wire::ENTRY_BYTES + LAYOUT.layer_bytes()) + 8 * wire::HEADER_BYTES;
    until(|| net.carried()[0] >= said + half + 2 * wire::HEADER_BYTES + 24 + 16).await;
    until(|| world.counters().extents == before.extents + u64::from(BLOCKS)).await;
    assert!(!committing.is_finished());
    assert_eq!(world.counters().failed, 0, "not judged by what has come so far");
    net.hold(None);
    // Two layers of four: judged once all that was sent is there, and found to lack the rest.
    assert!(committing.await.unwrap().is_err());
    let expected = TransferError::Incomplete { arrived: 64, expected: 128 };
    assert_eq!(incoming.wait().await.err(), Some(expected));
    until(|| world.held.count() == 0).await;
    completes(&world).await;
}

/// One connection dies at every boundary of the frames that it carries, and in the middle of each, while the other lives: the
/// link ends, both ends fail, nothing stays reserved, and what comes after completes over a new one.
#[tokio::test(start_paused = true)]
async fn a_lane_that_dies_at_any_frame_takes_the_link_with_it() {
    let hello =
        Message { tag: Tag::default(), body: Body::Hello { text: wire::compatibility(&LAYOUT, MODEL), features: 0 } };
    let open = Body::Open { request: REQUEST, grant: 0, ticket: None };
    let open = Message { tag: Tag::default(), body: open }.encode().len();
    let frame = wire::HEADER_BYTES + 4 * (wire::ENTRY_BYTES + LAYOUT.layer_bytes());
    let memory = Paths::default();
    let world = world(Arc::new(memory.clone()), 2).await;
    for (lane, said) in [(0, open), (1, 0)] {
        for half in 0..32 {
            // A sender that has not connected yet, to the same receiver.
            let net = Paths(Arc::new(Inner { net: memory.0.net.clone(), ..Inner::default() }));
            *net.0.cut.lock().unwrap() = Some((lane, hello.encode().len() + said + half * frame / 2));
            let links = Links::with(Arc::new(net), world.source.clone(), MODEL, ways(2));
            let (grant, incoming) = world.grant_first(BLOCKS);
            let outgoing = links.open(grant).await.unwrap();
            let sent = send(outgoing).await;
            assert!(matches!(sent, Err(TransferError::Lost { .. })), "lane {lane}, {half}: {sent:?}");
            let waited = incoming.wait().await.err();
            assert!(matches!(waited, Some(TransferError::Lost { .. })), "lane {lane}, {half}: {waited:?}");
            until(|| world.held.count() == 0 && world.counters().held == 0).await;
            assert_eq!((world.counters().completed, world.counters().dropped(Dropped::Damaged)), (0, 0));
        }
    }
    until(|| world.counters().links == 0).await;
    completes(&world).await;
    assert_eq!(world.counters().links, 1);
}

/// What had arrived over both connections when one died stays, and the next attempt sends the rest only.
#[tokio::test(start_paused = true)]
async fn what_arrived_over_all_lanes_is_kept() {
    let net = Paths::default();
    let world = world(Arc::new(net.clone()), 2).await;
    completes(&world).await;
    let (grant, mut incoming) = world.grant_first(BLOCKS);
    let mut outgoing = world.links.open(grant).await.unwrap();
    let (all, second) = (pairs(&ids(0..BLOCKS)), pairs(&ids(0..BLOCKS))[16..].to_vec());
    for layer in 0..3 {
        outgoing.send(layer, &all).await.unwrap();
    }
    outgoing.send(3, &all[..16]).await.unwrap();
    let extents = u64::from(BLOCKS) * (4 + 3) + 16;
    until(|| world.counters().extents == extents).await;
    *net.0.cut.lock().unwrap() = Some((1, 0));
    let partial: Partial<_> = match incoming.wait_or_keep().await {
        Err(Ok(partial)) => partial,
        _ => panic!("it was cut"),
    };
    drop(outgoing);
    *net.0.cut.lock().unwrap() = None;
    assert_eq!(partial.whole().iter().filter(|whole| **whole).count(), 16);
    let lacking = partial.lacking();
    let (grant, incoming) = world.receiver.resume(partial, Epoch(EPOCH.0 + 1), DEADLINE);
    assert_eq!(grant.blocks, lacking);
    let mut outgoing = world.links.open(grant).await.unwrap();
    let rest: Vec<_> = second.iter().map(|(_, block)| *block).enumerate().collect();
    for layer in 0..LAYOUT.layers as usize {
        outgoing.send(layer, &rest).await.unwrap();
    }
    outgoing.commit().await.unwrap();
    incoming.wait().await.unwrap();
    assert!(world.equal((0..BLOCKS).map(|i| (i, i))));
}

/// Frames that arrive late over one connection, after the transfer was given up and its blocks went to another, write nothing.
#[tokio::test(start_paused = true)]
async fn late_frames_of_a_lane_cannot_write() {
    let net = Paths::default();
    let world = world(Arc::new(net.clone()), 2).await;
    completes(&world).await;
    let (grant, incoming) = world.grant_first(BLOCKS);
    let mut outgoing = world.links.open(grant).await.unwrap();
    net.hold(Some(1));
    let extents = world.counters().extents;
    outgoing.send(0, &pairs(&ids((0..BLOCKS).rev()))).await.unwrap();
    until(|| world.counters().extents == extents + 16).await;
    drop(incoming);
    // The sender has spoken its last word over the first connection.
    until(|| world.held.count() == 0 && world.counters().held == 0).await;
    let next: Vec<_> =
        ids(0..BLOCKS).iter().map(|b| baton_core::BlockId { generation: b.generation + 1, ..*b }).collect();
    let (_next, _incoming) = world.grant(&next);
    let there: Vec<_> = (0..BLOCKS).map(|block| crate::world::read(&world.target, block, 0)).collect();
    net.hold(None);
    until(|| world.counters().dropped(Dropped::Unknown) >= 4).await;
    assert!((0..BLOCKS).all(|block| crate::world::read(&world.target, block, 0) == there[block as usize]));
    assert_eq!((world.counters().links, world.counters().extents), (1, extents + 16));
}

/// Who does not know the link's key joins nothing; nor does a second one under a number that is taken, or one beyond the last.
#[tokio::test]
async fn a_stranger_does_not_join() {
    let world = world(Arc::new(Loopback), 1).await;
    world.receiver.issue_tickets([3; 32], true);
    let mut first = greeted(&world, Tag::default()).await.expect("greeted");
    let key = LinkKey::of(first.1).0;
    assert!(key.0 > u128::from(u64::MAX), "not to be guessed");
    for tag in [LinkKey(1).tag(1), LinkKey(key.0 ^ 1).tag(1), key.tag(4), key.tag(u32::MAX)] {
        assert!(greeted(&world, tag).await.is_none(), "{tag:?}");
    }
    let mut second = greeted(&world, key.tag(1)).await.expect("joins");
    assert_eq!(LinkKey::of(second.1), (key, 1));
    assert!(greeted(&world, key.tag(1)).await.is_none());
    // Over another than the first nothing is said; and the two end together.
    second.0.say(Tag::default(), Body::Opened).await;
    assert!(second.0.hear().await.is_none() && first.0.hear().await.is_none());
    assert!(greeted(&world, key.tag(2)).await.is_none(), "the link is gone");
    until(|| world.counters().links == 0).await;
}

/// A connection that greets with `tag`, and the tag that it is greeted with; None if it is closed.
async fn greeted(world: &World, tag: Tag) -> Option<(Raw, Tag)> {
    let mut raw = Raw::connect(&Loopback, &world.receiver.address()).await;
    let features = FEATURE_RESEND | FEATURE_LANES | wire::FEATURE_TICKETS;
    raw.say(tag, Body::Hello { text: wire::compatibility(&LAYOUT, MODEL), features }).await;
    let answer = raw.hear().await?;
    matches!(answer.body, Body::Hello { .. }).then_some((raw, answer.tag))
}

/// A barrier for bytes of a connection that is not there, or over one that has no others, is nonsense: the link is closed.
#[tokio::test]
async fn a_barrier_without_its_lane_closes_the_link() {
    let world = world(Arc::new(Loopback), 1).await;
    let (mut raw, _) = greeted(&world, Tag::default()).await.unwrap();
    raw.say(Tag::default(), Body::Barrier(vec![(2, 1)])).await;
    assert!(raw.hear().await.is_none());
    let mut raw = Raw::connect(&Loopback, &world.receiver.address()).await;
    raw.say(Tag::default(), Body::Hello { text: wire::compatibility(&LAYOUT, MODEL), features: 0 }).await;
    assert!(matches!(raw.hear().await.unwrap().body, Body::Hello { .. }));
    raw.say(Tag::default(), Body::Barrier(vec![(1, 0)])).await;
    assert!(raw.hear().await.is_none());
}

/// Receivers of an earlier release know of one connection: they get one, and serve as ever.
#[tokio::test(start_paused = true)]
async fn a_receiver_without_lanes_gets_one_connection() {
    let net = Memory::default();
    let mut listener = net.listen("by hand").await.unwrap();
    let links = Links::with(Arc::new(net), Arc::new(Arena::new(LAYOUT, 8)), MODEL, ways(4));
    links.connect("by hand");
    let mut raw = Raw::new(listener.accept().await.unwrap());
    assert!(matches!(raw.hear().await.unwrap().body, Body::Hello { .. }));
    raw.say(Tag::default(), Body::Hello { text: wire::compatibility(&LAYOUT, MODEL), features: FEATURE_RESEND }).await;
    until(|| links.counters().connected == 1).await;
    // It says that it is alive, and makes no other connection meanwhile.
    assert_eq!(raw.frame().await.map(|(header, _)| header.kind), Some(Kind::Ping));
    assert!(tokio::time::timeout(std::time::Duration::from_millis(100), listener.accept()).await.is_err());
    assert_eq!(links.counters().fallbacks(Fallback::FewerLanes), 0);
}

/// A connection that does not come about is done without, and counted.
#[tokio::test(start_paused = true)]
async fn a_lane_that_cannot_be_made_is_done_without() {
    let net = OnlyOne::default();
    let world = world(Arc::new(net), 3).await;
    completes(&world).await;
    assert_eq!(world.links.counters().fallbacks(Fallback::FewerLanes), 1);
}

/// Every second connection to it is refused.
#[derive(Clone, Default)]
struct OnlyOne(Memory, Arc<Mutex<usize>>);

impl Net for OnlyOne {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        let first = {
            let mut made = self.1.lock().unwrap();
            *made += 1;
            *made % 2 == 1
        };
        match first {
            true => self.0.connect(address),
            false => Box::pin(async { Err(io::ErrorKind::ConnectionRefused.into()) }),
        }
    }

    fn listen<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        self.0.listen(address)
    }
}

/// A frame over one connection about a transfer that another link has opened is forged, whichever connection it is.
#[tokio::test]
async fn a_lane_of_another_link_cannot_write() {
    let world = world(Arc::new(Loopback), 2).await;
    world.receiver.issue_tickets([3; 32], true);
    let (grant, incoming) = world.grant_first(BLOCKS);
    let outgoing = world.links.open(grant.clone()).await.unwrap();
    let (mut first, tag) = greeted(&world, Tag::default()).await.unwrap();
    let (mut second, _) = greeted(&world, LinkKey::of(tag).0.tag(1)).await.unwrap();
    second.data(Frame::new(&world.source, &grant, 0, &pairs(&ids(0..1)))).await;
    assert!(second.hear().await.is_none() && first.hear().await.is_none());
    assert_eq!(world.counters().dropped(Dropped::Forged), 1);
    send(outgoing).await.unwrap();
    incoming.wait().await.unwrap();
}
