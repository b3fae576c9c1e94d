//! The production code on a simulated network, driven by a seed. Nobody imports this crate.
#![deny(unsafe_code)]

pub mod handoff;
pub mod memory;
pub mod net;

pub use net::TurmoilNet;
