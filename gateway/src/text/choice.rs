//! The visible side of one choice: text, the tokens it came from, and how it ended.

use std::collections::VecDeque;
use std::sync::Arc;

use baton_core::{Finish, SampledToken};

use super::stop::{Stopped, Stops};
use super::{Detokenizer, Vocabulary};

/// What a request says about its text. Shared by its choices.
#[derive(Clone, Debug, Default)]
pub(crate) struct TextOptions {
    pub stops: Stops,
    pub skip_special: bool,
    /// Stop strings do not count before this many tokens.
    pub tokens_min: u32,
    /// Tokens that end a sequence and whose text is then not shown.
    pub end_tokens: Arc<[u32]>,
    /// Report also the tokens of a stop string that is not shown (with `return_token_ids`).
    pub all_tokens: bool,
}

/// A generated token as reported beside the text.
pub(crate) type Piece = SampledToken;

/// How a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Eos,
    StopToken(u32),
    StopString(String),
    Length,
}

/// What became visible.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Delta {
    pub text: String,
    pub pieces: Vec<Piece>,
    pub ending: Option<Ending>,
}

/// One choice's text so far.
pub(crate) struct ChoiceText {
    options: Arc<TextOptions>,
    detokenizer: Detokenizer,
    /// A token that ends the sequence if nothing follows it.
    last: Option<Piece>,
    /// Text that could still begin a stop string.
    held: String,
    /// Tokens not yet reported, each with the bytes of text decoded before and after it.
    pieces: VecDeque<(usize, usize, Piece)>,
    decoded_bytes: usize,
    shown_bytes: usize,
    generated: u32,
    ended: bool,
}

impl ChoiceText {
    pub(crate) fn new(options: Arc<TextOptions>) -> ChoiceText {
        let detokenizer = Detokenizer::new(options.skip_special);
        ChoiceText {
            options,
            detokenizer,
            last: None,
            held: String::new(),
            pieces: VecDeque::new(),
            decoded_bytes: 0,
            shown_bytes: 0,
            generated: 0,
            ended: false,
        }
    }

    /// Tokens generated, up to the one that ended the choice.
    pub(crate) fn generated(&self) -> u32 {
        self.generated
    }

    pub(crate) fn ended(&self) -> bool {
        self.ended
    }

    /// Takes a token and adds what it makes visible. After the end tokens are ignored.
    pub(crate) fn push(&mut self, vocabulary: &Vocabulary, token: Piece, delta: &mut Delta) {
        if let Some(last) = self.last.take() {
            self.feed(vocabulary, last, delta);
        }
        if self.ended {
            return;
        }
        self.generated += 1;
        if self.options.end_tokens.contains(&token.id) {
            self.last = Some(token);
        } else {
            self.feed(vocabulary, token, delta);
        }
    }

    /// The sequence has ended by itself: shows what was held back.
    pub(crate) fn finish(&mut self, vocabulary: &Vocabulary, finish: Finish, delta: &mut Delta) {
        if self.ended {
            return;
        }
        let hidden = finish != Finish::Length && !self.options.stops.include();
        match self.last.take() {
            Some(last) if hidden => self.pieces.push_back((self.decoded_bytes, self.decoded_bytes, last)),
            Some(last) => self.feed(vocabulary, last, delta),
            None => {}
        }
        let tail = self.detokenizer.finish(vocabulary.tokenizer());
        self.append(tail, delta);
        if !self.ended {
            self.show(self.held.len(), delta);
            self.end(delta, ending(finish));
        }
    }

    fn feed(&mut self, vocabulary: &Vocabulary, token: Piece, delta: &mut Delta) {
        if self.ended {
            return;
        }
        let text = self.detokenizer.push(vocabulary.tokenizer(), token.id);
        self.pieces.push_back((self.decoded_bytes, self.decoded_bytes + text.len(), token));
        self.append(text, delta);
    }

    fn append(&mut self, text: String, delta: &mut Delta) {
        self.decoded_bytes += text.len();
        self.held.push_str(&text);
        if self.generated < self.options.tokens_min {
            return self.show(self.held.len(), delta);
        }
        let (shown, stopped) = self.options.stops.take(&mut self.held);
        self.shown_bytes += shown.len();
        delta.text.push_str(&shown);
        self.release(delta);
        if let Some(Stopped(stop)) = stopped {
            self.end(delta, Ending::StopString(stop));
        }
    }

    fn show(&mut self, bytes: usize, delta: &mut Delta) {
        delta.text.extend(self.held.drain(..bytes));
        self.shown_bytes += bytes;
        self.release(delta);
    }

    /// Reports the tokens whose text is shown in full.
    fn release(&mut self, delta: &mut Delta) {
        while self.pieces.front().is_some_and(|&(_, end, _)| end <= self.shown_bytes) {
            delta.pieces.extend(self.pieces.pop_front().map(|(_, _, piece)| piece));
        }
    }

    /// Reports the tokens left: all that reach into the text, or all there are.
    fn end(&mut self, delta: &mut Delta, ending: Ending) {
        let (all, shown) = (self.options.all_tokens || self.held.is_empty() && self.shown_bytes == self.decoded_bytes, self.shown_bytes);
        let left = self.pieces.drain(..).filter(|&(start, _, _)| all || start < shown);
        delta.pieces.extend(left.map(|(_, _, piece)| piece));
        delta.ending = Some(ending);
        self.ended = true;
    }
}

fn ending(finish: Finish) -> Ending {
    match finish {
        Finish::Eos => Ending::Eos,
        Finish::StopToken(token) => Ending::StopToken(token),
        Finish::Length => Ending::Length,
    }
}
