// Products with weights of 8 bits (e4m3: a sign, 4 bits of exponent, 3 of fraction), each of which has a scale. A weight means its
// value times its scale, rounded to bf16, which is what the CPU makes of it when it loads. It becomes that in registers, so that
// a row has the bits that a matrix of bf16 would give it.
//
//     cell = 8 outputs, 64 k: (output, quarter q of 16 bytes), and byte 4 s + j of q is k = 16 s + 2 q + {0, 1, 8, 9}[j]:
//            what one lane hands to the tensor cores in step s
//     memory = (outputs / 32, K / 64, 4) cells, zeros behind either end: a thread block's weights lie one after another
#include "common.cuh"

#define CELL_BYTES 512
// Cells side by side, and their outputs.
#define CELLS 4
#define TILE_OUTPUTS 32
// K that share a scale, where an output has more than one.
#define SCALED_K 128

struct Eights {
    // Each times 2^120, which is what `highest` leaves out.
    const float* scales;
    // Scales of an output: one, or one for every 128 k.
    u32 each;
    // log2 of the outputs that share them.
    u32 shift;
};

// Where the cell of a group of 8 outputs lies, `cell` of `width` along K.
__device__ __forceinline__ u64 cell_of(u32 group, u32 cell, u32 width) {
    return (((u64)(group / CELLS) * width + cell) * CELLS + group % CELLS) * CELL_BYTES;
}

__device__ __forceinline__ const float* scales_of(const Eights& e, u32 output) { return e.scales + (u64)(output >> e.shift) * e.each; }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
// Two weights, exactly.
__device__ __forceinline__ float2 exactly(u16 pair) {
    float2 values;
    asm("{\n.reg .b32 halves;\n.reg .b16 low, high;\ncvt.rn.f16x2.e4m3x2 halves, %2;\nmov.b32 {low, high}, halves;\n"
        "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(values.x), "=f"(values.y)
        : "h"(pair));
    return values;
}

// What a scale is multiplied by to suit `exactly`.
#define OWN_SCALE 7.52316384526264e-37f

// Four weights as two pairs of bf16.
__device__ __forceinline__ void widened(u32 (&pairs)[2], u32 word, float scale) {
    float2 low = exactly((u16)word), high = exactly((u16)(word >> 16));
    pairs[0] = pair_bf16(low.x * scale, low.y * scale);
    pairs[1] = pair_bf16(high.x * scale, high.y * scale);
}
#else
#define OWN_SCALE 1.0f
// The weight in the highest byte, times 2^-120, exactly: its exponent and fraction where a float has them.
__device__ __forceinline__ float highest(u32 word) { return __uint_as_float((u32)((int)word >> 4) & 0x87f00000u); }

__device__ __forceinline__ void widened(u32 (&pairs)[2], u32 word, float scale) {
    pairs[0] = pair_bf16(highest(word << 24) * scale, highest(word << 16) * scale);
    pairs[1] = pair_bf16(highest(word << 8) * scale, highest(word) * scale);
}
#endif

// 64 k of `Wide` times 8 outputs, whose cells lie `apart` bytes from one another, times 16 `High` rows. In every step of 16 k
// `before(k)` comes first.
template <int High, int Wide, class Left, class Before>
__device__ __forceinline__ void multiply_cells(float (&sum)[High][Wide][4], const Left& x, const u8* cells, u32 apart, const float (&scale)[Wide],
                                               int lane, Before before) {
    u32 words[Wide][4];
    float own_scale[Wide];
#pragma unroll
    for (int n = 0; n < Wide; n++) {
        own_scale[n] = scale[n] * OWN_SCALE;
        uint4 own = *(const uint4*)(cells + n * apart + lane * 16);
        words[n][0] = own.x;
        words[n][1] = own.y;
        words[n][2] = own.z;
        words[n][3] = own.w;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        before(k);
        u32 left[High][4];
#pragma unroll
        for (int h = 0; h < High; h++) load_tiles(left[h], x.at(h * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < Wide; n++) {
            u32 right[2];
            widened(right, words[n][k], own_scale[n]);
#pragma unroll
            for (int h = 0; h < High; h++) mma(sum[h][n], left[h], right[0], right[1]);
        }
    }
}

// The same with up to 8 rows as the right operand: two groups of outputs an instruction, (output, row) in `sum`. Changes no sum.
// `x` is this lane's row, of those that follow one another in eights of lanes.
template <int Wide>
__device__ __forceinline__ void multiply_turned(float (&sum)[Wide][4], const u8* x, const u8* cells, const float (&scale)[Wide], int lane) {
    u32 words[Wide][4], right[2][4];
    float own_scale[Wide];
#pragma unroll
    for (int n = 0; n < Wide; n++) {
        own_scale[n] = scale[n] * OWN_SCALE;
        uint4 own = *(const uint4*)(cells + n * CELL_BYTES + lane * 16);
        words[n][0] = own.x;
        words[n][1] = own.y;
        words[n][2] = own.z;
        words[n][3] = own.w;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) load_tiles(right[half], x + half * 64 + lane / 8 * 16);
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int n = 0; n < Wide; n += 2) {
            u32 low[2], high[2];
            widened(low, words[n][k], own_scale[n]);
            widened(high, words[n + 1][k], own_scale[n + 1]);
            u32 left[4] = {low[0], high[0], low[1], high[1]};
            mma(sum[n / 2], left, right[k / 2][k % 2 * 2], right[k / 2][k % 2 * 2 + 1]);
        }
    }
}

#define EIGHT_ROWS 16
#define EIGHT_OUTPUTS 32
#define EIGHT_STAGES 6

// 16 rows and 32 outputs a thread block, 8 outputs a warp.
//
//     stage = (two of 64 k, 16 rows, 64 k) of x, then (4 of 8 outputs, two of 64 k) cells: 8 KiB
template <bool Segmented, class Tile>
__device__ __forceinline__ void multiply_eights_tile(const Matmul& a, const Eights& e, const Tile& tile, u8* shared) {
    constexpr u32 XBytes = EIGHT_ROWS * SCALED_K * 2, StageBytes = XBytes + EIGHT_OUTPUTS * SCALED_K;
    u32 output = blockIdx.y * EIGHT_OUTPUTS;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 stages = (a.depth + SCALED_K - 1) / SCALED_K, steps = a.depth / 16, width = a.depth / STEP_K;
    auto load_cells = [&](u32 s) {
        for (u32 i = threadIdx.x; i < EIGHT_OUTPUTS * SCALED_K / 16; i += 128) {
            u32 n = output + i / 64 * 8, cell = s * 2 + i / 32 % 2;
            bool present = n < a.outputs && cell < width;
            u64 at = present ? cell_of(n / 8, cell, width) + i % 32 * 16 : 0;
            copy_async(shared + s % EIGHT_STAGES * StageBytes + XBytes + i * 16, (const u8*)a.w + at, present);
        }
    };
    auto load_x = [&](u32 s) {
        for (u32 i = threadIdx.x; i < EIGHT_ROWS * SCALED_K / 8; i += 128) {
            u32 half = i / (EIGHT_ROWS * PARTS), r = i / PARTS % EIGHT_ROWS, k = s * SCALED_K + half * STEP_K + i % PARTS * 8;
            bool present = tile.first + r < tile.end && k < a.depth;
            u8* to = shared + s % EIGHT_STAGES * StageBytes + half * (XBytes / 2) + tile_at<PARTS>(r, i % PARTS);
            copy_async(to, a.x + (present ? (u64)tile.of(tile.first + r) * a.x_stride + k : 0), present);
        }
    };
    u32 own = output + warp * 8 + lane / 4;
    const float* scales = scales_of(e, own < a.outputs ? own : a.outputs - 1);
    float scale[1], next = scales[0];
    float sum[1][1][4] = {{{0.0f, 0.0f, 0.0f, 0.0f}}};
    Held<1, Segmented> held;
    u32 segment = 0;

    // Weights do not wait for the kernel before.
    let_next_begin();
#pragma unroll
    for (u32 s = 0; s < EIGHT_STAGES - 1; s++) {
        if (s < stages) load_cells(s);
    }
    after_previous();
#pragma unroll
    for (u32 s = 0; s < EIGHT_STAGES - 1; s++) {
        if (s < stages) load_x(s);
        copy_commit();
    }
    for (u32 s = 0; s < stages; s++) {
        copy_wait<EIGHT_STAGES - 2>();
        __syncthreads();
        if (s + EIGHT_STAGES - 1 < stages) {
            load_x(s + EIGHT_STAGES - 1);
            load_cells(s + EIGHT_STAGES - 1);
        }
        copy_commit();
        scale[0] = next;
        if (s + 1 < e.each) next = scales[s + 1];
        const u8* x = shared + s % EIGHT_STAGES * StageBytes;
        const u8* cells = x + XBytes + warp * 2 * CELL_BYTES;
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            u32 step = (s * 2 + half) * 4;
            if (step >= steps) break;
            multiply_cells<1, 1>(sum, ExchangedRows{x + half * (XBytes / 2)}, cells + half * CELL_BYTES, 0, scale, lane, [&](int k) {
                if constexpr (Segmented) {
                    for (; segment < SEGMENTS && segment_at(steps, segment + 1) == step + k; segment++) fold(held, sum[0], segment);
                }
            });
        }
    }
    if (Segmented) {
        for (; segment < SEGMENTS; segment++) fold(held, sum[0], segment);
    }
    copy_wait<0>();
    float* y = a.y + (u64)tile.before() * a.outputs;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 r = tile.first + lane / 4 + i / 2 * 8, n = output + warp * 8 + lane % 4 * 2 + i % 2;
        if (r < tile.end && n < a.outputs) y[(u64)r * a.outputs + n] = a.bias ? sum[0][0][i] + a.bias[n] : sum[0][0][i];
    }
}

template <bool Segmented> __device__ __forceinline__ void multiply_eights(const Matmul& a, const Eights& e, u8* shared) {
    SameRows tile = {blockIdx.x * EIGHT_ROWS, a.rows};
    multiply_eights_tile<Segmented>(a, e, tile, shared);
}

// 128 threads, 48 KiB.
KERNEL void __launch_bounds__(128) matmul_f8(Matmul a, Eights e) {
    DYNAMIC_SHARED(shared);
    multiply_eights<false>(a, e, shared);
}
KERNEL void __launch_bounds__(128) matmul_segmented_f8(Matmul a, Eights e) {
    DYNAMIC_SHARED(shared);
    multiply_eights<true>(a, e, shared);
}

// The whole matrix as bf16, (outputs, K), for products of many rows. A warp per cell.
KERNEL void widen_f8(const u8* cells, Eights e, u32 outputs, u32 depth, u16* out) {
    begin();
    u32 width = depth / STEP_K, cell = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    u32 lane = threadIdx.x % 32, column = cell / CELLS % width, group = cell / CELLS / width * CELLS + cell % CELLS;
    u32 n = group * 8 + lane / 4, k = column * STEP_K + lane % 4 * 2;
    if (n >= outputs) return;
    uint4 own = *(const uint4*)(cells + (u64)cell * CELL_BYTES + lane * 16);
    u32 words[4] = {own.x, own.y, own.z, own.w};
    float scale = scales_of(e, n)[e.each > 1 ? k / SCALED_K : 0] * OWN_SCALE;
    u32* to = (u32*)(out + (u64)n * depth + k);
#pragma unroll
    for (int s = 0; s < 4; s++) {
        u32 pairs[2];
        widened(pairs, words[s], scale);
        to[s * 8] = pairs[0];
        to[s * 8 + 4] = pairs[1];
    }
}
