//! Models whose projections are e4m3 with scales, as checkpoints have them, and the same models in bf16.

use std::io;
use std::path::Path;

use baton_kernels::{Dtype, F8Matrix, f8};
use serde_json::{Value, json};

use super::{Stored, TinyModel, stored, write_tensors};

/// What shares a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scaling {
    One,
    Outputs,
    /// 128 by 128.
    Blocks,
}

/// Side of a block.
const SIDE: usize = 128;

impl Scaling {
    pub const ALL: [Scaling; 3] = [Scaling::One, Scaling::Outputs, Scaling::Blocks];

    fn block(self, rows: usize, cols: usize) -> (usize, usize) {
        match self {
            Scaling::One => (rows, cols),
            Scaling::Outputs => (1, cols),
            Scaling::Blocks => (SIDE, SIDE),
        }
    }

    /// `quantization_config`.
    pub fn config(self) -> Value {
        let strategy = match self {
            Scaling::Blocks => {
                return json!({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [SIDE, SIDE]});
            }
            Scaling::One => "tensor",
            Scaling::Outputs => "channel",
        };
        let weights = json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": strategy});
        let groups = json!({"group_0": {"weights": weights, "targets": ["Linear"]}});
        json!({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups, "ignore": ["lm_head"]})
    }

    /// The matrix, its scales, and the scales' name behind that of the matrix.
    fn quantize(self, shape: &[usize], values: &[f32]) -> (Stored, Stored, &'static str) {
        let [rows, cols] = shape else { unreachable!("projections are matrices") };
        let (rows, cols) = (*rows, *cols);
        let block = self.block(rows, cols);
        let across = cols.div_ceil(block.1);
        let at = |i: usize| i / cols / block.0 * across + i % cols / block.1;
        let mut scales = vec![0f32; rows.div_ceil(block.0) * across];
        values.iter().enumerate().for_each(|(i, value)| scales[at(i)] = scales[at(i)].max(value.abs() / 448.0));
        let known: Vec<f32> = (0..0x7f).map(f8::value).collect();
        let bytes: Vec<u8> =
            values.iter().enumerate().map(|(i, value)| nearest(&known, value / scales[at(i)])).collect();
        let matrix = Stored { dtype: "F8_E4M3", shape: shape.to_vec(), bytes };
        match self {
            Scaling::One => (matrix, stored(&[], &scales, Dtype::F32), "_scale"),
            Scaling::Outputs => (matrix, stored(&[rows, 1], &scales, Dtype::Bf16), "_scale"),
            Scaling::Blocks => (matrix, stored(&[rows.div_ceil(SIDE), across], &scales, Dtype::F32), "_scale_inv"),
        }
    }
}

/// A nearest one of the format's `values` of no sign, which rise.
fn nearest(values: &[f32], value: f32) -> u8 {
    let above = values.partition_point(|one| *one < value.abs()).clamp(1, values.len() - 1);
    let nearer = value.abs() - values[above - 1] < values[above] - value.abs();
    (if nearer { above - 1 } else { above }) as u8 | u8::from(value < 0.0) << 7
}

impl TinyModel {
    /// Writes the model with its projections in 8 bits, or, `widened`, with what these mean in bf16.
    pub fn write_eights(&self, dir: &Path, seed: u64, scaling: Scaling, widened: bool) -> io::Result<()> {
        let mut config = self.config_json();
        if !widened {
            config["quantization_config"] = scaling.config();
        }
        std::fs::write(dir.join("config.json"), config.to_string())?;
        let mut tensors = Vec::new();
        for (name, shape, values) in self.weights(seed) {
            if !name.ends_with("_proj.weight") {
                tensors.push((name, stored(&shape, &values, Dtype::Bf16)));
                continue;
            }
            let (matrix, scale, behind) = scaling.quantize(&shape, &values);
            if widened {
                let scales: Vec<f32> = match scale.dtype {
                    "F32" => scale.bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
                    _ => scale
                        .bytes
                        .as_chunks()
                        .0
                        .iter()
                        .map(|[low, high]| f32::from_le_bytes([0, 0, *low, *high]))
                        .collect(),
                };
                let (rows, cols) = (shape[0], shape[1]);
                let block = scaling.block(rows, cols);
                let bytes = F8Matrix { bytes: &matrix.bytes, rows, cols, scales: &scales, block }.widen();
                tensors.push((name, Stored { dtype: "BF16", shape, bytes }));
            } else {
                tensors.push((format!("{name}{behind}"), scale));
                tensors.push((name, matrix));
            }
        }
        write_tensors(&dir.join("model.safetensors"), &tensors)
    }
}
