//! Log-probabilities in the three shapes clients read: chat, completions, and vLLM's for prompts.

use baton_core::SampledToken;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::text::Vocabulary;

/// JSON has no infinities; vLLM writes this instead.
const LOGPROB_MIN: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    logprob.max(LOGPROB_MIN)
}

/// `choices[].logprobs` of a chat.
#[derive(Debug, Default, Serialize)]
pub(crate) struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct ChatToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    top_logprobs: Vec<ChatTop>,
}

#[derive(Debug, Serialize)]
struct ChatTop {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    pub(crate) fn new(vocabulary: &Vocabulary, tokens: &[SampledToken]) -> ChatLogprobs {
        let top = |&(id, logprob): &(u32, f32)| ChatTop {
            token: vocabulary.text(id),
            logprob: finite(logprob),
            bytes: vocabulary.bytes(id),
        };
        let token = |t: &SampledToken| ChatToken {
            token: vocabulary.text(t.id),
            logprob: finite(t.logprob),
            bytes: vocabulary.bytes(t.id),
            top_logprobs: t.top.iter().map(top).collect(),
        };
        ChatLogprobs { content: tokens.iter().map(token).collect(), refusal: None }
    }
}

/// `choices[].logprobs` of a completion.
#[derive(Debug, Default, Serialize)]
pub(crate) struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<Top>>,
}

/// Alternatives by text, most likely first; the token itself is always among them.
#[derive(Debug)]
struct Top(Vec<(String, f32)>);

impl Serialize for Top {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

impl CompletionLogprobs {
    /// Appends a generated token; `offset` counts the characters of the tokens before it and is moved on.
    pub(crate) fn push(&mut self, vocabulary: &Vocabulary, token: &SampledToken, offset: &mut usize) {
        let text = vocabulary.text(token.id);
        self.token_logprobs.push(Some(finite(token.logprob)));
        self.top_logprobs.push(Some(top(vocabulary, token)));
        self.push_text(text, offset);
    }

    /// Appends a prompt token; the first one has no log-probability.
    pub(crate) fn push_prompt(
        &mut self,
        vocabulary: &Vocabulary,
        id: u32,
        token: Option<&SampledToken>,
        offset: &mut usize,
    ) {
        if let Some(token) = token {
            return self.push(vocabulary, &SampledToken { id, ..token.clone() }, offset);
        }
        self.token_logprobs.push(None);
        self.top_logprobs.push(None);
        self.push_text(vocabulary.text(id), offset);
    }

    fn push_text(&mut self, text: String, offset: &mut usize) {
        self.text_offset.push(*offset);
        *offset += text.chars().count();
        self.tokens.push(text);
    }
}

/// Different tokens can look the same (parts of characters): the most likely one stands for them.
fn top(vocabulary: &Vocabulary, token: &SampledToken) -> Top {
    let chosen = (token.id, token.logprob);
    let more = (!token.top.iter().any(|(id, _)| *id == token.id)).then_some(chosen);
    let mut entries: Vec<(String, f32)> = Vec::with_capacity(token.top.len() + 1);
    for &(id, logprob) in token.top.iter().chain(more.iter()) {
        let text = vocabulary.text(id);
        if !entries.iter().any(|(known, _)| *known == text) {
            entries.push((text, finite(logprob)));
        }
    }
    Top(entries)
}

/// vLLM's `prompt_logprobs`: per position null or token id → {logprob, rank, decoded_token}.
#[derive(Debug)]
pub(crate) struct PromptPosition(Vec<(u32, PromptToken)>);

#[derive(Debug, Serialize)]
struct PromptToken {
    logprob: f32,
    /// Known for tokens among the most likely.
    rank: Option<usize>,
    decoded_token: String,
}

impl Serialize for PromptPosition {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (id, token) in &self.0 {
            map.serialize_entry(&id.to_string(), token)?;
        }
        map.end()
    }
}

pub(crate) fn prompt_positions(
    vocabulary: &Vocabulary,
    prompt: &[Option<SampledToken>],
) -> Vec<Option<PromptPosition>> {
    let entry = |id: u32, logprob: f32, rank: Option<usize>| {
        (id, PromptToken { logprob: finite(logprob), rank, decoded_token: vocabulary.text(id) })
    };
    let position = |token: &SampledToken| {
        let top = token.top.iter().enumerate().map(|(i, &(id, logprob))| entry(id, logprob, Some(i + 1)));
        let mut entries: Vec<_> = top.collect();
        if !entries.iter().any(|(id, _)| *id == token.id) {
            entries.insert(0, entry(token.id, token.logprob, None));
        }
        PromptPosition(entries)
    };
    prompt.iter().map(|token| token.as_ref().map(position)).collect()
}
