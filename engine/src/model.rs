//! The transformer on a CPU: one code path for Llama, Qwen2, Qwen3 and Mistral, and their mixtures of experts, alone or as a
//! rank of a tensor-parallel group. The bits of a row depend on the row, the weights and its sequence's KV alone, because those of every kernel do,
//! nothing here mixes rows, and what ranks add up is added in one order.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use baton_core::{SampledToken, TokenId};
use baton_kernels::{self as kernels, Attention, Broken, Collective, Cpu, Packed, RopeStore, RopeTable, Span};

use crate::backend::Backend;
use crate::batch::{Batch, Draw, Output};
use crate::experts::{self, Experts, Place};
use crate::load::config::ModelConfig;
use crate::ranks::process::{RankProcess, Watch};
use crate::ranks::{Compute, Ranks, Rows, Step};
use crate::sampling;
use crate::shard::Shard;

/// Rows of logits in memory at a time.
const LOGIT_ROWS: usize = 32;

/// A loaded model, or a rank's part of one, and the device it runs on.
pub struct CpuModel {
    /// Dropped before `others`: that ends their waiting.
    rank: Rank,
    others: Ranks,
    weights: Weights,
    rope: RopeTable,
    scratch: Scratch,
    /// Those of the others that are processes.
    pids: Vec<u32>,
    watch: Option<Arc<Watch>>,
}

/// What computes, and its place in the group.
struct Rank {
    cpu: Cpu,
    config: ModelConfig,
    shard: Shard,
    collective: Collective,
}

/// All weights of a rank; matrices packed, norms and biases as f32.
pub struct Weights {
    /// Rows of the rank's tokens.
    pub embedding: Arc<Packed>,
    pub layers: Vec<Layer>,
    pub norm: Vec<f32>,
    /// (the rank's tokens, hidden); the embedding itself when tied.
    pub head: Arc<Packed>,
}

/// Weights of one layer.
pub struct Layer {
    pub attention_norm: Vec<f32>,
    /// Rows of q, then k, then v.
    pub qkv: Packed,
    pub qkv_bias: Option<Vec<f32>>,
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    pub out: Packed,
    pub out_bias: Option<Vec<f32>>,
    pub mlp_norm: Vec<f32>,
    pub mlp: Mlp,
    pub window: Option<usize>,
}

/// The second half of a layer.
pub enum Mlp {
    Dense(Dense),
    Experts(Experts),
}

/// An MLP that every row goes through.
pub struct Dense {
    /// Rows of gate, then up.
    pub gate_up: Packed,
    pub gate_up_bias: Option<Vec<f32>>,
    pub down: Packed,
    pub down_bias: Option<Vec<f32>>,
}

impl Layer {
    /// Bytes of the matrices, of experts as told.
    fn bytes(&self, experts: fn(&Experts) -> usize) -> usize {
        self.qkv.bytes()
            + self.out.bytes()
            + match &self.mlp {
                Mlp::Dense(dense) => dense.gate_up.bytes() + dense.down.bytes(),
                Mlp::Experts(mixture) => experts(mixture),
            }
    }

    /// Weights that one row is multiplied with.
    fn weights(&self) -> usize {
        let size = |matrix: &Packed| matrix.rows() * matrix.cols();
        size(&self.qkv)
            + size(&self.out)
            + match &self.mlp {
                Mlp::Dense(dense) => size(&dense.gate_up) + size(&dense.down),
                Mlp::Experts(mixture) => mixture.weights_per_row(),
            }
    }
}

/// Buffers that grow to the largest batch seen and stay.
#[derive(Default)]
struct Scratch {
    /// (row, hidden): the residual stream.
    x: Vec<f32>,
    /// (row, hidden)
    normed: Vec<f32>,
    /// (row, q | k | v)
    qkv: Vec<f32>,
    /// (row, head, head_dim)
    attended: Vec<f32>,
    /// (row, hidden)
    delta: Vec<f32>,
    /// (drawn row, vocab)
    logits: Vec<f32>,
    /// (drawn row, the rank's tokens)
    part: Vec<f32>,
    experts: experts::Scratch,
}

impl CpuModel {
    /// # Panics
    /// If the weights do not have the configuration's number of layers.
    pub fn new(cpu: Cpu, config: ModelConfig, weights: Weights) -> CpuModel {
        let shard = Shard::whole(&config);
        CpuModel::rank(cpu, config, weights, shard, Collective::alone())
    }

    /// One rank of a group, with the weights that its shard says.
    ///
    /// # Panics
    /// As `new`, or if the collective is another rank's.
    pub fn rank(cpu: Cpu, config: ModelConfig, weights: Weights, shard: Shard, collective: Collective) -> CpuModel {
        assert!(weights.layers.len() == config.layers, "weights of another model");
        assert!((collective.rank(), collective.world()) == (shard.rank, shard.world), "the collective of another rank");
        let rope = RopeTable::new(&config.inv_freq, config.positions_max);
        let rank = Rank { cpu, config, shard, collective };
        let (others, scratch) = (Ranks::default(), Scratch::default());
        CpuModel { rank, others, weights, rope, scratch, pids: Vec::new(), watch: None }
    }

    /// Makes one model of rank 0 and the others, which compute on threads of their own from now on.
    ///
    /// # Errors
    /// When the system starts no more threads.
    pub fn group(mut first: CpuModel, others: Vec<Compute>) -> io::Result<CpuModel> {
        assert!(first.rank.shard.rank == 0 && first.rank.shard.world == others.len() + 1, "all ranks in order");
        first.others = Ranks::start(others)?;
        Ok(first)
    }

    /// Makes one model of rank 0 and the others, which are processes of their own. `watch` is told when one of them ends.
    pub(crate) fn apart(first: CpuModel, others: Vec<RankProcess>, watch: Arc<Watch>) -> io::Result<CpuModel> {
        let pids = others.iter().map(RankProcess::pid).collect();
        let model = CpuModel::group(first, others.into_iter().map(RankProcess::compute).collect())?;
        Ok(CpuModel { pids, watch: Some(watch), ..model })
    }

    /// Something that ends the group from elsewhere.
    pub(crate) fn aborter(&self) -> impl Fn() + Send + Sync + 'static {
        self.rank.collective.aborter()
    }

    /// Processes of the ranks 1, 2, ...; empty when they are threads of this one.
    pub fn pids(&self) -> &[u32] {
        &self.pids
    }

    /// What this rank does with each step, for `group`.
    pub fn compute(mut self) -> Compute {
        Box::new(move |step| self.follow(step))
    }

    pub fn config(&self) -> &ModelConfig {
        &self.rank.config
    }

    /// The device of rank 0.
    pub fn cpu(&self) -> &Cpu {
        &self.rank.cpu
    }

    /// Threads of all ranks.
    pub fn threads(&self) -> usize {
        self.rank.cpu.threads() * self.ranks()
    }

    /// Ranks of the group; 1 for a model that is whole.
    pub fn ranks(&self) -> usize {
        self.rank.shard.world
    }

    /// Bytes of the packed matrices of all layers, of all ranks, that a step of one row reads; without experts, of any step.
    pub fn layer_bytes(&self) -> usize {
        self.weights.layers.iter().map(|layer| layer.bytes(Experts::bytes_per_row)).sum::<usize>() * self.ranks()
    }

    /// Weights of the packed matrices of all layers, of all ranks, that each row is multiplied with.
    pub fn layer_weights(&self) -> usize {
        self.weights.layers.iter().map(Layer::weights).sum::<usize>() * self.ranks()
    }

    /// Whether the layers' products are of bytes.
    pub fn is_quantized(&self) -> bool {
        self.weights.layers.iter().any(|layer| layer.qkv.is_quantized())
    }

    /// Bytes of the output matrix: read once per step that draws.
    pub fn head_bytes(&self) -> usize {
        self.weights.head.bytes() * self.ranks()
    }

    /// Bytes of all packed matrices.
    pub fn weight_bytes(&self) -> usize {
        let Weights { embedding, head, .. } = &self.weights;
        let embedding = if Arc::ptr_eq(embedding, head) { 0 } else { embedding.bytes() };
        let layers = self.weights.layers.iter().map(|layer| layer.bytes(Experts::bytes)).sum::<usize>();
        layers * self.ranks() + self.head_bytes() + embedding * self.ranks()
    }

    /// Everything up to the final norm, whose rows are left in `scratch.normed`: one per row that is drawn from, which
    /// are returned. The others are done when their last keys and values are written.
    fn forward(&mut self, rows: Rows, layers: &mut dyn FnMut(usize)) -> Result<Vec<usize>, Broken> {
        let CpuModel { rank, weights, rope, scratch, .. } = self;
        let Rows { arena, tokens, mut spans, drawn } = rows;
        let (heads, kv, world) = (rank.shard.heads, rank.shard.kv, rank.shard.world);
        let (eps, hidden) = (rank.config.eps, rank.config.hidden);
        let scale = 1.0 / (heads.head_dim as f32).sqrt();
        let mut rows = tokens.len();

        rank.embed(&weights.embedding, tokens, scratch)?;
        let (x, normed) = (sized(&mut scratch.x, rows * hidden), sized(&mut scratch.normed, rows * hidden));
        rank.cpu.rms_norm(x, &weights.layers[0].attention_norm, eps, normed);
        for (index, layer) in weights.layers.iter().enumerate() {
            let normed = sized(&mut scratch.normed, rows * hidden);
            let qkv = sized(&mut scratch.qkv, rows * heads.qkv_width());
            matmul(&rank.cpu, normed, rows, &layer.qkv, &layer.qkv_bias, qkv);
            let (q_norm, k_norm) = (layer.q_norm.as_deref(), layer.k_norm.as_deref());
            let store = RopeStore { heads, kv, layer: index, spans: &spans, rope, q_norm, k_norm, eps };
            rank.cpu.rope_store(&store, qkv, arena);
            if index + 1 == weights.layers.len() && drawn.len() < rows {
                spans = keep_spans(&spans, &drawn);
                keep_rows(&mut scratch.qkv, &drawn, heads.qkv_width());
                keep_rows(&mut scratch.x, &drawn, hidden);
                rows = drawn.len();
            }
            // A layer is complete when every rank has written its heads: when all have met, here or in the sum below.
            let meet_now = world == 1 || rows == 0 || rank.config.heads.kv_heads < world;
            if meet_now {
                rank.collective.barrier()?;
                layers(index);
            }
            if rows == 0 {
                break;
            }
            let attention = Attention { heads, kv, layer: index, spans: &spans, scale, window: layer.window };
            let qkv = sized(&mut scratch.qkv, rows * heads.qkv_width());
            let attended = sized(&mut scratch.attended, rows * heads.width());
            rank.cpu.attention(&attention, qkv, arena, attended);
            let delta = sized(&mut scratch.delta, rows * hidden);
            rank.sum(attended, rows, &layer.out, &layer.out_bias, rank.config.heads.width(), delta)?;
            if !meet_now {
                layers(index);
            }
            let next = weights.layers.get(index + 1).map_or(&weights.norm, |next| &next.attention_norm);
            mix(rank, layer, next, rows, scratch)?;
        }
        Ok(drawn)
    }

    /// Reads the draws off the logits of their rows, a few rows at a time, which the threads share. `drawn` are the rows that
    /// are left.
    fn draw(&mut self, draws: &[Draw], drawn: &[usize]) -> Result<Vec<SampledToken>, Broken> {
        let mut tokens = Vec::with_capacity(draws.len());
        let mut of_rows = draws.chunk_by(|a, b| a.row == b.row);
        for chunk in chunks(drawn.len()) {
            self.logits(chunk.clone())?;
            let CpuModel { rank: Rank { cpu, config, .. }, scratch, .. } = self;
            let rows = scratch.logits.chunks_exact_mut(config.vocab).zip(of_rows.by_ref());
            let mut rows: Vec<_> = rows.take(chunk.len()).map(|(logits, draws)| (logits, draws, Vec::new())).collect();
            cpu.spread(&mut rows, |(logits, draws, found)| {
                found.extend(draws.iter().map(|draw| sampling::draw(cpu, logits, draw)));
            });
            tokens.extend(rows.into_iter().flat_map(|(_, _, found)| found));
        }
        Ok(tokens)
    }

    /// Logits of some of the rows that are left, on rank 0.
    fn logits(&mut self, rows: Range<usize>) -> Result<(), Broken> {
        let CpuModel { rank, weights, scratch, .. } = self;
        let (hidden, vocab, shard) = (rank.config.hidden, rank.config.vocab, &rank.shard);
        let normed = &scratch.normed[rows.start * hidden..rows.end * hidden];
        if shard.world == 1 {
            rank.cpu.matmul(normed, rows.len(), &weights.head, sized(&mut scratch.logits, rows.len() * vocab));
            return Ok(());
        }
        let part = sized(&mut scratch.part, rows.len() * shard.tokens().len());
        rank.cpu.matmul(normed, rows.len(), &weights.head, part);
        let len = |of: usize| rows.len() * shard.tokens_of(of).len();
        let longest = (0..shard.world).map(len).max().unwrap_or(0);
        if shard.rank > 0 {
            return rank.collective.all_gather(part, longest, len, |_, _, _| {});
        }
        let logits = sized(&mut scratch.logits, rows.len() * vocab);
        rank.collective.all_gather(part, longest, len, |from, offset, values| {
            let tokens = shard.tokens_of(from);
            lay_out(values, offset, tokens.len(), |row, col| row * vocab + tokens.start + col, logits);
        })
    }

    /// A step of a rank other than 0.
    fn follow(&mut self, step: &Step) -> Result<(), Broken> {
        let drawn = self.forward(step.rows(), &mut |_| {})?;
        chunks(drawn.len()).try_for_each(|rows| self.logits(rows))
    }

    fn step(&mut self, batch: &Batch, layers: &mut dyn FnMut(usize)) -> Result<Output, Broken> {
        if !self.others.is_empty() {
            self.others.compute(&Arc::new(Step::of(batch)));
        }
        let drawn = self.forward(Rows::of(batch), layers)?;
        Ok(Output { drawn: self.draw(&batch.draws, &drawn)? })
    }
}

impl Rank {
    /// The tokens' embeddings into the residual stream, each from the rank that has it.
    fn embed(&mut self, embedding: &Packed, tokens: &[TokenId], scratch: &mut Scratch) -> Result<(), Broken> {
        let Rank { cpu, config: ModelConfig { hidden, .. }, shard, collective } = self;
        let x = sized(&mut scratch.x, tokens.len() * *hidden);
        if shard.world == 1 {
            cpu.embed(embedding, tokens, x);
            return Ok(());
        }
        let mut owned = vec![Vec::new(); shard.world];
        tokens.iter().enumerate().for_each(|(row, token)| owned[shard.owner(*token)].push(row));
        let first = shard.tokens().start as TokenId;
        let ids: Vec<TokenId> = owned[shard.rank].iter().map(|row| tokens[*row] - first).collect();
        let own = sized(&mut scratch.delta, ids.len() * *hidden);
        cpu.embed(embedding, &ids, own);
        let len = |of: usize| owned[of].len() * *hidden;
        let longest = (0..shard.world).map(len).max().unwrap_or(0);
        collective.all_gather(own, longest, len, |from, offset, values| {
            lay_out(values, offset, *hidden, |at, col| owned[from][at] * *hidden + col, x);
        })
    }

    /// y = x · Wᵀ over all ranks' columns, `cols` in all, and the bias: x and w hold this rank's. K in its segments.
    fn sum(
        &mut self,
        x: &[f32],
        rows: usize,
        w: &Packed,
        bias: &Option<Vec<f32>>,
        cols: usize,
        y: &mut [f32],
    ) -> Result<(), Broken> {
        self.cpu.matmul_segments(x, rows, w, self.shard.segments(cols), y);
        self.add_up(bias, y)
    }

    /// All ranks' y into one, and the bias.
    fn add_up(&mut self, bias: &Option<Vec<f32>>, y: &mut [f32]) -> Result<(), Broken> {
        self.collective.all_reduce(y)?;
        if let Some(bias) = bias {
            self.cpu.add_bias(y, bias);
        }
        Ok(())
    }
}

/// The second half of a layer: attention's output, in `delta`, and the MLP into the residual stream, then the norm before
/// what comes next.
fn mix(rank: &mut Rank, layer: &Layer, next: &[f32], rows: usize, scratch: &mut Scratch) -> Result<(), Broken> {
    let (hidden, eps) = (rank.config.hidden, rank.config.eps);
    let (x, normed) = (sized(&mut scratch.x, rows * hidden), sized(&mut scratch.normed, rows * hidden));
    let delta = sized(&mut scratch.delta, rows * hidden);
    rank.cpu.add_rms_norm(x, delta, &layer.mlp_norm, eps, normed);
    match &layer.mlp {
        Mlp::Dense(dense) => {
            let segments = rank.shard.segments(rank.config.intermediate);
            let bias = dense.gate_up_bias.as_deref();
            let mlp = kernels::Mlp { x: normed, rows, gate_up: &dense.gate_up, bias, down: &dense.down, segments };
            rank.cpu.mlp(&mlp, delta);
            rank.add_up(&dense.down_bias, delta)?;
        }
        Mlp::Experts(experts) => {
            let Rank { cpu, collective, shard, .. } = rank;
            let place = Place { cpu, collective, segments: shard.segments(experts.inner) };
            experts.run(place, normed, delta, &mut scratch.experts)?;
        }
    }
    rank.cpu.add_rms_norm(x, delta, next, eps, normed);
    Ok(())
}

impl Backend for CpuModel {
    fn shares_arena(&self) -> bool {
        !self.pids.is_empty()
    }

    fn on_broken(&mut self, tell: Box<dyn Fn() + Send>) {
        if let Some(watch) = &self.watch {
            watch.tell(tell);
        }
    }

    /// # Panics
    /// If another rank of the group has ended or does not come: what the group has is lost then, and its worker with it.
    fn run(&mut self, batch: &Batch, layers: &mut dyn FnMut(usize)) -> Output {
        if batch.is_empty() {
            return Output::default();
        }
        batch.copy_shared_blocks();
        self.step(batch, layers).unwrap_or_else(|broken| panic!("the tensor-parallel group ends: {broken}"))
    }
}

/// Rows whose logits are in memory together.
fn chunks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(LOGIT_ROWS).map(move |row| row..(row + LOGIT_ROWS).min(rows))
}

/// Copies a run of a rank's rows of `width`, which begins `offset` values into them, to where (row, column) goes.
fn lay_out(mut values: &[f32], mut offset: usize, width: usize, place: impl Fn(usize, usize) -> usize, to: &mut [f32]) {
    while !values.is_empty() {
        let (row, col) = (offset / width, offset % width);
        let (run, rest) = values.split_at(values.len().min(width - col));
        to[place(row, col)..][..run.len()].copy_from_slice(run);
        (values, offset) = (rest, offset + run.len());
    }
}

/// Moves the rows that are kept, which are sorted, to the front.
fn keep_rows(buffer: &mut [f32], kept: &[usize], width: usize) {
    for (to, from) in kept.iter().enumerate() {
        buffer.copy_within(from * width..(from + 1) * width, to * width);
    }
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

/// The first `len` values of a buffer, which grows if it must. Their content is left over from the last use.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

fn matmul(cpu: &Cpu, x: &[f32], rows: usize, w: &Packed, bias: &Option<Vec<f32>>, y: &mut [f32]) {
    cpu.matmul(x, rows, w, y);
    if let Some(bias) = bias {
        cpu.add_bias(y, bias);
    }
}
