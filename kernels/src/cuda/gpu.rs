//! The GPU as a device: the operations of a decoder-only transformer over bf16 weights and a paged cache in its memory. As
//! with `Cpu`, a row's bits depend on nothing but the row's own values. Operations return once they are given to the GPU;
//! reading a result waits for it.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use std::sync::{Arc, Mutex, PoisonError};

use baton_core::arena::DeviceBlocks;
use baton_core::{Arena, BlockLayout, KvDtype};

use super::compile::{Cubins, source_hash};
use super::driver::{Driver, Kernel, SLOTS};
use super::eights::{Eights, PackedF8, Wide};
use super::emulated::Emulated;
use super::error::GpuError;
use super::launch::{
    self, Argument, CELL, EIGHTS, EIGHTS_DEPTH, EIGHTS_ROWS, HEAD_DIMS, HOPPER_EIGHTS, HOPPER_EIGHTS_SOME,
    HOPPER_EIGHTS_WHOLE, HOPPER_EIGHTS_WIDE, HOPPER_UNIT, HOPPERS, HOPPERS_NARROW, HOPPERS_WHOLE, Hopper, KERNELS,
    Layout, MATMULS, PREFILL_ROWS, TILE_OUTPUTS, hoppers,
};
use super::memory::{DEPTH_UNIT, Floats, GpuMatrix, Memory, Rows};
use super::nvidia::{Nvidia, arch};
use super::recorded::Launched;
use super::shared::SharedBlocks;
use super::spans::GpuSpans;
use crate::{Dtype, F8Matrix, Heads, Matrix, RopeTable, SEGMENTS};

/// Bytes of weights converted on the host at a time.
const CONVERT_BYTES: usize = 8 << 20;
/// Thread blocks that copy one cache block.
const COPY_PARTS: u32 = 16;

/// An opened GPU, or the emulation of one.
pub struct Gpu {
    pub(crate) driver: Arc<dyn Driver>,
    name: String,
    profile: String,
    /// A matrix of 8 bits as bf16, for one product after another.
    wide: Mutex<Wide>,
    /// Names of the kernels launched, while somebody watches.
    launched: Mutex<Option<BTreeSet<&'static str>>>,
    /// The launches, while they are recorded.
    pub(crate) recording: Mutex<Option<Vec<Launched>>>,
}

impl Gpu {
    /// Opens GPU `index` and loads the kernels, compiled now unless `cubins` has them.
    pub fn open(index: usize, cubins: &Cubins) -> Result<Gpu, GpuError> {
        let (driver, found) = Nvidia::open(index, cubins)?;
        Ok(Gpu::over(Arc::new(driver), found.name, &arch(found.capability)))
    }

    /// The kernels on this CPU, built into `folder` by the system's C++ compiler: for tests.
    pub fn emulated(folder: &Path) -> Result<Gpu, GpuError> {
        Ok(Gpu::over(Arc::new(Emulated::open(folder)?), "emulated".to_string(), "emulated"))
    }

    fn over(driver: Arc<dyn Driver>, name: String, arch: &str) -> Gpu {
        Gpu {
            driver,
            name,
            profile: format!("cuda-{arch}-{}", &source_hash()[..8]),
            wide: Mutex::default(),
            launched: Mutex::default(),
            recording: Mutex::default(),
        }
    }

    /// Begins to remember which kernels are launched.
    pub(crate) fn watch(&self) {
        self.launched.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default();
    }

    /// Kernels of this device that were not launched since `watch`, which this ends.
    pub(crate) fn unused(&self) -> Vec<&'static str> {
        let own = hoppers().map(|hopper| hopper.tiled.kernel.name).filter(|_| self.driver.hopper().is_some());
        let used = self.launched.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default();
        KERNELS.iter().map(|kernel| kernel.name).chain(own).filter(|name| !used.contains(name)).collect()
    }

    fn note(&self, kernel: Kernel) {
        if let Some(launched) = &mut *self.launched.lock().unwrap_or_else(PoisonError::into_inner) {
            launched.insert(kernel.name);
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The arithmetic's name in a numerics class: architecture and sources.
    pub fn profile(&self) -> &str {
        &self.profile
    }

    /// (free, total) bytes of memory.
    pub fn memory(&self) -> Result<(usize, usize), GpuError> {
        self.driver.memory()
    }

    /// Waits for all that was given.
    pub fn finish(&self) -> Result<(), GpuError> {
        self.driver.finish()
    }

    /// Room for `len` values, with any content.
    pub fn floats(&self, len: usize) -> Result<Floats, GpuError> {
        Floats::new(&self.driver, len)
    }

    pub fn floats_of(&self, values: &[f32]) -> Result<Floats, GpuError> {
        Floats::of(&self.driver, values)
    }

    pub fn rows(&self, rows: usize, width: usize) -> Result<Rows, GpuError> {
        Rows::new(&self.driver, rows, width)
    }

    /// The rows of the parts one after another, rounded to bf16.
    ///
    /// # Panics
    /// If the parts differ in width or their bytes do not fit their shapes.
    pub fn matrix(&self, parts: &[Matrix]) -> Result<GpuMatrix, GpuError> {
        let inputs = parts.first().map_or(0, |part| part.cols);
        for part in parts {
            assert_eq!(part.cols, inputs, "parts of one matrix differ in width");
            assert_eq!(part.bytes.len(), part.rows * inputs * part.dtype.unit_bytes(), "bytes do not fit the shape");
        }
        let outputs = parts.iter().map(|part| part.rows).sum::<usize>();
        let depth = inputs.next_multiple_of(DEPTH_UNIT);
        let memory = Memory::new(&self.driver, outputs * depth * 2)?;
        let mut offset = 0;
        for part in parts {
            if part.dtype == Dtype::Bf16 && depth == inputs {
                memory.write(offset, part.bytes)?;
                offset += part.bytes.len();
                continue;
            }
            let rows_at_once = (CONVERT_BYTES / (depth * 2)).max(1);
            for first in (0..part.rows).step_by(rows_at_once) {
                let rows = rows_at_once.min(part.rows - first);
                let mut values = vec![0u16; rows * depth];
                for (row, to) in values.chunks_exact_mut(depth).enumerate() {
                    part.read_row(first + row, &mut to[..inputs]);
                }
                memory.write(offset, &values)?;
                offset += rows * depth * 2;
            }
        }
        Ok(GpuMatrix { memory, outputs, inputs, depth, eights: None })
    }

    /// The rows of the parts one after another, kept in 8 bits: every product has the bits of one with `F8Matrix::widen`.
    ///
    /// # Panics
    /// If the parts differ in width or their bytes or scales do not fit their shapes.
    pub fn matrix_f8(&self, parts: &[F8Matrix]) -> Result<GpuMatrix, GpuError> {
        let packed = PackedF8::new(parts);
        let memory = Memory::of(&self.driver, &packed.cells)?;
        let scales = self.floats_of(&packed.scales)?;
        self.wide
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .ensure(&self.driver, packed.outputs * packed.depth * 2)?;
        let PackedF8 { outputs, inputs, depth, each, shift, .. } = packed;
        Ok(GpuMatrix { memory, outputs, inputs, depth, eights: Some(Eights { scales, each, shift }) })
    }

    /// Rotations of every position.
    pub fn rotations(&self, table: &RopeTable) -> Result<Floats, GpuError> {
        self.floats_of(&table.values())
    }

    /// Blocks in the GPU's memory.
    pub fn arena(&self, layout: BlockLayout, blocks: usize) -> Result<GpuArena, GpuError> {
        assert!(layout.dtype == KvDtype::Bf16, "the GPU's cache holds bf16");
        assert!(layout.block_tokens.is_power_of_two(), "the GPU's cache has blocks of a power of two of tokens");
        let memory = Arc::new(Memory::shared(&self.driver, layout.block_bytes() * blocks)?);
        let slot = || Memory::new(&self.driver, 1);
        let (gathered, lists) = ([slot()?, slot()?], [slot()?, slot()?]);
        Ok(GpuArena { memory, layout, blocks, gathered, lists })
    }

    /// Lets the GPU read and write the host's blocks by itself; None where it cannot, and they are copied on the way.
    pub fn pin(&self, host: &Arc<Arena>) -> Option<PinnedArena> {
        let bytes = host.layout().block_bytes() * host.blocks();
        // SAFETY: the arena lives as long as what is returned.
        let at = unsafe { self.driver.pin(host.block(0), bytes) };
        at.map(|at| PinnedArena { host: host.clone(), driver: self.driver.clone(), at })
    }

    /// Copies whole blocks of the host's to the same places of the GPU's, and waits for it if they are pinned.
    ///
    /// # Safety
    /// Nobody writes these blocks meanwhile.
    pub unsafe fn bring_blocks(
        &self,
        host: &Arena,
        pinned: Option<&PinnedArena>,
        blocks: &[u32],
        to: &mut GpuArena,
    ) -> Result<(), GpuError> {
        to.check(blocks);
        let bytes = to.layout.block_bytes();
        assert!(*host.layout() == to.layout && blocks.iter().all(|block| (*block as usize) < host.blocks()));
        for &block in blocks {
            let at = to.memory.at() + u64::from(block) * bytes as u64;
            // SAFETY: a block of either arena; the caller keeps others from writing it, and pinned ones are waited for.
            unsafe {
                let from = std::slice::from_raw_parts(host.block(block), bytes);
                match pinned {
                    Some(_) => self.driver.upload_pinned(at, from)?,
                    None => self.driver.upload(at, from)?,
                }
            }
        }
        if pinned.is_some() { self.driver.finish() } else { Ok(()) }
    }

    /// x (rows, hidden) = the rows of `w` that the spans' tokens name.
    pub fn embed(&self, w: &GpuMatrix, spans: &GpuSpans, x: &mut Floats) -> Result<(), GpuError> {
        let rows = spans.rows();
        assert!(x.len() >= rows * w.inputs && spans.tokens_below(w.outputs), "rows or tokens do not fit");
        assert!(w.eights.is_none(), "an embedding in 8 bits");
        let (ids, table, stride, hidden) = (spans.tokens_at(), w.memory.at(), w.depth as i32, w.inputs as i32);
        self.launch(launch::EMBED, [rows, 1, 1], &[&ids, &table, &stride, &hidden, &x.at()])
    }

    /// x += delta, if any; out = x / sqrt(mean(x²) + eps) · weight.
    pub fn add_rms_norm(
        &self,
        x: &mut Floats,
        delta: Option<&Floats>,
        weight: &Floats,
        rows: usize,
        eps: f32,
        out: &mut Rows,
    ) -> Result<(), GpuError> {
        let width = weight.len();
        assert!(x.len() >= rows * width && delta.is_none_or(|delta| delta.len() >= rows * width), "rows do not fit");
        out.check(rows, width);
        let (x, delta, weight) = (x.at(), delta.map_or(0, Floats::at), weight.at());
        let (width, stride) = (width as i32, out.stride() as i32);
        self.launch(launch::ADD_RMS_NORM, [rows, 1, 1], &[&x, &delta, &weight, &width, &eps, &out.at(), &stride])
    }

    /// y (rows, outputs) = these rows of x (.., K) · Wᵀ + bias, one chain per output over all k.
    pub fn matmul(
        &self,
        x: &Rows,
        rows: Range<usize>,
        w: &GpuMatrix,
        bias: Option<&Floats>,
        y: &mut Floats,
    ) -> Result<(), GpuError> {
        self.multiply(x, rows, w, bias, y, false)
    }

    /// As `matmul`, with K in 8 fixed segments whose sums are added as ((0+1)+(2+3))+((4+5)+(6+7)).
    pub fn matmul_segmented(
        &self,
        x: &Rows,
        rows: Range<usize>,
        w: &GpuMatrix,
        bias: Option<&Floats>,
        y: &mut Floats,
    ) -> Result<(), GpuError> {
        self.multiply(x, rows, w, bias, y, true)
    }

    fn multiply(
        &self,
        x: &Rows,
        range: Range<usize>,
        w: &GpuMatrix,
        bias: Option<&Floats>,
        y: &mut Floats,
        segmented: bool,
    ) -> Result<(), GpuError> {
        let rows = range.len();
        x.check(range.end, w.inputs);
        assert!(y.len() >= rows * w.outputs, "outputs do not fit (rows, N)");
        assert!(bias.is_none_or(|bias| bias.len() == w.outputs), "bias does not fit N");
        let arguments = launch::Matmul {
            x: x.at() + range.start as u64 * u64::from(x.stride()) * 2,
            w: w.memory.at(),
            bias: bias.map_or(0, Floats::at),
            y: y.at(),
            x_stride: x.stride(),
            rows: rows as u32,
            outputs: w.outputs as u32,
            depth: w.depth as u32,
            fresh: 0,
        };
        let Some(eights) = &w.eights else { return self.multiply_bf16(x, range, w, arguments, segmented) };
        let scaled = launch::Eights { scales: eights.scales.at(), each: eights.each, shift: eights.shift };
        if rows <= EIGHTS_ROWS {
            return self.multiply_f8(x, range, w, arguments, scaled, segmented);
        }
        let wide = self.wide.lock().unwrap_or_else(PoisonError::into_inner);
        let cells = w.outputs.next_multiple_of(TILE_OUTPUTS) * w.depth / (CELL.0 * CELL.1);
        let (from, to, outputs, depth) = (w.memory.at(), wide.at(), w.outputs as u32, w.depth as u32);
        let grid = [cells.div_ceil(launch::WIDEN_F8.threads as usize / 32), 1, 1];
        self.launch(launch::WIDEN_F8, grid, &[&from, &scaled, &outputs, &depth, &to])?;
        self.multiply_bf16(x, range, w, launch::Matmul { w: to, fresh: 1, ..arguments }, segmented)
    }

    /// Over weights of 8 bits, as they are.
    fn multiply_f8(
        &self,
        x: &Rows,
        range: Range<usize>,
        w: &GpuMatrix,
        arguments: launch::Matmul,
        eights: launch::Eights,
        segmented: bool,
    ) -> Result<(), GpuError> {
        let (passing, unit) = HOPPER_EIGHTS[segmented as usize];
        let fits = w.outputs.is_multiple_of(HOPPER_UNIT)
            && w.depth.is_multiple_of(unit)
            && (!segmented || w.depth <= EIGHTS_DEPTH);
        if let Some(resident) = self.driver.hopper().filter(|_| fits) {
            let bytes = launch::whole_bytes(range.len(), w.depth);
            let whole = HOPPER_EIGHTS_WHOLE[segmented as usize];
            let many = !segmented && w.outputs / TILE_OUTPUTS > whole.stays * resident;
            let hopper = match range.len() <= passing.tiled.rows {
                true if range.len() > launch::TURNED_ROWS => passing,
                true if many && bytes <= launch::WIDE_BYTES => HOPPER_EIGHTS_WIDE,
                true if bytes <= launch::WHOLE_BYTES => whole,
                true => passing,
                false => HOPPER_EIGHTS_SOME[segmented as usize],
            };
            let Hopper { tiled, boxes, cluster, stays } = hopper;
            let xs = self.driver.tensor_map(x.at(), (range.end, w.depth), x.stride() as usize, boxes.0)?;
            let tiles = w.outputs.div_ceil(tiled.outputs);
            // Thread blocks that stay have the same number of tiles each, or one less.
            let rounds = if stays > 0 { tiles.div_ceil(resident * stays) } else { 1 };
            let grid = [tiles.div_ceil(rounds) * cluster, 1, 1];
            let first = range.start as u32;
            return self.launch(tiled.kernel, grid, &[&xs, &arguments, &eights, &first]);
        }
        let tiled = EIGHTS[segmented as usize];
        let grid = [range.len().div_ceil(tiled.rows), w.outputs.div_ceil(tiled.outputs), 1];
        self.launch(tiled.kernel, grid, &[&arguments, &eights])
    }

    /// Over bf16 at `arguments.w`, in the shape of `w`.
    fn multiply_bf16(
        &self,
        x: &Rows,
        range: Range<usize>,
        w: &GpuMatrix,
        arguments: launch::Matmul,
        segmented: bool,
    ) -> Result<(), GpuError> {
        let rows = range.len();
        let segments = if segmented { SEGMENTS } else { 1 };
        let fits = w.outputs.is_multiple_of(HOPPER_UNIT) && w.depth.is_multiple_of(HOPPER_UNIT * segments);
        if let Some(resident) = self.driver.hopper().filter(|_| fits) {
            let index = HOPPERS.iter().position(|pair| rows <= pair[0].tiled.rows).unwrap_or(HOPPERS.len() - 1);
            let wide = HOPPERS[index][segmented as usize];
            let tiles = w.outputs / wide.tiled.outputs;
            let narrow = HOPPERS_NARROW.get(index).filter(|(_, most)| !segmented && tiles < most * resident);
            let is_whole = index == 0
                && w.depth.is_multiple_of(launch::WHOLE_DEPTH)
                && launch::whole_bytes(rows, w.depth) <= launch::WHOLE_BYTES;
            let hopper = match (narrow, is_whole) {
                (None, false) => wide,
                (Some((narrow, _)), false) => *narrow,
                (None, true) => HOPPERS_WHOLE[segmented as usize],
                (Some(_), true) => HOPPERS_WHOLE[2],
            };
            return self.multiply_on_hopper(x, range, w, arguments, hopper, resident);
        }
        let tiled = MATMULS.iter().find(|pair| rows <= pair[0].rows).unwrap_or(&MATMULS[2])[segmented as usize];
        let grid = [rows.div_ceil(tiled.rows), w.outputs.div_ceil(tiled.outputs), 1];
        self.launch(tiled.kernel, grid, &[&arguments])
    }

    fn multiply_on_hopper(
        &self,
        x: &Rows,
        range: Range<usize>,
        w: &GpuMatrix,
        arguments: launch::Matmul,
        hopper: Hopper,
        resident: usize,
    ) -> Result<(), GpuError> {
        let Hopper { tiled, boxes, cluster, stays } = hopper;
        let xs = self.driver.tensor_map(x.at(), (range.end, w.depth), x.stride() as usize, boxes.0)?;
        let ws = self.driver.tensor_map(arguments.w, (w.outputs, w.depth), w.depth, boxes.1)?;
        let tiles = range.len().div_ceil(tiled.rows) * w.outputs.div_ceil(tiled.outputs);
        let clusters = if stays > 0 { tiles.min(resident * stays / cluster) } else { tiles };
        self.launch(tiled.kernel, [clusters * cluster, 1, 1], &[&xs, &ws, &arguments, &(range.start as u32)])
    }

    /// (rows, gate | up) → (rows, silu(gate)·up).
    pub fn silu_mul(&self, gate_up: &Floats, rows: usize, out: &mut Rows) -> Result<(), GpuError> {
        let width = out.width();
        out.check(rows, width);
        assert!(gate_up.len() >= rows * 2 * width, "inputs do not fit (rows, gate | up)");
        let (from, to, stride) = (gate_up.at(), out.at(), out.stride() as i32);
        let grid = [rows, width.div_ceil(4 * launch::SILU_MUL.threads as usize), 1];
        self.launch(launch::SILU_MUL, grid, &[&from, &(width as i32), &to, &stride])
    }

    /// The rows `kept` of x (rows, width), packed into `out`.
    pub fn keep_rows(&self, x: &Floats, kept: &GpuSpans, width: usize, out: &mut Floats) -> Result<(), GpuError> {
        assert!(out.len() >= kept.rows() * width, "rows do not fit");
        let (from, rows, to) = (x.at(), kept.tokens_at(), out.at());
        self.launch(launch::KEEP_ROWS, [kept.rows(), 1, 1], &[&from, &rows, &(width as i32), &to])
    }

    /// Copies whole blocks inside the arena: (from, to).
    pub fn copy_blocks(&self, arena: &mut GpuArena, pairs: &[(u32, u32)]) -> Result<(), GpuError> {
        if pairs.is_empty() {
            return Ok(());
        }
        let all: Vec<u32> = pairs.iter().flat_map(|(from, to)| [*from, *to]).collect();
        arena.check(&all);
        arena.lists[0].ensure(all.len() * 4)?;
        arena.lists[0].write(0, &all)?;
        let (layout, list, memory) = (arena.shape(), arena.lists[0].at(), arena.memory.at());
        let grid = [COPY_PARTS as usize, pairs.len(), 1];
        self.launch(launch::COPY_BLOCKS, grid, &[&layout, &list, &memory])
    }

    /// Copies all blocks of another arena of the same size, as the driver copies memory.
    pub fn copy_arena(&self, from: &GpuArena, to: &mut GpuArena) -> Result<(), GpuError> {
        assert!(from.memory.bytes() == to.memory.bytes(), "arenas of one size");
        // SAFETY: both whole.
        unsafe { self.driver.copy(to.memory.at(), from.memory.at(), to.memory.bytes()) }
    }

    /// Begins to bring one layer of the blocks to the host, beside what is computed later. The slot's last one has ended.
    pub fn begin_gather(
        &self,
        arena: &mut GpuArena,
        slot: usize,
        layer: usize,
        blocks: &[u32],
    ) -> Result<(), GpuError> {
        arena.check(blocks);
        assert!(layer < arena.layout.layers as usize && !blocks.is_empty(), "a layer of some blocks");
        let bytes = blocks.len() * arena.layout.layer_bytes();
        arena.gathered[slot].ensure(bytes)?;
        arena.lists[slot].ensure(blocks.len() * 4)?;
        arena.lists[slot].write(0, blocks)?;
        let (layout, layer, list) = (arena.shape(), layer as u32, arena.lists[slot].at());
        let (memory, to) = (arena.memory.at(), arena.gathered[slot].at());
        let grid = [arena.layout.kv_heads as usize, blocks.len(), 1];
        self.launch(launch::GATHER_LAYER, grid, &[&layout, &layer, &list, &memory, &to])?;
        // SAFETY: the slot's memory, which nothing writes before the next gather into it.
        unsafe { self.driver.begin_download(slot, to, bytes) }
    }

    /// Begins to write one layer of the blocks into the same places of the host's, beside what is computed later. The slot's
    /// last one has ended; `end_gather` waits for it.
    ///
    /// # Safety
    /// Nobody else touches that layer of these blocks of the host's before it has ended.
    pub unsafe fn begin_give(
        &self,
        arena: &mut GpuArena,
        slot: usize,
        layer: usize,
        blocks: &[u32],
        to: &PinnedArena,
    ) -> Result<(), GpuError> {
        arena.check(blocks);
        assert!(layer < arena.layout.layers as usize && !blocks.is_empty(), "a layer of some blocks");
        let inside = blocks.iter().all(|block| (*block as usize) < to.host.blocks());
        assert!(inside && *to.host.layout() == arena.layout, "arenas of one shape");
        arena.lists[slot].ensure(blocks.len() * 4)?;
        arena.lists[slot].write(0, blocks)?;
        let (layout, layer, list, count) = (arena.shape(), layer as u32, arena.lists[slot].at(), blocks.len() as u32);
        let grid = [COPY_PARTS.min(count), layout.kv_heads, 1];
        let arguments: [&dyn Argument; 6] = [&layout, &layer, &list, &count, &arena.memory.at(), &to.at];
        let mut pointers = arguments.map(|argument| argument.at());
        self.note(launch::GIVE_LAYER);
        // SAFETY: blocks inside either arena; the host's are the caller's, the GPU's are written by later layers elsewhere.
        unsafe { self.driver.launch_beside(slot, launch::GIVE_LAYER, grid, &mut pointers) }
    }

    /// `end_gather` of this slot waits for all that was given before, and takes nothing. The slot's last one has ended.
    pub fn begin_mark(&self, slot: usize) -> Result<(), GpuError> {
        self.driver.begin_mark(slot)
    }

    /// Waits for a slot's gather: per block (kv_head, K|V, token, head_dim).
    pub fn end_gather(&self, slot: usize, take: &mut dyn FnMut(&[u8])) -> Result<(), GpuError> {
        self.driver.end_download(slot, take)
    }

    /// Gathers that can be on their way at a time.
    pub const GATHERS: usize = SLOTS;

    pub(crate) fn launch(&self, kernel: Kernel, grid: [usize; 3], arguments: &[&dyn Argument]) -> Result<(), GpuError> {
        if grid.contains(&0) {
            return Ok(());
        }
        let mut pointers: Vec<_> = arguments.iter().map(|argument| argument.at()).collect();
        self.note(kernel);
        if let Some(launches) = &mut *self.recording.lock().unwrap_or_else(PoisonError::into_inner) {
            launches.push(Launched::new(kernel, grid.map(|n| n as u32), arguments));
        }
        // SAFETY: the operation that calls this has checked what its kernel touches; the arguments outlive the call.
        unsafe { self.driver.launch(kernel, grid.map(|n| n as u32), &mut pointers) }
    }
}

/// Whether attention can run with these heads.
pub fn check_heads(heads: &Heads) -> Result<(), GpuError> {
    let group = heads.heads / heads.kv_heads;
    match HEAD_DIMS.contains(&heads.head_dim) && group <= PREFILL_ROWS {
        true => Ok(()),
        false => Err(GpuError::HeadDim { found: heads.head_dim, supported: HEAD_DIMS }),
    }
}

/// Blocks of the host's that the GPU reads and writes by itself, until this is dropped.
pub struct PinnedArena {
    host: Arc<Arena>,
    driver: Arc<dyn Driver>,
    /// Where the GPU finds them.
    at: u64,
}

impl Drop for PinnedArena {
    fn drop(&mut self) {
        if self.driver.finish().is_ok() {
            // SAFETY: pinned when this was made; everything has ended.
            unsafe { self.driver.unpin(self.host.block(0)) }
        }
    }
}

/// A worker's KV blocks in the GPU's memory, laid out as `baton_core::Arena`.
pub struct GpuArena {
    pub(crate) memory: Arc<Memory>,
    layout: BlockLayout,
    blocks: usize,
    /// Per slot: one layer of some blocks on its way to the host, and which.
    gathered: [Memory; SLOTS],
    lists: [Memory; SLOTS],
}

impl GpuArena {
    pub fn layout(&self) -> &BlockLayout {
        &self.layout
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Writes one whole block.
    pub fn write_block(&mut self, index: u32, bytes: &[u8]) -> Result<(), GpuError> {
        self.check(&[index]);
        assert_eq!(bytes.len(), self.layout.block_bytes(), "a whole block");
        self.memory.write(index as usize * bytes.len(), bytes)
    }

    pub fn read_block(&self, index: u32) -> Result<Vec<u8>, GpuError> {
        self.check(&[index]);
        let bytes = self.layout.block_bytes();
        self.memory.read(index as usize * bytes, bytes)
    }

    /// The blocks as links see them, which read and write them beside this.
    pub fn shared(&self, gpu: &Gpu) -> Arc<dyn DeviceBlocks> {
        Arc::new(SharedBlocks::new(gpu.driver.clone(), self.memory.clone()))
    }

    pub(crate) fn check(&self, blocks: &[u32]) {
        assert!(blocks.iter().all(|block| (*block as usize) < self.blocks), "a block outside the arena");
    }

    pub(crate) fn shape(&self) -> Layout {
        let BlockLayout { layers, kv_heads, head_dim, block_tokens, .. } = self.layout;
        Layout { layers, kv_heads, head_dim, block_tokens }
    }
}
