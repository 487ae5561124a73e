// A stand-in for libcuda and libcublasLt (nccl.cpp: and libnccl) that runs the kernels of this folder in the emulator and GEMMs in
// plain loops, as much of both as backend/cuda calls. With it the whole CUDA backend, host code and kernels, is tested
// on machines without a GPU: see scripts/gpu/emulator. Streams are synchronous; captured graphs are replayed.
#include "../device.cuh"

#include <chrono>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

namespace kernels {
#include "../attention_decode.cu"
namespace prefill {
#include "../attention_prefill.cu"
}
namespace hopper {
#include "../attention_prefill_hopper.cu"
}
#include "../fill.cu"
#include "../gate.cu"
#include "../linear.cu"
namespace wide {
#include "../skinny_gemm.cu"
}
#include "../norm.cu"
#include "../rope.cu"
#include "../rows.cu"
#include "../sample.cu"
}  // namespace kernels

#include "stream.h"

typedef uint64_t DevicePointer;

namespace {
struct Launch { dim3 grid, block; unsigned shared; };
typedef std::function<Work(void**, Launch)> Binder;

// An argument, wherever it lies.
template <typename T> T read(const void* from) { T value; memcpy(&value, from, sizeof value); return value; }
template <typename... A> Binder bind(void (*kernel)(A...)) {
  return [kernel](void** parameters, Launch launch) -> Work {
    size_t i = 0;
    std::tuple<std::remove_const_t<A>...> arguments{read<std::remove_const_t<A>>(parameters[i++])...};
    return [kernel, arguments, launch] {
      auto body = [kernel, &arguments] { std::apply(kernel, arguments); };
      typedef decltype(body) Threads;
      emulator::launch(launch.grid, launch.block, launch.shared, [](void* b) { (*(Threads*)b)(); }, &body);
    };
  };
}
std::map<std::string, Binder>& registry() {
  using namespace kernels;
  using namespace kernels::prefill;
  using namespace kernels::hopper;
  using namespace kernels::wide;
  static std::map<std::string, Binder> all = {
#define REGISTER(NAME) {#NAME, bind(NAME)},
#include "registry.inc"
  };
  return all;
}

size_t used;
std::map<DevicePointer, size_t> allocations;
size_t memory() { const char* e = getenv("BORA_EMULATED_MEMORY"); return e ? strtoull(e, 0, 10) : 4ull << 30; }
double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
std::mutex memory_lock;
}  // namespace

Status run(void* stream, Work work) {
  Stream* s = (Stream*)stream;
  if (s && s->capturing) s->graph.push_back(work); else work();
  return 0;
}

EXPORT Status cuInit(unsigned) { return 0; }
EXPORT Status cuDriverGetVersion(int* v) { *v = 13000; return 0; }
EXPORT Status cuDeviceGetCount(int* n) { const char* e = getenv("BORA_EMULATED_GPUS"); *n = e ? atoi(e) : 1; return 0; }
EXPORT Status cuDeviceGet(int* d, int i) { *d = i; return 0; }
EXPORT Status cuDeviceGetName(char* n, int l, int) { snprintf(n, l, "emulated GPU"); return 0; }
EXPORT Status cuDeviceGetAttribute(int* v, int a, int) { *v = a == 75 ? 9 : a == 76 ? 0 : a == 16 ? 4 : a == 97 ? 232448 : 1; return 0; }
EXPORT Status cuDeviceTotalMem_v2(size_t* n, int) { *n = memory(); return 0; }
EXPORT Status cuDevicePrimaryCtxRetain(void** c, int) { *c = (void*)0x1000; return 0; }
EXPORT Status cuDevicePrimaryCtxRelease_v2(int) { return 0; }
// memory can be taken only by a thread that has a context, as on a device
thread_local bool has_context = false;
EXPORT Status cuCtxSetCurrent(void* context) { has_context = context; return 0; }
EXPORT Status cuCtxGetCurrent(void** c) { *c = (void*)0x1000; return 0; }
EXPORT Status cuCtxSynchronize() { return 0; }
EXPORT Status cuMemGetInfo_v2(size_t* f, size_t* t) { *t = memory(); *f = *t - used; return 0; }
EXPORT Status cuStreamCreate(void** s, unsigned) { *s = new Stream; return 0; }
EXPORT Status cuStreamDestroy_v2(void* s) { delete (Stream*)s; return 0; }
EXPORT Status cuStreamSynchronize(void*) { return 0; }
EXPORT Status cuStreamWaitEvent(void*, void*, unsigned) { return 0; }
EXPORT Status cuModuleLoadData(void** m, const void*) { *m = (void*)1; return 0; }
EXPORT Status cuModuleUnload(void*) { return 0; }
EXPORT Status cuModuleGetFunction(void** f, void*, const char* name) {
  auto found = registry().find(name);
  if (found == registry().end()) return 500;
  *f = (void*)&found->second;
  return 0;
}
EXPORT Status cuFuncSetAttribute(void*, int, int) { return 0; }
EXPORT Status cuMemAlloc_v2(DevicePointer* p, size_t n) {
  if (!has_context) return 201;
  std::lock_guard<std::mutex> hold(memory_lock);
  if (used + n > memory()) return 2;
  *p = (DevicePointer)aligned_alloc(256, (n + 255) / 256 * 256);
  memset((void*)*p, 0xff, n);  // NaN in every format
  used += n, allocations[*p] = n;
  return 0;
}
EXPORT Status cuMemFree_v2(DevicePointer p) { std::lock_guard<std::mutex> hold(memory_lock); used -= allocations[p]; allocations.erase(p); free((void*)p); return 0; }
// ranks of one process reach each other's memory; processes do not
EXPORT Status cuDeviceCanAccessPeer(int* can, int, int) { *can = 1; return 0; }
EXPORT Status cuCtxEnablePeerAccess(void*, unsigned) { return 0; }
EXPORT Status cuIpcGetMemHandle(void* handle, DevicePointer) { memset(handle, 0, 64); return 0; }
EXPORT Status cuIpcOpenMemHandle_v2(DevicePointer*, const void*, unsigned) { return 801; }
EXPORT Status cuIpcCloseMemHandle(DevicePointer) { return 0; }
EXPORT Status cuMemHostAlloc(void** p, size_t n, unsigned) { *p = aligned_alloc(4096, (n + 4095) / 4096 * 4096); return 0; }
EXPORT Status cuMemFreeHost(void* p) { free(p); return 0; }
EXPORT Status cuMemcpyHtoD_v2(DevicePointer d, const void* s, size_t n) { memcpy((void*)d, s, n); return 0; }
EXPORT Status cuMemcpyDtoH_v2(void* d, DevicePointer s, size_t n) { memcpy(d, (void*)s, n); return 0; }
EXPORT Status cuMemcpyDtoD_v2(DevicePointer d, DevicePointer s, size_t n) { memcpy((void*)d, (void*)s, n); return 0; }
EXPORT Status cuMemcpyHtoDAsync_v2(DevicePointer d, const void* s, size_t n, void* st) { return run(st, [=] { memcpy((void*)d, s, n); }); }
EXPORT Status cuMemcpyDtoHAsync_v2(void* d, DevicePointer s, size_t n, void* st) { return run(st, [=] { memcpy(d, (void*)s, n); }); }
EXPORT Status cuMemcpyDtoDAsync_v2(DevicePointer d, DevicePointer s, size_t n, void* st) { return run(st, [=] { memmove((void*)d, (void*)s, n); }); }
EXPORT Status cuMemsetD8_v2(DevicePointer d, unsigned char v, size_t n) { memset((void*)d, v, n); return 0; }
EXPORT Status cuMemsetD8Async(DevicePointer d, unsigned char v, size_t n, void* st) { return run(st, [=] { memset((void*)d, v, n); }); }
struct Copy2D {
  size_t source_x, source_y; int source_type; const char* source_host; DevicePointer source_device; void* source_array; size_t source_pitch;
  size_t target_x, target_y; int target_type; char* target_host; DevicePointer target_device; void* target_array; size_t target_pitch;
  size_t width, height;
};
EXPORT Status cuMemcpy2DAsync_v2(const Copy2D* c, void* st) {
  const Copy2D copy = *c;
  if (copy.source_pitch < copy.width || copy.target_pitch < copy.width || copy.source_x || copy.source_y || copy.target_x || copy.target_y) return 1;
  return run(st, [=] {
    const char* from = copy.source_type == 1 ? copy.source_host : (const char*)copy.source_device;
    char* to = copy.target_type == 1 ? copy.target_host : (char*)copy.target_device;
    for (size_t row = 0; row < copy.height; row++) memcpy(to + row * copy.target_pitch, from + row * copy.source_pitch, copy.width);
  });
}
EXPORT Status cuTensorMapEncodeTiled(void* map, int type, unsigned dimensions, void* data, const uint64_t* sizes, const uint64_t* strides,
                                     const unsigned* box, const unsigned* steps, int interleave, int swizzle, int, int) {
  // bytes, swizzled over 128 of them
  if (type != 0 || dimensions < 2 || dimensions > 4 || interleave != 0 || swizzle != 3 || box[0] != 128 || (uintptr_t)data % 16) return 1;
  emulator::Map m{(const unsigned char*)data, dimensions, {1, 1, 1, 1}, {1, 1, 1, 1}, {1, 0, 0, 0}};
  for (unsigned d = 0; d < dimensions; d++) {
    if (steps[d] != 1 || box[d] > 256 || (d && strides[d - 1] % 16)) return 1;
    m.size[d] = (unsigned)sizes[d], m.box[d] = box[d];
    if (d) m.stride[d] = strides[d - 1];
  }
  memcpy(map, &m, sizeof m);
  return 0;
}
struct Event { double time; };
EXPORT Status cuEventCreate(void** e, unsigned) { *e = new Event{0}; return 0; }
EXPORT Status cuEventDestroy_v2(void* e) { delete (Event*)e; return 0; }
EXPORT Status cuEventRecord(void* e, void*) { ((Event*)e)->time = now(); return 0; }
EXPORT Status cuEventQuery(void*) { return 0; }
EXPORT Status cuEventSynchronize(void*) { return 0; }
EXPORT Status cuEventElapsedTime_v2(float* f, void* a, void* b) { *f = (float)((((Event*)b)->time - ((Event*)a)->time) * 1e3); return 0; }
EXPORT Status cuEventElapsedTime(float* f, void* a, void* b) { return cuEventElapsedTime_v2(f, a, b); }
EXPORT Status cuStreamBeginCapture_v2(void* s, int) { ((Stream*)s)->capturing = true; ((Stream*)s)->graph.clear(); return 0; }
EXPORT Status cuStreamEndCapture(void* s, void** g) { ((Stream*)s)->capturing = false; *g = new std::vector<Work>(std::move(((Stream*)s)->graph)); return 0; }
EXPORT Status cuGraphInstantiateWithFlags(void** e, void* g, unsigned long long) { *e = new std::vector<Work>(*(std::vector<Work>*)g); return 0; }
EXPORT Status cuGraphUpload(void*, void*) { return 0; }
EXPORT Status cuGraphLaunch(void* e, void* s) { for (auto& w : *(std::vector<Work>*)e) run(s, w); return 0; }
EXPORT Status cuGraphExecDestroy(void* e) { delete (std::vector<Work>*)e; return 0; }
EXPORT Status cuGraphDestroy(void* g) { delete (std::vector<Work>*)g; return 0; }
EXPORT Status cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream, void** parameters, void**) {
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535) return 1;
  return run(stream, (*(Binder*)f)(parameters, Launch{{gx, gy, gz}, {bx, by, bz}, shared}));
}
struct LaunchConfig { unsigned gx, gy, gz, bx, by, bz, shared; void* stream; void* attributes; unsigned count; };
EXPORT Status cuLaunchKernelEx(const LaunchConfig* c, void* f, void** parameters, void** extra) {
  return cuLaunchKernel(f, c->gx, c->gy, c->gz, c->bx, c->by, c->bz, c->shared, c->stream, parameters, extra);
}
EXPORT Status cuGetErrorName(int e, const char** s) { *s = e == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR"; return 0; }
EXPORT Status cuGetErrorString(int e, const char** s) { *s = e == 2 ? "out of memory" : "an error of the emulator"; return 0; }

// ---- cuBLASLt by its documented meaning: column-major, D = alpha scaleA scaleB op(A) op(B) ------------------------------
namespace {
enum { F32 = 0, BF16 = 14, E4M3 = 28 };
struct Layout { int type; uint64_t rows, columns; int64_t leading; };
struct Matmul { int a_transposed = 0, b_transposed = 0; const float *a_scale = nullptr, *b_scale = nullptr; };
float value(const void* p, int type, uint64_t i) {
  static const std::vector<float> table = [] { std::vector<float> t(256); for (int j = 0; j < 256; j++) t[j] = emulator::e4m3_value(j); return t; }();
  return type == E4M3 ? table[((const u8*)p)[i]] : __uint_as_float((u32)((const u16*)p)[i] << 16);
}
}  // namespace
EXPORT size_t cublasLtGetVersion() { return 130100; }
EXPORT int cublasLtCreate(void** h) { *h = (void*)1; return 0; }
EXPORT int cublasLtDestroy(void*) { return 0; }
EXPORT int cublasLtMatrixLayoutCreate(Layout** l, int type, uint64_t rows, uint64_t columns, int64_t leading) { *l = new Layout{type, rows, columns, leading}; return 0; }
EXPORT int cublasLtMatrixLayoutDestroy(Layout* l) { delete l; return 0; }
EXPORT int cublasLtMatmulDescCreate(Matmul** d, int compute, int scale) { *d = new Matmul; return compute == 68 && scale == 0 ? 0 : 7; }
EXPORT int cublasLtMatmulDescDestroy(Matmul* d) { delete d; return 0; }
EXPORT int cublasLtMatmulDescSetAttribute(Matmul* d, int attribute, const void* v, size_t n) {
  switch (attribute) {
    case 3: d->a_transposed = *(int*)v; return 0;
    case 4: d->b_transposed = *(int*)v; return 0;
    case 17: d->a_scale = *(float**)v; return n == 8 ? 0 : 7;
    case 18: d->b_scale = *(float**)v; return n == 8 ? 0 : 7;
    case 25: return n == 1 ? 0 : 7;
    default: return 7;
  }
}
EXPORT int cublasLtMatmulPreferenceCreate(void** p) { *p = (void*)1; return 0; }
EXPORT int cublasLtMatmulPreferenceDestroy(void*) { return 0; }
EXPORT int cublasLtMatmulPreferenceSetAttribute(void*, int attribute, const void*, size_t n) { return attribute == 1 && n == 8 ? 0 : 7; }
struct Heuristic { uint64_t algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; };
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, Matmul* d, Layout* a, Layout* b, Layout* c, Layout* o, void*, int want, Heuristic* h, int* got) {
  if (!d->a_transposed || d->b_transposed || a->type != b->type || a->rows != b->rows || a->columns != o->rows || b->columns != o->columns || c->type != o->type) return 15;
  if (a->type == E4M3 && (a->rows % 16 || a->columns % 16)) return 15;
  *got = want < 2 ? want : 2;
  memset(h, 0, *got * sizeof *h);
  return 0;
}
EXPORT int cublasLtMatmulAlgoCheck(void*, Matmul*, Layout*, Layout*, Layout*, Layout*, const void* algorithm, Heuristic* h) {
  if (!algorithm) return 7;
  memset(h, 0, sizeof *h);
  return 0;
}
EXPORT int cublasLtMatmul(void*, Matmul* d, const float* alpha, const void* A, Layout* la, const void* B, Layout* lb, const float* beta, const void*, Layout*, void* O, Layout* lo, const void* algorithm, void* workspace, size_t, void* stream) {
  if (*beta != 0 || !algorithm || !workspace) return 7;
  const Matmul m = *d;
  const Layout a = *la, b = *lb, o = *lo;
  const float by = *alpha;
  return run(stream, [=] {
    const float scale = by * (m.a_scale ? *m.a_scale : 1) * (m.b_scale ? *m.b_scale : 1);
    std::vector<float> left(a.rows), right(b.columns * b.rows);
    for (uint64_t j = 0; j < b.columns; j++) for (uint64_t k = 0; k < b.rows; k++) right[j * b.rows + k] = value(B, b.type, j * b.leading + k);
    for (uint64_t i = 0; i < o.rows; i++) {
      for (uint64_t k = 0; k < a.rows; k++) left[k] = value(A, a.type, i * a.leading + k);
      for (uint64_t j = 0; j < o.columns; j++) {
        float sum = 0;
        const float* r = &right[j * b.rows];
        for (uint64_t k = 0; k < a.rows; k++) sum += left[k] * r[k];
        if (o.type == F32) ((float*)O)[j * o.leading + i] = sum * scale;
        else ((u16*)O)[j * o.leading + i] = emulator::bf16_bits(sum * scale);
      }
    }
  });
}
