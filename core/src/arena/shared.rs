//! Memory that other processes of the host can map: a memfd, sealed so that it never shrinks under its readers.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;

/// A mapping of the whole of a descriptor's memory.
pub(super) struct Mapping {
    descriptor: OwnedFd,
    start: *mut u8,
    bytes: usize,
}

const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

impl Mapping {
    /// New zeroed memory, for reading and writing.
    pub(super) fn new(bytes: usize) -> io::Result<Mapping> {
        // SAFETY: a C string and flags; the descriptor is nobody else's.
        let descriptor = unsafe {
            let raw =
                checked(libc::memfd_create(c"baton arena".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING))?;
            OwnedFd::from_raw_fd(raw)
        };
        // SAFETY: calls on an open descriptor.
        unsafe {
            checked(libc::ftruncate(descriptor.as_raw_fd(), bytes as libc::off_t))?;
            checked(libc::fcntl(descriptor.as_raw_fd(), libc::F_ADD_SEALS, SEALS))?;
        }
        Mapping::map(descriptor, bytes, libc::PROT_READ | libc::PROT_WRITE)
    }

    /// Somebody else's memory, for reading.
    pub(super) fn of(descriptor: OwnedFd) -> io::Result<Mapping> {
        let refused = |text: &str| Err(io::Error::new(io::ErrorKind::InvalidData, text.to_string()));
        // SAFETY: calls on an open descriptor, into a struct of the right type.
        let (seals, bytes) = unsafe {
            let seals = libc::fcntl(descriptor.as_raw_fd(), libc::F_GET_SEALS);
            let mut stat: libc::stat = std::mem::zeroed();
            checked(libc::fstat(descriptor.as_raw_fd(), &mut stat))?;
            (seals, stat.st_size)
        };
        if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
            return refused("the memory could shrink under its readers: it is not a sealed memfd");
        }
        match usize::try_from(bytes) {
            Ok(bytes) if bytes > 0 => Mapping::map(descriptor, bytes, libc::PROT_READ),
            _ => refused("the memory is empty"),
        }
    }

    fn map(descriptor: OwnedFd, bytes: usize, access: libc::c_int) -> io::Result<Mapping> {
        // SAFETY: a new mapping, wherever the kernel puts it.
        let start = unsafe { libc::mmap(null_mut(), bytes, access, libc::MAP_SHARED, descriptor.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: advice about the mapping just made; where it is not taken nothing changes.
        unsafe { libc::madvise(start, bytes, libc::MADV_HUGEPAGE) };
        Ok(Mapping { descriptor, start: start.cast(), bytes })
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.start
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Opened anew, because a copy of the descriptor would carry the right to write along.
    pub(super) fn for_reading(&self) -> io::Result<OwnedFd> {
        let file = std::fs::File::open(format!("/proc/self/fd/{}", self.descriptor.as_raw_fd()))?;
        Ok(file.into())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length; the arena that owns this is the only user.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
