// Runs kernels on the CPU, for tests without a GPU: every thread of a block is a fiber, barriers and warp operations
// switch between fibers, asynchronous copies become visible only when they are waited for. One block after the other;
// every rank's kernels run on its own operating-system thread. It checks logic (indexing, fragment layouts, missing waits), not races or speed.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static thread_local
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __restrict__
#define __grid_constant__
#define KERNEL extern "C" void
#define DYNAMIC_SHARED(name) unsigned char* name = emulator::dynamic_shared()

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { unsigned x, y, z; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {
struct Copy { void* to; const void* from; };
struct Thread {
  void* stack_pointer = nullptr;
  dim3 index{};
  unsigned linear = 0, warp_operations = 0, barriers = 0;
  bool done = false;
  std::vector<std::vector<Copy>> committed;
  std::vector<Copy> open;
};
struct Warp { unsigned arrived = 0, generation = 0; unsigned char slots[2][32][64]; };
extern thread_local Thread* current;
extern thread_local dim3 block_index, block_size, grid_size;
unsigned char* dynamic_shared();
void yield();
void yield_to_others();
double seconds();
void barrier();
// Every lane gives `size` bytes and sees those of all lanes.
const unsigned char (*exchange(const void* mine, unsigned size))[64];
void launch(dim3 grid, dim3 block, unsigned shared_bytes, void (*body)(void*), void* argument);
}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { char c = 0; emulator::exchange(&c, 1); }
inline void __threadfence() {}
template <typename T> T __shfl_xor_sync(unsigned, T v, int mask) {
  auto slots = emulator::exchange(&v, sizeof v);
  T r; memcpy(&r, slots[(emulator::current->linear % 32) ^ mask], sizeof r); return r;
}
template <typename T> T __shfl_sync(unsigned, T v, int lane) {
  auto slots = emulator::exchange(&v, sizeof v);
  T r; memcpy(&r, slots[lane & 31], sizeof r); return r;
}
template <typename T> T __shfl_up_sync(unsigned, T v, int delta) {
  auto slots = emulator::exchange(&v, sizeof v);
  int lane = emulator::current->linear % 32, from = lane < delta ? lane : lane - delta;
  T r; memcpy(&r, slots[from], sizeof r); return r;
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  auto slots = emulator::exchange(&predicate, sizeof predicate);
  unsigned r = 0; for (int i = 0; i < 32; i++) { int p; memcpy(&p, slots[i], 4); r |= (p ? 1u : 0u) << i; } return r;
}
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline float __int_as_float(int u) { return __uint_as_float((unsigned)u); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((uint64_t)a * b) >> 32); }
inline int __ffs(unsigned v) { return __builtin_ffs((int)v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
template <typename T> T min(T a, T b) { return a < b ? a : b; }
template <typename T> T max(T a, T b) { return a > b ? a : b; }
template <typename T> T atomicAdd(T* p, T v) { T old = *p; *p += v; return old; }
inline unsigned atomicMax(unsigned* p, unsigned v) { unsigned old = *p; if (v > old) *p = v; return old; }
inline unsigned long long atomicMax(unsigned long long* p, unsigned long long v) { auto old = *p; if (v > old) *p = v; return old; }
inline unsigned atomicOr(unsigned* p, unsigned v) { unsigned old = *p; *p |= v; return old; }

// ---- what device.cuh says in PTX --------------------------------------------------------------------------------
struct bf16; struct e4m3;
namespace emulator {
inline unsigned short bf16_bits(float x) {
  unsigned u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline float e4m3_value(unsigned char b) {
  int e = b >> 3 & 15, m = b & 7;
  float v = e == 15 && m == 7 ? NAN : e == 0 ? ldexpf((float)m, -9) : ldexpf(1.f + m / 8.f, e - 7);
  return b & 128 ? -v : v;
}
inline unsigned char e4m3_bits(float x) {
  if (std::isnan(x)) return 0x7f;
  unsigned char sign = std::signbit(x) ? 0x80 : 0;
  float a = fabsf(x);
  if (a >= 448.f) return sign | 0x7e;
  int exponent = a < ldexpf(1, -6) ? -6 : ilogbf(a);
  float step = ldexpf(1, exponent - 3);
  float q = nearbyintf(a / step);  // ties to even; q is in [0, 16]
  float v = q * step;
  if (v >= 448.f) return sign | 0x7e;
  if (v < ldexpf(1, -6)) return sign | (unsigned char)q;
  int e = ilogbf(v);
  return sign | (unsigned char)(((e + 7) << 3) | (int)((v / ldexpf(1, e) - 1) * 8));
}
}  // namespace emulator
template <typename T = bf16> T to_bf16(float x) { T r; r.bits = emulator::bf16_bits(x); return r; }
inline unsigned pack_bf16(float low, float high) { return emulator::bf16_bits(low) | (unsigned)emulator::bf16_bits(high) << 16; }
inline unsigned short pack_e4m3(float low, float high) { return emulator::e4m3_bits(low) | emulator::e4m3_bits(high) << 8; }
inline float2 unpack_e4m3(unsigned short p) { return {emulator::e4m3_value(p & 255), emulator::e4m3_value(p >> 8)}; }
inline void wait_for_previous_kernel() {}
inline void tell_peer(unsigned* flag, unsigned turn) { __atomic_store_n(flag, turn, __ATOMIC_RELEASE); }
inline void wait_for_peer(const unsigned* flag, unsigned turn, volatile unsigned* state) {
  const double since = emulator::seconds();
  while ((int)(__atomic_load_n(flag, __ATOMIC_ACQUIRE) - turn) < 0) {
    if (state[0] | state[1]) return;
    if (emulator::seconds() - since > 20) state[1] = 1;
    emulator::yield_to_others();
  }
}
inline float4 load4_uncached(const float* p) { return *(const float4*)p; }
inline void let_next_kernel_start() {}
inline void copy_async_16(void* shared, const void* global) {
  if ((uintptr_t)shared % 16 || (uintptr_t)global % 16) { fprintf(stderr, "emulator: misaligned copy\n"); abort(); }
  emulator::current->open.push_back({shared, global});
}
inline void copy_async_commit() {
  emulator::current->committed.push_back(std::move(emulator::current->open));
  emulator::current->open.clear();
}
template <int PENDING> void copy_async_wait() {
  auto& groups = emulator::current->committed;
  size_t n = groups.size() > (size_t)PENDING ? groups.size() - PENDING : 0;
  for (size_t i = 0; i < n; i++) for (auto& c : groups[i]) memcpy(c.to, c.from, 16);
  groups.erase(groups.begin(), groups.begin() + n);
}
namespace emulator {
// A barrier that counts arrivals and bytes, within its 64 bits.
struct Counter { int32_t bytes; uint8_t left, count, phase, unused; };
static_assert(sizeof(Counter) == 8);
inline void settle(Counter* c) { if (!c->left && !c->bytes) c->left = c->count, c->phase ^= 1; }
// Barriers by number: arrivals and generations.
struct Numbered { unsigned arrived, generation; };
extern thread_local Numbered numbered[16];
}  // namespace emulator
inline void barrier_init(unsigned long long* b, unsigned count) { *(emulator::Counter*)b = {0, (uint8_t)count, (uint8_t)count, 0, 0}; }
inline void share_barriers() {}
inline void barrier_arrive(unsigned long long* b) { auto c = (emulator::Counter*)b; c->left--; emulator::settle(c); }
inline void barrier_arrive_expecting(unsigned long long* b, unsigned bytes) { auto c = (emulator::Counter*)b; c->bytes += bytes; c->left--; emulator::settle(c); }
inline void barrier_wait(unsigned long long* b, unsigned parity) { while (((volatile emulator::Counter*)b)->phase == parity) emulator::yield(); }
inline void copy_tile(void* shared, const void* global, unsigned bytes, unsigned long long* b) {
  if ((uintptr_t)shared % 16 || (uintptr_t)global % 16 || bytes % 16) { fprintf(stderr, "emulator: misaligned copy\n"); abort(); }
  memcpy(shared, global, bytes);
  auto c = (emulator::Counter*)b; c->bytes -= bytes; emulator::settle(c);
}
namespace emulator {
// What a TensorMap holds here: of each dimension, innermost first, its size, its stride in bytes and the box's size.
struct Map { const unsigned char* data; unsigned dimensions; unsigned size[4], box[4]; uint64_t stride[4]; };
static_assert(sizeof(Map) <= 128);
inline void copy_box(void* shared, const void* map_pointer, const unsigned (&start)[4], unsigned long long* b) {
  const Map& map = *(const Map*)map_pointer;
  unsigned at[4] = {}, bytes = 0, offset = (unsigned)((unsigned char*)shared - dynamic_shared());
  if (offset % 1024 || map.box[0] != 128) { fprintf(stderr, "emulator: a box that is not swizzled as it should be\n"); abort(); }
  for (at[3] = 0; at[3] < map.box[3]; at[3]++) for (at[2] = 0; at[2] < map.box[2]; at[2]++) for (at[1] = 0; at[1] < map.box[1]; at[1]++)
    for (at[0] = 0; at[0] < map.box[0]; at[0]++, bytes++) {
      bool inside = true;
      uint64_t from = 0;
      for (unsigned d = 0; d < 4; d++) inside = inside && start[d] + at[d] < map.size[d], from += (uint64_t)(start[d] + at[d]) * map.stride[d];
      ((unsigned char*)shared)[bytes ^ (bytes >> 7 & 7) << 4] = inside ? map.data[from] : 0;
    }
  auto c = (Counter*)b; c->bytes -= (int)bytes; settle(c);
}
}  // namespace emulator
template <bool> void copy_box(void* shared, const struct TensorMap& map, unsigned column, unsigned row, unsigned long long* b) {
  emulator::copy_box(shared, &map, {column, row, 0, 0}, b);
}
inline void copy_box_of_pairs(void* shared, const struct TensorMap& map, unsigned column, unsigned eighth, unsigned long long* b) {
  emulator::copy_box(shared, &map, {column, 0, 0, eighth}, b);
}
inline void wait_for_count(const unsigned* counter, unsigned count) {
  if (*counter != count) { fprintf(stderr, "emulator: a block waits for blocks that come after it\n"); abort(); }
}
inline void meet_later(unsigned number, unsigned threads) {
  auto& barrier = emulator::numbered[number];
  if (++barrier.arrived == threads) barrier.arrived = 0, barrier.generation++;
}
inline void meet(unsigned number, unsigned threads) {
  const unsigned generation = emulator::numbered[number].generation;
  meet_later(number, threads);
  while (emulator::numbered[number].generation == generation) emulator::yield();
}
inline float exp2_flushed(float x) { return exp2f(x); }
namespace emulator {
inline float f16_value(unsigned short b) {
  int e = b >> 10 & 31, m = b & 1023;
  float v = e == 31 ? (m ? NAN : INFINITY) : e == 0 ? ldexpf((float)m, -24) : ldexpf(1.f + m / 1024.f, e - 15);
  return b & 0x8000 ? -v : v;
}
inline unsigned short f16_bits(float x) {
  if (std::isnan(x)) return 0x7fff;
  unsigned short sign = std::signbit(x) ? 0x8000 : 0;
  float a = fabsf(x);
  if (a == 0) return sign;
  int exponent = a < ldexpf(1, -14) ? -14 : ilogbf(a);
  float v = nearbyintf(a / ldexpf(1, exponent - 10)) * ldexpf(1, exponent - 10);  // ties to even
  if (v >= 65520.f) return sign | 0x7c00;
  if (v < ldexpf(1, -14)) return sign | (unsigned short)(v / ldexpf(1, -24));
  int e = ilogbf(v);
  return sign | (unsigned short)((e + 15) << 10 | (int)((v / ldexpf(1, e) - 1) * 1024));
}
}  // namespace emulator
inline unsigned pack_f16(float low, float high) {
  auto clamp = [](float x) { return fminf(fmaxf(x, -65504.f), 65504.f); };
  return emulator::f16_bits(clamp(low)) | (unsigned)emulator::f16_bits(clamp(high)) << 16;
}
inline unsigned pack_small_f16(float low, float high) { return emulator::f16_bits(low) | (unsigned)emulator::f16_bits(high) << 16; }
inline unsigned e4m3_to_f16(unsigned two) { return emulator::f16_bits(emulator::e4m3_value(two & 255)) | (unsigned)emulator::f16_bits(emulator::e4m3_value(two >> 8 & 255)) << 16; }
inline unsigned choose_bytes(unsigned a, unsigned b, unsigned choice) {
  unsigned long long both = (unsigned long long)b << 32 | a; unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= (unsigned)(both >> (8 * (choice >> (4 * i) & 7)) & 255) << (8 * i);
  return r;
}
namespace emulator {
inline void load(unsigned (&r)[4], const void* row, bool transposed) {
  auto slots = exchange(&row, sizeof row);
  unsigned lane = current->linear % 32;
  for (unsigned j = 0; j < 4; j++) {
    unsigned short pair[2];
    for (unsigned i = 0; i < 2; i++) {
      unsigned matrix_row = transposed ? 2 * (lane % 4) + i : lane / 4, column = transposed ? lane / 4 : 2 * (lane % 4) + i;
      const unsigned short* p; memcpy(&p, slots[8 * j + matrix_row], sizeof p);
      pair[i] = p[column];
    }
    r[j] = pair[0] | (unsigned)pair[1] << 16;
  }
  __syncwarp();
}
template <int PER_WORD, typename Value> void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Value value) {
  unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  auto slots = exchange(mine, sizeof mine);
  unsigned lane = current->linear % 32, g = lane / 4, t = lane % 4;
  auto word = [&](unsigned from, unsigned i) { unsigned w; memcpy(&w, slots[from] + 4 * i, 4); return w; };
  for (unsigned half = 0; half < 2; half++) for (unsigned j = 0; j < 2; j++) {
    unsigned n = 2 * t + j;
    float sum = 0;
    for (unsigned quarter = 0; quarter < 4; quarter++) for (unsigned upper = 0; upper < 2; upper++) {
      unsigned wa = word(g * 4 + quarter, half + 2 * upper), wb = word(n * 4 + quarter, 4 + upper);
      for (int e = 0; e < PER_WORD; e++) sum += value(wa, e) * value(wb, e);
    }
    c[half * 2 + j] += sum;
  }
}
}  // namespace emulator
inline void load_matrices(unsigned (&r)[4], const void* row) { emulator::load(r, row, false); }
inline void load_matrices_transposed(unsigned (&r)[4], const void* row) { emulator::load(r, row, true); }
inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  emulator::mma<2>(c, a, b0, b1, [](unsigned w, int e) { return __uint_as_float(e ? w & 0xffff0000u : w << 16); });
}
inline void mma_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  emulator::mma<2>(c, a, b0, b1, [](unsigned w, int e) { return emulator::f16_value((unsigned short)(e ? w >> 16 : w)); });
}
inline void mma_e4m3(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  emulator::mma<4>(c, a, b0, b1, [](unsigned w, int e) { return emulator::e4m3_value(w >> (8 * e) & 255); });
}

// ---- warpgroup GEMMs, done by each warp at once ------------------------------------------------------------
inline void matrix_unit_begin() {}
inline void matrix_unit_commit() {}
inline void matrix_unit_wait() {}
inline void matrix_unit_wait_but_one() {}
template <unsigned N> void settle(float (&)[N][4]) {}
inline void show_shared_to_matrix_unit() {}
inline unsigned char* align_shared_1024(unsigned char* p) { return p; }
namespace emulator {
// Element (n, k) of a swizzled matrix; the swizzle works on addresses from the start of shared memory.
inline unsigned short element(uint64_t descriptor, unsigned n, unsigned k, bool transposed) {
  unsigned start = (unsigned)(descriptor & 0x3fff) << 4, leading = (unsigned)(descriptor >> 16 & 0x3fff) << 4, stride = (unsigned)(descriptor >> 32 & 0x3fff) << 4;
  unsigned at = transposed ? n % 64 * 2 + n / 64 * leading + k % 8 * 128 + k / 8 * stride : n % 8 * 128 + n / 8 * stride + k * 2;
  at += start;
  at ^= (at >> 7 & 7) << 4;
  unsigned short bits; memcpy(&bits, dynamic_shared() + at, 2);
  return bits;
}
inline float number(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }
template <unsigned N> void warpgroup(float (&c)[N / 8][4], const unsigned (&a)[4], uint64_t descriptor, bool transposed, bool add) {
  for (unsigned j = 0; !add && j < N / 8; j++) for (float& v : c[j]) v = 0.f;
  auto slots = exchange(a, sizeof a);
  unsigned lane = current->linear % 32, g = lane / 4, t = lane % 4;
  float row[2][16];
  for (unsigned half = 0; half < 2; half++) for (unsigned k = 0; k < 16; k++) {
    unsigned w; memcpy(&w, slots[g * 4 + k % 8 / 2] + 4 * (half + k / 8 * 2), 4);
    row[half][k] = number((unsigned short)(k % 2 ? w >> 16 : w));
  }
  for (unsigned j = 0; j < N / 8; j++) for (unsigned e = 0; e < 2; e++) for (unsigned k = 0; k < 16; k++) {
    float b = number(element(descriptor, j * 8 + t * 2 + e, k, transposed));
    c[j][e] += row[0][k] * b, c[j][2 + e] += row[1][k] * b;
  }
  __syncwarp();
}
}  // namespace emulator
inline uint64_t matrix_descriptor(const unsigned char* start, unsigned leading, unsigned stride) {
  return (uint64_t)(start - emulator::dynamic_shared()) >> 4 | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 | 1ull << 62;
}
inline void warpgroup_multiply(float (&c)[16][4], uint64_t a, uint64_t b, bool add) {
  const unsigned lane = emulator::current->linear % 32, warp = emulator::current->linear / 32 % 4, g = lane / 4, t = lane % 4;
  unsigned fragment[4];
  for (unsigned i = 0; i < 4; i++) {
    const unsigned row = warp * 16 + g + i % 2 * 8, k = i / 2 * 8 + t * 2;
    fragment[i] = emulator::element(a, row, k, false) | (unsigned)emulator::element(a, row, k + 1, false) << 16;
  }
  emulator::warpgroup<128>(c, fragment, b, false, add);
}
inline void warpgroup_multiply_transposed(float (&c)[16][4], const unsigned (&a)[4], uint64_t b, bool add) {
  emulator::warpgroup<128>(c, a, b, true, add);
}
namespace emulator {
// Row `row` of 32 e4m3 of a swizzled matrix.
inline void row_of_e4m3(float (&values)[32], uint64_t descriptor, unsigned row) {
  const unsigned start = (unsigned)(descriptor & 0x3fff) << 4, stride = (unsigned)(descriptor >> 32 & 0x3fff) << 4;
  for (unsigned k = 0; k < 32; k++) {
    unsigned at = start + row % 8 * 128 + row / 8 * stride + k;
    values[k] = e4m3_value(dynamic_shared()[at ^ (at >> 7 & 7) << 4]);
  }
}
}  // namespace emulator
namespace emulator {
// This lane's two rows times rows of b.
template <unsigned N> void warpgroup_e4m3(float (&c)[N / 8][4], const float (&rows)[2][32], uint64_t b, bool add) {
  const unsigned t = current->linear % 4;
  float column[32];
  for (unsigned j = 0; j < N / 8; j++) for (unsigned e = 0; e < 2; e++) {
    row_of_e4m3(column, b, j * 8 + t * 2 + e);
    for (unsigned half = 0; half < 2; half++) {
      float sum = add ? c[j][half * 2 + e] : 0.f;
      for (unsigned k = 0; k < 32; k++) sum += rows[half][k] * column[k];
      c[j][half * 2 + e] = sum;
    }
  }
}
}  // namespace emulator
template <unsigned N> void warpgroup_multiply_e4m3(float (&c)[N / 8][4], uint64_t a, uint64_t b, bool add) {
  const unsigned lane = emulator::current->linear % 32, warp = emulator::current->linear / 32 % 4;
  float rows[2][32];
  for (unsigned half = 0; half < 2; half++) emulator::row_of_e4m3(rows[half], a, warp * 16 + half * 8 + lane / 4);
  emulator::warpgroup_e4m3<N>(c, rows, b, add);
}
inline void warpgroup_multiply_e4m3(float (&c)[16][4], const unsigned (&a)[4], uint64_t b, bool add) {
  auto slots = emulator::exchange(a, sizeof a);
  const unsigned lane = emulator::current->linear % 32;
  float rows[2][32];
  for (unsigned half = 0; half < 2; half++) for (unsigned k = 0; k < 32; k++) {
    unsigned w; memcpy(&w, slots[lane / 4 * 4 + k % 16 / 4] + 4 * (half + k / 16 * 2), 4);
    rows[half][k] = emulator::e4m3_value(w >> (8 * (k % 4)) & 255);
  }
  emulator::warpgroup_e4m3<128>(c, rows, b, add);
  __syncwarp();
}
template <int> void give_registers() {}
template <int> void take_registers() {}
