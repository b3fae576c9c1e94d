//! `/tokenize`, `/detokenize`, `/tokenizer_info` and `/v1/models`, in vLLM's shapes.

use std::sync::Arc;

use baton_core::Clock;
use serde_json::{Map, Value, json};

use super::{Fields, chat};
use crate::error::ApiError;
use crate::model::Model;
use crate::prompt::Text;

/// The text of a `/tokenize` call: a prompt, or messages through the chat template.
pub(crate) fn read_tokenize(fields: Fields, model: &Model, clock: Arc<dyn Clock>) -> Result<Text, ApiError> {
    if fields.get("messages").is_some() {
        return chat::render(fields, model, clock);
    }
    let Some(text) = fields.text("prompt")? else {
        return Err(ApiError::invalid("prompt", "'prompt' or 'messages' must be given"));
    };
    Ok(Text { text: text.to_string(), special: fields.flag("add_special_tokens", true)? })
}

/// The answer of `/tokenize`.
pub(crate) fn tokenized(fields: Fields, model: &Model, tokens: &[u32]) -> Result<Value, ApiError> {
    let strings = || tokens.iter().map(|&id| model.vocabulary.text(id)).collect::<Vec<_>>();
    let strings = fields.flag("return_token_strs", false)?.then(strings);
    Ok(json!({
        "count": tokens.len(), "max_model_len": model.positions_max, "tokens": tokens, "token_strs": strings,
    }))
}

/// The answer of `/detokenize`.
pub(crate) fn detokenized(fields: Fields, model: &Model) -> Result<Value, ApiError> {
    let Some(tokens) = fields.tokens("tokens", model.vocab, usize::MAX)? else {
        return Err(ApiError::invalid("tokens", "'tokens' must be given"));
    };
    Ok(json!({"prompt": model.vocabulary.decode(&tokens, false)}))
}

/// The answer of `/tokenizer_info`: tokenizer_config.json with the chat template in use.
pub(crate) fn tokenizer_info(model: &Model) -> Value {
    let mut info: Map<String, Value> = model.tokenizer_config.clone();
    let class = || Value::from("PreTrainedTokenizerFast");
    info.entry("tokenizer_class").or_insert_with(class);
    if let Some(template) = &model.template {
        info.insert("chat_template".into(), template.source().into());
    }
    Value::Object(info)
}

/// An entry of `/v1/models`.
pub(crate) fn model_entry(id: &str, model: &Model) -> Value {
    json!({
        "id": id, "object": "model", "created": model.created_unix_s, "owned_by": "baton", "root": model.name,
        "parent": null, "max_model_len": model.positions_max, "permission": [],
    })
}
