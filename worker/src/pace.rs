//! How fast steps have been lately: what the coordinator is told about prefill, and how much of prompts fits into a step
//! beside sequences that decode. Their next tokens then come at most about twice as late as without any prompt, however long it
//! is; and where a step reads all weights anyway, such a part of a prompt costs little.
//! Source: Agrawal et al., Sarathi-Serve, OSDI 2024, section 4.2 (stall-free batching under a token budget).

use std::time::Duration;

use baton_engine::{Batch, PromptsBeside};

/// Prompt tokens beside decodes, at least: a prompt gets on, and decoding steps are measured anew.
const BESIDE_MIN: usize = 16;
/// Part of a step that only decodes which prompts may add: what is left of twice its length is for what is not foreseen.
const ADDED: f64 = 0.8;

/// What a step computed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Rows {
    /// Rows that decode, drafts among them.
    pub(crate) decodes: usize,
    /// Rows of prompts.
    pub(crate) prompts: usize,
    /// The positions of those, added up: what they attend to.
    pub(crate) attended: usize,
}

impl Rows {
    pub(crate) fn of(batch: &Batch) -> Rows {
        let prompts = || batch.spans.iter().filter(|span| span.rows - span.drafted > 1);
        let rows = prompts().map(|span| span.rows).sum();
        let attended = prompts().map(|span| attended(span.position, span.rows)).sum();
        Rows { decodes: batch.tokens.len() - rows, prompts: rows, attended }
    }
}

fn attended(position: usize, rows: usize) -> usize {
    rows * position + rows * rows.saturating_sub(1) / 2
}

#[derive(Default)]
pub(crate) struct Pace {
    /// Seconds of a prompt token, of steps with prompts.
    prefill: Mean,
    /// Seconds that prompts add to a step that decodes.
    added: Fit,
    /// Seconds of a step that only decodes.
    decode: Mean,
}

impl Pace {
    /// Old steps lose half their weight every so many prompt tokens,
    const HALF_LIFE_TOKENS: f64 = 16_384.0;
    /// in what decides how much of a prompt is beside decodes every so many,
    const HALF_LIFE_ADDED: f64 = 4_096.0;
    /// and every so many steps.
    const HALF_LIFE_STEPS: f64 = 16.0;

    /// A step that took so long.
    pub(crate) fn add(&mut self, rows: Rows, took: Duration) {
        let (took, prompts) = (took.as_secs_f64(), rows.prompts as f64);
        if rows.decodes + rows.prompts == 0 {
            return;
        }
        if rows.prompts == 0 {
            return self.decode.add(1.0, took, Pace::HALF_LIFE_STEPS);
        }
        self.prefill.add(prompts, took, Pace::HALF_LIFE_TOKENS);
        if let (Some(alone), 1..) = (self.decode.get(), rows.decodes) {
            self.added.add(prompts, rows.attended as f64, (took - alone).max(0.0), Pace::HALF_LIFE_ADDED);
        }
    }

    /// What a step of so many rows should take; None: nothing is known that it could be told from. A row of a prompt costs at
    /// most what a step that decodes does, for which all weights are read, too.
    pub(crate) fn expected(&self, rows: Rows) -> Option<Duration> {
        let (decode, token) = (self.decode.get(), self.prefill.get().or(self.decode.get()));
        let decodes = if rows.decodes > 0 { decode? } else { 0.0 };
        let prompts = if rows.prompts > 0 { token? * rows.prompts as f64 } else { 0.0 };
        Duration::try_from_secs_f64(decodes + prompts).ok()
    }

    /// Prompt tokens per second; 0: unknown.
    pub(crate) fn prefill_tokens_per_s(&self) -> u64 {
        self.prefill.get().filter(|seconds| *seconds > 0.0).map_or(0, |seconds| (1.0 / seconds) as u64)
    }

    /// What of prompts makes a step that decodes nearly twice as long; all, while that is not known.
    pub(crate) fn prompts_beside(&self) -> PromptsBeside {
        let known = || {
            let (step, token) = (self.decode.get()?, self.prefill.get()?);
            // Without decodes beside them tokens also pay for reading the weights: dearer than they need be is soon corrected.
            let (token, further) = self.added.get().unwrap_or((token, 0.0));
            (token > 0.0).then_some((step * ADDED / token, token / further))
        };
        let Some((rows, doubling)) = known() else { return PromptsBeside::ALL };
        // A float too large becomes the largest number.
        PromptsBeside { rows: (rows as usize).max(BESIDE_MIN), doubling: (doubling as usize).max(1) }
    }
}

/// What a token of a prompt costs: a constant, and something for each position before it. By least squares, in which what is old
/// counts less.
#[derive(Default)]
struct Fit {
    tokens_tokens: f64,
    tokens_attended: f64,
    attended_attended: f64,
    tokens_cost: f64,
    attended_cost: f64,
}

impl Fit {
    /// Between steps alike in how far into their prompts they were, the two parts cannot be told apart.
    const APART: f64 = 1e-2;
    /// The constant part of a token's mean cost, at least.
    const CONSTANT: f64 = 0.1;

    fn add(&mut self, tokens: f64, attended: f64, cost: f64, half_life: f64) {
        let keep = (-tokens / half_life).exp2();
        let sums = [
            (&mut self.tokens_tokens, tokens * tokens),
            (&mut self.tokens_attended, tokens * attended),
            (&mut self.attended_attended, attended * attended),
            (&mut self.tokens_cost, tokens * cost),
            (&mut self.attended_cost, attended * cost),
        ];
        for (sum, new) in sums {
            *sum = *sum * keep + new;
        }
    }

    /// Of a token at the beginning of a prompt, and more for each position. None: nothing is known, or it costs nothing.
    fn get(&self) -> Option<(f64, f64)> {
        let Fit { tokens_tokens: tt, tokens_attended: ta, attended_attended: aa, tokens_cost: tc, attended_cost: ac } =
            *self;
        let mean = (tt > 0.0 && tc > 0.0).then(|| tc / tt)?;
        let apart = tt * aa - ta * ta;
        if apart <= tt * aa * Fit::APART {
            return Some((mean, 0.0));
        }
        let constant = (tc * aa - ac * ta) / apart;
        if constant < mean * Fit::CONSTANT {
            let constant = mean * Fit::CONSTANT;
            return Some((constant, ((ac - constant * ta) / aa).max(0.0)));
        }
        let further = (tt * ac - ta * tc) / apart;
        if further > 0.0 { Some((constant, further)) } else { Some((mean, 0.0)) }
    }
}

/// A mean in which what is old counts less.
#[derive(Default)]
struct Mean {
    weight: f64,
    sum: f64,
}

impl Mean {
    /// So many of something took so long in all.
    fn add(&mut self, count: f64, sum: f64, half_life: f64) {
        let keep = (-count / half_life).exp2();
        self.weight = self.weight * keep + count;
        self.sum = self.sum * keep + sum;
    }

    /// Of one.
    fn get(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(60);

    fn decodes(decodes: usize) -> Rows {
        Rows { decodes, ..Rows::default() }
    }

    fn both(decodes: usize, prompts: usize) -> Rows {
        Rows { decodes, prompts, attended: 0 }
    }

    #[test]
    fn prompts_beside_decodes_take_nearly_as_long_as_the_step() {
        let mut pace = Pace::default();
        assert_eq!((pace.prompts_beside(), pace.prefill_tokens_per_s()), (PromptsBeside::ALL, 0));
        pace.add(both(0, 500), Duration::from_millis(500));
        assert_eq!((pace.prompts_beside(), pace.prefill_tokens_per_s()), (PromptsBeside::ALL, 1000));
        for _ in 0..100 {
            pace.add(decodes(8), STEP);
        }
        assert_eq!(pace.prompts_beside(), PromptsBeside { rows: 48, doubling: usize::MAX });
        // Beside decodes a prompt's tokens come cheaper: the weights are read already.
        for _ in 0..2000 {
            pace.add(both(8, 60), STEP + Duration::from_millis(30));
        }
        assert!((95..=96).contains(&pace.prompts_beside().rows), "{:?}", pace.prompts_beside());
        // Sequences that decode have become many, then few.
        for step in [4, 1] {
            (0..200).for_each(|_| pace.add(decodes(64), STEP * step));
            let expected = 96 * step as usize;
            assert!((expected * 19 / 20..=expected).contains(&pace.prompts_beside().rows));
        }
        for _ in 0..3000 {
            pace.add(both(1, 16), Duration::from_secs(3));
        }
        assert_eq!(pace.prompts_beside().rows, BESIDE_MIN, "a prompt gets on");
    }

    #[test]
    fn a_step_is_expected_to_take_what_its_rows_took() {
        let ms = Duration::from_millis;
        let mut pace = Pace::default();
        assert_eq!((pace.expected(decodes(1)), pace.expected(both(0, 10))), (None, None));
        pace.add(decodes(1), ms(60));
        assert_eq!((pace.expected(decodes(8)), pace.expected(both(0, 10))), (Some(ms(60)), Some(ms(600))));
        pace.add(both(0, 100), ms(300));
        assert_eq!((pace.expected(both(0, 10)), pace.expected(both(1, 10))), (Some(ms(30)), Some(ms(90))));

        let mut prompts_alone = Pace::default();
        prompts_alone.add(both(0, 100), ms(300));
        assert_eq!(prompts_alone.expected(both(1, 10)), None, "a step that decodes reads all weights for one row");
    }

    /// A prompt whose tokens cost the more the further they stand: steps stay as long from its beginning to its end.
    #[test]
    fn steps_stay_as_long_along_a_prompt() {
        let cost = |rows: usize, position: usize| {
            let further = attended(position, rows) as f64 / 1500.0;
            STEP + Duration::from_secs_f64((rows as f64 + further) * 2e-4)
        };
        let mut pace = Pace::default();
        (0..20).for_each(|_| pace.add(decodes(4), STEP));
        for prompt in 0..4 {
            let mut position = 0;
            while position < 4000 {
                let rows = pace.prompts_beside().rows_from(position).min(512).min(4000 - position);
                let took = cost(rows, position);
                pace.add(Rows { decodes: 4, prompts: rows, attended: attended(position, rows) }, took);
                assert!(prompt == 0 || took < STEP * 2, "{took:?} at {position} of prompt {prompt}");
                assert!(prompt == 0 || position + rows == 4000 || took > STEP * 3 / 2, "{took:?} at {position}");
                position += rows;
            }
        }
    }
}
