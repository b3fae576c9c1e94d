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

/// A token waiting for its text to be shown.
struct Waiting {
    piece: Piece,
    /// Bytes of text decoded before it.
    start: usize,
    /// And with it; None while it is the beginning of a character.
    end: Option<usize>,
}

/// One choice's text so far.
pub(crate) struct ChoiceText {
    options: Arc<TextOptions>,
    detokenizer: Detokenizer,
    /// A token that ends the sequence if nothing follows it.
    last: Option<Piece>,
    /// Text that could still begin a stop string.
    held: String,
    /// Tokens not yet reported.
    pieces: VecDeque<Waiting>,
    decoded_bytes: usize,
    shown_bytes: usize,
    generated: u32,
    ended: bool,
}

impl ChoiceText {
    /// For the tokens that follow `prompt`.
    pub(crate) fn new(vocabulary: &Vocabulary, prompt: &[u32], options: Arc<TextOptions>) -> ChoiceText {
        let detokenizer = Detokenizer::new(vocabulary.tokenizer(), prompt, options.skip_special);
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
            Some(last) if hidden => self.wait(last),
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
        self.wait(token);
        if !text.is_empty() {
            let end = Some(self.decoded_bytes + text.len());
            self.pieces.iter_mut().rev().take_while(|w| w.end.is_none()).for_each(|w| w.end = end);
        }
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

    fn wait(&mut self, piece: Piece) {
        self.pieces.push_back(Waiting { piece, start: self.decoded_bytes, end: None });
    }

    /// Reports the tokens whose text is shown in full.
    fn release(&mut self, delta: &mut Delta) {
        let shown = |w: &Waiting| w.end.is_some_and(|end| end <= self.shown_bytes);
        let count = self.pieces.iter().take_while(|w| shown(w)).count();
        delta.pieces.extend(self.pieces.drain(..count).map(|w| w.piece));
    }

    /// Reports the tokens left: all that reach into the text, or all there are.
    fn end(&mut self, delta: &mut Delta, ending: Ending) {
        let shown = self.shown_bytes;
        let all = self.options.all_tokens || shown == self.decoded_bytes;
        let left = self.pieces.drain(..).filter(|w| all || w.start < shown);
        delta.pieces.extend(left.map(|w| w.piece));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::fixtures::byte_level;
    use proptest::prelude::*;

    fn piece(id: u32) -> Piece {
        Piece { id, ..Piece::default() }
    }

    /// Feeds `tokens` in chunks of `chunk`; returns text, reported ids and the ending.
    fn run(options: TextOptions, tokens: &[u32], chunk: usize, finish: Finish) -> (String, Vec<u32>, Option<Ending>) {
        let vocabulary = Vocabulary::new(byte_level());
        let mut choice = ChoiceText::new(&vocabulary, &[], Arc::new(options));
        let mut all = Delta::default();
        for tokens in tokens.chunks(chunk) {
            let mut delta = Delta::default();
            tokens.iter().for_each(|t| choice.push(&vocabulary, piece(*t), &mut delta));
            merge(&mut all, delta);
        }
        let mut delta = Delta::default();
        choice.finish(&vocabulary, finish, &mut delta);
        merge(&mut all, delta);
        (all.text, all.pieces.iter().map(|p| p.id).collect(), all.ending)
    }

    fn merge(all: &mut Delta, delta: Delta) {
        all.text.push_str(&delta.text);
        all.pieces.extend(delta.pieces);
        all.ending = delta.ending.or(all.ending.take());
    }

    fn bytes(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn end_tokens_show_only_when_something_follows_or_they_are_included() {
        let options = |include| TextOptions {
            stops: Stops::new(Vec::new(), include),
            end_tokens: [u32::from(b'.')].into(),
            ..TextOptions::default()
        };
        let stop = Finish::StopToken(u32::from(b'.'));
        let check = |include, text: &str, finish, shown: &str| {
            let (text, ids, _) = run(options(include), &bytes(text), 1, finish);
            assert_eq!(text, shown);
            assert!(ids.len() >= shown.len());
        };
        check(false, "a.", stop, "a");
        check(true, "a.", stop, "a.");
        check(false, "a.", Finish::Length, "a.");
        check(false, "a.b.", stop, "a.b");
    }

    #[test]
    fn an_incomplete_end_can_complete_a_stop_string_no_more() {
        let options = TextOptions { stops: Stops::new(vec!["ab".into()], false), ..TextOptions::default() };
        let (text, ids, ending) = run(options, &[97, 0xF0], 1, Finish::Length);
        assert_eq!((text.as_str(), ids, ending), ("a\u{FFFD}", vec![97, 0xF0], Some(Ending::Length)));
    }

    proptest! {
        /// Text, reported tokens and ending depend on the tokens only, not on how they are delivered; and they are what
        /// a look at the whole text gives.
        #[test]
        fn delivery_does_not_matter(text in "[abé👍]{0,20}", stop in "[abé👍]{1,3}", chunk in 1usize..9, all in any::<bool>()) {
            let options = || TextOptions {
                stops: Stops::new(vec![stop.clone()], false),
                all_tokens: all,
                ..TextOptions::default()
            };
            let tokens = bytes(&text);
            let whole = run(options(), &tokens, chunk, Finish::Length);
            prop_assert_eq!(&whole, &run(options(), &tokens, 1, Finish::Length));
            let (shown, ids, ending) = whole;
            match text.find(&stop) {
                Some(at) => {
                    prop_assert_eq!(shown.as_str(), &text[..at]);
                    prop_assert_eq!(ending, Some(Ending::StopString(stop.clone())));
                    prop_assert_eq!(ids.len(), if all { at + stop.len() } else { at });
                }
                None => {
                    prop_assert_eq!(shown, text.as_str());
                    prop_assert_eq!(ids, tokens);
                }
            }
        }
    }
}
