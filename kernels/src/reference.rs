//! Every operation as plain loops on one thread. This is what the bits mean; the fast paths must equal it, always.
//! Sums over lanes go through `tree`, so that vector code of any width can follow the same order.

use std::ops::Range;

use baton_core::arena::{Arena, Half, KvDtype};

use crate::attention::{Attention, BLOCK, RopeStore, Span};
use crate::kv::{integers, load, store};
use crate::math::{exp, larger, ln, silu};
use crate::packed::{Format, Run};
use crate::quant::{BLOCK_LEN, Block, quantize};
use crate::{Packed, Profile, Segments, bf16};

/// Values per partial sum of `log_sum_exp`.
pub(crate) const CHUNK: usize = 4096;

/// Sum of 16 lanes: neighbours at distance 8, then 4, 2, 1.
pub(crate) fn tree(mut lanes: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// Sum of 64 lanes: four vectors of 16 as (0+1)+(2+3), then `tree`.
fn tree64(lanes: &[f32; 64]) -> f32 {
    tree(std::array::from_fn(|i| (lanes[i] + lanes[i + 16]) + (lanes[i + 32] + lanes[i + 48])))
}

/// The chain of one output over some pairs of k: `acc` plus w[k]·x[k], even k first (`f32acc`) or as `vdpbf16ps` does.
fn chain(profile: Profile, acc: f32, w: [f32; 2], x: [f32; 2]) -> f32 {
    match profile {
        Profile::F32Acc => w[1].mul_add(x[1], w[0].mul_add(x[0], acc)),
        Profile::Bf16Dp => dot_bf16(acc, w, x),
    }
}

/// One lane of `vdpbf16ps`: the odd product, then the even one, each fused; denormals count as zero, in and out
/// (Intel SDM, VDPBF16PS).
pub(crate) fn dot_bf16(acc: f32, w: [f32; 2], x: [f32; 2]) -> f32 {
    let odd = flush(flush(w[1]).mul_add(flush(x[1]), flush(acc)));
    flush(flush(w[0]).mul_add(flush(x[0]), odd))
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

fn weights(w: &Run, row: usize, pair: usize) -> [f32; 2] {
    [bf16::widen(w.at(row, 2 * pair)), bf16::widen(w.at(row, 2 * pair + 1))]
}

/// The pair of inputs, rounded to bf16; past the end it is zero.
fn inputs(x: &[f32], pair: usize) -> [f32; 2] {
    [bf16::rounded(x[2 * pair]), x.get(2 * pair + 1).map_or(0.0, |&x| bf16::rounded(x))]
}

fn check_matmul(x: &[f32], rows: usize, w: &Packed, y: &[f32]) {
    assert_eq!(x.len(), rows * w.cols(), "inputs do not fit (rows, K)");
    assert_eq!(y.len(), rows * w.rows(), "outputs do not fit (rows, N)");
}

/// The chain of one output over some steps of k: pairs, or blocks of 32 where the weights are quantized.
fn sum(profile: Profile, x: &[f32], w: &Run, n: usize, steps: Range<usize>) -> f32 {
    match w.format {
        Format::Bf16 => steps.fold(0.0, |acc, pair| chain(profile, acc, weights(w, n, pair), inputs(x, pair))),
        _ => steps.fold(0.0, |acc, step| block(acc, &w.block(n, step), w.format, &x[step * BLOCK_LEN..])),
    }
}

/// A block of 32 k: inputs become integers with one scale, products of integers are exact, scales are multiplied first.
fn block(acc: f32, w: &Block, format: Format, x: &[f32]) -> f32 {
    let (mut x_integers, w_integers) = ([0; BLOCK_LEN], w.integers(format));
    let scale = quantize(&x[..x.len().min(BLOCK_LEN)], &mut x_integers);
    let dot = |part: Range<usize>| part.map(|i| w_integers[i] * i32::from(x_integers[i])).sum::<i32>() as f32;
    match format {
        Format::Q6K => {
            let [first, second] = w.halves().map(|half| w.scale(format) * half * scale);
            dot(16..32).mul_add(second, dot(0..16).mul_add(first, acc))
        }
        _ if format.minima() => {
            let minus = -x_integers.iter().map(|q| i32::from(*q)).sum::<i32>() as f32 * scale;
            w.minimum(format).mul_add(minus, dot(0..32).mul_add(w.scale(format) * scale, acc))
        }
        _ => dot(0..32).mul_add(w.scale(format) * scale, acc),
    }
}

/// Steps of k of a run's chains.
fn steps(w: &Run) -> usize {
    if w.format == Format::Bf16 { w.pairs() } else { w.blocks() }
}

/// y (rows, N) = x (rows, K) · Wᵀ, one chain per output over all k.
pub fn matmul(profile: Profile, x: &[f32], rows: usize, w: &Packed, y: &mut [f32]) {
    check_matmul(x, rows, w, y);
    for row in 0..rows {
        let x = &x[row * w.cols()..][..w.cols()];
        for n in 0..w.rows() {
            let (run, at) = w.run_of(n);
            y[row * w.rows() + n] = sum(profile, x, run, at, 0..steps(run));
        }
    }
}

/// As `matmul`, with a chain per segment of K and the segments' sums added as ((0+1)+(2+3))+((4+5)+(6+7)).
pub fn matmul_segmented(profile: Profile, x: &[f32], rows: usize, w: &Packed, y: &mut [f32]) {
    matmul_segments(profile, x, rows, w, Segments::whole(w.cols()), y);
}

/// One rank's part of `matmul_segmented`: w holds the columns of these segments only. The ranks' results, added as a
/// binary tree, are the whole's.
pub fn matmul_segments(profile: Profile, x: &[f32], rows: usize, w: &Packed, segments: Segments, y: &mut [f32]) {
    check_matmul(x, rows, w, y);
    for row in 0..rows {
        let x = &x[row * w.cols()..][..w.cols()];
        for n in 0..w.rows() {
            let (run, at) = w.run_of(n);
            assert_eq!(w.cols(), segments.columns(run.format.step()).len(), "weights of other segments");
            let chains = segments.chains(run.format.step());
            let mut sums: Vec<f32> = chains.map(|steps| sum(profile, x, run, at, steps)).collect();
            while sums.len() > 1 {
                sums = sums.chunks(2).map(|pair| pair[0] + pair[1]).collect();
            }
            y[row * w.rows() + n] = sums[0];
        }
    }
}

/// Rows `ids` of w, one after another.
pub fn embed(w: &Packed, ids: &[u32], out: &mut [f32]) {
    assert_eq!(out.len(), ids.len() * w.cols(), "outputs do not fit (ids, K)");
    for (out, &id) in out.chunks_exact_mut(w.cols()).zip(ids) {
        w.read_row(id as usize, out);
    }
}

/// out = x / sqrt(mean(x²) + eps) · weight, row by row; the squares are summed in 64 lanes.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    assert!(x.len() == out.len() && x.len().is_multiple_of(width), "rows do not fit the weight");
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let scale = inverse_rms(x, eps);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }
}

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mut lanes = [0.0f32; 64];
    for (i, x) in x.iter().enumerate() {
        lanes[i % 64] = x.mul_add(*x, lanes[i % 64]);
    }
    1.0 / (tree64(&lanes) / x.len() as f32 + eps).sqrt()
}

/// x += delta.
pub fn add(x: &mut [f32], delta: &[f32]) {
    assert_eq!(x.len(), delta.len());
    x.iter_mut().zip(delta).for_each(|(x, delta)| *x += delta);
}

/// x += delta; out = rms_norm(x).
pub fn add_rms_norm(x: &mut [f32], delta: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    add(x, delta);
    rms_norm(x, weight, eps, out);
}

/// y += bias, row by row.
pub fn add_bias(y: &mut [f32], bias: &[f32]) {
    y.chunks_exact_mut(bias.len()).for_each(|row| add(row, bias));
}

/// silu(gate)·up for rows of (gate | up), each `width` wide.
pub fn silu_mul(gate_up: &[f32], width: usize, out: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * out.len(), "outputs do not fit (rows, width)");
    for (row, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
        let (gate, up) = row.split_at(width);
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = silu(*gate) * up;
        }
    }
}

/// Each row of out is the sum of its shares: rows of x (index, weight), one after another, each multiplied and added in one
/// rounding. `shares` has equally many for each row.
pub fn mix_rows(x: &[f32], width: usize, shares: &[(usize, f32)], out: &mut [f32]) {
    let each = shares.len() / (out.len() / width).max(1);
    for (out, shares) in out.chunks_exact_mut(width).zip(shares.chunks_exact(each.max(1))) {
        out.fill(0.0);
        for (row, weight) in shares {
            out.iter_mut().zip(&x[row * width..][..width]).for_each(|(out, x)| *out = weight.mul_add(*x, *out));
        }
    }
}

/// Normalises and rotates q and k, rounds q to bf16 in place, and writes k and v into the arena.
pub fn rope_store(a: &RopeStore, qkv: &mut [f32], arena: &Arena) {
    a.check(qkv.len(), arena);
    let (width, dim) = (a.heads.qkv_width(), a.heads.head_dim);
    for span in a.spans {
        for row in 0..span.rows {
            let (q, kv) = qkv[(span.row + row) * width..][..width].split_at_mut(a.heads.width());
            let (k, v) = kv.split_at_mut(a.heads.kv_heads * dim);
            let position = span.position + row;
            for head in q.chunks_exact_mut(dim) {
                turn(a, a.q_norm, position, head);
                head.iter_mut().for_each(|q| *q = bf16::rounded(*q));
            }
            if a.kv.foreign {
                continue;
            }
            for (kv_head, (k, v)) in k.chunks_exact_mut(dim).zip(v.chunks_exact(dim)).enumerate() {
                let kv_head = a.kv.first + kv_head;
                turn(a, a.k_norm, position, k);
                store(arena, span, position, kv_head, a.layer, Half::Key, k);
                store(arena, span, position, kv_head, a.layer, Half::Value, v);
            }
        }
    }
}

/// Optional norm, then rotate-half RoPE, of one head.
fn turn(a: &RopeStore, norm: Option<&[f32]>, position: usize, head: &mut [f32]) {
    if let Some(weight) = norm {
        let scale = inverse_rms(head, a.eps);
        head.iter_mut().zip(weight).for_each(|(x, weight)| *x = *x * scale * weight);
    }
    let (cos, sin) = a.rope.at(position);
    for i in 0..cos.len() {
        let (x, y) = (head[i], head[i + cos.len()]);
        head[i] = x.mul_add(cos[i], -(y * sin[i]));
        head[i + cos.len()] = y.mul_add(cos[i], x * sin[i]);
    }
}

/// Softmax partial of one row: largest score, sum of exponentials, and weighted sum of values.
struct Partial {
    max: f32,
    sum: f32,
    values: Vec<f32>,
    /// What the values mean times.
    factor: f32,
}

/// Causal attention of each row over its sequence's positions up to its own. Per logical block of 64 positions a
/// partial; partials merge in block order (Dao et al. 2022, "FlashAttention", section 3.1).
///
/// Scores are chains over head_dim and values chains over the block's positions: of f32 multiply-adds, or, in `bf16dp`
/// over a cache in bf16 or e4m3, of `vdpbf16ps` with the weights rounded to bf16. Over rows in 8 bits they are over numbers
/// without their scales: a position's score is multiplied with its key's scale, and its exponential, once it is in the sum,
/// with its value's. Over whole numbers q and a block's weights become whole numbers, too (`kv::whole`), and the sums of
/// products are exact.
pub fn attention(profile: Profile, a: &Attention, qkv: &[f32], arena: &Arena, out: &mut [f32]) {
    a.check(qkv.len(), out.len(), arena);
    let (width, dim) = (a.heads.qkv_width(), a.heads.head_dim);
    for span in a.spans {
        for row in span.row..span.row + span.rows {
            for head in 0..a.heads.heads {
                let q = &qkv[row * width + head * dim..][..dim];
                let values = attend(profile, a, span, span.position + row - span.row, head, q, arena);
                out[(row * a.heads.heads + head) * dim..][..dim].copy_from_slice(&values);
            }
        }
    }
}

fn attend(
    profile: Profile,
    a: &Attention,
    span: &Span,
    position: usize,
    head: usize,
    q: &[f32],
    arena: &Arena,
) -> Vec<f32> {
    let mut all = Partial { max: f32::NEG_INFINITY, sum: 0.0, values: vec![0.0; q.len()], factor: 1.0 };
    for block in a.first(position) / BLOCK..=position / BLOCK {
        let part = partial(profile, a, span, position, head, q, arena, block);
        let max = larger(all.max, part.max);
        let (old, new) = (exp(all.max - max), exp(part.max - max));
        all.sum = all.sum.mul_add(old, part.sum * new);
        let new = part.factor * new;
        for (all, part) in all.values.iter_mut().zip(&part.values) {
            *all = all.mul_add(old, part * new);
        }
        all.max = max;
    }
    let scale = 1.0 / all.sum;
    all.values.iter().map(|value| value * scale).collect()
}

#[allow(clippy::too_many_arguments)]
fn partial(
    profile: Profile,
    a: &Attention,
    span: &Span,
    position: usize,
    head: usize,
    q: &[f32],
    arena: &Arena,
    block: usize,
) -> Partial {
    let dtype = arena.layout().dtype;
    let pairs = profile == Profile::Bf16Dp && matches!(dtype, KvDtype::Bf16 | KvDtype::Fp8);
    let whole = (dtype == KvDtype::Int8).then(|| integers(q));
    let kv_head = a.kv.first + head / a.heads.group();
    let seen = a.first(position)..position + 1;
    let mut scores = [f32::NEG_INFINITY; BLOCK];
    let (mut values, mut scales) = (vec![vec![0.0; q.len()]; BLOCK], [1.0; BLOCK]);
    for i in (0..BLOCK).filter(|i| seen.contains(&(block * BLOCK + i))) {
        let (k, scale) = load(arena, span, block * BLOCK + i, kv_head, a.layer, Half::Key);
        (values[i], scales[i]) = load(arena, span, block * BLOCK + i, kv_head, a.layer, Half::Value);
        let steps = k.as_chunks().0.iter().zip(q.as_chunks().0);
        let score = match &whole {
            Some((q, factor)) => dot(&k, q) * (factor * a.scale),
            None if pairs => steps.fold(0.0, |acc, (&k, &q)| dot_bf16(acc, k, q)) * a.scale,
            None => k.iter().zip(q).fold(0.0, |acc, (k, q)| k.mul_add(*q, acc)) * a.scale,
        };
        scores[i] = score * scale;
    }
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, &score| larger(score, max));
    let rounded = |x: f32| if pairs { bf16::rounded(x) } else { x };
    let exps = scores.map(|score| exp(score - max)).map(|x| if dtype.is_scaled() { x } else { rounded(x) });
    let weight = |i: usize| if exps[i] > 0.0 { rounded(exps[i] * scales[i]) } else { 0.0 };
    let weights: [f32; BLOCK] = match dtype.is_scaled() {
        true => std::array::from_fn(weight),
        false => exps,
    };
    if whole.is_some() {
        let (weights, factor) = integers(&weights);
        let column = |d: usize| values.iter().map(|value| value[d]).collect::<Vec<f32>>();
        let values = (0..q.len()).map(|d| dot(&column(d), &weights)).collect();
        return Partial { max, sum: tree64(&exps), values, factor };
    }
    let value = |d: usize| {
        let column = |i: usize| [values[i][d], values[i + 1][d]];
        let steps = (0..BLOCK).step_by(2).map(|i| (column(i), [weights[i], weights[i + 1]]));
        let profile = if pairs { Profile::Bf16Dp } else { Profile::F32Acc };
        steps.fold(0.0, |acc, (v, w)| chain(profile, acc, v, w))
    };
    Partial { max, sum: tree64(&exps), values: (0..q.len()).map(value).collect(), factor: 1.0 }
}

/// The sum of products of whole numbers, rounded once.
fn dot(a: &[f32], b: &[i32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| *a as i32 * b).sum::<i32>() as f32
}

/// ln Σ e^x of a row: chunks of 4096 values summed in 64 lanes, the chunks' sums in f64.
pub fn log_sum_exp(row: &[f32]) -> f32 {
    let max = row.iter().fold(f32::NEG_INFINITY, |max, &x| larger(x, max));
    let mut sum = 0.0f64;
    for chunk in row.chunks(CHUNK) {
        let mut lanes = [0.0f32; 64];
        chunk.iter().enumerate().for_each(|(i, x)| lanes[i % 64] += exp(x - max));
        sum += tree64(&lanes) as f64;
    }
    finish_log_sum(max, sum)
}

/// max + ln(sum); an infinite maximum is the answer, and NaN anywhere gives NaN.
pub(crate) fn finish_log_sum(max: f32, sum: f64) -> f32 {
    match (max.is_finite(), sum.is_finite()) {
        (false, _) => max,
        (true, false) => f32::NAN,
        (true, true) => (max as f64 + ln(sum)) as f32,
    }
}

/// The largest value and its id, the lowest on ties; NaN is never larger.
pub fn argmax(row: &[f32]) -> (u32, f32) {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &value) in row.iter().enumerate() {
        if value > best.1 {
            best = (id as u32, value);
        }
    }
    best
}
