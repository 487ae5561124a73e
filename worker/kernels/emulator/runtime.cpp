// The emulator's threads: one fiber per thread of the block, switched at barriers and warp operations.
#include "cuda.h"

#include <sched.h>
#include <sys/mman.h>

#include <chrono>

namespace emulator {
thread_local Thread* current = nullptr;
thread_local dim3 block_index, block_size, grid_size;
thread_local Numbered numbered[16];

namespace {
constexpr size_t STACK_BYTES = 256 << 10, SHARED_BYTES = 232448;
thread_local std::vector<Thread> threads;
thread_local std::vector<Warp> warps;
thread_local std::vector<char*> stacks;
thread_local unsigned char* shared_memory = nullptr;
thread_local void* scheduler_stack_pointer;
thread_local unsigned barrier_arrived, barrier_generation, alive;
thread_local void (*kernel_body)(void*);
thread_local void* kernel_argument;

// Saves the callee-saved registers on the stack, stores the stack pointer to *from, continues at `to`.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void release_barrier_if_complete() {
  if (alive && barrier_arrived == alive) barrier_arrived = 0, barrier_generation++;
}

void thread_main() {
  kernel_body(kernel_argument);
  current->done = true;
  alive--;
  release_barrier_if_complete();
  yield();
  abort();
}
}  // namespace

unsigned char* dynamic_shared() { return shared_memory; }
void yield() { emulator_switch(&current->stack_pointer, scheduler_stack_pointer); }

void yield_to_others() { sched_yield(); yield(); }
double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void barrier() {
  const unsigned generation = barrier_generation;
  barrier_arrived++;
  release_barrier_if_complete();
  while (barrier_generation == generation) yield();
}

const unsigned char (*exchange(const void* mine, unsigned size))[64] {
  Warp& warp = warps[current->linear / 32];
  const unsigned turn = current->warp_operations++ % 2;
  memcpy(warp.slots[turn][current->linear % 32], mine, size);
  const unsigned generation = warp.generation;
  // All lanes of a warp take part in every warp operation: kernels here have no partly filled warps.
  if (++warp.arrived == 32) warp.arrived = 0, warp.generation++;
  while (warp.generation == generation) yield();
  return warp.slots[turn];
}

void launch(dim3 grid, dim3 block, unsigned shared_bytes, void (*body)(void*), void* argument) {
  const unsigned count = block.x * block.y * block.z;
  if (shared_bytes > SHARED_BYTES || count > 1024) { fprintf(stderr, "emulator: launch exceeds the block's limits\n"); abort(); }
  if (!shared_memory) shared_memory = (unsigned char*)aligned_alloc(1024, SHARED_BYTES);
  kernel_body = body, kernel_argument = argument;
  block_size = block, grid_size = grid;
  while (stacks.size() < count) stacks.push_back((char*)mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (unsigned z = 0; z < grid.z; z++) for (unsigned y = 0; y < grid.y; y++) for (unsigned x = 0; x < grid.x; x++) {
    block_index = {x, y, z};
    memset(shared_memory, 0xff, shared_bytes);  // NaN: nothing may be read that was not written
    threads.assign(count, Thread());
    warps.assign((count + 31) / 32, Warp());
    barrier_arrived = 0, alive = count;
    memset(numbered, 0, sizeof numbered);
    for (unsigned i = 0; i < count; i++) {
      Thread& t = threads[i];
      t.linear = i, t.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
      void** top = (void**)(stacks[i] + STACK_BYTES - 64);
      *--top = nullptr;              // return address of thread_main; keeps the stack aligned as after a call
      *--top = (void*)thread_main;
      for (int r = 0; r < 6; r++) *--top = nullptr;
      t.stack_pointer = top;
    }
    while (alive) {
      for (unsigned i = 0; i < count; i++) {
        if (threads[i].done) continue;
        current = &threads[i];
        emulator_switch(&scheduler_stack_pointer, threads[i].stack_pointer);
      }
    }
  }
}
}  // namespace emulator
