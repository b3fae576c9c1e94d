//! A backend without a model: what it writes into a block is a hash of the whole prefix as it stands in the arena, and
//! so is the next token. A lost, stale, swapped or foreign block changes every token after it. For tests and simulation.

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
    let (arena, table) = (batch.arena(), batch.table(span));
    let mut prefix = Xxh3::new();
    let mut bytes = Vec::new();
    for position in 0..span.position {
        token_bytes(arena, table, position, &mut bytes);
        prefix.update(&bytes);
    }
    let tokens = &batch.tokens[span.row..span.row + span.rows];
    let rows = tokens.iter().enumerate().map(|(i, token)| {
        let state = xxh3_64_with_seed(&prefix.digest().to_le_bytes(), u64::from(*token) ^ salt);
        write_token(arena, table, span.position + i, state);
        token_bytes(arena, table, span.position + i, &mut bytes);
        prefix.update(&bytes);
        prefix.digest()
    });
    rows.collect()
}

/// Calls `each` with the address of every (kv_head, layer, half) part of a position, each `part_bytes` long.
fn parts(arena: &Arena, table: &[u32], position: usize, mut each: impl FnMut(*mut u8)) {
    let layout = arena.layout();
    let block_tokens = layout.block_tokens as usize;
    let (block, token) = (arena.block(table[position / block_tokens]), position % block_tokens);
    for head in 0..layout.kv_heads as usize {
        for layer in 0..layout.layers as usize {
            for half in [Half::Key, Half::Value] {
                let offset = layout.offset(head, layer, half) + token * part_bytes(arena);
                // SAFETY: the offset lies inside the block.
                each(unsafe { block.add(offset) });
            }
        }
    }
}

fn part_bytes(arena: &Arena) -> usize {
    arena.layout().row_bytes()
}

fn token_bytes(arena: &Arena, table: &[u32], position: usize, out: &mut Vec<u8>) {
    let len = part_bytes(arena);
    out.clear();
    // SAFETY: the sequence of this span holds the block as filled up to this position.
    parts(arena, table, position, |part| out.extend_from_slice(unsafe { std::slice::from_raw_parts(part, len) }));
}

fn write_token(arena: &Arena, table: &[u32], position: usize, state: u64) {
    let len = part_bytes(arena);
    let mut salt = 0;
    parts(arena, table, position, |part| {
        for at in (0..len).step_by(8) {
            let word = xxh3_64_with_seed(&state.to_le_bytes(), salt).to_le_bytes();
            let count = (len - at).min(8);
            // SAFETY: the scheduler gave this position to this span alone; `at + count` stays inside the part.
            unsafe { std::ptr::copy_nonoverlapping(word.as_ptr(), part.add(at), count) };
            salt += 1;
        }
    });
}
