//! NVIDIA GPUs: kernels in CUDA C++ (src/), compiled at start, and the operations over them. Building needs no CUDA; running
//! needs the driver, and NVRTC unless the kernels are on disk. Nothing else in the workspace knows cudarc.
//!
//! `unsafe` lives in this folder: calls of the driver, and launches, whose operations check what their kernels touch.

pub mod check;
mod check_experts;
mod check_links;
mod compile;
mod draws;
mod driver;
mod eights;
mod emulated;
mod error;
mod experts;
mod gpu;
mod launch;
pub mod measure;
mod memory;
mod nvidia;
mod recorded;
mod shared;
mod spans;

pub use compile::{Cubins, compiler, source_hash};
pub use draws::{GpuDraw, GpuDrawKind, GpuDraws, GpuNext};
pub use error::GpuError;
pub use experts::GpuShares;
pub use gpu::{Gpu, GpuArena, PinnedArena, check_heads};
pub use launch::{EXPERTS_MAX, HEAD_DIMS};
pub use memory::{Floats, GpuMatrix, Rows};
pub use nvidia::{GpuFound, driver_version, gpus};
pub use recorded::Recorded;
pub use spans::{GpuAttention, GpuRope, GpuSpans};
