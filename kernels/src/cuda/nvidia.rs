//! A GPU through CUDA's driver API. Everything is looked for before it is used: a driver or a compiler that is absent,
//! too old or broken is an error that says what to do.

mod graphs;
mod sharing;

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicUsize;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::compile::Cubins;
use super::driver::{Driver, Errand, Kernel, SLOTS};
use super::error::GpuError;
use super::launch::{Hopper, KERNELS, TensorMap, hoppers};
use super::recorded::Launched;
use super::shared::LINK_KERNELS;

/// CUDA version of the driver, as 1000 · major + 10 · minor.
const DRIVER_LEAST: i32 = 12_000;
/// Compute capability: `mma` and `cp.async` over bf16.
const CAPABILITY_LEAST: (i32, i32) = (8, 0);
/// The only architecture with warpgroup tensor-core instructions.
const HOPPER_ARCH: &str = "sm_90a";
/// Half of the pinned memory that uploads go through.
const STAGE_BYTES: usize = 16 << 20;
/// Threads that make memory present at most, and the pieces they begin at.
const TOUCHING: usize = 8;
const TOUCHED_AT_ONCE: usize = 2 << 20;

/// One GPU as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuFound {
    pub name: String,
    pub capability: (i32, i32),
    pub memory_bytes: usize,
    pub multiprocessors: i32,
    /// Dynamic shared memory of a thread block at most.
    pub shared_bytes: usize,
    /// Whether other processes of the host can map its memory.
    pub shares: bool,
    /// The other GPUs whose memory it reads.
    pub reads: Vec<usize>,
}

/// Version of CUDA that the driver supports, as (major, minor).
pub fn driver_version() -> Result<(i32, i32), GpuError> {
    static FOUND: OnceLock<Result<i32, GpuError>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        // SAFETY: asks the loader only.
        if !unsafe { sys::is_culib_present() } {
            return Err(GpuError::NoDriver);
        }
        result::init().map_err(|error| GpuError::DriverFails(text(error)))?;
        let mut version = 0;
        // SAFETY: a place for a number.
        unsafe { sys::cuDriverGetVersion(&mut version) }
            .result()
            .map_err(|error| GpuError::DriverFails(text(error)))?;
        Ok(version)
    });
    let version = found.clone()?;
    let pair = |version: i32| (version / 1000, version % 1000 / 10);
    match version < DRIVER_LEAST {
        true => Err(GpuError::DriverTooOld { found: dotted(pair(version)), least: dotted(pair(DRIVER_LEAST)) }),
        false => Ok(pair(version)),
    }
}

/// All GPUs that this process is shown.
pub fn gpus() -> Result<Vec<GpuFound>, GpuError> {
    driver_version()?;
    let count = result::device::get_count().map_err(|error| GpuError::DriverFails(text(error)))?;
    (0..count).map(describe).collect()
}

fn describe(index: i32) -> Result<GpuFound, GpuError> {
    use sys::CUdevice_attribute as Attribute;
    let device = result::device::get(index).map_err(failed("cuDeviceGet"))?;
    let attribute = |which| {
        // SAFETY: the device was found above.
        unsafe { result::device::get_attribute(device, which) }.map_err(failed("cuDeviceGetAttribute"))
    };
    Ok(GpuFound {
        name: result::device::get_name(device).map_err(failed("cuDeviceGetName"))?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // SAFETY: as above.
        memory_bytes: unsafe { result::device::total_mem(device) }.map_err(failed("cuDeviceTotalMem"))?,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        shares: attribute(Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED)? != 0
            && attribute(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED)? != 0,
        reads: readable(device)?,
    })
}

/// The other GPUs whose memory a GPU reads.
fn readable(device: sys::CUdevice) -> Result<Vec<usize>, GpuError> {
    let count = result::device::get_count().map_err(failed("cuDeviceGetCount"))?;
    let mut found = Vec::new();
    for other in (0..count).filter(|other| *other != device) {
        let mut able = 0;
        // SAFETY: a place for a number; both devices exist.
        unsafe { sys::cuDeviceCanAccessPeer(&mut able, device, other) }
            .result()
            .map_err(failed("cuDeviceCanAccessPeer"))?;
        found.extend((able != 0).then_some(other as usize));
    }
    Ok(found)
}

/// What NVRTC is to compile for: from Hopper on with the instructions of that architecture alone.
pub(crate) fn arch(capability: (i32, i32)) -> String {
    let own = if capability.0 >= 9 { "a" } else { "" };
    format!("sm_{}{}{own}", capability.0, capability.1)
}

fn dotted((major, minor): (i32, i32)) -> String {
    format!("{major}.{minor}")
}

fn text(error: DriverError) -> String {
    let string = error.error_string().map(|text| text.to_string_lossy().into_owned());
    string.unwrap_or_else(|_| format!("{:?}", error.0))
}

fn failed(call: &'static str) -> impl Fn(DriverError) -> GpuError {
    move |error| GpuError::Call { call, what: text(error) }
}

/// An opened GPU with the kernels loaded.
pub(crate) struct Nvidia {
    device: sys::CUdevice,
    context: sys::CUcontext,
    module: sys::CUmodule,
    functions: BTreeMap<&'static str, sys::CUfunction>,
    compute: sys::CUstream,
    copies: sys::CUstream,
    /// What links do, before all else. Errands take turns on them, so that one's last thread blocks do not keep the next one waiting.
    urgent: [sys::CUstream; sharing::URGENT_STREAMS],
    errands_launched: AtomicUsize,
    errands: Mutex<Vec<Errand>>,
    /// Memory that can be shared, or is another process's, by address.
    shared: Mutex<BTreeMap<u64, sharing::Mapped>>,
    /// Whether launches may overlap: from Hopper on.
    overlaps: bool,
    /// Multiprocessors, where `launch::HOPPERS` run.
    hopper: Option<usize>,
    staging: Mutex<Staging>,
}

// SAFETY: handles of the driver, whose calls are thread-safe; the staging memory is behind a lock.
unsafe impl Send for Nvidia {}
// SAFETY: as above.
unsafe impl Sync for Nvidia {}

/// Pinned memory: uploads use the halves in turn, a download has one slot.
struct Staging {
    halves: [Pinned; 2],
    next: usize,
    slots: [Pinned; SLOTS],
    taken: [usize; SLOTS],
    /// Recorded on the computing stream when a slot's download may begin.
    ready: sys::CUevent,
}

/// Memory of the host that the GPU copies from and to, and the event behind its last copy.
struct Pinned {
    at: *mut u8,
    bytes: usize,
    copied: sys::CUevent,
}

impl Pinned {
    fn new(bytes: usize) -> Result<Pinned, GpuError> {
        let copied =
            result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed("cuEventCreate"))?;
        let mut pinned = Pinned { at: std::ptr::null_mut(), bytes: 0, copied };
        pinned.grow(bytes)?;
        Ok(pinned)
    }

    /// Makes room for `bytes`. No copy is on its way.
    fn grow(&mut self, bytes: usize) -> Result<(), GpuError> {
        if bytes <= self.bytes {
            return Ok(());
        }
        self.free();
        // SAFETY: a size that is not zero.
        self.at = unsafe { result::malloc_host(bytes, 0) }.map_err(failed("cuMemHostAlloc"))?.cast();
        self.bytes = bytes;
        Ok(())
    }

    fn free(&mut self) {
        if !self.at.is_null() {
            // SAFETY: allocated by `grow`; no copy is on its way.
            let _ = unsafe { result::free_host(self.at.cast()) };
        }
        (self.at, self.bytes) = (std::ptr::null_mut(), 0);
    }

    fn wait(&self) -> Result<(), GpuError> {
        // SAFETY: the event lives as long as this.
        unsafe { result::event::synchronize(self.copied) }.map_err(failed("cuEventSynchronize"))
    }
}

impl Nvidia {
    pub(crate) fn open(index: usize, cubins: &Cubins) -> Result<(Nvidia, GpuFound), GpuError> {
        let found = gpus()?;
        let Some(gpu) = found.get(index) else { return Err(GpuError::NoGpu { index, count: found.len() }) };
        if gpu.capability < CAPABILITY_LEAST {
            return Err(GpuError::GpuTooOld {
                name: gpu.name.clone(),
                found: dotted(gpu.capability),
                least: dotted(CAPABILITY_LEAST),
            });
        }
        let arch = arch(gpu.capability);
        let own: Vec<Hopper> = match arch == HOPPER_ARCH {
            true => hoppers().collect(),
            false => Vec::new(),
        };
        let kernels = || KERNELS.iter().chain(&LINK_KERNELS).chain(own.iter().map(|hopper| &hopper.tiled.kernel));
        if let Some(kernel) = kernels().find(|kernel| kernel.shared as usize > gpu.shared_bytes) {
            return Err(GpuError::SharedMemory {
                name: gpu.name.clone(),
                kernel: kernel.name,
                found: gpu.shared_bytes,
                needed: kernel.shared as usize,
            });
        }
        let device = result::device::get(index as i32).map_err(failed("cuDeviceGet"))?;
        // SAFETY: the device was found above; its primary context is released on drop.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("cuDevicePrimaryCtxRetain"))?;
        // SAFETY: just retained.
        unsafe { result::ctx::set_current(context) }.map_err(failed("cuCtxSetCurrent"))?;
        let module = load(cubins, &arch)?;
        let functions = kernels().map(|kernel| Ok((kernel.name, function(module, kernel)?)));
        let functions = functions.collect::<Result<BTreeMap<_, _>, GpuError>>()?;
        let stream =
            || result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("cuStreamCreate"));
        let staging = Staging {
            halves: [Pinned::new(STAGE_BYTES)?, Pinned::new(STAGE_BYTES)?],
            next: 0,
            slots: [Pinned::new(1)?, Pinned::new(1)?],
            taken: [0; SLOTS],
            ready: result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                .map_err(failed("cuEventCreate"))?,
        };
        let (compute, copies, staging) = (stream()?, stream()?, Mutex::new(staging));
        let overlaps = gpu.capability >= (9, 0);
        let hopper = (!own.is_empty()).then_some(gpu.multiprocessors as usize);
        let (urgent, errands, shared) = (Nvidia::urgent_streams()?, Mutex::default(), Mutex::default());
        let nvidia = Nvidia {
            device,
            context,
            module,
            functions,
            compute,
            copies,
            urgent,
            errands_launched: AtomicUsize::new(0),
            errands,
            shared,
            overlaps,
            hopper,
            staging,
        };
        nvidia.prepare_errands()?;
        Ok((nvidia, gpu.clone()))
    }

    /// Calls may come from any thread.
    fn enter(&self) -> Result<(), GpuError> {
        // SAFETY: retained until drop.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("cuCtxSetCurrent"))
    }

    /// As `Driver::launch`, on any stream.
    ///
    /// # Safety
    /// As `Driver::launch`.
    unsafe fn launch_on(
        &self,
        stream: sys::CUstream,
        kernel: Kernel,
        grid: [u32; 3],
        arguments: &mut [*mut c_void],
    ) -> Result<(), GpuError> {
        self.enter()?;
        let mut attributes = [overlapping()];
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: kernel.shared,
            hStream: stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: if self.overlaps { 1 } else { 0 },
        };
        // SAFETY: the caller's; the attributes live until the call returns.
        let launched = unsafe {
            sys::cuLaunchKernelEx(&config, self.functions[kernel.name], arguments.as_mut_ptr(), std::ptr::null_mut())
        };
        let launched = launched.result();
        launched.map_err(failed(kernel.name))
    }

    fn staging(&self) -> MutexGuard<'_, Staging> {
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A cubin that the driver refuses is compiled anew once.
fn load(cubins: &Cubins, arch: &str) -> Result<sys::CUmodule, GpuError> {
    let (cubin, kept) = cubins.get(arch)?;
    // SAFETY: the image is a whole ELF file, whose sizes stand in it.
    match unsafe { result::module::load_data(cubin.as_ptr().cast()) } {
        Ok(module) => Ok(module),
        Err(_) if kept => {
            cubins.forget(arch);
            let (cubin, _) = cubins.get(arch)?;
            // SAFETY: as above.
            unsafe { result::module::load_data(cubin.as_ptr().cast()) }.map_err(failed("cuModuleLoadData"))
        }
        Err(error) => Err(failed("cuModuleLoadData")(error)),
    }
}

fn function(module: sys::CUmodule, kernel: &Kernel) -> Result<sys::CUfunction, GpuError> {
    let name = CString::new(kernel.name).expect("kernel names have no zeros");
    // SAFETY: the module is loaded.
    let function = unsafe { result::module::get_function(module, name) }.map_err(failed("cuModuleGetFunction"))?;
    // Without it a launch gets 48 KiB, of which what the kernel has besides is a part.
    if kernel.shared > 0 {
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function exists, and the device has so much (`open`).
        unsafe { result::function::set_function_attribute(function, attribute, kernel.shared as i32) }
            .map_err(failed("cuFuncSetAttribute"))?;
    }
    Ok(function)
}

/// Has the system make memory present by several threads, since it takes a second per GiB by one. What fails shows later.
fn touch(at: *const u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(TOUCHING);
        let each = bytes.div_ceil(threads).next_multiple_of(TOUCHED_AT_ONCE);
        for first in (0..bytes).step_by(each) {
            let (from, len) = (at as usize + first, each.min(bytes - first));
            // SAFETY: the caller's memory, whose content stays.
            scope.spawn(move || unsafe { libc::madvise(from as *mut c_void, len, libc::MADV_POPULATE_WRITE) });
        }
    });
}

/// Lets a kernel begin while the one before it ends: every kernel waits for it where it has to (`after_previous` in
/// src/common.cuh).
fn overlapping() -> sys::CUlaunchAttribute {
    // SAFETY: a plain struct of the driver's, for which zeros are a value.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    attribute
}

impl Driver for Nvidia {
    fn allocate(&self, bytes: usize) -> Result<u64, GpuError> {
        self.enter()?;
        // SAFETY: the size is not zero.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Ok(at) => Ok(at),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                Err(GpuError::Memory { asked: bytes, free: self.memory()?.0 })
            }
            Err(error) => Err(failed("cuMemAlloc")(error)),
        }
    }

    unsafe fn free(&self, at: u64) {
        if self.enter().is_ok() && !self.drop_shared(at) {
            // SAFETY: the caller's; the driver waits for what was given before.
            let _ = unsafe { result::free_sync(at) };
        }
    }

    fn allocate_shared(&self, bytes: usize) -> Result<u64, GpuError> {
        match self.make_shared(bytes)? {
            Some(at) => Ok(at),
            None => self.allocate(bytes),
        }
    }

    fn export(&self, at: u64) -> Result<OwnedFd, GpuError> {
        self.export_shared(at)
    }

    fn import(&self, descriptor: OwnedFd, least: usize) -> Result<u64, GpuError> {
        self.map_shared(descriptor, least)
    }

    fn errand(&self) -> Result<Errand, GpuError> {
        self.take_errand()
    }

    unsafe fn launch_errand(
        &self,
        errand: &Errand,
        kernel: Kernel,
        grid: [u32; 3],
        arguments: &mut [*mut c_void],
    ) -> Result<(), GpuError> {
        // SAFETY: the caller's.
        unsafe { self.launch_urgent(errand, kernel, grid, arguments) }
    }

    fn wait_errand(&self, errand: &Errand) -> Result<(), GpuError> {
        self.wait_urgent(errand)
    }

    fn end_errand(&self, errand: Errand) {
        self.keep_errand(errand);
    }

    fn begin_mark(&self, slot: usize) -> Result<(), GpuError> {
        self.enter()?;
        let mut staging = self.staging();
        staging.taken[slot] = 0;
        // SAFETY: the event lives as long as this.
        unsafe { result::event::record(staging.slots[slot].copied, self.compute) }.map_err(failed("cuEventRecord"))
    }

    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), GpuError> {
        self.enter()?;
        let mut staging = self.staging();
        let mut at = to;
        for piece in from.chunks(STAGE_BYTES) {
            let half = &staging.halves[staging.next];
            half.wait()?;
            // SAFETY: the half's last copy has ended and it has room; the caller answers for `to`.
            unsafe {
                std::ptr::copy_nonoverlapping(piece.as_ptr(), half.at, piece.len());
                let pinned = std::slice::from_raw_parts(half.at, piece.len());
                result::memcpy_htod_async(at, pinned, self.compute).map_err(failed("cuMemcpyHtoDAsync"))?;
                result::event::record(half.copied, self.compute).map_err(failed("cuEventRecord"))?;
            }
            at += piece.len() as u64;
            staging.next ^= 1;
        }
        Ok(())
    }

    unsafe fn pin(&self, at: *const u8, bytes: usize) -> Option<u64> {
        self.enter().ok()?;
        touch(at, bytes);
        let mut there = 0;
        // SAFETY: the caller's; a place for an address.
        unsafe {
            let flags = sys::CU_MEMHOSTREGISTER_DEVICEMAP;
            sys::cuMemHostRegister_v2(at as *mut c_void, bytes, flags).result().ok()?;
            sys::cuMemHostGetDevicePointer_v2(&mut there, at as *mut c_void, 0).result().ok()?;
        }
        Some(there)
    }

    unsafe fn unpin(&self, at: *const u8) {
        if self.enter().is_ok() {
            // SAFETY: the caller's.
            let _ = unsafe { sys::cuMemHostUnregister(at as *mut c_void) };
        }
    }

    unsafe fn upload_pinned(&self, to: u64, from: &[u8]) -> Result<(), GpuError> {
        self.enter()?;
        // SAFETY: the caller's.
        unsafe { result::memcpy_htod_async(to, from, self.compute) }.map_err(failed("cuMemcpyHtoDAsync"))
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), GpuError> {
        self.enter()?;
        // SAFETY: the caller's; synchronised before the borrow ends.
        unsafe {
            result::memcpy_dtoh_async(to, from, self.compute).map_err(failed("cuMemcpyDtoHAsync"))?;
            result::stream::synchronize(self.compute).map_err(failed("cuStreamSynchronize"))
        }
    }

    unsafe fn launch_beside(
        &self,
        slot: usize,
        kernel: Kernel,
        grid: [u32; 3],
        arguments: &mut [*mut c_void],
    ) -> Result<(), GpuError> {
        self.enter()?;
        let mut staging = self.staging();
        staging.taken[slot] = 0;
        let (grid, threads) = ((grid[0], grid[1], grid[2]), (kernel.threads, 1, 1));
        // SAFETY: the caller's.
        unsafe {
            result::event::record(staging.ready, self.compute).map_err(failed("cuEventRecord"))?;
            let plain = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            result::stream::wait_event(self.copies, staging.ready, plain).map_err(failed("cuStreamWaitEvent"))?;
            result::launch_kernel(self.functions[kernel.name], grid, threads, kernel.shared, self.copies, arguments)
                .map_err(failed(kernel.name))?;
            result::event::record(staging.slots[slot].copied, self.copies).map_err(failed("cuEventRecord"))
        }
    }

    unsafe fn begin_download(&self, slot: usize, from: u64, bytes: usize) -> Result<(), GpuError> {
        self.enter()?;
        let mut staging = self.staging();
        staging.slots[slot].grow(bytes)?;
        staging.taken[slot] = bytes;
        let (pinned, ready) = (&staging.slots[slot], staging.ready);
        // SAFETY: the slot is free and has room; the caller answers for `from`.
        unsafe {
            result::event::record(ready, self.compute).map_err(failed("cuEventRecord"))?;
            let plain = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            result::stream::wait_event(self.copies, ready, plain).map_err(failed("cuStreamWaitEvent"))?;
            let to = std::slice::from_raw_parts_mut(pinned.at, bytes);
            result::memcpy_dtoh_async(to, from, self.copies).map_err(failed("cuMemcpyDtoHAsync"))?;
            result::event::record(pinned.copied, self.copies).map_err(failed("cuEventRecord"))
        }
    }

    fn end_download(&self, slot: usize, take: &mut dyn FnMut(&[u8])) -> Result<(), GpuError> {
        self.enter()?;
        let staging = self.staging();
        staging.slots[slot].wait()?;
        if staging.taken[slot] > 0 {
            // SAFETY: the copy into the slot has ended.
            take(unsafe { std::slice::from_raw_parts(staging.slots[slot].at, staging.taken[slot]) });
        }
        Ok(())
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), GpuError> {
        self.enter()?;
        // SAFETY: the caller's.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.compute) }.map_err(failed("cuMemcpyDtoDAsync"))
    }

    unsafe fn fill(&self, at: u64, byte: u8, bytes: usize) -> Result<(), GpuError> {
        self.enter()?;
        // SAFETY: the caller's.
        unsafe { result::memset_d8_async(at, byte, bytes, self.compute) }.map_err(failed("cuMemsetD8Async"))
    }

    unsafe fn launch(&self, kernel: Kernel, grid: [u32; 3], arguments: &mut [*mut c_void]) -> Result<(), GpuError> {
        // SAFETY: the caller's.
        unsafe { self.launch_on(self.compute, kernel, grid, arguments) }
    }

    unsafe fn graph(&self, launches: &[Launched]) -> Option<u64> {
        // SAFETY: the caller's.
        unsafe { self.make_graph(launches) }
    }

    unsafe fn launch_graph(&self, graph: u64) -> Result<(), GpuError> {
        // SAFETY: the caller's.
        unsafe { self.give_graph(graph) }
    }

    fn drop_graph(&self, graph: u64) {
        self.destroy_graph(graph);
    }

    fn hopper(&self) -> Option<usize> {
        self.hopper
    }

    fn tensor_map(
        &self,
        at: u64,
        (rows, columns): (usize, usize),
        stride: usize,
        box_rows: usize,
    ) -> Result<TensorMap, GpuError> {
        let mut map = TensorMap([0; 16]);
        let (sizes, strides) = ([columns as u64, rows as u64], [stride as u64 * 2]);
        let (boxes, steps) = ([64u32, box_rows as u32], [1u32, 1]);
        // SAFETY: writes the map, which has the size and the alignment of the driver's; reads two sizes each.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                std::ptr::from_mut(&mut map).cast(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                at as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(failed("cuTensorMapEncodeTiled"))?;
        Ok(map)
    }

    fn finish(&self) -> Result<(), GpuError> {
        self.enter()?;
        // SAFETY: the streams live until drop.
        unsafe {
            result::stream::synchronize(self.compute).map_err(failed("cuStreamSynchronize"))?;
            result::stream::synchronize(self.copies).map_err(failed("cuStreamSynchronize"))?;
            for urgent in self.urgent {
                result::stream::synchronize(urgent).map_err(failed("cuStreamSynchronize"))?;
            }
            Ok(())
        }
    }

    fn memory(&self) -> Result<(usize, usize), GpuError> {
        self.enter()?;
        result::mem_get_info().map_err(failed("cuMemGetInfo"))
    }
}

impl Drop for Nvidia {
    fn drop(&mut self) {
        if self.finish().is_err() {
            // A device that has failed gives nothing back.
            return;
        }
        self.drop_errands();
        let mut staging = self.staging();
        let Staging { halves, slots, ready, .. } = &mut *staging;
        // SAFETY: everything has ended, and nobody else has these handles.
        unsafe {
            for pinned in halves.iter_mut().chain(slots) {
                pinned.free();
                let _ = result::event::destroy(pinned.copied);
            }
            let _ = result::event::destroy(*ready);
            let _ = result::stream::destroy(self.compute);
            let _ = result::stream::destroy(self.copies);
            for urgent in self.urgent {
                let _ = result::stream::destroy(urgent);
            }
            let _ = result::module::unload(self.module);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_are_named_as_the_compiler_does() {
        assert_eq!(arch((8, 0)), "sm_80");
        assert_eq!(arch((8, 9)), "sm_89");
        assert_eq!(arch((9, 0)), "sm_90a");
        assert_eq!(arch((10, 0)), "sm_100a");
        assert_eq!(arch((12, 0)), "sm_120a");
    }

    /// With a GPU or without one: an answer or an error that says what to do, never a panic.
    #[test]
    fn looking_for_gpus_never_panics() {
        match gpus() {
            Ok(found) => assert!(matches!(
                Nvidia::open(found.len(), &Cubins::new(std::env::temp_dir())).err(),
                Some(GpuError::NoGpu { .. })
            )),
            Err(error) => assert!(error.to_string().contains("driver"), "{error}"),
        }
    }
}
