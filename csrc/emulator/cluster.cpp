#include "cluster.h"

#include <utility>

namespace hgfast::cuda::emulator {

bool Cluster::run(const Context& context, int64_t index) {
  size_ = context.launch.cluster;
  threads_ = context.launch.threads;
  agents_ = size_ * (threads_ + threads_ / kLanes + kMoreAgents) + 1;
  next_agent_ = size_ * (threads_ + threads_ / kLanes);
  clocks_.begin(agents_);
  copies_.clear();
  gate = {};
  random_ = context.seed * 0x94d049bb133111ebu;
  if (random_) random_ = (random_ ^ static_cast<uint64_t>(index)) * 0x9e3779b97f4a7c15u | 1;
  while (static_cast<int>(blocks_.size()) < size_) blocks_.push_back(std::make_unique<Block>());
  for (int rank = 0; rank < size_; ++rank)
    blocks_[rank]->start(*this, context.launch, context.memory, context.cache, context.seed, index,
                         rank);

  Block* outer = &Block::current();
  int thread = -1;
  Block* const first = choose(*blocks_[0], thread);
  first->set_thread(thread);
  Block::set_current(first);
  scheduler.switch_to(first->fiber(thread));
  Block::set_current(outer);
  for (int rank = 0; rank < size_; ++rank)
    if (blocks_[rank]->failed()) return false;
  return true;
}

Counters Cluster::take_counters() {
  Counters sum;
  for (auto& block : blocks_) {
    add(sum, block->counters());
    block->counters() = {};
  }
  return sum;
}

uint32_t Cluster::random() {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return static_cast<uint32_t>(random_ >> 32);
}

bool Cluster::all_ended() const {
  for (int rank = 0; rank < size_; ++rank)
    if (blocks_[rank]->ended() < threads_) return false;
  return true;
}

const Cluster::Copy* Cluster::copy_to(int rank) const {
  for (const Copy& copy : copies_)
    if (copy.rank == rank) return &copy;
  return nullptr;
}

// Copies arrive as late as they can, when nobody can go on without them; with a seed, some of them
// earlier, in any order.
Block* Cluster::choose(Block& from, int& thread) {
  if (random_ && !copies_.empty() && random() >> 28 == 2) deliver(random() % copies_.size());
  while (true) {
    thread = from.next_thread();
    if (thread >= 0 && (size_ == 1 || !from.asks_for_a_turn())) return &from;
    const int shift = random_ ? static_cast<int>(random() % static_cast<uint32_t>(size_)) : 0;
    for (int i = 1; i < size_; ++i) {
      Block& other = *blocks_[(from.rank() + 1 + (i - 1 + shift) % (size_ - 1)) % size_];
      const int next = other.next_thread();
      if (next < 0) continue;
      thread = next;
      return &other;
    }
    if (thread >= 0) return &from;
    if (copies_.empty()) return nullptr;
    deliver(random_ ? random() % copies_.size() : 0);
  }
}

void Cluster::deliver(size_t number) {
  const Copy copy = copies_[number];
  copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(number));
  blocks_[copy.rank]->deliver(copy.to, copy.from, copy.from ? nullptr : &copy.map, copy.at,
                              copy.bytes, copy.barrier, copy.by);
}

}  // namespace hgfast::cuda::emulator
