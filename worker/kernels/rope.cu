// Splits the product of q/k/v, rotates q and k, scales q by s(p), stores k and v in the cache.
#include "device.cuh"

__device__ __forceinline__ void store2(bf16* p, float a, float b) { *reinterpret_cast<u32*>(p) = pack_bf16(a, b); }
__device__ __forceinline__ void store2(e4m3* p, float a, float b) { *reinterpret_cast<u16*>(p) = pack_e4m3(a, b); }

template <typename In>
__device__ __forceinline__ float2 pair_at(const Product<In>& product, u64 index);
template <>
__device__ __forceinline__ float2 pair_at<bf16>(const Product<bf16>& product, u64 index) {
  const u32 pair = *reinterpret_cast<const u32*>(product.data + index);
  return make_float2(low_bf16(pair), high_bf16(pair));
}
template <>
__device__ __forceinline__ float2 pair_at<float>(const Product<float>& product, u64 index) {
  float2 sum = make_float2(0.f, 0.f);
  for (u32 s = 0; s < product.splits; s++) {
    const float2 v = *reinterpret_cast<const float2*>(product.data + s * product.split_stride + index);
    sum.x += v.x, sum.y += v.y;
  }
  return sum;
}

// Launch: grid (rows, query heads + 2 KV heads), block (head_dim / 4): a thread has dimensions 2i, 2i+1 and their
// partners half a head further. Cache layout: [block][kv head][64][head_dim].
template <typename In, typename Kv>
__device__ __forceinline__ void rotate_and_store(Product<In> qkv, float q_scale, float k_scale, float v_scale, bf16* q, Kv* k_cache,
                                                 Kv* v_cache, const float2* angles, const float* query_scale, const u32* kv_place,
                                                 u32 query_heads, u32 kv_heads, u32 head_dim) {
  wait_for_previous_kernel();
  const u32 row = blockIdx.x, head = blockIdx.y, half = head_dim / 2, i = threadIdx.x * 2;
  const u64 source = ((u64)row * (query_heads + 2 * kv_heads) + head) * head_dim + i;
  float2 a = pair_at(qkv, source), b = pair_at(qkv, source + half);
  const float weight_scale = head < query_heads ? q_scale : head < query_heads + kv_heads ? k_scale : v_scale;
  a.x *= weight_scale, a.y *= weight_scale, b.x *= weight_scale, b.y *= weight_scale;
  if (head < query_heads + kv_heads) {
    const float4 t = *reinterpret_cast<const float4*>(angles + (u64)row * half + i);  // cos, sin of i; cos, sin of i + 1
    const float2 first = make_float2(a.x * t.x - b.x * t.y, a.y * t.z - b.y * t.w);
    const float2 second = make_float2(b.x * t.x + a.x * t.y, b.y * t.z + a.y * t.w);
    a = first, b = second;
  }
  if (head < query_heads) {
    const float s = query_scale[row];
    bf16* target = q + ((u64)row * query_heads + head) * head_dim + i;
    store2(target, a.x * s, a.y * s);
    store2(target + half, b.x * s, b.y * s);
    return;
  }
  const bool is_key = head < query_heads + kv_heads;
  const u32 kv_head = head - query_heads - (is_key ? 0 : kv_heads), place = kv_place[row];
  Kv* target = (is_key ? k_cache : v_cache) +
               (((u64)(place / KV_BLOCK) * kv_heads + kv_head) * KV_BLOCK + place % KV_BLOCK) * head_dim + i;
  store2(target, a.x, a.y);
  store2(target + half, b.x, b.y);
}

#define ROPE(NAME, IN, KV)                                                                                                     \
  KERNEL NAME(const IN* qkv, u32 splits, u64 split_stride, float q_scale, float k_scale, float v_scale, bf16* q, KV* k_cache, \
              KV* v_cache, const float2* angles, const float* query_scale, const u32* kv_place, u32 query_heads, u32 kv_heads, \
              u32 head_dim) {                                                                                                 \
    rotate_and_store<IN, KV>(Product<IN>{qkv, splits, split_stride}, q_scale, k_scale, v_scale, q, k_cache, v_cache, angles,  \
                             query_scale, kv_place, query_heads, kv_heads, head_dim);                                         \
  }
ROPE(rope_bf16_kv_bf16, bf16, bf16)
ROPE(rope_bf16_kv_e4m3, bf16, e4m3)
ROPE(rope_f32_kv_bf16, float, bf16)
ROPE(rope_f32_kv_e4m3, float, e4m3)
