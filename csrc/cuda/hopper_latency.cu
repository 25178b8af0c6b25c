// The instances of the bottleneck kernel over clusters, and which of them a launch takes.
#include "hopper_latency.cuh"

namespace hgfast::cuda {
namespace {

// What a block may have so that two share a multiprocessor: of 228 KiB, of which every block has
// one for the system.
constexpr int kShared = 113 * 1024;
constexpr int kMostStrips = 4;  // of 16 middle channels of a block
constexpr int kFewestSlots = 3;

bool sensible(const BottleneckParams& p) {
  for (const int channels : {p.in, p.middle, p.out})
    if (channels < 16 || channels % 16) return false;
  if (p.batch < 0 || p.height < 1 || p.width < 1) return false;
  const int64_t x_height = p.pool ? p.x_height / 2 : p.x_height;
  const int64_t x_width = p.pool ? p.x_width / 2 : p.x_width;
  if (x_height != p.height || x_width != p.width) return false;
  // Offsets in an image are int.
  if (p.x_height * p.x_width * p.in > INT32_MAX) return false;
  if (p.height * p.width * p.out > INT32_MAX) return false;
  if (!p.project && p.in != p.out) return false;
  if (!p.scale != !p.shift) return false;
  if (p.low && (p.height % 2 || p.width % 2)) return false;
  return p.x && p.y && p.b1 && p.b2 && p.b3 && p.tape;
}

template <class Config>
struct Instance {
  // False where a block would need more shared memory than there is.
  static bool variant(const char* name, const BottleneckParams& p, int cluster, int shared_limit,
                      LatencyVariant& variant) {
    constexpr int tile = Config::tile;
    const int64_t tiles = (p.height + tile - 1) / tile * ((p.width + tile - 1) / tile);
    const LatencyTape order = latency_tape(p.in, p.middle, p.out, p.project);
    const LatencyLayout at = latency_layout<Config>(p, order, cluster);
    const int stages = at.stages;
    const auto slots = [&](int bytes) {
      const int room = (bytes - at.ring) / Config::slot_bytes;
      const int most = stages < kLatencySlots ? stages : kLatencySlots;
      return room < most ? room : most;
    };
    const int fewest = stages < kFewestSlots ? stages : kFewestSlots;
    int taken = slots(shared_limit < kShared ? shared_limit : kShared);
    if (taken < fewest) taken = slots(shared_limit);  // and one block on a multiprocessor
    const bool fits = taken >= fewest;
    if (!fits) taken = fewest;
    variant = {name,
               Config::threads,
               cluster,
               p.batch * tiles * cluster,
               at.ring + taken * Config::slot_bytes,
               taken,
               stages};
    return fits;
  }
  static cudaError_t launch(const LatencyVariant& variant, const BottleneckParams& block,
                            bool programmatic, int shared_limit, cudaStream_t stream) {
    LatencyParams p{block,
                    programmatic,
                    variant.cluster,
                    variant.slots,
                    latency_tape(block.in, block.middle, block.out, block.project),
                    {}};
    p.at = latency_layout<Config>(block, p.order, variant.cluster);
    Grid grid{variant.blocks, variant.threads, variant.shared_bytes, shared_limit};
    grid.cluster = variant.cluster;
    grid.programmatic = programmatic;
    return cuda::launch<latency_kernel<Config>>(variant.name, grid, stream, p);
  }
};

struct Entry {
  int strips;
  Element element;
  const char* name;
  bool (*variant)(const char*, const BottleneckParams&, int, int, LatencyVariant&);
  cudaError_t (*launch)(const LatencyVariant&, const BottleneckParams&, bool, int, cudaStream_t);
};

#define HGFAST_ENTRY(element, T, strips, channels)                   \
  {strips, Element::element, "latency<" #element ", " #channels ">", \
   Instance<LatencyConfig<T, strips>>::variant, Instance<LatencyConfig<T, strips>>::launch}

constexpr Entry kEntries[] = {
    HGFAST_ENTRY(bfloat16, BFloat16, 1, 16), HGFAST_ENTRY(bfloat16, BFloat16, 2, 32),
    HGFAST_ENTRY(bfloat16, BFloat16, 4, 64), HGFAST_ENTRY(float16, Float16, 1, 16),
    HGFAST_ENTRY(float16, Float16, 2, 32),   HGFAST_ENTRY(float16, Float16, 4, 64)};

#undef HGFAST_ENTRY

// The instance for clusters of that size; null where there is none.
const Entry* entry_for(const BottleneckParams& p, int cluster, int shared_limit,
                       LatencyVariant& variant) {
  if (p.in % 16 || p.middle % (16 * cluster) || p.out % (16 * cluster)) return nullptr;
  const int strips = p.middle / 16 / cluster;
  if (strips > kMostStrips) return nullptr;
  for (const Entry& entry : kEntries)
    if (entry.element == p.element && entry.strips >= strips)
      return entry.variant(entry.name, p, cluster, shared_limit, variant) ? &entry : nullptr;
  return nullptr;
}

const Entry* choose(const BottleneckParams& p, int multiprocessors, int shared_limit,
                    LatencyVariant& variant) {
  const Entry* chosen = nullptr;
  for (const int cluster : {8, 4, 2}) {
    LatencyVariant found;
    const Entry* entry = entry_for(p, cluster, shared_limit, found);
    if (!entry) continue;
    chosen = entry;
    variant = found;
    if (found.blocks <= multiprocessors) break;
  }
  return chosen;
}

}  // namespace

bool choose_latency(const BottleneckParams& p, int multiprocessors, int shared_limit,
                    LatencyVariant& variant) {
  return choose(p, multiprocessors, shared_limit, variant) != nullptr;
}

std::vector<BottleneckVariant> latency_variants() {
  std::vector<BottleneckVariant> variants;
  for (const Entry& entry : kEntries) {
    BottleneckParams p{};
    p.in = p.out = 256;
    p.middle = 128;
    LatencyVariant variant;
    entry.variant(entry.name, p, 8 / entry.strips, kShared, variant);
    variants.push_back({variant.name, variant.threads, 0, variant.shared_bytes});
  }
  return variants;
}

cudaError_t latency(const BottleneckParams& p, bool programmatic, cudaStream_t stream,
                    const char** name) {
  if (p.batch == 0) return cudaSuccess;
  if (!sensible(p)) return cudaErrorInvalidValue;
  Device device{};
  if (const auto error = current_device(device)) return error;
  if (device.major != 9 || device.minor != 0) return cudaErrorNotSupported;
  LatencyVariant variant;
  const Entry* entry = choose(p, device.multiprocessors, device.shared_bytes, variant);
  if (!entry) return cudaErrorInvalidConfiguration;
  if (name) *name = variant.name;
  return entry->launch(variant, p, programmatic, device.shared_bytes, stream);
}

}  // namespace hgfast::cuda
