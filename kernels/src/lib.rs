//! Math on one device. `Cpu` runs every operation of a decoder-only transformer over bf16 or quantized weights and paged KV, with
//! bits that depend on nothing but a row's own values: not on the batch around it, its chunking, or the thread count.
//! `reference` defines those bits with plain loops; everything fast is tested against it. `Collective` is what the
//! ranks of a tensor-parallel group tell one another.
//!
//! `unsafe` lives in bf16.rs, collective.rs, collective/, kv.rs, limits.rs, memory.rs, packed.rs, pool.rs, cpu.rs, cpu/ and
//! cuda/.

mod attention;
mod bf16;
pub mod collective;
mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod f8;
mod kv;
pub mod limits;
mod math;
mod memory;
mod packed;
mod pool;
mod profile;
mod quant;
pub mod reference;
mod rope;
mod route;
mod segments;

pub use attention::{Attention, HEAD_DIM_MAX, Heads, KvHeads, RopeStore, Span};
pub use bf16::round_f16;
pub use collective::{Broken, Collective};
pub use cpu::{Cpu, Mlp};
pub use f8::F8Matrix;
pub use packed::file::{ALIGNMENT, Mapped};
pub use packed::pieces::Pieces;
pub use packed::{Dtype, Matrix, Packed, Quantize};
pub use profile::{Profile, Unsupported};
pub use rope::RopeTable;
pub use route::route;
pub use segments::{SEGMENTS, Segments};
