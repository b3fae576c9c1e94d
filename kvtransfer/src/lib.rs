//! Moves blocks between two caches: the handoff. The decode worker grants blocks (`Receiver`), the prefill worker
//! writes them layer by layer over a link (`Links`, `Outgoing`). Sees memory of given blocks, never a model.
//! The protocol is drawn in `docs/handoff.md`.

#![deny(unsafe_code)]

pub mod wire;

mod connection;
mod counters;
mod error;
mod extent;
mod frames;
mod grant;
mod hash;
mod link;
mod links;
mod loan;
mod outbox;
mod outgoing;
pub mod ranks;
mod receiver;
pub mod reslice;
mod sending;
#[cfg(target_os = "linux")]
mod shm;
mod sums;
mod ticket;
mod tls;
mod transfer;
mod turns;
#[cfg(target_os = "linux")]
mod ucx;

pub use counters::{Counters, Dropped, Fallback, LinkCounters, LinkKind, Untrusted};
pub use error::TransferError;
pub use extent::Data;
pub use grant::{Grant, HeadSlice};
pub use links::{Links, Preferred, Ways};
pub use outgoing::{Committed, Outgoing};
pub use receiver::{Incoming, Partial, Receiver};
pub use sums::Audited;
pub use tls::{BadTls, Tls};
pub use transfer::Received;
#[cfg(target_os = "linux")]
pub use ucx::describe as describe_ucx;
