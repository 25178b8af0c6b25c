// y = skip + low upsampled x2 by nearest neighbour, one task per few rows of y.
// Each pixel of low is read for four of y, from the cache after the first time.
#include "table.h"
#include "vec.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

constexpr int64_t kPiece = 16384;  // elements per task, about

// Rows of y per task.
int64_t task_rows(const UpsampleAddParams& p) {
  return max(1, kPiece / max(1, p.width * p.channels));
}

}  // namespace

Work plan_upsample_add(const UpsampleAddParams& p, int) {
  return elementwise_work(p.batch * p.height, task_rows(p));
}

void upsample_add(const UpsampleAddParams& p, int, int64_t begin, int64_t end, void*) {
  with_element(p.element, [&](auto element) {
    using E = decltype(element);
    const int64_t rows = task_rows(p), last = min(end * rows, p.batch * p.height);
    for (int64_t row = begin * rows; row < last; ++row) {  // height is even: halves nicely
      const E* low = static_cast<const E*>(p.low) + row / 2 * (p.width / 2) * p.channels;
      const E* skip = static_cast<const E*>(p.skip) + row * p.width * p.channels;
      E* y = static_cast<E*>(p.y) + row * p.width * p.channels;
      for (int64_t column = 0; column < p.width; ++column) {
        const E* pixel = low + column / 2 * p.channels;
        each(p.channels, [&](int64_t c, auto lanes) {
          store(y + c, load(skip + c, lanes) + load(pixel + c, lanes), lanes);
        });
        skip += p.channels;
        y += p.channels;
      }
    }
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
