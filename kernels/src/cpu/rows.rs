//! What happens to rows between matmuls: norms, activations, rotation, sums over the vocabulary.

use std::ops::Range;

use baton_core::Arena;
use baton_core::arena::{Half, KvDtype};

use super::lanes::{Kernel, Lanes, exp};
use super::scaled::{self, Fp8, Int8};
use super::{Out, get, put};
use crate::kv;
use crate::reference::CHUNK;
use crate::{RopeStore, bf16};

// SAFETY (of each block below): `Kernel::run`'s contract; every index is within the row it belongs to.

/// Rows of rms_norm, with `delta` added to x first if there is one.
pub(crate) struct Norm<'a> {
    pub(crate) x: Out<f32>,
    pub(crate) delta: Option<&'a [f32]>,
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) out: Out<f32>,
    pub(crate) rows: Range<usize>,
}

impl Kernel for Norm<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let width = self.weight.len();
        for row in self.rows {
            unsafe {
                let x = self.x.at(row * width);
                if let Some(delta) = self.delta {
                    add::<L>(x, delta.as_ptr().add(row * width), width);
                }
                norm::<L>(x, self.weight, self.eps, self.out.at(row * width));
            }
        }
    }
}

#[inline(always)]
unsafe fn add<L: Lanes>(x: *mut f32, delta: *const f32, len: usize) {
    for i in (0..len).step_by(16) {
        unsafe { put::<L>(x, i, len, L::add(get::<L>(x, i, len), get::<L>(delta, i, len))) };
    }
}

#[inline(always)]
unsafe fn norm<L: Lanes>(x: *const f32, weight: &[f32], eps: f32, out: *mut f32) {
    unsafe {
        let len = weight.len();
        let mut lanes = [L::splat(0.0); 4];
        for from in (0..len).step_by(64) {
            for (part, lanes) in lanes.iter_mut().enumerate() {
                let i = from + 16 * part;
                if i < len {
                    let x = get::<L>(x, i, len);
                    *lanes = L::fma(x, x, *lanes);
                }
            }
        }
        let scale = L::splat(1.0 / (sum64::<L>(&lanes) / len as f32 + eps).sqrt());
        for i in (0..len).step_by(16) {
            let y = L::mul(L::mul(get::<L>(x, i, len), scale), get::<L>(weight.as_ptr(), i, len));
            put::<L>(out, i, len, y);
        }
    }
}

#[inline(always)]
pub(crate) unsafe fn sum64<L: Lanes>(lanes: &[L::F; 4]) -> f32 {
    unsafe { L::sum(L::add(L::add(lanes[0], lanes[1]), L::add(lanes[2], lanes[3]))) }
}

/// Rows of x += delta; a delta of one row serves all rows.
pub(crate) struct Add<'a> {
    pub(crate) x: Out<f32>,
    pub(crate) delta: &'a [f32],
    pub(crate) width: usize,
    pub(crate) rows: Range<usize>,
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let step = if self.delta.len() == self.width { 0 } else { self.width };
        for row in self.rows {
            unsafe { add::<L>(self.x.at(row * self.width), self.delta.as_ptr().add(row * step), self.width) };
        }
    }
}

/// Rows that are sums of rows of x, each with its weight.
pub(crate) struct MixRows<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) width: usize,
    /// (row of x, weight), `each` of them for every row.
    pub(crate) shares: &'a [(usize, f32)],
    pub(crate) each: usize,
    pub(crate) out: Out<f32>,
    pub(crate) rows: Range<usize>,
}

impl Kernel for MixRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let width = self.width;
        for row in self.rows {
            let shares = &self.shares[row * self.each..][..self.each];
            for i in (0..width).step_by(16) {
                unsafe {
                    let mut sum = L::splat(0.0);
                    for (from, weight) in shares {
                        let x = get::<L>(self.x.as_ptr().add(from * width), i, width);
                        sum = L::fma(L::splat(*weight), x, sum);
                    }
                    put::<L>(self.out.at(row * width), i, width, sum);
                }
            }
        }
    }
}

/// Rows of silu(gate)·up.
pub(crate) struct SiluMul<'a> {
    pub(crate) gate_up: &'a [f32],
    pub(crate) width: usize,
    pub(crate) out: Out<f32>,
    pub(crate) rows: Range<usize>,
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let width = self.width;
        for row in self.rows {
            unsafe {
                let gate = self.gate_up.as_ptr().add(row * 2 * width);
                let (up, out) = (gate.add(width), self.out.at(row * width));
                for i in (0..width).step_by(16) {
                    put::<L>(out, i, width, silu_mul::<L>(get::<L>(gate, i, width), get::<L>(up, i, width)));
                }
            }
        }
    }
}

/// silu(gate)·up
#[inline(always)]
pub(crate) unsafe fn silu_mul<L: Lanes>(gate: L::F, up: L::F) -> L::F {
    unsafe {
        let silu = L::div(gate, L::add(L::splat(1.0), exp::<L>(L::negate(gate))));
        L::mul(silu, up)
    }
}

/// `reference::rope_store` for some of the spans' rows, counted through all spans.
pub(crate) struct Rope<'a> {
    pub(crate) a: &'a RopeStore<'a>,
    pub(crate) qkv: Out<f32>,
    pub(crate) arena: &'a Arena,
    pub(crate) rows: Range<usize>,
}

impl Kernel for Rope<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let mut before = 0;
        for span in self.a.spans {
            let from = self.rows.start.max(before);
            let to = self.rows.end.min(before + span.rows);
            for row in from..to.max(from) {
                unsafe { self.row::<L>(span, row - before) };
            }
            before += span.rows;
        }
    }
}

impl Rope<'_> {
    #[inline(always)]
    unsafe fn row<L: Lanes>(&self, span: &crate::Span, row: usize) {
        unsafe {
            let (heads, position) = (self.a.heads, span.position + row);
            let dim = heads.head_dim;
            let q = self.qkv.at((span.row + row) * heads.qkv_width());
            for head in 0..heads.heads {
                let q = q.add(head * dim);
                self.turn::<L>(self.a.q_norm, position, q);
                for i in (0..dim).step_by(16) {
                    put::<L>(q, i, dim, L::round_bf16(get::<L>(q, i, dim)));
                }
            }
            if self.a.kv.foreign {
                return;
            }
            for index in 0..heads.kv_heads {
                let (kv_head, k) = (self.a.kv.first + index, q.add((heads.heads + index) * dim));
                self.turn::<L>(self.a.k_norm, position, k);
                self.store::<L>(kv::entry(self.arena, span, position, kv_head, self.a.layer, Half::Key), k);
                let v = k.add(heads.kv_heads * dim);
                self.store::<L>(kv::entry(self.arena, span, position, kv_head, self.a.layer, Half::Value), v);
            }
        }
    }

    #[inline(always)]
    unsafe fn turn<L: Lanes>(&self, weight: Option<&[f32]>, position: usize, head: *mut f32) {
        unsafe {
            if let Some(weight) = weight {
                norm::<L>(head, weight, self.a.eps, head);
            }
            let (cos, sin) = self.a.rope.at(position);
            let len = cos.len();
            let other = head.add(len);
            for i in (0..len).step_by(16) {
                let (x, y) = (get::<L>(head, i, len), get::<L>(other, i, len));
                let (cos, sin) = (get::<L>(cos.as_ptr(), i, len), get::<L>(sin.as_ptr(), i, len));
                put::<L>(head, i, len, L::fma(x, cos, L::negate(L::mul(y, sin))));
                put::<L>(other, i, len, L::fma(y, cos, L::mul(x, sin)));
            }
        }
    }

    #[inline(always)]
    unsafe fn store<L: Lanes>(&self, to: *mut u8, values: *const f32) {
        unsafe {
            let dim = self.a.heads.head_dim;
            match self.arena.layout().dtype {
                KvDtype::Bf16 => {}
                KvDtype::F32 => return std::ptr::copy_nonoverlapping(values, to.cast(), dim),
                KvDtype::Int8 => return scaled::store::<L, Int8>(to, values, dim),
                KvDtype::Fp8 => return scaled::store::<L, Fp8>(to, values, dim),
            }
            let (to, whole) = (to.cast::<u16>(), dim / 16 * 16);
            for i in (0..whole).step_by(16) {
                L::store_bf16(to.add(i), L::round_bf16(L::load(values.add(i))));
            }
            for i in whole..dim {
                to.add(i).write(bf16::round(values.add(i).read()));
            }
        }
    }
}

/// The largest value of a row, NaN apart.
pub(crate) struct Largest<'a>(pub(crate) &'a [f32]);

impl Kernel for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f32 {
        unsafe {
            let lowest = L::splat(f32::NEG_INFINITY);
            let mut lanes = [lowest; 4];
            let (blocks, rest) = self.0.as_chunks::<64>();
            for block in blocks {
                for (part, lanes) in lanes.iter_mut().enumerate() {
                    *lanes = L::larger(L::load(block.as_ptr().add(16 * part)), *lanes);
                }
            }
            let lanes = L::larger(L::larger(lanes[0], lanes[1]), L::larger(lanes[2], lanes[3]));
            rest.iter().fold(L::max(lanes), |max, &x| crate::math::larger(x, max))
        }
    }
}

/// Σ e^(x-max) of a row, chunk by chunk.
pub(crate) struct ExpSum<'a> {
    pub(crate) row: &'a [f32],
    pub(crate) max: f32,
}

impl Kernel for ExpSum<'_> {
    type Output = f64;

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f64 {
        let mut sum = 0.0;
        for chunk in self.row.chunks(CHUNK) {
            sum += unsafe { self.chunk::<L>(chunk) } as f64;
        }
        sum
    }
}

impl ExpSum<'_> {
    #[inline(always)]
    unsafe fn chunk<L: Lanes>(&self, chunk: &[f32]) -> f32 {
        unsafe {
            let max = L::splat(self.max);
            let mut lanes = [L::splat(0.0); 4];
            let (blocks, rest) = chunk.as_chunks::<64>();
            // e^-inf is zero: padding adds nothing.
            let mut last = [f32::NEG_INFINITY; 64];
            last[..rest.len()].copy_from_slice(rest);
            let last = if rest.is_empty() { None } else { Some(&last) };
            for block in blocks.iter().chain(last) {
                for (part, lanes) in lanes.iter_mut().enumerate() {
                    let x = L::load(block.as_ptr().add(16 * part));
                    *lanes = L::add(*lanes, exp::<L>(L::sub(x, max)));
                }
            }
            sum64::<L>(&lanes)
        }
    }
}
