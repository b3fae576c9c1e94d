//! From a model directory into a GPU's memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use baton_core::limits::BLOCK_TOKENS;
use baton_core::{BlockLayout, KvDtype, NumericsClass};
use baton_kernels::F8Matrix;
use baton_kernels::cuda::{Cubins, Floats, Gpu, GpuError, GpuMatrix, check_heads};
use xxhash_rust::xxh3::Xxh3;

use super::{Dense, Experts, GpuModel, Layer, Mlp, Weights};
use crate::load::checkpoint::{Checkpoint, Tensor};
use crate::load::config::{Mixture, ModelConfig};
use crate::load::error::LoadError;
use crate::load::{Phase, Progress, name};
use crate::spec::ModelSpec;

/// Which GPU, and where compiled kernels are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuOptions {
    pub index: usize,
    pub cubins: PathBuf,
    /// Threads that check the weights while they are read.
    pub threads: usize,
}

/// A model in a GPU's memory.
pub struct LoadedGpu {
    pub model: GpuModel,
    pub spec: ModelSpec,
}

impl From<GpuError> for LoadError {
    fn from(error: GpuError) -> LoadError {
        LoadError::Device(error.to_string())
    }
}

/// Opens the GPU and loads the model in `dir` into it, or says what is missing.
pub fn load(dir: &Path, options: &GpuOptions, progress: &mut dyn FnMut(Progress)) -> Result<LoadedGpu, LoadError> {
    let gpu = Gpu::open(options.index, &Cubins::new(&options.cubins))?;
    load_on(gpu, dir, options.threads, progress)
}

impl LoadedGpu {
    /// On an opened GPU.
    pub fn on(
        gpu: Gpu,
        dir: &Path,
        threads: usize,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<LoadedGpu, LoadError> {
        load_on(gpu, dir, threads, progress)
    }
}

fn load_on(gpu: Gpu, dir: &Path, threads: usize, progress: &mut dyn FnMut(Progress)) -> Result<LoadedGpu, LoadError> {
    progress(Progress { phase: Phase::Open, bytes_done: 0, bytes_total: 0 });
    let config = ModelConfig::read(dir)?;
    check_heads(&config.heads)?;
    let checkpoint = Checkpoint::open(dir)?;
    enough(gpu.name(), gpu.memory()?.0 as u64, checkpoint.kept_bytes())?;
    let total = checkpoint.bytes();
    let mut loader = Loader {
        checkpoint: &checkpoint,
        gpu: &gpu,
        threads,
        progress,
        done: 0,
        total,
        parameters: 0,
        digests: Vec::new(),
    };
    let weights = loader.weights(&config)?;
    let (parameters, weights_hash) = (loader.parameters, loader.hash(&config));
    gpu.finish()?;
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
        numerics: NumericsClass::new(&weights_hash, gpu.profile(), layout.dtype.as_str()),
        weights_hash,
        parameters,
    };
    Ok(LoadedGpu { model: GpuModel::new(gpu, config, weights)?, spec })
}

/// Refuses a model whose weights do not fit, before anything of it is read.
fn enough(gpu: &str, free: u64, needed: u64) -> Result<(), LoadError> {
    if needed < free {
        return Ok(());
    }
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    Err(LoadError::Device(format!(
        "{gpu} has {:.1} GiB free, and the weights alone need {:.1} GiB: {:.1} GiB are missing; free memory on it, name another \
         GPU with --device cuda:INDEX, take a model of at most {:.1} billion parameters in 16 bits, or compute on the CPU",
        gib(free),
        gib(needed),
        gib(needed - free),
        free as f64 / 2e9,
    )))
}

/// Reads tensor by tensor, as `load::Loader`, with the GPU's memory as the place they go to.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    gpu: &'a Gpu,
    threads: usize,
    progress: &'a mut dyn FnMut(Progress),
    done: u64,
    total: u64,
    parameters: u64,
    digests: Vec<(String, u128)>,
}

impl<'a> Loader<'a> {
    fn weights(&mut self, config: &ModelConfig) -> Result<Weights, LoadError> {
        let (vocab, hidden) = (config.vocab, config.hidden);
        let embedding = Arc::new(self.table("model.embed_tokens.weight", vocab, hidden)?);
        let layers = (0..config.layers).map(|layer| self.layer(config, layer)).collect::<Result<_, _>>()?;
        let norm = self.vector("model.norm.weight", hidden)?;
        let head = match config.tied {
            true => embedding.clone(),
            false => Arc::new(self.matrix(&[("lm_head.weight".into(), vocab)], hidden)?),
        };
        Ok(Weights { embedding, layers, norm, head })
    }

    fn layer(&mut self, config: &ModelConfig, layer: usize) -> Result<Layer, LoadError> {
        let (heads, hidden) = (config.heads, config.hidden);
        let (q, kv) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let weight = |part: &str| name(&format!("{part}.weight"));
        let qkv = [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)];
        let out = [("self_attn.o_proj", hidden)];
        let named = |parts: &[(&str, usize)], kind: &str| -> Vec<(String, usize)> {
            parts.iter().map(|(part, rows)| (name(&format!("{part}.{kind}")), *rows)).collect()
        };
        Ok(Layer {
            attention_norm: self.vector(&weight("input_layernorm"), hidden)?,
            qkv: self.matrix(&named(&qkv, "weight"), hidden)?,
            qkv_bias: self.bias(config.qkv_bias, &named(&qkv, "bias"))?,
            q_norm: self.norm(config.qk_norm, &weight("self_attn.q_norm"), heads.head_dim)?,
            k_norm: self.norm(config.qk_norm, &weight("self_attn.k_norm"), heads.head_dim)?,
            out: self.matrix(&named(&out, "weight"), q)?,
            out_bias: self.bias(config.out_bias, &named(&out, "bias"))?,
            mlp_norm: self.vector(&weight("post_attention_layernorm"), hidden)?,
            mlp: match config.mixture.as_ref().filter(|mixture| mixture.layers[layer]) {
                Some(mixture) => Mlp::Experts(self.experts(mixture, hidden, layer)?),
                None => Mlp::Dense(self.dense(config, layer)?),
            },
            window: config.windows[layer],
        })
    }

    fn dense(&mut self, config: &ModelConfig, layer: usize) -> Result<Dense, LoadError> {
        let (hidden, wide) = (config.hidden, config.intermediate);
        let named = |part: &str, kind: &str, rows: usize| (format!("model.layers.{layer}.mlp.{part}.{kind}"), rows);
        let gate_up = |kind: &str| ["gate_proj", "up_proj"].map(|part| named(part, kind, wide));
        let down = |kind: &str| named("down_proj", kind, hidden);
        Ok(Dense {
            gate_up: self.matrix(&gate_up("weight"), hidden)?,
            gate_up_bias: self.bias(config.mlp_bias, &gate_up("bias"))?,
            down: self.matrix(&[down("weight")], wide)?,
            down_bias: self.bias(config.mlp_bias, &[down("bias")])?,
        })
    }

    fn experts(&mut self, mixture: &Mixture, hidden: usize, layer: usize) -> Result<Experts, LoadError> {
        let Mixture { experts, used, intermediate: wide, names, .. } = *mixture;
        let block = format!("model.layers.{layer}.{}", names.block);
        let named = |expert: usize, part: &str, rows: usize| (format!("{block}.experts.{expert}.{part}.weight"), rows);
        let gate_up = |expert| [names.gate, names.up].map(|part| named(expert, part, wide));
        let gate_up: Vec<(String, usize)> = (0..experts).flat_map(gate_up).collect();
        let down: Vec<(String, usize)> = (0..experts).map(|expert| named(expert, names.down, hidden)).collect();
        Ok(Experts {
            router: self.table(&format!("{block}.gate.weight"), experts, hidden)?,
            gate_up: self.of_experts(&gate_up, 2, hidden)?,
            down: self.of_experts(&down, 1, wide)?,
            used,
        })
    }

    /// The matrices of all experts as one, of so many parts each.
    fn of_experts(&mut self, parts: &[(String, usize)], each: usize, cols: usize) -> Result<GpuMatrix, LoadError> {
        let mut tensors = self.floats(parts, cols)?;
        let eights: Option<Vec<F8Matrix>> = tensors.iter().map(Tensor::eights).collect();
        let experts: Option<Vec<Vec<F8Matrix>>> = eights.map(|all| all.chunks(each).map(<[_]>::to_vec).collect());
        let matrix = match experts.filter(|experts| GpuMatrix::keeps_experts(experts)) {
            Some(experts) => self.gpu.matrix_f8_of_experts(&experts)?,
            None => self.widened(&mut tensors)?,
        };
        tensors.iter().for_each(Tensor::give_pages_back);
        Ok(matrix)
    }

    fn matrix(&mut self, parts: &[(String, usize)], cols: usize) -> Result<GpuMatrix, LoadError> {
        let mut tensors = self.floats(parts, cols)?;
        let eights: Option<Vec<F8Matrix>> = tensors.iter().map(Tensor::eights).collect();
        let matrix = match eights.filter(|parts| GpuMatrix::keeps(parts)) {
            Some(parts) => self.gpu.matrix_f8(&parts)?,
            None => self.widened(&mut tensors)?,
        };
        tensors.iter().for_each(Tensor::give_pages_back);
        Ok(matrix)
    }

    fn widened(&mut self, tensors: &mut [Tensor]) -> Result<GpuMatrix, LoadError> {
        tensors.iter_mut().for_each(Tensor::widen);
        Ok(self.gpu.matrix(&tensors.iter().map(Tensor::matrix).collect::<Vec<_>>())?)
    }

    /// Tensors that are numbers as a GPU knows them, once they are inspected.
    fn floats(&mut self, parts: &[(String, usize)], cols: usize) -> Result<Vec<Tensor<'a>>, LoadError> {
        let tensors = parts.iter().map(|(name, rows)| self.checkpoint.kept(name, &[*rows, cols]));
        let tensors = tensors.collect::<Result<Vec<Tensor>, LoadError>>()?;
        if let Some(tensor) = tensors.iter().find(|tensor| !tensor.dtype.is_float()) {
            let name = &tensor.name;
            return Err(LoadError::Device(format!("{name} is of 8-bit integers, which are for --device cpu")));
        }
        tensors.iter().try_for_each(|tensor| self.inspect(tensor))?;
        Ok(tensors)
    }

    /// A matrix whose rows are looked up: bf16.
    fn table(&mut self, name: &str, rows: usize, cols: usize) -> Result<GpuMatrix, LoadError> {
        let tensor = self.checkpoint.tensor(name, &[rows, cols])?;
        self.inspect(&tensor)?;
        let matrix = self.gpu.matrix(&[tensor.matrix()])?;
        tensor.give_pages_back();
        Ok(matrix)
    }

    fn values(&mut self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        let tensor = self.checkpoint.tensor(name, &[len])?;
        self.inspect(&tensor)?;
        tensor.values()
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Floats, LoadError> {
        let values = self.values(name, len)?;
        Ok(self.gpu.floats_of(&values)?)
    }

    fn norm(&mut self, present: bool, name: &str, len: usize) -> Result<Option<Floats>, LoadError> {
        if present { self.vector(name, len).map(Some) } else { Ok(None) }
    }

    fn bias(&mut self, present: bool, parts: &[(String, usize)]) -> Result<Option<Floats>, LoadError> {
        if !present {
            return Ok(None);
        }
        let parts = parts.iter().map(|(name, len)| self.values(name, *len)).collect::<Result<Vec<_>, _>>()?;
        Ok(Some(self.gpu.floats_of(&parts.concat())?))
    }

    /// Refuses values that are not finite, and takes the content into the hash.
    fn inspect(&mut self, tensor: &Tensor) -> Result<(), LoadError> {
        let digest = tensor.inspect(self.threads)?;
        self.digests.push((tensor.name.clone(), digest));
        self.parameters += tensor.elements() as u64;
        self.done += tensor.stored_bytes() as u64;
        let (bytes_done, bytes_total) = (self.done.min(self.total), self.total);
        (self.progress)(Progress { phase: Phase::Weights, bytes_done, bytes_total });
        Ok(())
    }

    /// As the CPU's loader has it, so that equal weights have one name.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_memory_says_how_much_is_missing() {
        assert!(enough("GPU", 17 << 30, 16 << 30).is_ok());
        let error = enough("GPU", 10 << 30, 15 << 30).expect_err("5 GiB are missing").to_string();
        assert!(error.contains("10.0 GiB free") && error.contains("5.0 GiB are missing"), "{error}");
    }
}
