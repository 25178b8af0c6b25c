// The instances of the bottleneck kernel, and which of them a launch takes.
#include "bottleneck.cuh"

namespace hgfast::cuda {
namespace {

constexpr int kLeastShared = 99 * 1024;  // of a block on sm_86, sm_89, sm_120; the least there is

int padded(int channels, int multiple) { return (channels + multiple - 1) / multiple * multiple; }

int64_t tiles(const BottleneckParams& p, int height, int width) {
  return (p.height + height - 1) / height * ((p.width + width - 1) / width);
}

template <class Config>
struct Instance {
  static BottleneckVariant variant(const char* name, const BottleneckParams& p) {
    const int row = padded(p.middle, Config::chunk) * 2;
    return {name, Config::threads, p.batch * tiles(p, Config::tile_h, Config::tile_w),
            Config::layout(row, p.project).end};
  }
  static cudaError_t launch(const BottleneckVariant& variant, const BottleneckParams& p,
                            int shared_limit, cudaStream_t stream) {
    // ptxas does not see dynamic shared memory, so it is checked here.
    static_assert(!Config::single || Config::layout(Config::chunk * 2, true).end <= kLeastShared);
    const int most = Config::single ? Config::layout(Config::chunk * 2, true).end : shared_limit;
    const Grid grid{variant.blocks, variant.threads, variant.shared_bytes, most};
    return cuda::launch<bottleneck_kernel<Config>>(variant.name, grid, stream, p);
  }
};

struct Entry {
  int chunk;
  bool single;
  bool large;  // the larger of two tiles
  Element element;
  const char* name;
  BottleneckVariant (*variant)(const char*, const BottleneckParams&);
  cudaError_t (*launch)(const BottleneckVariant&, const BottleneckParams&, int, cudaStream_t);
};

#define HGFAST_ENTRY(element, T, label, chunk, single, h, w, m, n, resident)    \
  {chunk,                                                                       \
   single,                                                                      \
   h * w == 128,                                                                \
   Element::element,                                                            \
   "bottleneck<" #element ", " label ", " #h "x" #w ">",                        \
   Instance<BottleneckConfig<T, chunk, single, h, w, m, n, resident>>::variant, \
   Instance<BottleneckConfig<T, chunk, single, h, w, m, n, resident>>::launch}
#define HGFAST_ENTRIES(element, T)                                \
  HGFAST_ENTRY(element, T, "128", 128, true, 8, 16, 2, 2, 2),     \
      HGFAST_ENTRY(element, T, "128", 128, true, 4, 8, 1, 4, 2),  \
      HGFAST_ENTRY(element, T, "64", 64, true, 8, 16, 4, 1, 3),   \
      HGFAST_ENTRY(element, T, "64", 64, true, 4, 8, 1, 2, 4),    \
      HGFAST_ENTRY(element, T, "32", 32, true, 8, 16, 4, 1, 4),   \
      HGFAST_ENTRY(element, T, "32", 32, true, 4, 8, 2, 1, 4),    \
      HGFAST_ENTRY(element, T, "any", 64, false, 8, 16, 4, 1, 1), \
      HGFAST_ENTRY(element, T, "any", 64, false, 4, 8, 1, 2, 4)

constexpr Entry kEntries[] = {HGFAST_ENTRIES(bfloat16, BFloat16), HGFAST_ENTRIES(float16, Float16)};

#undef HGFAST_ENTRIES
#undef HGFAST_ENTRY

bool is_single(const BottleneckParams& p) { return p.middle <= 128; }

// Whether a launch with the larger tile would be mostly idle: multiprocessors without a block, or
// tiles that hang over the edge of a small image.
bool too_large(const BottleneckParams& p, int64_t blocks, int multiprocessors) {
  return blocks < multiprocessors || tiles(p, 8, 16) * 8 * 16 * 2 > tiles(p, 4, 8) * 4 * 8 * 3;
}

// The larger tile where it occupies the device, since it computes less halo and reads the weights
// less often; otherwise the smaller, which makes four times as many blocks.
const Entry* choose(const BottleneckParams& p, int multiprocessors, int shared_limit,
                    BottleneckVariant& variant) {
  const int chunk = bottleneck_tape(p.in, p.middle, p.out).chunk;
  for (const Entry& entry : kEntries) {  // of two, the larger tile comes first
    if (entry.element != p.element || entry.chunk != chunk || entry.single != is_single(p))
      continue;
    variant = entry.variant(entry.name, p);
    if (entry.large && too_large(p, variant.blocks, multiprocessors)) continue;
    if (variant.shared_bytes <= shared_limit) return &entry;
  }
  return nullptr;
}

}  // namespace

BottleneckTape bottleneck_tape(int in, int middle, int out) {
  const int chunk = middle <= 32 ? 32 : middle <= 64 || middle > 128 ? 64 : 128;
  return {chunk, padded(in, kSliceColumns), padded(middle, chunk), padded(out, chunk)};
}

cudaError_t shared_memory_of_a_block(int& bytes) {
  Device device{};
  const auto error = current_device(device);
  bytes = device.shared_bytes;
  return error;
}

cudaError_t is_hopper(bool& there) {
  Device device{};
  if (const auto error = current_device(device)) return error;
  there = device.major == 9 && device.minor == 0;
  return cudaSuccess;
}

bool choose_bottleneck(const BottleneckParams& p, int multiprocessors, int shared_limit,
                       BottleneckVariant& variant) {
  return choose(p, multiprocessors, shared_limit, variant) != nullptr;
}

std::vector<BottleneckVariant> bottleneck_variants() {
  std::vector<BottleneckVariant> variants;
  for (const Entry& entry : kEntries) {
    BottleneckParams p{};
    p.middle = entry.single ? entry.chunk : 256;
    p.project = true;
    variants.push_back(entry.variant(entry.name, p));
  }
  return variants;
}

cudaError_t bottleneck(const BottleneckParams& p, cudaStream_t stream, const char** name) {
  if (p.batch == 0) return cudaSuccess;
  if (!is_sensible(p)) return cudaErrorInvalidValue;
  Device device{};
  if (const auto error = current_device(device)) return error;
  BottleneckVariant variant;
  const Entry* entry = choose(p, device.multiprocessors, device.shared_bytes, variant);
  if (!entry) return cudaErrorInvalidConfiguration;
  if (name) *name = variant.name;
  return entry->launch(variant, p, device.shared_bytes, stream);
}

}  // namespace hgfast::cuda
