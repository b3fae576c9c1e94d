//! Model directories that are wrong: each is refused with an error that names the file, the tensor or key, and what was
//! expected.

use std::path::Path;

use baton_engine::testing::TinyModel;
use baton_engine::{LoadOptions, load};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::common::dir;

/// A good model, spoilt; every word of `expected` must be in the message.
fn check(name: &str, model: &TinyModel, spoil: impl FnOnce(&Path), expected: &[&str]) {
    let dir = dir(&format!("bad-{name}"));
    model.write(&dir, 1).expect("write a model");
    spoil(&dir);
    let options = LoadOptions { threads: 2, ..LoadOptions::default() };
    let Err(error) = load(&dir, options, &mut |_| {}) else { panic!("{name}: loaded") };
    let message = error.to_string();
    for word in expected {
        assert!(message.contains(word), "{name}: {word:?} is not in: {message}");
    }
}

fn configured(name: &str, config: Value, expected: &[&str]) {
    let model = TinyModel { config, ..TinyModel::llama() };
    check(name, &model, |_| {}, &[expected, &["config.json"]].concat());
}

/// As `configured`, of a model with experts.
fn mixed(name: &str, config: Value, expected: &[&str]) {
    let model = TinyModel { architecture: "Qwen3MoeForCausalLM", experts: 4, config, ..TinyModel::llama() };
    check(name, &model, |_| {}, expected);
}

#[test]
fn wrong_experts() {
    mixed("no-experts", json!({"num_experts": null}), &["num_experts", "1 to 1024"]);
    mixed("absurd-experts", json!({"num_experts": 1_000_000_000u64}), &["num_experts", "1000000000"]);
    mixed("more-than-there-are", json!({"num_experts_per_tok": 5}), &["num_experts_per_tok", "5", "1 to 4"]);
    mixed("missing-experts", json!({"num_experts": 5}), &["mlp.experts.4.gate_proj.weight", "[96, 64]"]);
    mixed(
        "narrow-experts",
        json!({"moe_intermediate_size": 80}),
        &["experts.0.gate_proj.weight", "[80, 64]", "[96, 64]"],
    );
    let mlp = json!({"mlp_only_layers": [0]});
    mixed("an-mlp-that-has-experts", mlp, &["model.layers.0.mlp.gate_proj.weight", "[96, 64]"]);
}

fn bytes(dir: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let file = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&file).expect("read");
    change(&mut bytes);
    std::fs::write(file, bytes).expect("write");
}

fn header(dir: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    bytes(dir, |bytes| {
        let at = bytes.windows(from.len()).position(|part| part == from.as_bytes()).expect("in the header");
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    });
}

fn remove(file: &'static str) -> impl Fn(&Path) {
    move |dir| std::fs::remove_file(dir.join(file)).expect("remove")
}

#[test]
fn wrong_configurations() {
    let llama = TinyModel::llama();
    check("no-config", &llama, remove("config.json"), &["config.json", "cannot be read"]);
    check(
        "no-json",
        &llama,
        |dir| std::fs::write(dir.join("config.json"), "{").expect("write"),
        &["config.json", "JSON"],
    );
    check(
        "generation",
        &llama,
        |dir| std::fs::write(dir.join("generation_config.json"), "[]").expect("write"),
        &["generation_config.json", "JSON"],
    );
    configured(
        "architecture",
        json!({"architectures": ["GPT2LMHeadModel"]}),
        &["GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM"],
    );
    configured("no-architecture", json!({"architectures": null}), &["\"none\"", "Qwen3ForCausalLM"]);
    configured("missing-key", json!({"hidden_size": null}), &["hidden_size"]);
    configured("type", json!({"hidden_size": "wide"}), &["wide"]);
    configured("negative", json!({"num_hidden_layers": -1}), &["-1"]);
    configured("zero", json!({"num_hidden_layers": 0}), &["num_hidden_layers", "0", "1 to 1024"]);
    configured("absurd", json!({"vocab_size": 1_000_000_000_000u64}), &["vocab_size", "1000000000000"]);
    configured("heads", json!({"num_key_value_heads": 3}), &["num_key_value_heads", "3", "divisor", "4"]);
    configured("head-dim", json!({"head_dim": 15}), &["head_dim", "15", "even"]);
    configured("no-head-dim", json!({"head_dim": null, "num_attention_heads": 6}), &["hidden_size", "64", "6"]);
    configured("activation", json!({"hidden_act": "gelu"}), &["hidden_act", "gelu", "silu"]);
    configured("eps", json!({"rms_norm_eps": -1e-5}), &["rms_norm_eps", "positive"]);
    configured("yarn", json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), &["yarn", "llama3", "linear"]);
    configured("linear", json!({"rope_scaling": {"type": "linear"}}), &["rope_scaling.factor", "positive"]);
    configured(
        "llama3",
        json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
        &["high_freq_factor", "4"],
    );
    configured("partial", json!({"partial_rotary_factor": 0.5}), &["partial_rotary_factor", "0.5"]);
    configured("quantized", json!({"quantization_config": {"bits": 4}}), &["quantization_config", "BF16"]);
    let qwen = TinyModel {
        architecture: "Qwen2ForCausalLM",
        config: json!({"use_sliding_window": true, "sliding_window": 8, "layer_types": ["full_attention"]}),
        ..llama
    };
    check("layer-types", &qwen, |_| {}, &["layer_types", "1 entries", "2 entries"]);
}

#[test]
fn wrong_weights() {
    let llama = TinyModel::llama();
    let file = "model.safetensors";
    check("no-weights", &llama, remove(file), &[file, "cannot be read"]);
    check("empty", &llama, |dir| bytes(dir, Vec::clear), &[file]);
    check("short", &llama, |dir| bytes(dir, |bytes| bytes.truncate(5)), &[file, "5 bytes"]);
    check("cut", &llama, |dir| bytes(dir, |bytes| bytes.truncate(bytes.len() - 1)), &[file, "truncated"]);
    check("long", &llama, |dir| bytes(dir, |bytes| bytes.push(0)), &[file, "overlong"]);
    check("absurd-header", &llama, |dir| bytes(dir, |bytes| bytes[..8].fill(0x7f)), &[file, "claims"]);
    check("huge-header", &llama, |dir| bytes(dir, |bytes| bytes[3] = 1), &[file, "claims"]);
    check("not-json", &llama, |dir| bytes(dir, |bytes| bytes[8] = b'x'), &[file, "header"]);
    let renamed = |dir: &Path| header(dir, "layers.1.mlp.down_proj", "layers.1.mlp.dawn_proj");
    check("missing", &llama, renamed, &[file, "model.layers.1.mlp.down_proj.weight", "[64, 96]"]);
    let reshaped = |dir: &Path| header(dir, "[32,64]", "[64,32]");
    check("shape", &llama, reshaped, &[file, "k_proj", "[64, 32]", "[32, 64]"]);
    let integers = |dir: &Path| header(dir, "\"BF16\"", "\"U16\" ");
    check("dtype", &llama, integers, &[file, "embed_tokens", "U16", "BF16"]);
    let nan = |dir: &Path| {
        bytes(dir, |bytes| {
            let at = bytes.len() - 128 * 64 * 2 + 2 * 77;
            bytes[at..at + 2].copy_from_slice(&[0xc0, 0x7f]);
        })
    };
    check("nan", &llama, nan, &[file, "lm_head.weight", "NaN", "element 77"]);
    let infinite = |dir: &Path| {
        bytes(dir, |bytes| {
            let at = bytes.len() - 2;
            bytes[at..].copy_from_slice(&[0x00, 0x7c]);
        })
    };
    let half = TinyModel { dtype: baton_kernels::Dtype::F16, ..llama.clone() };
    check("infinite", &half, infinite, &[file, "lm_head.weight", "inf", "element 8191"]);
    let tied = TinyModel { tied: true, config: json!({"tie_word_embeddings": false}), ..llama };
    check("untied", &tied, |_| {}, &[file, "lm_head.weight", "[128, 64]"]);
}

#[test]
fn wrong_shards() {
    let model = TinyModel { shards: 3, ..TinyModel::llama() };
    let index = "model.safetensors.index.json";
    let write = |text: &'static str| move |dir: &Path| std::fs::write(dir.join(index), text).expect("write");
    check("no-shard", &model, remove("model-00002-of-00003.safetensors"), &["model-00002-of-00003", "cannot be read"]);
    check("index-json", &model, write("{}"), &[index, "weight_map"]);
    check("elsewhere", &model, write(r#"{"weight_map": {"a": "../b"}}"#), &[index, "../b", "same directory"]);
    check("absolute", &model, write(r#"{"weight_map": {"a": "/etc/passwd"}}"#), &[index, "/etc/passwd"]);
    check("forgotten", &model, write(r#"{"weight_map": {}}"#), &[index, "model.embed_tokens.weight"]);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    /// Any damage to the first bytes of the weights or to config.json is loaded or refused, never a panic.
    #[test]
    fn damaged_files_are_refused(damage in proptest::collection::vec((0..3000usize, any::<u8>()), 1..4), config in any::<bool>()) {
        let dir = dir("bad-damaged");
        TinyModel::llama().write(&dir, 1).expect("write a model");
        let file = dir.join(if config { "config.json" } else { "model.safetensors" });
        let mut bytes = std::fs::read(&file).expect("read");
        for (at, value) in damage {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        std::fs::write(&file, bytes).expect("write");
        let result = load(&dir, LoadOptions::default(), &mut |_| {});
        prop_assert!(result.err().is_none_or(|error| error.to_string().contains(".json") || error.to_string().contains("model.safetensors")));
    }
}
