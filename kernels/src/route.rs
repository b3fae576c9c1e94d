//! Which experts a row goes to, by the logits of a mixture's router.

use crate::math::{exp, larger};

/// The `used` experts of the largest logits, by id, and their weights; ties go to the lowest ids. Weights are a softmax over
/// the chosen experts, or over all.
/// Source: Jiang et al., Mixtral of Experts, section 2 (over the chosen); Qwen3-MoE's `norm_topk_prob` says which.
///
/// # Panics
/// If more are to be used than there are.
pub fn route(logits: &[f32], used: usize, over_chosen: bool) -> Vec<(usize, f32)> {
    assert!(used <= logits.len(), "more experts than there are");
    let mut chosen: Vec<usize> = (0..logits.len()).collect();
    chosen.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    chosen.truncate(used);
    chosen.sort_unstable();
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, &logit| larger(logit, max));
    let part = |expert: usize| exp(logits[expert] - max);
    let sum: f32 = match over_chosen {
        true => chosen.iter().map(|&expert| part(expert)).sum(),
        false => (0..logits.len()).map(part).sum(),
    };
    chosen.into_iter().map(|expert| (expert, part(expert) / sum)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_chosen_and_weighed() {
        let ids = |logits: &[f32], used| route(logits, used, true).iter().map(|(id, _)| *id).collect::<Vec<_>>();
        assert_eq!(ids(&[0.0, 3.0, 1.0, 2.0], 2), [1, 3]);
        assert_eq!(ids(&[1.0, 1.0, 1.0, 2.0], 2), [0, 3]);
        assert_eq!(ids(&[f32::NEG_INFINITY, -1.0], 1), [1]);
        let logits = [0.5, -1.0, 2.0, 0.0];
        let sum = |over_chosen| route(&logits, 2, over_chosen).iter().map(|(_, weight)| weight).sum::<f32>();
        assert!((sum(true) - 1.0).abs() < 1e-6);
        let all: f32 = logits.iter().map(|logit| logit.exp()).sum();
        assert!((sum(false) - (0.5f32.exp() + 2f32.exp()) / all).abs() < 1e-6);
        assert!(route(&[f32::NAN, 1.0], 1, true)[0].1.is_nan());
    }
}
