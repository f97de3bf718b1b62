// The runtime behind simt.h. Compiled without sanitizer instrumentation (and without turning loops into memcpy, which
// the sanitizers intercept): what it does to pass values between lanes is not an access of the kernel's.
#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace simt {

Options options;
int planted = 0;
Thread* current = nullptr;
Counts counts;
void (*before_launch)(const void* kernel) = nullptr;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = size_t(256) << 10;
// No GPU named in the ladder gives a block more shared memory than this.
constexpr size_t kShared = size_t(227) << 10;
constexpr unsigned char kCanary = 0xA5;
#if defined(SIMT_TSAN)
constexpr bool kKeepsMemory = true;
#else
constexpr bool kKeepsMemory = false;
#endif

// Whole words where there are any: this and `fill` took a quarter of all time byte by byte.
using Word __attribute__((may_alias, aligned(1))) = uint32_t;
void move_bytes(void* to, const void* from, int bytes) {
  int i = 0;
  for (; i + 4 <= bytes; i += 4)
    *reinterpret_cast<volatile Word*>(static_cast<unsigned char*>(to) + i) =
        *reinterpret_cast<const Word*>(static_cast<const unsigned char*>(from) + i);
  for (; i < bytes; i++) static_cast<volatile unsigned char*>(to)[i] = static_cast<const unsigned char*>(from)[i];
}
void fill(unsigned char* memory, size_t first, size_t end, unsigned char value) {
  for (; first < end && first % 4; first++) static_cast<volatile unsigned char*>(memory)[first] = value;
  for (; first + 4 <= end; first += 4) *reinterpret_cast<volatile Word*>(memory + first) = value * 0x01010101u;
  for (; first < end; first++) static_cast<volatile unsigned char*>(memory)[first] = value;
}

// ---- switching stacks

#if defined(__x86_64__)
struct Context {
  void* sp = nullptr;
};
extern "C" void simt_switch(Context* from, Context* to);
// The callee-saved registers of the System V ABI; everything else is dead across a call.
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
.section .note.GNU-stack,"",@progbits
.text
)");
void switch_context(Context& from, Context& to) { simt_switch(&from, &to); }
void make_context(Context& context, void* stack, void (*entry)()) {
  auto top = (reinterpret_cast<uintptr_t>(stack) + kStack) & ~uintptr_t(63);
  auto* sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;  // a return address for entry, which never returns; keeps the stack aligned as after a call
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  context.sp = sp;
}
#else
struct Context {
  ucontext_t u;
};
void switch_context(Context& from, Context& to) { swapcontext(&from.u, &to.u); }
void make_context(Context& context, void* stack, void (*entry)()) {
  getcontext(&context.u);
  context.u.uc_stack = {stack, 0, kStack};
  context.u.uc_link = nullptr;
  makecontext(&context.u, entry, 0);
}
#endif

enum class State { kReady, kWarpWait, kBlockWait, kDone };

struct Copy {
  void* shared;
  const void* global;
  int bytes, valid;
};

// A stack, and the sanitizers' idea of it. Kept for the whole process: creating them is slow.
struct Fiber {
  Context context;
  void* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;
};

}  // namespace

struct Thread {
  unsigned index = 0;
  State state = State::kReady;
  Fiber* fiber = nullptr;
  // What it waits for.
  Collective kind = Collective::kShuffle;
  bool is_sync = false;
  uint32_t mask = 0;
  int line = 0;
  unsigned char in[64], out[64];
  // Groups of asynchronous copies, oldest first; the last is the one not yet committed.
  std::vector<std::vector<Copy>> groups;
  int barrier_parity = 0, warp_parity = 0;
};

namespace {

struct Launch {
  Entry entry;
  const void* arguments;
  int threads;
  size_t shared_bytes;
};

struct Block {
  int64_t index = 0;
  unsigned char* shared = nullptr;
  int live = 0, waiting = 0;
  int barrier_line = 0;
  int barriers = 0;
};

Launch launch_now;
Block block;
std::vector<Thread> threads;
std::vector<int> at_collectives;  // by warp: how many lanes wait at one
std::vector<Fiber*>& fibers = *new std::vector<Fiber*>;  // never destroyed: nor are the fibers
Context scheduler;
std::mt19937_64 random_bits;
#if defined(SIMT_ASAN)
const void* main_bottom = nullptr;
size_t main_size = 0;
void* main_fake = nullptr;
#endif
#if defined(SIMT_TSAN)
void* main_tsan = nullptr;
char block_sync[2];
char warp_sync[32][2];
char block_start;
#endif

// Uniform in [0, n): std::shuffle's own choice differs between standard libraries, and a seed should not.
template <class T>
void shuffle(std::vector<T>& values) {
  for (size_t i = values.size(); i > 1; i--) std::swap(values[i - 1], values[random_bits() % i]);
}

void to_scheduler() {
  Fiber* fiber = current->fiber;
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(&fiber->fake_stack, main_bottom, main_size);
#endif
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(fiber->context, scheduler);
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(fiber->fake_stack, nullptr, nullptr);
#endif
}

void run(Thread& thread) {
  current = &thread;
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(&main_fake, thread.fiber->stack, kStack);
#endif
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(thread.fiber->tsan, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(scheduler, thread.fiber->context);
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(main_fake, nullptr, nullptr);
#endif
  current = nullptr;
}

void release_barrier() {
  block.waiting = 0;
  block.barriers++;
  counts.barriers++;
  for (Thread& t : threads)
    if (t.state == State::kBlockWait) t.state = State::kReady;
}

void fiber_main() {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);
#endif
  for (;;) {
    Thread* self = current;
#if defined(SIMT_TSAN)
    __tsan_acquire(&block_start);
#endif
    launch_now.entry(launch_now.arguments);
    for (auto& group : self->groups)
      if (!group.empty()) fail("missing copy wait: thread %u ends with copies it never waited for", self->index);
    self->state = State::kDone;
    block.live--;
    // Threads that have left do not hold up a barrier, as on the hardware.
    if (block.live > 0 && block.waiting == block.live) release_barrier();
    to_scheduler();
  }
}

Fiber* make_fiber() {
  auto* fiber = new Fiber;
  // A guard page below: a stack overflow faults instead of writing over the next fiber.
  auto* region = static_cast<unsigned char*>(
      mmap(nullptr, kStack + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (region == MAP_FAILED) fail("no memory for a fiber");
  mprotect(region, 4096, PROT_NONE);
  fiber->stack = region + 4096;
  make_context(fiber->context, fiber->stack, fiber_main);
#if defined(SIMT_TSAN)
  fiber->tsan = __tsan_create_fiber(0);
#endif
  return fiber;
}

// ---- warp collectives

Thread& lane_of(Thread& t, int lane) { return threads[t.index / kWarp * kWarp + lane]; }

float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h >> 15) << 31, exponent = (h >> 10) & 31, mantissa = h & 1023;
  float f;
  if (exponent == 0) {
    f = std::ldexp(float(mantissa), -24);
    return sign ? -f : f;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7F800000u | mantissa << 13 : (exponent + 112) << 23 | mantissa << 13);
  std::memcpy(&f, &bits, 4);
  return f;
}

float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

struct MmaIn {
  uint32_t a[4], b[2];
  float c[4];
};

// Lane 4g + t of mma.sync.m16n8k{16,8} holds, of A (row-major) and B (column-major), the elements the PTX manual lists:
// A registers 0..3 are rows g, g + 8, g, g + 8 and the first, first, second, second half of k; B's are column g.
template <class Element>
void multiply(Thread& t, int per_register, Element element) {
  const int depth = per_register * 8;
  double a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; lane++) {
    MmaIn in;
    move_bytes(&in, lane_of(t, lane).in, sizeof in);
    const int g = lane / 4, k = lane % 4 * per_register;
    for (int e = 0; e < per_register; e++) {
      for (int r = 0; r < 4; r++) a[g + (r & 1) * 8][k + e + (r >> 1) * depth / 2] = element(in.a[r], e);
      for (int r = 0; r < 2; r++) b[k + e + r * depth / 2][g] = element(in.b[r], e);
    }
  }
  for (int lane = 0; lane < kWarp; lane++) {
    MmaIn in;
    move_bytes(&in, lane_of(t, lane).in, sizeof in);
    float d[4];
    for (int r = 0; r < 4; r++) {
      const int row = lane / 4 + (r >> 1) * 8, column = lane % 4 * 2 + (r & 1);
      double sum = in.c[r];
      for (int k = 0; k < depth; k++) sum += a[row][k] * b[k][column];
      d[r] = float(sum);
    }
    move_bytes(lane_of(t, lane).out, d, sizeof d);
  }
}

struct ShuffleIn {
  uint32_t value;
  int32_t source;
};

void complete(Thread& t) {
  counts.collectives++;
  switch (t.kind) {
    case Collective::kShuffle:
      for (int lane = 0; lane < kWarp; lane++) {
        if (!(t.mask >> lane & 1)) continue;
        ShuffleIn mine, theirs;
        move_bytes(&mine, lane_of(t, lane).in, sizeof mine);
        if (mine.source < 0 || mine.source >= kWarp || !(t.mask >> mine.source & 1))
          fail("shuffle at line %d: lane %d reads lane %d, which takes no part", t.line, lane, mine.source);
        move_bytes(&theirs, lane_of(t, mine.source).in, sizeof theirs);
        move_bytes(lane_of(t, lane).out, &theirs.value, 4);
      }
      break;
    case Collective::kBallot: {
      uint32_t votes = 0;
      for (int lane = 0; lane < kWarp; lane++)
        if ((t.mask >> lane & 1) && lane_of(t, lane).in[0]) votes |= 1u << lane;
      for (int lane = 0; lane < kWarp; lane++)
        if (t.mask >> lane & 1) move_bytes(lane_of(t, lane).out, &votes, 4);
      break;
    }
    case Collective::kMatrixLoad:
      // Lane 8j + i has read row i of matrix j (16 bytes); in[16] says whether the matrices are transposed.
      for (int lane = 0; lane < kWarp; lane++) {
        for (int j = 0; j < 4; j++) {
          unsigned char* out = lane_of(t, lane).out + 4 * j;
          if (!lane_of(t, lane).in[16]) {
            move_bytes(out, lane_of(t, 8 * j + lane / 4).in + lane % 4 * 4, 4);
          } else {
            for (int e = 0; e < 2; e++)
              move_bytes(out + 2 * e, lane_of(t, 8 * j + lane % 4 * 2 + e).in + lane / 4 * 2, 2);
          }
        }
      }
      break;
    case Collective::kMmaF16:
      multiply(t, 2, [](uint32_t r, int e) { return half_to_float(uint16_t(r >> 16 * e)); });
      break;
    case Collective::kMmaBf16:
      multiply(t, 2, [](uint32_t r, int e) { return bits_to_float(r >> 16 * e << 16); });
      break;
    case Collective::kMmaTf32:
      // The tensor core ignores the low 13 bits.
      multiply(t, 1, [](uint32_t r, int) { return bits_to_float(r & ~0x1FFFu); });
      break;
  }
}

// Waits until all lanes of the mask are at this call.
void meet(uint32_t mask, int line) {
  Thread& t = *current;
  const int lane = int(t.index % kWarp), first = int(t.index) - lane;
  if (!(mask >> lane & 1)) fail("divergent collective: lane %d at line %d is not in its own mask", lane, line);
  for (int i = 0; i < kWarp; i++)
    if ((mask >> i & 1) && first + i >= int(threads.size()))
      fail("divergent collective: line %d names lane %d of warp %d, which does not exist", line, i, first / kWarp);
  t.mask = mask;
  t.line = line;
  t.state = State::kWarpWait;
  int& waiting = at_collectives[t.index / kWarp];
  const int wanted = __builtin_popcount(mask);
  waiting++;
  bool all = waiting >= wanted;  // who of them, and where, is worth a look only then
  for (int i = 0; i < kWarp && all; i++) {
    if (!(mask >> i & 1)) continue;
    Thread& other = threads[first + i];
    all = other.state == State::kWarpWait && other.line == line && other.kind == t.kind && other.mask == mask &&
          other.is_sync == t.is_sync;
  }
  if (all) {
    if (!t.is_sync) complete(t);
    waiting -= wanted;
    for (int i = 0; i < kWarp; i++)
      if (mask >> i & 1) threads[first + i].state = State::kReady;
  }
  to_scheduler();
}

void deadlock() {
  for (Thread& t : threads) {
    if (t.state != State::kWarpWait) continue;
    std::fprintf(stderr, "SIMT: divergent collective: in block %lld thread %u waits at line %d for lanes %08x\n",
                 static_cast<long long>(block.index), t.index, t.line, t.mask);
    for (unsigned i = t.index / kWarp * kWarp; i < t.index / kWarp * kWarp + kWarp && i < threads.size(); i++) {
      const char* where[] = {"ready", "at a collective", "at a barrier", "gone"};
      if (threads[i].state != State::kWarpWait || threads[i].line != t.line)
        fail("divergent collective: while thread %u is %s (line %d)", i, where[int(threads[i].state)], threads[i].line);
    }
  }
  fail("barrier not reached: %d of %d threads wait at it", block.waiting, block.live);
}

void schedule() {
  const int count = int(threads.size()), warps = (count + kWarp - 1) / kWarp;
  if (options.order == Order::kForward) {
    while (block.live > 0) {
      bool any = false;
      for (Thread& t : threads)
        if (t.state == State::kReady) run(t), any = true;
      if (!any) deadlock();
    }
    return;
  }
  std::vector<int> priority(warps), lanes(kWarp);
  for (int i = 0; i < warps; i++) priority[i] = i;
  for (int i = 0; i < kWarp; i++) lanes[i] = i;
  int barriers = -1;
  while (block.live > 0) {
    if (barriers != block.barriers) shuffle(priority), shuffle(lanes), barriers = block.barriers;
    bool any = false;
    for (int w : priority) {
      for (int lane : lanes) {
        const int i = w * kWarp + lane;
        if (i < count && threads[i].state == State::kReady) run(threads[i]), any = true;
      }
      if (any) break;  // the same warp again, until it can go no further
    }
    if (!any) deadlock();
  }
}

void land(const Copy& copy);

}  // namespace

// Provided by the instrumented side (simt_copy.cpp): a copy's reads and writes are the kernel's own accesses.
void perform_copy(void* shared, const void* global, int bytes, int valid);

namespace {
void land(const Copy& copy) { perform_copy(copy.shared, copy.global, copy.bytes, copy.valid); }
}  // namespace

void fail(const char* format, ...) {
  std::va_list list;
  va_start(list, format);
  std::fputs("SIMT: ", stderr);
  std::vfprintf(stderr, format, list);
  std::fputs("\n", stderr);
  std::fflush(stderr);
  va_end(list);
  std::_Exit(3);
}

unsigned thread_index() { return current->index; }
int64_t block_index() { return block.index; }
unsigned char* shared_memory() { return block.shared; }

void sync_block(int line) {
  Thread& t = *current;
  if (block.waiting > 0 && block.barrier_line != line)
    fail("divergent barrier: thread %u is at line %d, others at line %d", t.index, line, block.barrier_line);
  block.barrier_line = line;
  block.waiting++;
  t.state = State::kBlockWait;
  t.line = line;
  const int parity = t.barrier_parity;
  (void)parity;
  t.barrier_parity ^= 1;
#if defined(SIMT_TSAN)
  // Two addresses in turn: a thread already at the next barrier must not be ordered before one still leaving this one.
  __tsan_release(&block_sync[parity]);
#endif
  if (block.waiting == block.live) release_barrier();
  to_scheduler();
#if defined(SIMT_TSAN)
  __tsan_acquire(&block_sync[parity]);
#endif
}

void sync_warp(uint32_t mask, int line) {
  Thread& t = *current;
  t.is_sync = true;
  const int parity = t.warp_parity;
  (void)parity;
  t.warp_parity ^= 1;
#if defined(SIMT_TSAN)
  __tsan_release(&warp_sync[t.index / kWarp][parity]);
#endif
  meet(mask, line);
#if defined(SIMT_TSAN)
  __tsan_acquire(&warp_sync[t.index / kWarp][parity]);
#endif
}

void collective(Collective kind, uint32_t mask, int line, const void* in, int in_bytes, void* out, int out_bytes) {
  Thread& t = *current;
  t.kind = kind;
  t.is_sync = false;
  move_bytes(t.in, in, in_bytes);
  meet(mask, line);
  move_bytes(out, t.out, out_bytes);
}

void copy_async(void* shared, const void* global, int bytes, int valid) {
  const auto to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  if (to % bytes || (valid && from % bytes)) fail("misaligned copy of %d bytes by thread %u", bytes, current->index);
  counts.copies++;
  const Copy copy{shared, global, bytes, valid};
  if (options.copies == Copies::kEager) land(copy);
  if (current->groups.empty()) current->groups.emplace_back();
  current->groups.back().push_back(copy);
}

void copy_commit() {
  if (current->groups.empty()) current->groups.emplace_back();
  current->groups.emplace_back();
}

void copy_wait(int pending_groups) {
  auto& groups = current->groups;
  // The open group at the end is not waited for.
  while (int(groups.size()) > pending_groups + 1) {
    if (options.copies == Copies::kLazy)
      for (const Copy& copy : groups.front()) land(copy);
    groups.erase(groups.begin());
  }
}

void launch(Entry entry, const void* arguments, int64_t blocks, int thread_count, size_t shared_bytes) {
  if (shared_bytes > kShared) fail("%zu bytes of shared memory asked for", shared_bytes);
  if (blocks < 1 || blocks > 0x7FFFFFFF) fail("a grid of %lld blocks", static_cast<long long>(blocks));
  if (thread_count < 1 || thread_count > 1024 || thread_count % kWarp) fail("a block of %d threads", thread_count);
  counts.launches++;
  launch_now = {entry, arguments, thread_count, shared_bytes};
  random_bits.seed(options.seed * 7919 + counts.launches);
#if defined(SIMT_TSAN)
  main_tsan = __tsan_get_current_fiber();
#endif
  while (int(fibers.size()) < thread_count) fibers.push_back(make_fiber());
  threads.resize(thread_count);
  at_collectives.assign(thread_count / kWarp, 0);

  std::vector<int64_t> sequence(blocks);
  for (int64_t i = 0; i < blocks; i++) sequence[i] = i;
  if (options.order == Order::kSkew && !options.last_blocks) shuffle(sequence);

  // What follows a block's own shared memory is a guard.
  const size_t allocated = (shared_bytes + 4096 + 1023) / 1024 * 1024;
  std::vector<void*> used;

  for (int64_t nth = options.last_blocks ? std::max<int64_t>(0, blocks - options.last_blocks) : 0; nth < blocks; nth++) {
    counts.blocks++;
    // Fresh memory each time: to ThreadSanitizer a block's accesses to it have no history.
    auto* memory = static_cast<unsigned char*>(std::aligned_alloc(1024, allocated));
    block = Block{sequence[nth], memory, thread_count, 0, 0, 0};
    // 0xFF everywhere is NaN in every floating-point format, −1 as an integer.
    fill(memory, 0, shared_bytes, 0xFF);
    fill(memory, shared_bytes, allocated, kCanary);
#if defined(SIMT_ASAN)
    __asan_poison_memory_region(memory + shared_bytes, allocated - shared_bytes);
#endif
    for (int i = 0; i < thread_count; i++) {
      Thread& t = threads[i];
      t.index = unsigned(i);
      t.state = State::kReady;
      t.groups.clear();
      t.barrier_parity = t.warp_parity = 0;
      // Another fiber for the same thread of the next block, so that ThreadSanitizer sees their races too.
      t.fiber = fibers[(i + nth) % thread_count];
    }
#if defined(SIMT_TSAN)
    __tsan_release(&block_start);
#endif
    schedule();
#if defined(SIMT_ASAN)
    __asan_unpoison_memory_region(memory + shared_bytes, allocated - shared_bytes);
#endif
    for (size_t i = shared_bytes; i < allocated; i++)
      if (memory[i] != kCanary) fail("write past shared memory: byte %zu of %zu", i, shared_bytes);
    // Freed only when the launch is over: freeing is a write, which would order or race with the blocks to come.
    used.push_back(memory);
    if (!kKeepsMemory) std::free(memory), used.clear();
  }
#if defined(SIMT_TSAN)
  // The launch is over: the host may read what the blocks wrote.
  for (Fiber* fiber : fibers) {
    __tsan_switch_to_fiber(fiber->tsan, __tsan_switch_to_fiber_no_sync);
    __tsan_release(&block_start);
    __tsan_switch_to_fiber(main_tsan, __tsan_switch_to_fiber_no_sync);
  }
  __tsan_acquire(&block_start);
#endif
  for (void* memory : used) std::free(memory);
}

}  // namespace simt
