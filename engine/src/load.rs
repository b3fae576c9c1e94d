//! From a Hugging Face model directory (config.json, generation_config.json, safetensors in one file or in shards with an
//! index) or a GGUF file to a model ready to run. Reads weights through a mapping and gives the pages back as soon as they are packed.

pub mod checkpoint;
pub mod config;
pub mod error;
pub mod gguf;
mod int8;
mod kept;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use baton_core::limits::BLOCK_TOKENS;
use baton_core::{BlockLayout, KvDtype, NumericsClass};
use baton_kernels::{Collective, Cpu, Dtype, HEAD_DIM_MAX, Matrix, Packed, Pieces, Profile, Quantize};
use xxhash_rust::xxh3::Xxh3;

use crate::experts::{Expert, Experts};
use crate::load::checkpoint::{Checkpoint, Tensor};
use crate::load::config::{Mixture, ModelConfig};
use crate::load::error::LoadError;
use crate::load::kept::{About, Kept, Place, Reader, Writer};
use crate::model::{CpuModel, Dense, Layer, Mlp, Weights};
use crate::ranks::process::{RankOptions, Starting, Watch};
use crate::shard::{Shard, Steps};
use crate::spec::ModelSpec;

/// Numbers that ranks exchange at a time: what fits a core's cache beside what it computes on.
const EXCHANGE: usize = 64 << 10;
/// How long a rank waits for one that does not come, beside the time it computed itself.
const PATIENCE: Duration = Duration::from_secs(1);

/// How to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Of all ranks together; each has one at least.
    pub threads: usize,
    /// None: the fastest this machine has.
    pub profile: Option<Profile>,
    /// Tensor-parallel ranks: 1, 2, 4 or 8.
    pub ranks: usize,
    /// What floating-point weights become in memory; None: bf16.
    pub quantize: Option<Quantize>,
    /// What keys and values become in the cache.
    pub kv_dtype: KvDtype,
}

impl Default for LoadOptions {
    fn default() -> LoadOptions {
        LoadOptions { threads: 1, profile: None, ranks: 1, quantize: None, kv_dtype: KvDtype::Bf16 }
    }
}

/// How far loading is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub phase: Phase,
    pub bytes_done: u64,
    pub bytes_total: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Configuration and headers.
    Open,
    /// Weights: checked, hashed, packed.
    Weights,
    Ready,
}

/// A model in memory.
pub struct Loaded {
    pub model: CpuModel,
    pub spec: ModelSpec,
}

/// Loads the model in a directory or a GGUF file, or says which file and tensor is wrong and what was expected.
pub fn load(path: &Path, options: LoadOptions, progress: &mut dyn FnMut(Progress)) -> Result<Loaded, LoadError> {
    load_kept(path, options, None, progress)
}

/// As `load`; packed weights are kept in files of a directory, which later loads map, in other processes as well.
pub fn load_kept(
    path: &Path,
    options: LoadOptions,
    kept: Option<&Path>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Loaded, LoadError> {
    let (mut ranks, spec) = load_all(path, options, kept, progress)?;
    let others = ranks.split_off(1).into_iter().map(CpuModel::compute).collect();
    let model = CpuModel::group(ranks.remove(0), others).map_err(|error| LoadError::Threads(options.ranks, error))?;
    Ok(Loaded { model, spec })
}

/// As `load`, each rank for itself, in order: `CpuModel::group` makes one model of them.
pub fn load_ranks(
    path: &Path,
    options: LoadOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<(Vec<CpuModel>, ModelSpec), LoadError> {
    load_all(path, options, None, progress)
}

fn load_all(
    path: &Path,
    options: LoadOptions,
    kept: Option<&Path>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(Vec<CpuModel>, ModelSpec), LoadError> {
    progress(Progress { phase: Phase::Open, bytes_done: 0, bytes_total: 0 });
    let source = Source::open(path, options, kept)?;
    let cpu = source.cpu()?;
    let (first, spec) = source.first(&cpu, progress)?;
    let mut weights = vec![first];
    for rank in 1..options.ranks {
        weights.push(source.weights(rank, &cpu, &mut |_| {})?.0);
    }
    progress(source.ready());
    let collectives = match options.ranks {
        1 => vec![Collective::alone()],
        ranks => Collective::threads(ranks, EXCHANGE, PATIENCE),
    };
    let rank = |(weights, collective): (Weights, Collective)| source.model(source.cpu()?, weights, collective);
    let ranks = weights.into_iter().zip(collectives).map(rank).collect::<Result<_, LoadError>>()?;
    Ok((ranks, spec))
}

/// As `load`, with each rank but the first in a process of its own: `command` is to run `ranks::process::serve` with these
/// options and this path. They load while this one does.
pub fn load_apart(
    path: &Path,
    options: LoadOptions,
    kept: Option<&Path>,
    command: &dyn Fn(&RankOptions) -> Command,
    progress: &mut dyn FnMut(Progress),
) -> Result<Loaded, LoadError> {
    progress(Progress { phase: Phase::Open, bytes_done: 0, bytes_total: 0 });
    let source = Source::open(path, options, kept)?;
    let ranks = options.ranks;
    let (collective, memory) = Collective::processes(ranks, EXCHANGE, PATIENCE).map_err(LoadError::Meeting)?;
    let watch = Watch::new(collective.aborter());
    let start = |rank: usize| {
        let (memory, threads, profile) = (memory.clone(), source.threads(), source.profile);
        let (quantize, kept) = (options.quantize, kept.map(Path::to_path_buf));
        let options = RankOptions { rank, ranks, memory, threads, profile, quantize, kept };
        let started = Starting::new(rank, command(&options), watch.clone());
        started.map_err(|error| LoadError::Rank { rank, reason: error.to_string() })
    };
    let others = (1..ranks).map(start).collect::<Result<Vec<_>, _>>()?;
    let cpu = source.cpu()?;
    let (weights, spec) = source.first(&cpu, progress)?;
    let others = others.into_iter().map(Starting::ready).collect::<Result<Vec<_>, _>>()?;
    progress(source.ready());
    let first = source.model(cpu, weights, collective)?;
    let model = CpuModel::apart(first, others, watch).map_err(|error| LoadError::Threads(ranks, error))?;
    Ok(Loaded { model, spec })
}

/// The part of one rank that is a process of its own. Rank 0 checks the weights of all.
pub(crate) fn load_rank(path: &Path, options: &RankOptions) -> Result<CpuModel, LoadError> {
    let RankOptions { rank, ranks, ref memory, threads, profile, quantize, ref kept } = *options;
    // What its cache is of, the group's memory says.
    let all =
        LoadOptions { threads: threads * ranks, profile: Some(profile), ranks, quantize, ..LoadOptions::default() };
    let source = Source::open(path, all, kept.as_deref())?;
    let collective = Collective::join(memory, rank, PATIENCE).map_err(LoadError::Meeting)?;
    let cpu = source.cpu()?;
    let (weights, _) = source.weights(rank, &cpu, &mut |_| {})?;
    source.model(cpu, weights, collective)
}

/// An opened model, and how it is to be loaded.
struct Source {
    path: PathBuf,
    config: ModelConfig,
    checkpoint: Checkpoint,
    shards: Vec<Shard>,
    profile: Profile,
    options: LoadOptions,
    /// Where packed weights are kept.
    kept: Option<PathBuf>,
}

impl Source {
    fn open(path: &Path, options: LoadOptions, kept: Option<&Path>) -> Result<Source, LoadError> {
        let (config, checkpoint) = open(path)?;
        let shards = shards(&config, &checkpoint, options)?;
        if options.kv_dtype == KvDtype::Int8 && config.heads.head_dim > HEAD_DIM_MAX {
            return Err(LoadError::TooWide { found: config.heads.head_dim, most: HEAD_DIM_MAX });
        }
        let profile = options.profile.unwrap_or_else(Profile::best);
        let (path, kept) = (path.to_path_buf(), kept.map(Path::to_path_buf));
        Ok(Source { path, config, checkpoint, shards, profile, options, kept })
    }

    /// Of each rank.
    fn threads(&self) -> usize {
        self.options.threads / self.options.ranks
    }

    /// A rank's device.
    fn cpu(&self) -> Result<Cpu, LoadError> {
        Cpu::new(self.threads(), self.profile).map_err(|unsupported| LoadError::Profile(unsupported.to_string()))
    }

    fn ready(&self) -> Progress {
        let total = self.checkpoint.bytes();
        Progress { phase: Phase::Ready, bytes_done: total, bytes_total: total }
    }

    fn loader<'a>(
        &'a self,
        rank: usize,
        cpu: &'a Cpu,
        progress: &'a mut dyn FnMut(Progress),
        kept: Kept,
    ) -> Loader<'a> {
        Loader {
            kept,
            checkpoint: &self.checkpoint,
            cpu,
            quantize: self.options.quantize,
            shard: self.shards[rank].clone(),
            progress,
            done: 0,
            total: self.checkpoint.bytes(),
            parameters: 0,
            digests: Vec::new(),
        }
    }

    /// Rank 0's weights, and what the model is.
    fn first(&self, cpu: &Cpu, progress: &mut dyn FnMut(Progress)) -> Result<(Weights, ModelSpec), LoadError> {
        let Source { path, config, profile, options, .. } = self;
        let (weights, About { weights_hash, parameters }) = self.weights(0, cpu, progress)?;
        let layout = BlockLayout {
            layers: config.layers as u32,
            kv_heads: config.heads.kv_heads as u32,
            head_dim: config.heads.head_dim as u32,
            block_tokens: BLOCK_TOKENS as u32,
            dtype: options.kv_dtype,
        };
        let spec = ModelSpec {
            name: name(path),
            layout,
            vocab: config.vocab,
            positions_max: config.positions_max,
            eos: config.eos.clone(),
            numerics: NumericsClass::new(&weights_hash, &arithmetic(*profile, options.quantize), layout.dtype.as_str()),
            weights_hash,
            parameters,
        };
        Ok((weights, spec))
    }

    /// A rank's weights: mapped if they are kept, else packed, into a file if they are to be kept.
    fn weights(
        &self,
        rank: usize,
        cpu: &Cpu,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Weights, About), LoadError> {
        let Some(place) = self.place(rank)? else { return self.pack(rank, cpu, progress) };
        if let Some(reader) = place.open_checked() {
            return self.read(rank, cpu, reader);
        }
        // One at a time checks, or packs, what all of them want.
        let lock = place.lock();
        if let Some(reader) = place.open() {
            return self.read(rank, cpu, reader);
        }
        let kept = lock.and_then(|lock| {
            let writer = place.write()?;
            self.keep(rank, cpu, progress, writer).map(|()| lock)
        });
        match kept {
            Ok(_lock) => {
                if let Some(reader) = place.open() {
                    return self.read(rank, cpu, reader);
                }
            }
            Err(error @ LoadError::Keep { .. }) => tracing::warn!(%error, "packed weights are not kept"),
            Err(error) => return Err(error),
        }
        self.pack(rank, cpu, progress)
    }

    fn place(&self, rank: usize) -> Result<Option<Place>, LoadError> {
        let Some(dir) = &self.kept else { return Ok(None) };
        let LoadOptions { ranks, quantize, .. } = self.options;
        let of = format!("rank {rank} of {ranks} {quantize:?}");
        let identity = format!("{}\n{}", self.config.describe(), self.checkpoint.identity()?);
        Ok(Some(Place::new(dir, &self.path, &of, &identity, self.threads())))
    }

    /// Rank 0 checks and hashes all weights, those of other ranks too.
    fn pack(&self, rank: usize, cpu: &Cpu, progress: &mut dyn FnMut(Progress)) -> Result<(Weights, About), LoadError> {
        let mut loader = self.loader(rank, cpu, progress, Kept::No);
        let weights = loader.weights(&self.config)?;
        Ok((weights, loader.about(&self.config)))
    }

    /// As `pack`, into a file that is read afterwards; little of the weights is in memory at a time.
    fn keep(
        &self,
        rank: usize,
        cpu: &Cpu,
        progress: &mut dyn FnMut(Progress),
        writer: Writer,
    ) -> Result<(), LoadError> {
        let mut loader = self.loader(rank, cpu, progress, Kept::Write(writer));
        loader.weights(&self.config)?;
        let about = loader.about(&self.config);
        match loader.kept {
            Kept::Write(writer) => writer.finish(about),
            Kept::No | Kept::Read(_) => Ok(()),
        }
    }

    fn read(&self, rank: usize, cpu: &Cpu, reader: Reader) -> Result<(Weights, About), LoadError> {
        let about = reader.about().clone();
        let weights = self.loader(rank, cpu, &mut |_| {}, Kept::Read(reader)).weights(&self.config)?;
        Ok((weights, about))
    }

    fn model(&self, cpu: Cpu, weights: Weights, collective: Collective) -> Result<CpuModel, LoadError> {
        let shard = self.shards[collective.rank()].clone();
        Ok(CpuModel::rank(cpu, self.config.clone(), weights, shard, collective))
    }
}

/// The kernel profile, and what weights are turned into: both decide bits.
fn arithmetic(profile: Profile, quantize: Option<Quantize>) -> String {
    quantize.map_or_else(|| profile.to_string(), |quantize| format!("{profile}.{}", quantize.as_str()))
}

fn open(path: &Path) -> Result<(ModelConfig, Checkpoint), LoadError> {
    if !path.is_file() {
        return Ok((ModelConfig::read(path)?, Checkpoint::open(path)?));
    }
    let (checkpoint, config) = Checkpoint::open_gguf(path)?;
    let mut config = ModelConfig::check(path, config, Vec::new())?;
    // Llama 3's scaling of rotations comes as a tensor of divisors.
    if let Some(tensor) = checkpoint.optional("rope_freqs.weight", &[config.inv_freq.len()])? {
        let divisors = tensor.values()?;
        if let Some(wrong) = divisors.iter().find(|by| !(by.is_finite() && **by > 0.0)) {
            let (file, what) = (path.to_path_buf(), format!("tensor {}", tensor.name));
            return Err(LoadError::Gguf { file, what, reason: format!("it holds {wrong}; expected positive numbers") });
        }
        config.inv_freq.iter_mut().zip(divisors).for_each(|(frequency, by)| *frequency /= f64::from(by));
    }
    Ok((config, checkpoint))
}

/// The ranks' shares. Refuses numbers of ranks that would cut a quantized matrix within a unit or elsewhere than between
/// its segments.
fn shards(config: &ModelConfig, checkpoint: &Checkpoint, options: LoadOptions) -> Result<Vec<Shard>, LoadError> {
    let dtypes = |part: &str| -> Vec<Dtype> {
        let name = |layer| format!("model.layers.{layer}.{part}.weight");
        (0..config.layers).filter_map(|layer| checkpoint.dtype(&name(layer))).collect()
    };
    let (down, out) = (dtypes("mlp.down_proj"), dtypes("self_attn.o_proj"));
    let of_experts = |mixture: &Mixture| -> Vec<Dtype> {
        let Mixture { experts, names, .. } = mixture;
        (0..*experts).flat_map(|expert| dtypes(&format!("{}.experts.{expert}.{}", names.block, names.down))).collect()
    };
    let experts = config.mixture.as_ref().map(of_experts).unwrap_or_default();
    let step = |dtypes: &[Dtype]| dtypes.iter().map(|dtype| dtype.step(options.quantize)).max().unwrap_or(1);
    let steps = Steps { mlp: step(&down), experts: step(&experts) };
    Shard::check(config, options.ranks, steps)?;
    let shards: Vec<Shard> = (0..options.ranks).map(|rank| Shard::of(config, rank, options.ranks, steps)).collect();
    for shard in &shards {
        let dim = config.heads.head_dim;
        let own = shard.q().start * dim..shard.q().end * dim;
        for dtype in &out {
            shard.check_columns("self_attn.o_proj", config.heads.width(), &own, *dtype, options.quantize)?;
        }
        for dtype in &down {
            shard.check_columns("mlp.down_proj", config.intermediate, &shard.inner, *dtype, options.quantize)?;
        }
        for (mixture, dtype) in config.mixture.iter().flat_map(|mixture| experts.iter().map(move |of| (mixture, of))) {
            let (name, inner) = (mixture.names.down, &shard.expert_inner);
            shard.check_columns(name, mixture.intermediate, inner, *dtype, options.quantize)?;
        }
    }
    Ok(shards)
}

/// The directory's own name, also when it was given as `.`, or that of the file without `.gguf`.
pub fn name(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let name = if whole.is_file() { whole.file_stem() } else { whole.file_name() };
    name.map_or_else(|| "model".to_string(), |name| name.to_string_lossy().into_owned())
}

/// Some of a tensor's rows.
struct Rows {
    tensor: String,
    /// Rows it has.
    of: usize,
    range: Range<usize>,
}

struct Loader<'a> {
    kept: Kept,
    checkpoint: &'a Checkpoint,
    cpu: &'a Cpu,
    /// What is loaded of each tensor; rank 0 checks and hashes all of it.
    shard: Shard,
    quantize: Option<Quantize>,
    progress: &'a mut dyn FnMut(Progress),
    done: u64,
    total: u64,
    parameters: u64,
    /// (tensor, its content).
    digests: Vec<(String, u128)>,
}

impl Loader<'_> {
    fn weights(&mut self, config: &ModelConfig) -> Result<Weights, LoadError> {
        let (vocab, hidden, tokens) = (config.vocab, config.hidden, self.shard.tokens());
        let rows = |name: &str| Rows { tensor: name.to_string(), of: vocab, range: tokens.clone() };
        let embedding = Arc::new(self.matrix(&[rows("model.embed_tokens.weight")], hidden)?);
        let layers = (0..config.layers).map(|layer| self.layer(config, layer)).collect::<Result<_, _>>()?;
        let norm = self.vector("model.norm.weight", hidden)?;
        let head = match config.tied {
            true => embedding.clone(),
            false => Arc::new(self.matrix(&[rows("lm_head.weight")], hidden)?),
        };
        Ok(Weights { embedding, layers, norm, head })
    }

    fn layer(&mut self, config: &ModelConfig, layer: usize) -> Result<Layer, LoadError> {
        let (heads, hidden) = (config.heads, config.hidden);
        let (dim, q, kv) = (heads.head_dim, heads.width(), heads.kv_heads * heads.head_dim);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let weight = |part: &str| name(&format!("{part}.weight"));
        let of_heads = |heads: Range<usize>| heads.start * dim..heads.end * dim;
        let (own_q, own_kv) = (of_heads(self.shard.q()), of_heads(self.shard.k()));
        let qkv = [
            ("self_attn.q_proj", q, own_q.clone()),
            ("self_attn.k_proj", kv, own_kv.clone()),
            ("self_attn.v_proj", kv, own_kv),
        ];
        let out = [("self_attn.o_proj", hidden, 0..hidden)];
        let tensors = |parts: &[(&str, usize, Range<usize>)], kind: &str| -> Vec<Rows> {
            let rows = |(part, of, range): &(&str, usize, Range<usize>)| {
                let tensor = name(&format!("{part}.{kind}"));
                Rows { tensor, of: *of, range: range.clone() }
            };
            parts.iter().map(rows).collect()
        };
        Ok(Layer {
            attention_norm: self.vector(&weight("input_layernorm"), hidden)?,
            qkv: self.matrix(&tensors(&qkv, "weight"), hidden)?,
            qkv_bias: self.bias(config.qkv_bias, &tensors(&qkv, "bias"))?,
            q_norm: self.norm(config.qk_norm, &weight("self_attn.q_norm"), heads.head_dim)?,
            k_norm: self.norm(config.qk_norm, &weight("self_attn.k_norm"), heads.head_dim)?,
            out: self.columns(&tensors(&out, "weight")[0], q, own_q)?,
            out_bias: self.bias(config.out_bias, &tensors(&out, "bias"))?,
            mlp_norm: self.vector(&weight("post_attention_layernorm"), hidden)?,
            mlp: match config.mixture.as_ref().filter(|mixture| mixture.layers[layer]) {
                Some(mixture) => Mlp::Experts(self.experts(mixture, hidden, layer)?),
                None => Mlp::Dense(self.dense(config, layer)?),
            },
            window: config.windows[layer],
        })
    }

    fn dense(&mut self, config: &ModelConfig, layer: usize) -> Result<Dense, LoadError> {
        let (hidden, wide, own) = (config.hidden, config.intermediate, self.shard.inner.clone());
        let rows = |part: &str, kind: &str, of: usize, range: &Range<usize>| {
            let tensor = format!("model.layers.{layer}.mlp.{part}.{kind}");
            Rows { tensor, of, range: range.clone() }
        };
        let gate_up = |kind: &str| ["gate_proj", "up_proj"].map(|part| rows(part, kind, wide, &own));
        let down = |kind: &str| rows("down_proj", kind, hidden, &(0..hidden));
        Ok(Dense {
            gate_up: self.matrix(&gate_up("weight"), hidden)?,
            gate_up_bias: self.bias(config.mlp_bias, &gate_up("bias"))?,
            down: self.columns(&down("weight"), wide, own.clone())?,
            down_bias: self.bias(config.mlp_bias, &[down("bias")])?,
        })
    }

    fn experts(&mut self, mixture: &Mixture, hidden: usize, layer: usize) -> Result<Experts, LoadError> {
        let Mixture { experts, intermediate: wide, names, .. } = *mixture;
        let block = format!("model.layers.{layer}.{}", names.block);
        let own = self.shard.expert_inner.clone();
        let expert = |expert: usize| {
            let rows = |part: &str, of: usize, range: Range<usize>| {
                let tensor = format!("{block}.experts.{expert}.{part}.weight");
                Rows { tensor, of, range }
            };
            let gate_up = [rows(names.gate, wide, own.clone()), rows(names.up, wide, own.clone())];
            let gate_up = self.matrix(&gate_up, hidden)?;
            Ok(Expert { gate_up, down: self.columns(&rows(names.down, hidden, 0..hidden), wide, own.clone())? })
        };
        let all = (0..experts).map(expert).collect::<Result<Vec<_>, LoadError>>()?;
        // It is small and decides much: it is never quantized.
        let quantize = self.quantize.take();
        let router =
            self.matrix(&[Rows { tensor: format!("{block}.gate.weight"), of: experts, range: 0..experts }], hidden);
        self.quantize = quantize;
        Ok(Experts { router: router?, all, used: mixture.used, over_chosen: mixture.over_chosen, inner: wide })
    }

    /// Some rows of each of the named tensors, one below the other.
    fn matrix(&mut self, parts: &[Rows], cols: usize) -> Result<Packed, LoadError> {
        let name = parts.iter().map(|part| part.tensor.as_str()).collect::<Vec<_>>().join(" ");
        if let Kept::Read(reader) = &self.kept {
            return reader.matrix(&name, parts.iter().map(|part| part.range.len()).sum(), cols);
        }
        let tensors = parts.iter().map(|part| self.checkpoint.tensor(&part.tensor, &[part.of, cols]));
        let tensors = tensors.collect::<Result<Vec<Tensor>, LoadError>>()?;
        tensors.iter().try_for_each(|tensor| self.inspect(tensor))?;
        let whole = tensors.iter().map(Tensor::matrix);
        let matrices: Vec<_> = whole.zip(parts).map(|(whole, part)| whole.some_rows(part.range.clone())).collect();
        let packed = self.packed(&name, &matrices)?;
        tensors.iter().for_each(Tensor::give_pages_back);
        Ok(packed)
    }

    /// Some columns of the named tensor.
    fn columns(&mut self, part: &Rows, cols: usize, own: Range<usize>) -> Result<Packed, LoadError> {
        if own == (0..cols) {
            return self.matrix(std::slice::from_ref(part), cols);
        }
        if let Kept::Read(reader) = &self.kept {
            return reader.matrix(&part.tensor, part.of, own.len());
        }
        let tensor = self.checkpoint.tensor(&part.tensor, &[part.of, cols])?;
        self.inspect(&tensor)?;
        let whole = tensor.matrix();
        // `shards` has seen to it that these are whole units.
        let bytes = |cols: usize| cols / whole.dtype.unit() * whole.dtype.unit_bytes();
        let cut = |row: &[u8]| row[bytes(own.start)..bytes(own.end)].to_vec();
        let kept: Vec<u8> = whole.bytes.chunks_exact(bytes(cols)).flat_map(cut).collect();
        let packed = self.packed(&part.tensor, &[Matrix { bytes: &kept, cols: own.len(), ..whole }])?;
        tensor.give_pages_back();
        Ok(packed)
    }

    /// The parts as one matrix. One that is kept is on its way to the file, out of which it comes back, and nothing here.
    fn packed(&mut self, name: &str, parts: &[Matrix]) -> Result<Packed, LoadError> {
        let Kept::Write(writer) = &mut self.kept else { return Ok(self.cpu.pack_as(parts, self.quantize)) };
        writer.matrix(name, self.cpu, &Pieces::new(parts, self.quantize))?;
        Ok(Packed::default())
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        if let Kept::Read(reader) = &self.kept {
            return reader.vector(name, len);
        }
        let tensor = self.checkpoint.tensor(name, &[len])?;
        self.inspect(&tensor)?;
        let values = tensor.values()?;
        if let Kept::Write(writer) = &mut self.kept {
            writer.vector(name, &values)?;
        }
        Ok(values)
    }

    fn norm(&mut self, present: bool, name: &str, len: usize) -> Result<Option<Vec<f32>>, LoadError> {
        if present { self.vector(name, len).map(Some) } else { Ok(None) }
    }

    fn bias(&mut self, present: bool, parts: &[Rows]) -> Result<Option<Vec<f32>>, LoadError> {
        if !present {
            return Ok(None);
        }
        let part = |part: &Rows| Ok(self.vector(&part.tensor, part.of)?[part.range.clone()].to_vec());
        Ok(Some(parts.iter().map(part).collect::<Result<Vec<_>, LoadError>>()?.concat()))
    }

    /// Refuses values that are not finite, and takes the content into the hash: once, for all ranks.
    fn inspect(&mut self, tensor: &Tensor) -> Result<(), LoadError> {
        if self.shard.rank > 0 {
            return Ok(());
        }
        let digest = tensor.inspect(self.cpu.threads())?;
        self.digests.push((tensor.name.clone(), digest));
        self.parameters += tensor.elements() as u64;
        self.done += tensor.stored_bytes() as u64;
        (self.progress)(Progress {
            phase: Phase::Weights,
            bytes_done: self.done.min(self.total),
            bytes_total: self.total,
        });
        Ok(())
    }

    /// What is known when all is loaded.
    fn about(&mut self, config: &ModelConfig) -> About {
        About { parameters: self.parameters, weights_hash: self.hash(config) }
    }

    /// Equal for equal weights and equal numbers in config.json, however the weights are cut into files.
    fn hash(&mut self, config: &ModelConfig) -> String {
        self.digests.sort_unstable();
        let mut hasher = Xxh3::new();
        hasher.update(config.describe().as_bytes());
        for (name, digest) in &self.digests {
            hasher.update(name.as_bytes());
            hasher.update(&digest.to_le_bytes());
        }
        format!("{:032x}", hasher.digest128())
    }
}
