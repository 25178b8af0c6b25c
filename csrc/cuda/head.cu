// The instances of the head's kernel, and which of them a launch takes.
#include "head.cuh"

namespace hgfast::cuda {
namespace {

constexpr int kLeastShared = 99 * 1024;  // of a block on sm_86, sm_89, sm_120; the least there is

int padded(int channels, int multiple) { return (channels + multiple - 1) / multiple * multiple; }

bool sensible(const HeadParams& p) {
  for (const int channels : {p.in, p.middle})
    if (channels < 16 || channels % 16) return false;
  if (p.out < 0 || p.out % 16 || p.joints < 0 || p.joints > kMostJoints) return false;
  if (p.pixels < 0 || (!p.out && !p.joints) || (p.x && !p.out)) return false;
  if (p.out && !(p.next && p.bn)) return false;
  if (p.joints && !(p.heatmaps && p.bh)) return false;
  return p.y && p.b1 && p.tape;
}

template <class Config>
struct Instance {
  static BottleneckVariant variant(const char* name, const HeadParams& p) {
    const HeadTape tape = head_tape(p.in, p.middle, p.out, p.joints);
    return {name, Config::threads, (p.pixels + Config::pixels - 1) / Config::pixels,
            Config::layout(tape.middle, tape.joints).end};
  }
  static cudaError_t launch(const BottleneckVariant& variant, const HeadParams& p, int shared_limit,
                            cudaStream_t stream) {
    // ptxas does not see dynamic shared memory, so it is checked here: what an hourglass needs.
    static_assert(Config::layout(256, 64).end <= kLeastShared || Config::chunk != 128);
    static_assert(Config::layout(64, 64).end <= kLeastShared);
    const Grid grid{variant.blocks, variant.threads, variant.shared_bytes, shared_limit};
    return cuda::launch<head_kernel<Config>>(variant.name, grid, stream, p);
  }
};

struct Entry {
  Element element;
  int chunk, pixels;
  const char* name;
  BottleneckVariant (*variant)(const char*, const HeadParams&);
  cudaError_t (*launch)(const BottleneckVariant&, const HeadParams&, int, cudaStream_t);
};

#define HGFAST_ENTRY(element, T, chunk, pixels, stages, resident)     \
  {Element::element,                                                  \
   chunk,                                                             \
   pixels,                                                            \
   "head<" #element ", " #chunk ", " #pixels ">",                     \
   Instance<HeadConfig<T, chunk, pixels, stages, resident>>::variant, \
   Instance<HeadConfig<T, chunk, pixels, stages, resident>>::launch}
#define HGFAST_ENTRIES(element, T)                                                   \
  HGFAST_ENTRY(element, T, 128, 128, 2, 2), HGFAST_ENTRY(element, T, 128, 32, 3, 4), \
      HGFAST_ENTRY(element, T, 64, 128, 3, 3), HGFAST_ENTRY(element, T, 64, 32, 3, 4)

constexpr Entry kEntries[] = {HGFAST_ENTRIES(bfloat16, BFloat16), HGFAST_ENTRIES(float16, Float16)};

#undef HGFAST_ENTRIES
#undef HGFAST_ENTRY

// The larger tile where it gives each multiprocessor a block, since it reads the weights less
// often; otherwise the smaller.
const Entry* choose(const HeadParams& p, int multiprocessors, int shared_limit,
                    BottleneckVariant& variant) {
  const int chunk = head_tape(p.in, p.middle, p.out, p.joints).chunk;
  for (const Entry& entry : kEntries) {  // of two, the larger tile comes first
    if (entry.element != p.element || entry.chunk != chunk) continue;
    variant = entry.variant(entry.name, p);
    if (entry.pixels == 128 && variant.blocks < multiprocessors) continue;
    if (variant.shared_bytes <= shared_limit) return &entry;
  }
  return nullptr;
}

}  // namespace

HeadTape head_tape(int in, int middle, int out, int joints) {
  const int chunk = middle <= 64 && out <= 64 ? 64 : 128;
  return {chunk, padded(in, kSliceColumns), padded(middle, chunk), padded(out, chunk),
          padded(joints, kJointRows)};
}

bool choose_head(const HeadParams& p, int multiprocessors, int shared_limit,
                 BottleneckVariant& variant) {
  return choose(p, multiprocessors, shared_limit, variant) != nullptr;
}

std::vector<BottleneckVariant> head_variants() {
  std::vector<BottleneckVariant> variants;
  for (const Entry& entry : kEntries) {
    HeadParams p{};
    p.in = p.middle = p.out = entry.chunk == 64 ? 64 : 256;
    p.joints = 17;
    variants.push_back(entry.variant(entry.name, p));
  }
  return variants;
}

cudaError_t head(const HeadParams& p, cudaStream_t stream, const char** name) {
  if (p.pixels == 0) return cudaSuccess;
  if (!sensible(p)) return cudaErrorInvalidValue;
  Device device{};
  if (const auto error = current_device(device)) return error;
  BottleneckVariant variant;
  const Entry* entry = choose(p, device.multiprocessors, device.shared_bytes, variant);
  if (!entry) return cudaErrorInvalidConfiguration;
  if (name) *name = variant.name;
  return entry->launch(variant, p, device.shared_bytes, stream);
}

}  // namespace hgfast::cuda
