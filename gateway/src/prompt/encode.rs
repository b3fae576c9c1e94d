//! Text to token ids. Long texts are encoded off the async threads, a bounded number at a time.

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::error::ApiError;
use crate::measure;
use crate::model::Model;

/// Texts above this many bytes leave the async thread (a few hundred microseconds of work).
const INLINE_BYTES_MAX: usize = 4 << 10;
/// Long texts encoded at a time.
const ENCODERS_MAX: usize = 4;

/// A text and whether the tokenizer adds its own special tokens (bos) to it.
pub(crate) struct Text {
    pub text: String,
    pub special: bool,
}

/// Encodes prompts.
#[derive(Clone)]
pub(crate) struct Encoder {
    places: Arc<Semaphore>,
}

impl Default for Encoder {
    fn default() -> Encoder {
        Encoder { places: Arc::new(Semaphore::new(ENCODERS_MAX)) }
    }
}

impl Encoder {
    /// The tokens of `text`; `param` is named in the error.
    pub(crate) async fn encode(&self, model: &Arc<Model>, text: Text, param: &str) -> Result<Vec<u32>, ApiError> {
        let started = tokio::time::Instant::now();
        let tokens = if text.text.len() <= INLINE_BYTES_MAX {
            encode(model, &text)
        } else {
            self.encode_long(model.clone(), text).await
        };
        measure::encoded(started.elapsed());
        tokens.map_err(|problem| ApiError::invalid(param, format!("The text cannot be tokenized: {problem}")))
    }

    async fn encode_long(&self, model: Arc<Model>, text: Text) -> Result<Vec<u32>, String> {
        let _place = self.places.acquire().await.map_err(|e| e.to_string())?;
        let encoded = tokio::task::spawn_blocking(move || encode(&model, &text)).await;
        encoded.map_err(|_| "the tokenizer failed".to_string())?
    }
}

fn encode(model: &Model, text: &Text) -> Result<Vec<u32>, String> {
    let encoding = model.vocabulary.tokenizer().encode_fast(text.text.as_str(), text.special);
    encoding.map(|e| e.get_ids().to_vec()).map_err(|e| e.to_string())
}
