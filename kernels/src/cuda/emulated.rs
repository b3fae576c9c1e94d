//! The kernels on this CPU: the same `.cu` sources, built as a library by the system's C++ compiler and loaded. For tests:
//! it checks indices, barriers and the order of sums, not how a tensor core rounds, and is slow.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::compile::{COMMON, FILES, source_hash};
use super::driver::{Driver, ERRAND_BYTES, Errand, Kernel, SLOTS};
use super::error::GpuError;

type Launch = unsafe extern "C" fn(*const c_char, *const c_uint, c_uint, c_uint, *mut *mut c_void) -> c_int;

/// "Device memory" is this process's.
pub(crate) struct Emulated {
    launch: Launch,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Bytes of each allocation.
    allocations: BTreeMap<u64, usize>,
    slots: [Vec<u8>; SLOTS],
    /// Of those that can be shared: what other processes map, or None of what is theirs.
    shared: BTreeMap<u64, Option<OwnedFd>>,
}

/// What fresh memory holds: as bf16 and as f32 no number, so that whoever reads what nobody wrote is found out.
const POISON: u8 = 0xff;
const ALIGNMENT: usize = 256;
/// What an emulated device claims to have.
const MEMORY: usize = 1 << 30;

/// What only the emulation needs.
const OWN: [(&str, &str); 2] =
    [("emulate.h", include_str!("src/emulate.h")), ("emulate.cpp", include_str!("src/emulate.cpp"))];
const COMPILERS: [&str; 3] = ["c++", "g++", "clang++"];
const FLAGS: [&str; 7] =
    ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-DBATON_EMULATED", "-Wno-unknown-pragmas"];

/// Builds the library in `folder`, unless it is there.
fn build(folder: &Path) -> Result<PathBuf, GpuError> {
    // Threads of one process would build in one folder.
    static BUILDING: Mutex<()> = Mutex::new(());
    let _alone = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    let failed = |what: String| GpuError::Emulation(what);
    let own = blake3::hash(OWN.map(|file| file.1).concat().as_bytes()).to_hex();
    let library = folder.join(format!("emulated-{}-{}.so", source_hash(), &own[..8]));
    if library.exists() {
        return Ok(library);
    }
    // Tests of several processes may build at the same time, each in a folder of its own.
    let sources = folder.join(format!("emulated.{}", std::process::id()));
    std::fs::create_dir_all(&sources).map_err(|error| failed(format!("{}: {error}", sources.display())))?;
    for (name, text) in FILES.into_iter().chain(OWN).chain([("common.cuh", COMMON)]) {
        std::fs::write(sources.join(name), text).map_err(|error| failed(error.to_string()))?;
    }
    let made = sources.join("emulated.so");
    let compile = |compiler: &&str| {
        let mut command = Command::new(compiler);
        command.args(FLAGS).arg(sources.join("emulate.cpp")).arg("-o").arg(&made).output().ok()
    };
    let output = COMPILERS.iter().find_map(compile);
    let output = output.ok_or_else(|| failed(format!("none of {} is installed", COMPILERS.join(", "))))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    std::fs::rename(&made, &library).map_err(|error| failed(error.to_string()))?;
    let _ = std::fs::remove_dir_all(sources);
    Ok(library)
}

impl Emulated {
    /// Builds the library in `folder` unless it is there, and loads it; it stays loaded.
    pub(crate) fn open(folder: &Path) -> Result<Emulated, GpuError> {
        let library = build(folder)?;
        let path =
            CString::new(library.as_os_str().as_bytes()).map_err(|_| GpuError::Emulation("a bad path".into()))?;
        // SAFETY: loading runs the library's initialisers; it is ours and has none.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        if handle.is_null() {
            // SAFETY: dlerror gives a C string after a failure.
            let reason = unsafe { CStr::from_ptr(libc::dlerror()) };
            return Err(GpuError::Emulation(reason.to_string_lossy().into_owned()));
        }
        // SAFETY: the handle is valid.
        let symbol = unsafe { libc::dlsym(handle, c"emulated_launch".as_ptr()) };
        if symbol.is_null() {
            return Err(GpuError::Emulation("it has no emulated_launch".into()));
        }
        // SAFETY: src/emulate.cpp defines the symbol with this signature.
        let launch = unsafe { std::mem::transmute::<*mut c_void, Launch>(symbol) };
        Ok(Emulated { launch, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Panics unless the range lies in one allocation.
    fn check(&self, at: u64, bytes: usize) {
        let state = self.state();
        let inside = state
            .allocations
            .range(..=at)
            .next_back()
            .is_some_and(|(start, size)| at as usize + bytes <= *start as usize + size);
        assert!(inside || bytes == 0, "{bytes} bytes at {at:#x} lie in no allocation");
    }
}

/// Maps all of a descriptor's memory.
fn map(descriptor: &OwnedFd, bytes: usize, access: c_int) -> Result<u64, GpuError> {
    // SAFETY: a new mapping, wherever the kernel puts it.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, descriptor.as_raw_fd(), 0) };
    match at == libc::MAP_FAILED {
        true => Err(GpuError::Emulation(std::io::Error::last_os_error().to_string())),
        false => Ok(at as u64),
    }
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes.max(1), ALIGNMENT).expect("a size that fits")
}

impl Driver for Emulated {
    fn allocate(&self, bytes: usize) -> Result<u64, GpuError> {
        // SAFETY: the size is not zero.
        let at = unsafe { alloc(layout(bytes)) };
        if at.is_null() {
            return Err(GpuError::Memory { asked: bytes, free: 0 });
        }
        // SAFETY: just allocated with this size.
        unsafe { at.write_bytes(POISON, bytes) };
        self.state().allocations.insert(at as u64, bytes);
        Ok(at as u64)
    }

    unsafe fn free(&self, at: u64) {
        let mut state = self.state();
        let (allocation, shared) = (state.allocations.remove(&at), state.shared.remove(&at));
        drop(state);
        let Some(bytes) = allocation else { return };
        if shared.is_some() {
            // SAFETY: mapped by `map` with this length.
            unsafe { libc::munmap(at as *mut c_void, bytes.max(1)) };
        } else {
            // SAFETY: allocated by `allocate` with this size.
            unsafe { dealloc(at as *mut u8, layout(bytes)) };
        }
    }

    fn allocate_shared(&self, bytes: usize) -> Result<u64, GpuError> {
        let failed = || GpuError::Emulation(std::io::Error::last_os_error().to_string());
        // SAFETY: a C string and flags; the descriptor is new and ours.
        let descriptor = unsafe {
            let raw = libc::memfd_create(c"baton emulated".as_ptr(), libc::MFD_CLOEXEC);
            if raw < 0 || libc::ftruncate(raw, bytes.max(1) as libc::off_t) < 0 {
                return Err(failed());
            }
            OwnedFd::from_raw_fd(raw)
        };
        let at = map(&descriptor, bytes.max(1), libc::PROT_READ | libc::PROT_WRITE)?;
        // SAFETY: just mapped with this size.
        unsafe { (at as *mut u8).write_bytes(POISON, bytes) };
        let mut state = self.state();
        state.allocations.insert(at, bytes);
        state.shared.insert(at, Some(descriptor));
        Ok(at)
    }

    fn export(&self, at: u64) -> Result<OwnedFd, GpuError> {
        let state = self.state();
        let descriptor = state.shared.get(&at).and_then(Option::as_ref);
        let none = || GpuError::Emulation("this memory is not shared".to_string());
        descriptor.ok_or_else(none)?.try_clone().map_err(|error| GpuError::Emulation(error.to_string()))
    }

    fn import(&self, descriptor: OwnedFd, least: usize) -> Result<u64, GpuError> {
        let failed = |what: &str| GpuError::Emulation(what.to_string());
        let bytes = std::fs::File::from(descriptor.try_clone().map_err(|error| failed(&error.to_string()))?)
            .metadata()
            .map_err(|error| failed(&error.to_string()))?
            .len() as usize;
        if bytes < least {
            return Err(failed("the memory is smaller than its blocks"));
        }
        let at = map(&descriptor, bytes, libc::PROT_READ)?;
        let mut state = self.state();
        state.allocations.insert(at, bytes);
        state.shared.insert(at, None);
        Ok(at)
    }

    fn errand(&self) -> Result<Errand, GpuError> {
        let host = Box::into_raw(Box::new([POISON; ERRAND_BYTES])).cast::<u8>();
        Ok(Errand { host, at: host as u64, event: 0 })
    }

    unsafe fn launch_errand(
        &self,
        _errand: &Errand,
        kernel: Kernel,
        grid: [u32; 3],
        arguments: &mut [*mut c_void],
    ) -> Result<(), GpuError> {
        // SAFETY: the caller's.
        unsafe { self.launch(kernel, grid, arguments) }
    }

    fn wait_errand(&self, _errand: &Errand) -> Result<(), GpuError> {
        Ok(())
    }

    fn end_errand(&self, errand: Errand) {
        // SAFETY: made by `errand` as a box of this type.
        drop(unsafe { Box::from_raw(errand.host.cast::<[u8; ERRAND_BYTES]>()) });
    }

    fn begin_mark(&self, slot: usize) -> Result<(), GpuError> {
        self.state().slots[slot].clear();
        Ok(())
    }

    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), GpuError> {
        self.check(to, from.len());
        // SAFETY: checked.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), GpuError> {
        self.check(from, to.len());
        // SAFETY: checked.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn begin_download(&self, slot: usize, from: u64, bytes: usize) -> Result<(), GpuError> {
        let mut taken = vec![0; bytes];
        // SAFETY: the caller's.
        unsafe { self.download(from, &mut taken)? };
        self.state().slots[slot] = taken;
        Ok(())
    }

    fn end_download(&self, slot: usize, take: &mut dyn FnMut(&[u8])) -> Result<(), GpuError> {
        let taken = std::mem::take(&mut self.state().slots[slot]);
        take(&taken);
        Ok(())
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), GpuError> {
        self.check(from, bytes);
        self.check(to, bytes);
        // SAFETY: checked.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    unsafe fn fill(&self, at: u64, byte: u8, bytes: usize) -> Result<(), GpuError> {
        self.check(at, bytes);
        // SAFETY: checked.
        unsafe { (at as *mut u8).write_bytes(byte, bytes) };
        Ok(())
    }

    unsafe fn launch(&self, kernel: Kernel, grid: [u32; 3], arguments: &mut [*mut c_void]) -> Result<(), GpuError> {
        let name = CString::new(kernel.name).expect("kernel names have no zeros");
        // SAFETY: the caller's; the library finds the kernel by its name.
        let found = unsafe {
            (self.launch)(name.as_ptr(), grid.as_ptr(), kernel.threads, kernel.shared, arguments.as_mut_ptr())
        };
        match found {
            0 => Ok(()),
            _ => Err(GpuError::Emulation(format!("it has no kernel {}", kernel.name))),
        }
    }

    unsafe fn launch_beside(
        &self,
        slot: usize,
        kernel: Kernel,
        grid: [u32; 3],
        arguments: &mut [*mut c_void],
    ) -> Result<(), GpuError> {
        self.state().slots[slot].clear();
        // SAFETY: the caller's.
        unsafe { self.launch(kernel, grid, arguments) }
    }

    unsafe fn pin(&self, at: *const u8, _bytes: usize) -> Option<u64> {
        Some(at as u64)
    }

    fn finish(&self) -> Result<(), GpuError> {
        Ok(())
    }

    fn memory(&self) -> Result<(usize, usize), GpuError> {
        let used = self.state().allocations.values().sum::<usize>();
        Ok((MEMORY.saturating_sub(used), MEMORY))
    }
}
