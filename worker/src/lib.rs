//! What both kinds of worker share: the engine thread, registration, heartbeats, the lease check, drain, metrics. Knows
//! neither handoffs nor streams; those are the roles'.
#![forbid(unsafe_code)]

mod canary;
pub mod card;
mod channels;
pub mod grant;
pub mod metrics;
pub mod outlet;
pub mod testing;

mod assigned;
mod audit;
mod config;
mod engine;
mod error;
mod inbox;
mod index;
mod lease;
mod membership;
mod pace;
mod peers;
mod pulse;
mod running;
mod shell;
mod standing;
mod steps;
mod tiers;
mod units;
mod worth;

pub use assigned::Assigned;
pub use canary::CanaryError;
pub use card::{CardError, LoadedModel};
pub use channels::Channels;
pub use config::{Config, KvLink, TlsFiles};
pub use engine::{Admission, EngineHandle, Submission};
pub use error::{Error, StartError};
pub use peers::count_move;
pub use running::{Left, Running};
pub use shell::{Joined, Lease, Opened, Shell, open};
pub use standing::Ending;
pub use units::Units;
