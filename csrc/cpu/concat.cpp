// y = maps one after the other in every pixel's channels, and a map of y's shape added on the way;
// one task per few pixels. Bound by memory.
#include "table.h"
#include "vec.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

constexpr int64_t kPiece = 16384;  // elements of y per task, about

int64_t channels_of(const ConcatParams& p) {
  int64_t channels = 0;
  for (int i = 0; i < p.maps; ++i) channels += p.channels[i];
  return channels;
}

// Pixels per task.
int64_t task_pixels(int64_t channels) { return max(1, kPiece / channels); }

}  // namespace

Work plan_concat(const ConcatParams& p, int) {
  return elementwise_work(p.pixels, task_pixels(channels_of(p)));
}

void concat(const ConcatParams& p, int, int64_t begin, int64_t end, void*) {
  with_element(p.element, [&](auto element) {
    using E = decltype(element);
    const int64_t channels = channels_of(p), piece = task_pixels(channels);
    const int64_t first = begin * piece, last = min(end * piece, p.pixels);
    E* y = static_cast<E*>(p.y) + first * channels;
    const E* add = p.add ? static_cast<const E*>(p.add) + first * channels : nullptr;
    for (int64_t pixel = first; pixel < last; ++pixel) {
      for (int i = 0; i < p.maps; ++i) {
        const E* x = static_cast<const E*>(p.x[i]) + pixel * p.channels[i];
        if (add) {
          each(p.channels[i], [&](int64_t c, auto lanes) {
            store(y + c, load(x + c, lanes) + load(add + c, lanes), lanes);
          });
          add += p.channels[i];
        } else {
          each(p.channels[i],
               [&](int64_t c, auto lanes) { store(y + c, load(x + c, lanes), lanes); });
        }
        y += p.channels[i];
      }
    }
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
