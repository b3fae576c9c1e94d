// Mixtures of experts: where each row goes, the matmuls of all experts at once, and the sum of what a row gets. A share is one row's
// visit to one expert. Shares lie by expert, then by row, and a tile of a matmul is a run of one expert's, so that a share's bits
// are those of its row alone. How many runs there are is known on the GPU only: as many thread blocks are launched as there could
// be, and those without a run return.
//
//     chosen, weights, places = (row, its experts by id): the expert, its weight, where the share lies
//     rows = (share): the row
#include "common.cuh"

#define EXPERTS_MAX 1024

// Shares from `first` to `end` of one expert, no more than a tile has rows.
struct Run {
    u32 expert;
    u32 first;
    u32 end;
};

struct Shares {
    u32* chosen;
    float* weights;
    u32* places;
    u32* rows;
    u32* run_count;
    Run* runs;
    u32 count;
    u32 experts;
    // Experts of a row.
    u32 used;
    // Shares of a run at most.
    u32 tile_rows;
};

// Integers in the order of `f32::total_cmp`.
__device__ __forceinline__ int total_order(float x) {
    int bits = (int)__float_as_uint(x);
    return bits ^ (int)((u32)(bits >> 31) >> 1);
}

#define ROUTE_THREADS 128

// A row's experts and their weights: operation by operation `route` of kernels/src/route.rs. A grid of rows.
KERNEL void __launch_bounds__(ROUTE_THREADS) route(Shares s, const float* logits, u32 over_chosen) {
    __shared__ float values[EXPERTS_MAX], parts[EXPERTS_MAX];
    __shared__ u32 ranks[EXPERTS_MAX];
    begin();
    const float* row = logits + (u64)blockIdx.x * s.experts;
    for (u32 i = threadIdx.x; i < s.experts; i += ROUTE_THREADS) values[i] = row[i];
    __syncthreads();
    for (u32 i = threadIdx.x; i < s.experts; i += ROUTE_THREADS) {
        int own = total_order(values[i]);
        u32 rank = 0;
        float max = -INFINITE;
        for (u32 other = 0; other < s.experts; other++) {
            int order = total_order(values[other]);
            rank += order > own || (order == own && other < i);
            max = larger(values[other], max);
        }
        ranks[i] = rank;
        parts[i] = exp_of(values[i] - max);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < s.experts; i += ROUTE_THREADS) {
        if (ranks[i] >= s.used) continue;
        u32 slot = 0;
        float sum = 0.0f;
        for (u32 other = 0; other < s.experts; other++) {
            bool taken = ranks[other] < s.used;
            slot += taken && other < i;
            if (taken || !over_chosen) sum += parts[other];
        }
        u32 at = blockIdx.x * s.used + slot;
        s.chosen[at] = i;
        s.weights[at] = parts[i] / sum;
    }
}

#define SORT_THREADS 256

// Where shares lie, and their runs. A thread block per expert finds its own shares: a thread looks at some that follow one another.
KERNEL void __launch_bounds__(SORT_THREADS) sort_shares(Shares s) {
    __shared__ u32 counts[EXPERTS_MAX];
    __shared__ u32 of_warps[SORT_THREADS / 32];
    // Shares and runs of the experts before.
    __shared__ u32 shares_before, runs_before;
    begin();
    u32 expert = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (u32 i = threadIdx.x; i < s.experts; i += SORT_THREADS) counts[i] = 0;
    if (threadIdx.x == 0) shares_before = runs_before = 0;
    __syncthreads();
    u32 first = (u32)((u64)s.count * threadIdx.x / SORT_THREADS);
    u32 end = (u32)((u64)s.count * (threadIdx.x + 1) / SORT_THREADS);
    u32 own = 0;
    // Sums of integers, which are the same in any order.
    for (u32 i = first; i < end; i++) {
        u32 chosen = s.chosen[i];
        atomicAdd(&counts[chosen], 1u);
        own += chosen == expert;
    }
    u32 until = own;
#pragma unroll
    for (u32 distance = 1; distance < 32; distance *= 2) {
        u32 other = __shfl_up_sync(~0u, until, (int)distance);
        if (lane >= distance) until += other;
    }
    if (lane == 31) of_warps[warp] = until;
    __syncthreads();
    for (u32 i = threadIdx.x; i < expert; i += SORT_THREADS) {
        atomicAdd(&shares_before, counts[i]);
        atomicAdd(&runs_before, (counts[i] + s.tile_rows - 1) / s.tile_rows);
    }
    __syncthreads();
    u32 place = shares_before + until - own;
    for (u32 i = 0; i < warp; i++) place += of_warps[i];
    for (u32 i = first; i < end; i++) {
        if (s.chosen[i] != expert) continue;
        s.rows[place] = i / s.used;
        s.places[i] = place++;
    }
    u32 shares_end = shares_before + counts[expert], runs = (counts[expert] + s.tile_rows - 1) / s.tile_rows;
    for (u32 i = threadIdx.x; i < runs; i += SORT_THREADS) {
        u32 from = shares_before + i * s.tile_rows, to = from + s.tile_rows;
        Run run = {expert, from, to < shares_end ? to : shares_end};
        s.runs[runs_before + i] = run;
    }
    if (expert == s.experts - 1 && threadIdx.x == 0) *s.run_count = runs_before + runs;
}

// A run's shares from 0 on, which are any rows of x. Where it begins in y is read when it is needed, for the sake of registers.
struct RowsOfShares {
    u32 first, end;
    const u32* rows;
    const Run* run;
    __device__ __forceinline__ u32 of(u32 share) const { return rows[share]; }
    __device__ __forceinline__ u32 before() const { return run->first; }
};

// This thread block's run as a tile whose rows of x are those of its shares, kept in `rows`; it ends at 0 if there is none.
__device__ __forceinline__ RowsOfShares rows_of_run(const Shares& s, u32* rows, u32& expert) {
    RowsOfShares tile = {0, 0, rows, s.runs + blockIdx.x};
    if (blockIdx.x >= *s.run_count) return tile;
    Run run = *tile.run;
    for (u32 i = threadIdx.x; i < run.end - run.first; i += blockDim.x) rows[i] = s.rows[run.first + i];
    __syncthreads();
    expert = run.expert;
    tile.end = run.end - run.first;
    return tile;
}

// The same, with the shares themselves as rows of x.
__device__ __forceinline__ SameRows shares_of_run(const Shares& s, u32& expert) {
    SameRows tile = {0, 0};
    if (blockIdx.x >= *s.run_count) return tile;
    Run run = s.runs[blockIdx.x];
    expert = run.expert;
    tile.first = run.first;
    tile.end = run.end;
    return tile;
}

template <bool Segmented> __device__ __forceinline__ auto tile_of_run(const Shares& s, u32* rows, u32& expert) {
    if constexpr (Segmented) return shares_of_run(s, expert);
    else return rows_of_run(s, rows, expert);
}

// y (share, outputs) = x (its row, K) . W^T of its expert, or, with segments, x (share, K). W is (expert, outputs, K). A grid of (runs
// that there could be, outputs / those of a tile).
template <int TileRows, int TileOutputs, int WarpRows, int WarpOutputs, int Stages, bool Segmented>
__device__ __forceinline__ void multiply_shares(Matmul& a, const Shares& s, u8* shared) {
    __shared__ u32 rows[TileRows];
    u32 expert = 0;
    begin();
    auto tile = tile_of_run<Segmented>(s, rows, expert);
    if (tile.end == 0) return;
    a.w += (u64)expert * a.outputs * a.depth;
    multiply_tile<TileRows, TileOutputs, WarpRows, WarpOutputs, Stages, Segmented>(a, tile, shared);
}

// The same over weights of 8 bits. The outputs of an expert are a multiple of 32, so that its cells lie one after another.
template <bool Segmented> __device__ __forceinline__ void multiply_shares_of_eights(Matmul& a, Eights& e, const Shares& s, u8* shared) {
    __shared__ u32 rows[EIGHT_ROWS];
    u32 expert = 0;
    begin();
    auto tile = tile_of_run<Segmented>(s, rows, expert);
    if (tile.end == 0) return;
    a.w = (const u16*)((const u8*)a.w + (u64)expert * a.outputs * a.depth);
    e.scales += (u64)(expert * (a.outputs >> e.shift)) * e.each;
    multiply_eights_tile<Segmented>(a, e, tile, shared);
}

// Threads and shared memory as those of matmul.cu and matmul_f8.cu.
KERNEL void __launch_bounds__(64) matmul_experts_16(Matmul a, Shares s) {
    DYNAMIC_SHARED(shared);
    multiply_shares<16, 32, 1, 2, 8, false>(a, s, shared);
}
KERNEL void __launch_bounds__(64) matmul_segmented_experts_16(Matmul a, Shares s) {
    DYNAMIC_SHARED(shared);
    multiply_shares<16, 32, 1, 2, 8, true>(a, s, shared);
}
KERNEL void __launch_bounds__(128, 2) matmul_experts_64(Matmul a, Shares s) {
    DYNAMIC_SHARED(shared);
    multiply_shares<64, 64, 2, 2, 4, false>(a, s, shared);
}
KERNEL void __launch_bounds__(128, 2) matmul_segmented_experts_64(Matmul a, Shares s) {
    DYNAMIC_SHARED(shared);
    multiply_shares<64, 64, 2, 2, 4, true>(a, s, shared);
}
KERNEL void __launch_bounds__(256) matmul_experts_128(Matmul a, Shares s) {
    DYNAMIC_SHARED(shared);
    multiply_shares<128, 128, 2, 4, 3, false>(a, s, shared);
}
KERNEL void __launch_bounds__(256) matmul_segmented_experts_128(Matmul a, Shares s) {
    DYNAMIC_SHARED(shared);
    multiply_shares<128, 64, 4, 2, 4, true>(a, s, shared);
}

KERNEL void __launch_bounds__(128) matmul_experts_f8(Matmul a, Eights e, Shares s) {
    DYNAMIC_SHARED(shared);
    multiply_shares_of_eights<false>(a, e, s, shared);
}
KERNEL void __launch_bounds__(128) matmul_segmented_experts_f8(Matmul a, Eights e, Shares s) {
    DYNAMIC_SHARED(shared);
    multiply_shares_of_eights<true>(a, e, s, shared);
}

// out (row, width) = the sum of what its experts made of it, by their ids, each multiplied and added in one rounding. A grid of
// (rows, width / threads).
KERNEL void mix_rows(Shares s, const float* y, u32 width, float* out) {
    begin();
    u32 i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= width) return;
    float sum = 0.0f;
    for (u32 slot = 0; slot < s.used; slot++) {
        u32 at = blockIdx.x * s.used + slot;
        sum = fmaf(s.weights[at], y[(u64)s.places[at] * width + i], sum);
    }
    out[(u64)blockIdx.x * width + i] = sum;
}
