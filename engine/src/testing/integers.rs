//! Models whose projections are 8-bit integers with scales, as compressed-tensors writes them, and the same values as plain
//! numbers.

use std::io;
use std::path::Path;

use baton_kernels::Dtype;
use serde_json::{Value, json};

use super::{Stored, TinyModel, stored, write_tensors};

/// How a checkpoint has its integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Integers {
    /// Four of them in one of 32 bits.
    pub packed: bool,
    /// Inputs that share a scale; None: all of an output.
    pub inputs: Option<usize>,
}

/// Every so many weights of a row one is the largest possible, so that the scale can be told from the values.
const BLOCK: usize = 32;

impl Integers {
    /// `quantization_config`.
    pub fn config(self) -> Value {
        let strategy = if self.inputs.is_some() { "group" } else { "channel" };
        let weights = json!({
            "num_bits": 8, "type": "int", "symmetric": true, "strategy": strategy, "group_size": self.inputs,
            "actorder": null, "dynamic": false,
        });
        let groups = json!({"group_0": {"weights": weights, "input_activations": null, "targets": ["Linear"]}});
        let format = if self.packed { "pack-quantized" } else { "int-quantized" };
        json!({"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]})
    }

    /// Integers and their scales, row by row; the scales are exact as halves.
    fn quantize(self, shape: &[usize], values: &[f32]) -> (Vec<i8>, Vec<f32>) {
        let cols = shape[1];
        let inputs = self.inputs.unwrap_or(cols);
        let mut integers = Vec::with_capacity(values.len());
        let mut scales = Vec::new();
        for group in values.chunks(cols).flat_map(|row| row.chunks(inputs)) {
            let largest = group.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            // Seven bits of fraction.
            let scale = f32::from_bits((largest / 127.0).to_bits() & 0xffff_0000);
            scales.push(scale);
            for (at, value) in group.iter().enumerate() {
                let integer = (value / scale).round().clamp(-127.0, 127.0) as i8;
                integers.push(if at % BLOCK == 5 { 127 } else { integer });
            }
        }
        (integers, scales)
    }
}

impl TinyModel {
    /// Writes the model with its projections in integers, or, `plain`, with their values as f32.
    pub fn write_integers(&self, dir: &Path, seed: u64, how: Integers, plain: bool) -> io::Result<()> {
        let mut config = self.config_json();
        if !plain {
            config["quantization_config"] = how.config();
        }
        std::fs::write(dir.join("config.json"), config.to_string())?;
        let mut tensors = Vec::new();
        for (name, shape, values) in self.weights(seed) {
            if !name.ends_with("_proj.weight") {
                tensors.push((name, stored(&shape, &values, Dtype::F32)));
                continue;
            }
            let (integers, scales) = how.quantize(&shape, &values);
            let (rows, cols) = (shape[0], shape[1]);
            if plain {
                let each = integers.len() / scales.len();
                let values: Vec<f32> =
                    integers.iter().enumerate().map(|(at, q)| f32::from(*q) * scales[at / each]).collect();
                tensors.push((name, stored(&shape, &values, Dtype::F32)));
                continue;
            }
            tensors.push((format!("{name}_scale"), stored(&[rows, scales.len() / rows], &scales, Dtype::Bf16)));
            let flip = if how.packed { 0x80 } else { 0 };
            let bytes = integers.iter().map(|q| q.cast_unsigned() ^ flip).collect();
            tensors.push(match how.packed {
                false => (name, Stored { dtype: "I8", shape, bytes }),
                true => (format!("{name}_packed"), Stored { dtype: "I32", shape: vec![rows, cols / 4], bytes }),
            });
        }
        write_tensors(&dir.join("model.safetensors"), &tensors)
    }
}
