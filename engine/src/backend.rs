//! The seam between deciding what to compute and computing it.

pub mod hash;

pub use hash::HashBackend;

use crate::batch::{Batch, Output};

/// Computes batches: a model on a device, or the hash that stands in for one in tests and simulations.
pub trait Backend: Send {
    /// Writes the KV of every row into its block and reads off the draws. Calls `layers(layer)` as soon as a layer's KV
    /// of the whole batch is in the arena, layer by layer.
    fn run(&mut self, batch: &Batch, layers: &mut dyn FnMut(usize)) -> Output;
}
