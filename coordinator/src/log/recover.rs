//! Reads the log back after a stop: cuts a torn tail, refuses damage anywhere else.

use std::collections::VecDeque;

use super::disk::Disk;
use super::frame::{Record, SEGMENT_HEADER, VERSION, find_frame, read_frame, read_segment_header};
use super::{LogError, segment_name, segment_number};
use baton_core::planted::{self, Bug};

/// How far ahead of the expected one a frame's number is still taken for one of this log, when looking for proof of damage.
const FRAMES_AHEAD_MAX: u64 = 1 << 32;

/// Where an entry's body lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) segment: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
}

/// A segment's name is the number of its first frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) first_frame: u64,
    /// Largest index of an entry in it.
    pub(super) index_last: Option<u64>,
}

/// What the log held.
#[derive(Debug, Default)]
pub(super) struct Recovered {
    pub(super) vote: Option<Vec<u8>>,
    pub(super) committed: Option<Vec<u8>>,
    pub(super) purged: Option<(u64, Vec<u8>)>,
    /// Index of the first location.
    pub(super) first: u64,
    pub(super) locations: VecDeque<Location>,
    /// Oldest first; the last one is appended to.
    pub(super) segments: Vec<Segment>,
    pub(super) next_frame: u64,
    /// Bytes of a torn tail that were cut.
    pub(super) cut_bytes: u64,
}

pub(super) fn recover(disk: &dyn Disk) -> Result<Recovered, LogError> {
    let names = disk.list().map_err(|error| LogError::io(disk, "", error))?;
    let segments: Vec<u64> = names.iter().filter_map(|name| segment_number(name)).collect();
    let mut recovered = Recovered::default();
    for (i, first_frame) in segments.iter().enumerate() {
        let last = i + 1 == segments.len();
        read_segment(disk, *first_frame, i == 0, last, &mut recovered)?;
    }
    let purged_next = recovered.purged.as_ref().map_or(0, |(index, _)| index + 1);
    if !recovered.locations.is_empty() && recovered.first > purged_next {
        let (from, to) = (purged_next, recovered.first - 1);
        let path = disk.path(&segment_name(recovered.segments[0].first_frame));
        return Err(LogError::Missing { path, from, to });
    }
    Ok(recovered)
}

fn read_segment(disk: &dyn Disk, name: u64, first: bool, last: bool, out: &mut Recovered) -> Result<(), LogError> {
    let file = segment_name(name);
    let bytes = disk.read(&file).map_err(|error| LogError::io(disk, &file, error))?;
    let damaged = |offset: usize, what| LogError::Damaged { path: disk.path(&file), offset: offset as u64, what };
    let Some((version, first_frame)) = read_segment_header(&bytes) else {
        // A crash while the last segment was being made leaves it without a frame.
        if last && find_frame(&bytes, 0, name..name + FRAMES_AHEAD_MAX).is_none() {
            out.cut_bytes += bytes.len() as u64;
            return disk.remove(&file).map_err(|error| LogError::io(disk, &file, error));
        }
        return Err(damaged(0, "segment header"));
    };
    if version > VERSION {
        return Err(LogError::Newer { path: disk.path(&file), version });
    }
    if first_frame != name || !(first || first_frame == out.next_frame) {
        return Err(damaged(12, "number of the first frame (a segment is missing or foreign)"));
    }
    out.next_frame = first_frame;
    out.segments.push(Segment { first_frame, index_last: None });
    let mut offset = SEGMENT_HEADER;
    while offset < bytes.len() {
        match read_frame(&bytes, offset) {
            Some((number, records)) if number == out.next_frame => {
                apply_frame(&bytes, records.clone(), out).map_err(|(at, what)| damaged(at, what))?;
                out.next_frame += 1;
                offset = records.end;
            }
            Some(_) => return Err(damaged(offset, "frame number")),
            None => {
                let later = out.next_frame..out.next_frame + FRAMES_AHEAD_MAX;
                if !last || find_frame(&bytes, offset, later).is_some() || planted::is(Bug::TornTailRefused) {
                    return Err(damaged(offset, "frame"));
                }
                out.cut_bytes += (bytes.len() - offset) as u64;
                return disk.truncate(&file, offset as u64).map_err(|error| LogError::io(disk, &file, error));
            }
        }
    }
    Ok(())
}

fn apply_frame(
    bytes: &[u8],
    records: std::ops::Range<usize>,
    out: &mut Recovered,
) -> Result<(), (usize, &'static str)> {
    let mut offset = records.start;
    while offset < records.end {
        let (record, len) = Record::read(&bytes[offset..records.end]).ok_or((offset, "record"))?;
        let end = offset + len;
        apply(record, end, out).map_err(|what| (offset, what))?;
        offset = end;
    }
    Ok(())
}

/// `end` is where the record ends in its segment; an entry's body is its last bytes.
fn apply(record: Record, end: usize, out: &mut Recovered) -> Result<(), &'static str> {
    match record {
        Record::Entry { index, body } => {
            if out.locations.is_empty() {
                out.first = index;
            } else if index != out.first + out.locations.len() as u64 {
                return Err("index of an entry");
            }
            let segment = out.segments.last_mut().expect("records lie in a segment");
            segment.index_last = segment.index_last.max(Some(index));
            let offset = (end - body.len()) as u64;
            out.locations.push_back(Location { segment: segment.first_frame, offset, len: body.len() as u32 });
        }
        Record::Vote(body) => out.vote = Some(body.to_vec()),
        Record::Committed(body) => out.committed = Some(body.to_vec()),
        Record::Truncate { .. } if planted::is(Bug::TruncateForgotten) => {}
        Record::Truncate { from } => out.locations.truncate(from.saturating_sub(out.first) as usize),
        Record::Purge { index, tag } => {
            let gone = (index + 1).saturating_sub(out.first).min(out.locations.len() as u64);
            out.locations.drain(..gone as usize);
            out.first = out.first.max(index + 1);
            out.purged = Some((index, tag.to_vec()));
        }
    }
    Ok(())
}
