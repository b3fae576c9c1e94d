//! GGUF files and quantized weights through whole clusters: the model that ships, put into a GGUF file, answers as its
//! directory does, and quantized workers give the same bytes in any arrangement.

use std::path::{Path, PathBuf};

use baton_tests::Cluster;
use baton_tests::cluster::{Scratch, baton};
use serde_json::Value;

use crate::same_bytes::answers;

/// Types of values and of tensors, by their numbers in the format.
const U32: u32 = 4;
const F32_VALUE: u32 = 6;
const TEXT: u32 = 8;
const LIST: u32 = 9;
const F32: u32 = 0;
const BF16: u32 = 30;

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/baton-3m").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(shipped(name)).expect("read")).expect("JSON")
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn list(kind: u32, items: &[Vec<u8>]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &(items.len() as u64).to_le_bytes(), &items.concat()].concat()
}

/// What the header says: shapes, and the tokenizer with its template.
fn keys() -> Vec<(String, u32, Vec<u8>)> {
    let (config, tokenizer, tokens) = (json("config.json"), json("tokenizer.json"), json("tokenizer_config.json"));
    let number = |key: &str| (config[key].as_u64().expect("a number") as u32).to_le_bytes().to_vec();
    let float = |key: &str| (config[key].as_f64().expect("a number") as f32).to_le_bytes().to_vec();
    let mut keys = vec![("general.architecture".to_string(), TEXT, text("llama"))];
    for (to, from) in [
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("block_count", "num_hidden_layers"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("context_length", "max_position_embeddings"),
    ] {
        keys.push((format!("llama.{to}"), U32, number(from)));
    }
    keys.push(("llama.attention.layer_norm_rms_epsilon".into(), F32_VALUE, float("rms_norm_eps")));
    keys.push(("llama.rope.freq_base".into(), F32_VALUE, float("rope_theta")));

    let vocabulary = tokenizer["model"]["vocab"].as_object().expect("a vocabulary");
    let mut texts = vec![Vec::new(); vocabulary.len()];
    vocabulary.iter().for_each(|(token, id)| texts[id.as_u64().expect("an id") as usize] = text(token));
    let mut kinds = vec![1i32.to_le_bytes().to_vec(); texts.len()];
    let added = tokenizer["added_tokens"].as_array().expect("tokens");
    let id = |token: &Value| token["id"].as_u64().expect("an id");
    added.iter().for_each(|token| kinds[id(token) as usize] = 3i32.to_le_bytes().to_vec());
    let merge =
        |pair: &Value| text(&format!("{} {}", pair[0].as_str().expect("text"), pair[1].as_str().expect("text")));
    let merges: Vec<Vec<u8>> = tokenizer["model"]["merges"].as_array().expect("merges").iter().map(merge).collect();
    keys.push(("tokenizer.ggml.model".into(), TEXT, text("gpt2")));
    keys.push(("tokenizer.ggml.pre".into(), TEXT, text("qwen2")));
    keys.push(("tokenizer.ggml.tokens".into(), LIST, list(TEXT, &texts)));
    keys.push(("tokenizer.ggml.token_type".into(), LIST, list(5, &kinds)));
    keys.push(("tokenizer.ggml.merges".into(), LIST, list(TEXT, &merges)));
    keys.push(("tokenizer.ggml.bos_token_id".into(), U32, 0u32.to_le_bytes().to_vec()));
    keys.push(("tokenizer.ggml.eos_token_id".into(), U32, 2u32.to_le_bytes().to_vec()));
    keys.push(("tokenizer.ggml.eot_token_id".into(), U32, 0u32.to_le_bytes().to_vec()));
    let template = tokens["chat_template"].as_str().expect("a template");
    keys.push(("tokenizer.chat_template".into(), TEXT, text(template)));
    keys
}

/// Name, shape and bytes of every tensor, as llama.cpp's converter names and lays them: norms in f32, rows of q and k that
/// rotate together side by side.
fn tensors() -> Vec<(String, Vec<usize>, u32, Vec<u8>)> {
    let bytes = std::fs::read(shipped("model.safetensors")).expect("read");
    let header_len = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_len]).expect("a header");
    let tensor = |(name, tensor): (&String, &Value)| {
        let number = |value: &Value| value.as_u64().expect("a number") as usize;
        let shape: Vec<usize> = tensor["shape"].as_array()?.iter().map(number).collect();
        let at = |end: usize| 8 + header_len + number(&tensor["data_offsets"][end]);
        let values = &bytes[at(0)..at(1)];
        let (kind, values) = match shape.len() {
            1 => (F32, values.chunks(2).flat_map(|half| [0, 0, half[0], half[1]]).collect()),
            _ if name.contains("q_proj") || name.contains("k_proj") => (BF16, paired(values, shape[1] * 2)),
            _ => (BF16, values.to_vec()),
        };
        Some((renamed(name), shape, kind, values))
    };
    header.as_object().expect("tensors").iter().filter_map(tensor).collect()
}

fn paired(bytes: &[u8], width: usize) -> Vec<u8> {
    let half = json("config.json")["head_dim"].as_u64().expect("a size") as usize / 2;
    let row = |to: usize| {
        let (head, within) = (to / (2 * half), to % (2 * half));
        &bytes[(head * 2 * half + within % 2 * half + within / 2) * width..][..width]
    };
    (0..bytes.len() / width).flat_map(|to| row(to).to_vec()).collect()
}

fn renamed(name: &str) -> String {
    let pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    pairs.iter().fold(name.to_string(), |name, (from, to)| name.replace(from, to))
}

fn write_gguf(file: &Path) {
    let (keys, tensors) = (keys(), tensors());
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((keys.len() as u64).to_le_bytes());
    for (name, kind, value) in keys {
        bytes.extend([text(&name), kind.to_le_bytes().to_vec(), value].concat());
    }
    let mut data: Vec<u8> = Vec::new();
    for (name, shape, kind, values) in tensors {
        bytes.extend(text(&name));
        bytes.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|n| bytes.extend((*n as u64).to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend((data.len() as u64).to_le_bytes());
        data.extend(values);
        data.resize(data.len().next_multiple_of(32), 0);
    }
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    bytes.extend(data);
    std::fs::write(file, bytes).expect("write a GGUF file");
}

#[tokio::test]
async fn a_gguf_file_answers_as_its_directory() {
    let folder = Scratch::new("gguf");
    let file = folder.path().join("baton-3m.gguf");
    write_gguf(&file);
    let reference = answers(&Cluster::up(&[]).await.client).await;
    let cluster = Cluster::up(&["--model", &file.display().to_string()]).await;
    assert_eq!(answers(&cluster.client).await, reference);
}

#[tokio::test]
async fn quantized_workers_give_the_same_bytes_in_any_arrangement() {
    let reference = answers(&Cluster::up(&["--quantize", "q8_0", "--prefill", "0"]).await.client).await;
    assert!(reference.iter().all(|r| r.error.is_none() && r.finish.iter().all(Option::is_some)), "{reference:?}");
    for flags in [&["--decode", "2"][..], &["--prefill-tp", "2"], &["--tp", "2", "--batch-tokens", "64"]] {
        let cluster = Cluster::up(&[&["--quantize", "q8_0"], flags].concat()).await;
        assert_eq!(answers(&cluster.client).await, reference, "{flags:?}");
    }
}

#[test]
fn what_cannot_be_served_is_refused_with_the_reason() {
    let folder = Scratch::new("quantized-refused");
    let refused = |flags: &[&str], reasons: &[&str]| {
        let data = folder.path().display().to_string();
        let output = baton(&[&["up", "--port", "0", "--data", &data], flags].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(reasons.iter().all(|reason| said.contains(reason)), "{said}");
    };
    let broken = folder.path().join("broken.gguf");
    write_gguf(&broken);
    let whole = std::fs::read(&broken).expect("read");
    std::fs::write(&broken, &whole[..whole.len() / 2]).expect("write");
    refused(&["--model", &broken.display().to_string()], &["broken.gguf", "copy the file again"]);
    refused(&["--quantize", "q3"], &["q3", "q8_0", "q4_0"]);
}
