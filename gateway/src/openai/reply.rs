//! Answers as OpenAI's clients read them: one JSON object, or chunks of a stream.

use std::borrow::Cow;
use std::sync::Arc;

use baton_core::SampledToken;
use serde::Serialize;

use super::logprobs::{ChatLogprobs, CompletionLogprobs, PromptPosition, prompt_positions};
use super::{Params, Shape};
use crate::answer::{Part, Usage};
use crate::model::Model;
use crate::resume::EventId;
use crate::text::{Delta, Ending};

/// What every object of an answer repeats.
#[derive(Clone, Debug)]
pub(crate) struct Envelope {
    pub id: String,
    pub created: u64,
    /// The model as the client named it.
    pub model: String,
}

/// Writes the answer to one call.
pub(crate) struct Reply {
    envelope: Envelope,
    model: Arc<Model>,
    shape: Shape,
    params: Params,
    prompts: Vec<Arc<[u32]>>,
    choices: Vec<ChoiceReply>,
    prompt_logprobs: Vec<Vec<Option<SampledToken>>>,
    usage: Usage,
    /// Of a resumable stream.
    ids: Option<Ids>,
}

/// Numbers the events, and leaves out those that the client has.
struct Ids {
    told: EventId,
    has: EventId,
}

/// What stands before an event's data.
enum Head {
    /// The client has this event.
    Known,
    Plain,
    Id(String),
}

/// One choice so far.
#[derive(Default)]
struct ChoiceReply {
    begun: bool,
    /// Characters of the tokens reported so far.
    offset: usize,
    generated: u32,
    /// Collected for an answer in one piece.
    text: String,
    pieces: Vec<SampledToken>,
    ending: Option<Ending>,
}

#[derive(Serialize)]
struct Object<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: &'a [C],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<UsageReply>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Option<PromptPosition>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

#[derive(Serialize)]
struct UsageReply {
    prompt_tokens: u64,
    total_tokens: u64,
    completion_tokens: u64,
    prompt_tokens_details: PromptDetails,
}

#[derive(Serialize)]
struct PromptDetails {
    cached_tokens: u64,
}

impl From<Usage> for UsageReply {
    fn from(usage: Usage) -> UsageReply {
        UsageReply {
            prompt_tokens: usage.prompt_tokens,
            total_tokens: usage.prompt_tokens + usage.generated_tokens,
            completion_tokens: usage.generated_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens: usage.cached_tokens },
        }
    }
}

/// A choice of a chat: `delta` in a stream, `message` in one piece.
#[derive(Serialize)]
struct ChatChoice<'a> {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Message<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Message<'a>>,
    logprobs: Option<ChatLogprobs>,
    #[serde(flatten)]
    end: End<'a>,
}

#[derive(Default, Serialize)]
struct Message<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

#[derive(Serialize)]
struct CompletionChoice<'a> {
    index: u32,
    text: Cow<'a, str>,
    logprobs: Option<CompletionLogprobs>,
    #[serde(flatten)]
    end: End<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Option<PromptPosition>>>,
}

#[derive(Serialize)]
struct End<'a> {
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum StopReason<'a> {
    Token(u32),
    String(&'a str),
}

impl<'a> End<'a> {
    fn new(ending: Option<&'a Ending>, token_ids: Option<Vec<u32>>) -> End<'a> {
        let finish_reason = ending.map(|ending| if *ending == Ending::Length { "length" } else { "stop" });
        let stop_reason = match ending {
            Some(Ending::StopToken(token)) => Some(StopReason::Token(*token)),
            Some(Ending::StopString(stop)) => Some(StopReason::String(stop)),
            _ => None,
        };
        End { finish_reason, stop_reason, token_ids }
    }
}

impl Reply {
    pub(crate) fn new(
        envelope: Envelope,
        model: Arc<Model>,
        shape: Shape,
        params: Params,
        prompts: Vec<Arc<[u32]>>,
    ) -> Reply {
        let choices = prompts.len() * params.choices as usize;
        Reply {
            envelope,
            model,
            shape,
            prompt_logprobs: vec![Vec::new(); prompts.len()],
            prompts,
            params,
            choices: (0..choices).map(|_| ChoiceReply::default()).collect(),
            usage: Usage::default(),
            ids: None,
        }
    }

    /// The reply of a resumable stream whose client has the events up to `has`.
    pub(crate) fn resumable(self, has: EventId) -> Reply {
        let told = EventId::start(self.choices.len());
        Reply { ids: Some(Ids { told, has }), ..self }
    }

    /// Counts an event of a choice, or of the end.
    fn head(&mut self, choice: Option<u32>) -> Head {
        let Some(Ids { told, has }) = &mut self.ids else { return Head::Plain };
        let (count, known) = match choice {
            Some(choice) => (&mut told.choices[choice as usize], has.choices[choice as usize]),
            None => (&mut told.end, has.end),
        };
        *count += 1;
        if *count <= known { Head::Known } else { Head::Id(told.to_string()) }
    }

    /// Takes a part of an answer that is given in one piece.
    pub(crate) fn collect(&mut self, part: Part) {
        match part {
            Part::Prompt { prompt, logprobs } => self.prompt_logprobs[prompt] = logprobs,
            Part::Ended(usage) => self.usage.add(usage),
            Part::Delta { choice, generated, delta, .. } => {
                let choice = &mut self.choices[choice as usize];
                choice.generated = generated;
                choice.text.push_str(&delta.text);
                choice.pieces.extend(delta.pieces);
                choice.ending = delta.ending.or(choice.ending.take());
            }
        }
    }

    /// The answer in one piece.
    pub(crate) fn whole(self) -> Vec<u8> {
        let mut out = Vec::new();
        match self.shape {
            Shape::Chat => {
                let choices: Vec<ChatChoice> = (0..self.choices.len()).map(|i| self.chat_choice(i)).collect();
                let mut object = self.object("chat.completion", &choices);
                object.usage = Some(self.usage.into());
                object.prompt_token_ids = self.params.return_token_ids.then_some(&*self.prompts[0]);
                object.prompt_logprobs = self.asked_prompt_logprobs(0);
                write(&mut out, &object);
            }
            Shape::Completions { .. } => {
                let choices: Vec<_> = (0..self.choices.len()).map(|i| self.completion_choice(i)).collect();
                let mut object = self.object("text_completion", &choices);
                object.usage = Some(self.usage.into());
                write(&mut out, &object);
            }
        }
        out
    }

    /// Writes the events of a part of a streamed answer.
    pub(crate) fn stream(&mut self, part: Part, out: &mut Vec<u8>) {
        match part {
            Part::Prompt { prompt, logprobs } => self.prompt_logprobs[prompt] = logprobs,
            Part::Ended(usage) => self.usage.add(usage),
            Part::Delta { prompt, choice, generated, delta } => {
                self.choices[choice as usize].generated = generated;
                self.begin(prompt, choice, out);
                self.stream_delta(choice, &delta, out);
            }
        }
    }

    /// The last events of a stream that went well.
    pub(crate) fn finish(&mut self, out: &mut Vec<u8>) {
        if self.params.include_usage {
            let head = self.head(None);
            let usage = Some(self.usage.into());
            match self.shape {
                Shape::Chat => head.event(out, &Object { usage, ..self.object::<ChatChoice>(CHAT_CHUNK, &[]) }),
                Shape::Completions { .. } => {
                    head.event(out, &Object { usage, ..self.object::<CompletionChoice>(COMPLETION_CHUNK, &[]) });
                }
            }
        }
        if self.head(None).begin(out) {
            out.extend_from_slice(DONE);
        }
    }

    fn begin(&mut self, prompt: usize, choice: u32, out: &mut Vec<u8>) {
        // Told once; by the same choice whichever gateway tells it.
        let first = match self.ids {
            Some(_) => choice == 0,
            None => !self.choices.iter().any(|c| c.begun),
        };
        if std::mem::replace(&mut self.choices[choice as usize].begun, true) {
            return;
        }
        match self.shape {
            Shape::Chat => {
                let head = self.head(Some(choice));
                let delta = Some(Message { role: Some("assistant"), content: Some("") });
                let end = End::new(None, None);
                let choice = ChatChoice { index: choice, delta, message: None, logprobs: None, end };
                let ids = (first && self.params.return_token_ids).then_some(&*self.prompts[prompt]);
                let object = self.object(CHAT_CHUNK, std::slice::from_ref(&choice));
                head.event(out, &Object { prompt_token_ids: ids, usage: self.running_usage(), ..object });
            }
            Shape::Completions { echo } if echo || self.params.return_token_ids => self.begin_completion(choice, out),
            Shape::Completions { .. } => {}
        }
    }

    /// The prompt, echoed before the first token of a choice.
    fn begin_completion(&mut self, choice: u32, out: &mut Vec<u8>) {
        let head = self.head(Some(choice));
        let (text, logprobs, offset) = self.echo(choice as usize);
        self.choices[choice as usize].offset = offset;
        let choice = CompletionChoice {
            index: choice,
            text: text.into(),
            logprobs,
            end: End::new(None, self.params.return_token_ids.then(Vec::new)),
            prompt_token_ids: self.prompt_token_ids(choice as usize),
            prompt_logprobs: None,
        };
        let object = self.object(COMPLETION_CHUNK, std::slice::from_ref(&choice));
        head.event(out, &Object { usage: self.running_usage(), ..object });
    }

    fn stream_delta(&mut self, choice: u32, delta: &Delta, out: &mut Vec<u8>) {
        let reports = self.params.logprobs.is_some() || self.params.return_token_ids;
        let content = !delta.text.is_empty() || reports && !delta.pieces.is_empty();
        if content {
            self.stream_chunk(choice, &delta.text, &delta.pieces, None, out);
        }
        if let Some(ending) = &delta.ending {
            self.stream_chunk(choice, "", &[], Some(ending), out);
        }
    }

    fn stream_chunk(
        &mut self,
        index: u32,
        text: &str,
        pieces: &[SampledToken],
        ending: Option<&Ending>,
        out: &mut Vec<u8>,
    ) {
        let head = self.head(Some(index));
        let logprobs = self.params.logprobs.is_some() && ending.is_none();
        let ids = || pieces.iter().map(|p| p.id).collect();
        let end = End::new(ending, self.params.return_token_ids.then(ids));
        let usage = self.running_usage();
        if self.shape == Shape::Chat {
            let content = ending.is_none().then_some(text);
            let logprobs = logprobs.then(|| ChatLogprobs::new(&self.model.vocabulary, pieces));
            let delta = Some(Message { role: None, content });
            let choice = ChatChoice { index, delta, message: None, logprobs, end };
            return head.event(out, &Object { usage, ..self.object(CHAT_CHUNK, std::slice::from_ref(&choice)) });
        }
        let mut offset = self.choices[index as usize].offset;
        let logprobs = logprobs.then(|| self.completion_logprobs(CompletionLogprobs::default(), pieces, &mut offset));
        self.choices[index as usize].offset = offset;
        let (prompt_token_ids, prompt_logprobs) = (None, None);
        let choice = CompletionChoice { index, text: text.into(), logprobs, end, prompt_token_ids, prompt_logprobs };
        head.event(out, &Object { usage, ..self.object(COMPLETION_CHUNK, std::slice::from_ref(&choice)) });
    }

    fn object<'a, C>(&'a self, object: &'static str, choices: &'a [C]) -> Object<'a, C> {
        Object {
            id: &self.envelope.id,
            object,
            created: self.envelope.created,
            model: &self.envelope.model,
            system_fingerprint: &self.model.numerics,
            choices,
            usage: None,
            prompt_logprobs: None,
            prompt_token_ids: None,
        }
    }

    /// `continuous_usage_stats`: the counts so far on every chunk.
    fn running_usage(&self) -> Option<UsageReply> {
        let prompt_tokens = self.prompts.iter().map(|p| p.len() as u64).sum();
        let generated_tokens = self.choices.iter().map(|c| u64::from(c.generated)).sum();
        let usage = Usage { prompt_tokens, cached_tokens: self.usage.cached_tokens, generated_tokens };
        (self.params.include_usage && self.params.continuous_usage).then(|| usage.into())
    }

    fn prompt_of(&self, choice: usize) -> usize {
        choice / self.params.choices as usize
    }

    fn chat_choice(&self, index: usize) -> ChatChoice<'_> {
        let choice = &self.choices[index];
        let ids = || choice.pieces.iter().map(|p| p.id).collect();
        let logprobs = || ChatLogprobs::new(&self.model.vocabulary, &choice.pieces);
        ChatChoice {
            index: index as u32,
            delta: None,
            message: Some(Message { role: Some("assistant"), content: Some(&choice.text) }),
            logprobs: self.params.logprobs.map(|_| logprobs()),
            end: End::new(choice.ending.as_ref(), self.params.return_token_ids.then(ids)),
        }
    }

    fn completion_choice(&self, index: usize) -> CompletionChoice<'_> {
        let choice = &self.choices[index];
        let ids = || choice.pieces.iter().map(|p| p.id).collect();
        let (echo, logprobs, mut offset) = self.echo(index);
        let text = if echo.is_empty() { Cow::Borrowed(choice.text.as_str()) } else { (echo + &choice.text).into() };
        CompletionChoice {
            index: index as u32,
            text,
            logprobs: logprobs.map(|l| self.completion_logprobs(l, &choice.pieces, &mut offset)),
            end: End::new(choice.ending.as_ref(), self.params.return_token_ids.then(ids)),
            prompt_token_ids: self.prompt_token_ids(index),
            prompt_logprobs: self.asked_prompt_logprobs(self.prompt_of(index)),
        }
    }

    /// What `echo` puts before a choice: the prompt's text and log-probabilities, and its length in characters. Without
    /// `echo` they are empty.
    fn echo(&self, index: usize) -> (String, Option<CompletionLogprobs>, usize) {
        let (mut logprobs, mut offset) = (self.params.logprobs.map(|_| CompletionLogprobs::default()), 0);
        if self.shape != (Shape::Completions { echo: true }) {
            return (String::new(), logprobs, offset);
        }
        let prompt = self.prompt_of(index);
        let known = &self.prompt_logprobs[prompt];
        for (i, &id) in self.prompts[prompt].iter().enumerate() {
            let token = known.get(i).and_then(Option::as_ref);
            logprobs.iter_mut().for_each(|l| l.push_prompt(&self.model.vocabulary, id, token, &mut offset));
        }
        (self.model.vocabulary.decode(&self.prompts[prompt], self.params.skip_special), logprobs, offset)
    }

    fn completion_logprobs(
        &self,
        mut logprobs: CompletionLogprobs,
        pieces: &[SampledToken],
        offset: &mut usize,
    ) -> CompletionLogprobs {
        pieces.iter().for_each(|piece| logprobs.push(&self.model.vocabulary, piece, offset));
        logprobs
    }

    fn prompt_token_ids(&self, index: usize) -> Option<&[u32]> {
        self.params.return_token_ids.then(|| &*self.prompts[self.prompt_of(index)])
    }

    fn asked_prompt_logprobs(&self, prompt: usize) -> Option<Vec<Option<PromptPosition>>> {
        self.params.prompt_logprobs?;
        Some(prompt_positions(&self.model.vocabulary, &self.prompt_logprobs[prompt]))
    }
}

const CHAT_CHUNK: &str = "chat.completion.chunk";
const COMPLETION_CHUNK: &str = "text_completion";
const DONE: &[u8] = b"data: [DONE]\n\n";

impl Head {
    /// Writes what stands before the data; false when nothing is to be written.
    fn begin(&self, out: &mut Vec<u8>) -> bool {
        if let Head::Id(id) = self {
            out.extend_from_slice(format!("id: {id}\n").as_bytes());
        }
        !matches!(self, Head::Known)
    }

    fn event(&self, out: &mut Vec<u8>, value: &impl Serialize) {
        if self.begin(out) {
            event(out, value);
        }
    }
}

/// The last events of a stream that failed after it had begun.
pub(crate) fn stream_error(body: &serde_json::Value, out: &mut Vec<u8>) {
    event(out, body);
    out.extend_from_slice(DONE);
}

fn event(out: &mut Vec<u8>, value: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    write(out, value);
    out.extend_from_slice(b"\n\n");
}

fn write(out: &mut Vec<u8>, value: &impl Serialize) {
    serde_json::to_writer(out, value).expect("numbers, texts and maps with text keys always serialize");
}
