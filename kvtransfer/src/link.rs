//! A link as the receiver sees it: a number, what it can do, and somebody to tell things.

use std::sync::Arc;

use baton_core::Arena;
use baton_core::arena::DeviceSource;

use crate::wire::{Body, FEATURE_RESEND, Tag};

/// One link of a receiver, never reused in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LinkId(pub(crate) u64);

impl LinkId {
    /// For events that come over no link.
    pub(crate) const NONE: LinkId = LinkId(0);
}

/// A greeted link and what its sender brought.
pub(crate) struct Link {
    pub(crate) id: LinkId,
    /// What both ends can do (`wire::FEATURE_*`).
    pub(crate) features: u16,
    /// The sender's arena, over shared memory.
    pub(crate) source: Option<Arc<Arena>>,
    /// The same blocks on its device, as ours reads them.
    pub(crate) device: Option<Arc<dyn DeviceSource>>,
}

/// What a sender of this host brings along.
pub(crate) struct Brought {
    pub(crate) arena: Arc<Arena>,
    pub(crate) device: Option<Arc<dyn DeviceSource>>,
}

impl Link {
    pub(crate) fn resends(&self) -> bool {
        self.features & FEATURE_RESEND != 0
    }
}

/// The sender at the other end: over a connection an outbox, in this process the transfer itself.
pub(crate) trait Peer: Send + Sync {
    fn tell(&self, tag: Tag, body: Body);
    fn close(&self);
}
