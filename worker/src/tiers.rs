//! Slower memory below a worker's cache: the host's (for a cache in a GPU, or in front of a disk) and a disk. One thread
//! saves blocks before they are evicted, and brings them back before a request that has them as its prefix is given to the
//! engine. The engine's step never waits for it; what goes wrong here is counted and means that blocks are computed.
//!
//! ```text
//! cache ──save, ahead of eviction──► host ──its oldest──► disk ──its oldest──► gone
//!   ▲                                  │                    │
//!   └──────────── recall ──────────────┴────────────────────┘   every block by its digest, or not at all
//! ```

mod disk;
mod fault;
mod host;
mod keeper;
mod store;

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use baton_core::BlockHash;
use baton_engine::{Blocks, Cache, ModelSpec, Reserved};
use tokio::sync::oneshot;

use crate::worth::{Meter, Offer};
use disk::Disk;
use host::Host;
use keeper::Keeper;
use store::FileStore;

pub(crate) use fault::Fault;

/// Recalls that wait at a time; who comes later computes.
const RECALLS_MAX: usize = 256;
/// One part in so many of the cache is kept ready to be given out without loss: a long prompt takes many blocks at once, and
/// a prefix that lacks its head is worth nothing.
const AHEAD_PART: usize = 2;

/// What an operator gives to the lower tiers.
#[derive(Clone, Debug, Default)]
pub(crate) struct TierSizes {
    /// 0: none.
    pub(crate) host_bytes: u64,
    pub(crate) disk: Option<PathBuf>,
    pub(crate) disk_bytes: u64,
}

/// The lower tiers of one cache. Dropping it saves what there is still time for, and joins the thread.
pub(crate) struct Tiers {
    cache: Cache,
    inbox: Arc<Inbox>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Blocks to be brought back, in order.
struct Recall {
    names: Vec<BlockHash>,
    room: Reserved,
    reply: oneshot::Sender<Blocks>,
}

#[derive(Default)]
struct Inbox {
    queue: Mutex<Queue>,
    wake: Condvar,
    /// How fast blocks have come back lately.
    speed: Mutex<Meter>,
}

#[derive(Default)]
struct Queue {
    recalls: VecDeque<Recall>,
    /// The cache may have something to save.
    pressed: bool,
    stopped: bool,
}

enum Next {
    Recall(Recall),
    Save,
    Stop,
}

impl Tiers {
    /// Makes the tiers that `sizes` asks for and takes in what the disk has kept; None if it asks for none.
    pub(crate) fn open(cache: &Cache, spec: &ModelSpec, sizes: &TierSizes) -> io::Result<Option<Tiers>> {
        let block_bytes = spec.layout.block_bytes();
        let class = disk::class(spec);
        let host = Host::new(class, block_bytes, sizes.host_bytes);
        let disk = match &sizes.disk {
            Some(folder) => Some(Disk::open(FileStore::open(folder)?, class, block_bytes, sizes.disk_bytes)?),
            None => None,
        };
        if host.is_none() && disk.is_none() {
            return Ok(None);
        }
        Tiers::start(cache.clone(), host, disk).map(Some)
    }

    fn start<S: store::Store + 'static>(cache: Cache, host: Option<Host>, disk: Option<Disk<S>>) -> io::Result<Tiers> {
        let inbox = Arc::<Inbox>::default();
        let keeper = Keeper::new(cache.clone(), host, disk);
        let ahead = cache.stats().total.div_ceil(AHEAD_PART);
        let pressed = Arc::downgrade(&inbox);
        cache.on_pressure(ahead, move || {
            if let Some(inbox) = pressed.upgrade() {
                inbox.press();
            }
        });
        let theirs = inbox.clone();
        let thread = std::thread::Builder::new().name("tiers".into()).spawn(move || drive(keeper, &theirs))?;
        Ok(Tiers { cache, inbox, thread: Mutex::new(Some(thread)) })
    }

    /// What it would take to bring `blocks` blocks back.
    pub(crate) fn offer(&self, blocks: usize) -> Offer {
        let bytes = blocks * self.cache.arena().layout().block_bytes();
        Offer { bytes: bytes as u64, bytes_per_s: lock(&self.inbox.speed).per_second() }
    }

    /// The leading run of `names` out of the lower tiers: as many as are there, as can be trusted, and as there is room
    /// for. They are cached from then on; the guard is the caller's.
    pub(crate) async fn recall(&self, names: &[BlockHash]) -> Option<Blocks> {
        let below = self.cache.below(names);
        let room = self.cache.reserve(below).ok().filter(|_| below > 0)?;
        let (reply, answer) = oneshot::channel();
        self.inbox.ask(Recall { names: names[..below].to_vec(), room, reply })?;
        answer.await.ok()
    }
}

impl Tiers {
    /// Saves what there is still time for, and ends the thread. Nothing is brought back any more.
    pub(crate) fn close(&self) {
        self.inbox.stop();
        let thread = lock(&self.thread).take();
        // A panic has been reported by its own message.
        thread.map(JoinHandle::join);
    }
}

impl Drop for Tiers {
    fn drop(&mut self) {
        self.close();
    }
}

impl Inbox {
    fn ask(&self, recall: Recall) -> Option<()> {
        let mut queue = lock(&self.queue);
        if queue.stopped || queue.recalls.len() >= RECALLS_MAX {
            drop(queue);
            crate::metrics::count_tier_fault("queue", Fault::Busy);
            return None;
        }
        queue.recalls.push_back(recall);
        drop(queue);
        self.wake.notify_one();
        Some(())
    }

    fn press(&self) {
        lock(&self.queue).pressed = true;
        self.wake.notify_one();
    }

    fn stop(&self) {
        let recalls = {
            let mut queue = lock(&self.queue);
            queue.stopped = true;
            std::mem::take(&mut queue.recalls)
        };
        self.wake.notify_one();
        // Dropped without the lock: they give blocks back, which may press.
        drop(recalls);
    }

    /// Recalls first: somebody waits for them.
    fn next(&self) -> Next {
        let idle = |queue: &mut Queue| queue.recalls.is_empty() && !queue.pressed && !queue.stopped;
        let mut queue = self.wake.wait_while(lock(&self.queue), idle).unwrap_or_else(|poisoned| poisoned.into_inner());
        if queue.stopped {
            return Next::Stop;
        }
        match queue.recalls.pop_front() {
            Some(recall) => Next::Recall(recall),
            None => {
                queue.pressed = false;
                Next::Save
            }
        }
    }
}

fn drive<S: store::Store>(mut keeper: Keeper<S>, inbox: &Inbox) {
    loop {
        match inbox.next() {
            Next::Recall(Recall { names, room, reply }) => {
                let (blocks, took) = keeper.recall(&names, room);
                lock(&inbox.speed).add(blocks.len() as u64 * keeper.block_bytes(), took);
                // Who does not wait any more finds them in the cache.
                let _ = reply.send(blocks);
            }
            // One at a time, so that a recall waits for one write at most.
            Next::Save => {
                if keeper.save_next() {
                    inbox.press();
                }
            }
            Next::Stop => return keeper.finish(),
        }
    }
}

/// A poisoned lock means that a thread panicked between two consistent states; going on is safe.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests;
