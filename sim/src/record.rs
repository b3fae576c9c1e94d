//! What happened in a run, in order: a digest of everything, and the lines that a person reads.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use xxhash_rust::xxh3::Xxh3;

/// One line of the timeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    pub at_us: u64,
    pub host: String,
    pub text: String,
}

/// Shared by all hosts of a run and by the loop that drives it.
#[derive(Clone, Default)]
pub struct Record(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    now: Duration,
    digest: Xxh3,
    lines: Vec<Line>,
    network_events: u64,
    detail: Detail,
}

/// How much of a run becomes lines; the digest is the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Detail {
    /// Lives, requests, leaders, faults.
    #[default]
    Outline,
    /// Besides: assignments and their epochs, what workers let in, blocks on their way.
    Story,
    /// And all that the network does.
    Network,
}

impl Record {
    /// Makes lines of so much from now on.
    pub fn tell(&self, detail: Detail) {
        self.lock().detail = detail;
    }

    pub fn tells(&self, detail: Detail) -> bool {
        self.lock().detail >= detail
    }

    /// Tells the virtual time to what is noted from outside of any host.
    pub fn set_now(&self, now: Duration) {
        self.lock().now = now;
    }

    pub fn now(&self) -> Duration {
        turmoil::sim_elapsed().unwrap_or_else(|| self.lock().now)
    }

    /// Adds a line.
    pub fn note(&self, host: &str, text: impl Into<String>) {
        let line = Line { at_us: self.now().as_micros() as u64, host: host.to_string(), text: text.into() };
        let mut kept = self.lock();
        kept.digest.update(&line.at_us.to_le_bytes());
        kept.digest.update(line.host.as_bytes());
        kept.digest.update(line.text.as_bytes());
        kept.lines.push(line);
    }

    /// Adds a line for the reader of a story, which the digest knows nothing of.
    pub fn detail(&self, host: &str, text: String) {
        let line = Line { at_us: self.now().as_micros() as u64, host: host.to_string(), text };
        let mut kept = self.lock();
        if kept.detail >= Detail::Story {
            kept.lines.push(line);
        }
    }

    /// Adds what the network did to the digest: who, what, how many bytes, when.
    pub fn network(&self, host: &str, what: u8, bytes: usize) {
        let now = self.now().as_micros() as u64;
        let mut kept = self.lock();
        kept.network_events += 1;
        let mut event = [0; 17];
        event[..8].copy_from_slice(&now.to_le_bytes());
        event[8..16].copy_from_slice(&(bytes as u64).to_le_bytes());
        event[16] = what;
        kept.digest.update(&event);
        kept.digest.update(host.as_bytes());
        if kept.detail == Detail::Network {
            let text = format!("{} {bytes}", what as char);
            kept.lines.push(Line { at_us: now, host: host.to_string(), text });
        }
    }

    pub fn digest(&self) -> u64 {
        self.lock().digest.digest()
    }

    pub fn network_events(&self) -> u64 {
        self.lock().network_events
    }

    pub fn lines(&self) -> Vec<Line> {
        self.lock().lines.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
