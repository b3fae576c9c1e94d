//! How fast steps have been lately: what the coordinator is told about prefill, and how many prompt tokens fit into a step
//! beside sequences that decode. Their next tokens then come at most about twice as late as without any prompt, however long it
//! is; and where a step reads all weights anyway, such a part of a prompt costs little.
//! Source: Agrawal et al., Sarathi-Serve, OSDI 2024, section 4.2 (stall-free batching under a token budget).

use std::time::Duration;

/// Prompt tokens beside decodes, at least: a prompt gets on, and decoding steps are measured anew.
const BESIDE_MIN: usize = 16;

#[derive(Default)]
pub(crate) struct Pace {
    /// Seconds of a prompt token, of steps with prompts.
    prefill: Mean,
    /// Seconds that a prompt token adds to a step.
    added: Mean,
    /// Seconds of a step that only decodes.
    decode: Mean,
}

impl Pace {
    /// Old steps lose half their weight every so many prompt tokens,
    const HALF_LIFE_TOKENS: f64 = 16_384.0;
    /// and every so many steps.
    const HALF_LIFE_STEPS: f64 = 16.0;

    /// A step that took so long, with rows that decode and rows of prompts.
    pub(crate) fn add(&mut self, decodes: usize, prompts: usize, took: Duration) {
        let took = took.as_secs_f64();
        if decodes + prompts == 0 {
            return;
        }
        if prompts == 0 {
            return self.decode.add(1.0, took, Pace::HALF_LIFE_STEPS);
        }
        self.prefill.add(prompts as f64, took, Pace::HALF_LIFE_TOKENS);
        let alone = self.decode.get().filter(|_| decodes > 0).unwrap_or(0.0);
        self.added.add(prompts as f64, (took - alone).max(0.0), Pace::HALF_LIFE_TOKENS);
    }

    /// Prompt tokens per second; 0: unknown.
    pub(crate) fn prefill_tokens_per_s(&self) -> u64 {
        self.prefill.get().filter(|seconds| *seconds > 0.0).map_or(0, |seconds| (1.0 / seconds) as u64)
    }

    /// Prompt tokens that make a step that decodes twice as long; all, while that is not known.
    pub(crate) fn prompt_tokens_beside(&self) -> usize {
        match (self.decode.get(), self.added.get()) {
            (Some(step), Some(token)) if token > 0.0 => ((step / token) as usize).max(BESIDE_MIN),
            _ => usize::MAX,
        }
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

    #[test]
    fn prompts_beside_decodes_take_as_long_as_the_step() {
        let mut pace = Pace::default();
        assert_eq!((pace.prompt_tokens_beside(), pace.prefill_tokens_per_s()), (usize::MAX, 0));
        pace.add(0, 500, Duration::from_millis(500));
        assert_eq!((pace.prompt_tokens_beside(), pace.prefill_tokens_per_s()), (usize::MAX, 1000));
        for _ in 0..100 {
            pace.add(8, 0, STEP);
        }
        assert!((58..=60).contains(&pace.prompt_tokens_beside()), "{}", pace.prompt_tokens_beside());
        // Beside decodes a prompt's tokens come cheaper: the weights are read already.
        for _ in 0..2000 {
            pace.add(8, 60, STEP + Duration::from_millis(30));
        }
        assert!((115..=120).contains(&pace.prompt_tokens_beside()), "{}", pace.prompt_tokens_beside());
        // Sequences that decode have become many, then few.
        for step in [4, 1] {
            (0..200).for_each(|_| pace.add(64, 0, STEP * step));
            let expected = 120 * step as usize;
            assert!((expected * 19 / 20..=expected).contains(&pace.prompt_tokens_beside()));
        }
        for _ in 0..3000 {
            pace.add(1, 16, Duration::from_secs(3));
        }
        assert_eq!(pace.prompt_tokens_beside(), BESIDE_MIN, "a prompt gets on");
    }
}
