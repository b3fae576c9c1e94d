//! Two arenas with a receiver and links between them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use baton_core::{Arena, BlockId, BlockLayout, Epoch, KvDtype, Net, RequestId, Rng};
use baton_kvtransfer::{
    Committed, Counters, Grant, Incoming, Links, Outgoing, Preferred, Receiver, Tls, TransferError, Ways, describe_ucx,
};

use crate::net::Loopback;

pub(crate) const LAYOUT: BlockLayout =
    BlockLayout { layers: 3, kv_heads: 2, head_dim: 8, block_tokens: 16, dtype: KvDtype::Bf16 };
pub(crate) const MODEL: &str = "w0-f32acc-bf16";
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
pub(crate) const REQUEST: RequestId = RequestId(77);
pub(crate) const EPOCH: Epoch = Epoch(5);

/// Counts the guards that are alive.
#[derive(Clone, Default)]
pub(crate) struct Held(Arc<AtomicUsize>);

pub(crate) struct Guard(Arc<AtomicUsize>);

impl Held {
    pub(crate) fn guard(&self) -> Guard {
        self.0.fetch_add(1, SeqCst);
        Guard(self.0.clone())
    }

    pub(crate) fn count(&self) -> usize {
        self.0.load(SeqCst)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

pub(crate) struct World {
    pub(crate) source: Arc<Arena>,
    pub(crate) target: Arc<Arena>,
    pub(crate) receiver: Receiver,
    pub(crate) links: Links,
    pub(crate) held: Held,
}

impl World {
    /// Two arenas of `blocks` blocks, the source full of random bytes.
    pub(crate) async fn new(blocks: usize) -> World {
        World::with_layout(LAYOUT, blocks).await
    }

    pub(crate) async fn with_layout(layout: BlockLayout, blocks: usize) -> World {
        World::over(Arc::new(Loopback), layout, blocks).await
    }

    pub(crate) async fn over(net: Arc<dyn Net>, layout: BlockLayout, blocks: usize) -> World {
        World::from(net, Arena::new(layout, blocks)).await
    }

    /// The source in memory that other processes can map.
    pub(crate) async fn shared(layout: BlockLayout, blocks: usize) -> World {
        World::from(Arc::new(Loopback), Arena::shared(layout, blocks).unwrap()).await
    }

    async fn from(net: Arc<dyn Net>, source: Arena) -> World {
        World::with(net, source, [Preferred::Best; 2], [None, None]).await
    }

    /// With what the receiver and the sender prefer, and their certificates.
    pub(crate) async fn with(
        net: Arc<dyn Net>,
        source: Arena,
        preferred: [Preferred; 2],
        tls: [Option<Tls>; 2],
    ) -> World {
        let (layout, blocks) = (*source.layout(), source.blocks());
        let source = Arc::new(source);
        let target = Arc::new(Arena::new(layout, blocks));
        fill(&source, &mut Rng::new(1));
        let [to, from] = preferred;
        let [of_receiver, of_sender] = tls;
        let to = Ways { preferred: to, tls: of_receiver, ..Ways::default() };
        let receiver = Receiver::with(net.clone(), "127.0.0.1:0", target.clone(), MODEL, to).await.unwrap();
        let links =
            Links::with(net, source.clone(), MODEL, Ways { preferred: from, tls: of_sender, ..Ways::default() });
        World { source, target, receiver, links, held: Held::default() }
    }

    /// Both ends prefer UCX, as far as there is such a library for the receiver.
    pub(crate) async fn over_ucx(layout: BlockLayout, blocks: usize) -> World {
        let to = if describe_ucx().is_ok() { Preferred::Ucx } else { Preferred::Best };
        World::with(Arc::new(Loopback), Arena::new(layout, blocks), [to, Preferred::Ucx], [None, None]).await
    }

    pub(crate) fn grant(&self, blocks: &[BlockId]) -> (Grant, Incoming<Guard>) {
        self.receiver.open(REQUEST, EPOCH, blocks.to_vec(), DEADLINE, self.held.guard())
    }

    /// Grants the target's first `count` blocks.
    pub(crate) fn grant_first(&self, count: u32) -> (Grant, Incoming<Guard>) {
        self.grant(&ids(0..count))
    }

    pub(crate) fn counters(&self) -> Counters {
        self.receiver.counters()
    }

    /// Whether every layer of `target` holds what `source` does, for pairs of blocks.
    pub(crate) fn equal(&self, pairs: impl IntoIterator<Item = (u32, u32)>) -> bool {
        pairs.into_iter().all(|(from, to)| {
            (0..self.source.layout().layers as usize)
                .all(|layer| read(&self.source, from, layer) == read(&self.target, to, layer))
        })
    }
}

/// Blocks with a generation that is not the index.
pub(crate) fn ids(indices: impl IntoIterator<Item = u32>) -> Vec<BlockId> {
    indices.into_iter().map(|index| BlockId { index, generation: index + 100 }).collect()
}

pub(crate) fn pairs(blocks: &[BlockId]) -> Vec<(usize, BlockId)> {
    blocks.iter().copied().enumerate().collect()
}

pub(crate) fn read(arena: &Arena, block: u32, layer: usize) -> Vec<u8> {
    let mut out = vec![0; arena.layout().layer_bytes()];
    // SAFETY: tests read blocks that no transfer writes at that moment.
    unsafe { arena.read_layer(block, layer, &mut out) };
    out
}

pub(crate) fn fill(arena: &Arena, rng: &mut Rng) {
    for block in 0..arena.blocks() as u32 {
        for layer in 0..arena.layout().layers as usize {
            let bytes: Vec<u8> = (0..arena.layout().layer_bytes()).map(|_| rng.u64() as u8).collect();
            // SAFETY: the arena is not shared yet.
            unsafe { arena.write_layer(block, layer, &bytes) };
        }
    }
}

/// How often a test repeats: seldom in CI, often when somebody asks for it (`BATON_TEST_LONG=1`).
pub(crate) fn rounds(seldom: u64, often: u64) -> u64 {
    if std::env::var_os("BATON_TEST_LONG").is_some() { often } else { seldom }
}

/// Sends every layer of `blocks` and commits.
pub(crate) async fn send_all(mut outgoing: Outgoing, blocks: &[(usize, BlockId)]) -> Result<Committed, TransferError> {
    for layer in 0..LAYOUT.layers as usize {
        outgoing.send(layer, blocks).await?;
    }
    outgoing.commit().await
}

/// An honest transfer of the world's first `count` blocks completes.
pub(crate) async fn completes(world: &World, count: u32) {
    let (grant, incoming) = world.grant_first(count);
    let outgoing = world.links.open(grant).await.unwrap();
    send_all(outgoing, &pairs(&ids(0..count))).await.unwrap();
    incoming.wait().await.unwrap();
    assert!(world.equal((0..count).map(|i| (i, i))));
}

/// Waits until `condition` holds; fails after 20 s.
#[track_caller]
pub(crate) fn until(condition: impl Fn() -> bool) -> impl Future<Output = ()> {
    let caller = std::panic::Location::caller();
    async move {
        for _ in 0..20_000 {
            if condition() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("waited in vain at {caller}");
    }
}
