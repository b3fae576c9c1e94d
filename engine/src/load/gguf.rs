//! GGUF files: the header, its keys as a config.json, and where each tensor lies, under the names that Hugging Face gives.
//! Everything is checked against the file's size before it is believed; nothing is allocated by a count that the file claims.
//! Source of the format: github.com/ggml-org/ggml, docs/gguf.md.

mod tokenizer;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use baton_kernels::Dtype;
use serde_json::{Map, Value as Json, json};

use crate::load::checkpoint;
use crate::load::config::{EXPERTS_MAX, MIXTRAL, MixtureNames, QWEN};
use crate::load::error::LoadError;

/// Entries of a header; more are refused.
const ENTRIES_MAX: u64 = 1 << 16;
/// Architectures that can be served, as GGUF names them.
const SUPPORTED: &[&str] = &["llama", "qwen2", "qwen3", "qwen3moe"];
/// Bytes of a name.
const NAME_MAX: usize = 256;

/// A checked header.
pub(crate) struct Header {
    keys: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Tensor>,
}

/// A value of a key: a number, or where its bytes lie.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(Range<usize>),
    /// Element type, count, and the bytes of all elements.
    List(u32, usize, Range<usize>),
}

/// Where one tensor lies.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tensor {
    /// Or the name of a type that is not supported.
    pub(crate) dtype: Result<Dtype, String>,
    /// Slowest dimension first.
    pub(crate) shape: Vec<usize>,
    /// Bytes of the file.
    pub(crate) bytes: Range<usize>,
    /// Rows of each head lie in pairs, as llama.cpp rotates them: the head's dimension.
    pub(crate) paired: Option<usize>,
}

/// Reads values one after another and never past the end.
struct Reader<'a> {
    file: &'a Path,
    bytes: &'a [u8],
    at: usize,
    /// What is being read, for errors.
    what: String,
}

impl Reader<'_> {
    fn wrong(&self, reason: impl Into<String>) -> LoadError {
        LoadError::Gguf { file: self.file.to_path_buf(), what: self.what.clone(), reason: reason.into() }
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, len: u64) -> Result<Range<usize>, LoadError> {
        let left = self.left();
        match usize::try_from(len).ok().filter(|len| *len <= left) {
            Some(len) => {
                self.at += len;
                Ok(self.at - len..self.at)
            }
            None => Err(self.wrong(format!("{len} bytes are claimed where {left} are left in the file"))),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], LoadError> {
        let range = self.take(N as u64)?;
        Ok(self.bytes[range].try_into().expect("N bytes were taken"))
    }

    fn u32(&mut self) -> Result<u32, LoadError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, LoadError> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<Range<usize>, LoadError> {
        let len = self.u64()?;
        let range = self.take(len)?;
        match std::str::from_utf8(&self.bytes[range.clone()]) {
            Ok(_) => Ok(range),
            Err(_) => Err(self.wrong("a text is not UTF-8")),
        }
    }

    fn name(&mut self) -> Result<String, LoadError> {
        let range = self.text()?;
        match range.len() {
            1..=NAME_MAX => Ok(String::from_utf8_lossy(&self.bytes[range]).into_owned()),
            len => Err(self.wrong(format!("a name has {len} bytes; expected 1 to {NAME_MAX}"))),
        }
    }

    fn value(&mut self, kind: u32) -> Result<Value, LoadError> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(self.array::<1>()?[0])),
            1 => Value::Signed(i64::from(self.array::<1>()?[0] as i8)),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::Unsigned(u64::from(self.u32()?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 => self.list()?,
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(self.wrong(format!("{other} is no type of value"))),
        })
    }

    fn list(&mut self) -> Result<Value, LoadError> {
        let (kind, count) = (self.u32()?, self.u64()?);
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            // A text has at least its length.
            8 | 10..=12 => 8,
            other => return Err(self.wrong(format!("a list of type {other} is not supported"))),
        };
        let Some(least) = count.checked_mul(size).filter(|least| *least <= self.left() as u64) else {
            return Err(self.wrong(format!("{count} elements are claimed where {} bytes are left", self.left())));
        };
        let start = self.at;
        match kind {
            8 => (0..count).try_for_each(|_| self.text().map(drop))?,
            _ => self.take(least).map(drop)?,
        }
        Ok(Value::List(kind, count as usize, start..self.at))
    }
}

impl Header {
    pub(crate) fn read(file: &Path, bytes: &[u8]) -> Result<Header, LoadError> {
        let mut reader = Reader { file, bytes, at: 0, what: "header".to_string() };
        if &reader.array::<4>()? != b"GGUF" {
            return Err(reader.wrong("not a GGUF file: it does not begin with GGUF"));
        }
        let version = reader.u32()?;
        if !(2..=3).contains(&version) {
            return Err(
                reader.wrong(format!("version {version} is not supported; supported are 2 and 3, little endian"))
            );
        }
        let (tensors, keys) = (reader.u64()?, reader.u64()?);
        if tensors.max(keys) > ENTRIES_MAX {
            let reason = format!("{tensors} tensors and {keys} keys are claimed; at most {ENTRIES_MAX} are expected");
            return Err(reader.wrong(reason));
        }
        let keys = read_keys(&mut reader, keys)?;
        let mut header = Header { keys, tensors: BTreeMap::new() };
        header.read_tensors(&mut reader, tensors)?;
        Ok(header)
    }

    fn read_tensors(&mut self, reader: &mut Reader, count: u64) -> Result<(), LoadError> {
        let mut claims = Vec::new();
        for _ in 0..count {
            reader.what = "tensors".to_string();
            let name = reader.name()?;
            reader.what = format!("tensor {name}");
            let dimensions = reader.u32()?;
            if !(1..=4).contains(&dimensions) {
                return Err(reader.wrong(format!("it has {dimensions} dimensions; expected 1 to 4")));
            }
            let mut shape = (0..dimensions).map(|_| reader.u64()).collect::<Result<Vec<_>, _>>()?;
            shape.reverse();
            claims.push((name, shape, reader.u32()?, reader.u64()?));
        }
        reader.what = "key general.alignment".to_string();
        let alignment = match self.keys.get("general.alignment") {
            None => 32,
            Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n as usize,
            Some(other) => return Err(reader.wrong(format!("it is {other:?}; expected a power of two"))),
        };
        // Of a file without tensors nothing is left.
        let start = reader.at.next_multiple_of(alignment).min(reader.bytes.len());
        for (name, shape, kind, offset) in claims {
            reader.what = format!("tensor {name}");
            let tensor = place(reader, shape, kind, offset, start)?;
            if self.tensors.insert(name, tensor).is_some() {
                return Err(reader.wrong("it is there twice"));
            }
        }
        Ok(())
    }

    fn number(&self, key: &str) -> Option<u64> {
        match self.keys.get(key)? {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    fn float(&self, key: &str) -> Option<f64> {
        match self.keys.get(key)? {
            Value::Float(x) => Some(*x),
            _ => None,
        }
    }

    fn text<'a>(&self, bytes: &'a [u8], key: &str) -> Option<&'a str> {
        match self.keys.get(key)? {
            Value::Text(range) => std::str::from_utf8(&bytes[range.clone()]).ok(),
            _ => None,
        }
    }

    fn count(&self, key: &str) -> Option<usize> {
        match self.keys.get(key)? {
            Value::List(_, count, _) => Some(*count),
            _ => None,
        }
    }

    /// The header's keys under the names of config.json, as far as they are there; `ModelConfig` checks them.
    pub(crate) fn config(&self, file: &Path, bytes: &[u8]) -> Result<Json, LoadError> {
        let architecture = self.text(bytes, "general.architecture").unwrap_or("none");
        let family = match architecture {
            "llama" if self.number("llama.expert_count").is_some_and(|count| count > 0) => "MixtralForCausalLM",
            "llama" => "LlamaForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            "qwen3moe" => "Qwen3MoeForCausalLM",
            other => {
                let found = other.to_string();
                return Err(LoadError::Architecture { file: file.to_path_buf(), found, supported: SUPPORTED });
            }
        };
        let key = |name: &str| format!("{architecture}.{name}");
        let mut config = Map::new();
        config.insert("architectures".to_string(), json!([family]));
        // It has no key: every model of these files has it so.
        config.insert("norm_topk_prob".to_string(), json!(true));
        let numbers = [
            ("hidden_size", "embedding_length"),
            ("intermediate_size", "feed_forward_length"),
            ("num_hidden_layers", "block_count"),
            ("num_attention_heads", "attention.head_count"),
            ("num_key_value_heads", "attention.head_count_kv"),
            ("head_dim", "attention.key_length"),
            ("max_position_embeddings", "context_length"),
            ("num_experts", "expert_count"),
            ("num_local_experts", "expert_count"),
            ("num_experts_per_tok", "expert_used_count"),
            ("moe_intermediate_size", "expert_feed_forward_length"),
        ];
        for (to, from) in numbers {
            if let Some(number) = self.number(&key(from)) {
                config.insert(to.to_string(), json!(number));
            }
        }
        for (to, from) in [("rms_norm_eps", "attention.layer_norm_rms_epsilon"), ("rope_theta", "rope.freq_base")] {
            if let Some(number) = self.float(&key(from)) {
                config.insert(to.to_string(), json!(number));
            }
        }
        let embedding = self.tensors.get("token_embd.weight").and_then(|tensor| tensor.shape.first().copied());
        let vocabulary = embedding.or(self.count("tokenizer.ggml.tokens"));
        config.insert("vocab_size".to_string(), json!(vocabulary.unwrap_or(0)));
        config.insert("tie_word_embeddings".to_string(), json!(!self.tensors.contains_key("output.weight")));
        let ends = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];
        let ends: Vec<u64> = ends.iter().filter_map(|key| self.number(key)).collect();
        config.insert("eos_token_id".to_string(), json!(ends));
        if let Some(kind) = self.text(bytes, &key("rope.scaling.type")).filter(|kind| *kind != "none") {
            let factor = self.float(&key("rope.scaling.factor"));
            config.insert("rope_scaling".to_string(), json!({"rope_type": kind, "factor": factor}));
        }
        Ok(Json::Object(config))
    }

    /// All tensors under Hugging Face's names; those that hold all experts' matrices of a layer, one by one.
    pub(crate) fn named(&self, bytes: &[u8]) -> BTreeMap<String, Tensor> {
        let head_dim = self.number("llama.attention.key_length").or_else(|| {
            let (width, heads) = (self.number("llama.embedding_length")?, self.number("llama.attention.head_count")?);
            width.checked_div(heads)
        });
        let is_llama = self.text(bytes, "general.architecture") == Some("llama");
        let names = if is_llama { MIXTRAL } else { QWEN };
        let paired = head_dim.filter(|_| is_llama);
        let mut named = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            if let Some(experts) = experts(name, tensor, names) {
                named.extend(experts);
                continue;
            }
            let paired = paired.filter(|_| name.contains("attn_q.") || name.contains("attn_k."));
            let paired = paired.and_then(|dim| usize::try_from(dim).ok());
            named.insert(hugging_face(name, names), Tensor { paired, ..tensor.clone() });
        }
        named
    }

    /// What the tokenizer's keys say about texts.
    fn texts(&self, bytes: &[u8]) -> Texts {
        let list = |key: &str| match self.keys.get(key) {
            Some(Value::List(8, count, range)) => texts_in(&bytes[range.clone()]).take(*count).collect(),
            _ => Vec::new(),
        };
        let kinds = match self.keys.get("tokenizer.ggml.token_type") {
            Some(Value::List(5, _, range)) => {
                bytes[range.clone()].as_chunks().0.iter().map(|kind| i64::from(i32::from_le_bytes(*kind))).collect()
            }
            _ => Vec::new(),
        };
        let scores = match self.keys.get("tokenizer.ggml.scores") {
            Some(Value::List(6, _, range)) => {
                bytes[range.clone()].as_chunks().0.iter().map(|score| f32::from_le_bytes(*score)).collect()
            }
            _ => Vec::new(),
        };
        let text = |key: &str, default| self.text(bytes, key).unwrap_or(default);
        let flag = |key: &str, default| match self.keys.get(key) {
            Some(Value::Bool(set)) => *set,
            _ => default,
        };
        let parts = tokenizer::Parts {
            model: text("tokenizer.ggml.model", "none"),
            pre: text("tokenizer.ggml.pre", "default"),
            tokens: list("tokenizer.ggml.tokens"),
            kinds,
            merges: list("tokenizer.ggml.merges"),
            scores,
            space_first: flag("tokenizer.ggml.add_space_prefix", true),
        };
        let token = |key: &str| {
            let id = usize::try_from(self.number(key)?).ok()?;
            parts.tokens.get(id).map(|text| text.to_string())
        };
        Texts {
            tokenizer_json: tokenizer::json(&parts),
            chat_template: text("tokenizer.chat_template", "").to_string(),
            bos_token: token("tokenizer.ggml.bos_token_id").unwrap_or_default(),
            eos_token: token("tokenizer.ggml.eos_token_id").unwrap_or_default(),
            add_bos: flag("tokenizer.ggml.add_bos_token", parts.model == "llama"),
        }
    }
}

/// What a GGUF file holds for whoever renders prompts.
#[derive(Clone, Debug, PartialEq)]
pub struct Texts {
    /// Or why the file's tokenizer cannot be read.
    pub tokenizer_json: Result<String, String>,
    pub chat_template: String,
    pub bos_token: String,
    pub eos_token: String,
    pub add_bos: bool,
}

/// Reads them from a file.
pub fn texts(file: &Path) -> Result<Texts, LoadError> {
    let map = checkpoint::map(file)?;
    Ok(Header::read(file, &map)?.texts(&map))
}

/// Texts that lie one after another, each behind its length; they were checked when the header was read.
fn texts_in(mut bytes: &[u8]) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        let (len, rest) = bytes.split_first_chunk::<8>()?;
        let (text, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        bytes = rest;
        std::str::from_utf8(text).ok()
    })
}

fn read_keys(reader: &mut Reader, count: u64) -> Result<BTreeMap<String, Value>, LoadError> {
    let mut keys = BTreeMap::new();
    for _ in 0..count {
        reader.what = "keys".to_string();
        let name = reader.name()?;
        reader.what = format!("key {name}");
        let kind = reader.u32()?;
        let value = reader.value(kind)?;
        keys.insert(name, value);
    }
    Ok(keys)
}

/// Checks that a tensor's bytes are in the file.
fn place(reader: &Reader, shape: Vec<u64>, kind: u32, offset: u64, start: usize) -> Result<Tensor, LoadError> {
    let dtype = dtype(kind);
    let shape = shape.iter().map(|n| usize::try_from(*n)).collect::<Result<Vec<usize>, _>>();
    let shape = shape.map_err(|_| reader.wrong("a dimension is too large"))?;
    let (cols, outer) = shape.split_last().expect("it has 1 to 4 dimensions");
    let rows = outer.iter().try_fold(1usize, |rows, n| rows.checked_mul(*n));
    let size = match &dtype {
        Ok(dtype) if *cols > 0 && !cols.is_multiple_of(dtype.unit()) => {
            return Err(reader.wrong(format!("rows of {cols} are no whole units of {} numbers", dtype.unit())));
        }
        Ok(dtype) => rows.and_then(|rows| dtype.row_bytes(*cols)?.checked_mul(rows)),
        Err(_) => Some(0),
    };
    let (data, offset_end) = (reader.bytes.len() - start, size.and_then(|size| offset.checked_add(size as u64)));
    match (size, offset_end) {
        (Some(size), Some(end)) if end <= data as u64 => {
            let from = start + offset as usize;
            Ok(Tensor { dtype, shape, bytes: from..from + size, paired: None })
        }
        _ => Err(reader.wrong(format!(
            "shape {shape:?} at offset {offset} does not fit {data} bytes of tensors; copy the file again"
        ))),
    }
}

fn dtype(kind: u32) -> Result<Dtype, String> {
    let unsupported = |name: &str| Err(name.to_string());
    match kind {
        0 => Ok(Dtype::F32),
        1 => Ok(Dtype::F16),
        2 => Ok(Dtype::Q4_0),
        3 => Ok(Dtype::Q4_1),
        6 => Ok(Dtype::Q5_0),
        7 => Ok(Dtype::Q5_1),
        8 => Ok(Dtype::Q8_0),
        12 => Ok(Dtype::Q4K),
        13 => Ok(Dtype::Q5K),
        14 => Ok(Dtype::Q6K),
        30 => Ok(Dtype::Bf16),
        10 => unsupported("Q2_K"),
        11 => unsupported("Q3_K"),
        15 => unsupported("Q8_K"),
        20 => unsupported("IQ4_NL"),
        other => Err(format!("type {other}")),
    }
}

/// The matrices of a tensor (experts, rows, columns); None if it is not one.
fn experts(name: &str, tensor: &Tensor, names: &MixtureNames) -> Option<Vec<(String, Tensor)>> {
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let part = match part {
        "ffn_gate_exps.weight" => names.gate,
        "ffn_up_exps.weight" => names.up,
        "ffn_down_exps.weight" => names.down,
        _ => return None,
    };
    let [count, rows, cols] = tensor.shape[..] else { return None };
    if !(1..=EXPERTS_MAX).contains(&count) {
        return None;
    }
    let size = tensor.bytes.len() / count;
    let one = |expert: usize| {
        let start = tensor.bytes.start + expert * size;
        let name = format!("model.layers.{layer}.{}.experts.{expert}.{part}.weight", names.block);
        (name, Tensor { shape: vec![rows, cols], bytes: start..start + size, ..tensor.clone() })
    };
    Some((0..count).map(one).collect())
}

/// Hugging Face's name of a tensor; names that no model here has stay as they are.
fn hugging_face(name: &str, names: &MixtureNames) -> String {
    let whole = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    let layer = || {
        let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
        let (part, end) = part.rsplit_once('.')?;
        let part = match part {
            "attn_norm" => "input_layernorm",
            "attn_q" => "self_attn.q_proj",
            "attn_k" => "self_attn.k_proj",
            "attn_v" => "self_attn.v_proj",
            "attn_output" => "self_attn.o_proj",
            "attn_q_norm" => "self_attn.q_norm",
            "attn_k_norm" => "self_attn.k_norm",
            "ffn_norm" => "post_attention_layernorm",
            "ffn_gate" => "mlp.gate_proj",
            "ffn_up" => "mlp.up_proj",
            "ffn_down" => "mlp.down_proj",
            "ffn_gate_inp" => return Some(format!("model.layers.{layer}.{}.gate.{end}", names.block)),
            _ => return None,
        };
        Some(format!("model.layers.{layer}.{part}.{end}"))
    };
    whole.map(str::to_string).or_else(layer).unwrap_or_else(|| name.to_string())
}
