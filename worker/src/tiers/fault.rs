//! What can be wrong with a block in a lower tier. Each is counted, and the block is computed instead.

/// Why a block was not kept, or not given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Its bytes are not those that were saved.
    Damaged,
    /// The file ends in its middle.
    Truncated,
    /// It is of another model, layout or numerics class.
    Foreign,
    Unreadable,
    /// The disk has no room although its share is not used up.
    Full,
    Unwritable,
    /// Too many recalls wait already.
    Busy,
    /// It was evicted before it was saved.
    Late,
}

impl Fault {
    /// The word used in metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Fault::Damaged => "damaged",
            Fault::Truncated => "truncated",
            Fault::Foreign => "foreign",
            Fault::Unreadable => "unreadable",
            Fault::Full => "full",
            Fault::Unwritable => "unwritable",
            Fault::Busy => "busy",
            Fault::Late => "late",
        }
    }

    /// What a failed read of a store means.
    pub(crate) fn of_read(error: &std::io::Error) -> Fault {
        match error.kind() {
            std::io::ErrorKind::UnexpectedEof => Fault::Truncated,
            _ => Fault::Unreadable,
        }
    }

    /// What a failed write to a store means.
    pub(crate) fn of_write(error: &std::io::Error) -> Fault {
        use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull, WriteZero};
        match error.kind() {
            StorageFull | QuotaExceeded | FileTooLarge | WriteZero => Fault::Full,
            _ => Fault::Unwritable,
        }
    }
}
