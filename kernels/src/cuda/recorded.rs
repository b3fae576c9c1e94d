//! Launches that are given again and again with the same arguments: recorded once while they run, then given as a whole, as one
//! graph where the driver has such a thing. What their kernels read may change in between, where it lies may not.

use std::ffi::c_void;
use std::sync::{Arc, PoisonError};

use super::driver::{Driver, Kernel};
use super::error::GpuError;
use super::gpu::Gpu;
use super::launch::Argument;

/// One launch and copies of its arguments.
pub(crate) struct Launched {
    pub(crate) kernel: Kernel,
    pub(crate) grid: [u32; 3],
    /// Each in words that are aligned for every type of argument that the host itself reads.
    arguments: Vec<Vec<u128>>,
}

impl Launched {
    pub(crate) fn new(kernel: Kernel, grid: [u32; 3], arguments: &[&dyn Argument]) -> Launched {
        let copied = |argument: &&dyn Argument| {
            let bytes = argument.bytes();
            let mut words = vec![0u128; bytes.div_ceil(size_of::<u128>())];
            // SAFETY: an argument is so many bytes long, for which there is room.
            unsafe {
                std::ptr::copy_nonoverlapping(argument.at().cast::<u8>(), words.as_mut_ptr().cast::<u8>(), bytes)
            };
            words
        };
        Launched { kernel, grid, arguments: arguments.iter().map(copied).collect() }
    }

    /// As `Driver::launch` takes them.
    pub(crate) fn pointers(&self) -> Vec<*mut c_void> {
        self.arguments.iter().map(|words| words.as_ptr().cast_mut().cast()).collect()
    }
}

/// Launches in order.
pub struct Recorded {
    driver: Arc<dyn Driver>,
    launches: Vec<Launched>,
    /// The driver's.
    graph: Option<u64>,
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if let Some(graph) = self.graph.take() {
            self.driver.drop_graph(graph);
        }
    }
}

impl Gpu {
    /// Runs operations, and keeps their launches. Operations that copy or wait have no part in it: `give` does none.
    pub fn record(&self, give: impl FnOnce() -> Result<(), GpuError>) -> Result<Recorded, GpuError> {
        *self.recording.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
        let given = give();
        let launches = self.recording.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default();
        given?;
        // SAFETY: the same launches have just run.
        let graph = unsafe { self.driver.graph(&launches) };
        Ok(Recorded { driver: self.driver.clone(), launches, graph })
    }

    /// Gives recorded launches once more.
    ///
    /// # Safety
    /// All memory that the operations were given is still where it was, and describes batches of the same shape.
    pub unsafe fn replay(&self, recorded: &Recorded) -> Result<(), GpuError> {
        if let Some(graph) = recorded.graph {
            // SAFETY: the caller's.
            return unsafe { self.driver.launch_graph(graph) };
        }
        for launched in &recorded.launches {
            // SAFETY: the caller's; the arguments are copies of what the operations checked.
            unsafe { self.driver.launch(launched.kernel, launched.grid, &mut launched.pointers())? };
        }
        Ok(())
    }
}
