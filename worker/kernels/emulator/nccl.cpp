// A stand-in for libnccl: ranks that are threads or processes of one machine meet in shared memory that is named by the
// communicator's id. Each sums in the order of the ranks, so all have the same bits. Waits for ever, as NCCL does, until
// the communicator is aborted.
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "stream.h"

namespace {
enum { SUCCESS = 0, SYSTEM = 2, INVALID = 4, IN_PROGRESS = 7, F32 = 7, BF16 = 9, SUM = 0, MAX_RANKS = 16 };
constexpr size_t SLOT = 1 << 20;
struct Meeting {
  std::atomic<int> attached;
  std::atomic<uint64_t> came[MAX_RANKS], left[MAX_RANKS];
  char slots[MAX_RANKS][SLOT];
};
struct Communicator {
  Meeting* meeting;
  int rank, ranks;
  uint64_t turn = 0;
  std::atomic<bool> aborted{false};
  std::atomic<int> users{0};
};
struct Id { char name[128]; };
struct Config { size_t size; unsigned magic, version; int blocking; };

// False if the communicator was aborted.
bool wait(Communicator* c, std::atomic<uint64_t>* counters) {
  counters[c->rank] = c->turn;
  for (int r = 0; r < c->ranks; r++) {
    for (unsigned spins = 0; counters[r] < c->turn; spins++) {
      if (c->aborted) return false;
      if (spins > 100) usleep(50); else sched_yield();
    }
  }
  return true;
}
float bf16_value(uint16_t bits) { uint32_t wide = (uint32_t)bits << 16; float f; memcpy(&f, &wide, 4); return f; }
uint16_t bf16_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16); }

void exchange(Communicator* c, const char* own, char* all, size_t bytes, int type, bool gather) {
  c->users++;
  for (size_t at = 0; at < bytes && !c->aborted; at += SLOT) {
    const size_t part = bytes - at < SLOT ? bytes - at : SLOT;
    c->turn++;
    memcpy(c->meeting->slots[c->rank], own + at, part);
    if (!wait(c, c->meeting->came)) break;
    if (gather) {
      for (int r = 0; r < c->ranks; r++) memcpy(all + r * bytes + at, c->meeting->slots[r], part);
    } else {
      const size_t size = type == F32 ? 4 : 2;
      for (size_t i = 0; i < part / size; i++) {
        float sum = 0;
        for (int r = 0; r < c->ranks; r++) {
          const char* slot = c->meeting->slots[r];
          sum += type == F32 ? ((const float*)slot)[i] : bf16_value(((const uint16_t*)slot)[i]);
        }
        if (type == F32) ((float*)(all + at))[i] = sum; else ((uint16_t*)(all + at))[i] = bf16_bits(sum);
      }
    }
    if (!wait(c, c->meeting->left)) break;
  }
  c->users--;
}
}  // namespace

EXPORT Status ncclGetVersion(int* v) { *v = 22809; return SUCCESS; }
EXPORT Status ncclGetUniqueId(Id* id) {
  uint64_t number;
  if (getrandom(&number, sizeof number, 0) != sizeof number) return SYSTEM;
  memset(id, 0, sizeof *id);
  snprintf(id->name, sizeof id->name, "/bora-nccl-%016llx", (unsigned long long)number);
  return SUCCESS;
}
EXPORT Status ncclCommInitRankConfig(Communicator** out, int ranks, Id id, int rank, Config* config) {
  if (config->magic != 0xcafebeef || config->blocking != 0 || ranks > MAX_RANKS || rank >= ranks) return INVALID;
  const int file = shm_open(id.name, O_CREAT | O_RDWR, 0600);
  if (file < 0 || ftruncate(file, sizeof(Meeting)) != 0) return SYSTEM;
  void* memory = mmap(nullptr, sizeof(Meeting), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) return SYSTEM;
  Communicator* c = new Communicator;
  c->meeting = (Meeting*)memory, c->rank = rank, c->ranks = ranks;
  // the last one in takes the name away
  if (++c->meeting->attached == ranks) shm_unlink(id.name);
  *out = c;
  return IN_PROGRESS;
}
EXPORT Status ncclCommGetAsyncError(Communicator* c, Status* state) {
  *state = c->meeting->attached < c->ranks ? IN_PROGRESS : SUCCESS;
  return SUCCESS;
}
EXPORT Status ncclAllReduce(const void* own, void* all, size_t count, int type, int operation, Communicator* c, void* stream) {
  if ((type != F32 && type != BF16) || operation != SUM) return INVALID;
  return run(stream, [=] { exchange(c, (const char*)own, (char*)all, count * (type == F32 ? 4 : 2), type, false); });
}
EXPORT Status ncclAllGather(const void* own, void* all, size_t count, int type, Communicator* c, void* stream) {
  if (type != F32 && type != BF16) return INVALID;
  return run(stream, [=] { exchange(c, (const char*)own, (char*)all, count * (type == F32 ? 4 : 2), type, true); });
}
EXPORT Status ncclCommAbort(Communicator* c) {
  c->aborted = true;
  while (c->users) usleep(50);
  munmap(c->meeting, sizeof(Meeting));
  // not deleted: a graph that was recorded with it may still be there
  return SUCCESS;
}
EXPORT const char* ncclGetErrorString(int status) { return status == SUCCESS ? "no error" : "an error of the emulator"; }
EXPORT const char* ncclGetLastError(void*) { return ""; }
