//! Why something was refused before it began, or aborted after. The words are metric labels and wire codes.

use serde::{Deserialize, Serialize};

macro_rules! reasons {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, thiserror::Error)]
        pub enum $name { $($(#[$vdoc])* #[error($text)] $variant,)* }

        impl $name {
            pub const ALL: &[$name] = &[$($name::$variant),*];

            /// The metric label and wire code.
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text,)* }
            }

            /// The reason a wire code names.
            pub fn parse(text: &str) -> Option<$name> {
                $name::ALL.iter().copied().find(|reason| reason.as_str() == text)
            }
        }
    };
}

reasons!(
    /// The answer to something that did not begin; nothing is held because of it.
    Refused {
        /// No live worker serves this model.
        NoWorkers = "no_workers",
        /// Every worker is full; worth a retry after a while.
        NoCapacity = "no_capacity",
        UnknownModel = "unknown_model",
        /// The request exceeds what any worker of the model can hold.
        TooLarge = "too_large",
        /// The sender's epoch or incarnation is older than the one in force.
        Stale = "stale",
        /// This life was ended for its silence; the process may register as a new one.
        Fenced = "fenced",
        /// The lease has run out.
        Expired = "expired",
        Draining = "draining",
        /// This coordinator does not lead.
        NotLeader = "not_leader",
        /// No quorum answered in time; the command may or may not have been applied.
        Unavailable = "unavailable",
        /// The worker speaks another cluster's id or wire version.
        Incompatible = "incompatible",
        /// The tenant has used up what it may use in this minute, or at a time.
        Quota = "quota",
        /// It would have to wait longer than its lane allows.
        Overloaded = "overloaded",
        /// Its worker died under it too often; it is not tried again for a while.
        Poisoned = "poisoned",
        /// Nothing is known of what was named.
        Unknown = "unknown",
        /// The sender belongs to another cluster.
        Foreign = "foreign",
    }
);

reasons!(
    /// The end of something that had begun; what it held has been freed.
    Aborted {
        PrefillLost = "prefill_lost",
        PrefillRefused = "prefill_refused",
        DecodeLost = "decode_lost",
        TransferFailed = "transfer_failed",
        Deadline = "deadline",
        Cancelled = "cancelled",
        Superseded = "superseded",
        Draining = "draining",
        NoCapacity = "no_capacity",
        /// A fault in the worker itself.
        Internal = "internal",
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_round_trip() {
        assert!(Refused::ALL.iter().all(|r| Refused::parse(r.as_str()) == Some(*r)));
        assert!(Aborted::ALL.iter().all(|r| Aborted::parse(r.as_str()) == Some(*r)));
        assert_eq!(Refused::parse("other"), None);
    }
}
