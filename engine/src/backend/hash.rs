//! A backend without a model: what it writes into a block is a hash of the whole prefix as it stands in the arena, and
//! so is the next token. A lost, stale, swapped or foreign block changes every token after it. For tests and simulation.

use std::ops::Range;

use baton_core::arena::Half;
use baton_core::{Arena, SampledToken, TokenId};
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use crate::backend::Backend;
use crate::batch::{Batch, Draw, DrawKind, Next, Output, Span};

/// Deterministic stand-in for a model with `vocab` tokens.
pub struct HashBackend {
    vocab: u32,
    /// Of what it writes: another salt is another model's arithmetic.
    salt: u64,
}

impl HashBackend {
    /// # Panics
    /// If `vocab` is zero.
    pub fn new(vocab: usize) -> HashBackend {
        assert!(vocab > 0, "a vocabulary has tokens");
        HashBackend { vocab: vocab as u32, salt: 0 }
    }

    /// The same with other arithmetic: whatever it writes differs.
    pub fn salted(self, salt: u64) -> HashBackend {
        HashBackend { salt, ..self }
    }

    fn draw(&self, draw: &Draw, prefix: u64) -> SampledToken {
        match &draw.kind {
            DrawKind::Next(next) => self.next(next, prefix),
            DrawKind::Given { token, .. } => {
                SampledToken { id: *token, logprob: logprob(prefix, *token), top: Vec::new() }
            }
        }
    }

    /// Greedy choices follow the prefix alone; sampled ones its seed, position and choice too.
    fn next(&self, next: &Next, prefix: u64) -> SampledToken {
        let sampling = &next.request.sampling;
        let seed = match sampling.temperature > 0.0 {
            true => sampling.seed ^ (u64::from(next.choice) << 32) ^ u64::from(next.position),
            false => 0,
        };
        let first = (xxh3_64_with_seed(&prefix.to_le_bytes(), seed) % u64::from(self.vocab)) as u32;
        let ring = (0..self.vocab).map(|step| (first + step) % self.vocab);
        let id = ring.into_iter().find(|id| !next.banned.contains(id)).unwrap_or(first);
        SampledToken { id, logprob: logprob(prefix, id), top: Vec::new() }
    }
}

impl Backend for HashBackend {
    fn run(&mut self, batch: &Batch, layers: &mut dyn FnMut(usize)) -> Output {
        batch.copy_shared_blocks();
        let prefixes: Vec<u64> = batch.spans.iter().flat_map(|span| write_span(batch, span, self.salt)).collect();
        (0..batch.arena().layout().layers as usize).for_each(layers);
        Output { drawn: batch.draws.iter().map(|draw| self.draw(draw, prefixes[draw.row])).collect() }
    }
}

fn logprob(prefix: u64, token: TokenId) -> f32 {
    let hash = xxh3_64_with_seed(&prefix.to_le_bytes(), u64::from(token) + 1);
    -((hash >> 40) as f32) / (1u32 << 24) as f32
}

/// Writes the span's rows and returns the hash of the prefix up to each of them, itself included.
fn write_span(batch: &Batch, span: &Span, salt: u64) -> Vec<u64> {
    let tokens = Tokens::new(batch.arena(), batch.table(span));
    let (mut prefix, mut bytes) = (Xxh3::new(), Vec::new());
    tokens.read(0..span.position, &mut bytes);
    prefix.update(&bytes);
    let rows = batch.tokens[span.row..span.row + span.rows].iter().zip(span.position..).map(|(token, position)| {
        let state = xxh3_64_with_seed(&prefix.digest().to_le_bytes(), u64::from(*token) ^ salt);
        tokens.write(position, state);
        tokens.read(position..position + 1, &mut bytes);
        prefix.update(&bytes);
        prefix.digest()
    });
    rows.collect()
}

/// The tokens of one sequence in the arena. Each is in parts, one for every (kv_head, layer, half).
struct Tokens<'a> {
    arena: &'a Arena,
    table: &'a [u32],
    /// Of each part of a block's first token, from the block's start.
    parts: Vec<usize>,
    part_bytes: usize,
    block_tokens: usize,
}

/// Bytes of a part in the model that simulations use, which reads more tokens than anything else there does.
const USUAL: usize = 8;

impl Tokens<'_> {
    fn new<'a>(arena: &'a Arena, table: &'a [u32]) -> Tokens<'a> {
        let layout = arena.layout();
        let mut parts = Vec::with_capacity(2 * (layout.kv_heads * layout.layers) as usize);
        for head in 0..layout.kv_heads as usize {
            for layer in 0..layout.layers as usize {
                parts.extend([Half::Key, Half::Value].map(|half| arena.offset(head, layer, half)));
            }
        }
        Tokens { arena, table, parts, part_bytes: layout.row_bytes(), block_tokens: layout.block_tokens as usize }
    }

    /// The bytes of these positions, in place of what is in `out`.
    fn read(&self, positions: Range<usize>, out: &mut Vec<u8>) {
        out.clear();
        out.resize(positions.len() * self.parts.len() * self.part_bytes, 0);
        let mut copies = out.chunks_exact_mut(self.part_bytes);
        let (mut left, mut token) = (positions.len(), positions.start % self.block_tokens);
        for index in &self.table[positions.start / self.block_tokens..] {
            let (block, tokens) = (self.arena.block(*index), (self.block_tokens - token).min(left));
            for token in token..token + tokens {
                for (part, copy) in self.parts.iter().zip(&mut copies) {
                    // SAFETY: the part of this token lies inside the block, which the sequence of this span holds as filled up
                    // to this position.
                    unsafe { read_part(block.add(part + token * self.part_bytes), copy) };
                }
            }
            (left, token) = (left - tokens, 0);
            if left == 0 {
                break;
            }
        }
    }

    /// Writes what follows from `state` to a position.
    fn write(&self, position: usize, state: u64) {
        let (block, token) = (self.arena.block(self.table[position / self.block_tokens]), position % self.block_tokens);
        let mut words = (0u64..).map(|at| xxh3_64_with_seed(&state.to_le_bytes(), at).to_le_bytes());
        for part in &self.parts {
            let start = part + token * self.part_bytes;
            for (at, word) in (0..self.part_bytes).step_by(8).zip(&mut words) {
                let count = (self.part_bytes - at).min(8);
                // SAFETY: the scheduler gave this position to this span alone; `at + count` stays inside the part, and that
                // inside the block.
                unsafe { std::ptr::copy_nonoverlapping(word.as_ptr(), block.add(start + at), count) };
            }
        }
    }
}

/// Copies one part of a token out.
///
/// # Safety
/// So many bytes can be read there.
unsafe fn read_part(from: *const u8, copy: &mut [u8]) {
    match <&mut [u8; USUAL]>::try_from(&mut *copy) {
        // SAFETY: the caller's promise, of that many bytes.
        Ok(usual) => *usual = unsafe { from.cast::<[u8; USUAL]>().read() },
        // SAFETY: the caller's promise.
        Err(_) => unsafe { std::ptr::copy_nonoverlapping(from, copy.as_mut_ptr(), copy.len()) },
    }
}
