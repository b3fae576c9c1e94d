//! The bytes of single tokens, for log-probabilities: a token may be a part of a character, which text cannot show.

use tokenizers::Tokenizer;
use tokenizers::decoders::DecoderWrapper;

/// A tokenizer and what is needed to name its tokens.
pub(crate) struct Vocabulary {
    tokenizer: Tokenizer,
    /// Tokens spell bytes in GPT-2's alphabet.
    byte_level: bool,
    special: Vec<u32>,
}

impl Vocabulary {
    pub(crate) fn new(tokenizer: Tokenizer) -> Vocabulary {
        let byte_level = tokenizer.get_decoder().is_some_and(has_byte_level);
        let mut special: Vec<u32> = tokenizer.get_added_tokens_decoder().into_keys().collect();
        special.sort_unstable();
        Vocabulary { tokenizer, byte_level, special }
    }

    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The bytes a token stands for, whatever its neighbours.
    pub(crate) fn bytes(&self, token: u32) -> Vec<u8> {
        let Some(spelled) = self.tokenizer.id_to_token(token) else { return Vec::new() };
        if self.special.binary_search(&token).is_ok() {
            return spelled.into_bytes();
        }
        if self.byte_level {
            let bytes: Option<Vec<u8>> = spelled.chars().map(byte_of).collect();
            return bytes.unwrap_or_else(|| spelled.into_bytes());
        }
        match byte_fallback(&spelled) {
            Some(byte) => vec![byte],
            None => spelled.replace('\u{2581}', " ").into_bytes(),
        }
    }

    /// The token as text; bytes that are no whole characters show as U+FFFD.
    pub(crate) fn text(&self, token: u32) -> String {
        String::from_utf8(self.bytes(token)).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned())
    }

    /// The text of a run of tokens.
    pub(crate) fn decode(&self, tokens: &[u32], skip_special: bool) -> String {
        self.tokenizer.decode(tokens, skip_special).unwrap_or_default()
    }
}

fn has_byte_level(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteLevel(_) => true,
        DecoderWrapper::Sequence(parts) => parts.get_decoders().iter().any(has_byte_level),
        _ => false,
    }
}

/// `<0xE2>` names one byte.
fn byte_fallback(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// GPT-2's alphabet (its encoder's `bytes_to_unicode`): printable Latin-1 stands for itself, the other 68 bytes in
/// order for U+0100 and on.
fn byte_of(c: char) -> Option<u8> {
    let code = c as u32;
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_names_every_byte_once() {
        let mut bytes: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
    }

    #[test]
    fn byte_fallback_tokens_are_one_byte() {
        assert_eq!(byte_fallback("<0xE2>"), Some(0xE2));
        assert_eq!(byte_fallback("<0x>"), None);
        assert_eq!(byte_fallback("<0xé>"), None);
    }
}
