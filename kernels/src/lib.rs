//! Math on one device. `Cpu` runs every operation of a decoder-only transformer over bf16 weights and paged KV, with
//! bits that depend on nothing but a row's own values: not on the batch around it, its chunking, or the thread count.
//! `reference` defines those bits with plain loops; everything fast is tested against it.
//!
//! `unsafe` lives in bf16.rs, kv.rs, limits.rs, memory.rs, packed.rs, pool.rs, cpu.rs, cpu/ and cuda/.

mod attention;
mod bf16;
mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod kv;
pub mod limits;
mod math;
mod memory;
mod packed;
mod pool;
mod profile;
pub mod reference;
mod rope;

pub use attention::{Attention, Heads, RopeStore, Span};
pub use cpu::Cpu;
pub use packed::{Dtype, Matrix, Packed};
pub use profile::{Profile, Unsupported};
pub use rope::RopeTable;
