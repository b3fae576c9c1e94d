//! Where a disk tier's bytes are: a file, or in tests memory that fails.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes that stay. Reads and writes are whole or fail.
pub(crate) trait Store: Send {
    fn len(&self) -> io::Result<u64>;
    fn resize(&mut self, len: u64) -> io::Result<()>;
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()>;
    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()>;
}

/// One file that belongs to this process alone.
pub(crate) struct FileStore(File);

impl FileStore {
    const NAME: &str = "blocks.kv";

    /// The file in `folder`, both made if they are not there.
    pub(crate) fn open(folder: &Path) -> io::Result<FileStore> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join(FileStore::NAME);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(FileStore(file)),
            Err(TryLockError::WouldBlock) => {
                let used = format!("{} is in use by another process; give each worker a folder", path.display());
                Err(io::Error::new(io::ErrorKind::ResourceBusy, used))
            }
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

impl Store for FileStore {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn resize(&mut self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(into, at)
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, at)
    }
}
