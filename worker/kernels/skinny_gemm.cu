// FP8 GEMMs for up to 128 rows: y = x W^T with W streamed once, near the bandwidth of device memory, on Hopper's
// warpgroup matrix instructions: W's rows are the rows of the instruction, x's its columns.
//
// One thread brings boxes of W and x through a ring of stages (bulk tensor copies, which also swizzle them), two warpgroups
// multiply. Two kinds:
// - plain: the work (all tiles of W, all of K) is cut into as many equal parts as there are blocks. A part may begin inside a
//   tile; then its block leaves the sums of that tile to the block that began it, which adds them up in their order.
// - gated: W is gate above up, y = silu(gate) * up in the form that the next GEMM reads. Whole tiles; groups of eight rows of
//   gate and of up take turns within a tile, so that each thread holds both numbers that belong together.
#include "device.cuh"

constexpr u32 GROUP_THREADS = 128, GROUPS = 2, BOX = 128;  // bytes of K in a box
constexpr u32 RING_BYTES = 222 << 10;
constexpr u32 MEET = 1;  // first of the warpgroups' barriers

// x has up to N rows. Each warpgroup multiplies TILES x 64 rows of W; a stage holds BOXES boxes of W, then as many of x.
template <u32 N, u32 TILES, u32 BOXES>
struct Ring {
  static constexpr u32 ROWS = GROUPS * TILES * 64, W_BYTES = ROWS * BOX, X_BYTES = N * BOX, STAGE = BOXES * (W_BYTES + X_BYTES);
  static constexpr u32 STAGES = RING_BYTES / STAGE < 12 ? RING_BYTES / STAGE : 12;

  u8* stages;
  u64 *full, *empty;
  __device__ __forceinline__ u8* w(u32 index, u32 box) const { return stages + index % STAGES * STAGE + box * W_BYTES; }
  __device__ __forceinline__ u8* x(u32 index, u32 box) const { return stages + index % STAGES * STAGE + BOXES * W_BYTES + box * X_BYTES; }

  // One thread: brings the steps [begin, end) of all tiles' steps, each tile being `steps` long.
  template <bool GATED>
  __device__ __forceinline__ void bring(const TensorMap& w_map, const TensorMap& x_map, u32 begin, u32 end, u32 steps) const {
    const u32 count = end - begin, ahead = min(count, STAGES);
    auto bring_w = [&](u32 index) {
      const u32 tile = (begin + index) / steps, step = (begin + index) % steps;
      u64* barrier = &full[index % STAGES];
      barrier_arrive_expecting(barrier, STAGE);
#pragma unroll
      for (u32 box = 0; box < BOXES; box++) {
        const u32 column = (step * BOXES + box) * BOX;
        if (GATED) {
          copy_box_of_pairs(w(index, box), w_map, column, tile * (ROWS / 16), barrier);
        } else {
          copy_box<true>(w(index, box), w_map, column, tile * ROWS, barrier);
        }
      }
    };
    auto bring_x = [&](u32 index) {
#pragma unroll
      for (u32 box = 0; box < BOXES; box++)
        copy_box<false>(x(index, box), x_map, ((begin + index) % steps * BOXES + box) * BOX, 0, &full[index % STAGES]);
    };
    // Weights never change: they may be read while the kernel that makes x still runs.
    for (u32 i = 0; i < ahead; i++) bring_w(i);
    wait_for_previous_kernel();
    for (u32 i = 0; i < ahead; i++) bring_x(i);
    for (u32 i = ahead; i < count; i++) {
      barrier_wait(&empty[i % STAGES], (i / STAGES & 1) ^ 1);
      bring_w(i);
      bring_x(i);
    }
  }

  // A warpgroup: multiplies the steps [index, index + count) into its rows of the tile.
  __device__ __forceinline__ void multiply(float (&c)[TILES][N / 8][4], u32 group, u32 index, u32 count) const {
    const bool speaks = threadIdx.x % WARP == 0;
    for (u32 i = index; i < index + count; i++) {
      barrier_wait(&full[i % STAGES], i / STAGES & 1);
#pragma unroll
      for (u32 tile = 0; tile < TILES; tile++) settle(c[tile]);
      matrix_unit_begin();
#pragma unroll
      for (u32 box = 0; box < BOXES; box++)
#pragma unroll
        for (u32 k = 0; k < BOX / 32; k++)
#pragma unroll
          for (u32 tile = 0; tile < TILES; tile++)
            warpgroup_multiply_e4m3<N>(c[tile], matrix_descriptor(w(i, box) + (group * TILES + tile) * 64 * BOX + k * 32, 16, 1024),
                                       matrix_descriptor(x(i, box) + k * 32, 16, 1024), i > index || box > 0 || k > 0);
      matrix_unit_commit();
      matrix_unit_wait_but_one();  // the step before has been multiplied
      if (speaks && i > index) barrier_arrive(&empty[(i - 1) % STAGES]);
    }
    matrix_unit_wait();
#pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) settle(c[tile]);
    if (speaks) barrier_arrive(&empty[(index + count - 1) % STAGES]);
  }
};

template <typename R>
__device__ __forceinline__ R start_ring(u8* stages, u64* full, u64* empty) {
  if (threadIdx.x == 0) {
    for (u32 s = 0; s < R::STAGES; s++) barrier_init(&full[s], 1), barrier_init(&empty[s], GROUPS * 4);
    share_barriers();
  }
  __syncthreads();
  return R{align_shared_1024(stages), full, empty};
}

// y[m][n] (bf16, without any scale); maps of W [n][row_bytes] in boxes of 128 TILES rows and of x [>= N][row_bytes] in boxes of N rows,
// both e4m3, 128 bytes wide; n % (128 TILES) == 0, row_bytes % (128 BOXES) == 0, m <= N. partial [grid][128 TILES * N];
// finished [n / (64 TILES)], zero before and after.
// Launch: grid (at most the multiprocessors, as blocks wait for each other, and at most all tiles' steps), block (288), dynamic shared memory 1024 + STAGES * STAGE.
template <u32 N, u32 TILES, u32 BOXES>
__device__ __forceinline__ void skinny_gemm(const TensorMap& w, const TensorMap& x, bf16* y, float* partial, u32* finished, u32 m, u32 n,
                                            u32 row_bytes) {
  using R = Ring<N, TILES, BOXES>;
  DYNAMIC_SHARED(shared);
  __shared__ u64 full[R::STAGES], empty[R::STAGES];
  const R ring = start_ring<R>(shared, full, empty);
  let_next_kernel_start();
  const u32 steps = row_bytes / (BOXES * BOX), total = n / R::ROWS * steps;
  auto begin_of = [&](u32 part) { return (u32)((u64)total * part / gridDim.x); };
  auto block_of = [&](u32 step) { return (u32)(((u64)(step + 1) * gridDim.x - 1) / total); };
  // turned around: who waits for the sums of others comes after them
  const u32 block = gridDim.x - 1 - blockIdx.x, begin = begin_of(block), end = begin_of(block + 1);
  if (threadIdx.x >= GROUPS * GROUP_THREADS) {
    if (threadIdx.x == GROUPS * GROUP_THREADS) ring.template bring<false>(w, x, begin, end, steps);
    return;
  }
  const u32 group = threadIdx.x / GROUP_THREADS, thread = threadIdx.x % GROUP_THREADS;
  const u32 warp = thread / WARP, lane = thread % WARP, g = lane / 4, t = lane % 4;
  // numbers of a thread lie a multiple of the threads apart: every access is coalesced
  auto sums_of = [&](u32 of) { return partial + ((u64)of * GROUPS + group) * TILES * 64 * N + thread * 4; };
  float c[TILES][N / 8][4];
  for (u32 at = begin; at < end;) {
    const u32 tile = at / steps, first = at % steps, last = min(steps, first + end - at);
    ring.multiply(c, group, at - begin, last - first);
    at += last - first;
    u32* arrived = &finished[tile * GROUPS + group];
    if (first > 0) {
      float* mine = sums_of(block);
#pragma unroll
      for (u32 i = 0; i < TILES; i++)
#pragma unroll
        for (u32 j = 0; j < N / 8; j++)
          store4(mine + (i * (N / 8) + j) * GROUP_THREADS * 4, make_float4(c[i][j][0], c[i][j][1], c[i][j][2], c[i][j][3]));
      __threadfence();
      meet(MEET + group, GROUP_THREADS);
      if (thread == 0) atomicAdd(arrived, 1u);
      continue;
    }
    if (last < steps) {
      const u32 others = block_of((tile + 1) * steps - 1) - block;
      if (thread == 0) {
        wait_for_count(arrived, others);
        *arrived = 0;
      }
      meet(MEET + group, GROUP_THREADS);
      for (u32 other = 1; other <= others; other++) {
        const float* sums = sums_of(block + other);
#pragma unroll
        for (u32 i = 0; i < TILES; i++)
#pragma unroll
          for (u32 j = 0; j < N / 8; j++) {
            const float4 v = load4_uncached(sums + (i * (N / 8) + j) * GROUP_THREADS * 4);
            c[i][j][0] += v.x, c[i][j][1] += v.y, c[i][j][2] += v.z, c[i][j][3] += v.w;
          }
      }
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
          const u32 row = j * 8 + t * 2 + g % 2, column = tile * R::ROWS + (group * TILES + i) * 64 + warp * 16 + half * 8 + g / 2 * 2;
          if (row < m) *reinterpret_cast<u32*>(y + (u64)row * n + column) = g % 2 ? pack_bf16(other, odd) : pack_bf16(even, other);
        }
  }
}

// y[m][width] (e4m3, divided by y_scale) of W [gate | up][width][row_bytes]; its map has the dimensions [width / 8][gate | up][8][row_bytes]
// and boxes of [8 TILES][2][8][128]; x, m and row_bytes as above; width % (64 TILES) == 0.
// Launch: as above, but any grid.
template <u32 N, u32 TILES, u32 BOXES>
__device__ __forceinline__ void linear_gated(const TensorMap& w, const TensorMap& x, e4m3* y, u32 m, u32 width, u32 row_bytes, float gate_scale,
                                             float up_scale, float y_scale) {
  using R = Ring<N, TILES, BOXES>;
  DYNAMIC_SHARED(shared);
  __shared__ u64 full[R::STAGES], empty[R::STAGES];
  const R ring = start_ring<R>(shared, full, empty);
  let_next_kernel_start();
  const u32 steps = row_bytes / (BOXES * BOX), tiles = width / (R::ROWS / 2);
  const u32 first = (u32)((u64)tiles * blockIdx.x / gridDim.x), last = (u32)((u64)tiles * (blockIdx.x + 1) / gridDim.x);
  if (threadIdx.x >= GROUPS * GROUP_THREADS) {
    if (threadIdx.x == GROUPS * GROUP_THREADS) ring.template bring<true>(w, x, first * steps, last * steps, steps);
    return;
  }
  const u32 group = threadIdx.x / GROUP_THREADS, warp = threadIdx.x % GROUP_THREADS / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  float c[TILES][N / 8][4];
  for (u32 tile = first; tile < last; tile++) {
    ring.multiply(c, group, (tile - first) * steps, steps);
#pragma unroll
    for (u32 i = 0; i < TILES; i++)
#pragma unroll
      for (u32 j = 0; j < N / 8; j++) {
        float v[2];
#pragma unroll
        for (u32 e = 0; e < 2; e++) v[e] = __fdiv_rn(silu(c[i][j][e] * gate_scale) * (c[i][j][2 + e] * up_scale), y_scale);
        const float other = __shfl_xor_sync(0xffffffffu, g % 2 ? v[0] : v[1], 4);
        const u32 row = j * 8 + t * 2 + g % 2, column = tile * (R::ROWS / 2) + (group * TILES + i) * 32 + warp * 8 + g / 2 * 2;
        if (row < m) *reinterpret_cast<u16*>(y + (u64)row * width + column) = g % 2 ? pack_e4m3(other, v[1]) : pack_e4m3(v[0], other);
      }
  }
}

#define WIDE(N, TILES, BOXES)                                                                                                    \
  KERNEL __launch_bounds__(288, 1)                                                                                               \
      skinny_gemm_##N(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, bf16* y, float* partial,         \
                      u32* finished, u32 m, u32 n, u32 row_bytes) {                                                              \
    skinny_gemm<N, TILES, BOXES>(w, x, y, partial, finished, m, n, row_bytes);                                                   \
  }
#define GATED(N, TILES, BOXES)                                                                                                   \
  KERNEL __launch_bounds__(288, 1)                                                                                               \
      linear_gated_##N(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, e4m3* y, u32 m, u32 width,      \
                       u32 row_bytes, float gate_scale, float up_scale, float y_scale) {                                         \
    linear_gated<N, TILES, BOXES>(w, x, y, m, width, row_bytes, gate_scale, up_scale, y_scale);                                  \
  }
WIDE(32, 1, 2)
WIDE(48, 1, 2)
WIDE(64, 1, 2)
WIDE(96, 1, 1)
WIDE(128, 1, 1)
GATED(8, 1, 1)
GATED(16, 1, 1)
GATED(32, 1, 2)
GATED(48, 1, 2)
GATED(64, 1, 2)
GATED(96, 1, 1)
GATED(128, 1, 1)
