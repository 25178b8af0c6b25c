// y = skip + low maps upsampled by nearest neighbour (x2 in an hourglass, up to x8 in HRNet), and
// the ReLU behind it; one task per few rows of y. Sums are float32, rounded once.
// Each pixel of a map is read for 4 to 64 of y, from the cache after the first time.
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
    for (int64_t row = begin * rows; row < last; ++row) {
      const E* low[UpsampleAddParams::kMaps];  // the rows that are enlarged onto this one
      for (int i = 0; i < p.maps; ++i)         // height is a multiple of the factor: divides nicely
        low[i] = static_cast<const E*>(p.low[i]) +
                 (row >> p.shift[i]) * (p.width >> p.shift[i]) * p.channels;
      const E* skip = static_cast<const E*>(p.skip) + row * p.width * p.channels;
      E* y = static_cast<E*>(p.y) + row * p.width * p.channels;
      for (int64_t column = 0; column < p.width; ++column) {
        each(p.channels, [&](int64_t c, auto lanes) {
          Vec sum = load(skip + c, lanes);
          for (int i = 0; i < p.maps; ++i)
            sum = sum + load(low[i] + (column >> p.shift[i]) * p.channels + c, lanes);
          store(y + c, p.relu ? relu(sum) : sum, lanes);
        });
        skip += p.channels;
        y += p.channels;
      }
    }
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
