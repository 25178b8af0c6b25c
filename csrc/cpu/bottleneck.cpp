// The bottleneck, fused, with its activations before the convolutions or behind them:
//
//   x -> BN, ReLU -> conv1 (1x1) -> ReLU -> conv2 (3x3) -> ReLU -> conv3 (1x1) -> + x [+ low] -> y
//   x -> conv1 -> ReLU -> conv2 -> ReLU -> conv3 -> + x -> ReLU [-> + low] -> y
//
// A task is a strip of rows of one image, computed a few rows at a time from the top down. conv1
// fills t, the next rows of the middle map and those around them, zero-padded; conv2 and conv3 run
// over it block by block, through u; then the last two rows of t move to its top. So only x (and
// low) is read from memory and only y is written: the maps between, which unfused go out and come
// back five times, are a few rows of t and a block of u, in L2, where x still is when it is added.
//
// The price is that the row above and the row below a strip are computed by its neighbour too:
// two rows of conv1, a seventh of the work where a block halves its channels.
//
// Where x is pooled first, a task pools the rows that conv1 is about to read into scratch, once,
// and keeps them until they have been the shortcut. Where only the maximum of y is wanted, two rows
// of y at least are computed at a time, in scratch: a quarter of them is written, and nothing reads
// the whole map again, which is a network's largest.
//
// A pixel's sums do not depend on the strip or block it falls in, so neither do their bits.
#include "maximum.h"
#include "operand.h"
#include "table.h"
#include "winograd.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

// How the work splits: the same for plan_bottleneck and every task.
struct Split {
  int64_t rows;  // in a strip
  int64_t strips;
  int64_t step;  // rows at a time

  // Strips of the height that leaves the busiest thread the least to do.
  template <class Operand>
  static Split of(const BottleneckParams& p, int threads, Operand) {
    const int64_t conv1 = p.in * p.middle;
    // Strips are rows of whole tiles, or windows.
    const int64_t side = p.pool_y ? max(2, tile_side(p.method)) : tile_side(p.method);
    const int64_t conv2 = p.middle * p.middle * 9;
    const int64_t rest = conv2 + (p.middle + (p.wp ? p.in : 0)) * p.out;
    Split best{};
    int64_t least = INT64_MAX;
    for (int64_t wanted = 1; wanted <= p.height; ++wanted) {
      const int64_t rows = round_up(ceil_div(p.height, wanted), side);
      const int64_t strips = ceil_div(p.height, rows);
      const int64_t tasks = ceil_div(p.batch * strips, threads);
      const int64_t halo = min(2, p.height - rows);
      const int64_t slots =
          round_up(Slots<Operand>(rows, p.width, p.width + 2).count(), Tiling<Operand>::kGroup);
      const int64_t cost = tasks * ((rows + halo) * p.width * conv1 + slots * rest);
      if (cost >= least) continue;
      least = cost;
      if (p.method == Method::direct) {  // about a block of pixels at a time, evenly
        const int64_t steps = ceil_div(rows, max(1, kBlock / p.width));
        best = {rows, strips, round_up(ceil_div(rows, steps), side)};
      } else {
        const Grouping group(ceil_div(rows, side), ceil_div(p.width, side));
        best = {rows, strips, group.tall * side};
      }
    }
    return best;
  }
};

template <class Operand>
struct Buffers {
  Operand* t;              // (step + 2, pitch, middle)
  Operand* u;              // (kBlock, or a group of tiles' pixels; middle)
  Operand* a;              // (kBlock, in): prologue(x), and later x for the projected shortcut
  float* bias;             // b3 + bp
  char* pooled = nullptr;  // (step + 2, width, in), of the element type
  char* whole = nullptr;   // (step, width, out) of y where that is pooled, likewise
  int64_t pitch;           // pixels in a row of t: whole tiles, and one at either end
  int64_t t_bytes, u_bytes;
  Grouping group;
  TileBuffers tiles;

  Buffers(const BottleneckParams& p, const Split& split, Scratch& scratch)
      : pitch(round_up(p.width, tile_side(p.method)) + 2),
        group(split.step / tile_side(p.method), ceil_div(p.width, tile_side(p.method))),
        tiles(p.method, group, p.middle, scratch) {
    const int64_t middle = padded<Operand>(p.middle);
    // The last group of slots may run past the end of t.
    const int64_t beyond = Tiling<Operand>::kGroup - 1;
    const int64_t t_count = ((split.step + 2) * pitch + beyond) * middle;
    const int64_t tile = tile_side(p.method) * tile_side(p.method);  // pixels
    const int64_t u_count = max(kBlock, group.most() * tile) * middle;
    t_bytes = t_count * sizeof(Operand);
    u_bytes = u_count * sizeof(Operand);
    t = scratch.take<Operand>(t_count);
    u = scratch.take<Operand>(u_count);
    a = scratch.take<Operand>(kBlock * padded<Operand>(p.in));
    bias = scratch.take<float>(p.out);
    const int64_t bytes = p.precision == Precision::medium ? sizeof(bf16) : sizeof(float);
    if (p.pool) pooled = scratch.take<char>((split.step + 2) * p.width * p.in * bytes);
    if (p.pool_y) whole = scratch.take<char>(split.step * p.width * p.out * bytes);
  }
};

template <class Operand, class E>
class Strip {
 public:
  Strip(const BottleneckParams& p, const Buffers<Operand>& buffers, int64_t image)
      : p(p), buffers(buffers), pitch(buffers.pitch), middle(padded<Operand>(p.middle)) {
    given = static_cast<const E*>(p.x) + image * p.x_height * p.x_width * p.in;
    x = given;
    const int64_t pixels = p.pool_y ? (p.height / 2) * (p.width / 2) : p.height * p.width;
    wanted = static_cast<E*>(p.y) + image * pixels * p.out;
    y = wanted;
    if (p.low) low = static_cast<const E*>(p.low) + image * (p.height / 2) * (p.width / 2) * p.out;
  }

  // Rows top ... bottom - 1 of y.
  void run(int64_t top, int64_t bottom, int64_t step) {
    for (int64_t r = 0; r < step + 2; ++r) {
      clear(r, 0, 1);
      clear(r, p.width + 1, pitch - p.width - 1);
    }
    if (top == 0) clear(0, 0, pitch);
    int64_t next = max(0, top - 1);  // the first row that t does not hold yet
    for (int64_t row = top; row < bottom; row += step) {
      const int64_t rows = min(step, bottom - row), last = min(p.height, row + rows + 1);
      if (p.pool) pool(row, next, last);
      for (int64_t pixel = next * p.width; pixel < last * p.width; pixel += kBlock)
        conv1(row, pixel, min(kBlock, last * p.width - pixel));
      next = last;
      if (row + rows == p.height) {  // tiles may hang over by more than one row
        for (int64_t r = rows + 1; r < round_up(rows, tile_side(p.method)) + 2; ++r)
          clear(r, 0, pitch);
      }
      // As if the whole of y were there.
      if (p.pool_y) y = reinterpret_cast<E*>(buffers.whole) - row * p.width * p.out;
      if (p.method == Method::direct) {
        const Slots<Operand> slots(rows, p.width, pitch);
        for (int64_t slot = 0; slot < slots.count(); slot += kBlock)
          conv2(row, slots, slot, min(kBlock, slots.count() - slot));
      } else if constexpr (is_same<Operand, float>) {
        with_tiles(p.method, [&](auto tiles) { conv2_by_tiles(tiles, row, rows); });
      }
      if (p.pool_y) pool_y(row, row + rows);
      memmove(static_cast<void*>(buffers.t), buffers.t + rows * pitch * middle,
              2 * pitch * middle * sizeof(Operand));
      if (p.pool) {
        const int64_t line = p.width * p.in * sizeof(E);
        memmove(buffers.pooled, buffers.pooled + rows * line, 2 * line);
      }
    }
  }

 private:
  // The pooled rows first ... last - 1 into scratch, whose second row is the map's row `top`; x is
  // read from there on as if the whole map were there.
  void pool(int64_t top, int64_t first, int64_t last) {
    const int64_t line = p.width * p.in, pitch = p.x_width * p.in;
    E* pooled = reinterpret_cast<E*>(buffers.pooled) - (top - 1) * line;
    x = pooled;
    for (int64_t row = first; row < last; ++row) {
      const E* from = given + 2 * row * pitch;
      for (int64_t i = 0; i < line; i += p.in, from += 2 * p.in)
        largest(from, pitch, p.in, Fixed<2>{}, Fixed<2>{}, pooled + row * line + i);
    }
  }

  // The maximum of rows first ... last - 1 of y, the first of which is even. An odd one at the
  // map's end falls away, as does an odd column.
  void pool_y(int64_t first, int64_t last) const {
    const int64_t pitch = p.width * p.out, across = p.width / 2;
    for (int64_t row = first; row + 1 < last; row += 2) {
      const E* from = y + row * pitch;
      E* to = wanted + row / 2 * across * p.out;
      for (int64_t i = 0; i < across; ++i, from += 2 * p.out, to += p.out)
        largest(from, pitch, p.out, Fixed<2>{}, Fixed<2>{}, to);
    }
  }

  // Zeros in t.
  void clear(int64_t row, int64_t column, int64_t columns) const {
    memset(static_cast<void*>(buffers.t + (row * pitch + column) * middle), 0,
           columns * middle * sizeof(Operand));
  }

  // `count` pixels of x, from `pixel`, into t, whose second row is the map's row `top`.
  void conv1(int64_t top, int64_t pixel, int64_t count) const {
    const int64_t in = padded<Operand>(p.in);
    int64_t a_at[kBlock], t_at[kBlock];
    Cursor at(pixel, p.width);
    for (int64_t i = 0; i < round_up(count, Tiling<Operand>::kGroup); ++i, at.next()) {
      a_at[i] = i * in;
      t_at[i] = i < count ? ((at.row - top + 1) * pitch + at.column + 1) * middle : -1;
    }
    auto segment = Segment<Operand>::dense(buffers.a, a_at, in, p.w1);
    const E* from = x + pixel * p.in;
    if (!p.scale && readable<Operand>(from, count, p.in)) {
      segment.a = reinterpret_cast<const Operand*>(from);
    } else {
      prologue_pixels(from, count, p.in, p.scale, p.shift, buffers.a);
    }
    gemm(&segment, 1, count, 0, p.middle,
         Epilogue<Operand>{.bias = p.b1, .relu = true, .y = buffers.t, .y_at = t_at});
  }

  // `count` slots of the rows from `top`, from `slot`: t to u to y.
  void conv2(int64_t top, const Slots<Operand>& slots, int64_t slot, int64_t count) const {
    int64_t t_at[kBlock], u_at[kBlock];
    int64_t pixels = 0, first = 0;
    Cursor at = slots.from(slot);
    for (int64_t i = 0; i < round_up(count, Tiling<Operand>::kGroup); ++i, at.next()) {
      t_at[i] = (at.row * pitch + at.column) * middle;
      u_at[i] = -1;
      if (!slots.is_pixel(at)) continue;
      if (pixels == 0) first = (top + at.row) * p.width + at.column;
      u_at[i] = pixels++ * middle;
    }
    const Segment<Operand> conv2{.a = buffers.t,
                                 .at = t_at,
                                 .stride = middle,
                                 .taps = 3,  // of three neighbours' channels each
                                 .tap_stride = pitch * middle,
                                 .depth = 3 * middle,
                                 .b = p.w2};
    gemm(&conv2, 1, count, 0, p.middle,
         Epilogue<Operand>{.bias = p.b2, .relu = true, .y = buffers.u, .y_at = u_at});
    conv3(first, buffers.u, pixels);  // which lie one after the other in u, as they do in y
  }

  // The `rows` rows from `top`, a group of tiles at a time: t to u to y.
  template <class Tiles>
  void conv2_by_tiles(Tiles, int64_t top, int64_t rows) const {
    constexpr int64_t side = Tiles::kPixels;
    const int64_t tall = ceil_div(rows, side);
    int64_t u_at[kTilesAtOnce * side * side];
    for (int64_t left = 0; left < p.width; left += buffers.group.wide * side) {
      const int64_t columns = min(buffers.group.wide * side, p.width - left);
      const int64_t wide = ceil_div(columns, side);
      for (int64_t i = 0; i < tall * wide * side * side; ++i) {
        const int64_t tile = i / (side * side), pixel = i % (side * side);
        const int64_t r = tile / wide * side + pixel / side, c = tile % wide * side + pixel % side;
        u_at[i] = r < rows && c < columns ? (r * columns + c) * middle : -1;
      }
      Tiles::convolve(buffers.t + left * middle, pitch * middle, middle, tall, wide,
                      static_cast<const float*>(p.w2), 0, p.middle, buffers.tiles,
                      Epilogue<Operand>{.bias = p.b2, .relu = true, .y = buffers.u, .y_at = u_at});
      // Pixels that lie one after the other in u as they do in y: all rows, or one.
      const int64_t run = columns == p.width ? rows * columns : columns;
      for (int64_t i = 0; i < rows * columns;) {
        const int64_t count = min(kBlock, run - i % run);
        conv3((top + i / columns) * p.width + left + i % columns, buffers.u + i * middle, count);
        i += count;
      }
    }
  }

  // `pixels` pixels from `first`: u to y.
  void conv3(int64_t first, const Operand* u, int64_t pixels) const {
    int64_t u_at[kBlock], y_at[kBlock], low_at[kBlock], x_at[kBlock];
    const int64_t in = padded<Operand>(p.in);
    Cursor at(first, p.width);
    for (int64_t i = 0; i < round_up(pixels, Tiling<Operand>::kGroup); ++i, at.next()) {
      u_at[i] = i * middle;
      x_at[i] = i * in;
      y_at[i] = i < pixels ? (first + i) * p.out : -1;
      low_at[i] = (at.row / 2 * (p.width / 2) + at.column / 2) * p.out;
    }
    Segment<Operand> conv3[2] = {Segment<Operand>::dense(u, u_at, middle, p.w3),
                                 Segment<Operand>::dense(buffers.a, x_at, in, p.wp)};
    if (p.wp) {
      const E* from = x + first * p.in;
      if (readable<Operand>(from, pixels, p.in)) {
        conv3[1].a = reinterpret_cast<const Operand*>(from);
      } else {
        prologue_pixels(from, pixels, p.in, nullptr, nullptr, buffers.a);
      }
    }
    gemm(conv3, p.wp ? 2 : 1, pixels, 0, p.out,
         Epilogue<E>{.bias = p.wp ? buffers.bias : p.b3,
                     .relu = false,
                     .relu_sum = p.relu,
                     .y = y,
                     .y_at = y_at,
                     .add = p.wp ? nullptr : x,
                     .low = low,
                     .low_at = low_at});
  }

  const BottleneckParams& p;
  const Buffers<Operand>& buffers;
  const E* given;  // the image of p.x
  const E* x;      // the same, or what it is pooled to
  E* wanted;       // the image of p.y
  E* y;            // the same, or what it is pooled from
  const E* low = nullptr;
  int64_t pitch;   // pixels in a row of t
  int64_t middle;  // values in a pixel of t and u
};

template <class Operand, class E>
void run(const BottleneckParams& p, int threads, int64_t begin, int64_t end, void* memory) {
  const Split split = Split::of(p, threads, Operand{});
  Scratch scratch(memory);
  const Buffers<Operand> buffers(p, split, scratch);
  if (padded<Operand>(p.middle) != p.middle) {  // zeros beyond the last channel, for good
    memset(static_cast<void*>(buffers.t), 0, buffers.t_bytes);
    memset(static_cast<void*>(buffers.u), 0, buffers.u_bytes);
  }
  if (p.wp) {
    each(p.out, [&](int64_t n, auto lanes) {
      store(buffers.bias + n, load(p.b3 + n, lanes) + load(p.bp + n, lanes), lanes);
    });
  }
  [[maybe_unused]] const typename Tiling<Operand>::Scope scope{};
  for (int64_t task = begin; task < end; ++task) {
    const int64_t top = task % split.strips * split.rows;
    Strip<Operand, E>(p, buffers, task / split.strips)
        .run(top, min(p.height, top + split.rows), split.step);
  }
}

}  // namespace

Work plan_bottleneck(const BottleneckParams& p, int threads) {
  Work work;
  with_types(p.precision, [&](auto operand, auto) {
    const Split split = Split::of(p, threads, operand);
    Scratch scratch(nullptr);
    Buffers<decltype(operand)>(p, split, scratch);
    work = {.tasks = p.batch * split.strips, .scratch = scratch.used()};
  });
  return work;
}

void bottleneck(const BottleneckParams& p, int threads, int64_t begin, int64_t end, void* scratch) {
  with_types(p.precision, [&](auto operand, auto element) {
    run<decltype(operand), decltype(element)>(p, threads, begin, end, scratch);
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
