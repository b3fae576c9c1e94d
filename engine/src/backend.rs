//! The seam between deciding what to compute and computing it.

pub mod hash;

pub use hash::HashBackend;

use std::sync::Arc;
use std::time::Duration;

use baton_core::Arena;
use baton_core::arena::DeviceBlocks;

use crate::batch::{Batch, Output};

/// Computes batches: a model on a device, or the hash that stands in for one in tests and simulations.
pub trait Backend: Send {
    /// Told once, before the first batch over it, of the arena whose blocks batches will name.
    fn prepare(&mut self, _arena: &Arc<Arena>) {}

    /// The blocks of the arena it was prepared for in the memory of its device, which links may read and write instead of the
    /// arena's. What lands there counts as brought by `Batch::arrived` and is not in the arena.
    fn device(&self) -> Option<Arc<dyn DeviceBlocks>> {
        None
    }

    /// Writes the KV of every row into its block and reads off the draws. Calls `layers(layer)` as soon as a layer's KV
    /// of the whole batch is in the arena, layer by layer.
    fn run(&mut self, batch: &Batch, layers: &mut dyn FnMut(usize)) -> Output;

    /// Whether everything `run` computes is in the arena when it returns. A device with memory of its own brings there
    /// only what a batch exports.
    fn fills_arena(&self) -> bool {
        true
    }

    /// None: `run` blocks, and its worker gives it a thread. Some: its worker runs it inline, once so much time has
    /// passed; a step of `rows` rows takes that long where time is simulated.
    fn inline_delay(&self, _rows: usize) -> Option<Duration> {
        None
    }
}
