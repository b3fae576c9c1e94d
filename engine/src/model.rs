//! The transformer on a CPU: one code path for Llama, Qwen2, Qwen3 and Mistral. The bits of a row depend on the row, the
//! weights and its sequence's KV alone, because those of every kernel do and nothing here mixes rows.

use std::sync::Arc;

use baton_core::SampledToken;
use baton_kernels::{Attention, Cpu, Packed, RopeStore, RopeTable, Span};

use crate::backend::Backend;
use crate::batch::{Batch, Draw, Output};
use crate::load::config::ModelConfig;
use crate::sampling;

/// Rows of logits in memory at a time.
const LOGIT_ROWS: usize = 32;

/// A loaded model and the device it runs on.
pub struct CpuModel {
    cpu: Cpu,
    config: ModelConfig,
    weights: Weights,
    rope: RopeTable,
    scratch: Scratch,
}

/// All weights; matrices packed, norms and biases as f32.
pub struct Weights {
    pub embedding: Arc<Packed>,
    pub layers: Vec<Layer>,
    pub norm: Vec<f32>,
    /// (vocab, hidden); the embedding itself when tied.
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
    /// Rows of gate, then up.
    pub gate_up: Packed,
    pub gate_up_bias: Option<Vec<f32>>,
    pub down: Packed,
    pub down_bias: Option<Vec<f32>>,
    pub window: Option<usize>,
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
    /// (row, gate | up)
    gate_up: Vec<f32>,
    /// (row, intermediate)
    gated: Vec<f32>,
    /// (drawn row, vocab)
    logits: Vec<f32>,
}

impl CpuModel {
    /// # Panics
    /// If the weights do not have the configuration's number of layers.
    pub fn new(cpu: Cpu, config: ModelConfig, weights: Weights) -> CpuModel {
        assert!(weights.layers.len() == config.layers, "weights of another model");
        let rope = RopeTable::new(&config.inv_freq, config.positions_max);
        CpuModel { cpu, config, weights, rope, scratch: Scratch::default() }
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// Bytes of the packed matrices of all layers: read once per step.
    pub fn layer_bytes(&self) -> usize {
        let packed = |layer: &Layer| layer.qkv.bytes() + layer.out.bytes() + layer.gate_up.bytes() + layer.down.bytes();
        self.weights.layers.iter().map(packed).sum()
    }

    /// Bytes of the output matrix: read once per step that draws.
    pub fn head_bytes(&self) -> usize {
        self.weights.head.bytes()
    }

    /// Bytes of all packed matrices.
    pub fn weight_bytes(&self) -> usize {
        let Weights { embedding, head, .. } = &self.weights;
        let embedding = if Arc::ptr_eq(embedding, head) { 0 } else { embedding.bytes() };
        self.layer_bytes() + self.head_bytes() + embedding
    }

    /// Everything up to the final norm, whose rows are left in `scratch.normed`: one per row that is drawn from, which
    /// are returned. The others are done when their last keys and values are written.
    fn forward(&mut self, batch: &Batch, layers: &mut dyn FnMut(usize)) -> Vec<usize> {
        let CpuModel { cpu, config, weights, rope, scratch } = self;
        let (heads, eps, hidden) = (config.heads, config.eps, config.hidden);
        let scale = 1.0 / (heads.head_dim as f32).sqrt();
        let drawn = drawn_rows(&batch.draws);
        let mut spans: Vec<Span> = batch.spans.iter().map(|span| kernel_span(batch, span)).collect();
        let mut rows = batch.tokens.len();

        let (x, normed) = (sized(&mut scratch.x, rows * hidden), sized(&mut scratch.normed, rows * hidden));
        cpu.embed(&weights.embedding, &batch.tokens, x);
        cpu.rms_norm(x, &weights.layers[0].attention_norm, eps, normed);
        for (index, layer) in weights.layers.iter().enumerate() {
            let normed = sized(&mut scratch.normed, rows * hidden);
            let qkv = sized(&mut scratch.qkv, rows * heads.qkv_width());
            matmul(cpu, normed, rows, &layer.qkv, &layer.qkv_bias, qkv);
            let (q_norm, k_norm) = (layer.q_norm.as_deref(), layer.k_norm.as_deref());
            let store = RopeStore { heads, layer: index, spans: &spans, rope, q_norm, k_norm, eps };
            cpu.rope_store(&store, qkv, batch.arena());
            layers(index);
            if index + 1 == weights.layers.len() && drawn.len() < rows {
                spans = keep_spans(&spans, &drawn);
                keep_rows(&mut scratch.qkv, &drawn, heads.qkv_width());
                keep_rows(&mut scratch.x, &drawn, hidden);
                rows = drawn.len();
            }
            if rows == 0 {
                break;
            }
            let attention = Attention { heads, layer: index, spans: &spans, scale, window: layer.window };
            let qkv = sized(&mut scratch.qkv, rows * heads.qkv_width());
            let attended = sized(&mut scratch.attended, rows * heads.width());
            cpu.attention(&attention, qkv, batch.arena(), attended);
            let next = weights.layers.get(index + 1).map_or(&weights.norm, |next| &next.attention_norm);
            mix(cpu, config, layer, next, rows, scratch);
        }
        drawn
    }

    /// Reads the draws off the logits of their rows, a few rows at a time. `drawn` are the rows that are left.
    fn draw(&mut self, draws: &[Draw], drawn: &[usize]) -> Vec<SampledToken> {
        let CpuModel { cpu, config, weights, scratch, .. } = self;
        let mut tokens = Vec::with_capacity(draws.len());
        let mut rest = draws.iter().peekable();
        for (chunk, rows) in drawn.chunks(LOGIT_ROWS).enumerate() {
            let logits = sized(&mut scratch.logits, rows.len() * config.vocab);
            let normed = &scratch.normed[chunk * LOGIT_ROWS * config.hidden..][..rows.len() * config.hidden];
            cpu.matmul(normed, rows.len(), &weights.head, logits);
            for (row, logits) in rows.iter().zip(logits.chunks_exact_mut(config.vocab)) {
                while let Some(draw) = rest.next_if(|draw| draw.row == *row) {
                    tokens.push(sampling::draw(cpu, logits, draw));
                }
            }
        }
        tokens
    }
}

/// The second half of a layer: attention's output and the MLP into the residual stream, then the norm before what comes
/// next.
fn mix(cpu: &Cpu, config: &ModelConfig, layer: &Layer, next: &[f32], rows: usize, scratch: &mut Scratch) {
    let (hidden, wide, eps) = (config.hidden, config.intermediate, config.eps);
    let (x, normed) = (sized(&mut scratch.x, rows * hidden), sized(&mut scratch.normed, rows * hidden));
    let attended = sized(&mut scratch.attended, rows * config.heads.width());
    let delta = sized(&mut scratch.delta, rows * hidden);
    let (gate_up, gated) = (sized(&mut scratch.gate_up, rows * 2 * wide), sized(&mut scratch.gated, rows * wide));
    matmul_segmented(cpu, attended, rows, &layer.out, &layer.out_bias, delta);
    cpu.add_rms_norm(x, delta, &layer.mlp_norm, eps, normed);
    matmul(cpu, normed, rows, &layer.gate_up, &layer.gate_up_bias, gate_up);
    cpu.silu_mul(gate_up, wide, gated);
    matmul_segmented(cpu, gated, rows, &layer.down, &layer.down_bias, delta);
    cpu.add_rms_norm(x, delta, next, eps, normed);
}

impl Backend for CpuModel {
    fn run(&mut self, batch: &Batch, layers: &mut dyn FnMut(usize)) -> Output {
        if batch.is_empty() {
            return Output::default();
        }
        batch.copy_shared_blocks();
        let drawn = self.forward(batch, layers);
        Output { drawn: self.draw(&batch.draws, &drawn) }
    }
}

/// The different rows of draws that are sorted by row.
fn drawn_rows(draws: &[Draw]) -> Vec<usize> {
    let mut rows: Vec<usize> = draws.iter().map(|draw| draw.row).collect();
    rows.dedup();
    rows
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

fn kernel_span<'a>(batch: &'a Batch, span: &crate::batch::Span) -> Span<'a> {
    let blocks = &batch.tables[span.table.clone()];
    Span { row: span.row, rows: span.rows, position: span.position, blocks }
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

fn matmul_segmented(cpu: &Cpu, x: &[f32], rows: usize, w: &Packed, bias: &Option<Vec<f32>>, y: &mut [f32]) {
    cpu.matmul_segmented(x, rows, w, y);
    if let Some(bias) = bias {
        cpu.add_bias(y, bias);
    }
}
