//! The CUDA kernels without a GPU: the same sources, launched by the same code, on an emulation that this machine's C++
//! compiler builds. Every kernel against the CPU's reference, and equal bits for a row whatever is beside it.

use std::path::Path;

use baton_kernels::cuda::check::{Extent, all};
use baton_kernels::cuda::{Cubins, Gpu, GpuError};

fn emulated() -> Gpu {
    Gpu::emulated(Path::new(env!("CARGO_TARGET_TMPDIR"))).expect("a C++ compiler builds the emulation")
}

#[test]
fn every_kernel_agrees_with_the_reference() {
    let gpu = emulated();
    for seed in [1, 20_261_127] {
        let found = all(&gpu, Extent::Small, seed).expect("the emulation runs");
        let wrong: Vec<_> = found.iter().filter(|check| !check.ok).collect();
        assert!(wrong.is_empty(), "seed {seed}: {wrong:#?}");
        assert!(found.len() >= 57, "{} checks", found.len());
    }
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
