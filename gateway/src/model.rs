//! A model as the gateway knows it: everything from the card that a worker gave, checked once and kept by hash.

use std::sync::Arc;

use baton_core::TokenId;
use baton_proto::v1::ModelCard;
use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use crate::measure::Meters;
use crate::prompt::Template;
use crate::text::Vocabulary;

/// A card that cannot be served from.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadCard {
    #[error("tokenizer.json of model {model}: {problem}")]
    Tokenizer { model: String, problem: String },
    #[error("chat template of model {model}: {problem}")]
    Template { model: String, problem: String },
    #[error("model {model}: {field} {problem}")]
    Field { model: String, field: &'static str, problem: &'static str },
}

/// A model that can be asked for.
pub(crate) struct Model {
    pub name: String,
    pub hash: String,
    pub vocabulary: Vocabulary,
    /// None: the model has no chat template.
    pub template: Option<Template>,
    pub eos: Arc<[TokenId]>,
    pub positions_max: usize,
    pub block_tokens: usize,
    /// Size of the vocabulary; token ids are below it.
    pub vocab: u32,
    pub numerics: String,
    pub created_unix_s: u64,
    /// The model's own sampling parameters (generation_config.json).
    pub defaults: Map<String, Value>,
    /// tokenizer_config.json, for `/tokenizer_info`.
    pub tokenizer_config: Map<String, Value>,
    pub meters: Arc<Meters>,
}

impl Model {
    /// Reads a card; parsing a large tokenizer takes a while.
    pub(crate) fn from_card(card: ModelCard) -> Result<Model, BadCard> {
        let field = |field, problem| BadCard::Field { model: card.name.clone(), field, problem };
        let vocab = u32::try_from(card.vocab).map_err(|_| field("vocab", "is too large"))?;
        let positions_max = usize::try_from(card.positions_max).unwrap_or(usize::MAX);
        if positions_max == 0 || card.block_tokens == 0 || vocab == 0 {
            return Err(field("positions_max, block_tokens and vocab", "must not be zero"));
        }
        let defaults = object(&card.generation_config_json);
        let tokenizer_config = object(&card.tokenizer_config_json);
        let vocabulary = Vocabulary::new(tokenizer(&card)?);
        Ok(Model {
            vocabulary,
            meters: Arc::new(Meters::new(&card.name)),
            template: template(&card)?,
            eos: card.eos.into(),
            positions_max,
            block_tokens: card.block_tokens as usize,
            vocab,
            name: card.name,
            hash: card.hash,
            numerics: card.numerics,
            created_unix_s: card.created_unix_s,
            defaults: defaults.unwrap_or_default(),
            tokenizer_config: tokenizer_config.unwrap_or_default(),
        })
    }

    /// The model's own bound on a chat's answer (generation_config's `max_new_tokens`).
    pub(crate) fn tokens_default(&self) -> u32 {
        let own = self.defaults.get("max_new_tokens").and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
        own.filter(|n| *n > 0).unwrap_or(u32::MAX)
    }
}

fn tokenizer(card: &ModelCard) -> Result<Tokenizer, BadCard> {
    let bad = |problem: String| BadCard::Tokenizer { model: card.name.clone(), problem };
    let mut tokenizer = Tokenizer::from_bytes(&card.tokenizer_json).map_err(|e| bad(e.to_string()))?;
    // A prompt is never cut or padded silently, whatever the file says.
    tokenizer.with_padding(None).with_truncation(None).map_err(|e| bad(e.to_string()))?;
    Ok(tokenizer)
}

fn template(card: &ModelCard) -> Result<Option<Template>, BadCard> {
    if card.chat_template.is_empty() {
        return Ok(None);
    }
    let template = Template::new(&card.chat_template, &card.bos_token, &card.eos_token);
    let bad = |e: minijinja::Error| BadCard::Template { model: card.name.clone(), problem: e.to_string() };
    template.map(Some).map_err(bad)
}

fn object(json: &str) -> Option<Map<String, Value>> {
    serde_json::from_str(json).ok()
}
