// Causal attention over the paged cache. Per logical block of 64 positions, counted from position 0, a row has a partial
// (largest score, sum of exponentials, weighted sum of values); a row's partials are merged in block order (Dao et al. 2022,
// "FlashAttention", section 3.1). Prefill merges as it goes, decode writes partials and merges them in a second kernel: both
// by the same functions below, so that a row has the same bits either way.
//
// Query heads of one KV head are packed: the rows of a 16-row tile are (token, head of the group).
#include "common.cuh"

#define BLOCK 64
#define MERGED_AT_ONCE 16

struct Attention {
    Layout layout;
    u32 layer;
    // Query heads, and of them those that read one KV head.
    u32 heads;
    u32 group;
    float scale;
    // Positions a row sees at most, its own included; 0 is all.
    u32 window;
    // Elements between rows of q and of the output.
    u32 stride;
};

// A run of rows of one sequence.
struct Tile {
    u32 row;
    u32 rows;
    u32 position;
    // Where the sequence's block table begins.
    u32 table;
};

__device__ __forceinline__ u32 first_seen(u32 window, u32 position) {
    return window == 0 || position + 1 < window ? 0 : position + 1 - window;
}

// The two rows of a 16-row tile that a lane holds scores of.
struct Seen {
    // First and last position seen; first > last: no row.
    u32 first[2], last[2];
};

// Where one KV head's keys of a layer lie, for one sequence. Values lie `half_elements` behind.
struct Keys {
    const u16* first;
    const u32* table;
    u64 block_elements, half_elements;
    // log2 of a cache block's tokens.
    u32 shift;
};

__device__ __forceinline__ Keys keys_of(const Attention& a, const u16* arena, const u32* table, u32 kv_head) {
    Keys k = {arena + half_at(a.layout, kv_head, a.layer, 0), table, block_elements(a.layout), half_elements(a.layout),
              (u32)(31 - __clz((int)a.layout.block_tokens))};
    return k;
}

// Copies keys (0), values (1) or both (2) of one block of positions into tiles; positions past `last` become zeros.
template <int Dim, int Threads, int What>
__device__ __forceinline__ void load_block(u8* keys, u8* values, const Keys& from, u32 block, u32 last, int thread) {
#pragma unroll
    for (int i = thread; i < BLOCK * Dim / 8; i += Threads) {
        int token = i / (Dim / 8), part = i % (Dim / 8);
        u32 position = block * BLOCK + token;
        bool present = position <= last;
        u32 at = present ? position : last;
        const u16* key = from.first + from.table[at >> from.shift] * from.block_elements +
                         ((at & ((1u << from.shift) - 1)) * Dim + part * 8);
        if (What != 1) copy_async(keys + tile_at<Dim / 8>(token, part), key, present);
        if (What != 0) copy_async(values + tile_at<Dim / 8>(token, part), key + from.half_elements, present);
    }
}

// Asks for one block of positions, of which the kernel before may still write the last ones.
template <int Dim> __device__ __forceinline__ void ask_block(const Keys& from, u32 block, u32 last) {
    u32 tokens = (1u << from.shift) < BLOCK ? 1u << from.shift : BLOCK;
    u32 position = block * BLOCK + threadIdx.x * tokens;
    if (threadIdx.x * tokens >= BLOCK || position > last) return;
    const u16* key = from.first + from.table[position >> from.shift] * from.block_elements + (position & ((1u << from.shift) - 1)) * Dim;
    ask(key, tokens * Dim * 2);
    ask(key + from.half_elements, tokens * Dim * 2);
}

// Queries of a lane's two rows, as the left operand; null is a row of zeros.
template <int Dim> __device__ __forceinline__ void load_queries(u32 (&q)[Dim / 16][4], const u16* row0, const u16* row1, int lane) {
#pragma unroll
    for (int k = 0; k < Dim / 16; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u16* row = i % 2 == 0 ? row0 : row1;
            q[k][i] = row ? *(const u32*)(row + k * 16 + i / 2 * 8 + lane % 4 * 2) : 0u;
        }
    }
}

// A block's largest scores, times log2 e, and sums of a lane's two rows, and the exponentials, rounded, as the left operand of
// the values.
struct Partial {
    float max[2], sum[2];
    u32 weights[BLOCK / 16][4];
};

template <int Dim>
__device__ __forceinline__ Partial scores(const u32 (&q)[Dim / 16][4], const u8* keys, const Seen& seen, u32 block,
                                          float scale, int lane) {
    float s[BLOCK / 8][4];
#pragma unroll
    for (int n = 0; n < BLOCK / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < BLOCK / 16; n++) {
#pragma unroll
        for (int k = 0; k < Dim / 16; k++) {
            u32 right[4];
            load_tiles(right, keys + tile_at<Dim / 8>(n * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
            mma(s[n * 2], q[k], right[0], right[1]);
            mma(s[n * 2 + 1], q[k], right[2], right[3]);
        }
    }
    Partial p;
    float unit = scale * 1.442695041f;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float max = -INFINITE;
        // Most blocks are seen whole.
        if (seen.first[r] > block * BLOCK || seen.last[r] < block * BLOCK + BLOCK - 1) {
#pragma unroll
            for (int n = 0; n < BLOCK / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    u32 position = block * BLOCK + n * 8 + lane % 4 * 2 + i;
                    bool visible = position >= seen.first[r] && position <= seen.last[r];
                    if (!visible) s[n][r * 2 + i] = -INFINITE;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < BLOCK / 8; n++) max = larger(larger(s[n][r * 2], s[n][r * 2 + 1]), max);
        max = larger(max, __shfl_xor_sync(~0u, max, 1));
        max = larger(max, __shfl_xor_sync(~0u, max, 2)) * unit;
        // A row that sees nothing of the block has no weights either.
        float base = max == -INFINITE ? 0.0f : max, sum = 0.0f;
#pragma unroll
        for (int n = 0; n < BLOCK / 8; n++) {
            u32 pair = pair_bf16(exp2_of(fmaf(s[n][r * 2], unit, -base)), exp2_of(fmaf(s[n][r * 2 + 1], unit, -base)));
            p.weights[n / 2][n % 2 * 2 + r] = pair;
            sum += __uint_as_float(pair << 16) + __uint_as_float(pair & 0xffff0000u);
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        p.max[r] = max;
        p.sum[r] = sum;
    }
    return p;
}

// Weighted sum of 16 dimensions of the block's values.
template <int Dim>
__device__ __forceinline__ void values_of(float (&sum)[2][4], const Partial& p, const u8* values, int dims, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) sum[0][i] = sum[1][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < BLOCK / 16; k++) {
        u32 right[4];
        load_tiles_transposed(right, values + tile_at<Dim / 8>(k * 16 + lane / 8 % 2 * 8 + lane % 8, dims * 2 + lane / 16));
        mma(sum[0], p.weights[k], right[0], right[1]);
        mma(sum[1], p.weights[k], right[2], right[3]);
    }
}

// Largest score and sum of the blocks so far.
struct Merged {
    float max, sum;
};

// What the sums so far and those of the next block are multiplied by.
struct Factors {
    float old, fresh;
};

__device__ __forceinline__ Factors merge(Merged& all, float max, float sum) {
    float most = larger(all.max, max);
    Factors f = {exp2_of(all.max - most), exp2_of(max - most)};
    all.sum = fmaf(all.sum, f.old, sum * f.fresh);
    all.max = most;
    return f;
}

__device__ __forceinline__ float merged(float all, float part, const Factors& f) { return fmaf(all, f.old, part * f.fresh); }

// Rows of many tokens: a thread block has up to 64 rows (token, head of the group) of one sequence and KV head. 128 threads.
template <int Dim>
__device__ __forceinline__ void prefill(const Attention& a, const u16* q, const u16* arena, const u32* tables, const Tile* tiles,
                                        u16* out, u8* shared) {
    constexpr int TileBytes = BLOCK * Dim * 2;
    Tile tile = tiles[blockIdx.x];
    u32 kv_head = blockIdx.y;
    Keys cached = keys_of(a, arena, tables + tile.table, kv_head);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Seen seen;
    const u16* from[2];
    u16* to[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        u32 row = warp * 16 + lane / 4 + r * 8, token = row / a.group;
        bool present = token < tile.rows;
        u64 at = (u64)(tile.row + token) * a.stride + (u64)(kv_head * a.group + row % a.group) * Dim;
        from[r] = present ? q + at : (const u16*)0;
        to[r] = present ? out + at : (u16*)0;
        seen.first[r] = present ? first_seen(a.window, tile.position + token) : 1;
        seen.last[r] = present ? tile.position + token : 0;
    }
    u32 queries[Dim / 16][4];
    load_queries<Dim>(queries, from[0], from[1], lane);
    float all[Dim / 8][4];
    Merged state[2] = {{-INFINITE, 0.0f}, {-INFINITE, 0.0f}};
#pragma unroll
    for (int d = 0; d < Dim / 8; d++) {
#pragma unroll
        for (int i = 0; i < 4; i++) all[d][i] = 0.0f;
    }
    u32 last = tile.position + tile.rows - 1;
    u32 block = first_seen(a.window, tile.position) / BLOCK, end = last / BLOCK;
    u32 stage = 0;
    load_block<Dim, 128, 2>(shared, shared + TileBytes, cached, block, last, threadIdx.x);
    copy_commit();
    for (; block <= end; block++, stage ^= 1) {
        if (block < end) {
            u8* next = shared + (stage ^ 1) * 2 * TileBytes;
            load_block<Dim, 128, 2>(next, next + TileBytes, cached, block + 1, last, threadIdx.x);
        }
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        const u8* keys = shared + stage * 2 * TileBytes;
        Partial p = scores<Dim>(queries, keys, seen, block, a.scale, lane);
        Factors f[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            // A block that a row sees nothing of is not one of its blocks.
            f[r].old = 1.0f;
            f[r].fresh = 0.0f;
            if (p.max[r] != -INFINITE) f[r] = merge(state[r], p.max[r], p.sum[r]);
        }
#pragma unroll
        for (int d = 0; d < Dim / 16; d++) {
            float part[2][4];
            values_of<Dim>(part, p, keys + TileBytes, d, lane);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int r = i % 4 / 2;
                float& value = all[d * 2 + i / 4][i % 4];
                if (p.max[r] != -INFINITE) value = merged(value, part[i / 4][i % 4], f[r]);
            }
        }
        __syncthreads();
    }
    copy_wait<0>();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (!to[r]) continue;
        float scale = 1.0f / state[r].sum;
#pragma unroll
        for (int d = 0; d < Dim / 8; d++)
            *(u32*)(to[r] + d * 8 + lane % 4 * 2) = pair_bf16(all[d][r * 2] * scale, all[d][r * 2 + 1] * scale);
    }
}

// Where decode's partials lie: of sequence s, its blocks from the first seen one on begin at `at`.
struct Decode {
    u32 row;
    u32 position;
    u32 table;
    u32 at;
};

// One row per sequence: a thread block has one block of positions of one sequence and KV head, for up to 16 heads of the group.
// 64 threads, whose warps share the loads and halve the dimensions. Partials: (block of the batch, head) of (max, sum) and of
// head_dim values.
template <int Dim>
__device__ __forceinline__ void decode(const Attention& a, const u16* q, const u16* arena, const u32* tables, const Decode* rows,
                                       float* partials, float* values, u8* shared) {
    constexpr int TileBytes = BLOCK * Dim * 2;
    Decode row = rows[blockIdx.z];
    u32 kv_head = blockIdx.y % a.layout.kv_heads, heads_at = blockIdx.y / a.layout.kv_heads * 16;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 first = first_seen(a.window, row.position) / BLOCK, block = first + blockIdx.x;
    u8* keys = shared;
    Keys cached = keys_of(a, arena, tables + row.table, kv_head);
    bool present = block <= row.position / BLOCK;
    if (present) ask_block<Dim>(cached, block, row.position);
    after_previous();
    if (!present) return;
    load_block<Dim, 64, 0>(keys, keys + TileBytes, cached, block, row.position, threadIdx.x);
    copy_commit();
    load_block<Dim, 64, 1>(keys, keys + TileBytes, cached, block, row.position, threadIdx.x);
    copy_commit();
    Seen seen;
    const u16* from[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        u32 head = heads_at + lane / 4 + r * 8;
        bool present = head < a.group;
        from[r] = present ? q + (u64)row.row * a.stride + (u64)(kv_head * a.group + head) * Dim : (const u16*)0;
        seen.first[r] = present ? first_seen(a.window, row.position) : 1;
        seen.last[r] = present ? row.position : 0;
    }
    u32 queries[Dim / 16][4];
    load_queries<Dim>(queries, from[0], from[1], lane);
    copy_wait<1>();
    __syncthreads();
    Partial p = scores<Dim>(queries, keys, seen, block, a.scale, lane);
    u64 at[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        u32 head = kv_head * a.group + heads_at + lane / 4 + r * 8;
        at[r] = (u64)(row.at + block - first) * a.heads + head;
        if (!from[r] || lane % 4 != 0 || warp != 0) continue;
        partials[at[r] * 2] = p.max[r];
        partials[at[r] * 2 + 1] = p.sum[r];
    }
    copy_wait<0>();
    __syncthreads();
#pragma unroll
    for (int half = 0; half < (Dim / 16 + 1) / 2; half++) {
        int d = half * 2 + warp;
        if (d >= Dim / 16) break;
        float part[2][4];
        values_of<Dim>(part, p, keys + TileBytes, d, lane);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int r = i % 4 / 2;
            if (from[r]) values[at[r] * Dim + d * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2] = part[i / 4][i % 4];
        }
    }
}

// Merges a row's partials in block order. One thread per dimension.
KERNEL void attention_merge(Attention a, const Decode* rows, const float* partials, const float* values, u16* out) {
    let_next_begin();
    Decode row = rows[blockIdx.y];
    after_previous();
    u32 head = blockIdx.x, dim = a.layout.head_dim;
    u32 first = first_seen(a.window, row.position) / BLOCK, count = row.position / BLOCK - first + 1;
    const float2* pairs = (const float2*)partials + (u64)row.at * a.heads + head;
    const float* from = values + ((u64)row.at * a.heads + head) * dim + threadIdx.x;
    Merged state = {-INFINITE, 0.0f};
    float all = 0.0f;
    // Some blocks are read at a time, so that their reads do not wait for one another.
    for (u32 i = 0; i < count; i += MERGED_AT_ONCE) {
        float2 pair[MERGED_AT_ONCE];
        float value[MERGED_AT_ONCE];
#pragma unroll
        for (int j = 0; j < MERGED_AT_ONCE; j++) {
            u64 at = (u64)(i + j < count ? i + j : i) * a.heads;
            pair[j] = pairs[at];
            value[j] = from[at * dim];
        }
#pragma unroll
        for (int j = 0; j < MERGED_AT_ONCE; j++) {
            if (i + j >= count) break;
            Factors f = merge(state, pair[j].x, pair[j].y);
            all = merged(all, value[j], f);
        }
    }
    out[(u64)row.row * a.stride + (u64)head * dim + threadIdx.x] = to_bf16(all * (1.0f / state.sum));
}

#define FOR_HEAD_DIM(Dim)                                                                                                   \
    KERNEL void __launch_bounds__(128, 2) attention_prefill_##Dim(Attention a, const u16* q, const u16* arena, const u32* tables, \
                                                               const Tile* tiles, u16* out) {                               \
        DYNAMIC_SHARED(shared);                                                                                             \
        begin();                                                                                                            \
        prefill<Dim>(a, q, arena, tables, tiles, out, shared);                                                              \
    }                                                                                                                       \
    KERNEL void __launch_bounds__(64) attention_decode_##Dim(Attention a, const u16* q, const u16* arena, const u32* tables,  \
                                                             const Decode* rows, float* partials, float* values) {          \
        DYNAMIC_SHARED(shared);                                                                                             \
        let_next_begin();                                                                                                   \
        decode<Dim>(a, q, arena, tables, rows, partials, values, shared);                                                   \
    }

FOR_HEAD_DIM(16)
FOR_HEAD_DIM(32)
FOR_HEAD_DIM(64)
FOR_HEAD_DIM(96)
FOR_HEAD_DIM(128)
