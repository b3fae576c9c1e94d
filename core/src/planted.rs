//! Bugs on purpose. The simulator has to find each of them; a build without the feature `planted` has none: `is` is a
//! constant there, and what it guards is compiled away.

#[cfg_attr(feature = "planted", path = "planted/on.rs")]
#[cfg_attr(not(feature = "planted"), path = "planted/off.rs")]
mod switch;

pub use switch::{is, plant};

/// One bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Bug {
    /// A receiver takes an extent for what was announced without looking at its checksum.
    SkipChecksum = 1,
    /// A handoff that was given up keeps its blocks.
    LeakOnAbort,
    /// A sequence that was cancelled in the middle keeps its blocks.
    LeakOnCancel,
    /// A prefill worker sends another block than the one asked for.
    ForeignBlock,
    /// The first tokens of a handoff are given to the wrong choices.
    SwapChoices,
    /// A request that moves to another worker forgets the last token its client has.
    DoubleToken,
    /// A stream whose request failed ends without a word.
    SilentEnd,
    /// A gateway does not tell the ledger that a request has ended.
    ForgetFinish,
    /// A repeated question for workers is answered with a second assignment.
    ApplyTwice,
    /// A vote is answered before it is durable.
    VoteNotDurable,
    /// Entries are answered before they are durable.
    EntryNotDurable,
    /// A torn end of the log is taken for damage.
    TornTailRefused,
    /// A coordinator that follows skips an entry now and then.
    SkipEntry,
}

impl Bug {
    pub const ALL: &[Bug] = &[
        Bug::SkipChecksum,
        Bug::LeakOnAbort,
        Bug::LeakOnCancel,
        Bug::ForeignBlock,
        Bug::SwapChoices,
        Bug::DoubleToken,
        Bug::SilentEnd,
        Bug::ForgetFinish,
        Bug::ApplyTwice,
        Bug::VoteNotDurable,
        Bug::EntryNotDurable,
        Bug::TornTailRefused,
        Bug::SkipEntry,
    ];
}
