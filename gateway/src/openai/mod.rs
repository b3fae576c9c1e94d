//! OpenAI's JSON, and vLLM's additions to it: what clients send, checked once, and what they are sent.

pub(crate) mod chat;
pub(crate) mod completions;
mod fields;
#[cfg(test)]
mod fuzz;
mod logprobs;
mod params;
mod reply;
pub(crate) mod tokens;

pub(crate) use fields::Fields;
pub(crate) use params::Params;
pub(crate) use reply::{Envelope, Reply, stream_error};

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::model::Model;
use crate::prompt::Text;

/// A checked call: what to generate for which prompts, and in which shape to answer.
pub(crate) struct Ask {
    pub model: Arc<Model>,
    pub prompts: Vec<Prompt>,
    pub params: Params,
    pub shape: Shape,
}

/// A prompt as the client gave it.
pub(crate) enum Prompt {
    Text(Text),
    Tokens(Vec<u32>),
}

/// Whose JSON the answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Shape {
    Chat,
    Completions { echo: bool },
}

impl Shape {
    /// The parameter that carries the prompt.
    pub(crate) fn prompt_param(self) -> &'static str {
        match self {
            Shape::Chat => "messages",
            Shape::Completions { .. } => "prompt",
        }
    }
}
