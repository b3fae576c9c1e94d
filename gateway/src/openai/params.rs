//! The parameters that both endpoints share, read and checked once.

use baton_core::{Sampling, TokenId, limits};
use serde_json::Value;

use super::Fields;
use crate::error::ApiError;
use crate::model::Model;
use crate::text::Stops;

/// How to generate and what to report.
#[derive(Clone, Debug, Default)]
pub(crate) struct Params {
    /// Its seed counts only when `seed` is given.
    pub sampling: Sampling,
    pub seed: Option<u64>,
    pub choices: u32,
    /// None: what the endpoint's default and the model's length allow.
    pub tokens_max: Option<u32>,
    pub tokens_min: u32,
    pub stops: Stops,
    pub stop_tokens: Vec<TokenId>,
    pub ignore_eos: bool,
    pub skip_special: bool,
    pub logprobs: Option<u32>,
    pub prompt_logprobs: Option<u32>,
    pub return_token_ids: bool,
    pub cache_salt: String,
    pub stream: bool,
    pub include_usage: bool,
    pub continuous_usage: bool,
}

const CACHE_SALT_BYTES_MAX: usize = 256;

/// Whether a parameter's value changes the answer.
type Changes = fn(&Value) -> bool;

/// Parameters that can change the answer in ways Baton does not know.
const UNSUPPORTED: &[(&str, Changes)] = &[
    ("response_format", |v| v.get("type").and_then(Value::as_str) != Some("text")),
    ("structured_outputs", |_| true),
    ("guided_json", |_| true),
    ("guided_regex", |_| true),
    ("guided_choice", |_| true),
    ("guided_grammar", |_| true),
    ("tool_choice", |v| !matches!(v.as_str(), Some("auto" | "none"))),
    ("function_call", |v| !matches!(v.as_str(), Some("auto" | "none"))),
    ("use_beam_search", |v| v.as_bool() != Some(false)),
    ("suffix", |v| v.as_str() != Some("")),
    ("truncate_prompt_tokens", |_| true),
    ("bad_words", |v| v.as_array().is_none_or(|list| !list.is_empty())),
    ("allowed_token_ids", |_| true),
    ("logits_processors", |v| v.as_array().is_none_or(|list| !list.is_empty())),
    ("prompt_embeds", |_| true),
    ("continue_final_message", |v| v.as_bool() != Some(false)),
    ("chat_template", |_| true),
    ("audio", |_| true),
    ("modalities", |v| v.as_array().is_none_or(|list| list.iter().any(|m| m.as_str() != Some("text")))),
];

impl Params {
    pub(crate) fn read(fields: Fields, model: &Model) -> Result<Params, ApiError> {
        refuse_unsupported(fields)?;
        let choices = fields.integer("n", 1..=i64::from(limits::CHOICES_MAX))?.unwrap_or(1);
        refuse_best_of(fields, choices)?;
        let tokens_max = match fields.integer("max_completion_tokens", 0..=i64::from(u32::MAX))? {
            Some(tokens) => Some(tokens),
            None => fields.integer("max_tokens", 0..=i64::from(u32::MAX))?,
        };
        let stream = fields.flag("stream", false)?;
        let stream_options = Fields(fields.object("stream_options")?.unwrap_or(&EMPTY));
        let cache_salt = fields.text("cache_salt")?.unwrap_or_default();
        if cache_salt.len() > CACHE_SALT_BYTES_MAX {
            let message = format!("'cache_salt' may have at most {CACHE_SALT_BYTES_MAX} bytes");
            return Err(ApiError::invalid("cache_salt", message));
        }
        Ok(Params {
            sampling: sampling(fields, model)?,
            seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(|seed| seed as u64),
            choices: choices as u32,
            tokens_max: tokens_max.map(|tokens| tokens as u32),
            tokens_min: fields.integer("min_tokens", 0..=i64::from(u32::MAX))?.unwrap_or(0) as u32,
            stops: stops(fields)?,
            stop_tokens: fields.tokens("stop_token_ids", model.vocab, limits::STOP_TOKENS_MAX)?.unwrap_or_default(),
            ignore_eos: fields.flag("ignore_eos", false)?,
            skip_special: fields.flag("skip_special_tokens", true)?,
            logprobs: None,
            prompt_logprobs: prompt_logprobs(fields, stream)?,
            return_token_ids: fields.flag("return_token_ids", false)?,
            cache_salt: cache_salt.to_string(),
            stream,
            include_usage: stream_options.flag("include_usage", false)?,
            continuous_usage: stream_options.flag("continuous_usage_stats", false)?,
        })
    }
}

static EMPTY: std::sync::LazyLock<serde_json::Map<String, Value>> = std::sync::LazyLock::new(serde_json::Map::new);

fn refuse_unsupported(fields: Fields) -> Result<(), ApiError> {
    let found = UNSUPPORTED.iter().find(|(name, changes)| fields.get(name).is_some_and(changes));
    match found {
        Some((name, _)) => Err(ApiError::unsupported(name, format!("'{name}' with this value is not supported"))),
        None => Ok(()),
    }
}

fn refuse_best_of(fields: Fields, choices: i64) -> Result<(), ApiError> {
    match fields.integer("best_of", 1..=i64::MAX)? {
        Some(best_of) if best_of != choices => {
            Err(ApiError::unsupported("best_of", "'best_of' other than 'n' is not supported"))
        }
        _ => Ok(()),
    }
}

fn prompt_logprobs(fields: Fields, stream: bool) -> Result<Option<u32>, ApiError> {
    let count = fields.integer("prompt_logprobs", 0..=i64::from(limits::TOP_LOGPROBS_MAX))?;
    if count.is_some() && stream {
        return Err(ApiError::invalid("prompt_logprobs", "'prompt_logprobs' is not available with 'stream'"));
    }
    Ok(count.map(|count| count as u32))
}

fn sampling(fields: Fields, model: &Model) -> Result<Sampling, ApiError> {
    let defaults = Fields(&model.defaults);
    // A default of the model that is out of range is no error of the client's: it does not count.
    let number = |name: &str, range: std::ops::RangeInclusive<f64>, otherwise: f64| {
        let own = fields.number(name, range.clone())?;
        let default = defaults.number(name, range).ok().flatten();
        Ok(own.or(default).unwrap_or(otherwise) as f32)
    };
    let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?;
    let top_k = top_k.or_else(|| defaults.integer("top_k", -1..=i64::from(u32::MAX)).ok().flatten()).unwrap_or(0);
    Ok(Sampling {
        temperature: number("temperature", 0.0..=2.0, 1.0)?,
        top_k: top_k.max(0) as u32,
        top_p: positive("top_p", number("top_p", 0.0..=1.0, 1.0)?)?,
        min_p: number("min_p", 0.0..=1.0, 0.0)?,
        repetition_penalty: positive("repetition_penalty", number("repetition_penalty", 0.0..=10.0, 1.0)?)?,
        presence_penalty: number("presence_penalty", -2.0..=2.0, 0.0)?,
        frequency_penalty: number("frequency_penalty", -2.0..=2.0, 0.0)?,
        logit_bias: logit_bias(fields, model.vocab)?,
        seed: 0,
    })
}

fn positive(name: &str, value: f32) -> Result<f32, ApiError> {
    if value > 0.0 { Ok(value) } else { Err(ApiError::invalid(name, format!("'{name}' must be above 0"))) }
}

fn logit_bias(fields: Fields, vocab: u32) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let bad = |message: String| ApiError::invalid("logit_bias", message);
    let Some(map) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    if map.len() > limits::LOGIT_BIAS_MAX {
        return Err(bad(format!("'logit_bias' may have at most {} entries", limits::LOGIT_BIAS_MAX)));
    }
    let entry = |(key, value): (&String, &Value)| {
        let token = key.parse::<u32>().ok().filter(|id| *id < vocab);
        let token = token.ok_or_else(|| bad(format!("'logit_bias' has a key that is no token id below {vocab}")))?;
        let bias = value.as_f64().filter(|b| (-100.0..=100.0).contains(b));
        let bias = bias.ok_or_else(|| bad("'logit_bias' values must be numbers between -100 and 100".into()))?;
        Ok((token, bias as f32))
    };
    let mut biases = map.iter().map(entry).collect::<Result<Vec<_>, ApiError>>()?;
    biases.sort_by_key(|(token, _)| *token);
    biases.dedup_by_key(|(token, _)| *token);
    Ok(biases)
}

fn stops(fields: Fields) -> Result<Stops, ApiError> {
    let include = fields.flag("include_stop_str_in_output", false)?;
    let bad = |message: String| ApiError::invalid("stop", message);
    let strings = match fields.get("stop") {
        None => Vec::new(),
        Some(Value::String(stop)) => vec![stop.clone()],
        Some(Value::Array(list)) => {
            let text = |v: &Value| v.as_str().map(String::from);
            let strings: Option<Vec<String>> = list.iter().map(text).collect();
            strings.ok_or_else(|| bad("'stop' must be a string or an array of strings".into()))?
        }
        Some(_) => return Err(bad("'stop' must be a string or an array of strings".into())),
    };
    if strings.len() > limits::STOP_STRINGS_MAX {
        return Err(bad(format!("'stop' may have at most {} strings", limits::STOP_STRINGS_MAX)));
    }
    if strings.iter().any(|s| s.len() > limits::STOP_STRING_BYTES_MAX) {
        return Err(bad(format!("a stop string may have at most {} bytes", limits::STOP_STRING_BYTES_MAX)));
    }
    Ok(Stops::new(strings, include))
}
