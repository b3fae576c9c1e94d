//! A child's log on disk: bounded, the file before kept as `<name>.1`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Size at which a new file is begun.
const BYTES_MAX: u64 = 16 << 20;

/// An open log.
#[derive(Debug)]
pub(crate) struct LogFile {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl LogFile {
    /// Continues the log at `path`.
    pub(crate) fn open(path: &Path) -> io::Result<LogFile> {
        let file = File::options().create(true).append(true).open(path)?;
        let bytes = file.metadata()?.len();
        Ok(LogFile { path: path.to_path_buf(), file, bytes })
    }

    /// Adds whole lines.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.bytes > BYTES_MAX {
            fs::rename(&self.path, self.path.with_extension("log.1"))?;
            *self = LogFile::open(&self.path)?;
        }
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes)
    }
}
