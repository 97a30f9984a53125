// Runs SIMT kernels on the host: one std::thread per CUDA thread, blocks one after the other. Test equipment, never shipped.
//
// A block's barrier and a warp's barrier are std::barrier, warp shuffles exchange values through one slot per lane, and
// atomics are std::atomic_ref, so ThreadSanitizer sees exactly the synchronisation that the kernel asked for: two accesses
// that only a missing __syncthreads() would order are reported. Block-shared memory is a heap block of exact size (so
// AddressSanitizer sees an index past its end), filled with rubbish before each block (CUDA does not zero it either).
#pragma once
#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace tk_shim {

constexpr unsigned kWarp = 32;
constexpr std::size_t kSharedLimit = 48 * 1024;  // static shared memory of a block on every architecture

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "host shim: %s\n", what);
  std::abort();
}

// With -DTK_TEST_REMOVE_BARRIER=tk_shim::removed_barrier one build serves every number, from the environment; 0: none.
inline const int removed_barrier = [] {
  const char* number = std::getenv("TK_TEST_REMOVE_BARRIER");
  return number == nullptr ? 0 : std::atoi(number);
}();

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

struct Warp {
  std::barrier<> barrier{kWarp};
  uint64_t slot[kWarp] = {};
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads), warps(threads / kWarp) {}
  std::barrier<> barrier;
  std::vector<Warp> warps;
  std::mutex mutex;  // guards shared, whose objects are made by the first thread that declares them
  std::vector<std::unique_ptr<unsigned char[]>> shared;
};

struct Context {
  Block* block = nullptr;
  Dim thread, block_index, block_dim, grid_dim;
  std::size_t shared_declared = 0;
};
inline thread_local Context context;

template <class T>
T& shared() {
  static_assert(std::is_trivially_default_constructible_v<T>, "block-shared memory is not constructed");
  static_assert(sizeof(T) <= kSharedLimit, "more static shared memory than a block has");
  Block& block = *context.block;
  const std::size_t mine = context.shared_declared++;
  const std::lock_guard<std::mutex> lock(block.mutex);
  if (block.shared.size() == mine) {
    block.shared.push_back(std::make_unique_for_overwrite<unsigned char[]>(sizeof(T)));
    std::memset(block.shared.back().get(), 0xa5, sizeof(T));
  }
  return *reinterpret_cast<T*>(block.shared[mine].get());
}

// Every lane hands in a value; read(slots) runs while all of them are there.
template <class Read>
auto exchange(unsigned mask, uint64_t value, Read read) {
  if (mask != 0xffffffffu) fail("only full warp masks are supported");
  const unsigned thread = context.thread.x;
  Warp& warp = context.block->warps[thread / kWarp];
  warp.slot[thread % kWarp] = value;
  warp.barrier.arrive_and_wait();
  auto result = read(warp.slot);
  warp.barrier.arrive_and_wait();
  return result;
}

// Runs `kernel` for every thread of every block. All threads of a block must return, having passed the same barriers.
template <class Kernel>
void launch(int64_t blocks, unsigned threads, Kernel kernel) {
  if (threads == 0 || threads % kWarp != 0 || threads > 1024) fail("a block is 32, 64, ... 1024 threads");
  Block block(threads);
  std::vector<std::thread> pool;
  pool.reserve(threads);
  for (unsigned thread = 0; thread < threads; ++thread) {
    pool.emplace_back([&, thread] {
      for (int64_t index = 0; index < blocks; ++index) {
        context = Context{&block, {thread}, {static_cast<unsigned>(index)}, {threads}, {static_cast<unsigned>(blocks)}, 0};
        kernel();
        block.barrier.arrive_and_wait();
        if (thread == 0) block.shared.clear();
        block.barrier.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
}

}  // namespace tk_shim

#define threadIdx (tk_shim::context.thread)
#define blockIdx (tk_shim::context.block_index)
#define blockDim (tk_shim::context.block_dim)
#define gridDim (tk_shim::context.grid_dim)

inline void __syncthreads() { tk_shim::context.block->barrier.arrive_and_wait(); }

inline uint32_t __shfl_sync(unsigned mask, uint32_t value, unsigned lane) {
  return tk_shim::exchange(mask, value, [&](const uint64_t* slots) { return static_cast<uint32_t>(slots[lane % 32]); });
}

inline uint32_t __shfl_up_sync(unsigned mask, uint32_t value, unsigned delta) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, lane >= delta ? lane - delta : lane);
}

inline uint32_t __shfl_down_sync(unsigned mask, uint32_t value, unsigned delta) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, lane + delta < 32 ? lane + delta : lane);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  return tk_shim::exchange(mask, predicate ? 1 : 0, [](const uint64_t* slots) {
    unsigned bits = 0;
    for (unsigned lane = 0; lane < tk_shim::kWarp; ++lane) bits |= static_cast<unsigned>(slots[lane]) << lane;
    return bits;
  });
}

inline void __syncwarp(unsigned mask) {
  if (mask != 0xffffffffu) tk_shim::fail("only full warp masks are supported");
  tk_shim::context.block->warps[threadIdx.x / tk_shim::kWarp].barrier.arrive_and_wait();
}

// The lanes that handed in the same value.
inline unsigned __match_any_sync(unsigned mask, uint32_t value) {
  return tk_shim::exchange(mask, value, [&](const uint64_t* slots) {
    unsigned bits = 0;
    for (unsigned lane = 0; lane < tk_shim::kWarp; ++lane) bits |= static_cast<unsigned>(slots[lane] == value) << lane;
    return bits;
  });
}

inline uint32_t __reduce_max_sync(unsigned mask, uint32_t value) {
  return tk_shim::exchange(mask, value, [](const uint64_t* slots) {
    return static_cast<uint32_t>(*std::max_element(slots, slots + tk_shim::kWarp));
  });
}

inline uint32_t __reduce_min_sync(unsigned mask, uint32_t value) {
  return tk_shim::exchange(mask, value, [](const uint64_t* slots) {
    return static_cast<uint32_t>(*std::min_element(slots, slots + tk_shim::kWarp));
  });
}

inline int __popc(unsigned bits) { return std::popcount(bits); }

inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  return std::atomic_ref<uint32_t>(*address).fetch_add(value, std::memory_order_relaxed);
}

// The little of the runtime that launch code calls.
using cudaStream_t = void*;
