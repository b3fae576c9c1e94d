//! A GGUF file's tokenizer as the tokenizer.json it was made from: byte-level BPE (`gpt2`) or SentencePiece's BPE (`llama`).

use std::cmp::Reverse;

use serde_json::{Map, Value, json};

/// How texts are split before merging, but for digits.
const SPLIT: [&str; 2] =
    [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"];
/// The kind of the token that stands for what no token spells.
const UNKNOWN: i64 = 2;
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
    /// Of gpt2.
    pub(crate) merges: Vec<&'a str>,
    /// Of llama, of each token: the higher, the earlier two tokens become it.
    pub(crate) scores: Vec<f32>,
    /// `tokenizer.ggml.add_space_prefix`
    pub(crate) space_first: bool,
}

/// The tokenizer.json, or why none can be made.
pub(crate) fn json(parts: &Parts) -> Result<String, String> {
    let own = match parts.model {
        "gpt2" => byte_level(parts)?,
        "llama" => sentence_piece(parts)?,
        other => {
            let known = "gpt2 (byte-level BPE) and llama (SentencePiece's BPE) are read";
            return Err(format!("its tokenizer is of the kind {other:?}; only {known}"));
        }
    };
    let found = |id: &usize| matches!(parts.kind(*id), CONTROL | USER_DEFINED);
    let added: Vec<Value> = (0..parts.tokens.len())
        .filter(found)
        .map(|id| {
            json!({"id": id, "content": parts.tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": parts.kind(id) == CONTROL})
        })
        .collect();
    let whole = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": own.normalizer, "pre_tokenizer": own.splitting, "post_processor": null, "decoder": own.decoder,
        "model": own.model});
    Ok(whole.to_string())
}

/// What the kinds differ in.
struct Own {
    normalizer: Value,
    splitting: Value,
    decoder: Value,
    model: Value,
}

impl Parts<'_> {
    fn kind(&self, id: usize) -> i64 {
        self.kinds.get(id).copied().unwrap_or(1)
    }

    fn vocabulary(&self) -> Map<String, Value> {
        self.tokens.iter().enumerate().map(|(id, text)| (text.to_string(), json!(id))).collect()
    }
}

fn byte_level(parts: &Parts) -> Result<Own, String> {
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
    let merges: Option<Vec<Value>> =
        parts.merges.iter().map(|merge| Some(json!([merge.split_once(' ')?.0, merge.split_once(' ')?.1]))).collect();
    let merges = merges.ok_or("one of its merges is not two texts")?;
    let model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
        "ignore_merges": parts.pre.starts_with("llama"), "vocab": parts.vocabulary(), "merges": merges});
    let normalizer = if parts.pre == "qwen2" { json!({"type": "NFC"}) } else { Value::Null };
    let decoder = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    Ok(Own { normalizer, splitting, decoder, model })
}

/// Spaces are ▁, each stretch of text begins with one, what no token spells is bytes. The file has no merges: two tokens merge
/// wherever they spell a third, by its score.
fn sentence_piece(parts: &Parts) -> Result<Own, String> {
    if parts.scores.len() != parts.tokens.len() {
        return Err(format!("it has {} tokens and {} scores", parts.tokens.len(), parts.scores.len()));
    }
    let vocabulary = parts.vocabulary();
    let mut merges = Vec::new();
    for (id, token) in parts.tokens.iter().enumerate() {
        let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let both = cuts.filter(|(a, b)| vocabulary.contains_key(*a) && vocabulary.contains_key(*b));
        merges.extend(both.map(|(a, b)| (parts.scores[id], a, b)));
    }
    // Of equal scores the longer first part, as the libraries order them that make a tokenizer.json of such a file.
    let length = |text: &str| Reverse(text.chars().count());
    merges
        .sort_by(|x, y| y.0.total_cmp(&x.0).then_with(|| (length(x.1), length(x.2)).cmp(&(length(y.1), length(y.2)))));
    let merges: Vec<Value> = merges.into_iter().map(|(_, a, b)| json!([a, b])).collect();
    let unknown = (0..parts.tokens.len()).find(|id| parts.kind(*id) == UNKNOWN).map(|id| parts.tokens[id]);
    let model = json!({"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
        "vocab": vocabulary, "merges": merges});
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let first = json!({"type": "Prepend", "prepend": "▁"});
    let normalizers = if parts.space_first { vec![first, spaces] } else { vec![spaces] };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if parts.space_first {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let normalizer = json!({"type": "Sequence", "normalizers": normalizers});
    let decoder = json!({"type": "Sequence", "decoders": decoders});
    Ok(Own { normalizer, splitting: Value::Null, decoder, model })
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
        let parts = Parts { model: "gpt2", pre: "qwen2", tokens, kinds, merges, scores: vec![], space_first: false };
        let mut made: Value = serde_json::from_str(&json(&parts).expect("made")).expect("JSON");
        // Ours leaves texts as they are; Qwen2's composes them first.
        assert_eq!(made["normalizer"].take()["type"], "NFC");
        assert_eq!(made, whole);
    }

    /// Pieces merge by score, not by length or id; spaces and stretches of text begin with ▁; the rest is bytes.
    #[test]
    fn sentence_pieces_merge_by_score() {
        let bytes: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
        let pieces = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab"];
        let tokens: Vec<&str> =
            ["<unk>", "<s>", "</s>"].into_iter().chain(bytes.iter().map(String::as_str)).chain(pieces).collect();
        let kinds = [vec![UNKNOWN, CONTROL, CONTROL], vec![6; 256], vec![1; pieces.len()]].concat();
        // bc before ab: "abc" is a + bc unless ▁a came first.
        let scores = [vec![0.0; 259 + 4], vec![-3.0, -1.0, -9.0, -4.0, -5.0]].concat();
        let parts = Parts { model: "llama", pre: "default", tokens, kinds, merges: vec![], scores, space_first: true };
        let tokenizer = tokenizers::Tokenizer::from_bytes(json(&parts).expect("made")).expect("a tokenizer");
        let spelled = |text: &str| tokenizer.encode(text, false).expect("encoded").get_tokens().to_vec();
        assert_eq!(spelled("abc"), ["▁a", "bc"]);
        assert_eq!(spelled("ab ba"), ["▁ab", "▁", "b", "a"]);
        assert_eq!(spelled("a</s>bc"), ["▁a", "</s>", "▁", "bc"]);
        assert_eq!(spelled("é"), ["▁", "<0xC3>", "<0xA9>"]);
        for text in ["abc  ab", "é c", " a"] {
            let ids = tokenizer.encode(text, false).expect("encoded").get_ids().to_vec();
            assert_eq!(tokenizer.decode(&ids, false).expect("decoded"), text);
        }
    }

    #[test]
    fn what_cannot_be_made_is_said() {
        let scores = Vec::new();
        let parts = |model, pre, merges| Parts {
            model,
            pre,
            tokens: vec!["a"],
            kinds: vec![],
            merges,
            scores: scores.clone(),
            space_first: true,
        };
        assert!(json(&parts("bert", "default", vec![])).unwrap_err().contains("\"bert\""));
        assert!(json(&parts("llama", "default", vec![])).unwrap_err().contains("1 tokens and 0 scores"));
        assert!(json(&parts("gpt2", "tekken", vec![])).unwrap_err().contains("tekken"));
        assert!(json(&parts("gpt2", "qwen2", vec!["ab"])).unwrap_err().contains("merges"));
    }
}
