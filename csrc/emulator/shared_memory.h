// A block's shared memory, and what is known of each of its 4-byte words: who wrote and who read it
// last, and between which barriers. Everything a kernel writes is whole words.
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
  after_read,     // written, with no barrier since another thread read it
  after_write,    // read or written, with no barrier since another thread wrote it
};

// One access. Two accesses of different threads are ordered by a barrier of the block between them,
// or, within a warp, by one of the warp: `warp_clock` counts these, and never goes back.
struct Access {
  Stamp by;
  uint32_t warp_clock;

  int warp() const { return thread_of(by) / 32; }
  // Of the thread so many behind this one.
  Access of_lane(uint32_t lane) const { return {by + (lane << 22), warp_clock}; }
  uint32_t lane_bit() const { return 1u << (thread_of(by) % 32); }
};

class SharedMemory {
 public:
  static constexpr uint32_t kBase = 1024;  // the first byte's address: 0 is nowhere

  // Forgets everything by letting time go on, and fills the memory with NaN.
  void begin_block(uint32_t bytes);
  void block_barrier() { ++clock_; }

  uint32_t bytes() const { return bytes_; }
  bool contains(uint32_t address, uint32_t bytes) const {
    return address >= kBase && address - kBase <= bytes_ && bytes <= bytes_ - (address - kBase);
  }
  char* at(uint32_t address) { return memory_.data() + (address - kBase); }

  // Each notes an access to the word at an address; of a fault, other() tells the earlier access.
  Fault read(uint32_t address, const Access&);
  Fault write(uint32_t address, const Access&);
  Fault begin_copy(uint32_t address, const Access&);
  void end_copy(uint32_t address, const Access&);  // as if written now

  Stamp other() const { return other_; }

 private:
  struct Word {
    uint32_t written_clock;  // the block's
    uint32_t written_warp_clock;
    Stamp written_by;
    // Of the reads since: the last one, and the lanes of its warp that read since a barrier of that
    // warp. A write of any warp but one of these two collides with the other: so two are enough.
    uint32_t read_clock;
    uint32_t read_warp_clock;
    Stamp read_by;
    uint32_t read_lanes;
    Stamp read_elsewhere;  // a reader in another warp than read_by's, or kNobody
  };
  static constexpr uint32_t kInFlight = 0xffffffffu;  // as written_warp_clock

  Word& word(uint32_t address) { return words_[(address - kBase) / 4]; }
  bool unordered_write(const Word& word, const Access& access) const {
    return word.written_clock == clock_ && thread_of(word.written_by) != thread_of(access.by) &&
           (thread_of(word.written_by) / 32 != access.warp() ||
            word.written_warp_clock == access.warp_clock);
  }

  std::vector<char> memory_;
  std::vector<Word> words_;
  uint32_t bytes_ = 0;
  uint32_t clock_ = 0;  // counts barriers of the block and blocks
  uint32_t first_clock_ = 0;
  Stamp other_ = kNobody;
};

inline Fault SharedMemory::read(uint32_t address, const Access& access) {
  Word& word = this->word(address);
  if (word.written_clock < first_clock_) return Fault::uninitialised;
  if (word.written_warp_clock == kInFlight) {
    other_ = word.written_by;
    return Fault::in_flight;
  }
  if (unordered_write(word, access)) {
    other_ = word.written_by;
    return Fault::after_write;
  }
  if (word.read_clock != clock_) {
    word.read_clock = clock_;
    word.read_elsewhere = kNobody;
    word.read_lanes = 0;
  } else if (thread_of(word.read_by) / 32 != access.warp()) {
    word.read_elsewhere = word.read_by;
    word.read_lanes = 0;
  } else if (word.read_warp_clock != access.warp_clock) {
    word.read_lanes = 0;
  }
  word.read_warp_clock = access.warp_clock;
  word.read_by = access.by;
  word.read_lanes |= access.lane_bit();
  return Fault::none;
}

inline Fault SharedMemory::write(uint32_t address, const Access& access) {
  Word& word = this->word(address);
  if (word.written_clock >= first_clock_ && word.written_warp_clock == kInFlight) {
    other_ = word.written_by;
    return Fault::in_flight;
  }
  if (unordered_write(word, access)) {
    other_ = word.written_by;
    return Fault::after_write;
  }
  if (word.read_clock == clock_) {
    if (thread_of(word.read_by) / 32 != access.warp()) {
      other_ = word.read_by;
      return Fault::after_read;
    }
    if (word.read_elsewhere != kNobody) {
      other_ = word.read_elsewhere;
      return Fault::after_read;
    }
    const uint32_t lanes = word.read_lanes & ~access.lane_bit();
    if (word.read_warp_clock == access.warp_clock && lanes) {
      // The line of the warp's last read; the lanes of a warp mostly share it.
      const uint32_t thread = access.warp() * 32 + __builtin_ctz(lanes);
      other_ = (word.read_by & 0x3fffff) | thread << 22;
      return Fault::after_read;
    }
  }
  word.written_clock = clock_;
  word.written_warp_clock = access.warp_clock;
  word.written_by = access.by;
  word.read_clock = 0;
  return Fault::none;
}

inline Fault SharedMemory::begin_copy(uint32_t address, const Access& access) {
  const Fault fault = write(address, access);
  if (fault == Fault::none) word(address).written_warp_clock = kInFlight;
  return fault;
}

inline void SharedMemory::end_copy(uint32_t address, const Access& access) {
  Word& word = this->word(address);
  word.written_clock = clock_;
  word.written_warp_clock = access.warp_clock;
  word.written_by = access.by;
}

inline void SharedMemory::begin_block(uint32_t bytes) {
  if (clock_ > 0xf0000000u) {  // long before it could begin anew, all is forgotten by hand
    words_.clear();
    clock_ = 0;
  }
  bytes_ = bytes;
  memory_.assign(bytes, '\xff');
  if (words_.size() < (bytes + 3) / 4) words_.resize((bytes + 3) / 4, Word{});
  first_clock_ = ++clock_;
}

}  // namespace hgfast::cuda::emulator
