// Causal attention for chunks of a prompt, heads of 128, on Hopper's warpgroup matrix instructions, in the manner of
// FlashAttention-3: one warpgroup brings keys and values, two compute 64 rows each, 128 keys at a time. A computing
// warpgroup's products with the values of one round run under its softmax of the next, and the two take turns at the matrix
// unit, so that one multiplies while the other exponentiates.
//
// A round's keys (and values) lie in shared memory as two halves of 64 numbers each, [half][128 tokens][128 bytes], pieces
// of a row exchanged by its number: as bf16 tiles lie in the cache, so that they are copied whole. Tiles of e4m3 are
// copied raw and widened to f16 by the warpgroup that brings them; queries and weights are then f16 too.
#include "device.cuh"

constexpr u32 D = 128, ROUND = 2 * KV_BLOCK, STAGES = 2, GROUP_THREADS = 128, COMPUTING = 2;
constexpr u32 HALF_BYTES = ROUND * 128, STAGE_BYTES = 2 * HALF_BYTES, TILE_HALF = KV_BLOCK * 128, QUERY_BYTES = 64 * D * 2, RAW_TILE = KV_BLOCK * D;
constexpr float REACH = 8.f;  // a row's reference may fall so far (in powers of 2) behind its largest score
// Numbers of barriers: turns at the matrix unit of the two, the last values cleared, the bringing group,
// the queries of each computing group.
constexpr u32 TURN = 1, CLEARED = 3, BROUGHT = 4, QUERIES = 5;

template <bool CHOICE, typename A, typename B>
struct Choice {
  using Type = A;
};
template <typename A, typename B>
struct Choice<false, A, B> {
  using Type = B;
};

struct Barriers {
  u64 keys_full[STAGES], keys_empty[STAGES], values_full[STAGES], values_empty[STAGES], raw_full[STAGES];
};

// Dynamic shared memory: 1024 for alignment, queries, stages of K and V, raw tiles of K and V for one round where the cache is e4m3.
template <typename Kv>
constexpr u32 hopper_shared_bytes() {
  return 1024 + COMPUTING * QUERY_BYTES + 2 * STAGES * STAGE_BYTES + (sizeof(Kv) == 1 ? STAGES * 2 * RAW_TILE : 0);
}

// Brings rounds 0..rounds: keys of round r + 1 before values of round r, as they are consumed.
template <typename Kv>
__device__ __forceinline__ void bring(const Kv* k_cache, const Kv* v_cache, const u32* table, u32 blocks, u32 kv_heads, u32 kv_head,
                                      u8* k_stages, u8* v_stages, u8* raw, Barriers& barriers) {
  const u32 rounds = (blocks + 1) / 2, thread = threadIdx.x % GROUP_THREADS;
  // One of a round's two operands: its blocks into a stage.
  auto fetch = [&](const Kv* cache, u32 round, u8* stages, u64* full, u64* empty, u32 turn) {
    const u32 stage = round % STAGES, count = min(2u, blocks - round * 2);
    u8* target = stages + stage * STAGE_BYTES;
    if (sizeof(Kv) == 2) {
      if (thread != 0) return;
      barrier_wait(&empty[stage], (round / STAGES & 1) ^ 1);
      barrier_arrive_expecting(&full[stage], count * 2 * TILE_HALF);
      for (u32 i = 0; i < count; i++) {
        const u8* source = reinterpret_cast<const u8*>(cache + ((u64)table[round * 2 + i] * kv_heads + kv_head) * KV_BLOCK * D);
        copy_tile(target + i * TILE_HALF, source, TILE_HALF, &full[stage]);
        copy_tile(target + HALF_BYTES + i * TILE_HALF, source + TILE_HALF, TILE_HALF, &full[stage]);
      }
      return;
    }
    // the raw tiles of this turn are on their way since the turn before
    barrier_wait(&barriers.raw_full[turn % STAGES], turn / STAGES & 1);
    barrier_wait(&empty[stage], (round / STAGES & 1) ^ 1);
    const u8* source = raw + turn % STAGES * 2 * RAW_TILE;
    for (u32 i = thread; i < count * KV_BLOCK * 8; i += GROUP_THREADS) {
      const u32 token = i / 8, piece = i % 8;  // sixteen numbers
      const uint4 packed = *reinterpret_cast<const uint4*>(source + i * 16);
      u8* row = target + piece / 4 * HALF_BYTES + token * 128;
      const uint4 first = make_uint4(e4m3_to_f16(packed.x), e4m3_to_f16(packed.x >> 16), e4m3_to_f16(packed.y), e4m3_to_f16(packed.y >> 16));
      const uint4 second = make_uint4(e4m3_to_f16(packed.z), e4m3_to_f16(packed.z >> 16), e4m3_to_f16(packed.w), e4m3_to_f16(packed.w >> 16));
      // lanes of the second half store in the other order: then eight of them write to all banks
      const u32 swap = piece / 4;
      *reinterpret_cast<uint4*>(row + (((piece % 4 * 2 + swap) ^ (token % 8)) << 4)) = swap ? second : first;
      *reinterpret_cast<uint4*>(row + (((piece % 4 * 2 + 1 - swap) ^ (token % 8)) << 4)) = swap ? first : second;
    }
    show_shared_to_matrix_unit();
    barrier_arrive(&full[stage]);
  };
  auto fetch_raw = [&](const Kv* cache, u32 round, u32 turn) {
    if (sizeof(Kv) == 2 || thread != 0 || round >= rounds) return;
    const u32 count = min(2u, blocks - round * 2);
    u64* full = &barriers.raw_full[turn % STAGES];
    barrier_arrive_expecting(full, count * RAW_TILE);
    for (u32 i = 0; i < count; i++)
      copy_tile(raw + turn % STAGES * 2 * RAW_TILE + i * RAW_TILE,
                cache + ((u64)table[round * 2 + i] * kv_heads + kv_head) * KV_BLOCK * D, RAW_TILE, full);
  };
  // Turn 0 is the keys of round 0; then values of round r and keys of round r + 1 take turns: keys first.
  auto of_turn = [&](u32 turn) { return turn == 0 ? 0 : turn % 2 ? (turn + 1) / 2 : turn / 2 - 1; };
  auto is_keys = [](u32 turn) { return turn == 0 || turn % 2 == 1; };
  const u32 turns = 2 * rounds;  // the keys of round `rounds` don't exist, the turn is skipped
  auto raw_of = [&](u32 turn) { fetch_raw(is_keys(turn) ? k_cache : v_cache, of_turn(turn), turn); };
  if (sizeof(Kv) == 1) raw_of(0);
  for (u32 turn = 0; turn <= turns; turn++) {
    const u32 round = of_turn(turn);
    if (sizeof(Kv) == 1) {
      // everyone has read the raw tiles of the turn before, which are filled next
      meet(BROUGHT, GROUP_THREADS);
      if (turn + 1 <= turns) raw_of(turn + 1);
      if (round >= rounds) {
        continue;
      }
    } else if (round >= rounds) {
      continue;
    }
    if (is_keys(turn)) {
      fetch(k_cache, round, k_stages, barriers.keys_full, barriers.keys_empty, turn);
    } else {
      fetch(v_cache, round, v_stages, barriers.values_full, barriers.values_empty, turn);
    }
  }
}

// Arguments, tiles and output as in attention_prefill.cu.
// Launch: grid (kv heads, tiles), block (384), dynamic shared memory hopper_shared_bytes<Kv>().
template <typename Kv, typename Out>
__device__ __forceinline__ void hopper_attention(const bf16* q, const Kv* k_cache, const Kv* v_cache, const u32* tiles,
                                                 const u32* positions, const u32* tables, const u32* table_start, Out* out,
                                                 float out_scale, u32 query_heads, u32 kv_heads, float score_scale) {
  using Value = typename Choice<sizeof(Kv) == 1, f16, bf16>::Type;
  DYNAMIC_SHARED(unaligned);
  u8* shared = align_shared_1024(unaligned);
  __shared__ Barriers barriers;
  let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (u32 s = 0; s < STAGES; s++) {
      const u32 bringing = sizeof(Kv) == 2 ? 1 : GROUP_THREADS;
      barrier_init(&barriers.keys_full[s], bringing), barrier_init(&barriers.values_full[s], bringing);
      barrier_init(&barriers.keys_empty[s], COMPUTING * 4), barrier_init(&barriers.values_empty[s], COMPUTING * 4);
      barrier_init(&barriers.raw_full[s], 1);
    }
    share_barriers();
  }
  wait_for_previous_kernel();
  __syncthreads();
  const u32 kv_head = blockIdx.x, sequence = tiles[blockIdx.y * 3], first_row = tiles[blockIdx.y * 3 + 1], tokens = tiles[blockIdx.y * 3 + 2];
  const u32 first_position = positions[first_row], last_position = first_position + tokens - 1;
  const u32 blocks = last_position / KV_BLOCK + 1, rounds = (blocks + 1) / 2;
  u8* k_stages = shared + COMPUTING * QUERY_BYTES;
  u8* v_stages = k_stages + STAGES * STAGE_BYTES;
  if (threadIdx.x < GROUP_THREADS) {
    give_registers<sizeof(Kv) == 2 ? 24 : 72>();
    bring<Kv>(k_cache, v_cache, tables + table_start[sequence], blocks, kv_heads, kv_head, k_stages, v_stages,
              v_stages + STAGES * STAGE_BYTES, barriers);
  } else {
    take_registers<sizeof(Kv) == 2 ? 240 : 216>();
    const u32 worker = threadIdx.x / GROUP_THREADS - 1;
    const u32 warp = threadIdx.x % GROUP_THREADS / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const u32 group = query_heads / kv_heads, used_rows = tokens * group;

    // The group's 64 rows of queries, as the tiles of keys lie: two halves, pieces exchanged.
    u8* queries = shared + worker * QUERY_BYTES;
    for (u32 i = threadIdx.x % GROUP_THREADS; i < 64 * 16; i += GROUP_THREADS) {
      const u32 row = i / 16, tile_row = worker * 64 + row, token = tile_row / group, head = kv_head * group + tile_row % group;
      uint4 piece = tile_row < used_rows
                              ? *reinterpret_cast<const uint4*>(q + ((u64)(first_row + token) * query_heads + head) * D + i % 16 * 8)
                              : make_uint4(0, 0, 0, 0);
      if (sizeof(Kv) == 1)
        piece = make_uint4(pack_f16(low_bf16(piece.x), high_bf16(piece.x)), pack_f16(low_bf16(piece.y), high_bf16(piece.y)),
                           pack_f16(low_bf16(piece.z), high_bf16(piece.z)), pack_f16(low_bf16(piece.w), high_bf16(piece.w)));
      *reinterpret_cast<uint4*>(queries + cache_place(256, row, i % 16)) = piece;
    }
    show_shared_to_matrix_unit();
    meet(QUERIES + worker, GROUP_THREADS);
    u32 row_position[2];  // of this lane's rows, g and g + 8 of the warp's sixteen
#pragma unroll
    for (u32 h = 0; h < 2; h++) row_position[h] = first_position + min((worker * 64 + warp * 16 + g + h * 8) / group, tokens - 1);

    float o[16][4];
    float scores[16][4];
    u32 p[8][4];
    float reference[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0.f, 0.f}, rescale[2];
    auto start_scores = [&](u32 round) {
      const u8* keys = k_stages + round % STAGES * STAGE_BYTES;
      settle(scores);
      matrix_unit_begin();
#pragma unroll
      for (u32 k = 0; k < D / 16; k++)
        // keys as they lie: rows of 128 bytes, eight rows a group of 1024
        warpgroup_multiply<Value>(scores, matrix_descriptor(queries + k / 4 * TILE_HALF + k % 4 * 32, 16, 1024),
                           matrix_descriptor(keys + k / 4 * HALF_BYTES + k % 4 * 32, 16, 1024), k > 0);
      matrix_unit_commit();
    };
    auto start_values = [&](u32 round) {
      const u8* values = v_stages + round % STAGES * STAGE_BYTES;
      settle(o);
      matrix_unit_begin();
#pragma unroll
      for (u32 k = 0; k < ROUND / 16; k++)
        // values transposed: sixteen tokens are two groups of eight rows; the second half of the numbers lies a half further
        warpgroup_multiply_transposed<Value>(o, p[k], matrix_descriptor(values + k * 2048, HALF_BYTES, 1024), round > 0 || k > 0);
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
        const bool moves = (largest[h] - reference[h]) * score_scale > REACH;
        const float now = moves ? largest[h] : reference[h];
        rescale[h] = moves ? exp2_flushed((reference[h] - now) * score_scale) : 1.f;
        reference[h] = now;
        offset[h] = now * score_scale;
        sum[h] *= rescale[h];
      }
#pragma unroll
      for (u32 j = 0; j < 16; j++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
          scores[j][i] = exp2_flushed(fmaf(scores[j][i], score_scale, -offset[i / 2]));
          sum[i / 2] += scores[j][i];
        }
    };
    auto pack = [&] {
#pragma unroll
      for (u32 k = 0; k < 8; k++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
          const float low = scores[k * 2 + i / 2][i % 2 * 2], high = scores[k * 2 + i / 2][i % 2 * 2 + 1];
          p[k][i] = sizeof(Kv) == 1 ? pack_small_f16(low, high) : pack_bf16(low, high);
        }
    };
    auto phase = [](u32 round) { return round / STAGES & 1; };
    auto release = [&](u64* empty) {
      if (lane == 0) barrier_arrive(empty);
    };

    if (worker == 1) meet_later(TURN, COMPUTING * GROUP_THREADS);  // the first turn is the other's
    barrier_wait(&barriers.keys_full[0], 0);
    meet(TURN + worker, COMPUTING * GROUP_THREADS);
    start_scores(0);
    meet_later(TURN + (worker ^ 1), COMPUTING * GROUP_THREADS);
    matrix_unit_wait();
    settle(scores);
    release(&barriers.keys_empty[0]);
    softmax(0);
    pack();
    for (u32 round = 0; round + 1 < rounds; round++) {
      barrier_wait(&barriers.keys_full[(round + 1) % STAGES], phase(round + 1));
      meet(TURN + worker, COMPUTING * GROUP_THREADS);
      start_scores(round + 1);
      barrier_wait(&barriers.values_full[round % STAGES], phase(round));
      start_values(round);
      meet_later(TURN + (worker ^ 1), COMPUTING * GROUP_THREADS);
      matrix_unit_wait_but_one();  // the scores; the products with the values run on under the softmax
      settle(scores);
      release(&barriers.keys_empty[(round + 1) % STAGES]);
      softmax(round + 1);
      matrix_unit_wait();
      settle(o);
      release(&barriers.values_empty[round % STAGES]);
      if (__ballot_sync(0xffffffffu, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
        for (u32 n = 0; n < 16; n++)
#pragma unroll
          for (u32 i = 0; i < 4; i++) o[n][i] *= rescale[i / 2];
      }
      pack();
    }
    // Nothing was stored behind the last position; what lies there (a NaN, even) must not meet the weight 0.
    barrier_wait(&barriers.values_full[(rounds - 1) % STAGES], phase(rounds - 1));
    const u32 begin = last_position - (rounds - 1) * ROUND + 1;
    if (begin < ROUND) {
      u8* values = v_stages + (rounds - 1) % STAGES * STAGE_BYTES;
      for (u32 i = threadIdx.x - GROUP_THREADS; i < (ROUND - begin) * 16; i += COMPUTING * GROUP_THREADS)
        *reinterpret_cast<uint4*>(values + i % 16 / 8 * HALF_BYTES + (begin + i / 16) * 128 + i % 8 * 16) = make_uint4(0, 0, 0, 0);
      show_shared_to_matrix_unit();
      meet(CLEARED, COMPUTING * GROUP_THREADS);
    }
    start_values(rounds - 1);
    matrix_unit_wait();
    settle(o);

#pragma unroll
    for (u32 h = 0; h < 2; h++) {
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
      const u32 tile_row = worker * 64 + warp * 16 + g + h * 8;
      if (tile_row >= used_rows) continue;
      const float inverse = 1.f / sum[h];
      Out* target = out + ((u64)(first_row + tile_row / group) * query_heads + kv_head * group + tile_row % group) * D;
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
