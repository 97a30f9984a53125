#include "buffers.h"

#include <sys/mman.h>

#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>

namespace tk {

namespace {

constexpr std::size_t kPage = 2 << 20, kLine = 64;

struct Block {
  void* data;
  std::size_t bytes;
};

class Pool {
 public:
  Block take(std::size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      auto best = free_.end();
      for (auto x = free_.begin(); x != free_.end(); ++x)  // the last of the smallest: its lines are in cache
        if (x->bytes >= bytes && x->bytes <= bytes + bytes / 4 && (best == free_.end() || x->bytes <= best->bytes)) best = x;
      if (best != free_.end()) {
        const Block found = *best;
        free_.erase(best);
        kept_ -= found.bytes;
        return found;
      }
    }
    const std::size_t alignment = bytes >= kPage ? kPage : kLine;
    bytes = (bytes + alignment - 1) / alignment * alignment;
    void* data = std::aligned_alloc(alignment, bytes);
    if (data == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (bytes >= kPage) madvise(data, bytes, MADV_HUGEPAGE);  // where it is refused small pages do
#endif
    return {data, bytes};
  }

  void give(Block block) {
    const std::lock_guard lock(mutex_);
    free_.push_back(block);
    kept_ += block.bytes;
    while (kept_ > most_) {
      std::free(free_.front().data);
      kept_ -= free_.front().bytes;
      free_.pop_front();
    }
  }

  std::size_t kept() {
    const std::lock_guard lock(mutex_);
    return kept_;
  }

 private:
  static std::size_t most() {
    const char* value = std::getenv("THINKERNEL_KEEP_MB");
    return (value == nullptr ? 64 : std::strtoull(value, nullptr, 10)) << 20;
  }
  std::mutex mutex_;
  std::deque<Block> free_;  // in the order in which they were given back
  std::size_t kept_ = 0;
  const std::size_t most_ = most();
};

Pool& pool() {
  static Pool* the_pool = new Pool;  // never destroyed: tensors may be freed after static objects are
  return *the_pool;
}

}  // namespace

Buffer::Buffer(std::size_t bytes) : bytes_(bytes) {
  const Block block = pool().take(bytes);
  data_ = block.data;
  capacity_ = block.bytes;
}

Buffer::~Buffer() { pool().give({data_, capacity_}); }

std::size_t kept_bytes() { return pool().kept(); }

}  // namespace tk
