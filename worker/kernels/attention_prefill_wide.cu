// Causal attention for chunks of a prompt, heads of 128: the same computation as attention_prefill.cu on Hopper's warpgroup
// matrix instructions, which read K and V from shared memory without going through registers.
//
// K and V tiles (64 tokens of 128 numbers) lie in shared memory as two halves of 64 numbers each, rows of 128 bytes, the
// 16-byte pieces of a row exchanged by its number (the instruction's 128-byte swizzle).
#include "device.cuh"

constexpr u32 WIDE_THREADS = 256, D = 128, HALF_BYTES = KV_BLOCK * 128, TILE_BYTES = 2 * HALF_BYTES;

// Place of piece `piece` (16 bytes, 0..15) of row `token` in a tile.
__device__ __forceinline__ u32 wide_place(u32 token, u32 piece) {
  return piece / 8 * HALF_BYTES + token * 128 + (((piece % 8) ^ (token % 8)) << 4);
}

// Dynamic shared memory: 1024 for alignment, two stages of K and V; with an e4m3 cache two raw stages and one pair of tiles.
template <typename Kv>
constexpr u32 wide_shared_bytes() {
  return 1024 + (sizeof(Kv) == 2 ? 4 * TILE_BYTES : 2 * TILE_BYTES + 4 * KV_BLOCK * D);
}

// Arguments, tiles and output as in attention_prefill.cu.
// Launch: grid (kv heads, tiles), block (256), dynamic shared memory wide_shared_bytes<Kv>().
template <typename Kv, typename Out>
__device__ __forceinline__ void wide_attention(const bf16* q, const Kv* k_cache, const Kv* v_cache, const u32* tiles,
                                               const u32* positions, const u32* tables, const u32* table_start, Out* out,
                                               float out_scale, u32 query_heads, u32 kv_heads, float score_scale) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  DYNAMIC_SHARED(unaligned);
  u8* shared = align_shared_1024(unaligned);
  const u32 kv_head = blockIdx.x, sequence = tiles[blockIdx.y * 3], first_row = tiles[blockIdx.y * 3 + 1], tokens = tiles[blockIdx.y * 3 + 2];
  const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const u32 group = query_heads / kv_heads, used_rows = tokens * group;
  const u32* table = tables + table_start[sequence];
  const u32 first_position = positions[first_row], last_position = first_position + tokens - 1;
  const u32 blocks = last_position / KV_BLOCK + 1;
  u8* raw = shared + 2 * TILE_BYTES;  // e4m3 only: [stage][K, V][64][128]

  auto load = [&](u32 block) {
    const u64 source = ((u64)table[block] * kv_heads + kv_head) * KV_BLOCK * D;
    const u8* keys = reinterpret_cast<const u8*>(k_cache + source);
    const u8* values = reinterpret_cast<const u8*>(v_cache + source);
    if (sizeof(Kv) == 2) {
      u8* k_tile = shared + block % 2 * 2 * TILE_BYTES;
#pragma unroll
      for (u32 i = threadIdx.x; i < KV_BLOCK * 16; i += WIDE_THREADS) {
        const u32 place = wide_place(i / 16, i % 16);
        copy_async_16(k_tile + place, keys + i * 16);
        copy_async_16(k_tile + TILE_BYTES + place, values + i * 16);
      }
    } else {
      u8* stage = raw + block % 2 * 2 * KV_BLOCK * D;
#pragma unroll
      for (u32 i = threadIdx.x; i < KV_BLOCK * D / 16; i += WIDE_THREADS) {
        copy_async_16(stage + i * 16, keys + i * 16);
        copy_async_16(stage + KV_BLOCK * D + i * 16, values + i * 16);
      }
    }
  };
  load(0);
  copy_async_commit();

  // This lane's two query rows (g and g + 8 of the warp's sixteen) and their fragments.
  u32 row_position[2];
  u32 a[D / 16][4];
#pragma unroll
  for (u32 h = 0; h < 2; h++) {
    const u32 tile_row = warp * 16 + g + h * 8, token = tile_row / group, head = kv_head * group + tile_row % group;
    const bool used = tile_row < used_rows;
    row_position[h] = first_position + min(token, tokens - 1);
    const bf16* source = q + ((u64)(first_row + token) * query_heads + head) * D;
#pragma unroll
    for (u32 k = 0; k < D / 16; k++) {
      a[k][h] = used ? *reinterpret_cast<const u32*>(source + k * 16 + t * 2) : 0;
      a[k][h + 2] = used ? *reinterpret_cast<const u32*>(source + k * 16 + 8 + t * 2) : 0;
    }
  }

  float o[16][4] = {};
  float largest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0.f, 0.f};
  for (u32 block = 0; block < blocks; block++) {
    copy_async_wait<0>();
    show_shared_to_matrix_unit();
    __syncthreads();  // this block's keys are here, and what is filled next has been read by all
    if (block + 1 < blocks) load(block + 1);
    copy_async_commit();
    u8* k_tile = shared + (sizeof(Kv) == 2 ? block % 2 * 2 * TILE_BYTES : 0);
    u8* v_tile = k_tile + TILE_BYTES;
    const bool cut = block + 1 == blocks && last_position % KV_BLOCK != KV_BLOCK - 1;
    if (sizeof(Kv) == 1) {
      const u8* stage = raw + block % 2 * 2 * KV_BLOCK * D;
      for (u32 i = threadIdx.x; i < 2 * KV_BLOCK * 16; i += WIDE_THREADS) {
        const u32 token = i / 16 % KV_BLOCK, piece = i % 16;
        const uint2 packed = *reinterpret_cast<const uint2*>(stage + i * 8);
        const float2 v0 = unpack_e4m3((u16)packed.x), v1 = unpack_e4m3((u16)(packed.x >> 16));
        const float2 v2 = unpack_e4m3((u16)packed.y), v3 = unpack_e4m3((u16)(packed.y >> 16));
        *reinterpret_cast<uint4*>(k_tile + i / (KV_BLOCK * 16) * TILE_BYTES + wide_place(token, piece)) =
            make_uint4(pack_bf16(v0.x, v0.y), pack_bf16(v1.x, v1.y), pack_bf16(v2.x, v2.y), pack_bf16(v3.x, v3.y));
      }
      if (!cut) {
        show_shared_to_matrix_unit();
        __syncthreads();
      }
    }
    if (cut) {
      // nothing was stored behind the last position; what lies there (a NaN, even) must not meet the weight 0
      __syncthreads();
      const u32 begin = last_position % KV_BLOCK + 1;
      for (u32 i = threadIdx.x; i < (KV_BLOCK - begin) * 16; i += WIDE_THREADS)
        *reinterpret_cast<uint4*>(v_tile + wide_place(begin + i / 16, i % 16)) = make_uint4(0, 0, 0, 0);
      show_shared_to_matrix_unit();
      __syncthreads();
    }

    float scores[8][4];
#pragma unroll
    for (u32 j = 0; j < 8; j++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) scores[j][i] = 0.f;
    settle(scores);
    matrix_unit_begin();
#pragma unroll
    for (u32 k = 0; k < D / 16; k++)
      // keys as they lie: rows of 128 bytes, eight rows a group of 1024
      warpgroup_multiply_64(scores, a[k], matrix_descriptor(k_tile + k / 4 * HALF_BYTES + k % 4 * 32, 16, 1024));
    matrix_unit_commit();
    matrix_unit_wait();
    settle(scores);

    const u32 token = block * KV_BLOCK;
    const bool masked = token + KV_BLOCK - 1 > first_position;
    float block_largest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
    if (masked) {
#pragma unroll
      for (u32 j = 0; j < 8; j++)
#pragma unroll
        for (u32 i = 0; i < 4; i++)
          if (token + j * 8 + t * 2 + i % 2 > row_position[i / 2]) scores[j][i] = NEGATIVE_INFINITY;
    }
#pragma unroll
    for (u32 j = 0; j < 8; j++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) block_largest[i / 2] = fmaxf(block_largest[i / 2], scores[j][i]);
    float rescale[2], offset[2];
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
      block_largest[h] = fmaxf(block_largest[h], __shfl_xor_sync(0xffffffffu, block_largest[h], 1));
      block_largest[h] = fmaxf(block_largest[h], __shfl_xor_sync(0xffffffffu, block_largest[h], 2));
      // key 0 is seen by every row, so from the first block on this is finite
      const float now = fmaxf(largest[h], block_largest[h]);
      rescale[h] = exp2f((largest[h] - now) * score_scale);
      largest[h] = now;
      offset[h] = now * score_scale;
      sum[h] *= rescale[h];
    }
#pragma unroll
    for (u32 j = 0; j < 8; j++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        // a product and a sum in one instruction; the largest score gives exactly 2^0 only up to its rounding
        scores[j][i] = exp2f(fmaf(scores[j][i], score_scale, -offset[i / 2]));
        sum[i / 2] += scores[j][i];
      }
#pragma unroll
    for (u32 n = 0; n < 16; n++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) o[n][i] *= rescale[i / 2];
    u32 p[4][4];
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
      p[k][0] = pack_bf16(scores[k * 2][0], scores[k * 2][1]), p[k][1] = pack_bf16(scores[k * 2][2], scores[k * 2][3]);
      p[k][2] = pack_bf16(scores[k * 2 + 1][0], scores[k * 2 + 1][1]), p[k][3] = pack_bf16(scores[k * 2 + 1][2], scores[k * 2 + 1][3]);
    }
    settle(o);
    matrix_unit_begin();
#pragma unroll
    for (u32 k = 0; k < 4; k++)
      // values transposed: sixteen tokens are two groups of eight rows; the second half of the numbers lies a half further
      warpgroup_multiply_128_transposed(o, p[k], matrix_descriptor(v_tile + k * 2048, HALF_BYTES, 1024));
    matrix_unit_commit();
    matrix_unit_wait();
    settle(o);
    if (sizeof(Kv) == 1) __syncthreads();  // the unpacked pair is written again in the next round
  }

#pragma unroll
  for (u32 h = 0; h < 2; h++) {
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
    const u32 tile_row = warp * 16 + g + h * 8;
    if (tile_row >= used_rows) continue;
    const float inverse = 1.f / sum[h];
    Out* target = out + ((u64)(first_row + tile_row / group) * query_heads + kv_head * group + tile_row % group) * D;
#pragma unroll
    for (u32 n = 0; n < 16; n++) store_activation2(target + n * 8 + t * 2, o[n][h * 2] * inverse, o[n][h * 2 + 1] * inverse, out_scale);
  }
}

// The same for a bf16 cache, with the products of the values of a block running under the softmax of the next: three stages of K
// and V, the tail of the last block cleared ahead of its use. Dynamic shared memory 1024 + 6 * TILE_BYTES.
template <typename Out>
__device__ __forceinline__ void piped_attention(const bf16* q, const bf16* k_cache, const bf16* v_cache, const u32* tiles,
                                                const u32* positions, const u32* tables, const u32* table_start, Out* out,
                                                float out_scale, u32 query_heads, u32 kv_heads, float score_scale) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  DYNAMIC_SHARED(unaligned);
  u8* shared = align_shared_1024(unaligned);
  const u32 kv_head = blockIdx.x, sequence = tiles[blockIdx.y * 3], first_row = tiles[blockIdx.y * 3 + 1], tokens = tiles[blockIdx.y * 3 + 2];
  const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const u32 group = query_heads / kv_heads, used_rows = tokens * group;
  const u32* table = tables + table_start[sequence];
  const u32 first_position = positions[first_row], last_position = first_position + tokens - 1;
  const u32 blocks = last_position / KV_BLOCK + 1;
  constexpr u32 STAGES = 3;

  auto k_tile_of = [&](u32 block) { return shared + block % STAGES * 2 * TILE_BYTES; };
  auto load = [&](u32 block) {
    if (block < blocks) {
      const u64 source = ((u64)table[block] * kv_heads + kv_head) * KV_BLOCK * D;
      const u8* keys = reinterpret_cast<const u8*>(k_cache + source);
      const u8* values = reinterpret_cast<const u8*>(v_cache + source);
      u8* k_tile = k_tile_of(block);
#pragma unroll
      for (u32 i = threadIdx.x; i < KV_BLOCK * 16; i += WIDE_THREADS) {
        const u32 place = wide_place(i / 16, i % 16);
        copy_async_16(k_tile + place, keys + i * 16);
        copy_async_16(k_tile + TILE_BYTES + place, values + i * 16);
      }
    }
    copy_async_commit();
  };
  // Everything asked for so far is here and seen by all. The block behind the last position (a NaN, even) is cleared when it
  // arrives: nothing was stored there, and it must not meet the weight 0.
  auto arrive = [&](u32 block) {
    copy_async_wait<0>();
    if (block + 1 == blocks && last_position % KV_BLOCK != KV_BLOCK - 1) {
      __syncthreads();
      const u32 begin = last_position % KV_BLOCK + 1;
      for (u32 i = threadIdx.x; i < (KV_BLOCK - begin) * 16; i += WIDE_THREADS)
        *reinterpret_cast<uint4*>(k_tile_of(block) + TILE_BYTES + wide_place(begin + i / 16, i % 16)) = make_uint4(0, 0, 0, 0);
    }
    show_shared_to_matrix_unit();
    __syncthreads();
  };
  load(0);

  u32 row_position[2];
  u32 a[D / 16][4];
#pragma unroll
  for (u32 h = 0; h < 2; h++) {
    const u32 tile_row = warp * 16 + g + h * 8, token = tile_row / group, head = kv_head * group + tile_row % group;
    const bool used = tile_row < used_rows;
    row_position[h] = first_position + min(token, tokens - 1);
    const bf16* source = q + ((u64)(first_row + token) * query_heads + head) * D;
#pragma unroll
    for (u32 k = 0; k < D / 16; k++) {
      a[k][h] = used ? *reinterpret_cast<const u32*>(source + k * 16 + t * 2) : 0;
      a[k][h + 2] = used ? *reinterpret_cast<const u32*>(source + k * 16 + 8 + t * 2) : 0;
    }
  }
  auto start_scores = [&](float(&scores)[8][4], u32 block) {
#pragma unroll
    for (u32 j = 0; j < 8; j++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) scores[j][i] = 0.f;
    settle(scores);
    matrix_unit_begin();
#pragma unroll
    for (u32 k = 0; k < D / 16; k++)
      warpgroup_multiply_64(scores, a[k], matrix_descriptor(k_tile_of(block) + k / 4 * HALF_BYTES + k % 4 * 32, 16, 1024));
    matrix_unit_commit();
  };

  float o[16][4] = {};
  float scores[8][4];
  float largest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0.f, 0.f}, rescale[2];
  u32 p[4][4];
  // Turns scores into weights; the output so far is to be multiplied by `rescale`.
  auto softmax = [&](u32 block) {
    const u32 token = block * KV_BLOCK;
    if (token + KV_BLOCK - 1 > first_position) {
#pragma unroll
      for (u32 j = 0; j < 8; j++)
#pragma unroll
        for (u32 i = 0; i < 4; i++)
          if (token + j * 8 + t * 2 + i % 2 > row_position[i / 2]) scores[j][i] = NEGATIVE_INFINITY;
    }
    float block_largest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
#pragma unroll
    for (u32 j = 0; j < 8; j++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) block_largest[i / 2] = fmaxf(block_largest[i / 2], scores[j][i]);
    float offset[2];
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
      block_largest[h] = fmaxf(block_largest[h], __shfl_xor_sync(0xffffffffu, block_largest[h], 1));
      block_largest[h] = fmaxf(block_largest[h], __shfl_xor_sync(0xffffffffu, block_largest[h], 2));
      const float now = fmaxf(largest[h], block_largest[h]);
      rescale[h] = exp2f((largest[h] - now) * score_scale);
      largest[h] = now;
      offset[h] = now * score_scale;
      sum[h] *= rescale[h];
    }
#pragma unroll
    for (u32 j = 0; j < 8; j++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        scores[j][i] = exp2f(fmaf(scores[j][i], score_scale, -offset[i / 2]));
        sum[i / 2] += scores[j][i];
      }
  };
  auto pack = [&] {
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
      p[k][0] = pack_bf16(scores[k * 2][0], scores[k * 2][1]), p[k][1] = pack_bf16(scores[k * 2][2], scores[k * 2][3]);
      p[k][2] = pack_bf16(scores[k * 2 + 1][0], scores[k * 2 + 1][1]), p[k][3] = pack_bf16(scores[k * 2 + 1][2], scores[k * 2 + 1][3]);
    }
  };
  auto start_values = [&](u32 block) {
    settle(o);
    matrix_unit_begin();
#pragma unroll
    for (u32 k = 0; k < 4; k++)
      warpgroup_multiply_128_transposed(o, p[k], matrix_descriptor(k_tile_of(block) + TILE_BYTES + k * 2048, HALF_BYTES, 1024));
    matrix_unit_commit();
  };
  arrive(0);
  load(1);
  start_scores(scores, 0);
  matrix_unit_wait();
  settle(scores);
  softmax(0);
  pack();
  for (u32 block = 0; block + 1 < blocks; block++) {
    arrive(block + 1);
    // fills the stage of block - 1: every thread has waited for its products
    load(block + 2);
    start_scores(scores, block + 1);
    start_values(block);
    matrix_unit_wait_but_one();  // the scores; the products with the values run on under the softmax
    settle(scores);
    softmax(block + 1);
    matrix_unit_wait();
    settle(o);
#pragma unroll
    for (u32 n = 0; n < 16; n++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) o[n][i] *= rescale[i / 2];
    pack();
  }
  start_values(blocks - 1);
  matrix_unit_wait();
  settle(o);
  copy_async_wait<0>();

#pragma unroll
  for (u32 h = 0; h < 2; h++) {
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
    const u32 tile_row = warp * 16 + g + h * 8;
    if (tile_row >= used_rows) continue;
    const float inverse = 1.f / sum[h];
    Out* target = out + ((u64)(first_row + tile_row / group) * query_heads + kv_head * group + tile_row % group) * D;
#pragma unroll
    for (u32 n = 0; n < 16; n++) store_activation2(target + n * 8 + t * 2, o[n][h * 2] * inverse, o[n][h * 2 + 1] * inverse, out_scale);
  }
}

#define PIPED(NAME, OUT)                                                                                                \
  KERNEL __launch_bounds__(256, 1) NAME(const bf16* q, const bf16* k_cache, const bf16* v_cache, const u32* tiles,      \
                                        const u32* positions, const u32* tables, const u32* table_start, OUT* out,      \
                                        float out_scale, u32 query_heads, u32 kv_heads, float score_scale) {            \
    piped_attention<OUT>(q, k_cache, v_cache, tiles, positions, tables, table_start, out, out_scale, query_heads,       \
                         kv_heads, score_scale);                                                                        \
  }
PIPED(piped_attention_bf16_to_bf16, bf16)
PIPED(piped_attention_bf16_to_e4m3, e4m3)

#define WIDE(NAME, KV, OUT)                                                                                             \
  KERNEL __launch_bounds__(256, 1) NAME(const bf16* q, const KV* k_cache, const KV* v_cache, const u32* tiles,          \
                                        const u32* positions, const u32* tables, const u32* table_start, OUT* out,      \
                                        float out_scale, u32 query_heads, u32 kv_heads, float score_scale) {            \
    wide_attention<KV, OUT>(q, k_cache, v_cache, tiles, positions, tables, table_start, out, out_scale, query_heads,    \
                            kv_heads, score_scale);                                                                     \
  }
WIDE(wide_attention_e4m3_to_bf16, e4m3, bf16)
WIDE(wide_attention_e4m3_to_e4m3, e4m3, e4m3)
