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
// Thread blocks that share the weights of a tile.
#define CLUSTER 2
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

// The first threads of the thread block, so many, wait for one another.
__device__ __forceinline__ void sync_some(u32 threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the same barrier of a thread block of the cluster. What was read here came by the copy engine and is guarded by
// barriers alone, so that no fence of ordinary memory, which costs a thousand cycles, is asked for.
__device__ __forceinline__ void barrier_arrive(u32 barrier, u32 rank) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(rank)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive_here(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
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

// The same of weights that nobody reads again soon: they leave the cache before anything else does.
__device__ __forceinline__ void load_once(u32 to, const TensorMap* map, u32 barrier, u32 k, u32 row) {
    asm volatile("{\n.reg .b64 first;\ncreatepolicy.fractional.L2::evict_first.b64 first, 1.0;\n"
                 "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1, {%3, %4}], [%2], first;\n}" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(k), "r"(row)
                 : "memory");
}

// Bytes one after another: a multiple of 16. The second: that nobody reads again soon.
__device__ __forceinline__ void load_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void load_bytes_once(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("{\n.reg .b64 first;\ncreatepolicy.fractional.L2::evict_first.b64 first, 1.0;\n"
                 "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], first;\n}" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
                 : "memory");
}

// `load_slab` into both thread blocks of the cluster.
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
__device__ __forceinline__ void wgmma(float (&d)[32], u64 x, u64 w) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, 1, 1, 1, 0, 0;"
        :
          "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(x), "l"(w));
}

// Four floats in the shared memory of a thread block of the cluster, at the place where they are here.
__device__ __forceinline__ float4 read_of(u32 at, u32 rank) {
    float4 value;
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "r"(at), "r"(rank)
                 : "memory");
    return value;
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
    constexpr int Values = Outputs / 2, Half = Outputs / CLUSTER;
    u32 skip = (1024 - shared_at(dynamic) % 1024) % 1024;
    u32 stages = shared_at(dynamic) + skip, full = stages + Stages * StageBytes, empty = full + 8 * Stages;
    // Sums of two segments: (value, thread).
    float* two = (float*)(dynamic + skip + Stages * StageBytes + 1024) + threadIdx.x % 256;
    u32 rank = cluster_rank(), group = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        for (int s = 0; s < Stages; s++) {
            barrier_init(full + 8 * s, 1);
            // Two warpgroups of two thread blocks.
            barrier_init(empty + 8 * s, 2 * CLUSTER);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    cluster_sync();
    begin();

    u32 steps = a.depth / HOPPER_STEP, segment_steps = Segmented ? steps / SEGMENTS : steps;
    u32 row_pairs = (a.rows + CLUSTER * HOPPER_ROWS - 1) / (CLUSTER * HOPPER_ROWS), outputs = (a.outputs + Outputs - 1) / Outputs;
    u32 tiles = row_pairs * outputs, clusters = gridDim.x / CLUSTER;
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) {
            Ring<Stages> ring = {0, 1};
            for (u32 tile = blockIdx.x / CLUSTER; tile < tiles; tile += clusters) {
                TileAt at = tile_of(tile, row_pairs, outputs);
                u32 row = first_row + (at.row_pair * CLUSTER + rank) * HOPPER_ROWS, output = at.output * Outputs + rank * Half;
                for (u32 step = 0; step < steps; step++, ring.next()) {
                    u32 to = stages + ring.stage * StageBytes, barrier = full + 8 * ring.stage, k = step * HOPPER_STEP;
                    barrier_wait(empty + 8 * ring.stage, ring.parity);
                    barrier_expect(barrier, StageBytes);
#pragma unroll
                    for (u32 i = 0; i < HOPPER_ROWS / 64; i++) load_slab(to + i * SLAB_BYTES, xs, barrier, k, row + i * 64);
#pragma unroll
                    for (u32 i = 0; i < Half / 64; i++) {
                        u32 at = to + WeightsAt + (rank * Half / 64 + i) * SLAB_BYTES;
                        load_slab_for_both(at, ws, barrier, k, output + i * 64);
                    }
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        u32 part = group - 1, thread = threadIdx.x % 128, lane = thread % 32;
        Ring<Stages> ring = {0, 0};
        float sum[Values];
        float one[Segmented ? Values : 1];
        for (u32 tile = blockIdx.x / CLUSTER; tile < tiles; tile += clusters) {
            TileAt at = tile_of(tile, row_pairs, outputs);
            u32 row = (at.row_pair * CLUSTER + rank) * HOPPER_ROWS + part * 64 + thread / 32 * 16 + lane / 4;
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
                    if (step > 0 && thread < CLUSTER) barrier_arrive(empty + 8 * before, thread);
                    before = ring.stage;
                    ring.next();
                }
                wgmma_wait<0>();
                if (thread < CLUSTER) barrier_arrive(empty + 8 * before, thread);
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
    multiply_on_hopper<128, 5, true>(&xs, &ws, a, first_row, shared);
}

// Few rows: bound by reading W. A thread block has 16 or 32 outputs; one thread lets the copy engine fill a ring of items, whose
// weights it asks for before the kernel before has ended. Without segments an item is 128 k, of which each warp multiplies 8
// outputs, and thread blocks stay and take tile after tile. With segments an item is 64 k of one segment, and each of eight
// warps has a segment.
//
//     shared = items, in the end sums of segments (segment, row, output) | barriers | whole rows of x
//     item = (chunk of 64 k, row) of x, then (chunk, output) of W

// Fragments of `Wide` times 8 outputs from `first` on, times all rows, over the 64 k of one chunk.
template <int Rows, int Wide, class Left>
__device__ __forceinline__ void multiply_chunk(float (&sum)[Rows / 16][Wide][4], const Left& x, const u8* w, int first, int lane) {
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
        u32 left[2][Rows / 16][4], right[Wide][4];
#pragma unroll
        for (int n = 0; n < Wide; n++) load_tiles(right[n], w + tile_at<PARTS>(first + n * 8 + lane % 8, k * 2 + lane / 8));
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int h = 0; h < Rows / 16; h++)
                load_tiles(left[i][h], x.at(h * 16 + lane % 16, (k + i) * 2 + lane / 16));
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int h = 0; h < Rows / 16; h++) {
#pragma unroll
                for (int n = 0; n < Wide; n++) mma(sum[h][n], left[i][h], right[n][i * 2], right[n][i * 2 + 1]);
            }
        }
    }
}

// Which item of which tile is next: of the thread block's tiles, one after another, all items in order.
struct Cursor {
    u32 output, item;
    __device__ __forceinline__ void next(u32 count, u32 stride) {
        if (++item == count) {
            item = 0;
            output += stride;
        }
    }
};

// Where the cells of 32 outputs begin at `k`.
__device__ __forceinline__ const u8* cells_at(const Matmul& a, u32 output, u32 k) {
    return (const u8*)a.w + ((u64)(output / TILE_OUTPUTS) * a.depth + k) * TILE_OUTPUTS;
}

// The scales of a warp's weights, 128 k after 128 k. Where outputs have more than one, each lane holds one of 32 that follow.
template <int Wide> struct Scales {
    float now[Wide], held[Wide], later[Wide];
    const float* from[Wide];
    u32 at, each;

    __device__ __forceinline__ float read(int n, u32 i) const { return from[n][i < each ? i : each - 1]; }
    __device__ __forceinline__ void begin(const Eights& e, u32 output, u32 k, int lane) {
        at = k / SCALED_K;
        each = e.each;
#pragma unroll
        for (int n = 0; n < Wide; n++) {
            from[n] = scales_of(e, output + n * 8 + (each == 1 ? lane / 4 : 0));
            if (each == 1) {
                now[n] = from[n][0];
            } else {
                held[n] = read(n, at / 32 * 32 + lane);
                later[n] = read(n, at / 32 * 32 + 32 + lane);
            }
        }
    }
    __device__ __forceinline__ void next(int lane) {
        if (each == 1) return;
#pragma unroll
        for (int n = 0; n < Wide; n++) now[n] = __shfl_sync(~0u, held[n], at % 32);
        if (++at % 32 != 0) return;
#pragma unroll
        for (int n = 0; n < Wide; n++) {
            held[n] = later[n];
            later[n] = read(n, at + 32 + lane);
        }
    }
};

// The 64 k of one chunk in the row of x that a lane reads, where x lies whole in shared memory. Where the tensor cores take more
// rows than there are, it is the last row again: nobody looks at what comes of it.
struct WholeRow {
    const u8* first;
    __device__ __forceinline__ const u8* at(int, int part) const { return first + part * 16; }
};

// `Segmented`: warps of a segment, which share its outputs; 0: there are no segments. `Eight`: weights of 8 bits, as cells
// (matmul_f8.cu). `Whole`: x does not pass through the ring but lies in shared memory whole, behind the barriers, for which there
// must be few rows; TURNED: up to 8 of them, the right operand of weights of 8 bits, which takes fewer instructions.
#define TURNED 2
template <int Rows, int Outputs, int Items, int Chunks, int Segmented, bool Eight, int Whole>
__device__ __forceinline__ void multiply_few(const TensorMap* xs, const TensorMap* ws, const Matmul& a, const Eights& e, u32 first_row,
                                             u8* dynamic) {
    constexpr bool Turned = Whole == TURNED;
    constexpr int Split = Segmented ? Segmented : 1, Warps = Segmented ? SEGMENTS * Split : Turned ? Outputs / 16 : Outputs / 8;
    constexpr int Wide = Segmented ? Outputs / 8 / Split : Turned ? 2 : 1, High = Rows / 16;
    constexpr u32 XBytes = Rows * HOPPER_STEP * 2, WBytes = Outputs * HOPPER_STEP * (Eight ? 1 : 2);
    constexpr u32 WeightsAt = Whole ? 0 : XBytes * Chunks, ItemBytes = WeightsAt + WBytes * Chunks;
    u32 skip = (1024 - shared_at(dynamic) % 1024) % 1024;
    u8* items = dynamic + skip;
    u32 full = shared_at(items) + Items * ItemBytes, empty = full + 8 * Items, ready = empty + 8 * Items;
    u8* whole = items + Items * ItemBytes + 1024;
    // So that eight rows lie in different banks.
    u32 pitch = a.depth * 2 + 16;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 steps = a.depth / HOPPER_STEP, count = (steps + Chunks - 1) / Chunks;
    u32 output = blockIdx.x * Outputs, stride = gridDim.x * Outputs;
    if (threadIdx.x == 0) {
        for (int s = 0; s < Items; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, (Segmented ? Split : Warps) * (Eight ? 32 : 1));
        }
        if (Whole) barrier_init(ready, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    let_next_begin();

    float sum[High][Wide][4];
    if (warp == Warps) {
        if (lane == 0) {
            u32 segment_steps = steps / SEGMENTS;
            auto k_of = [&](u32 i) { return (Segmented ? i % SEGMENTS * segment_steps + i / SEGMENTS * Chunks : i * Chunks) * HOPPER_STEP; };
            auto weights = [&](const Cursor& at, u32 slot) {
                u32 to = shared_at(items) + slot * ItemBytes + WeightsAt, barrier = full + 8 * slot;
                barrier_expect(barrier, ItemBytes);
                if constexpr (Eight) {
                    static_assert(Outputs == TILE_OUTPUTS, "a thread block's cells lie one after another");
                    load_bytes_once(to, cells_at(a, at.output, k_of(at.item)), WBytes * Chunks, barrier);
                } else {
#pragma unroll
                    for (u32 c = 0; c < Chunks; c++)
                        load_once(to + c * WBytes, ws, barrier, k_of(at.item) + c * HOPPER_STEP, at.output);
                }
            };
            auto whole_rows = [&]() {
                barrier_expect(ready, a.rows * a.depth * 2);
                for (u32 r = 0; r < a.rows; r++)
                    load_bytes(shared_at(whole) + r * pitch, a.x + (u64)r * a.x_stride, a.depth * 2, ready);
            };
            auto rows = [&](const Cursor& at, u32 slot) {
                if (Whole) return;
                u32 to = shared_at(items) + slot * ItemBytes;
#pragma unroll
                for (u32 c = 0; c < Chunks; c++)
                    load_slab(to + c * XBytes, xs, full + 8 * slot, k_of(at.item) + c * HOPPER_STEP, first_row);
            };
            Ring<Items> ring = {0, 0};
            if constexpr (Segmented) {
                // Items are small here: what this thread does for each is what the memory waits for.
                u32 first = count < Items ? count : Items;
                for (u32 i = 0; i < first; i++) weights({output, i}, i);
                after_previous();
                if (Whole) whole_rows();
                for (u32 i = 0; i < first && !Whole; i++) rows({output, i}, i);
                for (u32 i = Items; i < count; i++, ring.next()) {
                    barrier_wait(empty + 8 * ring.stage, ring.parity);
                    weights({output, i}, ring.stage);
                    rows({output, i}, ring.stage);
                }
            } else {
                Cursor ahead = {output, 0}, at = ahead;
                for (u32 slot = 0; slot < Items && ahead.output < a.outputs; slot++, ahead.next(count, stride)) weights(ahead, slot);
                after_previous();
                if (Whole) whole_rows();
                for (u32 slot = 0; slot < Items && at.output < a.outputs; slot++, at.next(count, stride)) rows(at, slot);
                for (; at.output < a.outputs; ring.next(), at.next(count, stride)) {
                    barrier_wait(empty + 8 * ring.stage, ring.parity);
                    weights(at, ring.stage);
                    rows(at, ring.stage);
                }
            }
        }
    } else {
        // Where a warp begins in K, and its first group of 8 outputs.
        u32 segment = Segmented ? warp / Split : 0, begin_k = segment * (a.depth / SEGMENTS);
        u32 groups_at = Segmented ? warp % Split * Wide : warp * Wide;
        after_previous();
        // A warp with a segment takes every eighth item.
        constexpr u32 Stride = Segmented ? SEGMENTS : 1;
        u32 slot = segment % Items, parity = 0;
        const u8* own_row = whole + min((u32)lane % (Turned ? 8 : 16), a.rows - 1) * pitch + begin_k * 2;
        if (Whole) barrier_wait(ready, 0);
        for (u32 own = output; own < a.outputs; own += stride) {
#pragma unroll
            for (int h = 0; h < High; h++) {
#pragma unroll
                for (int n = 0; n < Wide; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) sum[h][n][i] = 0.0f;
                }
            }
            Scales<Wide> scales;
            if (Eight) scales.begin(e, own + groups_at * 8, begin_k, lane);
            for (u32 i = segment; i < count; i += Stride) {
                barrier_wait(full + 8 * slot, parity);
                const u8* x = items + slot * ItemBytes;
#pragma unroll
                for (int c = 0; c < Chunks; c++) {
                    auto left = [&] {
                        if constexpr (Whole) return WholeRow{own_row + (i / Stride * Chunks + c) * HOPPER_STEP * 2};
                        else return ExchangedRows{x + c * XBytes};
                    }();
                    if (Eight) {
                        // Two of 64 k share a scale.
                        if (c % 2 == 0) scales.next(lane);
                        const u8* cells = x + WeightsAt + c * WBytes + groups_at * CELL_BYTES;
                        if constexpr (Turned) multiply_turned<Wide>(sum[0], left.first, cells, scales.now, lane);
                        else multiply_cells<High, Wide>(sum, left, cells, CELL_BYTES, scales.now, lane, [](int) {});
                    } else {
                        multiply_chunk<Rows, Wide>(sum, left, x + WeightsAt + c * WBytes, groups_at * 8, lane);
                    }
                }
                __syncwarp();
                // Cells are read by ordinary loads, whose order before a refill every lane tells for itself.
                if (Eight || lane == 0) barrier_arrive_here(empty + 8 * slot);
                slot += Stride;
                if (slot >= Items) {
                    slot -= Items;
                    parity ^= 1;
                }
            }
            if constexpr (!Segmented && Turned) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    u32 r = lane % 4 * 2 + i % 2, n = own + (groups_at + i / 2) * 8 + lane / 4;
                    if (r < a.rows) a.y[(u64)r * a.outputs + n] = a.bias ? sum[0][0][i] + a.bias[n] : sum[0][0][i];
                }
            } else if constexpr (!Segmented) {
#pragma unroll
                for (int h = 0; h < High; h++) {
#pragma unroll
                    for (int i = 0; i < 4; i += 2) {
                        u32 r = h * 16 + lane / 4 + i / 2 * 8, n = own + warp * 8 + lane % 4 * 2;
                        if (r >= a.rows) continue;
                        float2 value = make_float2(sum[h][0][i], sum[h][0][i + 1]);
                        if (a.bias) value = make_float2(value.x + a.bias[n], value.y + a.bias[n + 1]);
                        *(float2*)(a.y + (u64)r * a.outputs + n) = value;
                    }
                }
            }
        }
    }
    if (!Segmented) return;
    // Where items were, all of which have been multiplied.
    float* sums = (float*)items;
    __syncthreads();
    if (warp < Warps) {
#pragma unroll
        for (int h = 0; h < High; h++) {
#pragma unroll
            for (int n = 0; n < Wide; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (Turned && n >= Wide / 2) break;
                    int r = Turned ? lane % 4 * 2 + i % 2 : h * 16 + lane / 4 + i / 2 * 8;
                    int at = (warp % Split * Wide + (Turned ? 2 * n + i / 2 : n)) * 8 + (Turned ? lane / 4 : lane % 4 * 2 + i % 2);
                    if (r < (int)a.rows) sums[(warp / Split * Rows + r) * Outputs + at] = sum[h][n][i];
                }
            }
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < Rows * Outputs; i += 32 * (Warps + 1)) {
        u32 r = i / Outputs, n = output + i % Outputs;
        if (r >= a.rows) break;
        float s[SEGMENTS];
#pragma unroll
        for (int segment = 0; segment < SEGMENTS; segment++) s[segment] = sums[segment * Rows * Outputs + i];
        float all = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
        a.y[(u64)r * a.outputs + n] = a.bias ? all + a.bias[n] : all;
    }
}

#define FEW_KERNEL(Name, Outputs, Items, Chunks, Segmented, Whole, Threads)                                                  \
    KERNEL void __launch_bounds__(Threads)                                                                                   \
        Name(const __grid_constant__ TensorMap xs, const __grid_constant__ TensorMap ws, Matmul a, u32 first_row) {          \
        DYNAMIC_SHARED(shared);                                                                                              \
        multiply_few<16, Outputs, Items, Chunks, Segmented, false, Whole>(&xs, &ws, a, Eights(), first_row, shared);         \
    }
FEW_KERNEL(matmul_16_hopper, 32, 8, 2, 0, 0, 160)
FEW_KERNEL(matmul_16_narrow_hopper, 16, 8, 2, 0, 0, 96)
FEW_KERNEL(matmul_segmented_16_hopper, 32, 16, 1, 1, 0, 288)
FEW_KERNEL(matmul_whole_hopper, 32, 10, 2, 0, 1, 160)
FEW_KERNEL(matmul_whole_narrow_hopper, 16, 8, 2, 0, 1, 96)
FEW_KERNEL(matmul_segmented_whole_hopper, 16, 32, 1, 1, 1, 288)

// K is a multiple of 256, or of 1024 and at most 32768 with segments.
#define EIGHT_KERNEL(Name, Outputs, Items, Chunks, Segmented, Whole, Threads)                                                \
    KERNEL void __launch_bounds__(Threads, 1) Name(const __grid_constant__ TensorMap xs, Matmul a, Eights e, u32 first_row) { \
        DYNAMIC_SHARED(shared);                                                                                              \
        multiply_few<16, Outputs, Items, Chunks, Segmented, true, Whole>(&xs, &xs, a, e, first_row, shared);                 \
    }
EIGHT_KERNEL(matmul_f8_hopper, 32, 6, 4, 0, 0, 160)
EIGHT_KERNEL(matmul_segmented_f8_hopper, 32, 16, 2, 1, 0, 288)
EIGHT_KERNEL(matmul_f8_whole_hopper, 32, 4, 4, 0, TURNED, 96)
EIGHT_KERNEL(matmul_f8_whole_narrow_hopper, 32, 5, 4, 0, 1, 160)
EIGHT_KERNEL(matmul_segmented_f8_whole_hopper, 32, 16, 2, 2, TURNED, 544)

__device__ __forceinline__ float4 plus(const float4& a, const float4& b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// The last sums of a cluster of thread blocks, each of which has those of some of the segments, (row, output), at `sums`: some of
// the rows.
template <int Outputs, u32 Threads, u32 Blocks>
__device__ __forceinline__ void add_sums(const Matmul& a, u32 sums, u32 output, u32 rank) {
    constexpr u32 Fours = 64 / Blocks * Outputs / 4;
#pragma unroll
    for (u32 from = 0; from < Fours; from += Threads) {
        u32 i = from + threadIdx.x, r = rank * (64 / Blocks) + i / (Outputs / 4), n = i % (Outputs / 4) * 4;
        if (i >= Fours || r >= a.rows || output + n >= a.outputs) continue;
        float4 part[Blocks];
#pragma unroll
        for (u32 block = 0; block < Blocks; block++) part[block] = read_of(sums + (r * (Outputs + 8) + n) * 4, block);
        // The same tree as everywhere.
#pragma unroll
        for (u32 apart = 1; apart < Blocks; apart *= 2) {
#pragma unroll
            for (u32 block = 0; block + apart < Blocks; block += 2 * apart) part[block] = plus(part[block], part[block + apart]);
        }
        if (a.bias) part[0] = plus(part[0], *(const float4*)(a.bias + output + n));
        *(float4*)(a.y + (u64)r * a.outputs + output + n) = part[0];
    }
}

// Up to 64 rows, which a warpgroup multiplies with `Outputs` outputs while one thread of another warp loads. With segments a
// cluster of four thread blocks has the outputs, and each two of the segments; each adds up 16 of the rows in the end.
//
//     shared = items, in the end sums (row, output) | barriers
//     item = 64 rows of x, then `Outputs` rows of W: 64 k
template <int Outputs, int Items, bool Segmented>
__device__ __forceinline__ void multiply_some(const TensorMap* xs, const TensorMap* ws, const Matmul& a, u32 first_row, u8* dynamic) {
    constexpr u32 ItemBytes = (64 + Outputs) * HOPPER_STEP * 2, Parts = Segmented ? 2 : 1, Blocks = SEGMENTS / 2;
    constexpr int Values = Outputs / 2, Stride = Outputs + 8;
    u32 skip = (1024 - shared_at(dynamic) % 1024) % 1024;
    u32 items = shared_at(dynamic) + skip, full = items + Items * ItemBytes, empty = full + 8 * Items;
    u32 rank = Segmented ? cluster_rank() : 0, output = blockIdx.x / (Segmented ? Blocks : 1) * Outputs;
    u32 steps = a.depth / HOPPER_STEP / (Segmented ? SEGMENTS : 1), count = steps * Parts, first_k = rank * count * HOPPER_STEP;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
        for (int s = 0; s < Items; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, 1);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    let_next_begin();

    float sum[Values], one[Segmented ? Values : 1];
    if (warp == 4) {
        if (lane == 0) {
            auto weights = [&](u32 i, u32 slot) {
                u32 to = items + slot * ItemBytes + SLAB_BYTES, barrier = full + 8 * slot;
                barrier_expect(barrier, ItemBytes);
#pragma unroll
                for (u32 part = 0; part < Outputs / 64; part++)
                    load_once(to + part * SLAB_BYTES, ws, barrier, first_k + i * HOPPER_STEP, output + part * 64);
            };
            auto rows = [&](u32 i, u32 slot) { load_slab(items + slot * ItemBytes, xs, full + 8 * slot, first_k + i * HOPPER_STEP, first_row); };
            u32 first = count < Items ? count : Items;
            for (u32 i = 0; i < first; i++) weights(i, i);
            after_previous();
            for (u32 i = 0; i < first; i++) rows(i, i);
            Ring<Items> ring = {0, 0};
            for (u32 i = Items; i < count; i++, ring.next()) {
                barrier_wait(empty + 8 * ring.stage, ring.parity);
                weights(i, ring.stage);
                rows(i, ring.stage);
            }
        }
    } else {
        after_previous();
        Ring<Items> ring = {0, 0};
#pragma unroll
        for (u32 part = 0; part < Parts; part++) {
#pragma unroll
            for (int i = 0; i < Values; i++) {
                if (part == 1) one[Segmented ? i : 0] = sum[i];
                sum[i] = 0.0f;
            }
            u32 before = 0;
            for (u32 step = 0; step < steps; step++) {
                barrier_wait(full + 8 * ring.stage, ring.parity);
                u64 x = operand(items + ring.stage * ItemBytes), w = operand(items + ring.stage * ItemBytes + SLAB_BYTES);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < HOPPER_STEP / 16; k++) wgmma(sum, x + 2 * k, w + 2 * k);
                wgmma_commit();
                wgmma_wait<1>();
                if (step > 0 && threadIdx.x == 0) barrier_arrive_here(empty + 8 * before);
                before = ring.stage;
                ring.next();
            }
            wgmma_wait<0>();
            if (threadIdx.x == 0) barrier_arrive_here(empty + 8 * before);
        }
        // Where items were, all of which have been multiplied.
        float* sums = (float*)(dynamic + skip);
        if (Segmented) sync_some(128);
#pragma unroll
        for (int i = 0; i < Values; i += 2) {
            u32 r = warp * 16 + lane / 4 + i % 4 / 2 * 8, n = i / 4 * 8 + lane % 4 * 2;
            if (Segmented) {
                constexpr int Last = Segmented ? Values : 1;
                *(float2*)(sums + r * Stride + n) = make_float2(one[i % Last] + sum[i], one[(i + 1) % Last] + sum[i + 1]);
            } else if (r < a.rows && output + n < a.outputs) {
                float2 value = make_float2(sum[i], sum[i + 1]);
                if (a.bias) value = make_float2(value.x + a.bias[output + n], value.y + a.bias[output + n + 1]);
                *(float2*)(a.y + (u64)r * a.outputs + output + n) = value;
            }
        }
    }
    if (!Segmented) return;
    cluster_sync();
    add_sums<Outputs, 160, Blocks>(a, items, output, rank);
    // Nobody leaves while others may still read here.
    cluster_sync();
}

#define SOME_KERNEL(Name, Outputs, Items)                                                                                    \
    KERNEL void __launch_bounds__(160)                                                                                       \
        Name(const __grid_constant__ TensorMap xs, const __grid_constant__ TensorMap ws, Matmul a, u32 first_row) {          \
        DYNAMIC_SHARED(shared);                                                                                              \
        multiply_some<Outputs, Items, false>(&xs, &ws, a, first_row, shared);                                                \
    }
SOME_KERNEL(matmul_64_hopper, 128, 8)
SOME_KERNEL(matmul_64_narrow_hopper, 64, 12)
KERNEL void __launch_bounds__(160) __cluster_dims__(4, 1, 1)
    matmul_segmented_64_hopper(const __grid_constant__ TensorMap xs, const __grid_constant__ TensorMap ws, Matmul a, u32 first_row) {
    DYNAMIC_SHARED(shared);
    multiply_some<128, 7, true>(&xs, &ws, a, first_row, shared);
}
#endif
