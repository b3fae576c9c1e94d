//! Reads and writes arena blocks for scenarios, which know when nobody else does.
#![allow(unsafe_code)]

use baton_core::Arena;

/// One layer of a block that no transfer is writing.
pub fn read_layer(arena: &Arena, index: u32, layer: usize) -> Vec<u8> {
    let mut bytes = vec![0; arena.layout().layer_bytes()];
    read_layer_into(arena, index, layer, &mut bytes);
    bytes
}

/// The same, into a buffer of the layer's size.
pub fn read_layer_into(arena: &Arena, index: u32, layer: usize, bytes: &mut [u8]) {
    // SAFETY: scenarios read a block before its transfer begins or after it has completed.
    unsafe { arena.read_layer(index, layer, bytes) };
}

/// Fills one layer of a block of an arena that no transfer knows yet.
pub fn write_layer(arena: &Arena, index: u32, layer: usize, bytes: &[u8]) {
    // SAFETY: the arena has not been shared yet.
    unsafe { arena.write_layer(index, layer, bytes) };
}
