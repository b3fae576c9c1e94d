//! `baton prefill-worker` and `baton decode-worker`: load the model, then serve one role with it.

use std::path::PathBuf;

use anyhow::Context;
use baton_core::limits::{BLOCK_TOKENS, WORKER_QUEUE_MAX};
use baton_core::{Env, KvDtype, Rng, Role};
use baton_engine::{Backend, LoadOptions, Loaded, ModelSpec, Progress, RankOptions};
use baton_kernels::{Profile, Quantize};
use baton_worker::{Config, Ending, Error, Left, LoadedModel, Running, StartError};
use clap::Args;
use tokio::time::Instant;

use super::settings::{Settings, texts};
use super::{Asked, EXIT_CODES, RoleFlags, STOP_MAX, metrics, not_started};
use crate::device::Device;
use crate::event::{Event, Voice};
use crate::exit::Failure;
use crate::surroundings;

/// KV positions a worker has room for unless told otherwise; fewer where memory is short.
const KV_TOKENS: u64 = 64 << 10;
/// Share of the free memory that KV blocks take at most unless told otherwise: one part in so many.
const KV_MEMORY_PART: u64 = 4;
const BATCH_TOKENS: usize = 512;
const SEQUENCES_MAX: usize = 256;

/// Run one worker.
///
/// It loads the model, registers with the coordinators and serves until it is ended. An order of the cluster can drain it
/// (`baton drain`) or make it serve the other role with the weights it has (`baton role`). A worker that the cluster has given
/// up for its silence drops what it had and registers anew.
///
/// Keys of the TOML file, as the flags of these names: id, listen, kv_listen, kv_advertise, kv_tickets_required, kv_link,
/// advertise_host, coordinators (a list), model, threads, tp, ranks, device, profile, quantize, weights_cache, kv_dtype, metrics, kv_bytes, kv_pull (whether blocks that another
/// worker holds are fetched, true), kv_block_tokens, kv_audit, kv_host_bytes, kv_disk, kv_disk_bytes, drain_ms, autonomy_ms. In the table [kv_tls]: ca, cert, key. In the table [engine]: blocks
/// (--kv-blocks), batch_tokens_max (--batch-tokens),
/// sequences_max (sequences worked on at a time, 256), queue_max (requests that wait before more are refused, 256),
/// prefix_cache (whether finished blocks are kept and found by content, true).
#[derive(Args, Debug)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct WorkerFlags {
    #[command(flatten)]
    role: RoleFlags,
    /// Name, unique in the cluster; a process that takes a name over fences its earlier holder [default: <role>-0]
    #[arg(long)]
    id: Option<String>,
    /// Hugging Face model directory, or GGUF file
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: Option<PathBuf>,
    /// gRPC address; port 0 takes a free one [default: 127.0.0.1:0]
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Address where KV blocks come in, by handoffs and from workers that hold them; port 0 takes a free one [default: 127.0.0.1:0]
    #[arg(long, value_name = "HOST:PORT")]
    kv_listen: Option<String>,
    /// Address under which other workers reach --kv-listen, where a mapped port or a proxy stands before it
    /// [default: its port at --advertise-host]
    #[arg(long, value_name = "HOST:PORT")]
    kv_advertise: Option<String>,
    /// Turn away prefill workers of releases before handoffs had tickets (decode workers)
    #[arg(long)]
    kv_tickets_required: bool,
    /// Which link handoffs take where two workers share several: best (GPU to GPU, shared memory, UCX over RDMA, tcp, in this
    /// order), ucx (whatever it goes over, also within a host; on both ends), or tcp [default: best]
    #[arg(long, value_name = "LINK", value_parser = ["best", "ucx", "tcp"])]
    kv_link: Option<String>,
    /// TLS on handoffs between hosts: PEM file with the certificate of the authority that signed the workers'
    #[arg(long, value_name = "FILE", requires = "kv_tls_cert", requires = "kv_tls_key")]
    kv_tls_ca: Option<PathBuf>,
    /// This worker's certificate for --advertise-host (PEM), followed by those between it and its authority
    #[arg(long, value_name = "FILE")]
    kv_tls_cert: Option<PathBuf>,
    /// The private key of --kv-tls-cert (PEM)
    #[arg(long, value_name = "FILE")]
    kv_tls_key: Option<PathBuf>,
    /// Host under which other processes reach this worker [default: 127.0.0.1]
    #[arg(long, value_name = "HOST")]
    advertise_host: Option<String>,
    /// A coordinator's address; name each of them [default: 127.0.0.1:7400]
    #[arg(long = "coordinator", value_name = "HOST:PORT")]
    coordinators: Vec<String>,
    /// Threads to compute with [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Tensor-parallel ranks that share the model, each with its part of --threads: 1, 2, 4 or 8 [default: 1]
    #[arg(long, value_name = "N")]
    tp: Option<u32>,
    /// What those ranks are: threads of this process, or processes of their own on this host that share memory; one of them
    /// that ends takes the worker along [default: threads]
    #[arg(long, value_name = "KIND", value_parser = ["threads", "processes"])]
    ranks: Option<String>,
    /// What to compute on: cpu, cuda or cuda:INDEX (a build with the feature cuda) [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    device: Option<Device>,
    /// Kernel profile: f32acc or bf16dp; workers of one cluster should agree [default: the fastest this machine has]
    #[arg(long)]
    profile: Option<String>,
    /// Keep floating-point weights as q8_0 or q4_0; workers of one cluster should agree [default: bf16]
    #[arg(long, value_name = "FORMAT")]
    quantize: Option<String>,
    /// Directory for weights as they lie in memory: later starts map them, and all workers of a host that share it have them in
    /// memory once. Models over 64 MiB on CPUs [default: none]
    #[arg(long, value_name = "DIR")]
    weights_cache: Option<PathBuf>,
    /// What keys and values are kept as: bf16, f32, int8 or fp8 (8 bits, with a scale for each token and head); blocks pass only
    /// between workers that agree [default: bf16]
    #[arg(long, value_name = "DTYPE")]
    kv_dtype: Option<String>,
    /// KV blocks [default: as many as hold 65536 tokens, or as --kv-bytes hold]
    #[arg(long, value_name = "N")]
    kv_blocks: Option<u32>,
    /// Bytes of memory KV blocks take at most when --kv-blocks is not given [default: a quarter of the free memory]
    #[arg(long, value_name = "N")]
    kv_bytes: Option<i64>,
    /// Tokens in a KV block: 16, 32, 64 or 128. Workers whose blocks differ hand off to one another, but do not find each other's
    /// prefixes; not for GPUs [default: 16]
    #[arg(long, value_name = "N")]
    kv_block_tokens: Option<u32>,
    /// Of so many cached blocks that are used again one is compared with what it was when it was written; 1: each, 0: none
    /// [default: 64]
    #[arg(long, value_name = "N")]
    kv_audit: Option<u32>,
    /// Bytes of host memory for blocks that the cache has no room for any more: what a GPU's cache spills to. A cache on
    /// the CPU is in host memory already; give that to --kv-bytes instead [default: 0]
    #[arg(long, value_name = "N")]
    kv_host_bytes: Option<i64>,
    /// Folder of this worker alone for blocks that memory has no room for any more; they outlive the process
    /// [default: none]
    #[arg(long, value_name = "DIR")]
    kv_disk: Option<PathBuf>,
    /// Bytes that --kv-disk takes at most [default: 8589934592]
    #[arg(long, value_name = "N")]
    kv_disk_bytes: Option<i64>,
    /// Tokens one step computes at most [default: 512]
    #[arg(long, value_name = "N")]
    batch_tokens: Option<u32>,
    /// Tokens drafted for each sequence in a step where its text repeats itself: the same bytes in fewer steps [default: 0,
    /// none]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=64))]
    draft_tokens: Option<u32>,
    /// How long requests may go on when this worker drains, before they move to others [default: 30000]
    #[arg(long, value_name = "MS")]
    drain_ms: Option<u32>,
    /// How long it goes on serving while no coordinator answers [default: 30000]
    #[arg(long, value_name = "MS")]
    autonomy_ms: Option<u32>,
    /// Address for /metrics and /live; port 0 takes a free one [default: 127.0.0.1:0]
    #[arg(long, value_name = "HOST:PORT")]
    metrics: Option<String>,
}

pub(crate) fn run(flags: WorkerFlags, role: Role) -> Result<(), Failure> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(2);
    let common = flags.role.clone();
    super::process(runtime, &common, serve(flags, role))
}

/// Keys that this process reads itself; the rest is the worker's.
struct Own {
    model: PathBuf,
    threads: usize,
    tp: usize,
    /// The worker's name, when its ranks are processes.
    apart: Option<String>,
    weights_cache: Option<PathBuf>,
    device: Device,
    profile: Option<Profile>,
    quantize: Option<Quantize>,
    kv_dtype: KvDtype,
    kv_bytes: u64,
    block_tokens: Option<u32>,
    metrics: String,
}

impl Own {
    fn options(&self) -> LoadOptions {
        let Own { threads, profile, tp: ranks, quantize, kv_dtype, .. } = *self;
        LoadOptions { threads, profile, ranks, quantize, kv_dtype }
    }
}

async fn serve(flags: WorkerFlags, role: Role) -> Result<(), Failure> {
    let voice = flags.role.voice();
    let env = flags.role.env()?;
    let (own, settings) = settings(flags, role)?;
    let handle = metrics::install()?;
    let (Read { model, ranks, .. }, settings) = load(&own, settings, voice).await?;
    let config: Config = settings.finish()?;
    let metrics = metrics::serve(env.net.clone(), &own.metrics, handle).await.map_err(Failure::refused)?;
    let (id, configured) = (config.id.to_string(), config.coordinators.clone());
    let mut lives = Lives { id, configured, metrics, ranks, voice, asked: Asked::new()? };
    lives.live(role, config, model, env).await
}

/// What stays the same in all lives of this process.
struct Lives {
    id: String,
    configured: Vec<String>,
    metrics: String,
    /// Processes of the ranks other than this one.
    ranks: Vec<u32>,
    voice: Voice,
    asked: Asked,
}

impl Lives {
    /// One life after another, in whichever role, until the process is to end. The weights are loaded once.
    async fn live(
        &mut self,
        mut role: Role,
        mut config: Config,
        mut model: LoadedModel,
        mut env: Env,
    ) -> Result<(), Failure> {
        let mut before: Option<Instant> = None;
        loop {
            let (net, clock, process) = (env.net.clone(), env.clock.clone(), env.process);
            let life = Env { net, clock, rng: Rng::new(env.rng.u64()), process };
            let started = tokio::select! {
                started = start(role, config.clone(), model, life) => started,
                () = self.asked.come() => return Ok(()),
            };
            let running = started.map_err(|error| not_started(&self.id, error))?;
            self.announce(role, &running, before);
            let Some((ending, left)) = self.until_its_end(running).await? else { return Ok(()) };
            match ending {
                Ending::Drained => return Ok(()),
                Ending::Becomes(other) => role = other,
                Ending::Fenced | Ending::Alone => {}
            }
            before = Some(Instant::now());
            (config.role, config.coordinators) = (role, union(left.coordinators, &self.configured));
            config.cluster = left.cluster;
            model = left.model;
        }
    }

    fn announce(&self, role: Role, running: &Running, before: Option<Instant>) {
        let (id, address) = (self.id.clone(), running.address());
        let idle_ms = before.map(|before| before.elapsed().as_millis() as u64);
        tracing::info!(%role, id, address, idle_ms, "ready");
        let (metrics, ranks) = (Some(self.metrics.clone()), self.ranks.clone());
        self.voice.say(&Event::Ready { role, id, address, metrics, ranks });
    }

    /// How a life ended and what is left of it; None when the process was asked to end.
    async fn until_its_end(&mut self, mut running: Running) -> Result<Option<(Ending, Left)>, Failure> {
        let failed = |error: Error| anyhow::anyhow!("{} failed: {error}", self.id);
        let ending = tokio::select! {
            ending = running.ending() => ending.map_err(failed)?,
            () = self.asked.come() => {
                tracing::info!(id = self.id, "ending");
                if tokio::time::timeout(STOP_MAX, running.stop()).await.is_err() {
                    tracing::warn!(id = self.id, "did not end within {} s and is ended", STOP_MAX.as_secs());
                }
                return Ok(None);
            }
        };
        self.voice.say(&Event::LifeEnds { how: ending.as_str().to_string() });
        tokio::select! {
            left = running.end(ending) => Ok(Some((ending, left.map_err(failed)?))),
            () = self.asked.come() => Ok(None),
        }
    }
}

async fn start(role: Role, config: Config, model: LoadedModel, env: Env) -> Result<Running, StartError> {
    match role {
        Role::Prefill => baton_prefill_worker::start(config, model, env).await,
        _ => baton_decode_worker::start(config, model, env).await,
    }
}

/// The coordinators as last heard, and the configured ones in case all of those have moved.
fn union(mut heard: Vec<String>, configured: &[String]) -> Vec<String> {
    let others = configured.iter().filter(|address| !heard.contains(address)).cloned().collect::<Vec<_>>();
    heard.extend(others);
    heard
}

/// Lays flags over the file and takes out what this process reads itself.
fn settings(flags: WorkerFlags, role: Role) -> Result<(Own, Settings), Failure> {
    let mut settings = Settings::read(flags.role.config.as_deref())?;
    settings.flag("id", flags.id);
    settings.flag("listen", flags.listen);
    settings.flag("kv_listen", flags.kv_listen);
    settings.flag("kv_advertise", flags.kv_advertise);
    settings.flag("kv_tickets_required", flags.kv_tickets_required.then_some(true));
    settings.flag("kv_link", flags.kv_link);
    settings.flag("kv_tls.ca", path(flags.kv_tls_ca)?);
    settings.flag("kv_tls.cert", path(flags.kv_tls_cert)?);
    settings.flag("kv_tls.key", path(flags.kv_tls_key)?);
    settings.flag("advertise_host", flags.advertise_host);
    settings.flag("coordinators", texts(&flags.coordinators));
    let block_tokens: Option<u32> = flags.kv_block_tokens.or(settings.take("kv_block_tokens")?);
    settings.flag("kv_block_tokens", block_tokens);
    settings.flag("kv_audit", flags.kv_audit);
    settings.flag("kv_host_bytes", flags.kv_host_bytes);
    settings.flag("kv_disk", path(flags.kv_disk)?);
    settings.flag("kv_disk_bytes", flags.kv_disk_bytes);
    settings.flag("drain_ms", flags.drain_ms);
    settings.flag("autonomy_ms", flags.autonomy_ms);
    settings.flag("engine.blocks", flags.kv_blocks);
    settings.flag("engine.batch_tokens_max", flags.batch_tokens);
    settings.flag("engine.draft_tokens_max", flags.draft_tokens);
    settings.flag("role", Some(role.as_str()));
    settings.fallback("id", format!("{role}-0"));
    settings.fallback("listen", "127.0.0.1:0");
    settings.fallback("kv_listen", "127.0.0.1:0");
    settings.fallback("advertise_host", "127.0.0.1");
    settings.fallback("coordinators", vec![super::coordinator::LISTEN]);
    settings.fallback("engine.batch_tokens_max", BATCH_TOKENS as i64);
    settings.fallback("engine.sequences_max", SEQUENCES_MAX as i64);
    settings.fallback("engine.queue_max", WORKER_QUEUE_MAX as i64);
    settings.fallback("engine.prefix_cache", true);

    let kind: Option<String> = flags.ranks.or(settings.take("ranks")?);
    let apart = match kind.as_deref() {
        None | Some("threads") => None,
        Some("processes") => Some(settings.get("id").trim_matches('"').to_string()),
        Some(other) => return Err(Failure::refuse(format!("ranks is {other:?}; threads and processes are possible"))),
    };
    let own = Own {
        apart,
        weights_cache: flags.weights_cache.or(settings.take("weights_cache")?),
        model: flags
            .model
            .or(settings.take("model")?)
            .ok_or_else(|| Failure::refuse("name a model directory with --model"))?,
        threads: flags.threads.or(settings.take("threads")?).map_or_else(surroundings::cores, |n: u32| n as usize),
        tp: flags.tp.or(settings.take("tp")?).map_or(1, |n: u32| n as usize),
        device: device(flags.device, settings.take("device")?)?,
        profile: crate::bench::engine::profile(flags.profile.or(settings.take("profile")?).as_deref())?,
        quantize: crate::bench::engine::quantize(flags.quantize.or(settings.take("quantize")?).as_deref())?,
        kv_dtype: crate::bench::engine::kv_dtype(flags.kv_dtype.or(settings.take("kv_dtype")?).as_deref())?,
        kv_bytes: kv_bytes(flags.kv_bytes.or(settings.take("kv_bytes")?))?,
        block_tokens,
        metrics: flags.metrics.or(settings.take("metrics")?).unwrap_or_else(|| "127.0.0.1:0".to_string()),
    };
    Ok((own, settings))
}

/// A path as a value.
fn path(given: Option<PathBuf>) -> Result<Option<String>, Failure> {
    let text = |path: PathBuf| path.into_os_string().into_string();
    given.map(text).transpose().map_err(|path| Failure::refuse(format!("{} is not text", path.display())))
}

fn device(flag: Option<Device>, key: Option<String>) -> Result<Device, Failure> {
    match (flag, key) {
        (Some(device), _) => Ok(device),
        (None, Some(key)) => key.parse().map_err(Failure::refuse),
        (None, None) => Ok(Device::Cpu),
    }
}

fn kv_bytes(asked: Option<i64>) -> Result<u64, Failure> {
    match asked {
        None => Ok(surroundings::memory_available().unwrap_or(4 << 30) / KV_MEMORY_PART),
        Some(bytes) => u64::try_from(bytes).map_err(|_| Failure::refuse("kv_bytes is below 0")),
    }
}

/// Loads on a thread of its own, so that signals and the supervisor's pipe stay served, and fills in what depends on the model.
async fn load(own: &Own, mut settings: Settings, voice: Voice) -> Result<(Read, Settings), Failure> {
    let (directory, device, options) = (own.model.clone(), own.device, own.options());
    device.check(&directory, options.quantize, options.kv_dtype).map_err(Failure::refuse)?;
    let room = Room { blocks: settings.count("engine.blocks"), kv_bytes: own.kv_bytes };
    let kept =
        own.weights_cache.clone().filter(|_| surroundings::model_bytes(&directory) >= surroundings::LARGE_MODEL_BYTES);
    let asked = ToRead { directory, device, options, apart: own.apart.clone(), kept, room };
    let loading = tokio::task::spawn_blocking(move || read(asked, voice));
    let read = loading.await.context("the loading thread failed")?.map_err(Failure::refused)?;
    let (spec, blocks) = (&read.model.spec, read.blocks);
    tracing::info!(
        model = spec.name,
        parameters = spec.parameters,
        numerics = %spec.numerics,
        threads = own.threads,
        tp = own.tp,
        device = %own.device,
        blocks,
        "loaded"
    );
    // Larger ones are fewer.
    let units = own.block_tokens.map_or(1, |tokens| u64::from(tokens) / BLOCK_TOKENS as u64);
    settings.fallback("engine.blocks", (blocks / units.max(1)).max(1) as i64);
    Ok((read, settings))
}

/// Which model to read, and what for.
struct ToRead {
    directory: PathBuf,
    device: Device,
    options: LoadOptions,
    /// The worker's name, when its ranks are processes.
    apart: Option<String>,
    /// Where its packed weights are kept.
    kept: Option<PathBuf>,
    room: Room,
}

/// A model that has been read.
struct Read {
    model: LoadedModel,
    /// How many it has unless told otherwise; a GPU has made room for them.
    blocks: u64,
    /// Processes of the ranks other than this one.
    ranks: Vec<u32>,
}

fn read(asked: ToRead, voice: Voice) -> anyhow::Result<Read> {
    let ToRead { directory, device, options, apart, kept, room } = asked;
    let mut said = 0;
    let mut progress = |now: Progress| {
        // A line for every percent at most.
        let percent = now.bytes_done * 100 / now.bytes_total.max(1);
        if percent > said {
            said = percent;
            voice.say(&Event::Loading { done: now.bytes_done, total: now.bytes_total });
        }
    };
    let mut ranks = Vec::new();
    let (backend, spec, blocks): (Box<dyn Backend>, _, _) = match device {
        Device::Cpu => {
            let Loaded { model, spec } = match &apart {
                None => baton_engine::load_kept(&directory, options, kept.as_deref(), &mut progress)?,
                Some(id) => {
                    let command = |rank: &RankOptions| super::rank::command(id, &directory, rank);
                    baton_engine::load_apart(&directory, options, kept.as_deref(), &command, &mut progress)?
                }
            };
            ranks.extend(model.pids());
            let blocks = room.blocks(&spec);
            (Box::new(model), spec, blocks)
        }
        Device::Cuda(_) if options.ranks != 1 => {
            anyhow::bail!("tensor parallelism is not over GPUs yet: --tp {} needs --device cpu", options.ranks)
        }
        Device::Cuda(index) => crate::device::read(&directory, index, options.threads, room, &mut progress)?,
    };
    let card = baton_worker::card::read(&directory, &spec)?;
    Ok(Read { model: LoadedModel { spec, backend, card }, blocks, ranks })
}

/// How much room KV blocks may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// What somebody has asked for.
    blocks: Option<u64>,
    kv_bytes: u64,
}

impl Room {
    /// What was asked for; else blocks for `KV_TOKENS` tokens, or as many as fit.
    pub(crate) fn blocks(&self, spec: &ModelSpec) -> u64 {
        let fit = self.kv_bytes / spec.layout.block_bytes() as u64;
        self.blocks.unwrap_or_else(|| fit.clamp(1, KV_TOKENS / BLOCK_TOKENS as u64))
    }

    /// Whether somebody has asked for a number of blocks.
    #[cfg(feature = "cuda")]
    pub(crate) fn is_asked(&self) -> bool {
        self.blocks.is_some()
    }
}
