//! A backend that forgets: it zeroes one block of a sequence before decoding from it. A test that must notice a lost
//! block runs once with it, and has to fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use baton_core::arena::Half;

use crate::backend::Backend;
use crate::batch::{Batch, Output};

/// Wraps the backend of a decode worker.
pub struct ZeroBlock {
    pub backend: Box<dyn Backend>,
    /// Position in the sequence of the block to zero; the test may change it between requests.
    pub block: Arc<AtomicUsize>,
}

impl Backend for ZeroBlock {
    fn run(&mut self, batch: &Batch, layers: &mut dyn FnMut(usize)) -> Output {
        let layout = batch.arena().layout();
        let decoding = batch.spans.iter().filter(|span| span.rows == 1);
        for span in decoding {
            // Only blocks before the one being written.
            let filled = &batch.table(span)[..span.position / layout.block_tokens as usize];
            if let Some(index) = filled.get(self.block.load(Ordering::Relaxed)) {
                let block = batch.arena().block(*index);
                // SAFETY: the block starts at (head 0, layer 0, key) and has so many bytes. The sequence holds it as
                // filled, and this backend is the only one that computes on this arena.
                unsafe { block.add(layout.offset(0, 0, Half::Key)).write_bytes(0, layout.block_bytes()) };
            }
        }
        self.backend.run(batch, layers)
    }
}
