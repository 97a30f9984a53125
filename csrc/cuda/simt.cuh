// What SIMT kernels are written in: CUDA C++ under nvcc, and under any C++20 compiler the same words from the host shim,
// so that a kernel's logic runs, and is checked by the sanitizers, where there is no GPU. Full warp masks only.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
// One object of block-shared memory.
#define TK_SHARED(Type, name) __shared__ Type name
#define TK_LAUNCH(kernel, blocks, threads, stream, args) kernel<<<blocks, threads, 0, stream>>>(args)
#else
#include "host_shim/host_shim.h"
#define TK_SHARED(Type, name) Type& name = tk_shim::shared<Type>()
#define TK_LAUNCH(kernel, blocks, threads, stream, args) \
  (static_cast<void>(stream), tk_shim::launch(blocks, threads, [&] { kernel(args); }))
#endif

// Tests take one of a kernel's numbered barriers out and expect ThreadSanitizer to see the race.
#ifndef TK_TEST_REMOVE_BARRIER
#define TK_TEST_REMOVE_BARRIER 0
#endif

namespace tk::simt {

constexpr unsigned kFullWarp = 0xffffffffu;

// __syncthreads(), numbered from 1 inside each kernel.
template <int number>
__device__ __forceinline__ void block_barrier() {
  if (number != TK_TEST_REMOVE_BARRIER) __syncthreads();
}

// Inclusive sum over the lanes of a warp.
__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const uint32_t below = __shfl_up_sync(kFullWarp, value, delta);
    if (lane >= delta) value += below;
  }
  return value;
}

}  // namespace tk::simt
