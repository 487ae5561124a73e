// Samples the next id of a row of logits, or scores a known one, by the recipe of worker/src/sample/mod.rs. Sums that
// decide anything are taken in integers: the same on every rank, whatever the order of the threads.
#include "device.cuh"

constexpr u32 MAX_TOP = 20;
constexpr u32 FAULT = 0xffffffffu;
constexpr float GREEDY_BELOW = 1e-5f;

// One sequence's sampler. The host has the same struct in backend/cuda/sampler.rs.
struct SlotSampler {
  float temperature, top_p, min_p, presence, frequency, repetition;
  u32 top_k, seed_low, seed_high, min_tokens, bias_count, end_count;
  u32 logprobs;          // alternatives + 1; 0 = none
  u32 padding;
  u32* seen;             // [vocabulary]: times generated, plus IN_PROMPT; null where there is no penalty
  const u32* bias_ids;   // [bias_count]
  const float* biases;   // [bias_count]
  const u32* end_ids;    // [end_count]
};
constexpr u32 IN_PROMPT = 0x80000000u;

struct Request {
  u32 row, slot, position;
  u32 target;  // FAULT: sample; otherwise score this id
  u32 top;     // alternatives of a score
  u32 mask;    // which of `masks` bounds the sample; FAULT: none
  u32 link;    // samples of this sequence before this one in the step: only if each drew its request's `draft token`
  u32 draft;   // what the next link takes this one to sample
  u32 length;  // links of the chain; of more than one, `settle_drafts` says which count
};

struct Answer {
  u32 id, rank, tops;
  float logprob;
  u32 top_ids[MAX_TOP];
  float top_logprobs[MAX_TOP];
};

// Order-preserving map of floats to integers.
__device__ __forceinline__ u32 sort_key(float x) {
  const u32 u = __float_as_uint(__fadd_rn(x, 0.f));  // -0 becomes +0: they are equal
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

__device__ __forceinline__ u64 warp_max_u64(u64 v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = max(v, (u64)__shfl_xor_sync(0xffffffffu, v, o));
  return v;
}
__device__ __forceinline__ u64 warp_sum_u64(u64 v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += (u64)__shfl_xor_sync(0xffffffffu, v, o);
  return v;
}
template <typename Reduce>
__device__ __forceinline__ u64 block_u64(u64 v, u64* scratch, Reduce reduce) {
  v = reduce(v);
  __syncthreads();
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
  __syncthreads();
  if (threadIdx.x < WARP) {
    const u64 w = reduce(threadIdx.x < blockDim.x / WARP ? scratch[threadIdx.x] : 0);
    if (threadIdx.x == 0) scratch[32] = w;
  }
  __syncthreads();
  return scratch[32];
}
__device__ __forceinline__ u64 block_max_u64(u64 v, u64* scratch) {
  return block_u64(v, scratch, [](u64 x) { return warp_max_u64(x); });
}
__device__ __forceinline__ u64 block_sum_u64(u64 v, u64* scratch) {
  return block_u64(v, scratch, [](u64 x) { return warp_sum_u64(x); });
}

// (value, id) in one number whose maximum is the largest value, of equal ones the lowest id.
__device__ __forceinline__ u64 candidate(float value, u32 id) { return (u64)sort_key(value) << 32 | (u32)~id; }

// Four words of Philox4x32-10.
__device__ __forceinline__ uint4 philox(u32 c0, u32 c1, u32 k0, u32 k1) {
  u32 c2 = 0, c3 = 0;
#pragma unroll
  for (int i = 0; i < 10; i++) {
    const u32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const u32 high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}
__device__ __forceinline__ float gumbel(u32 word) {
  const float v = fminf(__fadd_rn(__fmul_rn((float)word, 2.3283064365386963e-10f), 1.1641532182693481e-10f), 0.99999994f);
  return -logf(-log1pf(-v));
}

// f(number, index) for every number of a row, eight loads on their way at a time. All threads of the block take part.
template <typename F>
__device__ __forceinline__ void for_each(const float* numbers, u32 count, F f) {
  constexpr u32 AT_ONCE = 8;
  for (u32 base = threadIdx.x; base < count; base += blockDim.x * AT_ONCE) {
    float v[AT_ONCE];
#pragma unroll
    for (u32 j = 0; j < AT_ONCE; j++) {
      const u32 i = base + j * blockDim.x;
      if (i < count) v[j] = numbers[i];
    }
#pragma unroll
    for (u32 j = 0; j < AT_ONCE; j++) {
      const u32 i = base + j * blockDim.x;
      if (i < count) f(v[j], i);
    }
  }
}

// The Gumbel number of an id at the request's position.
__device__ __forceinline__ float gumbel_of(u32 id, const Request& request, const SlotSampler& sampler) {
  const uint4 words = philox(id / 4, request.position, sampler.seed_low, sampler.seed_high);
  return gumbel(id % 4 == 0 ? words.x : id % 4 == 1 ? words.y : id % 4 == 2 ? words.z : words.w);
}

// Sums of 45-bit weights by bin, each in three native 32-bit counters of 15 bits: exact, and the same in any order. A row has
// fewer than 2^17 + 1 token IDs.
struct Histogram {
  u32 parts[3][256];
  __device__ __forceinline__ void add(u32 bin, u64 weight) {
    const u32 low = (u32)weight & 0x7fff, middle = (u32)(weight >> 15) & 0x7fff, high = (u32)(weight >> 30);
    if (low) atomicAdd(&parts[0][bin], low);
    if (middle) atomicAdd(&parts[1][bin], middle);
    if (high) atomicAdd(&parts[2][bin], high);
  }
  __device__ __forceinline__ u64 at(u32 bin) const {
    return (u64)parts[0][bin] + ((u64)parts[1][bin] << 15) + ((u64)parts[2][bin] << 30);
  }
};

// The largest key T for which the weights of all candidates with key >= T reach `wanted`; the smallest key where they never
// do. weight(x) is 0 for what is no candidate. Radix select, eight bits a pass.
template <typename Weight>
__device__ __forceinline__ u32 select_threshold(const float* x, u32 vocabulary, u64 wanted, Histogram& histogram, u64* chosen,
                                                Weight weight) {
  u32 prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    for (u32 i = threadIdx.x; i < 3 * 256; i += blockDim.x) histogram.parts[i / 256][i % 256] = 0;
    __syncthreads();
    const u32 mask = shift == 24 ? 0 : 0xffffffffu << (shift + 8);
    for_each(x, vocabulary, [&](float v, u32) {
      const u32 k = sort_key(v);
      if ((k & mask) != prefix) return;
      const u64 w = weight(v);
      if (w) histogram.add(k >> shift & 255, w);
    });
    __syncthreads();
    if (threadIdx.x < WARP) {
      // lane l holds the bins 255 - 8l down to 248 - 8l: sums from the top
      u64 own = 0;
      for (u32 j = 0; j < 8; j++) own += histogram.at(255 - threadIdx.x * 8 - j);
      u64 above = own;
#pragma unroll
      for (int o = 1; o < 32; o <<= 1) {
        const u64 other = __shfl_up_sync(0xffffffffu, above, o);
        if ((int)threadIdx.x >= o) above += other;
      }
      const u32 reached = __ballot_sync(0xffffffffu, above >= wanted);
      const u32 lane = reached ? __ffs(reached) - 1 : 31;
      if (threadIdx.x == lane) {
        u64 before = above - own;
        u32 bin = 255 - threadIdx.x * 8;
        for (u32 j = 0; j < 7; j++, bin--) {
          if (before + histogram.at(bin) >= wanted) break;
          before += histogram.at(bin);
        }
        chosen[0] = bin;
        chosen[1] = wanted - (before < wanted ? before : wanted);
      }
    }
    __syncthreads();
    prefix |= (u32)chosen[0] << shift;
    wanted = chosen[1];
  }
  __syncthreads();
  return prefix;
}

// Launch: grid (requests), block (1024). `logits` [rows][vocabulary] raw; `work` [requests][vocabulary] scratch.
// Responses [requests]; a sampled id also becomes last_sampled[slot] and is counted. id FAULT = the logits hold no numbers.
// `masks` [samples with a grammar][ceil(vocabulary / 32)]: bit i % 32 of word i / 32 lets id i be sampled.
KERNEL __launch_bounds__(1024) sample_rows(const float* logits, float* work, const Request* requests, SlotSampler* samplers,
                                           const u32* masks, u32* last_sampled, u32* generated, Answer* answers,
                                           u32 vocabulary) {
  wait_for_previous_kernel();
  __shared__ u64 scratch64[33];
  __shared__ Histogram histogram;
  __shared__ u64 chosen[2];
  __shared__ float scratch[33];
  const Request request = requests[blockIdx.x];
  const bool drawing = request.target == FAULT;
  const SlotSampler sampler = samplers[request.slot];
  const float* raw = logits + (u64)request.row * vocabulary;
  float* x = work + (u64)blockIdx.x * vocabulary;
  Answer& answer = answers[blockIdx.x];

  // Step 1: what is no number; the largest on the way.
  u64 best = 0;
  u32 bad = 0;
  for_each(raw, vocabulary, [&](float v, u32 i) {
    if (!(v < -NEGATIVE_INFINITY)) bad = 1;  // NaN or +inf
    best = max(best, candidate(v, i));
  });
  bad = (u32)block_max_u64(bad, scratch64);
  const u64 largest_raw = block_max_u64(best, scratch64);
  if (bad || (u32)(largest_raw >> 32) == sort_key(NEGATIVE_INFINITY)) {
    if (threadIdx.x == 0) {
      answer.id = drawing ? FAULT : request.target, answer.rank = 0, answer.tops = 0;
      answer.logprob = __int_as_float(0x7fc00000);
      // the sequence is dead, but a step that is already on its way may read this
      if (drawing && request.length == 1) last_sampled[request.slot] = 0;
    }
    return;
  }

  u32 id = request.target;
  if (drawing) {
    // Steps 3 to 5, into the scratch where anything changes the logits.
    const bool greedy = sampler.temperature < GREEDY_BELOW;
    const u32 so_far = generated[request.slot] + request.link;
    const u32* mask = request.mask == FAULT ? nullptr : masks + (u64)request.mask * ((vocabulary + 31) / 32);
    const bool adjusted = sampler.seen || sampler.bias_count || so_far < sampler.min_tokens || mask;
    const float temperature = greedy ? 1.f : sampler.temperature;
    if (adjusted) {
      for_each(raw, vocabulary, [&](float v, u32 i) { x[i] = v; });
      __syncthreads();
      if (threadIdx.x == 0)  // an id may occur twice: one thread, in order
        for (u32 i = 0; i < sampler.bias_count; i++)
          if (sampler.bias_ids[i] < vocabulary) x[sampler.bias_ids[i]] += sampler.biases[i];
      __syncthreads();
      if (so_far < sampler.min_tokens)
        for (u32 i = threadIdx.x; i < sampler.end_count; i += blockDim.x)
          if (sampler.end_ids[i] < vocabulary) x[sampler.end_ids[i]] = NEGATIVE_INFINITY;
      __syncthreads();
      for_each(x, vocabulary, [&](float v, u32 i) {
        if (sampler.seen) {
          // what the links before this one drew, if it counts at all
          u32 drafted = 0;
          for (u32 j = 1; j <= request.link; j++) drafted += requests[blockIdx.x - j].draft == i;
          const u32 seen = sampler.seen[i] + drafted, count = seen & ~IN_PROMPT;
          if (seen && sampler.repetition != 1.f) v = v > 0.f ? __fdiv_rn(v, sampler.repetition) : __fmul_rn(v, sampler.repetition);
          if (count) v = __fadd_rn(__fadd_rn(v, -__fmul_rn(sampler.frequency, (float)count)), -sampler.presence);
        }
        x[i] = mask && !(mask[i / 32] >> i % 32 & 1) ? NEGATIVE_INFINITY : __fdiv_rn(v, temperature);
      });
      __syncthreads();
    } else if (!greedy) {
      for_each(raw, vocabulary, [&](float v, u32 i) { x[i] = __fdiv_rn(v, temperature); });
      __syncthreads();
    }
    if (greedy) {
      u64 winner = largest_raw;
      if (adjusted) {
        best = 0;
        for_each(x, vocabulary, [&](float v, u32 i) { best = max(best, candidate(v, i)); });
        winner = block_max_u64(best, scratch64);
      }
      id = (u32)(winner >> 32) <= sort_key(NEGATIVE_INFINITY) ? FAULT : ~(u32)winner;
    } else {
      // Steps 7 and 8: every filter raises the key that an id must reach.
      float top = __fdiv_rn(raw[~(u32)largest_raw], temperature);
      if (adjusted) {
        top = NEGATIVE_INFINITY;
        for_each(x, vocabulary, [&](float v, u32) { top = fmaxf(top, v); });
        top = block_max(top, scratch);
      }
      u32 floor_key = sort_key(NEGATIVE_INFINITY) + 1;
      if (sampler.min_p > 0.f) floor_key = max(floor_key, sort_key(top + logf(sampler.min_p)));
      if (sampler.top_k) {
        const u32 least = floor_key;
        const u32 threshold = select_threshold(x, vocabulary, sampler.top_k, histogram, chosen,
                                               [&](float v) { return (u64)(sort_key(v) >= least ? 1 : 0); });
        floor_key = max(floor_key, threshold);
      }
      if (sampler.top_p < 1.f) {
        const u32 least = floor_key;
        // just under 2^45 a unit of probability
        auto weight = [&](float v) { return sort_key(v) >= least ? (u64)(expf(v - top) * 35184370000000.f) : 0; };
        u64 total = 0;
        for_each(x, vocabulary, [&](float v, u32) { total += weight(v); });
        total = block_sum_u64(total, scratch64);
        u64 wanted = (u64)((double)sampler.top_p * (double)total);
        if (wanted == 0) wanted = 1;
        floor_key = max(floor_key, select_threshold(x, vocabulary, wanted, histogram, chosen, weight));
      }
      // Step 9. The largest Gumbel number is below 22.9: an id further below the top than the top's own number leaves room for
      // can't win, and is spared its random number.
      const float reach = top - 22.9f + gumbel_of(~(u32)largest_raw, request, sampler);
      const u32 worth = adjusted ? floor_key : max(floor_key, sort_key(reach));
      best = 0;
      for_each(x, vocabulary, [&](float v, u32 i) {
        if (sort_key(v) >= worth) best = max(best, candidate(__fadd_rn(v, gumbel_of(i, request, sampler)), i));
      });
      const u64 winner = block_max_u64(best, scratch64);
      id = winner == 0 || top == NEGATIVE_INFINITY ? FAULT : ~(u32)winner;
    }
  }

  // Step 2, from the raw logits.
  const u32 wanted_top = drawing ? (sampler.logprobs ? sampler.logprobs - 1 : 0) : request.top;
  const bool scoring = !drawing || sampler.logprobs;
  if (scoring && id != FAULT) {
    const float largest = raw[~(u32)largest_raw], target = id < vocabulary ? raw[id] : NEGATIVE_INFINITY;
    // 2^44 a unit again: deterministic, and finer than a float
    u64 sum = 0, before = 0;
    for_each(raw, vocabulary, [&](float v, u32 i) {
      sum += (u64)((double)expf(v - largest) * 17592186044416.0);
      before += v > target || (v == target && i < id) ? 1 : 0;
    });
    sum = block_sum_u64(sum, scratch64);
    before = block_sum_u64(before, scratch64);
    const double log_sum = (double)largest + log((double)sum / 17592186044416.0);
    const u32 tops = min(min(wanted_top, MAX_TOP), vocabulary);
    u64 last = ~0ull;
    for (u32 n = 0; n < tops; n++) {
      best = 0;
      for_each(raw, vocabulary, [&](float v, u32 i) {
        const u64 c = candidate(v, i);
        if (c < last) best = max(best, c);
      });
      last = block_max_u64(best, scratch64);
      if (threadIdx.x == 0) {
        answer.top_ids[n] = ~(u32)last;
        answer.top_logprobs[n] = (float)((double)raw[~(u32)last] - log_sum);
      }
    }
    if (threadIdx.x == 0) {
      answer.rank = (u32)before + 1, answer.tops = tops;
      answer.logprob = (float)((double)target - log_sum);
    }
  }
  if (threadIdx.x == 0) {
    answer.id = id;
    if (drawing && request.length == 1) {
      last_sampled[request.slot] = id == FAULT ? 0 : id;
      generated[request.slot] += 1;
      if (sampler.seen && id < vocabulary) sampler.seen[id] += 1;
    }
  }
}

// Of each chain of samples, remembers those that count: up to the first that is not what was drafted. Launch: grid
// (requests / 128, rounded up), block (128), after sample_rows.
KERNEL settle_drafts(const Request* requests, u32 count, const Answer* answers, SlotSampler* samplers, u32* last_sampled,
                     u32* generated, u32 vocabulary) {
  wait_for_previous_kernel();
  const u32 first = blockIdx.x * blockDim.x + threadIdx.x;
  if (first >= count) return;
  const Request request = requests[first];
  if (request.target != FAULT || request.link || request.length == 1) return;
  u32* seen = samplers[request.slot].seen;
  for (u32 link = 0; link < request.length; link++) {
    const u32 id = answers[first + link].id;
    if (id == FAULT) {
      // met again by the next step, unless it was the first
      if (link == 0) last_sampled[request.slot] = 0;
      return;
    }
    last_sampled[request.slot] = id;
    generated[request.slot] += 1;
    if (seen && id < vocabulary) seen[id] += 1;
    if (id != requests[first + link].draft) return;
  }
}

// seen[id] |= IN_PROMPT for the token IDs of the prompt; += 1 for token IDs generated elsewhere. Launch: grid (any), block (256).
KERNEL count_ids(u32* seen, const u32* prompt, u32 prompt_count, const u32* generated, u32 generated_count, u32 vocabulary) {
  wait_for_previous_kernel();
  const u32 stride = gridDim.x * blockDim.x;
  for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < prompt_count; i += stride)
    if (prompt[i] < vocabulary) atomicOr(&seen[prompt[i]], IN_PROMPT);
  for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < generated_count; i += stride)
    if (generated[i] < vocabulary) atomicAdd(&seen[generated[i]], 1u);
}
