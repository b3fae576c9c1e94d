//! What the log keeps in memory: where each entry lies, the latest entries themselves, vote and marks.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::recover::{Location, Recovered};

#[derive(Clone, Copy, Debug)]
enum Entry {
    /// Not durable yet; the body is among the recent ones.
    Pending {
        ticket: u64,
    },
    Written(Location),
}

/// Where the body of an entry is.
pub(super) enum Body {
    Recent(Bytes),
    At(Location),
}

pub(super) struct Memory {
    pub(super) vote: Option<Bytes>,
    pub(super) committed: Option<Bytes>,
    pub(super) purged: Option<(u64, Bytes)>,
    first: u64,
    entries: VecDeque<Entry>,
    recent: BTreeMap<u64, Bytes>,
    recent_bytes: usize,
    recent_bytes_max: usize,
    tickets: u64,
}

impl Memory {
    pub(super) fn new(recovered: Recovered, recent_bytes_max: usize) -> Memory {
        Memory {
            vote: recovered.vote.map(Bytes::from),
            committed: recovered.committed.map(Bytes::from),
            purged: recovered.purged.map(|(index, tag)| (index, tag.into())),
            first: recovered.first,
            entries: recovered.locations.into_iter().map(Entry::Written).collect(),
            recent: BTreeMap::new(),
            recent_bytes: 0,
            recent_bytes_max,
            tickets: 0,
        }
    }

    /// Index of the last entry.
    pub(super) fn last(&self) -> Option<u64> {
        (!self.entries.is_empty()).then(|| self.next() - 1)
    }

    pub(super) fn range(&self) -> std::ops::Range<u64> {
        self.first..self.next()
    }

    fn next(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// Appends an entry and returns its ticket.
    ///
    /// # Panics
    /// If it leaves a hole; Raft never does.
    pub(super) fn push(&mut self, index: u64, body: Bytes) -> u64 {
        if self.entries.is_empty() {
            self.first = index;
        }
        assert_eq!(index, self.next(), "a log has no holes");
        self.tickets += 1;
        self.entries.push_back(Entry::Pending { ticket: self.tickets });
        self.recent_bytes += body.len();
        self.recent.insert(index, body);
        self.tickets
    }

    /// Entries that are durable now: (index, ticket, where). One that was replaced meanwhile has another ticket.
    pub(super) fn written(&mut self, entries: &[(u64, u64, Location)]) {
        for (index, ticket, location) in entries {
            let at = index.checked_sub(self.first).and_then(|at| self.entries.get_mut(at as usize));
            if let Some(entry) = at
                && matches!(entry, Entry::Pending { ticket: pending } if pending == ticket)
            {
                *entry = Entry::Written(*location);
            }
        }
        self.forget_old();
    }

    fn forget_old(&mut self) {
        while self.recent_bytes > self.recent_bytes_max {
            let Some((index, _)) = self.recent.first_key_value() else { return };
            let at = (index - self.first) as usize;
            if matches!(self.entries.get(at), Some(Entry::Pending { .. })) {
                return;
            }
            let (_, body) = self.recent.pop_first().expect("looked at above");
            self.recent_bytes -= body.len();
        }
    }

    pub(super) fn body(&self, index: u64) -> Option<Body> {
        if let Some(body) = self.recent.get(&index) {
            return Some(Body::Recent(body.clone()));
        }
        match self.entries.get(index.checked_sub(self.first)? as usize)? {
            Entry::Written(location) => Some(Body::At(*location)),
            Entry::Pending { .. } => unreachable!("pending entries are recent"),
        }
    }

    pub(super) fn truncate(&mut self, from: u64) {
        self.entries.truncate(from.saturating_sub(self.first) as usize);
        let gone = self.recent.split_off(&from);
        self.recent_bytes -= gone.values().map(Bytes::len).sum::<usize>();
    }

    pub(super) fn purge(&mut self, index: u64, tag: Bytes) {
        let gone = (index + 1).saturating_sub(self.first).min(self.entries.len() as u64);
        self.entries.drain(..gone as usize);
        self.first = self.first.max(index + 1);
        let kept = self.recent.split_off(&(index + 1));
        let gone = std::mem::replace(&mut self.recent, kept);
        self.recent_bytes -= gone.values().map(Bytes::len).sum::<usize>();
        self.purged = Some((index, tag));
    }
}
