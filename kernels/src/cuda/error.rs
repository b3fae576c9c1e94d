//! Why a GPU cannot be used, and what to do about it.

/// What stands between this process and a GPU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GpuError {
    #[error(
        "no NVIDIA driver: libcuda.so.1 cannot be loaded; install the driver (in a container, start it with the \
         NVIDIA runtime), or compute on the CPU with --device cpu"
    )]
    NoDriver,
    #[error("the NVIDIA driver does not start: {0}; see `nvidia-smi`, or compute on the CPU with --device cpu")]
    DriverFails(String),
    #[error("the NVIDIA driver supports CUDA {found} and CUDA {least} is needed; install driver 525 or newer")]
    DriverTooOld { found: String, least: String },
    #[error("there is no GPU {index}: this machine shows {count} (see `nvidia-smi` and CUDA_VISIBLE_DEVICES)")]
    NoGpu { index: usize, count: usize },
    #[error(
        "{name} has compute capability {found} and {least} is needed (Ampere or newer); compute on the CPU with --device cpu"
    )]
    GpuTooOld { name: String, found: String, least: String },
    #[error(
        "{name} gives a thread block {found} bytes of shared memory and kernel {kernel} needs {needed}; \
         compute on the CPU with --device cpu"
    )]
    SharedMemory { name: String, kernel: &'static str, found: usize, needed: usize },
    #[error(
        "the kernels are not compiled for {arch} and NVRTC cannot be loaded; install CUDA's NVRTC (the package \
         nvidia-cuda-nvrtc of PyPI is enough) and name its folder in LD_LIBRARY_PATH, or put a cubin of this version \
         into {folder}"
    )]
    NoCompiler { arch: String, folder: String },
    #[error("NVRTC {version} does not compile the kernels for {arch}: {log}; a newer NVRTC may")]
    Compile { arch: String, version: String, log: String },
    #[error(
        "the GPU has {free} bytes of memory free and {asked} more are needed; choose a smaller model or fewer KV blocks"
    )]
    Memory { asked: usize, free: usize },
    #[error("head_dim is {found}; the GPU's attention has kernels for {}", supported.map(|dim| dim.to_string()).join(", "))]
    HeadDim { found: usize, supported: [usize; 5] },
    #[error("{call}: {what}")]
    Call { call: &'static str, what: String },
    #[error("the emulated kernels cannot be loaded: {0}")]
    Emulation(String),
}
