//! The seam below the kernels: memory of a device, copies to and from it, launches. Production is a GPU (nvidia.rs); the
//! kernels are tested without one by an emulation on the CPU (emulated.rs).

use std::ffi::c_void;
use std::os::fd::OwnedFd;

use super::error::GpuError;
use super::launch::TensorMap;
use super::recorded::Launched;

/// A kernel by name, with what each launch of it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kernel {
    pub(crate) name: &'static str,
    pub(crate) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(crate) shared: u32,
}

/// Downloads on their way at a time.
pub(crate) const SLOTS: usize = 2;

/// Bytes that an errand takes along and brings back.
pub(crate) const ERRAND_BYTES: usize = 16 << 10;

/// A launch beside all others, with memory of its own that the host and the device both see.
pub(crate) struct Errand {
    /// `ERRAND_BYTES` of the host's, and where the device finds them.
    pub(crate) host: *mut u8,
    pub(crate) at: u64,
    /// The driver's.
    pub(crate) event: u64,
}

// SAFETY: memory and a handle that belong to whoever has the errand.
unsafe impl Send for Errand {}

/// One device. Work is done in the order it is given; `download` and `finish` wait for it.
pub(crate) trait Driver: Send + Sync {
    /// Memory with any content.
    fn allocate(&self, bytes: usize) -> Result<u64, GpuError>;

    /// # Safety
    /// `at` came from `allocate`, `allocate_shared` or `import`, and nothing that was given uses it any more but what is done
    /// before this.
    unsafe fn free(&self, at: u64);

    /// As `allocate`, of memory that `export` can let others read where the device has such memory.
    fn allocate_shared(&self, bytes: usize) -> Result<u64, GpuError>;

    /// What lets another process of this host map memory that came from `allocate_shared`.
    fn export(&self, at: u64) -> Result<OwnedFd, GpuError>;

    /// Maps another process's memory of at least so many bytes, for reading. It stays when its owner goes.
    fn import(&self, descriptor: OwnedFd, least: usize) -> Result<u64, GpuError>;

    fn errand(&self) -> Result<Errand, GpuError>;

    /// Launches beside everything else and before it, one errand after another: not after what was given elsewhere.
    ///
    /// # Safety
    /// As `launch`; and nothing else touches what the kernel writes, or writes what it reads, before `wait_errand`, but
    /// another process what it reads of its own.
    unsafe fn launch_errand(
        &self,
        errand: &Errand,
        kernel: Kernel,
        grid: [u32; 3],
        arguments: &mut [*mut c_void],
    ) -> Result<(), GpuError>;

    fn wait_errand(&self, errand: &Errand) -> Result<(), GpuError>;

    /// Gives an errand back that was never launched or has been waited for.
    fn end_errand(&self, errand: Errand);

    /// `end_download` of this slot waits until all that was given before is done, and reads nothing.
    fn begin_mark(&self, slot: usize) -> Result<(), GpuError>;

    /// # Safety
    /// `to` is memory of this device with room for the bytes.
    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), GpuError>;

    /// Lets the device read and write memory of the host by itself, which keeps it in place: where the device finds it, or
    /// None where that cannot be.
    ///
    /// # Safety
    /// The memory exists until `unpin`.
    unsafe fn pin(&self, at: *const u8, bytes: usize) -> Option<u64>;

    /// # Safety
    /// `at` was pinned, and nothing that was given reads it any more.
    unsafe fn unpin(&self, _at: *const u8) {}

    /// As `upload` from pinned memory, which must not change until what was given is done.
    ///
    /// # Safety
    /// As `upload`; and the bytes are pinned.
    unsafe fn upload_pinned(&self, to: u64, from: &[u8]) -> Result<(), GpuError> {
        // SAFETY: the caller's.
        unsafe { self.upload(to, from) }
    }

    /// # Safety
    /// As `upload`.
    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), GpuError>;

    /// Launches beside what is given later, after all that was given before. The slot's last download must have ended;
    /// `end_download` waits for it and reads nothing.
    ///
    /// # Safety
    /// As `launch`; and nothing given later touches what the kernel writes, or writes what it reads, before `end_download`.
    unsafe fn launch_beside(
        &self,
        slot: usize,
        kernel: Kernel,
        grid: [u32; 3],
        arguments: &mut [*mut c_void],
    ) -> Result<(), GpuError>;

    /// Begins a download beside what is given later. The slot's last download must have ended.
    ///
    /// # Safety
    /// As `upload`; and nothing given later writes the memory before `end_download`.
    unsafe fn begin_download(&self, slot: usize, from: u64, bytes: usize) -> Result<(), GpuError>;

    /// Waits for a slot's download and lets `take` read it.
    fn end_download(&self, slot: usize, take: &mut dyn FnMut(&[u8])) -> Result<(), GpuError>;

    /// Copies inside the device, as fast as the driver can.
    ///
    /// # Safety
    /// Both are memory of this device with room for the bytes.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), GpuError>;

    /// # Safety
    /// As `upload`.
    unsafe fn fill(&self, at: u64, byte: u8, bytes: usize) -> Result<(), GpuError>;

    /// # Safety
    /// `arguments` point to values of the types of the kernel's parameters, and what they point to on the device exists.
    unsafe fn launch(&self, kernel: Kernel, grid: [u32; 3], arguments: &mut [*mut c_void]) -> Result<(), GpuError>;

    /// Launches as one, for `launch_graph`; None where there is no such thing.
    ///
    /// # Safety
    /// As `launch` of each.
    unsafe fn graph(&self, _launches: &[Launched]) -> Option<u64> {
        None
    }

    /// # Safety
    /// As `graph`, which made it.
    unsafe fn launch_graph(&self, _graph: u64) -> Result<(), GpuError> {
        Err(GpuError::Call { call: "cuGraphLaunch", what: "this device has no graphs".to_string() })
    }

    /// Gives up what `graph` made.
    fn drop_graph(&self, _graph: u64) {}

    /// Thread blocks that stay on the device at a time when each fills a multiprocessor, if it has `launch::HOPPERS`.
    fn hopper(&self) -> Option<usize> {
        None
    }

    /// How the copy engine finds boxes of so many rows and 64 columns in a matrix of bf16, (rows, columns) of which the next
    /// row begins `stride` elements on. Only where there is `hopper`.
    fn tensor_map(
        &self,
        _at: u64,
        _shape: (usize, usize),
        _stride: usize,
        _box_rows: usize,
    ) -> Result<TensorMap, GpuError> {
        Err(GpuError::Call { call: "cuTensorMapEncodeTiled", what: "this device has no copy engine".to_string() })
    }

    /// Waits for all that was given.
    fn finish(&self) -> Result<(), GpuError>;

    /// (free, total) bytes.
    fn memory(&self) -> Result<(usize, usize), GpuError>;
}
