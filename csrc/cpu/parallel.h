// Threads and scratch memory.
//
// parallel_for(threads, items, body) runs body(item, thread) for every item; which thread gets which item is left
// to the schedule, so a result may depend on the item alone. On the AMX level every thread's tiles are configured
// while it is inside.
#pragma once

#include <omp.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "simd/tiles.h"

namespace tk::TK_ISA {

template <class F> inline void parallel_for(int threads, int64_t items, const F& body) {
  if (items <= 0) return;
  if (threads > items) threads = (int)items;
  if (threads <= 1) {
    TileRegion tiles;
    for (int64_t i = 0; i < items; ++i) body(i, 0);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    TileRegion tiles;
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < items; ++i) body(i, thread);
  }
}

// The same with an equal share of neighbouring items for each thread, from which the others take once theirs are done: call
// after call a thread then meets the data that its core's cache holds.
template <class F> inline void parallel_for_near(int threads, int64_t items, const F& body) {
  constexpr int kMost = 64;
  if (threads > items) threads = (int)items;
  if (threads <= 1 || threads > kMost) return parallel_for(threads, items, body);
  struct alignas(64) Share {
    int64_t next, end;
  } shares[kMost];
  for (int t = 0; t < threads; ++t) shares[t] = {items * t / threads, items * (t + 1) / threads};
#pragma omp parallel num_threads(threads)
  {
    TileRegion tiles;
    const int thread = omp_get_thread_num();
    for (int k = 0; k < threads; ++k) {
      Share& x = shares[(thread + k) % threads];
      for (int64_t i; (i = __atomic_fetch_add(&x.next, 1, __ATOMIC_RELAXED)) < x.end;) body(i, thread);
    }
  }
}

// The blocks a thread gave back last, for its next call: fresh ones would cost a page fault per 4 KiB, or the zeroing of
// 2 MiB (attention's forward at 2048 tokens took 105 to 216 faults a call).
class ScratchCache {
 public:
  static constexpr int64_t kKeep = 32 << 20;  // bytes of the largest block that is kept
  void* take(int64_t bytes, int64_t* capacity) {
    Block* best = nullptr;
    for (Block& x : blocks_)
      if (x.bytes >= bytes && x.bytes <= 2 * bytes + (1 << 20) && (!best || x.bytes < best->bytes)) best = &x;
    if (!best) return nullptr;
    void* data = best->data;
    *capacity = best->bytes;
    *best = {};
    return data;
  }
  void give(void* data, int64_t bytes) {
    Block* least = blocks_;
    for (Block& x : blocks_)
      if (x.bytes < least->bytes) least = &x;
    if (bytes > kKeep || bytes <= least->bytes) return free(data);
    free(least->data);
    *least = {data, bytes};
  }
  ~ScratchCache() {
    for (Block& x : blocks_) free(x.data);
  }

 private:
  struct Block {
    void* data = nullptr;
    int64_t bytes = 0;
  };
  Block blocks_[4];
};
inline ScratchCache& scratch_cache() {
  static thread_local ScratchCache cache;
  return cache;
}

// Uninitialised memory on a cache line, given back with the object; large blocks ask for huge pages (15-20 % on reads).
template <class T> class Scratch {
 public:
  explicit Scratch(int64_t count) {
    constexpr int64_t kHuge = 2 << 20;
    bytes_ = count * (int64_t)sizeof(T) + 64;
    if (bytes_ >= kSmall && (data_ = (T*)scratch_cache().take(bytes_, &bytes_))) return;
    const int64_t alignment = bytes_ >= kHuge ? kHuge : 64;
    bytes_ = (bytes_ + alignment - 1) / alignment * alignment;
    data_ = (T*)aligned_alloc(alignment, bytes_);
    if (!data_) abort();
    if (bytes_ >= kHuge) madvise(data_, bytes_, MADV_HUGEPAGE);
  }
  ~Scratch() {
    if (bytes_ >= kSmall) scratch_cache().give(data_, bytes_);
    else free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  operator T*() const { return data_; }

 private:
  static constexpr int64_t kSmall = 64 << 10;  // below that malloc has it at hand
  T* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace tk::TK_ISA
