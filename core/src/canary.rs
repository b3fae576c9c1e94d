//! The canary: one small request that is the same for every worker of a model. A worker answers it once by itself before
//! it registers (its golden tokens); the leader sends it over prefill–decode pairs and compares. Greedy, so that the
//! answer depends on the numerics class alone.

use crate::{Lane, Request, RequestId, Sampling, TokenId};

/// Prompt of the canary: three blocks, so that a handoff moves some.
pub const CANARY_PROMPT_TOKENS: usize = 48;
/// Tokens it generates: the first comes from prefill, the others from blocks that were handed off.
pub const CANARY_OUTPUT_TOKENS: u32 = 4;

/// Knuth's multiplicative constant (The Art of Computer Programming 6.4): neighbours land far apart.
const SPREAD: u64 = 2_654_435_761;

/// The prompt for a model with `vocab` token ids and sequences of at most `positions_max`; shorter than
/// `CANARY_PROMPT_TOKENS` only where the model is, and empty where it could not answer at all.
pub fn prompt(vocab: u64, positions_max: u64) -> Vec<TokenId> {
    if vocab == 0 {
        return Vec::new();
    }
    let room = positions_max.saturating_sub(u64::from(CANARY_OUTPUT_TOKENS));
    let tokens = room.min(CANARY_PROMPT_TOKENS as u64);
    (1..=tokens).map(|n| (n * SPREAD % vocab) as TokenId).collect()
}

/// The request. Another `salt` in every round keeps caches from answering for the link; the tokens do not depend on it.
pub fn request(id: RequestId, model: &str, prompt: Vec<TokenId>, salt: String, deadline_ms: u64) -> Request {
    Request {
        id,
        tenant: String::new(),
        lane: Lane::Interactive,
        model: model.to_string(),
        prompt: prompt.into(),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        choices: 1,
        tokens_max: CANARY_OUTPUT_TOKENS,
        tokens_min: 0,
        stop_tokens: Vec::new(),
        ignore_eos: true,
        logprobs: None,
        prompt_logprobs: None,
        cache_salt: salt,
        deadline_ms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prompt_is_fixed_and_fits_every_model() {
        assert_eq!(prompt(4096, 2048)[..4], [2481, 866, 3347, 1732]);
        let check = |vocab, positions_max, tokens: usize| {
            let prompt = prompt(vocab, positions_max);
            assert_eq!(prompt.len(), tokens, "vocab {vocab}, positions {positions_max}");
            assert!(prompt.iter().all(|token| u64::from(*token) < vocab));
        };
        check(1, 1 << 20, 48);
        check(151_936, 52, 48);
        check(7, 51, 47);
        check(7, 4, 0);
        check(0, 100, 0);
    }

    #[test]
    fn the_request_is_greedy_and_of_a_fixed_length() {
        let request = request(RequestId(1), "m", prompt(9, 99), "salt".into(), 5);
        assert_eq!((request.sampling.temperature, request.tokens_max, request.ignore_eos), (0.0, 4, true));
    }
}
