// matmul_f8.cu's products for some rows on Hopper: weights of 8 bits become bf16 in registers and are the left operand of the
// warpgroup's instruction, rows of x the right one, which changes no sum: up to 64 rows read the weights once.
#include "common.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// d (64 outputs, 64 rows) += w (64 outputs, 16 k) . x (64 rows, 16 k)^T, w in registers.
__device__ __forceinline__ void wgmma_of(float (&d)[32], const u32 (&w)[4], u64 x) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
        :
          "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x));
}

#define SOME_OUTPUTS 128
// Two warpgroups of 64 outputs each, and a warp that loads.
#define SOME_THREADS 288

// Up to 64 rows. With segments a cluster of eight thread blocks has the outputs, and each one of the segments.
//
//     shared = items, in the end sums (row, output) | barriers
//     item = (two of 64 k, 64 rows) of x, then (4 of 32 outputs, two of 64 k) of cells
template <int Items, bool Segmented>
__device__ __forceinline__ void multiply_some_eights(const TensorMap* xs, const Matmul& a, const Eights& e, u32 first_row, u8* dynamic) {
    constexpr u32 XBytes = 2 * SLAB_BYTES, TileBytes = 2 * TILE_OUTPUTS * HOPPER_STEP, Tiles = SOME_OUTPUTS / TILE_OUTPUTS;
    constexpr u32 ItemBytes = XBytes + Tiles * TileBytes;
    constexpr int Stride = SOME_OUTPUTS + 8, Consumers = SOME_THREADS - 32;
    u32 skip = (1024 - shared_at(dynamic) % 1024) % 1024;
    u8* items = dynamic + skip;
    u32 full = shared_at(items) + Items * ItemBytes, empty = full + 8 * Items;
    u32 rank = Segmented ? cluster_rank() : 0, output = blockIdx.x / (Segmented ? SEGMENTS : 1) * SOME_OUTPUTS;
    u32 count = a.depth / SCALED_K / (Segmented ? SEGMENTS : 1), first_k = rank * count * SCALED_K;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
        for (int s = 0; s < Items; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, Consumers);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    let_next_begin();

    // Where items were, all of which have been multiplied.
    float* sums = (float*)items;
    if (warp == Consumers / 32) {
        if (lane == 0) {
            // The last outputs may be fewer.
            u32 left = (a.outputs - output) / TILE_OUTPUTS, tiles = left < Tiles ? left : Tiles;
            auto weights = [&](u32 i, u32 slot) {
                u32 to = shared_at(items) + slot * ItemBytes + XBytes, barrier = full + 8 * slot;
                barrier_expect(barrier, XBytes + tiles * TileBytes);
                for (u32 t = 0; t < tiles; t++)
                    load_bytes_once(to + t * TileBytes, cells_at(a, output + t * TILE_OUTPUTS, first_k + i * SCALED_K), TileBytes, barrier);
            };
            auto rows = [&](u32 i, u32 slot) {
                u32 to = shared_at(items) + slot * ItemBytes, k = first_k + i * SCALED_K;
                load_slab(to, xs, full + 8 * slot, k, first_row);
                load_slab(to + SLAB_BYTES, xs, full + 8 * slot, k + HOPPER_STEP, first_row);
            };
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
        // Of 8 outputs each, this warp has two groups.
        u32 group = warp * 2, own = output + group * 8;
        Scales<2> scales;
        scales.begin(e, own < a.outputs ? own : output, first_k, lane);
        Ring<Items> ring = {0, 0};
        float sum[32];
        u32 w[2][4][4], before = 0;
#pragma unroll
        for (int i = 0; i < 32; i++) sum[i] = 0.0f;
        for (u32 i = 0; i < count; i++) {
            barrier_wait(full + 8 * ring.stage, ring.parity);
            const u8* item = items + ring.stage * ItemBytes;
            const u8* cells = item + XBytes + group / CELLS * TileBytes + group % CELLS * CELL_BYTES + lane * 16;
            scales.next(lane);
            float scale[2] = {scales.now[0] * OWN_SCALE, scales.now[1] * OWN_SCALE};
#pragma unroll
            for (int c = 0; c < 2; c++) {
                // Those before the last have read their registers.
                wgmma_wait<1>();
                if (c == 1 && i > 0) barrier_arrive_here(empty + 8 * before);
                uint4 low = *(const uint4*)(cells + c * (TileBytes / 2)), high = *(const uint4*)(cells + c * (TileBytes / 2) + CELL_BYTES);
                u32 words[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    u32 pairs[2][2];
                    widened(pairs[0], words[0][k], scale[0]);
                    widened(pairs[1], words[1][k], scale[1]);
                    w[c][k][0] = pairs[0][0];
                    w[c][k][1] = pairs[1][0];
                    w[c][k][2] = pairs[0][1];
                    w[c][k][3] = pairs[1][1];
                }
                u64 x = operand(shared_at(item) + c * SLAB_BYTES);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 4; k++) wgmma_of(sum, w[c][k], x + 2 * k);
                wgmma_commit();
            }
            before = ring.stage;
            ring.next();
        }
        wgmma_wait<0>();
        if (Segmented) sync_some(Consumers);
#pragma unroll
        for (int i = 0; i < 32; i++) {
            u32 r = i / 4 * 8 + lane % 4 * 2 + i % 2, n = group * 8 + lane / 4 + i % 4 / 2 * 8;
            if (Segmented) sums[r * Stride + n] = sum[i];
            else if (r < a.rows && output + n < a.outputs)
                a.y[(u64)r * a.outputs + output + n] = a.bias ? sum[i] + a.bias[output + n] : sum[i];
        }
    }
    if (!Segmented) return;
    cluster_sync();
    add_sums<SOME_OUTPUTS, SOME_THREADS, SEGMENTS>(a, shared_at(sums), output, rank);
    // Nobody leaves while others may still read here.
    cluster_sync();
}

// K is a multiple of 128, or of 1024 with segments.
KERNEL void __launch_bounds__(SOME_THREADS, 2) matmul_f8_64_hopper(const __grid_constant__ TensorMap xs, Matmul a, Eights e, u32 first_row) {
    DYNAMIC_SHARED(shared);
    multiply_some_eights<6, false>(&xs, a, e, first_row, shared);
}
KERNEL void __launch_bounds__(SOME_THREADS, 2) __cluster_dims__(8, 1, 1)
    matmul_segmented_f8_64_hopper(const __grid_constant__ TensorMap xs, Matmul a, Eights e, u32 first_row) {
    DYNAMIC_SHARED(shared);
    multiply_some_eights<3, true>(&xs, a, e, first_row, shared);
}
#endif
