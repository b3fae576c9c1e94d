//! The note that travels with a resumable request: how its reply looks, and what had been generated before its present
//! worker had it. Another gateway reads it and goes on with the same events.

use baton_core::{Finish, Request, SampledToken};
use serde::{Deserialize, Serialize};

use crate::openai::{Envelope, Params, Shape};
use crate::text::Stops;

/// A worker keeps no more than this per request.
const NOTE_BYTES_MAX: usize = 64 << 10;
/// First byte of a note. Gateways of another version cannot go on with it.
const VERSION: u8 = 1;

/// How a reply looks, whichever gateway writes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Look {
    pub id: String,
    pub created: u64,
    /// The model as the client named it.
    pub model: String,
    /// Names the model's card: tokenizer, limits, fingerprint.
    pub card: String,
    /// How long the request goes on without a gateway.
    pub window_ms: u64,
    pub shape: Shape,
    pub stops: Vec<String>,
    pub include_stop: bool,
    pub skip_special: bool,
    pub return_token_ids: bool,
    pub include_usage: bool,
    pub continuous_usage: bool,
    /// The client asked for no new tokens; the one generated is not shown.
    pub silent: bool,
}

/// One choice as far as it had come before the present attempt.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Before {
    pub tokens: Vec<SampledToken>,
    pub finish: Option<Finish>,
}

/// What another gateway needs to go on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Note {
    pub look: Look,
    /// Prompt tokens found in a cache; known from the second attempt on.
    pub cached_tokens: Option<u64>,
    /// By choice; empty on the first attempt.
    pub before: Vec<Before>,
}

impl Look {
    pub(crate) fn new(envelope: &Envelope, card: &str, shape: Shape, params: &Params, window_ms: u64) -> Look {
        Look {
            window_ms,
            id: envelope.id.clone(),
            created: envelope.created,
            model: envelope.model.clone(),
            card: card.to_string(),
            shape,
            stops: params.stops.strings().to_vec(),
            include_stop: params.stops.include(),
            skip_special: params.skip_special,
            return_token_ids: params.return_token_ids,
            include_usage: params.include_usage,
            continuous_usage: params.continuous_usage,
            silent: params.tokens_max == Some(0),
        }
    }

    pub(crate) fn envelope(&self) -> Envelope {
        Envelope { id: self.id.clone(), created: self.created, model: self.model.clone() }
    }

    /// The parameters that a streamed reply depends on.
    pub(crate) fn params(&self, request: &Request) -> Params {
        Params {
            sampling: request.sampling.clone(),
            choices: request.choices,
            tokens_max: Some(request.tokens_max),
            tokens_min: request.tokens_min,
            stops: Stops::new(self.stops.clone(), self.include_stop),
            stop_tokens: request.stop_tokens.clone(),
            ignore_eos: request.ignore_eos,
            skip_special: self.skip_special,
            logprobs: request.logprobs,
            return_token_ids: self.return_token_ids,
            stream: true,
            include_usage: self.include_usage,
            continuous_usage: self.continuous_usage,
            ..Params::default()
        }
    }
}

impl Note {
    /// None: it would be longer than a worker keeps.
    pub(crate) fn to_bytes(&self) -> Option<bytes::Bytes> {
        let bytes = postcard::to_extend(self, vec![VERSION]).ok()?;
        (bytes.len() <= NOTE_BYTES_MAX).then(|| bytes.into())
    }

    /// None: not a note, or one of another version.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Note> {
        let (version, rest) = bytes.split_first()?;
        (*version == VERSION).then(|| postcard::from_bytes(rest).ok())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(tokens: usize) -> Note {
        let token = |id| SampledToken { id, logprob: f32::NEG_INFINITY, top: vec![(id, -0.1)] };
        let before = Before { tokens: (0..tokens as u32).map(token).collect(), finish: Some(Finish::StopToken(3)) };
        let envelope = Envelope { id: "chatcmpl-1".into(), created: 5, model: "m".into() };
        let params = Params { stops: Stops::new(vec!["é".into()], true), include_usage: true, ..Params::default() };
        let look = Look::new(&envelope, "card", Shape::Completions { echo: true }, &params, 9_000);
        Note { look, cached_tokens: Some(7), before: vec![before, Before::default()] }
    }

    #[test]
    fn a_note_reads_back_and_nothing_else_does() {
        let written = note(9).to_bytes().unwrap();
        assert_eq!(Note::from_bytes(&written), Some(note(9)));
        assert_eq!(Note::from_bytes(&written[1..]), None);
        assert_eq!(Note::from_bytes(&[]), None);
        assert_eq!(Note::from_bytes(&written[..written.len() / 2]), None);
        let other = [&[VERSION + 1], &written[1..]].concat();
        assert_eq!(Note::from_bytes(&other), None);
    }

    #[test]
    fn a_note_that_no_worker_would_keep_is_none() {
        assert!(note(5_000).to_bytes().is_some_and(|bytes| bytes.len() > NOTE_BYTES_MAX / 2));
        assert_eq!(note(10_000).to_bytes(), None);
    }
}
