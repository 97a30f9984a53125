// What SIMT kernels are written in: CUDA C++ under nvcc, and under any C++20 compiler the same words from the host shim,
// so that a kernel's logic runs, and is checked by the sanitizers, where there is no GPU. Full warp masks only.
#pragma once
#include <math.h>
#include <string.h>

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
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

// __syncwarp(): what a warp's lanes wrote before it, they read after it. Numbered with the block's.
template <int number>
__device__ __forceinline__ void warp_barrier() {
  if (number != TK_TEST_REMOVE_BARRIER) __syncwarp(kFullWarp);
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

// The value that the lane `delta` above handed in; the uppermost lanes get their own.
template <class T>
__device__ __forceinline__ T shuffle_down(const T& value, int delta) {
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_down_sync(kFullWarp, word, delta);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

__device__ __forceinline__ float shuffle(float value, int lane) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = __shfl_sync(kFullWarp, bits, lane);
  memcpy(&value, &bits, 4);
  return value;
}

// The sum over a warp's lanes, the same for each, added in a tree.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) value += shuffle_down(value, delta);
  return shuffle(value, 0);
}

// The block's values merged into one, the same for every thread, in an order that only the number of threads decides: lanes
// in a tree, then warps in sequence. slots: one a warp, block-shared; not to be used again before the block has met at another barrier.
template <int THREADS, class T, class Merge>
__device__ __forceinline__ T block_merge(T (&slots)[THREADS / 32], T value, Merge merge) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) value = merge(value, shuffle_down(value, delta));
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = value;
  block_barrier<1>();
  T all = slots[0];
  for (int warp = 1; warp < THREADS / 32; ++warp) all = merge(all, slots[warp]);
  return all;
}

// 16-bit floats as their bits.
__device__ __forceinline__ float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}
__device__ __forceinline__ uint16_t float_to_bfloat16(float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
#if defined(__CUDACC__)
__device__ __forceinline__ float float16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t float_to_float16(float x) { return __half_as_ushort(__float2half_rn(x)); }
#else
inline float float16_to_float(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline uint16_t float_to_float16(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
#endif

// Floating-point formats: how a kernel loads and stores an element.
struct Float32 {
  using Element = float;
  static __device__ __forceinline__ float load(float x) { return x; }
  static __device__ __forceinline__ float store(float x) { return x; }
};
struct Bfloat16 {
  using Element = uint16_t;
  static __device__ __forceinline__ float load(uint16_t x) { return bfloat16_to_float(x); }
  static __device__ __forceinline__ uint16_t store(float x) { return float_to_bfloat16(x); }
};
struct Float16 {
  using Element = uint16_t;
  static __device__ __forceinline__ float load(uint16_t x) { return float16_to_float(x); }
  static __device__ __forceinline__ uint16_t store(float x) { return float_to_float16(x); }
};

}  // namespace tk::simt
