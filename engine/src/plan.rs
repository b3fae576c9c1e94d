//! First half of a step: which rows to compute. Decodes first, then prefill chunks, then new admissions, under one
//! budget of tokens; what has lost its worker before all that is fresh, without it and the shortest first. When blocks run out, the last in rank gives its own back and starts over later.

use std::sync::Arc;

use baton_core::{BlockHash, Lane, Refused, TokenId};

use crate::batch::{Batch, Draw, DrawKind, Next, Span};
use crate::beside::PromptsBeside;
use crate::cache::Hits;
use crate::draft;
use crate::engine::Engine;
use crate::sequence::{Rank, Sequence};
use crate::work::Goal;

/// Rows of a step that several share whose worker was lost; one that lacks more has the step to itself.
const URGENT_ROWS: usize = 64;
/// Rows of a step's drafts together: so many more hardly make a step longer that reads all weights anyway.
const DRAFT_ROWS: usize = 32;
/// Those that wait and are compared.
const URGENT_LOOKED_AT: usize = 64;

impl Engine {
    /// The next step, or None when there is nothing to do now: no work, or none that the free blocks allow (see
    /// `Cache::on_freed`).
    ///
    /// # Panics
    /// If the batch planned before has not been committed.
    pub fn plan(&mut self) -> Option<Batch> {
        assert!(!self.stepping, "the last batch must be committed before the next is planned");
        let mut batch = Batch::new(self.cache.clone());
        self.room = PromptsBeside::ALL;
        self.make_way();
        self.plan_decodes(&mut batch);
        // Somebody waits in the middle of a text: nothing fresh makes that step longer.
        let decodes = batch.tokens.len();
        self.plan_prefills(&mut batch, Rank::is_urgent);
        self.plan_urgent(&mut batch);
        if batch.tokens.len() == decodes {
            if decodes > 0 {
                self.room = self.prompts_beside;
            }
            self.plan_prefills(&mut batch, |_| true);
            self.plan_admissions(&mut batch, |_| true);
        }
        if batch.is_empty() && self.ready.is_empty() {
            return None;
        }
        self.stepping = true;
        Some(batch)
    }

    fn plan_decodes(&mut self, batch: &mut Batch) {
        let decoding = self.running.values().filter(|sequence| sequence.is_decoding());
        let ranks: Vec<Rank> = decoding.map(|sequence| sequence.rank).collect();
        let mut drafted = 0;
        for (at, rank) in ranks.iter().enumerate() {
            // An earlier one may have taken its blocks.
            if self.budget(batch) > 0 && self.running.contains_key(rank) && self.make_room(*rank, batch) {
                let others = ranks.len() - at;
                let room = self.budget(batch).saturating_sub(others).min(DRAFT_ROWS - drafted);
                let draft = self.draft(*rank, room, batch);
                drafted += draft.len();
                self.add_rows(batch, *rank, &draft);
            }
        }
    }

    /// What may come next in a decoding sequence, up to `room` tokens, with blocks for it if there are free ones.
    fn draft(&mut self, rank: Rank, room: usize, batch: &mut Batch) -> Vec<TokenId> {
        let most = self.config.draft_tokens_max.min(room);
        let Some(sequence) = self.running.get(&rank).filter(|_| most > 0) else { return Vec::new() };
        // The last token of all has no row.
        let (request, tokens) = (&sequence.request, &sequence.tokens);
        let left = (request.tokens_max as usize - sequence.generated()).min(self.spec.positions_max - tokens.len());
        let draft = draft::lookup(tokens, most.min(sequence.draft_max).min(left.saturating_sub(1)));
        let end = tokens.len() + draft.len();
        let lacking = end.div_ceil(self.block_tokens()).saturating_sub(sequence.block_count());
        // Others come before a draft.
        if lacking > 0 && self.cache.stats().available() < lacking + self.running.len() {
            return Vec::new();
        }
        let Some(mut sequence) = self.running.remove(&rank) else { return Vec::new() };
        let grown = self.grow(&mut sequence, end, batch);
        self.running.insert(rank, sequence);
        if grown.is_ok() { draft } else { Vec::new() }
    }

    fn plan_prefills(&mut self, batch: &mut Batch, of: impl Fn(&Rank) -> bool) {
        let prefilling = self.running.values().filter(|sequence| !sequence.is_decoding());
        let ranks: Vec<Rank> = prefilling.map(|sequence| sequence.rank).filter(of).collect();
        for rank in ranks {
            if self.has_room(batch) {
                self.add_span(batch, rank);
            }
        }
    }

    /// Lets those that wait begin, up to the first that is not one `of` those to plan.
    fn plan_admissions(&mut self, batch: &mut Batch, of: impl Fn(&Rank) -> bool) {
        while self.has_room(batch) {
            let Some(head) = self.waiting.first_entry().filter(|head| of(&head.key().1)) else { return };
            let (key, mut sequence) = head.remove_entry();
            let placed = self.slots_free() >= sequence.width() && self.place(&mut sequence, batch).is_ok();
            if placed {
                let rank = sequence.rank;
                self.running.insert(rank, sequence);
                self.add_span(batch, rank);
                continue;
            }
            self.waiting.insert(key, sequence);
            if !self.running.is_empty() || !self.reset_last_holder() {
                return;
            }
        }
    }

    /// Lets those that have lost their worker begin, the one that lacks least first, and none that lacks much beside others: most
    /// of what they had is in a cache, so that most can go on after a very short step.
    fn plan_urgent(&mut self, batch: &mut Batch) {
        let decodes = batch.tokens.len();
        while self.budget(batch) > 0 {
            let Some((lacking, key)) = self.shortest_urgent() else { return };
            let rows = batch.tokens.len() - decodes;
            if rows > 0 && rows + lacking > URGENT_ROWS {
                return;
            }
            let Some(mut sequence) = self.waiting.remove(&key) else { return };
            if self.slots_free() < sequence.width() || self.place(&mut sequence, batch).is_err() {
                // It waits for room like all others, in rank.
                self.waiting.insert(key, sequence);
                return self.plan_admissions(batch, Rank::is_urgent);
            }
            let rank = sequence.rank;
            self.running.insert(rank, sequence);
            self.add_span(batch, rank);
        }
    }

    /// Of the first that wait and are urgent: rows to compute, and where it stands.
    fn shortest_urgent(&mut self) -> Option<(usize, (bool, Rank))> {
        let first = *self.waiting.first_key_value()?.0;
        let urgent = self.waiting.keys().take_while(|(fresh, rank)| *fresh == first.0 && rank.is_urgent());
        let keys: Vec<(bool, Rank)> = urgent.take(URGENT_LOOKED_AT).copied().collect();
        let lacking = |key: (bool, Rank)| {
            let mut sequence = self.waiting.remove(&key)?;
            let held = match sequence.blocks {
                Some(_) => sequence.computed,
                None => self.cache.hits(self.lookup_names(&mut sequence)).count * self.block_tokens(),
            };
            let lacking = sequence.tokens.len() - held;
            self.waiting.insert(key, sequence);
            Some((lacking, key))
        };
        keys.into_iter().filter_map(lacking).min()
    }

    /// Token rows the step still has room for.
    fn budget(&self, batch: &Batch) -> usize {
        self.config.batch_tokens_max - batch.tokens.len()
    }

    /// Whether the step has room for rows of another prompt.
    fn has_room(&self, batch: &Batch) -> bool {
        self.budget(batch) > 0 && self.room.rows > 0
    }

    fn slots_free(&self) -> usize {
        let taken: usize = self.running.values().map(Sequence::width).sum();
        self.config.sequences_max.saturating_sub(taken)
    }

    /// Preempts batch-lane sequences for an interactive one that waits.
    fn make_way(&mut self) {
        while let Some(entry) = self.waiting.first_entry() {
            let (key, mut head) = entry.remove_entry();
            let fits = self.slots_free() >= head.width() && self.fits_now(&mut head);
            let interactive = head.rank.lane == Lane::Interactive;
            self.waiting.insert(key, head);
            let last = self.victim().filter(|rank| rank.lane == Lane::Batch);
            let Some(victim) = last.filter(|_| interactive && !fits) else { return };
            self.preempt(victim);
        }
    }

    /// Whether the blocks a waiting sequence lacks could be given now, leaving one for each sequence that grows. A yes that
    /// `place` then refused would free what it had looked up, and so wake the engine for the same again, without end.
    fn fits_now(&self, sequence: &mut Sequence) -> bool {
        let hits = match sequence.blocks {
            Some(_) => Hits { count: sequence.block_count(), unheld: 0 },
            None => self.cache.hits(self.lookup_names(sequence)),
        };
        let lacking = sequence.tokens.len().div_ceil(self.block_tokens()).saturating_sub(hits.count);
        let growing = self.running.values().filter(|other| other.goal == Goal::Generate).count();
        self.cache.stats().available() >= lacking + hits.unheld + growing
    }

    /// Names of the blocks a sequence may take from the cache: at least its last token is always computed.
    fn lookup_names<'a>(&self, sequence: &'a mut Sequence) -> &'a [BlockHash] {
        let full = (sequence.tokens.len() - 1) / self.block_tokens();
        let count = if self.config.prefix_cache && !sequence.wants_prompt_logprobs { full } else { 0 };
        sequence.hashes(count, self.block_tokens())
    }

    /// Gives a waiting sequence blocks for all its tokens, from the cache as far as it has them.
    fn place(&mut self, sequence: &mut Sequence, batch: &mut Batch) -> Result<(), Refused> {
        if sequence.blocks.is_some() {
            let end = sequence.tokens.len();
            return self.grow(sequence, end, batch);
        }
        if !self.fits_now(sequence) {
            return Err(Refused::NoCapacity);
        }
        let blocks = self.cache.lookup(self.lookup_names(sequence));
        let hit = blocks.len() * self.block_tokens();
        sequence.blocks = Some(blocks);
        sequence.computed = hit;
        let end = sequence.tokens.len();
        if let Err(refused) = self.grow(sequence, end, batch) {
            sequence.reset();
            return Err(refused);
        }
        if !sequence.admitted {
            sequence.admitted = true;
            sequence.cached_tokens = hit.min(sequence.request.prompt.len());
            self.totals.tokens_looked_up += sequence.request.prompt.len() as u64;
            self.totals.tokens_hit += sequence.cached_tokens as u64;
        }
        Ok(())
    }

    /// Makes sure that positions up to `end` have blocks, and that the block written next is read by nobody else.
    fn grow(&self, sequence: &mut Sequence, end: usize, batch: &mut Batch) -> Result<(), Refused> {
        let block_tokens = self.block_tokens();
        let Some(blocks) = &mut sequence.blocks else { unreachable!("only sequences with blocks grow") };
        let lacking = end.div_ceil(block_tokens).saturating_sub(blocks.len());
        if lacking > 0 {
            blocks.append(self.cache.reserve(lacking)?.take());
        }
        let at = sequence.computed / block_tokens;
        let partly = !sequence.computed.is_multiple_of(block_tokens);
        if partly && !blocks.is_sole(at) {
            let fresh = self.cache.reserve(1)?.take();
            let to = fresh.ids()[0];
            let from = blocks.replace(at, fresh);
            batch.copy(from, to);
        }
        Ok(())
    }

    /// Room for one more token of a running sequence, at the cost of the last in rank. False: it was itself the last.
    fn make_room(&mut self, rank: Rank, batch: &mut Batch) -> bool {
        loop {
            let Some(mut sequence) = self.running.remove(&rank) else { return false };
            let end = sequence.tokens.len();
            let grown = self.grow(&mut sequence, end, batch);
            self.running.insert(rank, sequence);
            if grown.is_ok() {
                return true;
            }
            let victim = self.victim().filter(|victim| *victim > rank).unwrap_or(rank);
            self.preempt(victim);
        }
    }

    /// The running sequence that would be preempted next. Handoffs read the blocks of a prefill, so it keeps them.
    fn victim(&self) -> Option<Rank> {
        let preemptible = self.running.values().rev().find(|sequence| sequence.goal == Goal::Generate);
        preemptible.map(|sequence| sequence.rank)
    }

    fn preempt(&mut self, rank: Rank) {
        let Some(mut sequence) = self.running.remove(&rank) else { return };
        sequence.reset();
        self.totals.preemptions += 1;
        self.waiting.insert((true, rank), sequence);
    }

    /// Takes the blocks of the last waiting sequence that holds any. False: none does.
    fn reset_last_holder(&mut self) -> bool {
        let Some(key) = self.waiting.range(..(true, Rank::FIRST)).next_back().map(|entry| *entry.0) else {
            return false;
        };
        let Some(mut sequence) = self.waiting.remove(&key) else { return false };
        sequence.reset();
        self.totals.preemptions += 1;
        self.waiting.insert((true, sequence.rank), sequence);
        true
    }

    /// Adds as many rows of a running sequence as there is room for.
    fn add_span(&mut self, batch: &mut Batch, rank: Rank) {
        self.add_rows(batch, rank, &[]);
        if let Some(span) = batch.spans.last() {
            self.room = self.room.less(span.rows, span.position);
        }
    }

    /// Adds rows of a running sequence, and behind its last one those of a draft.
    fn add_rows(&mut self, batch: &mut Batch, rank: Rank, draft: &[TokenId]) {
        let (budget, room) = (self.budget(batch), self.room);
        let block_tokens = self.block_tokens();
        let Some(sequence) = self.running.get_mut(&rank) else { return };
        let rows = sequence.pending().min(budget).min(room.rows_from(sequence.computed));
        let (position, end) = (sequence.computed, sequence.computed + rows);
        let (row, draws, table) = (batch.tokens.len(), batch.draws.len(), batch.tables.len());
        batch.tokens.extend(sequence.tokens[position..end].iter().chain(draft));
        let Some(blocks) = &sequence.blocks else { unreachable!("a running sequence has blocks") };
        batch.tables.extend(blocks.ids()[..(end + draft.len()).div_ceil(block_tokens)].iter().map(|id| id.index));
        // A block is complete when its last position is; the last one of a prompt, with the prompt.
        let complete = match end == sequence.tokens.len() {
            true => end.div_ceil(block_tokens),
            false => end / block_tokens,
        };
        export(batch, sequence, complete);
        let banned = |generated: usize| -> Arc<[TokenId]> {
            if generated >= sequence.request.tokens_min as usize {
                return self.nothing_banned.clone();
            }
            self.spec.eos.iter().chain(&sequence.request.stop_tokens).copied().collect()
        };
        add_draws(batch, sequence, row, rows, draft, banned);
        let (rows, drafted) = (rows + draft.len(), draft.len());
        let (table, draws) = (table..batch.tables.len(), draws..batch.draws.len());
        batch.spans.push(Span { rank, row, rows, position, table, draws, drafted });
        self.totals.tokens_computed += rows as u64;
        self.totals.tokens_drafted += drafted as u64;
    }
}

/// Announces the blocks before `complete` that have not been announced.
fn export(batch: &mut Batch, sequence: &mut Sequence, complete: usize) {
    let (Goal::Prefill { skip_blocks, on_device }, Some(blocks)) = (sequence.goal, &sequence.blocks) else { return };
    let first = skip_blocks.max(sequence.exported);
    if first < complete {
        batch.export(sequence.request.id, first, blocks.part(first..complete), on_device);
        sequence.exported = complete;
    }
}

/// `banned`: tokens that must not end a sequence yet that has generated so many.
fn add_draws(
    batch: &mut Batch,
    sequence: &Sequence,
    row: usize,
    rows: usize,
    draft: &[TokenId],
    banned: impl Fn(usize) -> Arc<[TokenId]>,
) {
    let position = sequence.computed;
    if let Some(top) = sequence.request.prompt_logprobs.filter(|_| sequence.wants_prompt_logprobs) {
        let following = sequence.request.prompt.iter().skip(position + 1).take(rows);
        let given =
            following.enumerate().map(|(i, token)| Draw { row: row + i, kind: DrawKind::Given { token: *token, top } });
        batch.draws.extend(given);
    }
    if position + rows < sequence.tokens.len() {
        return;
    }
    let mut seen = sequence.seen.clone();
    for ahead in 0..=draft.len() {
        let banned = banned(sequence.generated() + ahead);
        for branch in sequence.branches.iter().filter(|branch| branch.tail.is_empty()) {
            let kind = DrawKind::Next(Next {
                request: sequence.request.clone(),
                choice: branch.index,
                position: (sequence.tokens.len() + ahead) as u32,
                banned: banned.clone(),
                seen: seen.clone(),
            });
            batch.draws.push(Draw { row: row + rows - 1 + ahead, kind });
        }
        if let (Some(seen), Some(token)) = (&mut seen, draft.get(ahead)) {
            Arc::make_mut(seen).push(*token);
        }
    }
}
