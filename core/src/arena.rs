//! The memory that holds a worker's KV blocks, shared by the engine (kernels read and write it) and the links (which
//! move blocks in and out). Which of them may touch a block at a moment is decided by the cache's guards, not here.
//!
//! ```text
//! arena = block 0 | block 1 | ...            every block the same size
//! block = (kv_head, layer, K|V, token, row)          head outermost: one extent per head slice
//! row   = head_dim elements | scale                  a scale of its own where elements are 8 bits, else none
//! ```
//! A row is one token's key or value of one head. Its scale lies in it, is fixed when the row is written and never
//! changes: so bytes depend on the token alone, and heads, blocks and tokens can be moved and cut apart without a word
//! about scales.
//!
//! Because heads are outermost, some heads of every block are again blocks, only further apart: a view. So are some tokens of every
//! block, its units, but for their keys and values, which then do not lie together.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::ops::Range;
#[cfg(target_os = "linux")]
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use crate::BlockId;
#[cfg(target_os = "linux")]
use crate::shared::Mapping;

pub use device::{Arriving, DeviceBlocks, DeviceSource, Extents};

/// Element type of keys and values in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    Bf16,
    F32,
    /// Whole numbers from -127 to 127, times the row's scale.
    Int8,
    /// e4m3 (a sign, 4 bits of exponent, 3 of fraction), times the row's scale.
    Fp8,
}

impl KvDtype {
    pub const ALL: [KvDtype; 4] = [KvDtype::Bf16, KvDtype::F32, KvDtype::Int8, KvDtype::Fp8];

    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            KvDtype::Bf16 => 2,
            KvDtype::F32 => 4,
            KvDtype::Int8 | KvDtype::Fp8 => 1,
        }
    }

    /// Bytes of the bf16 behind a row's elements that they are multiplied with; none where elements mean themselves.
    pub fn scale_bytes(self) -> usize {
        if self.is_scaled() { 2 } else { 0 }
    }

    /// Whether rows have a scale.
    pub fn is_scaled(self) -> bool {
        matches!(self, KvDtype::Int8 | KvDtype::Fp8)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            KvDtype::Bf16 => "bf16",
            KvDtype::F32 => "f32",
            KvDtype::Int8 => "int8",
            KvDtype::Fp8 => "fp8",
        }
    }

    pub fn named(name: &str) -> Option<KvDtype> {
        KvDtype::ALL.into_iter().find(|dtype| dtype.as_str() == name)
    }

    /// What a row is made of, as layouts that are compared have it: `int8+bf16` are elements with their scale behind them.
    pub fn row(self) -> &'static str {
        match self {
            KvDtype::Bf16 => "bf16",
            KvDtype::F32 => "f32",
            KvDtype::Int8 => "int8+bf16",
            KvDtype::Fp8 => "fp8+bf16",
        }
    }
}

/// Key or value half of a (kv_head, layer) slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    Key = 0,
    Value = 1,
}

/// Shape of one block. What two workers must agree on before blocks can pass between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockLayout {
    pub layers: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub block_tokens: u32,
    pub dtype: KvDtype,
}

impl BlockLayout {
    /// Bytes of one token's key or value of one head, its scale included.
    pub fn row_bytes(&self) -> usize {
        self.head_dim as usize * self.dtype.bytes() + self.dtype.scale_bytes()
    }

    /// Bytes of one (kv_head, layer, K or V): (token, row).
    pub fn half_bytes(&self) -> usize {
        self.block_tokens as usize * self.row_bytes()
    }

    /// Bytes of one (kv_head, layer): K then V. The unit a layer's block moves in: `kv_heads` of these.
    pub fn slice_bytes(&self) -> usize {
        2 * self.half_bytes()
    }

    /// Bytes between the same (layer, half) of two neighbouring kv heads.
    pub fn head_stride(&self) -> usize {
        self.layers as usize * self.slice_bytes()
    }

    /// Bytes one layer of one block takes on the wire.
    pub fn layer_bytes(&self) -> usize {
        self.kv_heads as usize * self.slice_bytes()
    }

    pub fn block_bytes(&self) -> usize {
        self.kv_heads as usize * self.head_stride()
    }

    /// Offset in a block of (kv_head, layer, half).
    pub fn offset(&self, kv_head: usize, layer: usize, half: Half) -> usize {
        kv_head * self.head_stride() + layer * self.slice_bytes() + half as usize * self.half_bytes()
    }

    /// Text that is equal exactly for equal layouts.
    pub fn describe(&self) -> String {
        let BlockLayout { layers, kv_heads, head_dim, block_tokens, dtype } = self;
        format!("full:l{layers}:h{kv_heads}:d{head_dim}:t{block_tokens}:{}", dtype.row())
    }
}

/// Start of the blocks in their allocation: a huge page's size, so that the kernel can back the arena with such pages.
const ALIGNMENT: usize = 2 << 20;
/// Of an arena that fills no such page.
const ALIGNMENT_SMALL: usize = 4 << 10;

/// Memory for `blocks` blocks, zeroed, aligned to 2 MiB where it is as large (a smaller and a shared one to a page). Pages are taken from the machine when they are first touched.
pub struct Arena {
    base: *mut u8,
    memory: Memory,
    layout: BlockLayout,
    blocks: usize,
    /// Bytes from one block of the memory to the next.
    stride: usize,
    /// Blocks of this arena in one of the memory's.
    units: usize,
    beside: OnceLock<Beside>,
}

/// The same blocks on a device.
struct Beside {
    device: Arc<dyn DeviceBlocks>,
    /// By block: `there(generation)` when its bytes lie on the device and not here.
    there: Vec<AtomicU64>,
}

/// Where an arena's bytes come from.
enum Memory {
    /// Another arena.
    Of(Arc<Arena>),
    Heap {
        start: *mut u8,
        allocation: Layout,
    },
    /// Other processes of the host can map it.
    #[cfg(target_os = "linux")]
    Shared(Mapping),
}

// SAFETY: the arena is plain memory; exclusive access to a block's bytes is the callers' duty (see `block`).
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// # Panics
    /// If `blocks` is zero or the size overflows; callers have checked both against the machine's memory.
    pub fn new(layout: BlockLayout, blocks: usize) -> Arena {
        let bytes = layout.block_bytes().checked_mul(blocks).expect("arena size overflows");
        assert!(bytes > 0, "an arena holds at least one block");
        // Asked for with a larger alignment, zeroed memory would be written at once instead of coming as untouched pages.
        let alignment = if bytes < ALIGNMENT { ALIGNMENT_SMALL } else { ALIGNMENT };
        let allocation = Layout::from_size_align(bytes + alignment, 16).expect("arena size overflows");
        // SAFETY: the size is not zero.
        let start = unsafe { alloc_zeroed(allocation) };
        if start.is_null() {
            handle_alloc_error(allocation);
        }
        // SAFETY: the offset is below the alignment, by which the allocation exceeds the blocks.
        let base = unsafe { start.add(start.align_offset(alignment)) };
        let stride = layout.block_bytes();
        Arena {
            base,
            memory: Memory::Heap { start, allocation },
            layout,
            blocks,
            stride,
            units: 1,
            beside: OnceLock::new(),
        }
    }

    /// An arena that other processes of this host can be given to read (`descriptor`).
    ///
    /// # Errors
    /// What the kernel said; always where there is no such memory (other systems than Linux).
    ///
    /// # Panics
    /// As `new`.
    pub fn shared(layout: BlockLayout, blocks: usize) -> io::Result<Arena> {
        let bytes = layout.block_bytes().checked_mul(blocks).expect("arena size overflows");
        assert!(bytes > 0, "an arena holds at least one block");
        #[cfg(target_os = "linux")]
        {
            let mapping = Mapping::new(c"baton arena", bytes)?;
            Ok(Arena::over(mapping, layout, blocks))
        }
        #[cfg(not(target_os = "linux"))]
        Err(io::ErrorKind::Unsupported.into())
    }

    /// A `shared` arena of another process, out of the descriptor that it gave. It is for reading only: the kernel ends
    /// a process that writes it. Its blocks are those that the memory has room for.
    ///
    /// # Errors
    /// When the descriptor is not of memory that holds at least one block and cannot shrink.
    #[cfg(target_os = "linux")]
    pub fn map(descriptor: OwnedFd, layout: BlockLayout) -> io::Result<Arena> {
        Arena::filling(Mapping::of(descriptor)?, layout)
    }

    /// A `shared` arena of another process of this worker, at the path that it gave: for reading and writing, as there.
    ///
    /// # Errors
    /// When the path is not of memory that holds at least one block and cannot shrink.
    #[cfg(target_os = "linux")]
    pub fn join(path: &Path, layout: BlockLayout) -> io::Result<Arena> {
        Arena::filling(Mapping::join(path)?, layout)
    }

    #[cfg(not(target_os = "linux"))]
    pub fn join(_: &Path, _: BlockLayout) -> io::Result<Arena> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// As many blocks as the memory has room for.
    #[cfg(target_os = "linux")]
    fn filling(mapping: Mapping, layout: BlockLayout) -> io::Result<Arena> {
        match mapping.bytes() / layout.block_bytes().max(1) {
            0 => Err(io::Error::new(io::ErrorKind::InvalidData, "the memory holds no block")),
            blocks => Ok(Arena::over(mapping, layout, blocks)),
        }
    }

    #[cfg(target_os = "linux")]
    fn over(mapping: Mapping, layout: BlockLayout, blocks: usize) -> Arena {
        let (base, stride, beside) = (mapping.start(), layout.block_bytes(), OnceLock::new());
        Arena { base, memory: Memory::Shared(mapping), layout, blocks, stride, units: 1, beside }
    }

    /// Some `heads` of every block, as an arena of their own over the same memory, when blocks have `kv_heads` heads.
    /// None: there are no such heads, or the memory holds no such block.
    pub fn view(self: &Arc<Arena>, kv_heads: u32, heads: Range<u32>) -> Option<Arena> {
        let whole = BlockLayout { kv_heads, ..self.layout };
        let (stride, layout) = (whole.block_bytes(), BlockLayout { kv_heads: heads.len() as u32, ..whole });
        let is_view = matches!(self.memory, Memory::Of(_));
        if is_view || heads.is_empty() || heads.end > kv_heads || self.bytes() < stride {
            return None;
        }
        // SAFETY: the first block's heads are inside the memory, which holds at least one block.
        let base = unsafe { self.base.add(heads.start as usize * layout.head_stride()) };
        let (blocks, beside) = (self.bytes() / stride, OnceLock::new());
        Some(Arena { base, memory: Memory::Of(self.clone()), layout, blocks, stride, units: 1, beside })
    }

    /// Every block's tokens, `tokens` at a time, as blocks of their own over the same memory. Those of block `b` are `b * n` and the
    /// ones behind it, where `n` is how many fit (`units`). None: a block is not made of such.
    pub fn in_units(self: &Arc<Arena>, tokens: u32) -> Option<Arena> {
        let layout = BlockLayout { block_tokens: tokens, ..self.layout };
        let is_view = matches!(self.memory, Memory::Of(_));
        if is_view || tokens == 0 || !self.layout.block_tokens.is_multiple_of(tokens) {
            return None;
        }
        let (units, base, stride) = ((self.layout.block_tokens / tokens) as usize, self.base, self.stride);
        let (blocks, memory) = (self.blocks * units, Memory::Of(self.clone()));
        Some(Arena { base, memory, layout, blocks, stride, units, beside: OnceLock::new() })
    }

    /// How many of its blocks are one of the memory's.
    pub fn units(&self) -> usize {
        self.units
    }

    /// Makes known that a device has memory for the same blocks. The first one stays.
    pub fn attach(&self, device: Arc<dyn DeviceBlocks>) {
        let there = || (0..self.blocks).map(|_| AtomicU64::new(0)).collect();
        self.beside.get_or_init(|| Beside { device, there: there() });
    }

    /// The same blocks on a device.
    pub fn device(&self) -> Option<&Arc<dyn DeviceBlocks>> {
        // Its extents are runs of keys with their values, which units have not.
        self.beside().filter(|_| self.units == 1).map(|beside| &beside.device)
    }

    /// The block's bytes lie on the device from here on, and not here.
    #[inline]
    pub fn left_on_device(&self, block: BlockId) {
        if let Some(there) = self.there(block) {
            there.store(there_of(block), Relaxed);
        }
    }

    /// The block's bytes lie here from here on.
    pub fn brought_here(&self, block: BlockId) {
        if let Some(there) = self.there(block) {
            there.store(0, Relaxed);
        }
    }

    /// Whether the block's bytes lie on the device and not here.
    pub fn is_on_device(&self, block: BlockId) -> bool {
        self.there(block).is_some_and(|there| there.load(Relaxed) == there_of(block))
    }

    fn there(&self, block: BlockId) -> Option<&AtomicU64> {
        let index = block.index as usize;
        // Of every block of a transfer: a division is what this costs.
        self.beside()?.there.get(if self.units == 1 { index } else { index / self.units })
    }

    fn beside(&self) -> Option<&Beside> {
        match &self.memory {
            Memory::Of(arena) => arena.beside(),
            _ => self.beside.get(),
        }
    }

    /// Where one layer of every block lies in the memory, which begins with the first block of the whole arena.
    pub fn extents(&self, layer: usize) -> Extents {
        assert!(layer < self.layout.layers as usize, "layer {layer} of {}", self.layout.layers);
        assert!(self.units == 1, "a unit's keys do not lie beside its values");
        let start = match &self.memory {
            Memory::Of(arena) => arena.base,
            _ => self.base,
        };
        Extents {
            first: self.base.addr() - start.addr() + self.layout.offset(0, layer, Half::Key),
            block_stride: self.stride,
            head_stride: self.layout.head_stride(),
            heads: self.layout.kv_heads as usize,
            slice: self.layout.slice_bytes(),
        }
    }

    /// Bytes of the memory from the first block on.
    pub fn bytes(&self) -> usize {
        match &self.memory {
            #[cfg(target_os = "linux")]
            Memory::Shared(mapping) => mapping.bytes(),
            _ => self.blocks / self.units * self.stride,
        }
    }

    /// What gives another process of this host the right to read this arena, and no more than that; None if it is not a
    /// `shared` one.
    #[cfg(target_os = "linux")]
    pub fn descriptor(&self) -> Option<io::Result<OwnedFd>> {
        match &self.memory {
            Memory::Of(arena) if self.units > 1 => arena.descriptor(),
            Memory::Heap { .. } | Memory::Of(_) => None,
            Memory::Shared(mapping) => Some(mapping.for_reading()),
        }
    }

    /// Where other processes of this worker `join` this arena; None if it is not a `shared` one.
    pub fn path(&self) -> Option<PathBuf> {
        match &self.memory {
            #[cfg(target_os = "linux")]
            Memory::Shared(mapping) => Some(mapping.path()),
            _ => None,
        }
    }

    pub fn layout(&self) -> &BlockLayout {
        &self.layout
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// All blocks' bytes, while nobody else has the arena.
    ///
    /// # Panics
    /// If it is a view: its blocks lie apart, and the memory is another arena's.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        assert!(!matches!(self.memory, Memory::Of(_)), "a view has no memory of its own");
        // SAFETY: the memory was zeroed when it was made, and `&mut` excludes every other user.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.blocks * self.layout.block_bytes()) }
    }

    /// First byte of a block. Reading or writing through it is sound only while the caller holds the block: a reader
    /// a guard on a filled block, a writer the one guard on a reserved block.
    ///
    /// # Panics
    /// If the index is out of range.
    pub fn block(&self, index: u32) -> *mut u8 {
        assert!((index as usize) < self.blocks, "block {index} of {}", self.blocks);
        let (block, unit) = (index as usize / self.units, index as usize % self.units);
        // SAFETY: in bounds by the assertion.
        unsafe { self.base.add(block * self.stride + unit * self.layout.half_bytes()) }
    }

    /// Offset from `block` of (kv_head, layer, half).
    pub fn offset(&self, kv_head: usize, layer: usize, half: Half) -> usize {
        // Of the memory's blocks, in which those of this arena are cut.
        let between = self.layout.half_bytes() * self.units;
        (kv_head * self.layout.layers as usize + layer) * 2 * between + half as usize * between
    }

    /// Copies one layer of a block out, as (kv_head, K|V, token, row), into `out` of `layer_bytes`.
    ///
    /// # Safety
    /// The caller holds the block as filled, so that nobody writes it meanwhile.
    pub unsafe fn read_layer(&self, index: u32, layer: usize, out: &mut [u8]) {
        assert!(out.len() == self.layout.layer_bytes() && layer < self.layout.layers as usize);
        let block = self.block(index);
        for (at, part) in self.halves(layer).zip(out.chunks_exact_mut(self.layout.half_bytes())) {
            // SAFETY: offset + half stays inside the block; the caller holds it.
            unsafe { std::ptr::copy_nonoverlapping(block.add(at), part.as_mut_ptr(), part.len()) };
        }
    }

    /// Copies one layer of a block in; the inverse of `read_layer`.
    ///
    /// # Safety
    /// The caller holds the block as reserved, so that nobody else reads or writes it meanwhile.
    pub unsafe fn write_layer(&self, index: u32, layer: usize, bytes: &[u8]) {
        assert!(bytes.len() == self.layout.layer_bytes() && layer < self.layout.layers as usize);
        let block = self.block(index);
        for (at, part) in self.halves(layer).zip(bytes.chunks_exact(self.layout.half_bytes())) {
            // SAFETY: offset + half stays inside the block; the caller holds it.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), block.add(at), part.len()) };
        }
    }

    /// Offsets from a block of one layer's keys and values, by kv head.
    fn halves(&self, layer: usize) -> impl Iterator<Item = usize> {
        let heads = 0..self.layout.kv_heads as usize;
        heads.flat_map(move |head| [Half::Key, Half::Value].map(|half| self.offset(head, layer, half)))
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if let Memory::Heap { start, allocation } = self.memory {
            // SAFETY: allocated in `new` with this layout.
            unsafe { dealloc(start, allocation) }
        }
    }
}

/// A generation as `Beside::there` has it: never 0.
fn there_of(block: BlockId) -> u64 {
    1 << 32 | u64::from(block.generation)
}

mod device;

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: BlockLayout =
        BlockLayout { layers: 3, kv_heads: 2, head_dim: 4, block_tokens: 8, dtype: KvDtype::Bf16 };

    #[test]
    fn layers_tile_a_block_exactly() {
        let mut seen = vec![0u8; LAYOUT.block_bytes()];
        for head in 0..2 {
            for layer in 0..3 {
                for half in [Half::Key, Half::Value] {
                    let at = LAYOUT.offset(head, layer, half);
                    seen[at..at + LAYOUT.half_bytes()].iter_mut().for_each(|b| *b += 1);
                }
            }
        }
        assert!(seen.iter().all(|&count| count == 1));
    }

    #[test]
    fn a_layer_written_reads_back_and_touches_no_other() {
        let arena = Arena::new(LAYOUT, 2);
        let bytes: Vec<u8> = (0..LAYOUT.layer_bytes()).map(|i| i as u8 | 1).collect();
        let mut back = vec![0; bytes.len()];
        // SAFETY: this test is the only user of the arena.
        unsafe {
            arena.write_layer(1, 2, &bytes);
            arena.read_layer(1, 2, &mut back);
            assert_eq!(back, bytes);
            for (block, layer) in [(0, 0), (0, 2), (1, 0), (1, 1)] {
                arena.read_layer(block, layer, &mut back);
                assert!(back.iter().all(|&b| b == 0));
            }
        }
    }

    /// Views of all heads of an arena, two and one: together they are what is there, block by block.
    #[test]
    fn views_of_heads_tile_the_arena() {
        let whole = BlockLayout { kv_heads: 3, ..LAYOUT };
        let arena = Arc::new(Arena::new(whole, 4));
        let (two, one) = (arena.view(3, 0..2).unwrap(), arena.view(3, 2..3).unwrap());
        assert_eq!((two.layout().kv_heads, one.layout().kv_heads, two.blocks()), (2, 1, 4));
        for (view, label) in [(&two, 0x11), (&one, 0x77)] {
            let bytes = vec![label; view.layout().layer_bytes()];
            // SAFETY: this test is the only user of the arena.
            (0..4).for_each(|block| (0..3).for_each(|layer| unsafe { view.write_layer(block, layer, &bytes) }));
        }
        let mut back = vec![0; whole.layer_bytes()];
        let slice = whole.slice_bytes();
        for (block, layer) in (0..4).flat_map(|block| (0..3).map(move |layer| (block, layer))) {
            // SAFETY: as above.
            unsafe { arena.read_layer(block, layer, &mut back) };
            assert!(back[..2 * slice].iter().all(|byte| *byte == 0x11));
            assert!(back[2 * slice..].iter().all(|byte| *byte == 0x77));
        }
        assert!(arena.view(3, 2..4).is_none() && arena.view(3, 1..1).is_none() && arena.view(64, 0..1).is_none());
    }

    /// Units of two blocks: each (token, head, layer, half) is where the whole block has it, and a shared arena's units can be mapped.
    #[test]
    fn units_are_a_blocks_tokens() {
        let whole = Arc::new(Arena::new(LAYOUT, 2));
        let units = whole.in_units(4).unwrap();
        assert_eq!((units.blocks(), units.units(), units.layout().block_tokens), (4, 2, 4));
        let row = LAYOUT.half_bytes() / LAYOUT.block_tokens as usize;
        for unit in 0..4u32 {
            for layer in 0..3 {
                let bytes: Vec<u8> = (0..units.layout().layer_bytes())
                    .map(|at| (unit as usize * 89 + layer * 31 + at * 7) as u8)
                    .collect();
                // SAFETY: this test is the only user of the arena.
                unsafe { units.write_layer(unit, layer, &bytes) };
            }
        }
        let (mut of_block, mut of_unit) = (vec![0; LAYOUT.layer_bytes()], vec![0; units.layout().layer_bytes()]);
        for (block, layer) in (0..2u32).flat_map(|block| (0..3).map(move |layer| (block, layer))) {
            // SAFETY: as above.
            unsafe { whole.read_layer(block, layer, &mut of_block) };
            for unit in 0..2 {
                // SAFETY: as above.
                unsafe { units.read_layer(block * 2 + unit as u32, layer, &mut of_unit) };
                for (half, tokens) in of_unit.chunks_exact(4 * row).enumerate() {
                    let at = half * LAYOUT.half_bytes() + unit * 4 * row;
                    assert_eq!(tokens, &of_block[at..at + 4 * row], "{block} {layer} {unit} {half}");
                }
            }
        }
        assert!(whole.in_units(3).is_none() && whole.in_units(0).is_none());
        assert_eq!(whole.in_units(8).map(|all| all.units()), Some(1));
    }

    /// What one process writes another one reads, through a descriptor that does not let it write.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_shared_arena_can_be_mapped_and_only_read() {
        let arena = Arena::shared(LAYOUT, 3).expect("shared memory");
        let bytes: Vec<u8> = (0..LAYOUT.layer_bytes()).map(|i| i as u8 | 1).collect();
        let mut back = vec![0; bytes.len()];
        let mapped = Arena::map(arena.descriptor().expect("shared").expect("opened"), LAYOUT).expect("mapped");
        // SAFETY: this test is the only user of both.
        unsafe {
            arena.write_layer(2, 1, &bytes);
            mapped.read_layer(2, 1, &mut back);
        }
        assert_eq!(back, bytes);
        assert_eq!(mapped.blocks(), 3);
        let file = std::fs::File::from(arena.descriptor().expect("shared").expect("opened"));
        assert!(std::io::Write::write(&mut &file, &[1]).is_err(), "the descriptor does not write");
        assert!(file.set_len(1).is_err(), "the memory does not shrink under a reader");
    }

    /// What either of two processes of one worker writes the other reads.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_shared_arena_can_be_joined_and_written() {
        let arena = Arena::shared(LAYOUT, 3).expect("shared memory");
        let joined = Arena::join(&arena.path().expect("shared"), LAYOUT).expect("joined");
        let bytes: Vec<u8> = (0..LAYOUT.layer_bytes()).map(|i| i as u8 | 1).collect();
        let mut back = vec![0; bytes.len()];
        for (from, to, block) in [(&arena, &joined, 1), (&joined, &arena, 2)] {
            // SAFETY: this test is the only user of both.
            unsafe {
                from.write_layer(block, 1, &bytes);
                to.read_layer(block, 1, &mut back);
            }
            assert_eq!(back, bytes);
        }
        assert!(Arena::new(LAYOUT, 1).path().is_none());
        assert!(Arena::join(Path::new("/dev/null"), LAYOUT).is_err());
    }

    /// Memory that could shrink would kill its reader, so it is not mapped; nor is a file, nor what holds no block.
    #[cfg(target_os = "linux")]
    #[test]
    fn other_descriptors_are_not_mapped() {
        let executable = std::env::current_exe().expect("this test is a file");
        let file = std::fs::File::open(executable).expect("readable");
        assert!(Arena::map(file.into(), LAYOUT).is_err());
        let small = Arena::shared(BlockLayout { layers: 1, kv_heads: 1, ..LAYOUT }, 1).expect("shared memory");
        assert!(Arena::map(small.descriptor().expect("shared").expect("opened"), LAYOUT).is_err());
        assert!(Arena::new(LAYOUT, 1).descriptor().is_none());
    }

    struct Nowhere;

    impl DeviceBlocks for Nowhere {
        fn descriptor(&self) -> io::Result<std::os::fd::OwnedFd> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn map(&self, _: std::os::fd::OwnedFd, _: usize) -> io::Result<Arc<dyn DeviceSource>> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn sum(&self, _: &Extents, _: &[u32]) -> io::Result<Box<dyn Arriving>> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    /// Where a block's bytes are is known of one generation, by the arena and its views alike.
    #[test]
    fn a_block_is_on_the_device_while_its_generation_lasts() {
        let arena = Arc::new(Arena::new(LAYOUT, 3));
        let view = arena.view(2, 1..2).unwrap();
        let [block, later] = [7, 8].map(|generation| BlockId { index: 1, generation });
        arena.left_on_device(block);
        assert!(!arena.is_on_device(block), "there is no device");
        arena.attach(Arc::new(Nowhere));
        view.left_on_device(block);
        assert!(arena.is_on_device(block) && view.is_on_device(block) && !arena.is_on_device(later));
        arena.brought_here(block);
        assert!(!view.is_on_device(block));
        arena.left_on_device(BlockId { index: 1, generation: 0 });
        assert!(!arena.is_on_device(BlockId { index: 0, generation: 0 }));
    }

    /// Extents are where the arena's own functions find the bytes, of the whole and of some heads.
    #[test]
    fn extents_are_where_the_bytes_are() {
        let arena = Arc::new(Arena::new(LAYOUT, 3));
        let view = arena.view(2, 1..2).unwrap();
        for (arena, first_head) in [(&*arena, 0), (&view, 1)] {
            let extents = arena.extents(2);
            for (block, head) in (0..3).flat_map(|block| (0..arena.layout().kv_heads as usize).map(move |h| (block, h)))
            {
                let at = extents.first + block * extents.block_stride + head * extents.head_stride;
                assert_eq!(at, block * LAYOUT.block_bytes() + LAYOUT.offset(first_head + head, 2, Half::Key));
            }
            assert_eq!((extents.bytes(), extents.slice), (arena.layout().layer_bytes(), LAYOUT.slice_bytes()));
            assert!(extents.end(2) <= arena.bytes().max(3 * LAYOUT.block_bytes()));
        }
    }
}
