// Splits the GEMM of q/k/v, rotates q and k, scales q by s(p), stores k and v in the cache.
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
  float2 parts[MAX_SPLITS];
#pragma unroll
  for (u32 s = 0; s < MAX_SPLITS; s++)
    parts[s] = s < product.splits ? *reinterpret_cast<const float2*>(product.data + s * product.split_stride + index) : make_float2(0.f, 0.f);
#pragma unroll
  for (u32 s = 1; s < MAX_SPLITS; s++) parts[0].x += parts[s].x, parts[0].y += parts[s].y;
  return parts[0];
}

// Launch: grid (rows, any), block (any): the threads of a row share its (query heads + 2 KV heads) * head_dim / 4 items; an
// item is dimensions 2i, 2i+1 of a head and their partners half a head further. Cache: [block][kv head] and a tile as cache_place says.
template <typename In, typename Kv>
__device__ __forceinline__ void rotate_and_store(Product<In> qkv, float q_scale, float k_scale, float v_scale, bf16* q, Kv* k_cache,
                                                 Kv* v_cache, const float2* angles, const float* query_scale, const u32* kv_place,
                                                 u32 query_heads, u32 kv_heads, u32 head_dim) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const u32 row = blockIdx.x, half = head_dim / 2, heads = query_heads + 2 * kv_heads, items = heads * head_dim / 4;
  const u32 place = kv_place[row];
  const float s = query_scale[row];
  for (u32 item = blockIdx.y * blockDim.x + threadIdx.x; item < items; item += gridDim.y * blockDim.x) {
    const u32 head = item / (head_dim / 4), i = item % (head_dim / 4) * 2;
    const u64 source = ((u64)row * heads + head) * head_dim + i;
    float2 a = pair_at(qkv, source), b = pair_at(qkv, source + half);
    const bool is_query = head < query_heads, is_key = !is_query && head < query_heads + kv_heads;
    const float weight_scale = is_query ? q_scale : is_key ? k_scale : v_scale;
    a.x *= weight_scale, a.y *= weight_scale, b.x *= weight_scale, b.y *= weight_scale;
    if (is_query || is_key) {
      const float4 t = *reinterpret_cast<const float4*>(angles + (u64)row * half + i);  // cos, sin of i; cos, sin of i + 1
      const float2 first = make_float2(a.x * t.x - b.x * t.y, a.y * t.z - b.y * t.w);
      const float2 second = make_float2(b.x * t.x + a.x * t.y, b.y * t.z + a.y * t.w);
      a = first, b = second;
    }
    if (is_query) {
      bf16* target = q + ((u64)row * query_heads + head) * head_dim + i;
      store2(target, a.x * s, a.y * s);
      store2(target + half, b.x * s, b.y * s);
    } else {
      const u32 kv_head = head - query_heads - (is_key ? 0 : kv_heads);
      Kv* tile = (is_key ? k_cache : v_cache) + ((u64)(place / KV_BLOCK) * kv_heads + kv_head) * KV_BLOCK * head_dim;
      auto target = [&](u32 dimension) {
        const u32 byte = dimension * sizeof(Kv);
        return tile + (cache_place(head_dim * sizeof(Kv), place % KV_BLOCK, byte / 16) + byte % 16) / sizeof(Kv);
      };
      store2(target(i), a.x, a.y);
      store2(target(i + half), b.x, b.y);
    }
  }
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
