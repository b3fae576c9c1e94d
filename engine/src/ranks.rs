//! The other ranks of a group: threads that compute their part of every step that rank 0 hands them, or pass it to processes
//! that do. They end with it; a rank that ends breaks the group's collective, so that rank 0 hears of it in the middle of
//! the step.

pub mod process;
mod wire;

use std::io;
use std::ops::Range;
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
    rows: StepRows,
}

/// A step's rows, without the memory that they write.
#[derive(Clone, Debug, Default, PartialEq)]
struct StepRows {
    tokens: Vec<TokenId>,
    spans: Vec<StepSpan>,
    tables: Vec<u32>,
    drawn: Vec<usize>,
}

#[derive(Clone, Debug, PartialEq)]
struct StepSpan {
    row: usize,
    rows: usize,
    position: usize,
    /// In the tables.
    table: Range<usize>,
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
        let span = |span: &crate::batch::Span| StepSpan {
            row: span.row,
            rows: span.rows,
            position: span.position,
            table: span.table.clone(),
        };
        let spans = batch.spans.iter().map(span).collect();
        let (tokens, tables) = (batch.tokens.clone(), batch.tables.clone());
        Step { arena: batch.arena().clone(), rows: StepRows { tokens, spans, tables, drawn: drawn(batch) } }
    }

    pub(crate) fn rows(&self) -> Rows<'_> {
        let StepRows { tokens, spans, tables, drawn } = &self.rows;
        let span = |span: &StepSpan| {
            let blocks = &tables[span.table.clone()];
            Span { row: span.row, rows: span.rows, position: span.position, blocks }
        };
        Rows { arena: &self.arena, tokens, spans: spans.iter().map(span).collect(), drawn: drawn.clone() }
    }
}

impl<'a> Rows<'a> {
    pub(crate) fn of(batch: &'a Batch) -> Rows<'a> {
        let span = |span: &crate::batch::Span| {
            let blocks = &batch.tables[span.table.clone()];
            Span { row: span.row, rows: span.rows, position: span.position, blocks }
        };
        let spans = batch.spans.iter().map(span).collect();
        Rows { arena: batch.arena(), tokens: &batch.tokens, spans, drawn: drawn(batch) }
    }
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

/// As `serve_steps`. `_end` is dropped last.
fn serve(compute: Compute, steps: &Receiver<Arc<Step>>, _end: SyncSender<()>) {
    serve_steps(compute, steps);
}

/// Until rank 0 or the group is gone.
fn serve_steps(mut compute: Compute, steps: &Receiver<Arc<Step>>) {
    while let Ok(step) = steps.recv() {
        if compute(&step).is_err() {
            return;
        }
    }
}
