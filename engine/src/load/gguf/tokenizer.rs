//! A GGUF file's byte-level BPE tokenizer as the tokenizer.json it was made from.

use serde_json::{Map, Value, json};

/// How texts are split before merging, but for digits.
const SPLIT: [&str; 2] =
    [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"];
/// Kinds of tokens that are found in a text before it is split.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// What a file says of its tokenizer.
pub(crate) struct Parts<'a> {
    /// `tokenizer.ggml.model`
    pub(crate) model: &'a str,
    /// `tokenizer.ggml.pre`
    pub(crate) pre: &'a str,
    pub(crate) tokens: Vec<&'a str>,
    /// Of each token; empty: all are plain.
    pub(crate) kinds: Vec<i64>,
    pub(crate) merges: Vec<&'a str>,
}

/// The tokenizer.json, or why none can be made.
pub(crate) fn json(parts: &Parts) -> Result<String, String> {
    if parts.model != "gpt2" {
        return Err(format!("its tokenizer is of the kind {:?}; only gpt2 (byte-level BPE) is read", parts.model));
    }
    let digits = match parts.pre {
        "qwen2" => Some(r"\p{N}"),
        "llama-bpe" | "llama3" | "llama-v3" => Some(r"\p{N}{1,3}"),
        "default" | "gpt-2" => None,
        other => return Err(format!("it splits texts as {other:?}; known are qwen2, llama-bpe, gpt-2")),
    };
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let splitting = match digits {
        None => bytes(true),
        Some(digits) => {
            let pattern = [SPLIT[0], digits, SPLIT[1]].concat();
            let pattern = json!({"Regex": pattern});
            let split = json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false});
            json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})
        }
    };
    let kind = |id: usize| parts.kinds.get(id).copied().unwrap_or(1);
    let added = parts.tokens.iter().enumerate().filter(|(id, _)| matches!(kind(*id), CONTROL | USER_DEFINED));
    let added: Vec<Value> = added
        .map(|(id, text)| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                   "special": kind(id) == CONTROL})
        })
        .collect();
    let vocabulary: Map<String, Value> =
        parts.tokens.iter().enumerate().map(|(id, text)| (text.to_string(), json!(id))).collect();
    let merges: Option<Vec<Value>> =
        parts.merges.iter().map(|merge| Some(json!([merge.split_once(' ')?.0, merge.split_once(' ')?.1]))).collect();
    let merges = merges.ok_or("one of its merges is not two texts")?;
    let model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
        "ignore_merges": parts.pre.starts_with("llama"), "vocab": vocabulary, "merges": merges});
    let normalizer = if parts.pre == "qwen2" { json!({"type": "NFC"}) } else { Value::Null };
    let decoder = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let whole = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": normalizer, "pre_tokenizer": splitting, "post_processor": null, "decoder": decoder, "model": model});
    Ok(whole.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tokenizer that ships, taken apart as GGUF holds it and put together again.
    #[test]
    fn a_tokenizer_comes_back_as_it_was() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/baton-3m/tokenizer.json");
        let whole: Value = serde_json::from_slice(&std::fs::read(file).expect("read")).expect("JSON");
        let vocabulary = whole["model"]["vocab"].as_object().expect("a vocabulary");
        let mut tokens = vec![""; vocabulary.len()];
        vocabulary.iter().for_each(|(text, id)| tokens[id.as_u64().expect("an id") as usize] = text);
        let merges: Vec<String> = whole["model"]["merges"]
            .as_array()
            .expect("merges")
            .iter()
            .map(|pair| format!("{} {}", pair[0].as_str().expect("a text"), pair[1].as_str().expect("a text")))
            .collect();
        let mut kinds = vec![1; tokens.len()];
        whole["added_tokens"]
            .as_array()
            .expect("tokens")
            .iter()
            .for_each(|token| kinds[token["id"].as_u64().expect("an id") as usize] = CONTROL);
        let merges = merges.iter().map(String::as_str).collect();
        let parts = Parts { model: "gpt2", pre: "qwen2", tokens, kinds, merges };
        let mut made: Value = serde_json::from_str(&json(&parts).expect("made")).expect("JSON");
        // Ours leaves texts as they are; Qwen2's composes them first.
        assert_eq!(made["normalizer"].take()["type"], "NFC");
        assert_eq!(made, whole);
    }

    #[test]
    fn what_cannot_be_made_is_said() {
        let parts = |model, pre, merges| Parts { model, pre, tokens: vec!["a"], kinds: vec![], merges };
        assert!(json(&parts("llama", "default", vec![])).unwrap_err().contains("\"llama\""));
        assert!(json(&parts("gpt2", "tekken", vec![])).unwrap_err().contains("tekken"));
        assert!(json(&parts("gpt2", "qwen2", vec!["ab"])).unwrap_err().contains("merges"));
    }
}
