// Attention for single rows and for few rows of a sequence that follow each other (decode; draft tokens that are verified; the end
// of a prompt). All items' keys, one after the other, are cut into equal parts, one for each block that the GPU runs at once: a
// long context among short ones costs what its keys cost. Where an item lies in several parts, each leaves a partial result, and the
// block that finishes last adds them up. The query heads that share a KV head are packed into the 16 rows of the tensor cores' tile, and
// as many rows of the sequence as fit there: they share what is read of the cache. Softmax in base 2 and f32.
#include "device.cuh"

constexpr u32 DECODE_WARPS = 4, WARP_TOKENS = 16;

// Rows of 128 elements lie in the cache as they are read here: bulk copies bring a warp's tokens as they are. (Many rows over e4m3
// were measured to be faster with a copy by each lane.)
template <u32 D, typename Kv, bool FEW>
constexpr bool copied_whole() { return D == 128 && (sizeof(Kv) == 2 || FEW); }
// Bytes of a token in a warp's tile: other bf16 rows are padded, so that 8 rows of one 16-byte column lie in different banks; e4m3
// rows are not, the chunks of some are exchanged.
template <u32 D, typename Kv, bool FEW>
constexpr u32 stored_row() { return sizeof(Kv) == 2 && !copied_whole<D, Kv, FEW>() ? D * 2 + 16 : D * sizeof(Kv); }
template <typename Kv, bool FEW>
constexpr u32 decode_stages() { return sizeof(Kv) == 2 ? 3 : FEW ? 4 : 6; }
// Dynamic shared memory of decode_attention.
template <u32 D, typename Kv, bool FEW>
constexpr u32 decode_shared_bytes() {
  const u32 ring = DECODE_WARPS * decode_stages<Kv, FEW>() * 2 * WARP_TOKENS * stored_row<D, Kv, FEW>();
  const u32 merge = DECODE_WARPS * 16 * (D + 2) * 4;
  return ring > merge ? ring : merge;
}
// Places of a 16-byte chunk in a warp's tiles. e4m3 keys are read two rows and four chunks at a time, e4m3 values eight rows
// and one chunk at a time: each from all banks where rows are as long as the banks.
template <u32 D, typename Kv, bool FEW>
__device__ __forceinline__ u32 key_place(u32 token, u32 piece) {
  if (copied_whole<D, Kv, FEW>()) return piece / 8 * (WARP_TOKENS * 128) + token * 128 + ((piece % 8 ^ token % 8) << 4);
  return token * stored_row<D, Kv, FEW>() + (sizeof(Kv) == 1 && D == 128 ? piece ^ (token & 1) << 2 : piece) * 16;
}
template <u32 D, typename Kv, bool FEW>
__device__ __forceinline__ u32 value_place(u32 token, u32 piece) {
  if (copied_whole<D, Kv, FEW>()) return key_place<D, Kv, FEW>(token, piece);
  return token * stored_row<D, Kv, FEW>() + (sizeof(Kv) == 1 && D == 128 ? piece ^ token % 8 : piece) * 16;
}
// Rows of a sequence that are computed in one step are at most so many: keys that lie further back were there before it.
constexpr u32 MAX_NEW_ROWS = 32;

// Some rows of one sequence, at positions that follow each other. The host writes the same in backend/cuda/step.rs.
struct DecodeItem {
  u32 first_row;
  u32 count;       // times (query heads / kv heads) <= 16; 0: nothing to do
  u32 begin;       // blocks of keys of the items before this one
  u32 first_part;  // the part with its first block
  u32 parts;       // parts that have blocks of it
};
// A part of all items' blocks ends where the next one begins.
struct DecodePart {
  u32 begin;
  u32 first_item;
};

// ---- few rows over e4m3 rows of 128 -------------------------------------------------------------------------------
// Keys are multiplied as they are: a query element is two e4m3 numbers, q = (high + low / 16) * scale with one scale per row, which
// keeps the 8 bits of bf16. `high` and `low` of 8 tile rows fill the 16 rows of a tensor core's tile. The output is computed
// transposed, O^T = V^T P^T: the 8 tile rows are the 8 columns of a tile then, values are widened to f16 as the other operand.

constexpr float LOW_LIMB = 16.f;

// Of a lane: the fragments of dimensions t * 32.. of tile row g.
struct LimbQueries {
  u32 a[4][4];      // [dimensions / 8 of the lane][fragment]
  float row_scale;  // of a score: the row's scale times score_scale

  template <typename Row>
  __device__ __forceinline__ void load(Row q_row, u32 tile_rows, float score_scale, u32 g, u32 t) {
    u32 words[16];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      const uint4 eight = g < tile_rows ? *reinterpret_cast<const uint4*>(q_row(g) + t * 32 + i * 8) : make_uint4(0, 0, 0, 0);
      words[i * 4] = eight.x, words[i * 4 + 1] = eight.y, words[i * 4 + 2] = eight.z, words[i * 4 + 3] = eight.w;
    }
    float top = 0.f;
#pragma unroll
    for (u32 i = 0; i < 16; i++) top = fmaxf(top, fmaxf(fabsf(low_bf16(words[i])), fabsf(high_bf16(words[i]))));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    const float inverse = top > 0.f ? 448.f / top : 0.f;
    row_scale = top / 448.f * score_scale;
#pragma unroll
    for (u32 m = 0; m < 4; m++)
#pragma unroll
      for (u32 i = 0; i < 2; i++) {
        u32 high = 0, low = 0;
#pragma unroll
        for (u32 pair = 0; pair < 2; pair++) {
          const u32 word = words[m * 4 + i * 2 + pair];
          const float x = low_bf16(word) * inverse, y = high_bf16(word) * inverse;
          const u16 rounded = pack_e4m3(x, y);
          const float2 back = unpack_e4m3(rounded);
          high |= (u32)rounded << (16 * pair);
          low |= (u32)pack_e4m3((x - back.x) * LOW_LIMB, (y - back.y) * LOW_LIMB) << (16 * pair);
        }
        a[m][i * 2] = high, a[m][i * 2 + 1] = low;
      }
  }
};

// Adds a warp's 16 tokens. o [dimensions / 16]: element i is of dimension 2g + i / 2 and tile row 2t + i % 2; `largest`, `sum` and
// `own_position` are of tile row g.
__device__ __forceinline__ void e4m3_attention(const LimbQueries& queries, const u8* k_tile, const u8* v_tile, float (&o)[8][4],
                                               float& largest, float& sum, u32 own_position, u32 token, u32 g, u32 t) {
  const u32 lane = g * 4 + t;
  float x[4], block_largest = NEGATIVE_INFINITY;
#pragma unroll
  for (u32 j = 0; j < 2; j++) {
    float c[4] = {};
#pragma unroll
    for (u32 piece = 0; piece < 2; piece++) {
      const uint4 keys = *reinterpret_cast<const uint4*>(k_tile + key_place<128, e4m3, true>(j * 8 + g, t * 2 + piece));
      mma_e4m3(c, queries.a[piece * 2], keys.x, keys.y);
      mma_e4m3(c, queries.a[piece * 2 + 1], keys.z, keys.w);
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
      const bool seen = token + j * 8 + t * 2 + i <= own_position;
      x[j * 2 + i] = seen ? (c[i] + c[2 + i] * (1.f / LOW_LIMB)) * queries.row_scale : NEGATIVE_INFINITY;
      block_largest = fmaxf(block_largest, x[j * 2 + i]);
    }
  }
  block_largest = fmaxf(block_largest, __shfl_xor_sync(0xffffffffu, block_largest, 1));
  block_largest = fmaxf(block_largest, __shfl_xor_sync(0xffffffffu, block_largest, 2));
  if (__ballot_sync(0xffffffffu, block_largest > largest) != 0) {
    // a warp may have seen no key yet: -inf - -inf would be NaN
    const float now = fmaxf(largest, block_largest);
    const float rescale = now == NEGATIVE_INFINITY ? 1.f : exp2f(largest - now);
    largest = now;
    sum *= rescale;
    const float even = __shfl_sync(0xffffffffu, rescale, t * 8), odd = __shfl_sync(0xffffffffu, rescale, t * 8 + 4);
#pragma unroll
    for (u32 n = 0; n < 8; n++) {
      o[n][0] *= even, o[n][1] *= odd;
      o[n][2] *= even, o[n][3] *= odd;
    }
  }
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    x[i] = largest == NEGATIVE_INFINITY ? 0.f : exp2f(x[i] - largest);
    sum += x[i];
  }
  const u32 p[2] = {pack_small_f16(x[0], x[1]), pack_small_f16(x[2], x[3])};
#pragma unroll
  for (u32 n = 0; n < 8; n += 2) {
    // two tokens of two neighbouring dimensions in each word: even dimensions are the upper rows of a tile, odd ones the lower
    u32 b[4];
    load_matrices_transposed(b, v_tile + value_place<128, e4m3, true>(lane / 8 % 2 * 8 + lane % 8, n + lane / 16));
#pragma unroll
    for (u32 j = 0; j < 2; j++) {
      const u32 first = choose_bytes(b[j * 2], 0, 0x3120), second = choose_bytes(b[j * 2 + 1], 0, 0x3120);
      const u32 values[4] = {e4m3_to_f16(first), e4m3_to_f16(first >> 16), e4m3_to_f16(second), e4m3_to_f16(second >> 16)};
      mma_f16(o[n + j], values, p[0], p[1]);
    }
  }
}

// q [rows][query heads][D], scaled by s(p); caches [block][kv head][64][D]. A row of position p reads keys 0..=p.
// `items` lists the rows of the batch that are decoded here, `parts` [grid.x + 1] how their keys are shared out. Output [row][query
// heads * D]. Scratch, for each part twice (an item that began before it, an item that continues behind it), each KV head and each of 16
// rows: partial [part][2][kv head][16][D] (normalised) and log_sum [part][2][kv head][16] (base 2); finished [item][kv head] counts the
// blocks that are done: zero before and after.
// Launch: grid (parts <= 400, kv heads), block (128), dynamic shared memory
// decode_shared_bytes<D, Kv, FEW>(). score_scale = log2(e) / sqrt(D).
// FEW: every item has at most 8 tile rows.
template <u32 D, typename Kv, typename Out, bool FEW>
__device__ __forceinline__ void decode_attention(const bf16* q, const Kv* k_cache, const Kv* v_cache, const DecodeItem* items,
                                                 const DecodePart* parts, const u32* positions, const u32* row_sequence,
                                                 const u32* tables, const u32* table_start, float* partial, float* log_sum,
                                                 u32* finished, Out* out, float out_scale, u32 query_heads, u32 kv_heads,
                                                 float score_scale) {
  constexpr bool WHOLE = copied_whole<D, Kv, FEW>();
  constexpr bool NARROW = sizeof(Kv) == 1;
  // items of at most 8 tile rows over e4m3 rows of 128: see e4m3_attention. Other e4m3 rows are widened to f16 in registers.
  static_assert(!FEW || (NARROW && D == 128));
  constexpr u32 TILE = WARP_TOKENS * stored_row<D, Kv, FEW>(), DECODE_STAGES = decode_stages<Kv, FEW>();
  constexpr u32 PIECES = D * sizeof(Kv) / 16;  // of a row
  DYNAMIC_SHARED(shared);
  __shared__ u64 full[DECODE_WARPS][DECODE_STAGES];
  let_next_kernel_start();
  const u32 part = blockIdx.x, kv_head = blockIdx.y;
  const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const u32 group = query_heads / kv_heads, end = parts[part + 1].begin;
  u8* ring = shared + warp * DECODE_STAGES * 2 * TILE;
  if (WHOLE && threadIdx.x == 0) {
    for (u32 w = 0; w < DECODE_WARPS; w++)
      for (u32 s = 0; s < DECODE_STAGES; s++) barrier_init(&full[w][s], 1);
    share_barriers();
  }
  if (WHOLE) __syncthreads();

  // What a step's copies brought may be read while the kernel before this one still runs, and keys that are older than the step.
  bool previous_is_done = false;
  u32 turn = 0;  // blocks that this warp has gone through
  u32 at = parts[part].begin;
  for (u32 listed = parts[part].first_item; at < end; listed++) {
    const DecodeItem item = items[listed];
    if (item.count == 0) continue;
    const u32 row = item.first_row, tile_rows = item.count * group;
    const u32 first_position = positions[row], position = first_position + item.count - 1;  // of the last row
    const u32* table = tables + table_start[row_sequence[row]];
    const u32 blocks = position / KV_BLOCK + 1, first = at - item.begin, last = min(blocks, first + end - at);
    at += last - first;

    auto load = [&](u32 block) {
      const u64 source = ((u64)table[block] * kv_heads + kv_head) * KV_BLOCK * D;
      const u8* keys = reinterpret_cast<const u8*>(k_cache + source);
      const u8* values = reinterpret_cast<const u8*>(v_cache + source);
      const u32 stage = (turn + block - first) % DECODE_STAGES;
      u8* k_tile = ring + stage * 2 * TILE;
      u8* v_tile = k_tile + TILE;
      if constexpr (WHOLE) {
        if (lane != 0) return;
        constexpr u32 HALF = WARP_TOKENS * 128, HALVES = D * sizeof(Kv) / 128;
        u64* barrier = &full[warp][stage];
        barrier_arrive_expecting(barrier, 2 * TILE);
#pragma unroll
        for (u32 half = 0; half < HALVES; half++) {
          copy_tile(k_tile + half * HALF, keys + half * KV_BLOCK * 128 + warp * HALF, HALF, barrier);
          copy_tile(v_tile + half * HALF, values + half * KV_BLOCK * 128 + warp * HALF, HALF, barrier);
        }
      } else {
#pragma unroll
        for (u32 i = lane; i < WARP_TOKENS * PIECES; i += WARP) {
          const u32 token = i / PIECES, piece = i % PIECES, place = cache_place(D * sizeof(Kv), warp * WARP_TOKENS + token, piece);
          copy_async_16(k_tile + key_place<D, Kv, FEW>(token, piece), keys + place);
          copy_async_16(v_tile + value_place<D, Kv, FEW>(token, piece), values + place);
        }
      }
    };
    u32 ahead = first;
    for (; ahead < first + DECODE_STAGES - 1; ahead++) {
      if (!previous_is_done && (ahead + 1) * KV_BLOCK + MAX_NEW_ROWS > first_position) break;
      if (ahead < last) load(ahead);
      copy_async_commit();
    }
    if (!previous_is_done) wait_for_previous_kernel();
    previous_is_done = true;
    for (; ahead < first + DECODE_STAGES - 1; ahead++) {
      if (ahead < last) load(ahead);
      copy_async_commit();
    }
    // tile row r is head r % group of row r / group
    const u32 own_position[2] = {first_position + g / group, first_position + (g + 8) / group};

    const bf16* q_heads = q + ((u64)row * query_heads + kv_head * group) * D;
    auto q_row = [&](u32 r) { return q_heads + ((u64)(r / group) * query_heads + r % group) * D; };
    float o[FEW ? D / 16 : D / 8][4] = {};
    float largest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0.f, 0.f};
    LimbQueries limbs;
    if constexpr (FEW) limbs.load(q_row, tile_rows, score_scale, g, t);

    // Query fragments.
    u32 a[FEW ? 1 : D / 16][4];
    if constexpr (!FEW)
#pragma unroll
    for (u32 k = 0; k < D / 16; k++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        // e4m3 keys are read four dimensions at a time: theirs is another order of the dimensions, the same for q
        const u32 four = D >= 64 ? k / 4 * 64 + t * 16 + k % 4 * 4 : t * 8 + k * 4;
        const u32 r = g + i % 2 * 8, dimension = NARROW ? four + i / 2 * 2 : k * 16 + i / 2 * 8 + t * 2;
        const u32 pair = r < tile_rows ? *reinterpret_cast<const u32*>(q_row(r) + dimension) : 0;
        a[k][i] = NARROW ? pack_f16(low_bf16(pair), high_bf16(pair)) : pair;
      }

    for (u32 block = first; block < last; block++, ahead++) {
      const u32 stage = (turn + block - first) % DECODE_STAGES;
      if constexpr (WHOLE) {
        barrier_wait(&full[warp][stage], (turn + block - first) / DECODE_STAGES & 1);
      } else {
        copy_async_wait<DECODE_STAGES - 2>();
      }
      __syncwarp();
      if (ahead < last) load(ahead);
      copy_async_commit();
      const u8* k_tile = ring + stage * 2 * TILE;
      const u8* v_tile = k_tile + TILE;

      const u32 token = block * KV_BLOCK + warp * WARP_TOKENS;
      if (token + WARP_TOKENS - 1 > position) {
        // nothing was stored behind the last row's position; what lies there (a NaN, even) must not meet the weight 0
        const u32 stored = position < token ? 0 : position - token + 1;
        for (u32 i = lane; i < (WARP_TOKENS - stored) * PIECES; i += WARP)
          *reinterpret_cast<uint4*>(const_cast<u8*>(v_tile) + value_place<D, Kv, FEW>(stored + i / PIECES, i % PIECES)) = make_uint4(0, 0, 0, 0);
        __syncwarp();
      }

      if constexpr (FEW) {
        e4m3_attention(limbs, k_tile, v_tile, o, largest[0], sum[0], own_position[0], token, g, t);
      } else {
      float scores[2][4] = {};
      if constexpr (NARROW) {
        constexpr u32 WORDS = D >= 64 ? 4 : 2;  // a lane's bytes of a row at a time
#pragma unroll
        for (u32 j = 0; j < 2; j++)
#pragma unroll
          for (u32 k = 0; k < D / 16; k += WORDS) {
            u32 words[WORDS];
            if constexpr (WORDS == 4) {
              const uint4 four = *reinterpret_cast<const uint4*>(k_tile + key_place<D, Kv, FEW>(j * 8 + g, k + t));
              words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
            } else {
              const uint2 two = *reinterpret_cast<const uint2*>(k_tile + (j * 8 + g) * stored_row<D, Kv, FEW>() + t * 8);
              words[0] = two.x, words[1] = two.y;
            }
#pragma unroll
            for (u32 w = 0; w < WORDS; w++) mma_f16(scores[j], a[k + w], e4m3_to_f16(words[w]), e4m3_to_f16(words[w] >> 16));
          }
      } else {
#pragma unroll
        for (u32 k = 0; k < D / 16; k++) {
          u32 b[4];
          load_matrices(b, k_tile + key_place<D, Kv, FEW>(lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
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
          // two tokens of two neighbouring dimensions in each word: even dimensions make one tile of the GEMM, odd ones another
          u32 b[4];
          load_matrices_transposed(b, v_tile + value_place<D, Kv, FEW>(lane / 8 % 2 * 8 + lane % 8, n + lane / 16));
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
          load_matrices_transposed(b, v_tile + value_place<D, Kv, FEW>(lane / 8 % 2 * 8 + lane % 8, n * 2 + lane / 16));
          mma_bf16(o[n * 2], p, b[0], b[1]);
          mma_bf16(o[n * 2 + 1], p, b[2], b[3]);
        }
      }
      }
    }
    copy_async_wait<0>();
    turn += last - first;
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
    for (u32 n = 0; n < (FEW ? D / 16 : D / 8); n++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        const u32 dimension = FEW ? n * 16 + g * 2 + i / 2 : NARROW ? n / 2 * 16 + t * 4 + i % 2 * 2 + n % 2 : n * 8 + t * 2 + i % 2;
        merge_o[(warp * 16 + (FEW ? t * 2 + i % 2 : g + i / 2 * 8)) * D + dimension] = o[n][i];
      }
    if (t == 0) {
      merge_largest[warp * 16 + g] = largest[0], merge_largest[warp * 16 + g + 8] = largest[1];
      merge_sum[warp * 16 + g] = sum[0], merge_sum[warp * 16 + g + 8] = sum[1];
    }
    __syncthreads();
    // of a tile row: its place in the scratch of a part, and in the output
    auto scratch_place = [&](u32 of, bool goes_on, u32 r) { return (((u64)of * 2 + goes_on) * kv_heads + kv_head) * 16 + r; };
    auto out_place = [&](u32 r) { return out + ((u64)(row + r / group) * query_heads + kv_head * group + r % group) * D; };
    for (u32 i = threadIdx.x; i < tile_rows * D / 4; i += blockDim.x) {
      const u32 r = i / (D / 4), dimension = i % (D / 4) * 4;
      float top = NEGATIVE_INFINITY;
#pragma unroll
      for (u32 w = 0; w < DECODE_WARPS; w++) top = fmaxf(top, merge_largest[w * 16 + r]);
      if (top == NEGATIVE_INFINITY && item.parts > 1) {
        // all keys of this part lie behind the row: only where the last row sees some (a NaN goes the same way, and comes out
        // of adding up)
        const u64 place = scratch_place(part, first == 0, r);
        store4(partial + place * D + dimension, make_float4(0.f, 0.f, 0.f, 0.f));
        if (dimension == 0) log_sum[place] = NEGATIVE_INFINITY;
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
      if (item.parts == 1) {
        store_activation4(out_place(r) + dimension, v, out_scale);
        continue;
      }
      const u64 place = scratch_place(part, first == 0, r);
      store4(partial + place * D + dimension, v);
      if (dimension == 0) log_sum[place] = top + log2f(total);
    }
    if (item.parts > 1) {
      // The block that comes last sees what all others left.
      __shared__ u32 ticket;
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        u32* arrived = &finished[listed * kv_heads + kv_head];
        ticket = atomicAdd(arrived, 1u);
        if (ticket == item.parts - 1) *arrived = 0;
      }
      __syncthreads();
      if (ticket == item.parts - 1) {
        __threadfence();
        // the item began in its first part, and continues behind it
        auto place_of = [&](u32 p, u32 r) { return scratch_place(item.first_part + p, p == 0, r); };
        float* weights = reinterpret_cast<float*>(shared);  // [tile row][parts]
        for (u32 r = warp; r < tile_rows; r += DECODE_WARPS) {
          float top = NEGATIVE_INFINITY;
          for (u32 p = lane; p < item.parts; p += WARP) top = fmaxf(top, log_sum[place_of(p, r)]);
          top = warp_max(top);
          float total = 0.f;
          for (u32 p = lane; p < item.parts; p += WARP) {
            const float weight = exp2f(log_sum[place_of(p, r)] - top);
            weights[r * item.parts + p] = weight;
            total += weight;
          }
          const float inverse = 1.f / warp_sum(total);
          for (u32 p = lane; p < item.parts; p += WARP) weights[r * item.parts + p] *= inverse;
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < tile_rows * D / 4; i += blockDim.x) {
          const u32 r = i / (D / 4), dimension = i % (D / 4) * 4;
          float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
          for (u32 p = 0; p < item.parts; p++) {
            const float4 of_part = load4(partial + place_of(p, r) * D + dimension);
            const float weight = weights[r * item.parts + p];
            v.x += of_part.x * weight, v.y += of_part.y * weight, v.z += of_part.z * weight, v.w += of_part.w * weight;
          }
          store_activation4(out_place(r) + dimension, v, out_scale);
        }
      }
    }
    // the ring is filled again, by copies that must come behind what was written there
    if (WHOLE) show_shared_to_matrix_unit();
    __syncthreads();
  }
  if (!previous_is_done) wait_for_previous_kernel();
}

#define DECODE(NAME, D, KV, OUT, FEW)                                                                                         \
  KERNEL __launch_bounds__(128, FEW ? 3 : 2) NAME(const bf16* q, const KV* k_cache, const KV* v_cache, const DecodeItem* items,            \
                                     const DecodePart* parts, const u32* positions, const u32* row_sequence,                  \
                                     const u32* tables, const u32* table_start,                                               \
                                     float* partial, float* log_sum, u32* finished, OUT* out, float out_scale,                \
                                     u32 query_heads, u32 kv_heads, float score_scale) {                                      \
    decode_attention<D, KV, OUT, FEW>(q, k_cache, v_cache, items, parts, positions, row_sequence, tables, table_start, partial,    \
                                 log_sum, finished, out, out_scale, query_heads, kv_heads, score_scale);                      \
  }
DECODE(decode_attention_32_bf16_to_bf16, 32, bf16, bf16, false)
DECODE(decode_attention_32_bf16_to_e4m3, 32, bf16, e4m3, false)
DECODE(decode_attention_32_e4m3_to_bf16, 32, e4m3, bf16, false)
DECODE(decode_attention_32_e4m3_to_e4m3, 32, e4m3, e4m3, false)
DECODE(decode_attention_64_bf16_to_bf16, 64, bf16, bf16, false)
DECODE(decode_attention_64_bf16_to_e4m3, 64, bf16, e4m3, false)
DECODE(decode_attention_64_e4m3_to_bf16, 64, e4m3, bf16, false)
DECODE(decode_attention_64_e4m3_to_e4m3, 64, e4m3, e4m3, false)
DECODE(decode_attention_128_bf16_to_bf16, 128, bf16, bf16, false)
DECODE(decode_attention_128_bf16_to_e4m3, 128, bf16, e4m3, false)
DECODE(decode_attention_128_e4m3_to_bf16, 128, e4m3, bf16, false)
DECODE(decode_attention_128_e4m3_to_e4m3, 128, e4m3, e4m3, false)
DECODE(decode_attention_128_e4m3_few_to_bf16, 128, e4m3, bf16, true)
DECODE(decode_attention_128_e4m3_few_to_e4m3, 128, e4m3, e4m3, true)
