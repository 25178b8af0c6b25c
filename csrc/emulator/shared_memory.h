// A block's shared memory, and what is known of each of its 4-byte words: who wrote it last, and
// who read it since. Everything a kernel writes is whole words.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "place.h"

namespace hgfast::cuda::emulator {

enum class Fault : uint8_t {
  none,
  uninitialised,  // read, and never written in this block
  in_flight,      // touched while a copy to it has not been waited for
  after_read,     // written, with nothing that orders it after another agent's read
  after_write,    // read or written, with nothing that orders it after another agent's write
  not_fenced,     // touched by the asynchronous proxy, with no fence since a thread wrote it
  barrier,        // a barrier lies there
};

// Who touches memory, and what it knows (see clocks.h).
struct Asker {
  const uint32_t* seen;
  const uint32_t* fenced;
  uint32_t agent, time;
  uint32_t own_fenced;  // its own time up to which a fence lies behind its accesses
  Stamp by;

  bool knows(uint32_t other, uint32_t when) const { return other == agent || seen[other] >= when; }
  bool knows_fenced(uint32_t other, uint32_t when) const {
    return fenced[other] >= when || (other == agent && own_fenced >= when);
  }
};

class SharedMemory {
 public:
  static constexpr uint32_t kBase = 1024;  // the first byte's address: 0 is nowhere

  // Forgets everything, and fills the memory with NaN.
  // Its threads are the agents from `first_agent` on.
  void begin_block(uint32_t bytes, uint32_t first_agent, uint32_t threads);

  uint32_t bytes() const { return bytes_; }
  bool contains(uint32_t address, uint32_t bytes) const {
    return address >= kBase && address - kBase <= bytes_ && bytes <= bytes_ - (address - kBase);
  }
  char* at(uint32_t address) { return memory_.data() + (address - kBase); }

  // Each notes an access to the word at an address; of a fault, other() tells the earlier access.
  Fault read(uint32_t address, const Asker&);
  Fault write(uint32_t address, const Asker&);
  // A copy to it is under way; it arrives as a write by that agent at that time. `generic`: as the
  // threads' own writes, which the asynchronous proxy sees behind a fence.
  Fault begin_copy(uint32_t address, const Asker&, bool generic);
  void end_copy(uint32_t address, uint32_t agent, uint32_t time, Stamp by, bool generic);
  // A read by the asynchronous proxy, which is over at time `time` of the agents whose bits, from
  // `agent` on, are set. All of `askers` must know the last write.
  struct AsyncReader {
    uint32_t agent, time;
    uint8_t bits;
    Stamp by;
  };
  Fault read_async(uint32_t address, const Asker* askers, int count, const AsyncReader&);
  // From now on a barrier lies there.
  Fault make_barrier(uint32_t address, const Asker&);

  // The earlier of two accesses that collide.
  Stamp other() const { return other_; }
  uint32_t other_agent() const { return other_agent_; }

 private:
  enum class State : uint8_t { plain, in_flight, barrier };
  // Several agents that read at the same line and at the same time of theirs: as threads of a block
  // count barriers, mostly all warps. Bit i: agent + i * stride(agent).
  struct Reader {
    uint32_t agent, time;
    Stamp by;
    uint32_t bits;
  };
  static constexpr uint32_t kLine = (1u << 22) - 1;  // of a stamp, all but its thread
  static constexpr int kReaders = 2;
  struct alignas(64) Word {   // one line of the cache
    uint32_t generation = 0;  // of the block that wrote it
    uint32_t written_agent = 0, written_time = 0;
    Stamp written_by = kNobody;
    State state = State::plain;
    bool generic = true;
    uint8_t readers = 0;
    int more = -1;  // in more_, where they are too many
    Reader reader[kReaders] = {};
  };

  Word& word(uint32_t address) { return words_[(address - kBase) / 4]; }
  Fault found(Fault fault, uint32_t agent, Stamp by) {
    other_agent_ = agent;
    other_ = by;
    return fault;
  }
  bool is_thread(uint32_t agent) const { return agent - first_agent_ < threads_; }
  uint32_t stride(uint32_t agent) const { return is_thread(agent) ? 32 : 1; }
  // The first of a reader's agents of which one does not know, or -1.
  int unknown(const Asker& asker, const Reader& reader) const {
    const uint32_t step = stride(reader.agent);
    for (uint32_t agent = reader.agent, bits = reader.bits; bits; agent += step, bits >>= 1)
      if ((bits & 1) && !asker.knows(agent, reader.time)) return static_cast<int>(agent);
    return -1;
  }
  Fault found_reader(const Reader& reader, int agent) {
    const uint32_t thread = static_cast<uint32_t>(agent) - first_agent_;
    return found(Fault::after_read, static_cast<uint32_t>(agent),
                 thread < threads_ ? thread << 22 | (reader.by & kLine) : reader.by);
  }
  Fault check_state(const Word& word, bool reads) {
    if (word.generation != generation_) return reads ? Fault::uninitialised : Fault::none;
    if (word.state == State::barrier) return Fault::barrier;
    if (word.state == State::in_flight)
      return found(Fault::in_flight, word.written_agent, word.written_by);
    return Fault::none;
  }
  void note(Word&, const Asker* askers, int count, const Reader&);

  std::vector<char> memory_;
  std::vector<Word> words_;
  std::vector<std::vector<Reader>> more_;
  uint32_t bytes_ = 0;
  uint32_t generation_ = 0;
  uint32_t first_agent_ = 0, threads_ = 0;
  Stamp other_ = kNobody;
  uint32_t other_agent_ = 0;
};

// An earlier read that all who ask know of needs no record any more: who knows this one knows it
// too.
inline void SharedMemory::note(Word& word, const Asker* askers, int count, const Reader& reader) {
  const auto stands_for = [&](Reader& old) {
    if (old.agent == reader.agent && old.time == reader.time && !((old.by ^ reader.by) & kLine)) {
      old.bits |= reader.bits;
      return true;
    }
    for (int i = 0; i < count; ++i)
      if (unknown(askers[i], old) >= 0) return false;
    old = reader;
    return true;
  };
  for (int i = 0; i < word.readers; ++i)
    if (stands_for(word.reader[i])) return;
  if (word.readers < kReaders) {
    word.reader[word.readers++] = reader;
    return;
  }
  if (word.more < 0) {
    word.more = static_cast<int>(more_.size());
    more_.emplace_back();
  }
  for (Reader& old : more_[word.more])
    if (stands_for(old)) return;
  more_[word.more].push_back(reader);
}

inline Fault SharedMemory::read(uint32_t address, const Asker& asker) {
  Word& word = this->word(address);
  if (const Fault fault = check_state(word, true); fault != Fault::none) return fault;
  if (!asker.knows(word.written_agent, word.written_time))
    return found(Fault::after_write, word.written_agent, word.written_by);
  const uint32_t thread = asker.agent - first_agent_;
  note(word, &asker, 1, {first_agent_ + thread % 32, asker.time, asker.by, 1u << thread / 32});
  return Fault::none;
}

inline Fault SharedMemory::read_async(uint32_t address, const Asker* askers, int count,
                                      const AsyncReader& reader) {
  Word& word = this->word(address);
  if (const Fault fault = check_state(word, true); fault != Fault::none) return fault;
  for (int i = 0; i < count; ++i) {
    if (!askers[i].knows(word.written_agent, word.written_time))
      return found(Fault::after_write, word.written_agent, word.written_by);
    if (word.generic && !askers[i].knows_fenced(word.written_agent, word.written_time))
      return found(Fault::not_fenced, word.written_agent, word.written_by);
  }
  note(word, askers, count, {reader.agent, reader.time, reader.by, reader.bits});
  return Fault::none;
}

inline Fault SharedMemory::write(uint32_t address, const Asker& asker) {
  Word& word = this->word(address);
  if (const Fault fault = check_state(word, false); fault != Fault::none) return fault;
  if (word.generation == generation_) {
    if (!asker.knows(word.written_agent, word.written_time))
      return found(Fault::after_write, word.written_agent, word.written_by);
    for (int i = 0; i < word.readers; ++i)
      if (const int agent = unknown(asker, word.reader[i]); agent >= 0)
        return found_reader(word.reader[i], agent);
    if (word.more >= 0) {
      for (const Reader& reader : more_[word.more])
        if (const int agent = unknown(asker, reader); agent >= 0)
          return found_reader(reader, agent);
      more_[word.more].clear();
    }
  } else {
    word.more = -1;
  }
  word.generation = generation_;
  word.written_agent = asker.agent;
  word.written_time = asker.time;
  word.written_by = asker.by;
  word.state = State::plain;
  word.generic = true;
  word.readers = 0;
  return Fault::none;
}

inline Fault SharedMemory::begin_copy(uint32_t address, const Asker& asker, bool generic) {
  Word& word = this->word(address);
  const uint32_t agent = word.written_agent;
  const Stamp by = word.written_by;
  const bool fenced = generic || word.generation != generation_ || !word.generic ||
                      asker.knows_fenced(agent, word.written_time);
  if (const Fault fault = write(address, asker); fault != Fault::none) return fault;
  if (!fenced) return found(Fault::not_fenced, agent, by);
  word.state = State::in_flight;
  return Fault::none;
}

inline void SharedMemory::end_copy(uint32_t address, uint32_t agent, uint32_t time, Stamp by,
                                   bool generic) {
  Word& word = this->word(address);
  word.state = State::plain;
  word.generic = generic;
  word.written_agent = agent;
  word.written_time = time;
  word.written_by = by;
}

inline Fault SharedMemory::make_barrier(uint32_t address, const Asker& asker) {
  const Fault fault = write(address, asker);
  if (fault == Fault::none) word(address).state = State::barrier;
  return fault;
}

inline void SharedMemory::begin_block(uint32_t bytes, uint32_t first_agent, uint32_t threads) {
  bytes_ = bytes;
  first_agent_ = first_agent;
  threads_ = threads;
  memory_.assign(bytes, '\xff');
  if (words_.size() < (bytes + 3) / 4) words_.resize((bytes + 3) / 4);
  more_.clear();
  if (++generation_ == 0) {
    words_.assign(words_.size(), Word{});
    generation_ = 1;
  }
}

}  // namespace hgfast::cuda::emulator
