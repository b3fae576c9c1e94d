//! Bytes of entries and snapshots: a version, then postcard. A version this binary does not know is refused.

use serde::{Serialize, de::DeserializeOwned};
use xxhash_rust::xxh3::xxh3_64;

use super::{Batch, Ledger, version1, version2};

/// Version of the entries and snapshots this binary writes; it reads all up to it.
pub const VERSION: u16 = 4;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CodecError {
    #[error("version {0} is newer than this binary knows (up to {VERSION}): update the binary before it joins")]
    Newer(u16),
    #[error("bytes of version {0} that do not decode: {1}")]
    Damaged(u16, String),
}

pub fn encode_batch(batch: &Batch) -> Vec<u8> {
    encode(batch)
}

pub fn decode_batch(bytes: &[u8]) -> Result<Batch, CodecError> {
    // Versions 3 and 4 have one command more each than the one before, after the others.
    decode::<Batch, version1::Batch, Batch>(bytes)
}

pub fn encode_ledger(ledger: &Ledger) -> Vec<u8> {
    encode(ledger)
}

pub fn decode_ledger(bytes: &[u8]) -> Result<Ledger, CodecError> {
    decode::<Ledger, version1::Ledger, version2::Ledger>(bytes)
}

/// Equal for equal ledgers on every node and machine.
pub fn hash(ledger: &Ledger) -> u64 {
    xxh3_64(&encode(ledger))
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let bytes = VERSION.to_le_bytes().to_vec();
    postcard::to_extend(value, bytes).expect("memory takes any value")
}

/// `One` and `Two`: the same as versions 1 and 2 wrote it.
fn decode<T, One, Two>(bytes: &[u8]) -> Result<T, CodecError>
where
    T: DeserializeOwned + From<One> + From<Two>,
    One: DeserializeOwned,
    Two: DeserializeOwned,
{
    let Some((version, body)) = bytes.split_first_chunk() else {
        return Err(CodecError::Damaged(0, "no version".into()));
    };
    let version = u16::from_le_bytes(*version);
    let value = match version {
        0 => return Err(CodecError::Damaged(0, "there was no such version".into())),
        1 => postcard::from_bytes::<One>(body).map(T::from),
        2 => postcard::from_bytes::<Two>(body).map(T::from),
        // Version 4 has the ledger of version 3.
        3 | VERSION => postcard::from_bytes(body),
        _ => return Err(CodecError::Newer(version)),
    };
    value.map_err(|error| CodecError::Damaged(version, error.to_string()))
}
