//! What the rest of the system must know about a loaded model, and the sizes an operator gives an engine.

use baton_core::{BlockLayout, NumericsClass, TokenId};
use serde::Deserialize;

/// A loaded model, as schedulers, workers and gateways see it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Name of the model's directory.
    pub name: String,
    pub layout: BlockLayout,
    /// Number of token ids.
    pub vocab: usize,
    /// Longest sequence, prompt and output together.
    pub positions_max: usize,
    /// Tokens that end a sequence, sorted.
    pub eos: Vec<TokenId>,
    /// Content hash of all weights and of the numbers of config.json that change results, in hexadecimal.
    pub weights_hash: String,
    pub numerics: NumericsClass,
    pub parameters: u64,
}

/// The sizes of one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineConfig {
    /// KV blocks.
    pub blocks: usize,
    /// Token positions computed in one step at most.
    pub batch_tokens_max: usize,
    /// Sequences worked on at a time; each choice of a request counts.
    pub sequences_max: usize,
    /// Requests waiting at most; more are refused.
    pub queue_max: usize,
    /// Whether finished blocks are kept and looked up by content.
    pub prefix_cache: bool,
    /// Tokens drafted by prompt lookup for each sequence that decodes, at most; 0: none. The same bytes in fewer steps where
    /// texts repeat themselves.
    #[serde(default)]
    pub draft_tokens_max: usize,
}
