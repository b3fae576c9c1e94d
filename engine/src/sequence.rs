//! One sequence on its way through the engine: its tokens, how many of them have KV, and the blocks that hold it.

use std::sync::Arc;

use baton_core::{BlockHash, Finish, Lane, Request, SampledToken, TokenId};

use crate::cache::Blocks;
use crate::sampling::Seen;
use crate::work::{Choice, Goal};

/// Order in which sequences are served; the last one gives its blocks up first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub lane: Lane,
    /// No other worker had it before; what has been moved goes first.
    pub fresh: bool,
    /// Counts admissions.
    pub arrival: u64,
    pub choice: u32,
}

impl Rank {
    /// Before every other.
    pub(crate) const FIRST: Rank = Rank { lane: Lane::Interactive, fresh: false, arrival: 0, choice: 0 };

    /// Its worker was lost while somebody reads.
    pub(crate) fn is_urgent(&self) -> bool {
        !self.fresh && self.lane == Lane::Interactive
    }
}

/// One or more choices of a request that have all tokens in common so far.
pub(crate) struct Sequence {
    pub request: Arc<Request>,
    pub goal: Goal,
    pub rank: Rank,
    /// The prompt, then what has been generated.
    pub tokens: Vec<TokenId>,
    /// Leading positions whose KV is in `blocks`.
    pub computed: usize,
    /// Room for at least `computed` positions.
    pub blocks: Option<Blocks>,
    /// Names of the full blocks of `tokens`, as far as they were needed.
    pub hashes: Vec<BlockHash>,
    pub branches: Vec<Branch>,
    /// Leading prompt positions that the first admission found in the cache.
    pub cached_tokens: usize,
    /// Whether `cached_tokens` has been counted.
    pub admitted: bool,
    /// Blocks announced to the handoff so far.
    pub exported: usize,
    pub wants_prompt_logprobs: bool,
    pub prompt_logprobs: Vec<Option<SampledToken>>,
    pub seen: Option<Arc<Seen>>,
    pub cancelled: bool,
    /// Tokens to draft for the next step, at most: twice as many after a draft that was right, as many as were right after
    /// another.
    pub draft_max: usize,
}

/// How one choice goes on after the common tokens.
pub(crate) struct Branch {
    pub index: u32,
    /// Tokens emitted before that are not common to all choices. Empty: the next token is to be sampled.
    pub tail: Vec<TokenId>,
}

impl Sequence {
    /// The common part of all choices of a request: the prompt, and what was emitted when there is one choice only.
    pub(crate) fn trunk(request: Arc<Request>, goal: Goal, rank: Rank, choices: Vec<Choice>) -> Sequence {
        let mut tokens = request.prompt.to_vec();
        let fresh = choices.iter().all(|choice| choice.so_far.is_empty());
        let mut branches: Vec<Branch> =
            choices.into_iter().map(|choice| Branch { index: choice.index, tail: choice.so_far }).collect();
        if let [only] = &mut branches[..] {
            tokens.append(&mut only.tail);
        }
        let wants_prompt_logprobs = request.prompt_logprobs.is_some() && fresh;
        Sequence::new(request, goal, rank, tokens, branches, wants_prompt_logprobs)
    }

    /// A choice on its own, behind the common tokens of `trunk`.
    pub(crate) fn fork(trunk: &Sequence, branch: Branch) -> Sequence {
        let mut tokens = trunk.tokens.clone();
        tokens.extend(branch.tail);
        let rank = Rank { choice: branch.index, ..trunk.rank };
        let branches = vec![Branch { index: branch.index, tail: Vec::new() }];
        let sequence = Sequence::new(trunk.request.clone(), trunk.goal, rank, tokens, branches, false);
        Sequence {
            computed: trunk.computed,
            blocks: trunk.blocks.clone(),
            cached_tokens: trunk.cached_tokens,
            admitted: true,
            ..sequence
        }
    }

    fn new(
        request: Arc<Request>,
        goal: Goal,
        rank: Rank,
        tokens: Vec<TokenId>,
        branches: Vec<Branch>,
        wants_prompt_logprobs: bool,
    ) -> Sequence {
        let (prompt, output) = tokens.split_at(request.prompt.len());
        let seen = Seen::of(&request.sampling, prompt, output).map(Arc::new);
        Sequence {
            request,
            goal,
            rank,
            tokens,
            computed: 0,
            blocks: None,
            hashes: Vec::new(),
            branches,
            cached_tokens: 0,
            admitted: false,
            exported: 0,
            wants_prompt_logprobs,
            prompt_logprobs: Vec::new(),
            seen,
            cancelled: false,
            draft_max: usize::MAX,
        }
    }

    /// Positions still without KV.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// One position per step from now on.
    pub(crate) fn is_decoding(&self) -> bool {
        self.pending() == 1 && self.generated() > 0 && self.branches.len() == 1
    }

    pub(crate) fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Sequences this one will become.
    pub(crate) fn width(&self) -> usize {
        self.branches.len()
    }

    pub(crate) fn block_count(&self) -> usize {
        self.blocks.as_ref().map_or(0, Blocks::len)
    }

    /// Names of the first `count` blocks, which are full.
    pub(crate) fn hashes(&mut self, count: usize, block_tokens: usize) -> &[BlockHash] {
        while self.hashes.len() < count {
            let at = self.hashes.len() * block_tokens;
            let root = || BlockHash::root(&self.request.cache_salt);
            let parent = self.hashes.last().copied().unwrap_or_else(root);
            self.hashes.push(parent.child(&self.tokens[at..at + block_tokens]));
        }
        &self.hashes[..count]
    }

    /// Takes one more generated token.
    pub(crate) fn push(&mut self, id: TokenId) {
        self.tokens.push(id);
        if let Some(seen) = &mut self.seen {
            Arc::make_mut(seen).push(id);
        }
    }

    /// Forgets everything computed; the tokens stay.
    pub(crate) fn reset(&mut self) {
        self.blocks = None;
        self.computed = 0;
        self.prompt_logprobs.clear();
    }

    /// Why the sequence ends with its last token, if it does.
    pub(crate) fn finish(&self, eos: &[TokenId], positions_max: usize) -> Option<Finish> {
        finish(&self.request, &self.tokens, eos, positions_max)
    }
}

fn finish(request: &Request, tokens: &[TokenId], eos: &[TokenId], positions_max: usize) -> Option<Finish> {
    let generated = tokens.len() - request.prompt.len();
    let last = *tokens[request.prompt.len()..].last()?;
    if generated > request.tokens_min as usize {
        if eos.contains(&last) && !request.ignore_eos {
            return Some(Finish::Eos);
        }
        if request.stop_tokens.contains(&last) {
            return Some(Finish::StopToken(last));
        }
    }
    let full = generated >= request.tokens_max as usize || tokens.len() >= positions_max;
    full.then_some(Finish::Length)
}
