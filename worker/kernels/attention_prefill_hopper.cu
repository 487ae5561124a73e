// Causal attention for chunks of a prompt, heads of 128, on Hopper's warpgroup matrix instructions, in the manner of
// FlashAttention-3: one warpgroup brings keys and values, two compute 64 rows each, 128 keys at a time. A computing
// warpgroup's GEMMs with the values of one round run under its softmax of the next, and the two take turns at the matrix
// unit, so that one multiplies while the other exponentiates.
//
// Rows of shared memory have 128 bytes, the chunks of a row exchanged by its number, as the cache's tiles lie: they are copied whole.
// bf16: a round's keys (and values) are two halves of 64 numbers each, [half][128 tokens][64]. e4m3: keys are [128 tokens][128];
// the tensor core wants values of one byte as [128 numbers][128 tokens], so `transpose_values` brings those of the chunk's
// sequences into that form first. Queries (each row by its own scale) and weights are then e4m3 too. Its sums are kept to some
// thirteen bits, which a long context would show: GEMMs of a round with its values are added to the output in f32.
#include "device.cuh"

constexpr u32 D = 128, ROUND = 2 * KV_BLOCK, GROUP_THREADS = 128, COMPUTING = 2;
constexpr u32 HALF_BYTES = ROUND * 128, TILE_HALF = KV_BLOCK * 128;
// Numbers of barriers: turns at the tensor core of the two, the last values cleared, the queries of each computing group.
constexpr u32 TURN = 1, CLEARED = 3, QUERIES = 4;

// What depends on the numbers in the cache.
template <typename Kv>
struct Format {
  static constexpr bool NARROW = sizeof(Kv) == 1;
  static constexpr u32 STAGES = NARROW ? 4 : 2;
  static constexpr u32 HALVES = NARROW ? 1 : 2;  // of a row
  static constexpr u32 STAGE_BYTES = HALVES * HALF_BYTES, QUERY_BYTES = HALVES * TILE_HALF;
  // A row's largest weight is 2^HEADROOM at first, and may grow 2^REACH times larger before its reference is moved. e4m3 ends at
  // 448 and at 2^-9, and what is smaller is lost.
  static constexpr float REACH = NARROW ? 2.f : 8.f, HEADROOM = NARROW ? 6.f : 0.f;
  // Dynamic shared memory: 1024 for alignment, queries, stages of K and V.
  static constexpr u32 SHARED_BYTES = 1024 + COMPUTING * QUERY_BYTES + 2 * STAGES * STAGE_BYTES;
};

struct Barriers {
  u64 keys_full[4], keys_empty[4], values_full[4], values_empty[4];
};

// Brings rounds 0..rounds: keys of round r + 1 before values of round r, as they are consumed. One thread.
template <typename Kv>
__device__ __forceinline__ void bring(const Kv* k_cache, const Kv* v_cache, const u32* table, u32 blocks, u32 kv_heads, u32 kv_head,
                                      u8* k_stages, u8* v_stages, Barriers& barriers) {
  using F = Format<Kv>;
  const u32 rounds = (blocks + 1) / 2;
  // A round's keys or bf16 values: two blocks of the cache.
  auto fetch = [&](const Kv* cache, u32 round, u8* stages, u64* full, u64* empty) {
    const u32 stage = round % F::STAGES, count = min(2u, blocks - round * 2);
    u8* target = stages + stage * F::STAGE_BYTES;
    barrier_wait(&empty[stage], (round / F::STAGES & 1) ^ 1);
    barrier_arrive_expecting(&full[stage], count * F::HALVES * TILE_HALF);
    for (u32 i = 0; i < count; i++) {
      const u8* source = reinterpret_cast<const u8*>(cache + ((u64)table[round * 2 + i] * kv_heads + kv_head) * KV_BLOCK * D);
#pragma unroll
      for (u32 half = 0; half < F::HALVES; half++)
        copy_tile(target + half * HALF_BYTES + i * TILE_HALF, source + half * TILE_HALF, TILE_HALF, &full[stage]);
    }
  };
  // e4m3 values: `v_cache` is then this sequence's part of what `transpose_values` made.
  auto fetch_transposed = [&](u32 round) {
    const u32 stage = round % F::STAGES;
    barrier_wait(&barriers.values_empty[stage], (round / F::STAGES & 1) ^ 1);
    barrier_arrive_expecting(&barriers.values_full[stage], F::STAGE_BYTES);
    copy_tile(v_stages + stage * F::STAGE_BYTES, v_cache + ((u64)round * kv_heads + kv_head) * F::STAGE_BYTES, F::STAGE_BYTES,
              &barriers.values_full[stage]);
  };
  for (u32 round = 0; round <= rounds; round++) {
    if (round < rounds) fetch(k_cache, round, k_stages, barriers.keys_full, barriers.keys_empty);
    if (round == 0) continue;
    if constexpr (F::NARROW) {
      fetch_transposed(round - 1);
    } else {
      fetch(v_cache, round - 1, v_stages, barriers.values_full, barriers.values_empty);
    }
  }
}

// Arguments and output as in attention_prefill.cu; the last word of a tile is the first round of its sequence's values in `v_cache`, which
// is the output of `transpose_values` where the cache is e4m3.
// Launch: grid (kv heads, tiles), block (384), dynamic shared memory Format<Kv>::SHARED_BYTES.
template <typename Kv, typename Out>
__device__ __forceinline__ void hopper_attention(const bf16* q, const Kv* k_cache, const Kv* v_cache, const u32* tiles,
                                                 const u32* positions, const u32* tables, const u32* table_start, Out* out,
                                                 float out_scale, u32 query_heads, u32 kv_heads, float score_scale) {
  using F = Format<Kv>;
  DYNAMIC_SHARED(unaligned);
  u8* shared = align_shared_1024(unaligned);
  __shared__ Barriers barriers;
  __shared__ float row_scale[COMPUTING * 64];  // of queries in e4m3
  let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (u32 s = 0; s < F::STAGES; s++) {
      barrier_init(&barriers.keys_full[s], 1), barrier_init(&barriers.values_full[s], 1);
      barrier_init(&barriers.keys_empty[s], COMPUTING * 4), barrier_init(&barriers.values_empty[s], COMPUTING * 4);
    }
    share_barriers();
  }
  wait_for_previous_kernel();
  __syncthreads();
  const u32* tile = tiles + blockIdx.y * 4;
  const u32 kv_head = blockIdx.x, sequence = tile[0], first = tile[1], pairs = tile[2], group = query_heads / kv_heads;
  const u32 first_position = positions[first / group], last_position = positions[(first + pairs - 1) / group];
  const u32 blocks = last_position / KV_BLOCK + 1, rounds = (blocks + 1) / 2;
  u8* k_stages = shared + COMPUTING * F::QUERY_BYTES;
  u8* v_stages = k_stages + F::STAGES * F::STAGE_BYTES;
  if (threadIdx.x < GROUP_THREADS) {
    give_registers<24>();
    const Kv* values = F::NARROW ? v_cache + (u64)tile[3] * kv_heads * ROUND * D : v_cache;
    if (threadIdx.x == 0) bring<Kv>(k_cache, values, tables + table_start[sequence], blocks, kv_heads, kv_head, k_stages, v_stages, barriers);
  } else {
    take_registers<240>();
    const u32 worker = threadIdx.x / GROUP_THREADS - 1;
    const u32 warp = threadIdx.x % GROUP_THREADS / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;

    // The group's 64 rows of queries, as the tiles of keys lie.
    u8* queries = shared + worker * F::QUERY_BYTES;
    for (u32 i = threadIdx.x % GROUP_THREADS; i < 64 * 16; i += GROUP_THREADS) {
      const u32 row = i / 16, pair = worker * 64 + row, at = first + pair;
      uint4 piece = make_uint4(0, 0, 0, 0);
      if (pair < pairs) piece = *reinterpret_cast<const uint4*>(q + ((u64)(at / group) * query_heads + kv_head * group + at % group) * D + i % 16 * 8);
      if constexpr (F::NARROW) {
        const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
        float largest = 0.f;
#pragma unroll
        for (u32 w = 0; w < 4; w++) largest = fmaxf(largest, fmaxf(fabsf(low_bf16(words[w])), fabsf(high_bf16(words[w]))));
#pragma unroll
        for (u32 distance = 1; distance < 16; distance *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
        const float scale = largest > 0.f ? largest / 448.f : 1.f, inverse = 1.f / scale;
        u16 packed[4];
#pragma unroll
        for (u32 w = 0; w < 4; w++) packed[w] = pack_e4m3(low_bf16(words[w]) * inverse, high_bf16(words[w]) * inverse);
        *reinterpret_cast<uint2*>(queries + cache_place(128, row, i % 16 / 2) + i % 2 * 8) =
            make_uint2(packed[0] | (u32)packed[1] << 16, packed[2] | (u32)packed[3] << 16);
        if (i % 16 == 0) row_scale[pair] = scale;
      } else {
        *reinterpret_cast<uint4*>(queries + cache_place(256, row, i % 16)) = piece;
      }
    }
    show_shared_to_matrix_unit();
    meet(QUERIES + worker, GROUP_THREADS);
    u32 row_position[2];  // of this lane's rows, g and g + 8 of the warp's sixteen
    float scale[2];       // of their scores, base 2
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
      const u32 pair = worker * 64 + warp * 16 + g + h * 8;
      row_position[h] = first_position + (first % group + min(pair, pairs - 1)) / group;
      scale[h] = F::NARROW ? score_scale * row_scale[pair] : score_scale;
    }

    float o[16][4];
    float scores[16][4];
    float reference[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0.f, 0.f}, rescale[2];
    auto start_scores = [&](u32 round) {
      const u8* keys = k_stages + round % F::STAGES * F::STAGE_BYTES;
      settle(scores);
      matrix_unit_begin();
#pragma unroll
      for (u32 k = 0; k < F::HALVES * 4; k++) {
        // keys as they lie: rows of 128 bytes, eight rows a group of 1024
        const u64 a = matrix_descriptor(queries + k / 4 * TILE_HALF + k % 4 * 32, 16, 1024);
        const u64 b = matrix_descriptor(keys + k / 4 * HALF_BYTES + k % 4 * 32, 16, 1024);
        if constexpr (F::NARROW) {
          warpgroup_multiply_e4m3<128>(scores, a, b, k > 0);
        } else {
          warpgroup_multiply(scores, a, b, k > 0);
        }
      }
      matrix_unit_commit();
    };
    // Turns scores into weights; the output so far is to be multiplied by `rescale`.
    auto softmax = [&](u32 round) {
      const u32 token = round * ROUND;
      if (token + ROUND - 1 > first_position) {
#pragma unroll
        for (u32 j = 0; j < 16; j++)
#pragma unroll
          for (u32 i = 0; i < 4; i++)
            if (token + j * 8 + t * 2 + i % 2 > row_position[i / 2]) scores[j][i] = NEGATIVE_INFINITY;
      }
      float largest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, offset[2];
#pragma unroll
      for (u32 j = 0; j < 16; j++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) largest[i / 2] = fmaxf(largest[i / 2], scores[j][i]);
#pragma unroll
      for (u32 h = 0; h < 2; h++) {
        largest[h] = fmaxf(largest[h], __shfl_xor_sync(0xffffffffu, largest[h], 1));
        largest[h] = fmaxf(largest[h], __shfl_xor_sync(0xffffffffu, largest[h], 2));
        // key 0 is seen by every row, so from the first round on the reference is finite. It is moved only where the
        // weights would grow too large: rarely, and then alike in the four lanes of a row.
        const bool moves = (largest[h] - reference[h]) * scale[h] > F::REACH;
        const float now = moves ? largest[h] : reference[h];
        rescale[h] = moves ? exp2_flushed((reference[h] - now) * scale[h]) : 1.f;
        reference[h] = now;
        offset[h] = now * scale[h] - F::HEADROOM;
        sum[h] *= rescale[h];
      }
#pragma unroll
      for (u32 j = 0; j < 16; j++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
          scores[j][i] = exp2_flushed(fmaf(scores[j][i], scale[i / 2], -offset[i / 2]));
          sum[i / 2] += scores[j][i];
        }
    };
    auto phase = [](u32 round) { return round / F::STAGES & 1; };
    auto release = [&](u64* empty) {
      if (lane == 0) barrier_arrive(empty);
    };
    auto values_of = [&](u32 round) { return v_stages + round % F::STAGES * F::STAGE_BYTES; };
    // A round of scores, the first turn at the tensor core.
    auto first_scores = [&] {
      if (worker == 1) meet_later(TURN, COMPUTING * GROUP_THREADS);  // the first turn is the other's
      barrier_wait(&barriers.keys_full[0], 0);
      meet(TURN + worker, COMPUTING * GROUP_THREADS);
      start_scores(0);
      meet_later(TURN + (worker ^ 1), COMPUTING * GROUP_THREADS);
      matrix_unit_wait();
      settle(scores);
      release(&barriers.keys_empty[0]);
      softmax(0);
    };
    // Scores of round + 1 and GEMMs with the values of `round`, one behind the other; waits for the scores.
    auto turn = [&](u32 round, auto start_values) {
      barrier_wait(&barriers.keys_full[(round + 1) % F::STAGES], phase(round + 1));
      meet(TURN + worker, COMPUTING * GROUP_THREADS);
      start_scores(round + 1);
      barrier_wait(&barriers.values_full[round % F::STAGES], phase(round));
      start_values(round);
      meet_later(TURN + (worker ^ 1), COMPUTING * GROUP_THREADS);
      matrix_unit_wait_but_one();  // the GEMMs with the values run on under the softmax
      settle(scores);
      release(&barriers.keys_empty[(round + 1) % F::STAGES]);
    };

    if constexpr (F::NARROW) {
      u32 p[4][4];
      float products[16][4];  // of a round with its values
      auto start_values = [&](u32 round) {
        settle(products);
        matrix_unit_begin();
#pragma unroll
        for (u32 k = 0; k < ROUND / 32; k++)
          warpgroup_multiply_e4m3(products, p[k], matrix_descriptor(values_of(round) + k * 32, 16, 1024), k > 0);
        matrix_unit_commit();
      };
      // 32 keys in the order of `transpose_values`: what a lane has of sixteen is a word of its row.
      auto pack = [&] {
#pragma unroll
        for (u32 k = 0; k < 4; k++)
#pragma unroll
          for (u32 i = 0; i < 4; i++) {
            const float(&low)[4] = scores[k * 4 + i / 2 * 2], (&high)[4] = scores[k * 4 + i / 2 * 2 + 1];
            p[k][i] = pack_e4m3(low[i % 2 * 2], low[i % 2 * 2 + 1]) | (u32)pack_e4m3(high[i % 2 * 2], high[i % 2 * 2 + 1]) << 16;
          }
      };
      auto add = [&](float first_row, float second_row) {
        settle(products);
#pragma unroll
        for (u32 n = 0; n < 16; n++)
#pragma unroll
          for (u32 i = 0; i < 4; i++) o[n][i] = fmaf(o[n][i], i < 2 ? first_row : second_row, products[n][i]);
      };
#pragma unroll
      for (u32 n = 0; n < 16; n++) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.f;
      first_scores();
      pack();
      for (u32 round = 0; round + 1 < rounds; round++) {
        turn(round, start_values);
        const float before[2] = {round ? rescale[0] : 1.f, round ? rescale[1] : 1.f};  // of this round
        softmax(round + 1);
        matrix_unit_wait();
        add(before[0], before[1]);
        release(&barriers.values_empty[round % F::STAGES]);
        pack();
      }
      barrier_wait(&barriers.values_full[(rounds - 1) % F::STAGES], phase(rounds - 1));
      start_values(rounds - 1);
      matrix_unit_wait();
      add(rounds > 1 ? rescale[0] : 1.f, rounds > 1 ? rescale[1] : 1.f);
    } else {
      u32 p[8][4];
      auto start_values = [&](u32 round) {
        settle(o);
        matrix_unit_begin();
#pragma unroll
        for (u32 k = 0; k < ROUND / 16; k++)
          // values transposed: sixteen tokens are two groups of eight rows; the second half of the numbers lies a half further
          warpgroup_multiply_transposed(o, p[k], matrix_descriptor(values_of(round) + k * 2048, HALF_BYTES, 1024), round > 0 || k > 0);
        matrix_unit_commit();
      };
      auto pack = [&] {
#pragma unroll
        for (u32 k = 0; k < 8; k++)
#pragma unroll
          for (u32 i = 0; i < 4; i++) p[k][i] = pack_bf16(scores[k * 2 + i / 2][i % 2 * 2], scores[k * 2 + i / 2][i % 2 * 2 + 1]);
      };
      first_scores();
      pack();
      for (u32 round = 0; round + 1 < rounds; round++) {
        turn(round, start_values);
        softmax(round + 1);
        matrix_unit_wait();
        settle(o);
        release(&barriers.values_empty[round % F::STAGES]);
        if (__ballot_sync(0xffffffffu, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
          for (u32 n = 0; n < 16; n++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) o[n][i] *= rescale[i / 2];
        }
        pack();
      }
      // Nothing was stored behind the last position; what lies there (a NaN, even) must not meet the weight 0.
      barrier_wait(&barriers.values_full[(rounds - 1) % F::STAGES], phase(rounds - 1));
      const u32 begin = last_position - (rounds - 1) * ROUND + 1;
      if (begin < ROUND) {
        for (u32 i = threadIdx.x - GROUP_THREADS; i < (ROUND - begin) * 16; i += COMPUTING * GROUP_THREADS)
          *reinterpret_cast<uint4*>(values_of(rounds - 1) + i % 16 / 8 * HALF_BYTES + (begin + i / 16) * 128 + i % 8 * 16) = make_uint4(0, 0, 0, 0);
        show_shared_to_matrix_unit();
        meet(CLEARED, COMPUTING * GROUP_THREADS);
      }
      start_values(rounds - 1);
      matrix_unit_wait();
      settle(o);
    }

#pragma unroll
    for (u32 h = 0; h < 2; h++) {
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
      const u32 pair = worker * 64 + warp * 16 + g + h * 8, at = first + pair;
      if (pair >= pairs) continue;
      const float inverse = 1.f / sum[h];
      Out* target = out + ((u64)(at / group) * query_heads + kv_head * group + at % group) * D;
#pragma unroll
      for (u32 n = 0; n < 16; n++) store_activation2(target + n * 8 + t * 2, o[n][h * 2] * inverse, o[n][h * 2 + 1] * inverse, out_scale);
    }
  }
}

#define HOPPER(NAME, KV, OUT)                                                                                           \
  KERNEL __launch_bounds__(384, 1) NAME(const bf16* q, const KV* k_cache, const KV* v_cache, const u32* tiles,          \
                                        const u32* positions, const u32* tables, const u32* table_start, OUT* out,      \
                                        float out_scale, u32 query_heads, u32 kv_heads, float score_scale) {            \
    hopper_attention<KV, OUT>(q, k_cache, v_cache, tiles, positions, tables, table_start, out, out_scale, query_heads,  \
                              kv_heads, score_scale);                                                                   \
  }
HOPPER(hopper_attention_bf16_to_bf16, bf16, bf16)
HOPPER(hopper_attention_bf16_to_e4m3, bf16, e4m3)
HOPPER(hopper_attention_e4m3_to_bf16, e4m3, bf16)
HOPPER(hopper_attention_e4m3_to_e4m3, e4m3, e4m3)

// Values of e4m3 for the tensor core: prompts [count][3] lists sequences by the place of their first block in `tables`, the tokens that
// are stored, and their first round of the output; values behind the last token are 0. Output [round][kv head][128 numbers][128
// tokens], the chunks of a row exchanged by its number, and every sixteen tokens in the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15: what
// a lane has of the scores of sixteen keys then follows each other.
// Launch: grid (rounds, kv heads), block (256).
KERNEL __launch_bounds__(256) transpose_values(const e4m3* v_cache, const u32* prompts, u32 count, const u32* tables, u8* out) {
  let_next_kernel_start();
  while (count > 1 && prompts[5] <= blockIdx.x) prompts += 3, count--;
  const u32 round = blockIdx.x - prompts[2], place = prompts[0] + round * 2, tokens = prompts[1] - round * ROUND;
  const u32 kv_head = blockIdx.y, kv_heads = gridDim.y;
  const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  // this thread's four numbers of sixteen tokens: reads of 32 bytes a token and writes of 64 a number
  const u32 quad = warp % 4 * 8 + lane % 8, sixteen = warp / 4 * 4 + lane / 8;
  const u32 block = tables[place + (sixteen / 4 * KV_BLOCK < tokens ? sixteen / 4 : 0)];
  const u8* source = reinterpret_cast<const u8*>(v_cache + ((u64)block * kv_heads + kv_head) * KV_BLOCK * D);
  wait_for_previous_kernel();
  u32 words[16];
#pragma unroll
  for (u32 i = 0; i < 16; i++) {
    const u32 token = sixteen * 16 + i;
    words[i] = token < tokens ? *reinterpret_cast<const u32*>(source + cache_place(128, token % KV_BLOCK, quad / 4) + quad % 4 * 4) : 0;
  }
  u32 rows[4][4];
#pragma unroll
  for (u32 w = 0; w < 4; w++) {
    const u32 a = words[w * 2], b = words[w * 2 + 1], c = words[8 + w * 2], d = words[9 + w * 2];
    const u32 ab = choose_bytes(a, b, 0x5140), ab_high = choose_bytes(a, b, 0x7362);
    const u32 cd = choose_bytes(c, d, 0x5140), cd_high = choose_bytes(c, d, 0x7362);
    rows[0][w] = choose_bytes(ab, cd, 0x5410), rows[1][w] = choose_bytes(ab, cd, 0x7632);
    rows[2][w] = choose_bytes(ab_high, cd_high, 0x5410), rows[3][w] = choose_bytes(ab_high, cd_high, 0x7632);
  }
  u8* target = out + ((u64)blockIdx.x * kv_heads + kv_head) * ROUND * D;
#pragma unroll
  for (u32 i = 0; i < 4; i++)
    *reinterpret_cast<uint4*>(target + cache_place(128, quad * 4 + i, sixteen)) = make_uint4(rows[i][0], rows[i][1], rows[i][2], rows[i][3]);
}
