// What waiting costs on this GPU, in nanoseconds a time: the numbers that decide how a network of
// small maps is cut into kernels. Prints JSON: {"name": value, ...}; what a GPU cannot do is null.
//
//   nvcc -std=c++17 -O3 -arch=native costs.cu -o costs && ./costs
//
// launch        a kernel behind another one in a stream
// graph         the same inside a CUDA graph
// programmatic  the same where the second may begin early (griddepcontrol), in a graph
// grid          a barrier of all blocks, one for each multiprocessor
// cluster N     a barrier of the N blocks of a cluster
// exchange N    the same, and 4 KB stored into the next block's shared memory before it
// clusters N    no time: how many clusters of N blocks with 190 KB of shared memory run at once
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace cg = cooperative_groups;

namespace {

constexpr int kRounds = 1000, kThreads = 256;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Nanoseconds, by the clock that does not change with the multiprocessors'.
__device__ long long now() {
  long long time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time)::"memory");
  return time;
}

__global__ void __launch_bounds__(kThreads) grid_barriers(long long* took) {
  const auto grid = cg::this_grid();
  grid.sync();
  const long long begun = now();
  for (int i = 0; i < kRounds; ++i) grid.sync();
  if (grid.thread_rank() == 0) *took = now() - begun;
}

template <bool exchange>
__global__ void __launch_bounds__(kThreads) cluster_barriers(long long* took, float* sum) {
#if __CUDA_ARCH__ >= 900
  __shared__ float4 received[2][kThreads];
  const auto cluster = cg::this_cluster();
  const unsigned next = (cluster.block_rank() + 1) % cluster.num_blocks();
  float4 mine{1, 2, 3, static_cast<float>(threadIdx.x)};
  cluster.sync();
  const long long begun = now();
  for (int i = 0; i < kRounds; ++i) {
    if (exchange) cluster.map_shared_rank(received[i % 2], next)[threadIdx.x] = mine;
    cluster.sync();
    if (exchange) mine.x += received[i % 2][threadIdx.x ^ 1].y;
  }
  const long long ended = now();
  cluster.sync();  // nobody ends while others store
  if (cluster.thread_rank() == 0) *took = ended - begun;
  sum[blockIdx.x * kThreads + threadIdx.x] = mine.x;
#endif
}

__global__ void __launch_bounds__(kThreads) small(float* x) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  x[blockIdx.x * kThreads + threadIdx.x] += 1;
}

class Costs {
 public:
  Costs() {
    check(cudaGetDeviceProperties(&device_, 0), "cudaGetDeviceProperties");
    check(cudaStreamCreate(&stream_), "cudaStreamCreate");
    check(cudaMalloc(&took_, sizeof(long long)), "cudaMalloc");
    const size_t floats = static_cast<size_t>(device_.multiProcessorCount) * kThreads;
    check(cudaMalloc(&x_, floats * 4), "cudaMalloc");
    check(cudaMemset(x_, 0, floats * 4), "cudaMemset");
  }

  void measure() {
    say("launch", of_launches(false, false));
    say("graph", of_launches(true, false));
    const bool hopper = device_.major >= 9;
    hopper ? say("programmatic", of_launches(true, true)) : say_nothing("programmatic");
    void* arguments[] = {&took_};
    check(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grid_barriers),
                                      dim3(device_.multiProcessorCount), dim3(kThreads), arguments,
                                      0, stream_),
          "cudaLaunchCooperativeKernel");
    say("grid", taken());
    for (const int blocks : {2, 4, 8, 16}) {
      const std::string number = std::to_string(blocks);
      const bool can = hopper && of_cluster(cluster_barriers<false>, blocks, "cluster " + number);
      if (can) of_cluster(cluster_barriers<true>, blocks, "exchange " + number);
      if (!can) {
        say_nothing("cluster " + number);
        say_nothing("exchange " + number);
      }
    }
    std::printf("%s}\n", first_ ? "{" : "");
  }

 private:
  void say(const std::string& name, double value) {
    std::printf("%s\"%s\": %.1f", first_ ? "{" : ", ", name.c_str(), value);
    first_ = false;
  }
  void say_nothing(const std::string& name) {
    std::printf("%s\"%s\": null", first_ ? "{" : ", ", name.c_str());
    first_ = false;
  }
  double taken() {
    check(cudaStreamSynchronize(stream_), "a kernel");
    long long nanoseconds = 0;
    check(cudaMemcpy(&nanoseconds, took_, sizeof nanoseconds, cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    return static_cast<double>(nanoseconds) / kRounds;
  }

  using ClusterKernel = void (*)(long long*, float*);
  // False where there are no such clusters.
  bool of_cluster(ClusterKernel kernel, int blocks, const std::string& name) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cudaFuncSetAttribute");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 190 * 1024),
          "cudaFuncSetAttribute");
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kThreads);
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = 1;
    config.dynamicSmemBytes = 190 * 1024;
    int most = 0;
    if (cudaOccupancyMaxActiveClusters(&most, kernel, &config) != cudaSuccess || most == 0) {
      (void)cudaGetLastError();
      return false;
    }
    config.dynamicSmemBytes = 0;
    check(cudaLaunchKernelEx(&config, kernel, took_, x_), name.c_str());
    say(name, taken());
    if (name[0] == 'c') say("clusters " + std::to_string(blocks), most);
    return true;
  }

  double of_launches(bool in_graph, bool programmatic) {
    constexpr int kLaunches = 200, kReplays = 20;
    const auto launch_all = [&] {
      for (int i = 0; i < kLaunches; ++i) {
        cudaLaunchAttribute attribute;
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(device_.multiProcessorCount);
        config.blockDim = dim3(kThreads);
        config.stream = stream_;
        config.attrs = &attribute;
        config.numAttrs = programmatic ? 1 : 0;
        check(cudaLaunchKernelEx(&config, small, x_), "small");
      }
    };
    cudaGraphExec_t graph = nullptr;
    if (in_graph) {
      cudaGraph_t captured;
      check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
      launch_all();
      check(cudaStreamEndCapture(stream_, &captured), "capture");
      check(cudaGraphInstantiate(&graph, captured, 0), "cudaGraphInstantiate");
      check(cudaGraphDestroy(captured), "cudaGraphDestroy");
    }
    const auto run = [&] {
      if (graph)
        check(cudaGraphLaunch(graph, stream_), "cudaGraphLaunch");
      else
        launch_all();
    };
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
    for (int i = 0; i < 3; ++i) run();
    check(cudaEventRecord(begin, stream_), "cudaEventRecord");
    for (int i = 0; i < kReplays; ++i) run();
    check(cudaEventRecord(end, stream_), "cudaEventRecord");
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    if (graph) check(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
    return milliseconds * 1e6 / kReplays / kLaunches;
  }

  cudaDeviceProp device_;
  cudaStream_t stream_ = nullptr;
  long long* took_ = nullptr;
  float* x_ = nullptr;
  bool first_ = true;
};

}  // namespace

int main() { Costs().measure(); }
