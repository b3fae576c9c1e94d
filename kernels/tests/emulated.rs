//! The CUDA kernels without a GPU: the same sources, launched by the same code, on an emulation that this machine's C++
//! compiler builds. Every kernel against the CPU's reference, and equal bits for a row whatever is beside it.

use std::path::Path;

use baton_kernels::cuda::check::{Extent, all};
use baton_kernels::cuda::{Cubins, Gpu, GpuError};
use baton_kernels::{Dtype, Matrix};

fn emulated() -> Gpu {
    Gpu::emulated(Path::new(env!("CARGO_TARGET_TMPDIR"))).expect("a C++ compiler builds the emulation")
}

fn check(seed: u64) {
    let found = all(&emulated(), Extent::Small, seed).expect("the emulation runs");
    let wrong: Vec<_> = found.iter().filter(|check| !check.ok).collect();
    assert!(wrong.is_empty(), "seed {seed}: {wrong:#?}");
    assert!(found.len() >= 100, "{} checks", found.len());
}

#[test]
fn every_kernel_agrees_with_the_reference() {
    check(1);
}

/// At the same time as the other, since it takes its time.
#[test]
fn every_kernel_agrees_with_the_reference_on_other_numbers() {
    check(20_261_127);
}

/// Recorded launches read memory as it is when they are given again, and write where they wrote.
#[test]
fn what_is_recorded_computes_with_what_lies_there_later() {
    let gpu = emulated();
    let bytes: Vec<u8> = (0..64 * 64u32).flat_map(|i| ((i % 7) as f32 - 3.0).to_le_bytes()).collect();
    let w = gpu.matrix(&[Matrix { dtype: Dtype::F32, bytes: &bytes, rows: 64, cols: 64 }]).unwrap();
    let (weight, mut x) = (gpu.floats_of(&[1.0; 64]).unwrap(), gpu.floats_of(&[0.5; 64]).unwrap());
    let (mut normed, mut y) = (gpu.rows(1, 64).unwrap(), gpu.floats(64).unwrap());
    let mut other = gpu.floats_of(&(0..64).map(|i| i as f32).collect::<Vec<f32>>()).unwrap();
    let mut step = |x: &mut _, y: &mut _| {
        gpu.add_rms_norm(x, None, &weight, 1, 1e-5, &mut normed)?;
        gpu.matmul(&normed, 0..1, &w, None, y)
    };
    let mut expected = gpu.floats(64).unwrap();
    step(&mut other, &mut expected).unwrap();
    let recorded = gpu.record(|| step(&mut x, &mut y)).unwrap();
    let before = y.read(64).unwrap();
    // The same memory with other values: they are added to what lies there.
    let delta = gpu.floats_of(&(0..64).map(|i| i as f32 - 0.5).collect::<Vec<f32>>()).unwrap();
    let mut unused = gpu.rows(1, 64).unwrap();
    gpu.add_rms_norm(&mut x, Some(&delta), &weight, 1, 1e-5, &mut unused).unwrap();
    // SAFETY: everything that `step` was given is still there.
    unsafe { gpu.replay(&recorded) }.unwrap();
    assert_ne!(y.read(64).unwrap(), before);
    assert_eq!(y.read(64).unwrap(), expected.read(64).unwrap());
}

/// Where there is no GPU, opening one says so and what to do; nothing panics.
#[test]
fn a_gpu_that_is_not_there_is_an_error_with_advice() {
    let cubins = Cubins::new(Path::new(env!("CARGO_TARGET_TMPDIR")).join("cubins"));
    let error = Gpu::open(63, &cubins).err().expect("no machine has 64 GPUs");
    let advised = matches!(error, GpuError::NoDriver | GpuError::DriverFails(_) | GpuError::NoGpu { .. });
    assert!(advised, "{error}");
    assert!(!error.to_string().is_empty());
}
