//! `baton bench engine`: prefill and decode in this process, beside the limits of the machine measured in the same minute.

use std::path::PathBuf;

use baton_core::KvDtype;
use baton_engine::bench::{self, BenchOptions};
use baton_engine::{LoadOptions, Loaded};
use baton_kernels::{Profile, Quantize};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::Instant;

use super::figure::{self, Figure};
use crate::device::Device;
use crate::exit::Failure;
use crate::out::{say, sayln};
use crate::surroundings;
use crate::table;

/// Measure the engine.
///
/// Prefill of one prompt of 512 tokens, decode of 1, 8 and 32 sequences, and both mixed, in tokens a second; the
/// machine's memory bandwidth and multiply-add rate on the same threads; and the shares of them that prefill and decode
/// reach. Each figure is the best of --rounds rounds.
#[derive(Args, Debug)]
pub(crate) struct EngineFlags {
    /// Hugging Face model directory or GGUF file [default: the model in the binary]
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: Option<PathBuf>,
    /// Threads to compute with [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Tensor-parallel ranks that share the model and the threads: 1, 2, 4 or 8
    #[arg(long, value_name = "N", default_value_t = 1)]
    tp: u32,
    /// Kernel profile: f32acc or bf16dp [default: the fastest this machine has]
    #[arg(long)]
    profile: Option<String>,
    /// What to compute on: cpu, cuda or cuda:INDEX (a build with the feature cuda). A GPU prefills 4096 tokens and decodes 1,
    /// 8 and 64 sequences of 1024
    #[arg(long, value_name = "DEVICE", default_value_t, hide_default_value = true)]
    pub(crate) device: Device,
    /// GB/s that a copy reaches on the GPU, to state decode's bandwidth as a share of
    #[arg(long, value_name = "X")]
    pub(crate) copy_gbps: Option<f64>,
    /// TFLOP/s that a bf16 matmul reaches on the GPU, to state prefill's rate as a share of
    #[arg(long, value_name = "X")]
    pub(crate) matmul_tflops: Option<f64>,
    /// Keep floating-point weights as q8_0 or q4_0 (8 or 4 bits and a scale per 32 weights) [default: bf16]
    #[arg(long, value_name = "FORMAT")]
    quantize: Option<String>,
    /// What keys and values are kept as: bf16, f32, int8 or fp8 [default: bf16]
    #[arg(long, value_name = "DTYPE")]
    kv_dtype: Option<String>,
    /// Tokens that each decoding sequence has before it is measured, on the CPU
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=(1 << 20)))]
    context: u32,
    /// Rounds over all figures
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: u32,
    /// Print one JSON object a line for each figure instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(flags: EngineFlags) -> Result<(), Failure> {
    let directory = match &flags.model {
        Some(directory) => directory.clone(),
        None => crate::model::unpack(&surroundings::default_data()).map_err(Failure::refused)?,
    };
    let quantize = quantize(flags.quantize.as_deref())?;
    let kv_dtype = kv_dtype(flags.kv_dtype.as_deref())?;
    flags.device.check(&directory, quantize, kv_dtype).map_err(Failure::refuse)?;
    if let Device::Cuda(index) = flags.device {
        let threads = flags.threads.map_or_else(surroundings::cores, |n| n as usize);
        return crate::device::bench(&flags, &directory, index, threads);
    }
    let options = LoadOptions {
        threads: flags.threads.map_or_else(surroundings::cores, |n| n as usize),
        profile: profile(flags.profile.as_deref())?,
        ranks: flags.tp as usize,
        quantize,
        kv_dtype,
    };
    let started = Instant::now();
    let Loaded { mut model, spec } = load(&directory, options)?;
    let took = started.elapsed();

    let (rounds, context_tokens) = (flags.rounds as usize, flags.context as usize);
    if context_tokens + 4 * BenchOptions::default().decode_steps > spec.positions_max {
        let positions = spec.positions_max;
        return Err(Failure::refuse(format!(
            "--context {context_tokens} leaves no room to decode in {positions} positions"
        )));
    }
    let options = BenchOptions { rounds, context_tokens, ..BenchOptions::default() };
    let measured = bench::bench(&mut model, &spec, options, &|| started.elapsed().as_secs_f64());
    let mut figures = vec![Figure::new("load", took.as_secs_f64(), "s")];
    figures.extend(measured.into_iter().map(|f| Figure::new(f.name, f.value, f.unit)));
    let resident = surroundings::resident(std::process::id()).unwrap_or(0);
    figures.push(Figure::new("resident", resident as f64 / (1 << 20) as f64, "MiB"));
    match flags.json {
        true => figure::print(&figures),
        false => {
            let cpu = model.cpu();
            sayln!(
                "{}: {} parameters, {} ranks, {} threads, {} on {}",
                spec.name,
                spec.parameters,
                model.ranks(),
                model.threads(),
                spec.numerics,
                cpu.isa()
            );
            let rows: Vec<_> =
                figures.iter().map(|f| vec![f.name.clone(), format!("{:.2}", f.value), f.unit.into()]).collect();
            say!("{}", table::render(&["FIGURE", "VALUE", "UNIT"], &rows));
        }
    }
    Ok(())
}

fn load(directory: &std::path::Path, options: LoadOptions) -> Result<Loaded, Failure> {
    let style =
        ProgressStyle::with_template("loading {bar:40} {percent}% {elapsed}").expect("the template is well-formed");
    let bar = ProgressBar::new(0).with_style(style);
    let loaded = baton_engine::load(directory, options, &mut |progress| {
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes_done);
    });
    bar.finish_and_clear();
    loaded.map_err(Failure::refused)
}

/// The kernel profile of that name.
pub(crate) fn profile(name: Option<&str>) -> Result<Option<Profile>, Failure> {
    let Some(name) = name else { return Ok(None) };
    let found = [Profile::F32Acc, Profile::Bf16Dp].into_iter().find(|profile| profile.as_str() == name);
    found.map(Some).ok_or_else(|| Failure::refuse(format!("{name:?} is no kernel profile; f32acc and bf16dp are")))
}

/// The KV dtype of that name.
pub(crate) fn kv_dtype(name: Option<&str>) -> Result<KvDtype, Failure> {
    let Some(name) = name else { return Ok(KvDtype::Bf16) };
    let known = KvDtype::ALL.map(KvDtype::as_str).join(", ");
    KvDtype::named(name)
        .ok_or_else(|| Failure::refuse(format!("{name:?} is nothing to keep keys and values as; {known} are")))
}

/// The format of that name.
pub(crate) fn quantize(name: Option<&str>) -> Result<Option<Quantize>, Failure> {
    let Some(name) = name else { return Ok(None) };
    let found = Quantize::ALL.into_iter().find(|quantize| quantize.as_str() == name);
    found.map(Some).ok_or_else(|| Failure::refuse(format!("{name:?} is no format to quantize to; q8_0 and q4_0 are")))
}
