//! One handoff, from the open transfer to the committed one. Layers leave as the engine announces them.

use std::time::Duration;

use baton_core::planted::{self, Bug};
use baton_core::{Aborted, Refused, SampledToken};
use baton_engine::{Blocks, Event, Goal, Work};
use baton_kvtransfer::{Grant, Outgoing};
use baton_proto::convert::{prompt_logprobs, refusal};
use baton_proto::v1::{FirstToken, Prefilled};
use baton_worker::outlet::{Export, Inlet, Note, Phases, outlet};
use baton_worker::{Assigned, Shell, Submission, Units, metrics};
use tokio::time::Instant;

use crate::service::Failure;

/// What the engine had computed when it was done.
struct Computed {
    first: Vec<(u32, SampledToken)>,
    prompt_logprobs: Vec<Option<SampledToken>>,
    cached_tokens: usize,
    tokens: usize,
    /// Held until the transfer is committed.
    blocks: Blocks,
}

/// Opens the granted transfer, computes and sends the blocks, and commits. Dropping the future cancels all of it.
pub(crate) async fn run(
    shell: &Shell,
    assigned: Assigned,
    grant: Grant,
    skip_blocks: usize,
) -> Result<Prefilled, Failure> {
    let (tokens, units) = (assigned.shared_tokens().len(), shell.units);
    let moved = tokens.div_ceil(units.tokens());
    if skip_blocks + grant.blocks.len() != moved {
        let detail = format!("{skip_blocks} blocks skipped and {} granted, of {moved}", grant.blocks.len());
        return Err(Failure::Refused(refusal(Refused::Incompatible, detail)));
    }
    let outgoing = shell.links().open_from_device(grant).await?;
    let mut sending = Sending { outgoing, units, skip_blocks, end: moved, began: None };
    // Only what the engine does not write any more, and so whole blocks of its own.
    let full = tokens / shell.spec.layout.block_tokens as usize * units.each();
    sending.outgoing.settle(full.saturating_sub(skip_blocks));
    // Each layer announces each block once, so that so many messages can never be too many: the engine never waits
    // for a slow link, and what waits is bounded by the request itself.
    let layers = shell.spec.layout.layers as usize;
    let blocks = tokens.div_ceil(shell.spec.layout.block_tokens as usize);
    let on_device = sending.outgoing.is_from_device();
    let (outlet, inlet) = outlet(layers * blocks + 4);
    let is_moved = assigned.is_moved();
    drop(bring(shell, &assigned).await);
    let Assigned { request, choices, started, .. } = assigned;
    let goal = Goal::Prefill { skip_blocks: skip_blocks / units.each(), on_device };
    let work = Work { request, choices, goal, filled: None, moved: is_moved };
    let submission = Submission { work, outlet, tag: 0, phases: Phases::default(), started };
    // Dropped at the end of this function, however it ends.
    let admission = shell.engine.submit(submission).map_err(refused)?;
    let computed = sending.follow(inlet).await?;
    let computed_at = Instant::now();
    let began = sending.began.unwrap_or(computed_at);
    sending.outgoing.commit().await?;
    metrics::record_links(&shell.links().counters());
    drop((computed.blocks, admission));
    let phases = [began - started, computed_at - began, computed_at.elapsed()].map(us);
    metrics::record_prefill(phases.map(Duration::from_micros));
    let [queue_us, compute_us, transfer_us] = phases;
    Ok(Prefilled {
        first: computed.first.into_iter().map(|(choice, t)| FirstToken { choice, token: Some(t.into()) }).collect(),
        prompt_logprobs: prompt_logprobs(computed.prompt_logprobs),
        cached_tokens: computed.cached_tokens as u64,
        tokens: computed.tokens as u64,
        queue_us,
        compute_us,
        transfer_us,
    })
}

/// Brings what lower tiers and another worker have of the request into the cache, where the engine finds it.
async fn bring(shell: &Shell, assigned: &Assigned) -> Option<Blocks> {
    if !shell.config.prefix_cache || assigned.request.prompt_logprobs.is_some() {
        return None;
    }
    Some(shell.bring(assigned, &assigned.names(shell.spec.layout.block_tokens as usize)).await)
}

fn us(duration: Duration) -> u64 {
    duration.as_micros() as u64
}

fn refused(reason: Refused) -> Failure {
    metrics::count_refused(reason);
    Failure::Refused(refusal(reason, "the engine does not take it"))
}

/// The transfer while the engine computes.
struct Sending {
    outgoing: Outgoing,
    units: Units,
    /// Of the sequence's units, those that the decode worker has, and those that there are.
    skip_blocks: usize,
    end: usize,
    /// When the engine began with the request.
    began: Option<Instant>,
}

impl Sending {
    /// Sends what the engine announces until it is done.
    async fn follow(&mut self, mut inlet: Inlet) -> Result<Computed, Failure> {
        while let Some(notes) = inlet.next().await {
            for (_, note) in notes {
                match note {
                    Note::Admitted(_) => {}
                    Note::Refused(reason) => return Err(refused(reason)),
                    Note::Layer { layer, export } => self.send(layer, &export).await?,
                    Note::Event(Event::Prefilled { first, prompt_logprobs, cached_tokens, blocks, tokens, .. }) => {
                        return Ok(Computed { first, prompt_logprobs, cached_tokens, tokens, blocks });
                    }
                    Note::Event(Event::Aborted { reason, .. }) => return Err(reason.into()),
                    Note::Event(_) => return Err(Aborted::Internal.into()),
                }
            }
        }
        // The engine thread is gone.
        Err(Aborted::Internal.into())
    }

    async fn send(&mut self, layer: usize, export: &Export) -> Result<(), Failure> {
        self.began.get_or_insert(export.began);
        // The grant's blocks follow those that decode already holds.
        let mut blocks = self.units.placed(&export.blocks, self.skip_blocks, self.end);
        if planted::is(Bug::ForeignBlock)
            && let [.., (_, last), _] = export.blocks[..]
            && let Some((_, block)) = blocks.last_mut()
        {
            *block = last;
        }
        self.outgoing.send_soon(layer, &blocks).await?;
        Ok(())
    }
}
