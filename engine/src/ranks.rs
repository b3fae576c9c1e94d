//! The other ranks of a group: threads that compute their part of every step that rank 0 hands them. They end with it; a
//! rank that panics breaks the group's collective, so that rank 0 hears of it in the middle of the step.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use baton_core::{Arena, TokenId};
use baton_kernels::{Broken, Span};

use crate::batch::Batch;

/// How long a rank may take to end before it is left to the end of the process.
const JOIN: Duration = Duration::from_millis(500);

/// What all ranks compute in one step, and everything that takes. Owned, so that a rank that hangs outlives nothing it
/// reads.
pub struct Step {
    arena: Arc<Arena>,
    tokens: Vec<TokenId>,
    spans: Vec<crate::batch::Span>,
    tables: Vec<u32>,
    drawn: Vec<usize>,
}

/// A step's rows as kernels see them.
pub(crate) struct Rows<'a> {
    pub arena: &'a Arena,
    pub tokens: &'a [TokenId],
    pub spans: Vec<Span<'a>>,
    /// The rows drawn from.
    pub drawn: Vec<usize>,
}

/// What a rank does with a step.
pub type Compute = Box<dyn FnMut(&Step) -> Result<(), Broken> + Send>;

/// Rank 0's hold on the others; dropping it ends them.
#[derive(Default)]
pub(crate) struct Ranks {
    steps: Vec<SyncSender<Arc<Step>>>,
    ended: Option<Receiver<()>>,
}

impl Step {
    pub(crate) fn of(batch: &Batch) -> Step {
        Step {
            arena: batch.arena().clone(),
            tokens: batch.tokens.clone(),
            spans: batch.spans.clone(),
            tables: batch.tables.clone(),
            drawn: drawn(batch),
        }
    }

    pub(crate) fn rows(&self) -> Rows<'_> {
        let spans = self.spans.iter().map(|span| kernel_span(span, &self.tables)).collect();
        Rows { arena: &self.arena, tokens: &self.tokens, spans, drawn: self.drawn.clone() }
    }
}

impl<'a> Rows<'a> {
    pub(crate) fn of(batch: &'a Batch) -> Rows<'a> {
        let spans = batch.spans.iter().map(|span| kernel_span(span, &batch.tables)).collect();
        Rows { arena: batch.arena(), tokens: &batch.tokens, spans, drawn: drawn(batch) }
    }
}

fn kernel_span<'a>(span: &crate::batch::Span, tables: &'a [u32]) -> Span<'a> {
    Span { row: span.row, rows: span.rows, position: span.position, blocks: &tables[span.table.clone()] }
}

/// The different rows of a batch's draws, which are sorted by row.
fn drawn(batch: &Batch) -> Vec<usize> {
    let mut rows: Vec<usize> = batch.draws.iter().map(|draw| draw.row).collect();
    rows.dedup();
    rows
}

impl Ranks {
    /// Starts ranks 1, 2, ... of a group, each on a thread of its own.
    pub(crate) fn start(others: Vec<Compute>) -> io::Result<Ranks> {
        let (end, ended) = sync_channel(0);
        let start = |(index, compute): (usize, Compute)| {
            let (sender, steps) = sync_channel(1);
            let thread = thread::Builder::new().name(format!("rank-{}", index + 1));
            let end = end.clone();
            thread.spawn(move || serve(compute, &steps, end))?;
            Ok(sender)
        };
        let steps = others.into_iter().enumerate().map(start).collect::<io::Result<Vec<_>>>()?;
        Ok(Ranks { steps, ended: Some(ended) })
    }

    /// Whether rank 0 has no others.
    pub(crate) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Lets every other rank compute a step. One that has ended is heard of through the collective.
    pub(crate) fn compute(&self, step: &Arc<Step>) {
        self.steps.iter().for_each(|rank| drop(rank.try_send(step.clone())));
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.steps.clear();
        // Nothing is ever sent: the last rank to end closes the channel.
        let ended = self.ended.take().map(|ended| ended.recv_timeout(JOIN));
        if ended == Some(Err(RecvTimeoutError::Timeout)) {
            tracing::error!("a rank hangs and is left behind");
        }
    }
}

/// Until rank 0 or the group is gone. `_end` is dropped last.
fn serve(mut compute: Compute, steps: &Receiver<Arc<Step>>, _end: SyncSender<()>) {
    while let Ok(step) = steps.recv() {
        if compute(&step).is_err() {
            return;
        }
    }
}
