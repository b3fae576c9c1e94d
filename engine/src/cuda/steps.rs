//! Steps that decode one row per sequence take the same launches as the step before, over memory that lies where it lay: they are
//! recorded and given as a whole. A recording is kept per shape of a step, which says everything that a launch depends on.

use baton_kernels::cuda::{Gpu, GpuError, Recorded};

/// Rows at most: with more, kernels take so long that the time between them does not show.
pub(super) const ROWS_MAX: usize = 64;
/// Shapes known at a time; a recording of a large model takes some 100 KB.
const SHAPES_MAX: usize = 64;

#[derive(Default)]
pub(super) struct Steps {
    /// The one used last comes last.
    known: Vec<Known>,
}

struct Known {
    shape: Vec<u64>,
    /// None: seen once.
    recorded: Option<Recorded>,
}

impl Steps {
    /// Runs a step by what is recorded for its shape, and records it when the shape is seen for the second time.
    ///
    /// # Safety
    /// `give` gives the same launches whenever the shape is the same.
    pub(super) unsafe fn run(
        &mut self,
        gpu: &Gpu,
        shape: Vec<u64>,
        give: impl FnOnce() -> Result<(), GpuError>,
    ) -> Result<(), GpuError> {
        let found = self.known.iter().position(|known| known.shape == shape);
        let recorded = match found.map(|index| self.known.remove(index).recorded) {
            None => {
                give()?;
                None
            }
            Some(None) => Some(gpu.record(give)?),
            Some(Some(recorded)) => {
                // SAFETY: the caller's: `give` would give these launches.
                unsafe { gpu.replay(&recorded)? };
                Some(recorded)
            }
        };
        if self.known.len() == SHAPES_MAX {
            self.known.remove(0);
        }
        self.known.push(Known { shape, recorded });
        Ok(())
    }
}
