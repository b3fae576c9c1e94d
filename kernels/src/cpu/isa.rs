//! Which instruction set kernels run compiled for, chosen once from what the machine has.

use super::lanes::{Kernel, Scalar};
#[cfg(target_arch = "x86_64")]
use super::x86;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    Scalar,
    Avx2,
    Avx512,
    Avx512Vnni,
    Avx512Bf16,
}

impl Isa {
    pub(crate) const ALL: [Isa; 5] = [Isa::Avx512Bf16, Isa::Avx512Vnni, Isa::Avx512, Isa::Avx2, Isa::Scalar];

    pub(crate) fn best() -> Isa {
        Isa::ALL.into_iter().find(|isa| isa.supported()).unwrap_or(Isa::Scalar)
    }

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512f",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Avx512Bf16 => "avx512bf16",
        }
    }

    #[cfg(target_arch = "x86_64")]
    pub(crate) fn supported(self) -> bool {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("f16c");
        let avx512 = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match self {
            Isa::Scalar => true,
            Isa::Avx2 => avx2,
            Isa::Avx512 => avx512,
            Isa::Avx512Vnni => avx512 && is_x86_feature_detected!("avx512vnni"),
            Isa::Avx512Bf16 => Isa::Avx512Vnni.supported() && is_x86_feature_detected!("avx512bf16"),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn supported(self) -> bool {
        self == Isa::Scalar
    }

    /// Runs a kernel compiled for this instruction set.
    ///
    /// # Safety
    /// The machine supports it, and the kernel's pointers are valid.
    #[cfg(target_arch = "x86_64")]
    pub(crate) unsafe fn launch<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Isa::Scalar => kernel.run::<Scalar>(),
                Isa::Avx2 => x86::launch_avx2(kernel),
                Isa::Avx512 => x86::launch_avx512(kernel),
                Isa::Avx512Vnni => x86::launch_avx512vnni(kernel),
                Isa::Avx512Bf16 => x86::launch_avx512bf16(kernel),
            }
        }
    }

    /// Runs a kernel; every machine can run the scalar one.
    ///
    /// # Safety
    /// The kernel's pointers are valid.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) unsafe fn launch<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the caller's.
        unsafe { kernel.run::<Scalar>() }
    }
}
