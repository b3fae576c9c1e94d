//! From a Hugging Face model directory to a model ready to run: config.json, generation_config.json, safetensors (one
//! file or shards with an index). Reads weights through a mapping and gives the pages back as soon as they are packed.

pub mod checkpoint;
pub mod config;
pub mod error;

use std::path::Path;
use std::sync::Arc;

use baton_core::limits::BLOCK_TOKENS;
use baton_core::{BlockLayout, KvDtype, NumericsClass};
use baton_kernels::{Cpu, Packed, Profile};
use xxhash_rust::xxh3::Xxh3;

use crate::load::checkpoint::{Checkpoint, Tensor};
use crate::load::config::ModelConfig;
use crate::load::error::LoadError;
use crate::model::{CpuModel, Layer, Weights};
use crate::spec::ModelSpec;

/// How to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    pub threads: usize,
    /// None: the fastest this machine has.
    pub profile: Option<Profile>,
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
    progress(Progress { phase: Phase::Open, bytes_done: 0, bytes_total: 0 });
    let config = ModelConfig::read(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    let profile = options.profile.unwrap_or_else(Profile::best);
    let cpu = Cpu::new(options.threads, profile).map_err(|unsupported| LoadError::Profile(unsupported.to_string()))?;
    let total = checkpoint.bytes();
    let mut loader =
        Loader { checkpoint: &checkpoint, cpu: &cpu, progress, done: 0, total, parameters: 0, digests: Vec::new() };
    let weights = loader.weights(&config)?;
    let (parameters, weights_hash) = (loader.parameters, loader.hash(&config));
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
    Ok(Loaded { model: CpuModel::new(cpu, config, weights), spec })
}

/// The directory's own name, also when it was given as `.`.
pub(crate) fn name(dir: &Path) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    whole.file_name().map_or_else(|| "model".to_string(), |name| name.to_string_lossy().into_owned())
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    cpu: &'a Cpu,
    progress: &'a mut dyn FnMut(Progress),
    done: u64,
    total: u64,
    parameters: u64,
    /// (tensor, its content).
    digests: Vec<(String, u128)>,
}

impl Loader<'_> {
    fn weights(&mut self, config: &ModelConfig) -> Result<Weights, LoadError> {
        let (vocab, hidden) = (config.vocab, config.hidden);
        let embedding = Arc::new(self.matrix(&[("model.embed_tokens.weight".into(), vocab)], hidden)?);
        let layers = (0..config.layers).map(|layer| self.layer(config, layer)).collect::<Result<_, _>>()?;
        let norm = self.vector("model.norm.weight", hidden)?;
        let head = match config.tied {
            true => embedding.clone(),
            false => Arc::new(self.matrix(&[("lm_head.weight".into(), vocab)], hidden)?),
        };
        Ok(Weights { embedding, layers, norm, head })
    }

    fn layer(&mut self, config: &ModelConfig, layer: usize) -> Result<Layer, LoadError> {
        let (heads, hidden, wide) = (config.heads, config.hidden, config.intermediate);
        let (q, kv) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let weight = |part: &str| name(&format!("{part}.weight"));
        let qkv = [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)];
        let gate_up = [("mlp.gate_proj", wide), ("mlp.up_proj", wide)];
        let out = [("self_attn.o_proj", hidden)];
        let down = [("mlp.down_proj", hidden)];
        let weights = |parts: &[(&str, usize)]| -> Vec<(String, usize)> {
            parts.iter().map(|(part, rows)| (weight(part), *rows)).collect()
        };
        let biases = |parts: &[(&str, usize)]| -> Vec<(String, usize)> {
            parts.iter().map(|(part, rows)| (name(&format!("{part}.bias")), *rows)).collect()
        };
        Ok(Layer {
            attention_norm: self.vector(&weight("input_layernorm"), hidden)?,
            qkv: self.matrix(&weights(&qkv), hidden)?,
            qkv_bias: self.bias(config.qkv_bias, &biases(&qkv))?,
            q_norm: self.norm(config.qk_norm, &weight("self_attn.q_norm"), heads.head_dim)?,
            k_norm: self.norm(config.qk_norm, &weight("self_attn.k_norm"), heads.head_dim)?,
            out: self.matrix(&weights(&out), q)?,
            out_bias: self.bias(config.out_bias, &biases(&out))?,
            mlp_norm: self.vector(&weight("post_attention_layernorm"), hidden)?,
            gate_up: self.matrix(&weights(&gate_up), hidden)?,
            gate_up_bias: self.bias(config.mlp_bias, &biases(&gate_up))?,
            down: self.matrix(&weights(&down), wide)?,
            down_bias: self.bias(config.mlp_bias, &biases(&down))?,
            window: config.windows[layer],
        })
    }

    /// The rows of the named tensors, one below the other.
    fn matrix(&mut self, parts: &[(String, usize)], cols: usize) -> Result<Packed, LoadError> {
        let tensors = parts.iter().map(|(name, rows)| self.checkpoint.tensor(name, &[*rows, cols]));
        let tensors = tensors.collect::<Result<Vec<Tensor>, LoadError>>()?;
        tensors.iter().try_for_each(|tensor| self.inspect(tensor))?;
        let matrices: Vec<_> = tensors.iter().map(Tensor::matrix).collect();
        let packed = self.cpu.pack(&matrices);
        tensors.iter().for_each(Tensor::give_pages_back);
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

    fn bias(&mut self, present: bool, parts: &[(String, usize)]) -> Result<Option<Vec<f32>>, LoadError> {
        if !present {
            return Ok(None);
        }
        let parts = parts.iter().map(|(name, len)| self.vector(name, *len));
        Ok(Some(parts.collect::<Result<Vec<_>, _>>()?.concat()))
    }

    /// Refuses values that are not finite, and takes the content into the hash.
    fn inspect(&mut self, tensor: &Tensor) -> Result<(), LoadError> {
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
