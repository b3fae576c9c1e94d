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
    /// The log forgets that its end was cut off.
    TruncateForgotten,
    /// A snapshot leaves out which requests have ended.
    SnapshotForgets,
    /// A worker that starts again is given the number of its earlier life.
    SameLife,
    /// A worker serves what was assigned to an earlier life of it.
    SkipLifeCheck,
    /// A worker takes an assignment that a newer one has superseded.
    SkipEpochCheck,
    /// Blocks of a handoff that was given up are free while its sender still writes them.
    FreeEarly,
    /// A handoff is complete as soon as its sender says so.
    CommitEarly,
    /// Blocks are named after those before them.
    WrongName,
    /// A block that was given back is free twice.
    FreeTwice,
    /// Neither placement nor the link sees that a prefill worker computes otherwise than the decode worker.
    IgnoreNumerics,
    /// A gateway gives a request the name of one whose cancelling is still under way.
    SameHandle,
    /// A stream that another gateway takes over loses the last token said before.
    ResumeLosesToken,
    /// Of choices that end in the same step all but one are never said to have ended.
    CompletionLost,
    /// A decode worker does not notice that a handoff has failed.
    PrefillDeathWedges,
    /// A coordinator that stands aside keeps its connections, and the streams of assignments on them, open.
    StreamsOutliveNode,
    /// What a lost gateway left behind stays open.
    OrphansKept,
    /// A new leader gives tenants their quotas anew.
    RefillOnLead,
    /// The ledger does not look at a tenant's account, only the leader before it proposes.
    QuotaUnchecked,
    /// A coordinator with an empty disk takes part without asking whether it ever did.
    EmptyVotes,
    /// A coordinator that joins is given a number that another one had before it left.
    NumberTwice,
    /// That a worker makes no progress is noticed by nobody, as long as it answers.
    GreenHealth,
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
        Bug::TruncateForgotten,
        Bug::SnapshotForgets,
        Bug::SameLife,
        Bug::SkipLifeCheck,
        Bug::SkipEpochCheck,
        Bug::FreeEarly,
        Bug::CommitEarly,
        Bug::WrongName,
        Bug::FreeTwice,
        Bug::IgnoreNumerics,
        Bug::SameHandle,
        Bug::ResumeLosesToken,
        Bug::CompletionLost,
        Bug::PrefillDeathWedges,
        Bug::StreamsOutliveNode,
        Bug::OrphansKept,
        Bug::RefillOnLead,
        Bug::QuotaUnchecked,
        Bug::EmptyVotes,
        Bug::NumberTwice,
        Bug::GreenHealth,
    ];

    /// The bug of this name, as `Debug` writes it.
    pub fn named(name: &str) -> Option<Bug> {
        Bug::ALL.iter().find(|bug| format!("{bug:?}") == name).copied()
    }
}
