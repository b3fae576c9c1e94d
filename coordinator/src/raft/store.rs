//! The log as openraft wants it.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};

use bytes::Bytes;
use openraft::alias::{EntryOf, LogIdOf, VoteOf};
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{OptionalSend, RaftTypeConfig};

use super::types::Types;
use super::wire::{decode, encode};
use crate::log::Log;

#[derive(Clone)]
pub(super) struct Store(pub(super) Log);

type Entry = EntryOf<Types>;
type LogId = LogIdOf<Types>;
type Vote = VoteOf<Types>;

fn decoded<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    decode(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

impl RaftLogReader<Types> for Store {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(before) => before + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(last) => last + 1,
            Bound::Excluded(end) => *end,
            Bound::Unbounded => u64::MAX,
        };
        self.0.read(start..end)?.iter().map(|body| decoded(body)).collect()
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        self.0.vote().map(|vote| decoded(&vote)).transpose()
    }
}

impl RaftLogStorage<Types> for Store {
    type LogReader = Store;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let purged: Option<LogId> = self.0.purged().map(|(_, tag)| decoded(&tag)).transpose()?;
        let last = match self.0.last() {
            Some(index) => self.try_get_log_entries(index..=index).await?.pop().map(|entry| entry.log_id),
            None => purged,
        };
        Ok(LogState { last_purged_log_id: purged, last_log_id: last })
    }

    async fn get_log_reader(&mut self) -> Store {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        self.0.save_vote(encode(vote)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        self.0.save_committed(encode(&committed));
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        Ok(self.0.committed().map(|mark| decoded(&mark)).transpose()?.flatten())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = <Types as RaftTypeConfig>::Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let encoded = |entry: Entry| -> (u64, Bytes) { (entry.log_id.index, encode(&entry)) };
        let entries = entries.into_iter().map(encoded).collect();
        self.0.append(entries, Box::new(move |result| callback.io_completed(result))).await
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        self.0.truncate(last.map_or(0, |last| last.index + 1)).await
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        self.0.purge(upto.index, encode(&upto)).await
    }
}
