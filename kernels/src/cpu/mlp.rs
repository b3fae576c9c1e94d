//! An MLP as one operation: what gate and up give is gated, rounded and laid out for the product with down while it is at
//! hand. In memory it would be 4 bytes per row and output of both, written and read again; here it is 2 per row and input of
//! down. Matrices that this does not fit, quantized ones and odd widths, go step by step, to the same bits.

use std::marker::PhantomData;
use std::mem::{MaybeUninit, take};
use std::ops::Range;

use super::lanes::{Kernel, Lanes};
use super::matmul::{Dot, Exact, GROUP, Matmul, Pairs, Scratch, put_rounded};
use super::rows::silu_mul;
use super::{Cpu, Out, Product, sized};
use crate::packed::{Format, PANEL, Run};
use crate::{Packed, Profile, Segments};

/// What `Cpu::mlp` multiplies.
#[derive(Clone, Copy)]
pub struct Mlp<'a> {
    /// (rows, hidden)
    pub x: &'a [f32],
    pub rows: usize,
    /// Outputs of gate, then of up.
    pub gate_up: &'a Packed,
    /// Of gate, then of up.
    pub bias: Option<&'a [f32]>,
    pub down: &'a Packed,
    /// Those of down's K that it holds.
    pub segments: Segments,
}

impl Mlp<'_> {
    /// Inputs of down.
    fn width(&self) -> usize {
        self.down.cols()
    }

    fn check(&self, outputs: usize) {
        assert_eq!(self.gate_up.rows(), 2 * self.width(), "gate and up do not fit down");
        assert_eq!(self.x.len(), self.rows * self.gate_up.cols(), "inputs do not fit (rows, K)");
        assert_eq!(outputs, self.rows * self.down.rows(), "outputs do not fit (rows, N)");
        assert!(self.bias.is_none_or(|bias| bias.len() == 2 * self.width()), "a bias of another width");
    }

    /// Both matrices, if they are of bf16 and the panels of gate end where those of up begin.
    fn paired(&self) -> Option<[&Run; 2]> {
        let ([gate_up], [down]) = (self.gate_up.runs(), self.down.runs()) else { return None };
        let pairs = gate_up.format == Format::Bf16 && down.format == Format::Bf16;
        (pairs && self.width().is_multiple_of(PANEL)).then_some([gate_up, down])
    }
}

impl Cpu {
    /// y (rows, N) = (silu(x · gateᵀ)·(x · upᵀ)) · downᵀ, K of down in its segments. The bits are those of `matmul`, `add_bias`,
    /// `silu_mul` and `matmul_segments` one after another.
    ///
    /// # Panics
    /// If the parts do not fit each other.
    pub fn mlp(&self, a: &Mlp, y: &mut [f32]) {
        a.check(y.len());
        match (a.paired(), self.profile) {
            (Some(runs), Profile::F32Acc) => self.mlp_at_once::<Exact>(a, runs, y),
            (Some(runs), Profile::Bf16Dp) => self.mlp_at_once::<Pairs>(a, runs, y),
            (None, _) => self.mlp_in_steps(a, y),
        }
    }

    fn mlp_at_once<D: Dot>(&self, a: &Mlp, [gate_up, down]: [&Run; 2], y: &mut [f32]) {
        let mut state = self.state();
        let (mut inputs, mut gated) = (take(&mut state.inputs), take(&mut state.gated));
        let (x, rows, half) = (a.x, a.rows, a.width() / PANEL);
        let whole = Product { x, rows, w: gate_up, segments: None, y: Out(y.as_mut_ptr()), y_stride: a.down.rows() };
        let first = whole.pieces::<D>();
        self.round::<D>(&mut state, &whole, &first, &mut inputs);
        let product = Product { w: down, segments: Some(a.segments), ..whole };
        let next = product.pieces::<D>();
        let to = Out(sized(&mut gated, rows * down.pairs() * D::WORDS).as_mut_ptr());
        state.run(whole.cycles(), &|part| {
            let (x, pieces, panels) = (&inputs, &first, part.share(half));
            let matmul = Matmul { w: gate_up, x, rows, pieces, y: whole.y, y_stride: 0, panels, dot: PhantomData::<D> };
            self.launch(Gated { matmul, half, bias: a.bias, next: &next, to });
        });
        self.multiply_rounded::<D>(&mut state, &product, &next, &gated);
        (state.inputs, state.gated) = (inputs, gated);
    }

    fn mlp_in_steps(&self, a: &Mlp, y: &mut [f32]) {
        let width = a.width();
        let mut steps = take(&mut self.state().steps);
        let (gate_up, gated) = sized(&mut steps, 3 * a.rows * width).split_at_mut(2 * a.rows * width);
        self.matmul(a.x, a.rows, a.gate_up, gate_up);
        if let Some(bias) = a.bias {
            self.add_bias(gate_up, bias);
        }
        self.silu_mul(gate_up, width, gated);
        self.matmul_segments(gated, a.rows, a.down, a.segments, y);
        self.state().steps = steps;
    }
}

/// Inputs of down from some panels of gate and the same of up.
struct Gated<'a, D> {
    /// The panels of gate.
    matmul: Matmul<'a, D>,
    /// Panels from one of gate to the same of up.
    half: usize,
    bias: Option<&'a [f32]>,
    /// Of down.
    next: &'a [Vec<Range<usize>>],
    to: Out<u32>,
}

// SAFETY (of each block below): `Kernel::run`'s contract; every panel is written by one part.

impl<D: Dot> Kernel for Gated<'_, D> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        unsafe {
            let mut scratch = MaybeUninit::<Scratch>::uninit();
            let scratch = scratch.as_mut_ptr();
            for row in (0..self.matmul.rows).step_by(GROUP) {
                let rows = row..self.matmul.rows.min(row + GROUP);
                for panel in self.matmul.panels.clone() {
                    // One chain each: no level holds more than its sums.
                    self.matmul.group::<L>(panel, row, rows.len(), scratch, 0);
                    self.matmul.group::<L>(panel + self.half, row, rows.len(), scratch, 1);
                    self.write::<L>(panel, rows.clone(), (&raw const (*scratch).sums).cast());
                }
            }
        }
    }
}

/// Steps of down that 16 of its inputs are.
const STEPS: usize = 8;

impl<D: Dot> Gated<'_, D> {
    #[inline(always)]
    unsafe fn write<L: Lanes>(&self, panel: usize, rows: Range<usize>, sums: *const f32) {
        unsafe {
            for lane in (0..PANEL).step_by(16) {
                let step = (panel * PANEL + lane) / 2;
                let piece = self.next.iter().flatten().find(|piece| piece.contains(&step)).expect("pieces cover down");
                let [gate_bias, up_bias] = self.biases::<L>(panel * PANEL + lane);
                for (i, row) in rows.clone().enumerate() {
                    let gate = sums.add(i * PANEL + lane);
                    let up = L::add(L::load(gate.add(GROUP * PANEL)), up_bias);
                    let x = silu_mul::<L>(L::add(L::load(gate), gate_bias), up);
                    match step + STEPS <= piece.end {
                        true => put_rounded::<L, D>(x, self.place(piece, row, step)),
                        false => self.scatter::<L>(x, row, step),
                    }
                }
            }
        }
    }

    /// What is added to 16 outputs of gate and of up.
    #[inline(always)]
    unsafe fn biases<L: Lanes>(&self, output: usize) -> [L::F; 2] {
        unsafe {
            // A sum plus -0 is the sum, whatever its sign.
            let of = |bias: Option<&[f32]>, at: usize| bias.map_or(L::splat(-0.0), |bias| L::load(bias[at..].as_ptr()));
            [of(self.bias, output), of(self.bias, output + self.half * PANEL)]
        }
    }

    /// Where a step's input of a row goes.
    #[inline(always)]
    fn place(&self, piece: &Range<usize>, row: usize, step: usize) -> *mut u32 {
        self.to.at((self.matmul.rows * piece.start + row * piece.len() + step - piece.start) * D::WORDS)
    }

    /// `put_rounded` where a piece ends within.
    #[inline(always)]
    unsafe fn scatter<L: Lanes>(&self, x: L::F, row: usize, first: usize) {
        unsafe {
            let mut words = [0u32; 2 * STEPS];
            put_rounded::<L, D>(x, words.as_mut_ptr());
            let of = |step: usize| self.next.iter().flatten().find(move |piece| piece.contains(&step));
            for i in 0..STEPS {
                let piece = of(first + i).expect("pieces cover down");
                let from = words.as_ptr().add(i * D::WORDS);
                std::ptr::copy_nonoverlapping(from, self.place(piece, row, first + i), D::WORDS);
            }
        }
    }
}
