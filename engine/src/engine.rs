//! The engine: which sequences exist, what the next step computes (`plan`), and what came of it (`commit`). Pure: no
//! clock, no threads, no IO; equal calls give equal batches and events. `plan.rs` and `commit.rs` hold the two halves
//! of a step.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_core::planted::{self, Bug};
use baton_core::{Aborted, Refused, RequestId, SampledToken, TokenId};

use crate::beside::PromptsBeside;
use crate::cache::Cache;
use crate::sequence::{Branch, Rank, Sequence};
use crate::spec::{EngineConfig, ModelSpec};
use crate::work::{Event, Filled, Goal, Load, Usage, Work};

/// Scheduler of one worker; owned by one thread.
///
/// ```text
/// admit ─► waiting ──► running ──► finished: blocks stay cached
///             ▲  blocks ran out │
///             └── preempted ◄───┘
/// ```
pub struct Engine {
    pub(crate) spec: ModelSpec,
    pub(crate) config: EngineConfig,
    pub(crate) cache: Cache,
    /// By (holds no blocks yet, rank): what holds blocks goes first, so that holders cannot starve one another.
    pub(crate) waiting: BTreeMap<(bool, Rank), Sequence>,
    pub(crate) running: BTreeMap<Rank, Sequence>,
    /// Events that needed no step.
    pub(crate) ready: Vec<Event>,
    /// A planned batch is being run.
    pub(crate) stepping: bool,
    pub(crate) totals: Load,
    pub(crate) nothing_banned: Arc<[TokenId]>,
    /// What prompts may cost in a step that also decodes.
    pub(crate) prompts_beside: PromptsBeside,
    /// What is left of that in the step being planned.
    pub(crate) room: PromptsBeside,
    arrivals: u64,
}

impl Engine {
    /// # Panics
    /// If a size in `config` is zero.
    pub fn new(spec: ModelSpec, config: EngineConfig) -> Engine {
        let cache = Cache::new(spec.layout, config.blocks);
        Engine::over(cache, spec, config)
    }

    /// An engine over a cache of `config.blocks` blocks that somebody else has made the memory for.
    ///
    /// # Panics
    /// If a size in `config` is zero, or the cache is another one.
    pub fn over(cache: Cache, spec: ModelSpec, config: EngineConfig) -> Engine {
        let arena = cache.arena();
        assert!(*arena.layout() == spec.layout && arena.blocks() == config.blocks, "a cache for this model and config");
        let EngineConfig { blocks, batch_tokens_max, sequences_max, queue_max, .. } = config;
        assert!(blocks.min(batch_tokens_max).min(sequences_max).min(queue_max) > 0, "an engine needs room: {config:?}");
        // Every running sequence decodes in every step, with room left for a prefill.
        let config = EngineConfig { sequences_max: sequences_max.min(batch_tokens_max), ..config };
        Engine {
            cache,
            spec,
            config,
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            ready: Vec::new(),
            stepping: false,
            totals: Load::default(),
            nothing_banned: Arc::new([]),
            prompts_beside: PromptsBeside::ALL,
            room: PromptsBeside::ALL,
            arrivals: 0,
        }
    }

    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Fresh prompts cost no more than this in steps that decode from now on: how long a step takes is known outside. Without a
    /// word, as many rows as fit.
    pub fn prompts_beside_decodes(&mut self, most: PromptsBeside) {
        self.prompts_beside = PromptsBeside { rows: most.rows.max(1), ..most };
    }

    /// Takes work in, or refuses it and holds nothing of it. Every admitted request ends with `Finished` for each of its
    /// choices, with `Prefilled`, or with `Aborted`.
    pub fn admit(&mut self, work: Work) -> Result<(), Refused> {
        self.check(&work)?;
        self.arrivals += 1;
        let choice = work.choices[0].index;
        let rank = Rank { lane: work.request.lane, fresh: !work.moved, arrival: self.arrivals, choice };
        let trunk = Sequence::trunk(work.request, work.goal, rank, work.choices);
        match work.filled {
            Some(filled) => self.admit_filled(trunk, filled),
            None => self.enqueue(trunk),
        }
        Ok(())
    }

    /// Ends all choices of a request. Its blocks are free when the last guard on them is dropped; those of a batch that
    /// is being run, at its commit.
    pub fn cancel(&mut self, id: RequestId) {
        let known = self.sequences().any(|sequence| sequence.request.id == id && !sequence.cancelled);
        if !known {
            return;
        }
        self.waiting.retain(|_, sequence| sequence.request.id != id);
        let running = self.running.values_mut().filter(|sequence| sequence.request.id == id);
        running.for_each(|sequence| sequence.cancelled = true);
        if !self.stepping {
            self.drop_cancelled();
        }
        self.ready.push(Event::Aborted { request: id, reason: Aborted::Cancelled });
    }

    /// Ends some choices of a request; nothing is told of it, and the others go on. Blocks as with `cancel`.
    pub fn cancel_choices(&mut self, id: RequestId, choices: &[u32]) {
        let prune = |sequence: &mut Sequence| {
            if sequence.request.id == id {
                sequence.branches.retain(|branch| !choices.contains(&branch.index));
            }
            sequence.branches.is_empty()
        };
        self.waiting.retain(|_, sequence| !prune(sequence));
        for sequence in self.running.values_mut() {
            sequence.cancelled |= prune(sequence);
        }
        if !self.stepping {
            self.drop_cancelled();
        }
    }

    /// Moves out the events that needed no step: first tokens of handoffs, cancellations. `commit` does so too.
    pub fn take_events(&mut self, events: &mut Vec<Event>) {
        events.append(&mut self.ready);
    }

    pub fn load(&self) -> Load {
        let idle = self.sequences().filter(|sequence| !sequence.is_decoding());
        Load {
            sequences_max: self.config.sequences_max,
            running: self.running.len(),
            waiting: self.waiting.len(),
            tokens_waiting: idle.map(Sequence::pending).sum(),
            ..self.totals
        }
    }

    fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.waiting.values().chain(self.running.values())
    }

    fn check(&self, work: &Work) -> Result<(), Refused> {
        let request = &work.request;
        let outputs = work.choices.iter().flat_map(|choice| &choice.so_far);
        let known = request.prompt.iter().chain(outputs).all(|id| (*id as usize) < self.spec.vocab);
        let mut indices: Vec<u32> = work.choices.iter().map(|choice| choice.index).collect();
        indices.sort_unstable();
        let distinct = indices.windows(2).all(|pair| pair[0] != pair[1]) && !indices.is_empty();
        if request.prompt.is_empty() || !known || !distinct {
            return Err(Refused::Incompatible);
        }
        if !self.fits_ever(work) {
            return Err(Refused::TooLarge);
        }
        let queued = self.waiting.values().filter(|sequence| !sequence.admitted).count();
        match work.filled.is_none() && queued >= self.config.queue_max {
            true => Err(Refused::NoCapacity),
            false => Ok(()),
        }
    }

    /// Whether the work could be done if the engine had nothing else to do.
    fn fits_ever(&self, work: &Work) -> bool {
        let (prompt, positions_max) = (work.request.prompt.len(), self.spec.positions_max);
        let longest = match work.goal {
            Goal::Generate => (prompt + work.request.tokens_max as usize).min(positions_max) - 1,
            Goal::Prefill { .. } => prompt + work.choices[0].so_far.len(),
        };
        let blocks = longest.div_ceil(self.block_tokens());
        prompt < positions_max && blocks <= self.config.blocks && work.choices.len() <= self.config.sequences_max
    }

    /// Starts a sequence whose leading blocks a handoff has filled.
    fn admit_filled(&mut self, mut trunk: Sequence, filled: Filled) {
        let room = filled.blocks.len() * self.block_tokens();
        assert!(filled.tokens <= room, "{} positions in blocks for {room}", filled.tokens);
        trunk.admitted = true;
        if trunk.wants_prompt_logprobs {
            if filled.prompt_logprobs.is_empty() {
                // Only computing the prompt again can tell them.
                return self.enqueue(trunk);
            }
            let request = trunk.request.id;
            self.ready.push(Event::PromptLogprobs { request, tokens: filled.prompt_logprobs });
            trunk.wants_prompt_logprobs = false;
        }
        trunk.computed = filled.tokens.min(trunk.tokens.len());
        trunk.blocks = Some(filled.blocks);
        match trunk.pending() {
            0 => self.fork_filled(trunk, filled.first),
            _ => self.enqueue(trunk),
        }
    }

    /// Lets the choices of a completely filled trunk go on; those without a first token or a tail compute one.
    fn fork_filled(&mut self, mut trunk: Sequence, first: Vec<(u32, SampledToken)>) {
        let branches = std::mem::take(&mut trunk.branches);
        let known = |branch: &Branch| !branch.tail.is_empty() || first.iter().any(|entry| entry.0 == branch.index);
        let (known, unknown) = branches.into_iter().partition(known);
        trunk.branches = known;
        for sequence in self.fork(&mut trunk, first) {
            self.enqueue(sequence);
        }
        trunk.branches = unknown;
        if !trunk.branches.is_empty() {
            self.rewind(&mut trunk);
            self.enqueue(trunk);
        }
    }

    /// Goes back to the last full block before the last token, so that its logits can be computed without writing a
    /// block that others read.
    fn rewind(&self, sequence: &mut Sequence) {
        let full = (sequence.tokens.len() - 1) / self.block_tokens();
        sequence.computed = full * self.block_tokens();
        sequence.blocks.iter_mut().for_each(|blocks| blocks.truncate(full));
        sequence.rank.choice = sequence.branches[0].index;
    }

    /// Separates the choices of a completed trunk and gives each its first token or its tail. Returns those that go on.
    pub(crate) fn fork(&mut self, trunk: &mut Sequence, mut first: Vec<(u32, SampledToken)>) -> Vec<Sequence> {
        let mut going = Vec::new();
        for branch in std::mem::take(&mut trunk.branches) {
            let token = first.iter().position(|entry| entry.0 == branch.index).map(|at| first.swap_remove(at).1);
            let sequence = Sequence::fork(trunk, branch);
            match token {
                Some(token) => going.extend(self.accept(sequence, token)),
                None => going.push(sequence),
            }
        }
        going
    }

    /// Appends a sampled token and reports it. None when it was the last one.
    pub(crate) fn accept(&mut self, mut sequence: Sequence, token: SampledToken) -> Option<Sequence> {
        sequence.push(token.id);
        let (request, choice) = (sequence.request.id, sequence.branches[0].index);
        self.ready.push(Event::Tokens { request, choice, tokens: vec![token] });
        self.unless_finished(sequence)
    }

    /// Reports the end of a sequence that has reached it; gives back any other.
    fn unless_finished(&mut self, sequence: Sequence) -> Option<Sequence> {
        let Some(finish) = sequence.finish(&self.spec.eos, self.spec.positions_max) else {
            return Some(sequence);
        };
        let usage = Usage {
            prompt_tokens: sequence.request.prompt.len(),
            cached_tokens: sequence.cached_tokens,
            generated_tokens: sequence.generated(),
        };
        let (request, choice) = (sequence.request.id, sequence.branches[0].index);
        self.ready.push(Event::Finished { request, choice, finish, usage });
        None
    }

    /// Lets a sequence wait for its turn, unless the tokens it came with have ended it already.
    pub(crate) fn enqueue(&mut self, sequence: Sequence) {
        let going = match sequence.goal {
            Goal::Generate => self.unless_finished(sequence),
            Goal::Prefill { .. } => Some(sequence),
        };
        if let Some(sequence) = going {
            self.waiting.insert((sequence.blocks.is_none(), sequence.rank), sequence);
        }
    }

    pub(crate) fn drop_cancelled(&mut self) {
        let cancelled = self.running.extract_if(.., |_, sequence| sequence.cancelled);
        if planted::is(Bug::LeakOnCancel) {
            return cancelled.for_each(std::mem::forget);
        }
        drop(cancelled.collect::<Vec<_>>());
    }

    pub(crate) fn block_tokens(&self) -> usize {
        self.spec.layout.block_tokens as usize
    }
}
