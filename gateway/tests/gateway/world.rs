//! A cluster of fakes in this process: one coordinator that assigns by list, decode workers that "generate" a text
//! given by the test, one byte per token.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use baton_core::{Env, Net, Rng, SystemClock};
use baton_gateway::{Config, Running};
use baton_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use baton_proto::v1::decode_server::{Decode, DecodeServer};
use baton_proto::v1::request_output::Output;
use baton_proto::v1::worker_server::{Worker, WorkerServer};
use baton_proto::v1::*;
use baton_proto::{TcpNet, v1};
use futures::{Stream, StreamExt};
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tonic::{Request, Response, Status, Streaming};

pub(crate) const EOS: u32 = 256;
pub(crate) const VOCAB: u32 = 259;
pub(crate) const POSITIONS_MAX: u64 = 512;
pub(crate) const MODEL: &str = "tiny";

type Answer<T> = Result<Response<T>, Status>;
type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

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
    pub abort: Option<&'static str>,
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

/// What the fakes have seen.
#[derive(Default)]
pub(crate) struct Seen {
    pub assigns: Vec<AssignRequest>,
    pub finishes: Vec<FinishedRequest>,
    pub starts: Vec<(String, Start)>,
    pub cancels: Vec<String>,
    pub registered: Vec<Member>,
    pub heartbeats: usize,
}

struct FakeCoordinator {
    seen: Arc<watch::Sender<Seen>>,
    view: watch::Sender<ClusterView>,
    /// Answers to Assign before the workers are given out.
    refusals: Mutex<Vec<Refusal>>,
    epoch: AtomicUsize,
}

struct CoordinatorService(Arc<FakeCoordinator>);

#[tonic::async_trait]
impl Coordinator for CoordinatorService {
    async fn register(&self, request: Request<RegisterRequest>) -> Answer<RegisterReply> {
        let member = request.into_inner().member.unwrap_or_default();
        self.0.seen.send_modify(|seen| seen.registered.push(member));
        let registered = Registered { incarnation: 7, heartbeat_ms: 250, ..Default::default() };
        Ok(Response::new(RegisterReply { outcome: Some(register_reply::Outcome::Registered(registered)) }))
    }

    async fn heartbeat(&self, _: Request<HeartbeatRequest>) -> Answer<HeartbeatReply> {
        self.0.seen.send_modify(|seen| seen.heartbeats += 1);
        let accepted = HeartbeatAccepted { leader: true, ..Default::default() };
        Ok(Response::new(HeartbeatReply { outcome: Some(heartbeat_reply::Outcome::Accepted(accepted)) }))
    }

    async fn leave(&self, _: Request<LeaveRequest>) -> Answer<LeaveReply> {
        Ok(Response::new(LeaveReply {}))
    }

    async fn assign(&self, request: Request<AssignRequest>) -> Answer<AssignReply> {
        let request = request.into_inner();
        let outcome = self.0.assign_outcome(&request);
        self.0.seen.send_modify(|seen| seen.assigns.push(request));
        Ok(Response::new(AssignReply { outcome: Some(outcome) }))
    }

    async fn finish(&self, request: Request<FinishRequest>) -> Answer<FinishReply> {
        self.0.seen.send_modify(|seen| seen.finishes.extend(request.into_inner().requests));
        Ok(Response::new(FinishReply { outcome: Some(finish_reply::Outcome::Finished(Finished {})) }))
    }

    type AssignmentsStream = Events<baton_proto::v1::AssignedBatch>;

    async fn assignments(
        &self,
        _: Request<tonic::Streaming<baton_proto::v1::AssignBatch>>,
    ) -> Answer<Self::AssignmentsStream> {
        Err(tonic::Status::unimplemented("not yet"))
    }

    async fn locate(&self, _: Request<baton_proto::v1::LocateRequest>) -> Answer<baton_proto::v1::LocateReply> {
        Err(tonic::Status::unimplemented("not yet"))
    }

    type WatchAccessStream = Events<baton_proto::v1::Access>;

    async fn watch_access(&self, _: Request<WatchRequest>) -> Answer<Self::WatchAccessStream> {
        Err(tonic::Status::unimplemented("not yet"))
    }

    type WatchStream = Events<ClusterView>;

    async fn watch(&self, _: Request<WatchRequest>) -> Answer<Self::WatchStream> {
        Ok(Response::new(WatchStream::new(self.0.view.subscribe()).map(Ok).boxed()))
    }
}

impl FakeCoordinator {
    fn assign_outcome(&self, request: &AssignRequest) -> assign_reply::Outcome {
        if let Some(refusal) = self.refusals.lock().unwrap().pop() {
            return assign_reply::Outcome::Refused(refusal);
        }
        let view = self.view.borrow();
        let excluded = |m: &Member| request.exclude.iter().any(|e| e.id == m.id && e.incarnation == m.incarnation);
        let live = view.members.iter().filter(|m| m.live).filter_map(|m| m.member.as_ref());
        let Some(worker) = live.into_iter().find(|m| m.role() == Role::Decode && !excluded(m)) else {
            return assign_reply::Outcome::Refused(Refusal { reason: "no_workers".into(), ..Default::default() });
        };
        assign_reply::Outcome::Assignment(Assignment {
            request: request.request.clone(),
            attempt: request.attempt,
            epoch: self.epoch.fetch_add(1, Ordering::Relaxed) as u64 + 1,
            decode: Some(Place {
                worker: worker.id.clone(),
                incarnation: worker.incarnation,
                address: worker.address.clone(),
            }),
            prefill: None,
            lease_ms: 10_000,
            explanation: "first".into(),
        })
    }
}

struct FakeWorker {
    id: String,
    seen: Arc<watch::Sender<Seen>>,
    script: Mutex<Script>,
    generated: AtomicUsize,
    killed: watch::Sender<bool>,
}

#[derive(Clone)]
struct WorkerService(Arc<FakeWorker>);

#[tonic::async_trait]
impl Worker for WorkerService {
    async fn card(&self, _: Request<CardRequest>) -> Answer<ModelCard> {
        Ok(Response::new(card()))
    }
}

#[tonic::async_trait]
impl Decode for WorkerService {
    type GenerateStream = Events<StepOutput>;

    async fn generate(&self, commands: Request<Streaming<GenerateCommand>>) -> Answer<Self::GenerateStream> {
        let (steps, outgoing) = mpsc::channel(64);
        tokio::spawn(self.0.clone().work(commands.into_inner(), steps));
        Ok(Response::new(ReceiverStream::new(outgoing).boxed()))
    }
}

impl FakeWorker {
    /// The life of one stream: ends when the gateway closes it, or when the worker is lost.
    async fn work(
        self: Arc<FakeWorker>,
        mut commands: Streaming<GenerateCommand>,
        steps: mpsc::Sender<Result<StepOutput, Status>>,
    ) {
        let mut killed = self.killed.subscribe();
        let mut requests = JoinSet::new();
        let mut cancels = BTreeMap::new();
        loop {
            let command = tokio::select! {
                command = commands.message() => command,
                _ = killed.wait_for(|k| *k) => return,
            };
            let Ok(Some(command)) = command else { return };
            match command.command {
                Some(generate_command::Command::Start(start)) => {
                    self.seen.send_modify(|seen| seen.starts.push((self.id.clone(), start.clone())));
                    cancels.insert(start.handle, requests.spawn(self.clone().generate(start, steps.clone())));
                }
                Some(generate_command::Command::Cancel(cancel)) => {
                    self.seen.send_modify(|seen| seen.cancels.push(self.id.clone()));
                    cancels.remove(&cancel.handle).iter().for_each(tokio::task::AbortHandle::abort);
                }
                Some(generate_command::Command::Resume(_)) | None => {}
            }
        }
    }

    async fn generate(self: Arc<FakeWorker>, start: Start, steps: mpsc::Sender<Result<StepOutput, Status>>) {
        let script = self.script.lock().unwrap().clone();
        let handle = start.handle;
        let send = async |output| {
            let outputs = vec![RequestOutput { handle, output: Some(output) }];
            steps.send(Ok(StepOutput { outputs })).await.is_ok()
        };
        if let Some(reason) = script.refuse {
            send(Output::Refused(Refusal { reason: reason.into(), ..Default::default() })).await;
            return;
        }
        if let Some(reason) = script.abort {
            send(Output::Aborted(Abort { reason: reason.into(), ..Default::default() })).await;
            return;
        }
        send(Output::Admitted(Admitted { cached_tokens: 3, ..Default::default() })).await;
        let request = start.request.clone().unwrap();
        if let Some(top) = request.prompt_logprobs {
            send(Output::PromptLogprobs(prompt_logprobs(&request.prompt, top))).await;
        }
        let mut open: Vec<(u32, usize)> = start.choices.iter().map(|c| (c.index, c.so_far.len())).collect();
        while !open.is_empty() {
            for (choice, position) in std::mem::take(&mut open) {
                let (tokens, finished) = next(&script, &request, choice, position);
                let count = tokens.len();
                if !send(Output::Tokens(Tokens { choice, tokens })).await {
                    return;
                }
                let total = self.generated.fetch_add(count, Ordering::Relaxed) + count;
                if script.lose_after.is_some_and(|limit| total >= limit) {
                    self.killed.send_replace(true);
                    return;
                }
                if script.pause_after.is_some_and(|limit| position + count >= limit) {
                    return std::future::pending().await;
                }
                match finished {
                    Some(finished) => drop(send(Output::Finished(finished)).await),
                    None => open.push((choice, position + count)),
                }
            }
        }
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

/// A gateway among fakes.
pub(crate) struct World {
    pub gateway: Running,
    pub seen: watch::Receiver<Seen>,
    coordinator: Arc<FakeCoordinator>,
    workers: Vec<Arc<FakeWorker>>,
    _tasks: JoinSet<()>,
}

impl World {
    /// As many decode workers as scripts; ready when the gateway is healthy.
    pub(crate) async fn new(scripts: Vec<Script>) -> World {
        World::with(scripts, |_| {}).await
    }

    pub(crate) async fn with(scripts: Vec<Script>, configure: impl FnOnce(&mut Config)) -> World {
        let (seen_sender, seen) = watch::channel(Seen::default());
        let seen_sender = Arc::new(seen_sender);
        let mut tasks = JoinSet::new();
        let mut workers = Vec::new();
        let mut members = Vec::new();
        for (i, script) in scripts.into_iter().enumerate() {
            let id = format!("decode-{i}");
            let worker = Arc::new(FakeWorker {
                id: id.clone(),
                seen: seen_sender.clone(),
                script: Mutex::new(script),
                generated: AtomicUsize::new(0),
                killed: watch::Sender::new(false),
            });
            let services = baton_proto::channel::server()
                .add_service(DecodeServer::new(WorkerService(worker.clone())))
                .add_service(WorkerServer::new(WorkerService(worker.clone())));
            members.push(member(&id, serve(services, &mut tasks).await));
            workers.push(worker);
        }
        let view = ClusterView { cluster: "test".into(), node: 1, leader: 1, members, ..Default::default() };
        let coordinator = Arc::new(FakeCoordinator {
            seen: seen_sender,
            view: watch::Sender::new(view),
            refusals: Mutex::new(Vec::new()),
            epoch: AtomicUsize::new(0),
        });
        let services =
            baton_proto::channel::server().add_service(CoordinatorServer::new(CoordinatorService(coordinator.clone())));
        let address = serve(services, &mut tasks).await;
        let mut config = Config::new("gateway-0", "127.0.0.1:0", vec![address]);
        configure(&mut config);
        let env = Env { net: Arc::new(TcpNet), clock: Arc::new(SystemClock), rng: Rng::new(1) };
        let gateway = baton_gateway::start(config, env, Arc::new(|| "metrics here\n".to_string())).await.unwrap();
        let world = World { gateway, seen, coordinator, workers, _tasks: tasks };
        if !world.workers.is_empty() {
            world.healthy().await;
        }
        world
    }

    /// One worker that says "Hello world".
    pub(crate) async fn hello() -> World {
        World::new(vec![Script::default()]).await
    }

    /// One worker that generates `text`.
    pub(crate) async fn says(text: &str) -> World {
        World::new(vec![Script { texts: vec![text.as_bytes().to_vec()], ..Script::default() }]).await
    }

    pub(crate) fn address(&self) -> String {
        self.gateway.address()
    }

    /// What the next Assign calls are answered, the last one first.
    pub(crate) fn refuse_assigns(&self, reasons: &[&str]) {
        let refusal =
            |reason: &&str| Refusal { reason: reason.to_string(), retry_after_ms: 1500, ..Default::default() };
        self.coordinator.refusals.lock().unwrap().extend(reasons.iter().map(refusal));
    }

    pub(crate) fn change_view(&self, change: impl FnOnce(&mut ClusterView)) {
        self.coordinator.view.send_modify(change);
    }

    pub(crate) fn set_script(&self, worker: usize, script: Script) {
        *self.workers[worker].script.lock().unwrap() = script;
    }

    /// Waits until what the fakes have seen satisfies a condition.
    pub(crate) async fn until(&self, condition: impl FnMut(&Seen) -> bool) {
        self.seen.clone().wait_for(condition).await.unwrap();
    }

    async fn healthy(&self) {
        while crate::client::get(&self.address(), "/health").await.status != 200 {
            tokio::task::yield_now().await;
        }
    }
}

fn member(id: &str, address: String) -> MemberView {
    let model = ModelSummary { name: MODEL.into(), card_hash: "card-1".into(), ..Default::default() };
    let member = Member {
        id: id.into(),
        role: Role::Decode.into(),
        address,
        incarnation: 1,
        model: Some(model),
        ..Default::default()
    };
    MemberView { member: Some(member), live: true, ..Default::default() }
}

async fn serve(services: tonic::transport::server::Router, tasks: &mut JoinSet<()>) -> String {
    let listener = TcpNet.listen("127.0.0.1:0").await.unwrap();
    let address = listener.address();
    tasks.spawn(async move {
        services.serve_with_incoming(Box::pin(baton_proto::incoming(listener))).await.unwrap();
    });
    address
}
