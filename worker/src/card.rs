//! The model card: everything a gateway needs to serve a model without its directory. Read once, before the worker
//! registers.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use baton_core::limits::MESSAGE_BYTES_MAX;
use baton_engine::load::gguf::{self, Texts};
use baton_engine::{Backend, ModelSpec};
use baton_proto::v1::ModelCard;
use prost::Message;
use serde_json::Value;

/// A model ready to serve.
pub struct LoadedModel {
    pub spec: ModelSpec,
    pub backend: Box<dyn Backend>,
    pub card: ModelCard,
}

/// A model directory that cannot be served, with the file at fault.
#[derive(Debug, thiserror::Error)]
pub enum CardError {
    #[error("{path} is missing; a model directory needs it")]
    Missing { path: PathBuf },
    #[error("the tokenizer in {model} cannot be used: {reason}; put the model's tokenizer.json beside it as {path}")]
    Tokenizer { model: PathBuf, reason: String, path: PathBuf },
    #[error(transparent)]
    Model(#[from] baton_engine::LoadError),
    #[error("read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is not valid JSON: {source}")]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{path} is not UTF-8")]
    NotText { path: PathBuf },
    #[error("the texts of {path} (tokenizer, templates, configs) have {bytes} bytes; at most {max} fit a model card")]
    TooLarge { path: PathBuf, bytes: usize, max: usize },
}

/// Reads the texts of a Hugging Face model directory beside its weights, or those in a GGUF file and in its directory.
pub fn read(model: &Path, spec: &ModelSpec) -> Result<ModelCard, CardError> {
    let (dir, inside) = match model.is_file() {
        true => (model.parent().unwrap_or(model), Some(gguf::texts(model)?)),
        false => (model, None),
    };
    let tokenizer = dir.join("tokenizer.json");
    let tokenizer_json = match (text(&tokenizer)?, &inside) {
        (Some(text), _) => text,
        (None, None) => return Err(CardError::Missing { path: tokenizer }),
        (None, Some(inside)) => inside.tokenizer_json.clone().map_err(|reason| CardError::Tokenizer {
            model: model.to_path_buf(),
            reason,
            path: tokenizer.clone(),
        })?,
    };
    parse(&tokenizer, &tokenizer_json)?;
    let config_path = dir.join("tokenizer_config.json");
    let tokenizer_config_json = text(&config_path)?.unwrap_or_default();
    let config = match tokenizer_config_json.is_empty() {
        true => Value::Null,
        false => parse(&config_path, &tokenizer_config_json)?,
    };
    let generation_path = dir.join("generation_config.json");
    let generation_config_json = text(&generation_path)?.unwrap_or_default();
    if !generation_config_json.is_empty() {
        parse(&generation_path, &generation_config_json)?;
    }
    let (inside_template, inside_bos, inside_eos, inside_add_bos) = match inside {
        Some(Texts { chat_template, bos_token, eos_token, add_bos, .. }) => {
            (chat_template, bos_token, eos_token, add_bos)
        }
        None => Default::default(),
    };
    let template_file = text(&dir.join("chat_template.jinja"))?;
    let card = ModelCard {
        name: spec.name.clone(),
        hash: String::new(),
        tokenizer_json: tokenizer_json.into_bytes().into(),
        chat_template: template_file.or_else(|| template(&config["chat_template"])).unwrap_or(inside_template),
        eos: spec.eos.clone(),
        positions_max: spec.positions_max as u64,
        block_tokens: spec.layout.block_tokens,
        vocab: spec.vocab as u64,
        numerics: spec.numerics.0.clone(),
        bos_token: token(&config["bos_token"]).unwrap_or(inside_bos),
        eos_token: token(&config["eos_token"]).unwrap_or(inside_eos),
        generation_config_json,
        created_unix_s: 0,
        tokenizer_config_json,
        add_bos: config["add_bos_token"].as_bool().unwrap_or(inside_add_bos),
    };
    check_size(dir, card.encoded_len())?;
    // The hash names the contents; when the files were made is not part of them.
    let hash = blake3::hash(&card.encode_to_vec()).to_hex()[..32].to_string();
    Ok(ModelCard { hash, created_unix_s: created(if tokenizer.exists() { &tokenizer } else { model }), ..card })
}

fn check_size(path: &Path, bytes: usize) -> Result<(), CardError> {
    let max = MESSAGE_BYTES_MAX - 1024;
    match bytes > max {
        true => Err(CardError::TooLarge { path: path.to_path_buf(), bytes, max }),
        false => Ok(()),
    }
}

/// A file's text; None when there is no such file.
fn text(path: &Path) -> Result<Option<String>, CardError> {
    check_size(path, std::fs::metadata(path).map_or(0, |meta| meta.len() as usize))?;
    match std::fs::read(path) {
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => Ok(Some(text)),
            Err(_) => Err(CardError::NotText { path: path.to_path_buf() }),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CardError::Read { path: path.to_path_buf(), source }),
    }
}

fn parse(path: &Path, text: &str) -> Result<Value, CardError> {
    serde_json::from_str(text).map_err(|source| CardError::Json { path: path.to_path_buf(), source })
}

/// `chat_template` is one template, or a list of named ones of which `default` or else the first counts.
fn template(value: &Value) -> Option<String> {
    let named = value.as_array().into_iter().flatten();
    let default = named.clone().find(|entry| entry["name"] == "default");
    let one = value.as_str().or_else(|| default.or(named.clone().next())?["template"].as_str());
    one.map(str::to_string)
}

/// A special token is its text, or an object that holds it.
fn token(value: &Value) -> Option<String> {
    value.as_str().or(value["content"].as_str()).map(str::to_string)
}

fn created(path: &Path) -> u64 {
    let modified = std::fs::metadata(path).and_then(|meta| meta.modified());
    let since = modified.ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use baton_engine::testing::hash_spec;
    use serde_json::json;

    use super::*;

    #[test]
    fn the_model_that_ships_has_a_card() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/baton-3m");
        let card = read(&dir, &hash_spec()).unwrap();
        assert_eq!((card.bos_token.as_str(), card.eos_token.as_str()), ("<|endoftext|>", "<|im_end|>"));
        assert!(card.chat_template.contains("add_generation_prompt") && card.created_unix_s > 0 && !card.add_bos);
        assert_eq!(card.hash, read(&dir, &hash_spec()).unwrap().hash);
        assert_ne!(card.hash, read(&dir, &ModelSpec { vocab: 7, ..hash_spec() }).unwrap().hash);
    }

    #[test]
    fn a_bad_directory_is_named_by_its_file() {
        let check = |tokenizer: Option<&str>, expected: &str| {
            let dir = folder();
            if let Some(text) = tokenizer {
                std::fs::write(dir.join("tokenizer.json"), text).unwrap();
            }
            let error = read(&dir, &hash_spec()).unwrap_err().to_string();
            assert!(error.contains("tokenizer.json") && error.contains(expected), "{error}");
            std::fs::remove_dir_all(&dir).unwrap();
        };
        check(None, "is missing");
        check(Some("{"), "not valid JSON");
    }

    /// A folder of this test process alone.
    fn folder() -> PathBuf {
        let dir = std::env::temp_dir().join(format!("baton-card-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn templates_and_tokens_come_in_two_shapes() {
        let named = json!([{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]);
        assert_eq!(template(&named).as_deref(), Some("d"));
        assert_eq!(template(&json!([{"name": "tool", "template": "t"}])).as_deref(), Some("t"));
        assert_eq!(template(&json!("x")).as_deref(), Some("x"));
        assert_eq!(template(&Value::Null), None);
        assert_eq!(token(&json!({"content": "<s>"})), Some("<s>".to_string()));
        assert_eq!(token(&json!("<s>")), Some("<s>".to_string()));
        assert_eq!(token(&Value::Null), None);
    }
}
