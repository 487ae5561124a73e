// Dummy weights, and the ceilings that kernels are measured against.
#include "device.cuh"

// The number at a row and column of the slice, by the recipe of RandomFill in worker/src/weights/slice.rs.
__device__ __forceinline__ float random_number(u64 key, u64 index, float deviation) {
  u64 z = key + index + 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  const u32 sum = (u32)(z & 0xffff) + (u32)(z >> 16 & 0xffff) + (u32)(z >> 32 & 0xffff) + (u32)(z >> 48);
  return __fmul_rn((float)sum - 131070.f, __fdiv_rn(deviation, 37837.23f));
}
// p [rows][columns] of a tensor with `tensor_columns` columns, from `first_row`, `first_column` on.
// Launch: grid (any, rows), block (256); columns % 2 == 0.
KERNEL random_e4m3(u8* p, u32 columns, u64 key, u64 tensor_columns, u64 first_row, u64 first_column, float deviation, u32 row_base) {
  const u64 row = row_base + blockIdx.y;
  for (u32 i = (blockIdx.x * blockDim.x + threadIdx.x) * 2; i < columns; i += gridDim.x * blockDim.x * 2) {
    const u64 index = (first_row + row) * tensor_columns + first_column + i;
    *reinterpret_cast<u16*>(p + row * columns + i) = pack_e4m3(random_number(key, index, deviation), random_number(key, index + 1, deviation));
  }
}
KERNEL random_bf16(bf16* p, u32 columns, u64 key, u64 tensor_columns, u64 first_row, u64 first_column, float deviation, u32 row_base) {
  const u64 row = row_base + blockIdx.y;
  for (u32 i = (blockIdx.x * blockDim.x + threadIdx.x) * 2; i < columns; i += gridDim.x * blockDim.x * 2) {
    const u64 index = (first_row + row) * tensor_columns + first_column + i;
    *reinterpret_cast<u32*>(p + row * columns + i) = pack_bf16(random_number(key, index, deviation), random_number(key, index + 1, deviation));
  }
}
// Reads `count` chunks of 16 bytes, eight in flight a thread: the ceiling of everything that streams weights.
KERNEL __launch_bounds__(512) read_ceiling(const uint4* p, u64 count, u32* out) {
  u32 sum = 0;
  const u64 step = (u64)gridDim.x * blockDim.x * 8;
  for (u64 base = (u64)blockIdx.x * blockDim.x * 8 + threadIdx.x; base < count; base += step) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const u64 i = base + (u64)j * blockDim.x;
      v[j] = i < count ? p[i] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (sum == 0x12345678u) *out = sum;  // keeps the loads alive
}
