// What every kernel uses: bf16, arithmetic as fixed sequences of IEEE operations (the same as kernels/src/math.rs), tensor-core
// and copy instructions, and the index functions that say where a position's key and value lie.
//
// Compiled with contraction off (-fmad=false), so that a fused multiply-add is one exactly where `fmaf` is written. With
// BATON_EMULATED the same sources are C++ for a CPU (emulate.h), which is how they are tested where there is no GPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef BATON_EMULATED
#include "emulate.h"
#else
#define KERNEL extern "C" __global__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) u8 name[]

// d += a (16 x 16, row) . b (16 x 8, column), bf16 in, f32 out.
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 tiles of bf16; lane 8i + j gives the address of row j of tile i.
__device__ __forceinline__ void load_tiles(u32 (&r)[4], const u8* from) {
    u32 at = (u32)__cvta_generic_to_shared(from);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}

// The same, each tile transposed.
__device__ __forceinline__ void load_tiles_transposed(u32 (&r)[4], const u8* from) {
    u32 at = (u32)__cvta_generic_to_shared(from);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}

// Copies 16 bytes into shared memory in the background; zeros unless `present`.
__device__ __forceinline__ void copy_async(u8* to, const void* from, bool present) {
    u32 at = (u32)__cvta_generic_to_shared(to);
    int bytes = present ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}

// Closes a group of copies.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the newest `Left` groups are on their way.
template <int Left> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// Launches overlap (nvidia.rs): a kernel may begin while the one before it still runs. Every kernel calls this first, in every
// thread, and until it returns touches nothing but weights and what the host has copied here for the batch: the first launch
// behind a copy waits for it.
__device__ __forceinline__ void after_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel begin as soon as thread blocks of this one leave room.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Asks for memory to be brought into the cache that all multiprocessors share: multiples of 16 bytes. It changes nothing that a
// kernel can see, so that it need not wait for anything.
__device__ __forceinline__ void ask(const void* from, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(bytes) : "memory");
#endif
}
#endif

// The beginning of every kernel that has nothing to do before.
__device__ __forceinline__ void begin() {
    let_next_begin();
    after_previous();
}

#define INFINITE __uint_as_float(0x7f800000u)

// Nearest bf16, ties to even; NaN stays a quiet NaN.
__device__ __forceinline__ u16 to_bf16(float x) {
#ifdef BATON_EMULATED
    u32 bits = __float_as_uint(x);
    if (x != x) return (u16)((bits >> 16) | 0x40);
    return (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#else
    u16 half;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
#endif
}

__device__ __forceinline__ float of_bf16(u16 x) { return __uint_as_float((u32)x << 16); }

// The f32 that stands for the nearest bf16.
__device__ __forceinline__ float rounded(float x) { return of_bf16(to_bf16(x)); }

__device__ __forceinline__ u32 pair_bf16(float low, float high) {
#ifdef BATON_EMULATED
    return (u32)to_bf16(low) | (u32)to_bf16(high) << 16;
#else
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}

__device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }

// e^x to 1 ulp or so: `exp` of kernels/src/math.rs.
__device__ __forceinline__ float exp_of(float x) {
    float c = x > -87.0f ? x : -87.0f;
    c = c < 88.0f ? c : 88.0f;
    float t = fmaf(c, 1.442695041f, 12582912.0f);
    float n = t - 12582912.0f;
    float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, c));
    float p = 1.0f / 5040.0f;
    p = fmaf(p, r, 1.0f / 720.0f);
    p = fmaf(p, r, 1.0f / 120.0f);
    p = fmaf(p, r, 1.0f / 24.0f);
    p = fmaf(p, r, 1.0f / 6.0f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    float y = p * __uint_as_float((__float_as_uint(t) << 23) + 0x3f800000u);
    if (x != x) return x;
    if (x < -87.0f) return 0.0f;
    return x > 88.0f ? INFINITE : y;
}

// 2^x by the GPU's own instruction, which is the same on every GPU of an architecture.
__device__ __forceinline__ float exp2_of(float x) {
#ifdef BATON_EMULATED
    return exp_of(x * 0.69314718f);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// Sum over the warp's lanes, neighbours at distance 16, 8, 4, 2, 1: the same in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// Sum over a thread block of `Warps` warps, the same in every thread: each warp's tree, then the warps in order.
template <int Warps> __device__ __forceinline__ float block_sum(float x) {
    __shared__ float sums[Warps];
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    float all = sums[0];
#pragma unroll
    for (int i = 1; i < Warps; i++) all += sums[i];
    return all;
}

// Shape of a cache block: core/src/arena.rs, with bf16 elements.
//
//     block = (kv_head, layer, K|V, token, head_dim)
struct Layout {
    u32 layers;
    u32 kv_heads;
    u32 head_dim;
    u32 block_tokens;
};

__device__ __forceinline__ u64 half_elements(const Layout& l) { return (u64)l.block_tokens * l.head_dim; }

__device__ __forceinline__ u64 block_elements(const Layout& l) {
    return (u64)l.kv_heads * l.layers * 2 * half_elements(l);
}

// First element of (kv_head, layer, half) in a block.
__device__ __forceinline__ u64 half_at(const Layout& l, u32 kv_head, u32 layer, u32 half) {
    return (((u64)kv_head * l.layers + layer) * 2 + half) * half_elements(l);
}

// First element of a position's key (half 0) or value (half 1) in the arena.
__device__ __forceinline__ u64 kv_at(const Layout& l, const u32* table, u32 position, u32 kv_head, u32 layer, u32 half) {
    u32 block = table[position / l.block_tokens], token = position % l.block_tokens;
    return block * block_elements(l) + half_at(l, kv_head, layer, half) + (u64)token * l.head_dim;
}

// Which 16-byte part of a row of shared memory holds part `part`: parts are exchanged from row to row so that the eight
// rows of a tile lie in different banks. `Parts` is the number of parts of a row.
template <int Parts> __device__ __forceinline__ int swizzled(int row, int part) {
    return part ^ (row & (Parts % 8 == 0 ? 7 : Parts % 4 == 0 ? 3 : Parts % 2 == 0 ? 1 : 0));
}

// Byte in a tile of shared memory whose rows have `Parts` parts.
template <int Parts> __device__ __forceinline__ int tile_at(int row, int part) {
    return (row * Parts + swizzled<Parts>(row, part)) * 16;
}
