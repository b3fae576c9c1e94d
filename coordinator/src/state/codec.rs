//! Bytes of entries and snapshots: a version, then postcard. A version this binary does not know is refused.

use serde::{Serialize, de::DeserializeOwned};
use xxhash_rust::xxh3::xxh3_64;

use super::{Batch, Command, Ledger, version1, version2};

/// Version of the entries and snapshots this binary writes; it reads all up to it.
pub const VERSION: u16 = 4;
/// The earliest one that it can still write.
pub const VERSION_MIN: u16 = 3;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CodecError {
    #[error("version {found} is newer than this coordinator takes (up to {known}): update it before it joins")]
    Newer { found: u16, known: u16 },
    #[error("bytes of version {0} that do not decode: {1}")]
    Damaged(u16, String),
}

pub fn encode_batch(batch: &Batch) -> Vec<u8> {
    encode(batch)
}

/// As a binary of that version writes it.
pub fn encode_batch_as(version: u16, batch: &Batch) -> Vec<u8> {
    let earlier = |command: &Command| match command {
        Command::AssignAfter { proposed, .. } => Command::Assign(proposed.clone()),
        other => other.clone(),
    };
    match version {
        VERSION.. => encode(batch),
        _ => encode_as(version, &Batch { commands: batch.commands.iter().map(earlier).collect(), ..*batch }),
    }
}

/// Refuses bytes of a version after `known`.
pub fn refuse_newer(known: u16, bytes: &[u8]) -> Result<(), CodecError> {
    let found = bytes.first_chunk().map_or(0, |version| u16::from_le_bytes(*version));
    if found > known { Err(CodecError::Newer { found, known }) } else { Ok(()) }
}

pub fn decode_batch(bytes: &[u8]) -> Result<Batch, CodecError> {
    // Versions 3 and 4 have one command more each than the one before, after the others.
    decode::<Batch, version1::Batch, Batch>(bytes)
}

pub fn encode_ledger(ledger: &Ledger) -> Vec<u8> {
    encode(ledger)
}

/// As a binary of that version writes it. Version 4 has the ledger of version 3.
pub fn encode_ledger_as(version: u16, ledger: &Ledger) -> Vec<u8> {
    encode_as(version, ledger)
}

pub fn decode_ledger(bytes: &[u8]) -> Result<Ledger, CodecError> {
    decode::<Ledger, version1::Ledger, version2::Ledger>(bytes)
}

/// Equal for equal ledgers on every node and machine.
pub fn hash(ledger: &Ledger) -> u64 {
    xxh3_64(&encode(ledger))
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    encode_as(VERSION, value)
}

fn encode_as<T: Serialize>(version: u16, value: &T) -> Vec<u8> {
    let bytes = version.to_le_bytes().to_vec();
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
        found => return Err(CodecError::Newer { found, known: VERSION }),
    };
    value.map_err(|error| CodecError::Damaged(version, error.to_string()))
}
