//! Why a model cannot be loaded: always which file, which tensor or key, and what was expected instead.

use std::path::PathBuf;

/// A model directory that cannot be served, and why.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{}: cannot be read: {error}; a model directory holds config.json and model.safetensors (or \
             model.safetensors.index.json and its shards)", file.display())]
    Unreadable { file: PathBuf, error: std::io::Error },
    #[error("{}: not the JSON expected: {error}", file.display())]
    Json { file: PathBuf, error: serde_json::Error },
    #[error("{}: architecture {found:?} is not supported; supported are {}", file.display(), supported.join(", "))]
    Architecture { file: PathBuf, found: String, supported: &'static [&'static str] },
    #[error("{}: {key} is {found}; expected {expected}", file.display())]
    Config { file: PathBuf, key: &'static str, found: String, expected: String },
    #[error("{}: rope scaling {found:?} is not supported; supported are default, linear, llama3", file.display())]
    RopeScaling { file: PathBuf, found: String },
    #[error("{}: tensor {tensor} is missing; expected one of shape {expected:?}", file.display())]
    MissingTensor { file: PathBuf, tensor: String, expected: Vec<usize> },
    #[error("{}: tensor {tensor} has shape {found:?}; expected {expected:?} by config.json", file.display())]
    Shape { file: PathBuf, tensor: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("{}: tensor {tensor} holds {found}; expected F32, F16 or BF16, in a matrix F8_E4M3 or I8 with scales, or in one of a GGUF file Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K", file.display())]
    Dtype { file: PathBuf, tensor: String, found: String },
    #[error("{}: tensor {tensor} holds {value} at element {index}; expected finite numbers", file.display())]
    NotFinite { file: PathBuf, tensor: String, index: usize, value: f32 },
    #[error("{}: tensor {tensor} holds the scale {value} at element {index}; expected numbers from 0 to less than {bound}", file.display())]
    Scale { file: PathBuf, tensor: String, index: usize, value: f32, bound: f32 },
    #[error("{}: tensor {tensor} of 8-bit integers has {reason}", file.display())]
    Integers { file: PathBuf, tensor: String, reason: String },
    #[error("{}: {what} is not in it as this model has it; remove the file", file.display())]
    Kept { file: PathBuf, what: String },
    #[error("{}: cannot be written: {error}", file.display())]
    Keep { file: PathBuf, error: std::io::Error },
    #[error("{}: truncated or overlong: {found} bytes; its header describes {expected}; copy the file again", file.display())]
    Truncated { file: PathBuf, found: u64, expected: u64 },
    #[error("{}: not a safetensors header: {reason}", file.display())]
    Header { file: PathBuf, reason: String },
    #[error("{}: {what}: {reason}", file.display())]
    Gguf { file: PathBuf, what: String, reason: String },
    #[error("{}: tensor {tensor} is mapped to {found:?}; expected the name of a file in the same directory", file.display())]
    Shard { file: PathBuf, tensor: String, found: String },
    #[error("{ranks} tensor-parallel ranks cannot share this model: {reason}; choose another --tp")]
    Ranks { ranks: usize, reason: String },
    #[error("the threads of {0} ranks cannot be started: {1}")]
    Threads(usize, std::io::Error),
    #[error("the memory that ranks meet in cannot be had: {0}")]
    Meeting(std::io::Error),
    #[error("the process of rank {rank} cannot be started: {reason}")]
    Rank { rank: usize, reason: String },
    #[error("this machine cannot run the kernel profile asked for: {0}")]
    Profile(String),
    #[error("keys of {found} elements cannot be kept in int8, only of up to {most}; choose another --kv-dtype")]
    TooWide { found: usize, most: usize },
    #[error("{0}")]
    Device(String),
}
