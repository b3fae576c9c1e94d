//! The lower tiers over memory that fails in every way a disk does.

use std::io::{Error, ErrorKind};

use baton_core::{BlockLayout, KvDtype, NumericsClass};
use baton_engine::testing::hash_spec;

use super::*;
use crate::tiers::store::Store;

const LAYOUT: BlockLayout = BlockLayout { layers: 2, kv_heads: 2, head_dim: 4, block_tokens: 4, dtype: KvDtype::F32 };

/// A disk; clones are the same one.
#[derive(Clone, Default)]
struct Memory {
    bytes: Arc<Mutex<Vec<u8>>>,
    /// Longest it gets.
    room: Option<u64>,
}

impl Store for Memory {
    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.bytes).len() as u64)
    }

    fn resize(&mut self, len: u64) -> io::Result<()> {
        lock(&self.bytes).resize(len as usize, 0);
        Ok(())
    }

    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let bytes = lock(&self.bytes);
        let from = bytes.get(at as usize..at as usize + into.len()).ok_or(Error::from(ErrorKind::UnexpectedEof))?;
        into.copy_from_slice(from);
        Ok(())
    }

    fn write(&mut self, at: u64, from: &[u8]) -> io::Result<()> {
        let end = at as usize + from.len();
        if self.room.is_some_and(|room| end as u64 > room) {
            return Err(ErrorKind::StorageFull.into());
        }
        let mut bytes = lock(&self.bytes);
        let len = bytes.len().max(end);
        bytes.resize(len, 0);
        bytes[at as usize..end].copy_from_slice(from);
        Ok(())
    }
}

fn spec() -> ModelSpec {
    ModelSpec { layout: LAYOUT, ..hash_spec() }
}

fn disk_of(store: Memory, spec: &ModelSpec, blocks: u64) -> Disk<Memory> {
    let bytes = 4096 + blocks * (64 + LAYOUT.block_bytes() as u64);
    Disk::open(store, disk::class(spec), LAYOUT.block_bytes(), bytes).expect("opens")
}

/// The bytes of the block of this name.
fn bytes(name: u128) -> Vec<u8> {
    (0..LAYOUT.block_bytes()).map(|i| (i as u128 * 7 + name * 13) as u8).collect()
}

/// A cache of four blocks whose every block is to be saved, above the given tiers.
fn keeper(host_blocks: usize, disk: Option<Disk<Memory>>) -> (Cache, Keeper<Memory>) {
    let cache = Cache::new(LAYOUT, 4);
    cache.on_pressure(4, || ());
    let host = Host::new(disk::class(&spec()), LAYOUT.block_bytes(), (host_blocks * LAYOUT.block_bytes()) as u64);
    let keeper = Keeper::new(cache.clone(), host, disk);
    (cache, keeper)
}

/// Fills the cache with these names one after another; each is saved, and the oldest is evicted.
fn pass(cache: &Cache, keeper: &mut Keeper<Memory>, names: std::ops::Range<u128>) {
    for name in names {
        let mut reserved = cache.reserve(1).expect("room");
        reserved.write(0, &bytes(name));
        drop(reserved.fill(&[BlockHash(name)]));
        while keeper.save_next() {}
    }
}

/// Brings back what is known to be below, and checks every byte of it.
fn recalled(cache: &Cache, keeper: &mut Keeper<Memory>, names: &[u128]) -> usize {
    let names: Vec<BlockHash> = names.iter().map(|name| BlockHash(*name)).collect();
    let below = cache.below(&names);
    let (blocks, _) = keeper.recall(&names[..below], cache.reserve(below).expect("room"));
    let reference = Cache::new(LAYOUT, 1);
    for (id, name) in blocks.ids().iter().zip(&names) {
        let mut reserved = reference.reserve(1).expect("free");
        reserved.write(0, &bytes(name.0));
        for layer in 0..LAYOUT.layers as usize {
            let of = |cache: &Cache, index| baton_engine::testing::layer_of(cache.arena(), index, layer);
            assert_eq!(of(cache, id.index), of(&reference, 0), "{name:?}, layer {layer}");
        }
    }
    assert_eq!(cache.audit(), Ok(()));
    blocks.len()
}

#[test]
fn evicted_blocks_come_back_from_the_host_and_from_the_disk() {
    let store = Memory::default();
    let (cache, mut keeper) = keeper(3, Some(disk_of(store, &spec(), 100)));
    pass(&cache, &mut keeper, 0..20);
    assert_eq!(cache.lost(), 0);
    assert_eq!(recalled(&cache, &mut keeper, &[0, 1, 2]), 3);
    // Whatever is where: all twenty are known, and each comes back.
    for name in 3..16 {
        assert!(recalled(&cache, &mut keeper, &[name]) == 1 || cache.lookup(&[BlockHash(name)]).len() == 1, "{name}");
    }
    assert_eq!(cache.hashes(usize::MAX).len(), 20);
}

#[test]
fn a_bounded_tier_forgets_what_was_unused_longest() {
    let (cache, mut keeper) = keeper(0, Some(disk_of(Memory::default(), &spec(), 5)));
    pass(&cache, &mut keeper, 0..20);
    let known: Vec<u128> = cache.hashes(usize::MAX).into_iter().map(|name| name.0).collect();
    assert_eq!(known, [15, 16, 17, 18, 19]);
    let (cache, mut keeper) = self::keeper(6, None);
    pass(&cache, &mut keeper, 0..20);
    assert_eq!(cache.hashes(usize::MAX).len(), 6);
    assert_eq!(recalled(&cache, &mut keeper, &[14, 15]), 2);
    assert!(Host::new(disk::class(&spec()), 100, 99).is_none());
}

#[test]
fn a_restart_finds_the_disk_again() {
    let store = Memory::default();
    let (cache, mut before) = keeper(2, Some(disk_of(store.clone(), &spec(), 100)));
    pass(&cache, &mut before, 0..10);
    before.finish();
    let (cache, mut after) = keeper(0, Some(disk_of(store.clone(), &spec(), 100)));
    assert_eq!((cache.stats().cached, cache.hashes(usize::MAX).len()), (0, 10));
    assert_eq!(recalled(&cache, &mut after, &[0, 1, 2, 3]), 4);
    drop(after);
    // With a smaller share, as many as have room.
    let (cache, _after) = keeper(0, Some(disk_of(store, &spec(), 4)));
    assert_eq!(cache.hashes(usize::MAX).len(), 4);
}

/// Every byte of a place, one bit at a time: a wrong block never comes back, whether it is changed under a running
/// worker or before it starts.
#[test]
fn a_changed_bit_anywhere_is_a_miss() {
    let store = Memory::default();
    let (cache, mut before) = keeper(0, Some(disk_of(store.clone(), &spec(), 100)));
    pass(&cache, &mut before, 0..8);
    drop(before);
    let place = 64 + LAYOUT.block_bytes();
    for at in 4096..4096 + place {
        let flip = || lock(&store.bytes)[at] ^= 1 << (at % 8);
        let (cache, mut running) = keeper(0, Some(disk_of(store.clone(), &spec(), 100)));
        flip();
        assert_eq!(recalled(&cache, &mut running, &[0]), 0, "byte {at}");
        assert_eq!(cache.below(&[BlockHash(0)]), 0);
        drop(running);
        let (cache, mut started) = keeper(0, Some(disk_of(store.clone(), &spec(), 100)));
        assert_eq!(recalled(&cache, &mut started, &[0]), 0, "byte {at}");
        assert_eq!(recalled(&cache, &mut started, &[1]), 1);
        flip();
    }
}

#[test]
fn swapped_places_are_no_ones() {
    let store = Memory::default();
    let (cache, mut before) = keeper(0, Some(disk_of(store.clone(), &spec(), 100)));
    pass(&cache, &mut before, 0..8);
    let place = 64 + LAYOUT.block_bytes();
    let mut bytes = lock(&store.bytes);
    let (first, second) = bytes[4096..4096 + 2 * place].split_at_mut(place);
    first.swap_with_slice(second);
    drop(bytes);
    assert_eq!((recalled(&cache, &mut before, &[0]), recalled(&cache, &mut before, &[1])), (0, 0));
}

#[test]
fn a_file_cut_anywhere_gives_what_is_whole() {
    let store = Memory::default();
    let (cache, mut before) = keeper(0, Some(disk_of(store.clone(), &spec(), 100)));
    pass(&cache, &mut before, 0..8);
    drop(before);
    let (whole, place) = (lock(&store.bytes).clone(), 64 + LAYOUT.block_bytes());
    for len in [0, 1, 4095, 4096, 4097, 4096 + 63, 4096 + 64, 4096 + place - 1, 4096 + place, 4096 + 3 * place - 1] {
        *lock(&store.bytes) = whole[..len].to_vec();
        let disk = disk_of(store.clone(), &spec(), 100);
        let (faults, left) = (disk.found.len(), len.saturating_sub(4096) / place);
        let (cache, mut after) = keeper(0, Some(disk));
        assert_eq!(cache.hashes(usize::MAX).len(), left, "{len} bytes");
        assert_eq!(faults > 0, len > 0 && (len < 4096 || !(len - 4096).is_multiple_of(place)), "{len} bytes");
        pass(&cache, &mut after, 20..26);
        assert_eq!(recalled(&cache, &mut after, &[20, 21]), 2);
    }
    // Cut under a running worker.
    *lock(&store.bytes) = whole.clone();
    let (cache, mut running) = keeper(0, Some(disk_of(store.clone(), &spec(), 100)));
    lock(&store.bytes).truncate(4096 + place + 5);
    assert_eq!(recalled(&cache, &mut running, &[0, 1, 2]), 1);
}

#[test]
fn a_file_of_another_model_layout_or_class_is_not_used() {
    let layout = BlockLayout { layers: 4, kv_heads: 1, ..LAYOUT };
    let others = [
        ModelSpec { numerics: NumericsClass("other".into()), ..spec() },
        ModelSpec { weights_hash: "other".into(), ..spec() },
        ModelSpec { layout, ..spec() },
    ];
    for other in others {
        let store = Memory::default();
        let (cache, mut theirs) = keeper(0, Some(disk_of(store.clone(), &spec(), 100)));
        pass(&cache, &mut theirs, 0..8);
        drop(theirs);
        let disk = disk_of(store.clone(), &other, 100);
        assert_eq!((disk.found.clone(), disk.len()), (vec![Fault::Foreign], 0), "{other:?}");
    }
    let store = Memory { bytes: Arc::new(Mutex::new(vec![7; 10_000])), room: None };
    assert_eq!(disk_of(store, &spec(), 100).found, [Fault::Damaged]);
}

#[test]
fn a_full_disk_keeps_what_it_has_room_for() {
    let place = 64 + LAYOUT.block_bytes() as u64;
    let store = Memory { room: Some(4096 + 5 * place + 10), ..Memory::default() };
    let (cache, mut keeper) = keeper(0, Some(disk_of(store, &spec(), 100)));
    pass(&cache, &mut keeper, 0..20);
    let known = cache.hashes(usize::MAX);
    assert_eq!(known.len(), 5);
    assert_eq!(recalled(&cache, &mut keeper, &[15]), 1);
    // No room for one block at all: nothing is kept, nothing is lost but that.
    let store = Memory { room: Some(4096), ..Memory::default() };
    let (cache, mut keeper) = self::keeper(0, Some(disk_of(store, &spec(), 100)));
    pass(&cache, &mut keeper, 0..20);
    assert_eq!(cache.hashes(usize::MAX).len(), 4, "the cache's own");
    assert!(Disk::open(Memory::default(), disk::class(&spec()), 100, 4096 + 163).is_err());
}

#[test]
fn damaged_memory_is_a_miss() {
    let (cache, mut keeper) = keeper(8, None);
    pass(&cache, &mut keeper, 0..8);
    keeper.host_mut().damage(BlockHash(1));
    assert_eq!(recalled(&cache, &mut keeper, &[0, 1, 2]), 1);
    assert_eq!(cache.below(&[BlockHash(1)]), 0);
}

/// The thread, its queue and a file: what one life saves at its end the next one brings back.
#[tokio::test]
async fn a_worker_that_ends_leaves_its_cache_on_disk() {
    let folder = std::env::temp_dir().join(format!("baton-tiers-{}", std::process::id()));
    let names: Vec<BlockHash> = (0..4).map(BlockHash).collect();
    let sizes = TierSizes { host_bytes: 0, disk: Some(folder.clone()), disk_bytes: 1 << 20 };
    let open = |cache: &Cache| Tiers::open(cache, &spec(), &sizes);
    let cache = Cache::new(LAYOUT, 4);
    let tiers = open(&cache).expect("opens").expect("a disk");
    let second = open(&Cache::new(LAYOUT, 4)).err().map(|error| error.to_string());
    assert!(second.is_some_and(|why| why.contains("in use by another process")));
    let mut reserved = cache.reserve(4).expect("free");
    (0..4).for_each(|name| reserved.write(name, &bytes(name as u128)));
    drop(reserved.fill(&names));
    tiers.close();
    drop(tiers);
    let cache = Cache::new(LAYOUT, 4);
    let tiers = open(&cache).expect("opens").expect("a disk");
    assert_eq!(tiers.recall(&names).await.map(|blocks| blocks.len()), Some(4));
    assert!(tiers.offer(4).bytes_per_s > 0, "what came back was measured");
    assert_eq!(tiers.recall(&[BlockHash(99)]).await.map(|blocks| blocks.len()), None);
    drop(tiers);
    std::fs::remove_dir_all(folder).expect("it was made");
}
