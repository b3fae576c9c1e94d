//! How long kernels take on a GPU, as bandwidth and arithmetic rate, and as shares of ceilings that somebody else's copies and
//! matmuls have reached on the same GPU in the same minute. Inputs are random, and of weights there are so many that a launch
//! finds none of its own in the cache.

use baton_core::Rng;
use baton_core::arena::{BlockLayout, KvDtype};

use super::{Floats, Gpu, GpuArena, GpuAttention, GpuError, GpuMatrix, GpuRope, Rows};
use crate::limits::best;
use crate::{Dtype, F8Matrix, Heads, Matrix, RopeTable, Span};

/// One measured number.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
}

/// What a GPU could do at most, to state shares of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ceilings {
    /// GB/s of copies, read and written.
    pub copy_gbps: Option<f64>,
    /// TFLOP/s of bf16 matmuls.
    pub matmul_tflops: Option<f64>,
}

/// Launches per timing, so that waiting for the GPU does not count.
const LAUNCHES: usize = 20;
const TRIES: usize = 5;
/// Bytes of weights that take turns: several times any cache.
const TURNING: usize = 512 << 20;

/// Of a model of 8 billion parameters.
const HIDDEN: usize = 4096;
const WIDE: usize = 14_336;
const HEADS: Heads = Heads { heads: 32, kv_heads: 8, head_dim: 128 };

/// (outputs, inputs, whether they are added in segments) of the matmuls of a layer.
const SHAPES: [(usize, usize, bool); 4] =
    [(6144, HIDDEN, false), (HIDDEN, HIDDEN, true), (2 * WIDE, HIDDEN, false), (HIDDEN, WIDE, true)];
/// A mixture of experts: (experts, those of a row, hidden, inner width).
const MIXTURE: (usize, usize, usize, usize) = (128, 8, 2048, 768);
/// Layers in turn, whose weights together are many times any cache.
const LAYERS: usize = 3;

/// The matmuls of a layer, in order.
type Weights = [GpuMatrix; 4];

/// Layers out of some matrices of each shape.
fn layers_of(mut turning: Vec<Vec<GpuMatrix>>) -> Vec<Weights> {
    let layer = || {
        let each: Option<Vec<GpuMatrix>> = turning.iter_mut().map(Vec::pop).collect();
        each.and_then(|each| <[GpuMatrix; 4]>::try_from(each).ok())
    };
    std::iter::from_fn(layer).take(LAYERS).collect()
}

/// Every kernel of such a model's layer, at one row, some and many.
pub fn all(gpu: &Gpu, ceilings: Ceilings) -> Result<Vec<Measured>, GpuError> {
    let mut measure = Measure { gpu, ceilings, rng: Rng::new(1), found: Vec::new() };
    let mut turning = Vec::new();
    for shape in SHAPES {
        turning.push(measure.matmul(shape)?);
    }
    let layers = layers_of(turning);
    for rows in [1, 8, 64] {
        measure.layer_matmuls("", &layers, rows)?;
    }
    measure.layer(&layers)?;
    drop(layers);
    let layers = measure.eights()?;
    for rows in [1, 8, 64, 4096] {
        measure.layer_matmuls("_f8", &layers, rows)?;
    }
    drop(layers);
    measure.experts(&[1, 8, 64, 4096])?;
    measure.attention("decode, 1 of 1024", 1, 1, 1024)?;
    measure.attention("decode, 1 of 8192", 1, 1, 8192)?;
    measure.attention("decode, 64 of 1024", 1, 64, 1024)?;
    measure.attention("prefill, 4096", 4096, 1, 0)?;
    for rows in [1, 64, 4096] {
        measure.rows(rows)?;
    }
    Ok(measure.found)
}

struct Measure<'a> {
    gpu: &'a Gpu,
    ceilings: Ceilings,
    rng: Rng,
    found: Vec<Measured>,
}

impl Measure<'_> {
    fn halves(&mut self, count: usize) -> Vec<u16> {
        // Between 1/8 and 1/2, of both signs.
        let words = (0..count.div_ceil(4)).map(|_| self.rng.u64());
        words
            .flat_map(|word| [0, 16, 32, 48].map(|shift| (word >> shift) as u16 & 0x80ff | 0x3e00))
            .take(count)
            .collect()
    }

    fn rows_of(&mut self, rows: usize, width: usize) -> Result<Rows, GpuError> {
        let halves = self.halves(rows * width);
        let to = self.gpu.rows(rows, width)?;
        to.write(&halves)?;
        Ok(to)
    }

    fn floats_of(&mut self, count: usize) -> Result<Floats, GpuError> {
        let values: Vec<f32> = self.halves(count).into_iter().map(crate::bf16::widen).collect();
        self.gpu.floats_of(&values)
    }

    /// Blocks of random keys and values.
    fn arena_of(&mut self, layout: BlockLayout, blocks: usize) -> Result<GpuArena, GpuError> {
        let mut arena = self.gpu.arena(layout, blocks)?;
        for block in 0..blocks as u32 {
            let bytes: Vec<u8> = self.halves(layout.block_bytes() / 2).into_iter().flat_map(u16::to_le_bytes).collect();
            arena.write_block(block, &bytes)?;
        }
        Ok(arena)
    }

    fn add(&mut self, name: String, value: f64, unit: &'static str, most: Option<f64>) {
        let share =
            most.map(|most| Measured { name: format!("{name}, share"), value: 100.0 * value / most, unit: "%" });
        self.found.push(Measured { name, value, unit });
        self.found.extend(share);
    }

    /// Gives back the weights that took turns.
    fn matmul(&mut self, (outputs, inputs, segmented): (usize, usize, bool)) -> Result<Vec<GpuMatrix>, GpuError> {
        let gpu = self.gpu;
        let bytes: Vec<u8> = self.halves(outputs * inputs).into_iter().flat_map(u16::to_le_bytes).collect();
        let matrix = Matrix { dtype: Dtype::Bf16, bytes: &bytes, rows: outputs, cols: inputs };
        let turning = (0..TURNING.div_ceil(bytes.len()).max(1)).map(|_| gpu.matrix(&[matrix]));
        let turning = turning.collect::<Result<Vec<GpuMatrix>, _>>()?;
        for rows in [1, 8, 16, 64, 256, 4096] {
            let (x, mut y, mut turn) = (self.rows_of(rows, inputs)?, gpu.floats(rows * outputs)?, 0);
            let seconds = time(gpu, || {
                turn += 1;
                let w = &turning[turn % turning.len()];
                match segmented {
                    true => gpu.matmul_segmented(&x, 0..rows, w, None, &mut y),
                    false => gpu.matmul(&x, 0..rows, w, None, &mut y),
                }
            })?;
            let kind = if segmented { "matmul_segmented" } else { "matmul" };
            let name = format!("{kind} ({rows}, {outputs}, {inputs})");
            let Ceilings { copy_gbps, matmul_tflops } = self.ceilings;
            match rows <= 64 {
                true => self.add(name, turning[0].bytes() as f64 / seconds / 1e9, "GB/s", copy_gbps),
                false => {
                    let flops = 2.0 * (rows * outputs * inputs) as f64;
                    self.add(name, flops / seconds / 1e12, "TFLOP/s", matmul_tflops);
                }
            }
        }
        Ok(turning)
    }

    /// The matmuls of a layer one after another, as a decode step has them: few rows in a graph.
    fn layer_matmuls(&mut self, kind: &str, layers: &[Weights], rows: usize) -> Result<(), GpuError> {
        let gpu = self.gpu;
        let (x, wide) = (self.rows_of(rows, HIDDEN)?, self.rows_of(rows, WIDE)?);
        let (mut y, mut turn) = (gpu.floats(rows * 2 * WIDE)?, 0);
        let mut step = || {
            turn += 1;
            for (w, (_, inputs, segmented)) in layers[turn % layers.len()].iter().zip(SHAPES) {
                let x = if inputs == WIDE { &wide } else { &x };
                match segmented {
                    true => gpu.matmul_segmented(x, 0..rows, w, None, &mut y)?,
                    false => gpu.matmul(x, 0..rows, w, None, &mut y)?,
                }
            }
            Ok(())
        };
        let seconds = match rows {
            ..=64 => time_recorded(gpu, step)?,
            _ => time(gpu, &mut step)?,
        };
        self.add(format!("layer_matmuls{kind}_{rows}_rows"), seconds * 1e6, "us", None);
        if rows == 1 && !kind.is_empty() {
            let bytes: usize = layers[0].iter().map(GpuMatrix::bytes).sum();
            let name = format!("layer_matmuls{kind}_{rows}_rows, bandwidth");
            self.add(name, bytes as f64 / seconds / 1e9, "GB/s", self.ceilings.copy_gbps);
        }
        Ok(())
    }

    /// Layers of the same shapes in 8 bits, with a scale for 128 by 128 weights.
    fn eights(&mut self) -> Result<Vec<Weights>, GpuError> {
        let mut turning = Vec::new();
        for (rows, cols, _) in SHAPES {
            // Without the two bytes that are no numbers.
            let bytes: Vec<u8> =
                self.halves(rows * cols / 2).into_iter().flat_map(u16::to_le_bytes).map(|byte| byte & 0xf7).collect();
            let scales = vec![0.01; rows.div_ceil(128) * cols.div_ceil(128)];
            let matrix = F8Matrix { bytes: &bytes, rows, cols, scales: &scales, block: (128, 128) };
            let layers = (0..LAYERS).map(|_| self.gpu.matrix_f8(&[matrix]));
            turning.push(layers.collect::<Result<Vec<GpuMatrix>, _>>()?);
        }
        Ok(layers_of(turning))
    }

    /// A whole layer of a decode step of one sequence behind 1024 positions.
    fn layer(&mut self, layers: &[Weights]) -> Result<(), GpuError> {
        let (gpu, heads, context) = (self.gpu, HEADS, 1024);
        let layout = BlockLayout { layers: 1, kv_heads: 8, head_dim: 128, block_tokens: 16, dtype: KvDtype::Bf16 };
        let blocks: Vec<u32> = (0..context as u32 / 16 + 1).collect();
        let mut arena = self.arena_of(layout, blocks.len())?;
        let mut described = gpu.spans()?;
        let span = Span { row: 0, rows: 1, position: context, blocks: &blocks };
        gpu.describe(&mut described, &[0], &[span], &heads, &arena)?;
        let inv_freq: Vec<f64> = (0..64).map(|i| 0.8f64.powi(i)).collect();
        let rotations = gpu.rotations(&RopeTable::new(&inv_freq, context + 1))?;
        let (mut x, weight) = (self.floats_of(HIDDEN)?, self.floats_of(HIDDEN)?);
        let (mut normed, mut gated) = (self.rows_of(1, HIDDEN)?, gpu.rows(1, WIDE)?);
        let (mut q, mut attended) = (gpu.rows(1, heads.width())?, gpu.rows(1, heads.width())?);
        let (mut qkv, mut gate_up) = (gpu.floats(heads.qkv_width())?, gpu.floats(2 * WIDE)?);
        let (mut delta, mut turn) = (gpu.floats(HIDDEN)?, 0);
        let rope = GpuRope { heads, layer: 0, eps: 1e-5, rotations: &rotations, q_norm: None, k_norm: None };
        let attention = GpuAttention { heads, layer: 0, scale: 0.088, window: None };
        let mut step = || {
            turn += 1;
            let [first, out, second, down] = &layers[turn % layers.len()];
            gpu.matmul(&normed, 0..1, first, None, &mut qkv)?;
            gpu.rope_store(&rope, &described, &qkv, &mut q, &mut arena)?;
            gpu.attention(&attention, &described, &q, &arena, &mut attended)?;
            gpu.matmul_segmented(&attended, 0..1, out, None, &mut delta)?;
            gpu.add_rms_norm(&mut x, Some(&delta), &weight, 1, 1e-5, &mut normed)?;
            gpu.matmul(&normed, 0..1, second, None, &mut gate_up)?;
            gpu.silu_mul(&gate_up, 1, &mut gated)?;
            gpu.matmul_segmented(&gated, 0..1, down, None, &mut delta)?;
            gpu.add_rms_norm(&mut x, Some(&delta), &weight, 1, 1e-5, &mut normed)
        };
        let seconds = time(gpu, &mut step)?;
        let as_graph = time_recorded(gpu, step)?;
        let bytes: usize = layers[0].iter().map(GpuMatrix::bytes).sum();
        let name = "layer of one row".to_string();
        self.add(format!("{name}, time"), seconds * 1e6, "us", None);
        self.add(format!("{name} in a graph, time"), as_graph * 1e6, "us", None);
        self.add(name, bytes as f64 / seconds / 1e9, "GB/s", self.ceilings.copy_gbps);
        Ok(())
    }

    /// A mixture from the normed rows on to what is added to them, few rows in a graph.
    fn experts(&mut self, rows: &[usize]) -> Result<(), GpuError> {
        let (gpu, (experts, used, hidden, wide)) = (self.gpu, MIXTURE);
        let mut matrix = |outputs: usize, inputs: usize, times: usize| {
            let bytes: Vec<u8> = self.halves(outputs * inputs).into_iter().flat_map(u16::to_le_bytes).collect();
            let one = Matrix { dtype: Dtype::Bf16, bytes: &bytes, rows: outputs, cols: inputs };
            gpu.matrix(&vec![one; times])
        };
        let router = matrix(experts, hidden, 1)?;
        let (gate_up, down) = (matrix(2 * wide, hidden, experts)?, matrix(hidden, wide, experts)?);
        for &rows in rows {
            let (x, mut out) = (self.rows_of(rows, hidden)?, gpu.floats(rows * hidden)?);
            let mut shares = gpu.shares(experts, used, true)?;
            shares.ensure(rows)?;
            let count = shares.of_rows(rows);
            let (mut logits, mut y) = (gpu.floats(rows * experts)?, gpu.floats(count * hidden)?);
            let (mut both, mut gated) = (gpu.floats(count * 2 * wide)?, gpu.rows(count, wide)?);
            let mut step = || {
                gpu.matmul(&x, 0..rows, &router, None, &mut logits)?;
                gpu.route(&logits, rows, [&gate_up, &down], &mut shares)?;
                gpu.matmul_experts(&x, &shares, &gate_up, &mut both)?;
                gpu.silu_mul(&both, count, &mut gated)?;
                gpu.matmul_segmented_experts(&gated, &shares, &down, &mut y)?;
                gpu.mix_rows(&y, hidden, &shares, &mut out)
            };
            let seconds = match rows {
                ..=64 => time_recorded(gpu, step)?,
                _ => time(gpu, &mut step)?,
            };
            let name = format!("experts ({rows}, {used} of {experts}, {hidden}, {wide})");
            self.add(format!("{name}, time"), seconds * 1e6, "us", None);
            let flops = 2.0 * (count * 3 * wide * hidden) as f64;
            self.add(name, flops / seconds / 1e12, "TFLOP/s", self.ceilings.matmul_tflops);
        }
        Ok(())
    }

    /// One layer's attention over `sequences` of `rows` rows behind `context` positions.
    fn attention(&mut self, name: &str, rows: usize, sequences: usize, context: usize) -> Result<(), GpuError> {
        let gpu = self.gpu;
        let heads = HEADS;
        let layout = BlockLayout { layers: 1, kv_heads: 8, head_dim: 128, block_tokens: 16, dtype: KvDtype::Bf16 };
        let each = (context + rows).div_ceil(16);
        let arena = self.arena_of(layout, each * sequences)?;
        let blocks: Vec<u32> = (0..(each * sequences) as u32).collect();
        let spans: Vec<Span> = blocks
            .chunks_exact(each)
            .enumerate()
            .map(|(i, blocks)| Span { row: i * rows, rows, position: context, blocks })
            .collect();
        let mut described = gpu.spans()?;
        gpu.describe(&mut described, &vec![0; rows * sequences], &spans, &heads, &arena)?;
        let q = self.rows_of(rows * sequences, heads.width())?;
        let mut out = gpu.rows(rows * sequences, heads.width())?;
        let attention = GpuAttention { heads, layer: 0, scale: 0.088, window: None };
        let seconds = time(gpu, || gpu.attention(&attention, &described, &q, &arena, &mut out))?;
        let Ceilings { copy_gbps, matmul_tflops } = self.ceilings;
        let whole = context + rows;
        let name = format!("attention, {name}");
        match rows {
            1 => {
                self.add(format!("{name}, time"), seconds * 1e6, "us", None);
                self.add(name, (sequences * whole * 2 * 8 * 128 * 2) as f64 / seconds / 1e9, "GB/s", copy_gbps);
            }
            // Two products, half of which a causal mask leaves.
            _ => self.add(name, 2.0 * (rows * rows * 32 * 128) as f64 / seconds / 1e12, "TFLOP/s", matmul_tflops),
        }
        Ok(())
    }

    /// What works row by row: microseconds.
    fn rows(&mut self, rows: usize) -> Result<(), GpuError> {
        let gpu = self.gpu;
        let (mut x, delta, weight) =
            (self.floats_of(rows * HIDDEN)?, self.floats_of(rows * HIDDEN)?, self.floats_of(HIDDEN)?);
        let mut normed = gpu.rows(rows, HIDDEN)?;
        let seconds = time(gpu, || gpu.add_rms_norm(&mut x, Some(&delta), &weight, rows, 1e-5, &mut normed))?;
        self.add(format!("add_rms_norm ({rows}, {HIDDEN})"), seconds * 1e6, "us", None);
        let (gate_up, mut gated) = (self.floats_of(rows * 2 * WIDE)?, gpu.rows(rows, WIDE)?);
        let seconds = time(gpu, || gpu.silu_mul(&gate_up, rows, &mut gated))?;
        self.add(format!("silu_mul ({rows}, {WIDE})"), seconds * 1e6, "us", None);

        let heads = HEADS;
        let layout = BlockLayout { layers: 1, kv_heads: 8, head_dim: 128, block_tokens: 16, dtype: KvDtype::Bf16 };
        let mut arena = gpu.arena(layout, rows.div_ceil(16))?;
        let blocks: Vec<u32> = (0..rows.div_ceil(16) as u32).collect();
        let spans = [Span { row: 0, rows, position: 0, blocks: &blocks }];
        let mut described = gpu.spans()?;
        gpu.describe(&mut described, &vec![0; rows], &spans, &heads, &arena)?;
        let inv_freq: Vec<f64> = (0..64).map(|i| 0.8f64.powi(i)).collect();
        let rotations = gpu.rotations(&RopeTable::new(&inv_freq, rows))?;
        let (qkv, mut q) = (self.floats_of(rows * heads.qkv_width())?, gpu.rows(rows, heads.width())?);
        let rope = GpuRope { heads, layer: 0, eps: 1e-5, rotations: &rotations, q_norm: None, k_norm: None };
        let seconds = time(gpu, || gpu.rope_store(&rope, &described, &qkv, &mut q, &mut arena))?;
        self.add(format!("rope_store ({rows}, {})", heads.qkv_width()), seconds * 1e6, "us", None);
        Ok(())
    }
}

/// Seconds of one step, of many in a row that were recorded together.
fn time_recorded(gpu: &Gpu, mut step: impl FnMut() -> Result<(), GpuError>) -> Result<f64, GpuError> {
    let steps = LAYERS * 4;
    let recorded = gpu.record(|| (0..steps).try_for_each(|_| step()))?;
    // SAFETY: all that a step touches is borrowed by `step`, which is still here.
    Ok(time(gpu, || unsafe { gpu.replay(&recorded) })? / steps as f64)
}

/// Seconds of one launch, the best of some tries.
fn time(gpu: &Gpu, mut launch: impl FnMut() -> Result<(), GpuError>) -> Result<f64, GpuError> {
    let mut outcome = launch().and_then(|()| gpu.finish());
    let seconds = best(TRIES, || {
        for _ in 0..LAUNCHES {
            outcome = outcome.clone().and_then(|()| launch());
        }
        outcome = outcome.clone().and_then(|()| gpu.finish());
    });
    outcome.map(|()| seconds / LAUNCHES as f64)
}
