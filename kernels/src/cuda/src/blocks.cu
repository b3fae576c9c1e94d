// Moving cache blocks: whole ones inside the arena, one layer of many out of it for a handoff, and one layer of many from another
// process's arena into this one.
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

// Where one layer of some heads of every block lies in a memory, in bytes: core/src/arena/device.rs.
struct Extents {
    u64 first;
    u64 block_stride;
    u64 head_stride;
};

// XXH3's default secret as words.
__device__ const u64 SECRET[24] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
};

// A word of the secret that begins `bytes` (1 to 7) behind the word `at`.
__device__ __forceinline__ u64 secret_between(u32 at, u32 bytes) {
    return SECRET[at] >> (8 * bytes) | SECRET[at + 1] << (64 - 8 * bytes);
}

#define SUM_WARPS 8
// Pieces of 1 KiB whose sums wait in shared memory at a time.
#define SUM_PIECES 64
// Pieces that a warp reads before it looks at the first.
#define SUM_GROUP 4

// Copies extents and computes their checksums in the same pass: XXH3 with 64 bits ("XXH3 Algorithm for long inputs" of the
// xxHash specification 0.2.0) over `heads` slices one after another, which are stripes of 64 bytes, more than 240 in all. What a
// piece of 1 KiB adds to the eight lanes does not depend on the pieces before it, so warps take pieces as they come; the
// scrambles between pieces, which depend on order, are done over the pieces' sums by eight threads. One thread block for each of
// `pairs` of blocks (from, to); `slice` bytes a head.
template <bool Copy, bool Sum>
__device__ __forceinline__ void take_extent(const Extents& from, const Extents& to, u32 slice, u32 heads, const u32* pairs,
                                            const u8* source, u8* target, u64* sums) {
    __shared__ u64 partial[2][SUM_PIECES][8];
    __shared__ u64 lanes[8];
    __shared__ u32 pair[2];
    begin();
    // The list lies in the host's memory: it is read once for all threads.
    if (threadIdx.x < 2) pair[threadIdx.x] = pairs[blockIdx.x * 2 + threadIdx.x];
    __syncthreads();
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    source += from.first + pair[0] * from.block_stride;
    if (Copy) target += to.first + pair[1] * to.block_stride;
    u32 stripes = slice / 64 * heads, pieces = (stripes + 15) / 16;
    // Four threads take a stripe, two words each: a warp half a piece.
    u32 stripe_of = lane / 4, word = lane % 4 * 2;
    u64 keys[2][2], last_keys[2] = {0, 0}, total = 0;
    if (Sum) {
        for (u32 half = 0; half < 2; half++)
            for (u32 i = 0; i < 2; i++) keys[half][i] = SECRET[stripe_of + half * 8 + word + i];
        for (u32 i = 0; i < 2; i++) last_keys[i] = secret_between(15 + word + i, 1);
        const u64 starts[8] = {0xc2b2ae3dull, 0x9e3779b185ebca87ull, 0xc2b2ae3d27d4eb4full, 0x165667b19e3779f9ull,
                               0x85ebca77c2b2ae63ull, 0x85ebca77ull, 0x27d4eb2f165667c5ull, 0x9e3779b1ull};
#pragma unroll
        for (u32 i = 0; i < 8; i++) total = threadIdx.x == i ? starts[i] : total;
    }
    // A piece of such slices lies in one head, so that places need one division a group.
    bool whole = slice % 1024 == 0;
    for (u32 first = 0; first < pieces; first += SUM_PIECES) {
        u32 turn = first / SUM_PIECES % 2, end = first + SUM_PIECES < pieces ? first + SUM_PIECES : pieces;
        for (u32 piece = first + warp * SUM_GROUP; piece < end; piece += SUM_WARPS * SUM_GROUP) {
            // Where the pieces begin: the first one's head, and the bytes within it.
            u32 heads_of[SUM_GROUP], withins[SUM_GROUP];
            heads_of[0] = whole ? piece * 1024 / slice : 0, withins[0] = piece * 1024 - heads_of[0] * slice;
#pragma unroll
            for (u32 g = 1; g < SUM_GROUP; g++) {
                bool next = whole && withins[g - 1] + 1024 == slice;
                heads_of[g] = heads_of[g - 1] + next, withins[g] = next ? 0 : withins[g - 1] + 1024;
            }
            uint4 values[SUM_GROUP][2];
#pragma unroll
            for (u32 g = 0; g < SUM_GROUP; g++) {
#pragma unroll
                for (u32 half = 0; half < 2; half++) {
                    values[g][half] = {0, 0, 0, 0};
                    u32 at = withins[g] + half * 512 + lane * 16, head = whole ? heads_of[g] : at / slice;
                    if (piece + g < end && (piece + g) * 16 + half * 8 + stripe_of < stripes)
                        values[g][half] = *(const uint4*)(source + head * from.head_stride + (whole ? at : at - head * slice));
                }
            }
            u64 sums_of[2 * SUM_GROUP];
#pragma unroll
            for (u32 g = 0; g < SUM_GROUP; g++) {
                u64 even = 0, odd = 0;
#pragma unroll
                for (u32 half = 0; half < 2; half++) {
                    u32 stripe = (piece + g) * 16 + half * 8 + stripe_of;
                    if (piece + g < end && stripe < stripes) {
                        uint4 value = values[g][half];
                        u32 at = withins[g] + half * 512 + lane * 16, head = whole ? heads_of[g] : at / slice;
                        if (Copy) *(uint4*)(target + head * to.head_stride + (whole ? at : at - head * slice)) = value;
                        if (Sum) {
                            bool is_last = stripe + 1 == stripes;
                            u64 low = (u64)value.x | (u64)value.y << 32, high = (u64)value.z | (u64)value.w << 32;
                            u64 a = low ^ (is_last ? last_keys[0] : keys[half][0]);
                            u64 b = high ^ (is_last ? last_keys[1] : keys[half][1]);
                            even += (a & 0xffffffffull) * (a >> 32) + high;
                            odd += (b & 0xffffffffull) * (b >> 32) + low;
                        }
                    }
                }
                sums_of[2 * g] = even;
                sums_of[2 * g + 1] = odd;
            }
            if (Sum) {
                // Eight sums over eight threads each: every exchange halves what a thread is left with, until it has one.
#pragma unroll
                for (u32 left = SUM_GROUP; left > 0; left /= 2) {
                    bool upper = stripe_of & left;
#pragma unroll
                    for (u32 i = 0; i < left; i++) {
                        u64 mine = upper ? sums_of[left + i] : sums_of[i], given = upper ? sums_of[i] : sums_of[left + i];
                        sums_of[i] = mine + __shfl_xor_sync(~0u, given, (int)(left * 4));
                    }
                }
                u32 of = piece + stripe_of / 2;
                if (of < end) partial[turn][of - first][word + stripe_of % 2] = sums_of[0];
            }
        }
        if (Sum) {
            // The other warps go on with the other half of the memory meanwhile.
            __syncthreads();
            if (threadIdx.x < 8) {
#pragma unroll 8
                for (u32 piece = first; piece < end; piece++) {
                    total += partial[turn][piece - first][threadIdx.x];
                    if (piece < (stripes - 1) / 16) total = (total ^ total >> 47 ^ SECRET[16 + threadIdx.x]) * 0x9e3779b1ull;
                }
            }
        }
    }
    if (!Sum) return;
    if (threadIdx.x < 8) lanes[threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        u64 sum = (u64)stripes * 64 * 0x9e3779b185ebca87ull;
        for (u32 i = 0; i < 4; i++) {
            u64 a = lanes[i * 2] ^ secret_between(1 + i * 2, 3), b = lanes[i * 2 + 1] ^ secret_between(2 + i * 2, 3);
            sum += a * b ^ __umul64hi(a, b);
        }
        sum = (sum ^ sum >> 37) * 0x165667919e3779f9ull;
        sums[blockIdx.x] = sum ^ sum >> 32;
    }
}

// One layer of blocks of another arena into blocks of this one, and its checksums. A grid of pairs.
KERNEL void __launch_bounds__(SUM_WARPS * 32) fetch_extents(Extents from, Extents to, u32 slice, u32 heads, const u32* pairs,
                                                            const u8* source, u8* target, u64* sums) {
    take_extent<true, true>(from, to, slice, heads, pairs, source, target, sums);
}

// The checksums alone; the second block of each pair is not looked at. A grid of pairs.
KERNEL void __launch_bounds__(SUM_WARPS * 32) sum_extents(Extents from, u32 slice, u32 heads, const u32* pairs, const u8* source,
                                                          u64* sums) {
    take_extent<false, true>(from, from, slice, heads, pairs, source, 0, sums);
}

// The copy alone, to measure what the checksums cost. A grid of pairs.
KERNEL void __launch_bounds__(SUM_WARPS * 32) copy_extents(Extents from, Extents to, u32 slice, u32 heads, const u32* pairs,
                                                           const u8* source, u8* target) {
    take_extent<true, false>(from, to, slice, heads, pairs, source, target, 0);
}
