#include "block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>

namespace hgfast::cuda::emulator {
namespace {

// A pointer, so that it finds room in the static block of a process that loads this late.
__attribute__((tls_model("initial-exec"))) thread_local Block* current_block = nullptr;

// A set bit of a mask, the same for the same random number.
int pick(uint32_t mask, uint32_t random) {
  const uint32_t turn = random & 31;
  const uint32_t turned = mask >> turn | mask << (-turn & 31);
  return static_cast<int>((__builtin_ctz(turned) + turn) & 31);
}

// "0-31, 40": sorted numbers, those in a row drawn together.
std::string ranges(const std::vector<int>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    if (!text.empty()) text += ", ";
    text += std::to_string(numbers[i]);
    if (last > i) text += "-" + std::to_string(numbers[last]);
    i = last + 1;
  }
  return text;
}

// How many wavefronts eight rows of 16 bytes take, beyond one.
int conflicts(const uint32_t* rows) {
  int most = 1;
  for (uint32_t group = 0; group < 8; ++group) {
    int different = 0;
    for (int i = 0; i < 8; ++i)
      different += (rows[i] >> 4 & 7) == group && std::find(rows, rows + i, rows[i]) == rows + i;
    most = std::max(most, different);
  }
  return most - 1;
}

// Literals of one name mostly share their address.
bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

}  // namespace

Block& Block::current() { return *current_block; }

// ---- A block's life
// ------------------------------------------------------------------------------

void Block::start(const Context& context, int64_t index) {
  launch_ = &context.launch;
  global_ = &context.memory;
  cache_ = context.cache;
  index_ = index;
  threads_ = launch_->threads;
  thread_ = 0;
  ended_ = 0;
  at_barrier_ = 0;
  failed_ = false;
  last_array_ = 0;
  // Of the seed and the block alone, so that it is all the same which host thread runs the block.
  random_ = context.seed * 0x9e3779b97f4a7c15u;
  if (random_) random_ = (random_ ^ static_cast<uint64_t>(index)) * 0xbf58476d1ce4e5b9u | 1;

  const int warps = threads_ / kLanes;
  shared_.begin_block(static_cast<uint32_t>(launch_->shared_bytes));
  stacks_.reserve(threads_);
  if (static_cast<int>(thread_states_.size()) < threads_) thread_states_.resize(threads_);
  if (static_cast<int>(warps_.size()) < warps) warps_.resize(warps, Warp{});
  ready_warps_ = warps == 32 ? ~0u : (1u << warps) - 1;
  for (int i = 0; i < warps; ++i) {
    warps_[i].ready = ~0u;
    warps_[i].arrived = 0;
  }
  for (int i = 0; i < threads_; ++i) {
    Thread& thread = thread_states_[i];
    stacks_.start(thread.fiber, i, thread_main);
    thread.waits_in = nullptr;
    thread.copies.clear();
    thread.delivered = 0;
    thread.groups = 0;
  }
}

bool Block::run(const Context& context, int64_t index) {
  start(context, index);
  Block* const outer = current_block;
  current_block = this;
  thread_ = next_thread();
  scheduler_.switch_to(thread_states_[thread_].fiber);
  current_block = outer;
  return !failed_;
}

void Block::thread_main() {
  Block& block = current();
  block.launch_->run_thread(block.launch_->kernel);
  Thread& thread = block.thread_states_[block.thread_];
  if (thread.delivered < thread.copies.size()) {
    const Place place = place_of(thread.copies[thread.delivered].by);
    block.fail("copy never waited for", block.thread_,
               "copy_async at %s:%d is under way when its thread ends, to byte offset %u of shared "
               "memory",
               place.file, place.line, thread.copies[thread.delivered].to - SharedMemory::kBase);
  }
  ++block.ended_;
  block.warps_[block.thread_ / kLanes].ready &= ~(1u << block.thread_ % kLanes);
  block.switch_to_next();
  __builtin_unreachable();
}

Counters Block::take_counters() {
  Counters taken;
  std::swap(taken, counters_);
  return taken;
}

// ---- Taking turns
// --------------------------------------------------------------------------------

uint32_t Block::random() {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return static_cast<uint32_t>(random_ >> 32);
}

// One warp goes on as long as it can, since its lanes' stacks are in the cache; with a seed, other
// warps come in between. -1: nobody can go on.
int Block::next_thread() {
  int warp = thread_ / kLanes;
  const uint32_t chance = random_ ? random() : 0;
  if (!warps_[warp].ready || chance >> 28 == 1) {
    if (!warps_[warp].ready) ready_warps_ &= ~(1u << warp);
    if (!ready_warps_) return -1;
    warp = random_ ? pick(ready_warps_, chance >> 8) : __builtin_ctz(ready_warps_);
  }
  return warp * kLanes + pick(warps_[warp].ready, chance);
}

void Block::switch_to_next() {
  const int next = next_thread();
  if (next < 0) {
    if (ended_ < threads_) deadlock();
    leave();
  }
  Fiber& mine = thread_states_[thread_].fiber;
  thread_ = next;
  mine.switch_to(thread_states_[next].fiber);
}

void Block::leave() {
  thread_states_[thread_].fiber.switch_to(scheduler_);
  __builtin_unreachable();
}

void Block::wait(const char* function, Place place) {
  Thread& thread = thread_states_[thread_];
  thread.waits_in = function;
  thread.waits_at = place;
  warps_[thread_ / kLanes].ready &= ~(1u << thread_ % kLanes);
  switch_to_next();
  thread.waits_in = nullptr;
}

void Block::wake(int warp, uint32_t lanes) {
  warps_[warp].ready |= lanes;
  ready_warps_ |= 1u << warp;
}

void Block::sync_block(Place place) {
  if (at_barrier_ == 0) {
    barrier_ = place;
  } else if (!same(barrier_, place)) {
    fail("divergent barrier", thread_,
         "sync_block at %s:%d, while other threads of the block wait in sync_block at %s:%d",
         place.file, place.line, barrier_.file, barrier_.line);
  }
  if (++at_barrier_ < threads_) return wait("sync_block", place);
  at_barrier_ = 0;
  shared_.block_barrier();
  ++counters_.block_barriers;
  for (int warp = 0; warp < threads_ / kLanes; ++warp) wake(warp, ~0u);
}

void Block::collective(const char* function, Place place, void* argument, Compute compute) {
  Warp& warp = warps_[thread_ / kLanes];
  if (!warp.arrived) {
    warp.function = function;
    warp.place = place;
  } else if (!same(warp.function, function) || !emulator::same(warp.place, place)) {
    fail("divergent warp", thread_,
         "%s at %s:%d, while other lanes of its warp wait in %s at %s:%d", function, place.file,
         place.line, warp.function, warp.place.file, warp.place.line);
  }
  warp.arguments[thread_ % kLanes] = argument;
  warp.arrived |= 1u << thread_ % kLanes;
  if (warp.arrived != ~0u) return wait(function, place);
  warp.arrived = 0;
  compute(*this, place, warp.arguments);
  wake(thread_ / kLanes, ~0u);
}

void Block::sync_warp(Place place) {
  collective("sync_warp", place, nullptr, [](Block& block, Place, void* const(&)[kLanes]) {
    ++block.warps_[block.thread_ / kLanes].clock;
    ++block.counters_.warp_barriers;
  });
}

// ---- Reports
// -------------------------------------------------------------------------------------

void Block::fail(const char* kind, int thread, const char* format, ...) {
  const int head = std::snprintf(
      report_, sizeof report_, "%s: kernel %s, block %lld, thread %d (warp %d, lane %d): ", kind,
      launch_->name, static_cast<long long>(index_), thread, thread / kLanes, thread % kLanes);
  if (head > 0 && head < static_cast<int>(sizeof report_)) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(report_ + head, sizeof report_ - head, format, arguments);
    va_end(arguments);
  }
  failed_ = true;
  leave();
}

void Block::deadlock() {
  char text[1536];
  int first = -1;
  {  // nothing that owns memory may be alive when a fiber is left
    std::string all;
    std::vector<bool> told(threads_);
    for (int i = 0; i < threads_; ++i) {
      const Thread& one = thread_states_[i];
      if (!one.waits_in || told[i]) continue;
      if (first < 0) first = i;
      std::vector<int> alike;
      for (int j = i; j < threads_; ++j) {
        const Thread& other = thread_states_[j];
        if (!other.waits_in || !same(one.waits_in, other.waits_in) ||
            !same(one.waits_at, other.waits_at))
          continue;
        told[j] = true;
        alike.push_back(j);
      }
      all += (all.empty() ? "threads " : "; threads ") + ranges(alike) + " wait in " +
             one.waits_in + " at " + one.waits_at.file + ":" + std::to_string(one.waits_at.line);
    }
    std::vector<int> ended;
    for (int i = 0; i < threads_; ++i)
      if (!thread_states_[i].waits_in) ended.push_back(i);
    if (!ended.empty()) all += "; threads " + ranges(ended) + " have ended";
    std::snprintf(text, sizeof text, "%s", all.c_str());
  }
  fail("deadlock", first, "%s", text);
}

Stamp Block::stamp(int thread, Place place) {
  if (place.file != last_file_) {
    last_file_ = place.file;
    last_file_number_ = file_number(place.file);
  }
  return static_cast<uint32_t>(thread) << 22 | last_file_number_ << 16 |
         static_cast<uint32_t>(std::min(place.line, 65535));
}

// ---- Shared memory
// -------------------------------------------------------------------------------

void Block::check_shared(const char* function, uint32_t address, uint32_t bytes, uint32_t alignment,
                         int thread, Place place) {
  const auto offset = static_cast<long long>(address) - SharedMemory::kBase;
  if (!shared_.contains(address, bytes))
    fail("out of bounds", thread,
         "%s at %s:%d touches %u bytes at byte offset %lld of shared memory, which has %u bytes",
         function, place.file, place.line, bytes, offset, shared_.bytes());
  if (address % alignment)
    fail("misaligned", thread,
         "%s at %s:%d touches byte offset %lld of shared memory, not a multiple of %u", function,
         place.file, place.line, offset, alignment);
}

void Block::fail_shared(Fault fault, const char* function, bool writes, uint32_t address,
                        int thread, Place place) {
  const uint32_t offset = address - SharedMemory::kBase;
  const char* const does = writes ? "writes" : "reads";
  if (fault == Fault::uninitialised)
    fail("uninitialised", thread,
         "%s at %s:%d reads byte offset %u of shared memory, which no thread of the block has "
         "written yet",
         function, place.file, place.line, offset);
  const Stamp other = shared_.other();
  const Place there = place_of(other);
  if (fault == Fault::in_flight)
    fail("copy in flight", thread,
         "%s at %s:%d %s byte offset %u of shared memory, while the copy_async of thread %d at "
         "%s:%d to it has not been waited for",
         function, place.file, place.line, does, offset, thread_of(other), there.file, there.line);
  fail("race", thread,
       "%s at %s:%d %s byte offset %u of shared memory, which thread %d %s at %s:%d, with no "
       "barrier between them",
       function, place.file, place.line, does, offset, thread_of(other),
       fault == Fault::after_read ? "read" : "wrote", there.file, there.line);
}

void Block::load_shared(void* to, uint32_t from, uint32_t bytes, Place place) {
  check_shared("load_shared", from, bytes, bytes, thread_, place);
  const Access access = this->access(thread_, place);
  for (uint32_t i = 0; i < bytes; i += 4)
    if (const Fault fault = shared_.read(from + i, access); fault != Fault::none)
      fail_shared(fault, "load_shared", false, from + i, thread_, place);
  std::memcpy(to, shared_.at(from), bytes);
  counters_.shared_bytes_loaded += bytes;
}

void Block::store_shared(uint32_t to, const void* from, uint32_t bytes, Place place) {
  check_shared("store_shared", to, bytes, bytes, thread_, place);
  const Access access = this->access(thread_, place);
  for (uint32_t i = 0; i < bytes; i += 4)
    if (const Fault fault = shared_.write(to + i, access); fault != Fault::none)
      fail_shared(fault, "store_shared", true, to + i, thread_, place);
  std::memcpy(shared_.at(to), from, bytes);
  counters_.shared_bytes_stored += bytes;
}

void Block::move_matrices(Direction direction, const uint32_t (&rows)[kLanes],
                          uint32_t* const (&fragments)[kLanes], Place place) {
  const bool store = direction == Direction::store;
  const char* const function = store ? "store_matrices" : "load_matrices";
  const int first_thread = thread_ / kLanes * kLanes;
  const Access first = access(first_thread, place);
  for (int lane = 0; lane < kLanes; ++lane) {
    check_shared(function, rows[lane], 16, 16, first_thread + lane, place);
    const int matrix = lane / 8;
    for (int i = 0; i < 4; ++i) {
      // A word belongs to the lane that gets or gives it, whichever lane gave the address: the lane
      // that wrote a row on its own needs a barrier before the others get parts of it.
      const int owner = lane % 8 * 4 + i;
      const Access access = first.of_lane(owner);
      const uint32_t address = rows[lane] + 4 * i;
      const Fault fault = store ? shared_.write(address, access) : shared_.read(address, access);
      if (fault != Fault::none)
        fail_shared(fault, function, store, address, first_thread + owner, place);
      uint32_t* const element = fragments[owner] + matrix;
      if (store)
        std::memcpy(shared_.at(address), element, 4);
      else
        std::memcpy(element, shared_.at(address), 4);
    }
  }
  ++(store ? counters_.store_matrices : counters_.load_matrices);
  // Rows are moved eight at a time; different rows on the same four of the 32 banks wait.
  for (int phase = 0; phase < kLanes; phase += 8) {
    uint32_t groups = 0;
    for (int i = 0; i < 8; ++i) groups |= 1u << (rows[phase + i] >> 4 & 7);
    if (groups != 0xff) counters_.matrix_conflicts += conflicts(rows + phase);
  }
}

// ---- Copies
// --------------------------------------------------------------------------------------

void Block::copy_async(uint32_t to, const void* from, bool valid, Place place) {
  check_shared("copy_async", to, 16, 16, thread_, place);
  if (valid) {
    check_global("copy_async", from, 16, false, place);
    counters_.global_bytes_loaded += 16;
    if (cache_) cache_->read(from, 16);
  }
  counters_.async_bytes += 16;
  const Access access = this->access(thread_, place);
  for (int i = 0; i < 16; i += 4)
    if (const Fault fault = shared_.begin_copy(to + i, access); fault != Fault::none)
      fail_shared(fault, "copy_async", true, to + i, thread_, place);
  std::memset(shared_.at(to), 0xff, 16);
  Thread& thread = thread_states_[thread_];
  thread.copies.push_back({to, valid ? from : nullptr, access.by, thread.groups});
}

void Block::commit_copies() { ++thread_states_[thread_].groups; }

void Block::wait_copies(int pending) {
  Thread& thread = thread_states_[thread_];
  while (thread.delivered < thread.copies.size()) {
    const Copy& copy = thread.copies[thread.delivered];
    // Groups from thread.groups on are not closed yet, and no wait covers them.
    if (copy.group + static_cast<uint32_t>(pending) >= thread.groups) return;
    deliver(copy);
    ++thread.delivered;
  }
  thread.copies.clear();
  thread.delivered = 0;
}

void Block::deliver(const Copy& copy) {
  if (copy.from)
    std::memcpy(shared_.at(copy.to), copy.from, 16);
  else
    std::memset(shared_.at(copy.to), 0, 16);
  const Access access{copy.by, warps_[thread_ / kLanes].clock};
  for (int i = 0; i < 16; i += 4) shared_.end_copy(copy.to + i, access);
}

// ---- Global memory
// -------------------------------------------------------------------------------

int Block::check_global(const char* function, const void* address, uint32_t bytes, bool writes,
                        Place place) {
  const int array = global_->find(address, bytes, last_array_);
  if (array < 0) {
    char where[256];
    std::snprintf(where, sizeof where, "%s", global_->describe(address, bytes).c_str());
    fail("out of bounds", thread_, "%s at %s:%d touches %u bytes of global memory in no array: %s",
         function, place.file, place.line, bytes, where);
  }
  last_array_ = array;
  const Array& found = (*global_)[array];
  const auto offset = static_cast<long long>(static_cast<const char*>(address) - found.begin);
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail(
        "misaligned", thread_,
        "%s at %s:%d touches byte offset %lld of array %d, at an address that is no multiple of %u",
        function, place.file, place.line, offset, array, bytes);
  if (writes != found.written)
    fail(writes ? "write to an input" : "read of an output", thread_,
         "%s at %s:%d touches byte offset %lld of array %d", function, place.file, place.line,
         offset, array);
  return array;
}

void Block::load_global(void* to, const void* from, uint32_t bytes, Place place) {
  check_global("load_global", from, bytes, false, place);
  std::memcpy(to, from, bytes);
  counters_.global_bytes_loaded += bytes;
  if (cache_) cache_->read(from, bytes);
}

void Block::store_global(void* to, const void* from, uint32_t bytes, Place place) {
  const int array = check_global("store_global", to, bytes, true, place);
  const Stamp by = stamp(thread_, place);
  for (uint32_t i = 0; i < bytes; i += 4) {
    char* const address = static_cast<char*>(to) + i;
    const GlobalMemory::Writer before = global_->write_word(array, address, index_, by);
    if (before.block < 0) continue;
    const Place there = place_of(before.by);
    fail("written twice", thread_,
         "store_global at %s:%d writes byte offset %lld of array %d, which block %lld, thread %d "
         "wrote at %s:%d",
         place.file, place.line, static_cast<long long>(address - (*global_)[array].begin), array,
         static_cast<long long>(before.block), thread_of(before.by), there.file, there.line);
  }
  std::memcpy(to, from, bytes);
  counters_.global_bytes_stored += bytes;
  if (cache_) cache_->write(to, bytes);
}

}  // namespace hgfast::cuda::emulator
