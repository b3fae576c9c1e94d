//! The golden tokens: what this worker's backend makes of its model's canary, found out before the cluster hears of the
//! worker. An engine of its own is used, so that the cache the worker serves from stays empty.

use std::sync::Arc;

use baton_core::canary::{self, CANARY_OUTPUT_TOKENS};
use baton_core::{RequestId, TokenId};
use baton_engine::{Backend, Cache, Choice, Engine, EngineConfig, Event, Goal, ModelSpec, Output, Work};
use tokio::time::Instant;

use crate::pace::{Pace, Rows};

/// The backend has not answered the canary.
#[derive(Debug, thiserror::Error)]
pub enum CanaryError {
    #[error("sequences of {positions_max} positions leave no room for it")]
    NoRoom { positions_max: usize },
    #[error("the engine refuses it: {0}")]
    Refused(baton_core::Refused),
    #[error("no memory that its ranks can share: {0}")]
    Memory(std::io::Error),
    #[error("it ended after {tokens} of {CANARY_OUTPUT_TOKENS} tokens")]
    Short { tokens: usize },
}

/// What a backend makes of the canary.
pub(crate) struct Golden {
    pub(crate) tokens: Vec<TokenId>,
    /// How fast its steps were: what the first ones of requests are measured by.
    pub(crate) pace: Pace,
}

/// Runs the canary to its end. Blocks for as long as a few steps take.
pub(crate) fn golden(spec: &ModelSpec, backend: &mut dyn Backend) -> Result<Golden, CanaryError> {
    let prompt = canary::prompt(spec.vocab as u64, spec.positions_max as u64);
    if prompt.is_empty() {
        return Err(CanaryError::NoRoom { positions_max: spec.positions_max });
    }
    let positions = prompt.len() + CANARY_OUTPUT_TOKENS as usize;
    let blocks = positions.div_ceil(spec.layout.block_tokens as usize);
    let sizes = EngineConfig {
        blocks,
        batch_tokens_max: positions,
        sequences_max: 1,
        queue_max: 1,
        prefix_cache: false,
        draft_tokens_max: 0,
    };
    let cache = backend.arena(spec.layout, blocks).map(Cache::of).map_err(CanaryError::Memory)?;
    let mut engine = Engine::over(cache, spec.clone(), sizes);
    let request = canary::request(RequestId(0), &spec.name, prompt, String::new(), u64::MAX);
    let choices = vec![Choice::default()];
    let work = Work { request: Arc::new(request), choices, goal: Goal::Generate, filled: None, moved: false };
    engine.admit(work).map_err(CanaryError::Refused)?;
    let (mut events, mut tokens, mut pace) = (Vec::new(), Vec::new(), Pace::default());
    while let Some(batch) = engine.plan() {
        let (rows, began) = (Rows::of(&batch), Instant::now());
        let output = if batch.is_empty() { Output::default() } else { backend.run(&batch, &mut |_| {}) };
        pace.add(rows, began.elapsed());
        engine.commit(batch, output, &mut events);
    }
    for event in events {
        if let Event::Tokens { tokens: new, .. } = event {
            tokens.extend(new.into_iter().map(|token| token.id));
        }
    }
    match tokens.len() == CANARY_OUTPUT_TOKENS as usize {
        true => Ok(Golden { tokens, pace }),
        false => Err(CanaryError::Short { tokens: tokens.len() }),
    }
}

#[cfg(test)]
mod tests {
    use baton_engine::HashBackend;
    use baton_engine::testing::hash_spec;

    use super::*;

    #[test]
    fn equal_backends_answer_equally() {
        let spec = hash_spec();
        let answer = || golden(&spec, &mut HashBackend::new(spec.vocab)).unwrap().tokens;
        let first = answer();
        assert_eq!((first.len(), answer()), (4, first));
        let other = ModelSpec { vocab: 999, ..spec.clone() };
        assert_ne!(golden(&other, &mut HashBackend::new(999)).unwrap().tokens, answer());
    }

    #[test]
    fn a_model_without_room_says_so() {
        let spec = ModelSpec { positions_max: 4, ..hash_spec() };
        let error = golden(&spec, &mut HashBackend::new(spec.vocab)).err().unwrap();
        assert!(error.to_string().contains("4 positions"), "{error}");
    }
}
