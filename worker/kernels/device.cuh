// What every kernel file shares: number formats, vector accesses, warp and block reductions, tensor-core and copy
// instructions. Nothing here knows of the model.
//
// The same kernel sources are compiled by nvcc for the device and, with BORA_EMULATED, by a C++ compiler against
// emulator/cuda.h, which runs them on the CPU thread by thread. Inline PTX therefore stands here alone, beside the
// emulator's version of it.
#pragma once

#ifdef BORA_EMULATED
#include "emulator/cuda.h"
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct bf16 {
  u16 bits;
};
struct e4m3 {
  u8 bits;
};
// Describes a matrix in global memory and the boxes that are copied out of it; made by the driver.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

constexpr u32 WARP = 32;
// Tokens in one block of the KV cache.
constexpr u32 KV_BLOCK = 64;
constexpr float LOG2E = 1.4426950408889634f;
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

#ifndef BORA_EMULATED

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define KERNEL extern "C" __global__ void

// ---- numbers ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ bf16 to_bf16(float x) {
  bf16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
  return r;
}
// Two bf16 in one register, `low` in the lower half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// Two e4m3 with saturation at 448, round to nearest even, `low` in the lower byte.
__device__ __forceinline__ u16 pack_e4m3(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
// Two e4m3 (lower 16 bits of `packed`) as two bf16; exact, every e4m3 is a bf16.
__device__ __forceinline__ float2 unpack_e4m3(u16 packed) {
  u32 halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(packed));
  float2 r;
  asm("{.reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;}"
      : "=f"(r.x), "=f"(r.y)
      : "r"(halves));
  return r;
}

// ---- programmatic dependent launch: both do nothing where the launch did not ask for it --------------------------

__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- what ranks of a host say to each other through each other's memory -------------------------------------------

// Nanoseconds after which a rank that does not come is given up.
constexpr u64 PEER_TIMEOUT = 20000000000ull;

// Whoever sees `turn` there also sees what this block wrote before its last barrier.
__device__ __forceinline__ void tell_peer(u32* flag, u32 turn) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(turn) : "memory");
}
__device__ __forceinline__ void wait_for_peer(const u32* flag, u32 turn, volatile u32* state) {
  u64 since = 0;
  for (u32 spins = 1;; spins++) {
    u32 seen;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
    if ((int)(seen - turn) >= 0) return;
    if (spins % 4096) continue;
    // host memory: far away
    if (state[0] | state[1]) return;
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (!since) since = now;
    if (now - since > PEER_TIMEOUT) state[1] = 1;
  }
}
// Past the L1 cache, which does not know what other devices write.
__device__ __forceinline__ float4 load4_uncached(const float* p) { return __ldcg(reinterpret_cast<const float4*>(p)); }

// ---- copies from global to shared memory ------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `PENDING` of this thread's groups are outstanding.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- copies of whole tiles, and barriers that count bytes -------------------------------------------------------------

// `count` arrivals complete a phase (with all bytes that were announced). Then `share_barriers` and a __syncthreads.
__device__ __forceinline__ void barrier_init(u64* barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void share_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void barrier_arrive_expecting(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Until the phase of this parity (0, 1, 0, ...) is complete.
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
  asm volatile("{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra ready;\nbra again;\nready:\n}"
               ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}
// Copies `bytes` (a multiple of 16); the barrier counts them.
__device__ __forceinline__ void copy_tile(void* shared, const void* global, u32 bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
// Copies the box whose first element stands in `column` and `row`; the barrier counts all of its bytes. What is read `once` leaves
// the L2 cache before anything else.
template <bool ONCE>
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, u32 column, u32 row, u64* barrier) {
  constexpr u64 evict_first = 0x12F0000000000000ull, evict_last = 0x14F0000000000000ull;
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;"
               ::"r"(shared_address(shared)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(ONCE ? evict_first : evict_last)
               : "memory");
}
// The same of a matrix whose map has the dimensions [row / 8][half][row % 8][column]: rows of both halves, eight and eight.
__device__ __forceinline__ void copy_box_of_pairs(void* shared, const TensorMap& map, u32 column, u32 eighth, u64* barrier) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %3, %4}], [%5], %6;"
               ::"r"(shared_address(shared)), "l"(&map), "r"(column), "r"(0), "r"(eighth), "r"(shared_address(barrier)), "l"(0x12F0000000000000ull)
               : "memory");
}
// Until as many blocks have added 1; what they wrote before a fence is seen past the L1 cache.
__device__ __forceinline__ void wait_for_count(const u32* counter, u32 count) {
  u32 seen;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  while (seen != count);
}
// Numbered barriers among some of a block's threads: `threads` of them, those that only arrive included.
__device__ __forceinline__ void meet(u32 number, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory"); }
__device__ __forceinline__ void meet_later(u32 number, u32 threads) { asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory"); }

// 2^x, 0 where that is below the normal numbers.
__device__ __forceinline__ float exp2_flushed(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// Two e4m3 (lower 16 bits) as two f16 in one register; exact.
__device__ __forceinline__ u32 e4m3_to_f16(u32 two) {
  u32 r;
  asm("{.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;}" : "=r"(r) : "r"(two));
  return r;
}
// Two f16 in one register, `low` in the lower half; of numbers that f16 can hold.
__device__ __forceinline__ u32 pack_small_f16(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// The same; what is too large becomes the largest.
__device__ __forceinline__ u32 pack_f16(float low, float high) {
  return pack_small_f16(fminf(fmaxf(low, -65504.f), 65504.f), fminf(fmaxf(high, -65504.f), 65504.f));
}
// Bytes of `a` and `b` as the four digits of `choice` say (0..3 of a, 4..7 of b), lowest first.
__device__ __forceinline__ u32 choose_bytes(u32 a, u32 b, u32 choice) { return __byte_perm(a, b, choice); }

// ---- tensor cores -----------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements; lane 8j + i gives the address of row i of matrix j.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// c[16,8] += a[16,16] b[16,8], bf16 in, f32 out.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same with f16 in.
__device__ __forceinline__ void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c[16,8] += a[16,32] b[32,8], e4m3 in, f32 out.
__device__ __forceinline__ void mma_e4m3(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}


// ---- warpgroup GEMMs: Hopper only (sm_90a), elsewhere these trap and the host takes another kernel -------------

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HOPPER_ASM(text) asm volatile(text ::: "memory")
#else
#define HOPPER_ASM(text) __trap()
#endif
// Between writing registers or accumulators and the first GEMM; after the last GEMM; until all GEMMs are done.
__device__ __forceinline__ void matrix_unit_begin() { HOPPER_ASM("wgmma.fence.sync.aligned;"); }
__device__ __forceinline__ void matrix_unit_commit() { HOPPER_ASM("wgmma.commit_group.sync.aligned;"); }
__device__ __forceinline__ void matrix_unit_wait() { HOPPER_ASM("wgmma.wait_group.sync.aligned 0;"); }
// Until at most the group committed last is under way.
__device__ __forceinline__ void matrix_unit_wait_but_one() { HOPPER_ASM("wgmma.wait_group.sync.aligned 1;"); }
// Reports the compiler that these registers change here: nothing that reads them moves to before a wait, nothing that
// writes them to behind a begin.
template <u32 N>
__device__ __forceinline__ void settle(float (&c)[N][4]) {
#pragma unroll
  for (u32 j = 0; j < N; j++)
#pragma unroll
    for (u32 i = 0; i < 4; i++) asm volatile("" : "+f"(c[j][i])::"memory");
}
// To be called by each thread between its writes to shared memory and the barrier before GEMMs that read them.
__device__ __forceinline__ void show_shared_to_matrix_unit() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ u8* align_shared_1024(u8* p) {
  const u32 address = shared_address(p);
  return p + ((1024 - address % 1024) % 1024);
}
// A matrix in shared memory with the 128-byte swizzle: byte distances between groups along the two dimensions.
__device__ __forceinline__ u64 matrix_descriptor(const u8* start, u32 leading, u32 stride) {
  return (u64)((shared_address(start) & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | 1ull << 62;
}
// Accumulators of a warpgroup's GEMMs (four warps): 64 rows, and eight columns for each four numbers of a thread.
#define ACC1(c, j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define ACC2(c, j) ACC1(c, j), ACC1(c, j + 1)
#define ACC4(c, j) ACC2(c, j), ACC2(c, j + 2)
#define ACC6(c, j) ACC4(c, j), ACC2(c, j + 4)
#define ACC8(c, j) ACC4(c, j), ACC4(c, j + 4)
#define ACC12(c, j) ACC8(c, j), ACC4(c, j + 8)
#define ACC16(c, j) ACC8(c, j), ACC8(c, j + 8)
#define ACCUMULATORS(c) ACC16(c, 0)
#define NAMES4 "%0,%1,%2,%3"
#define NAMES8 NAMES4 ",%4,%5,%6,%7"
#define NAMES16 NAMES8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES24 NAMES16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define NAMES32 NAMES24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES48 NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES64 NAMES48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define ACCUMULATOR_NAMES "{" NAMES64 "}"
// c[64,128] (+)= a[64,16] b[16,128], bf16, both as rows of K in shared memory; `add` or replace c.
__device__ __forceinline__ void warpgroup_multiply(float (&c)[16][4], u64 a, u64 b, bool add) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("{.reg .pred add;\nsetp.ne.b32 add, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"
               " " ACCUMULATOR_NAMES ", %64, %65, add, 1, 1, 0, 0;}"
               : ACCUMULATORS(c)
               : "l"(a), "l"(b), "r"((u32)add));
#else
  __trap();
#endif
}
// c[64,128] (+)= a[64,16] b[16,128], bf16: a in registers (16 rows a warp), b as columns of K.
__device__ __forceinline__ void warpgroup_multiply_transposed(float (&c)[16][4], const u32 (&a)[4], u64 b, bool add) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("{.reg .pred add;\nsetp.ne.b32 add, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"
               " " ACCUMULATOR_NAMES ", {%64,%65,%66,%67}, %68, add, 1, 1, 1;}"
               : ACCUMULATORS(c)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)add));
#else
  __trap();
#endif
}
// c[64,128] (+)= a[64,32] b[32,128], e4m3: a in registers (16 rows a warp), b as rows of K.
__device__ __forceinline__ void warpgroup_multiply_e4m3(float (&c)[16][4], const u32 (&a)[4], u64 b, bool add) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("{.reg .pred add;\nsetp.ne.b32 add, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"
               " " ACCUMULATOR_NAMES ", {%64,%65,%66,%67}, %68, add, 1, 1;}"
               : ACCUMULATORS(c)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)add));
#else
  __trap();
#endif
}
// c[64,N] (+)= a[64,32] b[32,N], e4m3, both as rows of K in shared memory; `add` or replace c.
template <u32 N>
__device__ __forceinline__ void warpgroup_multiply_e4m3(float (&c)[N / 8][4], u64 a, u64 b, bool add) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define MULTIPLY(COLUMNS, ACCUMULATED, NAMES, A, B, ADD)                                                                      \
  asm volatile("{.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" COLUMNS                  \
               "k32.f32.e4m3.e4m3 {" NAMES "}, " A ", " B ", add, 1, 1;}"                                                     \
               : ACCUMULATED                                                                                                  \
               : "l"(a), "l"(b), "r"((u32)add))
  if constexpr (N == 8) MULTIPLY("8", ACC1(c, 0), NAMES4, "%4", "%5", "%6");
  if constexpr (N == 16) MULTIPLY("16", ACC2(c, 0), NAMES8, "%8", "%9", "%10");
  if constexpr (N == 32) MULTIPLY("32", ACC4(c, 0), NAMES16, "%16", "%17", "%18");
  if constexpr (N == 48) MULTIPLY("48", ACC6(c, 0), NAMES24, "%24", "%25", "%26");
  if constexpr (N == 64) MULTIPLY("64", ACC8(c, 0), NAMES32, "%32", "%33", "%34");
  if constexpr (N == 96) MULTIPLY("96", ACC12(c, 0), NAMES48, "%48", "%49", "%50");
  if constexpr (N == 128) MULTIPLY("128", ACC16(c, 0), NAMES64, "%64", "%65", "%66");
#undef MULTIPLY
#else
  __trap();
#endif
}
// Registers of each thread of the warpgroup from here on: given back, or taken (until there are enough).
template <int COUNT>
__device__ __forceinline__ void give_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

#endif  // not emulated

__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

// Where chunk `chunk` (16 bytes) of token `token` lies in a KV head's tile of a cache block. Rows of 128 and 256 bytes lie
// as the warpgroup's matrix instructions want them in shared memory: rows (two halves) of 128 bytes, the chunks of a row
// exchanged by its number. All others lie row by row.
__device__ __forceinline__ u32 cache_place(u32 row_bytes, u32 token, u32 piece) {
  if (row_bytes % 128) return token * row_bytes + piece * 16;
  return piece / 8 * (KV_BLOCK * 128) + token * 128 + (((piece % 8) ^ (token % 8)) << 4);
}

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Four consecutive values as floats, from memory aligned to four values.
__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ float4 load4(const bf16* p) {
  const uint2 v = *reinterpret_cast<const uint2*>(p);
  return make_float4(low_bf16(v.x), high_bf16(v.x), low_bf16(v.y), high_bf16(v.y));
}
__device__ __forceinline__ void store4(float* p, float4 v) { *reinterpret_cast<float4*>(p) = v; }
__device__ __forceinline__ void store4(bf16* p, float4 v) {
  *reinterpret_cast<uint2*>(p) = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
}
__device__ __forceinline__ void store4(e4m3* p, float4 v) {
  *reinterpret_cast<u32*>(p) = (u32)pack_e4m3(v.x, v.y) | ((u32)pack_e4m3(v.z, v.w) << 16);
}

// Most partial sums of a GEMM (MAX_SPLITS in linear.rs).
constexpr u32 MAX_SPLITS = 8;

// A GEMM that may still lie in several partial sums (split K): [splits][rows][columns]. A bf16 GEMM is one sum.
template <typename T>
struct Product {
  const T* data;
  u32 splits;
  u64 split_stride;
  __device__ __forceinline__ float4 at4(u64 index) const {
    if constexpr (sizeof(T) == 2) {
      return load4(data + index);
    } else {
      // all loads are on their way before the first is used
      float4 parts[MAX_SPLITS];
#pragma unroll
      for (u32 s = 0; s < MAX_SPLITS; s++) parts[s] = s < splits ? load4(data + s * split_stride + index) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (u32 s = 1; s < MAX_SPLITS; s++) {
        parts[0].x += parts[s].x, parts[0].y += parts[s].y, parts[0].z += parts[s].z, parts[0].w += parts[s].w;
      }
      return parts[0];
    }
  }
};

// What the next linear reads: bf16, or e4m3 divided by the linear's static activation scale. The division is exact
// (not a GEMM with the reciprocal), so that rounding falls as in the reference.
template <typename Out>
__device__ __forceinline__ void store_activation4(Out* p, float4 v, float scale);
template <>
__device__ __forceinline__ void store_activation4<bf16>(bf16* p, float4 v, float) {
  store4(p, v);
}
template <>
__device__ __forceinline__ void store_activation4<e4m3>(e4m3* p, float4 v, float scale) {
  store4(p, make_float4(__fdiv_rn(v.x, scale), __fdiv_rn(v.y, scale), __fdiv_rn(v.z, scale), __fdiv_rn(v.w, scale)));
}

template <typename Out>
__device__ __forceinline__ void store_activation2(Out* p, float a, float b, float scale);
template <>
__device__ __forceinline__ void store_activation2<bf16>(bf16* p, float a, float b, float) {
  *reinterpret_cast<u32*>(p) = pack_bf16(a, b);
}
template <>
__device__ __forceinline__ void store_activation2<e4m3>(e4m3* p, float a, float b, float scale) {
  *reinterpret_cast<u16*>(p) = pack_e4m3(__fdiv_rn(a, scale), __fdiv_rn(b, scale));
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}
// Sum over the block, to every thread. `scratch` holds 33 floats; it may be used again at once.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
  __syncthreads();
  if (threadIdx.x < WARP) {
    const float w = warp_sum(threadIdx.x < blockDim.x / WARP ? scratch[threadIdx.x] : 0.f);
    if (threadIdx.x == 0) scratch[32] = w;
  }
  __syncthreads();
  return scratch[32];
}
__device__ __forceinline__ float block_max(float v, float* scratch) {
  v = warp_max(v);
  __syncthreads();
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
  __syncthreads();
  if (threadIdx.x < WARP) {
    const float w = warp_max(threadIdx.x < blockDim.x / WARP ? scratch[threadIdx.x] : NEGATIVE_INFINITY);
    if (threadIdx.x == 0) scratch[32] = w;
  }
  __syncthreads();
  return scratch[32];
}
