// y = a + b, and the ReLU behind it. Three streams and one addition per element: bound by memory,
// so each task is a run of whole cache lines and nothing more is to be gained.
#include "table.h"
#include "vec.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {
constexpr int64_t kPiece = 16384;  // elements per task
}

Work plan_add(const AddParams& p, int) { return elementwise_work(p.count, kPiece); }

void add(const AddParams& p, int, int64_t begin, int64_t end, void*) {
  with_element(p.element, [&](auto element) {
    using E = decltype(element);
    const int64_t first = begin * kPiece, count = min(end * kPiece, p.count) - first;
    const E* a = static_cast<const E*>(p.a) + first;
    const E* b = static_cast<const E*>(p.b) + first;
    E* y = static_cast<E*>(p.y) + first;
    each(count, [&](int64_t i, auto lanes) {
      const Vec sum = load(a + i, lanes) + load(b + i, lanes);
      store(y + i, p.relu ? relu(sum) : sum, lanes);
    });
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
