#include "cpu_plan.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <utility>

#include "cpu_team.h"

namespace hgfast {
namespace {

constexpr size_t kLayouts = 8;  // shapes remembered per plan

// Convolutions of fewer channels read an input as it is given: what they lay out is little beside
// what they multiply, also where two blocks of pixels lay out the same rows.
constexpr int64_t kFewChannels = 16;

// Bytes of values: a batch that needs more runs in pieces, each of an image for every thread at
// least. So memory does not grow with the batch, and what one step writes is still in the
// last-level cache when the next one reads it; but every piece reads all weights.
constexpr size_t kArena = 16 << 20;

cpu::Element element_named(const std::string& name) {
  TORCH_CHECK_VALUE(name == "float32" || name == "bfloat16",
                    "CpuPlan: expected the element \"float32\" or \"bfloat16\", given \"", name,
                    "\"");
  return name == "float32" ? cpu::Element::float32 : cpu::Element::bfloat16;
}

// What `plan_*` sees in place of a map: it may ask whether there is one, and never reads it.
alignas(kAlignment) char some_map[kAlignment];

bool aligned_pointer(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0;
}

cpu::Strides nhwc(const Shape& s) {
  return {s.height * s.width * s.channels, 1, s.width * s.channels, s.channels};
}

cpu::Strides nchw(const Shape& s) {
  return {s.channels * s.height * s.width, s.height * s.width, s.width, 1};
}

// Where the user keeps (batch, channels, height, width) with the columns innermost.
bool is_nchw(const at::Tensor& map) {
  return map.is_contiguous() && map.suggest_memory_format() == at::MemoryFormat::Contiguous;
}

// May a value of this element live in the tensor's own memory?
bool is_dense_nhwc(const at::Tensor& map, cpu::Element element) {
  return map.scalar_type() == scalar_type(element) &&
         map.is_contiguous(at::MemoryFormat::ChannelsLast) && aligned_pointer(map.const_data_ptr());
}

std::array<int64_t, 2> both(const CpuPlan::Pair& pair) { return {pair.first, pair.second}; }

}  // namespace

// ---- recording ----

CpuPlan::CpuPlan(const std::string& element, std::shared_ptr<Arena> arena, bool high)
    : kernels_(cpu::kernels()),
      element_(element_named(element)),
      precision_(element_ == cpu::Element::bfloat16 ? cpu::Precision::medium
                 : high                             ? cpu::Precision::high
                                                    : cpu::Precision::highest),
      arena_(arena ? std::move(arena) : std::make_shared<Arena>()) {
  TORCH_CHECK_VALUE(!high || element_ == cpu::Element::float32,
                    "CpuPlan: expected the element \"float32\" where high is asked for, given \"",
                    element, "\"");
}

std::string CpuPlan::products() const {
  if (precision_ == cpu::Precision::high) return kernels_.high;
  return element_ == cpu::Element::float32 ? "float32" : "bfloat16";
}

std::string CpuPlan::where(const char* op) const {
  return "step " + std::to_string(steps_.size()) + " (" + op + ")";
}

CpuPlan::Slot CpuPlan::value(Id id) {
  const auto [entry, is_new] = slot_of_.try_emplace(id, static_cast<Slot>(id_of_.size()));
  if (is_new) {
    id_of_.push_back(id);
    defined_by_.push_back(-1);
  }
  return entry->second;
}

void CpuPlan::record(const char* op, std::vector<Slot> reads, const std::vector<Id>& outputs,
                     std::function<Launch(const std::vector<Shape>&, int threads)> launch) {
  TORCH_CHECK(!finished_, where(op), ": the plan is finished and takes no more steps");
  std::vector<Slot> writes;
  for (const Id output : outputs) {
    const Slot write = value(output);
    TORCH_CHECK_VALUE(defined_by_[write] < 0, where(op), ": value ", output,
                      " is already the output of step ", defined_by_[write]);
    const auto uses = [&](const std::vector<Slot>& slots) {
      return std::find(slots.begin(), slots.end(), write) != slots.end();
    };
    TORCH_CHECK_VALUE(!uses(reads), where(op), ": value ", output, " is both input and output");
    TORCH_CHECK_VALUE(!uses(writes), where(op), ": value ", output, " is its output twice");
    for (const Step& step : steps_)
      TORCH_CHECK_VALUE(!uses(step.reads), where(op), ": its output, value ", output,
                        ", is used before, by ", step.where);
    writes.push_back(write);
  }
  for (const Slot write : writes) defined_by_[write] = static_cast<int64_t>(steps_.size());
  Step step;
  step.op = op;
  step.where = where(op);
  step.reads = std::move(reads);
  step.writes = std::move(writes);
  step.launch = std::move(launch);
  steps_.push_back(std::move(step));
}

// A kernel call: `bind` fills in the pointers of one run.
template <class Launch, class Params, class Plan, class Kernel, class Bind>
static Launch make_launch(const std::vector<Shape>& results, const Params& params, int threads,
                          Plan plan, Kernel kernel, Bind bind) {
  Launch launch;
  launch.results = results;
  if (results.front().count() > 0) launch.work = plan(params, threads);
  launch.run = [=](void* const* slots, int64_t begin, int64_t end, void* scratch) {
    Params p = params;
    bind(p, slots);
    kernel(p, threads, begin, end, scratch);
  };
  return launch;
}

void CpuPlan::bottleneck(Id input, Id output, const OptionalTensor& scale,
                         const OptionalTensor& shift, const at::Tensor& w1, const at::Tensor& b1,
                         const at::Tensor& w2, const at::Tensor& b2, const at::Tensor& w3,
                         const at::Tensor& b3, const OptionalTensor& wp, const OptionalTensor& bp,
                         std::optional<Id> low, bool relu, bool pool,
                         const OptionalTensor& w2_factor, bool pool_y) {
  const char* op = "bottleneck";
  const std::string place = where(op);
  TORCH_CHECK_VALUE(!low || !pool_y, place, ": expected no low where y is pooled");
  const auto weights = std::make_shared<const BottleneckWeights>(
      place, kernels_, precision_, scale, shift, w1, b1, w2, b2, w3, b3, wp, bp, relu, w2_factor);
  const Slot x = value(input), y = value(output), half = low ? value(*low) : -1;
  std::vector<Slot> reads = {x};
  if (low) reads.push_back(half);
  const auto* kernels = &kernels_;
  record(op, reads, {output}, [=](const std::vector<Shape>& shapes, int threads) {
    auto p = weights->at(place, shapes[x], pool, pool_y);
    const Shape result = result_of(p);
    if (half >= 0) check_shape(place, "low", shapes[half], half_of(place, result));
    p.x = p.y = some_map;
    p.low = half >= 0 ? some_map : nullptr;
    return make_launch<Launch>({result}, p, threads, kernels->plan_bottleneck, kernels->bottleneck,
                               [weights, x, y, half](auto& params, void* const* slots) {
                                 params.x = slots[x];
                                 params.y = slots[y];
                                 if (half >= 0) params.low = slots[half];
                               });
  });
}

void CpuPlan::conv(Id input, Id output, const at::Tensor& weight, const at::Tensor& bias,
                   const OptionalTensor& scale, const OptionalTensor& shift, Pair stride,
                   Pair padding, Pair dilation, bool relu, std::optional<Id> add, bool relu_sum,
                   const OptionalTensor& factor) {
  const char* op = "conv";
  const std::string place = where(op);
  const auto weights = std::make_shared<const ConvWeights>(
      place, kernels_, precision_, weight, bias, scale, shift, both(stride), both(padding),
      both(dilation), relu, relu_sum, factor);
  const Slot x = value(input), y = value(output), other = add ? value(*add) : -1;
  std::vector<Slot> reads = {x};
  if (add) reads.push_back(other);
  const auto* kernels = &kernels_;
  const auto launch = [=](const std::vector<Shape>& shapes, int threads, const Given* given) {
    auto p = weights->at(place, shapes[x]);
    const Shape result = result_of(p);
    if (other >= 0) check_shape(place, "add", shapes[other], result);
    p.x = p.y = some_map;
    p.add = other >= 0 ? some_map : nullptr;
    if (given) {
      p.as_given = true;
      p.x_element = given->element;
      p.x_strides = given->strides;
    }
    const Slot from = given ? given->slot : x;
    return make_launch<Launch>({result}, p, threads, kernels->plan_conv, kernels->conv,
                               [weights, from, y, other](auto& params, void* const* slots) {
                                 params.x = slots[from];
                                 params.y = slots[y];
                                 if (other >= 0) params.add = slots[other];
                               });
  };
  record(op, reads, {output}, [=](const std::vector<Shape>& shapes, int threads) {
    return launch(shapes, threads, nullptr);
  });
  if (weights->params.in < kFewChannels) {
    steps_.back().launch_given = [=](const std::vector<Shape>& shapes, int threads,
                                     const Given& given) {
      return launch(shapes, threads, &given);
    };
  }
}

void CpuPlan::conv_transpose(Id input, Id output, const at::Tensor& weight, const at::Tensor& bias,
                             Pair stride, Pair padding, Pair output_padding, bool relu,
                             std::optional<Id> add, bool relu_sum) {
  const char* op = "conv_transpose";
  const std::string place = where(op);
  const auto weights = std::make_shared<const ConvTransposeWeights>(
      place, kernels_, precision_, weight, bias, both(stride), both(padding), both(output_padding),
      relu, relu_sum);
  const Slot x = value(input), y = value(output), other = add ? value(*add) : -1;
  std::vector<Slot> reads = {x};
  if (add) reads.push_back(other);
  const auto* kernels = &kernels_;
  record(op, reads, {output}, [=](const std::vector<Shape>& shapes, int threads) {
    auto p = weights->at(place, shapes[x]);
    const Shape result = result_of(p);
    if (other >= 0) check_shape(place, "add", shapes[other], result);
    p.x = p.y = some_map;
    p.add = other >= 0 ? some_map : nullptr;
    return make_launch<Launch>({result}, p, threads, kernels->plan_conv_transpose,
                               kernels->conv_transpose,
                               [weights, x, y, other](auto& params, void* const* slots) {
                                 params.x = slots[x];
                                 params.y = slots[y];
                                 if (other >= 0) params.add = slots[other];
                               });
  });
}

void CpuPlan::head(Id input, std::optional<Id> heatmaps, std::optional<Id> next,
                   const at::Tensor& w1, const at::Tensor& b1, const OptionalTensor& w_maps,
                   const OptionalTensor& b_maps, const OptionalTensor& w_next,
                   const OptionalTensor& b_next, std::optional<Id> add) {
  const char* op = "head";
  const std::string place = where(op);
  const auto weights = std::make_shared<const HeadWeights>(place, kernels_, precision_, w1, b1,
                                                           w_maps, b_maps, w_next, b_next);
  TORCH_CHECK_VALUE(heatmaps.has_value() == w_maps.has_value() &&
                        next.has_value() == w_next.has_value() && (next || !add),
                    place,
                    ": expected an output where there are weights, and only with that of "
                    "w_next something to add");
  const Slot x = value(input), maps = heatmaps ? value(*heatmaps) : -1;
  const Slot y = next ? value(*next) : -1, other = add ? value(*add) : -1;
  std::vector<Slot> reads = {x};
  if (add) reads.push_back(other);
  std::vector<Id> outputs;
  if (heatmaps) outputs.push_back(*heatmaps);
  if (next) outputs.push_back(*next);
  const auto* kernels = &kernels_;
  const auto launch = [=](const std::vector<Shape>& shapes, int threads, const Given* wanted) {
    auto p = weights->at(place, shapes[x]);
    std::vector<Shape> results;
    for (const int64_t channels : {p.joints, p.out}) {
      if (channels == 0) continue;
      results.push_back(shapes[x]);
      results.back().channels = channels;
    }
    if (other >= 0) check_shape(place, "add", shapes[other], results.back());
    p.x = some_map;
    p.add = other >= 0 ? some_map : nullptr;
    p.heatmaps = p.next = some_map;
    if (wanted) {
      p.as_wanted = true;
      p.maps_element = wanted->element;
      p.maps_strides = wanted->strides;
    }
    const Slot to = wanted ? wanted->slot : maps;
    return make_launch<Launch>(results, p, threads, kernels->plan_head, kernels->head,
                               [weights, x, to, y, other](auto& params, void* const* slots) {
                                 params.x = slots[x];
                                 if (other >= 0) params.add = slots[other];
                                 if (to >= 0) params.heatmaps = slots[to];
                                 if (y >= 0) params.next = slots[y];
                               });
  };
  record(op, reads, outputs, [=](const std::vector<Shape>& shapes, int threads) {
    return launch(shapes, threads, nullptr);
  });
  if (heatmaps) {
    steps_.back().launch_wanted = [=](const std::vector<Shape>& shapes, int threads,
                                      const Given& wanted) {
      return launch(shapes, threads, &wanted);
    };
  }
}

void CpuPlan::pool(Id input, Id output, const std::string& mode, Pair kernel, Pair stride,
                   Pair padding, bool ceil_mode, bool count_include_pad) {
  const char* op = "pool";
  const std::string place = where(op);
  const PoolSettings settings(place, element_, mode, both(kernel), both(stride), both(padding),
                              ceil_mode, count_include_pad);
  const Slot x = value(input), y = value(output);
  const auto* kernels = &kernels_;
  record(op, {x}, {output}, [=](const std::vector<Shape>& shapes, int threads) {
    auto p = settings.at(place, shapes[x]);
    p.x = p.y = some_map;
    return make_launch<Launch>({result_of(p)}, p, threads, kernels->plan_pool, kernels->pool,
                               [x, y](auto& params, void* const* slots) {
                                 params.x = slots[x];
                                 params.y = slots[y];
                               });
  });
}

void CpuPlan::concat(const std::vector<Id>& inputs, Id output, std::optional<Id> add) {
  const char* op = "concat";
  const std::string place = where(op);
  constexpr size_t kMaps = cpu::ConcatParams::kMaps;
  TORCH_CHECK_VALUE(!inputs.empty() && inputs.size() <= kMaps, place, ": expected 1 to ", kMaps,
                    " maps to concatenate, given ", inputs.size());
  std::vector<Slot> maps;
  for (const Id id : inputs) maps.push_back(value(id));
  const Slot y = value(output), other = add ? value(*add) : -1;
  std::vector<Slot> reads = maps;
  if (add) reads.push_back(other);
  const auto* kernels = &kernels_;
  record(op, reads, {output},
         [=, element = element_](const std::vector<Shape>& shapes, int threads) {
           Shape result = shapes[maps[0]];
           result.channels = 0;
           cpu::ConcatParams p{};
           p.element = element;
           p.pixels = result.batch * result.height * result.width;
           for (const Slot map : maps) {
             Shape expected = result;
             p.channels[p.maps] = expected.channels = shapes[map].channels;
             check_shape(place, c10::str("input ", p.maps).c_str(), shapes[map], expected);
             ++p.maps;
             result.channels += expected.channels;
           }
           if (other >= 0) check_shape(place, "add", shapes[other], result);
           return make_launch<Launch>({result}, p, threads, kernels->plan_concat, kernels->concat,
                                      [maps, y, other](auto& params, void* const* slots) {
                                        for (size_t i = 0; i < maps.size(); ++i)
                                          params.x[i] = slots[maps[i]];
                                        params.y = slots[y];
                                        if (other >= 0) params.add = slots[other];
                                      });
         });
}

void CpuPlan::upsample_add(const std::vector<Id>& lows, const std::vector<int64_t>& factors,
                           Id skip, Id output, bool relu) {
  const char* op = "upsample_add";
  const std::string place = where(op);
  check_map_count(place, lows.size());
  TORCH_CHECK_VALUE(lows.size() == factors.size(), place,
                    ": expected a factor for each map, given ", factors.size(), " for ",
                    lows.size());
  cpu::UpsampleAddParams settings{};
  settings.element = element_;
  settings.relu = relu;
  for (const int64_t factor : factors) {
    int shift = 0;
    while (shift < kMostDoublings && int64_t{1} << shift < factor) ++shift;
    TORCH_CHECK_VALUE(int64_t{1} << shift == factor, place,
                      ": expected factors out of 1, 2, 4, 8, given ", factor);
    settings.shift[settings.maps++] = shift;
  }
  std::vector<Slot> maps;
  for (const Id id : lows) maps.push_back(value(id));
  const Slot full = value(skip), y = value(output);
  std::vector<Slot> reads = maps;
  reads.push_back(full);
  const auto* kernels = &kernels_;
  record(op, reads, {output}, [=](const std::vector<Shape>& shapes, int threads) {
    const Shape& result = shapes[full];
    cpu::UpsampleAddParams p = settings;
    for (int i = 0; i < p.maps; ++i)
      check_shape(place, "low", shapes[maps[i]], reduced(place, result, p.shift[i]));
    p.batch = result.batch;
    p.height = result.height;
    p.width = result.width;
    p.channels = result.channels;
    return make_launch<Launch>({result}, p, threads, kernels->plan_upsample_add,
                               kernels->upsample_add,
                               [maps, full, y](auto& params, void* const* slots) {
                                 for (size_t i = 0; i < maps.size(); ++i)
                                   params.low[i] = slots[maps[i]];
                                 params.skip = slots[full];
                                 params.y = slots[y];
                               });
  });
}

void CpuPlan::add(Id a, Id b, Id output, bool relu) {
  const char* op = "add";
  const std::string place = where(op);
  const Slot left = value(a), right = value(b), y = value(output);
  const auto* kernels = &kernels_;
  record(op, {left, right}, {output},
         [=, element = element_](const std::vector<Shape>& shapes, int threads) {
           const Shape& result = shapes[left];
           check_shape(place, "b", shapes[right], result);
           const cpu::AddParams p{element, relu, result.count(), some_map, some_map, some_map};
           return make_launch<Launch>({result}, p, threads, kernels->plan_add, kernels->add,
                                      [left, right, y](auto& params, void* const* slots) {
                                        params.a = slots[left];
                                        params.b = slots[right];
                                        params.y = slots[y];
                                      });
         });
}

void CpuPlan::finish(const std::vector<Id>& inputs, const std::vector<Id>& outputs,
                     bool as_computed) {
  TORCH_CHECK(!finished_, "CpuPlan: the plan is finished already");
  TORCH_CHECK_VALUE(!inputs.empty() && !outputs.empty(),
                    "CpuPlan: expected at least one input and one output, given ", inputs.size(),
                    " and ", outputs.size());
  std::vector<bool> is_input(id_of_.size(), false);
  std::vector<Slot> input_slots;
  for (const Id id : inputs) {
    const Slot slot = value(id);
    is_input.resize(id_of_.size(), false);
    TORCH_CHECK_VALUE(!is_input[slot], "CpuPlan: input value ", id, " is listed twice");
    TORCH_CHECK_VALUE(defined_by_[slot] < 0, "CpuPlan: input value ", id, " is the output of ",
                      steps_[defined_by_[slot]].where);
    is_input[slot] = true;
    input_slots.push_back(slot);
  }
  for (const Step& step : steps_)
    for (const Slot slot : step.reads)
      TORCH_CHECK_VALUE(is_input[slot] || defined_by_[slot] >= 0, step.where, ": value ",
                        id_of_[slot], " is neither an input nor the output of an earlier step");
  std::vector<Slot> distinct;
  std::vector<size_t> index;
  for (const Id id : outputs) {
    const auto entry = slot_of_.find(id);
    const Slot slot = entry == slot_of_.end() ? -1 : entry->second;
    TORCH_CHECK_VALUE(slot >= 0 && (is_input[slot] || defined_by_[slot] >= 0),
                      "CpuPlan: output value ", id,
                      " is neither an input nor the output of a step");
    const auto seen = std::find(distinct.begin(), distinct.end(), slot);
    index.push_back(seen - distinct.begin());
    if (seen == distinct.end()) distinct.push_back(slot);
  }
  inputs_ = std::move(input_slots);
  distinct_outputs_ = std::move(distinct);
  output_index_ = std::move(index);
  as_computed_ = as_computed;
  finished_ = true;
}

// ---- layouts ----

std::shared_ptr<const CpuPlan::Layout> CpuPlan::layout_for(const std::vector<at::Tensor>& inputs,
                                                           bool to_nchw) const {
  // All that a layout depends on, and nothing that is not cheap to ask at every call.
  std::vector<int64_t> key;
  key.reserve(2 + 12 * inputs.size());
  key.push_back(at::get_num_threads());
  key.push_back(to_nchw);
  for (const at::Tensor& input : inputs) {
    key.push_back(static_cast<int64_t>(input.scalar_type()));
    key.push_back(static_cast<int64_t>(input.device().type()));
    key.push_back(aligned_pointer(input.device().is_cpu() ? input.const_data_ptr() : nullptr));
    key.push_back(input.dim());
    key.insert(key.end(), input.sizes().begin(), input.sizes().end());
    key.insert(key.end(), input.strides().begin(), input.strides().end());
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = std::find_if(layouts_.begin(), layouts_.end(),
                                  [&](const auto& layout) { return layout->key == key; });
  if (found != layouts_.end()) {
    std::rotate(layouts_.begin(), found, found + 1);
  } else {
    layouts_.insert(layouts_.begin(), make_layout(inputs, to_nchw, std::move(key)));
    if (layouts_.size() > kLayouts) layouts_.pop_back();
  }
  return layouts_.front();
}

std::shared_ptr<const CpuPlan::Layout> CpuPlan::make_layout(const std::vector<at::Tensor>& inputs,
                                                            bool to_nchw,
                                                            std::vector<int64_t> key) const {
  auto layout = std::make_shared<Layout>();
  layout->key = std::move(key);
  layout->threads = at::get_num_threads();
  const auto values = static_cast<Slot>(id_of_.size());
  std::vector<Shape> shapes(values, Shape{0, 0, 0, 0});
  auto& launches = layout->launches;

  const auto add_copy = [&](Slot from, cpu::Element from_element, const cpu::Strides& from_strides,
                            Slot to, cpu::Element to_element, const cpu::Strides& to_strides,
                            const Shape& s) {
    const cpu::RelayoutParams params{from_element, to_element,   s.batch,    s.channels, s.height,
                                     s.width,      from_strides, to_strides, nullptr,    nullptr};
    Launch launch = make_launch<Launch>({s}, params, layout->threads, kernels_.plan_relayout,
                                        kernels_.relayout, [from, to](auto& p, void* const* slots) {
                                          p.x = slots[from];
                                          p.y = slots[to];
                                        });
    launch.reads = {from};
    launch.writes = {to};
    launches.push_back(std::move(launch));
  };

  std::unordered_map<Slot, Given> given;  // values that nobody lays out: their readers do
  for (size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor& input = inputs[i];
    const Slot slot = inputs_[i];
    shapes[slot] = map_shape("CpuPlan", ("input " + std::to_string(i)).c_str(), input);
    layout->direct.push_back(is_dense_nhwc(input, element_));
    const bool laid_out = std::any_of(steps_.begin(), steps_.end(), [&](const Step& step) {
      const auto reads = std::count(step.reads.begin(), step.reads.end(), slot);
      return reads > (step.launch_given && step.reads[0] == slot ? 1 : 0);
    });
    if (layout->direct.back()) continue;  // cheaper than to copy rows of it once more
    const auto s = input.strides();
    const Given as_it_is{
        values + static_cast<Slot>(i), element_of(input), {s[0], s[1], s[2], s[3]}};
    if (!laid_out) {
      given.emplace(slot, as_it_is);
    } else {
      add_copy(as_it_is.slot, as_it_is.element, as_it_is.strides, slot, element_,
               nhwc(shapes[slot]), shapes[slot]);
    }
  }

  const at::Tensor& first = inputs.front();
  const cpu::Element to = as_computed_ ? element_ : element_of(first);
  const auto export_of = [&](Slot slot) {
    const auto found = std::find(distinct_outputs_.begin(), distinct_outputs_.end(), slot);
    return found == distinct_outputs_.end() ? -1 : found - distinct_outputs_.begin();
  };
  const auto is_read = [&](Slot slot) {
    return std::any_of(steps_.begin(), steps_.end(), [&](const Step& step) {
      return std::find(step.reads.begin(), step.reads.end(), slot) != step.reads.end();
    });
  };
  for (const Step& step : steps_) {
    const auto as_given = given.find(step.reads[0]);
    Launch launch = as_given == given.end()
                        ? step.launch(shapes, layout->threads)
                        : step.launch_given(shapes, layout->threads, as_given->second);
    for (size_t i = 0; i < step.writes.size(); ++i) shapes[step.writes[i]] = launch.results[i];
    const auto wanted = [&](Slot slot) -> std::optional<Given> {
      const int64_t index = export_of(slot);
      if (index < 0 || !(to_nchw || to != element_)) return std::nullopt;
      return Given{values + static_cast<Slot>(inputs.size()) + index, to,
                   to_nchw ? nchw(shapes[slot]) : nhwc(shapes[slot])};
    };
    launch.writes = step.writes;
    if (step.launch_wanted && !is_read(step.writes[0])) {
      if (const auto output = wanted(step.writes[0])) {
        launch = step.launch_wanted(shapes, layout->threads, *output);
        launch.writes.assign(step.writes.begin() + 1, step.writes.end());
      }
    }
    launch.op = step.op;
    launch.value = id_of_[step.writes[0]];
    launch.reads = step.reads;
    const std::vector<Slot> written = launch.writes;
    launches.push_back(std::move(launch));
    layout->last_op = step.op;
    // An output leaves as soon as it is there, while it is in the cache.
    for (const Slot slot : written) {
      if (const auto output = wanted(slot))
        add_copy(slot, element_, nhwc(shapes[slot]), output->slot, output->element, output->strides,
                 shapes[slot]);
    }
  }
  for (const Slot slot : distinct_outputs_)
    layout->outputs.push_back(
        {shapes[slot], slot, defined_by_[slot] >= 0 && !to_nchw && to == element_});

  launches.erase(std::remove_if(launches.begin(), launches.end(),
                                [](const Launch& launch) { return launch.work.tasks == 0; }),
                 launches.end());
  place(*layout, shapes, bytes_of(element_));
  for (const Launch& launch : launches) {
    layout->scratch = std::max(layout->scratch, aligned(launch.work.scratch));
    layout->parallel |= layout->threads > 1 && launch.work.tasks > 1;
  }
  layout->turns = layout->parallel ? launches.size() * Turn::bytes(layout->threads) : 0;

  const int64_t batch = layout->piece = first.size(0);
  const bool alike = std::all_of(inputs.begin(), inputs.end(),
                                 [&](const at::Tensor& input) { return input.size(0) == batch; });
  if (alike && layout->arena > kArena) {
    const auto image = static_cast<int64_t>(layout->arena) / batch;
    const auto most = std::max<int64_t>(layout->threads, static_cast<int64_t>(kArena) / image);
    const int64_t pieces = (batch + most - 1) / most;
    layout->piece = (batch + pieces - 1) / pieces;
  }
  return layout;
}

// Gives each value that lives in the arena the first gap that is free for as long as it lives.
void CpuPlan::place(Layout& layout, const std::vector<Shape>& shapes, int64_t element_bytes) {
  const auto values = static_cast<Slot>(shapes.size());
  std::vector<size_t> last_use(values, 0);
  for (size_t i = 0; i < layout.launches.size(); ++i)
    for (const Slot slot : layout.launches[i].reads)
      if (slot < values) last_use[slot] = i;
  std::vector<bool> elsewhere(values, false);
  for (const Output& output : layout.outputs)
    if (output.direct) elsewhere[output.value] = true;

  struct Range {
    int64_t begin, end;
    Slot value;
  };
  std::vector<Range> live;  // sorted
  layout.offsets.assign(values, -1);
  int64_t top = 0;
  for (size_t i = 0; i < layout.launches.size(); ++i) {
    for (const Slot slot : layout.launches[i].writes) {
      if (slot >= values || elsewhere[slot]) continue;
      const auto bytes =
          static_cast<int64_t>(aligned(static_cast<size_t>(shapes[slot].count() * element_bytes)));
      int64_t begin = 0;
      auto next = live.begin();
      while (next != live.end() && next->begin - begin < bytes) begin = (next++)->end;
      live.insert(next, {begin, begin + bytes, slot});
      layout.offsets[slot] = begin;
      top = std::max(top, begin + bytes);
    }
    live.erase(std::remove_if(live.begin(), live.end(),
                              [&](const Range& range) { return last_use[range.value] <= i; }),
               live.end());
  }
  layout.arena = static_cast<size_t>(top);
}

// ---- running ----

Arena::Block Arena::take(size_t bytes) {
  Block block;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto enough = std::find_if(idle_.begin(), idle_.end(),
                                     [&](const Block& idle) { return idle.bytes >= bytes; });
    const auto chosen = enough != idle_.end() ? enough : idle_.begin();
    if (chosen != idle_.end()) {
      block = std::move(*chosen);
      idle_.erase(chosen);
    }
  }
  if (block.bytes < bytes) {
    block.memory.reset();  // before the larger one is asked for
    block = {allocate(bytes), bytes};
  }
  return block;
}

void Arena::give(Block block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(block));
}

void CpuPlan::execute(const Layout& layout, Slots slots, char* scratch, Times* times) {
  using Clock = std::chrono::steady_clock;
  Clock::time_point before;
  if (times) before = Clock::now();
  const auto done = [&](const Launch& launch) {
    if (!times) return;
    const Clock::time_point now = Clock::now();
    const std::chrono::duration<double> seconds = now - before;
    times->push_back({launch.op ? launch.op : "copy", launch.value, seconds.count()});
    before = now;
  };
#ifdef _OPENMP
  if (layout.parallel && !at::in_parallel_region()) {
    // The turns lie behind the threads' scratch.
    char* turns = scratch + layout.threads * layout.scratch;
    const size_t step = Turn::bytes(layout.threads);
    for (size_t i = 0; i < layout.launches.size(); ++i)
      Turn::create(turns + i * step, layout.threads);
    // No num_threads clause, like ATen: a team that changes its size is made anew each time.
#pragma omp parallel
    {
      const int thread = omp_get_thread_num();
      const int team = std::min(omp_get_num_threads(), layout.threads);
      char* mine = scratch + thread * layout.scratch;
      char* turn = turns;
      for (const Launch& launch : layout.launches) {
        std::launder(reinterpret_cast<Turn*>(turn))
            ->take(launch.work.tasks, thread, team,
                   [&](int64_t begin, int64_t end) { launch.run(slots, begin, end, mine); });
        turn += step;
        if (thread == 0) done(launch);
      }
    }
    return;
  }
#endif
  for (const Launch& launch : layout.launches) {
    launch.run(slots, 0, launch.work.tasks, scratch);
    done(launch);
  }
}

std::vector<CpuPlan::Timed> CpuPlan::profile(const std::vector<at::Tensor>& inputs) const {
  Times times;
  run(inputs, &times);
  return times;
}

std::vector<at::Tensor> CpuPlan::run(const std::vector<at::Tensor>& inputs, Times* times) const {
  TORCH_CHECK(finished_, "CpuPlan: the plan is not finished");
  TORCH_CHECK_VALUE(inputs.size() == inputs_.size(), "CpuPlan: expected ", inputs_.size(),
                    " inputs, given ", inputs.size());
  const at::Tensor& first = inputs.front();
  const bool to_nchw = !as_computed_ && is_nchw(first);
  const auto layout = layout_for(inputs, to_nchw);
  const auto format = to_nchw ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
  auto options = first.options();
  if (as_computed_)
    options = options.dtype(element_ == cpu::Element::float32 ? at::kFloat : at::kBFloat16);

  std::vector<at::Tensor> distinct;
  std::vector<void*> results;
  for (const Output& output : layout->outputs) {
    at::Tensor& result = distinct.emplace_back(at::empty(output.shape.sizes(), options, format));
    const bool is_computed = defined_by_[output.value] >= 0;
    if (!is_computed) {
      const auto input = std::find(inputs_.begin(), inputs_.end(), output.value);
      result.copy_(inputs[input - inputs_.begin()].detach());
    }
    results.push_back(is_computed ? result.mutable_data_ptr() : nullptr);
  }

  const int64_t batch = first.size(0);
  if (layout->piece == batch) {
    run_layout(*layout, inputs, results, times);
  } else {
    std::vector<at::Tensor> piece(inputs.size());
    for (int64_t begin = 0; begin < batch; begin += layout->piece) {
      const int64_t count = std::min(layout->piece, batch - begin);
      for (size_t i = 0; i < inputs.size(); ++i) piece[i] = inputs[i].narrow(0, begin, count);
      Times own;
      run_layout(*layout_for(piece, to_nchw), piece, results, times ? &own : nullptr);
      if (times) times->resize(own.size());
      for (size_t i = 0; i < own.size(); ++i) {  // every piece goes through the same kernels
        const double before = (*times)[i].seconds;
        (*times)[i] = own[i];
        (*times)[i].seconds += before;
      }
      for (size_t i = 0; i < results.size(); ++i)
        if (results[i])
          results[i] = static_cast<char*>(results[i]) + count * distinct[i].nbytes() / batch;
    }
  }
  std::vector<at::Tensor> outputs;
  outputs.reserve(output_index_.size());
  for (const size_t index : output_index_) outputs.push_back(distinct[index]);
  return outputs;
}

// `results`: where each distinct output goes, dense; null for one that is an input.
void CpuPlan::run_layout(const Layout& layout, const std::vector<at::Tensor>& inputs,
                         const std::vector<void*>& results, Times* times) const {
  if (layout.launches.empty()) return;
  const size_t values = id_of_.size();
  std::vector<void*> slots(values + inputs.size() + results.size(), nullptr);
  for (size_t i = 0; i < inputs.size(); ++i) {
    // Kernels never write to what they read.
    void* data = const_cast<void*>(inputs[i].const_data_ptr());
    slots[values + i] = data;
    if (layout.direct[i]) slots[inputs_[i]] = data;
  }
  for (size_t i = 0; i < results.size(); ++i) {
    slots[values + inputs.size() + i] = results[i];
    if (layout.outputs[i].direct) slots[layout.outputs[i].value] = results[i];
  }
  Arena::Block block = arena_->take(layout.bytes());
  char* base = static_cast<char*>(block.memory.get());
  for (size_t value = 0; value < values; ++value)
    if (layout.offsets[value] >= 0) slots[value] = base + layout.offsets[value];
  execute(layout, slots.data(), base + layout.arena, times);
  arena_->give(std::move(block));
  if (layout.last_op) last_path() = {kernels_.name, layout.last_op};
}

}  // namespace hgfast
