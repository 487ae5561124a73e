// FP8 matrix products for some rows (17 to 128): y = x W^T with W streamed once, near the bandwidth of device memory, where
// cuBLASLt reaches 48 to 85 % of it. On Hopper's warpgroup matrix instructions, with W's rows as the rows of the instruction
// and x's as its columns.
//
// The work (all tiles of W's rows, all of K) is cut into as many equal parts as there are blocks, whatever the shape: a
// block's part may begin and end inside a tile. The blocks of such a tile leave partial sums, and the one that ends last adds
// them up. One warpgroup brings W and x through a ring of stages, two multiply.
#include "device.cuh"

constexpr u32 GROUP_THREADS = 128, MULTIPLYING = 2, CHUNK = 128;  // bytes of K in a stage
constexpr u32 READY = 1;                                          // the multiplying threads' barrier
constexpr u32 RING_BYTES = 216 << 10;

// x has up to N rows; each multiplying warpgroup has TILES x 64 rows of W.
template <u32 N, u32 TILES>
struct Sizes {
  static constexpr u32 ROWS = MULTIPLYING * TILES * 64, STAGE = (ROWS + N) * CHUNK;
  static constexpr int STAGES = RING_BYTES / STAGE < 8 ? RING_BYTES / STAGE : 8;
};

// Where a block is in its part: chunk `at` of all tiles' chunks.
struct Part {
  u32 at, end, chunks, total, grid;
  __device__ __forceinline__ u32 tile() const { return at / chunks; }
  __device__ __forceinline__ u32 first() const { return at % chunks; }
  __device__ __forceinline__ u32 last() const { return min(chunks, first() + end - at); }
  // The block that has a chunk.
  __device__ __forceinline__ u32 owner(u32 chunk) const { return (u32)(((u64)(chunk + 1) * grid - 1) / total); }
};

// y[m][n] (bf16, without any scale); W [n][row_bytes], x [m][row_bytes] in e4m3; n % ROWS == 0, row_bytes % 128 == 0, m <= N.
// partial [grid][2][ROWS * N]; finished [n / ROWS], zero before and after.
// Launch: grid (any, at best the multiprocessors), block (384), dynamic shared memory 1024 + STAGES * STAGE.
template <u32 N, u32 TILES>
__device__ __forceinline__ void linear_many_rows(const u8* w, const u8* x, bf16* y, float* partial, u32* finished, u32 m, u32 n, u32 row_bytes) {
  constexpr u32 ROWS = Sizes<N, TILES>::ROWS, STAGE = Sizes<N, TILES>::STAGE;
  constexpr int STAGES = Sizes<N, TILES>::STAGES, LAG = STAGES - 2;
  DYNAMIC_SHARED(unaligned);
  u8* ring = align_shared_1024(unaligned);
  __shared__ u64 full[STAGES], empty[STAGES];
  __shared__ u32 ticket;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) barrier_init(&full[s], GROUP_THREADS), barrier_init(&empty[s], MULTIPLYING * 4);
    share_barriers();
  }
  __syncthreads();
  Part part;
  part.chunks = row_bytes / CHUNK, part.total = n / ROWS * part.chunks, part.grid = gridDim.x;
  part.at = (u32)((u64)part.total * blockIdx.x / gridDim.x), part.end = (u32)((u64)part.total * (blockIdx.x + 1) / gridDim.x);
  const u32 count = part.end - part.at;

  if (threadIdx.x < GROUP_THREADS) {
    give_registers<40>();
    const u32 thread = threadIdx.x, row = thread / 8, piece = thread % 8;
    const u32 place = row * 128 + ((piece ^ (row % 8)) << 4);  // sixteen rows further, sixteen rows of 128 bytes further
    auto load_w = [&](u32 index) {
      const u32 chunk = part.at + index;
      const u8* source = w + ((u64)(chunk / part.chunks) * ROWS + row) * row_bytes + chunk % part.chunks * CHUNK + piece * 16;
      u8* stage = ring + index % STAGES * STAGE + place;
#pragma unroll
      for (u32 i = 0; i < ROWS / 16; i++) copy_async_16(stage + i * 2048, source + (u64)i * 16 * row_bytes);
    };
    auto load_x = [&](u32 index) {
      const u8* source = x + (u64)row * row_bytes + (part.at + index) % part.chunks * CHUNK + piece * 16;
      u8* stage = ring + index % STAGES * STAGE + ROWS * CHUNK + place;
#pragma unroll
      for (u32 i = 0; i < N / 16; i++)
        if (row + i * 16 < m) copy_async_16(stage + i * 2048, source + (u64)i * 16 * row_bytes);
    };
    auto arrive = [&](u32 index) {
      show_shared_to_matrix_unit();
      barrier_arrive(&full[index % STAGES]);
    };
    // Weights never change: they may be read while the kernel that makes x still runs.
    const u32 ahead = min(count, (u32)STAGES);
    for (u32 i = 0; i < ahead; i++) load_w(i);
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (u32 i = 0; i < count; i++) {
      if (i >= STAGES) {
        barrier_wait(&empty[i % STAGES], (i / STAGES & 1) ^ 1);
        load_w(i);
      }
      load_x(i);
      copy_async_commit();
      copy_async_wait<LAG>();
      if (i >= LAG) arrive(i - LAG);
    }
    copy_async_wait<0>();
    for (u32 i = count > LAG ? count - LAG : 0; i < count; i++) arrive(i);
    return;
  }

  take_registers<TILES == 1 ? 200 : 232>();
  wait_for_previous_kernel();
  let_next_kernel_start();
  const u32 worker = threadIdx.x / GROUP_THREADS - 1, thread = threadIdx.x - GROUP_THREADS;
  const u32 warp = threadIdx.x % GROUP_THREADS / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  float c[TILES][N / 8][4];
  u32 index = 0;
  while (part.at < part.end) {
    const u32 tile = part.tile(), first = part.first(), last = part.last();
    for (u32 chunk = first; chunk < last; chunk++, index++) {
      barrier_wait(&full[index % STAGES], index / STAGES & 1);
      const u8* stage = ring + index % STAGES * STAGE;
      if (chunk == first) {
#pragma unroll
        for (u32 i = 0; i < TILES; i++) settle(c[i]);
      }
      matrix_unit_begin();
#pragma unroll
      for (u32 k = 0; k < CHUNK / 32; k++)
#pragma unroll
        for (u32 i = 0; i < TILES; i++)
          warpgroup_multiply_e4m3(c[i], matrix_descriptor(stage + (worker * TILES + i) * 64 * CHUNK + k * 32, 16, 1024),
                                  matrix_descriptor(stage + ROWS * CHUNK + k * 32, 16, 1024), chunk > first || k > 0);
      matrix_unit_commit();
      matrix_unit_wait_but_one();  // the chunk before has been multiplied
      if (lane == 0 && chunk > first) barrier_arrive(&empty[(index - 1) % STAGES]);
    }
    matrix_unit_wait();
    if (lane == 0) barrier_arrive(&empty[(index - 1) % STAGES]);
#pragma unroll
    for (u32 i = 0; i < TILES; i++) settle(c[i]);

    const u32 first_owner = part.owner(tile * part.chunks), parts = part.owner((tile + 1) * part.chunks - 1) - first_owner + 1;
    if (parts > 1) {
      // numbers of a thread lie a multiple of the threads apart: every access is coalesced
      auto sums_of = [&](u32 owner, u32 slot) { return partial + ((u64)owner * 2 + slot) * ROWS * N + thread * 4; };
      float* mine = sums_of(blockIdx.x, first == 0 ? 1 : 0);
#pragma unroll
      for (u32 i = 0; i < TILES; i++)
#pragma unroll
        for (u32 j = 0; j < N / 8; j++)
          store4(mine + (i * (N / 8) + j) * MULTIPLYING * GROUP_THREADS * 4, make_float4(c[i][j][0], c[i][j][1], c[i][j][2], c[i][j][3]));
      __threadfence();
      meet(READY, MULTIPLYING * GROUP_THREADS);
      if (thread == 0) {
        ticket = atomicAdd(&finished[tile], 1u);
        if (ticket == parts - 1) finished[tile] = 0;
      }
      meet(READY, MULTIPLYING * GROUP_THREADS);
      const bool is_last = ticket == parts - 1;
      part.at += last - first;
      meet(READY, MULTIPLYING * GROUP_THREADS);  // the ticket may be written again
      if (!is_last) continue;
      __threadfence();
      // in an order that never varies
#pragma unroll
      for (u32 i = 0; i < TILES; i++)
#pragma unroll
        for (u32 j = 0; j < N / 8; j++) c[i][j][0] = c[i][j][1] = c[i][j][2] = c[i][j][3] = 0.f;
      for (u32 p = 0; p < parts; p++) {
        const float* sums = sums_of(first_owner + p, p == 0 ? 1 : 0);
#pragma unroll
        for (u32 i = 0; i < TILES; i++)
#pragma unroll
          for (u32 j = 0; j < N / 8; j++) {
            const float4 v = load4(sums + (i * (N / 8) + j) * MULTIPLYING * GROUP_THREADS * 4);
            c[i][j][0] += v.x, c[i][j][1] += v.y, c[i][j][2] += v.z, c[i][j][3] += v.w;
          }
      }
    } else {
      part.at += last - first;
    }
    // Neighbouring rows of W are neighbouring numbers of y: lanes g and g ^ 1 exchange halves, so that each stores pairs.
#pragma unroll
    for (u32 i = 0; i < TILES; i++)
#pragma unroll
      for (u32 j = 0; j < N / 8; j++)
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
          const float even = c[i][j][half * 2], odd = c[i][j][half * 2 + 1];
          const float other = __shfl_xor_sync(0xffffffffu, g % 2 ? even : odd, 4);
          const u32 row = j * 8 + t * 2 + g % 2, column = tile * ROWS + (worker * TILES + i) * 64 + warp * 16 + half * 8 + g / 2 * 2;
          if (row < m) *reinterpret_cast<u32*>(y + (u64)row * n + column) = g % 2 ? pack_bf16(other, odd) : pack_bf16(even, other);
        }
  }
}

#define MANY(NAME, N, TILES)                                                                                             \
  KERNEL __launch_bounds__(384, 1) NAME(const u8* w, const u8* x, bf16* y, float* partial, u32* finished, u32 m, u32 n,  \
                                        u32 row_bytes) {                                                                 \
    linear_many_rows<N, TILES>(w, x, y, partial, finished, m, n, row_bytes);                                             \
  }
MANY(many_e4m3_32, 32, 1)
MANY(many_e4m3_64, 64, 1)
MANY(many_e4m3_96, 96, 2)
MANY(many_e4m3_128, 128, 2)
