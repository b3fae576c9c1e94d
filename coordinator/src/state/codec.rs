//! Bytes of entries and snapshots: a version, then postcard. A version this binary does not know is refused.

use serde::{Serialize, de::DeserializeOwned};
use xxhash_rust::xxh3::xxh3_64;

use super::{Batch, Ledger};

/// Version of the entries and snapshots this binary writes; it reads all up to it.
pub const VERSION: u16 = 1;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CodecError {
    #[error("version {0} is newer than this binary knows (up to {VERSION}): update the binary before it joins")]
    Newer(u16),
    #[error("bytes of version {VERSION} that do not decode: {0}")]
    Damaged(String),
}

pub fn encode_batch(batch: &Batch) -> Vec<u8> {
    encode(batch)
}

pub fn decode_batch(bytes: &[u8]) -> Result<Batch, CodecError> {
    decode(bytes)
}

pub fn encode_ledger(ledger: &Ledger) -> Vec<u8> {
    encode(ledger)
}

pub fn decode_ledger(bytes: &[u8]) -> Result<Ledger, CodecError> {
    decode(bytes)
}

/// Equal for equal ledgers on every node and machine.
pub fn hash(ledger: &Ledger) -> u64 {
    xxh3_64(&encode(ledger))
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let bytes = VERSION.to_le_bytes().to_vec();
    postcard::to_extend(value, bytes).expect("memory takes any value")
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let Some((version, body)) = bytes.split_first_chunk() else {
        return Err(CodecError::Damaged("no version".into()));
    };
    let version = u16::from_le_bytes(*version);
    if version > VERSION {
        return Err(CodecError::Newer(version));
    }
    postcard::from_bytes(body).map_err(|e| CodecError::Damaged(e.to_string()))
}
