// What a step needs once before the first layer: embeddings of its token IDs, and for every row its rotary angles, its query
// scale and its place in the KV cache.
#include "device.cuh"

constexpr u32 SAMPLED = 0xffffffffu;

// residual[row] = table[id[row] - first_id], zeros where this rank does not hold the id; an id SAMPLED stands for the
// one sampled last in the row's slot.
// grid (rows), block (256); hidden % 4 == 0.
KERNEL embed(float* residual, const bf16* table, const u32* ids, const u32* row_slot, const u32* last_sampled, u32 first_id,
             u32 id_count, u32 hidden) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const u32 row = blockIdx.x;
  u32 id = ids[row];
  if (id == SAMPLED) id = last_sampled[row_slot[row]];
  const u32 local = id - first_id;  // wraps to something large below first_id
  for (u32 i = threadIdx.x * 4; i < hidden; i += blockDim.x * 4) {
    const float4 v = local < id_count ? load4(table + (u64)local * hidden + i) : make_float4(0.f, 0.f, 0.f, 0.f);
    store4(residual + (u64)row * hidden + i, v);
  }
}

// angles[row][i] = A (cos, sin)(position * frequency[i]); query_scale[row] = s(position) = 1 + beta ln(1 + floor(p / L0));
// kv_place[row] = block * 64 + offset. The angle is rounded to f32 as in the reference, its cosine and sine are taken
// in double: an f32 range reduction is off by 1e-3 at position 262,143.
// grid (rows), block (64); half_dim <= any.
KERNEL prepare_rows(float2* angles, float* query_scale, u32* kv_place, const u32* positions, const u32* row_sequence,
                    const u32* tables, const u32* table_start, const float* frequencies, u32 half_dim, float attention_factor,
                    float beta, u32 original_length) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const u32 row = blockIdx.x, position = positions[row];
  for (u32 i = threadIdx.x; i < half_dim; i += blockDim.x) {
    const double angle = (double)__fmul_rn((float)position, frequencies[i]);
    angles[(u64)row * half_dim + i] = make_float2(attention_factor * (float)cos(angle), attention_factor * (float)sin(angle));
  }
  if (threadIdx.x == 0) {
    query_scale[row] = 1.f + beta * (float)log(1.0 + (double)(position / original_length));
    const u32 block = tables[table_start[row_sequence[row]] + position / KV_BLOCK];
    kv_place[row] = block * KV_BLOCK + position % KV_BLOCK;
  }
}
