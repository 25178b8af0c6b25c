#include "cache.h"

namespace hgfast::cuda::emulator {
namespace {

constexpr uint64_t kSets = Cache::kBytes / Cache::kLine / Cache::kWays;

}  // namespace

Cache::Cache() : lines_(kSets * kWays) {}

void Cache::touch(const void* address, int64_t bytes, bool write) {
  const auto first = reinterpret_cast<uintptr_t>(address) / kSector;
  const auto last = (reinterpret_cast<uintptr_t>(address) + bytes - 1) / kSector;
  constexpr int kSectors = kLine / kSector;
  for (uint64_t sector = first; sector <= last; ++sector) {
    Line& line = this->line(sector / kSectors);
    const auto bit = static_cast<uint8_t>(1 << sector % kSectors);
    // Written sectors are not fetched: the cache keeps a mask of their bytes.
    if (!write && !(line.valid & bit)) ++sectors_read_;
    line.valid |= bit;
    if (write) line.dirty |= bit;
  }
}

Cache::Line& Cache::line(uint64_t number) {
  Line* set = &lines_[number % kSets * kWays];
  Line* oldest = set;
  for (Line* line = set; line < set + kWays; ++line) {
    if (line->number == number) {
      line->used = ++now_;
      return *line;
    }
    if (line->used < oldest->used) oldest = line;
  }
  sectors_written_ += __builtin_popcount(oldest->dirty);
  *oldest = Line{number, ++now_, 0, 0};
  return *oldest;
}

void Cache::write_back() {
  for (Line& line : lines_) {
    sectors_written_ += __builtin_popcount(line.dirty);
    line.dirty = 0;
  }
}

}  // namespace hgfast::cuda::emulator
