//! The CPU device: one thread pool, one profile, one instruction set.

use baton_core::Arena;

use crate::{Attention, Matrix, Packed, Profile, RopeStore, Unsupported, reference};

/// Runs a model's operations. Each call returns when its result is complete; calls from several threads take turns.
pub struct Cpu {
    profile: Profile,
    threads: usize,
}

impl Cpu {
    /// `threads` at least 1; the calling thread is one of them.
    pub fn new(threads: usize, profile: Profile) -> Result<Cpu, Unsupported> {
        if !profile.supported() {
            return Err(Unsupported(profile));
        }
        Ok(Cpu { profile, threads: threads.max(1) })
    }

    pub fn profile(&self) -> Profile {
        self.profile
    }

    /// The instruction set in use.
    pub fn isa(&self) -> &'static str {
        "scalar"
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Packs the rows of the parts one after another, rounded to bf16.
    ///
    /// # Panics
    /// If the parts differ in width or their bytes do not fit their shapes.
    pub fn pack(&self, parts: &[Matrix]) -> Packed {
        let packed = Packed::new(parts);
        for panel in 0..packed.panels() {
            // SAFETY: one panel after another.
            unsafe { packed.pack_panel(parts, panel) };
        }
        packed
    }

    /// y (rows, N) = x (rows, K) · Wᵀ; x is rounded to bf16.
    pub fn matmul(&self, x: &[f32], rows: usize, w: &Packed, y: &mut [f32]) {
        reference::matmul(self.profile, x, rows, w, y);
    }

    /// As `matmul`, with K in 8 fixed segments whose sums are added as ((0+1)+(2+3))+((4+5)+(6+7)).
    pub fn matmul_segmented(&self, x: &[f32], rows: usize, w: &Packed, y: &mut [f32]) {
        reference::matmul_segmented(self.profile, x, rows, w, y);
    }

    /// Rows `ids` of w.
    pub fn embed(&self, w: &Packed, ids: &[u32], out: &mut [f32]) {
        reference::embed(w, ids, out);
    }

    /// out = x / sqrt(mean(x²) + eps) · weight, row by row.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        reference::rms_norm(x, weight, eps, out);
    }

    /// x += delta.
    pub fn add(&self, x: &mut [f32], delta: &[f32]) {
        reference::add(x, delta);
    }

    /// x += delta; out = rms_norm(x).
    pub fn add_rms_norm(&self, x: &mut [f32], delta: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        reference::add_rms_norm(x, delta, weight, eps, out);
    }

    /// y += bias, row by row.
    pub fn add_bias(&self, y: &mut [f32], bias: &[f32]) {
        reference::add_bias(y, bias);
    }

    /// (rows, gate | up) → (rows, silu(gate)·up), each `width` wide.
    pub fn silu_mul(&self, gate_up: &[f32], width: usize, out: &mut [f32]) {
        reference::silu_mul(gate_up, width, out);
    }

    /// Optional qk-norm and RoPE on q (in place, rounded to bf16) and k; k and v go into the arena's blocks.
    pub fn rope_store(&self, a: &RopeStore, qkv: &mut [f32], arena: &Arena) {
        reference::rope_store(a, qkv, arena);
    }

    /// Causal attention of the spans' rows over their sequences; out is (rows, heads·head_dim).
    pub fn attention(&self, a: &Attention, q_in_qkv: &[f32], arena: &Arena, out: &mut [f32]) {
        reference::attention(self.profile, a, q_in_qkv, arena, out);
    }

    /// ln Σ e^x.
    pub fn log_sum_exp(&self, row: &[f32]) -> f32 {
        reference::log_sum_exp(row)
    }

    /// The largest value and its id, the lowest on ties.
    pub fn argmax(&self, row: &[f32]) -> (u32, f32) {
        reference::argmax(row)
    }
}
