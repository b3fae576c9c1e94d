//! Turns sequences into tokens on one worker: model, cache, scheduler, sampling. Synchronous and pure but for the
//! backend: no sockets, no clock, no randomness of its own. Knows sequences that need prefill or decode, not roles.

pub mod backend;
pub mod batch;
pub mod bench;
mod beside;
pub mod cache;
mod commit;
#[cfg(feature = "cuda")]
pub mod cuda;
mod draft;
pub mod engine;
pub mod experts;
mod journal;
pub mod load;
pub mod model;
mod plan;
pub mod ranks;
pub mod sampling;
mod sequence;
pub mod shard;
pub mod spec;
pub mod testing;
pub mod work;

pub use backend::{Backend, HashBackend};
pub use batch::{Batch, Draw, DrawKind, Export, Next, Output};
pub use beside::PromptsBeside;
pub use cache::{Blocks, Cache, CacheStats, Hits, Reserved, Saving};
pub use engine::Engine;
pub use journal::{Changes, Mark};
pub use load::{LoadOptions, Loaded, Phase, Progress, error::LoadError, load, load_apart, load_kept, load_ranks};
pub use model::CpuModel;
pub use ranks::process::RankOptions;
pub use spec::{EngineConfig, ModelSpec};
pub use work::{Choice, Event, Filled, Goal, Load, Usage, Work};
