// One instruction set's kernels, defined in the file that each is named after.
#pragma once

#include "common.h"

namespace hgfast::cpu::HGFAST_ISA {

Method choose(Precision, int64_t height, int64_t width, int64_t in, int64_t out);
bool goes_by_lines(const ConvParams&);
size_t packed_bytes(Precision, Method, int64_t out, int64_t in, int64_t kernel_h, int64_t kernel_w);
void pack(Precision, Method, int64_t out, int64_t in, int64_t kernel_h, int64_t kernel_w,
          const float* weight, void* packed);

#define HGFAST_KERNEL(name, Params)             \
  Work plan_##name(const Params&, int threads); \
  void name(const Params&, int threads, int64_t begin, int64_t end, void* scratch)

HGFAST_KERNEL(bottleneck, BottleneckParams);
HGFAST_KERNEL(conv, ConvParams);
HGFAST_KERNEL(conv_transpose, ConvTransposeParams);
HGFAST_KERNEL(head, HeadParams);
HGFAST_KERNEL(upsample_add, UpsampleAddParams);
HGFAST_KERNEL(pool, PoolParams);
HGFAST_KERNEL(concat, ConcatParams);
HGFAST_KERNEL(add, AddParams);
HGFAST_KERNEL(relayout, RelayoutParams);
HGFAST_KERNEL(decode, DecodeParams);
#undef HGFAST_KERNEL

}  // namespace hgfast::cpu::HGFAST_ISA
