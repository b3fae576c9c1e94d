//! Checkpoints of 8-bit floating-point weights with scales: what they load as, on the CPU and on a GPU, and what is refused.

use std::path::{Path, PathBuf};

use baton_core::SampledToken;
use baton_engine::testing::{Scaling, TinyModel, drain, request, work};
use baton_engine::{Backend, LoadOptions, ModelSpec, load};
use serde_json::{Value, json};

use crate::common::{CONFIG, Choices, bits, dir, model_engine, prompt};

/// Wide enough for several scales of 128 by 128 in either direction.
fn models() -> [TinyModel; 2] {
    let wide = TinyModel { hidden: 144, intermediate: 272, heads: 8, ..TinyModel::llama() };
    [TinyModel { architecture: "Qwen2ForCausalLM", tied: true, ..wide.clone() }, wide]
}

fn written(name: &str, model: &TinyModel, scaling: Scaling, widened: bool) -> PathBuf {
    let dir = dir(&format!("eights-{name}-{scaling:?}-{widened}"));
    model.write_eights(&dir, 3, scaling, widened).expect("write a model");
    dir
}

fn said(model: &mut dyn Backend, spec: &ModelSpec) -> Vec<SampledToken> {
    let mut asked = request(1, &prompt(1, 21, spec.vocab), 3);
    (asked.logprobs, asked.ignore_eos) = (Some(2), true);
    let mut engine = model_engine(spec, CONFIG);
    engine.admit(work(&asked)).expect("room");
    Choices::of(drain(&mut engine, model)).sampled(1, 0).to_vec()
}

/// 8 bits are what they mean in bf16, on one rank and on two; only the weights' hash tells them apart.
#[test]
fn on_a_cpu_they_are_the_bf16_they_mean() {
    for (index, model) in models().iter().enumerate() {
        for scaling in Scaling::ALL {
            let name = format!("cpu-{index}");
            let loaded = |widened: bool, ranks: usize| {
                let dir = written(&format!("{name}-{ranks}"), model, scaling, widened);
                let options = LoadOptions { threads: 2, ranks, ..LoadOptions::default() };
                let mut loaded = load(&dir, options, &mut |_| {}).expect("load");
                (bits(&said(&mut loaded.model, &loaded.spec)), loaded.spec)
            };
            let ((expected, wide), (found, eights)) = (loaded(true, 1), loaded(false, 1));
            assert_eq!(found, expected, "{} {scaling:?}", model.architecture);
            assert_eq!(wide.parameters, eights.parameters);
            assert_ne!(wide.weights_hash, eights.weights_hash);
            assert_eq!(loaded(false, 2).0, expected, "{} {scaling:?}, two ranks", model.architecture);
        }
    }
}

/// On a GPU they stay 8 bits, and every answer has the bits of bf16.
#[cfg(feature = "cuda")]
#[test]
fn on_a_gpu_they_stay_and_have_the_bits_of_bf16() {
    use baton_engine::cuda::LoadedGpu;

    use crate::gpu::opened;

    let experts = TinyModel {
        architecture: "Qwen3MoeForCausalLM",
        hidden: 160,
        intermediate: 144,
        layers: 1,
        experts: 3,
        ..TinyModel::llama()
    };
    for (index, model) in models().iter().chain([&experts]).enumerate() {
        for scaling in Scaling::ALL {
            let loaded = |widened: bool| {
                let dir = written(&format!("gpu-{index}"), model, scaling, widened);
                let LoadedGpu { mut model, spec } = LoadedGpu::on(opened(), &dir, 1, &mut |_| {}).expect("load");
                (bits(&said(&mut model, &spec)), model.layer_bytes(), spec, dir)
            };
            let ((expected, wide, ..), (found, eights, spec, dir)) = (loaded(true), loaded(false));
            assert_eq!(found, expected, "{} {scaling:?}", model.architecture);
            assert!(eights * 9 < wide * 5, "{eights} bytes of {wide}");
            let cpu = load(&dir, LoadOptions::default(), &mut |_| {}).expect("load");
            assert_eq!(spec.weights_hash, cpu.spec.weights_hash);
        }
    }
}

/// A good model, spoilt; every word of `expected` must be in the message.
fn refused(name: &str, scaling: Scaling, spoil: impl FnOnce(&Path), expected: &[&str]) {
    let dir = written(&format!("bad-{name}"), &models()[1], scaling, false);
    spoil(&dir);
    let Err(error) = load(&dir, LoadOptions::default(), &mut |_| {}) else { panic!("{name}: loaded") };
    let message = error.to_string();
    expected.iter().for_each(|word| assert!(message.contains(word), "{name}: {word:?} is not in: {message}"));
}

/// Writes over the bytes of a tensor, or what its header says of it.
pub(crate) fn rewrite(dir: &Path, tensor: &str, change: impl FnOnce(&mut Value, &mut [u8])) {
    let file = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&file).expect("read");
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..data]).expect("a header");
    let at = |i: usize, header: &Value| header[tensor]["data_offsets"][i].as_u64().expect("a place") as usize;
    let (from, to) = (data + at(0, &header), data + at(1, &header));
    change(&mut header, &mut bytes[from..to]);
    let text = header.to_string();
    let whole = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &bytes[data..]].concat();
    std::fs::write(file, whole).expect("write");
}

#[test]
fn wrong_ones_are_refused() {
    let down = "model.layers.1.mlp.down_proj.weight";
    let (one, each, inverse) = (format!("{down}_scale"), format!("{down}_scale"), format!("{down}_scale_inv"));
    let renamed = |dir: &Path| {
        rewrite(dir, &inverse, |header, _| {
            let found = header.as_object_mut().expect("an object").remove(&inverse).expect("the scales");
            header["other"] = found;
        });
    };
    refused("no-scale", Scaling::Blocks, renamed, &["model.safetensors", &one, "missing", "[2, 3]"]);
    let reshaped = |dir: &Path| rewrite(dir, &inverse, |header, _| header[&inverse]["shape"] = json!([3, 2]));
    refused("shape", Scaling::Blocks, reshaped, &[&inverse, "[3, 2]", "[2, 3]"]);
    let scale = |value: f32| {
        let one = one.clone();
        move |dir: &Path| rewrite(dir, &one, |_, bytes| bytes.copy_from_slice(&value.to_le_bytes()))
    };
    refused("negative", Scaling::One, scale(-1.0), &[&one, "scale -1", "256"]);
    refused("large", Scaling::One, scale(256.0), &[&one, "scale 256", "256"]);
    refused("no-number", Scaling::One, scale(f32::NAN), &[&one, "NaN"]);
    let nan = |dir: &Path| rewrite(dir, &each, |_, bytes| bytes[2..4].copy_from_slice(&[0xc0, 0x7f]));
    refused("no-number-there", Scaling::Outputs, nan, &[&each, "element 1"]);
    let weight = |dir: &Path| rewrite(dir, down, |_, bytes| bytes[9] = 0xff);
    refused("weight", Scaling::One, weight, &[down, "NaN", "element 9"]);
}

#[test]
fn other_quantizations_are_refused() {
    let with = |name: &str, change: &dyn Fn(&mut Value)| {
        let spoil = |dir: &Path| {
            let file = dir.join("config.json");
            let mut config: Value = serde_json::from_slice(&std::fs::read(&file).expect("read")).expect("JSON");
            change(&mut config["quantization_config"]);
            std::fs::write(file, config.to_string()).expect("write");
        };
        refused(name, Scaling::Outputs, spoil, &["quantization_config", "fp8", "[128, 128]"]);
    };
    with("awq", &|config| *config = json!({"quant_method": "awq", "bits": 4}));
    with("e5m2", &|config| *config = json!({"quant_method": "fp8", "fmt": "e5m2"}));
    with("blocks", &|config| *config = json!({"quant_method": "fp8", "weight_block_size": [64, 64]}));
    with("packed", &|config| config["format"] = json!("pack-quantized"));
    with("bits", &|config| config["config_groups"]["group_0"]["weights"]["num_bits"] = json!(4));
    with("asymmetric", &|config| config["config_groups"]["group_0"]["weights"]["symmetric"] = json!(false));
    with("groups", &|config| config["config_groups"] = json!({}));
}
