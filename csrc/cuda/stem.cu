// The instances of the stem's kernel, and how a launch shares out its tiles.
#include "stem.cuh"

namespace hgfast::cuda {
namespace {

bool sensible(const StemParams& p) {
  if (p.batch < 0 || p.height < 1 || p.width < 1) return false;
  if (p.out < 16 || p.out > 64 || p.out % 16) return false;
  if (p.x_batch < 0 || p.x_channel < 0 || p.x_row < 0 || p.x_column < 0) return false;
  // Offsets in an image are int, and so are rows and columns beyond its edges.
  constexpr int64_t kMost = INT32_MAX - 64;
  if (p.height > kMost || p.width > kMost) return false;
  for (const int64_t stride : {p.x_channel, p.x_row, p.x_column})
    if (stride > kMost) return false;
  const int64_t last = (StemParams::kChannels - 1) * p.x_channel + (p.height - 1) * p.x_row +
                       (p.width - 1) * p.x_column;
  if (last > kMost) return false;
  if (!p.scale != !p.shift) return false;
  return p.x && p.y && p.b && p.tape;
}

template <class Config>
cudaError_t launch_stem(const char* name, StemParams p, cudaStream_t stream) {
  static_assert(Config::shared_bytes <= 48 * 1024);  // on every device, without being asked for
  Device device{};
  if (const auto error = current_device(device)) return error;
  const int64_t height = (p.height + 1) / 2, width = (p.width + 1) / 2;
  const int64_t tiles = p.batch * ((height + Config::tile_h - 1) / Config::tile_h) *
                        ((width + Config::tile_w - 1) / Config::tile_w);
  if (tiles > INT32_MAX / 2) return cudaErrorInvalidValue;
  // As many blocks as run at the same time, so that each copies the weights once.
  const int64_t at_once = int64_t{device.multiprocessors} * Config::resident;
  p.tiles_a_block = static_cast<int>((tiles + at_once - 1) / at_once);
  const int64_t blocks = (tiles + p.tiles_a_block - 1) / p.tiles_a_block;
  const Grid grid{blocks, Config::threads, Config::shared_bytes, Config::shared_bytes};
  return launch<stem_kernel<Config>>(name, grid, stream, p);
}

struct Entry {
  Element element;
  int rows;  // channels, padded
  const char* name;
  int threads, shared_bytes;
  cudaError_t (*launch)(const char*, StemParams, cudaStream_t);
};

#define HGFAST_ENTRY(element, T, rows)    \
  {Element::element,                      \
   rows,                                  \
   "stem<" #element ", " #rows ">",       \
   StemConfig<T, rows / 8>::threads,      \
   StemConfig<T, rows / 8>::shared_bytes, \
   launch_stem<StemConfig<T, rows / 8>>}
constexpr Entry kEntries[] = {
    HGFAST_ENTRY(bfloat16, BFloat16, 64), HGFAST_ENTRY(bfloat16, BFloat16, 32),
    HGFAST_ENTRY(float16, Float16, 64), HGFAST_ENTRY(float16, Float16, 32)};
#undef HGFAST_ENTRY

}  // namespace

std::vector<BottleneckVariant> stem_variants() {
  std::vector<BottleneckVariant> variants;
  for (const Entry& entry : kEntries)
    variants.push_back({entry.name, entry.threads, 0, entry.shared_bytes});
  return variants;
}

cudaError_t stem(const StemParams& p, cudaStream_t stream, const char** name) {
  if (p.batch == 0) return cudaSuccess;
  if (!sensible(p)) return cudaErrorInvalidValue;
  for (const Entry& entry : kEntries) {
    if (entry.element != p.element || entry.rows != stem_rows(p.out)) continue;
    if (name) *name = entry.name;
    return entry.launch(entry.name, p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace hgfast::cuda
