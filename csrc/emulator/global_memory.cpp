#include "global_memory.h"

#include <algorithm>
#include <new>

namespace hgfast::cuda::emulator {

GlobalMemory::GlobalMemory(const std::vector<Array>& arrays)
    : arrays_(arrays), writers_(arrays.size()) {
  for (size_t i = 0; i < arrays.size(); ++i) {
    if (!arrays[i].written) continue;
    // calloc: pages that nobody touches cost nothing.
    writers_[i].reset(
        static_cast<uint64_t*>(std::calloc((arrays[i].bytes + 3) / 4, sizeof(uint64_t))));
    if (!writers_[i]) throw std::bad_alloc();
  }
}

std::string GlobalMemory::mistake() const {
  for (size_t i = 0; i < arrays_.size(); ++i) {
    const Array& a = arrays_[i];
    if (a.written && (reinterpret_cast<uintptr_t>(a.begin) % 4 || a.bytes % 4))
      return "array " + std::to_string(i) + " is written, and does not consist of 4-byte words";
    for (size_t j = 0; j < arrays_.size(); ++j) {
      const Array& b = arrays_[j];
      if (i != j && a.written && a.begin < b.begin + b.bytes && b.begin < a.begin + a.bytes)
        return "array " + std::to_string(i) + " is written, and shares bytes with array " +
               std::to_string(j);
    }
  }
  return "";
}

std::string GlobalMemory::never_written() const {
  for (size_t i = 0; i < arrays_.size(); ++i) {
    if (!arrays_[i].written) continue;
    const int64_t words = arrays_[i].bytes / 4;
    const uint64_t* writers = writers_[i].get();
    const int64_t missing = std::count(writers, writers + words, uint64_t{0});
    if (missing == 0) continue;
    const int64_t first = std::find(writers, writers + words, uint64_t{0}) - writers;
    return std::to_string(missing * 4) + " of the " + std::to_string(arrays_[i].bytes) +
           " bytes of array " + std::to_string(i) + ", the first at byte offset " +
           std::to_string(first * 4);
  }
  return "";
}

int GlobalMemory::find(const void* address, int64_t bytes, int guess) const {
  const auto* begin = static_cast<const char*>(address);
  const auto has = [&](const Array& a) {
    return begin >= a.begin && begin - a.begin <= a.bytes - bytes;
  };
  const int count = static_cast<int>(arrays_.size());
  if (guess < count && has(arrays_[guess])) return guess;
  for (int i = 0; i < count; ++i)
    if (has(arrays_[i])) return i;
  return -1;
}

std::string GlobalMemory::describe(const void* address, int64_t bytes) const {
  const auto begin = reinterpret_cast<intptr_t>(address);
  int nearest = -1;
  intptr_t least = INTPTR_MAX;
  for (int i = 0; i < static_cast<int>(arrays_.size()); ++i) {
    const auto start = reinterpret_cast<intptr_t>(arrays_[i].begin);
    const auto distance = begin < start
                              ? start - begin
                              : std::max<intptr_t>(0, begin + bytes - start - arrays_[i].bytes);
    if (distance < least) least = distance, nearest = i;
  }
  if (nearest < 0) return "the launch has no arrays";
  const Array& a = arrays_[nearest];
  return "byte offset " + std::to_string(begin - reinterpret_cast<intptr_t>(a.begin)) +
         " of array " + std::to_string(nearest) + " (" + std::to_string(a.bytes) +
         " bytes), the nearest";
}

GlobalMemory::Writer GlobalMemory::write_word(int array, const char* address, int64_t block,
                                              Stamp by) {
  uint64_t& word = writers_[array][(address - arrays_[array].begin) / 4];
  const uint64_t mine = static_cast<uint64_t>(block + 1) << 32 | by;
  const uint64_t before = __atomic_exchange_n(&word, mine, __ATOMIC_RELAXED);
  if (before == 0) return {};
  return {static_cast<int64_t>(before >> 32) - 1, static_cast<Stamp>(before)};
}

}  // namespace hgfast::cuda::emulator
