//! Between wire types and core types. What arrives is checked here once; core types are trusted afterwards.

use baton_core::{
    Aborted, Assignment, BlockHash, BlockId, BlockLayout, Epoch, Finish, Holder, Incarnation, KvDtype, Lane, Place,
    Refused, Request, RequestId, Role, SampledToken, Sampling, WorkerId,
};
use bytes::Bytes;

use crate::v1;

/// A message that a correct peer would not have sent.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("bad message: {field} {problem}")]
pub struct BadMessage {
    pub field: &'static str,
    pub problem: &'static str,
}

impl From<BadMessage> for tonic::Status {
    fn from(bad: BadMessage) -> tonic::Status {
        tonic::Status::invalid_argument(bad.to_string())
    }
}

/// The value of a field that must be present.
pub fn required<T>(field: &'static str, value: Option<T>) -> Result<T, BadMessage> {
    value.ok_or(BadMessage { field, problem: "is missing" })
}

pub fn request_id(text: &str) -> Result<RequestId, BadMessage> {
    text.parse().map_err(|_| BadMessage { field: "request", problem: "is not a request id" })
}

pub fn block_hash(bytes: &[u8]) -> Result<BlockHash, BadMessage> {
    let bytes = bytes.try_into().map_err(|_| BadMessage { field: "block_hash", problem: "has not 16 bytes" })?;
    Ok(BlockHash(u128::from_le_bytes(bytes)))
}

pub fn block_hash_bytes(hash: BlockHash) -> Bytes {
    Bytes::copy_from_slice(&hash.0.to_le_bytes())
}

impl From<Role> for v1::Role {
    fn from(role: Role) -> v1::Role {
        match role {
            Role::Coordinator => v1::Role::Coordinator,
            Role::Prefill => v1::Role::Prefill,
            Role::Decode => v1::Role::Decode,
            Role::Gateway => v1::Role::Gateway,
        }
    }
}

impl TryFrom<v1::Role> for Role {
    type Error = BadMessage;

    fn try_from(role: v1::Role) -> Result<Role, BadMessage> {
        match role {
            v1::Role::Unspecified => Err(BadMessage { field: "role", problem: "is missing" }),
            v1::Role::Coordinator => Ok(Role::Coordinator),
            v1::Role::Prefill => Ok(Role::Prefill),
            v1::Role::Decode => Ok(Role::Decode),
            v1::Role::Gateway => Ok(Role::Gateway),
        }
    }
}

/// Wire code of a lane.
pub fn lane_code(lane: Lane) -> u32 {
    match lane {
        Lane::Interactive => 0,
        Lane::Batch => 1,
    }
}

pub fn lane(code: u32) -> Result<Lane, BadMessage> {
    match code {
        0 => Ok(Lane::Interactive),
        1 => Ok(Lane::Batch),
        _ => Err(BadMessage { field: "lane", problem: "is unknown" }),
    }
}

/// A refusal with its reason's word.
pub fn refusal(reason: Refused, detail: impl Into<String>) -> v1::Refusal {
    v1::Refusal { reason: reason.as_str().into(), detail: detail.into(), ..Default::default() }
}

/// The reason of a refusal; a word of a newer peer reads as Unavailable.
pub fn refused(refusal: &v1::Refusal) -> Refused {
    Refused::parse(&refusal.reason).unwrap_or(Refused::Unavailable)
}

/// An abort with its reason's word.
pub fn abort(reason: Aborted, detail: impl Into<String>) -> v1::Abort {
    v1::Abort { reason: reason.as_str().into(), detail: detail.into(), ..Default::default() }
}

/// The reason of an abort; a word of a newer peer reads as Internal.
pub fn aborted(abort: &v1::Abort) -> Aborted {
    Aborted::parse(&abort.reason).unwrap_or(Aborted::Internal)
}

impl From<&Place> for v1::WorkerLife {
    fn from(place: &Place) -> v1::WorkerLife {
        v1::WorkerLife { id: place.worker.to_string(), incarnation: place.incarnation.0 }
    }
}

impl From<Place> for v1::Place {
    fn from(place: Place) -> v1::Place {
        v1::Place { worker: place.worker.to_string(), incarnation: place.incarnation.0, address: place.address }
    }
}

impl From<v1::Place> for Place {
    fn from(place: v1::Place) -> Place {
        Place {
            worker: WorkerId(place.worker.into()),
            incarnation: Incarnation(place.incarnation),
            address: place.address,
        }
    }
}

impl From<Assignment> for v1::Assignment {
    fn from(a: Assignment) -> v1::Assignment {
        v1::Assignment {
            request: a.request.to_string(),
            attempt: a.attempt,
            epoch: a.epoch.0,
            decode: Some(a.decode.into()),
            prefill: a.prefill.map(Into::into),
            lease_ms: a.lease_ms,
            explanation: a.explanation,
            holder: a.holder.map(Into::into),
            cluster: a.cluster,
        }
    }
}

impl From<Holder> for v1::Holder {
    fn from(holder: Holder) -> v1::Holder {
        v1::Holder { place: Some(holder.place.into()), blocks: holder.blocks, moves: holder.moves }
    }
}

/// None without a place: it is a hint only.
fn holder(holder: v1::Holder) -> Option<Holder> {
    Some(Holder { place: holder.place?.into(), blocks: holder.blocks, moves: holder.moves })
}

impl From<&Place> for v1::Place {
    fn from(place: &Place) -> v1::Place {
        place.clone().into()
    }
}

impl TryFrom<v1::Assignment> for Assignment {
    type Error = BadMessage;

    fn try_from(a: v1::Assignment) -> Result<Assignment, BadMessage> {
        Ok(Assignment {
            request: request_id(&a.request)?,
            attempt: a.attempt,
            epoch: Epoch(a.epoch),
            decode: required("assignment.decode", a.decode)?.into(),
            prefill: a.prefill.map(Into::into),
            holder: a.holder.and_then(holder),
            lease_ms: a.lease_ms,
            explanation: a.explanation,
            cluster: a.cluster,
        })
    }
}

impl From<&Request> for v1::Request {
    fn from(r: &Request) -> v1::Request {
        v1::Request {
            id: r.id.to_string(),
            tenant: r.tenant.clone(),
            lane: lane_code(r.lane),
            model: r.model.clone(),
            prompt: r.prompt.to_vec(),
            sampling: Some((&r.sampling).into()),
            choices: r.choices,
            tokens_max: r.tokens_max,
            tokens_min: r.tokens_min,
            stop_tokens: r.stop_tokens.clone(),
            ignore_eos: r.ignore_eos,
            logprobs: r.logprobs,
            prompt_logprobs: r.prompt_logprobs,
            cache_salt: r.cache_salt.clone(),
            deadline_ms: r.deadline_ms,
        }
    }
}

impl TryFrom<v1::Request> for Request {
    type Error = BadMessage;

    fn try_from(r: v1::Request) -> Result<Request, BadMessage> {
        if r.prompt.is_empty() {
            return Err(BadMessage { field: "request.prompt", problem: "is empty" });
        }
        if r.choices == 0 || r.tokens_max == 0 {
            return Err(BadMessage { field: "request.choices and tokens_max", problem: "must be at least 1" });
        }
        Ok(Request {
            id: request_id(&r.id)?,
            tenant: r.tenant,
            lane: lane(r.lane)?,
            model: r.model,
            prompt: r.prompt.into(),
            sampling: required("request.sampling", r.sampling)?.into(),
            choices: r.choices,
            tokens_max: r.tokens_max,
            tokens_min: r.tokens_min,
            stop_tokens: r.stop_tokens,
            ignore_eos: r.ignore_eos,
            logprobs: r.logprobs,
            prompt_logprobs: r.prompt_logprobs,
            cache_salt: r.cache_salt,
            deadline_ms: r.deadline_ms,
        })
    }
}

impl From<&Sampling> for v1::Sampling {
    fn from(s: &Sampling) -> v1::Sampling {
        let bias = |&(token, bias): &(u32, f32)| v1::LogitBias { token, bias };
        v1::Sampling {
            temperature: s.temperature,
            top_k: s.top_k,
            top_p: s.top_p,
            min_p: s.min_p,
            repetition_penalty: s.repetition_penalty,
            presence_penalty: s.presence_penalty,
            frequency_penalty: s.frequency_penalty,
            logit_bias: s.logit_bias.iter().map(bias).collect(),
            seed: s.seed,
        }
    }
}

impl From<v1::Sampling> for Sampling {
    fn from(s: v1::Sampling) -> Sampling {
        Sampling {
            temperature: s.temperature,
            top_k: s.top_k,
            top_p: s.top_p,
            min_p: s.min_p,
            repetition_penalty: s.repetition_penalty,
            presence_penalty: s.presence_penalty,
            frequency_penalty: s.frequency_penalty,
            logit_bias: s.logit_bias.into_iter().map(|b| (b.token, b.bias)).collect(),
            seed: s.seed,
        }
    }
}

impl From<SampledToken> for v1::Token {
    fn from(t: SampledToken) -> v1::Token {
        let top = t.top.into_iter().map(|(id, logprob)| v1::TokenLogprob { id, logprob }).collect();
        v1::Token { id: t.id, logprob: t.logprob, top }
    }
}

impl From<v1::Token> for SampledToken {
    fn from(t: v1::Token) -> SampledToken {
        SampledToken { id: t.id, logprob: t.logprob, top: t.top.into_iter().map(|t| (t.id, t.logprob)).collect() }
    }
}

/// Log-probabilities of the prompt's tokens; the first position has none.
pub fn prompt_logprobs(tokens: Vec<Option<SampledToken>>) -> Vec<v1::PromptLogprob> {
    tokens.into_iter().map(|token| v1::PromptLogprob { token: token.map(Into::into) }).collect()
}

pub fn prompt_logprobs_back(tokens: Vec<v1::PromptLogprob>) -> Vec<Option<SampledToken>> {
    tokens.into_iter().map(|logprob| logprob.token.map(Into::into)).collect()
}

/// Word and stop token of a finish reason.
pub fn finish_word(finish: Finish) -> (&'static str, u32) {
    match finish {
        Finish::Eos => ("eos", 0),
        Finish::StopToken(token) => ("stop_token", token),
        Finish::Length => ("length", 0),
    }
}

pub fn finish(word: &str, stop_token: u32) -> Result<Finish, BadMessage> {
    match word {
        "eos" => Ok(Finish::Eos),
        "stop_token" => Ok(Finish::StopToken(stop_token)),
        "length" => Ok(Finish::Length),
        _ => Err(BadMessage { field: "finished.reason", problem: "is unknown" }),
    }
}

impl From<BlockId> for v1::BlockId {
    fn from(id: BlockId) -> v1::BlockId {
        v1::BlockId { index: id.index, generation: id.generation }
    }
}

impl From<v1::BlockId> for BlockId {
    fn from(id: v1::BlockId) -> BlockId {
        BlockId { index: id.index, generation: id.generation }
    }
}

impl From<BlockLayout> for v1::Layout {
    fn from(l: BlockLayout) -> v1::Layout {
        v1::Layout {
            layers: l.layers,
            kv_heads: l.kv_heads,
            head_dim: l.head_dim,
            block_tokens: l.block_tokens,
            dtype: l.dtype.row().into(),
        }
    }
}

impl TryFrom<v1::Layout> for BlockLayout {
    type Error = BadMessage;

    fn try_from(l: v1::Layout) -> Result<BlockLayout, BadMessage> {
        let dtype = KvDtype::ALL.into_iter().find(|dtype| dtype.row() == l.dtype);
        let dtype = dtype.ok_or(BadMessage { field: "layout.dtype", problem: "is unknown" })?;
        Ok(BlockLayout {
            layers: l.layers,
            kv_heads: l.kv_heads,
            head_dim: l.head_dim,
            block_tokens: l.block_tokens,
            dtype,
        })
    }
}

/// The name under which the ledger knows one life of a gateway: what an earlier life of the same name left behind is
/// nobody's. A gateway that tells no incarnation is known by its id alone.
pub fn gateway_life(member: &v1::Member) -> String {
    match member.incarnation {
        0 => member.id.clone(),
        incarnation => format!("{}/{incarnation:x}", member.id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Request {
        Request {
            id: RequestId(7),
            tenant: "t".into(),
            lane: Lane::Batch,
            model: "m".into(),
            prompt: vec![1, 2, 3].into(),
            sampling: Sampling { temperature: 0.5, logit_bias: vec![(4, -1.0)], seed: 9, ..Default::default() },
            choices: 2,
            tokens_max: 5,
            tokens_min: 1,
            stop_tokens: vec![8],
            ignore_eos: true,
            logprobs: Some(3),
            prompt_logprobs: None,
            cache_salt: "s".into(),
            deadline_ms: 100,
        }
    }

    #[test]
    fn a_request_round_trips() {
        let request = sample();
        assert_eq!(Request::try_from(v1::Request::from(&request)), Ok(request));
    }

    #[test]
    fn incomplete_messages_are_refused_by_field() {
        let wire = v1::Request::from(&sample());
        let check = |wire: v1::Request, field: &str| match Request::try_from(wire) {
            Err(bad) => assert_eq!(bad.field, field),
            Ok(_) => panic!("accepted without {field}"),
        };
        check(v1::Request { id: "x".into(), ..wire.clone() }, "request");
        check(v1::Request { prompt: vec![], ..wire.clone() }, "request.prompt");
        check(v1::Request { sampling: None, ..wire.clone() }, "request.sampling");
        check(v1::Request { lane: 9, ..wire.clone() }, "lane");
        check(v1::Request { choices: 0, ..wire }, "request.choices and tokens_max");
    }
}
