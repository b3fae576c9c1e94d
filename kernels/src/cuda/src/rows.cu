// Kernels that work row by row: embedding, residual and norm, rotation with the cache's write, SiLU. One thread block per
// row, each sum in one order, so that a row's bits are its own.
#include "common.cuh"

// x (rows, hidden) = rows `ids` of table (vocab, stride).
KERNEL void embed(const u32* ids, const u16* table, int stride, int hidden, float* x) {
    begin();
    const u16* from = table + (u64)ids[blockIdx.x] * stride;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) x[(u64)blockIdx.x * hidden + i] = of_bf16(from[i]);
}

// Fours of values that a thread of `add_rms_norm` keeps in registers: rows up to 8192 wide are read once.
#define NORM_THREADS 512
#define KEPT 4

__device__ __forceinline__ float4 sum_of(float4 a, float4 b) {
    float4 sum = {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
    return sum;
}

__device__ __forceinline__ float squares_of(float4 a, float sum) {
    return fmaf(a.w, a.w, fmaf(a.z, a.z, fmaf(a.y, a.y, fmaf(a.x, a.x, sum))));
}

__device__ __forceinline__ void norm_wide(float* row, const float* more, const float* weight, int width, float eps, u16* to) {
    const float4* by = (const float4*)weight;
    float4 kept[KEPT], factor[KEPT];
    // Weights do not wait for the kernel before.
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
        int i = threadIdx.x + j * NORM_THREADS;
        if (i < width / 4) factor[j] = by[i];
    }
    after_previous();
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
        int i = threadIdx.x + j * NORM_THREADS;
        if (i < width / 4) kept[j] = ((float4*)row)[i];
    }
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
        int i = threadIdx.x + j * NORM_THREADS;
        if (i >= width / 4) continue;
        if (more) ((float4*)row)[i] = kept[j] = sum_of(kept[j], ((const float4*)more)[i]);
        squares = squares_of(kept[j], squares);
    }
    float scale = 1.0f / sqrtf(block_sum<NORM_THREADS / 32>(squares) / (float)width + eps);
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
        int i = threadIdx.x + j * NORM_THREADS;
        if (i >= width / 4) continue;
        u32* pair = (u32*)(to + i * 4);
        pair[0] = pair_bf16(kept[j].x * scale * factor[j].x, kept[j].y * scale * factor[j].y);
        pair[1] = pair_bf16(kept[j].z * scale * factor[j].z, kept[j].w * scale * factor[j].w);
    }
}

// x += delta, unless it is null; out = x / sqrt(mean(x^2) + eps) . weight. 512 threads.
KERNEL void add_rms_norm(float* x, const float* delta, const float* weight, int width, float eps, u16* out, int stride) {
    let_next_begin();
    float* row = x + (u64)blockIdx.x * width;
    const float* more = delta ? delta + (u64)blockIdx.x * width : (const float*)0;
    u16* to = out + (u64)blockIdx.x * stride;
    if (width % 4 == 0 && width <= 4 * KEPT * NORM_THREADS) {
        norm_wide(row, more, weight, width, eps, to);
        return;
    }
    after_previous();
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += NORM_THREADS) {
        float value = row[i];
        if (more) row[i] = value = value + more[i];
        squares = fmaf(value, value, squares);
    }
    float scale = 1.0f / sqrtf(block_sum<NORM_THREADS / 32>(squares) / (float)width + eps);
    // A thread reads what it wrote itself.
    for (int i = threadIdx.x; i < width; i += NORM_THREADS) to[i] = to_bf16(row[i] * scale * weight[i]);
}

__device__ __forceinline__ float gated(float gate, float up) { return gate / (1.0f + exp_of(-gate)) * up; }

// out (rows, stride) = silu(gate) . up for rows of (gate | up), each `width` wide. Four values a thread.
KERNEL void silu_mul(const float* gate_up, int width, u16* out, int stride) {
    begin();
    const float* gate = gate_up + (u64)blockIdx.x * 2 * width;
    u16* to = out + (u64)blockIdx.x * stride;
    int i = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    if (width % 4 == 0) {
        if (i >= width) return;
        float4 g = *(const float4*)(gate + i), up = *(const float4*)(gate + width + i);
        u32* pair = (u32*)(to + i);
        pair[0] = pair_bf16(gated(g.x, up.x), gated(g.y, up.y));
        pair[1] = pair_bf16(gated(g.z, up.z), gated(g.w, up.w));
        return;
    }
    for (int end = i + 4 < width ? i + 4 : width; i < end; i++) to[i] = to_bf16(gated(gate[i], gate[width + i]));
}

// What `rope_store` needs besides its rows.
struct Rope {
    Layout layout;
    u32 layer;
    u32 heads;
    float eps;
    // Elements between rows of q.
    u32 q_stride;
};

// Halves of a head that a lane holds at most: head_dim up to 256.
#define HALF_PARTS 4

// Optional norm and rotation of one head by one warp, in place: lane i holds dimensions i, i + 32, ... of each half, zeros
// behind its end.
__device__ __forceinline__ void turn(float (&low)[HALF_PARTS], float (&high)[HALF_PARTS], const float* norm, float eps, int dim,
                                     const float2 (&turns)[HALF_PARTS], int lane) {
    if (norm) {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < HALF_PARTS; i++) squares = fmaf(high[i], high[i], fmaf(low[i], low[i], squares));
        float scale = 1.0f / sqrtf(warp_sum(squares) / (float)dim + eps);
#pragma unroll
        for (int i = 0; i < HALF_PARTS; i++) {
            int at = lane + 32 * i;
            if (at >= dim / 2) continue;
            low[i] = low[i] * scale * norm[at];
            high[i] = high[i] * scale * norm[at + dim / 2];
        }
    }
#pragma unroll
    for (int i = 0; i < HALF_PARTS; i++) {
        int at = lane + 32 * i;
        if (at >= dim / 2) continue;
        float cosine = turns[i].x, sine = turns[i].y, x = low[i], y = high[i];
        low[i] = fmaf(x, cosine, -(y * sine));
        high[i] = fmaf(y, cosine, x * sine);
    }
}

// Splits rows of (q | k | v), normalises and rotates q and k, rounds q into `q`, and writes k and v into the arena.
// `turns` is (position, cos then sin, head_dim / 2); `tables` holds each row's block table from `table_at` on. A warp per head.
KERNEL void rope_store(Rope a, const float* qkv, const u32* positions, const u32* table_at, const u32* tables,
                       const float* turns, const float* q_norm, const float* k_norm, u16* q, u16* arena) {
    let_next_begin();
    u32 row = blockIdx.x, head = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
    int lane = threadIdx.x % 32, dim = a.layout.head_dim;
    u32 position = positions[row], heads = a.heads, kv_heads = a.layout.kv_heads;
    // Where things go and how they turn does not wait for the kernel before.
    float2 rotation[HALF_PARTS];
#pragma unroll
    for (int i = 0; i < HALF_PARTS; i++) {
        int at = lane + 32 * i;
        const float* from = turns + (u64)position * dim + (at < dim / 2 ? at : 0);
        rotation[i].x = from[0];
        rotation[i].y = from[dim / 2];
    }
    u16* to = q + (u64)row * a.q_stride + (u64)head * dim;
    if (head >= heads && head < heads + 2 * kv_heads) {
        u32 half = head < heads + kv_heads ? 0 : 1;
        to = arena + kv_at(a.layout, tables + table_at[row], position, head - heads - half * kv_heads, a.layer, half);
    }
    after_previous();
    if (head < heads + 2 * kv_heads) {
        const float* from = qkv + ((u64)row * (heads + 2 * kv_heads) + head) * dim;
        float low[HALF_PARTS], high[HALF_PARTS];
#pragma unroll
        for (int i = 0; i < HALF_PARTS; i++) {
            int at = lane + 32 * i;
            low[i] = at < dim / 2 ? from[at] : 0.0f;
            high[i] = at < dim / 2 ? from[at + dim / 2] : 0.0f;
        }
        if (head < heads + kv_heads) turn(low, high, head < heads ? q_norm : k_norm, a.eps, dim, rotation, lane);
#pragma unroll
        for (int i = 0; i < HALF_PARTS; i++) {
            int at = lane + 32 * i;
            if (at >= dim / 2) continue;
            to[at] = to_bf16(low[i]);
            to[at + dim / 2] = to_bf16(high[i]);
        }
    }
}

// Rows `kept` of x (rows, width of 4-byte words), packed.
KERNEL void keep_rows(const u32* x, const u32* kept, int width, u32* out) {
    begin();
    const u32* from = x + (u64)kept[blockIdx.x] * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[(u64)blockIdx.x * width + i] = from[i];
}
