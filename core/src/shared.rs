//! Memory that other processes of the host can map: a memfd, sealed so that it never shrinks under its readers.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;

/// A mapping of the whole of a descriptor's memory.
pub struct Mapping {
    descriptor: OwnedFd,
    start: *mut u8,
    bytes: usize,
}

const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
const WRITABLE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

// SAFETY: plain memory; who may touch which part when is the duty of whoever has the mapping.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// New zeroed memory, for reading and writing. The name is for people who look at the process.
    pub fn new(name: &CStr, bytes: usize) -> io::Result<Mapping> {
        // SAFETY: a C string and flags; the descriptor is nobody else's.
        let descriptor = unsafe {
            let raw = checked(libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING))?;
            OwnedFd::from_raw_fd(raw)
        };
        // SAFETY: calls on an open descriptor.
        unsafe {
            checked(libc::ftruncate(descriptor.as_raw_fd(), bytes as libc::off_t))?;
            checked(libc::fcntl(descriptor.as_raw_fd(), libc::F_ADD_SEALS, SEALS))?;
        }
        Mapping::map(descriptor, bytes, WRITABLE)
    }

    /// Somebody else's memory, for reading.
    pub fn of(descriptor: OwnedFd) -> io::Result<Mapping> {
        let bytes = Mapping::bytes_of(&descriptor)?;
        Mapping::map(descriptor, bytes, libc::PROT_READ)
    }

    /// The memory of another process of this user, for reading and writing, at the path that it gave.
    pub fn join(path: &Path) -> io::Result<Mapping> {
        let descriptor = OwnedFd::from(std::fs::File::options().read(true).write(true).open(path)?);
        let bytes = Mapping::bytes_of(&descriptor)?;
        Mapping::map(descriptor, bytes, WRITABLE)
    }

    /// Its size, when it never becomes smaller.
    fn bytes_of(descriptor: &OwnedFd) -> io::Result<usize> {
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
            Ok(bytes) if bytes > 0 => Ok(bytes),
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

    pub fn start(&self) -> *mut u8 {
        self.start
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where processes of the same user can `join`, while this one has the mapping.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.descriptor.as_raw_fd()))
    }

    /// Opened anew, because a copy of the descriptor would carry the right to write along.
    pub fn for_reading(&self) -> io::Result<OwnedFd> {
        let file = std::fs::File::open(format!("/proc/self/fd/{}", self.descriptor.as_raw_fd()))?;
        Ok(file.into())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length; the owner of this is the only user.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever joins reads and writes the same bytes; a file, which could shrink, is not joined.
    #[test]
    fn joined_memory_is_one() {
        let here = Mapping::new(c"test", 100).expect("shared memory");
        let there = Mapping::join(&here.path()).expect("the same memory");
        assert_eq!((there.bytes(), here.bytes()), (100, 100));
        // SAFETY: this test is the only user of both; both are 100 bytes.
        unsafe {
            here.start().add(7).write(1);
            there.start().add(99).write(2);
            assert_eq!((there.start().add(7).read(), here.start().add(99).read()), (1, 2));
        }
        let file = std::env::temp_dir().join(format!("baton-shared-test-{}", std::process::id()));
        std::fs::write(&file, [0; 100]).expect("a file");
        assert!(Mapping::join(&file).is_err());
        std::fs::remove_file(&file).expect("the file");
        assert!(Mapping::join(&file).is_err());
    }
}
