// Memory for results that is kept when it is freed. Fresh memory from the system costs a page fault every 4 KiB (0.5 to 1 us),
// which for a result of a mebibyte is as long as the kernels that fill it take; malloc gives the top of its heap back time and again.
#pragma once

#include <cstddef>

namespace tk {

// `bytes` (> 0) uninitialised bytes on a cache line, on huge pages from 2 MiB on; given back with the object. Thread-safe.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_;
  std::size_t bytes_, capacity_;
};

// Bytes kept for results to come: at most THINKERNEL_KEEP_MB MiB (default 64; 0: none), the longest unused going first.
std::size_t kept_bytes();

}  // namespace tk
