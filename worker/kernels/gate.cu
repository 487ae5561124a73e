// SwiGLU: y = silu(gate) * up, in the form that the next linear reads.
#include "device.cuh"

// Input [rows][gate | up], each half `width` wide with its own scale; output [rows][width].
// Launch: grid (ceil(width / 4 / block), rows), block (any); width % 4 == 0.
template <typename In, typename Out>
__device__ __forceinline__ void swiglu(Product<In> gate_up, float gate_scale, float up_scale, Out* y, float y_scale, u32 width) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const u32 i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (i >= width) return;
  const u64 row = blockIdx.y;
  const float4 g = gate_up.at4(row * 2 * width + i), u = gate_up.at4(row * 2 * width + width + i);
  const float4 v = make_float4(silu(g.x * gate_scale) * (u.x * up_scale), silu(g.y * gate_scale) * (u.y * up_scale),
                               silu(g.z * gate_scale) * (u.z * up_scale), silu(g.w * gate_scale) * (u.w * up_scale));
  store_activation4(y + row * width + i, v, y_scale);
}

#define GATE(NAME, IN, OUT)                                                                                             \
  KERNEL NAME(const IN* gate_up, u32 splits, u64 split_stride, float gate_scale, float up_scale, OUT* y, float y_scale, \
              u32 width) {                                                                                              \
    swiglu<IN, OUT>(Product<IN>{gate_up, splits, split_stride}, gate_scale, up_scale, y, y_scale, width);               \
  }
GATE(gate_bf16_to_bf16, bf16, bf16)
GATE(gate_bf16_to_e4m3, bf16, e4m3)
GATE(gate_f32_to_bf16, float, bf16)
GATE(gate_f32_to_e4m3, float, e4m3)
