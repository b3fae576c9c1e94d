//! Mixtures of experts against the CPU's reference: the router's choice exactly, the matmuls of all experts within rounding and
//! with equal bits whoever shares the batch, and their sum exactly.

use super::check::{Checker, RandomEights, Scaling, equal_bits};
use super::{Floats, Gpu, GpuError, GpuMatrix, GpuShares, Rows};
use crate::{Dtype, F8Matrix, Matrix, Packed, bf16, route};

/// The matrices of all experts: here, each for itself here, and on the CPU.
struct Experts {
    all: GpuMatrix,
    each: Vec<GpuMatrix>,
    packed: Vec<Packed>,
}

impl Checker<'_> {
    /// Logits with ties, zeros of both signs and infinities, of (experts, those used).
    pub(super) fn routes(&mut self, rows: usize, (experts, used): (usize, usize)) -> Result<(), GpuError> {
        let mut logits: Vec<f32> = self.values(rows * experts, 6.0).iter().map(|logit| logit.round() / 2.0).collect();
        logits.iter_mut().step_by(7).for_each(|logit| *logit *= -0.0);
        logits[..experts - used].fill(f32::NEG_INFINITY);
        let (there, (none, _)) = (self.gpu.floats_of(&logits)?, self.weights(1, 1)?);
        for over_chosen in [true, false] {
            let shares = routed(self.gpu, &there, rows, (experts, used, over_chosen), [&none, &none])?;
            let found: Vec<(usize, u32)> =
                shares.read()?.iter().map(|(expert, weight, _)| (*expert, weight.to_bits())).collect();
            let routed = logits.chunks_exact(experts).flat_map(|row| route(row, used, over_chosen));
            let expected: Vec<(usize, u32)> = routed.map(|(expert, weight)| (expert, weight.to_bits())).collect();
            let over = if over_chosen { "chosen" } else { "all" };
            self.same(format!("route ({rows}, {used} of {experts}), weights over {over}"), found == expected);
        }
        Ok(())
    }

    /// Each number of rows, most of which have the first expert among theirs, through experts of (hidden, inner width).
    pub(super) fn experts(
        &mut self,
        rows: &[usize],
        (experts, used): (usize, usize),
        (hidden, wide): (usize, usize),
    ) -> Result<(), GpuError> {
        let (gpu, most) = (self.gpu, rows.iter().copied().max().unwrap_or(1));
        let mut logits = self.values(most * experts, 4.0);
        logits.iter_mut().step_by(experts).for_each(|logit| *logit += 3.0);
        let there = gpu.floats_of(&logits)?;
        let (gate_up, down) = (self.matrices(experts, 2 * wide, hidden)?, self.matrices(experts, hidden, wide)?);
        let (x, values) = self.inputs(most, hidden)?;
        let (inner, inner_values) = self.inputs(most * used, wide)?;
        let mut runs = Vec::new();
        for &rows in rows {
            let name = format!("({rows}, {used} of {experts}, {hidden}, {wide})");
            let shares = routed(gpu, &there, rows, (experts, used, true), [&gate_up.all, &down.all])?;
            let routed = shares.read()?;
            let mut wider = gpu.floats(rows * used * 2 * wide)?;
            gpu.matmul_experts(&x, &shares, &gate_up.all, &mut wider)?;
            let wider = by_row(&routed, &wider.read(rows * used * 2 * wide)?, 2 * wide);
            let expected = self.products(&routed, &gate_up.packed, |at| &values[at / used * hidden..][..hidden], false);
            self.close(format!("matmul_experts {name}"), &wider, &expected);

            // What a share brings along lies where the share lies.
            let brought = by_share(gpu, &routed, &inner_values, wide)?;
            let mut y = gpu.floats(rows * used * hidden)?;
            gpu.matmul_segmented_experts(&brought, &shares, &down.all, &mut y)?;
            let sorted = y.read(rows * used * hidden)?;
            let narrow = by_row(&routed, &sorted, hidden);
            let expected = self.products(&routed, &down.packed, |at| &inner_values[at * wide..][..wide], true);
            self.close(format!("matmul_segmented_experts {name}"), &narrow, &expected);

            let (mut out, mut expected) = (gpu.floats(rows * hidden)?, vec![0.0; rows * hidden]);
            gpu.mix_rows(&y, hidden, &shares, &mut out)?;
            let weighed: Vec<(usize, f32)> = routed.iter().map(|(_, weight, place)| (*place, *weight)).collect();
            self.cpu.mix_rows(&sorted, hidden, &weighed, &mut expected);
            self.same(format!("mix_rows {name}"), equal_bits(&out.read(rows * hidden)?, &expected));
            runs.push((wider, narrow, routed));
        }
        let Some((wider, narrow, routed)) = runs.iter().max_by_key(|run| run.2.len()) else { return Ok(()) };
        let same = runs
            .iter()
            .all(|run| equal_bits(&run.0, &wider[..run.0.len()]) && equal_bits(&run.1, &narrow[..run.1.len()]));
        self.same(format!("experts ({used} of {experts}, {hidden}, {wide}): same bits in every tile"), same);
        // Elsewhere Hopper has kernels of its own for a matrix alone.
        if !hidden.is_multiple_of(64) && !(2 * wide).is_multiple_of(64) {
            let same = alone(gpu, routed, &gate_up, &x, used, wider, false)?
                && alone(gpu, routed, &down, &inner, 1, narrow, true)?;
            self.same(format!("experts ({used} of {experts}, {hidden}, {wide}): the bits of one matrix alone"), same);
        }
        Ok(())
    }

    /// Experts over weights of 8 bits: the bits of what these mean in bf16.
    pub(super) fn experts_of_eights(
        &mut self,
        rows: &[usize],
        (experts, used): (usize, usize),
        (hidden, wide): (usize, usize),
        scaling: Scaling,
    ) -> Result<(), GpuError> {
        let (gpu, most) = (self.gpu, rows.iter().copied().max().unwrap_or(1));
        let logits = self.values(most * experts, 4.0);
        let there = gpu.floats_of(&logits)?;
        let mut both = |outputs, inputs, parts: usize| {
            let of = |_| (0..parts).map(|_| self.random_eights(outputs, inputs, scaling)).collect();
            let random: Vec<Vec<RandomEights>> = (0..experts).map(of).collect();
            in_both_forms(gpu, &random)
        };
        let (gate_up, down) = (both(wide, hidden, 2)?, both(hidden, wide, 1)?);
        let ((x, _), (inner, _)) = (self.inputs(most, hidden)?, self.inputs(most * used, wide)?);
        for &rows in rows {
            let run = |gate_up: &GpuMatrix, down: &GpuMatrix| {
                let shares = routed(gpu, &there, rows, (experts, used, true), [gate_up, down])?;
                let (mut wider, mut y) = (gpu.floats(rows * used * 2 * wide)?, gpu.floats(rows * used * hidden)?);
                gpu.matmul_experts(&x, &shares, gate_up, &mut wider)?;
                gpu.matmul_segmented_experts(&inner, &shares, down, &mut y)?;
                Ok((wider.read(rows * used * 2 * wide)?, y.read(rows * used * hidden)?))
            };
            let expected = run(&gate_up.1, &down.1)?;
            let mut same = true;
            // Those that cannot be kept in 8 bits are beside others that are.
            for (gate_up, down) in [(&gate_up.0, &down.0), (&gate_up.0, &down.1), (&gate_up.1, &down.0)] {
                let found = run(gate_up, down)?;
                same &= equal_bits(&found.0, &expected.0) && equal_bits(&found.1, &expected.1);
            }
            let name = format!("experts of 8 bits ({rows}, {used} of {experts}, {hidden}, {wide}), {scaling:?}");
            self.same(format!("{name}: the bits of bf16"), same);
        }
        Ok(())
    }

    fn matrices(&mut self, experts: usize, outputs: usize, inputs: usize) -> Result<Experts, GpuError> {
        let values = self.values(experts * outputs * inputs, 1.0 / (inputs as f64).sqrt());
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let of = |bytes, rows| Matrix { dtype: Dtype::F32, bytes, rows, cols: inputs };
        let each: Vec<Matrix> = bytes.chunks_exact(outputs * inputs * 4).map(|bytes| of(bytes, outputs)).collect();
        Ok(Experts {
            all: self.gpu.matrix(&each)?,
            each: each.iter().map(|one| self.gpu.matrix(&[*one])).collect::<Result<_, _>>()?,
            packed: each.iter().map(|one| self.cpu.pack(&[*one])).collect(),
        })
    }

    /// The products of the rows that `of` has for each share, by row.
    fn products<'a>(
        &self,
        routed: &[(usize, f32, usize)],
        packed: &[Packed],
        of: impl Fn(usize) -> &'a [f32],
        segmented: bool,
    ) -> Vec<f32> {
        let product = |(at, (expert, ..)): (usize, &(usize, f32, usize))| {
            let mut y = vec![0.0; packed[*expert].rows()];
            match segmented {
                true => self.cpu.matmul_segmented(of(at), 1, &packed[*expert], &mut y),
                false => self.cpu.matmul(of(at), 1, &packed[*expert], &mut y),
            }
            y
        };
        routed.iter().enumerate().flat_map(product).collect()
    }
}

fn routed(
    gpu: &Gpu,
    logits: &Floats,
    rows: usize,
    (experts, used, over_chosen): (usize, usize, bool),
    matrices: [&GpuMatrix; 2],
) -> Result<GpuShares, GpuError> {
    let mut shares = gpu.shares(experts, used, over_chosen)?;
    shares.ensure(rows)?;
    gpu.route(logits, rows, matrices, &mut shares)?;
    Ok(shares)
}

/// The experts' parts in 8 bits, and as what these mean in bf16.
fn in_both_forms(gpu: &Gpu, random: &[Vec<RandomEights>]) -> Result<(GpuMatrix, GpuMatrix), GpuError> {
    let eights: Vec<Vec<F8Matrix>> =
        random.iter().map(|parts| parts.iter().map(RandomEights::matrix).collect()).collect();
    let parts: Vec<&F8Matrix> = eights.iter().flatten().collect();
    let widened: Vec<Vec<u8>> = parts.iter().map(|part| part.widen()).collect();
    let mut wide = Vec::with_capacity(parts.len());
    for (part, bytes) in parts.iter().zip(&widened) {
        wide.push(Matrix { dtype: Dtype::Bf16, bytes, rows: part.rows, cols: part.cols });
    }
    Ok((gpu.matrix_f8_of_experts(&eights)?, gpu.matrix(&wide)?))
}

/// Whether every share's row alone, through its expert's matrix alone, gives the same bits. `each` shares have one row of x.
fn alone(
    gpu: &Gpu,
    routed: &[(usize, f32, usize)],
    experts: &Experts,
    x: &Rows,
    each: usize,
    expected: &[f32],
    segmented: bool,
) -> Result<bool, GpuError> {
    let mut same = true;
    for (at, (expert, ..)) in routed.iter().enumerate() {
        let (w, row) = (&experts.each[*expert], at / each);
        let mut y = gpu.floats(w.outputs())?;
        match segmented {
            true => gpu.matmul_segmented(x, row..row + 1, w, None, &mut y)?,
            false => gpu.matmul(x, row..row + 1, w, None, &mut y)?,
        }
        same &= equal_bits(&y.read(w.outputs())?, &expected[at * w.outputs()..][..w.outputs()]);
    }
    Ok(same)
}

/// Values that lie by share, in the order of rows.
fn by_row(routed: &[(usize, f32, usize)], values: &[f32], width: usize) -> Vec<f32> {
    routed.iter().flat_map(|(.., place)| &values[place * width..][..width]).copied().collect()
}

/// The other way around, on the GPU.
fn by_share(gpu: &Gpu, routed: &[(usize, f32, usize)], values: &[f32], width: usize) -> Result<Rows, GpuError> {
    let mut halves = vec![0; routed.len() * width];
    for ((.., place), row) in routed.iter().zip(values.chunks_exact(width)) {
        let to = &mut halves[place * width..][..width];
        to.iter_mut().zip(row).for_each(|(to, value)| *to = bf16::round(*value));
    }
    let rows = gpu.rows(routed.len(), width)?;
    rows.write(&halves)?;
    Ok(rows)
}
