//! Drafts of the next tokens by prompt lookup: what followed the last words where they stood before. A step computes the
//! rows of a draft beside the next token's own, samples behind each as if there were no draft, and keeps what the draft had
//! right: the tokens and their bits are those of single steps, there are only fewer steps.
//! Source: Saxena, Prompt Lookup Decoding, 2023; Leviathan et al., Fast Inference from Transformers via Speculative Decoding,
//! 2023, section 2.

use baton_core::TokenId;

/// Last tokens that are looked for; fewer than the least say too little.
const WORDS: std::ops::RangeInclusive<usize> = 2..=5;
/// Tokens back that are searched.
const LOOKBACK: usize = 8192;

/// Up to `count` tokens that followed the longest end of `tokens` that stood there before, the latest such place; a place so
/// near the end that what follows runs into it goes on with the draft itself.
pub(crate) fn lookup(tokens: &[TokenId], count: usize) -> Vec<TokenId> {
    let mut draft = Vec::new();
    let Some(from) = follower(tokens) else { return draft };
    for at in from..from + count {
        let next = tokens.get(at).or_else(|| draft.get(at - tokens.len())).copied();
        draft.extend(next);
    }
    draft
}

/// Where the token stands that followed.
fn follower(tokens: &[TokenId]) -> Option<usize> {
    let first = tokens.len().saturating_sub(LOOKBACK);
    let mut best = (0, None);
    for end in (first + WORDS.start()..tokens.len()).rev() {
        let pairs = tokens[first..end].iter().rev().zip(tokens.iter().rev());
        let words = pairs.take(*WORDS.end()).take_while(|(a, b)| a == b).count();
        if words > best.0 {
            best = (words, Some(end));
        }
        if words == *WORDS.end() {
            break;
        }
    }
    best.1.filter(|_| WORDS.contains(&best.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: [TokenId; 0] = [];

    #[test]
    fn what_followed_the_longest_end_is_drafted() {
        assert_eq!(lookup(&[1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2), [9, 2], "three words before two later ones");
        assert_eq!(lookup(&[2, 3, 9, 2, 3, 8, 7, 2, 3], 1), [8], "the latest of equal ones");
        assert_eq!(lookup(&[1, 2, 1, 2], 5), [1, 2, 1, 2, 1], "a text that goes round");
        assert_eq!(lookup(&[7, 7, 7], 3), [7, 7, 7]);
        assert_eq!(lookup(&[1, 2, 3, 4, 3], 3), NOTHING, "one word is too little");
        assert_eq!([lookup(&[], 3), lookup(&[1], 3), lookup(&[1, 1], 3)], [NOTHING; 3]);
        assert_eq!(lookup(&[1, 2, 3, 1, 2], 0), NOTHING);
    }

    #[test]
    fn what_is_long_ago_is_not_searched() {
        let mut tokens: Vec<TokenId> = (0..LOOKBACK as TokenId + 3).collect();
        tokens.extend([0, 1]);
        assert_eq!(lookup(&tokens, 2), NOTHING);
        tokens.extend([LOOKBACK as TokenId, LOOKBACK as TokenId + 1]);
        assert_eq!(lookup(&tokens, 2), [LOOKBACK as TokenId + 2, 0]);
    }
}
