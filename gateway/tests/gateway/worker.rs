//! A decode worker that "generates" a text given by the test, one byte per token. What a resumable request was told is
//! kept when its gateway goes away.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use baton_proto::v1;
use baton_proto::v1::decode_server::Decode;
use baton_proto::v1::generate_command::Command;
use baton_proto::v1::request_output::Output;
use baton_proto::v1::worker_server::Worker;
use baton_proto::v1::*;
use futures::{Stream, StreamExt};
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::world::Seen;

pub(crate) const EOS: u32 = 256;
const VOCAB: u32 = 259;
pub(crate) const POSITIONS_MAX: u64 = 512;
pub(crate) const MODEL: &str = "tiny";

pub(crate) type Answer<T> = Result<Response<T>, Status>;
pub(crate) type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
type Steps = mpsc::Sender<Result<StepOutput, Status>>;

/// A byte-level tokenizer whose token ids are the bytes, with an end token and two role tokens.
pub(crate) fn tokenizer_json() -> String {
    let printable = |b: u32| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = 0x100..;
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u32 {
        let code = if printable(byte) { byte } else { others.next().unwrap() };
        vocab.insert(char::from_u32(code).unwrap().to_string(), byte.into());
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(EOS, "<|end|>"), special(257, "<|user|>"), special(258, "<|assistant|>")],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    })
    .to_string()
}

const TEMPLATE: &str = "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}\
    {{ raise_exception('unknown role ' + m.role) }}{% endif %}<|{{ m.role }}|>{{ m.content }}{% endfor %}\
    {% if add_generation_prompt %}<|assistant|>{% endif %}";

fn card() -> ModelCard {
    ModelCard {
        name: MODEL.into(),
        hash: "card-1".into(),
        tokenizer_json: tokenizer_json().into(),
        chat_template: TEMPLATE.into(),
        eos: vec![EOS],
        positions_max: POSITIONS_MAX,
        block_tokens: 16,
        vocab: u64::from(VOCAB),
        numerics: "weights-f32acc-bf16".into(),
        eos_token: "<|end|>".into(),
        tokenizer_config_json: json!({"eos_token": "<|end|>", "pad_token": null}).to_string(),
        ..Default::default()
    }
}

/// What a fake worker does with requests.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    /// The text of choice `i` is `texts[i % len]`; an end token follows.
    pub texts: Vec<Vec<u8>>,
    pub tokens_per_step: usize,
    /// After so many tokens in its life the worker stops mid-stream.
    pub lose_after: Option<usize>,
    /// After so many tokens of a request nothing more comes.
    pub pause_after: Option<usize>,
    /// The text begins again for ever.
    pub endless: bool,
    pub refuse: Option<&'static str>,
    pub abort: Option<Abort>,
}

impl Default for Script {
    fn default() -> Script {
        Script {
            texts: vec![b"Hello world".to_vec()],
            tokens_per_step: 1,
            lose_after: None,
            pause_after: None,
            endless: false,
            refuse: None,
            abort: None,
        }
    }
}

impl Script {
    pub(crate) fn aborting(reason: &str) -> Script {
        Script { abort: Some(Abort { reason: reason.into(), ..Default::default() }), ..Script::default() }
    }
}

/// A decode worker that has no model.
pub(crate) struct FakeWorker {
    pub id: String,
    pub seen: Arc<watch::Sender<Seen>>,
    pub script: watch::Sender<Script>,
    pub generated: AtomicUsize,
    /// It has ended its streams in good order.
    pub left: watch::Sender<bool>,
    /// Its connections are broken, as when its process is killed.
    pub died: watch::Sender<bool>,
    /// Resumable requests, by name.
    kept: Mutex<BTreeMap<String, Arc<Kept>>>,
    tasks: Mutex<JoinSet<()>>,
}

/// A request, what has been said about it, and who listens.
struct Kept {
    start: Start,
    state: Mutex<Told>,
}

#[derive(Default)]
struct Told {
    said: Resumed,
    listener: Option<(u32, Steps)>,
    /// Choices that need no more tokens.
    cancelled: Vec<u32>,
}

#[derive(Clone)]
pub(crate) struct WorkerService(pub Arc<FakeWorker>);

#[tonic::async_trait]
impl Worker for WorkerService {
    async fn card(&self, _: Request<CardRequest>) -> Answer<ModelCard> {
        Ok(Response::new(card()))
    }

    async fn lend(&self, _: Request<LendRequest>) -> Answer<LendReply> {
        Err(Status::unimplemented("gateways do not ask for blocks"))
    }
}

#[tonic::async_trait]
impl Decode for WorkerService {
    type GenerateStream = Events<StepOutput>;

    async fn generate(&self, commands: Request<Streaming<GenerateCommand>>) -> Answer<Self::GenerateStream> {
        let (steps, outgoing) = mpsc::channel(64);
        let stream = self.0.clone().stream(commands.into_inner(), steps);
        self.0.tasks.lock().unwrap().spawn(stream);
        Ok(Response::new(ReceiverStream::new(outgoing).boxed()))
    }
}

impl FakeWorker {
    pub(crate) fn new(id: &str, seen: Arc<watch::Sender<Seen>>, script: Script) -> FakeWorker {
        FakeWorker {
            id: id.into(),
            seen,
            script: watch::Sender::new(script),
            generated: AtomicUsize::new(0),
            left: watch::Sender::new(false),
            died: watch::Sender::new(false),
            kept: Mutex::default(),
            tasks: Mutex::default(),
        }
    }

    /// The life of one stream: ends when the gateway closes it, or when the worker is lost.
    async fn stream(self: Arc<FakeWorker>, mut commands: Streaming<GenerateCommand>, steps: Steps) {
        let mut left = self.left.subscribe();
        let mut requests = JoinSet::new();
        let mut open = BTreeMap::<u32, (Arc<Kept>, Option<AbortHandle>)>::new();
        loop {
            let command = tokio::select! {
                command = commands.message() => command,
                _ = left.wait_for(|left| *left) => break,
            };
            let Ok(Some(GenerateCommand { command: Some(command) })) = command else { break };
            match command {
                Command::Start(start) => {
                    self.seen.send_modify(|seen| seen.starts.push((self.id.clone(), start.clone())));
                    let (handle, kept) = (start.handle, Arc::new(Kept::new(start, steps.clone())));
                    let task = match kept.start.resumable_ms {
                        0 => Some(requests.spawn(self.clone().generate(kept.clone()))),
                        _ => {
                            let name = kept.start.request.as_ref().unwrap().id.clone();
                            self.kept.lock().unwrap().insert(name, kept.clone());
                            self.tasks.lock().unwrap().spawn(self.clone().generate(kept.clone()));
                            None
                        }
                    };
                    open.insert(handle, (kept, task));
                }
                Command::Cancel(cancel) => {
                    self.seen.send_modify(|seen| seen.cancels.push((self.id.clone(), cancel.choices.clone())));
                    let Some((kept, task)) = open.get(&cancel.handle) else { continue };
                    kept.state.lock().unwrap().cancelled.extend(&cancel.choices);
                    if cancel.choices.is_empty() {
                        kept.state.lock().unwrap().cancelled.extend(0..16);
                        task.iter().for_each(AbortHandle::abort);
                    }
                }
                Command::Resume(resume) => {
                    self.seen.send_modify(|seen| seen.resumes.push(resume.clone()));
                    let kept = self.kept.lock().unwrap().get(&resume.request).cloned();
                    let kept = kept.filter(|kept| kept.start.request.as_ref().unwrap().tenant == resume.tenant);
                    match kept {
                        Some(kept) => {
                            kept.resume(resume.handle, &steps).await;
                            open.insert(resume.handle, (kept, None));
                        }
                        None => {
                            let refusal = Refusal { reason: "unknown".into(), ..Default::default() };
                            let outputs =
                                vec![RequestOutput { handle: resume.handle, output: Some(Output::Refused(refusal)) }];
                            let _ = steps.send(Ok(StepOutput { outputs })).await;
                        }
                    }
                }
            }
        }
        // Whoever has taken a request over meanwhile listens on.
        for (handle, (kept, _)) in open {
            let mut told = kept.state.lock().unwrap();
            if told.listener.as_ref().is_some_and(|(h, s)| *h == handle && s.same_channel(&steps)) {
                told.listener = None;
            }
        }
        self.seen.send_modify(|seen| seen.streams_ended += 1);
    }

    async fn generate(self: Arc<FakeWorker>, kept: Arc<Kept>) {
        let start = kept.start.clone();
        let script = self.script.borrow().clone();
        if let Some(reason) = script.refuse {
            kept.say(Output::Refused(Refusal { reason: reason.into(), ..Default::default() })).await;
            return;
        }
        if let Some(abort) = script.abort {
            kept.say(Output::Aborted(abort)).await;
            return;
        }
        kept.say(Output::Admitted(Admitted { cached_tokens: 3, ..Default::default() })).await;
        let request = start.request.clone().unwrap();
        if let Some(top) = request.prompt_logprobs {
            kept.say(Output::PromptLogprobs(prompt_logprobs(&request.prompt, top))).await;
        }
        let mut open: Vec<(u32, usize)> = start.choices.iter().map(|c| (c.index, c.so_far.len())).collect();
        while !open.is_empty() {
            for (choice, position) in std::mem::take(&mut open) {
                if kept.state.lock().unwrap().cancelled.contains(&choice) {
                    continue;
                }
                let (tokens, finished) = next(&script, &request, choice, position);
                let count = tokens.len();
                kept.say(Output::Tokens(Tokens { choice, tokens })).await;
                let total = self.generated.fetch_add(count, Ordering::Relaxed) + count;
                self.seen.send_modify(|seen| seen.generated += count);
                if script.lose_after.is_some_and(|limit| total >= limit) {
                    self.left.send_replace(true);
                    return;
                }
                if script.pause_after.is_some_and(|limit| position + count >= limit) {
                    self.resumed(position + count).await;
                }
                match finished {
                    Some(finished) => kept.say(Output::Finished(finished)).await,
                    None => open.push((choice, position + count)),
                }
            }
        }
    }

    /// Waits until the script lets a request go on behind `position`.
    async fn resumed(&self, position: usize) {
        let goes_on = |script: &Script| script.pause_after.is_none_or(|limit| position < limit);
        let _ = self.script.subscribe().wait_for(goes_on).await;
    }
}

impl Kept {
    fn new(start: Start, steps: Steps) -> Kept {
        let said = Resumed {
            assignment: start.assignment.clone(),
            request: start.request.clone(),
            note: start.note.clone(),
            choices: start.choices.clone(),
            ..Resumed::default()
        };
        let listener = Some((start.handle, steps));
        Kept { start, state: Mutex::new(Told { said, listener, cancelled: Vec::new() }) }
    }

    async fn say(&self, output: Output) {
        let listener = {
            let mut told = self.state.lock().unwrap();
            note(&mut told.said, output.clone());
            told.listener.clone()
        };
        if let Some((handle, steps)) = listener {
            let outputs = vec![RequestOutput { handle, output: Some(output) }];
            let _ = steps.send(Ok(StepOutput { outputs })).await;
        }
    }

    /// Everything so far, and from here on the rest.
    async fn resume(&self, handle: u32, steps: &Steps) {
        let permit = steps.reserve().await.unwrap();
        let mut told = self.state.lock().unwrap();
        told.listener = Some((handle, steps.clone()));
        let output = Some(Output::Resumed(told.said.clone()));
        permit.send(Ok(StepOutput { outputs: vec![RequestOutput { handle, output }] }));
    }
}

fn note(said: &mut Resumed, output: Output) {
    match output {
        Output::Admitted(admitted) => said.admitted = Some(admitted),
        Output::PromptLogprobs(logprobs) => said.prompt_logprobs = Some(logprobs),
        Output::Finished(finished) => said.finished.push(finished),
        Output::Tokens(tokens) => match said.tokens.iter_mut().find(|t| t.choice == tokens.choice) {
            Some(known) => known.tokens.extend(tokens.tokens),
            None => said.tokens.push(tokens),
        },
        Output::Aborted(_) | Output::Refused(_) | Output::Resumed(_) => {}
    }
}

/// The tokens of one step of one choice, and its end.
fn next(script: &Script, request: &v1::Request, choice: u32, position: usize) -> (Vec<Token>, Option<ChoiceFinished>) {
    let text = &script.texts[choice as usize % script.texts.len()];
    let mut tokens = Vec::new();
    for at in position..position + script.tokens_per_step {
        let byte = if script.endless { Some(&text[at % text.len()]) } else { text.get(at) };
        let id = byte.map_or(EOS, |b| u32::from(*b));
        tokens.push(token(id, at, request.logprobs.unwrap_or(0)));
        let reason = if id == EOS && !request.ignore_eos {
            "eos"
        } else if request.stop_tokens.contains(&id) {
            "stop_token"
        } else if at + 1 == request.tokens_max as usize {
            "length"
        } else {
            continue;
        };
        let finished = ChoiceFinished {
            choice,
            reason: reason.into(),
            stop_token: id,
            prompt_tokens: request.prompt.len() as u64,
            cached_tokens: 3,
            generated_tokens: at as u64 + 1,
        };
        return (tokens, Some(finished));
    }
    (tokens, None)
}

/// A token with a log-probability that tells its position, and `top` alternatives of which it is the first.
fn token(id: u32, position: usize, top: u32) -> Token {
    let logprob = -0.25 - position as f32 * 0.125;
    let top = (0..top).map(|i| TokenLogprob { id: (id + i) % VOCAB, logprob: logprob - i as f32 });
    Token { id, logprob, top: top.collect() }
}

fn prompt_logprobs(prompt: &[u32], top: u32) -> PromptLogprobs {
    let position = |(i, &id): (usize, &u32)| PromptLogprob { token: (i > 0).then(|| token(id, i, top)) };
    PromptLogprobs { tokens: prompt.iter().enumerate().map(position).collect() }
}
