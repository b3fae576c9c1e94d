//! The seam between the links and a device with memory of its own: an arena's blocks may lie there too, in the same order
//! and shape, and another process of the host may read them where they are.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// An arena's blocks in a device's memory.
pub trait DeviceBlocks: Send + Sync {
    /// What lets another process of this host map the memory, or why there is no such thing.
    fn descriptor(&self) -> io::Result<OwnedFd>;

    /// Maps the memory behind another process's descriptor for this device to read.
    ///
    /// # Errors
    /// When it is no memory of a device, or of one that this device cannot read, or has fewer bytes than `least`.
    fn map(&self, descriptor: OwnedFd, least: usize) -> io::Result<Arc<dyn DeviceSource>>;

    /// Begins to compute the checksums of extents of this memory, beside what else the device does.
    ///
    /// # Panics
    /// If an extent lies outside the memory.
    fn sum(&self, extents: &Extents, blocks: &[u32]) -> io::Result<Box<dyn Arriving>>;
}

/// Another process's blocks, as a device of this process reads them. Its owner may be gone: the memory stays until this is
/// dropped.
pub trait DeviceSource: Send + Sync {
    /// Begins to copy extents into this process's device and to compute their checksums from what is stored: `from` of the
    /// source into `to`, for pairs of blocks.
    ///
    /// # Panics
    /// If an extent lies outside either memory.
    ///
    /// # Safety
    /// The caller holds what is written, on the device, until what is returned has been waited for or dropped.
    unsafe fn fetch(&self, from: &Extents, to: &Extents, pairs: &[(u32, u32)]) -> io::Result<Box<dyn Arriving>>;

    /// The copy alone, to measure what the checksums cost: what is waited for is of no use.
    ///
    /// # Safety
    /// As `fetch`.
    unsafe fn fetch_unchecked(
        &self,
        from: &Extents,
        to: &Extents,
        pairs: &[(u32, u32)],
    ) -> io::Result<Box<dyn Arriving>>;
}

/// Work that a device has begun. Dropping it waits.
pub trait Arriving: Send {
    /// Waits: XXH3 with 64 bits of each extent, its heads in order. After an error nothing is known of what was written.
    fn wait(self: Box<Self>) -> io::Result<Vec<u64>>;
}

/// Where one layer of some heads of every block lies in a memory: head `h` of block `b` begins at byte
/// `first + b * block_stride + h * head_stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extents {
    pub first: usize,
    pub block_stride: usize,
    pub head_stride: usize,
    pub heads: usize,
    /// Bytes of one head: its keys, then its values.
    pub slice: usize,
}

impl Extents {
    /// Bytes of one extent.
    pub fn bytes(&self) -> usize {
        self.heads * self.slice
    }

    /// The byte behind the last one of a block.
    pub fn end(&self, block: u32) -> usize {
        let last = self.heads.saturating_sub(1) * self.head_stride;
        self.first + block as usize * self.block_stride + last + self.slice
    }

    /// Whether devices compute such extents' checksums: they are made of whole stripes of XXH3, and long.
    pub fn are_summable(&self) -> bool {
        self.slice.is_multiple_of(64) && self.bytes() > 240
    }
}
