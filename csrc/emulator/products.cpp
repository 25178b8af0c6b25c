// Products of warpgroups. Each warp issues its own part, 16 of the 64 rows; the four go on by
// themselves, and what one of them knows of the others' reads it learns from barriers alone.
#include <algorithm>
#include <cstring>
#include <limits>

#include "block.h"
#include "cluster.h"
#include "device_model.h"
#include "formats.h"
#include "hopper_model.h"

namespace hgfast::cuda::emulator {
namespace {

constexpr int kRows = 16, kDepth = 16, kCore = 128;  // of a warp; of a product; bytes of 8 x 8

struct Operand {
  uint32_t start, columns, rows;
  explicit Operand(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        columns(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        rows(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4) {}
  // The 8 x 8 elements of these eights.
  uint32_t core(int row, int column) const {
    return start + static_cast<uint32_t>(row) * rows + static_cast<uint32_t>(column) * columns;
  }
};

// d (16, n) += a (16, 16) * b, b given as 8 x 8 elements: (2, n / 8) pointers to words.
template <class T>
void multiply(float* d, int n, const uint32_t (&a)[kRows][8], const uint32_t* const* b) {
  float weights[kDepth][256];
  for (int half = 0; half < 2; ++half)
    for (int group = 0; group < n / 8; ++group) {
      const uint32_t* const core = b[half * (n / 8) + group];
      for (int row = 0; row < 8; ++row)
        for (int pair = 0; pair < 4; ++pair) {
          const uint32_t both = core[row * 4 + pair];
          weights[half * 8 + pair * 2][group * 8 + row] = to_float<T>(both & 0xffff);
          weights[half * 8 + pair * 2 + 1][group * 8 + row] = to_float<T>(both >> 16);
        }
    }
  for (int row = 0; row < kRows; ++row) {
    float* const sums = d + row * n;
    for (int k = 0; k < kDepth; ++k) {
      const uint32_t both = a[row][k / 2];
      const float factor = to_float<T>(k % 2 ? both >> 16 : both & 0xffff);
      for (int i = 0; i < n; ++i) sums[i] += factor * weights[k][i];
    }
  }
}

}  // namespace

const char* Block::warpgroup_only(const char* function, Place place) {
  if (threads_ % kWarpgroup && thread_ >= threads_ / kWarpgroup * kWarpgroup)
    fail("no warpgroup", thread_, "%s at %s:%d, in a warp that has no whole warpgroup around it",
         function, place.file, place.line);
  return function;
}

void Block::begin_products(Place place) {
  collective(warpgroup_only("begin_products", place), place, nullptr,
             [](Block& block, Place, void* const(&)[kLanes]) {
               Warp& warp = block.warps_[block.thread_ / kLanes];
               warp.products_begun = true;
               ++warp.begins;
             });
}

void Block::commit_products(Place place) {
  collective(warpgroup_only("commit_products", place), place, nullptr,
             [](Block& block, Place, void* const(&)[kLanes]) {
               ++block.warps_[block.thread_ / kLanes].product_groups;
             });
}

int Block::distinct_askers(Asker (&askers)[kLanes], Place place) {
  const int first = thread_ / kLanes * kLanes;
  int count = 0;
  int known[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int clock = thread_states_[first + lane].clock;
    if (std::find(known, known + count, clock) != known + count) continue;
    known[count] = clock;
    askers[count] = asker(first + lane, place);
    askers[count++].agent = ~0u;  // what a lane wrote, all others must know of
  }
  return count;
}

void Block::add_product(const Product* const (&lanes)[kLanes], Multiply multiply, Place place) {
  const int number = thread_ / kLanes, first = number * kLanes;
  Warp& warp = warps_[number];
  const Product& mine = *lanes[0];
  if ((mine.b | (mine.a ? 0 : mine.a_operand)) & kMisaligned)
    fail("misaligned", first,
         "add_product at %s:%d: an operand whose start or distances are no multiples of 16, or lie "
         "beyond 256 KiB",
         place.file, place.line);
  for (int lane = 1; lane < kLanes; ++lane) {
    const Product& other = *lanes[lane];
    if (other.a_operand != mine.a_operand || other.b != mine.b || other.n != mine.n ||
        !other.a != !mine.a || other.accumulate != mine.accumulate)
      fail("divergent products", first + lane,
           "add_product at %s:%d: its operands differ from those of its warp's first lane",
           place.file, place.line);
  }
  // The four warps want the same.
  auto& issued = issued_[number / 4];
  if (warp.products == issued.size())
    issued.push_back({mine.a_operand, mine.b, mine.n, mine.a != nullptr, mine.accumulate, place});
  Issued& same_one = issued[warp.products++];
  if (same_one.a != mine.a_operand || same_one.b != mine.b || same_one.n != mine.n ||
      same_one.in_registers != (mine.a != nullptr) || same_one.accumulate != mine.accumulate)
    fail(
        "divergent products", first,
        "add_product at %s:%d: its operands differ from those of another warp of its warpgroup, at "
        "%s:%d",
        place.file, place.line, same_one.place.file, same_one.place.line);

  // Sums: from now on in the model's hands, and NaN in the kernel's.
  size_t sums = 0;
  while (sums < warp.sums.size() && warp.sums[sums].d[0] != mine.d) ++sums;
  const bool known = sums < warp.sums.size();
  if (!known) warp.sums.emplace_back();
  if (Sums& fresh = warp.sums[sums]; !fresh.open) {
    if (!warp.products_begun || (known && fresh.begins == warp.begins))
      fail("products not begun", first,
           "add_product at %s:%d adds to sums that threads may have touched, with no "
           "begin_products() since",
           place.file, place.line);
    fresh.n = mine.n;
    fresh.values.resize(size_t{kRows} * static_cast<size_t>(mine.n));
    for (int lane = 0; lane < kLanes; ++lane) {
      float* const d = fresh.d[lane] = lanes[lane]->d;
      for (int i = 0; i < mine.n / 2; ++i) {
        const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        fresh.values[row * mine.n + column] = d[i];
        d[i] = std::numeric_limits<float>::quiet_NaN();
      }
    }
  }
  ++warp.sums[sums].open;

  // Operands in shared memory are read from now until the wait, by this warp's products.
  Asker askers[kLanes];
  const int count = distinct_askers(askers, place);
  const SharedMemory::AsyncReader reader{
      static_cast<uint32_t>(cluster_->agent_of_warp(rank_, number & ~3)),
      static_cast<uint32_t>(warp.product_groups) + 1, static_cast<uint8_t>(1 << (number & 3)),
      askers[0].by};
  const auto read = [&](uint64_t bits, int first_row, int rows) {
    const Operand operand(bits);
    for (int row = first_row; row < first_row + rows; ++row)
      for (int column = 0; column < 2; ++column) {
        const uint32_t core = operand.core(row, column);
        check_shared("add_product", core, kCore, 16, first, place);
        for (uint32_t i = 0; i < kCore; i += 4)
          if (const Fault fault = shared_.read_async(core + i, askers, count, reader);
              fault != Fault::none)
            fail_shared(fault, "add_product", false, core + i, first, place, *this);
      }
  };
  if (!mine.a) read(mine.a_operand, number % 4 * 2, 2);
  read(mine.b, 0, mine.n / 8);

  Pending pending{static_cast<int>(sums), mine.n, mine.a != nullptr, {},
                  mine.a_operand,         mine.b, mine.accumulate,   multiply,
                  warp.product_groups,    place};
  if (mine.a)
    for (int lane = 0; lane < kLanes; ++lane)
      std::memcpy(pending.a[lane], lanes[lane]->a, sizeof pending.a[lane]);
  warp.pending.push_back(pending);
  counters_.operand_bytes += (mine.a ? 0 : kRows * kDepth * 2) + mine.n * kDepth * 2 / 4;
  counters_.flops += 2 * kRows * kDepth * mine.n;
  if (number % 4 == 0) ++counters_.warpgroup_products;
}

void Block::run_product(Warp& warp, int number, Pending& product) {
  uint32_t a[kRows][8];
  if (product.in_registers) {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < 4; ++i)
        a[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = product.a[lane][i];
  } else {
    const Operand operand(product.a_operand);
    for (int row = 0; row < kRows; ++row)
      for (int half = 0; half < 2; ++half)
        std::memcpy(&a[row][half * 4],
                    shared_.at(operand.core(number % 4 * 2 + row / 8, half) +
                               static_cast<uint32_t>(row % 8) * 16),
                    16);
  }
  const Operand operand(product.b);
  const uint32_t* b[64];
  for (int half = 0; half < 2; ++half)
    for (int group = 0; group < product.n / 8; ++group)
      b[half * (product.n / 8) + group] =
          reinterpret_cast<const uint32_t*>(shared_.at(operand.core(group, half)));
  Sums& sums = warp.sums[product.sums];
  if (!product.accumulate) std::fill(sums.values.begin(), sums.values.end(), 0.0f);
  product.multiply(sums.values.data(), product.n, a, b);
  if (--sums.open) return;
  sums.begins = warp.begins;
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < sums.n / 2; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      sums.d[lane][i] = sums.values[row * sums.n + column];
    }
}

void Block::wait_products(int pending, Place place) {
  struct Argument {
    int pending;
  } argument{pending};
  collective(
      warpgroup_only("wait_products", place), place, &argument,
      [](Block& block, Place, void* const(&all)[kLanes]) {
        const int number = block.thread_ / kLanes;
        Warp& warp = block.warps_[number];
        const auto pending = static_cast<uint32_t>(static_cast<const Argument*>(all[0])->pending);
        const uint32_t over = warp.product_groups - std::min(warp.product_groups, pending);
        size_t done = 0;
        while (done < warp.pending.size() && warp.pending[done].group < over)
          block.run_product(warp, number, warp.pending[done++]);
        warp.pending.erase(warp.pending.begin(),
                           warp.pending.begin() + static_cast<std::ptrdiff_t>(done));
        if (warp.pending.empty()) warp.products_begun = false;
        const int agent = block.cluster_->agent_of_warp(block.rank_, number);
        for (int lane = 0; lane < kLanes; ++lane) {
          Thread& thread = block.thread_states_[number * kLanes + lane];
          block.learn(thread, block.cluster_->clocks().raise(thread.clock, agent, over, over));
        }
      });
}

// ---- The functions of hopper.cuh
// -----------------------------------------------------------------

void begin_products(Place place) { Block::current().begin_products(place); }
void commit_products(Place place) { Block::current().commit_products(place); }
void wait_products(int pending, Place place) { Block::current().wait_products(pending, place); }

template <class T>
void add_product(float* d, int n, const uint32_t* a, uint64_t a_operand, uint64_t b,
                 bool accumulate, Place place) {
  Block::Product mine{d, n, a, a_operand, b, accumulate};
  Block& block = Block::current();
  block.collective(block.warpgroup_only("add_product", place), place, &mine,
                   [](Block& block, Place place, void* const(&all)[kLanes]) {
                     const Block::Product* lanes[kLanes];
                     for (int lane = 0; lane < kLanes; ++lane)
                       lanes[lane] = static_cast<const Block::Product*>(all[lane]);
                     block.add_product(lanes, &multiply<T>, place);
                   });
}
template void add_product<BFloat16>(float*, int, const uint32_t*, uint64_t, uint64_t, bool, Place);
template void add_product<Float16>(float*, int, const uint32_t*, uint64_t, uint64_t, bool, Place);

}  // namespace hgfast::cuda::emulator
