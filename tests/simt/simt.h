// A GPU on the CPU, one block at a time: what csrc/cuda needs to compile with g++ and run where its mistakes show.
//
// Every CUDA thread is a fiber with a stack of its own; blocks run one after another. A warp collective completes when
// every lane of its mask has arrived at the same call, a block barrier when every thread still running has. Between
// those points nothing orders the threads, and the scheduler is free to be unkind:
//
//   forward   threads run in ascending order, each until it has to wait.
//   skew      one warp is driven as far as it goes, warps, lanes and blocks in a random order (seeded).
//
// Asynchronous copies land when they are issued (eager) or no sooner than the wait that covers them (lazy). Shared
// memory starts as NaN and is guarded past its size. Under ThreadSanitizer every CUDA thread is one of its fibers, and
// only barriers order fibers: two accesses without a barrier between them are a reported race, whatever values they
// moved. Blocks are not ordered with one another either.
//
// A broken rule ends the process with a line that begins "SIMT:" and names it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

enum class Order { kForward, kSkew };
enum class Copies { kEager, kLazy };

struct Options {
  Order order = Order::kForward;
  Copies copies = Copies::kLazy;
  uint64_t seed = 0;
  int64_t last_blocks = 0;  // of a launch only its last blocks run, for grids too large to run whole; 0: all of them
};

extern Options options;
// Which planted bug is active (0: none) in a build with -DPLANT=simt::planted.
extern int planted;

struct Thread;
extern Thread* current;

// What a kernel can ask about where it runs.
unsigned thread_index();
int64_t block_index();
unsigned char* shared_memory();

// Every call names its source line: lanes that wait at different calls do not meet.
void sync_block(int line);
void sync_warp(uint32_t mask, int line);

// Each lane gives `in` and, once all lanes of `mask` are there, takes `out`. The bytes are moved by the runtime, which
// is not instrumented: a shuffle orders no memory.
enum class Collective { kShuffle, kBallot, kMatrixLoad, kMmaF16, kMmaBf16, kMmaTf32 };
void collective(Collective kind, uint32_t mask, int line, const void* in, int in_bytes, void* out, int out_bytes);

// A copy of `bytes` to shared memory of which the first `valid` bytes come from `global` and the rest are zero.
void copy_async(void* shared, const void* global, int bytes, int valid);
void copy_commit();
void copy_wait(int pending_groups);

void fail(const char* format, ...) __attribute__((format(printf, 1, 2), noreturn));

// Called with every kernel about to be launched: the tests plant bugs in one kernel at a time and count coverage.
extern void (*before_launch)(const void* kernel);

using Entry = void (*)(const void* arguments);
void launch(Entry entry, const void* arguments, int64_t blocks, int threads, size_t shared_bytes);

// For the tests: launches so far, and how often warps met in collectives.
struct Counts {
  int64_t launches = 0, blocks = 0, collectives = 0, barriers = 0, copies = 0;
};
extern Counts counts;

}  // namespace simt
