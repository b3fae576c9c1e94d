//! A layer's mixture of experts in place of its MLP: the router sends each row to a few experts, and what the row gets is the
//! sum of what they make of it, by their ids. So its bits depend on nothing but the row, as an MLP's do; and as there, every
//! rank of a group has some columns of each expert, and sums are cut into the same segments however many ranks there are.

use baton_kernels::{Broken, Collective, Cpu, Packed, Segments, route};

/// The experts of one layer.
pub struct Experts {
    /// (experts, hidden); every rank has all of it.
    pub router: Packed,
    pub all: Vec<Expert>,
    /// Experts per row.
    pub used: usize,
    /// Weights are a softmax over the chosen experts, not over all.
    pub over_chosen: bool,
    /// Inner width of an expert, of all ranks.
    pub inner: usize,
}

/// One expert's matrices.
pub struct Expert {
    /// Rows of gate, then up.
    pub gate_up: Packed,
    pub down: Packed,
}

/// Buffers that grow to the largest batch seen and stay. A share is one row's visit to one expert; shares are sorted by
/// expert, then by row.
#[derive(Default)]
pub(crate) struct Scratch {
    /// (row, expert)
    logits: Vec<f32>,
    /// Row of each share.
    rows: Vec<usize>,
    /// (row, its experts by id): share and weight.
    weighed: Vec<(usize, f32)>,
    /// (share, hidden)
    x: Vec<f32>,
    /// (share, gate | up)
    gate_up: Vec<f32>,
    /// (share, inner width)
    gated: Vec<f32>,
    /// (share, hidden)
    y: Vec<f32>,
}

/// Where a rank computes: its device, its place in the group.
pub(crate) struct Place<'a> {
    pub cpu: &'a Cpu,
    pub collective: &'a mut Collective,
    /// The rank's segments of an expert's inner width.
    pub segments: Segments,
}

impl Experts {
    /// Bytes of all matrices.
    pub fn bytes(&self) -> usize {
        self.router.bytes() + self.all.iter().map(Expert::bytes).sum::<usize>()
    }

    /// Bytes of the matrices that one row reads.
    pub fn bytes_per_row(&self) -> usize {
        self.router.bytes() + self.used * self.all.first().map_or(0, Expert::bytes)
    }

    /// Weights that one row is multiplied with.
    pub fn weights_per_row(&self) -> usize {
        let size = |matrix: &Packed| matrix.rows() * matrix.cols();
        size(&self.router) + self.used * self.all.first().map_or(0, |one| size(&one.gate_up) + size(&one.down))
    }

    /// out (rows, hidden) = the mixture of x (rows, hidden).
    pub(crate) fn run(&self, place: Place, x: &[f32], out: &mut [f32], scratch: &mut Scratch) -> Result<(), Broken> {
        let Place { cpu, collective, segments } = place;
        let hidden = self.router.cols();
        let counts = self.choose(cpu, x, x.len() / hidden, scratch);
        let (shares, wide) = (scratch.rows.len(), self.all[0].down.cols());
        scratch.x.resize(shares * hidden, 0.0);
        scratch.gate_up.resize(shares * 2 * wide, 0.0);
        scratch.gated.resize(shares * wide, 0.0);
        scratch.y.resize(shares * hidden, 0.0);
        cpu.gather_rows(x, hidden, &scratch.rows, &mut scratch.x);
        let runs = || {
            let mut from = 0;
            let busy = self.all.iter().zip(&counts).filter(|(_, count)| **count > 0);
            busy.map(move |(expert, &count)| {
                from += count;
                (expert, from - count..from)
            })
        };
        for (expert, run) in runs() {
            let (x, y) = (run.start * hidden..run.end * hidden, run.start * 2 * wide..run.end * 2 * wide);
            cpu.matmul(&scratch.x[x], run.len(), &expert.gate_up, &mut scratch.gate_up[y]);
        }
        cpu.silu_mul(&scratch.gate_up, wide, &mut scratch.gated);
        for (expert, run) in runs() {
            let (x, y) = (run.start * wide..run.end * wide, run.start * hidden..run.end * hidden);
            cpu.matmul_segments(&scratch.gated[x], run.len(), &expert.down, segments, &mut scratch.y[y]);
        }
        collective.all_reduce(&mut scratch.y)?;
        cpu.mix_rows(&scratch.y, hidden, &scratch.weighed, out);
        Ok(())
    }

    /// Routes the rows; returns how many shares each expert has.
    fn choose(&self, cpu: &Cpu, x: &[f32], rows: usize, scratch: &mut Scratch) -> Vec<usize> {
        let count = self.all.len();
        scratch.logits.resize(rows * count, 0.0);
        cpu.matmul(x, rows, &self.router, &mut scratch.logits);
        let logits = scratch.logits.chunks_exact(count);
        let routed: Vec<(usize, f32)> = logits.flat_map(|row| route(row, self.used, self.over_chosen)).collect();
        let mut counts = vec![0; count];
        routed.iter().for_each(|(expert, _)| counts[*expert] += 1);
        let mut next: Vec<usize> = counts
            .iter()
            .scan(0, |from, count| {
                *from += count;
                Some(*from - count)
            })
            .collect();
        scratch.rows.clear();
        scratch.rows.resize(routed.len(), 0);
        scratch.weighed.clear();
        for (at, (expert, weight)) in routed.into_iter().enumerate() {
            scratch.rows[next[expert]] = at / self.used;
            scratch.weighed.push((next[expert], weight));
            next[expert] += 1;
        }
        counts
    }
}

impl Expert {
    fn bytes(&self) -> usize {
        self.gate_up.bytes() + self.down.bytes()
    }
}
