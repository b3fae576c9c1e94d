//! What arrives by gRPC, checked once into the coordinator's own types.

use baton_core::limits::{CHOICES_MAX, REQUEST_DEADLINE_MS, RESUMABLE_MS_MAX};
use baton_core::{BlockHash, Epoch, Incarnation, Lane, NumericsClass, RequestId, Role, WorkerId};
use baton_proto::convert::{block_hash, lane, request_id, required};
use baton_proto::{BadMessage, v1};

use super::roster::Beat;
use crate::placement::{Decision, Question};
use crate::state::{Charge, Finished, Key, Life, Limits, Model, Order, Proposed, Registration};

const NAME_BYTES_MAX: usize = 256;
/// Block hashes looked at; a longer prompt is matched by its beginning.
const HASHES_MAX: usize = 1 << 16;
const EXCLUDE_MAX: usize = 64;
const CANARY_TOKENS_MAX: usize = 64;
/// Largest limit of a tenant; products with a minute's milliseconds stay far from overflow.
const LIMIT_MAX: u64 = 1 << 40;
/// Largest count of tokens, blocks or positions taken seriously; products of two stay far from overflow.
const COUNT_MAX: u64 = 1 << 31;
const BLOCK_TOKENS_MAX: u32 = 1 << 16;

fn bad(field: &'static str, problem: &'static str) -> BadMessage {
    BadMessage { field, problem }
}

/// A name that fits in metrics, logs and the ledger.
fn name(field: &'static str, text: String) -> Result<String, BadMessage> {
    match text.len() {
        0 => Err(bad(field, "is empty")),
        1..=NAME_BYTES_MAX => Ok(text),
        _ => Err(bad(field, "is longer than 256 bytes")),
    }
}

/// A text that may be empty.
pub(super) fn text(field: &'static str, text: String) -> Result<String, BadMessage> {
    if text.is_empty() { Ok(text) } else { name(field, text) }
}

/// A request for an assignment.
#[derive(Clone)]
pub(super) struct Ask {
    pub(super) request: RequestId,
    pub(super) attempt: u32,
    pub(super) tenant: String,
    pub(super) lane: Lane,
    pub(super) model: String,
    prompt_tokens: u64,
    tokens_max: u64,
    choices: u64,
    pub(super) chain: Vec<BlockHash>,
    pub(super) deadline_ms: u64,
    pub(super) exclude: Vec<Life>,
    /// (prefill, decode) between which a handoff failed.
    pub(super) exclude_pairs: Vec<(Life, Life)>,
    full_prefill: bool,
    pub(super) gateway: String,
    pub(super) key: String,
    resumable_ms: u64,
    pub(super) fingerprint: u128,
    pub(super) killed: Vec<Life>,
    /// Of the assignment that this attempt follows; 0: none.
    pub(super) previous: Epoch,
}

impl Ask {
    pub(super) fn new(wire: v1::AssignRequest) -> Result<Ask, BadMessage> {
        if wire.attempt == 0 || wire.prompt_tokens == 0 || wire.tokens_max == 0 || wire.choices == 0 {
            return Err(bad("attempt, prompt_tokens, tokens_max and choices", "must be at least 1"));
        }
        if wire.prompt_tokens.max(wire.tokens_max) > COUNT_MAX || wire.choices > CHOICES_MAX {
            return Err(bad("prompt_tokens, tokens_max or choices", "is out of range"));
        }
        if [wire.exclude.len(), wire.exclude_pairs.len(), wire.killed.len()].iter().any(|count| *count > EXCLUDE_MAX) {
            return Err(bad("exclude, exclude_pairs or killed", "has more than 64 entries"));
        }
        let life = |life: v1::WorkerLife| (WorkerId(life.id.into()), Incarnation(life.incarnation));
        let pair = |pair: v1::WorkerPair| {
            let prefill = required("exclude_pairs.prefill", pair.prefill)?;
            Ok((life(prefill), life(required("exclude_pairs.decode", pair.decode)?)))
        };
        let hashes = wire.block_hashes.iter().take(HASHES_MAX);
        Ok(Ask {
            request: request_id(&wire.request)?,
            attempt: wire.attempt,
            tenant: text("tenant", wire.tenant)?,
            lane: lane(wire.lane)?,
            model: name("model", wire.model)?,
            prompt_tokens: wire.prompt_tokens,
            tokens_max: wire.tokens_max,
            choices: u64::from(wire.choices),
            chain: hashes.map(|hash| block_hash(hash)).collect::<Result<_, _>>()?,
            deadline_ms: wire.deadline_ms.min(REQUEST_DEADLINE_MS),
            exclude: wire.exclude.into_iter().map(life).collect(),
            exclude_pairs: wire.exclude_pairs.into_iter().map(pair).collect::<Result<_, _>>()?,
            full_prefill: wire.prompt_logprobs,
            gateway: text("gateway", wire.gateway)?,
            key: text("key", wire.key)?,
            resumable_ms: wire.resumable_ms.min(RESUMABLE_MS_MAX),
            fingerprint: fingerprint(&wire.fingerprint)?,
            killed: wire.killed.into_iter().map(life).collect(),
            previous: Epoch(wire.previous_epoch),
        })
    }

    /// `numerics`: class of the attempt before.
    pub(super) fn question<'a>(&'a self, numerics: Option<&'a NumericsClass>) -> Question<'a> {
        Question {
            model: &self.model,
            lane: self.lane,
            prompt_tokens: self.prompt_tokens,
            tokens_max: self.tokens_max,
            choices: self.choices,
            full_prefill: self.full_prefill,
            exclude: &self.exclude,
            exclude_pairs: &self.exclude_pairs,
            numerics,
        }
    }

    pub(super) fn proposed(&self, decision: &Decision) -> Proposed {
        Proposed {
            request: self.request,
            attempt: self.attempt,
            tenant: self.tenant.clone(),
            lane: self.lane,
            gateway: self.gateway.clone(),
            prompt_tokens: self.prompt_tokens,
            tokens_max: self.tokens_max,
            choices: self.choices as u32,
            deadline_ms: self.deadline_ms,
            decode: decision.decode.clone(),
            prefill: decision.prefill.clone(),
            key: self.key.clone(),
            resumable_ms: self.resumable_ms,
            fingerprint: self.fingerprint,
            killed: self.killed.clone(),
        }
    }

    /// What the tenant's account is asked for.
    pub(super) fn charge(&self) -> Charge {
        Charge { prompt_tokens: self.prompt_tokens, tokens_max: self.tokens_max, choices: self.choices }
    }
}

/// Absent is 0.
fn fingerprint(bytes: &[u8]) -> Result<u128, BadMessage> {
    match bytes.try_into() {
        Ok(bytes) => Ok(u128::from_le_bytes(bytes)),
        Err(_) if bytes.is_empty() => Ok(0),
        Err(_) => Err(bad("fingerprint", "has not 16 bytes")),
    }
}

/// A name that operators type: letters, digits, `-`, `_`, `.`, at most 64 of them.
pub(super) fn plain(field: &'static str, text: String) -> Result<String, BadMessage> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    match (1..=64).contains(&text.len()) && text.bytes().all(plain) {
        true => Ok(text),
        false => Err(bad(field, "is not 1 to 64 letters, digits, '-', '_' or '.'")),
    }
}

pub(super) fn tenant(wire: v1::Tenant) -> Result<(String, Limits), BadMessage> {
    let limits = Limits {
        requests_per_minute: wire.requests_per_minute,
        tokens_per_minute: wire.tokens_per_minute,
        requests_open_max: wire.requests_open_max,
        prompt_tokens_max: wire.prompt_tokens_max,
        output_tokens_max: wire.output_tokens_max,
    };
    if limits.requests_per_minute.max(limits.tokens_per_minute) > LIMIT_MAX {
        return Err(bad("requests_per_minute or tokens_per_minute", "is over 2^40; 0 is no limit"));
    }
    Ok((plain("tenant.name", wire.name)?, limits))
}

pub(super) fn key(wire: v1::AccessKey) -> Result<(String, Key), BadMessage> {
    let hash: &[u8] = &wire.secret_hash;
    let secret_hash = hash.try_into().map_err(|_| bad("secret_hash", "has not 32 bytes"))?;
    let tenant = plain("key.tenant", wire.tenant)?;
    Ok((plain("key.id", wire.id)?, Key { secret_hash, tenant, created_unix_s: wire.created_unix_s }))
}

pub(super) fn order(wire: v1::Order) -> Order {
    match wire {
        v1::Order::Serve => Order::Serve,
        v1::Order::Drain => Order::Drain,
        v1::Order::BecomePrefill => Order::BecomePrefill,
        v1::Order::BecomeDecode => Order::BecomeDecode,
    }
}

/// A worker's registration; its model must be there.
pub(super) fn registration(member: v1::Member, process_key: String) -> Result<Registration, BadMessage> {
    let role = Role::try_from(member.role())?;
    Ok(Registration {
        worker: WorkerId(name("member.id", member.id)?.into()),
        role,
        address: name("member.address", member.address)?,
        pid: member.pid,
        version: text("member.version", member.version)?,
        model: model(required("member.model", member.model)?)?,
        process_key: name("process_key", process_key)?,
    })
}

fn model(wire: v1::ModelSummary) -> Result<Model, BadMessage> {
    if !(1..=BLOCK_TOKENS_MAX).contains(&wire.block_tokens) || wire.blocks_total.max(wire.positions_max) > COUNT_MAX {
        return Err(bad("model.block_tokens, blocks_total or positions_max", "is out of range"));
    }
    if wire.canary_tokens.len() > CANARY_TOKENS_MAX {
        return Err(bad("model.canary_tokens", "has more than 64 tokens"));
    }
    Ok(Model {
        name: name("model.name", wire.name)?,
        card_hash: text("model.card_hash", wire.card_hash)?,
        numerics: NumericsClass(text("model.numerics", wire.numerics)?),
        block_tokens: wire.block_tokens,
        positions_max: wire.positions_max,
        layout: text("model.layout", wire.layout)?,
        blocks_total: wire.blocks_total,
        block_bytes: wire.block_bytes,
        canary_tokens: wire.canary_tokens,
        vocab: wire.vocab,
    })
}

/// A worker's heartbeat.
pub(super) fn beat(wire: v1::HeartbeatRequest, member: v1::Member) -> Result<Beat, BadMessage> {
    let load = required("load", wire.load)?;
    let counts = [load.blocks_total, load.blocks_free, load.blocks_cached, load.tokens_waiting];
    if counts.iter().any(|count| *count > COUNT_MAX) {
        return Err(bad("load", "is out of range"));
    }
    let hashes = |blocks: &[bytes::Bytes]| blocks.iter().map(|b| block_hash(b)).collect::<Result<Vec<_>, _>>();
    // Workers of an earlier release do not say it.
    let kv_address = text("member.kv_address", member.kv_address)?;
    Ok(Beat {
        worker: WorkerId(name("id", wire.id)?.into()),
        incarnation: Incarnation(wire.incarnation),
        sequence: wire.sequence,
        added: hashes(&load.blocks_added)?,
        removed: hashes(&load.blocks_removed)?,
        member: v1::Member { incarnation: wire.incarnation, kv_address, ..member },
        load,
    })
}

/// A gateway's announcement of itself.
pub(super) fn gateway(member: v1::Member) -> Result<v1::Member, BadMessage> {
    let id = name("member.id", member.id)?;
    let address = name("member.address", member.address)?;
    Ok(v1::Member { id, address, model: None, ..member })
}

pub(super) fn finished(wire: v1::FinishedRequest) -> Result<Finished, BadMessage> {
    Ok(Finished {
        request: request_id(&wire.request)?,
        epoch: Epoch(wire.epoch),
        outcome: name("outcome", wire.outcome)?,
        prompt_tokens: wire.prompt_tokens,
        cached_tokens: wire.cached_tokens,
        generated_tokens: wire.generated_tokens,
    })
}
