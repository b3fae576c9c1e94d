//! The transformer on a GPU: the same path as `CpuModel`, with weights and cache in the GPU's memory. The host's arena stays
//! what links read and write where they cannot do so on the GPU: blocks that came to the host by a handoff are brought to the
//! GPU before they are used, and blocks that leave from the host are brought there, each layer while the next one computes. Links
//! between GPUs of one host read and write the GPU's memory itself; they are only told when a layer is done.

mod experts;
mod load;
mod steps;

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_core::arena::DeviceBlocks;
use baton_core::{Arena, BlockId, BlockLayout, SampledToken};
use baton_kernels::cuda::{
    Floats, Gpu, GpuArena, GpuAttention, GpuDraw, GpuDrawKind, GpuDraws, GpuError, GpuMatrix, GpuNext, GpuRope,
    GpuSpans, PinnedArena, Rows,
};
use baton_kernels::{RopeTable, Span};

use crate::backend::Backend;
use crate::batch::{Batch, Draw, DrawKind, Output};
use crate::load::config::ModelConfig;
use crate::sampling::Seen;

pub use load::{GpuOptions, LoadedGpu, load};

use experts::Experts;
use steps::Steps;

/// Rows of logits in memory at a time.
const LOGIT_ROWS: usize = 64;
/// One part in so many of the free memory is left to what a batch needs besides the cache.
const SPARE_PART: usize = 10;

/// A loaded model and the GPU it runs on.
pub struct GpuModel {
    gpu: Gpu,
    config: ModelConfig,
    weights: Weights,
    rotations: Floats,
    cache: Option<GpuArena>,
    mirror: Mirror,
    scratch: Scratch,
    steps: Steps,
}

pub(crate) struct Weights {
    pub(crate) embedding: Arc<GpuMatrix>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Floats,
    /// (vocab, hidden); the embedding itself when tied.
    pub(crate) head: Arc<GpuMatrix>,
}

/// Weights of one layer, as in `model::Layer`.
pub(crate) struct Layer {
    pub(crate) attention_norm: Floats,
    pub(crate) qkv: GpuMatrix,
    pub(crate) qkv_bias: Option<Floats>,
    pub(crate) q_norm: Option<Floats>,
    pub(crate) k_norm: Option<Floats>,
    pub(crate) out: GpuMatrix,
    pub(crate) out_bias: Option<Floats>,
    pub(crate) mlp_norm: Floats,
    pub(crate) mlp: Mlp,
    pub(crate) window: Option<usize>,
}

/// The second half of a layer.
pub(crate) enum Mlp {
    Dense(Dense),
    Experts(Experts),
}

/// An MLP that every row goes through.
pub(crate) struct Dense {
    pub(crate) gate_up: GpuMatrix,
    pub(crate) gate_up_bias: Option<Floats>,
    pub(crate) down: GpuMatrix,
    pub(crate) down_bias: Option<Floats>,
}

impl Layer {
    /// (bytes, weights) of the matrices that one row is multiplied with.
    fn size(&self) -> (usize, usize) {
        let matrices =
            |all: &[&GpuMatrix]| all.iter().map(|one| (one.bytes(), one.outputs() * one.inputs())).fold((0, 0), sum_of);
        let mlp = match &self.mlp {
            Mlp::Dense(dense) => matrices(&[&dense.gate_up, &dense.down]),
            Mlp::Experts(experts) => experts.size_per_row(),
        };
        sum_of(matrices(&[&self.qkv, &self.out]), mlp)
    }
}

fn sum_of(a: (usize, usize), b: (usize, usize)) -> (usize, usize) {
    (a.0 + b.0, a.1 + b.1)
}

/// Which of the host's blocks hold what the GPU's hold.
#[derive(Default)]
struct Mirror {
    host: Option<Arc<Arena>>,
    /// Made before the first blocks arrive or leave; None within is a host that the GPU cannot reach by itself.
    pinned: Option<Option<PinnedArena>>,
    /// Generation of each block that does.
    blocks: BTreeMap<u32, u32>,
}

impl Mirror {
    /// Forgets everything when the host's arena is another one.
    fn attach(&mut self, host: &Arc<Arena>) {
        if !self.host.as_ref().is_some_and(|old| Arc::ptr_eq(old, host)) {
            *self = Mirror { host: Some(host.clone()), ..Mirror::default() };
        }
    }

    /// The host's arena as the GPU reaches it.
    fn pinned(&mut self, gpu: &Gpu) -> Option<&PinnedArena> {
        let host = self.host.as_ref()?;
        self.pinned.get_or_insert_with(|| gpu.pin(host)).as_ref()
    }

    fn has(&self, block: &BlockId) -> bool {
        self.blocks.get(&block.index) == Some(&block.generation)
    }

    fn add(&mut self, blocks: &[BlockId]) {
        self.blocks.extend(blocks.iter().map(|block| (block.index, block.generation)));
    }
}

/// Buffers that grow to the largest batch seen and stay.
struct Scratch {
    spans: GpuSpans,
    /// The rows that are drawn from, after the last layer's keys and values are written.
    drawn: GpuSpans,
    /// (row, hidden): the residual stream.
    x: Floats,
    /// (row, hidden)
    normed: Rows,
    /// (row, q | k | v)
    qkv: Floats,
    /// (row, head, head_dim)
    q: Rows,
    attended: Rows,
    /// (row, hidden)
    delta: Floats,
    /// (row, gate | up)
    gate_up: Floats,
    /// (row, intermediate)
    gated: Rows,
    experts: Option<experts::Scratch>,
    /// (drawn row, vocab)
    logits: Floats,
    /// Rows kept of x and of qkv.
    kept_x: Floats,
    kept_qkv: Floats,
    draws: GpuDraws,
}

impl Scratch {
    fn new(gpu: &Gpu, config: &ModelConfig) -> Result<Scratch, GpuError> {
        let floats = || gpu.floats(1);
        Ok(Scratch {
            spans: gpu.spans()?,
            drawn: gpu.spans()?,
            x: floats()?,
            normed: gpu.rows(1, config.hidden)?,
            qkv: floats()?,
            q: gpu.rows(1, config.heads.width())?,
            attended: gpu.rows(1, config.heads.width())?,
            delta: floats()?,
            gate_up: floats()?,
            gated: gpu.rows(1, config.intermediate)?,
            experts: config.mixture.as_ref().map(|mixture| experts::Scratch::new(gpu, mixture)).transpose()?,
            logits: floats()?,
            kept_x: floats()?,
            kept_qkv: floats()?,
            draws: gpu.draws()?,
        })
    }

    /// Where everything lies that a step of all its rows touches, but its spans.
    fn places(&self) -> Vec<u64> {
        let Scratch { x, normed, qkv, q, attended, delta, gate_up, gated, experts, .. } = self;
        let floats = [x, qkv, delta, gate_up].map(Floats::place);
        let rows = [normed, q, attended, gated].map(Rows::place);
        let experts = experts.iter().flat_map(experts::Scratch::places);
        floats.into_iter().chain(rows).chain(experts).collect()
    }

    fn ensure(&mut self, rows: usize, drawn: usize, config: &ModelConfig) -> Result<(), GpuError> {
        let (hidden, wide, heads) = (config.hidden, config.intermediate, config.heads);
        self.x.ensure(rows * hidden)?;
        self.normed.ensure(rows)?;
        self.qkv.ensure(rows * heads.qkv_width())?;
        self.q.ensure(rows)?;
        self.attended.ensure(rows)?;
        self.delta.ensure(rows * hidden)?;
        if config.mixture.as_ref().is_none_or(|mixture| mixture.layers.contains(&false)) {
            self.gate_up.ensure(rows * 2 * wide)?;
            self.gated.ensure(rows)?;
        }
        if let Some(experts) = &mut self.experts {
            experts.ensure(rows, hidden)?;
        }
        self.kept_x.ensure(drawn * hidden)?;
        self.kept_qkv.ensure(drawn * heads.qkv_width())?;
        self.logits.ensure(drawn.min(LOGIT_ROWS) * config.vocab)
    }
}

impl GpuModel {
    pub(crate) fn new(gpu: Gpu, config: ModelConfig, weights: Weights) -> Result<GpuModel, GpuError> {
        assert!(weights.layers.len() == config.layers, "weights of another model");
        let rotations = gpu.rotations(&RopeTable::new(&config.inv_freq, config.positions_max))?;
        let scratch = Scratch::new(&gpu, &config)?;
        let (mirror, steps) = (Mirror::default(), Steps::default());
        Ok(GpuModel { gpu, config, weights, rotations, cache: None, mirror, scratch, steps })
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Bytes of the matrices of all layers that a step of one row reads; without experts, of any step.
    pub fn layer_bytes(&self) -> usize {
        self.weights.layers.iter().map(|layer| layer.size().0).sum()
    }

    /// Weights that a row meets in all layers: each a multiplication and an addition.
    pub fn layer_weights(&self) -> usize {
        self.weights.layers.iter().map(|layer| layer.size().1).sum()
    }

    /// Bytes of the output matrix: read once per step that draws.
    pub fn head_bytes(&self) -> usize {
        self.weights.head.bytes()
    }

    /// KV blocks that the free memory holds, with some of it left for batches.
    pub fn blocks_that_fit(&self, layout: &BlockLayout) -> Result<usize, GpuError> {
        let (free, _) = self.gpu.memory()?;
        Ok((free - free / SPARE_PART) / layout.block_bytes())
    }

    /// Makes the memory for `blocks` KV blocks, or says how much is missing.
    pub fn reserve(&mut self, layout: BlockLayout, blocks: usize) -> Result<(), GpuError> {
        let fits = self.cache.as_ref().is_some_and(|cache| cache.blocks() == blocks && *cache.layout() == layout);
        if !fits {
            self.cache = None;
            self.steps = Steps::default();
            self.cache = Some(self.gpu.arena(layout, blocks)?);
            self.mirror = Mirror::default();
        }
        Ok(())
    }

    fn compute(&mut self, batch: &Batch, layers: &mut dyn FnMut(usize)) -> Result<Vec<SampledToken>, GpuError> {
        self.reserve(*batch.arena().layout(), batch.arena().blocks())?;
        self.mirror.attach(batch.arena());
        self.take_in(batch)?;
        let drawn = self.forward(batch, layers)?;
        let tokens = self.draw(&batch.draws, &drawn)?;
        if tokens.is_empty() {
            // Nothing was waited for. Blocks of this batch may be given to a link next, whose copies do not wait for what the
            // batch still computes.
            self.gpu.finish()?;
        }
        Ok(tokens)
    }

    /// Brings blocks that came by a handoff to the GPU, then copies those that sequences share.
    fn take_in(&mut self, batch: &Batch) -> Result<(), GpuError> {
        let GpuModel { gpu, mirror, cache: Some(cache), .. } = self else { return Ok(()) };
        let (arena, arrived) = (batch.arena(), batch.arrived());
        // Others have come to the GPU's memory by themselves.
        let here: Vec<BlockId> = arrived.ids().iter().copied().filter(|block| !arena.is_on_device(*block)).collect();
        if !here.is_empty() {
            let pinned = mirror.pinned(gpu);
            let blocks: Vec<u32> = here.iter().map(|block| block.index).collect();
            // SAFETY: held filled by the guard `arrived`.
            unsafe { gpu.bring_blocks(arena, pinned, &blocks, cache)? };
        }
        mirror.add(&here);
        gpu.copy_blocks(cache, &batch.copies().collect::<Vec<_>>())
    }

    /// As `CpuModel::forward`: leaves the final norm of the rows that are drawn from in `scratch.normed`.
    fn forward(&mut self, batch: &Batch, layers: &mut dyn FnMut(usize)) -> Result<Vec<usize>, GpuError> {
        let GpuModel { gpu, config, weights, rotations, cache: Some(cache), mirror, scratch, steps } = self else {
            return Ok(Vec::new());
        };
        let (heads, eps) = (config.heads, config.eps);
        let drawn = drawn_rows(&batch.draws);
        let spans: Vec<Span> = batch.spans.iter().map(|span| kernel_span(batch, span)).collect();
        let mut rows = batch.tokens.len();
        scratch.ensure(rows, drawn.len(), config)?;
        gpu.describe(&mut scratch.spans, &batch.tokens, &spans, &heads, cache)?;
        let mut leaving = Leaving::of(batch, mirror);
        let repeats = drawn.len() == rows && rows <= steps::ROWS_MAX && !leaving.is_any();
        if let Some(shape) = scratch.spans.shape().filter(|_| repeats) {
            let shape = shape.into_iter().chain(scratch.places()).collect();
            // SAFETY: the shape has the rows and the places of all that a step touches but the weights, and the cache, with which
            // what is recorded is given up.
            unsafe {
                steps.run(gpu, shape, || {
                    begin(gpu, weights, rows, eps, scratch)?;
                    for (index, layer) in weights.layers.iter().enumerate() {
                        let rope = rope_of(config, layer, index, rotations);
                        project(gpu, layer, &rope, rows, scratch, cache)?;
                        attend(gpu, config, weights, index, rows, scratch, cache)?;
                    }
                    Ok(())
                })?;
            }
            (0..weights.layers.len()).for_each(layers);
            return Ok(drawn);
        }

        begin(gpu, weights, rows, eps, scratch)?;
        for (index, layer) in weights.layers.iter().enumerate() {
            let rope = rope_of(config, layer, index, rotations);
            project(gpu, layer, &rope, rows, scratch, cache)?;
            leaving.begin(gpu, cache, mirror, batch, index, layers)?;
            if index + 1 == weights.layers.len() && drawn.len() < rows {
                keep(gpu, config, &drawn, &spans, &rope, cache, scratch)?;
                rows = drawn.len();
                std::mem::swap(&mut scratch.spans, &mut scratch.drawn);
            }
            if rows == 0 {
                break;
            }
            attend(gpu, config, weights, index, rows, scratch, cache)?;
        }
        leaving.end(gpu, batch, layers)?;
        mirror.add(&leaving.blocks);
        Ok(drawn)
    }

    /// Reads the draws off the logits of their rows, some rows at a time.
    fn draw(&mut self, draws: &[Draw], drawn: &[usize]) -> Result<Vec<SampledToken>, GpuError> {
        let GpuModel { gpu, config, weights, scratch, .. } = self;
        let mut tokens = Vec::with_capacity(draws.len());
        let mut rest = draws;
        for (chunk, rows) in drawn.chunks(LOGIT_ROWS).enumerate() {
            let first = chunk * LOGIT_ROWS;
            gpu.matmul(&scratch.normed, first..first + rows.len(), &weights.head, None, &mut scratch.logits)?;
            let count = rest.iter().take_while(|draw| rows.contains(&draw.row)).count();
            let (these, others) = rest.split_at(count);
            let asked: Vec<GpuDraw> = these.iter().map(|draw| gpu_draw(draw, rows)).collect();
            tokens.extend(gpu.draw(&mut scratch.draws, &scratch.logits, rows.len(), config.vocab, &asked)?);
            rest = others;
        }
        Ok(tokens)
    }
}

impl Backend for GpuModel {
    fn prepare(&mut self, arena: &Arc<Arena>) {
        // What fails here fails in the first step too, which says so.
        let _ = self.reserve(*arena.layout(), arena.blocks());
        self.mirror.attach(arena);
        self.mirror.pinned(&self.gpu);
    }

    fn fills_arena(&self) -> bool {
        false
    }

    fn device(&self) -> Option<Arc<dyn DeviceBlocks>> {
        self.cache.as_ref().map(|cache| cache.shared(&self.gpu))
    }

    /// # Panics
    /// If the GPU fails, which ends the worker: what its memory holds is lost then.
    fn run(&mut self, batch: &Batch, layers: &mut dyn FnMut(usize)) -> Output {
        if batch.is_empty() {
            return Output::default();
        }
        match self.compute(batch, layers) {
            Ok(drawn) => Output { drawn },
            Err(error) => panic!("{} cannot go on: {error}", self.gpu.name()),
        }
    }
}

/// Blocks on their way to the host, one layer behind the one that computes.
struct Leaving {
    /// Those that the host does not have yet and that leave from there.
    blocks: Vec<BlockId>,
    /// Others are read where they are, once a layer of them is done.
    stay: bool,
    /// The layer whose blocks are on their way.
    layer: Option<usize>,
}

impl Leaving {
    fn of(batch: &Batch, mirror: &Mirror) -> Leaving {
        let leaving = batch.exports().iter().filter(|export| !export.on_device);
        let all = leaving.flat_map(|export| &export.blocks).map(|(_, block)| *block);
        let mut blocks: Vec<BlockId> = all.filter(|block| !mirror.has(block)).collect();
        blocks.sort_unstable_by_key(|block| block.index);
        blocks.dedup();
        let stay = batch.exports().iter().any(|export| export.on_device);
        Leaving { blocks, stay, layer: None }
    }

    /// Whether anything leaves, be it from where it is.
    fn is_any(&self) -> bool {
        !self.blocks.is_empty() || self.stay
    }

    /// Sends a computed layer on its way and reports the one before it.
    fn begin(
        &mut self,
        gpu: &Gpu,
        cache: &mut GpuArena,
        mirror: &mut Mirror,
        batch: &Batch,
        layer: usize,
        layers: &mut dyn FnMut(usize),
    ) -> Result<(), GpuError> {
        if !self.is_any() {
            layers(layer);
            return Ok(());
        }
        let indices: Vec<u32> = self.blocks.iter().map(|block| block.index).collect();
        let slot = layer % Gpu::GATHERS;
        match mirror.pinned(gpu) {
            _ if self.blocks.is_empty() => gpu.begin_mark(slot)?,
            // SAFETY: the export's guard keeps the blocks, and nobody reads this layer of them before it is reported.
            Some(host) => unsafe { gpu.begin_give(cache, slot, layer, &indices, host)? },
            None => gpu.begin_gather(cache, slot, layer, &indices)?,
        }
        self.end(gpu, batch, layers)?;
        self.layer = Some(layer);
        Ok(())
    }

    /// Waits until the layer that is on its way is in the host's arena, or is done if nothing of it goes there, and reports it.
    fn end(&mut self, gpu: &Gpu, batch: &Batch, layers: &mut dyn FnMut(usize)) -> Result<(), GpuError> {
        let Some(layer) = self.layer.take() else { return Ok(()) };
        let arena = batch.arena();
        gpu.end_gather(layer % Gpu::GATHERS, &mut |bytes| {
            for (block, bytes) in self.blocks.iter().zip(bytes.chunks_exact(arena.layout().layer_bytes())) {
                // SAFETY: the export's guard keeps the block, and nobody reads this layer of it before it is reported.
                unsafe { arena.write_layer(block.index, layer, bytes) };
            }
        })?;
        layers(layer);
        Ok(())
    }
}

/// Reduces the batch to the rows that are drawn from, once all keys and values of its last layer are written.
fn keep(
    gpu: &Gpu,
    config: &ModelConfig,
    drawn: &[usize],
    spans: &[Span],
    rope: &GpuRope,
    cache: &mut GpuArena,
    scratch: &mut Scratch,
) -> Result<(), GpuError> {
    let (heads, hidden) = (config.heads, config.hidden);
    let rows: Vec<u32> = drawn.iter().map(|row| *row as u32).collect();
    gpu.describe(&mut scratch.drawn, &rows, &keep_spans(spans, drawn), &heads, cache)?;
    gpu.keep_rows(&scratch.x, &scratch.drawn, hidden, &mut scratch.kept_x)?;
    gpu.keep_rows(&scratch.qkv, &scratch.drawn, heads.qkv_width(), &mut scratch.kept_qkv)?;
    std::mem::swap(&mut scratch.x, &mut scratch.kept_x);
    std::mem::swap(&mut scratch.qkv, &mut scratch.kept_qkv);
    // Writes the kept rows' keys and values once more, with the same bits, for the sake of their queries.
    gpu.rope_store(rope, &scratch.drawn, &scratch.qkv, &mut scratch.q, cache)
}

fn rope_of<'a>(config: &ModelConfig, layer: &'a Layer, index: usize, rotations: &'a Floats) -> GpuRope<'a> {
    let (q_norm, k_norm) = (layer.q_norm.as_ref(), layer.k_norm.as_ref());
    GpuRope { heads: config.heads, layer: index, eps: config.eps, rotations, q_norm, k_norm }
}

/// The rows that the first layer begins with.
fn begin(gpu: &Gpu, weights: &Weights, rows: usize, eps: f32, scratch: &mut Scratch) -> Result<(), GpuError> {
    gpu.embed(&weights.embedding, &scratch.spans, &mut scratch.x)?;
    gpu.add_rms_norm(&mut scratch.x, None, &weights.layers[0].attention_norm, rows, eps, &mut scratch.normed)
}

/// A layer's queries, and its keys and values into the cache.
fn project(
    gpu: &Gpu,
    layer: &Layer,
    rope: &GpuRope,
    rows: usize,
    scratch: &mut Scratch,
    cache: &mut GpuArena,
) -> Result<(), GpuError> {
    gpu.matmul(&scratch.normed, 0..rows, &layer.qkv, layer.qkv_bias.as_ref(), &mut scratch.qkv)?;
    gpu.rope_store(rope, &scratch.spans, &scratch.qkv, &mut scratch.q, cache)
}

/// Attention, and the second half of the layer.
fn attend(
    gpu: &Gpu,
    config: &ModelConfig,
    weights: &Weights,
    index: usize,
    rows: usize,
    scratch: &mut Scratch,
    cache: &GpuArena,
) -> Result<(), GpuError> {
    let (layer, heads) = (&weights.layers[index], config.heads);
    let scale = 1.0 / (heads.head_dim as f32).sqrt();
    let attention = GpuAttention { heads, layer: index, scale, window: layer.window };
    gpu.attention(&attention, &scratch.spans, &scratch.q, cache, &mut scratch.attended)?;
    let next = weights.layers.get(index + 1).map_or(&weights.norm, |next| &next.attention_norm);
    mix(gpu, layer, next, rows, config.eps, scratch)
}

/// The second half of a layer, as `model::mix`.
fn mix(gpu: &Gpu, layer: &Layer, next: &Floats, rows: usize, eps: f32, scratch: &mut Scratch) -> Result<(), GpuError> {
    let Scratch { x, normed, attended, delta, gate_up, gated, experts, .. } = scratch;
    gpu.matmul_segmented(attended, 0..rows, &layer.out, layer.out_bias.as_ref(), delta)?;
    gpu.add_rms_norm(x, Some(delta), &layer.mlp_norm, rows, eps, normed)?;
    match (&layer.mlp, experts) {
        (Mlp::Experts(mixture), Some(scratch)) => mixture.run(gpu, normed, rows, delta, scratch)?,
        (Mlp::Experts(_), None) => unreachable!("a mixture that the configuration does not have"),
        (Mlp::Dense(dense), _) => {
            gpu.matmul(normed, 0..rows, &dense.gate_up, dense.gate_up_bias.as_ref(), gate_up)?;
            gpu.silu_mul(gate_up, rows, gated)?;
            gpu.matmul_segmented(gated, 0..rows, &dense.down, dense.down_bias.as_ref(), delta)?;
        }
    }
    gpu.add_rms_norm(x, Some(delta), next, rows, eps, normed)
}

/// The different rows of draws that are sorted by row.
fn drawn_rows(draws: &[Draw]) -> Vec<usize> {
    let mut rows: Vec<usize> = draws.iter().map(|draw| draw.row).collect();
    rows.dedup();
    rows
}

/// Spans of the rows that are kept, once they lie one behind the other.
fn keep_spans<'a>(spans: &[Span<'a>], kept: &[usize]) -> Vec<Span<'a>> {
    let mut left = kept.iter().enumerate().peekable();
    let mut found = Vec::with_capacity(kept.len());
    for span in spans {
        while let Some((row, from)) = left.next_if(|(_, from)| **from < span.row + span.rows) {
            found.push(Span { row, rows: 1, position: span.position + from - span.row, blocks: span.blocks });
        }
    }
    found
}

fn kernel_span<'a>(batch: &'a Batch, span: &crate::batch::Span) -> Span<'a> {
    Span { row: span.row, rows: span.rows, position: span.position, blocks: batch.table(span) }
}

fn gpu_draw<'a>(draw: &'a Draw, rows: &[usize]) -> GpuDraw<'a> {
    let row = rows.iter().position(|row| *row == draw.row).unwrap_or(0);
    match &draw.kind {
        DrawKind::Given { token, top } => GpuDraw { row, kind: GpuDrawKind::Given(*token), top: Some(*top) },
        DrawKind::Next(next) => {
            let seen = next.seen.as_deref().map_or(&[][..], Seen::counts);
            let sampling = &next.request.sampling;
            let (position, choice, banned) = (next.position, next.choice, &next.banned[..]);
            let kind = GpuDrawKind::Next(GpuNext { sampling, position, choice, seen, banned });
            GpuDraw { row, kind, top: next.request.logprobs }
        }
    }
}
