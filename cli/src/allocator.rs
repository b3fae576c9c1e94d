//! Where memory comes from: libc, and for the small pieces of a coordinator mimalloc (decision 013). A coordinator makes and
//! drops dozens of small pieces for every call, hundreds of calls at once, which is what libc's allocator is slowest at;
//! other processes have few, and mimalloc would keep more of their memory resident.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};

use mimalloc::MiMalloc;

/// From this many bytes on a piece is always libc's: caches and buffers stay untouched pages until they are used.
const LARGE_BYTES: usize = 64 << 10;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;
/// Whether small pieces come from mimalloc. What was taken before goes back to where it came from.
static MANY_SMALL: AtomicBool = AtomicBool::new(false);

/// From now on small pieces come from mimalloc.
pub(crate) fn expect_many_small_pieces() {
    MANY_SMALL.store(true, Ordering::Relaxed);
}

struct Allocator;

/// Whether a new piece of so many bytes is mimalloc's.
fn is_small(bytes: usize) -> bool {
    bytes < LARGE_BYTES && MANY_SMALL.load(Ordering::Relaxed)
}

/// Whether mimalloc gave this piece.
fn is_mimallocs(piece: *mut u8, bytes: usize) -> bool {
    // SAFETY: only looks the address up; any will do.
    is_small(bytes) && unsafe { libmimalloc_sys::mi_is_in_heap_region(piece.cast::<c_void>()) }
}

// SAFETY: every call goes, with the caller's own promises, to one of two allocators. A piece goes back to the one that gave
// it: mimalloc knows its own by their addresses, and never gives one of LARGE_BYTES or more or before MANY_SMALL, which is
// never taken back. A `realloc` that would change sides allocates, copies and frees instead.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises on `layout` are what both ask for.
        unsafe { if is_small(layout.size()) { MiMalloc.alloc(layout) } else { System.alloc(layout) } }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        unsafe { if is_small(layout.size()) { MiMalloc.alloc_zeroed(layout) } else { System.alloc_zeroed(layout) } }
    }

    unsafe fn dealloc(&self, piece: *mut u8, layout: Layout) {
        // SAFETY: `piece` goes to the allocator it came from, with its own layout.
        unsafe {
            match is_mimallocs(piece, layout.size()) {
                true => MiMalloc.dealloc(piece, layout),
                false => System.dealloc(piece, layout),
            }
        }
    }

    unsafe fn realloc(&self, piece: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: `piece` goes to the allocator it came from, with its own layout; between the two the new piece is another
        // one, and as many bytes are copied as both have.
        unsafe {
            match (is_mimallocs(piece, layout.size()), is_small(bytes)) {
                (true, true) => MiMalloc.realloc(piece, layout, bytes),
                (false, false) => System.realloc(piece, layout, bytes),
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
    use super::*;

    fn byte(at: usize) -> u8 {
        (at * 31 % 251) as u8
    }

    fn is_whole(bytes: &[u8]) -> bool {
        bytes.iter().enumerate().all(|(at, found)| *found == byte(at))
    }

    /// Goal: a piece keeps its bytes whichever allocator it goes to, also when it was made before the switch. Method: vectors
    /// made before it and after it, grown and shrunk over the border.
    #[test]
    fn a_piece_keeps_its_bytes_between_the_allocators() {
        let before: Vec<Vec<u8>> = [1, 100, 5_000, 3 * LARGE_BYTES].map(|size| (0..size).map(byte).collect()).into();
        expect_many_small_pieces();
        for mut bytes in before.into_iter().chain([Vec::new()]) {
            for size in [bytes.len(), LARGE_BYTES - 1, LARGE_BYTES, 4 * LARGE_BYTES] {
                bytes.reserve_exact(size.saturating_sub(bytes.len()));
                bytes.extend((bytes.len()..size).map(byte));
                assert!(is_whole(&bytes), "grown to {size}");
            }
            for size in [LARGE_BYTES, LARGE_BYTES - 1, 10] {
                bytes.truncate(size);
                bytes.shrink_to_fit();
                assert!(is_whole(&bytes), "shrunk to {size}");
            }
        }
        assert!(vec![0u64; LARGE_BYTES].iter().all(|word| *word == 0));
        let small = Box::new(7u8);
        assert!(
            is_mimallocs(std::ptr::from_ref(&*small).cast_mut(), 1),
            "a small piece after the switch is mimalloc's"
        );
    }
}
