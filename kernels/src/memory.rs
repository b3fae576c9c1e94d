//! Memory for weights: an allocation of its own, aligned to 2 MiB and backed by huge pages where the system gives them, or a
//! part of a mapped file that other processes may have too.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::Range;

use crate::packed::file::Mapped;

const HUGE: usize = 2 << 20;

pub(crate) struct Memory {
    base: *mut u8,
    bytes: usize,
    held: Held,
}

enum Held {
    Allocated(Layout),
    /// Only read.
    Mapped {
        _file: Mapped,
    },
    /// Somebody else's, who lends it for as long as this lives.
    Lent,
}

// SAFETY: plain memory, owned or of a mapping that is owned; shared use is governed by the holders' borrows.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Uninitialised bytes; whoever packs writes all of them before anyone reads.
    ///
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
        Memory { base, bytes: layout.size(), held: Held::Allocated(layout) }
    }

    /// Memory of the caller's, who sees to it that this does not outlive it and is alone with it.
    pub(crate) fn lent(memory: &mut [u8]) -> Memory {
        Memory { base: memory.as_mut_ptr(), bytes: memory.len(), held: Held::Lent }
    }

    /// A part of a file.
    ///
    /// # Panics
    /// If the file has no such part.
    pub(crate) fn of(file: Mapped, part: Range<usize>) -> Memory {
        let bytes = &(*file).as_ref()[part];
        let (base, bytes) = (bytes.as_ptr().cast_mut(), bytes.len());
        Memory { base, bytes, held: Held::Mapped { _file: file } }
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Held::Allocated(layout) = self.held {
            // SAFETY: allocated in `new` with this layout.
            unsafe { dealloc(self.base, layout) }
        }
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
