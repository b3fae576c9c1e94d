//! Incremental detokenization. The text of a token depends on its neighbours (leading spaces, characters split over
//! tokens), so a short window of tokens is decoded again and what is new in it is emitted.
//!
//! ```text
//! window: | context | new tokens |        decode(window) = emitted + new text + maybe an incomplete character
//! ```

use tokenizers::Tokenizer;

const REPLACEMENT: char = '\u{FFFD}';
/// Tokens the window may hold before its context is cut.
const WINDOW_TOKENS: usize = 8;
/// A character has at most four bytes; a longer undecodable run is not an incomplete character but damaged text.
const INCOMPLETE_TOKENS_MAX: usize = 8;

/// The text of one sequence, token by token.
#[derive(Debug, Default)]
pub(crate) struct Detokenizer {
    skip_special: bool,
    window: Vec<u32>,
    /// The part of the window's text that has been emitted.
    emitted: String,
    /// Tokens of the window up to the last place where its text was complete.
    complete: usize,
}

impl Detokenizer {
    pub(crate) fn new(skip_special: bool) -> Detokenizer {
        Detokenizer { skip_special, ..Default::default() }
    }

    /// The text that `token` completes; empty while a character is incomplete.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> String {
        self.window.push(token);
        let text = self.decode(tokenizer, &self.window);
        let settled = text.trim_end_matches(REPLACEMENT).len();
        if settled < text.len() && self.window.len() - self.complete <= INCOMPLETE_TOKENS_MAX {
            return self.settle(&text[..settled]);
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
        *self = Detokenizer::new(self.skip_special);
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

    /// The window's text is complete: forget all but the tokens since it was last complete.
    fn shrink(&mut self, tokenizer: &Tokenizer) {
        if self.window.len() > WINDOW_TOKENS {
            self.window.drain(..self.complete);
            self.emitted = self.decode(tokenizer, &self.window);
        }
        self.complete = self.window.len();
    }

    fn decode(&self, tokenizer: &Tokenizer, tokens: &[u32]) -> String {
        tokenizer.decode(tokens, self.skip_special).unwrap_or_default()
    }
}
