//! A log of 64 KiB against every crash and every flipped bit: what was acknowledged is there, or the log is refused with
//! the path and an offset. Never anything else.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::recover::{Recovered, recover};
use super::*;

const LOG_BYTES: usize = 64 << 10;
const OPTIONS: LogOptions = LogOptions { segment_bytes_max: 16 << 10, recent_bytes_max: 1 << 10 };
/// As many as the machine that decides about a change has.
const THREADS: usize = 2;
/// Longest one of these tests may take on its own.
const TIME_MAX: Duration = Duration::from_secs(60);

/// What the log has acknowledged so far.
#[derive(Clone, Debug, Default)]
struct Acknowledged {
    /// One past the last entry.
    end: u64,
    vote: Option<u64>,
    /// First entry that no purge was asked for.
    start: u64,
}

/// A disk that keeps every state it has been in.
struct Tape {
    disk: MemoryDisk,
    states: Mutex<Vec<(MemoryDisk, Acknowledged)>>,
    acknowledged: Mutex<Acknowledged>,
}

impl Tape {
    fn keep<T>(&self, result: io::Result<T>) -> io::Result<T> {
        let state = (self.disk.copy(), self.acknowledged.lock().unwrap().clone());
        self.states.lock().unwrap().push(state);
        result
    }
}

struct Taped(Arc<Tape>);

impl Disk for Taped {
    fn path(&self, name: &str) -> String {
        self.0.disk.path(name)
    }
    fn list(&self) -> io::Result<Vec<String>> {
        self.0.disk.list()
    }
    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        self.0.disk.read(name)
    }
    fn read_at(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.0.disk.read_at(name, offset, len)
    }
    fn append(&self, name: &str) -> io::Result<Box<dyn Appender>> {
        let end = self.0.keep(self.0.disk.append(name))?;
        Ok(Box::new(TapedEnd { end, tape: self.0.clone() }))
    }
    fn truncate(&self, name: &str, len: u64) -> io::Result<()> {
        self.0.keep(self.0.disk.truncate(name, len))
    }
    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.0.keep(self.0.disk.replace(name, bytes))
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.keep(self.0.disk.remove(name))
    }
    fn sync_directory(&self) -> io::Result<()> {
        self.0.keep(self.0.disk.sync_directory())
    }
    fn inline_delay(&self) -> Option<Duration> {
        self.0.disk.inline_delay()
    }
}

struct TapedEnd {
    end: Box<dyn Appender>,
    tape: Arc<Tape>,
}

impl Appender for TapedEnd {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let written = self.end.write(bytes);
        self.tape.keep(written)
    }
    fn sync(&mut self) -> io::Result<()> {
        let synced = self.end.sync();
        self.tape.keep(synced)
    }
}

fn body(index: u64) -> Vec<u8> {
    let mut text = format!("entry {index} ").into_bytes();
    text.extend((0..150 + index % 211).map(|i| (i * 7 + index) as u8));
    text
}

/// Writes 64 KiB of entries with votes, marks and so many purges among them, and keeps every state on the way.
fn taped(purges: u64) -> Arc<Tape> {
    let tape = Arc::new(Tape {
        disk: MemoryDisk::new(Duration::ZERO),
        states: Mutex::default(),
        acknowledged: Mutex::default(),
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let log = Log::open(Arc::new(Taped(tape.clone())), OPTIONS).unwrap();
        let mut index = 0u64;
        let mut written = 0;
        while written < LOG_BYTES {
            let entries: Vec<(u64, Bytes)> = (index..index + 1 + index % 3).map(|i| (i, body(i).into())).collect();
            written += entries.iter().map(|(_, body)| body.len()).sum::<usize>();
            let before = index;
            index += entries.len() as u64;
            let (tell, told) = oneshot::channel();
            log.append(entries, Box::new(move |result| drop(tell.send(result)))).await.unwrap();
            told.await.unwrap().unwrap();
            tape.acknowledged.lock().unwrap().end = index;
            if index / 16 > before / 16 {
                log.save_vote(index.to_le_bytes().to_vec().into()).await.unwrap();
                tape.acknowledged.lock().unwrap().vote = Some(index);
                log.save_committed(Bytes::from(index.to_le_bytes().to_vec()));
            }
            if index / 50 > before / 50 && index / 50 <= purges {
                tape.acknowledged.lock().unwrap().start = index - 30;
                log.purge(index - 31, Bytes::from_static(b"tag")).await.unwrap();
            }
        }
        log.close().await;
    });
    tape
}

/// Panics unless what was recovered is whole: every entry it has is right, and it has all that was acknowledged.
fn check(disk: &MemoryDisk, found: &Recovered, acknowledged: &Acknowledged, exact: bool, what: impl Fn() -> String) {
    let end = found.first + found.locations.len() as u64;
    assert!(found.first <= acknowledged.start && end >= acknowledged.end, "{}: {}..{end}", what(), found.first);
    if exact {
        assert_eq!(end, acknowledged.end, "{}", what());
    }
    if let Some(vote) = acknowledged.vote {
        let found = found.vote.as_deref().unwrap_or_else(|| panic!("{}: no vote", what()));
        let found = u64::from_le_bytes(found.try_into().unwrap());
        assert!(found >= vote && (!exact || found == vote), "{}: vote {found:?}, not {vote}", what());
    }
    for (index, location) in (found.first..).zip(&found.locations) {
        let bytes = disk.read_at(&segment_name(location.segment), location.offset, location.len as usize).unwrap();
        assert_eq!(bytes, body(index), "{}: entry {index}", what());
    }
}

/// Runs the cases on all threads and says how many there were and how long they took.
fn share(what: &str, cases: usize, case: impl Fn(usize) + Sync) {
    let (next, start) = (AtomicUsize::new(0), Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= cases {
                        return;
                    }
                    case(at);
                }
            });
        }
    });
    println!("{what}: {:.1} s", start.elapsed().as_secs_f64());
    assert!(start.elapsed() < TIME_MAX, "{what} took {:?}", start.elapsed());
}

/// Goal: whenever power fails, the log opens with all that was acknowledged. Method: after every single write, sync,
/// creation and removal, with every count of unsynced bytes surviving.
#[test]
fn every_crash_recovers_what_was_acknowledged() {
    let tape = taped(u64::MAX);
    let states = std::mem::take(&mut *tape.states.lock().unwrap());
    let crashes = AtomicUsize::new(0);
    share("every crash of a log of 64 KiB", states.len(), |at| {
        let (state, acknowledged) = &states[at];
        for kept in 0..=state.unsynced() {
            let disk = state.copy();
            disk.crash(kept);
            let found = recover(&disk).unwrap_or_else(|error| panic!("operation {at}, {kept} bytes kept: {error}"));
            check(&disk, &found, acknowledged, false, || format!("operation {at}, {kept} bytes kept"));
            crashes.fetch_add(1, Ordering::Relaxed);
        }
    });
    assert!(crashes.load(Ordering::Relaxed) > LOG_BYTES, "{crashes:?} crashes of {} states", states.len());
    println!("{} states, {} crashes", states.len(), crashes.load(Ordering::Relaxed));
}

/// Goal: no flipped bit goes unnoticed where it matters. Method: each bit of each segment; the log is refused with that
/// segment's path, or everything reads back as it was written.
#[test]
fn every_flipped_bit_is_refused_with_its_place() {
    let tape = taped(1);
    let acknowledged = tape.acknowledged.lock().unwrap().clone();
    let names: Vec<String> = tape.disk.list().unwrap().into_iter().filter(|n| segment_number(n).is_some()).collect();
    let bytes: Vec<(String, usize)> = names
        .iter()
        .flat_map(|name| (0..tape.disk.read(name).unwrap().len()).map(move |at| (name.clone(), at)))
        .collect();
    assert!(bytes.len() >= LOG_BYTES && names.len() >= 3, "{} bytes in {names:?}", bytes.len());
    let harmless = AtomicUsize::new(0);
    share("every flipped bit of a log of 64 KiB", bytes.len(), |case| {
        let (name, at) = &bytes[case];
        let disk = tape.disk.copy();
        for bit in 0..8 {
            disk.edit(name, |bytes| bytes[*at] ^= 1 << bit);
            match recover(&disk) {
                Err(LogError::Damaged { path, offset, .. }) => {
                    assert!(path.ends_with(name.as_str()), "{name} byte {at} bit {bit}: {path}");
                    assert!(offset <= *at as u64 + 1, "{name} byte {at} bit {bit}: told as {offset}");
                    disk.edit(name, |bytes| bytes[*at] ^= 1 << bit);
                }
                Err(other) => panic!("{name} byte {at} bit {bit}: {other}"),
                Ok(found) => {
                    check(&disk, &found, &acknowledged, true, || format!("{name} byte {at} bit {bit}"));
                    harmless.fetch_add(1, Ordering::Relaxed);
                    // What was cut is put back.
                    disk.edit(name, |bytes| *bytes = tape.disk.read(name).unwrap());
                }
            }
        }
    });
    assert_eq!(harmless.load(Ordering::Relaxed), 8 * frame::FRAME_HEADER, "only the last mark may be lost");
    println!("{} bits", bytes.len() * 8);
}
