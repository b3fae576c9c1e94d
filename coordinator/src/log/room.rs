//! A disk that remembers whether it has run full, so that its node can step aside and come back.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::disk::{Appender, Disk};

/// Bytes that must fit on the disk before a node takes part again.
pub(crate) const ROOM_BYTES: usize = 256 << 10;
/// File that is written to see whether they do.
const PROBE: &str = "room";

/// Any disk, watched.
pub(crate) struct Room {
    disk: Arc<dyn Disk>,
    full: Arc<AtomicBool>,
}

impl Room {
    pub(crate) fn new(disk: Arc<dyn Disk>) -> Room {
        Room { disk, full: Arc::default() }
    }

    /// Whether a write has failed for want of space since the last `has_room` that found some.
    pub(crate) fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// Tries whether there is room again.
    pub(crate) fn has_room(&self) -> bool {
        let fits = self.disk.replace(PROBE, &vec![0; ROOM_BYTES]).is_ok();
        // What was written of it would fill the disk by itself.
        let removed = self.disk.remove(PROBE).is_ok();
        let room = fits && removed;
        self.full.store(!room, Ordering::Relaxed);
        room
    }

    fn note<T>(&self, result: io::Result<T>) -> io::Result<T> {
        note(&self.full, result)
    }
}

fn note<T>(full: &AtomicBool, result: io::Result<T>) -> io::Result<T> {
    result.inspect_err(|error| {
        if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            full.store(true, Ordering::Relaxed);
        }
    })
}

impl Disk for Room {
    fn path(&self, name: &str) -> String {
        self.disk.path(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.disk.list()
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        self.disk.read(name)
    }

    fn read_at(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.disk.read_at(name, offset, len)
    }

    fn append(&self, name: &str) -> io::Result<Box<dyn Appender>> {
        let end = self.note(self.disk.append(name))?;
        Ok(Box::new(End { end, full: self.full.clone() }))
    }

    fn truncate(&self, name: &str, len: u64) -> io::Result<()> {
        self.note(self.disk.truncate(name, len))
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.note(self.disk.replace(name, bytes))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.disk.remove(name)
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.note(self.disk.sync_directory())
    }

    fn inline_delay(&self) -> Option<Duration> {
        self.disk.inline_delay()
    }
}

struct End {
    end: Box<dyn Appender>,
    full: Arc<AtomicBool>,
}

impl Appender for End {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        note(&self.full, self.end.write(bytes))
    }

    fn sync(&mut self) -> io::Result<()> {
        note(&self.full, self.end.sync())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::MemoryDisk;

    #[test]
    fn a_full_disk_is_noticed_and_so_is_its_room() {
        let disk = MemoryDisk::new(Duration::ZERO);
        let room = Room::new(Arc::new(disk.clone()));
        let mut end = room.append("a").unwrap();
        end.write(b"fits").unwrap();
        assert!(!room.is_full() && room.has_room());
        disk.limit(Some(10));
        assert!(end.write(b"does not fit").is_err() && room.is_full());
        assert!(!room.has_room() && room.is_full());
        disk.limit(Some(10 + ROOM_BYTES));
        assert!(room.has_room() && !room.is_full());
        assert_eq!(room.list().unwrap(), ["a"], "nothing is left of the trial");
    }
}
