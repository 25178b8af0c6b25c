// The Python module hgfast._C: what is no op. Importing it also registers the ops (ops.cpp).
// Python code asks hgfast/_native.py for it, which explains in words where it cannot be had.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "build_info.h"
#include "cpu_plan.h"
#include "watch.h"
#ifdef HGFAST_CUDA
#include "cuda_python.h"
#endif

namespace {

namespace py = pybind11;
using hgfast::CpuPlan;

std::vector<std::pair<std::string, bool>> isa_list() {
  const hgfast::cpu::Isa* list = nullptr;
  const int count = hgfast::cpu::isa_list(&list);
  std::vector<std::pair<std::string, bool>> result;
  for (int i = 0; i < count; ++i) result.emplace_back(list[i].name, list[i].runnable);
  return result;
}

// Bound so that at::ValueError arrives as ValueError.
template <class Function>
auto translated(Function function) {
  return torch::wrap_pybind_function(function);
}

void bind_cpu_plan(py::module_& m) {
  using py::arg;
  const CpuPlan::Pair one(1, 1), zero(0, 0);
  py::class_<hgfast::Arena, std::shared_ptr<hgfast::Arena>>(
      m, "Arena", "The memory in which plans run: for plans that run one after the other.")
      .def(py::init<>());
  py::class_<CpuPlan>(m, "CpuPlan",
                      "A network's steps over numbered values, weights packed once, run in one "
                      "call. Record the steps, finish(), then run() from any thread.")
      .def(py::init(translated(
               [](const std::string& element, std::shared_ptr<hgfast::Arena> arena, bool high) {
                 return std::make_unique<CpuPlan>(element, std::move(arena), high);
               })),
           arg("element"), arg("arena") = py::none(), arg("high") = false)
      .def("bottleneck", translated(&CpuPlan::bottleneck), arg("input"), arg("output"),
           arg("scale"), arg("shift"), arg("w1"), arg("b1"), arg("w2"), arg("b2"), arg("w3"),
           arg("b3"), arg("wp") = py::none(), arg("bp") = py::none(), arg("low") = py::none(),
           arg("relu") = false, arg("pool") = false, arg("w2_factor") = py::none(),
           arg("pool_y") = false)
      .def("conv", translated(&CpuPlan::conv), arg("input"), arg("output"), arg("weight"),
           arg("bias"), arg("scale") = py::none(), arg("shift") = py::none(), arg("stride") = one,
           arg("padding") = zero, arg("dilation") = one, arg("relu") = false,
           arg("add") = py::none(), arg("relu_sum") = false, arg("factor") = py::none())
      .def("conv_transpose", translated(&CpuPlan::conv_transpose), arg("input"), arg("output"),
           arg("weight"), arg("bias"), arg("stride") = one, arg("padding") = zero,
           arg("output_padding") = zero, arg("relu") = false, arg("add") = py::none(),
           arg("relu_sum") = false)
      .def("head", translated(&CpuPlan::head), arg("input"), arg("heatmaps"), arg("next"),
           arg("w1"), arg("b1"), arg("w_maps") = py::none(), arg("b_maps") = py::none(),
           arg("w_next") = py::none(), arg("b_next") = py::none(), arg("add") = py::none())
      .def("pool", translated(&CpuPlan::pool), arg("input"), arg("output"), arg("mode"),
           arg("kernel"), arg("stride"), arg("padding") = zero, arg("ceil_mode") = false,
           arg("count_include_pad") = true)
      .def("concat", translated(&CpuPlan::concat), arg("inputs"), arg("output"),
           arg("add") = py::none())
      .def("upsample_add", translated(&CpuPlan::upsample_add), arg("lows"), arg("factors"),
           arg("skip"), arg("output"), arg("relu") = false)
      .def("add", translated(&CpuPlan::add), arg("a"), arg("b"), arg("output"), arg("relu") = false)
      .def("finish", translated(&CpuPlan::finish), arg("inputs"), arg("outputs"),
           arg("as_computed") = false)
      .def("run",
           torch::wrap_pybind_function_no_gil(
               [](const CpuPlan& plan, const std::vector<at::Tensor>& inputs) {
                 return plan.run(inputs);
               }),
           arg("inputs"))
      .def(
          "profile",
          [](const CpuPlan& plan, const std::vector<at::Tensor>& inputs) {
            const py::gil_scoped_release others_may_run;
            std::vector<std::tuple<std::string, CpuPlan::Id, double>> rows;
            for (auto& [op, value, seconds] : plan.profile(inputs))
              rows.emplace_back(op, value, seconds);
            return rows;
          },
          arg("inputs"),
          "[(op, value, seconds)]: runs, and tells how long each kernel took until all threads "
          "were done, by the first value that its step writes; (\"copy\", -1, seconds) for one of "
          "an input or output.")
      .def_property_readonly(
          "products", &CpuPlan::products,
          "What is multiplied: \"float32\", \"winograd\", \"bf16x3\", \"bfloat16\"")
      .def_property_readonly("path", &CpuPlan::path,
                             "The instruction set whose kernels the weights are packed for.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "hgfast's compiled part";
  m.def("build_info", &hgfast::build_info, "What this module was built from and for.");
  m.def("isa_list", translated(&isa_list),
        "[(name, runnable)]: the instruction sets that were built, the best first, and whether "
        "this machine can run each.");
  m.def(
      "last_path", [] { return hgfast::last_path().text(); },
      "The kernel that ran last in this thread: \"<instruction set>/<op>\", \"cuda/<instance>\"; "
      "\"\" before the first.");
  bind_cpu_plan(m);
  hgfast::bind_watch(m);
#ifdef HGFAST_CUDA
  hgfast::bind_cuda(m);
#endif
}
