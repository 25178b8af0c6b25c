#include "block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>

#include "cluster.h"

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
void Block::set_current(Block* block) { current_block = block; }

// ---- A block's life
// ------------------------------------------------------------------------------

void Block::start(Cluster& cluster, const Launch& launch, GlobalMemory& memory, Cache* cache,
                  uint64_t seed, int64_t number, int rank) {
  cluster_ = &cluster;
  launch_ = &launch;
  global_ = &memory;
  cache_ = cache;
  index_ = number * launch.cluster + rank;
  rank_ = rank;
  threads_ = launch_->threads;
  thread_ = 0;
  ended_ = 0;
  at_barrier_ = 0;
  gathered_ = {};
  for (SomeBarrier& some : some_) some = {};
  barriers_.clear();
  remote_.clear();
  failed_ = false;
  last_array_ = 0;
  // Of the seed and the block alone, so that it is all the same which host thread runs the block.
  random_ = seed * 0x9e3779b97f4a7c15u;
  if (random_) random_ = (random_ ^ static_cast<uint64_t>(index_)) * 0xbf58476d1ce4e5b9u | 1;

  const int warps = threads_ / kLanes;
  shared_.begin_block(static_cast<uint32_t>(launch_->shared_bytes), agent(0),
                      static_cast<uint32_t>(threads_));
  stacks_.reserve(threads_);
  if (static_cast<int>(thread_states_.size()) < threads_) thread_states_.resize(threads_);
  if (static_cast<int>(warps_.size()) < warps) warps_.resize(warps);
  issued_.assign((warps + 3) / 4, {});
  changes_.assign((warps + 3) / 4, {});
  ready_warps_ = warps == 32 ? ~0u : (1u << warps) - 1;
  free_registers_ = 0;
  for (int i = 0; i < warps; ++i) {
    Warp& warp = warps_[i];
    warp.ready = ~0u;
    warp.arrived = 0;
    warp.products_begun = false;
    warp.begins = 0;
    warp.changes = 0;
    warp.product_groups = 0;
    warp.products = 0;
    warp.pending.clear();
    warp.sums.clear();
    warp.registers = launch_->registers;
    warp.wanted = 0;
  }
  for (int i = 0; i < threads_; ++i) {
    Thread& thread = thread_states_[i];
    stacks_.start(thread.fiber, i, thread_main);
    thread.waits_in = nullptr;
    thread.copies.clear();
    thread.delivered = 0;
    thread.groups = 0;
    thread.stores.clear();
    thread.store_groups = 0;
    thread.store_agent = -1;
    thread.clock = Clocks::kNothing;
    thread.time = 1;
    thread.fenced = 0;
    thread.at_gate = false;
    thread.in_gate = false;
    thread.stored_remotely = false;
  }
}

void Block::thread_main() {
  {
    Block& block = current();
    block.launch_->run_thread(block.launch_->kernel);
  }
  current().end_thread();
}

void Block::end_thread() {
  Thread& thread = thread_states_[thread_];
  if (thread.delivered < thread.copies.size()) {
    const Place place = place_of(thread.copies[thread.delivered].by);
    fail(
        "copy never waited for", thread_,
        "copy_async at %s:%d is under way when its thread ends, to byte offset %u of shared memory",
        place.file, place.line, thread.copies[thread.delivered].to - SharedMemory::kBase);
  }
  if (!thread.stores.empty()) {
    const Place place = place_of(thread.stores.front().by);
    fail("copy never waited for", thread_,
         "store_tile at %s:%d is under way when its thread ends, from byte offset %u of shared "
         "memory",
         place.file, place.line, thread.stores.front().from - SharedMemory::kBase);
  }
  const Warp& warp = warps_[thread_ / kLanes];
  if (!warp.pending.empty())
    fail("products never waited for", thread_,
         "add_product at %s:%d is under way when its thread ends", warp.pending.front().place.file,
         warp.pending.front().place.line);
  if (++ended_ == threads_) {
    check_warpgroups();
    check_nobody_comes();
  }
  warps_[thread_ / kLanes].ready &= ~(1u << thread_ % kLanes);
  switch_to_next();
  __builtin_unreachable();
}

// What all warps of a warpgroup do together, none may leave out.
void Block::check_warpgroups() {
  for (int i = 0; i < threads_ / kLanes; ++i) {
    const Warp& warp = warps_[i];
    const auto& issued = issued_[i / 4];
    const auto& changes = changes_[i / 4];
    if (warp.products < issued.size())
      fail("divergent products", i * kLanes,
           "its warp leaves out a product of its warpgroup, that of %s:%d",
           issued[warp.products].place.file, issued[warp.products].place.line);
    if (warp.changes < changes.size())
      fail("divergent registers", i * kLanes,
           "its warp leaves out a change of its warpgroup's registers, that of %s:%d",
           changes[warp.changes].place.file, changes[warp.changes].place.line);
  }
}

// Behind a block's end, its shared memory is another's.
void Block::check_nobody_comes() {
  const auto knows = [&](uint32_t agent, uint32_t time) {
    for (int i = 0; i < threads_; ++i)
      if (cluster_->clocks().seen(thread_states_[i].clock)[agent] >= time) return true;
    return false;
  };
  for (const Remote& remote : remote_) {
    if (knows(remote.agent, remote.time)) continue;
    const Place place = place_of(remote.by);
    fail("ended too early", thread_,
         "its block ends, and nothing says that %s at %s:%d, by thread %d of block %lld, came "
         "before: that touches this block's shared memory",
         remote.function, place.file, place.line, thread_of(remote.by),
         static_cast<long long>(index_ - rank_ + cluster_->rank_of(remote.agent)));
  }
  // Whether a copy has come already is a matter of luck; whether somebody waited for it is not.
  const auto fail_copy = [&](uint32_t to, Stamp by) {
    const Place place = place_of(by);
    fail("ended too early", thread_,
         "its block ends, and none of its threads has waited for the copy of %s:%d to byte offset "
         "%u of its shared memory",
         place.file, place.line, to - SharedMemory::kBase);
  };
  for (const BarrierState& barrier : barriers_)
    if (barrier.brought_in && !knows(barrier.agent, barrier.brought_in))
      fail_copy(barrier.brought_to, barrier.brought_by);
  if (const Cluster::Copy* copy = cluster_->copy_to(rank_)) fail_copy(copy->to, copy->by);
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

bool Block::asks_for_a_turn() { return random_ && random() >> 28 == 1; }

void Block::switch_to_next() {
  int next = -1;
  Block* const block = cluster_->choose(*this, next);
  if (!block) {
    if (!cluster_->all_ended()) deadlock();
    leave();
  }
  Fiber& mine = thread_states_[thread_].fiber;
  block->thread_ = next;
  current_block = block;
  Fiber& chosen = block->thread_states_[next].fiber;
  if (&chosen != &mine) mine.switch_to(chosen);  // a copy that came just now may have woken it
}

void Block::leave() {
  thread_states_[thread_].fiber.switch_to(cluster_->scheduler);
  __builtin_unreachable();
}

void Block::wait(const char* function, Place place, int64_t barrier) {
  Thread& thread = thread_states_[thread_];
  thread.waits_in = function;
  thread.waits_at = place;
  thread.waits_for = barrier;
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
  gather(gathered_, thread_);
  if (++at_barrier_ < threads_) return wait("sync_block", place);
  at_barrier_ = 0;
  const int clock = cluster_->clocks().take(gathered_);
  for (int i = 0; i < threads_; ++i) {
    cluster_->clocks().keep(clock);
    learn(thread_states_[i], clock);
  }
  cluster_->clocks().give_back(clock);
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
    Clocks::Gathered& gathered = block.warp_gathered_;
    const int first = block.thread_ / kLanes * kLanes;
    for (int lane = 0; lane < kLanes; ++lane) block.gather(gathered, first + lane);
    const int clock = block.cluster_->clocks().take(gathered);
    for (int lane = 0; lane < kLanes; ++lane) {
      block.cluster_->clocks().keep(clock);
      block.learn(block.thread_states_[first + lane], clock);
    }
    block.cluster_->clocks().give_back(clock);
    ++block.counters_.warp_barriers;
  });
}

// ---- Reports
// -------------------------------------------------------------------------------------

void Block::fail(const char* kind, int thread, const char* format, ...) {
  char* const report = cluster_->report_buffer();
  const int head = std::snprintf(
      report, Cluster::kReport, "%s: kernel %s, block %lld, thread %d (warp %d, lane %d): ", kind,
      launch_->name, static_cast<long long>(index_), thread, thread / kLanes, thread % kLanes);
  if (head > 0 && head < static_cast<int>(Cluster::kReport)) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(report + head, Cluster::kReport - head, format, arguments);
    va_end(arguments);
  }
  failed_ = true;
  leave();
}

void Block::deadlock() {
  char text[3072];
  Block* first = nullptr;
  {  // nothing that owns memory may be alive when a fiber is left
    std::string all;
    for (int rank = 0; rank < cluster_->size(); ++rank) {
      Block& block = cluster_->block(rank);
      if (block.ended_ == block.threads_) continue;
      if (!first) first = &block;
      if (!all.empty()) all += "; ";
      if (cluster_->size() > 1) all += "in block " + std::to_string(block.index_) + " ";
      block.describe_waiting(all);
    }
    std::snprintf(text, sizeof text, "%s", all.c_str());
  }
  int thread = 0;
  while (!first->thread_states_[thread].waits_in) ++thread;
  first->fail("deadlock", thread, "%s", text);
}

void Block::describe_waiting(std::string& all) {
  std::vector<bool> told(threads_);
  std::vector<int> ended;
  bool begun = false;
  for (int i = 0; i < threads_; ++i) {
    const Thread& one = thread_states_[i];
    if (!one.waits_in) ended.push_back(i);
    if (!one.waits_in || told[i]) continue;
    std::vector<int> alike;
    for (int j = i; j < threads_; ++j) {
      const Thread& other = thread_states_[j];
      if (!other.waits_in || !same(one.waits_in, other.waits_in) ||
          !same(one.waits_at, other.waits_at) || one.waits_for != other.waits_for)
        continue;
      told[j] = true;
      alike.push_back(j);
    }
    all += (begun ? "; threads " : "threads ") + ranges(alike) + " wait in " + one.waits_in +
           " at " + one.waits_at.file + ":" + std::to_string(one.waits_at.line);
    begun = true;
    for (const BarrierState& barrier : barriers_) {
      if (one.waits_for != barrier.address) continue;
      all += " for the barrier at byte offset " +
             std::to_string(barrier.address - SharedMemory::kBase) + ", which lacks " +
             std::to_string(barrier.missing) + " of " + std::to_string(barrier.arrivals) +
             " arrivals and " + std::to_string(std::max<int64_t>(barrier.bytes, 0)) +
             " bytes in phase " + std::to_string(barrier.phase);
      if (barrier.bytes < 0)
        all += ", to which " + std::to_string(-barrier.bytes) + " bytes too many came";
    }
    if (warps_[i / kLanes].wanted)
      all += " for " + std::to_string(warps_[i / kLanes].wanted) + " registers a thread, and " +
             std::to_string(free_registers_) + " are left for the whole block";
  }
  if (!ended.empty()) all += "; threads " + ranges(ended) + " have ended";
}

Stamp Block::stamp(int thread, Place place) {
  if (place.file != last_file_) {
    last_file_ = place.file;
    last_file_number_ = file_number(place.file);
  }
  return static_cast<uint32_t>(thread) << 22 | last_file_number_ << 16 |
         static_cast<uint32_t>(std::min(place.line, 65535));
}

uint32_t Block::agent(int thread) const {
  return static_cast<uint32_t>(cluster_->agent_of(rank_, thread));
}

Asker Block::asker(int thread, Place place) {
  const Thread& state = thread_states_[thread];
  const Clocks& clocks = cluster_->clocks();
  return {
      clocks.seen(state.clock), clocks.fenced(state.clock), agent(thread), state.time, state.fenced,
      stamp(thread, place)};
}

void Block::learn(Thread& thread, int clock) {
  cluster_->clocks().give_back(thread.clock);
  thread.clock = clock;
}

void Block::gather(Clocks::Gathered& gathered, int number) {
  Thread& thread = thread_states_[number];
  const auto me = static_cast<int>(agent(number));
  cluster_->clocks().add(gathered, thread.clock, me, thread.time, thread.fenced);
  ++thread.time;
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
                        int thread, Place place, const Block& memory) {
  const uint32_t offset = address - SharedMemory::kBase;
  const char* const does = writes ? "writes" : "reads";
  char whose[48] = "";
  if (&memory != this)
    std::snprintf(whose, sizeof whose, " of block %lld", static_cast<long long>(memory.index_));
  if (fault == Fault::uninitialised)
    fail("uninitialised", thread,
         "%s at %s:%d reads byte offset %u of shared memory, which no thread of the block has "
         "written yet",
         function, place.file, place.line, offset);
  if (fault == Fault::barrier)
    fail("barrier touched", thread, "%s at %s:%d %s byte offset %u of shared memory%s, a barrier",
         function, place.file, place.line, does, offset, whose);
  const Stamp other = memory.shared_.other();
  const Place there = place_of(other);
  if (fault == Fault::in_flight)
    fail("copy in flight", thread,
         "%s at %s:%d %s byte offset %u of shared memory%s, while the copy of thread %d at %s:%d "
         "to it has not been waited for",
         function, place.file, place.line, does, offset, whose, thread_of(other), there.file,
         there.line);
  char of_block[48] = "";
  const auto agent = static_cast<int>(memory.shared_.other_agent());
  if (agent < cluster_->agent_of(cluster_->size(), 0) && cluster_->rank_of(agent) != rank_)
    std::snprintf(of_block, sizeof of_block, " of block %lld",
                  static_cast<long long>(index_ - rank_ + cluster_->rank_of(agent)));
  if (fault == Fault::not_fenced)
    fail("not fenced", thread,
         "%s at %s:%d %s byte offset %u of shared memory, which thread %d%s wrote at %s:%d, "
         "with no fence_async of that thread between them",
         function, place.file, place.line, does, offset, thread_of(other), of_block, there.file,
         there.line);
  fail("race", thread,
       "%s at %s:%d %s byte offset %u of shared memory%s, which thread %d%s %s at %s:%d, with no "
       "barrier between them",
       function, place.file, place.line, does, offset, whose, thread_of(other), of_block,
       fault == Fault::after_read ? "read" : "wrote", there.file, there.line);
}

void Block::load_shared(void* to, uint32_t from, uint32_t bytes, Place place) {
  check_shared("load_shared", from, bytes, bytes, thread_, place);
  const Asker asker = this->asker(thread_, place);
  for (uint32_t i = 0; i < bytes; i += 4)
    if (const Fault fault = shared_.read(from + i, asker); fault != Fault::none)
      fail_shared(fault, "load_shared", false, from + i, thread_, place, *this);
  std::memcpy(to, shared_.at(from), bytes);
  counters_.shared_bytes_loaded += bytes;
}

void Block::store_shared(uint32_t to, const void* from, uint32_t bytes, Place place) {
  check_shared("store_shared", to, bytes, bytes, thread_, place);
  const Asker asker = this->asker(thread_, place);
  for (uint32_t i = 0; i < bytes; i += 4)
    if (const Fault fault = shared_.write(to + i, asker); fault != Fault::none)
      fail_shared(fault, "store_shared", true, to + i, thread_, place, *this);
  std::memcpy(shared_.at(to), from, bytes);
  counters_.shared_bytes_stored += bytes;
}

void Block::store_remote(uint32_t to, int rank, const void* from, uint32_t bytes, Place place) {
  Block& other = other_block("store_remote", rank, place);
  check_shared("store_remote", to, bytes, bytes, thread_, place);
  const Asker asker = this->asker(thread_, place);
  for (uint32_t i = 0; i < bytes; i += 4)
    if (const Fault fault = other.shared_.write(to + i, asker); fault != Fault::none)
      fail_shared(fault, "store_remote", true, to + i, thread_, place, other);
  std::memcpy(other.shared_.at(to), from, bytes);
  other.note_remote(asker, "store_remote");
  if (&other != this) thread_states_[thread_].stored_remotely = true;
  counters_.remote_bytes += bytes;
}

Block& Block::other_block(const char* function, int rank, Place place) {
  if (rank < 0 || rank >= cluster_->size())
    fail("no such block", thread_, "%s at %s:%d names block %d of a cluster of %d", function,
         place.file, place.line, rank, cluster_->size());
  Block& other = cluster_->block(rank);
  if (&other != this) {
    const uint32_t* const seen = cluster_->clocks().seen(thread_states_[thread_].clock);
    const uint32_t* const its = seen + cluster_->agent_of(rank, 0);
    if (std::all_of(its, its + threads_, [](uint32_t time) { return time == 0; }))
      fail(
          "not begun", thread_,
          "%s at %s:%d touches the shared memory of block %lld, and nothing says that it has begun",
          function, place.file, place.line, static_cast<long long>(other.index_));
  }
  if (other.ended_ == other.threads_)
    fail("ended too early", thread_,
         "%s at %s:%d touches the shared memory of block %lld, which has ended", function,
         place.file, place.line, static_cast<long long>(other.index_));
  return other;
}

void Block::note_remote(const Asker& asker, const char* function) {
  if (asker.agent == agent(0) + static_cast<uint32_t>(thread_of(asker.by))) return;  // one of ours
  for (Remote& remote : remote_)
    if (remote.agent == asker.agent) {
      remote = {asker.agent, asker.time, asker.by, function};
      return;
    }
  remote_.push_back({asker.agent, asker.time, asker.by, function});
}

void Block::move_matrices(Direction direction, const uint32_t (&rows)[kLanes],
                          uint32_t* const (&fragments)[kLanes], Place place) {
  const bool store = direction == Direction::store;
  const char* const function = store ? "store_matrices" : "load_matrices";
  const int first_thread = thread_ / kLanes * kLanes;
  Asker askers[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) askers[lane] = asker(first_thread + lane, place);
  for (int lane = 0; lane < kLanes; ++lane) {
    check_shared(function, rows[lane], 16, 16, first_thread + lane, place);
    const int matrix = lane / 8;
    for (int i = 0; i < 4; ++i) {
      // A word belongs to the lane that gets or gives it, whichever lane gave the address: the lane
      // that wrote a row on its own needs a barrier before the others get parts of it.
      const int owner = lane % 8 * 4 + i;
      const uint32_t address = rows[lane] + 4 * i;
      const Fault fault =
          store ? shared_.write(address, askers[owner]) : shared_.read(address, askers[owner]);
      if (fault != Fault::none)
        fail_shared(fault, function, store, address, first_thread + owner, place, *this);
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
    check_global("copy_async", from, 16, false, 16, place);
    counters_.global_bytes_loaded += 16;
    if (cache_) cache_->read(from, 16);
  }
  counters_.async_bytes += 16;
  const Asker asker = this->asker(thread_, place);
  for (int i = 0; i < 16; i += 4)
    if (const Fault fault = shared_.begin_copy(to + i, asker, true); fault != Fault::none)
      fail_shared(fault, "copy_async", true, to + i, thread_, place, *this);
  std::memset(shared_.at(to), 0xff, 16);
  Thread& thread = thread_states_[thread_];
  thread.copies.push_back({to, valid ? from : nullptr, asker.by, thread.groups});
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
  for (int i = 0; i < 16; i += 4)
    shared_.end_copy(copy.to + i, agent(thread_), thread_states_[thread_].time, copy.by, true);
}

// ---- Global memory
// -------------------------------------------------------------------------------

int Block::check_global(const char* function, const void* address, uint32_t bytes, bool writes,
                        uint32_t alignment, Place place) {
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
  if (reinterpret_cast<uintptr_t>(address) % alignment)
    fail(
        "misaligned", thread_,
        "%s at %s:%d touches byte offset %lld of array %d, at an address that is no multiple of %u",
        function, place.file, place.line, offset, array, alignment);
  if (writes != found.written)
    fail(writes ? "write to an input" : "read of an output", thread_,
         "%s at %s:%d touches byte offset %lld of array %d", function, place.file, place.line,
         offset, array);
  if (launch_->programmatic && !found.constant) {
    const Thread& thread = thread_states_[thread_];
    if (!cluster_->clocks().seen(thread.clock)[cluster_->previous_kernel()])
      fail("too early", thread_,
           "%s at %s:%d touches byte offset %lld of array %d, which the kernel before may not have "
           "left yet: no wait_for_previous_kernel() lies before",
           function, place.file, place.line, offset, array);
  }
  return array;
}

void Block::load_global(void* to, const void* from, uint32_t bytes, Place place) {
  check_global("load_global", from, bytes, false, bytes, place);
  std::memcpy(to, from, bytes);
  counters_.global_bytes_loaded += bytes;
  if (cache_) cache_->read(from, bytes);
}

void Block::store_global(void* to, const void* from, uint32_t bytes, Place place) {
  check_global("store_global", to, bytes, true, bytes, place);
  write_global("store_global", static_cast<char*>(to), from, bytes, stamp(thread_, place));
}

// To an array that was checked.
void Block::write_global(const char* function, char* to, const void* from, uint32_t bytes,
                         Stamp by) {
  const int array = global_->find(to, bytes, last_array_);
  for (uint32_t i = 0; i < bytes; i += 4) {
    char* const address = to + i;
    const GlobalMemory::Writer before = global_->write_word(array, address, index_, by);
    if (before.block < 0) continue;
    const Place here = place_of(by), there = place_of(before.by);
    fail("written twice", thread_of(by),
         "%s at %s:%d writes byte offset %lld of array %d, which block %lld, thread %d "
         "wrote at %s:%d",
         function, here.file, here.line, static_cast<long long>(address - (*global_)[array].begin),
         array, static_cast<long long>(before.block), thread_of(before.by), there.file, there.line);
  }
  std::memcpy(to, from, bytes);
  counters_.global_bytes_stored += bytes;
  if (cache_) cache_->write(to, bytes);
}

void Block::wait_for_previous_kernel() {
  Thread& thread = thread_states_[thread_];
  learn(thread, cluster_->clocks().raise(thread.clock, cluster_->previous_kernel(), 1, 1));
}

}  // namespace hgfast::cuda::emulator
