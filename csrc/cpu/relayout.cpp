// Copies a feature map between layouts and element types: what comes into a plan and what leaves
// it.
//
// A task is a band of kBand pixels: its NHWC side stays in the first-level cache while its lines
// are filled.
#include "layout.h"
#include "table.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

constexpr int64_t kBand = 32;

// Rows that follow each other at the distance of their pixels are one long row.
struct Rows {
  int64_t count, pixels, bands;

  explicit Rows(const RelayoutParams& p) {
    const auto joined = [&](const Strides& s) { return s.height == s.width * p.width; };
    const bool whole = joined(p.from) && joined(p.to);
    count = p.batch * (whole ? 1 : p.height);
    pixels = whole ? p.height * p.width : p.width;
    bands = ceil_div(pixels, kBand);
  }
};

}  // namespace

Work plan_relayout(const RelayoutParams& p, int) {
  const Rows rows(p);
  return {.tasks = rows.count * rows.bands, .scratch = 0};
}

void relayout(const RelayoutParams& p, int, int64_t begin, int64_t end, void*) {
  const Rows rows(p);
  const int64_t per_image = rows.count / max(p.batch, 1);
  with_element(p.x_element, [&](auto from) {
    with_element(p.y_element, [&](auto to) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / rows.bands, first = task % rows.bands * kBand;
        const int64_t image = row / per_image, line = row % per_image;
        const auto at = [&](const Strides& s) {
          return image * s.batch + line * s.height + first * s.width;
        };
        copy_pixels(static_cast<const decltype(from)*>(p.x) + at(p.from), p.from,
                    static_cast<decltype(to)*>(p.y) + at(p.to), p.to, p.channels,
                    min(kBand, rows.pixels - first));
      }
    });
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
