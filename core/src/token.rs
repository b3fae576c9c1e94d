//! What an engine emits.

use serde::{Deserialize, Serialize};

use crate::TokenId;

/// One generated token with its log-probability (natural log, of the distribution before temperature and truncation)
/// and the most likely alternatives, most likely first, ties by lowest id.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SampledToken {
    pub id: TokenId,
    pub logprob: f32,
    pub top: Vec<(TokenId, f32)>,
}

/// Why a sequence ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Finish {
    /// The model's end-of-sequence token, which is part of the tokens.
    Eos,
    /// One of the request's stop token ids, which is part of the tokens.
    StopToken(TokenId),
    /// The request's or the model's token limit.
    Length,
}
