// Host code's common part: checks that name the argument, and what the runtime says.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "simt.cuh"

namespace tk::cuda {

constexpr int64_t kGridLimit = int64_t{1} << 31;  // blocks of one launch

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void require(bool holds, const char* what, int64_t got) {
  if (!holds) throw std::invalid_argument(std::string(what) + ", got " + std::to_string(got));
}

inline void check_launch(const char* name) {
#if defined(__CUDACC__)
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": the launch failed: " + cudaGetErrorString(error));
#else
  static_cast<void>(name);
#endif
}

}  // namespace tk::cuda
