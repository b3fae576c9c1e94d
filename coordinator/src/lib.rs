//! The coordinator: a ledger of workers, requests and assignments on Raft, and the placement of requests on workers.
//! The control plane only: no tensor byte passes here, and no token.
#![forbid(unsafe_code)]

mod aside;
mod config;
mod join;
pub mod log;
mod observe;
pub mod placement;
mod raft;
mod running;
mod service;
mod services;
mod stack;
pub mod state;

pub use config::{Config, ConfigError};
pub use join::{Join, join, join_on};
pub use observe::{Durable, Group, Observed, Observer};
pub use raft::NodeError;
pub use running::{Running, StartError, Stopped, start, start_on};
