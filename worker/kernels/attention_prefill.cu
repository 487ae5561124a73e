// Causal attention for chunks of a prompt over the paged cache, in the manner of FlashAttention-2: a block has 128 query
// rows (the tokens of one sequence times the query heads that share a KV head) and goes through the keys 64 at a time.
// Softmax in base 2 and f32; everything else on the tensor cores in bf16.
#include "device.cuh"

constexpr u32 PREFILL_WARPS = 8;

template <u32 D>
constexpr u32 padded_row() { return D * 2 + 16; }
// Dynamic shared memory of prefill_attention: two stages of K and V, and one unpacked pair where the cache is e4m3.
template <u32 D, typename Kv>
constexpr u32 prefill_shared_bytes() {
  return sizeof(Kv) == 2 ? 4 * KV_BLOCK * padded_row<D>() : 4 * KV_BLOCK * D + 2 * KV_BLOCK * padded_row<D>();
}

// tiles [n][4]: sequence, the first of its pairs of (row of the batch, query head that shares the KV head), pairs (<= 128), and what is
// of use on Hopper alone. A tile's pairs follow each other: row by row, and the heads of a row. All rows are of one sequence. A row
// of position p reads keys 0..=p. Output [row][query heads * D].
// Launch: grid (kv heads, tiles), block (256), dynamic shared memory prefill_shared_bytes<D, Kv>().
template <u32 D, typename Kv, typename Out>
__device__ __forceinline__ void prefill_attention(const bf16* q, const Kv* k_cache, const Kv* v_cache, const u32* tiles,
                                                  const u32* positions, const u32* tables, const u32* table_start, Out* out,
                                                  float out_scale, u32 query_heads, u32 kv_heads, float score_scale) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  DYNAMIC_SHARED(shared);
  constexpr u32 PADDED = padded_row<D>(), RAW = sizeof(Kv) == 2 ? PADDED : D, RAW_TILE = KV_BLOCK * RAW, TILE = KV_BLOCK * PADDED;
  constexpr u32 PIECES = D * sizeof(Kv) / 16;
  const u32* tile = tiles + blockIdx.y * 4;
  const u32 kv_head = blockIdx.x, sequence = tile[0], first = tile[1], pairs = tile[2], group = query_heads / kv_heads;
  const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const u32* table = tables + table_start[sequence];
  const u32 first_position = positions[first / group], last_position = positions[(first + pairs - 1) / group];
  const u32 blocks = last_position / KV_BLOCK + 1;

  auto load = [&](u32 block) {
    const u64 tile = ((u64)table[block] * kv_heads + kv_head) * KV_BLOCK * D;
    const u8* keys = reinterpret_cast<const u8*>(k_cache + tile);
    const u8* values = reinterpret_cast<const u8*>(v_cache + tile);
    u8* k_tile = shared + block % 2 * 2 * RAW_TILE;
    u8* v_tile = k_tile + RAW_TILE;
#pragma unroll
    for (u32 i = threadIdx.x; i < KV_BLOCK * PIECES; i += PREFILL_WARPS * WARP) {
      const u32 token = i / PIECES, piece = i % PIECES;
      const u32 place = cache_place(D * sizeof(Kv), token, piece);
      copy_async_16(k_tile + token * RAW + piece * 16, keys + place);
      copy_async_16(v_tile + token * RAW + piece * 16, values + place);
    }
  };
  load(0);
  copy_async_commit();

  // This lane's two query rows (g and g + 8 of the warp's sixteen) and their fragments.
  u32 row_position[2];
  u32 a[D / 16][4];
#pragma unroll
  for (u32 h = 0; h < 2; h++) {
    const u32 pair = warp * 16 + g + h * 8, at = first + pair;
    const bool used = pair < pairs;
    row_position[h] = first_position + (first % group + min(pair, pairs - 1)) / group;
    const bf16* source = q + ((u64)(at / group) * query_heads + kv_head * group + at % group) * D;
#pragma unroll
    for (u32 k = 0; k < D / 16; k++) {
      a[k][h] = used ? *reinterpret_cast<const u32*>(source + k * 16 + t * 2) : 0;
      a[k][h + 2] = used ? *reinterpret_cast<const u32*>(source + k * 16 + 8 + t * 2) : 0;
    }
  }

  float o[D / 8][4] = {};
  float largest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0.f, 0.f};
  for (u32 block = 0; block < blocks; block++) {
    copy_async_wait<0>();
    __syncthreads();  // this block's keys are here, and the stage that is filled next has been read by all
    if (block + 1 < blocks) load(block + 1);
    copy_async_commit();
    const u8* k_tile = shared + block % 2 * 2 * RAW_TILE;
    const u8* v_tile = k_tile + RAW_TILE;
    if (sizeof(Kv) == 1) {
      u8* unpacked = shared + 4 * RAW_TILE;
      for (u32 i = threadIdx.x; i < 2 * KV_BLOCK * D / 8; i += PREFILL_WARPS * WARP) {
        const u32 token = i / (D / 8), piece = i % (D / 8);
        const uint2 packed = *reinterpret_cast<const uint2*>(k_tile + token * RAW + piece * 8);
        const float2 v0 = unpack_e4m3((u16)packed.x), v1 = unpack_e4m3((u16)(packed.x >> 16));
        const float2 v2 = unpack_e4m3((u16)packed.y), v3 = unpack_e4m3((u16)(packed.y >> 16));
        *reinterpret_cast<uint4*>(unpacked + token * PADDED + piece * 16) =
            make_uint4(pack_bf16(v0.x, v0.y), pack_bf16(v1.x, v1.y), pack_bf16(v2.x, v2.y), pack_bf16(v3.x, v3.y));
      }
      __syncthreads();
      k_tile = unpacked;
      v_tile = unpacked + TILE;
    }

    if (block + 1 == blocks && last_position % KV_BLOCK != KV_BLOCK - 1) {
      // nothing was stored behind the last position; what lies there (a NaN, even) must not meet the weight 0
      const u32 begin = (last_position % KV_BLOCK + 1) * PADDED, bytes = TILE - begin;
      for (u32 i = threadIdx.x * 16; i < bytes; i += PREFILL_WARPS * WARP * 16)
        *reinterpret_cast<uint4*>(const_cast<u8*>(v_tile) + begin + i) = make_uint4(0, 0, 0, 0);
      __syncthreads();
    }

    float scores[8][4] = {};
#pragma unroll
    for (u32 k = 0; k < D / 16; k++)
#pragma unroll
      for (u32 j = 0; j < 4; j++) {
        u32 b[4];
        load_matrices(b, k_tile + (j * 16 + lane / 16 * 8 + lane % 8) * PADDED + (k * 2 + lane / 8 % 2) * 16);
        mma_bf16(scores[j * 2], a[k], b[0], b[1]);
        mma_bf16(scores[j * 2 + 1], a[k], b[2], b[3]);
      }
    const u32 token = block * KV_BLOCK;
    const bool masked = token + KV_BLOCK - 1 > first_position;
    float block_largest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
#pragma unroll
    for (u32 j = 0; j < 8; j++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        scores[j][i] *= score_scale;
        if (masked && token + j * 8 + t * 2 + i % 2 > row_position[i / 2]) scores[j][i] = NEGATIVE_INFINITY;
        block_largest[i / 2] = fmaxf(block_largest[i / 2], scores[j][i]);
      }
    float rescale[2];
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
      block_largest[h] = fmaxf(block_largest[h], __shfl_xor_sync(0xffffffffu, block_largest[h], 1));
      block_largest[h] = fmaxf(block_largest[h], __shfl_xor_sync(0xffffffffu, block_largest[h], 2));
      // key 0 is seen by every row, so from the first block on this is finite
      const float now = fmaxf(largest[h], block_largest[h]);
      rescale[h] = exp2f(largest[h] - now);
      largest[h] = now;
      sum[h] *= rescale[h];
    }
#pragma unroll
    for (u32 j = 0; j < 8; j++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        scores[j][i] = exp2f(scores[j][i] - largest[i / 2]);
        sum[i / 2] += scores[j][i];
      }
#pragma unroll
    for (u32 n = 0; n < D / 8; n++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) o[n][i] *= rescale[i / 2];
#pragma unroll
    for (u32 k = 0; k < 4; k++) {  // sixteen keys at a time
      const u32 p[4] = {pack_bf16(scores[k * 2][0], scores[k * 2][1]), pack_bf16(scores[k * 2][2], scores[k * 2][3]),
                        pack_bf16(scores[k * 2 + 1][0], scores[k * 2 + 1][1]), pack_bf16(scores[k * 2 + 1][2], scores[k * 2 + 1][3])};
#pragma unroll
      for (u32 n = 0; n < D / 16; n++) {
        u32 b[4];
        load_matrices_transposed(b, v_tile + (k * 16 + lane / 8 % 2 * 8 + lane % 8) * PADDED + (n * 2 + lane / 16) * 16);
        mma_bf16(o[n * 2], p, b[0], b[1]);
        mma_bf16(o[n * 2 + 1], p, b[2], b[3]);
      }
    }
    if (sizeof(Kv) == 1) __syncthreads();  // the unpacked pair is written again in the next round
  }

#pragma unroll
  for (u32 h = 0; h < 2; h++) {
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
    const u32 pair = warp * 16 + g + h * 8, at = first + pair;
    if (pair >= pairs) continue;
    const float inverse = 1.f / sum[h];
    Out* target = out + ((u64)(at / group) * query_heads + kv_head * group + at % group) * D;
#pragma unroll
    for (u32 n = 0; n < D / 8; n++) store_activation2(target + n * 8 + t * 2, o[n][h * 2] * inverse, o[n][h * 2 + 1] * inverse, out_scale);
  }
}

#define PREFILL(NAME, D, KV, OUT)                                                                                        \
  KERNEL __launch_bounds__(256, 1) NAME(const bf16* q, const KV* k_cache, const KV* v_cache, const u32* tiles,           \
                                        const u32* positions, const u32* tables, const u32* table_start, OUT* out,       \
                                        float out_scale, u32 query_heads, u32 kv_heads, float score_scale) {             \
    prefill_attention<D, KV, OUT>(q, k_cache, v_cache, tiles, positions, tables, table_start, out, out_scale, query_heads, \
                                  kv_heads, score_scale);                                                                \
  }
PREFILL(prefill_attention_32_bf16_to_bf16, 32, bf16, bf16)
PREFILL(prefill_attention_32_bf16_to_e4m3, 32, bf16, e4m3)
PREFILL(prefill_attention_32_e4m3_to_bf16, 32, e4m3, bf16)
PREFILL(prefill_attention_32_e4m3_to_e4m3, 32, e4m3, e4m3)
PREFILL(prefill_attention_64_bf16_to_bf16, 64, bf16, bf16)
PREFILL(prefill_attention_64_bf16_to_e4m3, 64, bf16, e4m3)
PREFILL(prefill_attention_64_e4m3_to_bf16, 64, e4m3, bf16)
PREFILL(prefill_attention_64_e4m3_to_e4m3, 64, e4m3, e4m3)
PREFILL(prefill_attention_128_bf16_to_bf16, 128, bf16, bf16)
PREFILL(prefill_attention_128_bf16_to_e4m3, 128, bf16, e4m3)
PREFILL(prefill_attention_128_e4m3_to_bf16, 128, e4m3, bf16)
PREFILL(prefill_attention_128_e4m3_to_e4m3, 128, e4m3, e4m3)
