//! GPUs: loading a model onto one, and what `baton doctor --gpu` finds, checks and measures.

#[path = "links.rs"]
mod links;

use std::path::{Path, PathBuf};

use baton_engine::bench::{BenchOptions, rates};
use baton_engine::cuda::{GpuOptions, LoadedGpu, load};
use baton_engine::{Backend, ModelSpec, Progress};
use baton_kernels::cuda::check::{self, Extent};
use baton_kernels::cuda::measure::{self, Ceilings};
use baton_kernels::cuda::{Cubins, Gpu, GpuFound, compiler, driver_version, gpus, source_hash};

use tokio::time::Instant;

use crate::bench::engine::EngineFlags;
use crate::bench::figure::{self, Figure};
use crate::doctor::DoctorFlags;
use crate::exit::Failure;
use crate::out::{say, sayln};
use crate::role::worker::Room;
use crate::{surroundings, table};

pub(crate) use self::links::{send, transfer};

/// Of a bf16 matmul's rate, in percent: what prefill is to reach.
const PREFILL_SHARE: f64 = 55.0;
/// Of a copy's bandwidth, in percent: what decode is to reach alone and in batches.
const DECODE_SHARE: f64 = 75.0;
const BATCH_SHARE: f64 = 50.0;

/// A model on GPU `index`, with memory for its KV blocks: those asked for, or no more than fit.
pub(crate) fn read(
    directory: &Path,
    index: usize,
    threads: usize,
    room: Room,
    progress: &mut dyn FnMut(Progress),
) -> anyhow::Result<(Box<dyn Backend>, ModelSpec, u64)> {
    let options = GpuOptions { index, cubins: surroundings::cubins(), threads };
    let LoadedGpu { mut model, spec } = load(directory, &options, progress)?;
    let fit = model.blocks_that_fit(&spec.layout)?;
    let wanted = room.blocks(&spec);
    let blocks = if room.is_asked() { wanted } else { wanted.min(fit as u64).max(1) };
    model.reserve(spec.layout, blocks as usize)?;
    Ok((Box::new(model), spec, blocks))
}

/// `baton bench engine` on a GPU: rates, and the shares of what its memory and its tensor cores could do that they make up.
pub(crate) fn bench(flags: &EngineFlags, directory: &Path, index: usize, threads: usize) -> Result<(), Failure> {
    let options = GpuOptions { index, cubins: surroundings::cubins(), threads };
    let started = Instant::now();
    let LoadedGpu { mut model, spec } = load(directory, &options, &mut |_| {}).map_err(Failure::refused)?;
    let took = started.elapsed().as_secs_f64();
    let weights = model.layer_bytes() + model.head_bytes();
    let mut figures = vec![Figure::new("load", took, "s"), Figure::new("weights", weights as f64 / 1e9, "GB")];
    let rounds = flags.rounds as usize;
    let options =
        BenchOptions { rounds, decode_steps: 64, prefill_tokens: 4096, context_tokens: 1024, batches: &[1, 8, 64] };
    let rates = rates(&mut model, &spec, &options, &|| started.elapsed().as_secs_f64());
    figures.extend(rates.figures(&options).into_iter().map(|f| Figure::new(f.name, f.value, f.unit)));
    // A multiplication and an addition per weight.
    let tflops = rates.prefill * 2.0 * model.layer_weights() as f64 / 1e12;
    figures.push(Figure::new("prefill_rate", tflops, "TFLOP/s"));
    figures.extend(
        flags
            .matmul_tflops
            .map(|most| Figure::at_least("prefill_share_of_matmul", 100.0 * tflops / most, "%", PREFILL_SHARE)),
    );
    let token_bytes = spec.layout.block_bytes() / spec.layout.block_tokens as usize;
    let context = options.context_tokens + options.decode_steps / 2;
    for (rate, batch) in rates.decode.iter().zip(options.batches) {
        let bytes = weights + batch * context * token_bytes;
        let gbps = rate / *batch as f64 * bytes as f64 / 1e9;
        figures.push(Figure::new(format!("decode_batch_{batch}_bandwidth"), gbps, "GB/s"));
        let target = if *batch == 1 { DECODE_SHARE } else { BATCH_SHARE };
        let name = format!("decode_batch_{batch}_share_of_copy");
        figures.extend(flags.copy_gbps.map(|most| Figure::at_least(name, 100.0 * gbps / most, "%", target)));
    }
    if flags.json {
        figure::print(&figures);
        return Ok(());
    }
    sayln!("{}: {} parameters, {} on {}", spec.name, spec.parameters, spec.numerics, model.gpu().name());
    let rows: Vec<_> = figures.iter().map(|f| vec![f.name.clone(), format!("{:.2}", f.value), f.unit.into()]).collect();
    say!("{}", table::render(&["FIGURE", "VALUE", "UNIT"], &rows));
    Ok(())
}

/// What `baton doctor` says in its line about GPUs.
pub(crate) fn finding() -> String {
    match gpus() {
        Ok(found) if found.is_empty() => "none: the driver shows no GPU".to_string(),
        Ok(found) => found
            .iter()
            .enumerate()
            .map(|(index, gpu)| format!("cuda:{index} {}", gpu.name))
            .collect::<Vec<_>>()
            .join(", "),
        Err(error) => format!("none: {error}"),
    }
}

/// `baton doctor --gpu`: driver, compiler and GPUs, then each kernel against the reference on the GPU asked for.
pub(crate) fn doctor(flags: &DoctorFlags, cubins: PathBuf) -> Result<(), Failure> {
    let version = |(major, minor): (i32, i32)| format!("{major}.{minor}");
    let driver = driver_version().map_or_else(|error| error.to_string(), |found| format!("CUDA {}", version(found)));
    let nvrtc = compiler().map_or_else(
        || format!("none: kernels must be compiled beforehand, in {}", cubins.display()),
        |found| format!("NVRTC {}", version(found)),
    );
    let mut rows = vec![["driver", &driver], ["compiler", &nvrtc], ["kernels", &source_hash()]]
        .into_iter()
        .map(|row| row.map(str::to_string).to_vec())
        .collect::<Vec<_>>();
    let found = gpus();
    rows.extend(found.iter().flatten().enumerate().map(|(index, gpu)| vec![format!("cuda:{index}"), describe(gpu)]));
    if !flags.json {
        say!("{}", table::render(&["WHAT", "FOUND"], &rows));
    }
    found.map_err(Failure::refused)?;
    let gpu = Gpu::open(flags.gpu_index, &Cubins::new(cubins)).map_err(Failure::refused)?;
    let checks = check::all(&gpu, if flags.small { Extent::Small } else { Extent::Large }, flags.seed)?;
    let figures: Vec<Figure> = checks
        .iter()
        .map(|check| Figure {
            ok: check.ok,
            target: Some(check::ERROR_MAX),
            ..Figure::new(check.name.clone(), check.error, "relative error")
        })
        .collect();
    show(flags, &figures);
    let failed = checks.iter().filter(|check| !check.ok).count();
    if !flags.json {
        sayln!("{} passed, {failed} failed", checks.len() - failed);
    }
    if flags.measure {
        let ceilings = Ceilings { copy_gbps: flags.copy_gbps, matmul_tflops: flags.matmul_tflops };
        let measured = measure::all(&gpu, ceilings)?;
        show(flags, &measured.into_iter().map(|one| Figure::new(one.name, one.value, one.unit)).collect::<Vec<_>>());
    }
    match failed {
        0 => Ok(()),
        _ => Err(anyhow::anyhow!("{} kernels do not agree with the reference on {}", failed, gpu.name()).into()),
    }
}

fn show(flags: &DoctorFlags, figures: &[Figure]) {
    if flags.json {
        return figure::print(figures);
    }
    let rows: Vec<_> = figures
        .iter()
        .map(|f| {
            vec![
                f.name.clone(),
                format!("{:.3e}", f.value),
                f.unit.to_string(),
                if f.ok { "ok" } else { "WRONG" }.to_string(),
            ]
        })
        .collect();
    say!("{}", table::render(&["KERNEL", "VALUE", "UNIT", ""], &rows));
}

fn describe(gpu: &GpuFound) -> String {
    let GpuFound { name, capability: (major, minor), memory_bytes, multiprocessors, shares, reads, .. } = gpu;
    let links = match (shares, &reads[..]) {
        (false, _) => "memory that other processes cannot map: handoffs pass through the host".to_string(),
        (true, []) => "handoffs from GPU to GPU with workers on itself".to_string(),
        (true, others) => {
            let others: Vec<String> = others.iter().map(|other| format!("cuda:{other}")).collect();
            format!("handoffs from GPU to GPU with workers on itself, and to it from {}", others.join(", "))
        }
    };
    format!(
        "{name}, {:.1} GiB, capability {major}.{minor}, {multiprocessors} multiprocessors; {links}",
        *memory_bytes as f64 / (1u64 << 30) as f64
    )
}
