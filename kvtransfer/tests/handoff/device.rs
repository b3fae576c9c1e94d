//! Blocks that go from device to device. The devices here are shared memory of the host that does what a GPU does, and can be told
//! to stall, to spoil what it copies and to refuse. What a block is on the device is never what it is on the host, so that a byte
//! that took the wrong way shows.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};

use baton_core::arena::{Arriving, DeviceBlocks, DeviceSource, Extents};
use baton_core::{Arena, BlockId, BlockLayout, Epoch, KvDtype, Rng};
use baton_kvtransfer::wire::{BY_REFERENCE, ON_DEVICE};
use baton_kvtransfer::{Dropped, Fallback, Grant, HeadSlice, Links, Receiver, TransferError};
use xxhash_rust::xxh3::xxh3_64;

use crate::net::Loopback;
use crate::raw::{Frame, Raw};
use crate::shm::Sender;
use crate::world::{DEADLINE, EPOCH, Guard, Held, LAYOUT, MODEL, REQUEST, fill, ids, pairs, read, until};

/// What stands in for a GPU.
pub(crate) struct Device {
    memory: Arc<Arena>,
    told: Arc<Told>,
}

/// What it is told to do, and what it has done.
#[derive(Default)]
struct Told {
    /// Copies begin, and end only when this is false.
    stalls: Mutex<bool>,
    goes_on: Condvar,
    /// So many of the next copies flip a bit of what they write.
    spoils: AtomicUsize,
    /// The memory cannot be given away, or another one's not be mapped.
    keeps: AtomicBool,
    refuses: AtomicBool,
    /// Copies that have begun and not ended; the extents of sums and of copies so far.
    under_way: AtomicUsize,
    summed: AtomicUsize,
    fetched: AtomicUsize,
}

impl Told {
    fn stall(&self, stalls: bool) {
        *self.stalls.lock().unwrap() = stalls;
        self.goes_on.notify_all();
    }
}

impl Device {
    fn new(layout: BlockLayout, blocks: usize) -> Device {
        Device { memory: Arc::new(Arena::shared(layout, blocks).unwrap()), told: Arc::default() }
    }

    /// Full of random bytes, the same ones in every process.
    pub(crate) fn filled(layout: BlockLayout, blocks: usize) -> Device {
        let device = Device::new(layout, blocks);
        fill(&device.memory, &mut Rng::new(2));
        device
    }
}

/// The slices of an extent, in order.
fn slices<'a>(memory: &'a Arena, extents: &Extents, block: u32) -> impl Iterator<Item = *mut u8> + use<'a> {
    let Extents { first, block_stride, head_stride, heads, .. } = *extents;
    assert!(extents.end(block) <= memory.bytes(), "outside the memory");
    let start = memory.block(0);
    (0..heads).map(move |head| start.wrapping_add(first + block as usize * block_stride + head * head_stride))
}

fn sum(memory: &Arena, extents: &Extents, block: u32) -> u64 {
    // SAFETY: inside the memory; tests write no block while it is summed.
    let slice = |at: *mut u8| unsafe { std::slice::from_raw_parts(at, extents.slice) };
    xxh3_64(&slices(memory, extents, block).map(slice).collect::<Vec<_>>().concat())
}

struct Sums(Vec<u64>);

impl Arriving for Sums {
    fn wait(self: Box<Self>) -> io::Result<Vec<u64>> {
        Ok(self.0)
    }
}

impl DeviceBlocks for Device {
    fn descriptor(&self) -> io::Result<OwnedFd> {
        match self.told.keeps.load(SeqCst) {
            true => Err(io::Error::other("kept")),
            false => self.memory.descriptor().unwrap(),
        }
    }

    fn map(&self, descriptor: OwnedFd, least: usize) -> io::Result<Arc<dyn DeviceSource>> {
        if self.told.refuses.load(SeqCst) {
            return Err(io::Error::other("refused"));
        }
        let theirs = Arc::new(Arena::map(descriptor, *self.memory.layout())?);
        assert!(theirs.bytes() >= least);
        Ok(Arc::new(Mapped { theirs, ours: self.memory.clone(), told: self.told.clone() }))
    }

    fn sum(&self, extents: &Extents, blocks: &[u32]) -> io::Result<Box<dyn Arriving>> {
        self.told.summed.fetch_add(blocks.len(), SeqCst);
        Ok(Box::new(Sums(blocks.iter().map(|block| sum(&self.memory, extents, *block)).collect())))
    }
}

struct Mapped {
    theirs: Arc<Arena>,
    ours: Arc<Arena>,
    told: Arc<Told>,
}

impl DeviceSource for Mapped {
    unsafe fn fetch(&self, from: &Extents, to: &Extents, pairs: &[(u32, u32)]) -> io::Result<Box<dyn Arriving>> {
        self.told.under_way.fetch_add(1, SeqCst);
        let (theirs, ours, told) = (self.theirs.clone(), self.ours.clone(), self.told.clone());
        Ok(Box::new(Copying { theirs, ours, told, from: *from, to: *to, pairs: pairs.to_vec() }))
    }

    unsafe fn fetch_unchecked(
        &self,
        from: &Extents,
        to: &Extents,
        pairs: &[(u32, u32)],
    ) -> io::Result<Box<dyn Arriving>> {
        // SAFETY: the caller's.
        unsafe { self.fetch(from, to, pairs) }
    }
}

/// A copy that is made when it is waited for, which is as late as can be.
struct Copying {
    theirs: Arc<Arena>,
    ours: Arc<Arena>,
    told: Arc<Told>,
    from: Extents,
    to: Extents,
    pairs: Vec<(u32, u32)>,
}

impl Copying {
    fn end(&mut self) -> Vec<u64> {
        let pairs = std::mem::take(&mut self.pairs);
        if pairs.is_empty() {
            return Vec::new();
        }
        let stalled = self.told.goes_on.wait_while(self.told.stalls.lock().unwrap(), |stalls| *stalls).unwrap();
        drop(stalled);
        for (from, to) in &pairs {
            let targets = slices(&self.ours, &self.to, *to);
            for (from, to) in slices(&self.theirs, &self.from, *from).zip(targets) {
                // SAFETY: inside either memory; the transfer holds what is written.
                unsafe { std::ptr::copy_nonoverlapping(from, to, self.from.slice) };
            }
        }
        let spoils = self.told.spoils.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok();
        if let Some(at) = slices(&self.ours, &self.to, pairs[0].1).next().filter(|_| spoils) {
            // SAFETY: as above.
            unsafe { *at ^= 4 };
        }
        self.told.fetched.fetch_add(pairs.len(), SeqCst);
        self.told.under_way.fetch_sub(1, SeqCst);
        pairs.iter().map(|(_, to)| sum(&self.ours, &self.to, *to)).collect()
    }
}

impl Arriving for Copying {
    fn wait(mut self: Box<Self>) -> io::Result<Vec<u64>> {
        Ok(self.end())
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.end();
    }
}

/// A prefill and a decode worker, each with a device.
struct Pair {
    source: Arc<Arena>,
    target: Arc<Arena>,
    from: Arc<Device>,
    to: Arc<Device>,
    receiver: Receiver,
    links: Links,
    held: Held,
}

const BLOCKS: usize = 32;

impl Pair {
    async fn new() -> Pair {
        Pair::of(LAYOUT, true, true).await
    }

    async fn of(layout: BlockLayout, sends_from_device: bool, takes_on_device: bool) -> Pair {
        let source = Arc::new(Arena::shared(layout, BLOCKS).unwrap());
        let target = Arc::new(Arena::new(layout, BLOCKS));
        let (from, to) = (Arc::new(Device::filled(layout, BLOCKS)), Arc::new(Device::new(layout, BLOCKS)));
        fill(&source, &mut Rng::new(1));
        if sends_from_device {
            source.attach(from.clone());
        }
        if takes_on_device {
            target.attach(to.clone());
        }
        let receiver = Receiver::listen(Arc::new(Loopback), "127.0.0.1:0", target.clone(), MODEL).await.unwrap();
        let links = Links::new(Arc::new(Loopback), source.clone(), MODEL);
        Pair { source, target, from, to, receiver, links, held: Held::default() }
    }

    fn grant(&self, blocks: &[BlockId]) -> (Grant, baton_kvtransfer::Incoming<Guard>) {
        self.receiver.open(REQUEST, EPOCH, blocks.to_vec(), DEADLINE, self.held.guard())
    }

    /// Sends `sources` from the device where that can be, and commits; whether it could.
    async fn send(&self, grant: Grant, sources: &[BlockId]) -> Result<bool, TransferError> {
        let mut outgoing = self.links.open_from_device(grant).await?;
        outgoing.settle(sources.len());
        let on_device = outgoing.is_from_device();
        for layer in 0..self.source.layout().layers as usize {
            outgoing.send(layer, &pairs(sources)).await?;
        }
        outgoing.commit().await.map(|_| on_device)
    }

    /// Whether blocks of the target's device are those of the source's, and the target's host knows nothing of them.
    fn landed(&self, pairs: impl IntoIterator<Item = (BlockId, BlockId)>) -> bool {
        let layers = 0..self.source.layout().layers as usize;
        pairs.into_iter().all(|(from, to)| {
            self.target.is_on_device(to)
                && layers.clone().all(|layer| {
                    read(&self.to.memory, to.index, layer) == read(&self.from.memory, from.index, layer)
                        && read(&self.target, to.index, layer).iter().all(|byte| *byte == 0)
                })
        })
    }
}

const WIDE: BlockLayout = BlockLayout { layers: 2, kv_heads: 8, head_dim: 128, block_tokens: 16, dtype: KvDtype::Bf16 };

/// From device to device, and only the device's bytes; full blocks are summed once for all their transfers.
#[tokio::test]
async fn blocks_go_from_device_to_device() {
    for layout in [LAYOUT, WIDE] {
        let pair = Pair::of(layout, true, true).await;
        let sources = ids((0..20).map(|i| 31 - i));
        for (round, first) in [0, 8].into_iter().enumerate() {
            let targets = ids(first..first + 20);
            let (grant, incoming) = pair.grant(&targets);
            assert_eq!(pair.send(grant, &sources).await, Ok(true));
            let (_guard, received) = incoming.wait().await.unwrap();
            assert_eq!(received.extents, 20 * u64::from(layout.layers));
            assert!(pair.landed(sources.iter().copied().zip(targets)));
            assert_eq!(pair.from.told.summed.load(SeqCst), 20 * layout.layers as usize, "round {round}");
        }
        let counters = pair.links.counters();
        assert_eq!((counters.gpu, counters.shm, counters.tcp, counters.committed), (2, 0, 0, 2));
        assert!(Fallback::ALL.iter().all(|reason| counters.fallbacks(*reason) == 0));
        assert_eq!(pair.receiver.counters().dropped_total(), 0);
    }
}

/// Layers that are sent soon leave together: at the commit, or once there are many bytes of them. Their checksums are computed
/// at once, and a newest layer whose checksums are not there does not keep the others.
#[tokio::test]
async fn layers_leave_a_device_together() {
    let pair = Pair::of(WIDE, true, true).await;
    let quiet = async || {
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
        pair.receiver.counters().extents
    };
    let blocks = ids(0..8);
    let (grant, incoming) = pair.grant(&blocks);
    let mut outgoing = pair.links.open_from_device(grant).await.unwrap();
    for layer in 0..2 {
        outgoing.send_soon(layer, &pairs(&blocks)).await.unwrap();
        assert_eq!((pair.from.told.summed.load(SeqCst), quiet().await), (8 * (layer + 1), 0));
    }
    outgoing.commit().await.unwrap();
    incoming.wait().await.unwrap();
    assert!(pair.landed(blocks.iter().copied().zip(blocks.clone())));

    // The same block in many places: 70 MiB a layer, in two frames.
    let many = vec![BlockId { index: 9, generation: 1 }; 1100];
    let many_sources = vec![BlockId { index: 31, generation: 1 }; 1100];
    let (first, all) = (16 + 1100, 16 + 2200);
    for (leave_first, leave_second) in [(first, first), (all + 1100, all + 2200)] {
        let (grant, incoming) = pair.grant(&many);
        let mut outgoing = pair.links.open_from_device(grant).await.unwrap();
        outgoing.settle(many.len());
        for layer in 0..2 {
            assert!(quiet().await <= leave_first - 1100, "70 MiB leave with the next ones");
            outgoing.send_soon(layer, &pairs(&many_sources)).await.unwrap();
        }
        until(|| pair.receiver.counters().extents == leave_second).await;
        assert_eq!(quiet().await, leave_second);
        let committed = outgoing.commit().await.unwrap();
        assert_eq!(committed.extents, 2200);
        incoming.wait().await.unwrap();
    }
    assert!(pair.landed([(many_sources[0], many[0])]));
    assert_eq!(pair.receiver.counters().dropped_total(), 0);
}

/// One that is given up with layers that have not left leaves nothing behind, and one whose receiver gives up finds out.
#[tokio::test]
async fn layers_that_have_not_left_are_given_up() {
    let pair = Pair::new().await;
    let blocks = ids(0..4);
    let (grant, incoming) = pair.grant(&blocks);
    let mut outgoing = pair.links.open_from_device(grant).await.unwrap();
    outgoing.send_soon(0, &pairs(&blocks)).await.unwrap();
    outgoing.abort(baton_core::Aborted::Cancelled).await;
    assert!(incoming.wait().await.is_err());
    until(|| pair.held.count() == 0).await;

    let (grant, incoming) = pair.grant(&blocks);
    let mut outgoing = pair.links.open_from_device(grant).await.unwrap();
    outgoing.send_soon(0, &pairs(&blocks)).await.unwrap();
    drop(incoming);
    until(|| pair.held.count() == 0).await;
    assert!(outgoing.send_soon(1, &pairs(&blocks)).await.is_err());
    assert!(outgoing.commit().await.is_err());
    assert_eq!(pair.receiver.counters().extents, 0);
}

/// Some heads of the sender's blocks into some heads of the receiver's.
#[tokio::test]
async fn heads_go_from_device_to_device() {
    let half = BlockLayout { kv_heads: 4, ..WIDE };
    let source = Arc::new(Arena::shared(WIDE, 8).unwrap());
    let target = Arc::new(Arena::new(half, 8));
    let (from, to) = (Arc::new(Device::filled(WIDE, 8)), Arc::new(Device::new(half, 8)));
    source.attach(from.clone());
    target.attach(to.clone());
    let listening = Receiver::of_rank(Arc::new(Loopback), "127.0.0.1:0", target.clone(), WIDE.kv_heads, MODEL);
    let receivers = baton_kvtransfer::ranks::Receivers::new(
        vec![
            listening.await.unwrap(),
            Receiver::of_rank(Arc::new(Loopback), "127.0.0.1:0", Arc::new(Arena::new(half, 8)), WIDE.kv_heads, MODEL)
                .await
                .unwrap(),
        ],
        WIDE.kv_heads,
    );
    let order =
        baton_kvtransfer::ranks::Order { request: REQUEST, epoch: EPOCH, blocks: &ids(0..8), deadline: DEADLINE };
    let (grants, arrivals) = receivers.open(1, order, ()).unwrap();
    let links = Links::of_rank(Arc::new(Loopback), source, WIDE.kv_heads, MODEL);
    for (rank, granted) in grants.into_iter().enumerate() {
        assert_eq!(granted.grant.slice, Some(HeadSlice { of: 8, first: 4 * rank as u32 }));
        let mut outgoing = links.open_from_device(granted.grant).await.unwrap();
        assert_eq!(outgoing.is_from_device(), rank == 0, "the second has no device");
        for layer in 0..2 {
            outgoing.send(layer, &pairs(&ids(0..8))).await.unwrap();
        }
        outgoing.commit().await.unwrap();
    }
    drop(arrivals);
    for (block, layer) in (0..8).flat_map(|block| [(block, 0), (block, 1)]) {
        assert_eq!(read(&to.memory, block, layer), read(&from.memory, block, layer)[..half.layer_bytes()]);
    }
}

/// Each way in which it cannot be has its reason, and the blocks go through the host as ever.
#[tokio::test]
async fn each_fallback_has_its_reason() {
    let refused = Some(Fallback::DeviceRefused);
    let cases = [
        (true, false, false, false, Some(Fallback::NotOnDevice)),
        (false, true, false, false, None),
        (true, true, true, false, Some(Fallback::DeviceNotShared)),
        (true, true, false, true, refused),
    ];
    for (sends, takes, keeps, refuses, reason) in cases {
        let pair = Pair::of(LAYOUT, sends, takes).await;
        pair.from.told.keeps.store(keeps, SeqCst);
        pair.to.told.refuses.store(refuses, SeqCst);
        let (grant, incoming) = pair.grant(&ids(0..4));
        assert_eq!(pair.send(grant, &ids(0..4)).await, Ok(false));
        incoming.wait().await.unwrap();
        for (block, layer) in (0..4).flat_map(|block| (0..3).map(move |layer| (block, layer))) {
            assert_eq!(read(&pair.target, block, layer), read(&pair.source, block, layer));
        }
        assert!(ids(0..4).into_iter().all(|block| !pair.target.is_on_device(block)));
        let counters = pair.links.counters();
        assert_eq!((counters.gpu, counters.shm), (0, 1), "{reason:?}");
        for other in Fallback::ALL {
            assert_eq!(counters.fallbacks(other), u64::from(Some(other) == reason), "{reason:?} and {other:?}");
        }
    }
}

/// Extents too small for a device's checksums go through the host.
#[tokio::test]
async fn small_extents_go_through_the_host() {
    let small = BlockLayout { layers: 3, kv_heads: 1, head_dim: 8, block_tokens: 4, dtype: KvDtype::Bf16 };
    let pair = Pair::of(small, true, true).await;
    let (grant, incoming) = pair.grant(&ids(0..4));
    assert_eq!(pair.send(grant, &ids(0..4)).await, Ok(false));
    incoming.wait().await.unwrap();
    assert_eq!(pair.links.counters().fallbacks(Fallback::DeviceNotShared), 1);
}

/// A copy that writes something else than what was announced is found, counted and made again; one that never gets it right
/// fails the transfer, and nothing of it counts.
#[tokio::test]
async fn what_a_device_spoils_is_mended_or_refused() {
    let pair = Pair::new().await;
    let blocks = ids(0..8);
    pair.to.told.spoils.store(2, SeqCst);
    let (grant, incoming) = pair.grant(&blocks);
    assert_eq!(pair.send(grant, &blocks).await, Ok(true));
    incoming.wait().await.unwrap();
    assert!(pair.landed(blocks.iter().copied().zip(blocks.clone())));
    let counters = pair.receiver.counters();
    assert_eq!((counters.dropped(Dropped::Damaged), counters.again, pair.links.counters().resent), (2, 2, 2));

    pair.to.told.spoils.store(usize::MAX, SeqCst);
    let (grant, incoming) = pair.grant(&blocks);
    assert!(pair.send(grant, &blocks).await.is_err());
    assert!(matches!(incoming.wait().await.err(), Some(TransferError::Corrupt { .. })));
    until(|| pair.held.count() == 0).await;
}

/// A source block that is written again between its announcement and its copy: the checksum shows it, and when it is asked for
/// again the sender sees that it is another one.
#[tokio::test]
async fn a_source_block_that_changes_on_the_device_never_counts() {
    let pair = Pair::new().await;
    pair.to.told.stall(true);
    let blocks = ids(0..4);
    let (grant, incoming) = pair.grant(&blocks);
    let mut outgoing = pair.links.open_from_device(grant).await.unwrap();
    assert!(outgoing.is_from_device());
    outgoing.send(0, &pairs(&blocks)).await.unwrap();
    until(|| pair.to.told.under_way.load(SeqCst) == 1).await;
    // SAFETY: the copy has not begun to read.
    unsafe { pair.from.memory.write_layer(2, 0, &vec![9; LAYOUT.layer_bytes()]) };
    pair.to.told.stall(false);
    for layer in 1..3 {
        outgoing.send(layer, &pairs(&blocks)).await.unwrap();
    }
    assert_eq!(outgoing.commit().await, Err(TransferError::Corrupt { layer: 0, position: 2 }));
    assert!(incoming.wait().await.is_err());
    assert_eq!(pair.receiver.counters().dropped(Dropped::Damaged), 1);
    until(|| pair.held.count() == 0).await;
}

/// How a transfer ends while the receiver's device copies.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    ReceiverGivesUp,
    SenderGivesUp,
    SenderDies,
    ReceiverCloses,
}

/// However a transfer ends while its copy is under way: the blocks are not let go before the copy has ended, and what it wrote
/// does not count.
#[tokio::test]
async fn blocks_are_held_while_a_copy_is_under_way() {
    for end in [End::ReceiverGivesUp, End::SenderGivesUp, End::SenderDies, End::ReceiverCloses] {
        let pair = Pair::new().await;
        pair.to.told.stall(true);
        let blocks = ids(0..4);
        let (grant, incoming) = pair.grant(&blocks);
        let mut outgoing = pair.links.open_from_device(grant).await.unwrap();
        assert!(outgoing.is_from_device());
        outgoing.send(0, &pairs(&blocks)).await.unwrap();
        until(|| pair.to.told.under_way.load(SeqCst) == 1).await;
        let mut incoming = Some(incoming);
        match end {
            End::ReceiverGivesUp => drop(incoming.take()),
            End::SenderGivesUp => outgoing.abort(baton_core::Aborted::Cancelled).await,
            End::SenderDies => {
                pair.links.disconnect(&pair.receiver.address());
                until(|| pair.receiver.counters().links == 0).await;
                drop(outgoing);
            }
            End::ReceiverCloses => {
                pair.receiver.end();
                drop(outgoing);
            }
        }
        // The transfer is over, as far as anybody can tell who waits for it.
        if let Some(incoming) = incoming.take() {
            assert!(incoming.wait().await.is_err(), "{end:?}");
        } else {
            until(|| pair.receiver.counters().failed == 1).await;
        }
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
        assert_eq!((pair.held.count(), pair.to.told.under_way.load(SeqCst)), (1, 1), "{end:?}");
        assert_eq!(pair.receiver.counters().held, 1, "{end:?}");
        pair.to.told.stall(false);
        until(|| pair.held.count() == 0).await;
        let counters = pair.receiver.counters();
        assert_eq!((counters.extents, counters.completed, counters.held), (0, 0, 0), "{end:?}");
        assert_eq!(pair.to.told.under_way.load(SeqCst), 0, "{end:?}");
    }
}

/// Transfers given up at any moment of their copies, many times over: no block leaks, and none is written after its guard went.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_aborts_leave_nothing() {
    let pair = Pair::new().await;
    let blocks = ids(0..16);
    let mut rng = Rng::new(3);
    let rounds = crate::world::rounds(100, 5_000);
    for _ in 0..rounds {
        let (grant, incoming) = pair.grant(&blocks);
        let yields = rng.u64() % 40;
        let aborts = async {
            for _ in 0..yields {
                tokio::task::yield_now().await;
            }
            drop(incoming);
        };
        let (_, ()) = tokio::join!(pair.send(grant, &blocks), aborts);
        until(|| pair.held.count() == 0).await;
        assert_eq!(pair.to.told.under_way.load(SeqCst), 0, "a copy outlives its guard");
    }
    assert_eq!(pair.receiver.counters().held, 0);
    let (grant, incoming) = pair.grant(&blocks);
    assert_eq!(pair.send(grant, &blocks).await, Ok(true));
    incoming.wait().await.unwrap();
}

/// Part of a transfer from a device, the rest from a host: each block is known where it is.
#[tokio::test]
async fn the_rest_may_come_from_a_host() {
    let pair = Pair::new().await;
    let blocks = ids(0..4);
    let (grant, mut incoming) = pair.grant(&blocks);
    let mut outgoing = pair.links.open_from_device(grant).await.unwrap();
    assert!(outgoing.is_from_device());
    for layer in 0..3 {
        let sent = if layer == 2 { &pairs(&blocks)[..2] } else { &pairs(&blocks)[..] };
        outgoing.send(layer, sent).await.unwrap();
    }
    until(|| pair.receiver.counters().extents == 10).await;
    outgoing.abort(baton_core::Aborted::Cancelled).await;
    let Err(Ok(partial)) = incoming.wait_or_keep().await else { panic!("something is left of it") };
    assert_eq!(partial.whole(), [true, true, false, false]);
    assert_eq!(partial.lacking(), ids(2..4));
    let (grant, incoming) = pair.receiver.resume(partial, Epoch(6), DEADLINE);
    let host = Links::new(Arc::new(Loopback), pair.source.clone(), MODEL);
    let mut outgoing = host.open(grant).await.unwrap();
    for layer in 0..3 {
        outgoing.send(layer, &pairs(&ids(2..4))).await.unwrap();
    }
    outgoing.commit().await.unwrap();
    incoming.wait().await.unwrap();
    assert!(pair.landed(ids(0..2).into_iter().zip(ids(0..2))));
    for block in ids(2..4) {
        assert!(!pair.target.is_on_device(block));
        assert!((0..3).all(|layer| read(&pair.target, block.index, layer) == read(&pair.source, block.index, layer)));
    }
}

/// A frame from a device by a sender that has brought none ends its link.
#[tokio::test]
async fn a_device_frame_without_a_device_closes_the_link() {
    let pair = Pair::new().await;
    let (grant, incoming) = pair.grant(&ids(0..4));
    let mut raw = Raw::opened(&Loopback, &grant).await;
    let mut frame = Frame::new(&pair.source, &grant, 0, &pairs(&ids(0..1)));
    frame.payload.truncate(24);
    (frame.header.flags, frame.header.length) = (BY_REFERENCE | ON_DEVICE, 24);
    raw.data(frame).await;
    assert!(matches!(incoming.wait().await.err(), Some(TransferError::Lost { .. })));
    assert_eq!((pair.receiver.counters().extents, pair.to.told.fetched.load(SeqCst)), (0, 0));
}

/// From another process's device; its memory is mapped without the right to write.
#[tokio::test]
async fn another_process_hands_off_from_its_device() {
    let pair = Pair::of(WIDE, true, true).await;
    let blocks = ids(0..24);
    let (grant, incoming) = pair.grant(&blocks);
    let _sender = Sender::from_device(&grant, 2);
    incoming.wait().await.unwrap();
    assert!(pair.landed(blocks.iter().copied().zip(blocks.clone())));
}

/// Killed or stopped while this end's device copies out of its memory: the copy goes on in memory that stays, the blocks are let go
/// after it, and what the next one brings into them is untouched when the stopped one goes on.
#[tokio::test]
async fn a_killed_or_stopped_sender_is_outlived_by_its_memory() {
    for signal in [libc::SIGKILL, libc::SIGSTOP] {
        let pair = Pair::of(WIDE, true, true).await;
        let blocks = ids(0..24);
        pair.to.told.stall(true);
        let (grant, incoming) = pair.grant(&blocks);
        let sender = Sender::from_device(&grant, 1);
        until(|| pair.to.told.under_way.load(SeqCst) == 1).await;
        sender.signal(signal);
        if signal == libc::SIGKILL {
            assert!(incoming.wait().await.is_err());
        } else {
            drop(incoming);
            until(|| pair.receiver.counters().links == 0).await;
        }
        assert_eq!(pair.held.count(), 1, "the copy has not ended");
        pair.to.told.stall(false);
        until(|| pair.held.count() == 0).await;

        let sources = ids((0..24).map(|i| 31 - i));
        let (grant, incoming) = pair.grant(&blocks);
        assert_eq!(pair.send(grant, &sources).await, Ok(true));
        let _guard = incoming.wait().await.unwrap();
        // That it has gone on shows in its connecting again.
        sender.signal(libc::SIGCONT);
        let links = if signal == libc::SIGSTOP { 2 } else { 1 };
        until(|| pair.receiver.counters().links == links).await;
        drop(sender);
        assert!(pair.landed(sources.into_iter().zip(blocks)));
    }
}
