// Moving cache blocks: whole ones inside the arena, and one layer of many out of it for a handoff.
#include "common.cuh"

// Copies whole blocks inside the arena: pairs of (from, to). A grid of (parts, pairs).
KERNEL void copy_blocks(Layout layout, const u32* pairs, u16* arena) {
    begin();
    u64 words = block_elements(layout) / 8;
    const uint4* from = (const uint4*)(arena + pairs[blockIdx.y * 2] * block_elements(layout));
    uint4* to = (uint4*)(arena + pairs[blockIdx.y * 2 + 1] * block_elements(layout));
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (u64)gridDim.x * blockDim.x) to[i] = from[i];
}

// One layer of the blocks `ids`, as (block, kv_head, K|V, token, head_dim): what goes over a link. A grid of (kv_heads, blocks).
KERNEL void gather_layer(Layout layout, u32 layer, const u32* ids, const u16* arena, u16* out) {
    begin();
    u64 slice = 2 * half_elements(layout);
    const uint4* from = (const uint4*)(arena + ids[blockIdx.y] * block_elements(layout) + half_at(layout, blockIdx.x, layer, 0));
    uint4* to = (uint4*)(out + ((u64)blockIdx.y * layout.kv_heads + blockIdx.x) * slice);
    for (u64 i = threadIdx.x; i < slice / 8; i += blockDim.x) to[i] = from[i];
}

// One layer of the blocks `ids` from one arena to the same places of another of the same shape, which is the host's. A grid of
// (parts, kv_heads).
KERNEL void give_layer(Layout layout, u32 layer, const u32* ids, u32 count, const u16* arena, u16* host) {
    begin();
    u64 words = 2 * half_elements(layout) / 8;
    for (u32 i = blockIdx.x; i < count; i += gridDim.x) {
        u64 at = ids[i] * block_elements(layout) + half_at(layout, blockIdx.y, layer, 0);
        const uint4* from = (const uint4*)(arena + at);
        uint4* to = (uint4*)(host + at);
        for (u64 word = threadIdx.x; word < words; word += blockDim.x) to[word] = from[word];
    }
}
