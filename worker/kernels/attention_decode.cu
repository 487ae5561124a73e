// Attention for single rows and for few rows of a sequence that follow each other (decode; guesses that are verified; the end
// of a prompt): the keys are split over blocks, each block leaves a partial result, and the one that finishes last adds them
// up. The query heads that share a KV head are packed into the 16 rows of the tensor cores' tile, and as many rows of the
// sequence as fit there: they share what is read of the cache. Softmax in base 2 and f32.
#include "device.cuh"

constexpr u32 DECODE_WARPS = 4, WARP_TOKENS = 16;

// Bytes of one padded bf16 row in shared memory: 8 rows of one 16-byte column lie in different banks.
template <u32 D>
constexpr u32 padded_row() { return D * 2 + 16; }
// e4m3 rows lie unpadded, the pieces of some exchanged.
template <u32 D, typename Kv>
constexpr u32 stored_row() { return sizeof(Kv) == 2 ? padded_row<D>() : D; }
template <typename Kv>
constexpr u32 decode_stages() { return sizeof(Kv) == 2 ? 3 : 6; }
// Dynamic shared memory of decode_attention.
template <u32 D, typename Kv>
constexpr u32 decode_shared_bytes() {
  const u32 ring = DECODE_WARPS * decode_stages<Kv>() * 2 * WARP_TOKENS * stored_row<D, Kv>();
  const u32 merge = DECODE_WARPS * 16 * (D + 2) * 4;
  return ring > merge ? ring : merge;
}
// Places of a 16-byte piece in a warp's tiles. e4m3 keys are read two rows and four pieces at a time, e4m3 values eight rows
// and one piece at a time: each from all banks where rows are as long as the banks.
template <u32 D, typename Kv>
__device__ __forceinline__ u32 key_place(u32 token, u32 piece) {
  return token * stored_row<D, Kv>() + (sizeof(Kv) == 1 && D == 128 ? piece ^ (token & 1) << 2 : piece) * 16;
}
template <u32 D, typename Kv>
__device__ __forceinline__ u32 value_place(u32 token, u32 piece) {
  return token * stored_row<D, Kv>() + (sizeof(Kv) == 1 && D == 128 ? piece ^ token % 8 : piece) * 16;
}

// Some rows of one sequence, at positions that follow each other. The host writes the same in backend/cuda/step.rs.
struct DecodeItem {
  u32 first_row;
  u32 count;   // times (query heads / kv heads) <= 16; 0: nothing to do
  u32 before;  // rows of the items before this one
};

// q [rows][query heads][D], scaled by s(p); caches [block][kv head][64][D]. A row of position p reads keys 0..=p.
// `items` lists the rows of the batch that are decoded here. Output [row][query heads * D]. Scratch, for split s of
// query head h of the i-th row of all items: partial [i][h][splits][D] (normalised) and log_sum [i][h][splits] (base 2);
// finished [item][kv head] counts the blocks that are done: zero before and after.
// Launch: grid (splits <= 128, kv heads, items), block (128), dynamic shared memory
// decode_shared_bytes<D, Kv>(). score_scale = log2(e) / sqrt(D).
template <u32 D, typename Kv, typename Out>
__device__ __forceinline__ void decode_attention(const bf16* q, const Kv* k_cache, const Kv* v_cache, const DecodeItem* items,
                                                 const u32* positions, const u32* row_sequence, const u32* tables,
                                                 const u32* table_start, float* partial, float* log_sum, u32* finished, Out* out,
                                                 float out_scale, u32 query_heads, u32 kv_heads, float score_scale) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  DYNAMIC_SHARED(shared);
  const u32 split = blockIdx.x, splits = gridDim.x, kv_head = blockIdx.y, listed = blockIdx.z;
  const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const DecodeItem item = items[listed];
  if (item.count == 0) return;
  const u32 group = query_heads / kv_heads, row = item.first_row, tile_rows = item.count * group;
  const u32 first_position = positions[row], position = first_position + item.count - 1;  // of the last row
  const u32* table = tables + table_start[row_sequence[row]];
  // tile row r is head r % group of row r / group
  const u32 own_position[2] = {first_position + g / group, first_position + (g + 8) / group};

  const u32 blocks = position / KV_BLOCK + 1, share = (blocks + splits - 1) / splits;
  const u32 first = min(split * share, blocks), last = min(first + share, blocks);
  const u32 active = (blocks + share - 1) / share;  // splits that have keys
  if (split >= active) return;

  constexpr bool NARROW = sizeof(Kv) == 1;  // e4m3, computed as f16: widened in registers
  constexpr u32 ROW = stored_row<D, Kv>(), TILE = WARP_TOKENS * ROW, DECODE_STAGES = decode_stages<Kv>();
  u8* ring = shared + warp * DECODE_STAGES * 2 * TILE;

  constexpr u32 PIECES = D * sizeof(Kv) / 16;  // of a row
  auto load = [&](u32 block, u32 stage) {
    const u64 source = ((u64)table[block] * kv_heads + kv_head) * KV_BLOCK * D;
    const u8* keys = reinterpret_cast<const u8*>(k_cache + source);
    const u8* values = reinterpret_cast<const u8*>(v_cache + source);
    u8* k_tile = ring + stage * 2 * TILE;
    u8* v_tile = k_tile + TILE;
#pragma unroll
    for (u32 i = lane; i < WARP_TOKENS * PIECES; i += WARP) {
      const u32 token = i / PIECES, piece = i % PIECES, place = cache_place(D * sizeof(Kv), warp * WARP_TOKENS + token, piece);
      copy_async_16(k_tile + key_place<D, Kv>(token, piece), keys + place);
      copy_async_16(v_tile + value_place<D, Kv>(token, piece), values + place);
    }
  };
  for (u32 s = 0; s < DECODE_STAGES - 1; s++) {
    if (first + s < last) load(first + s, s);
    copy_async_commit();
  }

  // Query fragments.
  u32 a[D / 16][4];
  const bf16* q_heads = q + ((u64)row * query_heads + kv_head * group) * D;
#pragma unroll
  for (u32 k = 0; k < D / 16; k++)
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      // e4m3 keys are read four dimensions at a time: theirs is another order of the dimensions, the same for q
      const u32 four = D >= 64 ? k / 4 * 64 + t * 16 + k % 4 * 4 : t * 8 + k * 4;
      const u32 r = g + i % 2 * 8, dimension = NARROW ? four + i / 2 * 2 : k * 16 + i / 2 * 8 + t * 2;
      const bf16* q_row = q_heads + ((u64)(r / group) * query_heads + r % group) * D;
      const u32 pair = r < tile_rows ? *reinterpret_cast<const u32*>(q_row + dimension) : 0;
      a[k][i] = NARROW ? pack_f16(low_bf16(pair), high_bf16(pair)) : pair;
    }

  float o[D / 8][4] = {};
  float largest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0.f, 0.f};
  for (u32 block = first; block < last; block++) {
    copy_async_wait<DECODE_STAGES - 2>();
    __syncwarp();
    const u32 ahead = block + DECODE_STAGES - 1;
    if (ahead < last) load(ahead, (ahead - first) % DECODE_STAGES);
    copy_async_commit();
    const u8* k_tile = ring + (block - first) % DECODE_STAGES * 2 * TILE;
    const u8* v_tile = k_tile + TILE;

    const u32 token = block * KV_BLOCK + warp * WARP_TOKENS;
    if (token + WARP_TOKENS - 1 > position) {
      // nothing was stored behind the last row's position; what lies there (a NaN, even) must not meet the weight 0
      const u32 begin = position < token ? 0 : (position - token + 1) * ROW;
      for (u32 i = lane * 16; i < TILE - begin; i += WARP * 16)
        *reinterpret_cast<uint4*>(const_cast<u8*>(v_tile) + begin + i) = make_uint4(0, 0, 0, 0);
      __syncwarp();
    }

    float scores[2][4] = {};
    if constexpr (NARROW) {
      constexpr u32 WORDS = D >= 64 ? 4 : 2;  // a lane's bytes of a row at a time
#pragma unroll
      for (u32 j = 0; j < 2; j++)
#pragma unroll
        for (u32 k = 0; k < D / 16; k += WORDS) {
          u32 words[WORDS];
          if constexpr (WORDS == 4) {
            const uint4 four = *reinterpret_cast<const uint4*>(k_tile + key_place<D, Kv>(j * 8 + g, k + t));
            words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
          } else {
            const uint2 two = *reinterpret_cast<const uint2*>(k_tile + (j * 8 + g) * ROW + t * 8);
            words[0] = two.x, words[1] = two.y;
          }
#pragma unroll
          for (u32 w = 0; w < WORDS; w++) mma_f16(scores[j], a[k + w], e4m3_to_f16(words[w]), e4m3_to_f16(words[w] >> 16));
        }
    } else {
#pragma unroll
      for (u32 k = 0; k < D / 16; k++) {
        u32 b[4];
        load_matrices(b, k_tile + (lane / 16 * 8 + lane % 8) * ROW + (k * 2 + lane / 8 % 2) * 16);
        mma_bf16(scores[0], a[k], b[0], b[1]);
        mma_bf16(scores[1], a[k], b[2], b[3]);
      }
    }
    float block_largest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
#pragma unroll
    for (u32 j = 0; j < 2; j++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        const bool seen = token + j * 8 + t * 2 + i % 2 <= own_position[i / 2];
        scores[j][i] = seen ? scores[j][i] * score_scale : NEGATIVE_INFINITY;
        block_largest[i / 2] = fmaxf(block_largest[i / 2], scores[j][i]);
      }
    float rescale[2];
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
      block_largest[h] = fmaxf(block_largest[h], __shfl_xor_sync(0xffffffffu, block_largest[h], 1));
      block_largest[h] = fmaxf(block_largest[h], __shfl_xor_sync(0xffffffffu, block_largest[h], 2));
      const float now = fmaxf(largest[h], block_largest[h]);
      // a warp may have seen no key yet: -inf - -inf would be NaN
      rescale[h] = now == NEGATIVE_INFINITY ? 1.f : exp2f(largest[h] - now);
      largest[h] = now;
      sum[h] *= rescale[h];
    }
#pragma unroll
    for (u32 j = 0; j < 2; j++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        const float p = largest[i / 2] == NEGATIVE_INFINITY ? 0.f : exp2f(scores[j][i] - largest[i / 2]);
        scores[j][i] = p;
        sum[i / 2] += p;
      }
    u32 p[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      const float low = scores[i / 2][i % 2 * 2], high = scores[i / 2][i % 2 * 2 + 1];
      p[i] = NARROW ? pack_small_f16(low, high) : pack_bf16(low, high);
    }
#pragma unroll
    for (u32 n = 0; n < D / 8; n++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) o[n][i] *= rescale[i / 2];
    if constexpr (NARROW) {
#pragma unroll
      for (u32 n = 0; n < D / 16; n += 2) {
        // two tokens of two neighbouring dimensions in each word: even dimensions make one tile of the product, odd ones another
        u32 b[4];
        load_matrices_transposed(b, v_tile + value_place<D, Kv>(lane / 8 % 2 * 8 + lane % 8, n + lane / 16));
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
          const u32 first = choose_bytes(b[j * 2], 0, 0x3120), second = choose_bytes(b[j * 2 + 1], 0, 0x3120);
          mma_f16(o[(n + j) * 2], p, e4m3_to_f16(first), e4m3_to_f16(second));
          mma_f16(o[(n + j) * 2 + 1], p, e4m3_to_f16(first >> 16), e4m3_to_f16(second >> 16));
        }
      }
    } else {
#pragma unroll
      for (u32 n = 0; n < D / 16; n++) {
        u32 b[4];
        load_matrices_transposed(b, v_tile + (lane / 8 % 2 * 8 + lane % 8) * ROW + (n * 2 + lane / 16) * 16);
        mma_bf16(o[n * 2], p, b[0], b[1]);
        mma_bf16(o[n * 2 + 1], p, b[2], b[3]);
      }
    }
  }
  copy_async_wait<0>();
#pragma unroll
  for (u32 h = 0; h < 2; h++) {
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
  }

  // Merge the four warps, each of which saw its own tokens.
  __syncthreads();
  float* merge_o = reinterpret_cast<float*>(shared);                       // [warp][16][D]
  float* merge_largest = merge_o + DECODE_WARPS * 16 * D;                  // [warp][16]
  float* merge_sum = merge_largest + DECODE_WARPS * 16;                    // [warp][16]
#pragma unroll
  for (u32 n = 0; n < D / 8; n++)
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      const u32 dimension = NARROW ? n / 2 * 16 + t * 4 + i % 2 * 2 + n % 2 : n * 8 + t * 2 + i % 2;
      merge_o[(warp * 16 + g + i / 2 * 8) * D + dimension] = o[n][i];
    }
  if (t == 0) {
    merge_largest[warp * 16 + g] = largest[0], merge_largest[warp * 16 + g + 8] = largest[1];
    merge_sum[warp * 16 + g] = sum[0], merge_sum[warp * 16 + g + 8] = sum[1];
  }
  __syncthreads();
  // of a tile row: its place in the scratch, and in the output
  auto scratch_place = [&](u32 r) { return (u64)(item.before + r / group) * query_heads + kv_head * group + r % group; };
  auto out_place = [&](u32 r) { return out + ((u64)(row + r / group) * query_heads + kv_head * group + r % group) * D; };
  for (u32 i = threadIdx.x; i < tile_rows * D / 4; i += blockDim.x) {
    const u32 r = i / (D / 4), dimension = i % (D / 4) * 4;
    float top = NEGATIVE_INFINITY;
#pragma unroll
    for (u32 w = 0; w < DECODE_WARPS; w++) top = fmaxf(top, merge_largest[w * 16 + r]);
    if (top == NEGATIVE_INFINITY && active > 1) {
      // all keys of this split lie behind the row: only where the last row sees some (a NaN goes the same way, and comes out
      // of adding up)
      const u64 at = scratch_place(r) * splits + split;
      store4(partial + at * D + dimension, make_float4(0.f, 0.f, 0.f, 0.f));
      if (dimension == 0) log_sum[at] = NEGATIVE_INFINITY;
      continue;
    }
    float total = 0.f;
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (u32 w = 0; w < DECODE_WARPS; w++) {
      const float weight = exp2f(merge_largest[w * 16 + r] - top);
      const float4 p = load4(merge_o + (w * 16 + r) * D + dimension);
      total += merge_sum[w * 16 + r] * weight;
      v.x += p.x * weight, v.y += p.y * weight, v.z += p.z * weight, v.w += p.w * weight;
    }
    const float inverse = 1.f / total;
    v = make_float4(v.x * inverse, v.y * inverse, v.z * inverse, v.w * inverse);
    if (active == 1) {
      store_activation4(out_place(r) + dimension, v, out_scale);
      continue;
    }
    const u64 at = scratch_place(r) * splits + split;
    store4(partial + at * D + dimension, v);
    if (dimension == 0) log_sum[at] = top + log2f(total);
  }
  if (active == 1) return;

  // The block that comes last sees what all others left.
  __shared__ u32 ticket;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    ticket = atomicAdd(&finished[listed * kv_heads + kv_head], 1u);
    if (ticket == active - 1) finished[listed * kv_heads + kv_head] = 0;
  }
  __syncthreads();
  if (ticket != active - 1) return;
  __threadfence();
  float* weights = reinterpret_cast<float*>(shared);  // [tile row][active]
  for (u32 r = warp; r < tile_rows; r += DECODE_WARPS) {
    const float* sums = log_sum + scratch_place(r) * splits;
    float top = NEGATIVE_INFINITY;
    for (u32 s = lane; s < active; s += WARP) top = fmaxf(top, sums[s]);
    top = warp_max(top);
    float total = 0.f;
    for (u32 s = lane; s < active; s += WARP) {
      const float weight = exp2f(sums[s] - top);
      weights[r * active + s] = weight;
      total += weight;
    }
    const float inverse = 1.f / warp_sum(total);
    for (u32 s = lane; s < active; s += WARP) weights[r * active + s] *= inverse;
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < tile_rows * D / 4; i += blockDim.x) {
    const u32 r = i / (D / 4), dimension = i % (D / 4) * 4;
    const float* parts = partial + scratch_place(r) * splits * D + dimension;
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
    for (u32 s = 0; s < active; s++) {
      const float4 p = load4(parts + (u64)s * D);
      const float weight = weights[r * active + s];
      v.x += p.x * weight, v.y += p.y * weight, v.z += p.z * weight, v.w += p.w * weight;
    }
    store_activation4(out_place(r) + dimension, v, out_scale);
  }
}

#define DECODE(NAME, D, KV, OUT)                                                                                              \
  KERNEL __launch_bounds__(128) NAME(const bf16* q, const KV* k_cache, const KV* v_cache, const DecodeItem* items,            \
                                     const u32* positions, const u32* row_sequence, const u32* tables, const u32* table_start, \
                                     float* partial, float* log_sum, u32* finished, OUT* out, float out_scale,                \
                                     u32 query_heads, u32 kv_heads, float score_scale) {                                      \
    decode_attention<D, KV, OUT>(q, k_cache, v_cache, items, positions, row_sequence, tables, table_start, partial,           \
                                 log_sum, finished, out, out_scale, query_heads, kv_heads, score_scale);                      \
  }
DECODE(decode_attention_32_bf16_to_bf16, 32, bf16, bf16)
DECODE(decode_attention_32_bf16_to_e4m3, 32, bf16, e4m3)
DECODE(decode_attention_32_e4m3_to_bf16, 32, e4m3, bf16)
DECODE(decode_attention_32_e4m3_to_e4m3, 32, e4m3, e4m3)
DECODE(decode_attention_64_bf16_to_bf16, 64, bf16, bf16)
DECODE(decode_attention_64_bf16_to_e4m3, 64, bf16, e4m3)
DECODE(decode_attention_64_e4m3_to_bf16, 64, e4m3, bf16)
DECODE(decode_attention_64_e4m3_to_e4m3, 64, e4m3, e4m3)
DECODE(decode_attention_128_bf16_to_bf16, 128, bf16, bf16)
DECODE(decode_attention_128_bf16_to_e4m3, 128, bf16, e4m3)
DECODE(decode_attention_128_e4m3_to_bf16, 128, e4m3, bf16)
DECODE(decode_attention_128_e4m3_to_e4m3, 128, e4m3, e4m3)
