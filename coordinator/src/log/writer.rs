//! The one writer of the log: takes whatever has queued while the last sync ran, writes it as one frame, syncs once.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use baton_core::planted::{self, Bug};
use bytes::Bytes;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::Instant;

use super::disk::{Appender, Disk};
use super::frame::{FRAME_HEADER, Record, SEGMENT_HEADER, seal_frame, segment_header};
use super::memory::Memory;
use super::recover::{Location, Segment};
use super::{LogError, segment_name};

/// Jobs that may wait for the writer; then whoever appends waits.
const QUEUE_MAX: usize = 1024;
/// Bytes of one frame after which no further append joins it.
const FRAME_BYTES: usize = 8 << 20;

/// A write that takes so long, sync included, is slow.
pub(super) const SYNC_SLOW: Duration = Duration::from_millis(100);

/// Called once, when the append is durable or has failed.
pub type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

pub(super) struct Append {
    pub(super) records: Vec<Item>,
    pub(super) done: Done,
}

pub(super) enum Item {
    /// The ticket tells this entry from a later one under the same index.
    Entry {
        index: u64,
        ticket: u64,
        body: Bytes,
    },
    Vote(Bytes),
    Truncate {
        from: u64,
    },
    Purge {
        index: u64,
        tag: Bytes,
    },
}

/// The running writer: a thread where syncs block, a task where the disk is simulated.
pub(super) enum Running {
    Thread(JoinHandle<()>),
    Task(tokio::task::JoinHandle<()>),
}

pub(super) struct Writer {
    disk: Arc<dyn Disk>,
    memory: Arc<Mutex<Memory>>,
    segments: Vec<Segment>,
    segment_bytes_max: u64,
    file: Box<dyn Appender>,
    /// Length of the last segment.
    offset: u64,
    next_frame: u64,
    vote: Option<Bytes>,
    purged: Option<(u64, Bytes)>,
    committed: Option<Bytes>,
    buffer: Vec<u8>,
    /// When the round under way began.
    began: Instant,
    /// Slow writes in a row.
    slow: Arc<AtomicU32>,
    /// The first error; nothing is written after it, because what the disk holds is unknown then.
    failed: Option<(io::ErrorKind, String)>,
}

/// What a writer starts from.
pub(super) struct Start {
    pub(super) segments: Vec<Segment>,
    pub(super) next_frame: u64,
    pub(super) segment_bytes_max: u64,
    pub(super) slow: Arc<AtomicU32>,
}

impl Writer {
    pub(super) fn open(disk: Arc<dyn Disk>, memory: Arc<Mutex<Memory>>, start: Start) -> Result<Writer, LogError> {
        let fresh = start.segments.is_empty();
        let last = start.segments.last().map_or(start.next_frame, |segment| segment.first_frame);
        let name = segment_name(last);
        let failed = |error| LogError::io(&*disk, &name, error);
        let offset = if fresh { 0 } else { disk.read(&name).map_err(failed)?.len() as u64 };
        let file = disk.append(&name).map_err(failed)?;
        let (vote, purged, committed) = {
            let memory = memory.lock().expect("memory lock");
            (memory.vote.clone(), memory.purged.clone(), memory.committed.clone())
        };
        let mut writer = Writer {
            disk: disk.clone(),
            memory,
            segments: start.segments,
            segment_bytes_max: start.segment_bytes_max,
            file,
            offset,
            next_frame: start.next_frame,
            vote,
            purged,
            committed,
            buffer: Vec::new(),
            began: Instant::now(),
            slow: start.slow,
            failed: None,
        };
        if fresh {
            writer.begin_segment().map_err(failed)?;
        }
        Ok(writer)
    }

    pub(super) fn run(self) -> io::Result<(Sender<Append>, Running)> {
        let (appends, queue) = channel(QUEUE_MAX);
        let running = match self.disk.inline_delay() {
            Some(_) => Running::Task(tokio::spawn(self.run_inline(queue))),
            None => {
                let thread = std::thread::Builder::new().name("baton-log".into());
                Running::Thread(thread.spawn(move || self.run_thread(queue))?)
            }
        };
        Ok((appends, running))
    }

    fn run_thread(mut self, mut queue: Receiver<Append>) {
        while let Some(append) = queue.blocking_recv() {
            self.began = Instant::now();
            self.round(append, &mut queue);
        }
    }

    async fn run_inline(mut self, mut queue: Receiver<Append>) {
        while let Some(append) = queue.recv().await {
            self.began = Instant::now();
            tokio::time::sleep(self.disk.inline_delay().unwrap_or_default()).await;
            self.round(append, &mut queue);
        }
    }

    fn round(&mut self, first: Append, queue: &mut Receiver<Append>) {
        let mut bytes = size(&first);
        let mut appends = vec![first];
        while bytes < FRAME_BYTES
            && let Ok(append) = queue.try_recv()
        {
            bytes += size(&append);
            appends.push(append);
        }
        self.commit(appends);
        if queue.is_empty() && self.failed.is_none() {
            self.mark();
        }
    }

    /// Makes the appends durable together and tells each of them.
    fn commit(&mut self, appends: Vec<Append>) {
        let result = match self.failed {
            Some(_) => Err(()),
            None => self.write(&appends).map_err(|error| self.fail(error)),
        };
        for append in appends {
            let failed = || self.failed.clone().expect("set when a write fails");
            (append.done)(result.map_err(|()| {
                let (kind, text) = failed();
                io::Error::new(kind, text)
            }));
        }
    }

    fn fail(&mut self, error: io::Error) {
        let name = self.segments.last().map_or(String::new(), |s| segment_name(s.first_frame));
        let text = format!("{}: {error}", self.disk.path(&name));
        tracing::error!(error = %text, "the log cannot be written; this coordinator stops taking part");
        self.failed = Some((error.kind(), text));
    }

    fn write(&mut self, appends: &[Append]) -> io::Result<()> {
        if self.offset >= self.segment_bytes_max {
            self.file.sync()?;
            self.begin_segment()?;
        }
        let mut entries = Vec::new();
        let mut purge = None;
        self.begin_frame();
        for item in appends.iter().flat_map(|append| &append.records) {
            self.record(item, &mut entries);
            if let Item::Purge { index, .. } = item {
                purge = Some(*index);
            }
        }
        let committed = self.memory.lock().expect("memory lock").committed.clone();
        if committed != self.committed {
            committed.iter().for_each(|body| Record::Committed(body).write(&mut self.buffer));
            self.committed = committed;
        }
        self.end_frame()?;
        let start = Instant::now();
        if !stays_volatile(appends) {
            self.file.sync()?;
        }
        metrics::histogram!("baton_coordinator_fsync_seconds").record(start.elapsed().as_secs_f64());
        match self.began.elapsed() >= SYNC_SLOW {
            true => drop(self.slow.fetch_add(1, Ordering::Relaxed)),
            false => self.slow.store(0, Ordering::Relaxed),
        }
        self.memory.lock().expect("memory lock").written(&entries);
        match purge {
            Some(index) => self.drop_segments(index),
            None => Ok(()),
        }
    }

    fn record(&mut self, item: &Item, entries: &mut Vec<(u64, u64, Location)>) {
        match item {
            Item::Entry { index, ticket, body } => {
                Record::Entry { index: *index, body }.write(&mut self.buffer);
                let segment = self.segments.last_mut().expect("a segment is open");
                segment.index_last = segment.index_last.max(Some(*index));
                let offset = self.offset + (self.buffer.len() - body.len()) as u64;
                entries.push((
                    *index,
                    *ticket,
                    Location { segment: segment.first_frame, offset, len: body.len() as u32 },
                ));
            }
            Item::Vote(body) => {
                Record::Vote(body).write(&mut self.buffer);
                self.vote = Some(body.clone());
            }
            Item::Truncate { from } => Record::Truncate { from: *from }.write(&mut self.buffer),
            Item::Purge { index, tag } => {
                Record::Purge { index: *index, tag }.write(&mut self.buffer);
                self.purged = Some((*index, tag.clone()));
            }
        }
    }

    fn begin_frame(&mut self) {
        self.buffer.clear();
        self.buffer.resize(FRAME_HEADER, 0);
    }

    fn end_frame(&mut self) -> io::Result<()> {
        seal_frame(&mut self.buffer, 0, self.next_frame);
        self.file.write(&self.buffer)?;
        self.offset += self.buffer.len() as u64;
        self.next_frame += 1;
        Ok(())
    }

    /// An empty frame after a synced one, itself not synced: losing it loses nothing.
    fn mark(&mut self) {
        self.begin_frame();
        if let Err(error) = self.end_frame() {
            self.fail(error);
        }
    }

    /// Opens the next segment and says again what older ones said last, so that they can go.
    fn begin_segment(&mut self) -> io::Result<()> {
        let name = segment_name(self.next_frame);
        self.file = self.disk.append(&name)?;
        self.file.write(&segment_header(self.next_frame))?;
        self.offset = SEGMENT_HEADER as u64;
        self.segments.push(Segment { first_frame: self.next_frame, index_last: None });
        self.begin_frame();
        self.vote.iter().for_each(|body| Record::Vote(body).write(&mut self.buffer));
        let purged = self.purged.iter();
        purged.for_each(|(index, tag)| Record::Purge { index: *index, tag }.write(&mut self.buffer));
        self.committed.iter().for_each(|body| Record::Committed(body).write(&mut self.buffer));
        self.end_frame()?;
        self.file.sync()?;
        self.disk.sync_directory()
    }

    /// Removes the oldest segments while all of their entries are purged.
    fn drop_segments(&mut self, index: u64) -> io::Result<()> {
        let gone = |s: &&Segment| s.index_last.is_none_or(|last| last <= index);
        let closed = &self.segments[..self.segments.len() - 1];
        let count = closed.iter().take_while(gone).count();
        for segment in self.segments.drain(..count) {
            self.disk.remove(&segment_name(segment.first_frame))?;
        }
        if count > 0 { self.disk.sync_directory() } else { Ok(()) }
    }
}

fn size(append: &Append) -> usize {
    let body = |item: &Item| match item {
        Item::Entry { body, .. } | Item::Vote(body) => body.len(),
        Item::Truncate { .. } | Item::Purge { .. } => 0,
    };
    append.records.iter().map(body).sum()
}

/// The planted bugs: what is answered without being durable.
fn stays_volatile(appends: &[Append]) -> bool {
    let mut items = appends.iter().flat_map(|append| &append.records);
    planted::is(Bug::EntryNotDurable)
        || planted::is(Bug::VoteNotDurable) && items.all(|item| matches!(item, Item::Vote(_)))
}
