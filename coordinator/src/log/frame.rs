//! Bytes of a segment. What one group commit writes is one frame, whole or not at all; frames are numbered without
//! gaps through the whole log, so that a missing or foreign one is noticed.
//!
//! ```text
//! segment = magic 8 | version u32 | first frame number u64 | crc32 u32      then frames
//! frame   = len u32 | crc32 u32 (of len, number and records) | number u64 | records
//! record  = len u32 | crc32 u32 (of kind and body) | kind u8 | body
//! ```
//! A frame without records is a mark: the frame before it was synced. It lets damage in the last frame be told from a
//! torn write.

use std::ops::Range;

pub(super) const MAGIC: [u8; 8] = *b"BATONLOG";
pub(super) const VERSION: u32 = 1;
pub(super) const SEGMENT_HEADER: usize = 24;
pub(super) const FRAME_HEADER: usize = 16;
pub(super) const RECORD_HEADER: usize = 9;

/// One thing the log remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record<'a> {
    Entry {
        index: u64,
        body: &'a [u8],
    },
    Vote(&'a [u8]),
    /// Entries from this index on are void.
    Truncate {
        from: u64,
    },
    /// Entries up to this index are void; `tag` is the caller's name for that point.
    Purge {
        index: u64,
        tag: &'a [u8],
    },
    Committed(&'a [u8]),
}

impl Record<'_> {
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend([0; RECORD_HEADER]);
        let kind = match self {
            Record::Entry { index, body } => {
                out.extend(index.to_le_bytes());
                out.extend(*body);
                1
            }
            Record::Vote(body) => {
                out.extend(*body);
                2
            }
            Record::Truncate { from } => {
                out.extend(from.to_le_bytes());
                3
            }
            Record::Purge { index, tag } => {
                out.extend(index.to_le_bytes());
                out.extend(*tag);
                4
            }
            Record::Committed(body) => {
                out.extend(*body);
                5
            }
        };
        let len = u32::try_from(out.len() - start - RECORD_HEADER).expect("a record is far below 4 GiB");
        out[start + 8] = kind;
        let crc = crc32fast::hash(&out[start + 8..]);
        out[start..start + 4].copy_from_slice(&len.to_le_bytes());
        out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
    }

    /// The record at the start of `bytes` and the bytes it takes. None: not a record.
    pub(super) fn read(bytes: &[u8]) -> Option<(Record<'_>, usize)> {
        let len = u32_at(bytes, 0)? as usize;
        let end = RECORD_HEADER.checked_add(len)?;
        let body = bytes.get(RECORD_HEADER..end)?;
        if crc32fast::hash(&bytes[8..end]) != u32_at(bytes, 4)? {
            return None;
        }
        let number = || Some((u64_at(body, 0)?, &body[8..]));
        let record = match bytes[8] {
            1 => number().map(|(index, body)| Record::Entry { index, body })?,
            2 => Record::Vote(body),
            3 => number().map(|(from, _)| Record::Truncate { from })?,
            4 => number().map(|(index, tag)| Record::Purge { index, tag })?,
            5 => Record::Committed(body),
            _ => return None,
        };
        Some((record, end))
    }
}

pub(super) fn segment_header(first_frame: u64) -> [u8; SEGMENT_HEADER] {
    let mut out = [0; SEGMENT_HEADER];
    out[..8].copy_from_slice(&MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[12..20].copy_from_slice(&first_frame.to_le_bytes());
    let crc = crc32fast::hash(&out[..20]);
    out[20..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// (version, first frame number) of a segment. None: not a header.
pub(super) fn read_segment_header(bytes: &[u8]) -> Option<(u32, u64)> {
    let header = bytes.get(..SEGMENT_HEADER)?;
    let sound = header[..8] == MAGIC && u32_at(header, 20)? == crc32fast::hash(&header[..20]);
    sound.then_some((u32_at(header, 8)?, u64_at(header, 12)?))
}

/// Puts the header before `out[start + FRAME_HEADER..]`, the records of frame `number`.
pub(super) fn seal_frame(out: &mut [u8], start: usize, number: u64) {
    let len = u32::try_from(out.len() - start - FRAME_HEADER).expect("a frame is far below 4 GiB");
    out[start..start + 4].copy_from_slice(&len.to_le_bytes());
    out[start + 8..start + 16].copy_from_slice(&number.to_le_bytes());
    let crc = frame_crc(&out[start..]);
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

/// (number, where its records lie) of the frame at `offset`. None: not a whole frame.
pub(super) fn read_frame(bytes: &[u8], offset: usize) -> Option<(u64, Range<usize>)> {
    let rest = bytes.get(offset..)?;
    let end = FRAME_HEADER.checked_add(u32_at(rest, 0)? as usize)?;
    let frame = rest.get(..end)?;
    let sound = frame_crc(frame) == u32_at(frame, 4)?;
    sound.then_some((u64_at(frame, 8)?, offset + FRAME_HEADER..offset + end))
}

/// The first whole frame after `offset` with a number in `numbers`: proof that what lies before it was once whole.
pub(super) fn find_frame(bytes: &[u8], offset: usize, numbers: Range<u64>) -> Option<usize> {
    let plausible = |at: &usize| u64_at(bytes, at + 8).is_some_and(|number| numbers.contains(&number));
    (offset + 1..bytes.len()).filter(plausible).find(|at| read_frame(bytes, *at).is_some())
}

fn frame_crc(frame: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&frame[..4]);
    hasher.update(&frame[8..]);
    hasher.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
