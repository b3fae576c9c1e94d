//! The two sets of CPU arithmetic. A worker's profile is part of its numerics class.

use std::fmt;

/// How products are summed in a matmul; everything else is the same f32 arithmetic in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// One chain of f32 fused multiply-adds per output, over bf16 values: the same bits on every CPU.
    F32Acc,
    /// One chain of `vdpbf16ps` per output: the same bits on every CPU with AVX512-BF16.
    Bf16Dp,
}

impl Profile {
    /// The fastest profile on this kind of machine. Intel's `vdpbf16ps` runs at half the rate of its f32 multiply-adds
    /// (measured on Emerald Rapids: 89 against 179 GFLOP/s), AMD's at twice the rate.
    pub fn best() -> Profile {
        if bf16dp_supported() && made_by_amd() { Profile::Bf16Dp } else { Profile::F32Acc }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Profile::F32Acc => "f32acc",
            Profile::Bf16Dp => "bf16dp",
        }
    }

    pub(crate) fn supported(self) -> bool {
        self == Profile::F32Acc || bf16dp_supported()
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(target_arch = "x86_64")]
fn bf16dp_supported() -> bool {
    is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw")
}

#[cfg(target_arch = "x86_64")]
fn made_by_amd() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat() == *b"AuthenticAMD"
}

#[cfg(not(target_arch = "x86_64"))]
fn bf16dp_supported() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn made_by_amd() -> bool {
    false
}

/// The machine cannot run the profile; `f32acc` runs everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this CPU cannot run profile {0} (it needs AVX512-BF16); use f32acc")]
pub struct Unsupported(pub Profile);
