//! Second half of a step: what the backend found becomes tokens, ends and handoffs.

use baton_core::SampledToken;

use crate::batch::{Batch, DrawKind, Output, Span};
use crate::engine::Engine;
use crate::sequence::Sequence;
use crate::work::{Event, Goal};

impl Engine {
    /// Takes in the results of the batch planned last and appends what is to be told, in the order in which it happened.
    ///
    /// # Panics
    /// If no batch is being run, or the output has not one entry per draw.
    pub fn commit(&mut self, batch: Batch, output: Output, events: &mut Vec<Event>) {
        assert!(self.stepping, "commit without a plan");
        assert!(output.drawn.len() == batch.draws.len(), "one result per draw");
        self.stepping = false;
        let mut drawn = output.drawn.into_iter();
        for span in &batch.spans {
            let results = drawn.by_ref().take(span.draws.len()).collect();
            let sequence = self.running.remove(&span.rank).filter(|sequence| !sequence.cancelled);
            if let Some(sequence) = sequence {
                self.advance(sequence, &batch, span, results);
            }
        }
        let brought = batch.exports().iter().filter(|export| !export.on_device);
        self.cache.is_present(brought.flat_map(|export| export.blocks.iter().map(|(_, block)| *block)));
        self.drop_cancelled();
        self.totals.steps += u64::from(!batch.is_empty());
        events.append(&mut self.ready);
    }

    /// Moves one sequence behind its rows.
    fn advance(&mut self, mut sequence: Sequence, batch: &Batch, span: &Span, results: Vec<SampledToken>) {
        if span.drafted > 0 {
            return self.advance_drafted(sequence, batch, span, results);
        }
        self.publish(&mut sequence, span.rows);
        let mut first = Vec::new();
        for (draw, token) in batch.draws[span.draws.clone()].iter().zip(results) {
            match &draw.kind {
                DrawKind::Given { .. } => sequence.prompt_logprobs.push(Some(token)),
                DrawKind::Next(next) => first.push((next.choice, token)),
            }
        }
        if sequence.pending() > 0 {
            self.running.insert(sequence.rank, sequence);
            return;
        }
        self.totals.tokens_generated += first.len() as u64;
        match sequence.goal {
            Goal::Generate => self.go_on(sequence, first),
            Goal::Prefill { .. } => self.hand_over(sequence, first),
        }
    }

    /// Moves a sequence on whose last rows are a draft's: by one token, and by one more for each that the draft had right. What
    /// the rows behind wrote is written again before it is read.
    fn advance_drafted(&mut self, sequence: Sequence, batch: &Batch, span: &Span, results: Vec<SampledToken>) {
        let draft = &batch.tokens[span.row + span.rows - span.drafted..span.row + span.rows];
        let drafted = draft.iter().map(Some).chain([None]);
        let (mut going, mut right) = (Some(sequence), 0);
        for (token, drafted) in results.into_iter().zip(drafted) {
            let Some(mut sequence) = going.take() else { break };
            let is_right = drafted == Some(&token.id);
            right += usize::from(is_right);
            sequence.draft_max = if right == draft.len() { draft.len().saturating_mul(2) } else { right.max(1) };
            self.publish(&mut sequence, 1);
            self.totals.tokens_generated += 1;
            going = self.accept(sequence, token);
            if !is_right {
                break;
            }
        }
        self.totals.drafted_right += right as u64;
        self.running.extend(going.map(|sequence| (sequence.rank, sequence)));
    }

    /// Counts the new positions and names the blocks they completed.
    fn publish(&mut self, sequence: &mut Sequence, rows: usize) {
        let block_tokens = self.block_tokens();
        let before = sequence.computed / block_tokens;
        sequence.computed += rows;
        let full = sequence.computed / block_tokens;
        if !self.config.prefix_cache || full == before {
            return;
        }
        sequence.hashes(full, block_tokens);
        let Some(blocks) = &sequence.blocks else { return };
        (before..full).for_each(|at| blocks.publish(at, sequence.hashes[at]));
    }

    /// All tokens have KV: each choice takes its next token.
    fn go_on(&mut self, mut sequence: Sequence, mut first: Vec<(u32, SampledToken)>) {
        self.report_prompt(&mut sequence);
        if let ([_], [_]) = (&sequence.branches[..], &first[..]) {
            let going = first.pop().and_then(|(_, token)| self.accept(sequence, token));
            self.running.extend(going.map(|sequence| (sequence.rank, sequence)));
            return;
        }
        for sequence in self.fork(&mut sequence, first) {
            match sequence.is_decoding() {
                true => drop(self.running.insert(sequence.rank, sequence)),
                false => self.enqueue(sequence),
            }
        }
    }

    fn report_prompt(&mut self, sequence: &mut Sequence) {
        if sequence.wants_prompt_logprobs {
            let (request, tokens) = (sequence.request.id, prompt_logprobs(sequence));
            self.ready.push(Event::PromptLogprobs { request, tokens });
            sequence.wants_prompt_logprobs = false;
        }
    }

    fn hand_over(&mut self, mut sequence: Sequence, first: Vec<(u32, SampledToken)>) {
        let prompt_logprobs = match sequence.wants_prompt_logprobs {
            true => prompt_logprobs(&mut sequence),
            false => Vec::new(),
        };
        let Some(blocks) = sequence.blocks else { return };
        self.ready.push(Event::Prefilled {
            request: sequence.request.id,
            first,
            prompt_logprobs,
            cached_tokens: sequence.cached_tokens,
            blocks,
            tokens: sequence.computed,
        });
    }
}

/// The log-probabilities of the whole prompt; its first token follows nothing and has none.
fn prompt_logprobs(sequence: &mut Sequence) -> Vec<Option<SampledToken>> {
    let rest = std::mem::take(&mut sequence.prompt_logprobs);
    std::iter::once(None).chain(rest).collect()
}
