//! Memory for weights: one allocation, aligned to 2 MiB and backed by huge pages where the system gives them.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};

const HUGE: usize = 2 << 20;

/// Uninitialised bytes; whoever packs writes all of them before anyone reads.
pub(crate) struct Memory {
    base: *mut u8,
    layout: Layout,
}

// SAFETY: plain memory, owned; shared use is governed by the holders' borrows.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// # Panics
    /// If the size overflows.
    pub(crate) fn new(bytes: usize) -> Memory {
        let layout = Layout::from_size_align(bytes.max(1), HUGE).expect("memory size overflows");
        let layout = if bytes < HUGE { Layout::from_size_align(bytes.max(1), 64).expect("fits") } else { layout };
        // SAFETY: the size is not zero.
        let base = unsafe { alloc(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        if bytes >= HUGE {
            advise(base, bytes);
        }
        Memory { base, layout }
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    pub(crate) fn bytes(&self) -> usize {
        self.layout.size()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.base, self.layout) }
    }
}

/// Asks for huge pages; a refusal costs speed only.
#[cfg(target_os = "linux")]
fn advise(base: *mut u8, bytes: usize) {
    // SAFETY: the range is ours and the advice changes no content.
    unsafe { libc::madvise(base.cast(), bytes, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn advise(_: *mut u8, _: usize) {}
