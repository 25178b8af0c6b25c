// The arrays of a launch, and who wrote each word of those that it writes.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "launch.h"
#include "place.h"

namespace hgfast::cuda::emulator {

class GlobalMemory {
 public:
  explicit GlobalMemory(const std::vector<Array>& arrays);

  // What is wrong with the arrays themselves, or "".
  std::string mistake() const;
  // What no block wrote, or "".
  std::string never_written() const;

  // The array that has all these bytes, or -1. `guess`: where the last such call found its own.
  int find(const void* address, int64_t bytes, int guess) const;
  const Array& operator[](int array) const { return arrays_[array]; }
  // In words, where bytes lie that are in no array.
  std::string describe(const void* address, int64_t bytes) const;

  struct Writer {
    int64_t block = -1;  // -1: nobody
    Stamp by = kNobody;
  };
  // Notes a write to the word at an address; returns who wrote it before. For any host thread.
  Writer write_word(int array, const char* address, int64_t block, Stamp by);

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::vector<Array> arrays_;
  std::vector<std::unique_ptr<uint64_t[], Free>> writers_;  // block + 1 above the stamp; 0: nobody
};

}  // namespace hgfast::cuda::emulator
