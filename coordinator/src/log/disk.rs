//! The disk seam: named files in one directory. Production is a directory of the file system; the simulator and the
//! tests hold files in memory that can lose unsynced writes, tear them, or be full.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A flat directory that belongs to one coordinator.
pub trait Disk: Send + Sync + 'static {
    /// Where a file is, for messages.
    fn path(&self, name: &str) -> String;
    /// Names of all files, sorted.
    fn list(&self) -> io::Result<Vec<String>>;
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;
    fn read_at(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>>;
    /// Opens a file for appending, at its end; makes it if it is not there.
    fn append(&self, name: &str) -> io::Result<Box<dyn Appender>>;
    /// Cuts a file, durably.
    fn truncate(&self, name: &str, len: u64) -> io::Result<()>;
    /// Writes a whole file so that after a crash it is the old one or the new one.
    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()>;
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes creations and removals durable.
    fn sync_directory(&self) -> io::Result<()>;
    /// None: writes block, and the log gives them a thread. Some: they run inline after this delay of virtual time.
    fn inline_delay(&self) -> Option<Duration>;
}

/// The end of one file.
pub trait Appender: Send {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Returns when everything written is durable.
    fn sync(&mut self) -> io::Result<()>;
}

/// A directory of the file system, held by this process alone.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    /// Locked while this value lives.
    _lock: File,
}

const LOCK: &str = "lock";
const TEMPORARY: &str = ".new";

#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    #[error("{0} is in use by another process: one coordinator per data directory")]
    InUse(String),
    #[error("data directory {path}: {error}")]
    Io { path: String, error: io::Error },
}

impl Directory {
    /// Makes the directory if needed and takes it for this process.
    pub fn open(path: &Path) -> Result<Directory, DirectoryError> {
        let text = || path.display().to_string();
        let lock = Directory::lock_file(path).map_err(|error| DirectoryError::Io { path: text(), error })?;
        match lock.try_lock() {
            Ok(()) => Ok(Directory { path: path.to_path_buf(), _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(DirectoryError::InUse(text())),
            Err(TryLockError::Error(error)) => Err(DirectoryError::Io { path: text(), error }),
        }
    }

    fn lock_file(path: &Path) -> io::Result<File> {
        std::fs::create_dir_all(path)?;
        OpenOptions::new().create(true).truncate(false).write(true).open(path.join(LOCK))
    }
}

impl Disk for Directory {
    fn path(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.path)?;
        let names = entries.map(|entry| entry.map(|e| e.file_name().to_string_lossy().into_owned()));
        let mut names = names.collect::<io::Result<Vec<String>>>()?;
        names.retain(|name| name != LOCK && !name.ends_with(TEMPORARY));
        names.sort();
        Ok(names)
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(self.path.join(name))?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn read_at(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        File::open(self.path.join(name))?.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn append(&self, name: &str) -> io::Result<Box<dyn Appender>> {
        let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(self.path.join(name))?;
        file.seek(SeekFrom::End(0))?;
        Ok(Box::new(file))
    }

    fn truncate(&self, name: &str, len: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(self.path.join(name))?;
        file.set_len(len)?;
        file.sync_all()
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let temporary = self.path.join(format!("{name}{TEMPORARY}"));
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, self.path.join(name))?;
        self.sync_directory()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.path.join(name))
    }

    fn sync_directory(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    fn inline_delay(&self) -> Option<Duration> {
        None
    }
}

impl Appender for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}
