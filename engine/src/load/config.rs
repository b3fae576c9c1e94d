//! config.json and generation_config.json of both generations (`torch_dtype`, `rope_theta`, `rope_scaling`; `dtype`,
//! `rope_parameters`), checked into one struct. Everything later trusts it.

use std::path::{Path, PathBuf};

use baton_core::TokenId;
use baton_kernels::Heads;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::load::error::LoadError;

/// Architectures that can be served, as config.json names them.
pub const SUPPORTED: &[&str] = &[
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",
    "Qwen3MoeForCausalLM",
    "MixtralForCausalLM",
];

/// Longest sequence served, whatever the model claims: it bounds the table of rotations.
const POSITIONS_MAX: usize = 131_072;
/// Bounds of any size in config.json; beyond them the file is wrong, not the model large.
const SIZE_MAX: usize = 1 << 24;
const LAYERS_MAX: usize = 1024;
pub(crate) const EXPERTS_MAX: usize = 1024;

/// A decoder-only transformer's shape. The families differ only in these fields.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: Heads,
    pub vocab: usize,
    pub positions_max: usize,
    /// Of every RMS norm.
    pub eps: f32,
    /// Rotation per position of each pair of dimensions.
    pub inv_freq: Vec<f64>,
    /// The output matrix is the embedding.
    pub tied: bool,
    pub qkv_bias: bool,
    pub out_bias: bool,
    pub mlp_bias: bool,
    pub qk_norm: bool,
    /// Sliding window of each layer, in positions.
    pub windows: Vec<Option<usize>>,
    /// Experts in place of some layers' MLPs.
    pub mixture: Option<Mixture>,
    /// Tokens that end a sequence, sorted.
    pub eos: Vec<TokenId>,
}

/// A mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixture {
    pub experts: usize,
    /// Experts per row.
    pub used: usize,
    /// Inner width of each expert.
    pub intermediate: usize,
    /// Weights are a softmax over the chosen experts, not over all.
    pub over_chosen: bool,
    /// Whether each layer has experts.
    pub layers: Vec<bool>,
    pub(crate) names: &'static MixtureNames,
}

/// What files call the tensors of a mixture.
#[derive(Debug, PartialEq)]
pub(crate) struct MixtureNames {
    /// What the router and the experts are parts of.
    pub(crate) block: &'static str,
    pub(crate) gate: &'static str,
    pub(crate) up: &'static str,
    pub(crate) down: &'static str,
}

pub(crate) const QWEN: &MixtureNames =
    &MixtureNames { block: "mlp", gate: "gate_proj", up: "up_proj", down: "down_proj" };
pub(crate) const MIXTRAL: &MixtureNames = &MixtureNames { block: "block_sparse_moe", gate: "w1", up: "w3", down: "w2" };

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Llama,
    Qwen2,
    Qwen3,
    Mistral,
    Qwen3Moe,
    Mixtral,
}

/// The keys of config.json that matter, as they are written.
#[derive(Deserialize)]
struct Raw {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Rope>,
    rope_parameters: Option<Rope>,
    partial_rotary_factor: Option<f64>,
    /// Absent and null differ for Mistral.
    #[serde(default, deserialize_with = "present")]
    sliding_window: Option<Option<usize>>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    num_experts: Option<usize>,
    num_local_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    moe_intermediate_size: Option<usize>,
    norm_topk_prob: Option<bool>,
    decoder_sparse_step: Option<usize>,
    mlp_only_layers: Option<Vec<usize>>,
    quantization_config: Option<Value>,
    eos_token_id: Option<Ids>,
}

/// `rope_scaling`, or `rope_parameters`, which carries theta too.
#[derive(Deserialize, Default)]
struct Rope {
    rope_type: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(TokenId),
    Many(Vec<TokenId>),
}

impl Ids {
    fn list(self) -> Vec<TokenId> {
        match self {
            Ids::One(id) => vec![id],
            Ids::Many(ids) => ids,
        }
    }
}

#[derive(Deserialize)]
struct Generation {
    eos_token_id: Option<Ids>,
}

fn present<'de, D: serde::Deserializer<'de>>(value: D) -> Result<Option<Option<usize>>, D::Error> {
    Option::deserialize(value).map(Some)
}

impl ModelConfig {
    /// Reads and checks the configuration in `dir`.
    pub fn read(dir: &Path) -> Result<ModelConfig, LoadError> {
        let file = dir.join("config.json");
        let value = read_json(&file)?;
        let generation = dir.join("generation_config.json");
        let more = match generation.exists() {
            true => read_json::<Generation>(&generation)?.eos_token_id.map(Ids::list).unwrap_or_default(),
            false => Vec::new(),
        };
        ModelConfig::check(&file, value, more)
    }

    /// Checks what config.json says, or what another file says in its words. `more` are further tokens that end sequences.
    pub(crate) fn check(file: &Path, value: Value, more: Vec<TokenId>) -> Result<ModelConfig, LoadError> {
        let family = family(file, &value)?;
        let raw: Raw =
            serde_json::from_value(value).map_err(|error| LoadError::Json { file: file.to_path_buf(), error })?;
        let mut config = check(file, family, raw)?;
        config.eos.extend(more);
        config.eos.sort_unstable();
        config.eos.dedup();
        config.eos.retain(|id| (*id as usize) < config.vocab);
        Ok(config)
    }

    /// Text that is equal exactly for configurations that compute the same.
    pub fn describe(&self) -> String {
        let all = format!("{:?}", ModelConfig { eos: Vec::new(), ..self.clone() });
        // As before there were mixtures: hashes of models without one stay what they were.
        all.replace(", mixture: None", "")
    }
}

fn read_json<T: DeserializeOwned>(file: &Path) -> Result<T, LoadError> {
    let text = std::fs::read(file).map_err(|error| LoadError::Unreadable { file: file.to_path_buf(), error })?;
    serde_json::from_slice(&text).map_err(|error| LoadError::Json { file: file.to_path_buf(), error })
}

fn family(file: &Path, value: &Value) -> Result<Family, LoadError> {
    let found = value["architectures"][0].as_str().unwrap_or("none").to_string();
    match found.as_str() {
        "LlamaForCausalLM" => Ok(Family::Llama),
        "Qwen2ForCausalLM" => Ok(Family::Qwen2),
        "Qwen3ForCausalLM" => Ok(Family::Qwen3),
        "MistralForCausalLM" => Ok(Family::Mistral),
        "Qwen3MoeForCausalLM" => Ok(Family::Qwen3Moe),
        "MixtralForCausalLM" => Ok(Family::Mixtral),
        _ => Err(LoadError::Architecture { file: file.to_path_buf(), found, supported: SUPPORTED }),
    }
}

/// Builds errors about one file.
struct Checker<'a> {
    file: &'a Path,
}

impl Checker<'_> {
    fn wrong(&self, key: &'static str, found: impl ToString, expected: impl ToString) -> LoadError {
        LoadError::Config {
            file: PathBuf::from(self.file),
            key,
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    fn size(&self, key: &'static str, value: usize, max: usize) -> Result<usize, LoadError> {
        match (1..=max).contains(&value) {
            true => Ok(value),
            false => Err(self.wrong(key, value, format!("a number from 1 to {max}"))),
        }
    }

    fn positive(&self, key: &'static str, value: f64) -> Result<f64, LoadError> {
        match value.is_finite() && value > 0.0 {
            true => Ok(value),
            false => Err(self.wrong(key, value, "a positive number")),
        }
    }
}

/// Quantized weights that are understood.
const EIGHTS: &str = "none (weights in F32, F16 or BF16), 8-bit integers: quant_method compressed-tensors with format \
                      int-quantized or pack-quantized and symmetric weights of 8 bits, or 8-bit floating-point weights: \
                      quant_method fp8 with fmt e4m3 and \
                      weight_block_size [128, 128] or none, or quant_method compressed-tensors with format float-quantized and \
                      weights of 8 bits, symmetric, of the strategy tensor, channel or block [128, 128]";

/// Whether `quantization_config` says that weights are 8-bit integers with scales that the checkpoint has. What it says of
/// activations is left aside: they become integers in the kernels' own way, 32 at a time.
fn is_integers(found: &Value) -> bool {
    let groups = found["config_groups"].as_object();
    let understood = |group: &Value| {
        let weights = &group["weights"];
        weights["num_bits"] == 8
            && weights["type"] == "int"
            && weights["symmetric"] != false
            && weights["actorder"].is_null()
            && matches!(weights["strategy"].as_str(), Some("tensor" | "channel" | "group"))
    };
    found["quant_method"] == "compressed-tensors"
        && matches!(found["format"].as_str(), Some("int-quantized" | "pack-quantized"))
        && groups.is_some_and(|groups| !groups.is_empty() && groups.values().all(understood))
}

/// Whether `quantization_config` says that weights are e4m3 with scales that the checkpoint has. What it says of activations
/// is left aside: they stay bf16, which is nearer to the model that was quantized.
fn is_eights(found: &Value) -> bool {
    let block = |found: &Value| found.is_null() || *found == json!([128, 128]);
    match found["quant_method"].as_str() {
        Some("fp8") => matches!(found["fmt"].as_str(), None | Some("e4m3")) && block(&found["weight_block_size"]),
        Some("compressed-tensors") => {
            let groups = found["config_groups"].as_object();
            let understood = |group: &Value| {
                let weights = &group["weights"];
                weights["num_bits"] == 8
                    && weights["type"] == "float"
                    && weights["symmetric"] != false
                    && matches!(weights["strategy"].as_str(), Some("tensor" | "channel" | "block"))
                    && block(&weights["block_structure"])
            };
            found["format"] == "float-quantized"
                && groups.is_some_and(|groups| !groups.is_empty() && groups.values().all(understood))
        }
        _ => false,
    }
}

fn check(file: &Path, family: Family, raw: Raw) -> Result<ModelConfig, LoadError> {
    let checker = Checker { file };
    let unknown = |found: &&Value| !is_eights(found) && !is_integers(found);
    if let Some(found) = raw.quantization_config.as_ref().filter(unknown) {
        return Err(checker.wrong("quantization_config", found, EIGHTS));
    }
    if let Some(act) = raw.hidden_act.as_deref().filter(|act| *act != "silu") {
        return Err(checker.wrong("hidden_act", act, "silu"));
    }
    let heads = check_heads(&checker, family, &raw)?;
    let layers = checker.size("num_hidden_layers", raw.num_hidden_layers, LAYERS_MAX)?;
    let positions = checker.size("max_position_embeddings", raw.max_position_embeddings.unwrap_or(2048), usize::MAX)?;
    let attention_bias = raw.attention_bias.unwrap_or(false);
    Ok(ModelConfig {
        hidden: checker.size("hidden_size", raw.hidden_size, SIZE_MAX)?,
        intermediate: checker.size("intermediate_size", raw.intermediate_size, SIZE_MAX)?,
        layers,
        heads,
        vocab: checker.size("vocab_size", raw.vocab_size, SIZE_MAX)?,
        positions_max: positions.min(POSITIONS_MAX),
        eps: checker.positive("rms_norm_eps", raw.rms_norm_eps.unwrap_or(1e-6))? as f32,
        inv_freq: inv_freq(&checker, &raw, heads.head_dim)?,
        tied: raw.tie_word_embeddings.unwrap_or(false),
        qkv_bias: family == Family::Qwen2 || attention_bias,
        out_bias: family != Family::Qwen2 && attention_bias,
        mlp_bias: family == Family::Llama && raw.mlp_bias.unwrap_or(false),
        qk_norm: matches!(family, Family::Qwen3 | Family::Qwen3Moe),
        windows: windows(&checker, family, &raw, layers)?,
        mixture: mixture(&checker, family, &raw, layers)?,
        eos: raw.eos_token_id.map(Ids::list).unwrap_or_default(),
    })
}

fn check_heads(checker: &Checker, family: Family, raw: &Raw) -> Result<Heads, LoadError> {
    let heads = checker.size("num_attention_heads", raw.num_attention_heads, SIZE_MAX)?;
    let kv_heads = checker.size("num_key_value_heads", raw.num_key_value_heads.unwrap_or(heads), SIZE_MAX)?;
    if !heads.is_multiple_of(kv_heads) {
        return Err(checker.wrong(
            "num_key_value_heads",
            kv_heads,
            format!("a divisor of num_attention_heads, {heads}"),
        ));
    }
    let default = match family {
        Family::Qwen3 => Some(128),
        _ => raw.hidden_size.is_multiple_of(heads).then_some(raw.hidden_size / heads),
    };
    let Some(head_dim) = raw.head_dim.or(default) else {
        let expected = format!("a multiple of num_attention_heads, {heads}, or a head_dim");
        return Err(checker.wrong("hidden_size", raw.hidden_size, expected));
    };
    match checker.size("head_dim", head_dim, SIZE_MAX)?.is_multiple_of(2) {
        true => Ok(Heads { heads, kv_heads, head_dim }),
        false => Err(checker.wrong("head_dim", head_dim, "an even number")),
    }
}

/// Experts as transformers reads them: Mixtral has them in every layer; Qwen in every `decoder_sparse_step`th one but those
/// of `mlp_only_layers`.
fn mixture(checker: &Checker, family: Family, raw: &Raw, layers: usize) -> Result<Option<Mixture>, LoadError> {
    let (experts, intermediate, names) = match family {
        Family::Qwen3Moe => (("num_experts", raw.num_experts), raw.moe_intermediate_size, QWEN),
        Family::Mixtral => (("num_local_experts", raw.num_local_experts), Some(raw.intermediate_size), MIXTRAL),
        _ => return Ok(None),
    };
    let experts = checker.size(experts.0, experts.1.unwrap_or(0), EXPERTS_MAX)?;
    let every = checker.size("decoder_sparse_step", raw.decoder_sparse_step.unwrap_or(1), LAYERS_MAX)?;
    let plain = raw.mlp_only_layers.as_deref().unwrap_or_default();
    Ok(Some(Mixture {
        experts,
        used: checker.size("num_experts_per_tok", raw.num_experts_per_tok.unwrap_or(0), experts)?,
        intermediate: checker.size("moe_intermediate_size", intermediate.unwrap_or(0), SIZE_MAX)?,
        over_chosen: family == Family::Mixtral || raw.norm_topk_prob.unwrap_or(false),
        layers: (0..layers).map(|layer| (layer + 1).is_multiple_of(every) && !plain.contains(&layer)).collect(),
        names,
    }))
}

/// Sliding windows as transformers reads them: Qwen has them only when `use_sliding_window`, and not in its first
/// `max_window_layers` layers; Mistral and Mixtral in every layer unless `sliding_window` is null.
fn windows(checker: &Checker, family: Family, raw: &Raw, layers: usize) -> Result<Vec<Option<usize>>, LoadError> {
    let window = match family {
        Family::Llama => None,
        Family::Mistral => raw.sliding_window.unwrap_or(Some(4096)),
        Family::Mixtral => raw.sliding_window.flatten(),
        Family::Qwen2 | Family::Qwen3 | Family::Qwen3Moe => {
            raw.sliding_window.flatten().filter(|_| raw.use_sliding_window == Some(true))
        }
    };
    let Some(window) = window else { return Ok(vec![None; layers]) };
    let window = checker.size("sliding_window", window, usize::MAX)?;
    if matches!(family, Family::Mistral | Family::Mixtral) {
        return Ok(vec![Some(window); layers]);
    }
    if let Some(types) = &raw.layer_types {
        if types.len() != layers {
            return Err(checker.wrong("layer_types", format!("{} entries", types.len()), format!("{layers} entries")));
        }
        return Ok(types.iter().map(|kind| (kind == "sliding_attention").then_some(window)).collect());
    }
    let full = raw.max_window_layers.unwrap_or(28);
    Ok((0..layers).map(|layer| (layer >= full).then_some(window)).collect())
}

/// RoPE frequencies, theta^(-2i/d), scaled as the model asks.
fn inv_freq(checker: &Checker, raw: &Raw, head_dim: usize) -> Result<Vec<f64>, LoadError> {
    let none = Rope::default();
    let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref()).unwrap_or(&none);
    let partial = raw.partial_rotary_factor.or(rope.partial_rotary_factor).unwrap_or(1.0);
    if partial != 1.0 {
        return Err(checker.wrong("partial_rotary_factor", partial, 1));
    }
    let theta = checker.positive("rope_theta", rope.rope_theta.or(raw.rope_theta).unwrap_or(10_000.0))?;
    let plain = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64));
    match rope.rope_type.as_deref().or(rope.kind.as_deref()).unwrap_or("default") {
        "default" => Ok(plain.collect()),
        "linear" => {
            let factor = checker.positive("rope_scaling.factor", rope.factor.unwrap_or(f64::NAN))?;
            Ok(plain.map(|frequency| frequency / factor).collect())
        }
        "llama3" => {
            let scaling = Llama3::check(checker, rope)?;
            Ok(plain.map(|frequency| scaling.scale(frequency)).collect())
        }
        other => Err(LoadError::RopeScaling { file: checker.file.to_path_buf(), found: other.to_string() }),
    }
}

/// Llama 3.1's scaling: long wavelengths are divided by `factor`, short ones kept, those between blended.
struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    positions: f64,
}

impl Llama3 {
    fn check(checker: &Checker, rope: &Rope) -> Result<Llama3, LoadError> {
        let number = |key, value: Option<f64>| checker.positive(key, value.unwrap_or(f64::NAN));
        let low = number("rope_scaling.low_freq_factor", rope.low_freq_factor)?;
        let high = number("rope_scaling.high_freq_factor", rope.high_freq_factor)?;
        if high <= low {
            return Err(checker.wrong(
                "rope_scaling.high_freq_factor",
                high,
                format!("more than low_freq_factor, {low}"),
            ));
        }
        let positions = number("rope_scaling.original_max_position_embeddings", rope.original_max_position_embeddings)?;
        Ok(Llama3 { factor: number("rope_scaling.factor", rope.factor)?, low, high, positions })
    }

    fn scale(&self, frequency: f64) -> f64 {
        let turns = self.positions * frequency / std::f64::consts::TAU;
        let smooth = ((turns - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        (1.0 - smooth) * frequency / self.factor + smooth * frequency
    }
}
