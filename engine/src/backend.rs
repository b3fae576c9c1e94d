//! The seam between deciding what to compute and computing it.

pub mod hash;

pub use hash::HashBackend;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use baton_core::arena::DeviceBlocks;
use baton_core::{Arena, BlockLayout};

use crate::batch::{Batch, Output};

/// Computes batches: a model on a device, or the hash that stands in for one in tests and simulations.
pub trait Backend: Send {
    /// Told once, before the first batch over it, of the arena whose blocks batches will name.
    fn prepare(&mut self, _arena: &Arc<Arena>) {}

    /// Whether arenas have to be memory that other processes can map, because they compute too.
    fn shares_arena(&self) -> bool {
        false
    }

    /// An arena that it can compute in.
    ///
    /// # Errors
    /// When it has to be shared memory and there is none.
    fn arena(&self, layout: BlockLayout, blocks: usize) -> io::Result<Arena> {
        if self.shares_arena() { Arena::shared(layout, blocks) } else { Ok(Arena::new(layout, blocks)) }
    }

    /// Calls `tell` when what it computes with has broken for good, also while it computes nothing; who was named before is not
    /// called any more. Steps then panic.
    fn on_broken(&mut self, _tell: Box<dyn Fn() + Send>) {}

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
