//! Decode's side of a handoff: reserve, grant, ask the prefill worker, wait until every block has arrived. All that is
//! held on the way is held by guards, so that giving up at any point frees it, as soon as nobody can write it any more.

use std::time::Duration;

use baton_core::limits::BLOCK_TOKENS;
use baton_core::planted::{self, Bug};
use baton_core::{Aborted, Assignment, BlockHash, Refused, TokenId};
use baton_engine::{Blocks, Filled, Reserved};
use baton_kvtransfer::{Partial, TransferError};
use baton_proto::convert::{prompt_logprobs_back, refusal};
use baton_proto::v1::{Choice, PrefillRequest, Prefilled, Refusal};
use baton_worker::outlet::Phases;
use baton_worker::{Assigned, grant, metrics};
use tokio::time::timeout;

use crate::Decode;
use crate::prefills::Pair;
use crate::request::End;

/// After a transfer broke, how long the prefill worker may take to say why; its word names the cause.
const VERDICT: Duration = Duration::from_millis(500);

/// After a handoff broke, how long its sender may take to fall silent, so that what it sent whole can be kept.
const REMAINS: Duration = Duration::from_millis(100);

/// A full cache may have room again when so much time has passed.
const RETRY_AFTER_MS: u64 = 250;

/// What a request brings to the engine.
#[derive(Default)]
pub(crate) struct Brought {
    /// None: the engine prefills.
    pub(crate) filled: Option<Filled>,
    pub(crate) phases: Phases,
}

/// Brings the blocks here, unless the engine is to compute them.
pub(crate) async fn bring(decode: &Decode, assigned: &Assigned) -> Result<Brought, End> {
    let Some(prefill) = &assigned.assignment.prefill else {
        let held = bring_held(decode, assigned).await;
        count_move(decode, assigned, held * decode.shell.spec.layout.block_tokens as usize);
        return Ok(local("assigned"));
    };
    let pair = Pair { prefill, decode: &assigned.assignment.decode };
    let tokens = assigned.shared_tokens();
    let hashes = names(decode, assigned, &tokens);
    // What another worker holds is fetched here only if nothing is left to compute then; else whoever computes fetches it.
    let held = match &assigned.assignment.holder {
        Some(holder) if holder.moves => decode.shell.bring(assigned, &hashes).await,
        _ => decode.shell.recall(&hashes).await,
    };
    count_move(decode, assigned, held.len() * decode.shell.spec.layout.block_tokens as usize);
    if is_nearly_held(decode, assigned, &tokens, &held) {
        return Ok(local("prefix_hit"));
    }
    let room = reserve(decode, &tokens, held)?;
    let result = receive(decode, assigned, pair, &hashes, (tokens.len(), room)).await;
    metrics::record_transfers(&decode.shell.receiver().counters());
    let (prefilled, room) = result?;
    let phases = phases(&prefilled);
    let filled = fill(decode, pair, &tokens, &hashes, room, prefilled)?;
    Ok(Brought { filled: Some(filled), phases })
}

/// Brings what lower tiers and another worker have of the request into the cache, where the engine finds it, and says how many
/// blocks those are.
async fn bring_held(decode: &Decode, assigned: &Assigned) -> usize {
    if !decode.shell.config.prefix_cache || assigned.request.prompt_logprobs.is_some() {
        return 0;
    }
    let names = assigned.names(decode.shell.spec.layout.block_tokens as usize);
    decode.shell.bring(assigned, &names).await.len()
}

/// Counts how a request that had to leave another worker goes on: from its blocks, but for the one that was not full, or
/// by computing them again.
fn count_move(decode: &Decode, assigned: &Assigned, held: usize) {
    let Some(holder) = &assigned.assignment.holder else { return };
    let whole = assigned.choices.iter().all(|choice| {
        let tokens = assigned.request.prompt.len() + choice.so_far.len();
        tokens - held.min(tokens) <= BLOCK_TOKENS.max(decode.shell.spec.layout.block_tokens as usize)
    });
    baton_worker::count_move(holder, !whole);
}

fn local(reason: &'static str) -> Brought {
    metrics::count_local_prefill(reason);
    Brought { filled: None, phases: Phases { local_prefill: true, ..Phases::default() } }
}

fn names(decode: &Decode, assigned: &Assigned, tokens: &[TokenId]) -> Vec<BlockHash> {
    let block_tokens = decode.shell.spec.layout.block_tokens as usize;
    match decode.shell.config.prefix_cache {
        true => BlockHash::chain(&assigned.request.cache_salt, tokens, block_tokens),
        false => Vec::new(),
    }
}

/// Computing at most one block takes less than a handoff.
fn is_nearly_held(decode: &Decode, assigned: &Assigned, tokens: &[TokenId], held: &Blocks) -> bool {
    let block_tokens = decode.shell.spec.layout.block_tokens as usize;
    let lacking = tokens.len() - held.len() * block_tokens;
    !held.is_empty() && lacking <= block_tokens && assigned.request.prompt_logprobs.is_none()
}

/// Blocks for a sequence: those found here, and those that the handoff is to fill.
struct Room {
    held: Blocks,
    reserved: Reserved,
}

fn reserve(decode: &Decode, tokens: &[TokenId], held: Blocks) -> Result<Room, End> {
    let spec = &decode.shell.spec;
    let blocks = tokens.len().div_ceil(spec.layout.block_tokens as usize);
    if tokens.len() >= spec.positions_max || blocks > decode.shell.config.blocks {
        metrics::count_refused(Refused::TooLarge);
        return Err(refusal(Refused::TooLarge, format!("{} tokens fit no sequence here", tokens.len())).into());
    }
    let reserved = decode.shell.engine.cache().reserve(blocks - held.len());
    let reserved = reserved.map_err(|reason| {
        metrics::count_refused(reason);
        Refusal { retry_after_ms: RETRY_AFTER_MS, ..refusal(reason, format!("{blocks} blocks are not free")) }
    })?;
    Ok(Room { held, reserved })
}

/// Grants the room to the prefill worker and waits for its answer and for the blocks, in whatever order they come. If the
/// handoff breaks, the blocks that arrived whole stay: the next attempt finds them, by whichever worker, and brings or
/// computes the rest only.
async fn receive(
    decode: &Decode,
    assigned: &Assigned,
    pair: Pair<'_>,
    hashes: &[BlockHash],
    (tokens, room): (usize, Room),
) -> Result<(Prefilled, Room), End> {
    let (request, epoch) = (assigned.request.id, assigned.assignment.epoch);
    // As links move them: those that the tokens take, behind what is held here.
    let units = decode.shell.units;
    let (mut blocks, skip_blocks) = (units.of(&room.reserved.ids()), room.held.len() * units.each());
    blocks.truncate(tokens.div_ceil(units.tokens()) - skip_blocks);
    let (mut grant, mut incoming) = decode.shell.receiver().open(request, epoch, blocks, assigned.left(), room);
    grant.address = decode.shell.kv_address().to_string();
    let left_ms = assigned.left().as_millis() as u64;
    // What a move could bring has been brought.
    let holder = assigned.assignment.holder.clone().filter(|holder| !holder.moves);
    let assignment = Assignment { holder, ..assigned.assignment.clone() };
    let wire = PrefillRequest {
        assignment: Some(baton_proto::v1::Assignment { lease_ms: left_ms, ..assignment.into() }),
        request: Some(baton_proto::v1::Request { deadline_ms: left_ms, ..(&*assigned.request).into() }),
        choices: assigned.choices.iter().map(|c| Choice { index: c.index, so_far: c.so_far.clone() }).collect(),
        grant: Some(grant::to_wire(grant)),
        skip_blocks: skip_blocks as u32,
    };
    let mut call = std::pin::pin!(decode.prefills.call(pair, wire));
    let broken = |error: TransferError| End::from(pair.blame_both(error.reason(), error.to_string()));
    tokio::select! {
        reply = &mut call => match reply {
            Ok(prefilled) => match incoming.wait_or_keep().await {
                Ok((room, _)) => Ok((prefilled, room)),
                Err(remains) => Err(broken(keep(decode, remains, hashes))),
            },
            Err(_) if planted::is(Bug::PrefillDeathWedges) => std::future::pending().await,
            Err(abort) => {
                incoming.give_up();
                if let Ok(Err(remains)) = timeout(REMAINS, incoming.wait_or_keep()).await {
                    keep(decode, remains, hashes);
                }
                Err(abort.into())
            }
        },
        arrived = incoming.wait_or_keep() => match arrived {
            Ok((room, _)) => Ok((call.await?, room)),
            Err(_) if planted::is(Bug::PrefillDeathWedges) => std::future::pending().await,
            Err(remains) => {
                let error = keep(decode, remains, hashes);
                match timeout(VERDICT, call).await {
                    Ok(Err(abort)) => Err(abort.into()),
                    Ok(Ok(_)) | Err(_) => Err(broken(error)),
                }
            }
        },
    }
}

/// Names the verified blocks of a broken handoff for the prefix cache, up to the first that lacks something, and says
/// what broke it.
fn keep(decode: &Decode, remains: Result<Partial<Room>, TransferError>, hashes: &[BlockHash]) -> TransferError {
    let partial = match remains {
        Ok(partial) => partial,
        Err(error) => return error,
    };
    let whole = decode.shell.units.whole_blocks(partial.whole());
    let Partial { error, guard: Room { held, mut reserved }, .. } = partial;
    let names = &hashes[held.len().min(hashes.len())..];
    let kept = whole.min(names.len());
    reserved.truncate(kept);
    drop(reserved.fill(&names[..kept]));
    metrics::count_kept_blocks(kept as u64);
    error
}

fn phases(prefilled: &Prefilled) -> Phases {
    Phases {
        cached_tokens: prefilled.cached_tokens,
        prefill_queue: Duration::from_micros(prefilled.queue_us),
        prefill_compute: Duration::from_micros(prefilled.compute_us),
        transfer: Duration::from_micros(prefilled.transfer_us),
        ..Phases::default()
    }
}

/// Declares the arrived blocks filled, once the prefill worker's answer fits them.
fn fill(
    decode: &Decode,
    pair: Pair<'_>,
    tokens: &[TokenId],
    hashes: &[BlockHash],
    room: Room,
    prefilled: Prefilled,
) -> Result<Filled, End> {
    let first: Vec<_> = prefilled.first.into_iter().filter_map(|f| Some((f.choice, f.token?.into()))).collect();
    let first = match planted::is(Bug::SwapChoices) {
        true => swapped(first),
        false => first,
    };
    let known = |(_, token): &(u32, baton_core::SampledToken)| (token.id as usize) < decode.shell.spec.vocab;
    if prefilled.tokens != tokens.len() as u64 || !first.iter().all(known) {
        return Err(pair.blame_prefill(Aborted::Internal, "its answer does not fit the request").into());
    }
    let Room { held: mut blocks, reserved } = room;
    let named = if planted::is(Bug::WrongName) { 0 } else { blocks.len().min(hashes.len()) };
    // The engine goes on writing the last one unless it is full.
    let full = hashes.len() - named;
    let unfinished = decode.shell.units.of(&reserved.ids()[full.min(reserved.ids().len())..]);
    decode.shell.links().unsettle(&unfinished);
    blocks.append(reserved.fill(&hashes[named..]));
    Ok(Filled { blocks, tokens: tokens.len(), first, prompt_logprobs: prompt_logprobs_back(prefilled.prompt_logprobs) })
}

/// The planted bug: each choice gets the next one's token.
fn swapped(mut first: Vec<(u32, baton_core::SampledToken)>) -> Vec<(u32, baton_core::SampledToken)> {
    let choices: Vec<u32> = first.iter().map(|(choice, _)| *choice).collect();
    let next = choices.iter().cycle().skip(1);
    first.iter_mut().zip(next).for_each(|((choice, _), next)| *choice = *next);
    first
}
