//! The engine's bigger tests: the scheduler over a backend without a model, and models over random weights.

mod anywhere;
mod apart;
mod bad_models;
mod cache;
mod common;
mod eights;
mod gguf;
#[cfg(feature = "cuda")]
mod gpu;
mod integers;
mod kept;
mod kv_dtypes;
mod models;
mod quantized;
mod references;
mod scheduler;
mod tensor_parallel;
