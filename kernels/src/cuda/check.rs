//! Every kernel against the CPU's reference, on random inputs, and the promise that a row's bits are its own. `baton doctor
//! --gpu` runs this on a GPU, the tests on the emulation.

use baton_core::arena::{Arena, BlockLayout, KvDtype};
use baton_core::{Philox, Rng, SampledToken, Sampling, TokenId};

use super::check_links::links;
use super::{Gpu, GpuArena, GpuAttention, GpuDraw, GpuDrawKind, GpuError, GpuMatrix, GpuNext, GpuRope, GpuSpans, Rows};
use crate::{
    Attention, Cpu, Dtype, F8Matrix, Heads, KvHeads, Matrix, Packed, Profile, RopeStore, RopeTable, Span, bf16,
};

/// Largest ‖out − reference‖ / ‖reference‖.
pub const ERROR_MAX: f64 = 1e-2;

/// One thing checked: how far it is from the reference, or, where bits are compared, 0 or infinity.
#[derive(Clone, Debug, PartialEq)]
pub struct Check {
    pub name: String,
    pub error: f64,
    pub ok: bool,
}

/// How much to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Small shapes with every edge case.
    Small,
    /// Also the shapes of a model of 8 billion parameters.
    Large,
}

/// Checks all kernels on inputs drawn from `seed`. The checks that failed have `ok` false; an error is a GPU that does not
/// answer.
pub fn all(gpu: &Gpu, extent: Extent, seed: u64) -> Result<Vec<Check>, GpuError> {
    let cpu = Cpu::new(1, Profile::F32Acc).expect("every machine runs f32acc");
    let mut checker = Checker { gpu, cpu, rng: Rng::new(seed), found: Vec::new() };
    gpu.watch();
    checker.rows(3, 200)?;
    checker.matmul(&[1, 3, 16, 17, 64, 65, 130], 70, 200)?;
    checker.matmul(&[2, 20, 90], 33, 64)?;
    checker.matmul(&[4], 40, 1000)?;
    // What Hopper's own kernels take, and so many outputs that those for many run.
    checker.matmul(&[1, 3, 16, 20, 70], 64, 1024)?;
    if let Some(resident) = gpu.driver.hopper() {
        checker.matmul(&[3, 33], resident * 128 + 64, 64)?;
        checker.matmul(&[2], resident * 128 + 64, 128)?;
        checker.eights(&[2], resident * 64 + 64, 256, Scaling::One)?;
    }
    let shapes = [(4, 2, 16, None), (6, 2, 32, Some(40)), (8, 1, 64, None), (5, 5, 96, Some(64)), (20, 1, 128, None)];
    for (heads, kv_heads, head_dim, window) in shapes {
        checker.attention(Heads { heads, kv_heads, head_dim }, window, &[(37, 0), (1, 70), (9, 100), (1, 0)])?;
    }
    checker.eights(&[1, 16, 17, 65], 72, 320, Scaling::One)?;
    checker.eights(&[3, 40], 40, 200, Scaling::Outputs)?;
    checker.eights(&[2, 70], 136, 1024, Scaling::Blocks)?;
    // What Hopper's own kernels take, with scales in more than one register.
    checker.eights(&[1, 4, 20], 64, 4352, Scaling::Blocks)?;
    checker.eights(&[1, 16, 20, 66], 128, 1024, Scaling::Outputs)?;
    checker.routes(9, (5, 2))?;
    checker.routes(3, (128, 8))?;
    checker.routes(2, (1000, 7))?;
    checker.experts(&[1, 3, 40, 160], (2, 1), (200, 35))?;
    checker.experts(&[2, 30], (6, 3), (64, 96))?;
    for scaling in [Scaling::One, Scaling::Outputs, Scaling::Blocks] {
        checker.experts_of_eights(&[2, 21], (3, 2), (160, 272), scaling)?;
    }
    checker.blocks()?;
    checker.found.extend(links(gpu, seed)?);
    checker.draws(1500)?;
    if extent == Extent::Large {
        checker.rows(300, 4096)?;
        checker.matmul(&[1, 64, 512], 4096, 4096)?;
        checker.matmul(&[1, 64], 4096, 14336)?;
        // Tiles that end in the middle, of every kernel there is.
        checker.matmul(&[1, 17, 65, 130, 300, 1000], 448, 1536)?;
        checker.matmul(&[5, 200, 257], 192, 1344)?;
        checker.eights(&[1, 8, 64, 100], 4096, 4096, Scaling::Blocks)?;
        checker.eights(&[1, 33], 17_024, 1024, Scaling::One)?;
        checker.eights(&[1, 16, 50], 1024, 14336, Scaling::Blocks)?;
        checker.routes(300, (128, 8))?;
        checker.experts(&[1, 64, 700], (64, 8), (1024, 384))?;
        checker.experts(&[5, 90, 1500], (8, 2), (512, 448))?;
        checker.experts_of_eights(&[1, 300], (64, 8), (1024, 384), Scaling::Blocks)?;
        let heads = Heads { heads: 32, kv_heads: 8, head_dim: 128 };
        checker.attention(heads, None, &[(256, 0), (1, 900), (100, 333), (1, 63), (1, 64)])?;
        checker.draws(128_256)?;
    }
    let unused = gpu.unused();
    let name = if unused.is_empty() { String::new() } else { format!(": not {}", unused.join(", ")) };
    checker.same(format!("every kernel is checked{name}"), unused.is_empty());
    Ok(checker.found)
}

/// What shares a scale.
#[derive(Clone, Copy, Debug)]
pub(super) enum Scaling {
    One,
    Outputs,
    Blocks,
}

/// A matrix of 8 bits.
pub(super) struct RandomEights {
    bytes: Vec<u8>,
    /// (outputs, inputs)
    shape: (usize, usize),
    scales: Vec<f32>,
    block: (usize, usize),
}

impl RandomEights {
    pub(super) fn matrix(&self) -> F8Matrix<'_> {
        let (rows, cols) = self.shape;
        F8Matrix { bytes: &self.bytes, rows, cols, scales: &self.scales, block: self.block }
    }
}

pub(super) struct Checker<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) cpu: Cpu,
    pub(super) rng: Rng,
    found: Vec<Check>,
}

impl Checker<'_> {
    pub(super) fn values(&mut self, count: usize, spread: f64) -> Vec<f32> {
        (0..count).map(|_| ((self.rng.f64() + self.rng.f64() - 1.0) * spread) as f32).collect()
    }

    pub(super) fn close(&mut self, name: String, found: &[f32], expected: &[f32]) {
        let error = distance(found, expected);
        self.found.push(Check { name, error, ok: error <= ERROR_MAX });
    }

    pub(super) fn same(&mut self, name: String, same: bool) {
        self.found.push(Check { name, error: if same { 0.0 } else { f64::INFINITY }, ok: same });
    }

    pub(super) fn weights(&mut self, outputs: usize, inputs: usize) -> Result<(GpuMatrix, Packed), GpuError> {
        let values = self.values(outputs * inputs, 1.0 / (inputs as f64).sqrt());
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let matrix = Matrix { dtype: Dtype::F32, bytes: &bytes, rows: outputs, cols: inputs };
        Ok((self.gpu.matrix(&[matrix])?, self.cpu.pack(&[matrix])))
    }

    /// Random rows on the GPU and as the values they stand for.
    pub(super) fn inputs(&mut self, rows: usize, width: usize) -> Result<(Rows, Vec<f32>), GpuError> {
        let halves: Vec<u16> = self.values(rows * width, 1.0).into_iter().map(bf16::round).collect();
        let on_gpu = self.gpu.rows(rows, width)?;
        on_gpu.write(&halves)?;
        Ok((on_gpu, widened(&halves)))
    }

    fn rows(&mut self, rows: usize, width: usize) -> Result<(), GpuError> {
        let (gpu, name) = (self.gpu, format!("({rows}, {width})"));
        let (table, packed) = self.weights(50, width)?;
        let ids: Vec<u32> = (0..rows).map(|_| self.rng.below(50) as u32).collect();
        let (spans, _) = one_token_rows(gpu, &ids)?;
        let (mut x, mut expected) = (gpu.floats(rows * width)?, vec![0.0; rows * width]);
        gpu.embed(&table, &spans, &mut x)?;
        self.cpu.embed(&packed, &ids, &mut expected);
        self.same(format!("embed {name}"), x.read(rows * width)? == expected);

        let kept = [rows as u32 - 1, 0];
        let (spans, _) = one_token_rows(gpu, &kept)?;
        let mut few = gpu.floats(2 * width)?;
        gpu.keep_rows(&x, &spans, width, &mut few)?;
        let last = expected[(rows - 1) * width..].iter().chain(&expected[..width]).copied();
        self.same(format!("keep_rows {name}"), few.read(2 * width)? == last.collect::<Vec<f32>>());

        let (delta, weight) = (self.values(rows * width, 1.0), self.values(width, 1.0));
        let (on_gpu, on_gpu_weight) = (gpu.floats_of(&delta)?, gpu.floats_of(&weight)?);
        let mut out = gpu.rows(rows, width)?;
        gpu.add_rms_norm(&mut x, Some(&on_gpu), &on_gpu_weight, rows, 1e-5, &mut out)?;
        let mut normed = vec![0.0; rows * width];
        self.cpu.add_rms_norm(&mut expected, &delta, &weight, 1e-5, &mut normed);
        self.same(format!("residual {name}"), x.read(rows * width)? == expected);
        self.close(format!("add_rms_norm {name}"), &widened(&out.read(rows)?), &normed);

        let gate_up = self.values(rows * width * 2, 6.0);
        let on_gpu = gpu.floats_of(&gate_up)?;
        gpu.silu_mul(&on_gpu, rows, &mut out)?;
        self.cpu.silu_mul(&gate_up, width, &mut normed);
        self.close(format!("silu_mul {name}"), &widened(&out.read(rows)?), &normed);
        Ok(())
    }

    /// Each number of rows against the reference, and each row of the most against the same row alone.
    fn matmul(&mut self, rows: &[usize], outputs: usize, inputs: usize) -> Result<(), GpuError> {
        let (gpu, most) = (self.gpu, rows.iter().copied().max().unwrap_or(1));
        let (w, packed) = self.weights(outputs, inputs)?;
        let bias = self.values(outputs, 1.0);
        let on_gpu_bias = gpu.floats_of(&bias)?;
        let (x, values) = self.inputs(most, inputs)?;
        for segmented in [false, true] {
            let kind = if segmented { "matmul_segmented" } else { "matmul" };
            let mut expected = vec![0.0; most * outputs];
            match segmented {
                true => self.cpu.matmul_segmented(&values, most, &packed, &mut expected),
                false => self.cpu.matmul(&values, most, &packed, &mut expected),
            }
            self.cpu.add_bias(&mut expected, &bias);
            let mut runs = Vec::new();
            for &rows in rows {
                let mut y = gpu.floats(rows * outputs)?;
                match segmented {
                    true => gpu.matmul_segmented(&x, 0..rows, &w, Some(&on_gpu_bias), &mut y)?,
                    false => gpu.matmul(&x, 0..rows, &w, Some(&on_gpu_bias), &mut y)?,
                }
                let found = y.read(rows * outputs)?;
                self.close(format!("{kind} ({rows}, {outputs}, {inputs})"), &found, &expected[..rows * outputs]);
                runs.push(found);
            }
            let whole = runs.iter().max_by_key(|run| run.len()).cloned().unwrap_or_default();
            let same = runs.iter().all(|run| equal_bits(run, &whole[..run.len()]));
            self.same(format!("{kind} (.., {outputs}, {inputs}): same bits in every tile"), same);
        }
        Ok(())
    }

    /// Weights of 8 bits: each number of rows against the reference, and against the GPU's own product with what they mean in
    /// bf16, whose bits they have.
    fn eights(&mut self, rows: &[usize], outputs: usize, inputs: usize, scaling: Scaling) -> Result<(), GpuError> {
        let (gpu, most) = (self.gpu, rows.iter().copied().max().unwrap_or(1));
        let random = self.random_eights(outputs, inputs, scaling);
        let matrix = random.matrix();
        let widened = matrix.widen();
        let wide = Matrix { dtype: Dtype::Bf16, bytes: &widened, rows: outputs, cols: inputs };
        let (packed, w, plain) = (self.cpu.pack(&[wide]), gpu.matrix_f8(&[matrix])?, gpu.matrix(&[wide])?);
        let bias = self.values(outputs, 1.0);
        let on_gpu_bias = gpu.floats_of(&bias)?;
        let (x, values) = self.inputs(most, inputs)?;
        for segmented in [false, true] {
            let kind = if segmented { "matmul_segmented" } else { "matmul" };
            let mut expected = vec![0.0; most * outputs];
            match segmented {
                true => self.cpu.matmul_segmented(&values, most, &packed, &mut expected),
                false => self.cpu.matmul(&values, most, &packed, &mut expected),
            }
            self.cpu.add_bias(&mut expected, &bias);
            for &rows in rows {
                let run = |w: &GpuMatrix| {
                    let mut y = gpu.floats(rows * outputs)?;
                    match segmented {
                        true => gpu.matmul_segmented(&x, 0..rows, w, Some(&on_gpu_bias), &mut y)?,
                        false => gpu.matmul(&x, 0..rows, w, Some(&on_gpu_bias), &mut y)?,
                    }
                    y.read(rows * outputs)
                };
                let (found, of_bf16) = (run(&w)?, run(&plain)?);
                let name = format!("{kind} of 8 bits ({rows}, {outputs}, {inputs}), {scaling:?}");
                self.close(name.clone(), &found, &expected[..rows * outputs]);
                self.same(format!("{name}: the bits of bf16"), equal_bits(&found, &of_bf16));
            }
        }
        Ok(())
    }

    pub(super) fn random_eights(&mut self, outputs: usize, inputs: usize, scaling: Scaling) -> RandomEights {
        // Every byte but the two that are no numbers, small ones among them.
        let bytes: Vec<u8> = (0..outputs * inputs).map(|_| self.rng.below(254) as u8).map(|b| b + b / 127).collect();
        let block = match scaling {
            Scaling::One => (outputs, inputs),
            Scaling::Outputs => (1, inputs),
            Scaling::Blocks => (128, 128),
        };
        let count = outputs.div_ceil(block.0) * inputs.div_ceil(block.1);
        let spread = 0.02 / (inputs as f64).sqrt();
        let scales: Vec<f32> = (0..count).map(|_| ((0.5 + self.rng.f64()) * spread) as f32).collect();
        RandomEights { bytes, shape: (outputs, inputs), scales, block }
    }

    /// Spans of (rows, position of the first), over a cache whose blocks lie in random order.
    fn attention(&mut self, heads: Heads, window: Option<usize>, shape: &[(usize, usize)]) -> Result<(), GpuError> {
        let gpu = self.gpu;
        let layout = BlockLayout {
            layers: 2,
            kv_heads: heads.kv_heads as u32,
            head_dim: heads.head_dim as u32,
            block_tokens: 16,
            dtype: KvDtype::Bf16,
        };
        let sequences: Vec<usize> = shape.iter().map(|(rows, position)| (rows + position).div_ceil(16)).collect();
        let blocks = sequences.iter().sum::<usize>() + 1;
        let mut order: Vec<u32> = (0..blocks as u32).collect();
        for i in (1..blocks).rev() {
            order.swap(i, self.rng.below(i as u64 + 1) as usize);
        }
        let arena = Arena::new(layout, blocks);
        let mut cache = gpu.arena(layout, blocks)?;
        self.fill(&arena, &mut cache)?;
        let (mut spans, mut row, mut at) = (Vec::new(), 0, 0);
        for ((rows, position), count) in shape.iter().zip(&sequences) {
            spans.push(Span { row, rows: *rows, position: *position, blocks: &order[at..at + count] });
            (row, at) = (row + rows, at + count);
        }
        let name = format!("head_dim {}, {} of {} heads", heads.head_dim, heads.kv_heads, heads.heads);
        let (rows, tokens) = (row, vec![0; row]);
        let positions = shape.iter().map(|(rows, position)| rows + position).max().unwrap_or(1);
        let inv_freq: Vec<f64> = (0..heads.head_dim / 2).map(|i| 0.8f64.powi(i as i32)).collect();
        let table = RopeTable::new(&inv_freq, positions);
        let (rotations, eps) = (gpu.rotations(&table)?, 1e-5);
        let (q_norm, k_norm) = (self.values(heads.head_dim, 1.0), self.values(heads.head_dim, 1.0));
        let (q_norm_there, k_norm_there) = (gpu.floats_of(&q_norm)?, gpu.floats_of(&k_norm)?);
        let mut qkv = self.values(rows * heads.qkv_width(), 2.0);
        let qkv_there = gpu.floats_of(&qkv)?;
        let mut described = gpu.spans()?;
        gpu.describe(&mut described, &tokens, &spans, &heads, &cache)?;
        let (mut q, mut out) = (gpu.rows(rows, heads.width())?, gpu.rows(rows, heads.width())?);
        let rope = GpuRope {
            heads,
            layer: 1,
            eps,
            rotations: &rotations,
            q_norm: Some(&q_norm_there),
            k_norm: Some(&k_norm_there),
        };
        gpu.rope_store(&rope, &described, &qkv_there, &mut q, &mut cache)?;
        let (q_norm, k_norm) = (Some(&q_norm[..]), Some(&k_norm[..]));
        let store =
            RopeStore { heads, kv: KvHeads::default(), layer: 1, spans: &spans, rope: &table, q_norm, k_norm, eps };
        self.cpu.rope_store(&store, &mut qkv, &arena);
        let expected: Vec<f32> = qkv.chunks(heads.qkv_width()).flat_map(|row| row[..heads.width()].to_vec()).collect();
        self.close(format!("rope_store, q, {name}"), &widened(&q.read(rows)?), &expected);
        let mut caches = (Vec::new(), Vec::new());
        for block in 0..blocks as u32 {
            caches.0.extend(halves(&cache.read_block(block)?));
            // SAFETY: this check is the arena's only user.
            caches.1.extend(halves(unsafe { std::slice::from_raw_parts(arena.block(block), layout.block_bytes()) }));
        }
        self.close(format!("rope_store, cache, {name}"), &widened(&caches.0), &widened(&caches.1));

        let scale = 1.0 / (heads.head_dim as f32).sqrt();
        let attention = GpuAttention { heads, layer: 1, scale, window };
        gpu.attention(&attention, &described, &q, &cache, &mut out)?;
        let found = out.read(rows)?;
        let mut expected = vec![0.0; rows * heads.width()];
        let attend = Attention { heads, kv: KvHeads::default(), layer: 1, spans: &spans, scale, window };
        self.cpu.attention(&attend, &qkv, &arena, &mut expected);
        self.close(format!("attention, window {window:?}, {name}"), &widened(&found), &expected);

        let single = single_rows(&spans);
        gpu.describe(&mut described, &tokens, &single, &heads, &cache)?;
        gpu.attention(&attention, &described, &q, &cache, &mut out)?;
        self.same(format!("attention, {name}: same bits decoded as prefilled"), out.read(rows)? == found);
        Ok(())
    }

    /// The same random bytes here and there, so that what is read too far would show.
    fn fill(&mut self, arena: &Arena, cache: &mut GpuArena) -> Result<(), GpuError> {
        let bytes = arena.layout().block_bytes();
        for block in 0..arena.blocks() as u32 {
            let values: Vec<u8> =
                self.values(bytes / 2, 1.0).into_iter().flat_map(|value| bf16::round(value).to_le_bytes()).collect();
            // SAFETY: this check is the arena's only user.
            unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), arena.block(block), bytes) };
            cache.write_block(block, &values)?;
        }
        Ok(())
    }

    fn blocks(&mut self) -> Result<(), GpuError> {
        let layout = BlockLayout { layers: 3, kv_heads: 2, head_dim: 16, block_tokens: 16, dtype: KvDtype::Bf16 };
        let arena = Arena::new(layout, 5);
        let mut cache = self.gpu.arena(layout, 5)?;
        self.fill(&arena, &mut cache)?;
        self.gpu.copy_blocks(&mut cache, &[(4, 0), (2, 3)])?;
        let copied = cache.read_block(0)? == cache.read_block(4)? && cache.read_block(3)? == cache.read_block(2)?;
        self.same("copy_blocks".to_string(), copied);
        let mut same = true;
        for slot in 0..Gpu::GATHERS {
            self.gpu.begin_gather(&mut cache, slot, slot + 1, &[4, 1])?;
        }
        for slot in 0..Gpu::GATHERS {
            self.gpu.end_gather(slot, &mut |bytes| {
                for (block, found) in [4, 1].iter().zip(bytes.chunks_exact(layout.layer_bytes())) {
                    let mut expected = vec![0; layout.layer_bytes()];
                    // SAFETY: this check is the arena's only user.
                    unsafe { arena.read_layer(*block, slot + 1, &mut expected) };
                    same &= found == expected;
                }
                same &= bytes.len() == 2 * layout.layer_bytes();
            })?;
        }
        self.same("gather_layer".to_string(), same);
        let host = std::sync::Arc::new(Arena::new(layout, 5));
        let Some(pinned) = self.gpu.pin(&host) else { return Ok(()) };
        // SAFETY: this check is the arena's only user.
        unsafe { self.gpu.begin_give(&mut cache, 0, 2, &[3, 1], &pinned)? };
        self.gpu.end_gather(0, &mut |_| {})?;
        let layer = |of: &Arena, block: u32, layer: usize| {
            let mut bytes = vec![0; layout.layer_bytes()];
            // SAFETY: as above.
            unsafe { of.read_layer(block, layer, &mut bytes) };
            bytes
        };
        // Block 3 was copied from block 2.
        let given = layer(&host, 3, 2) == layer(&arena, 2, 2) && layer(&host, 1, 2) == layer(&arena, 1, 2);
        let others = [(1, 0), (1, 1), (0, 2), (2, 2), (4, 2)];
        let left = others.iter().all(|(block, of)| layer(&host, *block, *of).iter().all(|byte| *byte == 0));
        self.same("give_layer".to_string(), given && left);
        Ok(())
    }

    /// Draws of every kind against plain sorting, exactly; log-probabilities within rounding.
    fn draws(&mut self, vocab: usize) -> Result<(), GpuError> {
        let rows = 3;
        let mut logits = self.values(rows * vocab, 8.0);
        // Ties, a likely token, and a row of equals.
        (0..vocab).step_by(3).for_each(|i| logits[i] = (logits[i] * 2.0).round() / 2.0);
        logits[vocab..2 * vocab].iter_mut().for_each(|logit| *logit = 1.5);
        logits[2 * vocab + vocab / 2] = 9.5;
        let there = self.gpu.floats_of(&logits)?;
        let samplings = samplings();
        let (seen, banned) = ([(1, 0), (4, 2), (vocab as u32 / 2, 1)], [0, 7, vocab as u32 + 5]);
        let mut draws = Vec::new();
        for (index, sampling) in samplings.iter().enumerate() {
            let penal = sampling.repetition_penalty != 1.0;
            let next = GpuNext {
                sampling,
                position: 5 + index as u32,
                choice: index as u32 % 2,
                seen: if penal { &seen } else { &[] },
                banned: if index % 3 == 2 { &banned } else { &[] },
            };
            let top = (index % 2 == 0).then_some(3);
            draws.push(GpuDraw { row: index % rows, kind: GpuDrawKind::Next(next), top });
        }
        draws.push(GpuDraw { row: 1, kind: GpuDrawKind::Given(9), top: Some(2) });
        draws.sort_by_key(|draw| draw.row);
        let mut scratch = self.gpu.draws()?;
        let found = self.gpu.draw(&mut scratch, &there, rows, vocab, &draws)?;
        let expected: Vec<SampledToken> =
            draws.iter().map(|draw| self.plainly(&logits[draw.row * vocab..][..vocab], draw)).collect();
        let ids = |tokens: &[SampledToken]| -> Vec<(TokenId, Vec<TokenId>)> {
            tokens.iter().map(|token| (token.id, token.top.iter().map(|one| one.0).collect())).collect()
        };
        self.same(format!("sample, vocabulary {vocab}"), ids(&found) == ids(&expected));
        let numbers = |tokens: &[SampledToken]| -> Vec<f32> {
            tokens.iter().flat_map(|token| token.top.iter().map(|one| one.1).chain([token.logprob])).collect()
        };
        self.close(format!("report, vocabulary {vocab}"), &numbers(&found), &numbers(&expected));
        self.same(format!("logits, vocabulary {vocab}: left as they were"), there.read(rows * vocab)? == logits);
        Ok(())
    }

    fn plainly(&self, logits: &[f32], draw: &GpuDraw) -> SampledToken {
        let id = match &draw.kind {
            GpuDrawKind::Given(id) => *id,
            GpuDrawKind::Next(next) => pick(&adjusted(logits, next), next),
        };
        let Some(top) = draw.top else { return SampledToken { id, ..SampledToken::default() } };
        let sum = self.cpu.log_sum_exp(logits);
        let top = sorted(logits).into_iter().take(top as usize).map(|(id, logit)| (id, logit - sum)).collect();
        SampledToken { id, logprob: logits[id as usize] - sum, top }
    }
}

/// One of each way to sample, and all at once.
fn samplings() -> Vec<Sampling> {
    let of = |seed: u64| Sampling { seed: seed * 0x1_0000_0007, ..Sampling::default() };
    vec![
        Sampling { temperature: 0.0, ..of(1) },
        of(2),
        Sampling { temperature: 0.3, ..of(3) },
        Sampling { top_k: 5, ..of(4) },
        Sampling { top_k: 1_000_000, top_p: 0.4, ..of(5) },
        Sampling { top_p: 0.9, ..of(6) },
        Sampling { min_p: 0.2, ..of(7) },
        Sampling { top_k: 40, top_p: 0.7, min_p: 0.05, temperature: 1.7, ..of(8) },
        Sampling { repetition_penalty: 1.3, presence_penalty: 0.4, frequency_penalty: 0.2, ..of(9) },
        Sampling { logit_bias: vec![(2, 30.0), (3, -4.0)], repetition_penalty: 0.8, temperature: 0.0, ..of(10) },
        Sampling { top_p: 0.0, ..of(11) },
        Sampling { temperature: 0.05, top_k: 3, min_p: 1.0, ..of(12) },
        of(13),
        of(14),
        of(15),
    ]
}

fn adjusted(logits: &[f32], next: &GpuNext) -> Vec<f32> {
    let sampling = next.sampling;
    let mut logits = logits.to_vec();
    let mut change = |id: TokenId, to: &dyn Fn(f32) -> f32| {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = to(*logit);
        }
    };
    sampling.logit_bias.iter().for_each(|(id, bias)| change(*id, &|logit| logit + bias));
    for (id, count) in next.seen {
        let presence = if *count > 0 { sampling.presence_penalty } else { 0.0 };
        let repeated = |logit: f32| match logit > 0.0 {
            true => logit / sampling.repetition_penalty,
            false => logit * sampling.repetition_penalty,
        };
        change(*id, &|logit| repeated(logit) - sampling.frequency_penalty * *count as f32 - presence);
    }
    next.banned.iter().for_each(|id| change(*id, &|_| f32::NEG_INFINITY));
    logits
}

/// Tokens by (logit descending, id ascending).
fn sorted(logits: &[f32]) -> Vec<(TokenId, f32)> {
    let mut all: Vec<(TokenId, f32)> = logits.iter().enumerate().map(|(id, logit)| (id as TokenId, *logit)).collect();
    all.sort_by(|a, b| (b.1 + 0.0).total_cmp(&(a.1 + 0.0)).then(a.0.cmp(&b.0)));
    all
}

/// The rules of the engine's sampling over sorted tokens, with weights as integers of 2^-38.
fn pick(logits: &[f32], next: &GpuNext) -> TokenId {
    let sampling = next.sampling;
    let all = sorted(logits);
    let max = all[0].1;
    if sampling.temperature <= 0.0 || max == f32::NEG_INFINITY {
        return all[0].0;
    }
    let weight = |logit: f32| exp((logit - max) / sampling.temperature);
    let units = |logit: f32| (weight(logit) * 274_877_906_944.0) as u64;
    let top_k = if sampling.top_k == 0 { all.len() } else { all.len().min(sampling.top_k as usize) };
    let mass: u64 = all[..top_k].iter().map(|entry| units(entry.1)).sum();
    let mut kept = 0;
    for (rank, (_, logit)) in all[..top_k].iter().enumerate() {
        let enough = sampling.top_p < 1.0 && kept as f64 >= f64::from(sampling.top_p) * mass as f64;
        if rank > 0 && (enough || weight(*logit) < sampling.min_p) {
            break;
        }
        kept += units(*logit);
    }
    let word = Philox::new(sampling.seed).at([next.position, next.choice, 0, 0])[0] >> 8;
    let target = ((u128::from(word) * u128::from(kept)) >> 24) as u64;
    let mut sum = 0;
    let beyond = |entry: &&(TokenId, f32)| {
        sum += units(entry.1);
        sum > target
    };
    all.iter().find(beyond).map_or(0, |entry| entry.0)
}

/// The engine's e^x for sampling, operation by operation.
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let bounded = if x >= -87.0 { x } else { -87.0 };
    let shifted = bounded * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = bounded - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let p = ((((1.987_569_1e-4 * r + 1.398_199_9e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2) * r + 0.166_666_66) * r
        + 0.5;
    let power = f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23);
    if x >= -87.0 { (p * r * r + r + 1.0) * power } else { 0.0 }
}

/// A batch of one row per token, as the embedding needs it.
fn one_token_rows(gpu: &Gpu, tokens: &[u32]) -> Result<(GpuSpans, GpuArena), GpuError> {
    let layout = BlockLayout { layers: 1, kv_heads: 1, head_dim: 16, block_tokens: 16, dtype: KvDtype::Bf16 };
    let arena = gpu.arena(layout, 1)?;
    let spans: Vec<Span> = (0..tokens.len()).map(|row| Span { row, rows: 1, position: 0, blocks: &[0] }).collect();
    let mut described = gpu.spans()?;
    gpu.describe(&mut described, tokens, &spans, &Heads { heads: 1, kv_heads: 1, head_dim: 16 }, &arena)?;
    Ok((described, arena))
}

/// The same rows, each a span of its own.
fn single_rows<'a>(spans: &[Span<'a>]) -> Vec<Span<'a>> {
    let rows = |span: &Span<'a>| {
        let span = *span;
        (0..span.rows).map(move |i| Span { row: span.row + i, rows: 1, position: span.position + i, ..span })
    };
    spans.iter().flat_map(rows).collect()
}

fn halves(bytes: &[u8]) -> Vec<u16> {
    bytes.as_chunks().0.iter().map(|pair| u16::from_le_bytes(*pair)).collect()
}

fn widened(halves: &[u16]) -> Vec<f32> {
    halves.iter().map(|half| bf16::widen(*half)).collect()
}

pub(super) fn equal_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// ‖found − expected‖ / ‖expected‖; infinite when anything is no number or the lengths differ.
fn distance(found: &[f32], expected: &[f32]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let difference = square(&mut found.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    let whole = square(&mut expected.iter().map(|value| f64::from(*value)));
    let error = (difference / whole.max(f64::MIN_POSITIVE)).sqrt();
    if error.is_finite() && found.len() == expected.len() { error } else { f64::INFINITY }
}
