// Host side of top-k: checks, plan, launches. The kernel and its method are in topk_kernel.cuh.
#include <stdexcept>
#include <string>

#include "cuda_kernels.h"
#include "topk_kernel.cuh"

// Threads a block for rows up to kShortRow and for longer ones; tests on the host build with fewer.
#ifndef TK_TOPK_SHORT_THREADS
#define TK_TOPK_SHORT_THREADS 256
#endif
#ifndef TK_TOPK_LONG_THREADS
#define TK_TOPK_LONG_THREADS 1024
#endif

namespace tk::cuda {
namespace {

constexpr int64_t kShortRow = 4096;
constexpr int64_t kLimit = int64_t{1} << 31;
constexpr int64_t kSmallestChunk = 16384;
constexpr int64_t kChunkPerK = 8;  // a piece leaves at most an eighth of its scores to the second launch

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void require(bool holds, const char* what, int64_t got) {
  if (!holds) throw std::invalid_argument(std::string("topk: ") + what + ", got " + std::to_string(got));
}

int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

#if defined(__CUDACC__)
void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("topk: ") + what + ": " + cudaGetErrorString(error));
}
void check_launch() { check(cudaGetLastError(), "the launch failed"); }
int64_t multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "no current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "no device attributes");
  return count;
}
#else
void check_launch() {}
int64_t multiprocessors() { return 132; }
#endif

// Pieces of `chunk` scores that each row is cut into: 1 unless the rows alone would leave half the GPU idle.
struct Plan {
  int64_t chunk, pieces;
};

Plan make_plan(const TopkParams& params) {
  require(params.rows >= 0 && params.rows < kLimit, "rows must be in 0..2^31-1", params.rows);
  require(params.length >= 0 && params.length < kLimit, "length must be in 0..2^31-1", params.length);
  require(params.k >= 0 && params.k < kLimit, "k must be in 0..2^31-1", params.k);
  require(params.chunk >= 0, "chunk must not be negative", params.chunk);
  const int dtype = static_cast<int>(params.dtype);
  require(dtype >= 0 && dtype <= 2, "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)", dtype);
  const Plan whole{params.length > 0 ? params.length : 1, 1};
  int64_t chunk = params.chunk;
  if (chunk == 0) {
    chunk = kChunkPerK * params.k > kSmallestChunk ? kChunkPerK * params.k : kSmallestChunk;
    if (params.length < 4 * chunk || params.rows * 2 > multiprocessors()) return whole;
  }
  if (chunk >= params.length) return whole;
  require(chunk >= params.k, "chunk must be at least k", chunk);
  const Plan plan{chunk, ceil_div(params.length, chunk)};
  require(params.rows * plan.pieces < kLimit, "rows times pieces must stay below 2^31", params.rows * plan.pieces);
  return plan;
}

int64_t workspace_bytes(const TopkParams& params, const Plan& plan) {
  if (plan.pieces == 1) return 0;
  return params.rows * plan.pieces * params.k * (static_cast<int64_t>(sizeof(int32_t)) + element_size(params.dtype));
}

template <class Format>
void launch(const TopkArgs& args, int64_t blocks, int64_t scores_per_block, cudaStream_t stream) {
  const unsigned grid = static_cast<unsigned>(blocks);
  if (scores_per_block <= kShortRow) {
    TK_LAUNCH((topk_rows<Format, TK_TOPK_SHORT_THREADS>), grid, TK_TOPK_SHORT_THREADS, stream, args);
  } else {
    TK_LAUNCH((topk_rows<Format, TK_TOPK_LONG_THREADS>), grid, TK_TOPK_LONG_THREADS, stream, args);
  }
  check_launch();
}

template <class Format>
void run(const TopkParams& params, const Plan& plan, cudaStream_t stream) {
  TopkArgs args{params.scores, nullptr,       params.lengths, params.values, params.indices,
                params.row_stride, params.length, plan.chunk,     plan.pieces,   params.k};
  if (plan.pieces == 1) {
    launch<Format>(args, params.rows, params.length, stream);
    return;
  }
  const int64_t candidates = plan.pieces * params.k;
  int32_t* indices = static_cast<int32_t*>(params.workspace);  // [N, C·k]
  void* values = indices + params.rows * candidates;           // [N, C·k]
  args.values = values;
  args.indices = indices;
  launch<Format>(args, params.rows * plan.pieces, plan.chunk, stream);
  args = TopkArgs{values,     indices,       params.lengths, params.values, params.indices,
                  candidates, params.length, plan.chunk,     1,             params.k};
  launch<Format>(args, params.rows, candidates, stream);
}

}  // namespace

int64_t topk_workspace_bytes(const TopkParams& params) { return workspace_bytes(params, make_plan(params)); }

void topk(const TopkParams& params, std::uintptr_t stream_handle) {
  const Plan plan = make_plan(params);
  if (params.rows == 0 || params.k == 0) return;
  const int64_t wanted = workspace_bytes(params, plan);
  if (wanted > 0 && (params.workspace == nullptr || params.workspace_bytes < wanted)) {
    throw std::invalid_argument("topk: workspace must hold " + std::to_string(wanted) + " bytes, got " +
                                std::to_string(params.workspace == nullptr ? 0 : params.workspace_bytes));
  }
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_handle);
  switch (params.dtype) {
    case DType::float32: run<Float32>(params, plan, stream); break;
    case DType::bfloat16: run<Bfloat16>(params, plan, stream); break;
    case DType::float16: run<Float16>(params, plan, stream); break;
  }
}

}  // namespace tk::cuda
