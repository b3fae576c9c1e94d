// A thread block on one CPU thread: each CUDA thread is a fiber, and they run in turn between barriers. What a warp does
// together (shuffles, tensor cores, tile loads) happens when its last lane has come. Copies in the background arrive when they
// are waited for and no sooner, so that a missing wait shows. This is for testing indices, barriers and the order of sums, not
// for speed; how a real tensor core rounds inside one instruction it cannot say.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define KERNEL extern "C"
// One thread block runs on one CPU thread at a time.
#define __shared__ static thread_local
#define DYNAMIC_SHARED(name) u8* name = emulated::dynamic()

struct uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct dim3_of {
    unsigned x, y, z;
};

namespace emulated {
extern thread_local dim3_of thread_at, block_at, block_size, grid_size;
unsigned char* dynamic();
void block_barrier();
// Each lane gives `bytes`; all 32 lie in `all` when it returns, until the lane's next exchange.
const unsigned char* exchange(const void* own, int bytes);
int block_count(int predicate);
void copy(void* to, const void* from, int bytes);
void commit();
void wait(int left);
inline int lane() { return thread_at.x % 32; }
}

#define threadIdx emulated::thread_at
#define blockIdx emulated::block_at
#define blockDim emulated::block_size
#define gridDim emulated::grid_size

inline void __syncthreads() { emulated::block_barrier(); }
inline int __syncthreads_count(int predicate) { return emulated::block_count(predicate); }
inline void __syncwarp() { unsigned char none = 0; emulated::exchange(&none, 1); }

template <class T> T of_lane(T own, int lane) {
    T got;
    memcpy(&got, emulated::exchange(&own, sizeof own) + lane * sizeof own, sizeof own);
    return got;
}
template <class T> T __shfl_xor_sync(unsigned, T own, int mask) { return of_lane(own, emulated::lane() ^ mask); }
template <class T> T __shfl_up_sync(unsigned, T own, int distance) {
    int from = emulated::lane() - distance;
    return of_lane(own, from < 0 ? emulated::lane() : from);
}

inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((unsigned)x); }
inline unsigned __float_as_uint(float x) { unsigned r; memcpy(&r, &x, 4); return r; }
inline float __uint_as_float(unsigned x) { float r; memcpy(&r, &x, 4); return r; }
inline u64 __umul64hi(u64 a, u64 b) { return (u64)((unsigned __int128)a * b >> 64); }
// Fibers of a block take turns on one CPU thread, so a plain addition is atomic.
template <class T> T atomicAdd(T* to, T value) { T old = *to; *to = old + value; return old; }

inline void copy_async(u8* to, const void* from, bool present) { emulated::copy(to, present ? from : 0, 16); }
inline void copy_commit() { emulated::commit(); }
template <int Left> void copy_wait() { emulated::wait(Left); }

// Kernels run one after another.
inline void after_previous() {}
inline void let_next_begin() {}
inline void ask(const void*, u32) {}

// Fragment layouts: PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix".
inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    struct { u32 a[4], b[2]; } own = {{a[0], a[1], a[2], a[3]}, {b0, b1}}, all[32];
    memcpy(all, emulated::exchange(&own, sizeof own), sizeof all);
    auto value = [](u32 pair, int i) { return __uint_as_float((pair >> (16 * i) & 0xffff) << 16); };
    int lane = emulated::lane();
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            float x = value(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2);
            float y = value(all[column * 4 + k % 8 / 2].b[k / 8], k % 2);
            d[i] = fmaf(x, y, d[i]);
        }
    }
}

inline void load_tiles_by(u32 (&r)[4], const u8* from, bool transposed) {
    const u8* all[32];
    memcpy(all, emulated::exchange(&from, sizeof from), sizeof all);
    int lane = emulated::lane();
    for (int tile = 0; tile < 4; tile++) {
        u16 half[2];
        for (int i = 0; i < 2; i++) {
            int row = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
            memcpy(&half[i], all[tile * 8 + row] + column * 2, 2);
        }
        r[tile] = (u32)half[0] | (u32)half[1] << 16;
    }
}
inline void load_tiles(u32 (&r)[4], const u8* from) { load_tiles_by(r, from, false); }
inline void load_tiles_transposed(u32 (&r)[4], const u8* from) { load_tiles_by(r, from, true); }
