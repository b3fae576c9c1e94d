// matmul.cu's products for many rows on Hopper: the same chains of 16 k, given to the warpgroup's tensor-core instruction
// (wgmma) from shared memory that the copy engine fills. baton doctor --gpu checks that the bits are those of matmul.cu.
//
// A cluster of two thread blocks computes (2 x 128 rows, Outputs): each has 128 rows of its own and loads half of the weights
// for both. In a thread block one thread loads, two warpgroups multiply, 64 rows each; thread blocks stay and take tile after
// tile.
//
//     shared = stages | barriers | sums of two segments
//     stage = 128 rows of x, then `Outputs` rows of W: 64 k, 128 bytes a row, 16-byte parts exchanged as the copy engine does
//
// Outputs are a multiple of 64; K of 64, and of 512 where segments are added.
#include "common.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HOPPER_ROWS 128
#define HOPPER_STEP 64
#define SLAB_BYTES 8192
// Pairs of row tiles whose weights are used together, while they are in the cache.
#define GROUP 8

// What the copy engine knows of a matrix: cuTensorMapEncodeTiled with boxes of 64 x 64.
struct __align__(64) TensorMap {
    u64 opaque[16];
};

__device__ __forceinline__ u32 shared_at(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the same barrier of a thread block of the cluster.
__device__ __forceinline__ void barrier_arrive(u32 barrier, u32 rank) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(rank)
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!done);
}

// 64 rows from `row` on, 64 k from `k` on.
__device__ __forceinline__ void load_slab(u32 to, const TensorMap* map, u32 barrier, u32 k, u32 row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(k), "r"(row)
                 : "memory");
}

// The same, into both thread blocks of the cluster.
__device__ __forceinline__ void load_slab_for_both(u32 to, const TensorMap* map, u32 barrier, u32 k, u32 row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(k), "r"(row), "h"((u16)3)
                 : "memory");
}

// Rows of 128 bytes in shared memory as the tensor cores take them: eight rows are 1024 bytes, parts exchanged.
__device__ __forceinline__ u64 operand(u32 at) {
    return (u64)((at & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Left> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}

// d (64, N) += x (64 rows, 16 k) . w (N rows, 16 k)^T.
__device__ __forceinline__ void wgmma(float (&d)[128], u64 x, u64 w) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, 1, 1, 1, 0, 0;"
        :
          "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),
          "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
          "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),
          "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),
          "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),
          "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
          "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),
          "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),
          "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
        : "l"(x), "l"(w));
}
__device__ __forceinline__ void wgmma(float (&d)[64], u64 x, u64 w) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, 1, 1, 1, 0, 0;"
        :
          "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(x), "l"(w));
}

// Tile number `i`: neighbours share weights.
struct TileAt {
    u32 row_pair, output;
};
__device__ __forceinline__ TileAt tile_of(u32 i, u32 row_pairs, u32 outputs) {
    u32 group = i / (GROUP * outputs) * GROUP, inside = i % (GROUP * outputs);
    u32 size = row_pairs - group < GROUP ? row_pairs - group : GROUP;
    TileAt at = {group + inside % size, inside / size};
    return at;
}

// Where in the ring of stages a thread is.
template <int Stages> struct Ring {
    u32 stage, parity;
    __device__ __forceinline__ void next() {
        if (++stage == Stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Where a thread's values i and i + 1 belong in y, or null.
template <int Outputs> __device__ __forceinline__ float2* place(const Matmul& a, u32 row, u32 output, int i) {
    u32 r = row + i % 4 / 2 * 8, n = output + i / 4 * 8;
    return r < a.rows && n < a.outputs ? (float2*)(a.y + (u64)r * a.outputs + n) : (float2*)0;
}

template <int Outputs, int Stages, bool Segmented>
__device__ __forceinline__ void multiply_on_hopper(const TensorMap* xs, const TensorMap* ws, const Matmul& a, u32 first_row, u8* dynamic) {
    constexpr u32 StageBytes = (HOPPER_ROWS + Outputs) * HOPPER_STEP * 2, WeightsAt = HOPPER_ROWS * HOPPER_STEP * 2;
    constexpr int Values = Outputs / 2, Half = Outputs / 2;
    u32 skip = (1024 - shared_at(dynamic) % 1024) % 1024;
    u32 stages = shared_at(dynamic) + skip, full = stages + Stages * StageBytes, empty = full + 8 * Stages;
    // Sums of two segments: (value, thread).
    float* two = (float*)(dynamic + skip + Stages * StageBytes + 1024) + threadIdx.x % 256;
    u32 rank = cluster_rank(), group = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        for (int s = 0; s < Stages; s++) {
            barrier_init(full + 8 * s, 1);
            // Two warpgroups of two thread blocks.
            barrier_init(empty + 8 * s, 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    cluster_sync();
    begin();

    u32 steps = a.depth / HOPPER_STEP, segment_steps = Segmented ? steps / SEGMENTS : steps;
    u32 row_pairs = (a.rows + 2 * HOPPER_ROWS - 1) / (2 * HOPPER_ROWS), outputs = (a.outputs + Outputs - 1) / Outputs;
    u32 tiles = row_pairs * outputs, clusters = gridDim.x / 2;
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) {
            Ring<Stages> ring = {0, 1};
            for (u32 tile = blockIdx.x / 2; tile < tiles; tile += clusters) {
                TileAt at = tile_of(tile, row_pairs, outputs);
                u32 row = first_row + (at.row_pair * 2 + rank) * HOPPER_ROWS, output = at.output * Outputs + rank * Half;
                for (u32 step = 0; step < steps; step++, ring.next()) {
                    u32 to = stages + ring.stage * StageBytes, barrier = full + 8 * ring.stage, k = step * HOPPER_STEP;
                    barrier_wait(empty + 8 * ring.stage, ring.parity);
                    barrier_expect(barrier, StageBytes);
#pragma unroll
                    for (u32 i = 0; i < HOPPER_ROWS / 64; i++) load_slab(to + i * SLAB_BYTES, xs, barrier, k, row + i * 64);
#pragma unroll
                    for (u32 i = 0; i < Half / 64; i++)
                        load_slab_for_both(to + WeightsAt + (rank * Half / 64 + i) * SLAB_BYTES, ws, barrier, k, output + i * 64);
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        u32 part = group - 1, thread = threadIdx.x % 128, lane = thread % 32;
        Ring<Stages> ring = {0, 0};
        float sum[Values];
        float one[Segmented ? Values : 1];
        for (u32 tile = blockIdx.x / 2; tile < tiles; tile += clusters) {
            TileAt at = tile_of(tile, row_pairs, outputs);
            u32 row = (at.row_pair * 2 + rank) * HOPPER_ROWS + part * 64 + thread / 32 * 16 + lane / 4;
            u32 output = at.output * Outputs + lane % 4 * 2;
#pragma unroll 1
            for (u32 segment = 0; segment < (Segmented ? SEGMENTS : 1); segment++) {
#pragma unroll
                for (int i = 0; i < Values; i++) sum[i] = 0.0f;
                u32 before = 0;
                for (u32 step = 0; step < segment_steps; step++) {
                    barrier_wait(full + 8 * ring.stage, ring.parity);
                    u64 x = operand(stages + ring.stage * StageBytes + part * SLAB_BYTES);
                    u64 w = operand(stages + ring.stage * StageBytes + WeightsAt);
                    wgmma_fence();
#pragma unroll
                    for (int k = 0; k < HOPPER_STEP / 16; k++) wgmma(sum, x + 2 * k, w + 2 * k);
                    wgmma_commit();
                    // The stage before has been read.
                    wgmma_wait<1>();
                    if (step > 0 && thread < 2) barrier_arrive(empty + 8 * before, thread);
                    before = ring.stage;
                    ring.next();
                }
                wgmma_wait<0>();
                if (thread < 2) barrier_arrive(empty + 8 * before, thread);
                if (!Segmented) break;
                // As `fold`, with the sum of four segments in y.
                if (segment % 2 == 0) {
#pragma unroll
                    for (int i = 0; i < Values; i++) one[Segmented ? i : 0] = sum[i];
                } else if (segment % 4 == 1) {
#pragma unroll
                    for (int i = 0; i < Values; i++) two[i * 256] = one[Segmented ? i : 0] + sum[i];
                } else {
                    // Places are found anew each time, lest they take registers all the while.
                    u32 own_row = row, own_output = output;
                    asm volatile("" : "+r"(own_row), "+r"(own_output));
#pragma unroll
                    for (int i = 0; i < Values; i++) sum[i] = two[i * 256] + (one[Segmented ? i : 0] + sum[i]);
#pragma unroll
                    for (int i = 0; i < Values; i += 2) {
                        float2* four = place<Outputs>(a, own_row, own_output, i);
                        if (!four) continue;
                        if (segment == SEGMENTS - 1) {
                            float2 held = *four;
                            sum[i] = held.x + sum[i];
                            sum[i + 1] = held.y + sum[i + 1];
                        } else {
                            *four = make_float2(sum[i], sum[i + 1]);
                        }
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < Values; i += 2) {
                float2* to = place<Outputs>(a, row, output, i);
                if (!to) continue;
                const float* bias = a.bias + output + i / 4 * 8;
                *to = a.bias ? make_float2(sum[i] + bias[0], sum[i + 1] + bias[1]) : make_float2(sum[i], sum[i + 1]);
            }
        }
    }
    // Nobody leaves while the other thread block may still arrive here.
    cluster_sync();
}

KERNEL void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
    matmul_hopper(const __grid_constant__ TensorMap xs, const __grid_constant__ TensorMap ws, Matmul a, u32 first_row) {
    DYNAMIC_SHARED(shared);
    multiply_on_hopper<256, 4, false>(&xs, &ws, a, first_row, shared);
}
KERNEL void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
    matmul_segmented_hopper(const __grid_constant__ TensorMap xs, const __grid_constant__ TensorMap ws, Matmul a, u32 first_row) {
    DYNAMIC_SHARED(shared);
    multiply_on_hopper<128, 4, true>(&xs, &ws, a, first_row, shared);
}
#endif
