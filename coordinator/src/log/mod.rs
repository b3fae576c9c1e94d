//! The durable log: entries, vote and marks as bytes in numbered segments, written by one writer with group commit.
//! Knows nothing of Raft. A torn tail is cut, damage anywhere else is refused with its place, and nothing is reported
//! durable before it is.

mod disk;
#[cfg(test)]
mod exhaustive;
mod frame;
mod identity;
mod memory;
mod memory_disk;
mod recover;
mod room;
mod snapshot;
#[cfg(test)]
mod tests;
mod writer;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use bytes::Bytes;
use tokio::sync::mpsc::Sender;
use tokio::sync::oneshot;

pub use disk::{Appender, Directory, DirectoryError, Disk};
pub use identity::{Identity, IdentityError};
use memory::{Body, Memory};
pub use memory_disk::MemoryDisk;
pub(crate) use room::Room;
pub use snapshot::{Saved, load_snapshot, save_snapshot};
pub use writer::Done;
use writer::{Append, Item, Running, Start, Writer};

/// Why a log or a snapshot cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error(
        "{path} is damaged at byte {offset}: {what}. Replace this node, or put back an undamaged copy; nothing was changed"
    )]
    Damaged { path: String, offset: u64, what: &'static str },
    #[error("entries {from} to {to} are missing before {path}: a segment file was removed")]
    Missing { path: String, from: u64, to: u64 },
    #[error("{path} has version {version}, newer than this binary: update it")]
    Newer { path: String, version: u32 },
    #[error("{path}: {error}")]
    Io { path: String, error: io::Error },
}

impl LogError {
    fn io(disk: &dyn Disk, name: &str, error: io::Error) -> LogError {
        LogError::Io { path: disk.path(name), error }
    }
}

/// What of a log a loss of power would leave now: the vote, and the index of the last entry. For checks.
pub(crate) fn durable(disk: &MemoryDisk) -> Result<(Option<Vec<u8>>, u64), LogError> {
    let left = disk.copy();
    left.crash(0);
    let log = recover::recover(&left)?;
    let purged = log.purged.map_or(0, |(index, _)| index);
    Ok((log.vote, purged.max((log.first + log.locations.len() as u64).saturating_sub(1))))
}

/// Whether a disk has never held a log nor a snapshot, or has lost them.
pub fn is_empty(disk: &dyn Disk) -> Result<bool, LogError> {
    let names = disk.list().map_err(|error| LogError::io(disk, "", error))?;
    Ok(!names.iter().any(|name| segment_number(name).is_some() || name == snapshot::NAME))
}

/// Sizes of a log.
#[derive(Clone, Copy, Debug)]
pub struct LogOptions {
    /// A segment that has grown to this is followed by a new one.
    pub segment_bytes_max: u64,
    /// Bytes of the latest entries kept in memory.
    pub recent_bytes_max: usize,
}

impl Default for LogOptions {
    fn default() -> LogOptions {
        LogOptions { segment_bytes_max: 16 << 20, recent_bytes_max: 4 << 20 }
    }
}

/// Where appends are handed in, and who does them.
type Writing = (Sender<Append>, Running);

/// Clones are handles of one log.
#[derive(Clone)]
pub struct Log {
    disk: Arc<dyn Disk>,
    memory: Arc<Mutex<Memory>>,
    writer: Arc<Mutex<Option<Writing>>>,
    damage: Arc<OnceLock<String>>,
    slow: Arc<AtomicU32>,
}

impl Log {
    /// Recovers the log of a disk, or begins one.
    pub fn open(disk: Arc<dyn Disk>, options: LogOptions) -> Result<Log, LogError> {
        let recovered = recover::recover(&*disk)?;
        if recovered.cut_bytes > 0 {
            tracing::warn!(bytes = recovered.cut_bytes, "cut the log's torn tail, which was never acknowledged");
        }
        let slow = Arc::new(AtomicU32::new(0));
        let start = Start {
            slow: slow.clone(),
            segments: recovered.segments.clone(),
            next_frame: recovered.next_frame,
            segment_bytes_max: options.segment_bytes_max,
        };
        let memory = Arc::new(Mutex::new(Memory::new(recovered, options.recent_bytes_max)));
        let writer = Writer::open(disk.clone(), memory.clone(), start)?;
        let running = writer.run().map_err(|error| LogError::io(&*disk, "", error))?;
        let writer = Arc::new(Mutex::new(Some(running)));
        Ok(Log { disk, memory, writer, damage: Arc::default(), slow })
    }

    /// Indices of the entries held.
    pub fn range(&self) -> Range<u64> {
        self.memory().range()
    }

    pub fn last(&self) -> Option<u64> {
        self.memory().last()
    }

    pub fn vote(&self) -> Option<Bytes> {
        self.memory().vote.clone()
    }

    pub fn committed(&self) -> Option<Bytes> {
        self.memory().committed.clone()
    }

    /// Remembers how far the log is committed. Travels with the next frame; older values after a crash are harmless.
    pub fn save_committed(&self, mark: Bytes) {
        self.memory().committed = Some(mark);
    }

    /// Last purged index and its tag.
    pub fn purged(&self) -> Option<(u64, Bytes)> {
        self.memory().purged.clone()
    }

    /// Bodies of the entries of `range` that are held, in order.
    pub fn read(&self, range: Range<u64>) -> io::Result<Vec<Bytes>> {
        let bodies: Vec<Body> = {
            let memory = self.memory();
            let held = memory.range();
            let range = range.start.max(held.start)..range.end.min(held.end);
            range.map_while(|index| memory.body(index)).collect()
        };
        bodies.into_iter().map(|body| self.load(body)).collect()
    }

    /// Appends entries, readable at once; `done` is called when they are durable.
    pub async fn append(&self, entries: Vec<(u64, Bytes)>, done: Done) -> io::Result<()> {
        let records = {
            let mut memory = self.memory();
            let item = |(index, body): (u64, Bytes)| {
                let ticket = memory.push(index, body.clone());
                Item::Entry { index, ticket, body }
            };
            entries.into_iter().map(item).collect()
        };
        self.send(Append { records, done }).await
    }

    /// Returns when the vote is durable.
    pub async fn save_vote(&self, vote: Bytes) -> io::Result<()> {
        self.memory().vote = Some(vote.clone());
        self.write(Item::Vote(vote)).await
    }

    /// Voids the entries from `from` on; returns when that is durable.
    pub async fn truncate(&self, from: u64) -> io::Result<()> {
        self.memory().truncate(from);
        self.write(Item::Truncate { from }).await
    }

    /// Voids the entries up to `index` and drops the segments that held nothing else. `tag` comes back from `purged`.
    pub async fn purge(&self, index: u64, tag: Bytes) -> io::Result<()> {
        self.memory().purge(index, tag.clone());
        let done = Box::new(|_| {});
        self.send(Append { records: vec![Item::Purge { index, tag }], done }).await
    }

    /// Writes what is queued and ends the writer; later writes fail.
    pub async fn close(&self) {
        let Some((appends, running)) = self.writer.lock().expect("writer lock").take() else { return };
        drop(appends);
        match running {
            Running::Task(task) => drop(task.await),
            Running::Thread(thread) => drop(thread.join()),
        }
    }

    async fn write(&self, item: Item) -> io::Result<()> {
        let (tell, told) = oneshot::channel();
        let done = Box::new(move |result| drop(tell.send(result)));
        self.send(Append { records: vec![item], done }).await?;
        told.await.unwrap_or_else(|_| Err(closed()))
    }

    async fn send(&self, append: Append) -> io::Result<()> {
        let appends = self.writer.lock().expect("writer lock").as_ref().map(|(appends, _)| appends.clone());
        let appends = appends.ok_or_else(closed)?;
        appends.send(append).await.map_err(|_| closed())
    }

    /// How many writes in a row have been slow, the last one among them.
    pub fn writes_slow(&self) -> u32 {
        self.slow.load(Ordering::Relaxed)
    }

    /// What was found damaged while this log was read.
    pub fn damage(&self) -> Option<String> {
        self.damage.get().cloned()
    }

    /// Reads a body back from its segment; the record's checksum stands just before it.
    fn load(&self, body: Body) -> io::Result<Bytes> {
        let location = match body {
            Body::Recent(bytes) => return Ok(bytes),
            Body::At(location) => location,
        };
        let before = frame::RECORD_HEADER + 8;
        let name = segment_name(location.segment);
        let record = self.disk.read_at(&name, location.offset - before as u64, before + location.len as usize)?;
        match frame::Record::read(&record) {
            Some((frame::Record::Entry { .. }, _)) => Ok(Bytes::from(record).slice(before..)),
            _ => {
                let damage = LogError::Damaged { path: self.disk.path(&name), offset: location.offset, what: "entry" };
                let text = self.damage.get_or_init(|| damage.to_string()).clone();
                Err(io::Error::new(io::ErrorKind::InvalidData, text))
            }
        }
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().expect("memory lock")
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the log is closed")
}

fn segment_name(first_frame: u64) -> String {
    format!("{first_frame:020}.log")
}

fn segment_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".log").filter(|digits| digits.len() == 20)?;
    digits.parse().ok()
}
