//! A prefill worker and a decode worker that this process runs, and a client of the decode worker.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_core::arena::DeviceBlocks;
use baton_core::limits::{AUTONOMY_GRACE_MS, DRAIN_MS, KV_AUDIT, WORKER_QUEUE_MAX};
use baton_core::{
    Arena, Assignment, Env, Epoch, Lane, Net, Place, Process, Request, RequestId, Rng, Role, Sampling, SystemClock,
    TokenId, WorkerId,
};
use baton_engine::{Backend, Batch, EngineConfig, Output};
use baton_proto::TcpNet;
use baton_proto::v1::decode_client::DecodeClient;
use baton_proto::v1::generate_command::Command;
use baton_proto::v1::request_output::Output as Said;
use baton_proto::v1::{Admitted, GenerateCommand, Start, StepOutput};
use baton_worker::testing::FakeCoordinator;
use baton_worker::{Config, KvLink, LoadedModel, Running};
use futures::channel::mpsc;
use tokio::runtime::Runtime;
use tokio::time::{Instant, sleep, timeout};
use tonic::Streaming;

use super::BATCH_TOKENS;
use crate::exit::Failure;

/// How long one request may take.
const DEADLINE: Duration = Duration::from_secs(120);
/// Sequences whose blocks a cache holds.
const SEQUENCES: usize = 4;

pub(super) struct Pair {
    net: Arc<dyn Net>,
    prefill: Worker,
    decode: Worker,
    _coordinator: FakeCoordinator,
}

/// A worker on a runtime of its own, as a process has it.
struct Worker {
    running: Running,
    steps: Steps,
    runtime: Option<Runtime>,
}

/// When a worker's engine computed.
#[derive(Clone, Default)]
struct Steps(Arc<Mutex<Times>>);

#[derive(Default)]
struct Times {
    /// The first step since the last look.
    began: Option<Instant>,
    /// The last one.
    ended: Option<Instant>,
}

/// One request.
pub(super) struct Order {
    pub(super) id: u128,
    pub(super) prompt: Vec<TokenId>,
    pub(super) tokens: u32,
}

/// Milliseconds of one request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// From the end of the prefill to the client's first token.
    pub(super) gap_ms: f64,
    /// From there to the first step of the decode worker.
    pub(super) begins_ms: f64,
    /// From the prefill's last word to the commit, as the prefill worker tells it.
    pub(super) exposed_ms: f64,
}

impl Pair {
    /// Two workers whose handoffs take `link`, with room for prompts of `longest` tokens.
    pub(super) async fn start(models: [LoadedModel; 2], link: KvLink, longest: usize) -> Result<Pair, Failure> {
        let net: Arc<dyn Net> = Arc::new(TcpNet);
        let coordinator = FakeCoordinator::start(&net).await?;
        let [to_prefill, to_decode] = models;
        let start = async |role: Role, model: LoadedModel| {
            let block_tokens = model.spec.layout.block_tokens as usize;
            let blocks = SEQUENCES * (longest + BATCH_TOKENS).div_ceil(block_tokens);
            Worker::start(&net, config(role, link, blocks, coordinator.address()), model).await
        };
        let (decode, prefill) = (start(Role::Decode, to_decode).await?, start(Role::Prefill, to_prefill).await?);
        let pair = Pair { net: net.clone(), prefill, decode, _coordinator: coordinator };
        pair.is_linked().await?;
        Ok(pair)
    }

    /// The prefill worker hears of the decode worker with a heartbeat, and connects.
    async fn is_linked(&self) -> Result<(), Failure> {
        let linked = async {
            while self.prefill.running.shell().links().counters().connected == 0 {
                sleep(Duration::from_millis(5)).await;
            }
        };
        let late = |_| Failure::refuse("the prefill worker did not connect to the decode worker");
        timeout(Duration::from_secs(10), linked).await.map_err(late)
    }

    /// Whether every handoff has gone by the link of this name.
    pub(super) fn went_by(&self, link: &str) -> bool {
        let begun = self.prefill.running.shell().links().counters().begun();
        begun.into_iter().all(|(name, count)| (count > 0) == (name == link))
    }

    pub(super) async fn connect(&self) -> Result<Client, Failure> {
        let channel = baton_proto::channel(self.net.clone(), &self.decode.running.address());
        let (commands, outgoing) = mpsc::channel(16);
        let mut client = DecodeClient::new(channel.map_err(Failure::refused)?);
        let answers = client.generate(outgoing).await.map_err(Failure::refused)?.into_inner();
        Ok(Client { commands, answers, asked: 0 })
    }
}

fn config(role: Role, link: KvLink, blocks: usize, coordinator: String) -> Config {
    Config {
        id: WorkerId(role.as_str().into()),
        role,
        listen: "127.0.0.1:0".into(),
        kv_listen: "127.0.0.1:0".into(),
        kv_advertise: None,
        kv_tickets_required: true,
        kv_link: link,
        kv_tls: None,
        advertise_host: "127.0.0.1".into(),
        coordinators: vec![coordinator],
        cluster: String::new(),
        drain_ms: DRAIN_MS,
        autonomy_ms: AUTONOMY_GRACE_MS,
        kv_pull: true,
        kv_block_tokens: None,
        kv_audit: KV_AUDIT,
        kv_host_bytes: 0,
        kv_disk: None,
        kv_disk_bytes: 0,
        engine: EngineConfig {
            blocks,
            batch_tokens_max: BATCH_TOKENS,
            sequences_max: SEQUENCES,
            queue_max: WORKER_QUEUE_MAX,
            prefix_cache: true,
            draft_tokens_max: 0,
        },
    }
}

impl Worker {
    async fn start(net: &Arc<dyn Net>, config: Config, model: LoadedModel) -> Result<Worker, Failure> {
        let (steps, role) = (Steps::default(), config.role);
        let backend = Box::new(Watched { backend: model.backend, steps: steps.clone() });
        let model = LoadedModel { backend, ..model };
        let env =
            Env { net: net.clone(), clock: Arc::new(SystemClock), rng: Rng::new(role as u64), process: Process::own() };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let starting = runtime.spawn(async move {
            match role {
                Role::Prefill => baton_prefill_worker::start(config, model, env).await,
                _ => baton_decode_worker::start(config, model, env).await,
            }
        });
        let running = starting.await.map_err(|error| Failure::refuse(error.to_string()))?.map_err(Failure::refused)?;
        Ok(Worker { running, steps, runtime: Some(runtime) })
    }

    fn place(&self) -> Place {
        let shell = self.running.shell();
        Place { worker: shell.id.clone(), incarnation: shell.incarnation, address: self.running.address() }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Steps {
    /// What there was since the last look.
    fn take(&self) -> Times {
        std::mem::take(&mut self.lock())
    }

    fn forget(&self) {
        *self.lock() = Times::default();
    }

    fn lock(&self) -> MutexGuard<'_, Times> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A backend that notes when it computes.
struct Watched {
    backend: Box<dyn Backend>,
    steps: Steps,
}

impl Backend for Watched {
    fn prepare(&mut self, arena: &Arc<Arena>) {
        self.backend.prepare(arena);
    }

    fn device(&self) -> Option<Arc<dyn DeviceBlocks>> {
        self.backend.device()
    }

    fn run(&mut self, batch: &Batch, layers: &mut dyn FnMut(usize)) -> Output {
        self.steps.lock().began.get_or_insert_with(Instant::now);
        let output = self.backend.run(batch, layers);
        self.steps.lock().ended = Some(Instant::now());
        output
    }

    fn fills_arena(&self) -> bool {
        self.backend.fills_arena()
    }

    fn inline_delay(&self, rows: usize) -> Option<Duration> {
        self.backend.inline_delay(rows)
    }
}

/// A stream to the decode worker, as a gateway has it.
pub(super) struct Client {
    commands: mpsc::Sender<GenerateCommand>,
    answers: Streaming<StepOutput>,
    asked: u32,
}

impl Client {
    /// Asks, reads to the end, and says what it saw.
    pub(super) async fn ask(&mut self, pair: &Pair, order: Order) -> Result<Seen, Failure> {
        pair.prefill.steps.forget();
        pair.decode.steps.forget();
        self.asked += 1;
        let command = Command::Start(start(pair, order, self.asked));
        let sent = self.commands.try_send(GenerateCommand { command: Some(command) });
        sent.map_err(|error| Failure::refuse(error.to_string()))?;
        let reading = timeout(DEADLINE, self.read()).await;
        let (admitted, first) = reading.map_err(|_| Failure::refuse("no answer from the decode worker"))??;
        let (prefill, decode) = (pair.prefill.steps.take(), pair.decode.steps.take());
        let none = || Failure::refuse("the prefill worker, or the decode worker, computed nothing");
        let (ended, began) = (prefill.ended.ok_or_else(none)?, decode.began.ok_or_else(none)?);
        let after = |at: Instant| at.saturating_duration_since(ended).as_secs_f64() * 1e3;
        let exposed_ms = admitted.transfer_us as f64 / 1e3;
        Ok(Seen { gap_ms: after(first), begins_ms: after(began), exposed_ms })
    }

    /// Until the end: how it was admitted, and when its first token came.
    async fn read(&mut self) -> Result<(Admitted, Instant), Failure> {
        let (mut admitted, mut first) = (None, None);
        loop {
            let message = self.answers.message().await.map_err(Failure::refused)?;
            let message = message.ok_or_else(|| Failure::refuse("the decode worker closed the stream"))?;
            let now = Instant::now();
            for said in message.outputs.into_iter().filter_map(|output| output.output) {
                match said {
                    Said::Admitted(told) => admitted = Some(told),
                    Said::Tokens(_) => first = first.or(Some(now)),
                    Said::Finished(_) => {
                        let seen = admitted.zip(first).filter(|(admitted, _)| !admitted.local_prefill);
                        return seen.ok_or_else(|| Failure::refuse("a request that was not handed off"));
                    }
                    Said::Aborted(abort) => return Err(Failure::refuse(format!("{}: {}", abort.reason, abort.detail))),
                    Said::Refused(refusal) => {
                        return Err(Failure::refuse(format!("{}: {}", refusal.reason, refusal.detail)));
                    }
                    Said::PromptLogprobs(_) | Said::Resumed(_) => {}
                }
            }
        }
    }
}

fn start(pair: &Pair, order: Order, handle: u32) -> Start {
    let (id, deadline_ms) = (RequestId(order.id), DEADLINE.as_millis() as u64);
    let assignment = Assignment {
        request: id,
        attempt: 1,
        epoch: Epoch(1),
        decode: pair.decode.place(),
        prefill: Some(pair.prefill.place()),
        holder: None,
        lease_ms: deadline_ms,
        explanation: String::new(),
        cluster: String::new(),
    };
    let request = Request {
        id,
        tenant: String::new(),
        lane: Lane::Interactive,
        model: String::new(),
        prompt: order.prompt.into(),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        choices: 1,
        tokens_max: order.tokens,
        tokens_min: order.tokens,
        stop_tokens: Vec::new(),
        ignore_eos: true,
        logprobs: None,
        prompt_logprobs: None,
        cache_salt: String::new(),
        deadline_ms,
    };
    Start {
        handle,
        assignment: Some(assignment.into()),
        request: Some((&request).into()),
        choices: vec![baton_proto::v1::Choice { index: 0, so_far: Vec::new() }],
        ..Start::default()
    }
}
