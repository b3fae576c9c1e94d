//! What rank 0 tells a rank that is a process of its own: frames on its standard input.
//!
//! ```text
//! frame  kind: u32 | bytes: u32 | payload
//! arena  the memory that steps write from here on, as JSON: where it is, and its blocks' layout
//! step   counts of tokens, spans, tables, drawn | tokens | spans of 5 | tables | drawn         all u32
//! ```

use std::io::{self, Read, Write};
use std::path::PathBuf;

use baton_core::BlockLayout;
use serde::{Deserialize, Serialize};

use super::{StepRows, StepSpan};

const ARENA: u32 = 1;
const STEP: u32 = 2;
/// No step is as large: a batch of a million rows, each with its own block.
const PAYLOAD_MAX: usize = 64 << 20;
const SPAN_WORDS: usize = 5;

/// One frame.
#[derive(Debug, PartialEq)]
pub(super) enum Frame {
    Arena(Place),
    Step(StepRows),
}

/// An arena of another process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Place {
    pub(super) path: PathBuf,
    pub(super) layout: BlockLayout,
}

pub(super) fn write_arena(to: &mut impl Write, place: &Place) -> io::Result<()> {
    write(to, ARENA, &serde_json::to_vec(place)?)
}

pub(super) fn write_step(to: &mut impl Write, rows: &StepRows) -> io::Result<()> {
    let StepRows { tokens, spans, tables, drawn } = rows;
    let counts = [tokens.len(), spans.len(), tables.len(), drawn.len()];
    let span = |span: &StepSpan| [span.row, span.rows, span.position, span.table.start, span.table.end];
    let words = counts.into_iter().map(|count| count as u32);
    let words = words.chain(tokens.iter().copied()).chain(spans.iter().flat_map(span).map(|word| word as u32));
    let words = words.chain(tables.iter().copied()).chain(drawn.iter().map(|row| *row as u32));
    let payload: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
    write(to, STEP, &payload)
}

/// In one piece, so that the reader wakes once.
fn write(to: &mut impl Write, kind: u32, payload: &[u8]) -> io::Result<()> {
    let mut frame = Vec::with_capacity(8 + payload.len());
    frame.extend(kind.to_le_bytes());
    frame.extend((payload.len() as u32).to_le_bytes());
    frame.extend(payload);
    to.write_all(&frame)?;
    to.flush()
}

/// The next frame; None at the end.
///
/// # Errors
/// When it is no frame.
pub(super) fn read(from: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut head = [0; 8];
    match from.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let [kind, len] = words_of(&head)[..] else { unreachable!("eight bytes are two words") };
    if len as usize > PAYLOAD_MAX {
        return Err(wrong());
    }
    let mut payload = vec![0; len as usize];
    from.read_exact(&mut payload)?;
    match kind {
        ARENA => Ok(Some(Frame::Arena(serde_json::from_slice(&payload)?))),
        STEP => step(&payload).map(Frame::Step).map(Some).ok_or_else(wrong),
        _ => Err(wrong()),
    }
}

fn wrong() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not what rank 0 says")
}

fn words_of(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

/// A step whose spans lie within its rows and tables.
fn step(payload: &[u8]) -> Option<StepRows> {
    let words = words_of(payload);
    let (counts, rest) = words.split_at_checked(4)?;
    let counts: Vec<usize> = counts.iter().map(|count| *count as usize).collect();
    let (tokens, rest) = rest.split_at_checked(counts[0])?;
    let (spans, rest) = rest.split_at_checked(counts[1].checked_mul(SPAN_WORDS)?)?;
    let (tables, drawn) = rest.split_at_checked(counts[2])?;
    let span = |words: &[u32; SPAN_WORDS]| {
        let [row, rows, position, start, end] = words.map(|word| word as usize);
        StepSpan { row, rows, position, table: start..end }
    };
    let spans: Vec<StepSpan> = spans.as_chunks::<SPAN_WORDS>().0.iter().map(span).collect();
    let within = |span: &StepSpan| {
        span.row + span.rows <= tokens.len() && span.table.start <= span.table.end && span.table.end <= tables.len()
    };
    let drawn: Vec<usize> = drawn.iter().map(|row| *row as usize).collect();
    let whole = payload.len().is_multiple_of(4) && drawn.len() == counts[3];
    let fits = whole && spans.iter().all(within) && drawn.iter().all(|row| *row < tokens.len());
    fits.then(|| StepRows { tokens: tokens.to_vec(), spans, tables: tables.to_vec(), drawn })
}

#[cfg(test)]
mod tests {
    use baton_core::KvDtype;
    use proptest::prelude::*;

    use super::*;

    fn rows() -> impl Strategy<Value = StepRows> {
        (1usize..40, prop::collection::vec(any::<u32>(), 0..60)).prop_flat_map(|(len, tables)| {
            let tokens = prop::collection::vec(any::<u32>(), len);
            let end = tables.len();
            let span = (0..len, 0..=end).prop_map(move |(row, start)| StepSpan {
                row,
                rows: len - row,
                position: row * 3,
                table: start..end,
            });
            (tokens, prop::collection::vec(span, 0..5), Just(tables), prop::collection::vec(0..len, 0..9))
                .prop_map(|(tokens, spans, tables, drawn)| StepRows { tokens, spans, tables, drawn })
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(rows in rows()) {
            let layout = BlockLayout { layers: 2, kv_heads: 1, head_dim: 8, block_tokens: 16, dtype: KvDtype::Bf16 };
            let place = Place { path: "/proc/1/fd/3".into(), layout };
            let mut bytes = Vec::new();
            write_arena(&mut bytes, &place).unwrap();
            write_step(&mut bytes, &rows).unwrap();
            let mut from = &bytes[..];
            prop_assert_eq!(read(&mut from).unwrap(), Some(Frame::Arena(place)));
            prop_assert_eq!(read(&mut from).unwrap(), Some(Frame::Step(rows)));
            prop_assert_eq!(read(&mut from).unwrap(), None);
        }

        /// Whatever comes: a frame, an error or the end, and every step's spans lie within it.
        #[test]
        fn anything_else_is_refused(rows in rows(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = Vec::new();
            write_step(&mut bytes, &rows).unwrap();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(Some(Frame::Step(rows))) = read(&mut &bytes[..]) {
                for span in &rows.spans {
                    prop_assert!(span.row + span.rows <= rows.tokens.len());
                    prop_assert!(rows.tables.get(span.table.clone()).is_some());
                }
            }
        }
    }
}
