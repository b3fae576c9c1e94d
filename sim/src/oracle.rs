//! What the tokens of a request must be: the same hash backend, alone in an engine with room for everything.

use std::sync::Arc;

use baton_core::{Lane, Request, RequestId, Sampling, TokenId};
use baton_engine::testing::{drain, work};
use baton_engine::{Engine, EngineConfig, Event, HashBackend};

use crate::model::{POSITIONS_MAX, spec};
use crate::workload::Ask;

/// The tokens of each choice.
pub fn reference(ask: &Ask) -> Vec<Vec<TokenId>> {
    let spec = spec();
    let positions = ask.prompt.len() + ask.tokens_max as usize;
    let blocks = (ask.choices as usize + 1) * (positions.div_ceil(spec.layout.block_tokens as usize) + 1);
    let sizes = EngineConfig {
        blocks,
        batch_tokens_max: POSITIONS_MAX,
        sequences_max: 16,
        queue_max: 1,
        prefix_cache: false,
        draft_tokens_max: 0,
    };
    let mut backend = HashBackend::new(spec.vocab);
    let mut engine = Engine::new(spec, sizes);
    let admitted = engine.admit(work(&request(ask)));
    admitted.expect("an empty engine takes a request that fits it");
    let mut tokens = vec![Vec::new(); ask.choices as usize];
    for event in drain(&mut engine, &mut backend) {
        if let Event::Tokens { choice, tokens: new, .. } = event {
            tokens[choice as usize].extend(new.into_iter().map(|token| token.id));
        }
    }
    tokens
}

fn request(ask: &Ask) -> Request {
    Request {
        id: RequestId(1),
        tenant: "default".to_string(),
        lane: Lane::Interactive,
        model: crate::model::NAME.to_string(),
        prompt: Arc::from(ask.prompt.clone()),
        sampling: Sampling {
            temperature: if ask.seed.is_some() { 1.0 } else { 0.0 },
            seed: ask.seed.unwrap_or(0),
            ..Sampling::default()
        },
        choices: ask.choices,
        tokens_max: ask.tokens_max,
        tokens_min: 0,
        stop_tokens: Vec::new(),
        ignore_eos: true,
        logprobs: None,
        prompt_logprobs: None,
        cache_salt: String::new(),
        deadline_ms: 60_000,
    }
}
