// A model of the last-level cache, to estimate how many bytes a launch moves to and from DRAM:
// 50 MiB, 16 ways, least recently used out first, lines of 128 bytes whose sectors of 32 bytes are
// fetched one by one and written back when dirty. It is empty when a launch begins and written back
// when it ends. Blocks pass through it one after the other, not side by side as on a GPU, so it
// flatters kernels whose blocks share data with distant blocks.
#pragma once

#include <cstdint>
#include <vector>

namespace hgfast::cuda::emulator {

class Cache {
 public:
  static constexpr int64_t kBytes = 50 << 20;
  static constexpr int kLine = 128, kSector = 32, kWays = 16;

  Cache();
  void read(const void* address, int64_t bytes) { touch(address, bytes, false); }
  void write(const void* address, int64_t bytes) { touch(address, bytes, true); }
  void write_back();

  int64_t bytes_read() const { return sectors_read_ * kSector; }
  int64_t bytes_written() const { return sectors_written_ * kSector; }

 private:
  struct Line {
    uint64_t number = ~uint64_t{0};
    uint64_t used = 0;
    uint8_t valid = 0, dirty = 0;  // a bit for each sector
  };
  void touch(const void* address, int64_t bytes, bool write);
  Line& line(uint64_t number);

  std::vector<Line> lines_;
  uint64_t now_ = 0;
  int64_t sectors_read_ = 0, sectors_written_ = 0;
};

}  // namespace hgfast::cuda::emulator
