// The Python module hgfast_emulator, for tests: the emulator's settings and counters, and its probe
// kernels. Where csrc/cuda_ops.cpp is part of it, importing it also gives the ops to the CPU.
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_python.h"
#include "launch.h"
#include "registry.h"

namespace {

namespace py = pybind11;
namespace emulator = hgfast::cuda::emulator;

// The number of its array among inputs and outputs; the numbers of a TileShape, in their order.
using Map = std::pair<size_t, std::array<int64_t, 8>>;

py::dict counters() {
  const emulator::Counters& c = emulator::last_counters();
  py::dict d;
  d["name"] = c.name;
  d["blocks"] = c.blocks;
  d["threads"] = c.threads;
  d["shared_bytes"] = c.shared_bytes;
  d["block_barriers"] = c.block_barriers;
  d["warp_barriers"] = c.warp_barriers;
  d["shuffles"] = c.shuffles;
  d["multiply_adds"] = c.multiply_adds;
  d["flops"] = c.flops;
  d["load_matrices"] = c.load_matrices;
  d["store_matrices"] = c.store_matrices;
  d["matrix_conflicts"] = c.matrix_conflicts;
  d["shared_bytes_loaded"] = c.shared_bytes_loaded;
  d["shared_bytes_stored"] = c.shared_bytes_stored;
  d["async_bytes"] = c.async_bytes;
  d["partial_barriers"] = c.partial_barriers;
  d["cluster_barriers"] = c.cluster_barriers;
  d["barrier_phases"] = c.barrier_phases;
  d["warpgroup_products"] = c.warpgroup_products;
  d["operand_bytes"] = c.operand_bytes;
  d["tile_bytes"] = c.tile_bytes;
  d["stored_tile_bytes"] = c.stored_tile_bytes;
  d["bulk_bytes"] = c.bulk_bytes;
  d["remote_bytes"] = c.remote_bytes;
  d["global_bytes_loaded"] = c.global_bytes_loaded;
  d["global_bytes_stored"] = c.global_bytes_stored;
  d["minimum_bytes"] = c.minimum_bytes;
  d["dram_bytes_read"] = c.memory_modelled ? py::cast(c.dram_bytes_read) : py::none();
  d["dram_bytes_written"] = c.memory_modelled ? py::cast(c.dram_bytes_written) : py::none();
  return d;
}

py::buffer_info contents(const py::buffer& buffer, bool writable) {
  py::buffer_info info = buffer.request(writable);
  py::ssize_t stride = info.itemsize;
  for (auto i = info.ndim; i-- > 0; stride *= info.shape[i])
    if (info.shape[i] != 1 && info.strides[i] != stride)
      throw py::value_error("arrays must be contiguous");
  return info;
}

void run(const std::string& name, const std::vector<py::buffer>& inputs,
         const std::vector<py::buffer>& outputs, const std::vector<int64_t>& values, int64_t blocks,
         int threads, int shared_bytes, int cluster, int registers, bool programmatic,
         const std::vector<size_t>& constants, const std::vector<Map>& maps) {
  const auto found = emulator::probes().find(name);
  if (found == emulator::probes().end()) throw py::key_error(name);
  constexpr size_t kMost = emulator::ProbeParams::kMost;
  if (inputs.size() > kMost || outputs.size() > kMost || values.size() > kMost ||
      maps.size() > kMost)
    throw py::value_error("at most four of each");
  std::vector<py::buffer_info> infos;  // keep the arrays where they are
  emulator::ProbeParams params{};
  for (size_t i = 0; i < inputs.size(); ++i) {
    infos.push_back(contents(inputs[i], false));
    params.input[i] = static_cast<const char*>(infos.back().ptr);
    params.input_bytes[i] = infos.back().size * infos.back().itemsize;
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    infos.push_back(contents(outputs[i], true));
    params.output[i] = static_cast<char*>(infos.back().ptr);
    params.output_bytes[i] = infos.back().size * infos.back().itemsize;
  }
  for (size_t i = 0; i < values.size(); ++i) params.value[i] = values[i];
  for (const size_t i : constants) {
    if (i >= inputs.size()) throw py::index_error("constants: no such input");
    params.input_constant[i] = true;
  }
  for (size_t i = 0; i < maps.size(); ++i) {
    const auto& [array, s] = maps[i];
    if (array >= inputs.size() + outputs.size()) throw py::index_error("maps: no such array");
    const hgfast::cuda::TileShape shape{s[0],
                                        s[1],
                                        s[2],
                                        static_cast<int>(s[3]),
                                        static_cast<int>(s[4]),
                                        static_cast<int>(s[5]),
                                        static_cast<int>(s[6]),
                                        static_cast<hgfast::cuda::Swizzle>(s[7])};
    if (hgfast::cuda::make_tensor_map(params.map[i], infos[array].ptr, shape, true) != cudaSuccess)
      throw py::value_error("maps: the copy engine takes no such map");
  }
  cudaError_t error;
  {
    py::gil_scoped_release release;
    error = found->second(
        found->first.c_str(),
        {blocks, threads, shared_bytes, shared_bytes, cluster, registers, programmatic}, params);
  }
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace

PYBIND11_MODULE(hgfast_emulator, m) {
  using py::arg;
  m.doc() = "CUDA kernels on a CPU, checked access by access. See docs/emulator.md.";
  m.def("set_seed", &emulator::set_seed, arg("seed"),
        "The order in which threads take turns: 0 in order, else shuffled.");
  m.def("set_threads", &emulator::set_threads, arg("count"),
        "Host threads that run blocks; 0: as many as the machine has.");
  m.def("model_memory", &emulator::model_memory, arg("on"),
        "Whether launches go through a model of the last-level cache, on one host thread.");
  m.def(
      "set_device",
      [](int multiprocessors, int shared_bytes) {
        // A block of that much shared memory there is on Hopper and its successors.
        const int major = shared_bytes > 163 * 1024 ? 9 : 8;
        hgfast::cuda::emulated_device = {multiprocessors, shared_bytes, major, 0};
      },
      arg("multiprocessors") = 132, arg("shared_bytes") = 227 * 1024,
      "What launchers are told of the GPU; by default an H200.");
  m.def("counters", &counters, "What the last launch of this thread did.");
  m.def(
      "last_path", [] { return hgfast::last_path().text(); },
      "The kernel that ran last in this thread, as hgfast._C.last_path() says it.");
  hgfast::bind_cuda(m);
  m.def("last_report", &emulator::last_report,
        "What the last launch of this thread did wrong, or \"\".");
  m.def("probes", [] {
    std::vector<std::string> names;
    for (const auto& probe : emulator::probes()) names.push_back(probe.first);
    return names;
  });
  m.def(
      "run", &run, arg("name"), arg("inputs") = std::vector<py::buffer>(),
      arg("outputs") = std::vector<py::buffer>(), arg("values") = std::vector<int64_t>(),
      arg("blocks") = 1, arg("threads") = 32, arg("shared_bytes") = 0, arg("cluster") = 1,
      arg("registers") = 0, arg("programmatic") = false, arg("constants") = std::vector<size_t>(),
      arg("maps") = std::vector<Map>(),
      "Run a probe kernel on contiguous arrays. `constants`: numbers of inputs that no kernel\n"
      "before writes. `maps`: for each map the number of its array, inputs first, and (batch,\n"
      "height, width, channels, box_channels, box_width, box_height, swizzle). RuntimeError: the\n"
      "report of its mistake.");
}
