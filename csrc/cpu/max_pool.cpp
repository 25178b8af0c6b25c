// y = 2x2 maximum of x with stride 2, one task per few rows of y. Every element of x is read
// once: bound by memory.
#include "table.h"
#include "vec.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

constexpr int64_t kPiece = 8192;  // elements of y per task, about

// Rows of y per task.
int64_t task_rows(const MaxPoolParams& p) {
  return max(1, kPiece / max(1, p.width / 2 * p.channels));
}

}  // namespace

Work plan_max_pool(const MaxPoolParams& p, int) {
  return elementwise_work(p.batch * (p.height / 2), task_rows(p));
}

void max_pool(const MaxPoolParams& p, int, int64_t begin, int64_t end, void*) {
  with_element(p.element, [&](auto element) {
    using E = decltype(element);
    const int64_t height = p.height / 2, width = p.width / 2, pitch = p.width * p.channels;
    const int64_t rows = task_rows(p), last = min(end * rows, p.batch * height);
    for (int64_t row = begin * rows; row < last; ++row) {
      const int64_t image = row / height, top = 2 * (row % height);
      const E* x = static_cast<const E*>(p.x) + (image * p.height + top) * pitch;
      E* y = static_cast<E*>(p.y) + row * width * p.channels;
      for (int64_t column = 0; column < width; ++column) {
        each(p.channels, [&](int64_t c, auto lanes) {
          const E* a = x + c;
          const E* b = a + p.channels;
          const Vec upper = maximum(load(a, lanes), load(b, lanes));
          const Vec lower = maximum(load(a + pitch, lanes), load(b + pitch, lanes));
          store(y + c, maximum(upper, lower), lanes);
        });
        x += 2 * p.channels;
        y += p.channels;
      }
    }
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
