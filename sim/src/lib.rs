//! The production code on a simulated network, driven by a seed. Nobody imports this crate.

pub mod net;
