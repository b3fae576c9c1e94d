//! The snapshot file beside the log: replaced whole, checked whole.
//!
//! ```text
//! magic 8 | version u32 | crc32 u32 (of all that follows) | tag len u32 | tag | body
//! ```

use super::LogError;
use super::disk::Disk;

pub(super) const NAME: &str = "snapshot";
const MAGIC: [u8; 8] = *b"BATONSNP";
const VERSION: u32 = 1;
const HEADER: usize = 16;

/// Replaces the snapshot; after a crash it is the old one or this one. `tag` says what point of the log it stands for.
pub fn save_snapshot(disk: &dyn Disk, tag: &[u8], body: &[u8]) -> Result<(), LogError> {
    let mut bytes = Vec::with_capacity(HEADER + 4 + tag.len() + body.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend((tag.len() as u32).to_le_bytes());
    bytes.extend(tag);
    bytes.extend(body);
    let crc = crc32fast::hash(&bytes[HEADER..]);
    bytes[12..HEADER].copy_from_slice(&crc.to_le_bytes());
    disk.replace(NAME, &bytes).map_err(|error| LogError::io(disk, NAME, error))
}

/// A saved state and what point of the log it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    pub tag: Vec<u8>,
    pub body: Vec<u8>,
}

/// The snapshot, if there is one.
pub fn load_snapshot(disk: &dyn Disk) -> Result<Option<Saved>, LogError> {
    let failed = |error| LogError::io(disk, NAME, error);
    if !disk.list().map_err(failed)?.iter().any(|name| name == NAME) {
        return Ok(None);
    }
    let bytes = disk.read(NAME).map_err(failed)?;
    let damaged = |offset, what| LogError::Damaged { path: disk.path(NAME), offset, what };
    let header = bytes.get(..HEADER).ok_or_else(|| damaged(0, "snapshot header"))?;
    if header[..8] != MAGIC {
        return Err(damaged(0, "snapshot magic"));
    }
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let version = number(8);
    if crc32fast::hash(&bytes[HEADER..]) != number(12) {
        return Err(damaged(HEADER as u64, "snapshot"));
    }
    if version != VERSION {
        return Err(LogError::Newer { path: disk.path(NAME), version });
    }
    let rest = bytes.get(HEADER + 4..).ok_or_else(|| damaged(HEADER as u64, "snapshot"))?;
    let (tag, body) =
        rest.split_at_checked(number(HEADER) as usize).ok_or_else(|| damaged(HEADER as u64, "snapshot tag"))?;
    Ok(Some(Saved { tag: tag.to_vec(), body: body.to_vec() }))
}
