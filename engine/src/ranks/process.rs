//! Ranks that are processes of their own, on the same host. Rank 0 tells each on its standard input what to compute; what
//! they tell one another goes through the collective's memory, and keys and values into one arena that all of them map.
//!
//! ```text
//! rank 0 ── arena, steps ──► standard input of rank n      its end: rank 0 has ended, and rank n ends
//!        ◄── "ready", or why not ── its standard output    its end: rank n has ended, and the group is broken
//! ```

use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use baton_core::Arena;
use baton_kernels::{Broken, Profile, Quantize};

use super::wire::{self, Frame, Place};
use super::{Compute, Step};
use crate::load::error::LoadError;
use crate::load::load_rank;

/// Steps that wait in a rank's process: rank 0 goes on only when all have computed the last one.
const STEPS_WAITING: usize = 2;
const READY: &str = "ready";

/// What a rank's process has to know; whoever starts it puts it on a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankOptions {
    /// Not 0.
    pub rank: usize,
    /// Of the group.
    pub ranks: usize,
    /// Where the group's collective is.
    pub memory: PathBuf,
    /// Of this rank.
    pub threads: usize,
    pub profile: Profile,
    pub quantize: Option<Quantize>,
    /// Where packed weights are kept.
    pub kept: Option<PathBuf>,
}

/// Why a rank's process ends before rank 0 does.
#[derive(Debug, thiserror::Error)]
pub enum RankError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("what rank 0 says: {0}")]
    Told(#[from] io::Error),
    #[error("rank 0 sends more steps than it waits for")]
    Flooded,
}

/// Serves one rank in this process until rank 0 ends: loads its part of the model, says so on `to`, and computes the steps
/// that come in `from`. The caller ends the process when this returns: a step may still be under way.
pub fn serve(path: &Path, options: &RankOptions, mut from: impl Read, mut to: impl Write) -> Result<(), RankError> {
    let model = match load_rank(path, options) {
        Ok(model) => model,
        Err(error) => {
            let _ = writeln!(to, "{error}");
            return Err(error.into());
        }
    };
    let abort = model.aborter();
    let (steps, waiting) = sync_channel(STEPS_WAITING);
    let rank = thread::Builder::new().name(format!("rank-{}", options.rank));
    rank.spawn(move || super::serve_steps(model.compute(), &waiting))?;
    writeln!(to, "{READY}")?;
    to.flush()?;
    let outcome = pass_on(&mut from, &steps);
    abort();
    outcome
}

/// Until rank 0 says no more or the rank has ended.
fn pass_on(from: &mut impl Read, steps: &SyncSender<Arc<Step>>) -> Result<(), RankError> {
    let mut arena = None;
    while let Some(frame) = wire::read(from)? {
        match (frame, &arena) {
            (Frame::Arena(Place { path, layout }), _) => arena = Some(Arc::new(Arena::join(&path, layout)?)),
            (Frame::Step(_), None) => return Err(io::Error::other("a step without an arena").into()),
            (Frame::Step(rows), Some(arena)) => match steps.try_send(Arc::new(Step { arena: arena.clone(), rows })) {
                Ok(()) => {}
                Err(TrySendError::Full(_)) => return Err(RankError::Flooded),
                Err(TrySendError::Disconnected(_)) => return Ok(()),
            },
        }
    }
    Ok(())
}

/// What is to be done when a rank's process ends, by whoever hears of it first.
pub(crate) struct Watch {
    abort: Box<dyn Fn() + Send + Sync>,
    heard: Mutex<Heard>,
}

#[derive(Default)]
struct Heard {
    ended: bool,
    tell: Option<Box<dyn Fn() + Send>>,
}

impl Watch {
    pub(crate) fn new(abort: impl Fn() + Send + Sync + 'static) -> Arc<Watch> {
        Arc::new(Watch { abort: Box::new(abort), heard: Mutex::default() })
    }

    /// Calls `tell`, and nobody who was named before, when a rank has ended: at once if one has.
    pub(crate) fn tell(&self, tell: Box<dyn Fn() + Send>) {
        let mut heard = lock(&self.heard);
        if heard.ended {
            tell();
        }
        heard.tell = Some(tell);
    }

    fn ended(&self) {
        (self.abort)();
        let mut heard = lock(&self.heard);
        heard.ended = true;
        heard.tell.iter().for_each(|tell| tell());
    }
}

/// A process that loads its part of the model.
pub(crate) struct Starting {
    rank: usize,
    process: RankProcess,
    said: Receiver<String>,
}

/// A rank's process; dropping it ends it.
pub(crate) struct RankProcess {
    child: Arc<Mutex<Child>>,
    to: ChildStdin,
    /// The one it was told of last.
    arena: Option<Arc<Arena>>,
}

impl Starting {
    pub(crate) fn new(rank: usize, mut command: Command, watch: Arc<Watch>) -> io::Result<Starting> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
            unreachable!("both are piped");
        };
        let child = Arc::new(Mutex::new(child));
        let process = RankProcess { child: child.clone(), to, arena: None };
        let (say, said) = sync_channel(1);
        let thread = thread::Builder::new().name(format!("watch-{rank}"));
        thread.spawn(move || watch_over(BufReader::new(from), say, &child, &watch))?;
        Ok(Starting { rank, process, said })
    }

    /// Returns when it has loaded its part.
    pub(crate) fn ready(self) -> Result<RankProcess, LoadError> {
        let said = self.said.recv().unwrap_or_default();
        match said.trim() {
            READY => Ok(self.process),
            "" => Err(LoadError::Rank { rank: self.rank, reason: "it ended while it loaded".into() }),
            reason => Err(LoadError::Rank { rank: self.rank, reason: reason.into() }),
        }
    }
}

/// Passes on the first line that a process says, and reaps it once it has ended.
fn watch_over(mut from: BufReader<ChildStdout>, say: SyncSender<String>, child: &Mutex<Child>, watch: &Watch) {
    let mut line = String::new();
    let _ = from.read_line(&mut line);
    // Nobody waits any more: loading has failed elsewhere.
    let _ = say.try_send(line);
    drop(say);
    let _ = io::copy(&mut from, &mut io::sink());
    watch.ended();
    let mut child = lock(child);
    let _ = child.kill();
    let _ = child.wait();
}

impl RankProcess {
    pub(crate) fn pid(&self) -> u32 {
        lock(&self.child).id()
    }

    /// What rank 0 does with each step: it hands it over. What came of it the collective tells.
    pub(crate) fn compute(mut self) -> Compute {
        Box::new(move |step| self.hand(step).map_err(|_| Broken::Aborted))
    }

    fn hand(&mut self, step: &Step) -> io::Result<()> {
        if !self.arena.as_ref().is_some_and(|known| Arc::ptr_eq(known, &step.arena)) {
            let path = step.arena.path().ok_or_else(|| io::Error::other("the arena is not shared memory"))?;
            wire::write_arena(&mut self.to, &Place { path, layout: *step.arena.layout() })?;
            self.arena = Some(step.arena.clone());
        }
        wire::write_step(&mut self.to, &step.rows)
    }
}

impl Drop for RankProcess {
    fn drop(&mut self) {
        // It has nothing to lose. One that has ended is reaped by its watch.
        let _ = lock(&self.child).kill();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
