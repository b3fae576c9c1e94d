//! A disk in memory for tests and the simulator: a crash loses what was not synced, or leaves a torn part of it; the
//! disk can be full; bytes can be changed.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::disk::{Appender, Disk};

#[derive(Clone, Debug, Default)]
struct File {
    bytes: Vec<u8>,
    /// Length that survives a crash.
    synced: usize,
    /// Whether the name survives a crash.
    linked: bool,
}

#[derive(Debug, Default)]
struct Files {
    files: BTreeMap<String, File>,
    /// Bytes that all files may take together.
    capacity: Option<usize>,
    /// Virtual time that a write takes.
    delay: Duration,
    /// Syncs done; a test can read how often the log waited.
    syncs: u64,
}

/// Clones are the same disk, also across restarts of what uses it.
#[derive(Clone, Debug)]
pub struct MemoryDisk {
    files: Arc<Mutex<Files>>,
}

impl MemoryDisk {
    /// `delay`: virtual time that a write takes.
    pub fn new(delay: Duration) -> MemoryDisk {
        MemoryDisk { files: Arc::new(Mutex::new(Files { delay, ..Files::default() })) }
    }

    /// Power is lost: of each file's unsynced bytes the first `kept` survive, and files never made durable go.
    pub fn crash(&self, kept: usize) {
        let mut disk = self.lock();
        disk.files.retain(|_, file| file.linked);
        for file in disk.files.values_mut() {
            file.bytes.truncate(file.synced.saturating_add(kept));
            file.synced = file.bytes.len();
        }
    }

    /// The disk is lost, and an empty one is in its place.
    pub fn wipe(&self) {
        self.lock().files.clear();
    }

    /// Limits the bytes of all files together; None lifts the limit.
    pub fn limit(&self, capacity: Option<usize>) {
        self.lock().capacity = capacity;
    }

    /// Changes the virtual time that a write takes.
    pub fn slow(&self, delay: Duration) {
        self.lock().delay = delay;
    }

    /// A file's bytes, to change them behind the log's back.
    pub fn edit(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut disk = self.lock();
        let file = disk.files.get_mut(name).expect("a file of that name");
        change(&mut file.bytes);
        file.synced = file.bytes.len();
    }

    /// An independent disk with the same content.
    pub fn copy(&self) -> MemoryDisk {
        let disk = self.lock();
        let files = Files { files: disk.files.clone(), capacity: disk.capacity, delay: disk.delay, syncs: 0 };
        MemoryDisk { files: Arc::new(Mutex::new(files)) }
    }

    /// Bytes that a crash may lose, of the file with most of them.
    pub fn unsynced(&self) -> usize {
        self.lock().files.values().map(|file| file.bytes.len() - file.synced.min(file.bytes.len())).max().unwrap_or(0)
    }

    /// Syncs of files so far.
    pub fn syncs(&self) -> u64 {
        self.lock().syncs
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Files> {
        self.files.lock().expect("disk lock")
    }
}

impl Files {
    fn get(&self, name: &str) -> io::Result<&File> {
        self.files.get(name).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, name.to_string()))
    }

    fn room_for(&self, more: usize) -> io::Result<()> {
        let used: usize = self.files.values().map(|file| file.bytes.len()).sum();
        match self.capacity {
            Some(capacity) if used + more > capacity => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }
}

impl Disk for MemoryDisk {
    fn path(&self, name: &str) -> String {
        format!("memory/{name}")
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.lock().files.keys().cloned().collect())
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        Ok(self.lock().get(name)?.bytes.clone())
    }

    fn read_at(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let disk = self.lock();
        let end = (offset as usize).checked_add(len);
        let bytes = end.and_then(|end| disk.files.get(name)?.bytes.get(offset as usize..end));
        bytes.map(<[u8]>::to_vec).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn append(&self, name: &str) -> io::Result<Box<dyn Appender>> {
        self.lock().files.entry(name.to_string()).or_default();
        Ok(Box::new(End { disk: self.clone(), name: name.to_string() }))
    }

    fn truncate(&self, name: &str, len: u64) -> io::Result<()> {
        let mut disk = self.lock();
        disk.get(name)?;
        let file = disk.files.get_mut(name).expect("looked up above");
        file.bytes.truncate(len as usize);
        file.synced = file.bytes.len();
        Ok(())
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut disk = self.lock();
        disk.room_for(bytes.len())?;
        let file = File { bytes: bytes.to_vec(), synced: bytes.len(), linked: true };
        disk.files.insert(name.to_string(), file);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut disk = self.lock();
        disk.get(name)?;
        disk.files.remove(name);
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.lock().files.values_mut().for_each(|file| file.linked = true);
        Ok(())
    }

    fn inline_delay(&self) -> Option<Duration> {
        Some(self.lock().delay)
    }
}

struct End {
    disk: MemoryDisk,
    name: String,
}

impl Appender for End {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut disk = self.disk.lock();
        disk.room_for(bytes.len())?;
        let file = disk.files.get_mut(&self.name);
        file.ok_or(io::ErrorKind::NotFound)?.bytes.extend(bytes);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut disk = self.disk.lock();
        disk.syncs += 1;
        let file = disk.files.get_mut(&self.name).ok_or(io::ErrorKind::NotFound)?;
        file.synced = file.bytes.len();
        Ok(())
    }
}
