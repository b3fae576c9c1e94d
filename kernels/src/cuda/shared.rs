//! A GPU's blocks as links see them (`baton_core::arena::DeviceBlocks`): other processes of the host map them for reading, and
//! what they hold is copied from GPU memory to GPU memory by one kernel, which computes its checksums as it goes.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use baton_core::arena::{Arriving, DeviceBlocks, DeviceSource, Extents};

use super::driver::{Driver, ERRAND_BYTES, Errand, Kernel};
use super::error::GpuError;
use super::launch::Argument;
use super::memory::Memory;

const fn kernel(name: &'static str) -> Kernel {
    Kernel { name, threads: 256, shared: 0 }
}

const FETCH: Kernel = kernel("fetch_extents");
const SUM: Kernel = kernel("sum_extents");
const COPY: Kernel = kernel("copy_extents");
/// What links launch.
pub(crate) const LINK_KERNELS: [Kernel; 3] = [FETCH, SUM, COPY];

/// Extents of one errand: for each a pair of blocks on the way there, a checksum on the way back.
const EXTENTS_MAX: usize = ERRAND_BYTES / 16;
const SUMS_AT: usize = EXTENTS_MAX * 8;

/// As `Extents` in blocks.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Places {
    first: u64,
    block_stride: u64,
    head_stride: u64,
}

// SAFETY: laid out as the device's struct.
unsafe impl Argument for Places {}

impl Places {
    fn of(extents: &Extents) -> Places {
        let Extents { first, block_stride, head_stride, .. } = *extents;
        Places { first: first as u64, block_stride: block_stride as u64, head_stride: head_stride as u64 }
    }
}

fn failed(error: GpuError) -> io::Error {
    io::Error::other(error.to_string())
}

/// The blocks of a `GpuArena`, kept alive.
pub(crate) struct SharedBlocks {
    driver: Arc<dyn Driver>,
    memory: Arc<Memory>,
}

impl SharedBlocks {
    pub(crate) fn new(driver: Arc<dyn Driver>, memory: Arc<Memory>) -> SharedBlocks {
        SharedBlocks { driver, memory }
    }
}

impl DeviceBlocks for SharedBlocks {
    fn descriptor(&self) -> io::Result<OwnedFd> {
        self.memory.export().map_err(failed)
    }

    fn map(&self, descriptor: OwnedFd, least: usize) -> io::Result<Arc<dyn DeviceSource>> {
        let theirs = Arc::new(Memory::of_another(&self.driver, descriptor, least).map_err(failed)?);
        Ok(Arc::new(Theirs { driver: self.driver.clone(), theirs, ours: self.memory.clone() }))
    }

    fn sum(&self, extents: &Extents, blocks: &[u32]) -> io::Result<Box<dyn Arriving>> {
        inside(extents, blocks.iter().copied(), &self.memory);
        let mut under_way = UnderWay::new(&self.driver, [self.memory.clone(), self.memory.clone()]);
        let (places, slice, heads) = (Places::of(extents), extents.slice as u32, extents.heads as u32);
        for blocks in blocks.chunks(EXTENTS_MAX) {
            let errand = under_way.prepare(blocks.iter().map(|block| (*block, *block)))?;
            let (pairs, sums) = (errand.at, errand.at + SUMS_AT as u64);
            let arguments: [&dyn Argument; 6] = [&places, &slice, &heads, &pairs, &self.memory.at(), &sums];
            // SAFETY: extents inside the memory (checked), which `under_way` keeps; the errand's own memory.
            unsafe { under_way.launch(errand, SUM, blocks.len(), &arguments)? };
        }
        Ok(Box::new(under_way))
    }
}

/// # Panics
/// If an extent lies outside the memory, or heads are not made of stripes.
fn inside(extents: &Extents, blocks: impl Iterator<Item = u32>, memory: &Memory) {
    assert!(extents.are_summable() && extents.bytes() <= u32::MAX as usize, "extents of whole stripes");
    assert!(extents.first.is_multiple_of(16) && extents.block_stride.is_multiple_of(16), "extents at 16 bytes");
    if let Some(last) = blocks.max() {
        assert!(extents.end(last) <= memory.bytes(), "block {last} lies outside its memory");
    }
}

/// Another process's blocks, and ours that they are copied into.
struct Theirs {
    driver: Arc<dyn Driver>,
    theirs: Arc<Memory>,
    ours: Arc<Memory>,
}

impl Theirs {
    /// # Safety
    /// As `DeviceSource::fetch`.
    unsafe fn take(
        &self,
        sums: bool,
        from: &Extents,
        to: &Extents,
        pairs: &[(u32, u32)],
    ) -> io::Result<Box<dyn Arriving>> {
        assert!((from.heads, from.slice) == (to.heads, to.slice), "extents of one shape");
        inside(from, pairs.iter().map(|pair| pair.0), &self.theirs);
        inside(to, pairs.iter().map(|pair| pair.1), &self.ours);
        let mut under_way = UnderWay::new(&self.driver, [self.theirs.clone(), self.ours.clone()]);
        let (slice, heads, from, to) = (from.slice as u32, from.heads as u32, Places::of(from), Places::of(to));
        for pairs in pairs.chunks(EXTENTS_MAX) {
            let errand = under_way.prepare(pairs.iter().copied())?;
            let (list, found) = (errand.at, errand.at + SUMS_AT as u64);
            let arguments: [&dyn Argument; 8] =
                [&from, &to, &slice, &heads, &list, &self.theirs.at(), &self.ours.at(), &found];
            let (kernel, count) = if sums { (FETCH, 8) } else { (COPY, 7) };
            // SAFETY: extents inside either memory (checked), which `under_way` keeps; the caller holds what is written.
            unsafe { under_way.launch(errand, kernel, pairs.len(), &arguments[..count])? };
        }
        Ok(Box::new(under_way))
    }
}

impl DeviceSource for Theirs {
    unsafe fn fetch(&self, from: &Extents, to: &Extents, pairs: &[(u32, u32)]) -> io::Result<Box<dyn Arriving>> {
        // SAFETY: the caller's.
        unsafe { self.take(true, from, to, pairs) }
    }

    unsafe fn fetch_unchecked(
        &self,
        from: &Extents,
        to: &Extents,
        pairs: &[(u32, u32)],
    ) -> io::Result<Box<dyn Arriving>> {
        // SAFETY: the caller's.
        unsafe { self.take(false, from, to, pairs) }
    }
}

/// Errands under way, in order, and the memory that they touch.
struct UnderWay {
    driver: Arc<dyn Driver>,
    errands: Vec<(Errand, usize)>,
    /// Freed only after the errands have ended.
    _touched: [Arc<Memory>; 2],
}

impl UnderWay {
    fn new(driver: &Arc<dyn Driver>, touched: [Arc<Memory>; 2]) -> UnderWay {
        UnderWay { driver: driver.clone(), errands: Vec::new(), _touched: touched }
    }

    /// An errand with its list of pairs written.
    fn prepare(&self, pairs: impl Iterator<Item = (u32, u32)>) -> io::Result<Errand> {
        let errand = self.driver.errand().map_err(failed)?;
        for (i, (from, to)) in pairs.enumerate() {
            // SAFETY: at most `EXTENTS_MAX` pairs, in the errand's memory.
            unsafe { errand.host.cast::<[u32; 2]>().add(i).write([from, to]) };
        }
        Ok(errand)
    }

    /// # Safety
    /// As `Driver::launch_errand`.
    unsafe fn launch(
        &mut self,
        errand: Errand,
        kernel: Kernel,
        extents: usize,
        arguments: &[&dyn Argument],
    ) -> io::Result<()> {
        if extents == 0 {
            self.driver.end_errand(errand);
            return Ok(());
        }
        let mut pointers: Vec<_> = arguments.iter().map(|argument| argument.at()).collect();
        // SAFETY: the caller's.
        match unsafe { self.driver.launch_errand(&errand, kernel, [extents as u32, 1, 1], &mut pointers) } {
            Ok(()) => {
                self.errands.push((errand, extents));
                Ok(())
            }
            Err(error) => {
                self.driver.end_errand(errand);
                Err(failed(error))
            }
        }
    }

    /// Waits for all errands and takes their checksums.
    fn end(&mut self) -> io::Result<Vec<u64>> {
        let mut sums = Vec::new();
        let mut ended = Ok(());
        for (errand, extents) in std::mem::take(&mut self.errands) {
            match self.driver.wait_errand(&errand) {
                // SAFETY: the errand has ended; so many checksums lie in its memory, which is aligned for them.
                Ok(()) => sums.extend_from_slice(unsafe {
                    std::slice::from_raw_parts(errand.host.add(SUMS_AT).cast::<u64>(), extents)
                }),
                Err(error) => ended = Err(failed(error)),
            }
            self.driver.end_errand(errand);
        }
        ended.map(|()| sums)
    }
}

impl Arriving for UnderWay {
    fn wait(mut self: Box<Self>) -> io::Result<Vec<u64>> {
        self.end()
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let _ = self.end();
    }
}
