// The instances of the bottleneck kernel over clusters, and which of them a launch takes.
#include "hopper_latency.cuh"

namespace hgfast::cuda {
namespace {

// What a block may have so that two share a multiprocessor: of 228 KiB, of which every block has
// one for the system.
constexpr int kShared = 113 * 1024;
constexpr int kMostStrips = 4;  // of 16 middle channels of a block
constexpr int kFewestSlots = 3;

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
  if (!is_sensible(p)) return cudaErrorInvalidValue;
  Device device{};
  if (const auto error = current_device(device)) return error;
  if (device.major != 9 || device.minor != 0) return cudaErrorNotSupported;
  LatencyVariant variant;
  const Entry* entry = choose(p, device.multiprocessors, device.shared_bytes, variant);
  if (!entry) return cudaErrorInvalidConfiguration;
  if (name) *name = variant.name;
  return entry->launch(variant, p, programmatic, device.shared_bytes, stream);
}

// ---- Chains
// ------------------------------------------------------------------------------------

namespace {

template <class T>
using SubtreeConfig = LatencyConfig<T, 1>;
constexpr int kSubtreeSlots = 6;  // at most: the weights of a 256/128/256 block, and a sixth

// Steps that read only what is there, on maps that fit a tile; and the same channels in all.
bool sensible_chain(const SubtreeParams& p) {
  if (p.steps < 1 || p.steps > SubtreeParams::kMostSteps) return false;
  const BottleneckParams& first = p.blocks[0];
  for (int i = 0; i < p.steps; ++i) {
    BottleneckParams block = p.blocks[i];
    block.x = first.x;  // of the others none is read
    block.y = p.blocks[p.steps - 1].y;
    block.low = nullptr;
    if (!is_sensible(block) || block.project || block.in != first.in) return false;
    if (block.middle != first.middle || block.element != first.element) return false;
    if (block.batch != first.batch || block.height > 8 || block.width > 8) return false;
    const int source = p.source[i], low = p.low[i];
    if (source >= i || low >= i || (source < 0) != (i == 0)) return false;
    if (source >= 0 &&
        (block.x_height != p.blocks[source].height || block.x_width != p.blocks[source].width))
      return false;
    if (low >= 0 &&
        (block.height != 2 * p.blocks[low].height || block.width != 2 * p.blocks[low].width))
      return false;
  }
  return first.middle == 32 || first.middle == 64 || first.middle == 128;
}

// Places for the results from `begin` on: one is free again once all that reads it is done. Gives
// the end.
int place_maps(SubtreeParams& p, int begin) {
  struct Place {
    int at, bytes, last;  // the last step that reads what lies there
  };
  std::vector<Place> places;
  for (int i = 0; i < p.steps - 1; ++i) {
    const BottleneckParams& block = p.blocks[i];
    const int bytes = static_cast<int>(block.height * block.width) * (2 * block.out + 16);
    int last = i;
    for (int reader = i + 1; reader < p.steps; ++reader)
      if (p.source[reader] == i || p.low[reader] == i) last = reader;
    Place* found = nullptr;
    for (Place& place : places)
      if (place.last < i && place.bytes >= bytes && (!found || place.bytes < found->bytes))
        found = &place;
    if (!found) {
      places.push_back({begin, bytes, last});
      begin += bytes;
      found = &places.back();
    }
    found->last = last;
    p.maps[i] = found->at;
  }
  return begin;
}

// Fills in what the launcher does; gives the bytes of shared memory, 0 where it is too little.
template <class Config>
int arrange(SubtreeParams& p, int shared_limit) {
  const BottleneckParams& first = p.blocks[0];
  p.cluster = first.middle / 16;
  p.order = latency_tape(first.in, first.middle, first.out, false);
  p.at = latency_layout<Config>(first, p.order, p.cluster, p.steps);
  p.at.ring = place_maps(p, p.at.ring);
  const int room = (shared_limit - p.at.ring) / Config::slot_bytes;
  p.slots = room < kSubtreeSlots ? room : kSubtreeSlots;
  if (p.slots > p.steps * p.at.stages) p.slots = p.steps * p.at.stages;
  const bool fits = room >= kFewestSlots && first.out % (16 * p.cluster) == 0;
  return fits ? p.at.ring + p.slots * Config::slot_bytes : 0;
}

template <class T>
cudaError_t launch_subtree(const char* name, SubtreeParams p, cudaStream_t stream) {
  using Config = SubtreeConfig<T>;
  Device device{};
  if (const auto error = current_device(device)) return error;
  if (device.major != 9 || device.minor != 0) return cudaErrorNotSupported;
  const int bytes = arrange<Config>(p, device.shared_bytes);
  if (!bytes) return cudaErrorInvalidConfiguration;
  Grid grid{p.blocks[0].batch * p.cluster, Config::threads, bytes, device.shared_bytes};
  grid.cluster = p.cluster;
  grid.programmatic = p.programmatic;
  return cuda::launch<subtree_kernel<Config>>(name, grid, stream, p);
}

constexpr const char* kSubtrees[] = {"subtree<bfloat16>", "subtree<float16>"};

}  // namespace

cudaError_t subtree(const SubtreeParams& p, cudaStream_t stream, const char** name) {
  if (p.blocks[0].batch == 0) return cudaSuccess;
  if (!sensible_chain(p)) return cudaErrorInvalidValue;
  const bool bfloat16 = p.blocks[0].element == Element::bfloat16;
  const char* const variant = kSubtrees[bfloat16 ? 0 : 1];
  if (name) *name = variant;
  return bfloat16 ? launch_subtree<BFloat16>(variant, p, stream)
                  : launch_subtree<Float16>(variant, p, stream);
}

bool subtree_fits(const SubtreeParams& params, int shared_limit) {
  SubtreeParams p = params;
  for (int i = 0; i < p.steps; ++i) {
    const int64_t x = p.source[i] < 0 ? 16 : p.blocks[p.source[i]].height;
    p.blocks[i].height = p.blocks[i].width = p.source[i] < 0 ? 8 : p.blocks[i].pool ? x / 2 : x;
  }
  return arrange<SubtreeConfig<BFloat16>>(p, shared_limit) > 0;
}

std::vector<BottleneckVariant> subtree_variants() {
  using Config = SubtreeConfig<BFloat16>;
  // 8x8, 4x4, 4x4, 4x4, 8x8 with the upsampled map, 8x8.
  SubtreeParams p{};
  p.steps = 6;
  const int sizes[] = {8, 4, 4, 4, 8, 8}, sources[] = {-1, 0, 1, 2, 0, 4};
  for (int i = 0; i < p.steps; ++i) {
    BottleneckParams& block = p.blocks[i];
    block.in = block.out = 256;
    block.middle = 128;
    block.height = block.width = sizes[i];
    p.source[i] = sources[i];
    p.low[i] = i == 4 ? 3 : -1;
  }
  const int bytes = arrange<Config>(p, 227 * 1024);
  std::vector<BottleneckVariant> variants;
  for (const char* name : kSubtrees) variants.push_back({name, Config::threads, 0, bytes});
  return variants;
}

}  // namespace hgfast::cuda
