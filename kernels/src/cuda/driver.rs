//! The seam below the kernels: memory of a device, copies to and from it, launches. Production is a GPU (nvidia.rs); the
//! kernels are tested without one by an emulation on the CPU (emulated.rs).

use std::ffi::c_void;

use super::error::GpuError;
use super::launch::TensorMap;

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

/// One device. Work is done in the order it is given; `download` and `finish` wait for it.
pub(crate) trait Driver: Send + Sync {
    /// Memory with any content.
    fn allocate(&self, bytes: usize) -> Result<u64, GpuError>;

    /// # Safety
    /// `at` came from `allocate`, and nothing that was given uses it any more but what is done before this.
    unsafe fn free(&self, at: u64);

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

    /// # Safety
    /// As `upload`.
    unsafe fn fill(&self, at: u64, byte: u8, bytes: usize) -> Result<(), GpuError>;

    /// # Safety
    /// `arguments` point to values of the types of the kernel's parameters, and what they point to on the device exists.
    unsafe fn launch(&self, kernel: Kernel, grid: [u32; 3], arguments: &mut [*mut c_void]) -> Result<(), GpuError>;

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
