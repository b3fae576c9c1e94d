//! Bytes between coordinators and in the log: a version byte, then postcard.

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

/// Grows when an older coordinator could misread a newer one's bytes.
const VERSION: u8 = 1;

#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    #[error("raft bytes of version {0}, this coordinator speaks {VERSION}: run one version of the binary")]
    Version(u8),
    #[error("raft bytes are empty")]
    Empty,
    #[error("raft bytes do not decode: {0}")]
    Damaged(#[from] postcard::Error),
}

pub(super) fn encode<T: Serialize>(value: &T) -> Bytes {
    postcard::to_extend(value, vec![VERSION]).expect("memory takes any value").into()
}

pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    match bytes.split_first() {
        Some((&VERSION, body)) => Ok(postcard::from_bytes(body)?),
        Some((version, _)) => Err(WireError::Version(*version)),
        None => Err(WireError::Empty),
    }
}
