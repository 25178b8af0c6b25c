// y = the maximum or the mean of x over windows, one task per few rows of y. Bound by memory: the
// windows of a network's pools overlap little, and what they share is in the cache.
#include "maximum.h"
#include "table.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

constexpr int64_t kPiece = 8192;  // elements of y per task, about

// Rows of y per task.
int64_t task_rows(const PoolParams& p) { return max(1, kPiece / max(1, p.out_width * p.channels)); }

// A window's places along one axis: those in the map, and how many it has with the padding.
struct Span {
  int64_t first, last, with_padding;

  static Span of(int64_t place, int64_t kernel, int64_t stride, int64_t pad, int64_t size) {
    const int64_t first = place * stride - pad, last = min(first + kernel, size + pad);
    return {max(0, first), min(last, size), last - first};
  }
  int64_t size() const { return last - first; }
};

template <class E>
void mean(const E* x, int64_t pitch, int64_t channels, int64_t height, int64_t width, float divisor,
          E* y) {
  each(channels, [&](int64_t c, auto lanes) {
    Vec sum = {};
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) sum = sum + load(x + i * pitch + j * channels + c, lanes);
    store(y + c, sum / divisor, lanes);
  });
}

}  // namespace

Work plan_pool(const PoolParams& p, int) {
  return elementwise_work(p.batch * p.out_height, task_rows(p));
}

void pool(const PoolParams& p, int, int64_t begin, int64_t end, void*) {
  with_element(p.element, [&](auto element) {
    using E = decltype(element);
    const int64_t rows = task_rows(p), last = min(end * rows, p.batch * p.out_height);
    const int64_t pitch = p.width * p.channels;
    for (int64_t row = begin * rows; row < last; ++row) {
      const int64_t image = row / p.out_height;
      const auto h = Span::of(row % p.out_height, p.kernel_h, p.stride_h, p.pad_h, p.height);
      const E* x = static_cast<const E*>(p.x) + (image * p.height + h.first) * pitch;
      E* y = static_cast<E*>(p.y) + row * p.out_width * p.channels;
      for (int64_t column = 0; column < p.out_width; ++column, y += p.channels) {
        const auto w = Span::of(column, p.kernel_w, p.stride_w, p.pad_w, p.width);
        const E* from = x + w.first * p.channels;
        if (p.mean) {
          const int64_t count = p.count_pad ? h.with_padding * w.with_padding : h.size() * w.size();
          mean(from, pitch, p.channels, h.size(), w.size(), static_cast<float>(count), y);
        } else if (h.size() == 2 && w.size() == 2) {
          largest(from, pitch, p.channels, Fixed<2>{}, Fixed<2>{}, y);
        } else if (h.size() == 3 && w.size() == 3) {
          largest(from, pitch, p.channels, Fixed<3>{}, Fixed<3>{}, y);
        } else {
          largest(from, pitch, p.channels, h.size(), w.size(), y);
        }
      }
    }
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
