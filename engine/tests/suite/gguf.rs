//! GGUF files written here: the same models as from safetensors, and every damage refused with its reason.

use std::path::Path;

use baton_core::TokenId;
use baton_engine::testing::TinyModel;
use baton_engine::{LoadOptions, load};
use baton_kernels::{Dtype, Quantize};
use proptest::prelude::*;

use crate::common::{dir, prompt};
use crate::references::{log_probabilities, relative_error};
use crate::tensor_parallel::{ROOMY, said};

/// Types of tensors, by their numbers in the format.
const F32: u32 = 0;
const F16: u32 = 1;
const Q4_0: u32 = 2;
const Q4_1: u32 = 3;
const Q5_0: u32 = 6;
const Q5_1: u32 = 7;
const Q8_0: u32 = 8;
const Q4_K: u32 = 12;
const Q5_K: u32 = 13;
const Q6_K: u32 = 14;
const BF16: u32 = 30;

/// The type of the matrix of that name.
type Kind<'a> = &'a dyn Fn(&str) -> u32;

#[derive(Default)]
struct Keys {
    bytes: Vec<u8>,
    count: u64,
}

impl Keys {
    fn put(&mut self, name: &str, kind: u32, value: &[u8]) {
        self.count += 1;
        self.bytes.extend(text(name));
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend(value);
    }

    fn number(&mut self, name: &str, value: usize) {
        self.put(name, 4, &(value as u32).to_le_bytes());
    }
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// The model as a GGUF file whose matrices have the type that `kind` gives their names.
fn write(file: &Path, tiny: &TinyModel, seed: u64, kind: impl Fn(&str) -> u32) {
    let architecture = match tiny.architecture {
        "Qwen2ForCausalLM" => "qwen2",
        "Qwen3ForCausalLM" => "qwen3",
        "Qwen3MoeForCausalLM" => "qwen3moe",
        _ => "llama",
    };
    let mut keys = Keys::default();
    keys.put("general.architecture", 8, &text(architecture));
    let numbers = [
        ("embedding_length", tiny.hidden),
        ("feed_forward_length", tiny.intermediate),
        ("block_count", tiny.layers),
        ("attention.head_count", tiny.heads),
        ("attention.head_count_kv", tiny.kv_heads),
        ("attention.key_length", tiny.head_dim),
        ("context_length", tiny.positions_max),
    ];
    numbers.iter().for_each(|(name, value)| keys.number(&format!("{architecture}.{name}"), *value));
    keys.put(&format!("{architecture}.attention.layer_norm_rms_epsilon"), 6, &1e-5f32.to_le_bytes());
    keys.put(&format!("{architecture}.rope.freq_base"), 6, &10_000f32.to_le_bytes());
    if tiny.experts > 0 {
        let numbers = [("count", tiny.experts), ("used_count", 2), ("feed_forward_length", tiny.intermediate)];
        numbers.iter().for_each(|(name, value)| keys.number(&format!("{architecture}.expert_{name}"), *value));
    }
    keys.number("tokenizer.ggml.eos_token_id", 2);
    // What is not needed is passed over: a list of texts, and one of numbers.
    let tokens: Vec<u8> = (0..tiny.vocab).flat_map(|id| text(&format!("t{id}"))).collect();
    let list = |kind: u32, count: usize, bytes: &[u8]| {
        [&kind.to_le_bytes()[..], &(count as u64).to_le_bytes(), bytes].concat()
    };
    keys.put("tokenizer.ggml.tokens", 9, &list(8, tiny.vocab, &tokens));
    keys.put("tokenizer.ggml.token_type", 9, &list(5, tiny.vocab, &vec![1; 4 * tiny.vocab]));

    let (mut infos, mut data) = (Vec::new(), Vec::new());
    let weights = merged(tiny.weights(seed));
    for (name, shape, mut values) in weights.clone() {
        // Norms, biases and routers are F32, of what the model directory holds.
        let kind = match shape.len() {
            1 => F32,
            _ if is_router(&name) => F32,
            _ => kind(&name),
        };
        if shape.len() == 1 || is_router(&name) {
            values.iter_mut().for_each(|x| *x = stored(tiny.dtype, *x));
        }
        if architecture == "llama" && (name.contains("q_proj") || name.contains("k_proj")) {
            values = paired(&values, shape[0], tiny.head_dim);
        }
        infos.extend(text(&gguf_name(&name)));
        infos.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|n| infos.extend((*n as u64).to_le_bytes()));
        infos.extend(kind.to_le_bytes());
        infos.extend((data.len() as u64).to_le_bytes());
        data.extend(encode(kind, &values));
        data.resize(data.len().next_multiple_of(32), 0);
    }
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend((weights.len() as u64).to_le_bytes());
    bytes.extend(keys.count.to_le_bytes());
    bytes.extend(keys.bytes);
    bytes.extend(infos);
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    bytes.extend(data);
    std::fs::write(file, bytes).expect("write a GGUF file");
}

fn is_router(name: &str) -> bool {
    name.ends_with(".gate.weight")
}

/// The matrices of all experts of a layer as one tensor, as GGUF has them.
fn merged(weights: Vec<(String, Vec<usize>, Vec<f32>)>) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let mut merged: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    for (name, shape, values) in weights {
        let Some((layer, expert)) = name.split_once(".experts.") else {
            merged.push((name, shape, values));
            continue;
        };
        let layer = layer.rsplit_once('.').expect("a block").0;
        let part = match expert.split('.').nth(1).expect("a matrix") {
            "gate_proj" | "w1" => "gate",
            "up_proj" | "w3" => "up",
            _ => "down",
        };
        let name = format!("{layer}.ffn_{part}_exps.weight");
        match merged.iter_mut().find(|(known, ..)| *known == name) {
            Some((_, whole, all)) => {
                whole[0] += 1;
                all.extend(values);
            }
            None => merged.push((name, [vec![1], shape].concat(), values)),
        }
    }
    merged
}

fn gguf_name(name: &str) -> String {
    let pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("block_sparse_moe.gate.", "ffn_gate_inp."),
        ("mlp.gate.", "ffn_gate_inp."),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    pairs.iter().fold(name.to_string(), |name, (from, to)| name.replace(from, to))
}

/// Rows as llama.cpp's converter lays them: those that rotate together side by side.
fn paired(values: &[f32], rows: usize, head_dim: usize) -> Vec<f32> {
    let width = values.len() / rows;
    let row = |to: usize| {
        let (head, within) = (to / head_dim, to % head_dim);
        let from = head * head_dim + within % 2 * (head_dim / 2) + within / 2;
        &values[from * width..][..width]
    };
    (0..rows).flat_map(|to| row(to).to_vec()).collect()
}

/// The nearest half; of two the even one.
fn half(x: f32) -> u16 {
    let (mut low, mut high) = (0u16, 0x7bff);
    while low < high {
        let middle = (low + high).div_ceil(2);
        if widen(middle) <= x.abs() { low = middle } else { high = middle - 1 }
    }
    let (below, above) = (x.abs() - widen(low), widen(low + 1) - x.abs());
    let up = above < below || above == below && low % 2 == 1;
    (low + u16::from(up)) | if x < 0.0 { 0x8000 } else { 0 }
}

fn widen(bits: u16) -> f32 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f32::from(bits & 0x3ff));
    let size = match exponent {
        0 => fraction * 2f32.powi(-24),
        _ => (1024.0 + fraction) * 2f32.powi(exponent - 25),
    };
    if bits >> 15 == 1 { -size } else { size }
}

fn encode(kind: u32, values: &[f32]) -> Vec<u8> {
    match kind {
        F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        BF16 => values.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect(),
        // As `TinyModel` writes halves: toward zero.
        F16 => values.iter().flat_map(|x| toward_zero(*x).to_le_bytes()).collect(),
        Q8_0 => values.chunks(32).flat_map(q8_0).collect(),
        Q4_0 => values.chunks(32).flat_map(q4_0).collect(),
        Q4_1 => values.chunks(32).flat_map(|x| with_minimum(x, 15.0)).collect(),
        Q5_0 => values.chunks(32).flat_map(q5_0).collect(),
        Q5_1 => values.chunks(32).flat_map(|x| with_minimum(x, 31.0)).collect(),
        Q4_K => values.chunks(256).flat_map(|x| k_format(x, 15.0)).collect(),
        Q5_K => values.chunks(256).flat_map(|x| k_format(x, 31.0)).collect(),
        _ => values.chunks(256).flat_map(q6_k).collect(),
    }
}

/// The value that `TinyModel` writes.
fn stored(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => widen(toward_zero(x)),
        _ => f32::from_bits(x.to_bits() & 0xffff_0000),
    }
}

fn toward_zero(x: f32) -> u16 {
    let bits = x.to_bits();
    let exponent = (bits >> 23 & 0xff) as i32 - 127;
    let sign = (bits >> 16 & 0x8000) as u16;
    if exponent < -14 { sign } else { sign | ((exponent + 15) as u16) << 10 | (bits >> 13 & 0x3ff) as u16 }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max, x| max.max(x.abs()))
}

fn q8_0(values: &[f32]) -> Vec<u8> {
    let scale = largest(values) / 127.0;
    let mut out = half(scale).to_le_bytes().to_vec();
    out.extend(values.iter().map(|x| (x * (1.0 / scale)).round() as i8 as u8));
    out
}

fn q4_0(values: &[f32]) -> Vec<u8> {
    let extreme = values.iter().fold(0.0f32, |max, &x| if x.abs() > max.abs() { x } else { max });
    let scale = extreme / -8.0;
    let number = |x: f32| ((x * (1.0 / scale) + 8.5) as u8).min(15);
    let mut out = half(scale).to_le_bytes().to_vec();
    out.extend((0..16).map(|i| number(values[i]) | number(values[i + 16]) << 4));
    out
}

fn q5_0(values: &[f32]) -> Vec<u8> {
    let extreme = values.iter().fold(0.0f32, |max, &x| if x.abs() > max.abs() { x } else { max });
    let scale = extreme / -16.0;
    let numbers: Vec<u8> = values.iter().map(|x| ((x * (1.0 / scale) + 16.5) as u8).min(31)).collect();
    [half(scale).to_le_bytes().to_vec(), high_bits(&numbers), halves(&numbers)].concat()
}

/// Q4_1, or with more numbers Q5_1.
fn with_minimum(values: &[f32], most: f32) -> Vec<u8> {
    let low = values.iter().fold(f32::MAX, |min, x| min.min(*x));
    let scale = (values.iter().fold(f32::MIN, |max, x| max.max(*x)) - low) / most;
    let numbers: Vec<u8> = values.iter().map(|x| ((x - low) * (1.0 / scale)).round().min(most) as u8).collect();
    let high = if most > 15.0 { high_bits(&numbers) } else { Vec::new() };
    [half(scale).to_le_bytes().to_vec(), half(low).to_le_bytes().to_vec(), high, halves(&numbers)].concat()
}

fn halves(numbers: &[u8]) -> Vec<u8> {
    (0..16).map(|i| numbers[i] & 15 | (numbers[i + 16] & 15) << 4).collect()
}

fn high_bits(numbers: &[u8]) -> Vec<u8> {
    let bits = numbers.iter().enumerate().fold(0u32, |bits, (i, number)| bits | u32::from(number >> 4) << i);
    bits.to_le_bytes().to_vec()
}

/// Q4_K, or with more numbers Q5_K.
fn k_format(values: &[f32], most: f32) -> Vec<u8> {
    let blocks: Vec<&[f32]> = values.chunks(32).collect();
    let low = |block: &[f32]| block.iter().fold(0.0f32, |min, x| min.min(*x));
    let high = |block: &[f32]| block.iter().fold(0.0f32, |max, x| max.max(*x));
    let spread: Vec<f32> = blocks.iter().map(|block| (high(block) - low(block)) / most).collect();
    let minima: Vec<f32> = blocks.iter().map(|block| -low(block)).collect();
    let (d, dmin) = (half(largest(&spread) / 63.0), half(largest(&minima) / 63.0));
    let six = |x: f32, by: u16| (x / widen(by)).round().clamp(1.0, 63.0) as u8;
    let scales: Vec<u8> = spread.iter().map(|x| six(*x, d)).collect();
    let mins: Vec<u8> = minima.iter().map(|x| six(*x, dmin)).collect();
    let mut packed = [0u8; 12];
    for j in 0..4 {
        packed[j] = scales[j] | (scales[j + 4] >> 4) << 6;
        packed[j + 4] = mins[j] | (mins[j + 4] >> 4) << 6;
        packed[j + 8] = (scales[j + 4] & 15) | (mins[j + 4] & 15) << 4;
    }
    let number = |block: usize, i: usize| {
        let (scale, min) = (widen(d) * f32::from(scales[block]), widen(dmin) * f32::from(mins[block]));
        ((blocks[block][i] + min) / scale).round().clamp(0.0, most) as u8
    };
    let mut out = [d.to_le_bytes(), dmin.to_le_bytes()].concat();
    out.extend(packed);
    if most > 15.0 {
        out.extend((0..32).map(|i| (0..8).fold(0, |bits, block| bits | (number(block, i) >> 4) << block)));
    }
    for pair in 0..4 {
        out.extend((0..32).map(|i| number(2 * pair, i) & 15 | (number(2 * pair + 1, i) & 15) << 4));
    }
    out
}

fn q6_k(values: &[f32]) -> Vec<u8> {
    let sizes: Vec<f32> = values.chunks(16).map(|part| largest(part) / 31.0).collect();
    let d = half(largest(&sizes) / 127.0);
    let scales: Vec<i8> = sizes.iter().map(|size| (size / widen(d)).round().max(1.0) as i8).collect();
    let number = |i: usize| (values[i] / (widen(d) * f32::from(scales[i / 16]))).round().clamp(-32.0, 31.0) as i8 + 32;
    let (mut low, mut high) = (vec![0u8; 128], vec![0u8; 64]);
    for i in 0..256 {
        let (part, quarter, at) = (i / 128, i % 128 / 32, i % 32);
        low[part * 64 + quarter % 2 * 32 + at] |= (number(i) as u8 & 15) << (quarter / 2 * 4);
        high[part * 32 + at] |= (number(i) as u8 >> 4) << (quarter * 2);
    }
    let mut out = [low, high].concat();
    out.extend(scales.iter().map(|scale| *scale as u8));
    out.extend(d.to_le_bytes());
    out
}

fn tokens(vocab: usize) -> Vec<TokenId> {
    prompt(4, 30, vocab)
}

fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

/// Every family from GGUF says bit for bit what it says from safetensors: in each float type, and quantized in the file or
/// as it is loaded.
#[test]
fn gguf_equals_safetensors() {
    for (index, tiny) in TinyModel::families().into_iter().enumerate() {
        let config = serde_json::json!({"sliding_window": null, "rope_parameters": null, "rope_theta": 10000.0});
        let tiny = TinyModel { config, ..tiny };
        let dir = dir(&format!("gguf-{index}"));
        tiny.write(&dir, 7).expect("write a model");
        let tokens = tokens(tiny.vocab);
        let own = match tiny.dtype {
            Dtype::F32 => F32,
            Dtype::F16 => F16,
            _ => BF16,
        };
        let file = dir.join("model.gguf");
        write(&file, &tiny, 7, |_| own);
        let expected = log_probabilities(&dir, &tokens, None);
        assert_eq!(bits(&log_probabilities(&file, &tokens, None)), bits(&expected), "{}", tiny.architecture);
        // Quantized from the stored values, which only F32 keeps whole.
        let whole = TinyModel { dtype: Dtype::F32, ..tiny.clone() };
        whole.write(&dir, 7).expect("write a model");
        for (quantize, kind) in [(Quantize::Q8_0, Q8_0), (Quantize::Q4_0, Q4_0)] {
            write(&file, &whole, 7, |_| kind);
            let at_load = log_probabilities(&dir, &tokens, Some(quantize));
            let in_file = log_probabilities(&file, &tokens, None);
            assert_eq!(bits(&in_file), bits(&at_load), "{} {}", tiny.architecture, quantize.as_str());
        }
    }
}

/// The formats, alone and mixed as files have them, are as near as their bits allow. The limits are one and a half times what an
/// f64 model of the same quantization gives, of five bits half those of four: random weights are ill-conditioned.
#[test]
fn k_formats_are_near() {
    let tiny = TinyModel { hidden: 256, intermediate: 512, head_dim: 64, dtype: Dtype::F32, ..TinyModel::llama() };
    let dir = dir("gguf-k");
    tiny.write(&dir, 7).expect("write a model");
    let tokens = tokens(tiny.vocab);
    let expected = log_probabilities(&dir, &tokens, None);
    let mixed = |name: &str| if name.contains("v_proj") || name.contains("lm_head") { Q6_K } else { Q4_K };
    let kinds: [(&str, Kind, f64); 8] = [
        ("q8_0", &|_| Q8_0, 0.08),
        ("q6_k", &|_| Q6_K, 0.18),
        ("q5_0", &|_| Q5_0, 0.35),
        ("q5_1", &|_| Q5_1, 0.35),
        ("q5_k", &|_| Q5_K, 0.35),
        ("q4_1", &|_| Q4_1, 0.7),
        ("q4_k", &|_| Q4_K, 0.7),
        ("q4_k_m", &mixed, 0.7),
    ];
    for (name, kind, limit) in kinds {
        let file = dir.join(format!("{name}.gguf"));
        write(&file, &tiny, 7, kind);
        let found = log_probabilities(&file, &tokens, None);
        let mut errors: Vec<f64> = found.iter().zip(&expected).map(|(a, b)| relative_error(a, b)).collect();
        errors.sort_by(f64::total_cmp);
        let median = errors[errors.len() / 2];
        assert!(median < limit, "{name}: off by {median}");
    }
}

/// Ranks share a file's matrices where they can be cut between units; where they cannot, they are refused.
#[test]
fn ranks_share_whole_units() {
    let tiny = TinyModel { hidden: 256, intermediate: 768, heads: 8, head_dim: 64, ..TinyModel::llama() };
    let options = |ranks| LoadOptions { ranks, ..LoadOptions::default() };
    let file = dir("gguf-ranks").join("model.gguf");
    for (kind, possible) in [(Q8_0, [2, 4, 8].as_slice()), (Q5_1, &[2, 4, 8]), (Q4_K, &[]), (Q5_K, &[]), (Q6_K, &[])] {
        write(&file, &tiny, 7, |_| kind);
        let whole = said(&mut load(&file, options(1), &mut |_| {}).expect("load"), ROOMY);
        for ranks in [2, 4, 8] {
            match load(&file, options(ranks), &mut |_| {}) {
                Ok(mut group) => {
                    assert!(possible.contains(&ranks) && said(&mut group, ROOMY) == whole, "{kind} {ranks}");
                }
                Err(error) => {
                    let error = error.to_string();
                    assert!(
                        !possible.contains(&ranks) && error.contains("multiples of 256"),
                        "{kind} {ranks}: {error}"
                    );
                }
            }
        }
    }
    let file = dir("gguf-ranks-k").join("model.gguf");
    write(&file, &TinyModel { intermediate: 1024, ..tiny }, 7, |_| Q4_K);
    let whole = said(&mut load(&file, options(1), &mut |_| {}).expect("load"), ROOMY);
    assert!(said(&mut load(&file, options(2), &mut |_| {}).expect("load"), ROOMY) == whole);
}

/// Four bits stay four bits in memory.
#[test]
fn weights_stay_as_small_as_in_the_file() {
    let tiny = TinyModel { hidden: 512, intermediate: 1024, head_dim: 128, vocab: 512, ..TinyModel::llama() };
    let dir = dir("gguf-size");
    let most = [(Q4_0, 4.6), (Q4_1, 5.1), (Q4_K, 4.7), (Q5_0, 5.6), (Q5_1, 6.1), (Q5_K, 5.7), (Q6_K, 6.6), (Q8_0, 8.6)];
    for (kind, bits_max) in most {
        let file = dir.join("model.gguf");
        write(&file, &tiny, 7, |_| kind);
        let options = LoadOptions::default();
        let model = load(&file, options, &mut |_| {}).expect("load").model;
        let per_weight =
            8.0 * model.weight_bytes() as f64 / (model.layer_weights() + 2 * tiny.vocab * tiny.hidden) as f64;
        assert!(per_weight < bits_max, "type {kind}: {per_weight} bits a weight");
    }
}

fn refused(name: &str, spoil: impl FnOnce(&mut Vec<u8>), expected: &[&str]) {
    let file = dir(&format!("gguf-bad-{name}")).join("model.gguf");
    write(&file, &TinyModel::llama(), 1, |_| Q8_0);
    let mut bytes = std::fs::read(&file).expect("read");
    spoil(&mut bytes);
    std::fs::write(&file, bytes).expect("write");
    let options = LoadOptions::default();
    let Err(error) = load(&file, options, &mut |_| {}) else { panic!("{name}: loaded") };
    for word in [expected, &["model.gguf"]].concat() {
        assert!(error.to_string().contains(word), "{name}: {word:?} is not in: {error}");
    }
}

/// Overwrites what follows a text of the header.
fn after(text: &'static str, skip: usize, with: &'static [u8]) -> impl Fn(&mut Vec<u8>) {
    move |bytes| {
        let at = bytes.windows(text.len()).position(|part| part == text.as_bytes()).expect("in the header");
        let at = at + text.len() + skip;
        bytes[at..at + with.len()].copy_from_slice(with);
    }
}

#[test]
fn wrong_files_are_refused_with_the_reason() {
    refused("magic", |bytes| bytes[0] = b'X', &["not a GGUF file"]);
    refused("empty", Vec::clear, &["header", "0 are left"]);
    refused("version", |bytes| bytes[4] = 9, &["version 9", "2 and 3"]);
    refused("tensors", |bytes| bytes[8..16].fill(0xff), &["tensors", "claimed"]);
    refused("keys", |bytes| bytes[16..24].fill(0x7f), &["keys", "claimed"]);
    refused("name", |bytes| bytes[24..32].fill(0xff), &["keys", "bytes are claimed"]);
    refused("cut-header", |bytes| bytes.truncate(200), &["are left in the file"]);
    refused("cut", |bytes| bytes.truncate(bytes.len() - 4096), &["tensor", "does not fit", "copy the file again"]);
    refused("list", after("tokenizer.ggml.tokens", 8, &[0xff; 8]), &["tokenizer.ggml.tokens", "elements are claimed"]);
    refused("nested", after("tokenizer.ggml.tokens", 4, &[9]), &["tokenizer.ggml.tokens", "list of type 9"]);
    refused("kind", after("llama.block_count", 0, &[77]), &["llama.block_count", "77 is no type"]);
    refused("dimensions", after("blk.0.attn_q.weight", 0, &[5]), &["tensor blk.0.attn_q.weight", "5 dimensions"]);
    refused(
        "shape",
        after("blk.0.attn_q.weight", 4, &[0xe0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]),
        &["tensor blk.0.attn_q.weight"],
    );
    refused("units", after("blk.0.attn_q.weight", 4, &[33]), &["tensor blk.0.attn_q.weight", "whole units of 32"]);
    refused("offset", after("blk.0.attn_q.weight", 24, &[0xff; 8]), &["tensor blk.0.attn_q.weight", "does not fit"]);
    refused("type", after("blk.0.attn_q.weight", 20, &[11]), &["self_attn.q_proj", "Q3_K", "Q4_K"]);
    refused("quantized-norm", after("output_norm.weight", 12, &[8]), &["model.norm.weight", "Q8_0"]);
    refused("architecture", after("general.architecture", 12, b"lulla"), &["lulla", "qwen3"]);
    refused("layers", after("llama.block_count", 4, &[0, 0, 0, 0]), &["num_hidden_layers"]);
    refused("vector", after("llama.embedding_length", 4, &[32]), &["[128, 64]", "[128, 32]"]);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    /// The fuzzer: any bytes of a header overwritten, any of its numbers made extreme, any end cut off: loaded or refused with
    /// the file's name, never a panic, never memory beyond the file's size.
    #[test]
    fn damaged_gguf_files_are_refused(
        damage in proptest::collection::vec((0..6000usize, any::<u8>()), 0..4),
        extreme in proptest::option::of((0..6000usize, 0..4usize)),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let file = dir("gguf-damaged").join("model.gguf");
        static WHOLE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let whole = WHOLE.get_or_init(|| {
            write(&file, &TinyModel { layers: 1, vocab: 32, ..TinyModel::llama() }, 1, |_| Q4_0);
            std::fs::read(&file).expect("read")
        });
        let mut bytes = whole.clone();
        for (at, value) in damage {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if let Some((at, which)) = extreme {
            let at = at % (bytes.len() - 8);
            let value = [u64::MAX, 1 << 63, u64::from(u32::MAX), 1 << 40][which];
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        std::fs::write(&file, bytes).expect("write");
        let result = load(&file, LoadOptions::default(), &mut |_| {});
        prop_assert!(result.err().is_none_or(|error| error.to_string().contains("model.gguf")));
    }
}
