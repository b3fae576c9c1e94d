//! The answer to one prompt: a request's tokens become visible text, choice by choice, and stop strings end it.

use std::collections::VecDeque;
use std::sync::Arc;

use baton_core::SampledToken;
use futures::Stream;

use crate::error::ApiError;
use crate::model::Model;
use crate::serve::{Event, Serving};
use crate::text::{ChoiceText, Delta, TextOptions};

/// What a client may be told next.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Part {
    /// Log-probabilities of the prompt's tokens, before anything else of this prompt.
    Prompt { prompt: usize, logprobs: Vec<Option<SampledToken>> },
    /// `choice` counts over all prompts of the call; `generated` counts the choice's tokens so far.
    Delta { prompt: usize, choice: u32, generated: u32, delta: Delta },
    /// The prompt's answer is complete.
    Ended(Usage),
}

/// Tokens to be paid for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub generated_tokens: u64,
}

impl Usage {
    pub(crate) fn add(&mut self, other: Usage) {
        self.prompt_tokens += other.prompt_tokens;
        self.cached_tokens += other.cached_tokens;
        self.generated_tokens += other.generated_tokens;
    }
}

/// One prompt being answered.
pub(crate) struct Answer {
    prompt: usize,
    serving: Serving,
    model: Arc<Model>,
    texts: Vec<ChoiceText>,
    /// The client asked for no new tokens (`echo` with `max_tokens: 0`); the one generated is not shown.
    silent: bool,
    /// Every token makes its own events, however many come at a time, so that the events can be told again.
    token_by_token: bool,
    ready: VecDeque<Part>,
}

impl Answer {
    pub(crate) fn new(
        prompt: usize,
        serving: Serving,
        model: Arc<Model>,
        options: Arc<TextOptions>,
        silent: bool,
    ) -> Answer {
        let request = serving.request();
        let text = |_| ChoiceText::new(&model.vocabulary, &request.prompt, options.clone());
        let texts = (0..request.choices).map(text).collect();
        let token_by_token = serving.is_resumable();
        Answer { prompt, serving, model, texts, silent, token_by_token, ready: VecDeque::new() }
    }

    /// Everything about this answer, in order; ends after `Ended` or an error. Dropping the stream cancels the request.
    pub(crate) fn parts(self) -> impl Stream<Item = Result<Part, ApiError>> + Send {
        futures::stream::unfold(Some(self), |answer| async move {
            let mut answer = answer?;
            match answer.next().await {
                Ok(Some(part)) => Some((Ok(part), Some(answer))),
                Ok(None) => Some((Ok(Part::Ended(answer.usage())), None)),
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    async fn next(&mut self) -> Result<Option<Part>, ApiError> {
        loop {
            if let Some(part) = self.ready.pop_front() {
                return Ok(Some(part));
            }
            match self.serving.next().await? {
                Some(Event::Tokens { choice, tokens }) if self.token_by_token => {
                    tokens.into_iter().for_each(|token| self.take_tokens(choice, vec![token]));
                }
                Some(Event::Tokens { choice, tokens }) => self.take_tokens(choice, tokens),
                Some(Event::Finished { choice, finish }) => {
                    let mut delta = Delta::default();
                    self.texts[choice as usize].finish(&self.model.vocabulary, finish, &mut delta);
                    self.show(choice, delta);
                }
                Some(Event::PromptLogprobs(logprobs)) => {
                    self.ready.push_back(Part::Prompt { prompt: self.prompt, logprobs });
                }
                None => return Ok(None),
            }
        }
    }

    fn take_tokens(&mut self, choice: u32, tokens: Vec<SampledToken>) {
        let mut delta = Delta::default();
        let text = &mut self.texts[choice as usize];
        for token in tokens {
            text.push(&self.model.vocabulary, token, &mut delta);
        }
        if text.ended() {
            self.serving.end_choice(choice, text.generated() as usize);
        }
        self.show(choice, delta);
    }

    fn show(&mut self, choice: u32, mut delta: Delta) {
        let mut generated = self.texts[choice as usize].generated();
        if self.silent {
            generated = 0;
            delta = Delta { ending: delta.ending, ..Delta::default() };
        }
        if delta != Delta::default() {
            let choice = self.prompt as u32 * self.texts.len() as u32 + choice;
            self.ready.push_back(Part::Delta { prompt: self.prompt, choice, generated, delta });
        }
    }

    fn usage(&self) -> Usage {
        let generated: u64 = self.texts.iter().map(|t| u64::from(t.generated())).sum();
        Usage {
            prompt_tokens: self.serving.request().prompt.len() as u64,
            cached_tokens: self.serving.cached_tokens(),
            generated_tokens: if self.silent { 0 } else { generated },
        }
    }
}
