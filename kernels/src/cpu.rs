//! The CPU device: one thread pool, one profile, one instruction set. Operations check shapes, cut the work into fixed
//! parts, and run kernels on them.

mod attend;
pub(crate) mod ceiling;
mod isa;
mod lanes;
mod matmul;
mod mlp;
mod quantized;
mod rows;
mod scaled;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use baton_core::{Arena, KvDtype};

use self::attend::{Attend, Operands, Plan};
use self::isa::Isa;
use self::lanes::{Kernel, Lanes};
use self::matmul::{Dot, Exact, Fours, Full, Inputs, Matmul, Pack, Pairs, pieces};
pub use self::mlp::Mlp;
use self::quantized::{Grid, Multiply, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, Quantized, WORDS};
use self::rows::{Add, ExpSum, Largest, MixRows, Norm, Rope, SiluMul};
use crate::packed::{Format, PANEL, Quantize, Run, locate};
use crate::pool::{Part, Pool};
use crate::quant::Block;
use crate::reference::finish_log_sum;
use crate::{Attention, Matrix, Packed, Pieces, Profile, RopeStore, Segments, Unsupported, bf16};

/// Cycles of work, about, below which handing out parts costs more than it gains.
const PARALLEL_CYCLES: usize = 8_000;
/// Values searched at a time by `argmax`.
const SEARCH: usize = 4096;

/// Runs a model's operations. Each call returns when its result is complete; calls from several threads take turns.
pub struct Cpu {
    profile: Profile,
    isa: Isa,
    threads: usize,
    state: Mutex<State>,
}

/// What one operation at a time uses.
struct State {
    pool: Pool,
    /// A matmul's inputs, rounded.
    inputs: Vec<u32>,
    /// An MLP's inputs of down, rounded.
    gated: Vec<u32>,
    /// What an MLP that goes step by step has in between.
    steps: Vec<f32>,
    /// Attention's tiles, one share per thread.
    scratch: Vec<Line>,
}

/// One run's part of y = x · Wᵀ.
#[derive(Clone, Copy)]
struct Product<'a> {
    x: &'a [f32],
    rows: usize,
    w: &'a Run,
    /// None: one chain.
    segments: Option<Segments>,
    /// The run's first output of the first row.
    y: Out<f32>,
    y_stride: usize,
}

impl Product<'_> {
    /// Pieces of each of its chains over pairs.
    fn pieces<D: Dot>(&self) -> Vec<Vec<Range<usize>>> {
        let pairs = self.w.pairs();
        match self.segments {
            Some(segments) => pieces::<D>(pairs, self.rows, segments.chains(self.w.format.step())),
            None => pieces::<D>(pairs, self.rows, std::iter::once(0..pairs)),
        }
    }

    /// What multiplying pairs takes, about.
    fn cycles(&self) -> usize {
        (self.w.bytes() / 16).max(self.rows * self.w.panels() * self.w.pairs() * 4)
    }
}

/// The first `len` values of a buffer, which grows if it must. Their content is left over from the last use.
fn sized<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    buffer.resize(buffer.len().max(len), T::default());
    &mut buffer[..len]
}

/// Writes the blocks of some panels; rows past the last are zero.
fn pack_blocks(run: &Run, parts: &[Matrix], panels: Range<usize>) {
    let (mut values, mut blocks) = (vec![0.0; run.cols()], vec![Block::default(); run.blocks()]);
    for row in panels.start * PANEL..panels.end * PANEL {
        match locate(parts, row) {
            Some((part, row)) => part.read_blocks(row, run.format, &mut values, &mut blocks),
            None => blocks.fill(Block::default()),
        }
        for (at, block) in blocks.iter().enumerate() {
            // SAFETY: each thread packs panels of its own, and nobody reads them yet.
            unsafe { run.write_block(row, at, block) };
        }
    }
}

/// A cache line: vectors of scratch do not straddle two.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line {
    _lanes: [f32; 16],
}

/// Memory that parts write at places of their own.
pub(crate) struct Out<T>(*mut T);

impl<T> Clone for Out<T> {
    fn clone(&self) -> Out<T> {
        *self
    }
}

impl<T> Copy for Out<T> {}

// SAFETY: parts write disjoint ranges, which is each kernel's duty.
unsafe impl<T> Send for Out<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Out<T> {}

impl<T> Out<T> {
    fn at(self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

/// Lanes i.. of a row of `len`; those past its end are zero.
///
/// # Safety
/// As for `Lanes`; the row is valid and i < len.
#[inline(always)]
unsafe fn get<L: Lanes>(from: *const f32, i: usize, len: usize) -> L::F {
    // SAFETY: the caller's.
    unsafe { if i + 16 <= len { L::load(from.add(i)) } else { L::load_some(from.add(i), len - i) } }
}

/// Writes lanes i.. of a row of `len`.
///
/// # Safety
/// As for `get`.
#[inline(always)]
unsafe fn put<L: Lanes>(to: *mut f32, i: usize, len: usize, x: L::F) {
    // SAFETY: the caller's.
    unsafe { if i + 16 <= len { L::store(to.add(i), x) } else { L::store_some(to.add(i), x, len - i) } }
}

impl Cpu {
    /// `threads` at least 1; the calling thread is one of them.
    pub fn new(threads: usize, profile: Profile) -> Result<Cpu, Unsupported> {
        if !profile.supported() {
            return Err(Unsupported(profile));
        }
        Ok(Cpu::with_isa(threads.max(1), profile, Isa::best()))
    }

    /// On a given instruction set, which the machine has. Profile `bf16dp` is emulated where it must be.
    fn with_isa(threads: usize, profile: Profile, isa: Isa) -> Cpu {
        assert!(isa.supported());
        let state = State {
            pool: Pool::new(threads),
            inputs: Vec::new(),
            gated: Vec::new(),
            steps: Vec::new(),
            scratch: Vec::new(),
        };
        Cpu { profile, isa, threads, state: Mutex::new(state) }
    }

    pub fn profile(&self) -> Profile {
        self.profile
    }

    /// The instruction set in use.
    pub fn isa(&self) -> &'static str {
        self.isa.as_str()
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Packs the rows of the parts one after another: quantized ones as they are, others rounded to bf16.
    ///
    /// # Panics
    /// If the parts differ in width or their bytes do not fit their shapes.
    pub fn pack(&self, parts: &[Matrix]) -> Packed {
        self.pack_as(parts, None)
    }

    /// As `pack`, with floating-point parts quantized if asked.
    pub fn pack_as(&self, parts: &[Matrix], quantize: Option<Quantize>) -> Packed {
        let (packed, parts) = Packed::new(parts, quantize);
        packed.runs().iter().zip(parts).for_each(|(run, parts)| self.pack_run(run, parts));
        packed
    }

    /// Packs some panels of one run over `out`, which begins at a word and has room for exactly these.
    ///
    /// # Panics
    /// If it has not, or there are no such panels.
    pub fn pack_panels(&self, pieces: &Pieces, run: usize, panels: Range<usize>, out: &mut [u8]) {
        let (run, parts) = pieces.lay(run, panels, out);
        self.pack_run(&run, &parts);
    }

    fn pack_run(&self, run: &Run, parts: &[Matrix]) {
        let job = |part: Part| {
            let panels = part.share(run.panels());
            match run.format {
                Format::Bf16 => self.pack_pairs(run, parts, panels),
                _ => pack_blocks(run, parts, panels),
            }
        };
        self.state().run(run.bytes(), &job);
    }

    fn pack_pairs(&self, run: &Run, parts: &[Matrix], panels: Range<usize>) {
        let mut rows = vec![0u32; 16 * run.pairs()];
        for panel in panels {
            for lane in (0..PANEL).step_by(16) {
                rows.fill(0);
                for (i, to) in rows.chunks_exact_mut(run.pairs().max(1)).enumerate() {
                    if let Some((part, row)) = locate(parts, panel * PANEL + lane + i) {
                        part.read_row(row, &mut bf16::halves(to)[..run.cols()]);
                    }
                }
                self.launch(Pack { packed: run, rows: &rows, panel, lane });
            }
        }
    }

    /// y (rows, N) = x (rows, K) · Wᵀ; x is rounded to bf16, or quantized where the weights are.
    pub fn matmul(&self, x: &[f32], rows: usize, w: &Packed, y: &mut [f32]) {
        self.multiply(x, rows, w, None, y);
    }

    /// As `matmul`, with K in 8 fixed segments whose sums are added as ((0+1)+(2+3))+((4+5)+(6+7)).
    pub fn matmul_segmented(&self, x: &[f32], rows: usize, w: &Packed, y: &mut [f32]) {
        self.multiply(x, rows, w, Some(Segments::whole(w.cols())), y);
    }

    /// One rank's part of `matmul_segmented`: w holds the columns of these segments only. The ranks' results, added as a
    /// binary tree, are the whole's.
    pub fn matmul_segments(&self, x: &[f32], rows: usize, w: &Packed, segments: Segments, y: &mut [f32]) {
        self.multiply(x, rows, w, Some(segments), y);
    }

    fn multiply(&self, x: &[f32], rows: usize, w: &Packed, segments: Option<Segments>, y: &mut [f32]) {
        assert_eq!(x.len(), rows * w.cols(), "inputs do not fit (rows, K)");
        assert_eq!(y.len(), rows * w.rows(), "outputs do not fit (rows, N)");
        for run in w.runs() {
            if let Some(segments) = segments {
                assert_eq!(w.cols(), segments.columns(run.format.step()).len(), "weights of other segments");
            }
            let y = Product { x, rows, w: run, segments, y: Out(y[run.first..].as_mut_ptr()), y_stride: w.rows() };
            match (run.format, self.profile) {
                (Format::Bf16, Profile::F32Acc) => self.multiply_pairs::<Exact>(y),
                (Format::Bf16, Profile::Bf16Dp) => self.multiply_pairs::<Pairs>(y),
                (Format::Q8_0, _) => self.multiply_blocks::<Q8_0>(y),
                (Format::Q4_0, _) => self.multiply_blocks::<Q4_0>(y),
                (Format::Q4_1, _) => self.multiply_blocks::<Q4_1>(y),
                (Format::Q5_0, _) => self.multiply_blocks::<Q5_0>(y),
                (Format::Q5_1, _) => self.multiply_blocks::<Q5_1>(y),
                (Format::Q4K, _) => self.multiply_blocks::<Q4K>(y),
                (Format::Q5K, _) => self.multiply_blocks::<Q5K>(y),
                (Format::Q6K, _) => self.multiply_blocks::<Q6K>(y),
            }
        }
    }

    fn multiply_pairs<D: Dot>(&self, product: Product) {
        let mut state = self.state();
        let mut inputs = std::mem::take(&mut state.inputs);
        let pieces = product.pieces::<D>();
        self.round::<D>(&mut state, &product, &pieces, &mut inputs);
        self.multiply_rounded::<D>(&mut state, &product, &pieces, &inputs);
        state.inputs = inputs;
    }

    /// A product's inputs, rounded and laid out piece by piece.
    fn round<D: Dot>(&self, state: &mut State, product: &Product, pieces: &[Vec<Range<usize>>], to: &mut Vec<u32>) {
        let Product { x, rows, w, .. } = *product;
        let to = Out(sized(to, rows * w.pairs() * D::WORDS).as_mut_ptr());
        state.run(x.len() / 8, &|part| {
            let shown = part.share(rows);
            self.launch(Inputs::<D> { x, cols: w.cols(), rows, pieces, to, shown, dot: PhantomData });
        });
    }

    /// A product whose inputs `x` are as `round` leaves them.
    fn multiply_rounded<D: Dot>(&self, state: &mut State, product: &Product, pieces: &[Vec<Range<usize>>], x: &[u32]) {
        let Product { rows, w, y, y_stride, .. } = *product;
        state.run(product.cycles(), &|part| {
            let panels = part.share(w.panels());
            self.launch(Matmul::<D> { w, x, rows, pieces, y, y_stride, panels, dot: PhantomData });
        });
    }

    fn multiply_blocks<G: Grid>(&self, product: Product) {
        let Product { x, rows, w, segments, y, y_stride } = product;
        let mut state = self.state();
        let words = rows * w.blocks() * WORDS;
        let mut inputs = std::mem::take(&mut state.inputs);
        inputs.resize(inputs.len().max(words), 0);
        let chains: Vec<Range<usize>> = match segments {
            Some(segments) => segments.chains(w.format.step()).collect(),
            None => std::iter::once(0..w.blocks()).collect(),
        };
        let to = Out(inputs.as_mut_ptr());
        state.run(x.len() / 4, &|part| {
            self.launch(Quantized { x, cols: w.cols(), to, shown: part.share(rows) });
        });
        let cycles = (w.bytes() / 16).max(rows * w.panels() * w.blocks() * 24);
        state.run(cycles, &|part| {
            let (x, chains, panels) = (&inputs[..words], &chains, part.share(w.panels()));
            self.launch(Multiply::<G> { w, x, rows, chains, y, y_stride, panels, grid: PhantomData });
        });
        state.inputs = inputs;
    }

    /// Rows `ids` of w, one after another.
    pub fn embed(&self, w: &Packed, ids: &[u32], out: &mut [f32]) {
        assert_eq!(out.len(), ids.len() * w.cols(), "outputs do not fit (ids, K)");
        assert!(ids.iter().all(|&id| (id as usize) < w.rows()), "an id past the last row");
        let out = Out(out.as_mut_ptr());
        self.state().run(ids.len() * w.cols() * 4, &|part| {
            for i in part.share(ids.len()) {
                // SAFETY: row i of out, this part's alone.
                let row = unsafe { std::slice::from_raw_parts_mut(out.at(i * w.cols()), w.cols()) };
                w.read_row(ids[i] as usize, row);
            }
        });
    }

    /// out = x / sqrt(mean(x²) + eps) · weight, row by row.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(x.len() == out.len() && x.len().is_multiple_of(weight.len()), "rows do not fit the weight");
        // Without a delta x is only read.
        let (x, out, count) = (Out(x.as_ptr().cast_mut()), Out(out.as_mut_ptr()), x.len());
        self.rows(count, weight.len(), |rows| Norm { x, delta: None, weight, eps, out, rows });
    }

    /// x += delta; out = rms_norm(x).
    pub fn add_rms_norm(&self, x: &mut [f32], delta: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(x.len() == out.len() && x.len().is_multiple_of(weight.len()), "rows do not fit the weight");
        assert_eq!(x.len(), delta.len());
        let (x, out, delta, count) = (Out(x.as_mut_ptr()), Out(out.as_mut_ptr()), Some(delta), x.len());
        self.rows(count, weight.len(), |rows| Norm { x, delta, weight, eps, out, rows });
    }

    /// x += delta.
    pub fn add(&self, x: &mut [f32], delta: &[f32]) {
        assert_eq!(x.len(), delta.len());
        let (count, width) = (x.len(), if x.len().is_multiple_of(64) { 64 } else { x.len() });
        if count == width {
            return self.add_bias(x, delta);
        }
        let x = Out(x.as_mut_ptr());
        self.rows(count, width, |rows| Add { x, delta, width, rows });
    }

    /// y += bias, row by row.
    pub fn add_bias(&self, y: &mut [f32], bias: &[f32]) {
        let (count, width) = (y.len(), bias.len());
        assert!(count.is_multiple_of(width.max(1)), "rows do not fit the bias");
        let x = Out(y.as_mut_ptr());
        self.rows(count, width, |rows| Add { x, delta: bias, width, rows });
    }

    /// (rows, gate | up) → (rows, silu(gate)·up), each `width` wide.
    pub fn silu_mul(&self, gate_up: &[f32], width: usize, out: &mut [f32]) {
        assert!(gate_up.len() == 2 * out.len() && out.len().is_multiple_of(width), "outputs do not fit (rows, width)");
        let (count, out) = (out.len(), Out(out.as_mut_ptr()));
        self.rows(count, width, |rows| SiluMul { gate_up, width, out, rows });
    }

    /// Copies rows `ids` of x, each `width` wide, one after another.
    ///
    /// # Panics
    /// If a row is not in x, or out does not fit.
    pub fn gather_rows(&self, x: &[f32], width: usize, ids: &[usize], out: &mut [f32]) {
        assert_eq!(out.len(), ids.len() * width, "outputs do not fit (ids, width)");
        let (count, to) = (out.len(), Out(out.as_mut_ptr()));
        self.state().run(count / 4, &|part| {
            for i in part.share(ids.len()) {
                // SAFETY: row i of out, this part's alone.
                let row = unsafe { std::slice::from_raw_parts_mut(to.at(i * width), width) };
                row.copy_from_slice(&x[ids[i] * width..][..width]);
            }
        });
    }

    /// out (rows, width): each row the sum of its shares (row of x, weight), one after another, each multiplied and added in
    /// one rounding. `shares` has equally many for each row.
    ///
    /// # Panics
    /// If a row is not in x, or the shares are no whole number for each row of out.
    pub fn mix_rows(&self, x: &[f32], width: usize, shares: &[(usize, f32)], out: &mut [f32]) {
        let (count, rows) = (out.len(), out.len() / width.max(1));
        assert!(count == rows * width && shares.len().is_multiple_of(rows.max(1)), "shares do not fit the rows");
        assert!(shares.iter().all(|(row, _)| (row + 1) * width <= x.len()), "a row past the last");
        let (each, out) = (shares.len() / rows.max(1), Out(out.as_mut_ptr()));
        self.rows(count * each, width * each, |rows| MixRows { x, width, shares, each, out, rows });
    }

    /// Optional qk-norm and RoPE on q (in place, rounded to bf16) and k; k and v go into the arena's blocks.
    pub fn rope_store(&self, a: &RopeStore, qkv: &mut [f32], arena: &Arena) {
        a.check(qkv.len(), arena);
        let rows = a.spans.iter().map(|span| span.rows).sum::<usize>();
        let (width, qkv) = (a.heads.qkv_width(), Out(qkv.as_mut_ptr()));
        self.rows(rows * width, width, |rows| Rope { a, qkv, arena, rows });
    }

    /// Causal attention of the spans' rows over their sequences; out is (rows, heads·head_dim).
    pub fn attention(&self, a: &Attention, q_in_qkv: &[f32], arena: &Arena, out: &mut [f32]) {
        a.check(q_in_qkv.len(), out.len(), arena);
        let out = Out(out.as_mut_ptr());
        match (arena.layout().dtype, self.profile) {
            (KvDtype::Int8, _) => self.attend::<Fours>(a, q_in_qkv, arena, out),
            (KvDtype::Bf16 | KvDtype::Fp8, Profile::Bf16Dp) => self.attend::<Pairs>(a, q_in_qkv, arena, out),
            _ => self.attend::<Full>(a, q_in_qkv, arena, out),
        }
    }

    fn attend<D: Operands>(&self, a: &Attention, qkv: &[f32], arena: &Arena, out: Out<f32>) {
        let mut state = self.state();
        let (plan, tiles) = (Plan::new(a, arena), attend::tiles(a));
        let words = plan.scratch_words().next_multiple_of(16);
        let mut scratch = std::mem::take(&mut state.scratch);
        scratch.resize(scratch.len().max(words * self.threads / 16), Line { _lanes: [0.0; 16] });
        let base = Out(scratch.as_mut_ptr().cast::<f32>());
        state.run(attend::cost(&tiles) * a.heads.head_dim * 4, &|part| {
            let tiles = &tiles[attend::share(&tiles, part.index, part.of)];
            // SAFETY: each part has a share of its own.
            let scratch = unsafe { std::slice::from_raw_parts_mut(base.at(part.index * words), words) };
            self.launch(Attend::<D> { a, qkv, arena, out, tiles, plan, scratch, dot: PhantomData });
        });
        state.scratch = scratch;
    }

    /// ln Σ e^x.
    pub fn log_sum_exp(&self, row: &[f32]) -> f32 {
        let max = self.launch(Largest(row));
        finish_log_sum(max, self.launch(ExpSum { row, max }))
    }

    /// The largest value and its id, the lowest on ties; NaN is never larger.
    pub fn argmax(&self, row: &[f32]) -> (u32, f32) {
        let (mut best, mut max) = (0, f32::NEG_INFINITY);
        for (i, chunk) in row.chunks(SEARCH).enumerate() {
            let largest = self.launch(Largest(chunk));
            if largest > max {
                (best, max) = (i, largest);
            }
        }
        let within = row.iter().skip(best * SEARCH).take(SEARCH).position(|&x| x == max && max > f32::NEG_INFINITY);
        within.map_or((0, f32::NEG_INFINITY), |i| ((best * SEARCH + i) as u32, row[best * SEARCH + i]))
    }

    /// Calls `f` once for each item; every thread has a share of neighbours. `f` may use what this device does on one thread.
    pub fn spread<T: Send>(&self, items: &mut [T], f: impl Fn(&mut T) + Sync) {
        let (count, items) = (items.len(), Out(items.as_mut_ptr()));
        let cycles = if count > 1 { PARALLEL_CYCLES } else { 0 };
        self.state().run(cycles, &|part| {
            // SAFETY: each item is in the share of one part.
            part.share(count).for_each(|i| f(unsafe { &mut *items.at(i) }));
        });
    }

    /// Runs a kernel over shares of `count / width` rows.
    fn rows<K: Kernel<Output = ()>>(&self, count: usize, width: usize, kernel: impl Fn(Range<usize>) -> K + Sync) {
        self.state().run(count / 4, &|part| self.launch(kernel(part.share(count / width.max(1)))));
    }

    fn launch<K: Kernel>(&self, kernel: K) -> K::Output {
        // SAFETY: support was checked in `with_isa`; the operation that made the kernel checked its shapes.
        unsafe { self.isa.launch(kernel) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Runs a job in parts, or in one when it is small.
    fn run(&mut self, cycles: usize, job: &(dyn Fn(Part) + Sync)) {
        match cycles < PARALLEL_CYCLES {
            true => job(Part { index: 0, of: 1 }),
            false => self.pool.run(job),
        }
    }
}
