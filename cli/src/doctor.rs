//! `baton doctor`: what this machine offers, and what is missing and why.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use baton_kernels::Profile;
use clap::Args;

use crate::exit::Failure;
use crate::out::say;
use crate::surroundings;
use crate::table;

const PORT: u16 = 8000;

/// What `baton doctor` looks at.
#[derive(Args, Debug)]
pub(crate) struct DoctorFlags {
    /// Look at GPUs: driver, compiler and devices, then run every kernel against the reference on one of them
    #[arg(long)]
    pub(crate) gpu: bool,
    /// Which GPU to check
    #[arg(long, value_name = "N", default_value_t = 0, requires = "gpu")]
    pub(crate) gpu_index: usize,
    /// Only small shapes, as a memory checker has time for
    #[arg(long, requires = "gpu")]
    pub(crate) small: bool,
    /// Also measure the kernels
    #[arg(long, requires = "gpu")]
    pub(crate) measure: bool,
    /// GB/s that a copy reaches on this GPU, to state bandwidths as shares of
    #[arg(long, value_name = "X", requires = "measure")]
    pub(crate) copy_gbps: Option<f64>,
    /// TFLOP/s that a bf16 matmul reaches on this GPU, to state rates as shares of
    #[arg(long, value_name = "X", requires = "measure")]
    pub(crate) matmul_tflops: Option<f64>,
    /// Seed of the random inputs
    #[arg(long, default_value_t = 1, requires = "gpu")]
    pub(crate) seed: u64,
    /// Print one JSON object a line for each check and figure
    #[arg(long, requires = "gpu")]
    pub(crate) json: bool,
}

pub(crate) fn run(flags: DoctorFlags) -> Result<(), Failure> {
    if flags.gpu {
        return crate::device::doctor(&flags, surroundings::cubins());
    }
    let rows: Vec<Vec<String>> = findings().into_iter().map(|(what, found)| vec![what.to_string(), found]).collect();
    say!("{}", table::render(&["WHAT", "FOUND"], &rows));
    Ok(())
}

fn findings() -> Vec<(&'static str, String)> {
    vec![
        ("version", format!("baton {}, wire version {}", env!("CARGO_PKG_VERSION"), baton_proto::WIRE_VERSION)),
        ("cores", surroundings::cores().to_string()),
        ("kernels", kernels()),
        ("memory", memory()),
        ("huge pages", huge_pages()),
        ("model", shipped()),
        ("port", port()),
        ("open files", open_files()),
        (
            "handoff links",
            "within a host from GPU to GPU (see --gpu) or through shared memory; between hosts UCX over RDMA, or tcp (encrypted \
             with --kv-tls-*); `baton status` shows which are up and why not better ones; NCCL is not in this build"
                .to_string(),
        ),
        ("ucx", ucx()),
        ("gpu", crate::device::finding()),
        ("data directory", data_directory()),
    ]
}

#[cfg(target_os = "linux")]
fn ucx() -> String {
    baton_kvtransfer::describe_ucx().unwrap_or_else(|why| format!("none: {why}; install libucx (Debian: libucx0)"))
}

#[cfg(not(target_os = "linux"))]
fn ucx() -> String {
    "none: Linux only".to_string()
}

fn kernels() -> String {
    let best = Profile::best();
    match baton_kernels::Cpu::new(1, best) {
        Ok(cpu) => format!("{} with profile {}", cpu.isa(), best.as_str()),
        Err(error) => format!("none: {error}"),
    }
}

fn memory() -> String {
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    match (surroundings::memory_available(), surroundings::memory_total()) {
        (Some(available), Some(total)) => format!("{:.1} GiB available of {:.1} GiB", gib(available), gib(total)),
        _ => "unknown: /proc/meminfo does not say".to_string(),
    }
}

fn huge_pages() -> String {
    match std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled") {
        Ok(modes) => match modes.split(['[', ']']).nth(1) {
            Some("never") => "off: memory-bound steps are slower; `madvise` or `always` turns them on".to_string(),
            Some(mode) => format!("on ({mode})"),
            None => "unknown".to_string(),
        },
        Err(_) => "unknown: this kernel does not say".to_string(),
    }
}

fn shipped() -> String {
    format!(
        "{} is part of this binary ({:.1} MiB)",
        crate::model::NAME,
        crate::model::bytes() as f64 / (1 << 20) as f64
    )
}

fn port() -> String {
    match surroundings::bindable(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), PORT)) {
        Ok(()) => format!("{PORT} is free on 127.0.0.1"),
        Err(error) => format!("{PORT} cannot be used ({error}); choose another with `baton up --port`"),
    }
}

fn open_files() -> String {
    match crate::process::open_files_max() {
        Some(limit) if limit < 4096 => format!("{limit}: few for thousands of streams; raise it with `ulimit -n`"),
        Some(limit) => limit.to_string(),
        None => "unknown".to_string(),
    }
}

fn data_directory() -> String {
    let data = surroundings::default_data();
    match crate::up::cluster_file::ClusterFile::read(&data) {
        Ok(file) if file.runs() => format!("{}: a cluster runs there at {}", data.display(), file.url),
        _ => format!("{}: no cluster runs there", data.display()),
    }
}
