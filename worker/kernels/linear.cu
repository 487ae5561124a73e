// GEMMs for a few rows (M <= 32): y = x W^T with W streamed once, near the bandwidth of device memory.
// cuBLASLt reaches 58 to 87 % of it at these sizes.
//
// Each warp keeps its own ring of stages in shared memory, filled by asynchronous copies; a stage holds 128 bytes of K
// for 32 rows of W and for all rows of x. The eight warps of a block take turns along K and add up in the end. A block
// goes from unit to unit (32 rows of W, one part of K) without letting its rings run dry.
#include "device.cuh"

constexpr u32 UNIT_ROWS = 32, WARPS = 8, STAGE_BYTES_OF_K = 128;
constexpr u32 REDUCTION_STRIDE = UNIT_ROWS + 1;

template <typename Value>
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <>
__device__ __forceinline__ void multiply<e4m3>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  mma_e4m3(c, a, b0, b1);
}
template <>
__device__ __forceinline__ void multiply<bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  mma_bf16(c, a, b0, b1);
}

// Place of a 16-byte chunk in a stage: rows of 128 bytes; odd rows have their halves exchanged, so that the eight lanes
// of one phase (two rows, four chunks each) read from all banks.
__device__ __forceinline__ u32 piece_offset(u32 row, u32 piece) { return row * STAGE_BYTES_OF_K + ((piece ^ ((row & 1) << 2)) << 4); }

// y[split][m][n] (f32, without any scale); W [n][row_bytes], x [m][row_bytes]; n % 32 == 0, row_bytes % 128 == 0,
// m <= 8 * COLUMN_TILES. Which elements of K a lane multiplies is a permutation of the instruction's own order, the
// same for W and x, so that a lane's operands lie together and are read 16 bytes at a time.
// Launch: grid (any, at best a multiple of the multiprocessors), block (256), dynamic shared memory
// 8 * STAGES * (32 + 8 COLUMN_TILES) * 128 + 8 * 8 COLUMN_TILES * 33 * 4 bytes.
template <typename Value, u32 COLUMN_TILES, int STAGES>
__device__ __forceinline__ void linear_few_rows(const u8* w, const u8* x, float* y, u32 m, u32 n, u32 row_bytes, u32 splits) {
  constexpr u32 COLUMNS = COLUMN_TILES * 8, W_BYTES = UNIT_ROWS * STAGE_BYTES_OF_K, X_BYTES = COLUMNS * STAGE_BYTES_OF_K;
  constexpr u32 STAGE_BYTES = W_BYTES + X_BYTES;
  DYNAMIC_SHARED(shared);
  const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  u8* ring = shared + warp * STAGES * STAGE_BYTES;
  float* reduction = reinterpret_cast<float*>(shared + WARPS * STAGES * STAGE_BYTES);

  const u32 chunks = row_bytes / STAGE_BYTES_OF_K, units = n / UNIT_ROWS * splits;
  const u32 turns = ((chunks + splits - 1) / splits + WARPS - 1) / WARPS;

  // Where a warp is on its way through the block's units; one for what is copied, one for what is multiplied.
  struct Cursor {
    u32 unit, turn, stage, chunk, chunks_end;
  };
  auto enter_unit = [&](Cursor& at) {
    const u32 split = at.unit % splits;
    at.turn = 0;
    at.chunk = (u32)((u64)split * chunks / splits) + warp;
    at.chunks_end = (u32)((u64)(split + 1) * chunks / splits);
  };
  auto advance = [&](Cursor& at) {
    at.stage = at.stage + 1 == STAGES ? 0 : at.stage + 1;
    at.chunk += WARPS;
    if (++at.turn < turns) return;
    at.unit += gridDim.x;
    enter_unit(at);
  };
  auto idle = [&](const Cursor& at) { return at.unit >= units || at.chunk >= at.chunks_end; };
  auto load_w = [&](const Cursor& at) {
    if (idle(at)) return;
    const u8* source = w + (u64)(at.unit / splits) * UNIT_ROWS * row_bytes + at.chunk * STAGE_BYTES_OF_K;
    u8* stage = ring + at.stage * STAGE_BYTES;
#pragma unroll
    for (u32 i = 0; i < UNIT_ROWS / 4; i++) {
      const u32 row = i * 4 + lane / 8;
      copy_async_16(stage + piece_offset(row, lane % 8), source + (u64)row * row_bytes + lane % 8 * 16);
    }
  };
  auto load_x = [&](const Cursor& at) {
    if (idle(at)) return;
    u8* stage = ring + at.stage * STAGE_BYTES + W_BYTES;
#pragma unroll
    for (u32 i = 0; i < COLUMNS / 4; i++) {
      const u32 row = i * 4 + lane / 8;
      if (row < m) copy_async_16(stage + piece_offset(row, lane % 8), x + (u64)row * row_bytes + at.chunk * STAGE_BYTES_OF_K + lane % 8 * 16);
    }
  };

  // Rows of x that don't exist are never copied: they stay zero.
  for (u32 s = 0; s < STAGES; s++)
    for (u32 i = lane; i < X_BYTES / 16; i += WARP) *reinterpret_cast<uint4*>(ring + s * STAGE_BYTES + W_BYTES + i * 16) = make_uint4(0, 0, 0, 0);
  __syncwarp();
  // Weights never change: they may be read while the kernel that makes x still runs.
  Cursor start{blockIdx.x, 0, 0, 0, 0};
  enter_unit(start);
  Cursor ahead = start;
  for (int s = 0; s < STAGES - 1; s++, advance(ahead)) load_w(ahead);
  wait_for_previous_kernel();
  ahead = start;
  for (int s = 0; s < STAGES - 1; s++, advance(ahead)) {
    load_x(ahead);
    copy_async_commit();
  }
  let_next_kernel_start();

  float c[2][COLUMN_TILES][4] = {};
  const u32 g = lane / 4, t = lane % 4;
  for (Cursor at = start; at.unit < units; advance(at), advance(ahead)) {
    copy_async_wait<STAGES - 2>();
    __syncwarp();  // every lane's copies have landed, and every lane is done with the stage before this one
    load_w(ahead);
    load_x(ahead);
    copy_async_commit();
    if (!idle(at)) {
      const u8* stage = ring + at.stage * STAGE_BYTES;
#pragma unroll
      for (u32 half = 0; half < 2; half++) {
        const u32 piece = half * 4 + t;
        uint4 b[COLUMN_TILES];
#pragma unroll
        for (u32 j = 0; j < COLUMN_TILES; j++) b[j] = *reinterpret_cast<const uint4*>(stage + W_BYTES + piece_offset(j * 8 + g, piece));
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
          const uint4 low = *reinterpret_cast<const uint4*>(stage + piece_offset(r * 16 + g, piece));
          const uint4 high = *reinterpret_cast<const uint4*>(stage + piece_offset(r * 16 + g + 8, piece));
          const u32 first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
          for (u32 j = 0; j < COLUMN_TILES; j++) {
            multiply<Value>(c[r][j], first, b[j].x, b[j].y);
            multiply<Value>(c[r][j], second, b[j].z, b[j].w);
          }
        }
      }
    }
    if (at.turn != turns - 1) continue;

    // The unit is finished: add the warps' sums, in an order that never varies.
    float* mine = reduction + warp * COLUMNS * REDUCTION_STRIDE;
#pragma unroll
    for (u32 r = 0; r < 2; r++)
#pragma unroll
      for (u32 j = 0; j < COLUMN_TILES; j++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
          mine[(j * 8 + t * 2 + i % 2) * REDUCTION_STRIDE + r * 16 + g + i / 2 * 8] = c[r][j][i];
          c[r][j][i] = 0.f;
        }
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < COLUMN_TILES; i++) {
      const u32 row = threadIdx.x % UNIT_ROWS, column = threadIdx.x / UNIT_ROWS + i * 8;
      if (column < m) {
        float sum = 0.f;
#pragma unroll
        for (u32 v = 0; v < WARPS; v++) sum += reduction[(v * COLUMNS + column) * REDUCTION_STRIDE + row];
        y[((u64)(at.unit % splits) * m + column) * n + at.unit / splits * UNIT_ROWS + row] = sum;
      }
    }
    __syncthreads();
  }
}

#define LINEAR(NAME, VALUE, COLUMN_TILES, STAGES)                                                                          \
  KERNEL __launch_bounds__(256, 1)                                                                                         \
      NAME(const u8* w, const u8* x, float* y, u32 m, u32 n, u32 row_bytes, u32 splits) {                                  \
    linear_few_rows<VALUE, COLUMN_TILES, STAGES>(w, x, y, m, n, row_bytes, splits);                                        \
  }
LINEAR(linear_e4m3_8, e4m3, 1, 5)
LINEAR(linear_e4m3_16, e4m3, 2, 4)
LINEAR(linear_e4m3_32, e4m3, 4, 3)
LINEAR(linear_bf16_8, bf16, 1, 5)
LINEAR(linear_bf16_16, bf16, 2, 4)
LINEAR(linear_bf16_32, bf16, 4, 3)
