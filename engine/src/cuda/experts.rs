//! A layer's mixture of experts on a GPU: `crate::experts` with the matrices of all experts in one, so that a launch computes what all
//! of them make of their rows, and nothing is read back in between.

use baton_kernels::cuda::{EXPERTS_MAX, Floats, Gpu, GpuError, GpuMatrix, GpuShares, Rows};

use crate::load::config::{self, Mixture};

const _: () = assert!(config::EXPERTS_MAX <= EXPERTS_MAX, "a model that the kernels do not compute");

/// The experts of one layer.
pub(crate) struct Experts {
    /// (expert, hidden)
    pub(crate) router: GpuMatrix,
    /// (expert, gate | up, hidden)
    pub(crate) gate_up: GpuMatrix,
    /// (expert, hidden, inner width)
    pub(crate) down: GpuMatrix,
    /// Experts per row.
    pub(crate) used: usize,
}

/// Buffers that grow to the largest batch seen and stay. A share is one row's visit to one expert.
pub(super) struct Scratch {
    /// (row, expert)
    logits: Floats,
    shares: GpuShares,
    /// (share, gate | up)
    gate_up: Floats,
    /// (share, inner width)
    gated: Rows,
    /// (share, hidden)
    y: Floats,
}

impl Scratch {
    pub(super) fn new(gpu: &Gpu, mixture: &Mixture) -> Result<Scratch, GpuError> {
        Ok(Scratch {
            logits: gpu.floats(1)?,
            shares: gpu.shares(mixture.experts, mixture.used, mixture.over_chosen)?,
            gate_up: gpu.floats(1)?,
            gated: gpu.rows(1, mixture.intermediate)?,
            y: gpu.floats(1)?,
        })
    }

    pub(super) fn places(&self) -> [u64; 5] {
        let Scratch { logits, shares, gate_up, gated, y } = self;
        [logits.place(), shares.place(), gate_up.place(), gated.place(), y.place()]
    }

    pub(super) fn ensure(&mut self, rows: usize, hidden: usize) -> Result<(), GpuError> {
        let (shares, wide) = (self.shares.of_rows(rows), self.gated.width());
        self.logits.ensure(rows * self.shares.experts())?;
        self.shares.ensure(rows)?;
        self.gate_up.ensure(shares * 2 * wide)?;
        self.gated.ensure(shares)?;
        self.y.ensure(shares * hidden)
    }
}

impl Experts {
    /// (bytes, weights) that one row is multiplied with.
    pub(super) fn size_per_row(&self) -> (usize, usize) {
        let Experts { router, gate_up, down, used } = self;
        let experts = router.outputs();
        let weights = |matrix: &GpuMatrix| matrix.outputs() * matrix.inputs();
        let bytes = router.bytes() + (gate_up.bytes() + down.bytes()) / experts * used;
        (bytes, weights(router) + (weights(gate_up) + weights(down)) / experts * used)
    }

    /// out (row, hidden) = the mixture of these rows of x (row, hidden).
    pub(super) fn run(
        &self,
        gpu: &Gpu,
        x: &Rows,
        rows: usize,
        out: &mut Floats,
        scratch: &mut Scratch,
    ) -> Result<(), GpuError> {
        let Scratch { logits, shares, gate_up, gated, y } = scratch;
        gpu.matmul(x, 0..rows, &self.router, None, logits)?;
        gpu.route(logits, rows, [&self.gate_up, &self.down], shares)?;
        gpu.matmul_experts(x, shares, &self.gate_up, gate_up)?;
        gpu.silu_mul(gate_up, shares.of_rows(rows), gated)?;
        gpu.matmul_segmented_experts(gated, shares, &self.down, y)?;
        gpu.mix_rows(y, x.width(), shares, out)
    }
}
