//! Memory that other processes can map, where the system has none that this project knows.

use std::ffi::CStr;
use std::io;
use std::path::{Path, PathBuf};

/// There is none.
pub enum Mapping {}

impl Mapping {
    pub fn new(_: &CStr, _: usize) -> io::Result<Mapping> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub fn join(_: &Path) -> io::Result<Mapping> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub fn path(&self) -> PathBuf {
        match *self {}
    }

    pub fn start(&self) -> *mut u8 {
        match *self {}
    }

    pub fn bytes(&self) -> usize {
        match *self {}
    }
}
