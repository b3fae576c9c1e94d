//! What the tokens of a request must be: the same hash backend, each request alone in an engine with room for it.

use std::sync::Arc;

use baton_core::{Lane, Request, RequestId, Sampling, TokenId};
use baton_engine::testing::{drain, work};
use baton_engine::{Engine, EngineConfig, Event, HashBackend};

use crate::model::{POSITIONS_MAX, spec};
use crate::workload::Ask;

/// An engine for the requests of a run, one after the other.
pub struct Oracle {
    engine: Engine,
    backend: HashBackend,
}

impl Oracle {
    /// With room for any of these.
    pub fn new<'a>(asks: impl Iterator<Item = &'a Ask>) -> Oracle {
        let spec = spec();
        let block_tokens = spec.layout.block_tokens as usize;
        let blocks = |ask: &Ask| {
            let positions = ask.prompt.len() + ask.tokens_max as usize;
            (ask.choices as usize + 1) * (positions.div_ceil(block_tokens) + 1)
        };
        let sizes = EngineConfig {
            blocks: asks.map(blocks).max().unwrap_or(1),
            batch_tokens_max: POSITIONS_MAX,
            sequences_max: 16,
            queue_max: 1,
            prefix_cache: false,
            draft_tokens_max: 0,
        };
        let backend = HashBackend::new(spec.vocab);
        Oracle { engine: Engine::new(spec, sizes), backend }
    }

    /// The tokens of each choice.
    pub fn reference(&mut self, ask: &Ask) -> Vec<Vec<TokenId>> {
        let admitted = self.engine.admit(work(&request(ask)));
        admitted.expect("an empty engine takes a request that fits it");
        let mut tokens = vec![Vec::new(); ask.choices as usize];
        for event in drain(&mut self.engine, &mut self.backend) {
            if let Event::Tokens { choice, tokens: new, .. } = event {
                tokens[choice as usize].extend(new.into_iter().map(|token| token.id));
            }
        }
        tokens
    }
}

fn request(ask: &Ask) -> Request {
    Request {
        id: RequestId(ask.number as u128 + 1),
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
