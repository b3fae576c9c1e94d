//! Matrices of 8-bit integers with scales, as compressed-tensors has them, in GGUF's Q8_0: the integers stay what they are, and
//! every 32 of them carry their scale as a half.
//!
//! ```text
//! int-quantized    X.weight          I8  (outputs, inputs)
//! pack-quantized   X.weight_packed   I32 (outputs, inputs / 4), four integers + 128 in each, the first in its low byte
//! both             X.weight_scale    one; one for each output; one for each output and so many inputs
//! ```

use baton_kernels::{Dtype, round_f16};

use crate::load::checkpoint::{File, Scales};
use crate::load::error::LoadError;
use crate::load::gguf;

/// How integers lie in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Plain,
    Packed,
}

impl Packing {
    /// The packing that a tensor of this type has: `packed` by its name.
    pub(super) fn of(tensor: &gguf::Tensor, packed: bool) -> Option<Packing> {
        match (tensor.dtype.as_ref().err()?.as_str(), packed) {
            ("I8", false) => Some(Packing::Plain),
            ("I32", true) => Some(Packing::Packed),
            _ => None,
        }
    }

    /// Shape in the file of a matrix.
    pub(super) fn shape(self, rows: usize, cols: usize) -> Vec<usize> {
        match self {
            Packing::Plain => vec![rows, cols],
            Packing::Packed => vec![rows, cols.div_ceil(4)],
        }
    }

    /// What turns a byte of the file into the integer's own.
    fn flip(self) -> u8 {
        match self {
            Packing::Plain => 0,
            Packing::Packed => 0x80,
        }
    }
}

/// The matrix in Q8_0, row by row. `bytes` are as the file has them, of `packing.shape`.
pub(super) fn to_q8_0(
    file: &File,
    name: &str,
    (rows, cols): (usize, usize),
    packing: Packing,
    bytes: &[u8],
    scales: &Scales,
) -> Result<Vec<u8>, LoadError> {
    let unit = Dtype::Q8_0.unit();
    let inputs = scales.block.1;
    if !cols.is_multiple_of(unit) || !(inputs.is_multiple_of(unit) || inputs >= cols) {
        let reason = match cols.is_multiple_of(unit) {
            false => format!("rows of {cols}; expected multiples of {unit}"),
            true => format!("a scale for every {inputs} inputs; expected multiples of {unit}"),
        };
        return Err(LoadError::Integers { file: file.path.clone(), tensor: name.to_string(), reason });
    }
    let across = cols.div_ceil(inputs);
    let mut out = Vec::with_capacity(rows * cols / unit * Dtype::Q8_0.unit_bytes());
    for (row, integers) in bytes.chunks_exact(cols).enumerate() {
        for (at, integers) in integers.chunks_exact(unit).enumerate() {
            let scale = scales.values[row / scales.block.0 * across + at * unit / inputs];
            out.extend(round_f16(scale).to_le_bytes());
            out.extend(integers.iter().map(|byte| byte ^ packing.flip()));
        }
    }
    Ok(out)
}
