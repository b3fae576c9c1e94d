//! `baton up`: a whole cluster on this machine, every role a process of this same binary.

pub(crate) mod child;
pub(crate) mod cluster_file;
pub(crate) mod control;
mod health;
mod lock;
mod log_file;
pub(crate) mod plan;
mod scaling;
mod screen;
mod supervisor;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::Context;
use baton_core::{Rng, Role};
use clap::Args;
use tokio::time::Instant;

use self::control::Control;
use self::lock::Lock;
use self::plan::Topology;
use self::supervisor::{Cluster, Supervisor};
use crate::device::{Device, Devices};
use crate::exit::Failure;
use crate::log::LogFlags;
use crate::surroundings;

/// Where everything but the gateway listens.
const INSIDE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Start a cluster on this machine and keep it running.
///
/// Coordinators, prefill workers, decode workers and a gateway run as processes of their own. One that dies is started
/// again. Ctrl-C or SIGTERM ends them all; should `baton up` itself be killed, they die with it. All start at once; only of a
/// model over 64 MiB on CPUs that the workers share, prefill workers start when the decode workers serve.
#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes:\n  0  ended as asked\n  1  a process could not be brought to serve\n  2  refused before anything served: port in use, model unreadable, data directory in use; nothing is left running"
)]
pub(crate) struct UpFlags {
    /// Hugging Face model directory, or GGUF file; its name without `.gguf` is the model's
    /// name in the API [default: the model in the binary]
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: Option<PathBuf>,
    /// Prefill workers; 0 lets decode workers prefill themselves
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(0..=64))]
    prefill: u64,
    /// Decode workers
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    decode: u64,
    /// Coordinators: 3 survive the loss of one
    #[arg(long, value_name = "1|3", default_value = "1", value_parser = ["1", "3"])]
    coordinators: String,
    /// Port of the API; 0 chooses a free one
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Address of the API; 0.0.0.0 serves other machines too
    #[arg(long, default_value_t = INSIDE)]
    host: IpAddr,
    /// Serve other machines although the cluster has no API keys
    #[arg(long)]
    open: bool,
    /// Directory for ledger, logs and the unpacked model; one cluster at a time uses it [default: $HOME/.baton]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Threads of each worker [default: cores / workers of its pool, of a model under 64 MiB cores / all workers, rounded up]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1024))]
    threads: Option<u64>,
    /// Tensor-parallel ranks of each worker, which share its threads: 1, 2, 4 or 8; no number changes a byte of an answer
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=8))]
    tp: u64,
    /// Tensor-parallel ranks of each prefill worker [default: --tp]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=8))]
    prefill_tp: Option<u64>,
    /// Tensor-parallel ranks of each decode worker [default: --tp]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=8))]
    decode_tp: Option<u64>,
    /// What the ranks of a worker are: threads of its process, or processes of their own that share memory
    #[arg(long, value_name = "KIND", default_value = "threads", value_parser = ["threads", "processes"])]
    ranks: String,
    /// What the workers compute on: cpu, cuda, or GPUs they take in turn, as cuda:0,1 (a build with the feature cuda)
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Devices,
    /// KV blocks (of 16 tokens) of each worker [default: 4096, or fewer if a quarter of the free memory holds fewer]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=(1 << 31)))]
    kv_blocks: Option<u64>,
    /// Bytes of host memory of each worker for blocks that its cache has no room for any more [default: 0]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    kv_host_bytes: Option<u64>,
    /// Directory for blocks that memory has no room for any more, a folder in it for each worker; they outlive the
    /// processes [default: none]
    #[arg(long, value_name = "DIR")]
    kv_disk: Option<PathBuf>,
    /// Bytes that each worker's folder in --kv-disk takes at most [default: 8589934592]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    kv_disk_bytes: Option<u64>,
    /// Tokens one engine step computes at most [default: the engine's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=(1 << 20)))]
    batch_tokens: Option<u64>,
    /// Tokens drafted for each sequence in a step where its text repeats itself: the same bytes in fewer steps [default: 0,
    /// none]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=64))]
    draft_tokens: Option<u32>,
    /// Keep floating-point weights as q8_0 or q4_0: 8 or 4 bits and a scale per 32 weights [default: bf16]
    #[arg(long, value_name = "FORMAT", value_parser = ["q8_0", "q4_0"])]
    quantize: Option<String>,
    /// Directory for weights as they lie in memory, of models over 64 MiB: later starts map them, and the workers have them in
    /// memory once; none keeps none [default: weights in --data]
    #[arg(long, value_name = "DIR|none")]
    weights_cache: Option<PathBuf>,
    /// What keys and values are kept as: bf16, f32, or 8 bits with a scale for each token and head (int8, fp8), which hold
    /// nearly twice the tokens in the same memory [default: bf16]
    #[arg(long, value_name = "DTYPE", value_parser = ["bf16", "f32", "int8", "fp8"])]
    kv_dtype: Option<String>,
    /// Fixes every random choice of the cluster's processes [default: from the operating system]
    #[arg(long)]
    seed: Option<u64>,
}

pub(crate) fn run(flags: UpFlags, log: &LogFlags) -> Result<(), Failure> {
    // One thread: children die with the thread that started them, so it must be the process's own.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(bring_up(flags, log))
}

async fn bring_up(flags: UpFlags, log: &LogFlags) -> Result<(), Failure> {
    let started = Instant::now();
    let mut rng = crate::seed::rng(flags.seed)?;
    let data = prepare(flags.data.clone())?;
    let _lock = Lock::take(&data)?;
    let gateway = gateway_address(&flags, &mut rng)?;
    let model = model_directory(flags.model.as_deref(), &data)?;
    let name = model_name(&model)?;
    let topology = topology(&flags, log, data.clone(), gateway, model, &mut rng)?;

    let reachable = SocketAddr::new(if flags.host.is_unspecified() { INSIDE } else { flags.host }, gateway.port());
    let cluster = Cluster { data, url: format!("http://{reachable}"), gateway: reachable.to_string(), model: name };
    let (_control, wishes) = Control::listen(&cluster.data)?;
    Supervisor::new(cluster, topology, wishes, started)?.run().await
}

/// The data directory, made if need be, as an absolute path.
fn prepare(data: Option<PathBuf>) -> Result<PathBuf, Failure> {
    let data = data.unwrap_or_else(surroundings::default_data);
    let made = std::fs::create_dir_all(data.join("logs")).and_then(|()| data.canonicalize());
    let unusable = || format!("the data directory {} cannot be used; choose another with --data", data.display());
    made.with_context(unusable).map_err(Failure::refused)
}

fn gateway_address(flags: &UpFlags, rng: &mut Rng) -> Result<SocketAddr, Failure> {
    let port = match flags.port {
        0 => surroundings::free_port(flags.host, &[], rng).ok_or_else(|| Failure::refuse("no free port was found"))?,
        port => port,
    };
    let address = SocketAddr::new(flags.host, port);
    match surroundings::bindable(address) {
        Ok(()) => Ok(address),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Err(Failure::refuse(format!(
            "port {port} on {} is in use; choose another with --port, for example --port {}",
            flags.host,
            port.checked_add(1).unwrap_or(8000)
        ))),
        Err(error) => Err(Failure::refuse(format!("cannot listen on {address}: {error}; see --host and --port"))),
    }
}

fn model_directory(asked: Option<&Path>, data: &Path) -> Result<PathBuf, Failure> {
    match asked {
        None => crate::model::unpack(data).map_err(Failure::refused),
        Some(path) => {
            let found = path.canonicalize();
            found.with_context(|| format!("the model {}", path.display())).map_err(Failure::refused)
        }
    }
}

/// What the API calls the model.
fn model_name(directory: &Path) -> Result<String, Failure> {
    let name = if directory.is_file() { directory.file_stem() } else { directory.file_name() };
    let name = name.and_then(|name| name.to_str());
    name.map(str::to_string).ok_or_else(|| Failure::refuse(format!("{} has no name to serve as", directory.display())))
}

fn topology(
    flags: &UpFlags,
    log: &LogFlags,
    data: PathBuf,
    gateway: SocketAddr,
    model: PathBuf,
    rng: &mut Rng,
) -> Result<Topology, Failure> {
    let workers = (flags.prefill + flags.decode) as usize;
    let nodes = if flags.coordinators == "3" { 3 } else { 1 };
    // Mostly one pool or the other has more to do, and idle threads take nothing. Steps of a small model are shorter than what
    // it takes to wake threads whose core is another worker's at the moment.
    let small = surroundings::model_bytes(&model) < surroundings::LARGE_MODEL_BYTES;
    let threads = |pool: u64| match flags.threads {
        Some(threads) => threads as usize,
        None => surroundings::threads_each(surroundings::cores(), if small { workers } else { pool as usize }),
    };
    let (prefill_threads, decode_threads) = (threads(flags.prefill), threads(flags.decode));
    let memory = surroundings::memory_available().unwrap_or(4 << 30);
    Ok(Topology {
        coordinators: coordinator_addresses(&data, nodes, gateway.port(), rng)?,
        model,
        prefill: flags.prefill as usize,
        decode: flags.decode as usize,
        decode_first: !small
            && flags.device.of(Role::Decode, 0) == Device::Cpu
            && prefill_threads * flags.prefill as usize + decode_threads * flags.decode as usize
                > surroundings::cores(),
        gateway,
        open: flags.open,
        weights_cache: match &flags.weights_cache {
            None => Some(data.join("weights")),
            Some(none) if none.as_os_str() == "none" => None,
            Some(dir) => Some(std::path::absolute(dir)?),
        },
        data,
        devices: flags.device.clone(),
        prefill_threads,
        decode_threads,
        prefill_tp: flags.prefill_tp.unwrap_or(flags.tp) as usize,
        decode_tp: flags.decode_tp.unwrap_or(flags.tp) as usize,
        ranks: flags.ranks.clone(),
        kv_blocks: flags.kv_blocks,
        kv_host_bytes: flags.kv_host_bytes,
        kv_disk: flags.kv_disk.clone().map(std::path::absolute).transpose()?,
        kv_disk_bytes: flags.kv_disk_bytes,
        kv_bytes: memory / 4 / workers as u64,
        batch_tokens: flags.batch_tokens,
        draft_tokens: flags.draft_tokens,
        quantize: flags.quantize.clone(),
        kv_dtype: flags.kv_dtype.clone(),
        seed: flags.seed,
        log: log.to_arguments(),
    })
}

/// The addresses this directory's coordinators had before, which their ledger remembers, as long as they are free; else
/// new ones.
fn coordinator_addresses(data: &Path, nodes: usize, gateway: u16, rng: &mut Rng) -> Result<Vec<SocketAddr>, Failure> {
    let ledger = Topology::ledger(data, nodes);
    let path = ledger.join("addresses.json");
    let before: Vec<SocketAddr> =
        std::fs::read(&path).ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default();
    let usable = |address: &SocketAddr| address.port() != gateway && surroundings::bindable(*address).is_ok();
    if before.len() == nodes && before.iter().all(usable) {
        return Ok(before);
    }
    let mut taken = vec![gateway];
    for _ in 0..nodes {
        let port = surroundings::free_port(INSIDE, &taken, rng);
        taken.push(port.ok_or_else(|| Failure::refuse("no free port was found for a coordinator"))?);
    }
    let addresses: Vec<_> = taken[1..].iter().map(|port| SocketAddr::new(INSIDE, *port)).collect();
    let kept = std::fs::create_dir_all(&ledger).and_then(|()| std::fs::write(&path, serde_json::to_vec(&addresses)?));
    kept.with_context(|| format!("write {}", path.display())).map_err(Failure::refused)?;
    Ok(addresses)
}
