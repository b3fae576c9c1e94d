//! Every fast path equals the reference bit for bit, whatever the instruction set, thread count, batch or chunk.

mod quantized;

use baton_core::Rng;
use baton_core::arena::{Arena, BlockLayout, KvDtype};
use proptest::prelude::*;

use super::isa::Isa;
use super::*;
use crate::{Dtype, Heads, KvHeads, RopeTable, SEGMENTS, Span, reference};

const PROFILES: [Profile; 2] = [Profile::F32Acc, Profile::Bf16Dp];

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.supported())
}

/// A device for every instruction set here and profile.
fn devices(threads: usize) -> impl Iterator<Item = Cpu> {
    PROFILES.into_iter().flat_map(move |profile| isas().map(move |isa| Cpu::with_isa(threads, profile, isa)))
}

/// The quickest device of a profile.
fn device(threads: usize, profile: Profile) -> Cpu {
    Cpu::with_isa(threads, profile, Isa::best())
}

/// Values in (-1, 1).
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..count).map(|_| (2.0 * rng.f64() - 1.0) as f32).collect()
}

fn pack(cpu: &Cpu, values: &[f32], rows: usize, cols: usize) -> Packed {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    cpu.pack(&[Matrix { dtype: Dtype::F32, bytes: &bytes, rows, cols }])
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn matmul(cpu: &Cpu, x: &[f32], w: &Packed, segmented: bool) -> Vec<f32> {
    let rows = x.len() / w.cols();
    let mut y = vec![f32::NAN; rows * w.rows()];
    match segmented {
        true => cpu.matmul_segmented(x, rows, w, &mut y),
        false => cpu.matmul(x, rows, w, &mut y),
    }
    y
}

fn reference_matmul(profile: Profile, x: &[f32], w: &Packed, segmented: bool) -> Vec<f32> {
    let rows = x.len() / w.cols();
    let mut y = vec![f32::NAN; rows * w.rows()];
    match segmented {
        true => reference::matmul_segmented(profile, x, rows, w, &mut y),
        false => reference::matmul(profile, x, rows, w, &mut y),
    }
    y
}

/// Odd shapes, tails of panels and pairs, one row tile and several, one block of k and several.
#[test]
fn matmul_equals_the_reference() {
    let shapes =
        [(1, 1, 1), (3, 63, 2), (2, 64, 7), (5, 65, 33), (6, 130, 16), (7, 70, 90), (13, 64, 300), (99, 66, 35)];
    for cpu in devices(2) {
        for (rows, n, k) in shapes {
            let (w, x) = (pack(&cpu, &numbers(1, n * k), n, k), numbers(2, rows * k));
            for segmented in [false, true] {
                let expected = reference_matmul(cpu.profile, &x, &w, segmented);
                let same = bits(&matmul(&cpu, &x, &w, segmented)) == bits(&expected);
                assert!(same, "{} {} {rows}x{n}x{k} segmented {segmented}", cpu.isa(), cpu.profile);
            }
        }
    }
}

/// What 2, 4 and 8 ranks compute of the columns they hold, added as a tree, is what one computes: in the reference and
/// in the fast paths, for widths that the segments do not divide.
#[test]
fn ranks_together_multiply_as_one() {
    for cpu in devices(1) {
        for (rows, n, k) in [(1, 65, 96), (3, 64, 31), (7, 66, 101), (50, 64, 176)] {
            let (values, x) = (numbers(1, n * k), numbers(2, rows * k));
            let whole = bits(&reference_matmul(cpu.profile, &x, &pack(&cpu, &values, n, k), true));
            for world in [1, 2, 4, 8] {
                let of = |rank| {
                    let segments = Segments::of(k, rank, world);
                    let columns = segments.columns(2);
                    let cut = |values: &[f32]| -> Vec<f32> {
                        values.chunks_exact(k).flat_map(|row| &row[columns.clone()]).copied().collect()
                    };
                    let (w, x) = (pack(&cpu, &cut(&values), n, columns.len()), cut(&x));
                    let (mut fast, mut plain) = (vec![f32::NAN; rows * n], vec![f32::NAN; rows * n]);
                    cpu.matmul_segments(&x, rows, &w, segments, &mut fast);
                    reference::matmul_segments(cpu.profile, &x, rows, &w, segments, &mut plain);
                    assert_eq!(bits(&fast), bits(&plain), "{} {} rank {rank} of {world}", cpu.isa(), cpu.profile);
                    fast
                };
                let mut parts: Vec<Vec<f32>> = (0..world).map(of).collect();
                while parts.len() > 1 {
                    let add = |pair: &[Vec<f32>]| pair[0].iter().zip(&pair[1]).map(|(a, b)| a + b).collect();
                    parts = parts.chunks(2).map(add).collect();
                }
                assert_eq!(bits(&parts[0]), whole, "{} {} {world} ranks", cpu.isa(), cpu.profile);
            }
        }
    }
}

/// An MLP as one operation is its operations one after another, whatever splits it: panels, pieces, segments that end within a
/// panel, ranks, threads, biases, and widths that do not fit it.
#[test]
fn an_mlp_is_its_steps() {
    for cpu in devices(2).chain(devices(1)) {
        for (rows, hidden, width) in
            [(1, 33, 64), (3, 64, 192), (7, 70, 128), (45, 20, 320), (200, 16, 192), (4, 32, 100)]
        {
            let w = pack(&cpu, &numbers(1, 2 * width * hidden), 2 * width, hidden);
            let (x, bias) = (numbers(2, rows * hidden), numbers(3, 2 * width));
            for (biased, world) in [(false, 1), (true, 1), (true, 2)] {
                let segments = Segments::of(width * world, world - 1, world);
                let down = pack(&cpu, &numbers(4, 65 * width), 65, width);
                let mut gate_up = matmul(&cpu, &x, &w, false);
                if biased {
                    reference::add_bias(&mut gate_up, &bias);
                }
                let (mut gated, mut expected) = (vec![0.0; rows * width], vec![f32::NAN; rows * 65]);
                reference::silu_mul(&gate_up, width, &mut gated);
                reference::matmul_segments(cpu.profile, &gated, rows, &down, segments, &mut expected);
                let mut y = vec![f32::NAN; rows * 65];
                let bias = biased.then_some(&bias[..]);
                cpu.mlp(&Mlp { x: &x, rows, gate_up: &w, bias, down: &down, segments }, &mut y);
                assert_eq!(bits(&y), bits(&expected), "{} {} {rows} {hidden} {width}", cpu.isa(), cpu.profile);
            }
        }
    }
}

/// The reference itself is a product: close to f64 arithmetic on rounded values.
#[test]
fn the_reference_multiplies() {
    let (rows, n, k) = (3, 70, 101);
    let cpu = Cpu::with_isa(1, Profile::F32Acc, Isa::Scalar);
    let (w, x) = (pack(&cpu, &numbers(1, n * k), n, k), numbers(2, rows * k));
    for profile in PROFILES {
        for (i, y) in reference_matmul(profile, &x, &w, true).into_iter().enumerate() {
            let product = |j: usize| bf16::rounded(x[i / n * k + j]) as f64 * w.value(i % n, j) as f64;
            let exact: f64 = (0..k).map(product).sum();
            assert!((y as f64 - exact).abs() < 1e-5, "{profile} {y} {exact}");
        }
    }
}

/// Random bit patterns, denormals and huge values included: the model of vdpbf16ps is the instruction.
#[cfg(target_arch = "x86_64")]
#[test]
fn the_model_of_vdpbf16ps_is_exact() {
    if !Isa::Avx512Bf16.supported() {
        return;
    }
    let mut rng = Rng::new(3);
    for round in 0..20_000 {
        // Exponents around a random centre, so that sums cancel, overflow and underflow.
        let centre = rng.below(255) as u32;
        let mut half = |around: u32| {
            let exponent = (around + rng.below(5) as u32).saturating_sub(2).min(254);
            (rng.u64() as u32 & 0x807f) | exponent << 7
        };
        let partner = if round % 2 == 0 { 254 - centre } else { (127 - 8u32).saturating_sub(centre / 2) };
        let w: [u32; 16] = std::array::from_fn(|_| half(centre) | half(centre) << 16);
        let x = half(partner) | half(partner) << 16;
        let sum = (centre + partner).saturating_sub(127);
        let acc: [f32; 16] = std::array::from_fn(|_| f32::from_bits(half(sum) << 16 | half(0)));
        let mut got = [0.0f32; 16];
        // SAFETY: the instructions are supported.
        unsafe { Isa::Avx512Bf16.launch(Dot16 { acc, w, x, out: &mut got }) };
        for i in 0..16 {
            let expected = reference::dot_bf16(acc[i], pair(w[i]), pair(x));
            let same = expected.to_bits() == got[i].to_bits() || expected.is_nan() && got[i].is_nan();
            assert!(
                same,
                "{:08x} + {:08x}·{x:08x} = {:08x}, model {:08x}",
                acc[i].to_bits(),
                w[i],
                got[i].to_bits(),
                expected.to_bits()
            );
        }
    }
}

fn pair(word: u32) -> [f32; 2] {
    [bf16::widen(word as u16), bf16::widen((word >> 16) as u16)]
}

struct Dot16<'a> {
    acc: [f32; 16],
    w: [u32; 16],
    x: u32,
    out: &'a mut [f32; 16],
}

impl Kernel for Dot16<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: sixteen of everything.
        unsafe {
            let sum = L::dot_bf16(L::load(self.acc.as_ptr()), self.w.as_ptr().cast(), self.x);
            L::store(self.out.as_mut_ptr(), sum);
        }
    }
}

#[test]
fn packing_joins_parts_of_any_dtype() {
    let halves: Vec<u8> = [0x3c00u16, 0xc000, 0x3800].iter().flat_map(|x| x.to_le_bytes()).collect();
    let brains: Vec<u8> = [0x3f80u16, 0xc000, 0x3f00].iter().flat_map(|x| x.to_le_bytes()).collect();
    let floats: Vec<u8> = [1.0f32, -2.0, 0.5].iter().flat_map(|x| x.to_le_bytes()).collect();
    for cpu in devices(2) {
        let part = |dtype, bytes| Matrix { dtype, bytes, rows: 1, cols: 3 };
        let w = cpu.pack(&[part(Dtype::F16, &halves), part(Dtype::Bf16, &brains), part(Dtype::F32, &floats)]);
        let mut out = vec![0.0; 9];
        cpu.embed(&w, &[2, 0, 1], &mut out);
        assert_eq!(out, [1.0, -2.0, 0.5].repeat(3));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A row's bits are the same alone and at any place in any batch.
    #[test]
    fn matmul_rows_do_not_see_their_batch(
        rows in 1usize..=64, first in 0usize..64, n in 1usize..200, k in 1usize..700, segmented: bool,
    ) {
        for profile in PROFILES.into_iter().filter(|profile| profile.supported()) {
            let cpu = device(1, profile);
            let (w, x) = (pack(&cpu, &numbers(1, n * k), n, k), numbers(2, 128 * k));
            let all = matmul(&cpu, &x, &w, segmented);
            let some = matmul(&cpu, &x[first * k..][..rows * k], &w, segmented);
            prop_assert_eq!(bits(&some), bits(&all[first * n..][..rows * n]));
        }
    }

    /// Thread counts change who computes, never what.
    #[test]
    fn thread_counts_do_not_matter(rows in 1usize..=40, n in 200usize..400, k in 100usize..400, segmented: bool) {
        for profile in PROFILES.into_iter().filter(|profile| profile.supported()) {
            let one = device(1, profile);
            let (w, x) = (pack(&one, &numbers(1, n * k), n, k), numbers(2, rows * k));
            let expected = bits(&matmul(&one, &x, &w, segmented));
            for threads in 2..=3 {
                prop_assert_eq!(&bits(&matmul(&device(threads, profile), &x, &w, segmented)), &expected);
            }
        }
    }

    /// The segmented product is the explicit tree over products of column slices, as tensor-parallel ranks compute it.
    #[test]
    fn segments_are_products_of_column_slices(rows in 1usize..20, n in 1usize..100, k in 16usize..400) {
        for profile in PROFILES.into_iter().filter(|profile| profile.supported()) {
            let cpu = device(2, profile);
            let (weights, x) = (numbers(1, n * k), numbers(2, rows * k));
            let sums: Vec<Vec<f32>> = (0..SEGMENTS).map(|index| {
                let cols = Segments::of(k, index, SEGMENTS).columns(2);
                let slice = |rows: &[f32]| rows.chunks(k).flat_map(|row| row[cols.clone()].to_vec()).collect::<Vec<f32>>();
                matmul(&cpu, &slice(&x), &pack(&cpu, &slice(&weights), n, cols.len()), false)
            }).collect();
            let tree = |i: usize| {
                let s = |index: usize| sums[index][i];
                ((s(0) + s(1)) + (s(2) + s(3))) + ((s(4) + s(5)) + (s(6) + s(7)))
            };
            let expected: Vec<f32> = (0..rows * n).map(tree).collect();
            prop_assert_eq!(bits(&matmul(&cpu, &x, &pack(&cpu, &weights, n, k), true)), bits(&expected));
        }
    }

    /// Rows of norms and activations equal the reference on every instruction set.
    #[test]
    fn rows_equal_the_reference(rows in 1usize..5, width in 1usize..200, scale in 0.01f32..100.0) {
        let x: Vec<f32> = numbers(1, rows * 2 * width).iter().map(|x| x * scale).collect();
        let (delta, weight) = (numbers(2, rows * width), numbers(3, width));
        let half = &x[..rows * width];
        for isa in isas() {
            let cpu = Cpu::with_isa(2, Profile::F32Acc, isa);
            let (mut out, mut expected) = (vec![0.0; half.len()], vec![0.0; half.len()]);
            cpu.rms_norm(half, &weight, 1e-6, &mut out);
            reference::rms_norm(half, &weight, 1e-6, &mut expected);
            prop_assert_eq!(bits(&out), bits(&expected));

            let (mut sum, mut expected_sum) = (half.to_vec(), half.to_vec());
            cpu.add_rms_norm(&mut sum, &delta, &weight, 1e-6, &mut out);
            reference::add_rms_norm(&mut expected_sum, &delta, &weight, 1e-6, &mut expected);
            prop_assert_eq!((bits(&out), bits(&sum)), (bits(&expected), bits(&expected_sum)));

            cpu.silu_mul(&x, width, &mut out);
            reference::silu_mul(&x, width, &mut expected);
            prop_assert_eq!(bits(&out), bits(&expected));

            cpu.add(&mut out, &delta);
            reference::add(&mut expected, &delta);
            cpu.add_bias(&mut out, &weight);
            reference::add_bias(&mut expected, &weight);
            prop_assert_eq!(bits(&out), bits(&expected));

            let shares: Vec<(usize, f32)> = (0..2 * rows).map(|i| (i * 7 % (2 * rows), x[i] * 0.1)).collect();
            cpu.mix_rows(&x, width, &shares, &mut out);
            reference::mix_rows(&x, width, &shares, &mut expected);
            prop_assert_eq!(bits(&out), bits(&expected));

            let ids: Vec<usize> = (0..rows).map(|row| 2 * rows - 1 - row).collect();
            cpu.gather_rows(&x, width, &ids, &mut out);
            prop_assert!(ids.iter().zip(out.chunks(width)).all(|(id, row)| bits(row) == bits(&x[id * width..][..width])));
        }
    }

    #[test]
    fn sums_over_the_vocabulary_equal_the_reference(count in 1usize..10_000, scale in 0.1f32..50.0) {
        // Few distinct values, so that ties occur.
        let row: Vec<f32> = numbers(1, count).iter().map(|x| (x * 30.0).round() * scale).collect();
        for isa in isas() {
            let cpu = Cpu::with_isa(1, Profile::F32Acc, isa);
            prop_assert_eq!(cpu.log_sum_exp(&row).to_bits(), reference::log_sum_exp(&row).to_bits());
            prop_assert_eq!(cpu.argmax(&row), reference::argmax(&row));
        }
    }
}

#[test]
fn log_sum_exp_is_close() {
    let row: Vec<f32> = numbers(1, 151_936).iter().map(|x| x * 12.0).collect();
    let exact = row.iter().map(|&x| (x as f64).exp()).sum::<f64>().ln();
    let cpu = device(1, Profile::F32Acc);
    assert!((cpu.log_sum_exp(&row) as f64 - exact).abs() < 2e-6);
}

/// Broken numbers end as broken numbers, soon.
#[test]
fn nan_and_infinity_pass_through() {
    for cpu in devices(2) {
        assert_eq!(cpu.argmax(&[f32::NAN; 100]), (0, f32::NEG_INFINITY));
        assert_eq!(cpu.argmax(&[f32::NAN, 1.0, f32::INFINITY]), (2, f32::INFINITY));
        assert!(cpu.log_sum_exp(&[1.0, f32::NAN]).is_nan());
        assert_eq!(cpu.log_sum_exp(&[f32::NEG_INFINITY; 3]), f32::NEG_INFINITY);
        let w = pack(&cpu, &[f32::NAN, 1.0], 2, 1);
        let y = matmul(&cpu, &[2.0], &w, false);
        assert!(y[0].is_nan() && y[1] == 2.0);
        let mut out = [0.0; 2];
        cpu.silu_mul(&[f32::NAN, f32::NEG_INFINITY, 1.0, 1.0], 2, &mut out);
        assert!(out[0].is_nan());
    }
}

/// A sequence in an arena, with blocks in scattered order.
struct World {
    heads: Heads,
    arena: Arena,
    rope: RopeTable,
    blocks: Vec<Vec<u32>>,
}

const LAYER: usize = 1;

impl World {
    fn new(heads: Heads, dtype: KvDtype, block_tokens: usize, sequences: usize, positions: usize) -> World {
        let layout = BlockLayout {
            layers: 2,
            kv_heads: heads.kv_heads as u32,
            head_dim: heads.head_dim as u32,
            block_tokens: block_tokens as u32,
            dtype,
        };
        let each = positions.div_ceil(block_tokens);
        let arena = Arena::new(layout, each * sequences);
        let blocks = (0..sequences).map(|s| (0..each).rev().map(|i| (i * sequences + s) as u32).collect()).collect();
        let inv_freq: Vec<f64> = (0..heads.head_dim / 2).map(|i| 1.0 / (1 + i) as f64).collect();
        World { heads, arena, rope: RopeTable::new(&inv_freq, positions), blocks }
    }

    fn span(&self, sequence: usize, row: usize, rows: usize, position: usize) -> Span<'_> {
        Span { row, rows, position, blocks: &self.blocks[sequence] }
    }

    /// Garbage everywhere, as blocks have that other sequences used.
    fn soil(&self) {
        for block in 0..self.arena.blocks() {
            // SAFETY: this test is the arena's only user.
            unsafe { self.arena.block(block as u32).write_bytes(0xff, self.arena.layout().block_bytes()) };
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let size = self.arena.layout().block_bytes();
        // SAFETY: this test is the arena's only user.
        let block = |i: usize| unsafe { std::slice::from_raw_parts(self.arena.block(i as u32), size) };
        (0..self.arena.blocks()).flat_map(|i| block(i).to_vec()).collect()
    }

    fn rope_store<'a>(&'a self, spans: &'a [Span<'a>], norm: Option<&'a [f32]>) -> RopeStore<'a> {
        let (heads, kv, rope) = (self.heads, KvHeads::default(), &self.rope);
        RopeStore { heads, kv, layer: LAYER, spans, rope, q_norm: norm, k_norm: norm, eps: 1e-6 }
    }

    fn attention<'a>(&self, spans: &'a [Span<'a>], window: Option<usize>) -> Attention<'a> {
        let scale = 1.0 / (self.heads.head_dim as f32).sqrt();
        Attention { heads: self.heads, kv: KvHeads::default(), layer: LAYER, spans, scale, window }
    }

    /// Runs qkv rows of one sequence in chunks; returns attention's output.
    fn run(&self, cpu: &Cpu, qkv: &[f32], sequence: usize, window: Option<usize>, chunks: &[usize]) -> Vec<f32> {
        let (mut position, mut outs) = (0, Vec::new());
        for &rows in chunks {
            let mut part = qkv[position * self.heads.qkv_width()..][..rows * self.heads.qkv_width()].to_vec();
            let spans = [self.span(sequence, 0, rows, position)];
            cpu.rope_store(&self.rope_store(&spans, None), &mut part, &self.arena);
            let mut out = vec![f32::NAN; rows * self.heads.width()];
            cpu.attention(&self.attention(&spans, window), &part, &self.arena, &mut out);
            outs.extend(out);
            position += rows;
        }
        outs
    }
}

const SHAPES: [Heads; 5] = [
    Heads { heads: 14, kv_heads: 2, head_dim: 64 },
    Heads { heads: 2, kv_heads: 2, head_dim: 128 },
    Heads { heads: 4, kv_heads: 1, head_dim: 80 },
    Heads { heads: 3, kv_heads: 3, head_dim: 32 },
    Heads { heads: 4, kv_heads: 2, head_dim: 18 },
];

/// Heads of any width, every KV dtype, blocks smaller and larger than 64: same bits in q, arena and output.
#[test]
fn rope_store_and_attention_equal_the_reference() {
    for (i, heads) in SHAPES.into_iter().enumerate() {
        let dtypes = [
            (KvDtype::Bf16, 16),
            (KvDtype::F32, 128),
            (KvDtype::Bf16, 24),
            (KvDtype::Int8, 16),
            (KvDtype::Int8, 24),
            (KvDtype::Fp8, 16),
            (KvDtype::Fp8, 24),
        ];
        for (dtype, block_tokens) in dtypes {
            let rows = 75;
            let world = World::new(heads, dtype, block_tokens, 1, rows);
            let (qkv, norm) = (numbers(i as u64, rows * heads.qkv_width()), numbers(9, heads.head_dim));
            let spans = [world.span(0, 0, rows, 0)];
            let store = world.rope_store(&spans, if i % 2 == 0 { Some(&norm) } else { None });
            let mut expected_qkv = qkv.clone();
            reference::rope_store(&store, &mut expected_qkv, &world.arena);
            let expected_bytes = world.bytes();
            for cpu in devices(2) {
                let window = if block_tokens == 24 { Some(20) } else { None };
                let attention = world.attention(&spans, window);
                world.soil();
                let mut q = qkv.clone();
                cpu.rope_store(&store, &mut q, &world.arena);
                let held =
                    |bytes: Vec<u8>| bytes.iter().zip(&expected_bytes).all(|(got, held)| got == held || *got == 0xff);
                assert!(held(world.bytes()), "{heads:?} {dtype:?} {}", cpu.isa());
                let q_same = q.iter().zip(&expected_qkv).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(q_same, "{heads:?} {dtype:?} {}", cpu.isa());

                let mut out = vec![f32::NAN; rows * heads.width()];
                let mut expected = out.clone();
                cpu.attention(&attention, &q, &world.arena, &mut out);
                reference::attention(cpu.profile, &attention, &q, &world.arena, &mut expected);
                let same = bits(&out) == bits(&expected);
                assert!(same, "{heads:?} {dtype:?} {block_tokens} {} {}", cpu.isa(), cpu.profile);
            }
        }
    }
}

/// The reference is attention: close to a softmax in f64 over all positions at once.
#[test]
fn the_reference_attends() {
    let heads = Heads { heads: 2, kv_heads: 1, head_dim: 16 };
    let rows = 150;
    let world = World::new(heads, KvDtype::F32, 16, 1, rows);
    let mut qkv = numbers(4, rows * heads.qkv_width());
    let spans = [world.span(0, 0, rows, 0)];
    reference::rope_store(&world.rope_store(&spans, None), &mut qkv, &world.arena);
    for (profile, window) in [(Profile::F32Acc, None), (Profile::Bf16Dp, Some(70))] {
        let attention = world.attention(&spans, window);
        let mut out = vec![0.0; rows * heads.width()];
        reference::attention(profile, &attention, &qkv, &world.arena, &mut out);
        for row in 0..rows {
            for head in 0..2 {
                let at = |row: usize, from: usize, d: usize| qkv[row * heads.qkv_width() + from + d] as f64;
                let seen = attention.first(row)..row + 1;
                let score = |j: usize| (0..16).map(|d| at(row, head * 16, d) * at(j, 32, d)).sum::<f64>() * 0.25;
                let weights: Vec<f64> = seen.clone().map(|j| score(j).exp()).collect();
                for d in 0..16 {
                    let sum: f64 = seen.clone().zip(&weights).map(|(j, w)| w * at(j, 48, d)).sum();
                    let exact = sum / weights.iter().sum::<f64>();
                    let got = out[(row * 2 + head) * 16 + d] as f64;
                    assert!((got - exact).abs() < 2e-6, "row {row} head {head} dim {d}: {got} {exact}");
                }
            }
        }
    }
}

/// Attention over 8 bits is near what it is over f32, and a number that is not finite is not lost in them.
#[test]
fn eight_bits_attend_nearly() {
    let (heads, rows) = (SHAPES[0], 300);
    let error = |found: &[f32], exact: &[f32]| {
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
        norm(&mut found.iter().zip(exact).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied())
    };
    for profile in PROFILES.into_iter().filter(|profile| profile.supported()) {
        let cpu = device(2, profile);
        let qkv = numbers(12, rows * heads.qkv_width());
        let run = |dtype, qkv: &[f32]| World::new(heads, dtype, 16, 1, rows).run(&cpu, qkv, 0, None, &[rows]);
        let exact = run(KvDtype::F32, &qkv);
        for (dtype, limit) in [(KvDtype::Bf16, 0.005), (KvDtype::Int8, 0.01), (KvDtype::Fp8, 0.04)] {
            let found = error(&run(dtype, &qkv), &exact);
            assert!(found < limit, "{dtype:?} {profile}: {found}");
        }
        for (dtype, broken) in [(KvDtype::Int8, f32::NAN), (KvDtype::Fp8, f32::INFINITY)] {
            let mut qkv = qkv.clone();
            // One element of a value of the first kv head, after the sixteen heads of q and k, at position 40.
            qkv[40 * heads.qkv_width() + 16 * heads.head_dim + 3] = broken;
            let out = run(dtype, &qkv);
            let of = |row: usize| &out[row * heads.width()..][..7 * heads.head_dim];
            assert!(of(40).iter().chain(of(299)).all(|x| x.is_nan()), "{dtype:?} {profile}");
            assert!(out[299 * heads.width() + 7 * heads.head_dim..].iter().all(|x| x.is_finite()));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// One chunk, random chunks, token by token, in any batch, on any thread count: the same bits.
    #[test]
    fn chunks_do_not_matter(
        cuts in proptest::collection::btree_set(1usize..200, 0..6), shape in 0usize..5, windowed: bool, dtype in 0usize..4,
    ) {
        let (heads, rows) = (SHAPES[shape], 200);
        let window = windowed.then_some(70);
        let qkv = numbers(5, rows * heads.qkv_width());
        let bounds: Vec<usize> = [0].into_iter().chain(cuts).chain([rows]).collect();
        let chunks: Vec<usize> = bounds.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let dtype = KvDtype::ALL[dtype];
        for profile in PROFILES.into_iter().filter(|profile| profile.supported()) {
            let world = World::new(heads, dtype, 16, 2, rows);
            let whole = bits(&world.run(&device(1, profile), &qkv, 0, window, &[rows]));
            let several = device(3, profile);
            prop_assert_eq!(&bits(&world.run(&several, &qkv, 1, window, &chunks)), &whole);
            prop_assert_eq!(&bits(&world.run(&several, &qkv, 0, window, &[1; 200])), &whole);
        }
    }
}

/// Spans of several sequences in one batch give each row what it gets alone.
#[test]
fn attention_rows_do_not_see_their_batch() {
    let (heads, rows) = (SHAPES[0], 130);
    let profiles = PROFILES.into_iter().filter(|profile| profile.supported());
    for (profile, dtype) in profiles.flat_map(|profile| KvDtype::ALL.map(|dtype| (profile, dtype))) {
        let cpu = device(2, profile);
        let world = World::new(heads, dtype, 16, 3, rows);
        let width = heads.qkv_width();
        let mut alone = Vec::new();
        let inputs: Vec<Vec<f32>> = (0..3).map(|s| numbers(s, rows * width)).collect();
        for (s, qkv) in inputs.iter().enumerate() {
            alone.push(world.run(&cpu, qkv, s, None, &[rows]));
        }
        // The last row of each sequence together, and a longer tail of the middle one.
        let tails = [1, 40, 1];
        let mut batch: Vec<f32> = Vec::new();
        let mut spans = Vec::new();
        for (s, tail) in tails.into_iter().enumerate() {
            spans.push(world.span(s, batch.len() / width, tail, rows - tail));
            batch.extend(&inputs[s][(rows - tail) * width..]);
        }
        cpu.rope_store(&world.rope_store(&spans, None), &mut batch, &world.arena);
        let mut out = vec![0.0; 42 * heads.width()];
        cpu.attention(&world.attention(&spans, None), &batch, &world.arena, &mut out);
        let expected: Vec<f32> =
            tails.iter().zip(&alone).flat_map(|(tail, out)| out[(rows - tail) * heads.width()..].to_vec()).collect();
        assert_eq!(bits(&out), bits(&expected));
    }
}

/// Ranks that each have some of the heads, and that share a kv head when there are fewer of those than ranks, leave in the
/// arena and give out what one does that has all: in the reference and in the fast paths.
#[test]
fn ranks_together_attend_as_one() {
    let (rows, whole) = (70, Heads { heads: 8, kv_heads: 2, head_dim: 32 });
    let (width, dim) = (whole.qkv_width(), whole.head_dim);
    for (index, cpu) in devices(1).enumerate() {
        let world = World::new(whole, KvDtype::ALL[index % 4], 16, 1, rows);
        let spans = [world.span(0, 0, rows, 0)];
        let qkv = numbers(6, rows * width);
        let mut all = qkv.clone();
        world.soil();
        cpu.rope_store(&world.rope_store(&spans, None), &mut all, &world.arena);
        let (bytes, mut expected) = (world.bytes(), vec![f32::NAN; rows * whole.width()]);
        cpu.attention(&world.attention(&spans, None), &all, &world.arena, &mut expected);
        for ranks in [2, 4, 8] {
            world.soil();
            let heads = Heads { heads: 8 / ranks, kv_heads: (2 / ranks).max(1), head_dim: dim };
            let kv = |rank: usize| KvHeads { first: rank * 2 / ranks, foreign: !(rank * 2).is_multiple_of(ranks) };
            let of = |rank: usize| -> Vec<f32> {
                let (q, k) = (rank * heads.heads, 8 + kv(rank).first);
                let parts = [q..q + heads.heads, k..k + heads.kv_heads, k + 2..k + 2 + heads.kv_heads];
                let row =
                    |row: &[f32]| parts.clone().map(|part| row[part.start * dim..part.end * dim].to_vec()).concat();
                qkv.chunks_exact(width).flat_map(row).collect()
            };
            let mut parts: Vec<Vec<f32>> = (0..ranks).map(of).collect();
            for (rank, part) in parts.iter_mut().enumerate() {
                cpu.rope_store(
                    &RopeStore { heads, kv: kv(rank), ..world.rope_store(&spans, None) },
                    part,
                    &world.arena,
                );
            }
            assert!(world.bytes() == bytes, "{} {ranks} ranks", cpu.isa());
            for (rank, part) in parts.iter().enumerate() {
                let a = Attention { heads, kv: kv(rank), ..world.attention(&spans, None) };
                let (mut fast, mut plain) =
                    (vec![f32::NAN; rows * heads.width()], vec![f32::NAN; rows * heads.width()]);
                cpu.attention(&a, part, &world.arena, &mut fast);
                reference::attention(cpu.profile, &a, part, &world.arena, &mut plain);
                let own = |row: &[f32]| row[rank * heads.width()..][..heads.width()].to_vec();
                let expected: Vec<f32> = expected.chunks_exact(whole.width()).flat_map(own).collect();
                assert_eq!(bits(&fast), bits(&expected), "{} rank {rank} of {ranks}", cpu.isa());
                assert_eq!(bits(&plain), bits(&expected), "{} rank {rank} of {ranks}", cpu.profile);
            }
        }
    }
}

/// Tiles are shared out in order, completely, and about evenly.
#[test]
fn tiles_are_shared_evenly() {
    let blocks: Vec<u32> = (0..64).collect();
    let spans = [
        Span { row: 0, rows: 1000, position: 0, blocks: &blocks },
        Span { row: 1000, rows: 1, position: 9, blocks: &blocks },
    ];
    let heads = Heads { heads: 14, kv_heads: 2, head_dim: 64 };
    let a = Attention { heads, kv: KvHeads::default(), layer: 0, spans: &spans, scale: 1.0, window: None };
    let tiles = attend::tiles(&a);
    for of in [1, 2, 3, 16] {
        let shares: Vec<Range<usize>> = (0..of).map(|index| attend::share(&tiles, index, of)).collect();
        assert_eq!(shares[0].start, 0);
        assert_eq!(shares[of - 1].end, tiles.len());
        assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start));
        let costs: Vec<usize> = shares.into_iter().map(|share| attend::cost(&tiles[share])).collect();
        let (least, most) = (costs.iter().min().unwrap(), costs.iter().max().unwrap());
        assert!(most - least <= 2 * 16 * 103, "{costs:?}");
    }
}
