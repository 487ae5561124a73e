// residual += partial; y = rms(residual) * gain, in the form that the next linear reads.
#include "device.cuh"

// y = values / rms * gain; `squares` is this thread's part of the sum of the values' squares.
template <typename Out>
__device__ __forceinline__ void store_normed(const float* values, float squares, const bf16* gain, Out* y, float y_scale, u32 hidden,
                                             float epsilon) {
  __shared__ float scratch[33];
  const float mean = block_sum(squares, scratch) / (float)hidden;
  const float inverse = 1.f / sqrtf(mean + epsilon);
  for (u32 i = threadIdx.x * 4; i < hidden; i += blockDim.x * 4) {
    const float4 v = load4(values + i), g = load4(gain + i);
    store_activation4(y + i, make_float4(v.x * inverse * g.x, v.y * inverse * g.y, v.z * inverse * g.z, v.w * inverse * g.w), y_scale);
  }
}

// Launch: grid (rows), block (multiple of 32, <= 1024), dynamic shared memory hidden * 4 bytes; hidden % 4 == 0.
// partial_scale multiplies the sum of the partial's splits; `rows`, where given, picks rows of the residual (then the
// residual itself is not written: only the head does so, and nothing reads the residual after it).
template <typename In, typename Out, bool HAS_PARTIAL>
__device__ __forceinline__ void add_norm(float* residual, Product<In> partial, float partial_scale, const bf16* gain, Out* y,
                                         float y_scale, const u32* rows, u32 hidden, float epsilon) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  DYNAMIC_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);
  const u64 source = (u64)(rows ? rows[blockIdx.x] : blockIdx.x) * hidden, target = (u64)blockIdx.x * hidden;
  float squares = 0.f;
  for (u32 i = threadIdx.x * 4; i < hidden; i += blockDim.x * 4) {
    float4 v = load4(residual + source + i);
    if (HAS_PARTIAL) {
      const float4 p = partial.at4(source + i);
      v.x += p.x * partial_scale, v.y += p.y * partial_scale, v.z += p.z * partial_scale, v.w += p.w * partial_scale;
      if (!rows) store4(residual + source + i, v);
    }
    store4(values + i, v);
    squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  store_normed(values, squares, gain, y + target, y_scale, hidden, epsilon);
}

#define NORM(NAME, IN, OUT, HAS_PARTIAL)                                                                                        \
  KERNEL NAME(float* residual, const IN* partial, u32 splits, u64 split_stride, float partial_scale, const bf16* gain, OUT* y, \
              float y_scale, const u32* rows, u32 hidden, float epsilon) {                                                     \
    add_norm<IN, OUT, HAS_PARTIAL>(residual, Product<IN>{partial, splits, split_stride}, partial_scale, gain, y, y_scale,      \
                                   rows, hidden, epsilon);                                                                     \
  }
NORM(norm_to_bf16, bf16, bf16, false)
NORM(norm_to_e4m3, bf16, e4m3, false)
NORM(add_bf16_norm_to_bf16, bf16, bf16, true)
NORM(add_bf16_norm_to_e4m3, bf16, e4m3, true)
NORM(add_f32_norm_to_bf16, float, bf16, true)
NORM(add_f32_norm_to_e4m3, float, e4m3, true)

// What a rank's kernels know of the memory that the ranks of a host share: `inboxes` lists every rank's. An inbox is
// flags [ranks][PEER_ROWS], then rows [2][ranks][PEER_ROWS][hidden] of f32. `state` is host memory: [0] is set by the
// host to end all waiting, [1] by a kernel that waited too long.
constexpr u32 PEER_ROWS = 64;
struct Peers {
  const u64* inboxes;
  u32* turns;
  volatile u32* state;
  u32 rank, ranks;
  __device__ u32* flag(u32 of, u32 from, u32 row) const { return (u32*)inboxes[of] + from * PEER_ROWS + row; }
  __device__ float* row(u32 of, u32 turn, u32 from, u32 row, u32 hidden) const {
    float* rows = (float*)(inboxes[of] + (u64)ranks * PEER_ROWS * 4);
    return rows + (((u64)(turn & 1) * ranks + from) * PEER_ROWS + row) * hidden;
  }
};

// As add_norm, of a partial that is summed over the ranks of a host first. Each block pushes its row of this rank's
// partial into the inboxes of the others, reports them, and waits until theirs are here; sums are made in the order of the
// ranks, so that all ranks have the same bits. A row's place alternates with its turn: a rank that pushes turn t + 2 has
// seen the others come to turn t + 1, and who came there has read what turn t brought.
// Launch as add_norm; rows <= PEER_ROWS, ranks <= 32 and <= block.
template <typename In, typename Out>
__device__ __forceinline__ void peer_add_norm(float* residual, Product<In> partial, float partial_scale, const bf16* gain, Out* y,
                                              float y_scale, const u32* rows, u32 hidden, float epsilon, Peers peers) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  DYNAMIC_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);
  const u32 row = blockIdx.x, turn = peers.turns[row] + 1;
  const u64 source = (u64)(rows ? rows[row] : row) * hidden, target = (u64)row * hidden;
  for (u32 i = threadIdx.x * 4; i < hidden; i += blockDim.x * 4) {
    float4 p = partial.at4(source + i);
    p = make_float4(p.x * partial_scale, p.y * partial_scale, p.z * partial_scale, p.w * partial_scale);
    store4(values + i, p);
    for (u32 other = 0; other < peers.ranks; other++) {
      if (other != peers.rank) store4(peers.row(other, turn, peers.rank, row, hidden) + i, p);
    }
  }
  __syncthreads();
  if (threadIdx.x < peers.ranks && threadIdx.x != peers.rank) {
    tell_peer(peers.flag(threadIdx.x, peers.rank, row), turn);
    wait_for_peer(peers.flag(peers.rank, threadIdx.x, row), turn, peers.state);
  }
  if (threadIdx.x == 0) peers.turns[row] = turn;
  __syncthreads();
  float squares = 0.f;
  for (u32 i = threadIdx.x * 4; i < hidden; i += blockDim.x * 4) {
    const float4 own = load4(values + i);
    float4 v = load4(residual + source + i);
    for (u32 from = 0; from < peers.ranks; from++) {
      const float4 p = from == peers.rank ? own : load4_uncached(peers.row(peers.rank, turn, from, row, hidden) + i);
      v.x += p.x, v.y += p.y, v.z += p.z, v.w += p.w;
    }
    if (!rows) store4(residual + source + i, v);
    store4(values + i, v);
    squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  store_normed(values, squares, gain, y + target, y_scale, hidden, epsilon);
}

#define PEER_NORM(NAME, IN, OUT)                                                                                                \
  KERNEL NAME(float* residual, const IN* partial, u32 splits, u64 split_stride, float partial_scale, const bf16* gain, OUT* y,  \
              float y_scale, const u32* rows, u32 hidden, float epsilon, const u64* inboxes, u32* turns, u32* state, u32 rank,  \
              u32 ranks) {                                                                                                      \
    peer_add_norm<IN, OUT>(residual, Product<IN>{partial, splits, split_stride}, partial_scale, gain, y, y_scale, rows, hidden, \
                           epsilon, Peers{inboxes, turns, state, rank, ranks});                                                 \
  }
PEER_NORM(peer_add_bf16_norm_to_bf16, bf16, bf16)
PEER_NORM(peer_add_bf16_norm_to_e4m3, bf16, e4m3)
PEER_NORM(peer_add_f32_norm_to_bf16, float, bf16)
PEER_NORM(peer_add_f32_norm_to_e4m3, float, e4m3)

// The parts of a GEMM, [splits][rows * columns], added up in place of the first. grid (quads / 256), block (256).
KERNEL add_splits(float* product, u32 splits, u64 split_stride, u32 quads) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const u32 quad = blockIdx.x * blockDim.x + threadIdx.x;
  if (quad < quads) store4(product + (u64)quad * 4, Product<float>{product, splits, split_stride}.at4((u64)quad * 4));
}

// logits[row][rank * per_rank + i] = gathered[rank][row][i]. A rank's rows are as long as its part of the vocabulary,
// its part of `gathered` is rows * per_rank. grid (vocabulary / 1024, rows), block (256).
KERNEL spread_vocabulary(float* logits, const float* gathered, u32 rows, u32 per_rank, u32 vocabulary) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const u32 row = blockIdx.y;
  for (u32 i = blockIdx.x * 1024 + threadIdx.x; i < min(vocabulary, (blockIdx.x + 1) * 1024); i += blockDim.x) {
    const u32 rank = i / per_rank, own = min(per_rank, vocabulary - rank * per_rank);
    logits[(u64)row * vocabulary + i] = gathered[(u64)rank * rows * per_rank + (u64)row * own + i % per_rank];
  }
}
