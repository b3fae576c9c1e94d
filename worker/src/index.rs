//! What a coordinator node knows of this worker's prefix index, and what a heartbeat must tell it. Every node is told
//! the difference to what it last acknowledged; after a heartbeat that may or may not have arrived, everything.

use std::sync::Arc;

use baton_core::BlockHash;

/// Hashes named in one heartbeat. A reset may take several; the rest follows as differences.
const CHANGES_MAX: usize = 65_536;

/// A sorted prefix index, shared by all that look at it.
pub(crate) type Index = Arc<[BlockHash]>;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    pub(crate) added: Vec<BlockHash>,
    pub(crate) removed: Vec<BlockHash>,
    /// `added` is the whole index.
    pub(crate) reset: bool,
}

/// What one coordinator node has acknowledged; None: nothing, or it asked for everything.
#[derive(Default)]
pub(crate) struct Known(Option<Index>);

impl Known {
    /// What to tell the node so that it knows `now`, and what it knows when it acknowledges that.
    pub(crate) fn changes(&self, now: &Index) -> (Changes, Index) {
        self.changes_within(now, CHANGES_MAX)
    }

    pub(crate) fn acknowledge(&mut self, told: Index) {
        self.0 = Some(told);
    }

    pub(crate) fn forget(&mut self) {
        self.0 = None;
    }

    fn changes_within(&self, now: &Index, max: usize) -> (Changes, Index) {
        let reset = self.0.is_none();
        let before = self.0.as_deref().unwrap_or_default();
        let (mut added, mut removed) = difference(before, now);
        if added.len() + removed.len() <= max {
            return (Changes { added, removed, reset }, now.clone());
        }
        removed.truncate(max);
        added.truncate(max - removed.len());
        let told = applied(before, &added, &removed);
        (Changes { added, removed, reset }, told)
    }
}

/// (only in `after`, only in `before`); both sorted.
fn difference(before: &[BlockHash], after: &[BlockHash]) -> (Vec<BlockHash>, Vec<BlockHash>) {
    let (mut added, mut removed) = (Vec::new(), Vec::new());
    let (mut b, mut a) = (before.iter().peekable(), after.iter().peekable());
    loop {
        match (b.peek(), a.peek()) {
            (None, None) => return (added, removed),
            (Some(x), Some(y)) if x == y => {
                b.next();
                a.next();
            }
            (Some(x), y) if y.is_none_or(|y| x < y) => removed.extend(b.next()),
            _ => added.extend(a.next()),
        }
    }
}

fn applied(before: &[BlockHash], added: &[BlockHash], removed: &[BlockHash]) -> Index {
    let kept = before.iter().filter(|hash| removed.binary_search(hash).is_err());
    let mut told: Vec<BlockHash> = kept.chain(added).copied().collect();
    told.sort_unstable();
    told.into()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn index(names: &BTreeSet<u128>) -> Index {
        names.iter().map(|name| BlockHash(*name)).collect()
    }

    /// What a coordinator does with the lists.
    fn apply(node: &mut BTreeSet<u128>, changes: &Changes) {
        if changes.reset {
            node.clear();
        }
        node.retain(|name| !changes.removed.contains(&BlockHash(*name)));
        node.extend(changes.added.iter().map(|hash| hash.0));
    }

    proptest! {
        /// Whatever heartbeats are lost on either way, and however small a heartbeat, the node ends with the index.
        #[test]
        fn a_node_converges(
            states in prop::collection::vec(prop::collection::btree_set(0u128..40, 0..20), 1..8),
            fates in prop::collection::vec(0u8..3, 8),
            max in 1usize..12,
        ) {
            let (mut known, mut node) = (Known::default(), BTreeSet::from([99u128]));
            for (state, fate) in states.iter().zip(fates) {
                let (changes, told) = known.changes_within(&index(state), max);
                prop_assert!(changes.added.len() + changes.removed.len() <= max);
                if fate > 0 { apply(&mut node, &changes) }
                if fate > 1 { known.acknowledge(told) } else { known.forget() }
            }
            let last = states.last().expect("at least one state");
            for _ in 0..80 {
                let (changes, told) = known.changes_within(&index(last), max);
                apply(&mut node, &changes);
                known.acknowledge(told);
            }
            prop_assert_eq!(&node, last);
        }
    }

    #[test]
    fn a_node_that_asks_is_told_everything() {
        let mut known = Known::default();
        let now = index(&BTreeSet::from([1, 2]));
        known.acknowledge(known.changes(&now).1);
        assert_eq!(known.changes(&now).0, Changes::default());
        known.forget();
        let (changes, _) = known.changes(&now);
        assert!(changes.reset && changes.added.len() == 2);
    }
}
