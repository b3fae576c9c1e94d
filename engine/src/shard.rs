//! What one rank of a tensor-parallel group has of a model: some query heads and the kv heads that they read, some columns
//! of the MLP, some of the vocabulary. Norms are everybody's.
//!
//! ```text
//! embedding  rows of its tokens             gathered
//! q, k, v    rows of its heads              into the arena all ranks share
//! out        columns of its heads           one tree of sums over all ranks
//! gate, up   rows of its segments of down
//! down       columns of its segments        one tree of sums over all ranks
//! experts    each as gate, up and down      the router is everybody's
//! head       rows of its tokens             gathered by rank 0, which samples
//! ```

use std::ops::Range;

use baton_core::TokenId;
use baton_kernels::collective::RANKS_MAX;
use baton_kernels::{Dtype, Heads, KvHeads, Quantize, SEGMENTS, Segments};

use crate::load::config::ModelConfig;
use crate::load::error::LoadError;

/// One rank's share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    pub rank: usize,
    /// Ranks of the group.
    pub world: usize,
    /// Its query heads and the kv heads they read.
    pub heads: Heads,
    /// Where its kv heads lie in the arena.
    pub kv: KvHeads,
    /// Columns of the MLP's inner width.
    pub inner: Range<usize>,
    /// Columns of an expert's inner width.
    pub expert_inner: Range<usize>,
    vocab: usize,
}

/// How many columns at a time K of `down` is multiplied in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steps {
    pub mlp: usize,
    pub experts: usize,
}

impl Steps {
    /// Inner widths of a model, and their steps.
    fn widths(self, config: &ModelConfig) -> [(usize, usize); 2] {
        let experts = config.mixture.as_ref().map_or(0, |mixture| mixture.intermediate);
        [(config.intermediate, self.mlp), (experts, self.experts)]
    }
}

impl Shard {
    /// A model that is whole.
    pub fn whole(config: &ModelConfig) -> Shard {
        Shard::of(config, 0, 1, Steps { mlp: 1, experts: 1 })
    }

    /// The share of one of `world` ranks, which `check` has let pass.
    pub fn of(config: &ModelConfig, rank: usize, world: usize, steps: Steps) -> Shard {
        let all = config.heads;
        let heads = Heads { heads: all.heads / world, kv_heads: (all.kv_heads / world).max(1), ..all };
        let kv = KvHeads {
            first: rank * all.kv_heads / world,
            foreign: all.kv_heads < world && !(rank * all.kv_heads).is_multiple_of(world),
        };
        let [inner, expert_inner] =
            steps.widths(config).map(|(width, step)| Segments::of(width, rank, world).columns(step));
        Shard { rank, world, heads, kv, inner, expert_inner, vocab: config.vocab }
    }

    /// Refuses numbers of ranks that cannot share this model.
    pub fn check(config: &ModelConfig, world: usize, steps: Steps) -> Result<(), LoadError> {
        let refuse = |reason: String| Err(LoadError::Ranks { ranks: world, reason });
        let Heads { heads, kv_heads, .. } = config.heads;
        if world == 0 || !SEGMENTS.is_multiple_of(world) {
            return refuse(format!("1, 2, 4 and 8 are possible, since sums are cut into {SEGMENTS} segments"));
        }
        if !heads.is_multiple_of(world) {
            return refuse(format!("they do not divide the model's {heads} attention heads"));
        }
        if !kv_heads.is_multiple_of(world) && !world.is_multiple_of(kv_heads) {
            return refuse(format!("they neither divide the model's {kv_heads} kv heads nor are divided by them"));
        }
        for (width, step) in steps.widths(config).into_iter().filter(|(width, _)| *width > 0) {
            let narrow = (0..world).any(|rank| Segments::of(width, rank, world).columns(step).is_empty());
            if narrow || config.vocab < RANKS_MAX {
                return refuse(format!("an inner width of {width} leaves nothing for some"));
            }
        }
        Ok(())
    }

    /// Refuses to cut columns `own` out of a matrix where they are not whole units of its file, or not just the rank's
    /// segments of it.
    pub(crate) fn check_columns(
        &self,
        tensor: &str,
        cols: usize,
        own: &Range<usize>,
        dtype: Dtype,
        quantize: Option<Quantize>,
    ) -> Result<(), LoadError> {
        let whole = |col: usize| col.is_multiple_of(dtype.unit()) || col == cols;
        let (step, unit) = (dtype.step(quantize), dtype.unit().max(dtype.step(quantize)));
        if whole(own.start) && whole(own.end) && *own == self.segments(cols).columns(step) {
            return Ok(());
        }
        let reason = format!(
            "rank {} would have columns {own:?} of {tensor}, whose quantized weights are cut at multiples of {unit} in equal \
             segments only",
            self.rank
        );
        Err(LoadError::Ranks { ranks: self.world, reason })
    }

    /// Tokens whose embedding and logits are this rank's.
    pub fn tokens(&self) -> Range<usize> {
        self.tokens_of(self.rank)
    }

    pub(crate) fn tokens_of(&self, rank: usize) -> Range<usize> {
        self.vocab * rank / self.world..self.vocab * (rank + 1) / self.world
    }

    /// The rank that has a token's embedding.
    pub(crate) fn owner(&self, token: TokenId) -> usize {
        let token = token as usize;
        (0..self.world).find(|rank| token < self.tokens_of(*rank).end).unwrap_or(self.world - 1)
    }

    /// Its query heads.
    pub(crate) fn q(&self) -> Range<usize> {
        self.rank * self.heads.heads..(self.rank + 1) * self.heads.heads
    }

    /// Its kv heads.
    pub(crate) fn k(&self) -> Range<usize> {
        self.kv.first..self.kv.first + self.heads.kv_heads
    }

    /// The rank's segments of a row-parallel matrix `cols` wide in all.
    pub(crate) fn segments(&self, cols: usize) -> Segments {
        Segments::of(cols, self.rank, self.world)
    }
}
