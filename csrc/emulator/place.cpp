#include "place.h"

#include <atomic>
#include <mutex>

namespace hgfast::cuda::emulator {
namespace {

constexpr uint32_t kFiles = 63;
const char* files[kFiles + 1];  // the last one stands for all that found no room
std::atomic<uint32_t> count{0};
std::mutex adding;

uint32_t find(const char* file, uint32_t known) {
  for (uint32_t i = 0; i < known; ++i)
    if (files[i] == file || std::strcmp(files[i], file) == 0) return i;
  return kFiles;
}

}  // namespace

uint32_t file_number(const char* file) {
  const uint32_t found = find(file, count.load(std::memory_order_acquire));
  if (found < kFiles) return found;
  const std::lock_guard<std::mutex> lock(adding);
  const uint32_t known = count.load(std::memory_order_relaxed);
  const uint32_t again = find(file, known);
  if (again < kFiles || known == kFiles) return again;
  files[known] = file;
  count.store(known + 1, std::memory_order_release);
  return known;
}

Place place_of(Stamp stamp) {
  const uint32_t number = stamp >> 16 & 63;
  return {number < kFiles ? files[number] : "(one file too many)", static_cast<int>(stamp & 65535)};
}

}  // namespace hgfast::cuda::emulator
