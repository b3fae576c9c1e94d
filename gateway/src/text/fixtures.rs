//! Small tokenizers for tests, made by code.

use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

/// Token ids are bytes; 256 is a special token.
pub(crate) fn byte_level() -> Tokenizer {
    let printable = |b: u32| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = 0x100..;
    let mut vocab = Map::new();
    for byte in 0..=255u32 {
        let code = if printable(byte) { byte } else { others.next().unwrap() };
        vocab.insert(char::from_u32(code).unwrap().to_string(), byte.into());
    }
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    build(vocab, json!([]), &byte_level, &byte_level, false)
}

/// Sentencepiece as Llama 2 has it: bytes by fallback, `▁` for spaces, 300.. are words.
pub(crate) fn byte_fallback() -> Tokenizer {
    let mut vocab: Map<String, Value> = (0..=255u32).map(|b| (format!("<0x{b:02X}>"), b.into())).collect();
    for (word, id) in [("▁the", 300), ("▁end", 301), ("ing", 302)] {
        vocab.insert(word.into(), id.into());
    }
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    build(vocab, json!([]), &Value::Null, &decoder, true)
}

fn build(vocab: Map<String, Value>, merges: Value, pre: &Value, decoder: &Value, byte_fallback: bool) -> Tokenizer {
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{"id": 256, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "pre_tokenizer": pre, "decoder": decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": byte_fallback, "vocab": vocab,
                  "merges": merges},
    });
    Tokenizer::from_bytes(json.to_string()).unwrap()
}
