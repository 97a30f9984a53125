// Threads and scratch memory.
//
// parallel_for(threads, items, body) runs body(item, thread) for every item; which thread gets which item is left
// to the schedule, so a result may depend on the item alone. On the AMX level every thread's tiles are configured
// while it is inside.
#pragma once

#include <omp.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "simd/amx.h"

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

// Uninitialised memory on a cache line, freed with the object; large blocks ask for huge pages (15-20 % on reads).
template <class T> class Scratch {
 public:
  explicit Scratch(int64_t count) {
    constexpr int64_t kHuge = 2 << 20;
    const int64_t bytes = count * (int64_t)sizeof(T) + 64;
    const int64_t alignment = bytes >= kHuge ? kHuge : 64;
    data_ = (T*)aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (!data_) abort();
    if (bytes >= kHuge) madvise(data_, bytes, MADV_HUGEPAGE);
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  operator T*() const { return data_; }

 private:
  T* data_;
};

}  // namespace tk::TK_ISA
