//! What goes into an engine and what comes out of it.

use std::sync::Arc;

use baton_core::{Aborted, Finish, Request, RequestId, SampledToken, TokenId};

use crate::cache::Blocks;

/// What a worker gives the engine.
pub struct Work {
    pub request: Arc<Request>,
    pub choices: Vec<Choice>,
    pub goal: Goal,
    pub filled: Option<Filled>,
    /// Another worker had it and is lost: it goes before what came earlier, because its client has waited longer.
    pub moved: bool,
}

/// One choice of a request, with the tokens already emitted; the next token continues behind them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    pub index: u32,
    pub so_far: Vec<TokenId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Prefill here what `filled` does not cover, then decode to the end.
    Generate,
    /// Compute the shared tokens, sample the first token of each choice, hand off. Blocks before `skip_blocks` are not
    /// announced. Those that leave from where they were computed, `on_device`, need not be in the arena.
    Prefill { skip_blocks: usize, on_device: bool },
}

/// Blocks that a handoff filled, with the first tokens that prefill sampled.
pub struct Filled {
    pub blocks: Blocks,
    /// Positions they hold.
    pub tokens: usize,
    /// (choice, its first token).
    pub first: Vec<(u32, SampledToken)>,
    pub prompt_logprobs: Vec<Option<SampledToken>>,
}

/// Token counts of one choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: usize,
    /// Prompt tokens this engine found in its cache. Tokens of `Filled` are not counted: their prefill has.
    pub cached_tokens: usize,
    /// Includes the tokens emitted before this work.
    pub generated_tokens: usize,
}

#[derive(Debug)]
pub enum Event {
    Tokens {
        request: RequestId,
        choice: u32,
        tokens: Vec<SampledToken>,
    },
    /// One entry per prompt token; the first is None.
    PromptLogprobs {
        request: RequestId,
        tokens: Vec<Option<SampledToken>>,
    },
    Finished {
        request: RequestId,
        choice: u32,
        finish: Finish,
        usage: Usage,
    },
    Prefilled {
        request: RequestId,
        first: Vec<(u32, SampledToken)>,
        prompt_logprobs: Vec<Option<SampledToken>>,
        cached_tokens: usize,
        /// Guard on all its blocks, to keep until the handoff is done.
        blocks: Blocks,
        /// Positions they hold.
        tokens: usize,
    },
    /// The whole request, all its choices.
    Aborted {
        request: RequestId,
        reason: Aborted,
    },
}

/// What an engine has to do, and counters since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Sequences worked on at a time.
    pub sequences_max: usize,
    pub running: usize,
    pub waiting: usize,
    /// Positions to be computed before all admitted sequences decode.
    pub tokens_waiting: usize,
    pub steps: u64,
    pub preemptions: u64,
    /// Positions computed, prompts and decoded tokens.
    pub tokens_computed: u64,
    /// Tokens sampled.
    pub tokens_generated: u64,
    /// Prompt tokens that admissions looked up in the cache, and those found.
    pub tokens_looked_up: u64,
    pub tokens_hit: u64,
    /// Tokens drafted, and those that were right.
    pub tokens_drafted: u64,
    pub drafted_right: u64,
}
