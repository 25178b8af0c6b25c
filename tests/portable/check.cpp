// The CPU kernels against plain loops in float64, without torch: check NAME, where NAME is the
// instruction set that is expected to be chosen. Of the sets that multiply in float32.
//
// Every kernel runs task by task, the last one first, on scratch that holds NaN: tasks depend on
// nothing but their inputs. What lies behind a result or scratch must stay as it was.
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using namespace hgfast::cpu;

int checks = 0, mistakes = 0;

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char line[300];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  return line;
}

void wrong(const std::string& what) {
  ++mistakes;
  printf("wrong: %s\n", what.c_str());
}

// ---- Elements and memory ----

uint16_t to_bf16(float x) {  // round to nearest even
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

double rounded(double x, Element element) {
  const float single = static_cast<float>(x);
  return element == Element::float32 ? single : from_bf16(to_bf16(single));
}

const char* name_of(Element element) {
  return element == Element::float32 ? "float32" : "bfloat16";
}

constexpr unsigned char kNan = 0xff;  // of these bytes every float32 and bfloat16 is NaN
constexpr size_t kBeyond = 256;

// 64-byte-aligned, with a margin behind it that nobody may write to.
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes), storage_(bytes + 64 + kBeyond, kNan) {}
  char* data() {
    const auto start = reinterpret_cast<uintptr_t>(storage_.data());
    return reinterpret_cast<char*>(start + (64 - start % 64) % 64);
  }
  void spoil() { memset(data(), kNan, bytes_); }
  bool kept_within() {
    for (size_t i = 0; i < kBeyond; ++i) {
      if (static_cast<unsigned char>(data()[bytes_ + i]) != kNan) return false;
    }
    return true;
  }

 private:
  size_t bytes_;
  std::vector<unsigned char> storage_;
};

// Values as the kernels store them.
class Stored {
 public:
  Stored(Element element, size_t count)
      : element_(element), memory_(count * (element == Element::float32 ? 4 : 2)) {}
  Stored(Element element, const std::vector<double>& values) : Stored(element, values.size()) {
    for (size_t i = 0; i < values.size(); ++i) {
      const float x = static_cast<float>(values[i]);
      const uint16_t half = to_bf16(x);
      if (element == Element::float32) memcpy(data() + 4 * i, &x, 4);
      if (element == Element::bfloat16) memcpy(data() + 2 * i, &half, 2);
    }
  }
  char* data() { return memory_.data(); }
  bool kept_within() { return memory_.kept_within(); }
  double operator[](size_t i) {
    float x;
    uint16_t half;
    if (element_ == Element::float32) {
      memcpy(&x, data() + 4 * i, 4);
    } else {
      memcpy(&half, data() + 2 * i, 2);
      x = from_bf16(half);
    }
    return x;
  }

 private:
  Element element_;
  Memory memory_;
};

uint64_t state = 1;

// Evenly from -scale to scale, and exact in this element.
double random_value(Element element, double scale = 1) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return rounded(scale * (static_cast<double>(state >> 33) / (1u << 30) - 1), element);
}

std::vector<double> random_values(size_t count, Element element, double scale = 1) {
  std::vector<double> values(count);
  for (double& value : values) value = random_value(element, scale);
  return values;
}

std::vector<float> floats(const std::vector<double>& values) {
  return std::vector<float>(values.begin(), values.end());
}

// (batch, height, width, channels)
struct Map {
  int64_t batch, height, width, channels;
  std::vector<double> values;

  Map(int64_t batch, int64_t height, int64_t width, int64_t channels)
      : batch(batch),
        height(height),
        width(width),
        channels(channels),
        values(batch * height * width * channels) {}
  static Map random(Element element, int64_t batch, int64_t height, int64_t width,
                    int64_t channels) {
    Map map(batch, height, width, channels);
    map.values = random_values(map.values.size(), element);
    return map;
  }
  size_t index(int64_t b, int64_t i, int64_t j, int64_t c) const {
    return ((b * height + i) * width + j) * channels + c;
  }
  double& at(int64_t b, int64_t i, int64_t j, int64_t c) { return values[index(b, i, j, c)]; }
  double at(int64_t b, int64_t i, int64_t j, int64_t c) const { return values[index(b, i, j, c)]; }
  bool has(int64_t i, int64_t j) const { return i >= 0 && i < height && j >= 0 && j < width; }
};

// f(b, i, j, c) for each value.
template <class F>
void each(const Map& map, F f) {
  for (int64_t b = 0; b < map.batch; ++b)
    for (int64_t i = 0; i < map.height; ++i)
      for (int64_t j = 0; j < map.width; ++j)
        for (int64_t c = 0; c < map.channels; ++c) f(b, i, j, c);
}

// ---- Running and comparing ----

template <class Params>
void run(const std::string& what, Work (*plan)(const Params&, int),
         void (*kernel)(const Params&, int, int64_t, int64_t, void*), const Params& p,
         int threads) {
  const Work work = plan(p, threads);
  if (work.tasks < 1) return wrong(what + ": no tasks");
  Memory scratch(work.scratch);
  for (int64_t task = work.tasks - 1; task >= 0; --task) {
    scratch.spoil();
    kernel(p, threads, task, task + 1, scratch.data());
  }
  if (!scratch.kept_within()) wrong(what + ": writes beyond its scratch");
}

// Of the values' size, and of the result's root mean square.
void compare(const std::string& what, Stored& result, const std::vector<double>& expected,
             Element element, double tolerance) {
  ++checks;
  double squares = 0, worst = 0;
  for (const double value : expected) squares += value * value;
  const double size = std::sqrt(squares / static_cast<double>(expected.size()));
  const double half_a_step = element == Element::bfloat16 ? 1.01 / 256 : 0;
  size_t where = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double limit =
        half_a_step * std::fabs(expected[i]) + tolerance * (size + std::fabs(expected[i]));
    const double error = std::fabs(result[i] - expected[i]);
    const double ratio = error <= limit ? (error > 0 ? error / limit : 0) : error / limit;
    if (ratio > worst || ratio != ratio) {
      worst = ratio;
      where = i;
      if (ratio != ratio || limit == 0) break;
    }
  }
  if (!(worst <= 1))
    wrong(text("%s: value %zu is %.9g, expected %.9g", what.c_str(), where, result[where],
               expected[where]));
  if (!result.kept_within()) wrong(what + ": writes beyond its result");
}

// ---- What is expected ----

void relu(Map& map) {
  for (double& value : map.values) value = value > 0 ? value : 0;
}

void add(Map& map, const Map& other) {
  for (size_t i = 0; i < map.values.size(); ++i) map.values[i] += other.values[i];
}

Map normed(Map x, const std::vector<float>& scale, const std::vector<float>& shift) {
  each(x, [&](int64_t b, int64_t i, int64_t j, int64_t c) {
    x.at(b, i, j, c) = double{scale[c]} * x.at(b, i, j, c) + double{shift[c]};
  });
  relu(x);
  return x;
}

void add_upsampled(Map& map, const Map& low, int shift) {
  each(map, [&](int64_t b, int64_t i, int64_t j, int64_t c) {
    map.at(b, i, j, c) += low.at(b, i >> shift, j >> shift, c);
  });
}

// A weight (out, in, height, width), as the user has it.
struct Weight {
  int64_t out, in, height, width;
  std::vector<float> values, bias;

  Weight(int64_t out, int64_t in, int64_t height, int64_t width)
      : out(out), in(in), height(height), width(width) {
    const double scale = std::sqrt(3.0 / static_cast<double>(in * height * width));
    values = floats(random_values(out * in * height * width, Element::float32, scale));
    bias = floats(random_values(out, Element::float32));
  }
  double at(int64_t n, int64_t c, int64_t i, int64_t j) const {
    return values[((n * in + c) * height + i) * width + j];
  }
};

struct Window {
  int64_t stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
};

// The maximum of windows of 2x2.
Map pooled(const Map& x) {
  Map y(x.batch, x.height / 2, x.width / 2, x.channels);
  each(y, [&](int64_t b, int64_t i, int64_t j, int64_t n) {
    const auto at = [&](int64_t k, int64_t l) { return x.at(b, 2 * i + k, 2 * j + l, n); };
    y.at(b, i, j, n) = std::fmax(std::fmax(at(0, 0), at(0, 1)), std::fmax(at(1, 0), at(1, 1)));
  });
  return y;
}

Map convolved(const Map& x, const Weight& w, const Window& g) {
  Map y(x.batch, (x.height + 2 * g.pad_h - (w.height - 1) * g.dilation_h - 1) / g.stride_h + 1,
        (x.width + 2 * g.pad_w - (w.width - 1) * g.dilation_w - 1) / g.stride_w + 1, w.out);
  each(y, [&](int64_t b, int64_t i, int64_t j, int64_t n) {
    double sum = w.bias[n];
    for (int64_t k = 0; k < w.height; ++k) {
      for (int64_t l = 0; l < w.width; ++l) {
        const int64_t row = i * g.stride_h - g.pad_h + k * g.dilation_h;
        const int64_t column = j * g.stride_w - g.pad_w + l * g.dilation_w;
        if (!x.has(row, column)) continue;
        for (int64_t c = 0; c < w.in; ++c) sum += w.at(n, c, k, l) * x.at(b, row, column, c);
      }
    }
    y.at(b, i, j, n) = sum;
  });
  return y;
}

// ---- Each kernel ----

struct Packed {
  Memory memory;
  Packed(const Kernels& kernels, const std::string& what, Precision precision, Method method,
         const Weight& w)
      : memory(kernels.packed_bytes(precision, method, w.out, w.in, w.height, w.width)) {
    kernels.pack(precision, method, w.out, w.in, w.height, w.width, w.values.data(), memory.data());
    if (!memory.kept_within()) wrong(what + ": packing writes beyond the weight");
  }
};

constexpr Precision kPrecisions[] = {Precision::highest, Precision::high, Precision::medium};
constexpr Method kMethods[] = {Method::direct, Method::tiles2, Method::tiles4};

Element element_of(Precision precision) {
  return precision == Precision::medium ? Element::bfloat16 : Element::float32;
}

// How far a method's float32 sums may be off.
double tolerance_of(Method method) { return method == Method::tiles4 ? 1e-5 : 2e-6; }

std::string product(Precision precision, Method method) {
  static const char* const precisions[] = {"highest", "high", "medium"};
  static const char* const methods[] = {"direct", "2x2", "4x4"};
  return text("%s %s", precisions[static_cast<int>(precision)], methods[static_cast<int>(method)]);
}

void check_bottleneck(const Kernels& kernels, Precision precision, Method method) {
  struct Case {
    int64_t batch, height, width, in, middle, out;
    bool norm, project, low, relu, pool = false, pool_y = false;
  };
  const Case cases[] = {{2, 9, 12, 24, 20, 24, true, false, false, false},
                        {1, 6, 8, 20, 17, 33, true, true, true, false},
                        {1, 14, 4, 33, 48, 33, false, false, true, true},
                        {3, 1, 1, 1, 1, 1, false, true, false, true},
                        {1, 3, 67, 16, 16, 40, true, true, false, false},
                        {2, 6, 5, 24, 17, 24, true, false, false, true, true},
                        {2, 7, 11, 24, 17, 24, true, false, false, true, false, true}};
  const Element element = element_of(precision);
  for (const Case& c : cases) {
    const std::string what =
        text("bottleneck, %s, %dx%dx%d, channels %d %d %d", product(precision, method).c_str(),
             int(c.batch), int(c.height), int(c.width), int(c.in), int(c.middle), int(c.out));
    const int64_t x_height = c.pool ? 2 * c.height + 1 : c.height;  // the last row falls away
    const int64_t x_width = c.pool ? 2 * c.width : c.width;
    const Map given = Map::random(element, c.batch, x_height, x_width, c.in);
    const Map x = c.pool ? pooled(given) : given;
    const Map low = Map::random(element, c.batch, c.height / 2, c.width / 2, c.out);
    const Weight w1(c.middle, c.in, 1, 1), w2(c.middle, c.middle, 3, 3), w3(c.out, c.middle, 1, 1);
    const Weight wp(c.out, c.in, 1, 1);
    const auto scale = floats(random_values(c.in, Element::float32));
    const auto shift = floats(random_values(c.in, Element::float32));

    Map t = convolved(c.norm ? normed(x, scale, shift) : x, w1, {});
    relu(t);
    Map u = convolved(t, w2, {.pad_h = 1, .pad_w = 1});
    relu(u);
    Map expected = convolved(u, w3, {});
    add(expected, c.project ? convolved(x, wp, {}) : x);
    if (c.relu) relu(expected);
    if (c.low) add_upsampled(expected, low, 1);
    if (c.pool_y) expected = pooled(expected);

    Packed p1(kernels, what, precision, Method::direct, w1),
        p2(kernels, what, precision, method, w2);
    Packed p3(kernels, what, precision, Method::direct, w3);
    Packed pp(kernels, what, precision, Method::direct, wp);
    Stored from(element, given.values), half(element, low.values);
    for (const int threads : {1, 3}) {
      Stored y(element, expected.values.size());
      BottleneckParams p{};
      p.precision = precision;
      p.method = method;
      p.relu = c.relu;
      p.batch = c.batch;
      p.pool = c.pool;
      p.pool_y = c.pool_y;
      p.height = c.height;
      p.width = c.width;
      p.x_height = x_height;
      p.x_width = x_width;
      p.in = c.in;
      p.middle = c.middle;
      p.out = c.out;
      p.x = from.data();
      p.low = c.low ? half.data() : nullptr;
      p.y = y.data();
      p.scale = c.norm ? scale.data() : nullptr;
      p.shift = c.norm ? shift.data() : nullptr;
      p.w1 = p1.memory.data();
      p.b1 = w1.bias.data();
      p.w2 = p2.memory.data();
      p.b2 = w2.bias.data();
      p.w3 = p3.memory.data();
      p.b3 = w3.bias.data();
      p.wp = c.project ? pp.memory.data() : nullptr;
      p.bp = c.project ? wp.bias.data() : nullptr;
      run(what, kernels.plan_bottleneck, kernels.bottleneck, p, threads);
      compare(what, y, expected.values, element, tolerance_of(method));
    }
  }
}

void check_conv(const Kernels& kernels, Precision precision, Method method) {
  struct Case {
    int64_t batch, height, width, in, out, kernel_h, kernel_w;
    Window window;
    bool norm, relu, add, relu_sum;
  };
  const Window same{.pad_h = 1, .pad_w = 1};
  const Case cases[] = {{1, 15, 18, 3, 16, 7, 7, {2, 2, 3, 3, 1, 1}, false, true, false, false},
                        {2, 7, 9, 24, 20, 1, 1, {}, true, false, true, true},
                        {1, 7, 9, 33, 40, 1, 1, {2, 2, 0, 0, 1, 1}, false, true, false, false},
                        {2, 11, 8, 20, 24, 3, 3, {1, 1, 2, 2, 2, 2}, true, false, false, false},
                        {1, 9, 14, 16, 17, 2, 5, {3, 1, 1, 4, 1, 2}, false, true, true, false},
                        {1, 5, 6, 130, 9, 3, 2, {1, 2, 0, 1, 1, 1}, true, false, true, false},
                        // for tiles
                        {2, 9, 11, 19, 21, 3, 3, same, true, true, true, true},
                        {1, 8, 8, 48, 40, 3, 3, same, false, false, true, false},
                        {1, 3, 70, 16, 33, 3, 3, {1, 1, 2, 0, 1, 1}, false, true, false, false},
                        {3, 1, 2, 17, 16, 3, 3, same, true, false, false, false}};
  const Element element = element_of(precision);
  for (const Case& c : cases) {
    const Window& g = c.window;
    const bool tiles = c.kernel_h == 3 && c.kernel_w == 3 && g.stride_w * g.dilation_w == 1;
    if (method != Method::direct && !tiles) continue;
    const std::string what =
        text("conv, %s, %dx%d, stride %d %d, %dx%dx%d, channels %d %d",
             product(precision, method).c_str(), int(c.kernel_h), int(c.kernel_w), int(g.stride_h),
             int(g.stride_w), int(c.batch), int(c.height), int(c.width), int(c.in), int(c.out));
    const Map x = Map::random(element, c.batch, c.height, c.width, c.in);
    const Weight w(c.out, c.in, c.kernel_h, c.kernel_w);
    const auto scale = floats(random_values(c.in, Element::float32));
    const auto shift = floats(random_values(c.in, Element::float32));
    Map expected = convolved(c.norm ? normed(x, scale, shift) : x, w, g);
    const Map other =
        Map::random(element, expected.batch, expected.height, expected.width, expected.channels);
    if (c.relu) relu(expected);
    if (c.add) add(expected, other);
    if (c.relu_sum) relu(expected);

    Packed packed(kernels, what, precision, method, w);
    Stored from(element, x.values), more(element, other.values);
    for (const int threads : {1, 4}) {
      Stored y(element, expected.values.size());
      ConvParams p{};
      p.precision = precision;
      p.method = method;
      p.batch = c.batch;
      p.height = c.height;
      p.width = c.width;
      p.in = c.in;
      p.out = c.out;
      p.kernel_h = c.kernel_h;
      p.kernel_w = c.kernel_w;
      p.stride_h = g.stride_h;
      p.stride_w = g.stride_w;
      p.pad_h = g.pad_h;
      p.pad_w = g.pad_w;
      p.dilation_h = g.dilation_h;
      p.dilation_w = g.dilation_w;
      p.relu = c.relu;
      p.relu_sum = c.relu_sum;
      p.x = from.data();
      p.add = c.add ? more.data() : nullptr;
      p.y = y.data();
      p.scale = c.norm ? scale.data() : nullptr;
      p.shift = c.norm ? shift.data() : nullptr;
      p.weight = packed.memory.data();
      p.bias = w.bias.data();
      run(what, kernels.plan_conv, kernels.conv, p, threads);
      compare(what, y, expected.values, element, tolerance_of(method));
    }
  }
}

void check_conv_transpose(const Kernels& kernels, Precision precision) {
  struct Case {
    int64_t height, width, in, out, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    int64_t beyond_h, beyond_w;
  };
  const Case cases[] = {{5, 6, 33, 41, 4, 4, 2, 2, 1, 1, 0, 0},
                        {3, 4, 20, 9, 4, 2, 1, 3, 0, 0, 0, 0},
                        {4, 3, 16, 16, 3, 5, 2, 3, 1, 2, 1, 0}};
  const Element element = element_of(precision);
  for (const Case& c : cases) {
    const std::string what =
        text("conv_transpose, %s, %dx%d, stride %d %d", product(precision, Method::direct).c_str(),
             int(c.kernel_h), int(c.kernel_w), int(c.stride_h), int(c.stride_w));
    const Map x = Map::random(element, 2, c.height, c.width, c.in);
    const Weight w(c.out, c.in, c.kernel_h, c.kernel_w);
    Map expected(2, (c.height - 1) * c.stride_h - 2 * c.pad_h + c.kernel_h + c.beyond_h,
                 (c.width - 1) * c.stride_w - 2 * c.pad_w + c.kernel_w + c.beyond_w, c.out);
    each(expected,
         [&](int64_t b, int64_t i, int64_t j, int64_t n) { expected.at(b, i, j, n) = w.bias[n]; });
    for (int64_t k = 0; k < c.kernel_h; ++k) {
      for (int64_t l = 0; l < c.kernel_w; ++l) {
        each(x, [&](int64_t b, int64_t i, int64_t j, int64_t n) {
          const int64_t row = i * c.stride_h - c.pad_h + k;
          const int64_t column = j * c.stride_w - c.pad_w + l;
          if (!expected.has(row, column)) return;
          for (int64_t o = 0; o < c.out; ++o)
            expected.at(b, row, column, o) += w.at(o, n, k, l) * x.at(b, i, j, n);
        });
      }
    }
    const Map other = Map::random(element, 2, expected.height, expected.width, c.out);
    relu(expected);
    add(expected, other);

    // The phases' weights, one behind the other (kernels.h).
    std::vector<char> phases;
    for (int64_t i = 0; i < c.stride_h && i < c.kernel_h; ++i) {
      for (int64_t j = 0; j < c.stride_w && j < c.kernel_w; ++j) {
        Weight phase(c.out, c.in, (c.kernel_h - i - 1) / c.stride_h + 1,
                     (c.kernel_w - j - 1) / c.stride_w + 1);
        size_t next = 0;
        for (int64_t o = 0; o < c.out; ++o)
          for (int64_t n = 0; n < c.in; ++n)
            for (int64_t k = phase.height - 1; k >= 0; --k)
              for (int64_t l = phase.width - 1; l >= 0; --l)
                phase.values[next++] =
                    static_cast<float>(w.at(o, n, i + k * c.stride_h, j + l * c.stride_w));
        Packed packed(kernels, what, precision, Method::direct, phase);
        const size_t bytes = kernels.packed_bytes(precision, Method::direct, phase.out, phase.in,
                                                  phase.height, phase.width);
        phases.insert(phases.end(), packed.memory.data(), packed.memory.data() + bytes);
      }
    }
    Memory packed(phases.size());
    memcpy(packed.data(), phases.data(), phases.size());
    Stored from(element, x.values), more(element, other.values);
    for (const int threads : {1, 3}) {
      Stored y(element, expected.values.size());
      ConvTransposeParams p{};
      p.precision = precision;
      p.batch = 2;
      p.height = c.height;
      p.width = c.width;
      p.in = c.in;
      p.out = c.out;
      p.out_height = expected.height;
      p.out_width = expected.width;
      p.kernel_h = c.kernel_h;
      p.kernel_w = c.kernel_w;
      p.stride_h = c.stride_h;
      p.stride_w = c.stride_w;
      p.pad_h = c.pad_h;
      p.pad_w = c.pad_w;
      p.relu = true;
      p.x = from.data();
      p.add = more.data();
      p.y = y.data();
      p.weight = packed.data();
      p.bias = w.bias.data();
      run(what, kernels.plan_conv_transpose, kernels.conv_transpose, p, threads);
      compare(what, y, expected.values, element, tolerance_of(Method::direct));
    }
  }
}

void check_head(const Kernels& kernels, Precision precision) {
  struct Case {
    int64_t in, middle, joints, out;
    bool add;
  };
  const Case cases[] = {{24, 33, 17, 40, true}, {20, 16, 5, 0, false}, {64, 20, 0, 24, false}};
  const Element element = element_of(precision);
  for (const Case& c : cases) {
    const std::string what =
        text("head, %s, channels %d %d %d %d", product(precision, Method::direct).c_str(),
             int(c.in), int(c.middle), int(c.joints), int(c.out));
    const Map x = Map::random(element, 2, 9, 11, c.in);
    const Map other = Map::random(element, 2, 9, 11, c.out);
    const Weight w1(c.middle, c.in, 1, 1);
    const Weight w_maps(c.joints, c.middle, 1, 1), w_next(c.out, c.middle, 1, 1);
    Map z = convolved(x, w1, {});
    relu(z);
    for (double& value : z.values) value = rounded(value, element);  // as between two steps
    Map next = convolved(z, w_next, {});
    if (c.add) add(next, other);
    const Map maps = convolved(z, w_maps, {});
    Packed p1(kernels, what, precision, Method::direct, w1);
    Packed p_maps(kernels, what, precision, Method::direct, w_maps);
    Packed p_next(kernels, what, precision, Method::direct, w_next);
    Stored from(element, x.values), more(element, other.values);
    Stored heatmaps(element, maps.values.size()), to(element, next.values.size());
    HeadParams p{};
    p.precision = precision;
    p.batch = 2;
    p.pixels = 9 * 11;
    p.in = c.in;
    p.middle = c.middle;
    p.joints = c.joints;
    p.out = c.out;
    p.x = from.data();
    p.add = c.add ? more.data() : nullptr;
    p.heatmaps = heatmaps.data();
    p.next = to.data();
    p.w1 = p1.memory.data();
    p.b1 = w1.bias.data();
    p.w_maps = p_maps.memory.data();
    p.b_maps = w_maps.bias.data();
    p.w_next = p_next.memory.data();
    p.b_next = w_next.bias.data();
    run(what, kernels.plan_head, kernels.head, p, 3);
    // A value of z halfway between two bfloat16 may round to the other.
    const double tolerance = element == Element::bfloat16 ? 2e-3 : 2e-6;
    if (c.joints) compare(what, heatmaps, maps.values, element, tolerance);
    if (c.out) compare(what, to, next.values, element, tolerance);
  }
}

void check_upsample_add(const Kernels& kernels, Element element) {
  const std::string what = text("upsample_add, %s", name_of(element));
  const int shifts[] = {1, 3, 0};
  const Map skip = Map::random(element, 2, 8, 24, 19);
  Map expected = skip;
  UpsampleAddParams p{};
  std::vector<Stored> lows;
  for (const int shift : shifts) {
    const Map low = Map::random(element, 2, 8 >> shift, 24 >> shift, 19);
    add_upsampled(expected, low, shift);
    lows.emplace_back(element, low.values);
    p.shift[p.maps++] = shift;
  }
  relu(expected);
  for (int i = 0; i < p.maps; ++i) p.low[i] = lows[i].data();
  Stored from(element, skip.values), y(element, expected.values.size());
  p.element = element;
  p.batch = 2;
  p.height = 8;
  p.width = 24;
  p.channels = 19;
  p.relu = true;
  p.skip = from.data();
  p.y = y.data();
  run(what, kernels.plan_upsample_add, kernels.upsample_add, p, 2);
  compare(what, y, expected.values, element, 1e-6);
}

void check_pool(const Kernels& kernels, Element element) {
  struct Case {
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, out_height, out_width;
    bool mean, count_pad;
  };
  const int64_t height = 7, width = 9, channels = 37;
  const Case cases[] = {{2, 2, 2, 2, 0, 0, 3, 4, false, false},
                        {3, 3, 2, 2, 1, 1, 4, 5, false, false},
                        {2, 4, 2, 1, 1, 1, 4, 8, false, false},
                        {3, 2, 1, 2, 1, 0, 7, 5, true, true},  // the last column hangs over
                        {3, 2, 1, 2, 1, 0, 7, 5, true, false}};
  for (const Case& c : cases) {
    const std::string what = text("pool, %s, %s %dx%d", name_of(element), c.mean ? "mean" : "max",
                                  int(c.kernel_h), int(c.kernel_w));
    const Map x = Map::random(element, 2, height, width, channels);
    Map expected(2, c.out_height, c.out_width, channels);
    each(expected, [&](int64_t b, int64_t i, int64_t j, int64_t n) {
      double most = -INFINITY, sum = 0;
      int count = 0;
      for (int64_t k = 0; k < c.kernel_h; ++k) {
        for (int64_t l = 0; l < c.kernel_w; ++l) {
          const int64_t row = i * c.stride_h - c.pad_h + k;
          const int64_t column = j * c.stride_w - c.pad_w + l;
          const bool padded = row < height + c.pad_h && column < width + c.pad_w;
          count += x.has(row, column) || (c.count_pad && padded);
          if (!x.has(row, column)) continue;
          most = std::fmax(most, x.at(b, row, column, n));
          sum += x.at(b, row, column, n);
        }
      }
      expected.at(b, i, j, n) = c.mean ? sum / count : most;
    });
    Stored from(element, x.values), y(element, expected.values.size());
    PoolParams p{};
    p.element = element;
    p.mean = c.mean;
    p.count_pad = c.count_pad;
    p.batch = 2;
    p.height = height;
    p.width = width;
    p.channels = channels;
    p.out_height = c.out_height;
    p.out_width = c.out_width;
    p.kernel_h = c.kernel_h;
    p.kernel_w = c.kernel_w;
    p.stride_h = c.stride_h;
    p.stride_w = c.stride_w;
    p.pad_h = c.pad_h;
    p.pad_w = c.pad_w;
    p.x = from.data();
    p.y = y.data();
    run(what, kernels.plan_pool, kernels.pool, p, 2);
    compare(what, y, expected.values, c.mean ? element : Element::float32, c.mean ? 1e-6 : 0);
  }
}

void check_concat(const Kernels& kernels, Element element) {
  const int64_t channels[] = {5, 16, 33};
  for (const bool with_add : {false, true}) {
    const std::string what = text("concat, %s%s", name_of(element), with_add ? ", add" : "");
    ConcatParams p{};
    p.element = element;
    p.pixels = 700;
    Map expected(1, 1, p.pixels, 54);
    std::vector<Stored> maps;
    int64_t first = 0;
    for (const int64_t count : channels) {
      const Map x = Map::random(element, 1, 1, p.pixels, count);
      each(x, [&](int64_t b, int64_t i, int64_t j, int64_t c) {
        expected.at(b, i, j, first + c) = x.at(b, i, j, c);
      });
      first += count;
      p.channels[p.maps++] = count;
      maps.emplace_back(element, x.values);
    }
    for (int i = 0; i < p.maps; ++i) p.x[i] = maps[i].data();
    const Map other = Map::random(element, 1, 1, p.pixels, first);
    Stored more(element, other.values), y(element, expected.values.size());
    if (with_add) {
      add(expected, other);
      p.add = more.data();
    }
    p.y = y.data();
    run(what, kernels.plan_concat, kernels.concat, p, 2);
    compare(what, y, expected.values, with_add ? element : Element::float32, with_add ? 1e-6 : 0);
  }
}

void check_add(const Kernels& kernels, Element element) {
  for (const int64_t count : {3, 40001}) {
    const std::string what = text("add, %s, %d", name_of(element), int(count));
    const auto a = random_values(count, element), b = random_values(count, element);
    std::vector<double> expected(count);
    for (int64_t i = 0; i < count; ++i)
      expected[i] = rounded(std::fmax(rounded(a[i] + b[i], Element::float32), 0), element);
    Stored left(element, a), right(element, b), y(element, count);
    const AddParams p{element, true, count, left.data(), right.data(), y.data()};
    run(what, kernels.plan_add, kernels.add, p, 2);
    compare(what, y, expected, Element::float32, 0);
  }
}

// Between NCHW and NHWC and within one, and between element types, to the bit.
void check_relayout(const Kernels& kernels, Element from, Element to) {
  const int64_t batch = 2, height = 3, width = 35, channels = 21;
  const Strides nchw{channels * height * width, height * width, width, 1};
  const Strides nhwc{channels * height * width, 1, width * channels, channels};
  const Strides apart{channels * height * width, height * width, 1, height};  // columns of rows
  const Strides* const layouts[][2] = {
      {&nchw, &nhwc}, {&nhwc, &nchw}, {&nhwc, &nhwc}, {&apart, &nhwc}};
  for (const auto& [x_at, y_at] : layouts) {
    const std::string what =
        text("relayout %d, %s to %s", int(&x_at - &layouts[0][0]) / 2, name_of(from), name_of(to));
    const auto values = random_values(batch * channels * height * width, from);
    std::vector<double> expected(values.size());
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < width; ++j) {
            const auto at = [&](const Strides& s) {
              return b * s.batch + c * s.channels + i * s.height + j * s.width;
            };
            expected[at(*y_at)] = rounded(values[at(*x_at)], to);
          }
    Stored x(from, values), y(to, values.size());
    const RelayoutParams p{from,  to,    batch, channels, height,
                           width, *x_at, *y_at, x.data(), y.data()};
    run(what, kernels.plan_relayout, kernels.relayout, p, 2);
    compare(what, y, expected, Element::float32, 0);
  }
}

void check_decode(const Kernels& kernels, Element element, DecodeMethod method) {
  const int64_t batch = 2, joints = 19, height = 13, width = 22;
  for (const bool channels_last : {false, true}) {
    const std::string what = text("decode, %s, %s, %s", name_of(element),
                                  method == DecodeMethod::argmax ? "argmax" : "quarter",
                                  channels_last ? "NHWC" : "NCHW");
    Strides s{joints * height * width, height * width, width, 1};
    if (channels_last) s = {joints * height * width, 1, width * joints, joints};
    auto values = random_values(batch * joints * height * width, element);
    const auto at = [&](int64_t b, int64_t k, int64_t i, int64_t j) -> double& {
      return values[b * s.batch + k * s.channels + i * s.height + j * s.width];
    };
    for (int64_t i = 0; i < height; ++i)  // a joint that cannot be seen
      for (int64_t j = 0; j < width; ++j) at(0, 3, i, j) = -std::fabs(at(0, 3, i, j));
    at(1, 2, 5, 6) = at(1, 2, 8, 3) = at(1, 2, 8, 4) = 2;  // of equals the first in row order
    at(1, 4, 12, 9) = 2;                                   // at the border

    std::vector<double> places, tops;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t k = 0; k < joints; ++k) {
        int64_t y = 0, x = 0;
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < width; ++j)
            if (at(b, k, i, j) > at(b, k, y, x)) y = i, x = j;
        const double top = at(b, k, y, x);
        const auto slope = [](double before, double behind) {
          return 0.25 * ((behind > before) - (behind < before));
        };
        double place_x = static_cast<double>(x), place_y = static_cast<double>(y);
        if (method == DecodeMethod::quarter && 1 < x && x < width - 1 && 1 < y && y < height - 1) {
          place_x += slope(at(b, k, y, x - 1), at(b, k, y, x + 1));
          place_y += slope(at(b, k, y - 1, x), at(b, k, y + 1, x));
        }
        places.push_back(top > 0 ? place_x : 0);
        places.push_back(top > 0 ? place_y : 0);
        tops.push_back(top);
      }
    }
    Stored maps(element, values), coords(Element::float32, places.size());
    Stored scores(Element::float32, tops.size());
    DecodeParams p{};
    p.type = element == Element::float32 ? HeatmapType::float32 : HeatmapType::bfloat16;
    p.method = method;
    p.batch = batch;
    p.joints = joints;
    p.height = height;
    p.width = width;
    p.maps = {maps.data(), s.batch, s.channels, s.height, s.width};
    p.coords = reinterpret_cast<float*>(coords.data());
    p.scores = reinterpret_cast<float*>(scores.data());
    run(what, kernels.plan_decode, kernels.decode, p, 3);
    compare(what + ": coordinates", coords, places, Element::float32, 0);
    compare(what + ": scores", scores, tops, Element::float32, 0);
  }
}

void check(const Kernels& kernels) {
  for (const Precision precision : kPrecisions) {
    for (const Method method : kMethods) {
      check_bottleneck(kernels, precision, method);
      check_conv(kernels, precision, method);
    }
    check_conv_transpose(kernels, precision);
    check_head(kernels, precision);
  }
  for (const Element element : {Element::float32, Element::bfloat16}) {
    check_upsample_add(kernels, element);
    check_pool(kernels, element);
    check_concat(kernels, element);
    check_add(kernels, element);
    for (const Element to : {Element::float32, Element::bfloat16})
      check_relayout(kernels, element, to);
    for (const DecodeMethod method : {DecodeMethod::argmax, DecodeMethod::quarter})
      check_decode(kernels, element, method);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return fprintf(stderr, "usage: check INSTRUCTION-SET\n"), 2;
  const Kernels* kernels;
  try {
    kernels = &hgfast::cpu::kernels();
  } catch (const std::exception& error) {
    return fprintf(stderr, "check: %s\n", error.what()), 1;
  }
  if (strcmp(kernels->name, arguments[1]) != 0)
    return fprintf(stderr, "check: %s was chosen, not %s\n", kernels->name, arguments[1]), 1;
  check(*kernels);
  const std::string verdict = mistakes ? text("%d mistakes", mistakes) : "ok";
  printf("%s: %d checks, %s\n", kernels->name, checks, verdict.c_str());
  return mistakes ? 1 : 0;
}
