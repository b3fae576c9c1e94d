//! Quantized weights: the same promises as for bf16, for every format.

use super::*;

const DTYPES: [Dtype; 8] =
    [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1, Dtype::Q4K, Dtype::Q5K, Dtype::Q6K];

/// Random units whose scales are small numbers.
fn units(dtype: Dtype, seed: u64, rows: usize, cols: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let scales: &[usize] = match dtype {
        Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4K | Dtype::Q5K => &[1, 3],
        Dtype::Q6K => &[209],
        _ => &[1],
    };
    let mut bytes: Vec<u8> = (0..rows * dtype.row_bytes(cols).unwrap()).map(|_| rng.u64() as u8).collect();
    for unit in bytes.chunks_exact_mut(dtype.unit_bytes()) {
        scales.iter().for_each(|&high| unit[high] = unit[high] & 0x83 | 0x1c);
    }
    bytes
}

fn random(cpu: &Cpu, dtype: Dtype, rows: usize, cols: usize) -> Packed {
    let bytes = units(dtype, 1, rows, cols);
    cpu.pack(&[Matrix { dtype, bytes: &bytes, rows, cols }])
}

/// Whole units of any format.
fn width(dtype: Dtype, units: usize) -> usize {
    if dtype.unit() == 256 { units.div_ceil(3) * 256 } else { units * dtype.unit() }
}

#[test]
fn quantized_matmul_equals_the_reference() {
    let shapes = [(1, 1, 1), (3, 63, 2), (2, 64, 7), (5, 65, 3), (6, 130, 1), (7, 70, 17), (13, 64, 10), (50, 66, 3)];
    for cpu in devices(2).filter(|cpu| cpu.profile == Profile::F32Acc) {
        for dtype in DTYPES {
            for (rows, n, units) in shapes {
                let k = width(dtype, units);
                let (w, x) = (random(&cpu, dtype, n, k), numbers(2, rows * k));
                for segmented in [false, true] {
                    let expected = reference_matmul(cpu.profile, &x, &w, segmented);
                    let same = bits(&matmul(&cpu, &x, &w, segmented)) == bits(&expected);
                    assert!(same, "{} {dtype:?} {rows}x{n}x{k} segmented {segmented}", cpu.isa());
                }
            }
        }
    }
}

/// Extreme integers: no sum of products overflows or saturates on any instruction set.
#[test]
fn extreme_integers_are_exact() {
    let (n, k) = (64, 256);
    for cpu in devices(1).filter(|cpu| cpu.profile == Profile::F32Acc) {
        for dtype in DTYPES {
            for fill in [0x00u8, 0x7f, 0x80, 0xff] {
                let mut bytes = units(dtype, 1, n, k);
                let scales: Vec<u8> = bytes.clone();
                bytes.fill(fill);
                for (to, from) in bytes.chunks_exact_mut(dtype.unit_bytes()).zip(scales.chunks(dtype.unit_bytes())) {
                    match dtype {
                        Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4K | Dtype::Q5K => to[..4].copy_from_slice(&from[..4]),
                        Dtype::Q6K => to[208..].copy_from_slice(&from[208..]),
                        _ => to[..2].copy_from_slice(&from[..2]),
                    }
                }
                let w = cpu.pack(&[Matrix { dtype, bytes: &bytes, rows: n, cols: k }]);
                for sign in [1.0, -1.0] {
                    let x = vec![sign; k];
                    let expected = reference_matmul(cpu.profile, &x, &w, false);
                    assert_eq!(bits(&matmul(&cpu, &x, &w, false)), bits(&expected), "{} {dtype:?} {fill}", cpu.isa());
                }
            }
        }
    }
}

/// The reference is a product: close to f64 arithmetic on the values of the weights.
#[test]
fn the_quantized_reference_multiplies() {
    let cpu = Cpu::with_isa(1, Profile::F32Acc, Isa::Scalar);
    for dtype in DTYPES {
        let (rows, n, k) = (2, 70, 512);
        let (w, x) = (random(&cpu, dtype, n, k), numbers(2, rows * k));
        for (i, y) in reference_matmul(Profile::F32Acc, &x, &w, true).into_iter().enumerate() {
            let products = (0..k).map(|j| x[i / n * k + j] as f64 * w.value(i % n, j) as f64);
            let size: f64 = products.clone().map(f64::abs).sum();
            let exact: f64 = products.sum();
            assert!((y as f64 - exact).abs() < 4e-3 * size, "{dtype:?} {y} {exact} of {size}");
        }
    }
}

/// Parts of several formats, one below the other, are what each is alone, and what their rows look up.
#[test]
fn formats_mix() {
    let (k, rows) = (256, 9);
    let x = numbers(2, rows * k);
    let floats: Vec<u8> = numbers(3, 70 * k).iter().flat_map(|x| x.to_le_bytes()).collect();
    let (four, six) = (units(Dtype::Q4K, 1, 65, k), units(Dtype::Q6K, 2, 30, k));
    for cpu in devices(2) {
        let parts = [
            Matrix { dtype: Dtype::Q4K, bytes: &four, rows: 65, cols: k },
            Matrix { dtype: Dtype::F32, bytes: &floats, rows: 70, cols: k },
            Matrix { dtype: Dtype::Q6K, bytes: &six, rows: 30, cols: k },
        ];
        let w = cpu.pack(&parts);
        let all = matmul(&cpu, &x, &w, true);
        assert_eq!(bits(&all), bits(&reference_matmul(cpu.profile, &x, &w, true)));
        let mut first = 0;
        for part in parts {
            let alone = cpu.pack(&[part]);
            let y = matmul(&cpu, &x, &alone, true);
            for row in 0..rows {
                let found = &all[row * w.rows() + first..][..part.rows];
                assert_eq!(bits(found), bits(&y[row * part.rows..][..part.rows]));
            }
            let (mut a, mut b) = (vec![0.0; k], vec![1.0; k]);
            cpu.embed(&w, &[(first + part.rows - 1) as u32], &mut a);
            reference::embed(&alone, &[part.rows as u32 - 1], &mut b);
            assert_eq!(bits(&a), bits(&b));
            first += part.rows;
        }
    }
}

/// What 2, 4 and 8 ranks compute of the columns they hold, in whole units, added as a tree, is what one computes.
#[test]
fn ranks_multiply_quantized_weights_as_one() {
    for cpu in devices(1).filter(|cpu| cpu.profile == Profile::F32Acc) {
        for (dtype, k) in DTYPES.map(|dtype| (dtype, 2048)).into_iter().chain([(Dtype::Q8_0, 352), (Dtype::Q4_0, 992)])
        {
            let (n, rows) = (66, 7);
            let (file, x) = (units(dtype, 1, n, k), numbers(2, rows * k));
            let whole = bits(&reference_matmul(cpu.profile, &x, &random(&cpu, dtype, n, k), true));
            for world in [1, 2, 4, 8] {
                let of = |rank| {
                    let segments = Segments::of(k, rank, world);
                    let columns = segments.columns(dtype.step(None));
                    let bytes = |cols: usize| dtype.row_bytes(cols).expect("whole units");
                    let cut = |row: &[u8]| row[bytes(columns.start)..bytes(columns.end)].to_vec();
                    let part: Vec<u8> = file.chunks_exact(bytes(k)).flat_map(cut).collect();
                    let w = cpu.pack(&[Matrix { dtype, bytes: &part, rows: n, cols: columns.len() }]);
                    let x: Vec<f32> = x.chunks_exact(k).flat_map(|row| &row[columns.clone()]).copied().collect();
                    let mut y = vec![f32::NAN; rows * n];
                    cpu.matmul_segments(&x, rows, &w, segments, &mut y);
                    y
                };
                let mut parts: Vec<Vec<f32>> = (0..world).map(of).collect();
                while parts.len() > 1 {
                    let add = |pair: &[Vec<f32>]| pair[0].iter().zip(&pair[1]).map(|(a, b)| a + b).collect();
                    parts = parts.chunks(2).map(add).collect();
                }
                assert_eq!(bits(&parts[0]), whole, "{} {dtype:?} {k} {world} ranks", cpu.isa());
            }
        }
    }
}

/// Weights quantized as they are packed are those of a file quantized before; rows that are no whole blocks are padded.
#[test]
fn quantizing_at_load_equals_a_quantized_file() {
    let cpu = device(2, Profile::F32Acc);
    for (quantize, dtype) in [(Quantize::Q8_0, Dtype::Q8_0), (Quantize::Q4_0, Dtype::Q4_0)] {
        for (n, k) in [(3, 64), (70, 96), (64, 80), (5, 7)] {
            let values = numbers(4, n * k);
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            let w = cpu.pack_as(&[Matrix { dtype: Dtype::F32, bytes: &bytes, rows: n, cols: k }], Some(quantize));
            for (i, x) in values.iter().enumerate() {
                let limit = if quantize == Quantize::Q8_0 { 0.005 } else { 0.13 };
                assert!((w.value(i / k, i % k) - x).abs() < limit);
            }
            let x = numbers(5, 3 * k);
            assert_eq!(bits(&matmul(&cpu, &x, &w, true)), bits(&reference_matmul(cpu.profile, &x, &w, true)));
            if k % 32 != 0 {
                continue;
            }
            let file: Vec<u8> = values.chunks(32).flat_map(|values| unit(dtype, values)).collect();
            let from_file = cpu.pack(&[Matrix { dtype, bytes: &file, rows: n, cols: k }]);
            assert_eq!(bits(&matmul(&cpu, &x, &w, false)), bits(&matmul(&cpu, &x, &from_file, false)));
        }
    }
}

/// A unit as GGUF stores it.
fn unit(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::Q8_0 => {
            let block = crate::quant::to_q8_0(values);
            block.head.into_iter().take(2).chain(block.words.map(|byte| byte ^ 0x80)).collect()
        }
        _ => {
            let block = crate::quant::to_q4_0(values);
            block.head.into_iter().take(2).chain(block.words[..16].iter().copied()).collect()
        }
    }
}

/// Broken numbers end as broken numbers.
#[test]
fn nan_passes_through_quantized_weights() {
    for cpu in devices(1) {
        let w = random(&cpu, Dtype::Q8_0, 3, 64);
        let mut x = numbers(1, 128);
        x[5] = f32::NAN;
        let y = matmul(&cpu, &x, &w, false);
        assert!(y[..3].iter().all(|y| y.is_nan()) && y[3..].iter().all(|y| y.is_finite()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A row's bits are the same alone and at any place in any batch.
    #[test]
    fn quantized_rows_do_not_see_their_batch(
        rows in 1usize..=64, first in 0usize..64, n in 1usize..200, units in 1usize..24, dtype in 0usize..4, segmented: bool,
    ) {
        let (dtype, cpu) = (DTYPES[dtype], device(1, Profile::F32Acc));
        let k = width(dtype, units);
        let (w, x) = (random(&cpu, dtype, n, k), numbers(2, 128 * k));
        let all = matmul(&cpu, &x, &w, segmented);
        let some = matmul(&cpu, &x[first * k..][..rows * k], &w, segmented);
        prop_assert_eq!(bits(&some), bits(&all[first * n..][..rows * n]));
    }

    /// Thread counts change who computes, never what.
    #[test]
    fn thread_counts_do_not_matter_to_quantized_weights(
        rows in 1usize..=40, n in 200usize..400, units in 3usize..12, dtype in 0usize..4, segmented: bool,
    ) {
        let (dtype, one) = (DTYPES[dtype], device(1, Profile::F32Acc));
        let k = width(dtype, units);
        let (w, x) = (random(&one, dtype, n, k), numbers(2, rows * k));
        let expected = bits(&matmul(&one, &x, &w, segmented));
        for threads in 2..=3 {
            prop_assert_eq!(&bits(&matmul(&device(threads, Profile::F32Acc), &x, &w, segmented)), &expected);
        }
    }
}
