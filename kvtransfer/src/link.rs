//! A link as the receiver sees it: a number, and somebody to tell things.

use crate::wire::{Body, Tag};

/// One link of a receiver, never reused in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LinkId(pub(crate) u64);

impl LinkId {
    /// For events that come over no link.
    pub(crate) const NONE: LinkId = LinkId(0);
}

/// The sender at the other end: over TCP an outbox, in this process the transfer itself.
pub(crate) trait Peer: Send + Sync {
    fn tell(&self, tag: Tag, body: Body);
    fn close(&self);
}
