// Threads that wait for one another, for copies, and for registers.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "cluster.h"
#include "device_model.h"
#include "hopper_model.h"

namespace hgfast::cuda::emulator {

// ---- Some threads of a block
// ---------------------------------------------------------------------

void Block::sync_some(int number, int threads, Place place) {
  if (number < 1 || number > 15 || threads < kLanes || threads > threads_ || threads % kLanes)
    fail("bad barrier", thread_,
         "sync_some at %s:%d: barrier %d for %d threads; there are 1 to 15, for whole warps of the "
         "block's %d threads",
         place.file, place.line, number, threads, threads_);
  SomeBarrier& barrier = some_[number];
  if (barrier.arrived == 0) {
    barrier.threads = threads;
    barrier.place = place;
  } else if (barrier.threads != threads) {
    fail("divergent barrier", thread_,
         "sync_some at %s:%d waits for %d threads at barrier %d, and %s:%d for %d", place.file,
         place.line, threads, number, barrier.place.file, barrier.place.line, barrier.threads);
  }
  gather(barrier.gathered, thread_);
  barrier.who.push_back(thread_);
  if (++barrier.arrived < threads) return wait("sync_some", place);
  Clocks& clocks = cluster_->clocks();
  const int clock = clocks.take(barrier.gathered);
  for (const int thread : barrier.who) {
    clocks.keep(clock);
    learn(thread_states_[thread], clock);
    wake(thread / kLanes, 1u << thread % kLanes);
  }
  clocks.give_back(clock);
  barrier.arrived = 0;
  barrier.who.clear();
  ++counters_.partial_barriers;
}

// ---- Barriers that count arrivals and bytes
// ------------------------------------------------------

void Block::init_barrier(uint32_t address, int arrivals, Place place) {
  check_shared("init_barrier", address, 8, 8, thread_, place);
  if (arrivals < 1 || arrivals >= 1 << 20)
    fail("bad barrier", thread_, "init_barrier at %s:%d: %d arrivals", place.file, place.line,
         arrivals);
  const Asker asker = this->asker(thread_, place);
  for (int i = 0; i < 8; i += 4)
    if (const Fault fault = shared_.make_barrier(address + i, asker); fault != Fault::none)
      fail_shared(fault, "init_barrier", true, address + i, thread_, place, *this);
  const int agent = cluster_->new_agent();
  if (agent < 0) fail("bad barrier", thread_, "too many barriers for the emulator");
  barriers_.push_back({address,
                       static_cast<uint32_t>(agent),
                       arrivals,
                       arrivals,
                       0,
                       0,
                       asker.agent,
                       asker.time,
                       {},
                       Clocks::kNothing,
                       false,
                       0,
                       0,
                       kNobody,
                       {}});
}

void Block::fence_barriers() {
  Thread& thread = thread_states_[thread_];
  for (BarrierState& barrier : barriers_) {
    if (barrier.fenced || barrier.made_by != agent(thread_)) continue;
    barrier.fenced = true;
    barrier.made_at = thread.time;
  }
  ++thread.time;
}

Block::BarrierState& Block::barrier_at(Block& owner, const char* function, uint32_t address,
                                       Place place) {
  for (BarrierState& barrier : owner.barriers_) {
    if (barrier.address != address) continue;
    if (!asker(thread_, place).knows(barrier.made_by, barrier.made_at))
      fail("race", thread_,
           "%s at %s:%d uses the barrier at byte offset %u of shared memory, and nothing orders "
           "that behind its init_barrier",
           function, place.file, place.line, address - SharedMemory::kBase);
    if (!barrier.fenced)
      fail("not fenced", thread_,
           "%s at %s:%d uses the barrier at byte offset %u of shared memory, with no "
           "fence_barriers() behind its init_barrier",
           function, place.file, place.line, address - SharedMemory::kBase);
    return barrier;
  }
  fail("no barrier", thread_, "%s at %s:%d: there is no barrier at byte offset %lld", function,
       place.file, place.line, static_cast<long long>(address) - SharedMemory::kBase);
}

// rank -1: here.
void Block::arrive(uint32_t address, int rank, int bytes, const char* function, Place place) {
  Block& owner = rank < 0 ? *this : other_block(function, rank, place);
  BarrierState& barrier = barrier_at(owner, function, address, place);
  if (&owner != this && thread_states_[thread_].stored_remotely)
    fail("not ordered", thread_,
         "%s at %s:%d comes behind a store_remote of this thread, and orders reads alone: between "
         "them there must be a barrier of the cluster",
         function, place.file, place.line);
  if (barrier.missing == 0)
    fail(
        "too many arrivals", thread_,
        "%s at %s:%d: the phase of the barrier at byte offset %u has all its %d arrivals and waits "
        "for %lld bytes",
        function, place.file, place.line, address - SharedMemory::kBase, barrier.arrivals,
        static_cast<long long>(barrier.bytes));
  constexpr int kMostBytes = (1 << 20) - 1;  // that a phase can wait for
  if (bytes < 0 || barrier.bytes + bytes > kMostBytes)
    fail("bad barrier", thread_, "%s at %s:%d: %d bytes more, and a phase counts up to %d",
         function, place.file, place.line, bytes, kMostBytes);
  if (&owner != this) owner.note_remote(asker(thread_, place), function);
  barrier.bytes += bytes;
  --barrier.missing;
  gather(barrier.gathered, thread_);
  owner.complete_if_over(barrier);
}

void Block::complete_if_over(BarrierState& barrier) {
  if (barrier.missing || barrier.bytes) return;
  Clocks& clocks = cluster_->clocks();
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
  // What it counted is there now, for both proxies.
  clocks.add(barrier.gathered, Clocks::kNothing, static_cast<int>(barrier.agent), barrier.phase,
             barrier.phase);
  const int phase = clocks.take(barrier.gathered);
  const int all = clocks.join(phase, barrier.clock);
  clocks.give_back(phase);
  clocks.give_back(barrier.clock);
  barrier.clock = all;
  for (const int thread : barrier.waiting) wake(thread / kLanes, 1u << thread % kLanes);
  barrier.waiting.clear();
  ++counters_.barrier_phases;
}

void Block::wait_barrier(uint32_t address, int parity, Place place) {
  if (parity != 0 && parity != 1)
    fail("bad barrier", thread_, "wait_barrier at %s:%d: parity %d", place.file, place.line,
         parity);
  while (true) {
    BarrierState& barrier = barrier_at(*this, "wait_barrier", address, place);
    if (is_over(barrier, parity)) {
      Thread& thread = thread_states_[thread_];
      learn(thread, cluster_->clocks().join(thread.clock, barrier.clock));
      return;
    }
    barrier.waiting.push_back(thread_);
    wait("wait_barrier", place, address);
  }
}

// ---- The cluster
// ---------------------------------------------------------------------------------

namespace {
void nothing(Block&, Place, void* const (&)[kLanes]) {}
}  // namespace

// All lanes of a warp come to each of its steps together.
void Block::arrive_cluster(Place place) {
  collective("arrive_cluster", place, nullptr, nothing);
  Thread& thread = thread_states_[thread_];
  Cluster::Gate& gate = cluster_->gate;
  if (thread.at_gate)
    fail("divergent barrier", thread_,
         "arrive_cluster at %s:%d, with no wait_cluster since the last", place.file, place.line);
  thread.at_gate = true;
  thread.gate_phase = gate.phase;
  gather(gate.gathered, thread_);
  if (++gate.arrived < cluster_->size() * threads_) return;
  Clocks& clocks = cluster_->clocks();
  clocks.give_back(gate.clock);
  gate.clock = clocks.take(gate.gathered);
  gate.arrived = 0;
  ++gate.phase;
  ++counters_.cluster_barriers;
  for (int rank = 0; rank < cluster_->size(); ++rank) {
    Block& block = cluster_->block(rank);
    for (int i = 0; i < threads_; ++i)
      if (block.thread_states_[i].in_gate) block.wake(i / kLanes, 1u << i % kLanes);
  }
}

void Block::wait_cluster(Place place) {
  collective("wait_cluster", place, nullptr, nothing);
  Thread& thread = thread_states_[thread_];
  if (!thread.at_gate)
    fail("divergent barrier", thread_, "wait_cluster at %s:%d, with no arrive_cluster before it",
         place.file, place.line);
  Cluster::Gate& gate = cluster_->gate;
  thread.in_gate = true;
  while (gate.phase == thread.gate_phase) wait("wait_cluster", place);
  thread.at_gate = thread.in_gate = thread.stored_remotely = false;
  cluster_->clocks().keep(gate.clock);
  learn(thread, cluster_->clocks().join(thread.clock, gate.clock));
  cluster_->clocks().give_back(gate.clock);
}

// ---- Registers
// -----------------------------------------------------------------------------------

void Block::set_registers(int registers, bool raise, Place place) {
  const char* const function = raise ? "raise_registers" : "lower_registers";
  if (registers < 24 || registers > 256 || registers % 8)
    fail("bad registers", thread_, "%s at %s:%d: %d; it takes multiples of 8 from 24 to 256",
         function, place.file, place.line, registers);
  if (!launch_->registers)
    fail("bad registers", thread_, "%s at %s:%d: the launch does not tell its registers", function,
         place.file, place.line);
  struct Wish {
    int registers;
    bool raise;
  } wish{registers, raise};
  const auto change = [](Block& block, Place place, void* const(&all)[kLanes]) {
    const Wish& wish = *static_cast<const Wish*>(all[0]);
    const int number = block.thread_ / kLanes;
    Warp& mine = block.warps_[number];
    auto& changes = block.changes_[number / 4];
    if (mine.changes == changes.size()) changes.push_back({wish.registers, wish.raise, place});
    const Change& same_one = changes[mine.changes++];
    if (same_one.registers != wish.registers || same_one.raise != wish.raise)
      block.fail("divergent registers", block.thread_,
                 "%s at %s:%d: to %d, and another warp of its warpgroup wants %d at %s:%d",
                 wish.raise ? "raise_registers" : "lower_registers", place.file, place.line,
                 wish.registers, same_one.registers, same_one.place.file, same_one.place.line);
    if (wish.raise ? wish.registers < mine.registers : wish.registers > mine.registers)
      block.fail("bad registers", block.thread_, "%s at %s:%d: to %d, and the warp has %d",
                 wish.raise ? "raise_registers" : "lower_registers", place.file, place.line,
                 wish.registers, mine.registers);
    if (wish.raise) {
      mine.wanted = wish.registers;
    } else {
      block.free_registers_ += (mine.registers - wish.registers) * kLanes;
      mine.registers = wish.registers;
    }
    for (int i = 0; i < block.threads_ / kLanes; ++i) {
      Warp& warp = block.warps_[i];
      const int more = (warp.wanted - warp.registers) * kLanes;
      if (!warp.wanted || more > block.free_registers_) continue;
      block.free_registers_ -= more;
      warp.registers = warp.wanted;
      warp.wanted = 0;
      block.wake(i, ~0u);
    }
  };
  collective(warpgroup_only(function, place), place, &wish, change);
  while (warps_[thread_ / kLanes].wanted) wait(function, place);
}

// ---- The functions of hopper.cuh
// -----------------------------------------------------------------

void init_barrier(Barrier barrier, int arrivals, Place place) {
  Block::current().init_barrier(barrier, arrivals, place);
}
void fence_barriers() { Block::current().fence_barriers(); }
void arrive(Barrier barrier, int rank, int bytes, const char* function, Place place) {
  Block::current().arrive(barrier, rank, bytes, function, place);
}
void wait_barrier(Barrier barrier, int parity, Place place) {
  Block::current().wait_barrier(barrier, parity, place);
}
void sync_some(int number, int threads, Place place) {
  Block::current().sync_some(number, threads, place);
}
int cluster_rank() { return Block::current().rank(); }
void arrive_cluster(Place place) { Block::current().arrive_cluster(place); }
void wait_cluster(Place place) { Block::current().wait_cluster(place); }
void store_remote(Shared to, int rank, const void* from, uint32_t bytes, Place place) {
  Block::current().store_remote(to, rank, from, bytes, place);
}
void set_registers(int registers, bool raise, Place place) {
  Block::current().set_registers(registers, raise, place);
}
void wait_for_previous_kernel() { Block::current().wait_for_previous_kernel(); }

}  // namespace hgfast::cuda::emulator
