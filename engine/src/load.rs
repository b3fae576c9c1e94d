//! From a Hugging Face model directory to a model ready to run: config.json, generation_config.json, safetensors (one
//! file or shards with an index). Reads weights through a mapping and gives the pages back as soon as they are packed.

pub mod checkpoint;
pub mod config;
pub mod error;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use baton_core::limits::BLOCK_TOKENS;
use baton_core::{BlockLayout, KvDtype, NumericsClass};
use baton_kernels::{Collective, Cpu, Matrix, Packed, Profile};
use xxhash_rust::xxh3::Xxh3;

use crate::load::checkpoint::{Checkpoint, Tensor};
use crate::load::config::ModelConfig;
use crate::load::error::LoadError;
use crate::model::{CpuModel, Layer, Weights};
use crate::shard::Shard;
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
}

impl Default for LoadOptions {
    fn default() -> LoadOptions {
        LoadOptions { threads: 1, profile: None, ranks: 1 }
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

/// Loads the model in `dir`, or says which file and tensor is wrong and what was expected.
pub fn load(dir: &Path, options: LoadOptions, progress: &mut dyn FnMut(Progress)) -> Result<Loaded, LoadError> {
    let (mut ranks, spec) = load_ranks(dir, options, progress)?;
    let others = ranks.split_off(1).into_iter().map(CpuModel::compute).collect();
    let model = CpuModel::group(ranks.remove(0), others).map_err(|error| LoadError::Threads(options.ranks, error))?;
    Ok(Loaded { model, spec })
}

/// As `load`, each rank for itself, in order: `CpuModel::group` makes one model of them.
pub fn load_ranks(
    dir: &Path,
    options: LoadOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<(Vec<CpuModel>, ModelSpec), LoadError> {
    progress(Progress { phase: Phase::Open, bytes_done: 0, bytes_total: 0 });
    let config = ModelConfig::read(dir)?;
    Shard::check(&config, options.ranks)?;
    let checkpoint = Checkpoint::open(dir)?;
    let profile = options.profile.unwrap_or_else(Profile::best);
    let threads = options.threads / options.ranks;
    let device = || Cpu::new(threads, profile).map_err(|unsupported| LoadError::Profile(unsupported.to_string()));
    let total = checkpoint.bytes();
    let whole = device()?;
    let shard = Shard::of(&config, 0, options.ranks);
    let mut loader = Loader {
        checkpoint: &checkpoint,
        cpu: &whole,
        shard,
        progress,
        done: 0,
        total,
        parameters: 0,
        digests: Vec::new(),
    };
    let mut weights = vec![loader.weights(&config)?];
    let (parameters, weights_hash) = (loader.parameters, loader.hash(&config));
    for rank in 1..options.ranks {
        loader.shard = Shard::of(&config, rank, options.ranks);
        weights.push(loader.weights(&config)?);
    }
    progress(Progress { phase: Phase::Ready, bytes_done: total, bytes_total: total });
    let layout = BlockLayout {
        layers: config.layers as u32,
        kv_heads: config.heads.kv_heads as u32,
        head_dim: config.heads.head_dim as u32,
        block_tokens: BLOCK_TOKENS as u32,
        dtype: KvDtype::Bf16,
    };
    let spec = ModelSpec {
        name: name(dir),
        layout,
        vocab: config.vocab,
        positions_max: config.positions_max,
        eos: config.eos.clone(),
        numerics: NumericsClass::new(&weights_hash, profile.as_str(), layout.dtype.as_str()),
        weights_hash,
        parameters,
    };
    let collectives = match options.ranks {
        1 => vec![Collective::alone()],
        ranks => Collective::threads(ranks, EXCHANGE, PATIENCE),
    };
    let rank = |(weights, collective): (Weights, Collective)| {
        let shard = Shard::of(&config, collective.rank(), collective.world());
        Ok(CpuModel::rank(device()?, config.clone(), weights, shard, collective))
    };
    let ranks = weights.into_iter().zip(collectives).map(rank).collect::<Result<_, LoadError>>()?;
    Ok((ranks, spec))
}

/// The directory's own name, also when it was given as `.`.
pub(crate) fn name(dir: &Path) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    whole.file_name().map_or_else(|| "model".to_string(), |name| name.to_string_lossy().into_owned())
}

/// Some of a tensor's rows.
struct Rows {
    tensor: String,
    /// Rows it has.
    of: usize,
    range: Range<usize>,
}

fn rows_of(whole: Matrix<'_>, range: Range<usize>) -> Matrix<'_> {
    let width = whole.cols * whole.dtype.bytes();
    Matrix { bytes: &whole.bytes[range.start * width..range.end * width], rows: range.len(), ..whole }
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    cpu: &'a Cpu,
    /// What is loaded of each tensor; rank 0 checks and hashes all of it.
    shard: Shard,
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
        let (heads, hidden, wide) = (config.heads, config.hidden, config.intermediate);
        let (dim, q, kv) = (heads.head_dim, heads.width(), heads.kv_heads * heads.head_dim);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let weight = |part: &str| name(&format!("{part}.weight"));
        let of_heads = |heads: Range<usize>| heads.start * dim..heads.end * dim;
        let (own_q, own_kv, own_wide) = (of_heads(self.shard.q()), of_heads(self.shard.k()), self.shard.inner.clone());
        let qkv = [
            ("self_attn.q_proj", q, own_q.clone()),
            ("self_attn.k_proj", kv, own_kv.clone()),
            ("self_attn.v_proj", kv, own_kv),
        ];
        let gate_up = [("mlp.gate_proj", wide, own_wide.clone()), ("mlp.up_proj", wide, own_wide.clone())];
        let out = [("self_attn.o_proj", hidden, 0..hidden)];
        let down = [("mlp.down_proj", hidden, 0..hidden)];
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
            gate_up: self.matrix(&tensors(&gate_up, "weight"), hidden)?,
            gate_up_bias: self.bias(config.mlp_bias, &tensors(&gate_up, "bias"))?,
            down: self.columns(&tensors(&down, "weight")[0], wide, own_wide)?,
            down_bias: self.bias(config.mlp_bias, &tensors(&down, "bias"))?,
            window: config.windows[layer],
        })
    }

    /// Some rows of each of the named tensors, one below the other.
    fn matrix(&mut self, parts: &[Rows], cols: usize) -> Result<Packed, LoadError> {
        let tensors = parts.iter().map(|part| self.checkpoint.tensor(&part.tensor, &[part.of, cols]));
        let tensors = tensors.collect::<Result<Vec<Tensor>, LoadError>>()?;
        tensors.iter().try_for_each(|tensor| self.inspect(tensor))?;
        let whole = tensors.iter().map(Tensor::matrix);
        let matrices: Vec<_> = whole.zip(parts).map(|(whole, part)| rows_of(whole, part.range.clone())).collect();
        let packed = self.cpu.pack(&matrices);
        tensors.iter().for_each(Tensor::give_pages_back);
        Ok(packed)
    }

    /// Some columns of the named tensor.
    fn columns(&mut self, part: &Rows, cols: usize, own: Range<usize>) -> Result<Packed, LoadError> {
        if own == (0..cols) {
            return self.matrix(std::slice::from_ref(part), cols);
        }
        let tensor = self.checkpoint.tensor(&part.tensor, &[part.of, cols])?;
        self.inspect(&tensor)?;
        let whole = tensor.matrix();
        let bytes = whole.dtype.bytes();
        let cut = |row: &[u8]| row[own.start * bytes..own.end * bytes].to_vec();
        let kept: Vec<u8> = whole.bytes.chunks_exact(cols * bytes).flat_map(cut).collect();
        let packed = self.cpu.pack(&[Matrix { bytes: &kept, cols: own.len(), ..whole }]);
        tensor.give_pages_back();
        Ok(packed)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        let tensor = self.checkpoint.tensor(name, &[len])?;
        self.inspect(&tensor)?;
        Ok(tensor.values())
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
        self.done += tensor.bytes.len() as u64;
        (self.progress)(Progress {
            phase: Phase::Weights,
            bytes_done: self.done.min(self.total),
            bytes_total: self.total,
        });
        Ok(())
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
