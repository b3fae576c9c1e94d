// y (rows, outputs) = x (rows, K) . W^T (outputs, K) on tensor cores, the same bits for a row whatever the rows beside it: an
// output is one chain of m16n8k16 instructions over k in order, or eight such chains, one per segment of K, whose sums are
// added as ((0+1)+(2+3))+((4+5)+(6+7)). The kernels differ in tile only, which changes no chain.
//
//     stage = (tile_rows, 64 k) of x, then (tile_outputs, 64 k) of W: 128 bytes a row, parts exchanged (tile_at)
//
// K is a multiple of 64 in memory, zeros behind the real end.
#include "common.cuh"

#define STEP_K 64
#define PARTS 8
#define SEGMENTS 8

struct Matmul {
    const u16* x;
    const u16* w;
    const float* bias;
    float* y;
    // Elements between rows of x; W's is `depth`.
    u32 x_stride;
    u32 rows;
    u32 outputs;
    u32 depth;
    // Whether the kernel before makes W.
    u32 fresh;
};

// First step (of 16 k) of a segment.
__device__ __forceinline__ u32 segment_at(u32 steps, u32 segment) { return (u32)((u64)steps * segment / SEGMENTS); }

// Rows of 64 k in shared memory, whose parts are exchanged.
struct ExchangedRows {
    const u8* first;
    __device__ __forceinline__ const u8* at(int row, int part) const { return first + tile_at<PARTS>(row, part); }
};

// The rows of a tile, which begin at `first`: those behind `end` are none. They are the same rows of x and of y.
struct SameRows {
    u32 first, end;
    __device__ __forceinline__ u32 of(u32 row) const { return row; }
    // Rows of y before that of 0.
    __device__ __forceinline__ u32 before() const { return 0; }
};

template <int Rows, int Threads, class Tile>
__device__ __forceinline__ void load_rows(const Matmul& a, const Tile& tile, u8* stage, u32 k) {
    for (int i = threadIdx.x; i < Rows * PARTS; i += Threads) {
        u32 r = tile.first + i / PARTS;
        bool present = r < tile.end;
        copy_async(stage + tile_at<PARTS>(i / PARTS, i % PARTS), a.x + (u64)(present ? tile.of(r) : 0) * a.x_stride + k + i % PARTS * 8,
                   present);
    }
}

template <int Outputs, int Threads>
__device__ __forceinline__ void load_weights(const Matmul& a, u8* stage, u32 output, u32 k) {
    for (int i = threadIdx.x; i < Outputs * PARTS; i += Threads) {
        u32 n = output + i / PARTS;
        bool present = n < a.outputs;
        copy_async(stage + tile_at<PARTS>(i / PARTS, i % PARTS), a.w + (u64)(present ? n : 0) * a.depth + k + i % PARTS * 8,
                   present);
    }
}

// Sums of finished segments that wait for their neighbours: of one, of two and of four.
template <int Tiles, bool Segmented> struct Held {
    float one[Tiles][4], two[Tiles][4], four[Tiles][4];
};
template <int Tiles> struct Held<Tiles, false> {};

// Takes in the sum of a segment; after the last one, `sum` holds the whole.
template <int Tiles> __device__ __forceinline__ void fold(Held<Tiles, true>& held, float (&sum)[Tiles][4], u32 segment) {
#pragma unroll
    for (int t = 0; t < Tiles; t++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float s = sum[t][i];
            if (segment % 2 == 0) {
                held.one[t][i] = s;
            } else {
                s = held.one[t][i] + s;
                if (segment % 4 == 1) {
                    held.two[t][i] = s;
                } else {
                    s = held.two[t][i] + s;
                    if (segment % 8 == 3) held.four[t][i] = s;
                    else s = held.four[t][i] + s;
                }
            }
            sum[t][i] = segment == SEGMENTS - 1 ? s : 0.0f;
        }
    }
}
template <int Tiles> __device__ __forceinline__ void fold(Held<Tiles, false>&, float (&)[Tiles][4], u32) {}

// A warp computes (TileRows / WarpRows) x (TileOutputs / WarpOutputs) outputs of the thread block's tile.
template <int TileRows, int TileOutputs, int WarpRows, int WarpOutputs, int Stages, bool Segmented, class Tile>
__device__ __forceinline__ void multiply_tile(const Matmul& a, const Tile& tile, u8* shared) {
    constexpr int Threads = 32 * WarpRows * WarpOutputs;
    constexpr int High = TileRows / WarpRows / 16, Wide = TileOutputs / WarpOutputs / 8;
    constexpr int StageBytes = (TileRows + TileOutputs) * STEP_K * 2, WeightsAt = TileRows * STEP_K * 2;
    static_assert(High >= 1 && Wide % 2 == 0, "a warp's tile is a multiple of 16 x 16");
    u32 output = blockIdx.y * TileOutputs;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int warp_row = warp / WarpOutputs * High * 16, warp_output = warp % WarpOutputs * Wide * 8;
    u32 stages = a.depth / STEP_K, steps = a.depth / 16;

    float sum[High * Wide][4];
#pragma unroll
    for (int t = 0; t < High * Wide; t++) {
#pragma unroll
        for (int i = 0; i < 4; i++) sum[t][i] = 0.0f;
    }
    Held<High * Wide, Segmented> held;
    u32 segment = 0;

    // Weights do not wait for the kernel before, unless it makes them.
    let_next_begin();
    if (a.fresh) after_previous();
#pragma unroll
    for (u32 s = 0; s < Stages - 1; s++) {
        if (s < stages) load_weights<TileOutputs, Threads>(a, shared + s * StageBytes + WeightsAt, output, s * STEP_K);
    }
    after_previous();
#pragma unroll
    for (u32 s = 0; s < Stages - 1; s++) {
        if (s < stages) load_rows<TileRows, Threads>(a, tile, shared + s * StageBytes, s * STEP_K);
        copy_commit();
    }
    for (u32 s = 0; s < stages; s++) {
        copy_wait<Stages - 2>();
        __syncthreads();
        // The stage that everyone has left takes in the next loads.
        u32 next = s + Stages - 1;
        if (next < stages) {
            u8* stage = shared + next % Stages * StageBytes;
            load_rows<TileRows, Threads>(a, tile, stage, next * STEP_K);
            load_weights<TileOutputs, Threads>(a, stage + WeightsAt, output, next * STEP_K);
        }
        copy_commit();
        const u8* x = shared + s % Stages * StageBytes;
        const u8* w = x + WeightsAt;
#pragma unroll
        for (int k = 0; k < STEP_K / 16; k++) {
            if (Segmented) {
                for (; segment < SEGMENTS && segment_at(steps, segment + 1) == s * (STEP_K / 16) + k; segment++)
                    fold(held, sum, segment);
            }
            u32 left[High][4];
#pragma unroll
            for (int h = 0; h < High; h++)
                load_tiles(left[h], x + tile_at<PARTS>(warp_row + h * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
            for (int n = 0; n < Wide / 2; n++) {
                u32 right[4];
                load_tiles(right, w + tile_at<PARTS>(warp_output + n * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
                for (int h = 0; h < High; h++) {
                    mma(sum[h * Wide + n * 2], left[h], right[0], right[1]);
                    mma(sum[h * Wide + n * 2 + 1], left[h], right[2], right[3]);
                }
            }
        }
    }
    if (Segmented) {
        for (; segment < SEGMENTS; segment++) fold(held, sum, segment);
    }
    copy_wait<0>();

    float* y = a.y + (u64)tile.before() * a.outputs;
#pragma unroll
    for (int t = 0; t < High * Wide; t++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 r = tile.first + warp_row + t / Wide * 16 + lane / 4 + i / 2 * 8;
            u32 n = output + warp_output + t % Wide * 8 + lane % 4 * 2 + i % 2;
            if (r < tile.end && n < a.outputs) y[(u64)r * a.outputs + n] = a.bias ? sum[t][i] + a.bias[n] : sum[t][i];
        }
    }
}

template <int TileRows, int TileOutputs, int WarpRows, int WarpOutputs, int Stages, bool Segmented>
__device__ __forceinline__ void multiply(const Matmul& a, u8* shared) {
    SameRows tile = {blockIdx.x * TileRows, a.rows};
    multiply_tile<TileRows, TileOutputs, WarpRows, WarpOutputs, Stages, Segmented>(a, tile, shared);
}

// Few rows: bound by reading W. 64 threads, 48 KiB.
KERNEL void __launch_bounds__(64) matmul_16(Matmul a) {
    DYNAMIC_SHARED(shared);
    multiply<16, 32, 1, 2, 8, false>(a, shared);
}
KERNEL void __launch_bounds__(64) matmul_segmented_16(Matmul a) {
    DYNAMIC_SHARED(shared);
    multiply<16, 32, 1, 2, 8, true>(a, shared);
}
// 128 threads, 64 KiB.
KERNEL void __launch_bounds__(128, 2) matmul_64(Matmul a) {
    DYNAMIC_SHARED(shared);
    multiply<64, 64, 2, 2, 4, false>(a, shared);
}
KERNEL void __launch_bounds__(128, 2) matmul_segmented_64(Matmul a) {
    DYNAMIC_SHARED(shared);
    multiply<64, 64, 2, 2, 4, true>(a, shared);
}
// Many rows: bound by arithmetic. 256 threads, 96 KiB.
KERNEL void __launch_bounds__(256) matmul_128(Matmul a) {
    DYNAMIC_SHARED(shared);
    multiply<128, 128, 2, 4, 3, false>(a, shared);
}
KERNEL void __launch_bounds__(256) matmul_segmented_128(Matmul a) {
    DYNAMIC_SHARED(shared);
    multiply<128, 64, 4, 2, 4, true>(a, shared);
}
