//! `/v1/completions`: prompts as text or tokens, one or many.

use std::sync::Arc;

use baton_core::limits;
use serde_json::Value;

use super::fields::tokens;
use super::{Ask, Fields, Params, Prompt, Shape};
use crate::error::ApiError;
use crate::model::Model;
use crate::prompt::Text;

/// Prompts in one call.
const PROMPTS_MAX: usize = 1024;

/// Reads a completions call.
pub(crate) fn read(fields: Fields, model: Arc<Model>) -> Result<Ask, ApiError> {
    let mut params = Params::read(fields, &model)?;
    let echo = fields.flag("echo", false)?;
    if params.tokens_max == Some(0) && !echo {
        return Err(ApiError::invalid("max_tokens", "'max_tokens' may be 0 only with 'echo'"));
    }
    let logprobs = fields.integer("logprobs", 0..=i64::from(limits::TOP_LOGPROBS_MAX))?;
    params.logprobs = logprobs.map(|count| count as u32);
    let special = fields.flag("add_special_tokens", true)?;
    let prompts = prompts(fields, model.vocab, special)?;
    Ok(Ask { model, prompts, params, shape: Shape::Completions { echo } })
}

fn prompts(fields: Fields, vocab: u32, special: bool) -> Result<Vec<Prompt>, ApiError> {
    let bad = || {
        let kinds = "a string, an array of strings, an array of token ids, or an array of arrays of token ids";
        ApiError::invalid("prompt", format!("'prompt' must be {kinds}, and not empty"))
    };
    let text = |text: &str| Prompt::Text(Text { text: text.to_string(), special });
    match fields.get("prompt") {
        Some(Value::String(prompt)) => Ok(vec![text(prompt)]),
        Some(Value::Array(list)) => match list.first() {
            Some(Value::Number(_)) => Ok(vec![Prompt::Tokens(tokens(list, "prompt", vocab)?)]),
            Some(_) if list.len() > PROMPTS_MAX => {
                Err(ApiError::invalid("prompt", format!("'prompt' may have at most {PROMPTS_MAX} prompts")))
            }
            Some(Value::String(_)) => list.iter().map(|p| p.as_str().map(text).ok_or_else(bad)).collect(),
            Some(Value::Array(_)) => {
                let prompt = |p: &Value| {
                    let list = p.as_array().filter(|list| !list.is_empty()).ok_or_else(bad)?;
                    Ok(Prompt::Tokens(tokens(list, "prompt", vocab)?))
                };
                list.iter().map(prompt).collect()
            }
            _ => Err(bad()),
        },
        _ => Err(bad()),
    }
}
