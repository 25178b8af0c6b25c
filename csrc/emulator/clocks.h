// What every agent of a cluster knows of every other: vector clocks.
//
// An agent is whoever touches memory: a thread; the products of a warp that are under way; the
// copies that a barrier counts; the stores of a thread that are under way. Each has a time of its
// own, which goes on whenever it tells others what it did. An access is an agent and its time, and
// it happened before another one exactly if the other's clock has seen that time.
//
// A clock has two parts: what was seen, and what of it the asynchronous proxy sees too, since a
// fence lay in between. Clocks are values with numbers, shared and counted: whole warps know the
// same, so that few exist, and a join of the same two is computed once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace hgfast::cuda::emulator {

class Clocks {
 public:
  static constexpr int kNothing = 0;  // the clock that has seen nothing; never given back

  // Forgets all clocks.
  void begin(int agents) {
    agents_ = agents;
    serial_ = 0;
    used_ = 0;
    free_.clear();
    for (Memo& memo : memo_) memo = Memo{};
    (void)create();
    std::fill_n(data(kNothing), 2 * agents_, 0u);
  }

  const uint32_t* seen(int clock) const { return values_.data() + offset(clock); }
  const uint32_t* fenced(int clock) const { return values_.data() + offset(clock) + agents_; }

  void keep(int clock) { ++references_[clock]; }
  void give_back(int clock) {
    if (clock != kNothing && --references_[clock] == 0) free_.push_back(clock);
  }

  // Each gives a clock that the caller has to give back.
  int join(int a, int b) {
    if (a == b || b == kNothing) return keep(a), a;
    if (a == kNothing) return keep(b), b;
    Memo& memo = memo_[(serials_[a] * 31 + serials_[b]) % kMemos];
    if (memo.a == serials_[a] && memo.b == serials_[b] && memo.kind == 0 && is_alive(memo))
      return keep(memo.result), memo.result;
    const int result = copy(a);
    uint32_t* to = data(result);
    const uint32_t* from = data(b);
    for (int i = 0; i < 2 * agents_; ++i) to[i] = std::max(to[i], from[i]);
    memo = {serials_[a], serials_[b], 0, result, serials_[result]};
    return result;
  }
  // That an agent's accesses up to a time, and those up to `fenced` by the other proxy, were seen.
  int raise(int a, int agent, uint32_t time, uint32_t fenced) {
    const uint32_t* now = data(a);
    if (now[agent] >= time && now[agents_ + agent] >= fenced) return keep(a), a;
    const uint64_t b = uint64_t{static_cast<uint32_t>(agent)} << 32 | time;
    Memo& memo = memo_[(serials_[a] * 31 + b * 17 + fenced) % kMemos];
    if (memo.a == serials_[a] && memo.b == b && memo.kind == fenced + 1 && is_alive(memo))
      return keep(memo.result), memo.result;
    const int result = copy(a);
    uint32_t* to = data(result);
    to[agent] = std::max(to[agent], time);
    to[agents_ + agent] = std::max(to[agents_ + agent], fenced);
    memo = {serials_[a], b, fenced + 1, result, serials_[result]};
    return result;
  }

  // What several agents bring to one place. Belongs to that place, so that it costs nothing to
  // add to it what it has already.
  struct Gathered {
    std::vector<uint32_t> values;  // of nobody while `next` is 0
    uint64_t latest[4] = {};       // clocks added last
    uint32_t next = 0;
  };
  void add(Gathered& to, int clock, int agent, uint32_t time, uint32_t fenced) {
    const uint64_t serial = serials_[clock];
    if (!to.next) {
      to.values.assign(data(clock), data(clock) + 2 * agents_);
      std::fill_n(to.latest, 4, uint64_t{0});
      to.latest[to.next++] = serial;
    } else if (std::find(to.latest, to.latest + 4, serial) == to.latest + 4) {
      const uint32_t* from = data(clock);
      for (int i = 0; i < 2 * agents_; ++i) to.values[i] = std::max(to.values[i], from[i]);
      to.latest[to.next++ % 4] = serial;
    }
    to.values[agent] = std::max(to.values[agent], time);
    to.values[agents_ + agent] = std::max(to.values[agents_ + agent], fenced);
  }
  // The clock of all that was gathered, to be given back; nothing is gathered then.
  int take(Gathered& from) {
    if (!from.next) return kNothing;
    const int result = create();
    std::copy(from.values.begin(), from.values.end(), data(result));
    from.next = 0;
    return result;
  }

 private:
  struct Memo {
    uint64_t a = 0, b = 0;
    uint64_t kind = 0;
    int result = 0;
    uint64_t serial = 0;  // of the result: a clock given back may have become another
  };
  static constexpr uint64_t kMemos = 1021;

  size_t offset(int clock) const { return size_t{2} * agents_ * clock; }
  uint32_t* data(int clock) { return values_.data() + offset(clock); }
  bool is_alive(const Memo& memo) const {
    return serials_[memo.result] == memo.serial && references_[memo.result] > 0;
  }
  int create() {
    int clock = used_;
    if (free_.empty()) {
      ++used_;
      if (values_.size() < offset(used_)) values_.resize(std::max(offset(used_), offset(64)));
      if (static_cast<int>(serials_.size()) < used_)
        serials_.resize(used_), references_.resize(used_);
    } else {
      clock = free_.back();
      free_.pop_back();
    }
    serials_[clock] = ++serial_;
    references_[clock] = 1;
    return clock;
  }
  int copy(int clock) {
    const int result = create();
    std::copy_n(data(clock), 2 * agents_, data(result));
    return result;
  }

  int agents_ = 0;
  uint64_t serial_ = 0;  // of the newest clock; 0 is none's
  int used_ = 0;
  std::vector<uint32_t> values_;
  std::vector<uint64_t> serials_;
  std::vector<int> references_;
  std::vector<int> free_;
  Memo memo_[kMemos];
};

}  // namespace hgfast::cuda::emulator
