// From rows of logits to tokens, by the rules of engine/src/sampling.rs: bias, penalties and bans, then the largest logit or
// the inverse CDF over the tokens that top-k, top-p and min-p keep, most likely first, ties by lowest id; log-probabilities of
// the untouched row. One thread block of 512 threads per draw.
//
// Weights are summed as integers of 2^-38, so that a sum is the same in any order. A token is found without sorting: by
// histograms of the weights over what orders the tokens, first coarsely by distance from the largest logit, then by the
// bits of the logit, each time only within the bin found before.
#include "common.cuh"

#define THREADS 512
#define COARSE 1024
#define AT_ONCE 16
#define UNIT 274877906944.0f

struct Edit {
    u32 id;
    u32 count;
    float bias;
    u32 _pad;
};

// One draw whose logits are changed: its edits are `biases`, then `penalties`, then `bans` of them, from `at` on.
struct Adjust {
    u32 row;
    u32 out;
    u32 at;
    u32 biases;
    u32 penalties;
    u32 bans;
    float repetition;
    float presence;
    float frequency;
    u32 _pad;
};

struct Sample {
    // Row of the logits; when `adjusted`, of the changed ones.
    u32 row;
    u32 adjusted;
    u32 seed_low;
    u32 seed_high;
    u32 position;
    u32 choice;
    float temperature;
    u32 top_k;
    float top_p;
    float min_p;
};

struct Report {
    u32 row;
    // The draw whose token it is about, or the token itself.
    u32 draw;
    u32 token;
    u32 given;
    u32 top;
    // Where its `top` alternatives begin.
    u32 at;
};

struct Alternative {
    u32 id;
    float logprob;
};

// Copies a row of logits and changes it: each id has at most one edit of each kind.
KERNEL void adjust(const float* logits, u32 vocab, const Adjust* draws, const Edit* edits, float* out) {
    begin();
    Adjust a = draws[blockIdx.x];
    const float* from = logits + (u64)a.row * vocab;
    float* to = out + (u64)a.out * vocab;
    for (u32 i = threadIdx.x; i < vocab; i += blockDim.x) to[i] = from[i];
    __syncthreads();
    for (u32 i = threadIdx.x; i < a.biases; i += blockDim.x) {
        Edit edit = edits[a.at + i];
        if (edit.id < vocab) to[edit.id] = to[edit.id] + edit.bias;
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < a.penalties; i += blockDim.x) {
        Edit edit = edits[a.at + a.biases + i];
        if (edit.id >= vocab) continue;
        float logit = to[edit.id];
        float repeated = logit > 0.0f ? logit / a.repetition : logit * a.repetition;
        float presence = edit.count > 0 ? a.presence : 0.0f;
        to[edit.id] = repeated - a.frequency * (float)edit.count - presence;
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < a.bans; i += blockDim.x) {
        Edit edit = edits[a.at + a.biases + a.penalties + i];
        if (edit.id < vocab) to[edit.id] = -INFINITE;
    }
}

// Philox4x32-10 (Salmon et al., SC'11): a number in [0, 2^24) for (position, choice, draw 0).
__device__ __forceinline__ u32 philox24(const Sample& a) {
    u32 c[4] = {a.position, a.choice, 0, 0}, k[2] = {a.seed_low, a.seed_high};
    for (int round = 0; round < 10; round++) {
        if (round > 0) {
            k[0] += 0x9E3779B9u;
            k[1] += 0xBB67AE85u;
        }
        u64 p0 = (u64)0xD2511F53u * c[0], p1 = (u64)0xCD9E8D57u * c[2];
        c[0] = (u32)(p1 >> 32) ^ c[1] ^ k[0];
        c[1] = (u32)p1;
        u32 third = (u32)(p0 >> 32) ^ c[3] ^ k[1];
        c[3] = (u32)p0;
        c[2] = third;
    }
    return c[0] >> 8;
}

// e^x for x <= 0: `exp` of engine/src/sampling.rs, without fused operations.
__device__ __forceinline__ float weight_of(float x) {
    float bounded = x >= -87.0f ? x : -87.0f;
    float shifted = bounded * 1.442695041f + 12582912.0f;
    float n = shifted - 12582912.0f;
    float r = bounded - n * 0.693359375f - n * -2.12194440e-4f;
    float p = ((((1.9875691e-4f * r + 1.3981999e-3f) * r + 8.333452e-3f) * r + 4.1665796e-2f) * r + 0.16666666f) * r + 0.5f;
    float power = __uint_as_float((__float_as_uint(shifted) + 127) << 23);
    return x >= -87.0f ? (p * r * r + r + 1.0f) * power : 0.0f;
}

// Larger for more likely; -0 and +0 are equal logits.
__device__ __forceinline__ u32 order_of(float logit) {
    u32 bits = __float_as_uint(logit + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

struct Best {
    float value;
    u32 id;
};

__device__ __forceinline__ bool better(const Best& a, const Best& b) {
    return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// The best over the thread block, in every thread.
__device__ __forceinline__ Best block_best(Best best) {
    __shared__ float values[THREADS / 32];
    __shared__ u32 ids[THREADS / 32];
    for (int distance = 16; distance > 0; distance /= 2) {
        Best other = {__shfl_xor_sync(~0u, best.value, distance), __shfl_xor_sync(~0u, best.id, distance)};
        if (better(other, best)) best = other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        values[threadIdx.x / 32] = best.value;
        ids[threadIdx.x / 32] = best.id;
    }
    __syncthreads();
    best.value = values[0];
    best.id = ids[0];
    for (int i = 1; i < THREADS / 32; i++) {
        Best other = {values[i], ids[i]};
        if (better(other, best)) best = other;
    }
    return best;
}

__device__ __forceinline__ u64 block_sum_u64(u64 x) {
    __shared__ u64 sums[THREADS / 32];
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    u64 all = 0;
    for (int i = 0; i < THREADS / 32; i++) all += sums[i];
    return all;
}

// A row of logits as weights. Tokens without weight are never drawn and are left out of every count.
struct Row {
    const float* logits;
    u32 vocab;
    float max;
    float temperature;

    __device__ __forceinline__ float scaled(float logit) const { return (logit - max) / temperature; }
    __device__ __forceinline__ u64 weight(float logit) const { return (u64)(weight_of(scaled(logit)) * UNIT); }
    // Never smaller for a less likely token.
    __device__ __forceinline__ u32 coarse(float logit) const {
        float distance = scaled(logit) * -36.0f;
        return distance < (float)(COARSE - 1) ? (u32)distance : COARSE - 1;
    }
};

// Where in the order of tokens something was found: those before it, and the equal ones it is among.
struct Found {
    // False: it lies behind the last token.
    bool inside;
    u32 order;
    u64 count, mass;
    // Weight of each equal token.
    u64 weight;
};

// The histogram's first bin at which the running sum exceeds `target`, with the sums before it; `bins` if there is none.
// The first warp searches, everybody gets the answer.
struct Bin {
    u32 index;
    u64 count, mass;
};

__device__ __forceinline__ Bin search(const u32* counts, const u64* masses, int bins, bool by_count, u64 target, u64 count, u64 mass) {
    __shared__ Bin answer;
    __syncthreads();
    if (threadIdx.x < 32) {
        int lane = threadIdx.x, share = bins / 32;
        u64 own_count = 0, own_mass = 0;
        for (int i = 0; i < share; i++) {
            own_count += counts[lane * share + i];
            own_mass += masses[lane * share + i];
        }
        // Sums of the lanes before this one.
        u64 before_count = own_count, before_mass = own_mass;
        for (int distance = 1; distance < 32; distance *= 2) {
            u64 c = __shfl_up_sync(~0u, before_count, distance), m = __shfl_up_sync(~0u, before_mass, distance);
            if (lane >= distance) {
                before_count += c;
                before_mass += m;
            }
        }
        before_count += count - own_count;
        before_mass += mass - own_mass;
        u64 before = by_count ? before_count : before_mass, own = by_count ? own_count : own_mass;
        if (lane == 31 && before + own <= target) {
            answer.index = bins;
            answer.count = before_count + own_count;
            answer.mass = before_mass + own_mass;
        }
        if (before <= target && before + own > target) {
            for (int i = 0; i < share; i++) {
                u64 c = counts[lane * share + i], m = masses[lane * share + i];
                if ((by_count ? before_count + c : before_mass + m) > target) {
                    answer.index = lane * share + i;
                    answer.count = before_count;
                    answer.mass = before_mass;
                    break;
                }
                before_count += c;
                before_mass += m;
            }
        }
    }
    __syncthreads();
    return answer;
}

// The token at which the running count (or mass) of tokens, most likely first, exceeds `target`.
__device__ __forceinline__ Found find(const Row& row, bool by_count, u64 target) {
    __shared__ u32 counts[COARSE];
    __shared__ u64 masses[COARSE];
    Bin bin = {0, 0, 0};
    u32 coarse = 0, prefix = 0;
    for (int level = 0; level < 5; level++) {
        int bins = level == 0 ? COARSE : 256, shift = 32 - 8 * level;
        __syncthreads();
        for (int i = threadIdx.x; i < bins; i += THREADS) {
            counts[i] = 0;
            masses[i] = 0;
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < row.vocab; i += THREADS) {
            float logit = row.logits[i];
            u64 weight = row.weight(logit);
            if (weight == 0) continue;
            u32 at = row.coarse(logit), order = ~order_of(logit);
            if (level > 0) {
                // Within the bin, and equal in the bits seen so far.
                if (at != coarse || (level > 1 && order >> (shift + 8) != prefix)) continue;
                at = order >> shift & 255;
            }
            atomicAdd(&counts[at], 1u);
            atomicAdd(&masses[at], weight);
        }
        bin = search(counts, masses, bins, by_count, target, bin.count, bin.mass);
        if (bin.index == (u32)bins) {
            Found none = {false, 0, bin.count, bin.mass, 0};
            return none;
        }
        if (level == 0) coarse = bin.index;
        else prefix = prefix << 8 | bin.index;
    }
    __syncthreads();
    Found found = {true, ~prefix, bin.count, bin.mass, masses[bin.index] / counts[bin.index]};
    return found;
}

// The `nth` token, by id, whose logit has this order.
__device__ __forceinline__ u32 nth_of(const Row& row, u32 order, u64 nth) {
    __shared__ u32 answer;
    __shared__ u8 equal[THREADS];
    u64 before = 0;
    for (u32 base = 0; base < row.vocab; base += THREADS) {
        u32 id = base + threadIdx.x;
        bool is = id < row.vocab && order_of(row.logits[id]) == order;
        u32 count = __syncthreads_count(is);
        if (before + count > nth) {
            equal[threadIdx.x] = is;
            __syncthreads();
            u64 rank = before;
            for (u32 i = 0; i < threadIdx.x && is; i++) rank += equal[i];
            if (is && rank == nth) answer = id;
            __syncthreads();
            return answer;
        }
        before += count;
    }
    return 0;
}

__device__ __forceinline__ Best largest(const float* logits, u32 vocab) {
    Best best = {-INFINITE, ~0u};
    // Some are read at a time, so that their reads do not wait for one another.
    for (u32 i = threadIdx.x; i < vocab; i += THREADS * AT_ONCE) {
        float some[AT_ONCE];
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++) some[j] = i + j * THREADS < vocab ? logits[i + j * THREADS] : -INFINITE;
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++) {
            if (some[j] > best.value) {
                best.value = some[j];
                best.id = i + j * THREADS;
            }
        }
    }
    best = block_best(best);
    if (best.id == ~0u) best.id = 0;
    return best;
}

// Mass of the tokens that min-p keeps: all before the first one whose weight is below it, the most likely one always.
__device__ __forceinline__ u64 kept_by_min_p(const Row& row, float min_p, u64 top) {
    Best cut = {-INFINITE, ~0u};
    for (u32 i = threadIdx.x; i < row.vocab; i += THREADS) {
        float logit = row.logits[i];
        if (weight_of(row.scaled(logit)) < min_p && logit > cut.value) {
            cut.value = logit;
            cut.id = i;
        }
    }
    cut = block_best(cut);
    u64 mass = 0;
    for (u32 i = threadIdx.x; i < row.vocab; i += THREADS) {
        float logit = row.logits[i];
        if (logit > cut.value) mass += row.weight(logit);
    }
    mass = block_sum_u64(mass);
    return mass > top ? mass : top;
}

__device__ __forceinline__ u32 pick(const Row& row, const Sample& a) {
    u64 mass = 0;
    bool few = a.top_k > 0 && a.top_k < row.vocab;
    if (few) {
        Found last = find(row, true, a.top_k - 1);
        mass = last.inside ? last.mass + (a.top_k - last.count) * last.weight : last.mass;
    } else {
        for (u32 i = threadIdx.x; i < row.vocab; i += THREADS) mass += row.weight(row.logits[i]);
        mass = block_sum_u64(mass);
    }
    u64 kept = mass;
    if (a.top_p < 1.0f) {
        u64 least = (u64)ceil((double)a.top_p * (double)mass);
        Found last = find(row, false, least > 0 ? least - 1 : 0);
        u64 within = last.inside ? last.mass + ((least > 0 ? least - 1 : 0) - last.mass) / last.weight * last.weight + last.weight
                                 : last.mass;
        kept = within < kept ? within : kept;
    }
    if (a.min_p > 0.0f) {
        u64 within = kept_by_min_p(row, a.min_p, row.weight(row.max));
        kept = within < kept ? within : kept;
    }
    // The product with a 24-bit fraction needs more than 64 bits.
    u64 fraction = philox24(a);
    u64 target = __umul64hi(fraction, kept) << 40 | (fraction * kept) >> 24;
    Found found = find(row, false, target);
    return nth_of(row, found.order, (target - found.mass) / found.weight);
}

// Token of each draw.
KERNEL void __launch_bounds__(THREADS) sample(const float* logits, const float* adjusted, u32 vocab, const Sample* draws, u32* tokens) {
    begin();
    Sample a = draws[blockIdx.x];
    const float* from = (a.adjusted ? adjusted : logits) + (u64)a.row * vocab;
    Best best = largest(from, vocab);
    u32 token = best.id;
    if (a.temperature > 0.0f && best.value > -INFINITE && best.value < INFINITE) {
        Row row = {from, vocab, best.value, a.temperature};
        token = pick(row, a);
    }
    if (threadIdx.x == 0) tokens[blockIdx.x] = token;
}

// max + ln of the sum of exponentials: per thread in f64, then the warps' trees, then the warps in order.
__device__ __forceinline__ float log_sum_exp(const float* logits, u32 vocab) {
    __shared__ double sums[THREADS / 32];
    float max = largest(logits, vocab).value;
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < vocab; i += THREADS) sum += (double)exp_of(logits[i] - max);
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    double all = 0.0;
    for (int i = 0; i < THREADS / 32; i++) all += sums[i];
    if (max == INFINITE || max == -INFINITE) return max;
    return (float)((double)max + log(all));
}

// Log-probability of each reported token and of the `top` most likely ones, most likely first, ties by lowest id.
KERNEL void __launch_bounds__(THREADS) report(const float* logits, u32 vocab, const Report* draws, const u32* tokens, float* logprobs, Alternative* top) {
    begin();
    Report a = draws[blockIdx.x];
    const float* row = logits + (u64)a.row * vocab;
    u32 token = a.given ? a.token : tokens[a.draw];
    float sum = log_sum_exp(row, vocab);
    if (threadIdx.x == 0) logprobs[blockIdx.x] = (token < vocab ? row[token] : -INFINITE) - sum;
    Best last = {INFINITE, 0};
    for (u32 rank = 0; rank < a.top; rank++) {
        Best best = {-INFINITE, ~0u};
        for (u32 i = threadIdx.x; i < vocab; i += THREADS) {
            Best one = {row[i], i};
            bool after = rank == 0 || better(last, one);
            if (after && (better(one, best) || best.id == ~0u) && one.value == one.value) best = one;
        }
        last = block_best(best);
        if (threadIdx.x == 0) {
            top[a.at + rank].id = last.id;
            top[a.at + rank].logprob = last.value - sum;
        }
    }
}
