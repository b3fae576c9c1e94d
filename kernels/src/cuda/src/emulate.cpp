// The kernels as a library for a CPU: `emulated_launch` runs one by name over a whole grid. Built by tests only.
#include "common.cuh"

#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulated {
thread_local dim3_of thread_at, block_at, block_size, grid_size;

static const size_t STACK_BYTES = 64 << 10;

// Where a fiber goes on. On x86-64 its stack pointer is enough; the registers a call must keep lie on its stack.
#if defined(__x86_64__)
typedef void* Place;
extern "C" void emulated_switch(Place* from, Place to);
asm(R"(
.text
.type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
static void go(Place& from, Place& to) { emulated_switch(&from, to); }
static void begin(Place& place, void (*run)(), unsigned char* stack, size_t bytes) {
    void** top = (void**)(((uintptr_t)stack + bytes) & ~(uintptr_t)15);
    *--top = 0;
    *--top = (void*)run;
    place = top - 6;
}
#else
typedef ucontext_t Place;
static void go(Place& from, Place& to) { swapcontext(&from, &to); }
static void begin(Place& place, void (*run)(), unsigned char* stack, size_t bytes) {
    getcontext(&place);
    place.uc_stack.ss_sp = stack;
    place.uc_stack.ss_size = bytes;
    place.uc_link = 0;
    makecontext(&place, run, 0);
}
#endif

struct Copy {
    void* to;
    const void* from;
    int bytes;
    unsigned group;
};

struct Fiber {
    Place place;
    std::vector<unsigned char> stack;
    std::vector<Copy> copies;
    unsigned group;
    bool done;
};

struct Warp {
    // Two buffers: lanes may still read one exchange while others begin the next.
    unsigned char exchanged[2][32 * 64];
    unsigned arrived, turn;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
    Place scheduler;
    unsigned current, arrived, turn, alive, counting, counted;
    void (*kernel)(void**);
    void** arguments;
};

static thread_local Block block;

unsigned char* dynamic() { return block.shared.data(); }

static void pass_turn() {
    go(block.fibers[block.current].place, block.scheduler);
}

static void open_if_complete() {
    if (block.arrived >= block.alive && block.arrived > 0) {
        block.arrived = 0;
        block.counted = block.counting;
        block.counting = 0;
        block.turn++;
    }
}

void block_barrier() {
    unsigned turn = block.turn;
    block.arrived++;
    open_if_complete();
    while (block.turn == turn) pass_turn();
}

int block_count(int predicate) {
    block.counting += predicate ? 1 : 0;
    block_barrier();
    int counted = block.counted;
    // Nobody may count anew before all have read.
    block_barrier();
    return counted;
}

const unsigned char* exchange(const void* own, int bytes) {
    Warp& warp = block.warps[thread_at.x / 32];
    unsigned turn = warp.turn;
    unsigned char* buffer = warp.exchanged[turn % 2];
    memcpy(buffer + lane() * bytes, own, bytes);
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        warp.turn++;
    }
    while (warp.turn == turn) pass_turn();
    return buffer;
}

void copy(void* to, const void* from, int bytes) {
    Fiber& own = block.fibers[block.current];
    own.copies.push_back({to, from, bytes, own.group});
}

void commit() { block.fibers[block.current].group++; }

void wait(int left) {
    Fiber& own = block.fibers[block.current];
    size_t kept = 0;
    for (Copy& copy : own.copies) {
        if (copy.group + left >= own.group) {
            own.copies[kept++] = copy;
        } else if (copy.from) {
            memcpy(copy.to, copy.from, copy.bytes);
        } else {
            memset(copy.to, 0, copy.bytes);
        }
    }
    own.copies.resize(kept);
}

static void run_fiber() {
    block.kernel(block.arguments);
    block.fibers[block.current].done = true;
    block.alive--;
    open_if_complete();
    pass_turn();
}

static void run_block() {
    unsigned threads = block_size.x;
    block.fibers.resize(threads);
    block.warps.resize((threads + 31) / 32);
    for (Warp& warp : block.warps) warp.arrived = warp.turn = 0;
    block.arrived = block.turn = block.counting = block.counted = 0;
    block.alive = threads;
    for (Fiber& fiber : block.fibers) {
        fiber.stack.resize(STACK_BYTES);
        fiber.copies.clear();
        fiber.group = 0;
        fiber.done = false;
        begin(fiber.place, run_fiber, fiber.stack.data(), STACK_BYTES);
    }
    while (block.alive > 0) {
        for (block.current = 0; block.current < threads; block.current++) {
            if (block.fibers[block.current].done) continue;
            thread_at = {block.current, 0, 0};
            go(block.scheduler, block.fibers[block.current].place);
        }
    }
}

// Takes a kernel's parameters out of the array of pointers that a launch gets.
template <class... A> struct Caller;
template <> struct Caller<> {
    template <class F, class... Taken> static void call(F kernel, void**, Taken... taken) { kernel(taken...); }
};
template <class First, class... Rest> struct Caller<First, Rest...> {
    template <class F, class... Taken> static void call(F kernel, void** arguments, Taken... taken) {
        First first;
        memcpy(&first, *arguments, sizeof first);
        Caller<Rest...>::call(kernel, arguments + 1, taken..., first);
    }
};
template <class... A> void invoke(void (*kernel)(A...), void** arguments) { Caller<A...>::call(kernel, arguments); }
}

#include "attention.cu"
#include "blocks.cu"
#include "matmul.cu"
#include "matmul_f8.cu"
#include "matmul_hopper.cu"
#include "experts.cu"
#include "rows.cu"
#include "sampling.cu"

struct Entry {
    const char* name;
    void (*kernel)(void**);
};

#define ENTRY(name) {#name, [](void** arguments) { emulated::invoke(&name, arguments); }}
#define ENTRIES_FOR(dim) ENTRY(attention_prefill_##dim), ENTRY(attention_decode_##dim)

static const Entry ENTRIES[] = {
    ENTRY(embed), ENTRY(add_rms_norm), ENTRY(silu_mul), ENTRY(rope_store), ENTRY(keep_rows), ENTRY(matmul_16), ENTRY(matmul_64),
    ENTRY(matmul_128), ENTRY(matmul_segmented_16), ENTRY(matmul_segmented_64), ENTRY(matmul_segmented_128), ENTRIES_FOR(16),
    ENTRIES_FOR(32), ENTRIES_FOR(64), ENTRIES_FOR(96), ENTRIES_FOR(128), ENTRY(attention_merge), ENTRY(copy_blocks),
    ENTRY(gather_layer), ENTRY(give_layer), ENTRY(fetch_extents), ENTRY(sum_extents), ENTRY(copy_extents), ENTRY(adjust), ENTRY(sample), ENTRY(report),
    ENTRY(matmul_f8), ENTRY(matmul_segmented_f8), ENTRY(widen_f8), ENTRY(route), ENTRY(sort_shares), ENTRY(mix_rows),
    ENTRY(matmul_experts_16), ENTRY(matmul_experts_64), ENTRY(matmul_experts_128), ENTRY(matmul_segmented_experts_16),
    ENTRY(matmul_segmented_experts_64), ENTRY(matmul_segmented_experts_128), ENTRY(matmul_experts_f8),
    ENTRY(matmul_segmented_experts_f8),
};

// 0, or 1 when there is no kernel of that name.
extern "C" int emulated_launch(const char* name, const unsigned* grid, unsigned threads, unsigned shared_bytes, void** arguments) {
    for (const Entry& entry : ENTRIES) {
        if (strcmp(entry.name, name) != 0) continue;
        emulated::block.kernel = entry.kernel;
        emulated::block.arguments = arguments;
        emulated::grid_size = {grid[0], grid[1], grid[2]};
        emulated::block_size = {threads, 1, 1};
        // What a block finds in shared memory is not zero.
        emulated::block.shared.assign(shared_bytes + 16, 0xff);
        for (unsigned z = 0; z < grid[2]; z++)
            for (unsigned y = 0; y < grid[1]; y++)
                for (unsigned x = 0; x < grid[0]; x++) {
                    emulated::block_at = {x, y, z};
                    emulated::run_block();
                }
        return 0;
    }
    return 1;
}
