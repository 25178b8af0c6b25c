// The table through which callers reach this instruction set's kernels.
#include "table.h"

#include "gemm.h"

#define HGFAST_STRING(x) #x
#define HGFAST_NAME(x) HGFAST_STRING(x)

namespace hgfast::cpu::HGFAST_ISA {

extern const Kernels table;

const Kernels table = {
    .name = HGFAST_NAME(HGFAST_ISA),
    .high = kHigh,
    .choose = choose,
    .goes_by_lines = goes_by_lines,
    .packed_bytes = packed_bytes,
    .pack = pack,
    .plan_bottleneck = plan_bottleneck,
    .bottleneck = bottleneck,
    .plan_conv = plan_conv,
    .conv = conv,
    .plan_conv_transpose = plan_conv_transpose,
    .conv_transpose = conv_transpose,
    .plan_head = plan_head,
    .head = head,
    .plan_upsample_add = plan_upsample_add,
    .upsample_add = upsample_add,
    .plan_pool = plan_pool,
    .pool = pool,
    .plan_concat = plan_concat,
    .concat = concat,
    .plan_add = plan_add,
    .add = add,
    .plan_relayout = plan_relayout,
    .relayout = relayout,
    .plan_decode = plan_decode,
    .decode = decode,
};

}  // namespace hgfast::cpu::HGFAST_ISA
