//! Memory that another process of the host can map for reading, by a descriptor of the driver's (virtual memory management), and
//! errands: launches beside all else, for links. The driver counts who maps such memory, so a mapping outlives the process that
//! made it; nothing that a peer does takes it away under a kernel.

use std::ffi::c_void;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{MutexGuard, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::{Nvidia, failed};
use crate::cuda::driver::{ERRAND_BYTES, Errand, Kernel};
use crate::cuda::error::GpuError;

/// As many as a link has under way, and some sums.
const ERRANDS_AHEAD: usize = 64;
/// An errand of a thousand extents just fills a GPU: while its last thread blocks end, those of the next one fill the places.
pub(super) const URGENT_STREAMS: usize = 4;

/// Memory behind a handle, mapped whole.
#[derive(Clone, Copy)]
pub(super) struct Mapped {
    handle: sys::CUmemGenericAllocationHandle,
    bytes: usize,
    /// Another process's, which only errands use.
    theirs: bool,
}

impl Nvidia {
    /// The highest of the priorities, so that a copy's thread blocks go before those of a matmul that waits for room.
    pub(super) fn urgent_streams() -> Result<[sys::CUstream; URGENT_STREAMS], GpuError> {
        let (mut least, mut greatest) = (0, 0);
        let mut streams = [std::ptr::null_mut(); URGENT_STREAMS];
        // SAFETY: places for numbers and handles; a context is current.
        unsafe {
            sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest)
                .result()
                .map_err(failed("cuCtxGetStreamPriorityRange"))?;
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            for stream in &mut streams {
                sys::cuStreamCreateWithPriority(stream, flags, greatest)
                    .result()
                    .map_err(failed("cuStreamCreateWithPriority"))?;
            }
        }
        Ok(streams)
    }

    fn attribute(&self, which: sys::CUdevice_attribute) -> bool {
        // SAFETY: the device was found when this was opened.
        unsafe { result::device::get_attribute(self.device, which) }.is_ok_and(|found| found != 0)
    }

    fn properties(&self) -> sys::CUmemAllocationProp {
        // SAFETY: a plain struct of the driver's, for which zeros are a value.
        let mut properties: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
        properties.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.requestedHandleTypes = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        properties.location = self.location();
        properties
    }

    fn location(&self) -> sys::CUmemLocation {
        sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: self.device }
    }

    /// Both ends round sizes up by the same rule: a mapping has the size of its memory.
    fn rounded(&self, bytes: usize) -> Result<usize, GpuError> {
        let mut unit = 0;
        let minimum = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        // SAFETY: a place for a number.
        unsafe { sys::cuMemGetAllocationGranularity(&mut unit, &self.properties(), minimum) }
            .result()
            .map_err(failed("cuMemGetAllocationGranularity"))?;
        Ok(bytes.max(1).next_multiple_of(unit.max(1)))
    }

    /// None: this device has no such memory.
    pub(super) fn make_shared(&self, bytes: usize) -> Result<Option<u64>, GpuError> {
        use sys::CUdevice_attribute as Attribute;
        self.enter()?;
        let able = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED)
            && self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
        if !able {
            return Ok(None);
        }
        let (asked, bytes) = (bytes, self.rounded(bytes)?);
        let mut handle = 0;
        // SAFETY: a place for a handle.
        match unsafe { sys::cuMemCreate(&mut handle, bytes, &self.properties(), 0) }.result() {
            Ok(()) => {}
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                return Err(GpuError::Memory { asked, free: result::mem_get_info().map_or(0, |(free, _)| free) });
            }
            // The device could, but this process may not: a container without the right to, say.
            Err(_) => return Ok(None),
        }
        let access = [sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE];
        self.map_whole(Mapped { handle, bytes, theirs: false }, &access).map(Some)
    }

    /// Maps memory with the first of some accesses that the driver grants; gives the handle up if there is none.
    fn map_whole(&self, mapped: Mapped, accesses: &[sys::CUmemAccess_flags]) -> Result<u64, GpuError> {
        let Mapped { handle, bytes, .. } = mapped;
        let mut at = 0;
        // SAFETY: a handle of this many bytes, a fresh range of addresses of as many; what was done is undone on failure.
        unsafe {
            if let Err(error) = sys::cuMemAddressReserve(&mut at, bytes, 0, 0, 0).result() {
                let _ = sys::cuMemRelease(handle);
                return Err(failed("cuMemAddressReserve")(error));
            }
            if let Err(error) = sys::cuMemMap(at, bytes, 0, handle, 0).result() {
                let _ = sys::cuMemAddressFree(at, bytes);
                let _ = sys::cuMemRelease(handle);
                return Err(failed("cuMemMap")(error));
            }
            let mut granted = Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_SUPPORTED));
            for flags in accesses {
                let access = sys::CUmemAccessDesc { location: self.location(), flags: *flags };
                granted = sys::cuMemSetAccess(at, bytes, &access, 1).result();
                if granted.is_ok() {
                    break;
                }
            }
            if let Err(error) = granted {
                self.unmap(at, mapped);
                return Err(failed("cuMemSetAccess")(error));
            }
        }
        self.shared().insert(at, mapped);
        Ok(at)
    }

    fn unmap(&self, at: u64, Mapped { handle, bytes, .. }: Mapped) {
        // SAFETY: mapped by `map_whole` and not in use any more; the driver waits for what was given.
        unsafe {
            let _ = sys::cuMemUnmap(at, bytes);
            let _ = sys::cuMemAddressFree(at, bytes);
            let _ = sys::cuMemRelease(handle);
        }
    }

    /// Frees memory that `make_shared` or `map_shared` made; false: neither did.
    pub(super) fn drop_shared(&self, at: u64) -> bool {
        let Some(mapped) = self.shared().remove(&at) else { return false };
        // Unmapping does not wait for kernels by itself; errands have been waited for by whoever holds the mapping.
        if !mapped.theirs {
            let _ = crate::cuda::driver::Driver::finish(self);
        }
        self.unmap(at, mapped);
        true
    }

    pub(super) fn export_shared(&self, at: u64) -> Result<OwnedFd, GpuError> {
        self.enter()?;
        let unable = || GpuError::Call { call: "export", what: "the driver has no shareable memory here".to_string() };
        let mapped = self.shared().get(&at).copied().ok_or_else(unable)?;
        let mut descriptor = -1i32;
        let kind = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        // SAFETY: a place for a descriptor, which is new and ours.
        unsafe {
            sys::cuMemExportToShareableHandle((&raw mut descriptor).cast(), mapped.handle, kind, 0)
                .result()
                .map_err(failed("cuMemExportToShareableHandle"))?;
            Ok(OwnedFd::from_raw_fd(descriptor))
        }
    }

    /// Maps the memory behind a descriptor, for reading where the driver knows such a thing.
    pub(super) fn map_shared(&self, descriptor: OwnedFd, least: usize) -> Result<u64, GpuError> {
        self.enter()?;
        let bytes = self.rounded(least)?;
        let mut handle = 0;
        let kind = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        // SAFETY: a place for a handle; the descriptor travels as a pointer's value, which is this call's convention.
        unsafe {
            sys::cuMemImportFromShareableHandle(&mut handle, descriptor.as_raw_fd() as usize as *mut c_void, kind)
        }
        .result()
        .map_err(failed("cuMemImportFromShareableHandle"))?;
        let accesses = [
            sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READ,
            sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        ];
        self.map_whole(Mapped { handle, bytes, theirs: true }, &accesses)
    }

    /// Memory that the host and the GPU share takes long to make, so some is made ahead.
    pub(super) fn prepare_errands(&self) -> Result<(), GpuError> {
        for _ in 0..ERRANDS_AHEAD {
            let errand = self.make_errand()?;
            self.keep_errand(errand);
        }
        Ok(())
    }

    pub(super) fn take_errand(&self) -> Result<Errand, GpuError> {
        match self.errands().pop() {
            Some(errand) => Ok(errand),
            None => self.make_errand(),
        }
    }

    fn make_errand(&self) -> Result<Errand, GpuError> {
        self.enter()?;
        let event =
            result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed("cuEventCreate"))?;
        // SAFETY: a size that is not zero. The device finds memory of the host's under the same address.
        let host: *mut u8 = unsafe { result::malloc_host(ERRAND_BYTES, 0) }.map_err(failed("cuMemHostAlloc"))?.cast();
        Ok(Errand { host, at: host as u64, event: event as u64 })
    }

    /// # Safety
    /// As `Driver::launch`.
    pub(super) unsafe fn launch_urgent(
        &self,
        errand: &Errand,
        kernel: Kernel,
        grid: [u32; 3],
        arguments: &mut [*mut c_void],
    ) -> Result<(), GpuError> {
        self.enter()?;
        let (grid, threads) = ((grid[0], grid[1], grid[2]), (kernel.threads, 1, 1));
        let stream = self.urgent[self.errands_launched.fetch_add(1, Relaxed) % URGENT_STREAMS];
        // SAFETY: the caller's; the errand's event lives until this is dropped.
        unsafe {
            result::launch_kernel(self.functions[kernel.name], grid, threads, kernel.shared, stream, arguments)
                .map_err(failed(kernel.name))?;
            result::event::record(errand.event as sys::CUevent, stream).map_err(failed("cuEventRecord"))
        }
    }

    pub(super) fn wait_urgent(&self, errand: &Errand) -> Result<(), GpuError> {
        self.enter()?;
        // SAFETY: the event lives as long as its errand.
        unsafe { sys::cuEventSynchronize(errand.event as sys::CUevent) }.result().map_err(failed("cuEventSynchronize"))
    }

    pub(super) fn keep_errand(&self, errand: Errand) {
        self.errands().push(errand);
    }

    /// Frees what errands and mappings are left. Everything has ended.
    pub(super) fn drop_errands(&self) {
        for errand in std::mem::take(&mut *self.errands()) {
            // SAFETY: nobody else has it any more.
            unsafe {
                let _ = result::free_host(errand.host.cast());
                let _ = result::event::destroy(errand.event as sys::CUevent);
            }
        }
    }

    fn errands(&self) -> MutexGuard<'_, Vec<Errand>> {
        self.errands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shared(&self) -> MutexGuard<'_, std::collections::BTreeMap<u64, Mapped>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
