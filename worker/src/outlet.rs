//! From the engine thread to the tasks that wait for it. One outlet stands for one gateway stream or one Prefill call;
//! everything a step has for it travels as one message. The engine never waits for a reader: an outlet that is full is
//! *overrun*, and all its work is cancelled.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use baton_core::{BlockId, Refused};
use baton_engine::{Blocks, Event};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

/// What one step has for one outlet, in order; each note with the tag its work was submitted under.
pub type Notes = Vec<(u32, Note)>;

/// One thing the engine thread says about one piece of work.
#[derive(Debug)]
pub enum Note {
    /// The engine has taken the work.
    Admitted(Phases),
    /// The engine has not taken the work and holds nothing of it.
    Refused(Refused),
    /// One layer of these blocks is complete (Prefill goal only).
    Layer {
        layer: usize,
        export: Arc<Export>,
    },
    Event(Event),
}

/// Blocks whose layers are being announced.
#[derive(Debug)]
pub struct Export {
    /// (index in the sequence, block).
    pub blocks: Vec<(usize, BlockId)>,
    /// When the batch that completes them began.
    pub began: Instant,
    /// Keeps the blocks from being given out anew until the last layer has been sent.
    pub guard: Blocks,
}

/// How a request spent the time before its engine had it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Phases {
    /// Prompt tokens that the prefill worker found in its cache.
    pub cached_tokens: u64,
    pub prefill_queue: Duration,
    pub prefill_compute: Duration,
    /// Transfer that prefill's compute did not hide.
    pub transfer: Duration,
    /// From Start to the engine's admission.
    pub handoff: Duration,
    pub local_prefill: bool,
}

#[derive(Default)]
struct State {
    id: u64,
    overrun: AtomicBool,
    notify: Notify,
}

/// The sending half; clones are the same outlet.
#[derive(Clone)]
pub struct Outlet {
    sender: mpsc::Sender<Notes>,
    state: Arc<State>,
}

/// The receiving half.
pub struct Inlet {
    receiver: mpsc::Receiver<Notes>,
    state: Arc<State>,
}

/// Why a message did not go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// The reader is too slow.
    Overrun,
    /// The reader is gone.
    Closed,
}

/// A channel for at most `messages` unread messages.
pub fn outlet(messages: usize) -> (Outlet, Inlet) {
    static IDS: AtomicU64 = AtomicU64::new(0);
    let (sender, receiver) = mpsc::channel(messages);
    let state = Arc::new(State { id: IDS.fetch_add(1, Ordering::Relaxed), ..State::default() });
    (Outlet { sender, state: state.clone() }, Inlet { receiver, state })
}

impl Outlet {
    pub(crate) fn id(&self) -> u64 {
        self.state.id
    }

    /// Hands a message over without waiting.
    pub(crate) fn try_send(&self, notes: Notes) -> Result<(), Broken> {
        match self.sender.try_send(notes) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(Broken::Closed),
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.state.overrun.store(true, Ordering::Release);
                self.state.notify.notify_one();
                Err(Broken::Overrun)
            }
        }
    }

    /// Resolves when the reader fell so far behind that its work was cancelled.
    pub async fn overrun(&self) {
        while !self.state.overrun.load(Ordering::Acquire) {
            self.state.notify.notified().await;
        }
    }
}

impl Inlet {
    /// The next message; None after an overrun, or when no sender is left.
    pub async fn next(&mut self) -> Option<Notes> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Notes>> {
        match self.is_overrun() {
            true => Poll::Ready(None),
            false => self.receiver.poll_recv(cx),
        }
    }

    /// Whether nothing waits to be read.
    pub fn is_empty(&self) -> bool {
        self.receiver.is_empty()
    }

    pub fn is_overrun(&self) -> bool {
        self.state.overrun.load(Ordering::Acquire)
    }
}
