// What of the CUDA binding is no op, as Python sees it: in hgfast._C where torch has CUDA, and in
// the emulator's module for tests.
#include "cuda_python.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

namespace hgfast {
namespace {

namespace py = pybind11;
using OptionalTensor = std::optional<at::Tensor>;

template <class Block>
std::unique_ptr<Block> make_block(at::ScalarType element, const OptionalTensor& scale,
                                  const OptionalTensor& shift, const at::Tensor& w1,
                                  const at::Tensor& b1, const at::Tensor& w2, const at::Tensor& b2,
                                  const at::Tensor& w3, const at::Tensor& b3,
                                  const OptionalTensor& wp, const OptionalTensor& bp, bool relu) {
  return std::make_unique<Block>("bottleneck", element, scale, shift, w1, b1, w2, b2, w3, b3, wp,
                                 bp, relu);
}

py::list rows(const std::vector<cuda::BottleneckVariant>& variants) {
  py::list rows;
  for (const auto& row : variants) {
    py::dict entry;
    entry["name"] = row.name;
    entry["threads"] = row.threads;
    entry["shared_bytes"] = row.shared_bytes;
    rows.append(entry);
  }
  return rows;
}

}  // namespace

void bind_cuda(pybind11::module_& m) {
  using py::arg;
  py::class_<CudaBottleneck>(m, "CudaBottleneck",
                             "A residual block with its weights packed for a GPU. Immutable.")
      .def(py::init(torch::wrap_pybind_function(&make_block<CudaBottleneck>)), arg("element"),
           arg("scale"), arg("shift"), arg("w1"), arg("b1"), arg("w2"), arg("b2"), arg("w3"),
           arg("b3"), arg("wp") = py::none(), arg("bp") = py::none(), arg("relu") = false)
      .def("run", torch::wrap_pybind_function_no_gil(&CudaBottleneck::run), arg("x"),
           arg("low") = py::none(), arg("pool") = false)
      .def("tensors", &CudaBottleneck::tensors)
      .def_static("obstacle", torch::wrap_pybind_function(&CudaBottleneck::obstacle), arg("device"),
                  arg("in"), arg("middle"), arg("out"), arg("project"));
  py::class_<CudaStem>(m, "CudaStem", "A stem with its weights packed for a GPU. Immutable.")
      .def(py::init(torch::wrap_pybind_function(
               [](at::ScalarType element, const at::Tensor& weight, const at::Tensor& bias,
                  const CudaStem::OptionalTensor& scale, const CudaStem::OptionalTensor& shift) {
                 return std::make_unique<CudaStem>("stem", element, weight, bias, scale, shift);
               })),
           arg("element"), arg("weight"), arg("bias"), arg("scale") = py::none(),
           arg("shift") = py::none())
      .def("run", torch::wrap_pybind_function_no_gil(&CudaStem::run), arg("x"))
      .def("tensors", &CudaStem::tensors);
  py::class_<CudaHead>(m, "CudaHead",
                       "What follows an hourglass, with its weights packed for a GPU. Immutable.")
      .def(py::init(torch::wrap_pybind_function(
               [](at::ScalarType element, const at::Tensor& w1, const at::Tensor& b1,
                  const CudaHead::OptionalTensor& wh, const CudaHead::OptionalTensor& bh,
                  const CudaHead::OptionalTensor& wn, const CudaHead::OptionalTensor& bn) {
                 return std::make_unique<CudaHead>("head", element, w1, b1, wh, bh, wn, bn);
               })),
           arg("element"), arg("w1"), arg("b1"), arg("wh") = py::none(), arg("bh") = py::none(),
           arg("wn") = py::none(), arg("bn") = py::none())
      .def("run", torch::wrap_pybind_function_no_gil(&CudaHead::run), arg("y"),
           arg("x") = py::none())
      .def("tensors", &CudaHead::tensors)
      .def_static("obstacle", torch::wrap_pybind_function(&CudaHead::obstacle), arg("device"),
                  arg("in"), arg("middle"), arg("joints"), arg("out"));
  m.def("cuda_obstacle", torch::wrap_pybind_function(&cuda_obstacle), arg("device"),
        "Why this build has no code for a device, in words; empty if it has.");
  m.def(
      "bottleneck_variants", [] { return rows(cuda::bottleneck_variants()); },
      "Every instance of the bottleneck kernel, and the most shared memory that a block of it asks "
      "for; of the instances for any number of channels, with 256 middle channels.");
  m.def(
      "stem_variants", [] { return rows(cuda::stem_variants()); },
      "Every instance of the stem's kernel, and the shared memory of a block.");
  m.def(
      "head_variants", [] { return rows(cuda::head_variants()); },
      "Every instance of the head's kernel, and the shared memory of a block for 17 joints and as "
      "many channels as an hourglass has for it: 256, or 64.");
#ifdef HGFAST_HOPPER
  py::class_<CudaHopperBottleneck>(
      m, "CudaHopperBottleneck",
      "A residual block with its weights packed for Hopper's warpgroups. Immutable.")
      .def(py::init(torch::wrap_pybind_function(&make_block<CudaHopperBottleneck>)), arg("element"),
           arg("scale"), arg("shift"), arg("w1"), arg("b1"), arg("w2"), arg("b2"), arg("w3"),
           arg("b3"), arg("wp") = py::none(), arg("bp") = py::none(), arg("relu") = false)
      .def("run", torch::wrap_pybind_function_no_gil(&CudaHopperBottleneck::run), arg("x"),
           arg("low") = py::none(), arg("pooled") = false)
      .def("tensors", &CudaHopperBottleneck::tensors)
      .def_static("obstacle", torch::wrap_pybind_function(&CudaHopperBottleneck::obstacle),
                  arg("device"), arg("in"), arg("middle"), arg("out"),
                  arg("project") = false);
  m.def(
      "hopper_bottleneck_variants", [] { return rows(cuda::hopper_bottleneck_variants()); },
      "Every instance of the bottleneck kernel for Hopper, and the shared memory of a block.");
  py::class_<CudaLatencyBottleneck>(
      m, "CudaLatencyBottleneck",
      "A residual block with its weights packed for clusters of blocks on Hopper. Immutable.")
      .def(py::init(torch::wrap_pybind_function(&make_block<CudaLatencyBottleneck>)),
           arg("element"), arg("scale"), arg("shift"), arg("w1"), arg("b1"), arg("w2"), arg("b2"),
           arg("w3"), arg("b3"), arg("wp") = py::none(), arg("bp") = py::none(),
           arg("relu") = false)
      .def("run", torch::wrap_pybind_function_no_gil(&CudaLatencyBottleneck::run), arg("x"),
           arg("low") = py::none(), arg("pool") = false)
      .def("tensors", &CudaLatencyBottleneck::tensors)
      .def_static("obstacle", torch::wrap_pybind_function(&CudaLatencyBottleneck::obstacle),
                  arg("device"), arg("in"), arg("middle"), arg("out"), arg("project"));
  py::class_<CudaLatencySubtree>(
      m, "CudaLatencySubtree",
      "A chain of residual blocks on maps of at most 8x8 pixels, in one launch. Immutable.")
      .def(py::init(torch::wrap_pybind_function(
               [](const std::vector<const CudaLatencyBottleneck*>& blocks,
                  const std::vector<std::tuple<int, bool, int>>& steps) {
                 std::vector<CudaLatencySubtree::Step> program;
                 for (const auto& [source, pool, low] : steps)
                   program.push_back({source, pool, low});
                 return std::make_unique<CudaLatencySubtree>("subtree", blocks, program);
               })),
           arg("blocks"), arg("steps"))
      .def("run", torch::wrap_pybind_function_no_gil(&CudaLatencySubtree::run), arg("x"))
      .def("tensors", &CudaLatencySubtree::tensors);
  m.def(
      "latency_variants", [] { return rows(cuda::latency_variants()); },
      "Every instance of the bottleneck kernel over clusters, and the shared memory of a block for "
      "256, 128 and 256 channels.");
  m.def(
      "subtree_variants", [] { return rows(cuda::subtree_variants()); },
      "Every instance of the kernel for chains of blocks, and the shared memory of a block for six "
      "steps of 256 channels.");
#endif
}

}  // namespace hgfast
