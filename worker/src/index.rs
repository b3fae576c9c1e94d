//! What a coordinator node knows of this worker's prefix index, and what a heartbeat must tell it. A node that is up to
//! date costs what has changed since; one that is new, or may have missed a heartbeat, is told everything in parts.

use std::sync::Arc;

use baton_core::BlockHash;
use baton_engine::{Cache, Mark};

/// Hashes named in one heartbeat. The whole index may take several; changes meanwhile follow after it.
const CHANGES_MAX: usize = 65_536;
/// Indexed blocks a coordinator is told of.
const INDEX_MAX: usize = 1 << 20;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    pub(crate) added: Vec<BlockHash>,
    pub(crate) removed: Vec<BlockHash>,
    /// `added` begins the whole index.
    pub(crate) reset: bool,
}

/// What one coordinator node has acknowledged.
#[derive(Clone, Debug, Default)]
pub(crate) enum Known {
    /// Nothing, or it asked for everything.
    #[default]
    Nothing,
    /// It did not answer. What it knows is uncertain, and until it answers nothing is spent on it.
    Unreached,
    /// The first `told` names of the index as it was at `mark`.
    Part { all: Arc<[BlockHash]>, told: usize, mark: Mark },
    /// Everything up to the mark.
    UpTo(Mark),
}

impl Known {
    /// What to tell the node next, and what it knows when it acknowledges that.
    pub(crate) fn next(&self, cache: &Cache) -> (Changes, Known) {
        self.next_within(cache, CHANGES_MAX)
    }

    fn next_within(&self, cache: &Cache, max: usize) -> (Changes, Known) {
        match self {
            Known::Part { all, told, mark } => part(all, *told, *mark, max),
            Known::UpTo(mark) => match cache.changes(*mark, max) {
                Some(changes) => {
                    let known = Known::UpTo(changes.mark);
                    (Changes { added: changes.added, removed: changes.removed, reset: false }, known)
                }
                None => whole(cache, max),
            },
            Known::Nothing => whole(cache, max),
            Known::Unreached => (Changes::default(), Known::Nothing),
        }
    }
}

fn whole(cache: &Cache, max: usize) -> (Changes, Known) {
    let (all, mark) = cache.snapshot(INDEX_MAX);
    part(&all.into(), 0, mark, max)
}

fn part(all: &Arc<[BlockHash]>, told: usize, mark: Mark, max: usize) -> (Changes, Known) {
    let end = all.len().min(told + max);
    let changes = Changes { added: all[told..end].to_vec(), removed: Vec::new(), reset: told == 0 };
    let known = match end == all.len() {
        true => Known::UpTo(mark),
        false => Known::Part { all: all.clone(), told: end, mark },
    };
    (changes, known)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use baton_engine::testing::hash_spec;
    use proptest::prelude::*;

    use super::*;

    /// Puts a block of this name into the cache, at the cost of the one unused longest when it is full.
    fn put(cache: &Cache, name: u128) {
        drop(cache.reserve(1).unwrap().fill(&[BlockHash(name)]));
    }

    /// What a coordinator does with the lists.
    fn apply(node: &mut BTreeSet<BlockHash>, changes: &Changes) {
        if changes.reset {
            node.clear();
        }
        node.retain(|name| !changes.removed.contains(name));
        node.extend(&changes.added);
    }

    proptest! {
        /// Whatever heartbeats are lost on either way, and however small a heartbeat, the node ends with the index.
        #[test]
        fn a_node_converges(
            rounds in prop::collection::vec((prop::collection::vec(0u128..40, 0..12), 0u8..4), 1..12),
            max in 1usize..12,
        ) {
            let cache = Cache::new(hash_spec().layout, 16);
            let (mut known, mut node) = (Known::default(), BTreeSet::from([BlockHash(99)]));
            for (names, fate) in rounds {
                names.into_iter().for_each(|name| put(&cache, name));
                let (changes, next) = known.next_within(&cache, max);
                prop_assert!(changes.added.len() + changes.removed.len() <= max);
                if fate > 0 { apply(&mut node, &changes) }
                known = if fate > 1 { next } else { Known::Unreached };
            }
            for _ in 0..200 {
                let (changes, next) = known.next_within(&cache, max);
                apply(&mut node, &changes);
                known = next;
            }
            prop_assert_eq!(node.into_iter().collect::<Vec<_>>(), cache.hashes(usize::MAX));
        }
    }

    #[test]
    fn a_node_that_does_not_answer_costs_nothing() {
        let cache = Cache::new(hash_spec().layout, 8);
        (0..5).for_each(|name| put(&cache, name));
        let (changes, known) = Known::Unreached.next(&cache);
        assert_eq!(changes, Changes::default());
        assert_eq!((known.next(&cache).0.reset, known.next(&cache).0.added.len()), (true, 5));
    }

    #[test]
    fn a_node_that_follows_is_told_only_what_changed() {
        let cache = Cache::new(hash_spec().layout, 8);
        (0..5).for_each(|name| put(&cache, name));
        let (changes, known) = Known::Nothing.next(&cache);
        assert_eq!((changes.reset, changes.added.len()), (true, 5));
        assert_eq!(known.next(&cache).0, Changes::default());
        put(&cache, 7);
        assert_eq!(known.next(&cache).0.added, [BlockHash(7)]);
    }
}
