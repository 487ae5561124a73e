// residual += partial; y = rms(residual) * gain, in the form that the next linear reads.
#include "device.cuh"

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
  __shared__ float scratch[33];
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
  const float mean = block_sum(squares, scratch) / (float)hidden;
  const float inverse = 1.f / sqrtf(mean + epsilon);
  for (u32 i = threadIdx.x * 4; i < hidden; i += blockDim.x * 4) {
    const float4 v = load4(values + i), g = load4(gain + i);
    store_activation4(y + target + i, make_float4(v.x * inverse * g.x, v.y * inverse * g.y, v.z * inverse * g.z, v.w * inverse * g.w),
                      y_scale);
  }
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

// The parts of a product, [splits][rows * columns], added up in place of the first. grid (quads / 256), block (256).
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
