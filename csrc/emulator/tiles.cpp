// The copy engine: boxes of maps and plain bytes into shared memory, boxes of it into maps.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "cluster.h"
#include "device_model.h"
#include "hopper_model.h"

namespace hgfast::cuda {
namespace {

int row_of(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::none:
      return 0;
    case Swizzle::rows_of_32:
      return 32;
    case Swizzle::rows_of_64:
      return 64;
    case Swizzle::rows_of_128:
      return 128;
  }
  return 0;
}

}  // namespace

cudaError_t make_tensor_map(TensorMap& map, const void* address, const TileShape& shape, bool) {
  const int64_t row = int64_t{2} * shape.box_channels;
  const bool good = reinterpret_cast<uintptr_t>(address) % 16 == 0 && shape.channels % 8 == 0 &&
                    shape.channels > 0 && shape.width > 0 && shape.height > 0 && shape.batch > 0 &&
                    shape.box_channels >= 8 && row % 16 == 0 && shape.box_channels <= 256 &&
                    shape.box_width >= 1 && shape.box_width <= 256 && shape.box_height >= 1 &&
                    shape.box_height <= 256 &&
                    (shape.swizzle == Swizzle::none || row == row_of(shape.swizzle)) &&
                    std::max({shape.width, shape.height, shape.batch}) <= int64_t{1} << 32;
  if (!good) return cudaErrorInvalidValue;
  map = {static_cast<const char*>(address), shape};
  return cudaSuccess;
}

namespace emulator {
namespace {

uint32_t bytes_of(const TileShape& shape) {
  return static_cast<uint32_t>(shape.box_channels * shape.box_width * shape.box_height * 2);
}

// Where the piece of 16 bytes that would lie at an address does lie.
uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  const uint32_t pieces = static_cast<uint32_t>(row_of(swizzle)) / 16;
  return pieces ? address ^ ((address / 128 % pieces) * 16) : address;
}

}  // namespace

// visit(address, map's bytes or null outside, how many bytes): pieces of 16 bytes, each from its
// begin in shared memory before the swizzle. The last one of a row may be cut off by the map's end.
template <class Visit>
void Block::visit_box(const TensorMap& map, const int* at, Visit&& visit) {
  const TileShape& s = map.shape;
  uint32_t offset = 0;
  for (int y = 0; y < s.box_height; ++y)
    for (int x = 0; x < s.box_width; ++x)
      for (int c = 0; c < s.box_channels; c += 8, offset += 16) {
        const int64_t channel = at[0] + c, column = at[1] + x, row = at[2] + y, image = at[3];
        const bool inside = channel >= 0 && channel < s.channels && column >= 0 &&
                            column < s.width && row >= 0 && row < s.height && image >= 0 &&
                            image < s.batch;
        visit(offset,
              inside
                  ? map.address +
                        (((image * s.height + row) * s.width + column) * s.channels + channel) * 2
                  : nullptr);
      }
}

void Block::check_tile(const char* function, const TensorMap& map, uint32_t address, Place place) {
  if (!map.address)
    fail("bad map", thread_, "%s at %s:%d: the map was never made", function, place.file,
         place.line);
  // With a swizzle the pattern repeats with the address: a box that begins elsewhere is legal, and
  // hardly ever meant.
  const int row = row_of(map.shape.swizzle);
  check_shared(function, address, bytes_of(map.shape), row ? static_cast<uint32_t>(row) * 8 : 128,
               thread_, place);
}

void Block::load_tile(uint32_t to, const TensorMap& map, uint32_t barrier, const int (&at)[4],
                      Place place) {
  check_tile("load_tile", map, to, place);
  if (at[0] % 8)
    fail("misaligned", thread_, "load_tile at %s:%d begins at channel %d; the model wants eights",
         place.file, place.line, at[0]);
  (void)barrier_at(*this, "load_tile", barrier, place);
  const Asker asker = this->asker(thread_, place);
  const uint32_t bytes = bytes_of(map.shape);
  visit_box(map, at, [&](uint32_t, const char* from) {
    if (!from) return;
    check_global("load_tile", from, 16, false, 16, place);
    counters_.global_bytes_loaded += 16;
    if (cache_) cache_->read(from, 16);
  });
  for (uint32_t i = 0; i < bytes; i += 4)
    if (const Fault fault = shared_.begin_copy(to + i, asker, false); fault != Fault::none)
      fail_shared(fault, "load_tile", true, to + i, thread_, place, *this);
  std::memset(shared_.at(to), 0xff, bytes);
  counters_.tile_bytes += bytes;
  cluster_->begin_copy(
      {rank_, to, barrier, nullptr, bytes, map, {at[0], at[1], at[2], at[3]}, asker.by});
}

void Block::load_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier, uint32_t ranks,
                      const char* function, Place place) {
  if (!ranks)
    fail("no such block", thread_, "%s at %s:%d: for nobody", function, place.file, place.line);
  if (bytes <= 0 || bytes % 16)
    fail("misaligned", thread_, "%s at %s:%d: %d bytes, no multiple of 16", function, place.file,
         place.line, bytes);
  const auto count = static_cast<uint32_t>(bytes);
  check_shared(function, to, count, 16, thread_, place);
  check_global(function, from, count, false, 16, place);
  counters_.global_bytes_loaded += count;
  if (cache_) cache_->read(from, count);
  const Asker asker = this->asker(thread_, place);
  for (int rank = 0; rank < 32; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    Block& other = other_block(function, rank, place);
    (void)barrier_at(other, function, barrier, place);
    for (uint32_t i = 0; i < count; i += 4)
      if (const Fault fault = other.shared_.begin_copy(to + i, asker, false); fault != Fault::none)
        fail_shared(fault, function, true, to + i, thread_, place, other);
    std::memset(other.shared_.at(to), 0xff, count);
    other.counters_.bulk_bytes += count;
    cluster_->begin_copy(
        {rank, to, barrier, static_cast<const char*>(from), count, {}, {}, asker.by});
  }
}

void Block::deliver(uint32_t to, const char* bytes, const TensorMap* map, const int* at,
                    uint32_t count, uint32_t address, Stamp by) {
  BarrierState* barrier = nullptr;
  for (BarrierState& one : barriers_)
    if (one.address == address) barrier = &one;
  if (map) {
    visit_box(*map, at, [&](uint32_t offset, const char* from) {
      char* const place = shared_.at(swizzled(to + offset, map->shape.swizzle));
      if (from)
        std::memcpy(place, from, 16);
      else
        std::memset(place, 0, 16);
    });
  } else {
    std::memcpy(shared_.at(to), bytes, count);
  }
  for (uint32_t i = 0; i < count; i += 4)
    shared_.end_copy(to + i, barrier->agent, barrier->phase + 1, by, false);
  barrier->bytes -= count;
  barrier->brought_in = barrier->phase + 1;
  barrier->brought_to = to;
  barrier->brought_by = by;
  complete_if_over(*barrier);
}

// ---- Back
// ----------------------------------------------------------------------------------------

void Block::store_tile(const TensorMap& map, uint32_t from, const int (&at)[4], Place place) {
  check_tile("store_tile", map, from, place);
  Thread& thread = thread_states_[thread_];
  if (thread.store_agent < 0) thread.store_agent = cluster_->new_agent();
  if (thread.store_agent < 0) fail("bad store", thread_, "too many storing threads");
  const Asker asker = this->asker(thread_, place);
  const SharedMemory::AsyncReader reader{static_cast<uint32_t>(thread.store_agent),
                                         thread.store_groups + 1, 1, asker.by};
  for (uint32_t i = 0; i < bytes_of(map.shape); i += 4)
    if (const Fault fault = shared_.read_async(from + i, &asker, 1, reader); fault != Fault::none)
      fail_shared(fault, "store_tile", false, from + i, thread_, place, *this);
  visit_box(map, at, [&](uint32_t, const char* to) {
    if (to) check_global("store_tile", to, 16, true, 16, place);
  });
  thread.stores.push_back({map, from, {at[0], at[1], at[2], at[3]}, asker.by, thread.store_groups});
}

void Block::commit_stores() { ++thread_states_[thread_].store_groups; }

void Block::wait_stores(int pending) {
  Thread& thread = thread_states_[thread_];
  size_t done = 0;
  while (done < thread.stores.size() &&
         thread.stores[done].group + static_cast<uint32_t>(pending) < thread.store_groups)
    deliver(thread.stores[done++]);
  thread.stores.erase(thread.stores.begin(),
                      thread.stores.begin() + static_cast<std::ptrdiff_t>(done));
  if (thread.store_agent < 0) return;
  const uint32_t over = thread.store_groups - std::min<uint32_t>(thread.store_groups, pending);
  learn(thread, cluster_->clocks().raise(thread.clock, thread.store_agent, over, over));
}

void Block::deliver(const Store& store) {
  visit_box(store.map, store.at, [&](uint32_t offset, const char* to) {
    if (!to) return;
    const char* const piece = shared_.at(swizzled(store.from + offset, store.map.shape.swizzle));
    write_global("store_tile", const_cast<char*>(to), piece, 16, store.by);
    counters_.stored_tile_bytes += 16;
  });
}

void Block::fence_async() {
  Thread& thread = thread_states_[thread_];
  thread.fenced = thread.time++;
}

// ---- The functions of hopper.cuh
// -----------------------------------------------------------------

void fence_async() { Block::current().fence_async(); }
void load_tile(Shared to, const TensorMap& map, Barrier barrier, const int (&at)[4], Place place) {
  Block::current().load_tile(to, map, barrier, at, place);
}
void load_bulk(Shared to, const void* from, int bytes, Barrier barrier, uint32_t ranks,
               const char* function, Place place) {
  Block::current().load_bulk(to, from, bytes, barrier, ranks, function, place);
}
void store_tile(const TensorMap& map, Shared from, const int (&at)[4], Place place) {
  Block::current().store_tile(map, from, at, place);
}
void commit_stores() { Block::current().commit_stores(); }
void wait_stores(int pending) { Block::current().wait_stores(pending); }

}  // namespace emulator
}  // namespace hgfast::cuda
