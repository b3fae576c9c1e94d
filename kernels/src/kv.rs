//! Where a position's key and value lie in the arena, and reading and writing them one by one.

use baton_core::arena::{Arena, Half, KvDtype};

use crate::{Span, bf16};

/// First byte of one position's key or value. The span, head and layer have been checked.
pub(crate) fn entry(arena: &Arena, span: &Span, position: usize, kv_head: usize, layer: usize, half: Half) -> *mut u8 {
    let layout = arena.layout();
    let (block, token) = (position / layout.block_tokens as usize, position % layout.block_tokens as usize);
    let offset = layout.offset(kv_head, layer, half) + token * layout.head_dim as usize * layout.dtype.bytes();
    // SAFETY: `Span::check` has checked the position and the layer, `Heads::check` the head.
    unsafe { arena.block(span.blocks[block]).add(offset) }
}

pub(crate) fn store(
    arena: &Arena,
    span: &Span,
    position: usize,
    kv_head: usize,
    layer: usize,
    half: Half,
    values: &[f32],
) {
    let to = entry(arena, span, position, kv_head, layer, half);
    for (i, &value) in values.iter().enumerate() {
        // SAFETY: head_dim values fit; the caller of the operation holds the block for writing.
        unsafe {
            match arena.layout().dtype {
                KvDtype::Bf16 => to.cast::<u16>().add(i).write(bf16::round(value)),
                KvDtype::F32 => to.cast::<f32>().add(i).write(value),
            }
        }
    }
}

pub(crate) fn load(arena: &Arena, span: &Span, position: usize, kv_head: usize, layer: usize, half: Half) -> Vec<f32> {
    let from = entry(arena, span, position, kv_head, layer, half);
    let value = |i: usize| {
        // SAFETY: head_dim values lie there; the caller of the operation holds the block.
        unsafe {
            match arena.layout().dtype {
                KvDtype::Bf16 => bf16::widen(from.cast::<u16>().add(i).read()),
                KvDtype::F32 => from.cast::<f32>().add(i).read(),
            }
        }
    };
    (0..arena.layout().head_dim as usize).map(value).collect()
}
