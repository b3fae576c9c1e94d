//! Incremental detokenization. The text of a token depends on its neighbours (leading spaces, characters split over
//! tokens), so a short window of tokens is decoded again and what is new in it is emitted.
//!
//! ```text
//! window: | context | complete | pending |      decode(window) = emitted + new text + maybe an incomplete character
//! ```

use tokenizers::Tokenizer;

const REPLACEMENT: char = '\u{FFFD}';
/// Tokens of the prompt that the first generated token is decoded after.
const CONTEXT_TOKENS: usize = 6;
/// Tokens the window may hold before its context is cut.
const WINDOW_TOKENS: usize = 8;
/// A character has at most four bytes: of more undecodable tokens only the end can be an incomplete character.
const INCOMPLETE_TOKENS_MAX: usize = 4;
/// Undecodable tokens the window may hold.
const DAMAGED_TOKENS_MAX: usize = 64;

/// The text of one sequence, token by token.
#[derive(Debug)]
pub(crate) struct Detokenizer {
    skip_special: bool,
    window: Vec<u32>,
    /// The part of the window's text that has been emitted.
    emitted: String,
    /// Tokens of the window up to the last place where its text was complete.
    complete: usize,
}

impl Detokenizer {
    /// For the tokens that follow `prompt`.
    pub(crate) fn new(tokenizer: &Tokenizer, prompt: &[u32], skip_special: bool) -> Detokenizer {
        let window = prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..].to_vec();
        let complete = window.len();
        let mut detokenizer = Detokenizer { skip_special, window, emitted: String::new(), complete };
        let context = detokenizer.decode(tokenizer, &detokenizer.window);
        detokenizer.emitted = context.trim_end_matches(REPLACEMENT).to_string();
        detokenizer
    }

    /// The text that `token` completes; empty while a character is incomplete.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> String {
        self.window.push(token);
        let text = self.decode(tokenizer, &self.window);
        if text.ends_with(REPLACEMENT) {
            return self.push_incomplete(tokenizer, &text);
        }
        let new = self.rest(tokenizer, &text);
        self.emitted = text;
        self.shrink(tokenizer);
        new
    }

    /// What is left at the end of the sequence: an incomplete character becomes U+FFFD.
    pub(crate) fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        let text = self.decode(tokenizer, &self.window);
        let new = self.rest(tokenizer, &text);
        self.emitted = text;
        new
    }

    /// The text ends with what may be an incomplete character: emits what comes before it.
    fn push_incomplete(&mut self, tokenizer: &Tokenizer, text: &str) -> String {
        let pending = self.window.len() - self.complete;
        if pending <= INCOMPLETE_TOKENS_MAX {
            return self.settle(text.trim_end_matches(REPLACEMENT));
        }
        let new = self.settle(without_last(text));
        if pending > DAMAGED_TOKENS_MAX {
            self.window.drain(..self.window.len() - INCOMPLETE_TOKENS_MAX);
            self.complete = 0;
            self.emitted = without_last(&self.decode(tokenizer, &self.window)).to_string();
        }
        new
    }

    /// Emits what is new in the part of the window's text that can no longer change. Byte-fallback tokens decode as a
    /// run, so that an incomplete character can hide complete ones emitted before: then nothing is new yet.
    fn settle(&mut self, settled: &str) -> String {
        let Some(new) = settled.strip_prefix(self.emitted.as_str()) else { return String::new() };
        let new = new.to_string();
        self.emitted.push_str(&new);
        new
    }

    /// What is new in the window's whole text.
    fn rest(&self, tokenizer: &Tokenizer, text: &str) -> String {
        match text.strip_prefix(self.emitted.as_str()) {
            Some(new) => new.to_string(),
            None => self.decode(tokenizer, &self.window[self.complete..]),
        }
    }

    /// The window's text is complete: forget all but the tokens since it was last complete. They must have a text, or
    /// the next token would be decoded as if it began one.
    fn shrink(&mut self, tokenizer: &Tokenizer) {
        if self.window.len() > WINDOW_TOKENS {
            let kept = self.decode(tokenizer, &self.window[self.complete..]);
            if !kept.is_empty() || self.window.len() > DAMAGED_TOKENS_MAX {
                self.window.drain(..self.complete);
                self.emitted = kept;
            }
        }
        self.complete = self.window.len();
    }

    fn decode(&self, tokenizer: &Tokenizer, tokens: &[u32]) -> String {
        tokenizer.decode(tokens, self.skip_special).unwrap_or_default()
    }
}

/// Without its last character, which is U+FFFD.
fn without_last(text: &str) -> &str {
    text.strip_suffix(REPLACEMENT).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::fixtures::{byte_fallback, byte_level};
    use proptest::prelude::*;

    fn pieces(tokenizer: &Tokenizer, prompt: &[u32], tokens: &[u32]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(tokenizer, prompt, true);
        let mut pieces: Vec<String> = tokens.iter().map(|t| detokenizer.push(tokenizer, *t)).collect();
        pieces.push(detokenizer.finish(tokenizer));
        pieces
    }

    fn bytes(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn a_character_comes_with_its_last_token() {
        let tokenizer = byte_level();
        assert_eq!(pieces(&tokenizer, &[], &bytes("é𝄞")), ["", "é", "", "", "", "𝄞", ""]);
        assert_eq!(pieces(&tokenizer, &[], &bytes("\u{FFFD}a")), ["", "", "", "\u{FFFD}a", ""]);
        assert_eq!(pieces(&tokenizer, &bytes("caf"), &bytes("é")), ["", "é", ""]);
        assert_eq!(pieces(&tokenizer, &bytes("x")[..], &[0xF0, 0x9F]), ["", "", "\u{FFFD}"]);
        assert_eq!(pieces(&tokenizer, &[], &[97, 256, 98]), ["a", "", "b", ""], "special tokens have no text");
    }

    #[test]
    fn spaces_of_sentencepiece_tokens_stay() {
        // 300 = "▁the", 301 = "▁end", 302 = "ing"; bytes are tokens 0..256 by fallback.
        let tokenizer = byte_fallback();
        assert_eq!(pieces(&tokenizer, &[], &[300, 301, 302]), ["the", " end", "ing", ""]);
        assert_eq!(pieces(&tokenizer, &[300], &[301, 302]), [" end", "ing", ""], "the prompt is context");
        let face = bytes("😀");
        let tokens = [&[300][..], &face, &face, &[301]].concat();
        assert_eq!(pieces(&tokenizer, &[], &tokens).concat(), "the😀😀 end");
        let long: Vec<u32> = (0..40).map(|i| 300 + i % 3).collect();
        assert_eq!(pieces(&tokenizer, &[], &long).concat(), tokenizer.decode(&long, true).unwrap());
    }

    proptest! {
        /// Whatever bytes a model emits, the pieces are the text of all its tokens, and no piece takes back another.
        #[test]
        fn pieces_are_the_whole_text(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let tokens: Vec<u32> = bytes.iter().map(|b| u32::from(*b)).collect();
            prop_assert_eq!(pieces(&byte_level(), &[], &tokens).concat(), String::from_utf8_lossy(&bytes));
        }

        /// Damaged runs longer than the window keeps.
        #[test]
        fn damaged_runs_are_exact_too(bytes in prop::collection::vec(0x80u8..=0xF4, 0..300)) {
            let tokens: Vec<u32> = bytes.iter().map(|b| u32::from(*b)).collect();
            prop_assert_eq!(pieces(&byte_level(), &[], &tokens).concat(), String::from_utf8_lossy(&bytes));
        }

        /// Valid text never shows U+FFFD, by bytes and by words.
        #[test]
        fn text_is_never_broken(text in "[a-z é日👩🏽‍🚀]{0,60}") {
            for tokenizer in [byte_level(), byte_fallback()] {
                let shown = pieces(&tokenizer, &[97], &bytes_of(&text));
                prop_assert!(shown.iter().all(|piece| !piece.contains(REPLACEMENT)));
                prop_assert_eq!(shown.concat(), text.as_str());
            }
        }
    }

    fn bytes_of(text: &str) -> Vec<u32> {
        bytes(text)
    }
}
