// A residual block, 1x1 -> 3x3 -> 1x1, for few pixels: over clusters of blocks (see kernels.h for
// the formula, hopper_latency.h for the weights).
//
// Why clusters. At batch 1 there are fewer tiles than multiprocessors, and a block that computes a
// tile alone reads all 416 KB of weights of a 256/128/256 block: no less than 3.8 us for what a
// multiprocessor takes out of L2. Here the C blocks of a cluster share a tile of 8x8 pixels. Each
// has 1/C of the channels of every convolution, and reads 1/C of the weights.
//
//   before   weights are asked for, as many as there is room for: with C = 8 all of them. They do
//            not depend on the kernel in front, which may be at work still.
//   conv1    on the tile and a halo of one pixel. x goes from memory to registers, as the fragments
//            that the products take: nobody else in the block needs it. Each warp has 16 pixels.
//            relu(...) goes into T1 of every block of the cluster.
//   conv2    Each warp has all pixels, 16 channels, and a part of the sum: every so manieth 16
//            channels of T1. Of a column of the 3x3 window the rows overlap, so that ten rows of
//            pixels, read once, feed three taps. The parts are added in the order of their numbers
//            through shared memory. relu(...) goes into T2 of every block of the cluster.
//   conv3    Each warp has 16 pixels and half of the channels. Where the shortcut is projected,
//            that part comes first, while the others' T2 is on its way.
//
// Weights come through a ring of slots, each filled by the copy engine for a barrier; where
// everything fits, no slot is filled twice. T1 and T2 have 16 bytes more a row than they need, so
// that the eight rows of an ldmatrix lie in different banks.
//
// No block ends while another one touches its shared memory: the last to do so are the stores to
// T2, and all blocks wait for them behind conv2.
#pragma once

#include "fragments.cuh"
#include "hopper.cuh"
#include "hopper_latency.h"
#include "launch.cuh"

namespace hgfast::cuda {

// An instance: up to 16 * strips middle channels for a block. Registers and, if the launcher can,
// shared memory leave room for two blocks on a multiprocessor: for the next kernel's, which asks
// for its weights early.
template <class Element_, int strips_>
struct LatencyConfig {
  using T = Element_;
  static constexpr int strips = strips_;  // of 16 middle channels

  static constexpr int warps = 8, threads = warps * kWarp;
  static constexpr int tile = 8, halo = tile + 2;  // pixels
  static constexpr int groups = warps / strips;    // of warps, between which conv2's sum is split
  static constexpr int out_strips = 2 * strips;    // that are computed at a time
  static_assert(warps % strips == 0);

  // What a stage holds, for each strip: so many units of conv1, triples (of rows of the window) of
  // conv2, one for each group of warps, and units of conv3. Where x is summed, two units are one
  // load of it, and so many are under way at a time twice.
  static constexpr int slot_units = 24, slot_bytes = slot_units * LatencyTape::kUnit;
  static constexpr int steps1 = strips == 1 ? 16 : strips == 2 ? 8 : 6;
  static constexpr int steps2 = 3 * groups;
  static constexpr int steps3 = strips == 1 ? 12 : strips == 2 ? 6 : 2;
  static constexpr int fetches1 = strips == 4 ? 3 : 4;
  static constexpr int fetches3 = strips == 4 ? 1 : 3;
  static_assert(steps1 * strips <= slot_units && steps1 / 2 % fetches1 == 0);
  static_assert(steps2 * strips <= slot_units);
  static_assert(steps3 * out_strips <= slot_units && steps3 / 2 % fetches3 == 0);
};

// A slot has two barriers; and there is one for the vectors.
constexpr int kLatencyBarriers = 256, kLatencySlots = 15;

template <class Config>
LatencyLayout latency_layout(const BottleneckParams& p, const LatencyTape& tape, int cluster,
                             int steps = 1) {
  const auto rounded_up = [](int n, int of) { return (n + of - 1) / of; };
  LatencyLayout at{};
  at.strips = p.middle / 16 / cluster;
  at.out_strips = p.out / 16 / cluster;
  at.row = 2 * p.middle + 16;
  at.vectors = kLatencyBarriers;
  at.vector_bytes = 64 * (2 * tape.steps1 + 2 * at.strips + at.out_strips);
  at.t1 = at.vectors + steps * at.vector_bytes;
  // On T1 lie, once it was read, the parts of conv2's sum: of each warp 64 pixels by 16 channels.
  const int t1 = Config::halo * Config::halo * at.row, parts = Config::warps * 4096;
  at.t2 = at.t1 + (t1 > parts ? t1 : parts);
  at.ring = at.t2 + Config::tile * Config::tile * at.row;
  at.stages1 = rounded_up(tape.steps1, Config::steps1);
  at.stages2 = rounded_up(tape.steps2, Config::steps2);
  at.stages3 = rounded_up(tape.steps3, Config::steps3);
  at.passes = rounded_up(at.out_strips, Config::out_strips);
  at.stages = at.stages1 + at.stages2 + at.passes * at.stages3;
  return at;
}

HGFAST_DEVICE const BottleneckParams& block_of(const LatencyParams& p, int) { return p.block; }
HGFAST_DEVICE const BottleneckParams& block_of(const SubtreeParams& p, int i) {
  return p.blocks[i];
}
HGFAST_DEVICE int steps_of(const LatencyParams&) { return 1; }
HGFAST_DEVICE int steps_of(const SubtreeParams& p) { return p.steps; }

template <class Params>
constexpr bool is_chain = false;
template <>
inline constexpr bool is_chain<SubtreeParams> = true;

// The stage of weights that is being consumed, of all steps; and where it lies.
struct LatencyRing {
  int stage = -1, slot = -1, parity = 1;
};

// One thread's part in a tile, or in a step of a chain.
template <class Config, class Params>
struct LatencyTile {
  using T = typename Config::T;
  static constexpr int kUnit = LatencyTape::kUnit;
  static constexpr bool kChain = is_chain<Params>;

  const Params& params;
  const int number;  // of the step
  LatencyRing& ring;
  const BottleneckParams& p;
  const LatencyTape& order;
  const LatencyLayout& at;
  const int cluster, slots;
  const int rank = cluster_rank();
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp, quad = lane % 4;

  int image, y0, x0;  // the tile's place
  const char* x;      // the image

  HGFAST_DEVICE LatencyTile(const Params& params, int number, LatencyRing& ring)
      : params(params),
        number(number),
        ring(ring),
        p(block_of(params, number)),
        order(params.order),
        at(params.at),
        cluster(params.cluster),
        slots(params.slots) {
    if constexpr (kChain) {
      image = block_index() / cluster;
      y0 = x0 = 0;
    } else {
      const int tiles_x = (static_cast<int>(p.width) + Config::tile - 1) / Config::tile;
      const int tiles_y = (static_cast<int>(p.height) + Config::tile - 1) / Config::tile;
      const int tiles = tiles_x * tiles_y, tile = block_index() / cluster % tiles;
      image = block_index() / cluster / tiles;
      y0 = tile / tiles_x * Config::tile;
      x0 = tile % tiles_x * Config::tile;
    }
    x = static_cast<const char*>(p.x) +
        static_cast<int64_t>(image) * p.x_height * p.x_width * p.in * 2;
  }

  // Of the tile's four fragments of two rows of pixels, those that have some; and the halo's pixels
  // that these read.
  HGFAST_DEVICE int fragments() const {
    const int rows = static_cast<int>(p.height) - y0;
    return rows < Config::tile ? (rows + 1) / 2 : Config::tile / 2;
  }
  HGFAST_DEVICE int halo_pixels() const { return (2 * fragments() + 2) * Config::halo; }

  // Where what this step reads lies in shared memory; 0: it is x.
  HGFAST_DEVICE Shared source() const {
    if constexpr (kChain)
      if (params.source[number] >= 0) return map_of(params.source[number]);
    return 0;
  }
  HGFAST_DEVICE Shared map_of(int step) const { return shared_memory() + params.maps[step]; }
  HGFAST_DEVICE int map_row() const { return 2 * p.out + 16; }  // bytes of a pixel there
  HGFAST_DEVICE bool is_last() const { return number == steps_of(params) - 1; }
  HGFAST_DEVICE int all_stages() const { return steps_of(params) * at.stages; }

  HGFAST_DEVICE int other_block(int i) const { return (rank + i) & (cluster - 1); }

  // ---- Weights ----

  HGFAST_DEVICE Barrier vectors_there() const { return shared_memory(); }
  HGFAST_DEVICE Barrier filled(int slot) const { return shared_memory() + 8 + slot * 16; }
  HGFAST_DEVICE Barrier emptied(int slot) const { return filled(slot) + 8; }
  HGFAST_DEVICE Shared slot_address(int slot) const {
    return shared_memory() + at.ring + slot * Config::slot_bytes;
  }

  // Asks for a stage's weights: for each strip a part of what lies in one piece on the tape.
  HGFAST_DEVICE void ask(int wanted, int into) const {
    int of_block, strips, length, steps, first;  // units
    int64_t begin;
    const void* const tape = block_of(params, kChain ? wanted / at.stages : 0).tape;
    if (kChain) wanted %= at.stages;
    if (wanted < at.stages1) {
      begin = 0, of_block = rank * at.strips, strips = at.strips;
      length = order.steps1, steps = Config::steps1, first = wanted * Config::steps1;
    } else if (wanted < at.stages1 + at.stages2) {
      begin = order.conv2, of_block = rank * at.strips, strips = at.strips;
      length = order.steps2, steps = Config::steps2, first = (wanted - at.stages1) * Config::steps2;
    } else {
      const int number = wanted - at.stages1 - at.stages2, before = out_begin(number / at.stages3);
      begin = order.conv3, of_block = rank * at.out_strips + before;
      strips = at.out_strips - before;
      if (strips > Config::out_strips) strips = Config::out_strips;
      length = order.steps3, steps = Config::steps3, first = number % at.stages3 * Config::steps3;
    }
    const int bytes = (length - first < steps ? length - first : steps) * kUnit;
    arrive_expecting(filled(into), strips * bytes);
#pragma unroll 1
    for (int strip = 0; strip < strips; ++strip)
      load_bulk(slot_address(into) + strip * steps * kUnit,
                static_cast<const char*>(tape) +
                    (begin + int64_t{of_block + strip} * length + first) * kUnit,
                bytes, filled(into));
  }
  HGFAST_DEVICE static int out_begin(int pass) { return pass * Config::out_strips; }

  // In shared memory, floats: scale, shift; of this block's channels b1, b2, b3.
  HGFAST_DEVICE Shared vector(int floats_before) const {
    return shared_memory() + at.vectors + number * at.vector_bytes + floats_before * 4;
  }
  HGFAST_DEVICE int padded_in() const { return order.steps1 * 16; }
  HGFAST_DEVICE Shared scale() const { return vector(0); }
  HGFAST_DEVICE Shared shift() const { return vector(padded_in()); }
  HGFAST_DEVICE Shared bias1() const { return vector(2 * padded_in()); }
  HGFAST_DEVICE Shared bias2() const { return bias1() + at.strips * 64; }
  HGFAST_DEVICE Shared bias3() const { return bias2() + at.strips * 64; }

  HGFAST_DEVICE void ask_for_vectors() const {
    const int middle = at.strips * 64, out = at.out_strips * 64, in = padded_in() * 4;
    arrive_expecting(vectors_there(), 2 * middle + out + (p.scale ? 2 * in : 0));
    if (p.scale) {
      load_bulk(scale(), p.scale, in, vectors_there());
      load_bulk(shift(), p.shift, in, vectors_there());
    }
    load_bulk(bias1(), p.b1 + rank * at.strips * 16, middle, vectors_there());
    load_bulk(bias2(), p.b2 + rank * at.strips * 16, middle, vectors_there());
    load_bulk(bias3(), p.b3 + rank * at.out_strips * 16, out, vectors_there());
  }

  // Before the first step.
  HGFAST_DEVICE void begin() {
    if (thread_index() == 0) {
      init_barrier(vectors_there(), steps_of(params));
#pragma unroll 1
      for (int i = 0; i < slots; ++i) {
        init_barrier(filled(i), 1);
        init_barrier(emptied(i), Config::warps);
      }
      fence_barriers();
#pragma unroll 1
      for (int i = 0; i < steps_of(params); ++i) LatencyTile(params, i, ring).ask_for_vectors();
#pragma unroll 1
      for (int i = 0; i < slots; ++i) ask(i, i);
    }
    sync_block();
    let_next_kernel_begin();
    arrive_cluster();  // that this block is there
    wait_for_previous_kernel();
    wait_own_barrier(vectors_there(), 0);
  }

  // To the next stage. What the one before held, nobody of this warp needs any more; a stage
  // later, when all warps have said so, its slot is filled again.
  HGFAST_DEVICE void step() {
    const int stages = all_stages();
    if (slots < stages) {
      sync_warp();
      if (ring.stage >= 0 && lane == 0) arrive(emptied(ring.slot));
      const int again = ring.stage - 1;  // the stage whose slot is to be filled
      if (thread_index() == 0 && again >= 0 && again + slots < stages) {
        const bool wrapped = ring.slot == 0;
        const int into = wrapped ? slots - 1 : ring.slot - 1;
        wait_own_barrier(emptied(into), wrapped ? ring.parity ^ 1 : ring.parity);
        ask(again + slots, into);
      }
      sync_warp();
    }
    ++ring.stage;
    if (++ring.slot == slots) ring.slot = 0;
    if (ring.slot == 0) ring.parity ^= 1;
    wait_own_barrier(filled(ring.slot), ring.parity);
  }

  // ---- Pixels ----

  HGFAST_DEVICE bool inside(int y, int x) const {
    return y >= 0 && y < p.height && x >= 0 && x < p.width;
  }
  // Where t's pixel is in x, or in the map that is read instead, in elements; -1 outside.
  HGFAST_DEVICE int offset_of(int y, int x) const {
    if (!inside(y, x)) return -1;
    const int twice = p.pool ? 2 : 1;
    return (twice * y * static_cast<int>(p.x_width) + twice * x) * pixel();
  }
  HGFAST_DEVICE int pixel() const { return kChain && source() ? map_row() / 2 : p.in; }
  HGFAST_DEVICE bool inside_in_halo(int row) const {
    return row < halo_pixels() && inside(y0 - 1 + row / Config::halo, x0 - 1 + row % Config::halo);
  }
  // 8 channels of t.
  HGFAST_DEVICE uint4 load_input(int offset, int channel) const {
    const int64_t begin = int64_t{offset + channel} * 2;
    if constexpr (kChain)
      if (const Shared map = source())
        return pooled(static_cast<Shared>(begin), [&](int64_t at) {
          return load_shared<uint4>(map + static_cast<Shared>(at));
        });
    return pooled(begin, [&](int64_t at) { return load_written(x + at); });
  }
  template <class Load>
  HGFAST_DEVICE uint4 pooled(int64_t begin, Load&& load) const {
    uint4 most = load(begin);
    if (p.pool) {
      const int64_t right = int64_t{pixel()} * 2, down = p.x_width * right;
      const uint4 pieces[] = {load(begin + right), load(begin + down), load(begin + down + right)};
#pragma unroll
      for (const uint4& piece : pieces)
        most = {maximum<T>(most.x, piece.x), maximum<T>(most.y, piece.y),
                maximum<T>(most.z, piece.z), maximum<T>(most.w, piece.w)};
    }
    return most;
  }

  // ---- Products ----

  // Of a pair of channels, BN-ReLU.
  HGFAST_DEVICE static uint32_t activated(uint32_t pair, float by0, float by1, float plus0,
                                          float plus1) {
    const float2 value = unpack<T>(pair);
    return pack_relu<T>(fmaf(by0, value.x, plus0), fmaf(by1, value.y, plus1));
  }
  HGFAST_DEVICE static void activate(uint4& piece, const float4 (&by)[2], const float4 (&plus)[2]) {
    piece = {activated(piece.x, by[0].x, by[0].y, plus[0].x, plus[0].y),
             activated(piece.y, by[0].z, by[0].w, plus[0].z, plus[0].w),
             activated(piece.z, by[1].x, by[1].y, plus[1].x, plus[1].y),
             activated(piece.w, by[1].z, by[1].w, plus[1].z, plus[1].w)};
  }

  // sums += a * weights of a unit.
  HGFAST_DEVICE void multiply(float (&sums)[2][4], const uint32_t (&a)[4], Shared unit) const {
    const uint4 b = load_shared<uint4>(unit + lane * 16);
    multiply_add<T>(sums[0], a, b.x, b.y);
    multiply_add<T>(sums[1], a, b.z, b.w);
  }

  // sums of so many strips, from `first` on, += t of two rows of pixels * weights, over all
  // channels of t, that is of x, with BN-ReLU if `active`. A stage has `steps` units for a strip.
  // Loads run `fetches` pairs of units ahead.
  template <int steps, int fetches, bool active>
  HGFAST_DEVICE void add_input(float (&sums)[Config::strips][2][4], const int (&offset)[2],
                               bool works, int first, int strips) {
    const int slices = padded_in() / 32;
    uint4 now[fetches][2] = {};
    bool there = false;  // what `now` is for
#pragma unroll 1         // one copy of all this: what runs once must first be read
    for (int begin = -fetches; begin < slices; begin += fetches) {
      uint4 next[fetches][2];
#pragma unroll
      for (int i = 0; i < fetches; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int channel = (begin + fetches + i) * 32 + quad * 8;
          next[i][half] = offset[half] >= 0 && channel < p.in ? load_input(offset[half], channel)
                                                              : uint4{0, 0, 0, 0};
        }
      }
      if (there) {  // not begin >= 0: GCC 12 splits such a loop, and gets it wrong
        if (2 * begin % steps == 0) step();
#pragma unroll
        for (int i = 0; i < fetches; ++i) {
          const int slice = begin + i;
          if (!works || slice >= slices) break;
          if (active && p.scale) {
            const int before = (slice * 32 + quad * 8) * 4;
            const float4 by[] = {load_shared<float4>(scale() + before),
                                 load_shared<float4>(scale() + before + 16)};
            const float4 plus[] = {load_shared<float4>(shift() + before),
                                   load_shared<float4>(shift() + before + 16)};
            activate(now[i][0], by, plus);
            activate(now[i][1], by, plus);
          }
          const uint4 upper = now[i][0], lower = now[i][1];
          const uint32_t a[2][4] = {{upper.x, lower.x, upper.y, lower.y},
                                    {upper.z, lower.z, upper.w, lower.w}};
          const Shared units = slot_address(ring.slot) + 2 * slice % steps * kUnit;
#pragma unroll
          for (int n = 0; n < Config::strips; ++n) {
            if (n >= strips) break;
#pragma unroll
            for (int j = 0; j < 2; ++j)
              multiply(sums[n], a[j], units + ((first + n) * steps + j) * kUnit);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < fetches; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) now[i][half] = next[i][half];
      there = true;
    }
  }

  // ---- To all blocks ----

  // relu(sums + bias) of a fragment of 16 pixels, the first of them in row `first`, and the 16
  // channels of a strip, into T1 or T2 of every block. `keep` says of a row whether it is 0:
  // outside of the image; 1: real; -1: not stored.
  template <class Keep>
  HGFAST_DEVICE void store_middle(const float (&sums)[2][4], Shared to, Shared bias, int first,
                                  int strip, Keep&& keep) const {
    const float2 b[] = {load_shared<float2>(bias + strip * 64 + quad * 8),
                        load_shared<float2>(bias + strip * 64 + 32 + quad * 8)};
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const pair = sums[i % 2] + i / 2 * 2;
      v[i] = pack_relu<T>(pair[0] + b[i % 2].x, pair[1] + b[i % 2].y);
    }
    transpose_quad(v);
    const int row = first + lane / 4 + quad / 2 * 8, kept = keep(row);
    if (kept < 0) return;
    const uint4 piece = kept ? uint4{v[0], v[1], v[2], v[3]} : uint4{0, 0, 0, 0};
    const int column = ((rank * at.strips + strip) * 2 + quad % 2) * 16;
#pragma unroll 1
    for (int i = 0; i < cluster; ++i)
      store_remote(to + row * at.row + column, other_block(i), piece);
  }

  HGFAST_DEVICE void conv1() {
    if (kChain) wait_cluster();  // all blocks are there; what this step reads is whole
    float sums[Config::strips][2][4] = {};
    const int first = warp * 16;
    int offset[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + half * 8 + lane / 4;
      offset[half] = row < halo_pixels()
                         ? offset_of(y0 - 1 + row / Config::halo, x0 - 1 + row % Config::halo)
                         : -1;
    }
    const bool works = first < halo_pixels();
    add_input<Config::steps1, Config::fetches1, true>(sums, offset, works, 0, at.strips);
    if (!kChain) wait_cluster();  // all blocks are there
    if (works) {
#pragma unroll
      for (int n = 0; n < Config::strips; ++n) {
        if (n >= at.strips) break;
        store_middle(sums[n], shared_memory() + at.t1, bias1(), first, n, [&](int row) {
          return row >= halo_pixels() ? -1 : inside_in_halo(row) ? 1 : 0;
        });
      }
    }
    sync_warp();
    arrive_cluster();  // this block's part of T1 is everywhere
  }

  HGFAST_DEVICE void conv2() {
    float sums[4][2][4] = {};
    const int strip = warp % Config::strips, group = warp / Config::strips;
    const int parts = p.middle / 16;  // of 16 channels
    // The pixel and the half of the 16 channels that this lane names to ldmatrix.
    const Shared mine = shared_memory() + at.t1 +
                        (lane / 8 % 2 * Config::halo + lane % 8) * at.row + lane / 16 * 16;
    wait_cluster();  // T1 is whole
#pragma unroll 1
    for (int begin = 0; begin < 3 * parts; begin += Config::groups) {
      step();
      const int triple = begin + group;
      if (triple >= 3 * parts || strip >= at.strips) continue;
      // Ten rows of eight pixels, two in each fragment.
      uint32_t rows[5][4] = {};
      const Shared from = mine + triple / parts * at.row + triple % parts * 32;
#pragma unroll
      for (int i = 0; i < 5; ++i)
        if (i <= fragments()) load_matrices(rows[i], from + i * 2 * Config::halo * at.row);
      const Shared units = slot_address(ring.slot) + (strip * Config::steps2 + group * 3) * kUnit;
#pragma unroll
      for (int dy = 0; dy < 3; ++dy) {
        const uint4 b = load_shared<uint4>(units + dy * kUnit + lane * 16);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          if (m >= fragments()) break;
          const int upper = 2 * m + dy, lower = upper + 1;
          const uint32_t a[] = {rows[upper / 2][upper % 2], rows[lower / 2][lower % 2],
                                rows[upper / 2][upper % 2 + 2], rows[lower / 2][lower % 2 + 2]};
          multiply_add<T>(sums[m][0], a, b.x, b.y);
          multiply_add<T>(sums[m][1], a, b.z, b.w);
        }
      }
    }
    add_parts(sums, group * Config::strips + strip);
    sync_warp();
    arrive_cluster();  // this block's part of T2 is everywhere
  }

  // Each warp has a part of the sum of 64 pixels by 16 channels.
  HGFAST_DEVICE void add_parts(const float (&sums)[4][2][4], int number) const {
    const Shared parts = shared_memory() + at.t1 + lane * 16;
    const auto fragment = [&](int warp, int m, int n) {
      return parts + ((warp * 4 + m) * 2 + n) * kUnit;
    };
    sync_block();  // T1 was read: the parts lie there
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      if (m >= fragments()) break;
#pragma unroll
      for (int n = 0; n < 2; ++n)
        store_shared(fragment(number, m, n),
                     float4{sums[m][n][0], sums[m][n][1], sums[m][n][2], sums[m][n][3]});
    }
    sync_block();  // all parts are there
#pragma unroll 1
    for (int unit = warp; unit < 4 * at.strips; unit += Config::warps) {
      const int m = unit % 4, strip = unit / 4;
      if (m >= fragments()) continue;
      float total[2][4] = {};
#pragma unroll
      for (int group = 0; group < Config::groups; ++group) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float4 part = load_shared<float4>(fragment(group * Config::strips + strip, m, n));
          total[n][0] += part.x;
          total[n][1] += part.y;
          total[n][2] += part.z;
          total[n][3] += part.w;
        }
      }
      store_middle(total, shared_memory() + at.t2, bias2(), m * 16, strip, [](int) { return 1; });
    }
  }

  HGFAST_DEVICE void conv3() {
    const int first = warp % 4 * 16;                      // row
    const int before = warp / 4 * Config::strips;         // strips of a pass that others have
    const int slices = p.project ? padded_in() / 16 : 0;  // units of the projection
#pragma unroll 1
    for (int pass = 0; pass < at.passes; ++pass) {
      float sums[Config::strips][2][4] = {};
      int strips = at.out_strips - out_begin(pass) - before;
      if (strips > Config::strips) strips = Config::strips;
      if (first >= fragments() * 16) strips = 0;  // no pixel
      const auto place = [&](int row, int& y, int& x) {
        y = y0 + row / Config::tile;
        x = x0 + row % Config::tile;
      };
      // The pixel and the 8 channels of each strip that this lane has at the end.
      int y, x;
      place(first + lane / 4 + quad / 2 * 8, y, x);
      const bool real = inside(y, x);
      const int channel = (rank * at.out_strips + out_begin(pass) + before) * 16 + quad % 2 * 8;
      uint4 shortcut[Config::strips] = {};
      if (p.project) {
        int offset[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int row, column;
          place(first + half * 8 + lane / 4, row, column);
          offset[half] = offset_of(row, column);
        }
        add_input<Config::steps3, Config::fetches3, false>(sums, offset, strips > 0, before,
                                                           strips);
      } else if (real) {
#pragma unroll
        for (int n = 0; n < Config::strips; ++n)
          if (n < strips) shortcut[n] = load_input(offset_of(y, x), channel + n * 16);
      }
      if (pass == 0) wait_cluster();  // T2 is whole
      const Shared mine = shared_memory() + at.t2 + (first + lane % 16) * at.row + lane / 16 * 16;
      const int parts = p.middle / 16;
#pragma unroll 1
      for (int part = 0, unit = slices % Config::steps3; part < parts; unit = 0) {
        if (unit == 0) step();
        const int rest = parts - part;
        const int count = rest < Config::steps3 - unit ? rest : Config::steps3 - unit;
        const Shared units = slot_address(ring.slot) + (before * Config::steps3 + unit) * kUnit;
#pragma unroll 2
        for (int i = 0; i < (strips > 0 ? count : 0); ++i) {
          uint32_t a[4];
          load_matrices(a, mine + (part + i) * 32);
#pragma unroll
          for (int n = 0; n < Config::strips; ++n)
            if (n < strips) multiply(sums[n], a, units + (n * Config::steps3 + i) * kUnit);
        }
        part += count;
      }
      store_output(sums, shortcut, strips, y, x, channel, out_begin(pass) + before);
    }
  }

  // Strips of 16 pixels, from strip `first` of the block's on; this lane stores 8 channels of each,
  // from `channel` on, of one pixel.
  HGFAST_DEVICE void store_output(const float (&sums)[Config::strips][2][4],
                                  const uint4 (&shortcut)[Config::strips], int strips, int y, int x,
                                  int channel, int first) const {
    const int width = static_cast<int>(p.width);
    const int64_t begin = int64_t{image} * p.height * p.width * p.out * 2;
    const int at_y = (y * width + x) * p.out + channel;
    const int at_low = (y / 2 * (width / 2) + x / 2) * p.out + channel;
#pragma unroll
    for (int n = 0; n < Config::strips; ++n) {
      if (n >= strips) break;
      float2 v[] = {{sums[n][0][0], sums[n][0][1]},
                    {sums[n][1][0], sums[n][1][1]},
                    {sums[n][0][2], sums[n][0][3]},
                    {sums[n][1][2], sums[n][1][3]}};
      transpose_quad(v);  // by all lanes, also where nothing is stored
      if (!inside(y, x)) continue;
      const Shared bias = bias3() + (first + n) * 64 + quad % 2 * 32;
      const float4 b[] = {load_shared<float4>(bias), load_shared<float4>(bias + 16)};
      v[0] = {v[0].x + b[0].x, v[0].y + b[0].y};
      v[1] = {v[1].x + b[0].z, v[1].y + b[0].w};
      v[2] = {v[2].x + b[1].x, v[2].y + b[1].y};
      v[3] = {v[3].x + b[1].z, v[3].y + b[1].w};
      if (!p.project) add<T>(v, shortcut[n]);
      if (p.relu) {
#pragma unroll
        for (float2& value : v) value = {relu(value.x), relu(value.y)};
      }
      if constexpr (kChain) {
        if (params.low[number] >= 0)
          add<T>(v, load_shared<uint4>(map_of(params.low[number]) +
                                       (y / 2 * (width / 2) + x / 2) * map_row() +
                                       (channel + n * 16) * 2));
      } else if (p.low) {
        add<T>(v, load_written(static_cast<const char*>(p.low) + begin / 4 +
                               int64_t{at_low + n * 16} * 2));
      }
      const uint4 piece = {pack<T>(v[0].x, v[0].y), pack<T>(v[1].x, v[1].y),
                           pack<T>(v[2].x, v[2].y), pack<T>(v[3].x, v[3].y)};
      if constexpr (kChain) {
        if (!is_last()) {
          const Shared to = map_of(number) + (y * width + x) * map_row() + (channel + n * 16) * 2;
#pragma unroll 1
          for (int i = 0; i < cluster; ++i) store_remote(to, other_block(i), piece);
          continue;
        }
      }
      store_global(static_cast<char*>(p.y) + begin + int64_t{at_y + n * 16} * 2, piece);
    }
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::threads, 2)
    latency_kernel(const __grid_constant__ LatencyParams p) {
  LatencyRing ring;
  LatencyTile<Config, LatencyParams> tile(p, 0, ring);
  tile.begin();
  tile.conv1();
  tile.conv2();
  tile.conv3();
}

// A cluster for each image. Weights run ahead from step to step.
template <class Config>
__global__ void __launch_bounds__(Config::threads, 1)
    subtree_kernel(const __grid_constant__ SubtreeParams p) {
  LatencyRing ring;
  LatencyTile<Config, SubtreeParams>(p, 0, ring).begin();
#pragma unroll 1
  for (int i = 0; i < p.steps; ++i) {
    LatencyTile<Config, SubtreeParams> step(p, i, ring);
    step.conv1();
    step.conv2();
    step.conv3();
    if (step.is_last()) break;
    sync_warp();
    arrive_cluster();  // this block's part of the map is everywhere
  }
}

}  // namespace hgfast::cuda
