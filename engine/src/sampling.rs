//! From one row of logits to one token. The order is: log-probabilities (of the untouched logits), logit bias,
//! penalties, bans, temperature, top-k, top-p, min-p, draw. Pure: equal logits and equal `Next` give equal tokens.

use baton_core::{Philox, SampledToken, Sampling, TokenId};
use baton_kernels::Cpu;

use crate::batch::{Draw, DrawKind, Next};

/// Tokens of a sequence so far, for the penalties: sorted by id, with how often the output (not the prompt) has each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    counts: Vec<(TokenId, u32)>,
}

impl Seen {
    /// What the penalties of `sampling` must know of a sequence; None when it has none.
    pub fn of(sampling: &Sampling, prompt: &[TokenId], output: &[TokenId]) -> Option<Seen> {
        let none =
            sampling.repetition_penalty == 1.0 && sampling.presence_penalty == 0.0 && sampling.frequency_penalty == 0.0;
        if none {
            return None;
        }
        let mut ids = prompt.to_vec();
        ids.sort_unstable();
        ids.dedup();
        let mut seen = Seen { counts: ids.into_iter().map(|id| (id, 0)).collect() };
        output.iter().for_each(|id| seen.push(*id));
        Some(seen)
    }

    /// One more token of output.
    pub fn push(&mut self, id: TokenId) {
        match self.counts.binary_search_by_key(&id, |entry| entry.0) {
            Ok(at) => self.counts[at].1 += 1,
            Err(at) => self.counts.insert(at, (id, 1)),
        }
    }
}

/// Reads one draw off its row of logits, which is left as it was found.
pub fn draw(cpu: &Cpu, logits: &mut [f32], draw: &Draw) -> SampledToken {
    match &draw.kind {
        DrawKind::Given { token, top } => report(cpu, logits, *token, *top),
        DrawKind::Next(next) => sample(cpu, logits, next),
    }
}

/// The token that follows the row.
pub fn sample(cpu: &Cpu, logits: &mut [f32], next: &Next) -> SampledToken {
    let changed = adjust(logits, next);
    let sampling = &next.request.sampling;
    let (best, max) = cpu.argmax(logits);
    let id = match sampling.temperature > 0.0 && max > f32::NEG_INFINITY {
        true => {
            let uniform = Philox::new(sampling.seed).uniform(next.position, next.choice, 0);
            pick(logits, max, sampling, uniform)
        }
        false => best,
    };
    changed.into_iter().rev().for_each(|(id, raw)| logits[id as usize] = raw);
    match next.request.logprobs {
        Some(top) => report(cpu, logits, id, top),
        None => SampledToken { id, logprob: 0.0, top: Vec::new() },
    }
}

/// Log-probability of `id` and of the `top` most likely tokens.
fn report(cpu: &Cpu, logits: &[f32], id: TokenId, top: u32) -> SampledToken {
    let sum = cpu.log_sum_exp(logits);
    let top = most_likely(logits, top as usize).into_iter().map(|(id, logit)| (id, logit - sum)).collect();
    let logit = logits.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
    SampledToken { id, logprob: logit - sum, top }
}

/// The `count` largest logits, largest first, ties by lowest id.
fn most_likely(logits: &[f32], count: usize) -> Vec<(TokenId, f32)> {
    let mut best: Vec<(TokenId, f32)> = Vec::with_capacity(count + 1);
    for (id, &logit) in logits.iter().enumerate() {
        if best.len() == count && best.last().is_none_or(|worst| logit <= worst.1) {
            continue;
        }
        let at = best.partition_point(|entry| entry.1 >= logit);
        best.insert(at, (id as TokenId, logit));
        best.truncate(count);
    }
    best
}

/// Applies bias, penalties and bans, and returns what each change replaced, in order.
fn adjust(logits: &mut [f32], next: &Next) -> Vec<(TokenId, f32)> {
    let sampling = &next.request.sampling;
    let mut changed = Vec::new();
    let mut change = |id: TokenId, to: &dyn Fn(f32) -> f32| {
        if let Some(logit) = logits.get_mut(id as usize) {
            changed.push((id, *logit));
            *logit = to(*logit);
        }
    };
    for (id, bias) in &sampling.logit_bias {
        change(*id, &|logit| logit + bias);
    }
    for (id, count) in next.seen.iter().flat_map(|seen| &seen.counts) {
        change(*id, &|logit| penalized(logit, sampling, *count));
    }
    for id in next.banned.iter() {
        change(*id, &|_| f32::NEG_INFINITY);
    }
    changed
}

fn penalized(logit: f32, sampling: &Sampling, count: u32) -> f32 {
    let repeated = match logit > 0.0 {
        true => logit / sampling.repetition_penalty,
        false => logit * sampling.repetition_penalty,
    };
    let presence = if count > 0 { sampling.presence_penalty } else { 0.0 };
    repeated - sampling.frequency_penalty * count as f32 - presence
}

/// Inverse CDF at `uniform` over the kept tokens, most likely first. All three truncations keep a prefix of that order.
fn pick(logits: &[f32], max: f32, sampling: &Sampling, uniform: f32) -> TokenId {
    let weight = |logit: f32| exp((logit - max) / sampling.temperature);
    let top_k = match sampling.top_k {
        0 => logits.len(),
        k => (k as usize).min(logits.len()),
    };
    let cut = sampling.top_p < 1.0 || sampling.min_p > 0.0 || top_k < logits.len();
    let mut sorted = Sorted::new(logits, max, sampling.temperature);
    if !cut {
        let target = f64::from(uniform) * total(logits, weight);
        return sorted.first_beyond(target, weight);
    }
    let mass = match top_k < logits.len() {
        true => (0..top_k).map(|rank| f64::from(weight(sorted.logit(rank)))).sum(),
        false => total(logits, weight),
    };
    let mut kept = 0.0;
    for rank in 0..top_k {
        let w = weight(sorted.logit(rank));
        if rank > 0 && (kept >= f64::from(sampling.top_p) * mass || w < sampling.min_p) {
            break;
        }
        kept += f64::from(w);
    }
    sorted.first_beyond(f64::from(uniform) * kept, weight)
}

/// Sum of the weights in a fixed order: eight lanes over the ids, then the lanes.
fn total(logits: &[f32], weight: impl Fn(f32) -> f32) -> f64 {
    let mut lanes = [0f64; 8];
    for chunk in logits.chunks(8) {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(weight(logit));
        }
    }
    lanes.iter().sum()
}

/// Tokens by (logit descending, id ascending), sorted only as far as asked: a wider band below the maximum each time.
struct Sorted<'a> {
    logits: &'a [f32],
    max: f32,
    temperature: f32,
    bands: std::slice::Iter<'static, f32>,
    floor: f32,
    ids: Vec<TokenId>,
}

/// Lower ends of the bands, in units of temperature below the largest logit.
static BANDS: [f32; 7] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, f32::INFINITY];

impl<'a> Sorted<'a> {
    fn new(logits: &'a [f32], max: f32, temperature: f32) -> Sorted<'a> {
        Sorted { logits, max, temperature, bands: BANDS.iter(), floor: f32::INFINITY, ids: Vec::new() }
    }

    /// Logit of the token at `rank`, which is below the number of tokens.
    fn logit(&mut self, rank: usize) -> f32 {
        while self.ids.len() <= rank {
            if !self.widen() {
                return f32::NEG_INFINITY;
            }
        }
        self.logits[self.ids[rank] as usize]
    }

    /// The first token at which the running sum of weights exceeds `target`, or the last one that has any weight.
    fn first_beyond(&mut self, target: f64, weight: impl Fn(f32) -> f32) -> TokenId {
        let (mut sum, mut last) = (0.0, 0);
        for rank in 0..self.logits.len() {
            let w = weight(self.logit(rank));
            if w == 0.0 {
                break;
            }
            last = rank;
            sum += f64::from(w);
            if sum > target {
                break;
            }
        }
        self.ids.get(last).copied().unwrap_or(0)
    }

    /// Sorts one band more in; false when all tokens are in.
    fn widen(&mut self) -> bool {
        let Some(band) = self.bands.next() else { return false };
        let low = self.max - band * self.temperature;
        let inside = |logit: f32| logit >= low && logit < self.floor;
        let found = self.logits.iter().enumerate().filter(|(_, logit)| inside(**logit));
        let mut keys: Vec<u64> = found.map(|(id, logit)| key(*logit, id as TokenId)).collect();
        keys.sort_unstable();
        self.ids.extend(keys.into_iter().map(|key| key as TokenId));
        self.floor = low;
        true
    }
}

/// Orders by (logit descending, id ascending) as one number.
fn key(logit: f32, id: TokenId) -> u64 {
    // -0 and +0 are equal logits.
    let bits = (logit + 0.0).to_bits();
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!ascending) << 32 | u64::from(id)
}

/// e^x for x ≤ 0 by range reduction and a polynomial of degree 6 (Cephes `expf`), the same bits on every machine.
/// Relative error below 2e-7; 0 below -87.
fn exp(x: f32) -> f32 {
    if x < -87.0 || x.is_nan() {
        return 0.0;
    }
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let poly = [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5];
    let p = poly.iter().fold(1.987_569_1e-4, |sum, c| sum * r + c);
    (p * r * r + r + 1.0) * f32::from_bits(((n as i32 + 127) as u32) << 23)
}
