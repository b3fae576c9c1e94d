//! Mixtures of experts: a router's choice for each row, the matmuls of all experts in one launch, and what a row gets of them. As
//! everywhere, a row's bits depend on nothing but the row. Nothing is read back: launches are as large as they could have to be.

use super::eights::{Eights, PackedF8};
use super::error::GpuError;
use super::gpu::Gpu;
use super::launch::{self, EXPERT_EIGHTS, EXPERT_MATMULS, EXPERTS_MAX, TILE_OUTPUTS, Tiled};
use super::memory::{Floats, GpuMatrix, Memory, Rows};
use crate::F8Matrix;

const _: () = assert!(EXPERT_EIGHTS[0].rows == EXPERT_MATMULS[0][0].rows, "one tile for both where weights differ");

/// Words of a run (src/experts.cu).
const RUN_WORDS: usize = 3;

/// Where a batch's rows go: a share is one row's visit to one expert. Made once and routed anew in every layer.
///
/// ```text
/// memory = chosen | weights | places | rows | how many runs there are | runs
/// ```
pub struct GpuShares {
    memory: Memory,
    /// Experts there are, and of each row.
    experts: usize,
    used: usize,
    over_chosen: bool,
    /// Whether weights are of 8 bits, for which there are kernels of small tiles only.
    eights: bool,
    /// Those there is room for, and those routed.
    rows_most: usize,
    rows: usize,
}

impl GpuShares {
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Of so many rows.
    pub fn of_rows(&self, rows: usize) -> usize {
        rows * self.used
    }

    /// Where they lie.
    pub fn place(&self) -> u64 {
        self.memory.at()
    }

    /// Makes room for so many rows; the content is lost when it must grow.
    pub fn ensure(&mut self, rows: usize) -> Result<(), GpuError> {
        let shares = self.of_rows(rows);
        // The smallest tiles are the most runs.
        let runs = runs_most(shares, self.experts, EXPERT_MATMULS[0][0].rows);
        self.memory.ensure((4 * shares + 1 + RUN_WORDS * runs) * 4)?;
        self.rows_most = self.rows_most.max(rows);
        Ok(())
    }

    fn count(&self) -> usize {
        self.of_rows(self.rows)
    }

    /// The matmuls for as many rows as an expert has on average; those with the most are several tiles.
    fn tiled(&self) -> [Tiled; 2] {
        if self.eights {
            return EXPERT_MATMULS[0];
        }
        let average = self.count().div_ceil(self.experts);
        *EXPERT_MATMULS.iter().find(|pair| average <= pair[0].rows).unwrap_or(&EXPERT_MATMULS[2])
    }

    fn arguments(&self) -> launch::Shares {
        let count = self.count();
        let at = |words: usize| self.memory.at() + (words * 4) as u64;
        launch::Shares {
            chosen: at(0),
            weights: at(count),
            places: at(2 * count),
            rows: at(3 * count),
            run_count: at(4 * count),
            runs: at(4 * count + 1),
            count: count as u32,
            experts: self.experts as u32,
            used: self.used as u32,
            tile_rows: self.tiled()[0].rows as u32,
        }
    }

    /// (row, its experts by id): the expert, its weight, and where the share lies.
    pub(crate) fn read(&self) -> Result<Vec<(usize, f32, usize)>, GpuError> {
        let count = self.count();
        let chosen: Vec<u32> = self.memory.read(0, count)?;
        let weights: Vec<f32> = self.memory.read(4 * count, count)?;
        let places: Vec<u32> = self.memory.read(8 * count, count)?;
        let all = chosen.into_iter().zip(weights).zip(places);
        Ok(all.map(|((expert, weight), place)| (expert as usize, weight, place as usize)).collect())
    }
}

/// Runs of at most `tile` shares of one expert that so many shares can be at most.
fn runs_most(shares: usize, experts: usize, tile: usize) -> usize {
    (shares + shares.min(experts) * (tile - 1)) / tile
}

impl Gpu {
    /// The rows of the experts' parts, expert by expert, kept in 8 bits as by `matrix_f8`.
    ///
    /// # Panics
    /// If they cannot be (`GpuMatrix::keeps_experts`).
    pub fn matrix_f8_of_experts(&self, experts: &[Vec<F8Matrix>]) -> Result<GpuMatrix, GpuError> {
        assert!(GpuMatrix::keeps_experts(experts), "experts that differ");
        let one = PackedF8::new(&experts[0]);
        let memory = Memory::new(&self.driver, one.cells.len() * experts.len())?;
        let mut scales = Vec::with_capacity(one.scales.len() * experts.len());
        for (expert, parts) in experts.iter().enumerate() {
            let packed = PackedF8::new(parts);
            memory.write(expert * one.cells.len(), &packed.cells)?;
            scales.extend_from_slice(&packed.scales);
        }
        let PackedF8 { outputs, inputs, depth, each, shift, .. } = one;
        let eights = Some(Eights { scales: self.floats_of(&scales)?, each, shift });
        Ok(GpuMatrix { memory, outputs: outputs * experts.len(), inputs, depth, eights })
    }

    /// For mixtures of so many experts, `used` of which each row visits. Weights are a softmax over the chosen ones, or over all.
    ///
    /// # Panics
    /// If more are used than there are, or there are more than `EXPERTS_MAX`.
    pub fn shares(&self, experts: usize, used: usize, over_chosen: bool) -> Result<GpuShares, GpuError> {
        assert!((1..=experts).contains(&used) && experts <= EXPERTS_MAX, "{used} of {experts} experts");
        let memory = Memory::new(&self.driver, 1)?;
        Ok(GpuShares { memory, experts, used, over_chosen, eights: false, rows_most: 0, rows: 0 })
    }

    /// Chooses each row's experts by its logits (row, expert), as `route` does, and sorts the shares for products with `matrices`.
    pub fn route(
        &self,
        logits: &Floats,
        rows: usize,
        matrices: [&GpuMatrix; 2],
        shares: &mut GpuShares,
    ) -> Result<(), GpuError> {
        assert!(rows <= shares.rows_most && logits.len() >= rows * shares.experts, "rows do not fit");
        shares.rows = rows;
        shares.eights = matrices.iter().any(|matrix| matrix.eights.is_some());
        let arguments = shares.arguments();
        let over_chosen = u32::from(shares.over_chosen);
        self.launch(launch::ROUTE, [rows, 1, 1], &[&arguments, &logits.at(), &over_chosen])?;
        let experts = if rows > 0 { shares.experts } else { 0 };
        self.launch(launch::SORT_SHARES, [experts, 1, 1], &[&arguments])
    }

    /// y (share, outputs) = the share's row of x (.., K) · its expert's Wᵀ, one chain per output over all k. `w` has the rows of all
    /// experts, one after another.
    pub fn matmul_experts(&self, x: &Rows, shares: &GpuShares, w: &GpuMatrix, y: &mut Floats) -> Result<(), GpuError> {
        x.check(shares.rows, w.inputs);
        self.multiply_shares(x, shares, w, y, 0)
    }

    /// y (share, outputs) = x (share, K) · its expert's Wᵀ, with K in segments as in `matmul_segmented`.
    pub fn matmul_segmented_experts(
        &self,
        x: &Rows,
        shares: &GpuShares,
        w: &GpuMatrix,
        y: &mut Floats,
    ) -> Result<(), GpuError> {
        x.check(shares.count(), w.inputs);
        self.multiply_shares(x, shares, w, y, 1)
    }

    fn multiply_shares(
        &self,
        x: &Rows,
        shares: &GpuShares,
        w: &GpuMatrix,
        y: &mut Floats,
        segmented: usize,
    ) -> Result<(), GpuError> {
        assert!(w.outputs.is_multiple_of(shares.experts), "no matrix of experts");
        assert!(w.eights.is_none() || shares.eights, "shares that were sorted for other matrices");
        let (count, outputs) = (shares.count(), w.outputs / shares.experts);
        assert!(y.len() >= count * outputs, "outputs do not fit (shares, N)");
        let arguments = launch::Matmul {
            x: x.at(),
            w: w.memory.at(),
            bias: 0,
            y: y.at(),
            x_stride: x.stride(),
            rows: count as u32,
            outputs: outputs as u32,
            depth: w.depth as u32,
            fresh: 0,
        };
        let (tiled, sorted) = (shares.tiled()[segmented], shares.arguments());
        let grid = |tiled: Tiled| [runs_most(count, shares.experts, tiled.rows), outputs.div_ceil(tiled.outputs), 1];
        let Some(eights) = &w.eights else { return self.launch(tiled.kernel, grid(tiled), &[&arguments, &sorted]) };
        let scaled = launch::Eights { scales: eights.scales.at(), each: eights.each, shift: eights.shift };
        let tiled = EXPERT_EIGHTS[segmented];
        self.launch(tiled.kernel, grid(tiled), &[&arguments, &scaled, &sorted])
    }

    /// out (row, width) = the sum of the row's shares of y (share, width), by the experts' ids, each multiplied by its weight and added
    /// in one rounding.
    pub fn mix_rows(&self, y: &Floats, width: usize, shares: &GpuShares, out: &mut Floats) -> Result<(), GpuError> {
        assert!(y.len() >= shares.count() * width && out.len() >= shares.rows * width, "rows do not fit");
        let grid = [shares.rows, width.div_ceil(launch::MIX_ROWS.threads as usize), 1];
        self.launch(launch::MIX_ROWS, grid, &[&shares.arguments(), &y.at(), &(width as u32), &out.at()])
    }
}

impl GpuMatrix {
    /// Whether the parts of all experts can be kept in 8 bits together: scaled alike, and in whole tiles.
    pub fn keeps_experts(experts: &[Vec<F8Matrix>]) -> bool {
        let outputs = |parts: &[F8Matrix]| parts.iter().map(|part| part.rows).sum::<usize>();
        let several = |parts: &[F8Matrix]| parts.iter().any(|part| part.block.1 < part.cols);
        let Some(first) = experts.first() else { return false };
        outputs(first).is_multiple_of(TILE_OUTPUTS)
            && experts.iter().all(|parts| {
                GpuMatrix::keeps(parts) && several(parts) == several(first) && outputs(parts) == outputs(first)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However shares are spread over experts, their runs are no more; and spread in the worst way they are as many.
    #[test]
    fn there_are_no_more_runs_than_thread_blocks() {
        let tile = 16;
        let runs = |shares: &[usize]| shares.iter().map(|count| count.div_ceil(tile)).sum::<usize>();
        for (experts, shares) in [(1, 1), (8, 3), (8, 8), (8, 200), (5, 81), (128, 1000)] {
            let worst = runs_most(shares, experts, tile);
            let even: Vec<usize> = (0..experts).map(|i| (shares + i) / experts).collect();
            let mut steep = vec![1; experts.min(shares)];
            steep[0] += shares - steep.len();
            assert!(runs(&even) <= worst && runs(&steep) <= worst && runs(&[shares]) <= worst, "{shares} of {experts}");
        }
        assert_eq!(runs_most(8 + 7 * 16, 8, tile), 15, "7 of 17 and one of 1");
    }

    /// Experts that differ, or end within a tile, become bf16.
    #[test]
    fn experts_that_fit_are_kept_in_8_bits() {
        let one = |rows: usize, block: (usize, usize)| {
            let scales = vec![1.0; rows.div_ceil(block.0) * 256usize.div_ceil(block.1)];
            let bytes = vec![0; rows * 256];
            let (bytes, scales) = (Vec::leak(bytes), Vec::leak(scales));
            F8Matrix { bytes, rows, cols: 256, scales, block }
        };
        let keeps = |experts: &[Vec<F8Matrix>]| GpuMatrix::keeps_experts(experts);
        assert!(keeps(&[vec![one(16, (16, 256)); 2], vec![one(16, (1, 256)); 2]]));
        assert!(!keeps(&[vec![one(16, (16, 256))]]), "half a tile");
        assert!(!keeps(&[vec![one(32, (32, 256))], vec![one(32, (128, 128))]]), "one has several scales for an output");
        assert!(!keeps(&[vec![one(32, (32, 256))], vec![one(64, (64, 256))]]), "one is larger");
        assert!(!keeps(&[]));
    }
}
