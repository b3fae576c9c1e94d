//! For tests of this and other crates: small random models of each family as Hugging Face directories, a model-free
//! spec, and the loop that drives an engine to the end of its work.

mod eights;
mod faulty_rank;
mod integers;
mod zero_block;

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use baton_core::{Arena, BlockLayout, KvDtype, Lane, NumericsClass, Request, RequestId, Rng, Sampling, TokenId};
use baton_kernels::Dtype;
use serde_json::{Value, json};

use crate::backend::Backend;
use crate::engine::Engine;
use crate::spec::ModelSpec;
use crate::work::{Choice, Event, Goal, Work};

/// One layer of a block, for tests that hold the block or own the arena alone.
pub fn layer_of(arena: &Arena, index: u32, layer: usize) -> Vec<u8> {
    let mut bytes = vec![0; arena.layout().layer_bytes()];
    // SAFETY: the caller holds the block as filled, or nobody else has the arena.
    unsafe { arena.read_layer(index, layer, &mut bytes) };
    bytes
}

pub use eights::Scaling;
pub use faulty_rank::{Fault, faulty_group};
pub use integers::Integers;
pub use zero_block::ZeroBlock;

/// A small model: what differs between families, and the sizes.
#[derive(Clone, Debug)]
pub struct TinyModel {
    /// As config.json names it.
    pub architecture: &'static str,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub positions_max: usize,
    pub tied: bool,
    /// Experts of each layer, two of which each row uses; 0 is an MLP.
    pub experts: usize,
    /// Layers of a Qwen3-MoE that have an MLP all the same.
    pub mlp_layers: &'static [usize],
    pub dtype: Dtype,
    /// Files the weights are cut into; 1 writes no index.
    pub shards: usize,
    /// Keys that are added to config.json or replace those in it; null removes one.
    pub config: Value,
}

impl TinyModel {
    /// A plain Llama; other families are made from it.
    pub fn llama() -> TinyModel {
        TinyModel {
            architecture: "LlamaForCausalLM",
            hidden: 64,
            intermediate: 96,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            vocab: 128,
            positions_max: 512,
            tied: false,
            experts: 0,
            mlp_layers: &[],
            dtype: Dtype::Bf16,
            shards: 1,
            config: json!({}),
        }
    }

    /// One model per family and feature.
    pub fn families() -> Vec<TinyModel> {
        let llama3 = json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}});
        let new_keys = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "dtype": "bfloat16",
            "rope_theta": null, "torch_dtype": null});
        let plain = TinyModel::llama();
        let of = |architecture: &'static str| TinyModel { architecture, ..plain.clone() };
        vec![
            TinyModel { config: llama3, ..plain.clone() },
            TinyModel { tied: true, dtype: Dtype::F16, shards: 3, ..of("Qwen2ForCausalLM") },
            TinyModel { head_dim: 32, tied: true, config: new_keys, ..of("Qwen3ForCausalLM") },
            TinyModel { dtype: Dtype::F32, config: json!({"sliding_window": 24}), ..of("MistralForCausalLM") },
            TinyModel { experts: 5, tied: true, ..of("Qwen3MoeForCausalLM") },
            TinyModel { experts: 4, ..of("MixtralForCausalLM") },
        ]
    }

    /// Writes config.json, generation_config.json and the weights drawn from `seed` into `dir`.
    pub fn write(&self, dir: &Path, seed: u64) -> io::Result<()> {
        std::fs::write(dir.join("config.json"), self.config_json().to_string())?;
        std::fs::write(dir.join("generation_config.json"), json!({"eos_token_id": [2, 3]}).to_string())?;
        let tensors = self.tensors();
        let values: Vec<Vec<f32>> = self.weights(seed).into_iter().map(|(.., values)| values).collect();
        let size = tensors.len().div_ceil(self.shards);
        let mut index = serde_json::Map::new();
        for (at, part) in tensors.chunks(size).enumerate() {
            let file = match self.shards {
                1 => "model.safetensors".to_string(),
                shards => format!("model-{:05}-of-{shards:05}.safetensors", at + 1),
            };
            part.iter().for_each(|(name, _)| drop(index.insert(name.clone(), json!(file))));
            write_safetensors(&dir.join(file), part, &values[at * size..], self.dtype)?;
        }
        match self.shards {
            1 => Ok(()),
            _ => std::fs::write(dir.join("model.safetensors.index.json"), json!({"weight_map": index}).to_string()),
        }
    }

    /// Name, shape and values of every tensor.
    pub fn weights(&self, seed: u64) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let mut rng = Rng::new(seed);
        let with_values = |(name, shape): (String, Vec<usize>)| {
            let values = random(&name, &shape, &mut rng);
            (name, shape, values)
        };
        self.tensors().into_iter().map(with_values).collect()
    }

    fn config_json(&self) -> Value {
        let mut config = json!({
            "architectures": [self.architecture], "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "vocab_size": self.vocab, "max_position_embeddings": self.positions_max,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": self.tied, "hidden_act": "silu",
            "sliding_window": null, "torch_dtype": "bfloat16", "eos_token_id": 2,
        });
        if self.experts > 0 {
            config["num_experts"] = json!(self.experts);
            config["num_local_experts"] = json!(self.experts);
            config["num_experts_per_tok"] = json!(2);
            config["moe_intermediate_size"] = json!(self.intermediate);
            config["norm_topk_prob"] = json!(true);
            config["mlp_only_layers"] = json!(self.mlp_layers);
        }
        for (key, value) in self.config.as_object().into_iter().flatten() {
            match value {
                Value::Null => drop(config.as_object_mut().and_then(|config| config.remove(key))),
                value => config[key] = value.clone(),
            }
        }
        config
    }

    /// Names and shapes, in the order of the file.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, wide, head_dim) = (self.hidden, self.intermediate, self.head_dim);
        let (q, kv) = (self.heads * head_dim, self.kv_heads * head_dim);
        let mut all = vec![("model.embed_tokens.weight".to_string(), vec![self.vocab, hidden])];
        for layer in 0..self.layers {
            let mut add =
                |part: &str, shape: &[usize]| all.push((format!("model.layers.{layer}.{part}"), shape.to_vec()));
            add("input_layernorm.weight", &[hidden]);
            for (part, rows) in [("q", q), ("k", kv), ("v", kv)] {
                add(&format!("self_attn.{part}_proj.weight"), &[rows, hidden]);
                if self.architecture == "Qwen2ForCausalLM" {
                    add(&format!("self_attn.{part}_proj.bias"), &[rows]);
                }
            }
            if self.architecture.starts_with("Qwen3") {
                add("self_attn.q_norm.weight", &[head_dim]);
                add("self_attn.k_norm.weight", &[head_dim]);
            }
            add("self_attn.o_proj.weight", &[hidden, q]);
            add("post_attention_layernorm.weight", &[hidden]);
            let (block, [gate, up, down]) = match self.architecture {
                "MixtralForCausalLM" => ("block_sparse_moe", ["w1", "w3", "w2"]),
                _ => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
            };
            let has_experts = self.experts > 0 && !self.mlp_layers.contains(&layer);
            let experts = (0..self.experts).map(|expert| format!("{block}.experts.{expert}"));
            let mlps: Vec<String> = if has_experts { experts.collect() } else { vec![block.to_string()] };
            if has_experts {
                add(&format!("{block}.gate.weight"), &[self.experts, hidden]);
            }
            for mlp in mlps {
                add(&format!("{mlp}.{gate}.weight"), &[wide, hidden]);
                add(&format!("{mlp}.{up}.weight"), &[wide, hidden]);
                add(&format!("{mlp}.{down}.weight"), &[hidden, wide]);
            }
        }
        all.push(("model.norm.weight".to_string(), vec![hidden]));
        if !self.tied {
            all.push(("lm_head.weight".to_string(), vec![self.vocab, hidden]));
        }
        all
    }
}

/// Norms around 1; everything else around 0, so wide that the tokens of a random model vary.
fn random(name: &str, shape: &[usize], rng: &mut Rng) -> Vec<f32> {
    let (middle, spread) = match name.contains("norm") {
        true => (1.0, 0.2),
        false => (0.0, 4.0 / (shape.last().copied().unwrap_or(1) as f64).sqrt()),
    };
    let count = shape.iter().product::<usize>();
    (0..count).map(|_| (middle + spread * (rng.f64() + rng.f64() + rng.f64() - 1.5)) as f32).collect()
}

fn write_safetensors(
    file: &Path,
    tensors: &[(String, Vec<usize>)],
    values: &[Vec<f32>],
    dtype: Dtype,
) -> io::Result<()> {
    let stored = tensors.iter().zip(values).map(|((name, shape), values)| (name.clone(), stored(shape, values, dtype)));
    write_tensors(file, &stored.collect::<Vec<_>>())
}

/// A tensor of a file: the name of its type, its shape and its bytes.
struct Stored {
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn stored(shape: &[usize], values: &[f32], dtype: Dtype) -> Stored {
    let (name, bytes) = match dtype {
        Dtype::F32 => ("F32", values.iter().flat_map(|value| value.to_le_bytes()).collect()),
        Dtype::F16 => ("F16", values.iter().flat_map(|value| to_f16(*value).to_le_bytes()).collect()),
        _ => ("BF16", values.iter().flat_map(|value| ((value.to_bits() >> 16) as u16).to_le_bytes()).collect()),
    };
    Stored { dtype: name, shape: shape.to_vec(), bytes }
}

fn write_tensors(file: &Path, tensors: &[(String, Stored)]) -> io::Result<()> {
    let (mut header, mut offset) = (serde_json::Map::new(), 0);
    for (name, Stored { dtype, shape, bytes }) in tensors {
        let end = offset + bytes.len();
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let header = Value::Object(header).to_string();
    let mut out = io::BufWriter::new(std::fs::File::create(file)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    tensors.iter().try_for_each(|(_, stored)| out.write_all(&stored.bytes))?;
    out.flush()
}

/// Toward zero; values below the normal range become zero.
fn to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let (sign, exponent) = ((bits >> 16 & 0x8000) as u16, (bits >> 23 & 0xff) as i32 - 127);
    match exponent {
        -14..=15 => sign | ((exponent + 15) as u16) << 10 | (bits >> 13 & 0x3ff) as u16,
        _ => sign,
    }
}

/// A spec for `HashBackend`: small blocks, 1,000 tokens, no end-of-sequence token.
pub fn hash_spec() -> ModelSpec {
    let layout = BlockLayout { layers: 2, kv_heads: 1, head_dim: 4, block_tokens: 4, dtype: KvDtype::Bf16 };
    ModelSpec {
        name: "hash".to_string(),
        layout,
        vocab: 1000,
        positions_max: 4096,
        eos: Vec::new(),
        weights_hash: "hash".to_string(),
        numerics: NumericsClass::new("hash", "hash", "bf16"),
        parameters: 0,
    }
}

/// A greedy request for `tokens_max` tokens.
pub fn request(id: u128, prompt: &[TokenId], tokens_max: u32) -> Request {
    Request {
        id: RequestId(id),
        tenant: "tenant".to_string(),
        lane: Lane::Interactive,
        model: "tiny".to_string(),
        prompt: prompt.into(),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        choices: 1,
        tokens_max,
        tokens_min: 0,
        stop_tokens: Vec::new(),
        ignore_eos: false,
        logprobs: None,
        prompt_logprobs: None,
        cache_salt: "salt".to_string(),
        deadline_ms: 60_000,
    }
}

/// All choices of a request from their beginning.
pub fn work(request: &Request) -> Work {
    let choices = (0..request.choices).map(|index| Choice { index, so_far: Vec::new() }).collect();
    Work { request: Arc::new(request.clone()), choices, goal: Goal::Generate, filled: None, moved: false }
}

/// One step; false when there was nothing to do.
pub fn step(engine: &mut Engine, backend: &mut dyn Backend, events: &mut Vec<Event>) -> bool {
    let Some(batch) = engine.plan() else { return false };
    let output = backend.run(&batch, &mut |_| {});
    engine.commit(batch, output, events);
    true
}

/// Steps until nothing is left to do, and returns all events.
pub fn drain(engine: &mut Engine, backend: &mut dyn Backend) -> Vec<Event> {
    let mut events = Vec::new();
    while step(engine, backend, &mut events) {}
    events
}
