//! The OpenAI-compatible gateway: HTTP in front, coordinators and workers behind. The only crate that knows OpenAI's
//! JSON, tokenizers and chat templates, and the only place that retries a request. It never touches a KV block.
#![forbid(unsafe_code)]

mod access;
mod answer;
mod assign;
mod cluster;
mod config;
mod coordinators;
mod error;
mod failure;
mod finish;
mod generate;
mod http;
mod link;
mod measure;
mod membership;
mod model;
mod note;
mod openai;
mod prompt;
mod resume;
mod running;
mod serve;
mod server;
mod shed;
mod text;

pub use config::Config;
pub use measure::BUCKETS;
pub use running::{Failed, RenderMetrics, Running, StartError, start};
