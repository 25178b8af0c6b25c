// A network as the CPU runs it: steps over numbered values, weights packed once, one call per run.
//
// Steps are recorded in order, then `finish` names the inputs and outputs and freezes the plan;
// from then on `run` may be called from any number of threads. For each shape of input (the last
// eight are kept) a layout is worked out once: the shape of every value, how each kernel splits
// into tasks, and where in one arena each value lives, by first fit over lifetimes, so that a whole
// network needs little more memory than its widest moment. Arenas come from a pool: fresh pages
// cost milliseconds. Plans that run one after the other can share one. A batch that would need a
// large arena runs in pieces.
//
// A run opens one parallel region, in which every thread walks the steps (cpu_team.h): cheaper than
// to start and end the threads' work for every step. No Tensor is created but the outputs.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cpu_binding.h"

namespace hgfast {

// The memory in which plans run: blocks at rest, as many as there were ever runs at once, none
// larger than was asked for.
class Arena {
 public:
  struct Block {
    Memory memory;
    size_t bytes = 0;
  };
  Block take(size_t bytes);
  void give(Block block);

 private:
  std::mutex mutex_;
  std::vector<Block> idle_;
};

class CpuPlan {
 public:
  using Id = int64_t;  // a value's number; the caller chooses it
  using Pair = std::pair<int64_t, int64_t>;
  using OptionalTensor = std::optional<at::Tensor>;

  // "float32" or "bfloat16", what activations are kept in; without an arena, one of its own. Of
  // float32 activations products are formed as Precision::highest has them, or `high`.
  explicit CpuPlan(const std::string& element, std::shared_ptr<Arena> arena = nullptr,
                   bool high = false);

  // Formulas in cpu/kernels.h; settings as torch.nn.functional has them. w2 and weight are
  // multiplied by a factor (out) per output channel, if there is one. They are not copied and must
  // keep their values while the plan is in use.
  void bottleneck(Id input, Id output, const OptionalTensor& scale, const OptionalTensor& shift,
                  const at::Tensor& w1, const at::Tensor& b1, const at::Tensor& w2,
                  const at::Tensor& b2, const at::Tensor& w3, const at::Tensor& b3,
                  const OptionalTensor& wp, const OptionalTensor& bp, std::optional<Id> low,
                  bool relu, bool pool, const OptionalTensor& w2_factor, bool pool_y);
  void conv(Id input, Id output, const at::Tensor& weight, const at::Tensor& bias,
            const OptionalTensor& scale, const OptionalTensor& shift, Pair stride, Pair padding,
            Pair dilation, bool relu, std::optional<Id> add, bool relu_sum,
            const OptionalTensor& factor);
  void conv_transpose(Id input, Id output, const at::Tensor& weight, const at::Tensor& bias,
                      Pair stride, Pair padding, Pair output_padding, bool relu,
                      std::optional<Id> add, bool relu_sum);
  void head(Id input, std::optional<Id> heatmaps, std::optional<Id> next, const at::Tensor& w1,
            const at::Tensor& b1, const OptionalTensor& w_maps, const OptionalTensor& b_maps,
            const OptionalTensor& w_next, const OptionalTensor& b_next, std::optional<Id> add);
  void pool(Id input, Id output, const std::string& mode, Pair kernel, Pair stride, Pair padding,
            bool ceil_mode, bool count_include_pad);
  void concat(const std::vector<Id>& inputs, Id output, std::optional<Id> add);
  void upsample_add(const std::vector<Id>& lows, const std::vector<int64_t>& factors, Id skip,
                    Id output, bool relu);
  void add(Id a, Id b, Id output, bool relu);
  void finish(const std::vector<Id>& inputs, const std::vector<Id>& outputs,
              bool as_computed = false);

  // Inputs: (batch, channels, height, width), float32 or bfloat16, any strides. Outputs: fresh
  // tensors in the first input's dtype; NCHW if the first input is, else channels_last. As
  // computed: in the plan's own element type, channels_last.
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs) const {
    return run(inputs, nullptr);
  }

  // One kernel's part of a run: its op, the first value that its step writes, and the time until
  // all threads were done, added up over the pieces of a batch. A copy in or out has the op "copy",
  // and no value: -1.
  struct Timed {
    std::string op;
    Id value = -1;
    double seconds = 0;
  };
  std::vector<Timed> profile(const std::vector<at::Tensor>& inputs) const;

  std::string path() const { return kernels_.name; }
  std::string products() const;  // what is multiplied: "float32", "winograd", "bf16x3", "bfloat16"

 private:
  using Slot = int64_t;  // a place in the run's table of pointers: values, inputs, outputs
  using Slots = void* const*;
  using Run = std::function<void(Slots, int64_t begin, int64_t end, void* scratch)>;

  // One kernel call of a layout: everything but the pointers is settled.
  struct Launch {
    cpu::Work work{};
    std::vector<Shape> results;
    Run run;
    const char* op = nullptr;  // null: a copy in or out
    Id value = -1;             // the first that its step writes
    std::vector<Slot> reads, writes;
  };

  // An input or output as the caller keeps it.
  struct Given {
    Slot slot;
    cpu::Element element;
    cpu::Strides strides;
  };

  struct Step {
    const char* op;
    std::string where;  // "step 3 (conv)", for errors
    std::vector<Slot> reads, writes;
    // Checks the shapes of all values so far, and settles the kernel call for them.
    std::function<Launch(const std::vector<Shape>&, int threads)> launch;
    // The same where the first map it reads is an input as given; null: not for this step.
    std::function<Launch(const std::vector<Shape>&, int threads, const Given&)> launch_given;
    // The same where the first map it writes is an output, and nobody reads it; likewise.
    std::function<Launch(const std::vector<Shape>&, int threads, const Given&)> launch_wanted;
  };

  struct Output {
    Shape shape;
    Slot value;
    bool direct;  // the last kernel writes into the output itself
  };

  struct Layout {
    std::vector<int64_t> key;
    std::vector<Launch> launches;
    std::vector<bool> direct;      // per input: its memory serves as the value's
    std::vector<int64_t> offsets;  // per value, in the arena; -1: lives elsewhere, or nowhere
    std::vector<Output> outputs;   // one per distinct output
    int64_t piece = 0;             // images that run at once
    int threads = 1;
    bool parallel = false;
    size_t arena = 0, scratch = 0, turns = 0;  // bytes; scratch per thread
    const char* last_op = nullptr;

    size_t bytes() const { return arena + threads * scratch + turns; }
  };

  std::string where(const char* op) const;
  Slot value(Id id);
  void record(const char* op, std::vector<Slot> reads, const std::vector<Id>& outputs,
              std::function<Launch(const std::vector<Shape>&, int threads)> launch);

  std::shared_ptr<const Layout> layout_for(const std::vector<at::Tensor>& inputs,
                                           bool to_nchw) const;
  std::shared_ptr<const Layout> make_layout(const std::vector<at::Tensor>& inputs, bool to_nchw,
                                            std::vector<int64_t> key) const;
  static void place(Layout& layout, const std::vector<Shape>& shapes, int64_t element_bytes);
  // Where `times` is given, that of each kernel is appended to it.
  using Times = std::vector<Timed>;
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs, Times* times) const;
  void run_layout(const Layout& layout, const std::vector<at::Tensor>& inputs,
                  const std::vector<void*>& results, Times* times) const;
  static void execute(const Layout& layout, Slots slots, char* scratch, Times* times);

  const cpu::Kernels& kernels_;
  const cpu::Element element_;
  const cpu::Precision precision_;
  bool finished_ = false;
  bool as_computed_ = false;
  std::vector<Step> steps_;
  std::unordered_map<Id, Slot> slot_of_;
  std::vector<Id> id_of_;               // per value
  std::vector<int64_t> defined_by_;     // per value: the step, or -1
  std::vector<Slot> inputs_;            // values
  std::vector<Slot> distinct_outputs_;  // values, each once
  std::vector<size_t> output_index_;    // per output: which of the distinct ones

  mutable std::mutex mutex_;
  mutable std::vector<std::shared_ptr<const Layout>> layouts_;  // the latest used first
  const std::shared_ptr<Arena> arena_;
};

}  // namespace hgfast
