//! What links do on a GPU against the host's checksum and plain copies: extents of several shapes, from another mapping of the
//! memory, whole blocks and some heads of them.

use std::sync::Arc;

use baton_core::Rng;
use baton_core::arena::{Arena, BlockLayout, DeviceBlocks, KvDtype};
use xxhash_rust::xxh3::xxh3_64;

use super::check::Check;
use super::{Gpu, GpuArena, GpuError};

const BLOCKS: u32 = 6;

/// (kv_heads, head_dim, block_tokens): one piece and less, pieces that end in the middle, more than are summed at a time.
const SHAPES: [(u32, u32, u32); 6] = [(1, 16, 8), (2, 16, 16), (3, 96, 2), (8, 128, 16), (5, 32, 16), (20, 128, 32)];

pub(crate) fn links(gpu: &Gpu, seed: u64) -> Result<Vec<Check>, GpuError> {
    let mut rng = Rng::new(seed);
    let mut found = Vec::new();
    for (kv_heads, head_dim, block_tokens) in SHAPES {
        let layout = BlockLayout { layers: 2, kv_heads, head_dim, block_tokens, dtype: KvDtype::Bf16 };
        let whole = [Part { heads: kv_heads, from: 0, to: 0 }];
        let part = Part { heads: kv_heads / 2, from: kv_heads - kv_heads / 2, to: 0 };
        let parts = whole.into_iter().chain((part.heads > 0).then_some(part));
        for part in parts {
            let name = format!("links {kv_heads}x{head_dim}x{block_tokens}, {} heads", part.heads);
            let ok = same(gpu, layout, part, &mut rng)?;
            found.push(Check { name, error: if ok { 0.0 } else { f64::INFINITY }, ok });
        }
    }
    Ok(found)
}

/// Some heads of every block: so many, from this one on, to that one on.
#[derive(Clone, Copy)]
struct Part {
    heads: u32,
    from: u32,
    to: u32,
}

fn same(gpu: &Gpu, layout: BlockLayout, part: Part, rng: &mut Rng) -> Result<bool, GpuError> {
    let (source, from) = filled(gpu, layout, rng)?;
    let (target, to) = filled(gpu, layout, rng)?;
    let Part { heads, .. } = part;
    let range = |first: u32| first..first + heads;
    let [view, into] = [(&source, part.from), (&target, part.to)]
        .map(|(arena, first)| Arc::new(arena.view(layout.kv_heads, range(first)).expect("heads of the layout")));
    let layer = 1;
    let (extents, placed) = (view.extents(layer), into.extents(layer));
    if !extents.are_summable() {
        return Ok(true);
    }
    let failed = |error: std::io::Error| GpuError::Call { call: "links", what: error.to_string() };
    let ids: Vec<u32> = (0..BLOCKS).collect();
    let sums = from.shared(gpu).sum(&extents, &ids).and_then(|sums| sums.wait()).map_err(failed)?;
    let expected: Vec<u64> = ids.iter().map(|block| xxh3_64(&read(&view, *block, layer))).collect();
    let mut same = sums == expected;

    let ours: Arc<dyn DeviceBlocks> = to.shared(gpu);
    let descriptor = from.shared(gpu).descriptor().map_err(failed)?;
    let theirs = ours.map(descriptor, source.bytes()).map_err(failed)?;
    let pairs: Vec<(u32, u32)> = ids.iter().map(|block| (*block, (block + 2) % (BLOCKS - 1))).take(4).collect();
    // SAFETY: nobody else knows of these arenas.
    let fetched = unsafe { theirs.fetch(&extents, &placed, &pairs) }.and_then(|sums| sums.wait()).map_err(failed)?;
    same &= fetched == expected[..4];
    for (block, there) in pairs {
        // SAFETY: as above.
        unsafe { into.write_layer(there, layer, &read(&view, block, layer)) };
    }
    for block in ids {
        let stride = layout.block_bytes();
        // SAFETY: as above; a whole block.
        let expected = unsafe { std::slice::from_raw_parts(target.block(block), stride) };
        same &= to.read_block(block)? == expected;
    }
    Ok(same)
}

fn read(arena: &Arena, block: u32, layer: usize) -> Vec<u8> {
    let mut bytes = vec![0; arena.layout().layer_bytes()];
    // SAFETY: the check is the arena's only user.
    unsafe { arena.read_layer(block, layer, &mut bytes) };
    bytes
}

/// Random blocks on the host, and the same on the GPU.
fn filled(gpu: &Gpu, layout: BlockLayout, rng: &mut Rng) -> Result<(Arc<Arena>, GpuArena), GpuError> {
    let mut arena = Arena::new(layout, BLOCKS as usize);
    arena.bytes_mut().iter_mut().for_each(|byte| *byte = rng.u64() as u8);
    let mut device = gpu.arena(layout, BLOCKS as usize)?;
    for (block, bytes) in arena.bytes_mut().chunks_exact(layout.block_bytes()).enumerate() {
        device.write_block(block as u32, bytes)?;
    }
    gpu.finish()?;
    Ok((Arc::new(arena), device))
}
