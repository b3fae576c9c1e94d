//! The latest changes of a prefix index, so that whoever knows an older state can follow without comparing all of it.

use std::collections::{BTreeMap, VecDeque};

use baton_core::BlockHash;

/// Changes that are remembered; who is further behind starts over from the whole index.
const JOURNAL_MAX: usize = 65_536;

/// A state of the index, by how many changes led to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(u64);

/// What happened between two marks; a name that came and went again stands in one list only.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub added: Vec<BlockHash>,
    pub removed: Vec<BlockHash>,
    /// The state that the changes lead to.
    pub mark: Mark,
}

#[derive(Debug, Default)]
pub(crate) struct Journal {
    /// Oldest first; true: added.
    entries: VecDeque<(BlockHash, bool)>,
    end: u64,
}

impl Journal {
    pub(crate) fn add(&mut self, name: BlockHash) {
        self.push(name, true);
    }

    pub(crate) fn remove(&mut self, name: BlockHash) {
        self.push(name, false);
    }

    pub(crate) fn mark(&self) -> Mark {
        Mark(self.end)
    }

    /// The net effect of at most `max` changes behind `since`; None when those are forgotten, or never were.
    pub(crate) fn since(&self, since: Mark, max: usize) -> Option<Changes> {
        let count = usize::try_from(self.end.checked_sub(since.0)?).ok()?;
        let first = self.entries.len().checked_sub(count)?;
        let taken = count.min(max);
        let last: BTreeMap<BlockHash, bool> = self.entries.range(first..first + taken).copied().collect();
        let (added, removed): (Vec<_>, Vec<_>) = last.into_iter().partition(|(_, added)| *added);
        let names = |entries: Vec<(BlockHash, bool)>| entries.into_iter().map(|(name, _)| name).collect();
        Some(Changes { added: names(added), removed: names(removed), mark: Mark(since.0 + taken as u64) })
    }

    fn push(&mut self, name: BlockHash, added: bool) {
        if self.entries.len() == JOURNAL_MAX {
            self.entries.pop_front();
        }
        self.entries.push_back((name, added));
        self.end += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[u128]) -> Vec<BlockHash> {
        names.iter().map(|name| BlockHash(*name)).collect()
    }

    #[test]
    fn only_the_last_word_on_a_name_counts() {
        let mut journal = Journal::default();
        let start = journal.mark();
        (1..=3).for_each(|name| journal.add(BlockHash(name)));
        journal.remove(BlockHash(2));
        let middle = journal.mark();
        journal.remove(BlockHash(1));
        journal.add(BlockHash(2));
        let check = |since, max, added: &[u128], removed: &[u128]| {
            let changes = journal.since(since, max).unwrap();
            assert_eq!((changes.added, changes.removed), (names(added), names(removed)));
            changes.mark
        };
        assert_eq!(check(start, 100, &[2, 3], &[1]), journal.mark());
        assert_eq!(check(start, 4, &[1, 3], &[2]), middle);
        assert_eq!(check(middle, 100, &[2], &[1]), journal.mark());
        check(journal.mark(), 100, &[], &[]);
        assert_eq!(journal.since(Mark(7), 100), None);
    }

    #[test]
    fn what_is_forgotten_is_said_to_be() {
        let mut journal = Journal::default();
        let start = journal.mark();
        journal.add(BlockHash(0));
        let second = journal.mark();
        (0..JOURNAL_MAX as u128).for_each(|name| journal.add(BlockHash(name)));
        assert_eq!((journal.since(start, 1), journal.entries.len()), (None, JOURNAL_MAX));
        assert_eq!(journal.since(second, usize::MAX).unwrap().added.len(), JOURNAL_MAX);
    }
}
