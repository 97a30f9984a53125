// Host side of logprob from given logits: checks and launches. The kernels are in logprob_kernel.cuh.
#include "cuda_kernels.h"
#include "launch.h"
#include "logprob_kernel.cuh"

// Threads a block; tests on the host build with fewer.
#ifndef TK_LOGPROB_THREADS
#define TK_LOGPROB_THREADS 512
#endif

namespace tk::cuda {
namespace {

template <class Params>
int64_t check_rows(const Params& params) {
  require(params.b >= 0 && params.s >= 0, "logprob: the numbers of rows must not be negative", params.b < 0 ? params.b : params.s);
  require(params.v > 0, "logprob: v must be positive", params.v);
  require(params.b == 0 || params.s < kGridLimit / params.b, "logprob: rows must stay below 2^31", params.s);
  const int dtype = static_cast<int>(params.dtype);
  require(dtype >= 0 && dtype <= 2, "logprob: dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)", dtype);
  return params.b * params.s;
}

}  // namespace

void logprob_forward(const LogprobForwardParams& params, std::uintptr_t stream_handle) {
  const int64_t rows = check_rows(params);
  if (rows == 0) return;
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_handle);
  const unsigned grid = static_cast<unsigned>(rows);
  constexpr int threads = TK_LOGPROB_THREADS;
  switch (params.dtype) {
    case DType::float32: TK_LAUNCH((logprob_rows<simt::Float32, threads>), grid, threads, stream, params); break;
    case DType::bfloat16: TK_LAUNCH((logprob_rows<simt::Bfloat16, threads>), grid, threads, stream, params); break;
    case DType::float16: TK_LAUNCH((logprob_rows<simt::Float16, threads>), grid, threads, stream, params); break;
  }
  check_launch("logprob");
}

void logprob_backward(const LogprobBackwardParams& params, std::uintptr_t stream_handle) {
  const int64_t rows = check_rows(params), pieces = ceil_div(params.v, kPiece);
  require(rows < kGridLimit / pieces, "logprob: rows times pieces of 16384 columns must stay below 2^31", rows);
  if (rows == 0) return;
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_handle);
  const unsigned grid = static_cast<unsigned>(rows * pieces);
  constexpr int threads = TK_LOGPROB_THREADS;
  switch (params.dtype) {
    case DType::float32: TK_LAUNCH((logprob_gradient<simt::Float32, threads>), grid, threads, stream, params); break;
    case DType::bfloat16: TK_LAUNCH((logprob_gradient<simt::Bfloat16, threads>), grid, threads, stream, params); break;
    case DType::float16: TK_LAUNCH((logprob_gradient<simt::Float16, threads>), grid, threads, stream, params); break;
  }
  check_launch("logprob backward");
}

}  // namespace tk::cuda
