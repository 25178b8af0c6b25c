// Lines of kernel source, for reports.
#pragma once

#include <cstdint>
#include <cstring>

namespace hgfast::cuda::emulator {

struct Place {
  const char* file;
  int line;
};

// As the default argument of a function: the line that calls that function.
constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {file, line};
}

inline bool same(const Place& a, const Place& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// A thread of a block and a place in 32 bits, so that a record for each word of memory stays small:
// 10 bits of thread, 6 of a file's number, 16 of the line. By an unlikely clash of bits the last
// line of the 64th file is also kNobody.
using Stamp = uint32_t;
constexpr Stamp kNobody = 0xffffffffu;

// The number of a file: the same in all host threads, for good.
uint32_t file_number(const char* file);

Place place_of(Stamp);
inline int thread_of(Stamp stamp) { return static_cast<int>(stamp >> 22); }

}  // namespace hgfast::cuda::emulator
