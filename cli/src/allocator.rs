//! Where memory comes from: small pieces from mimalloc, large ones from the system. A coordinator makes and drops many
//! small pieces for every assignment, of a thousand assignments at once, which is what libc's allocator is slowest at;
//! caches of KV blocks and packed weights stay untouched zero pages of the system until they are used.

use std::alloc::{GlobalAlloc, Layout, System};

use mimalloc::MiMalloc;

/// From this many bytes on a piece is the system's.
const LARGE_BYTES: usize = 128 << 10;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

struct Allocator;

/// Whose a piece of this layout is: a function of its size alone, so that whoever gave it takes it back.
fn is_large(bytes: usize) -> bool {
    bytes >= LARGE_BYTES
}

// SAFETY: every call goes, with the caller's own promises, to one of two allocators. Which one is a function of the
// layout's size, and `dealloc` and `realloc` are given the layout that the piece was allocated with; a `realloc` that
// would change sides allocates, copies and frees instead.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises on `layout` are what both ask for.
        unsafe { if is_large(layout.size()) { System.alloc(layout) } else { MiMalloc.alloc(layout) } }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        unsafe { if is_large(layout.size()) { System.alloc_zeroed(layout) } else { MiMalloc.alloc_zeroed(layout) } }
    }

    unsafe fn dealloc(&self, piece: *mut u8, layout: Layout) {
        // SAFETY: `piece` was allocated with this layout, so by the same of the two.
        unsafe { if is_large(layout.size()) { System.dealloc(piece, layout) } else { MiMalloc.dealloc(piece, layout) } }
    }

    unsafe fn realloc(&self, piece: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: `piece` was allocated with this layout, so by the same of the two; across the border the new piece is
        // another one, and as many bytes are copied as both have.
        unsafe {
            match (is_large(layout.size()), is_large(bytes)) {
                (true, true) => System.realloc(piece, layout, bytes),
                (false, false) => MiMalloc.realloc(piece, layout, bytes),
                _ => {
                    let other = self.alloc(Layout::from_size_align_unchecked(bytes, layout.align()));
                    if !other.is_null() {
                        std::ptr::copy_nonoverlapping(piece, other, layout.size().min(bytes));
                        self.dealloc(piece, layout);
                    }
                    other
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    /// Goal: a piece keeps its bytes when it grows and shrinks over the border. Method: one vector, in steps around it.
    #[test]
    fn a_piece_keeps_its_bytes_over_the_border() {
        let byte = |at: usize| (at * 31 % 251) as u8;
        let mut bytes: Vec<u8> = Vec::new();
        for size in [10, super::LARGE_BYTES - 1, super::LARGE_BYTES, 3 * super::LARGE_BYTES] {
            bytes.reserve_exact(size - bytes.len());
            bytes.extend((bytes.len()..size).map(byte));
            assert!(bytes.iter().enumerate().all(|(at, found)| *found == byte(at)), "grown to {size}");
        }
        for size in [super::LARGE_BYTES, super::LARGE_BYTES - 1, 10] {
            bytes.truncate(size);
            bytes.shrink_to_fit();
            assert!(bytes.iter().enumerate().all(|(at, found)| *found == byte(at)), "shrunk to {size}");
        }
        assert!(vec![0u64; super::LARGE_BYTES].iter().all(|word| *word == 0));
    }
}
