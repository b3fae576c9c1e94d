//! What the client asked, checked once at the gateway and trusted from there on.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{RequestId, TokenId};

/// Priority band.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Lane {
    #[default]
    Interactive,
    Batch,
}

/// A request as every process sees it. It never changes; what has been generated so far travels beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    pub id: RequestId,
    pub tenant: String,
    pub lane: Lane,
    pub model: String,
    pub prompt: Arc<[TokenId]>,
    pub sampling: Sampling,
    /// Number of choices (OpenAI's `n`), at least 1.
    pub choices: u32,
    /// Tokens to generate at most, at least 1; prompt + tokens fit the model's length.
    pub tokens_max: u32,
    /// No end-of-sequence and no stop token before this many tokens.
    pub tokens_min: u32,
    pub stop_tokens: Vec<TokenId>,
    pub ignore_eos: bool,
    /// Alternatives to report per generated token; None reports no log-probabilities.
    pub logprobs: Option<u32>,
    /// Alternatives to report per prompt token (OpenAI's `echo` with `logprobs`).
    pub prompt_logprobs: Option<u32>,
    /// Salt of the block hashes.
    pub cache_salt: String,
    /// Milliseconds the whole request may take from its acceptance.
    pub deadline_ms: u64,
}

/// How the next token is drawn. Penalties and biases act on the logits before temperature, truncation after it,
/// in the order top-k, top-p, min-p.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    /// Counts prompt and output (CTRL, Keskar et al. 2019, section 4.1).
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// Sorted by token id, each id once.
    pub logit_bias: Vec<(TokenId, f32)>,
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}
