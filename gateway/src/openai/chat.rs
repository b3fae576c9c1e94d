//! `/v1/chat/completions`: messages through the model's chat template.

use std::sync::Arc;

use baton_core::{Clock, limits};
use serde_json::{Map, Value};

use super::{Ask, Fields, Params, Prompt, Shape};
use crate::error::ApiError;
use crate::model::Model;
use crate::prompt::{Render, Text};

/// Reads a chat call.
pub(crate) fn read(fields: Fields, model: Arc<Model>, clock: Arc<dyn Clock>) -> Result<Ask, ApiError> {
    let mut params = Params::read(fields, &model)?;
    if params.tokens_max == Some(0) {
        return Err(ApiError::invalid("max_tokens", "'max_tokens' must be at least 1"));
    }
    if fields.flag("echo", false)? {
        return Err(ApiError::unsupported("echo", "'echo' is not supported for chats"));
    }
    params.logprobs = logprobs(fields)?;
    let text = render(fields, &model, clock)?;
    Ok(Ask { model, prompts: vec![Prompt::Text(text)], params, shape: Shape::Chat })
}

/// The prompt's text. The template writes its own special tokens, so that by default the tokenizer adds none.
pub(crate) fn render(fields: Fields, model: &Model, clock: Arc<dyn Clock>) -> Result<Text, ApiError> {
    let Some(template) = &model.template else {
        return Err(ApiError::invalid("messages", "this model has no chat template; use /v1/completions"));
    };
    let messages = messages(fields)?;
    let empty = Map::new();
    let tools = match fields.text("tool_choice") {
        Ok(Some("none")) => None,
        _ => fields.list("tools")?.filter(|tools| !tools.is_empty()).and(fields.get("tools")),
    };
    let render = Render {
        messages: &messages,
        tools,
        documents: fields.list("documents")?.and(fields.get("documents")),
        add_generation_prompt: fields.flag("add_generation_prompt", true)?,
        kwargs: fields.object("chat_template_kwargs")?.unwrap_or(&empty),
        clock,
    };
    let special = fields.flag("add_special_tokens", false)?;
    match template.render(&render) {
        Ok(text) => Ok(Text { text, special }),
        Err(problem) => Err(ApiError::invalid("messages", format!("The chat template refuses this: {problem}"))),
    }
}

fn logprobs(fields: Fields) -> Result<Option<u32>, ApiError> {
    let top = fields.integer("top_logprobs", 0..=i64::from(limits::TOP_LOGPROBS_MAX))?;
    match (fields.flag("logprobs", false)?, top) {
        (true, top) => Ok(Some(top.unwrap_or(0) as u32)),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid("top_logprobs", "'top_logprobs' needs 'logprobs' to be true")),
    }
}

fn messages(fields: Fields) -> Result<Vec<Value>, ApiError> {
    let list = fields.list("messages")?.unwrap_or_default();
    if list.is_empty() {
        return Err(ApiError::invalid("messages", "'messages' must be an array with at least one message"));
    }
    list.iter().enumerate().map(|(i, m)| message(&format!("messages[{i}]"), m)).collect()
}

fn message(at: &str, message: &Value) -> Result<Value, ApiError> {
    let Some(fields) = message.as_object() else {
        return Err(ApiError::invalid(at, format!("'{at}' must be an object")));
    };
    if Fields(fields).text("role").ok().flatten().is_none_or(str::is_empty) {
        return Err(ApiError::invalid(&format!("{at}.role"), format!("'{at}.role' must be a string")));
    }
    let content = content(&format!("{at}.content"), fields.get("content"))?;
    let mut fields = fields.clone();
    fields.insert("content".into(), content);
    fields.get_mut("tool_calls").into_iter().for_each(parse_arguments);
    Ok(Value::Object(fields))
}

/// A string stays; a list of text parts becomes one text; nothing stays nothing (an assistant's tool call).
fn content(at: &str, content: Option<&Value>) -> Result<Value, ApiError> {
    let bad = || ApiError::invalid(at, format!("'{at}' must be a string or an array of text parts"));
    match content {
        None | Some(Value::Null) => Ok(Value::Null),
        Some(Value::String(text)) => Ok(Value::String(text.clone())),
        Some(Value::Array(parts)) => {
            let texts: Option<Vec<&str>> = parts.iter().map(part).collect();
            Ok(Value::String(texts.ok_or_else(bad)?.join("\n")))
        }
        Some(_) => Err(bad()),
    }
}

fn part(part: &Value) -> Option<&str> {
    match part {
        Value::String(text) => Some(text),
        _ if part.get("type")?.as_str()? == "text" => part.get("text")?.as_str(),
        _ => None,
    }
}

/// Clients send a tool call's arguments as a JSON text; templates expect the object.
fn parse_arguments(calls: &mut Value) {
    for call in calls.as_array_mut().into_iter().flatten() {
        let arguments = call.get_mut("function").and_then(|f| f.get_mut("arguments"));
        let parsed = arguments.as_ref().and_then(|a| serde_json::from_str::<Map<String, Value>>(a.as_str()?).ok());
        if let (Some(arguments), Some(parsed)) = (arguments, parsed) {
            *arguments = Value::Object(parsed);
        }
    }
}
