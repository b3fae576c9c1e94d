//! Weights of 8 bits (e4m3) with scales, as checkpoints have them, and how they lie on the GPU. A weight means its value times
//! its scale in f32, rounded to bf16.

use std::sync::Arc;

use super::driver::Driver;
use super::error::GpuError;
use super::launch::{CELL, SCALED_K, TILE_OUTPUTS};
use super::memory::{Floats, Memory};
use crate::f8::F8Matrix;

/// What is left out where a float is made of 8 bits: the difference of the exponents' biases.
const LEFT_OUT: f32 = f32::from_bits((127 + 120) << 23);
/// Outputs that share scales, log2, where an output has several.
const SHARED: u32 = 3;

/// What the cells of a matrix mean: `Eights` of src/matmul_f8.cu.
pub(crate) struct Eights {
    pub(crate) scales: Floats,
    pub(crate) each: u32,
    pub(crate) shift: u32,
}

/// Room for one matrix as bf16.
#[derive(Default)]
pub(crate) struct Wide(Option<Memory>);

impl Wide {
    pub(crate) fn ensure(&mut self, driver: &Arc<dyn Driver>, bytes: usize) -> Result<(), GpuError> {
        if self.0.as_ref().is_none_or(|memory| memory.bytes() < bytes) {
            self.0 = None;
            self.0 = Some(Memory::new(driver, bytes)?);
        }
        Ok(())
    }

    pub(crate) fn at(&self) -> u64 {
        self.0.as_ref().map_or(0, Memory::at)
    }
}

/// A matrix in the order of src/matmul_f8.cu.
pub(crate) struct PackedF8 {
    pub(crate) cells: Vec<u8>,
    pub(crate) scales: Vec<f32>,
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) depth: usize,
    pub(crate) each: u32,
    pub(crate) shift: u32,
}

/// Place in its row of 64 bytes of a cell that k has.
fn place(k: usize) -> usize {
    let (step, within) = (k / 16, k % 16);
    within % 8 / 2 * 16 + step * 4 + within / 8 * 2 + within % 2
}

impl PackedF8 {
    /// # Panics
    /// If the parts differ in width, or are scaled along K in other pieces than 128.
    pub(crate) fn new(parts: &[F8Matrix]) -> PackedF8 {
        let inputs = parts.first().map_or(0, |part| part.cols);
        let outputs = parts.iter().map(|part| part.rows).sum::<usize>();
        let (depth, padded) = (inputs.next_multiple_of(CELL.1), outputs.next_multiple_of(TILE_OUTPUTS));
        let several = parts.iter().any(|part| part.block.1 < inputs);
        let each = if several { inputs.div_ceil(SCALED_K) } else { 1 };
        let shift = if several { SHARED } else { 0 };
        let mut cells = vec![0; padded * depth];
        let mut scales = vec![0.0; (padded >> shift) * each];
        let places: [usize; 64] = std::array::from_fn(place);
        let mut output = 0;
        for part in parts {
            assert_eq!(part.cols, inputs, "parts of one matrix differ in width");
            assert!(part.fits(), "bytes or scales do not fit the shape");
            assert!(!several || part.whole(CELL.0, SCALED_K), "scales of other pieces than 128 k and whole cells");
            for row in 0..part.rows {
                // Behind the cells of the outputs before, at the row of its cell.
                let first = output / TILE_OUTPUTS * TILE_OUTPUTS * depth + output % TILE_OUTPUTS * CELL.1;
                for (cell, bytes) in part.bytes[row * inputs..][..inputs].chunks(CELL.1).enumerate() {
                    let to = &mut cells[first + cell * TILE_OUTPUTS * CELL.1..][..CELL.1];
                    bytes.iter().zip(places).for_each(|(byte, place)| to[place] = *byte);
                }
                for i in 0..each {
                    scales[(output >> shift) * each + i] = part.scale(row, i * SCALED_K) * LEFT_OUT;
                }
                output += 1;
            }
        }
        PackedF8 { cells, scales, outputs, inputs, depth, each: each as u32, shift }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Byte 4 s + j of quarter q is k = 16 s + 2 q + {0, 1, 8, 9}[j].
    #[test]
    fn a_lane_finds_what_it_hands_to_the_tensor_cores() {
        for (step, quarter, j) in (0..64).map(|i| (i / 16, i / 4 % 4, i % 4)) {
            assert_eq!(place(16 * step + 2 * quarter + [0, 1, 8, 9][j]), quarter * 16 + step * 4 + j);
        }
    }
}
