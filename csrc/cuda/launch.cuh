// Launching a kernel, on a GPU or on the emulator.
#pragma once

#include <atomic>
#include <cstdint>

#include "device.cuh"

namespace hgfast::cuda {

// What a launcher asks of the current device.
struct Device {
  int multiprocessors;
  int shared_bytes;  // that one block may have
  int major, minor;  // its compute capability
};

#ifdef HGFAST_EMULATE
inline Device emulated_device{132, 227 * 1024, 9, 0};  // as a test wants it; by default an H200

inline cudaError_t current_device(Device& device) {
  device = emulated_device;
  return cudaSuccess;
}
#else
inline cudaError_t current_device(Device& device) {
  int number = 0;
  if (const auto error = cudaGetDevice(&number)) return error;
  if (const auto error =
          cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, number))
    return error;
  if (const auto error =
          cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, number))
    return error;
  if (const auto error =
          cudaDeviceGetAttribute(&device.minor, cudaDevAttrComputeCapabilityMinor, number))
    return error;
  return cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                number);
}
#endif

struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes;           // dynamic shared memory of each block of this launch
  int most_shared_bytes;      // and of any launch of this kernel on this device
  int cluster = 1;            // blocks that work together; sm_90 and later
  int registers = 0;          // of a thread when it begins, where the kernel changes them
  bool programmatic = false;  // may begin before the kernel in front of it has ended
};

#ifndef HGFAST_EMULATE
// The runtime remembers errors that it returned, and the next one who asks would take it for
// theirs.
inline cudaError_t forgotten(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}
#endif

// Launches `kernel(params)`. One instance of this function serves one kernel: it remembers on
// which devices it raised the kernel's limit of shared memory. Neither waits nor allocates, so
// that it may stand in a stream capture.
template <auto kernel, class Params>
cudaError_t launch(const char* name, const Grid& grid, cudaStream_t stream, const Params& params) {
  if (grid.blocks == 0) return cudaSuccess;
  if (grid.blocks < 0 || grid.blocks > INT32_MAX || grid.shared_bytes > grid.most_shared_bytes)
    return cudaErrorInvalidConfiguration;
#ifdef HGFAST_EMULATE
  (void)stream;
  return emulator::launch({name,
                           grid.blocks,
                           grid.threads,
                           grid.shared_bytes,
                           grid.cluster,
                           grid.registers,
                           grid.programmatic,
                           {},
                           nullptr,
                           nullptr},
                          emulator::arrays_of(params), [&] { kernel(params); });
#else
  (void)name;
  if (grid.most_shared_bytes > 48 * 1024) {
    static std::atomic<uint64_t> raised{0};  // a bit for each device
    int device = 0;
    if (const auto error = cudaGetDevice(&device)) return forgotten(error);
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (!(raised.load(std::memory_order_relaxed) & bit)) {
      const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              grid.most_shared_bytes);
      if (error != cudaSuccess) return forgotten(error);
      if (grid.cluster > 8) {
        const auto refused =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        if (refused != cudaSuccess) return forgotten(refused);
      }
      raised.fetch_or(bit, std::memory_order_relaxed);
    }
  }
  // Not <<<>>>, whose errors only cudaGetLastError tells, together with everyone else's.
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (grid.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  }
  if (grid.programmatic) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  return forgotten(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments));
#endif
}

}  // namespace hgfast::cuda
