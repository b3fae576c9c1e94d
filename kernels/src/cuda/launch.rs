//! The kernels and what their parameters look like on this side: structs laid out as those of the `.cu` sources.

use std::ffi::c_void;

use super::driver::Kernel;

const fn kernel(name: &'static str, threads: u32, shared: u32) -> Kernel {
    Kernel { name, threads, shared }
}

pub(crate) const EMBED: Kernel = kernel("embed", 256, 0);
pub(crate) const ADD_RMS_NORM: Kernel = kernel("add_rms_norm", 512, 0);
pub(crate) const SILU_MUL: Kernel = kernel("silu_mul", 256, 0);
pub(crate) const ROPE_STORE: Kernel = kernel("rope_store", 256, 0);
pub(crate) const KEEP_ROWS: Kernel = kernel("keep_rows", 256, 0);
pub(crate) const MERGE: &str = "attention_merge";
pub(crate) const COPY_BLOCKS: Kernel = kernel("copy_blocks", 256, 0);
pub(crate) const GATHER_LAYER: Kernel = kernel("gather_layer", 256, 0);
pub(crate) const GIVE_LAYER: Kernel = kernel("give_layer", 256, 0);
pub(crate) const ROUTE: Kernel = kernel("route", 128, 0);
pub(crate) const SORT_SHARES: Kernel = kernel("sort_shares", 256, 0);
pub(crate) const MIX_ROWS: Kernel = kernel("mix_rows", 256, 0);
pub(crate) const ADJUST: Kernel = kernel("adjust", 512, 0);
pub(crate) const SAMPLE: Kernel = kernel("sample", 512, 0);
pub(crate) const REPORT: Kernel = kernel("report", 512, 0);

/// A matmul kernel and its tile: (rows, outputs).
#[derive(Clone, Copy)]
pub(crate) struct Tiled {
    pub(crate) kernel: Kernel,
    pub(crate) rows: usize,
    pub(crate) outputs: usize,
}

/// Bytes of `stages` stages of 64 k.
const fn stages(rows: usize, outputs: usize, stages: usize) -> u32 {
    ((rows + outputs) * 128 * stages) as u32
}

/// By rows, fewest first; the second of each pair adds in segments.
pub(crate) const MATMULS: [[Tiled; 2]; 3] = [
    [
        Tiled { kernel: kernel("matmul_16", 64, stages(16, 32, 8)), rows: 16, outputs: 32 },
        Tiled { kernel: kernel("matmul_segmented_16", 64, stages(16, 32, 8)), rows: 16, outputs: 32 },
    ],
    [
        Tiled { kernel: kernel("matmul_64", 128, stages(64, 64, 4)), rows: 64, outputs: 64 },
        Tiled { kernel: kernel("matmul_segmented_64", 128, stages(64, 64, 4)), rows: 64, outputs: 64 },
    ],
    [
        Tiled { kernel: kernel("matmul_128", 256, stages(128, 128, 3)), rows: 128, outputs: 128 },
        Tiled { kernel: kernel("matmul_segmented_128", 256, stages(128, 64, 4)), rows: 128, outputs: 64 },
    ],
];

/// The same over the experts of a mixture, by the rows that an expert has on average.
pub(crate) const EXPERT_MATMULS: [[Tiled; 2]; 3] = [
    [
        Tiled { kernel: kernel("matmul_experts_16", 64, stages(16, 32, 8)), rows: 16, outputs: 32 },
        Tiled { kernel: kernel("matmul_segmented_experts_16", 64, stages(16, 32, 8)), rows: 16, outputs: 32 },
    ],
    [
        Tiled { kernel: kernel("matmul_experts_64", 128, stages(64, 64, 4)), rows: 64, outputs: 64 },
        Tiled { kernel: kernel("matmul_segmented_experts_64", 128, stages(64, 64, 4)), rows: 64, outputs: 64 },
    ],
    [
        Tiled { kernel: kernel("matmul_experts_128", 256, stages(128, 128, 3)), rows: 128, outputs: 128 },
        Tiled { kernel: kernel("matmul_segmented_experts_128", 256, stages(128, 64, 4)), rows: 128, outputs: 64 },
    ],
];

/// The same over weights of 8 bits.
pub(crate) const EXPERT_EIGHTS: [Tiled; 2] = [
    Tiled { kernel: kernel("matmul_experts_f8", 128, EIGHTS[0].kernel.shared), rows: 16, outputs: 32 },
    Tiled { kernel: kernel("matmul_segmented_experts_f8", 128, EIGHTS[1].kernel.shared), rows: 16, outputs: 32 },
];

/// Experts of a mixture at most.
pub const EXPERTS_MAX: usize = 1024;

/// A kernel of matmul_hopper.cu: its tile, and the rows of what the copy engine brings at a time.
#[derive(Clone, Copy)]
pub(crate) struct Hopper {
    pub(crate) tiled: Tiled,
    /// (x, W)
    pub(crate) boxes: (usize, usize),
    /// Thread blocks that share a tile.
    pub(crate) cluster: usize,
    /// Thread blocks per multiprocessor that stay and take tile after tile; 0: each tile has its own.
    pub(crate) stays: usize,
}

/// By rows, fewest first; the second of each pair adds in segments.
pub(crate) const HOPPERS: [[Hopper; 2]; 3] = [
    [
        few(kernel("matmul_16_hopper", 160, few_bytes(32, 8 * 2)), 32, 2),
        few(kernel("matmul_segmented_16_hopper", 288, ALONE), 32, 0),
    ],
    [
        some(kernel("matmul_64_hopper", 160, some_bytes(128, 8)), 128, 1),
        some(kernel("matmul_segmented_64_hopper", 160, some_bytes(128, 7)), 128, 4),
    ],
    [
        many(kernel("matmul_hopper", 384, many_bytes(256, 4, 0)), 256),
        many(kernel("matmul_segmented_hopper", 384, many_bytes(128, 5, 256 * 64 * 4)), 128),
    ],
];
/// All kernels of Hopper alone.
pub(crate) fn hoppers() -> impl Iterator<Item = Hopper> {
    let narrow = HOPPERS_NARROW.into_iter().chain(HOPPER_EIGHTS).map(|(hopper, _)| hopper);
    HOPPERS
        .into_iter()
        .flatten()
        .chain(narrow)
        .chain(HOPPERS_WHOLE)
        .chain(HOPPER_EIGHTS_WHOLE)
        .chain(HOPPER_EIGHTS_SOME)
        .chain([HOPPER_EIGHTS_WIDE])
}

/// In place of the first two that add in no segments, where those have fewer tiles than so many per multiprocessor.
pub(crate) const HOPPERS_NARROW: [(Hopper, usize); 2] = [
    (few(kernel("matmul_16_narrow_hopper", 96, few_bytes(16, 8 * 2)), 16, 3), 3),
    (some(kernel("matmul_64_narrow_hopper", 160, some_bytes(64, 12)), 64, 1), 1),
];
/// In place of the first two and of the first narrow one, where so few rows are so short that they fit into shared memory: K is a
/// multiple of 128, and `whole_bytes` at most `WHOLE_BYTES`.
pub(crate) const HOPPERS_WHOLE: [Hopper; 3] = [
    few(kernel("matmul_whole_hopper", 160, HALF), 32, 2),
    few(kernel("matmul_segmented_whole_hopper", 288, HALF), 16, 0),
    few(kernel("matmul_whole_narrow_hopper", 96, THIRD), 16, 3),
];
pub(crate) const WHOLE_BYTES: usize = 30 << 10;
pub(crate) const WHOLE_DEPTH: usize = 128;

/// Bytes that whole rows take.
pub(crate) const fn whole_bytes(rows: usize, depth: usize) -> usize {
    rows * (depth * 2 + 16)
}

/// Shared memory of kernels of which a multiprocessor takes one, two, three or four thread blocks, more of it than some need: where
/// thread blocks of the next launch find room beside these, they come to lie unevenly, some multiprocessors have the work of two,
/// and a product takes a quarter longer.
const ALONE: u32 = 114 << 10;
const HALF: u32 = 112 << 10;
const THIRD: u32 = 66 << 10;
const QUARTER: u32 = 54 << 10;

/// Over weights of 8 bits; the second adds in segments.
pub(crate) const EIGHTS: [Tiled; 2] = [
    Tiled { kernel: kernel("matmul_f8", 128, 6 * (16 * 2 + 32) * 128), rows: 16, outputs: 32 },
    Tiled { kernel: kernel("matmul_segmented_f8", 128, 6 * (16 * 2 + 32) * 128), rows: 16, outputs: 32 },
];
/// The same on Hopper, with what K is a multiple of there.
pub(crate) const HOPPER_EIGHTS: [(Hopper, usize); 2] = [
    (few(kernel("matmul_f8_hopper", 160, eight_bytes(6 * 4)), 32, 2), 256),
    (few(kernel("matmul_segmented_f8_hopper", 288, eight_bytes(16 * 2)), 32, 0), 1024),
];
/// In place of those for more rows than they take.
pub(crate) const HOPPER_EIGHTS_SOME: [Hopper; 2] = [
    some(kernel("matmul_f8_64_hopper", 288, some_eight_bytes(6)), 128, 1),
    some(kernel("matmul_segmented_f8_64_hopper", 288, some_eight_bytes(3)), 128, 8),
];
/// In place of those, as `HOPPERS_WHOLE`, for up to `TURNED_ROWS`.
pub(crate) const HOPPER_EIGHTS_WHOLE: [Hopper; 2] = [
    few(kernel("matmul_f8_whole_narrow_hopper", 160, HALF), 32, 2),
    few(kernel("matmul_segmented_f8_whole_hopper", 544, ALONE), 32, 0),
];
/// In place of the first of those where there are tiles for more thread blocks than that has, and for shorter rows.
pub(crate) const HOPPER_EIGHTS_WIDE: Hopper = few(kernel("matmul_f8_whole_hopper", 96, QUARTER), 32, 4);
pub(crate) const TURNED_ROWS: usize = 8;
pub(crate) const WIDE_BYTES: usize = 18 << 10;
/// K at most where segments of weights of 8 bits are added on Hopper.
pub(crate) const EIGHTS_DEPTH: usize = 32_768;
/// Rows up to which weights of 8 bits are multiplied as they are; for more they become bf16 first.
pub(crate) const EIGHTS_ROWS: usize = 64;
pub(crate) const WIDEN_F8: Kernel = kernel("widen_f8", 256, 0);
/// Outputs and K of a cell of weights of 8 bits.
pub(crate) const CELL: (usize, usize) = (8, 64);
/// Outputs whose cells lie side by side.
pub(crate) const TILE_OUTPUTS: usize = 32;
/// K that share a scale, where an output has more than one.
pub(crate) const SCALED_K: usize = 128;

/// Outputs, and the K of a segment, are a multiple of this in those kernels.
pub(crate) const HOPPER_UNIT: usize = 64;
/// Bytes lost to alignment, and those of barriers.
const HOPPER_MORE: usize = 1024 + 1024;

const fn few(kernel: Kernel, outputs: usize, stays: usize) -> Hopper {
    Hopper { tiled: Tiled { kernel, rows: 16, outputs }, boxes: (16, outputs), cluster: 1, stays }
}

const fn some(kernel: Kernel, outputs: usize, cluster: usize) -> Hopper {
    Hopper { tiled: Tiled { kernel, rows: 64, outputs }, boxes: (64, 64), cluster, stays: 0 }
}

const fn many(kernel: Kernel, outputs: usize) -> Hopper {
    Hopper { tiled: Tiled { kernel, rows: 256, outputs }, boxes: (64, 64), cluster: 2, stays: 1 }
}

/// So many stages of 64 k.
const fn few_bytes(outputs: usize, stages: usize) -> u32 {
    (HOPPER_MORE + (16 + outputs) * 128 * stages) as u32
}

/// So many steps of 64 k over 32 outputs of 8 bits.
const fn eight_bytes(steps: usize) -> u32 {
    (HOPPER_MORE + (16 * 2 + 32) * 64 * steps) as u32
}

/// So many stages of 64 k.
const fn some_bytes(outputs: usize, stages: usize) -> u32 {
    (HOPPER_MORE + (64 + outputs) * 128 * stages) as u32
}

/// So many steps of 128 k over 128 outputs of 8 bits.
const fn some_eight_bytes(steps: usize) -> u32 {
    (HOPPER_MORE + (64 * 2 + 128) * 128 * steps) as u32
}

const fn many_bytes(outputs: usize, stages: usize, more: usize) -> u32 {
    (HOPPER_MORE + (128 + outputs) * 128 * stages + more) as u32
}

/// Positions per logical block of attention.
pub(crate) const BLOCK: usize = 64;
/// Rows of a thread block of prefill's attention: (token, head of the group).
pub(crate) const PREFILL_ROWS: usize = 64;
/// Heads of a group per thread block of decode's attention.
pub(crate) const DECODE_HEADS: usize = 16;

/// Head dimensions with attention kernels.
pub const HEAD_DIMS: [usize; 5] = [16, 32, 64, 96, 128];

/// Attention of one head_dim: keys and values of two blocks of positions in shared memory, or of one.
const fn attentions(prefill: &'static str, decode: &'static str, dim: u32) -> [Kernel; 2] {
    let shared = 4 * BLOCK as u32 * dim * 2;
    [kernel(prefill, 128, shared), kernel(decode, 64, shared / 2)]
}

/// (prefill, decode) per `HEAD_DIMS`.
pub(crate) const ATTENTIONS: [[Kernel; 2]; 5] = [
    attentions("attention_prefill_16", "attention_decode_16", 16),
    attentions("attention_prefill_32", "attention_decode_32", 32),
    attentions("attention_prefill_64", "attention_decode_64", 64),
    attentions("attention_prefill_96", "attention_decode_96", 96),
    attentions("attention_prefill_128", "attention_decode_128", 128),
];

/// Every kernel but those of one architecture.
pub(crate) const KERNELS: [Kernel; 42] = [
    EMBED,
    ADD_RMS_NORM,
    SILU_MUL,
    ROPE_STORE,
    KEEP_ROWS,
    kernel(MERGE, 128, 0),
    COPY_BLOCKS,
    GATHER_LAYER,
    GIVE_LAYER,
    ROUTE,
    SORT_SHARES,
    MIX_ROWS,
    ADJUST,
    SAMPLE,
    REPORT,
    EIGHTS[0].kernel,
    EIGHTS[1].kernel,
    WIDEN_F8,
    MATMULS[0][0].kernel,
    MATMULS[0][1].kernel,
    MATMULS[1][0].kernel,
    MATMULS[1][1].kernel,
    MATMULS[2][0].kernel,
    MATMULS[2][1].kernel,
    EXPERT_EIGHTS[0].kernel,
    EXPERT_EIGHTS[1].kernel,
    EXPERT_MATMULS[0][0].kernel,
    EXPERT_MATMULS[0][1].kernel,
    EXPERT_MATMULS[1][0].kernel,
    EXPERT_MATMULS[1][1].kernel,
    EXPERT_MATMULS[2][0].kernel,
    EXPERT_MATMULS[2][1].kernel,
    ATTENTIONS[0][0],
    ATTENTIONS[0][1],
    ATTENTIONS[1][0],
    ATTENTIONS[1][1],
    ATTENTIONS[2][0],
    ATTENTIONS[2][1],
    ATTENTIONS[3][0],
    ATTENTIONS[3][1],
    ATTENTIONS[4][0],
    ATTENTIONS[4][1],
];

/// A kernel's parameter.
///
/// # Safety
/// The value has the layout of the parameter's type on the device.
pub(crate) unsafe trait Argument {
    fn at(&self) -> *mut c_void {
        (self as *const Self).cast::<c_void>().cast_mut()
    }

    fn bytes(&self) -> usize {
        size_of_val(self)
    }
}

/// Values that go to the device as they lie in memory.
///
/// # Safety
/// No padding and no pointers.
pub(crate) unsafe trait Plain: Copy {}

pub(crate) fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: plain values have no padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

macro_rules! plain {
    ($($type:ty),*) => { $(
        // SAFETY: numbers, or structs of 4-byte fields.
        unsafe impl Plain for $type {}
        // SAFETY: the same type on the device.
        unsafe impl Argument for $type {}
    )* };
}

macro_rules! argument {
    ($($type:ty),*) => { $(
        // SAFETY: `repr(C)` as the device's struct of this name.
        unsafe impl Argument for $type {}
    )* };
}

plain!(u8, u16, u32, i32, f32, u64, Tile, Decode, Edit, Adjust, Sample, Report, Alternative);
argument!(Layout, Rope, Matmul, Eights, Shares, Attention, TensorMap);

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) layers: u32,
    pub(crate) kv_heads: u32,
    pub(crate) head_dim: u32,
    pub(crate) block_tokens: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Rope {
    pub(crate) layout: Layout,
    pub(crate) layer: u32,
    pub(crate) heads: u32,
    pub(crate) eps: f32,
    pub(crate) q_stride: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Matmul {
    pub(crate) x: u64,
    pub(crate) w: u64,
    pub(crate) bias: u64,
    pub(crate) y: u64,
    pub(crate) x_stride: u32,
    pub(crate) rows: u32,
    pub(crate) outputs: u32,
    pub(crate) depth: u32,
    pub(crate) fresh: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Eights {
    pub(crate) scales: u64,
    pub(crate) each: u32,
    pub(crate) shift: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Shares {
    pub(crate) chosen: u64,
    pub(crate) weights: u64,
    pub(crate) places: u64,
    pub(crate) rows: u64,
    pub(crate) run_count: u64,
    pub(crate) runs: u64,
    pub(crate) count: u32,
    pub(crate) experts: u32,
    pub(crate) used: u32,
    pub(crate) tile_rows: u32,
}

/// What the copy engine knows of a matrix of bf16: as the driver fills it in.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct TensorMap(pub(crate) [u64; 16]);

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Attention {
    pub(crate) layout: Layout,
    pub(crate) layer: u32,
    pub(crate) heads: u32,
    pub(crate) group: u32,
    pub(crate) scale: f32,
    pub(crate) window: u32,
    pub(crate) stride: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Tile {
    pub(crate) row: u32,
    pub(crate) rows: u32,
    pub(crate) position: u32,
    pub(crate) table: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Decode {
    pub(crate) row: u32,
    pub(crate) position: u32,
    pub(crate) table: u32,
    pub(crate) at: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Edit {
    pub(crate) id: u32,
    pub(crate) count: u32,
    pub(crate) bias: f32,
    pub(crate) _pad: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Adjust {
    pub(crate) row: u32,
    pub(crate) out: u32,
    pub(crate) at: u32,
    pub(crate) biases: u32,
    pub(crate) penalties: u32,
    pub(crate) bans: u32,
    pub(crate) repetition: f32,
    pub(crate) presence: f32,
    pub(crate) frequency: f32,
    pub(crate) _pad: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) row: u32,
    pub(crate) adjusted: u32,
    pub(crate) seed_low: u32,
    pub(crate) seed_high: u32,
    pub(crate) position: u32,
    pub(crate) choice: u32,
    pub(crate) temperature: f32,
    pub(crate) top_k: u32,
    pub(crate) top_p: f32,
    pub(crate) min_p: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Report {
    pub(crate) row: u32,
    pub(crate) draw: u32,
    pub(crate) token: u32,
    pub(crate) given: u32,
    pub(crate) top: u32,
    pub(crate) at: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Alternative {
    pub(crate) id: u32,
    pub(crate) logprob: f32,
}
