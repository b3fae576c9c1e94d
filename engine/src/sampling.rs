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

    /// Each token once, with how often the output has it.
    #[cfg(feature = "cuda")]
    pub(crate) fn counts(&self) -> &[(TokenId, u32)] {
        &self.counts
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

/// Sum of the weights in a fixed order: sixteen lanes over the ids, then the lanes.
fn total(logits: &[f32], weight: impl Fn(f32) -> f32) -> f64 {
    let (rows, rest) = logits.as_chunks::<16>();
    let mut lanes = [0f64; 16];
    for row in rows {
        let weights = row.map(&weight);
        lanes.iter_mut().zip(weights).for_each(|(lane, w)| *lane += f64::from(w));
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, logit)| *lane += f64::from(weight(*logit)));
    lanes.iter().sum()
}

/// Tokens by (logit descending, id ascending), sorted only as far as asked: a wider band below the maximum is gathered
/// when the last is used up, and of a crowded band only the next few are sorted.
struct Sorted<'a> {
    logits: &'a [f32],
    max: f32,
    temperature: f32,
    bands: std::slice::Iter<'static, f32>,
    floor: f32,
    /// Keys of the band that are not sorted yet.
    crowd: Vec<u64>,
    ids: Vec<TokenId>,
}

/// Lower ends of the bands, in units of temperature below the largest logit.
static BANDS: [f32; 4] = [2.0, 6.0, 16.0, f32::INFINITY];
/// Tokens sorted at a time, at least.
const SORTED_MIN: usize = 256;

impl<'a> Sorted<'a> {
    fn new(logits: &'a [f32], max: f32, temperature: f32) -> Sorted<'a> {
        let (bands, floor) = (BANDS.iter(), f32::INFINITY);
        Sorted { logits, max, temperature, bands, floor, crowd: Vec::new(), ids: Vec::new() }
    }

    /// Logit of the token at `rank`, which is below the number of tokens.
    fn logit(&mut self, rank: usize) -> f32 {
        while self.ids.len() <= rank {
            if self.crowd.is_empty() && !self.gather() {
                return f32::NEG_INFINITY;
            }
            self.sort_some();
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

    /// Takes in the next band; false when there is none.
    fn gather(&mut self) -> bool {
        let Some(band) = self.bands.next() else { return false };
        let low = self.max - band * self.temperature;
        let inside = |logit: f32| logit >= low && logit < self.floor;
        let found = self.logits.iter().enumerate().filter(|(_, logit)| inside(**logit));
        self.crowd = found.map(|(id, logit)| key(*logit, id as TokenId)).collect();
        self.floor = low;
        true
    }

    /// Sorts the first tokens of the crowd, twice as many each time.
    fn sort_some(&mut self) {
        let count = self.ids.len().max(SORTED_MIN);
        if count < self.crowd.len() {
            self.crowd.select_nth_unstable(count);
        }
        let mut first: Vec<u64> = self.crowd.drain(..count.min(self.crowd.len())).collect();
        first.sort_unstable();
        self.ids.extend(first.into_iter().map(|key| key as TokenId));
    }
}

/// Orders by (logit descending, id ascending) as one number.
fn key(logit: f32, id: TokenId) -> u64 {
    // -0 and +0 are equal logits.
    let bits = (logit + 0.0).to_bits();
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!ascending) << 32 | u64::from(id)
}

/// e^x for x ≤ 0 by range reduction and a polynomial of degree 6 (Cephes `expf`), the same bits on every machine and
/// without a branch, so that loops over it vectorize. Relative error below 2e-7; 0 below -87.
fn exp(x: f32) -> f32 {
    /// Adding and subtracting it rounds to the nearest integer, which is left in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // Also takes a value that is no number to the lower end.
    let bounded = if x >= -87.0 { x } else { -87.0 };
    let shifted = bounded * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = bounded - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let p = ((((1.987_569_1e-4 * r + 1.398_199_9e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2) * r + 0.166_666_66) * r
        + 0.5;
    let power = f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23);
    let value = (p * r * r + r + 1.0) * power;
    if x >= -87.0 { value } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_kernels::Profile;
    use proptest::prelude::*;

    #[test]
    fn exp_is_close_and_monotone() {
        let mut before = 0.0;
        for step in 0..=870_000 {
            let x = -87.0 + step as f32 * 1e-4;
            let error = (f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs();
            assert!(error < 2e-7, "exp({x}) is off by {error}");
            assert!(exp(x) >= before);
            before = exp(x);
        }
        assert_eq!((exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY), exp(f32::NAN)), (1.0, 0.0, 0.0, 0.0));
    }

    /// The same by sorting everything and filtering in plain steps.
    fn pick_plainly(logits: &[f32], sampling: &Sampling, uniform: f32) -> TokenId {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: f32| exp((logit - max) / sampling.temperature);
        let mut sorted: Vec<(TokenId, f32)> =
            logits.iter().enumerate().map(|(id, logit)| (id as TokenId, *logit)).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if sampling.top_k > 0 {
            sorted.truncate(sampling.top_k as usize);
        }
        let all: f64 = match sorted.len() == logits.len() {
            true => total(logits, weight),
            false => sorted.iter().map(|entry| f64::from(weight(entry.1))).sum(),
        };
        let mut kept = Vec::new();
        let mut sum = 0.0;
        for (id, logit) in sorted {
            let w = weight(logit);
            if !kept.is_empty() && (sum >= f64::from(sampling.top_p) * all || w < sampling.min_p) {
                break;
            }
            sum += f64::from(w);
            kept.push((id, w));
        }
        let cut =
            sampling.top_p < 1.0 || sampling.min_p > 0.0 || (1..logits.len()).contains(&(sampling.top_k as usize));
        let target = f64::from(uniform) * if cut { sum } else { all };
        kept.retain(|entry| entry.1 > 0.0);
        let mut sum = 0.0;
        let found = kept.iter().find(|entry| {
            sum += f64::from(entry.1);
            sum > target
        });
        found.or(kept.last()).map_or(0, |entry| entry.0)
    }

    fn sampling() -> impl Strategy<Value = Sampling> {
        let top_p = prop_oneof![Just(1.0f32), 0.01..1.0f32];
        let min_p = prop_oneof![Just(0.0f32), 0.0..1.0f32];
        (0.05..3.0f32, prop_oneof![Just(0u32), 1..50u32], top_p, min_p).prop_map(
            |(temperature, top_k, top_p, min_p)| Sampling { temperature, top_k, top_p, min_p, ..Sampling::default() },
        )
    }

    /// Values that collide often, so that ties are tried.
    fn logits() -> impl Strategy<Value = Vec<f32>> {
        proptest::collection::vec(prop_oneof![(-40..40i32).prop_map(|v| v as f32 / 4.0), -90.0..5.0f32], 1..60)
    }

    fn next(sampling: Sampling) -> Next {
        let request = baton_core::Request { sampling, ..crate::testing::request(1, &[1], 1) };
        Next { request: request.into(), choice: 0, position: 1, banned: [].into(), seen: None }
    }

    fn cpu() -> Cpu {
        Cpu::new(1, Profile::best()).expect("a profile this machine has")
    }

    proptest! {
        #[test]
        fn picks_as_plain_sorting_does(logits in logits(), sampling in sampling(), uniform in 0.0..1.0f32) {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert_eq!(pick(&logits, max, &sampling, uniform), pick_plainly(&logits, &sampling, uniform));
        }

        /// Bias, penalties and bans leave the row as they found it, and the report is of the row without them.
        #[test]
        fn leaves_the_logits_alone(logits in logits(), bias in -5.0..5.0f32, penalty in 0.5..2.0f32, greedy in any::<bool>()) {
            let mut next = next(Sampling {
                temperature: if greedy { 0.0 } else { 1.0 },
                repetition_penalty: penalty,
                frequency_penalty: bias,
                logit_bias: vec![(0, bias), (3, bias), (1_000_000, 1.0)],
                ..Sampling::default()
            });
            next.seen = Seen::of(&next.request.sampling, &[0, 1], &[3, 3, 1_000_000]).map(Into::into);
            next.banned = [0, 0, 2_000_000].into();
            next.request = baton_core::Request { logprobs: Some(2), ..(*next.request).clone() }.into();
            let mut row = logits.clone();
            let token = sample(&cpu(), &mut row, &next);
            prop_assert_eq!(&row, &logits);
            prop_assert_eq!(token.logprob, logits[token.id as usize] - cpu().log_sum_exp(&logits));
            prop_assert!(token.id != 0 || logits.len() == 1, "a banned token came");
            prop_assert!(token.top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
        }
    }

    /// Each adjustment decides a greedy choice between two tokens.
    #[test]
    fn adjustments_change_the_greedy_choice() {
        let check = |logits: &[f32], sampling: Sampling, output: &[TokenId], expected: TokenId| {
            let mut next = next(Sampling { temperature: 0.0, ..sampling });
            next.seen = Seen::of(&next.request.sampling, &[1], output).map(Into::into);
            assert_eq!(sample(&cpu(), &mut logits.to_vec(), &next).id, expected);
        };
        let of = Sampling::default;
        check(&[1.0, 2.0, 2.0], of(), &[], 1);
        check(&[1.0, 2.0, 1.5], Sampling { logit_bias: vec![(0, 1.5)], ..of() }, &[], 0);
        check(&[1.0, 2.0, 1.5], Sampling { repetition_penalty: 1.5, ..of() }, &[], 2);
        check(&[-3.0, -2.0, -2.5], Sampling { repetition_penalty: 1.5, ..of() }, &[], 2);
        check(&[1.0, 2.0, 1.5], Sampling { presence_penalty: 0.9, ..of() }, &[], 1);
        check(&[1.0, 2.0, 1.5], Sampling { presence_penalty: 0.9, ..of() }, &[1], 2);
        check(&[1.0, 2.0, 1.5], Sampling { frequency_penalty: 0.3, ..of() }, &[1], 1);
        check(&[1.0, 2.0, 1.5], Sampling { frequency_penalty: 0.3, ..of() }, &[1, 1], 2);
    }

    /// Over many seeds, sampled frequencies follow the softmax.
    #[test]
    fn frequencies_follow_the_distribution() {
        let logits = [0.0, 1.0, 2.0, -1.0];
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        let mut counts = [0.0; 4];
        for seed in 0..20_000 {
            let next = next(Sampling { seed, ..Sampling::default() });
            counts[sample(&cpu(), &mut logits.to_vec(), &next).id as usize] += 1.0 / 20_000.0;
        }
        for (count, logit) in counts.iter().zip(logits) {
            assert!((count - f64::from(logit).exp() / sum).abs() < 0.015, "{counts:?}");
        }
    }

    #[test]
    fn the_most_likely_are_sorted_and_ties_go_by_id() {
        assert_eq!(most_likely(&[1.0, 3.0, 3.0, 2.0], 3), [(1, 3.0), (2, 3.0), (3, 2.0)]);
        assert_eq!(most_likely(&[1.0], 5), [(0, 1.0)]);
        assert_eq!(most_likely(&[1.0, 2.0], 0), []);
    }
}
