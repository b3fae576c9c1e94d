//! Checkpoints of 8-bit integers with scales: they are multiplied as the integers they are, and what is not understood is
//! refused.

use std::path::{Path, PathBuf};

use baton_engine::testing::{Integers, TinyModel};
use baton_engine::{LoadOptions, load};
use baton_kernels::Quantize;
use serde_json::{Value, json};

use crate::common::dir;
use crate::eights::rewrite;
use crate::tensor_parallel::{ROOMY, said};

const HOW: [Integers; 4] = [
    Integers { packed: false, inputs: None },
    Integers { packed: true, inputs: None },
    Integers { packed: false, inputs: Some(64) },
    Integers { packed: true, inputs: Some(32) },
];

fn model() -> TinyModel {
    TinyModel { hidden: 128, intermediate: 512, heads: 8, kv_heads: 2, head_dim: 32, ..TinyModel::llama() }
}

fn written(name: &str, how: Integers, plain: bool) -> PathBuf {
    let dir = dir(&format!("integers-{name}-{how:?}-{plain}").replace([' ', '{', '}', ':', ',', '(', ')'], ""));
    model().write_integers(&dir, 5, how, plain).expect("write a model");
    dir
}

/// The integers and scales of a checkpoint are those that the same values have when they are quantized while loading: equal
/// tokens and log-probability bits, in company, on one rank and on two, on one thread and on two.
#[test]
fn they_are_multiplied_as_they_are() {
    let options = LoadOptions { quantize: Some(Quantize::Q8_0), ..LoadOptions::default() };
    for how in HOW {
        let expected = said(&mut load(&written("same", how, true), options, &mut |_| {}).expect("load"), ROOMY);
        let dir = written("same", how, false);
        for (ranks, threads) in [(1, 1), (1, 2), (2, 2)] {
            let mut loaded = load(&dir, LoadOptions { ranks, threads, ..options }, &mut |_| {}).expect("load");
            assert!(loaded.model.is_quantized());
            assert_eq!(said(&mut loaded, ROOMY), expected, "{how:?}, {ranks} ranks, {threads} threads");
        }
        let mut floats_beside = load(&dir, LoadOptions::default(), &mut |_| {}).expect("load");
        assert!(floats_beside.model.is_quantized());
        assert!(!said(&mut floats_beside, ROOMY).is_empty());
    }
}

/// A good model, spoilt; every word of `expected` must be in the message.
fn refused(name: &str, how: Integers, spoil: impl FnOnce(&Path), expected: &[&str]) {
    let dir = written(&format!("bad-{name}"), how, false);
    spoil(&dir);
    let Err(error) = load(&dir, LoadOptions::default(), &mut |_| {}) else { panic!("{name}: loaded") };
    let message = error.to_string();
    expected.iter().for_each(|word| assert!(message.contains(word), "{name}: {word:?} is not in: {message}"));
}

#[test]
fn what_is_not_understood_is_refused() {
    let down = "model.layers.1.mlp.down_proj.weight";
    let (packed, scale) = (format!("{down}_packed"), format!("{down}_scale"));
    let [plain, pack, groups, _] = HOW;
    let dropped = |dir: &Path| {
        rewrite(dir, &scale, |header, _| {
            let found = header.as_object_mut().expect("an object").remove(&scale).expect("the scales");
            header["other"] = found;
        });
    };
    refused("no-scale", plain, dropped, &[&scale, "missing"]);
    let reshape = |tensor: &str, shape: [usize; 2]| {
        let tensor = tensor.to_string();
        move |dir: &Path| rewrite(dir, &tensor, |header, _| header[&tensor]["shape"] = json!(shape))
    };
    refused("shape", plain, reshape(down, [512, 128]), &[down, "[512, 128]", "[128, 512]"]);
    refused("packed-shape", pack, reshape(&packed, [256, 64]), &[down, "[256, 64]", "[128, 128]"]);
    refused("scales", groups, reshape(&scale, [64, 16]), &[&scale, "[64, 16]"]);
    let nan = |dir: &Path| rewrite(dir, &scale, |_, bytes| bytes[2..4].copy_from_slice(&[0xc0, 0x7f]));
    refused("no-number", plain, nan, &[&scale, "NaN", "element 1"]);
    let config = |change: fn(&mut Value)| {
        move |dir: &Path| {
            let file = dir.join("config.json");
            let mut config: Value = serde_json::from_slice(&std::fs::read(&file).expect("read")).expect("JSON");
            change(&mut config["quantization_config"]);
            std::fs::write(file, config.to_string()).expect("write");
        }
    };
    for (name, change) in [
        (
            "bits",
            (|config: &mut Value| config["config_groups"]["group_0"]["weights"]["num_bits"] = json!(4))
                as fn(&mut Value),
        ),
        ("asymmetric", |config| config["config_groups"]["group_0"]["weights"]["symmetric"] = json!(false)),
        ("order", |config| config["config_groups"]["group_0"]["weights"]["actorder"] = json!("group")),
        ("method", |config| config["quant_method"] = json!("gptq")),
        ("format", |config| config["format"] = json!("marlin-24")),
    ] {
        refused(name, plain, config(change), &["quantization_config", "int-quantized", "symmetric"]);
    }
}
