// Host side of route: checks, plan, launches. The kernels and their method are in route_kernel.cuh.
#include "cuda_kernels.h"
#include "launch.h"
#include "route_kernel.cuh"

// Warps a block, and the tiles up to which a warp takes one row of a tile; tests on the host build with fewer.
#ifndef TK_ROUTE_WARPS
#define TK_ROUTE_WARPS 4
#endif
#ifndef TK_ROUTE_TILES
#define TK_ROUTE_TILES 1024
#endif

namespace tk::cuda {
namespace {

constexpr int kWarps = TK_ROUTE_WARPS;

void check_shape(const RouteShape& p) {
  require(p.tokens >= 0, "route: tokens must not be negative", p.tokens);
  require(p.experts >= 1 && p.experts <= kMaxExperts, "route: experts must be in 1..1024", p.experts);
  require(p.top_k >= 1 && p.top_k <= kMaxTopK, "route: top_k must be in 1..32", p.top_k);
  require(p.tokens < kGridLimit / p.top_k, "route: tokens times top_k must stay below 2^31", p.tokens);
  const int dtype = static_cast<int>(p.dtype), score = static_cast<int>(p.score);
  require(dtype >= 0 && dtype <= 2, "route: dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)", dtype);
  require(score >= 0 && score <= 4, "route: score must be in 0..4", score);
}

void check_forward(const RouteForwardCudaParams& p) {
  check_shape(p);
  require(p.groups >= 1 && p.experts % p.groups == 0, "route: groups must divide experts", p.groups);
  require(p.top_groups >= 1 && p.top_groups <= p.groups, "route: top_groups must be in 1..groups", p.top_groups);
  require(p.replay || p.top_k <= p.experts / p.groups * p.top_groups, "route: top_k must be at most top_groups * experts / groups", p.top_k);
}

RouteTiles tiles_of(const RouteForwardCudaParams& p) {
  const int64_t of_one_row_a_warp = ceil_div(p.tokens, kWarps);
  const int64_t rows = kWarps * (of_one_row_a_warp > TK_ROUTE_TILES ? ceil_div(of_one_row_a_warp, TK_ROUTE_TILES) : 1);
  const int64_t tiles = ceil_div(p.tokens, rows);
  return {rows, tiles > 0 ? tiles : 1, static_cast<uint32_t*>(p.workspace)};
}

template <int number>
struct Constant {
  static constexpr int value = number;
};

// Calls run with the smallest number of 32s that hold E, of those that are compiled.
template <class Run>
void by_experts(int64_t experts, Run run) {
  if (experts <= 64) run(Constant<2>{});
  else if (experts <= 128) run(Constant<4>{});
  else if (experts <= 256) run(Constant<8>{});
  else if (experts <= 512) run(Constant<16>{});
  else run(Constant<32>{});
}

template <class Format>
void forward(const RouteForwardArgs& args, cudaStream_t stream) {
  const unsigned tiles = static_cast<unsigned>(args.tiles.tiles);
  const unsigned of_experts = static_cast<unsigned>(ceil_div(args.p.experts + 1, kWarps));
  by_experts(args.p.experts, [&](auto size) {
    constexpr int per = decltype(size)::value;
    TK_LAUNCH((route_rows<Format, per, kWarps>), tiles, 32 * kWarps, stream, args);
    TK_LAUNCH((route_prefix<kWarps>), of_experts, 32 * kWarps, stream, args);
    TK_LAUNCH((route_order<per>), tiles, 32, stream, args);
  });
  check_launch("route");
}

template <class Format>
void backward(const RouteBackwardParams& p, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(p.tokens, kWarps));
  by_experts(p.experts, [&](auto size) {
    TK_LAUNCH((route_gradient<Format, decltype(size)::value, kWarps>), blocks, 32 * kWarps, stream, p);
  });
  check_launch("route backward");
}

}  // namespace

int64_t route_workspace_bytes(const RouteForwardCudaParams& params) {
  check_forward(params);
  return (params.experts + 1) * tiles_of(params).tiles * static_cast<int64_t>(sizeof(uint32_t));
}

void route_forward(const RouteForwardCudaParams& params, std::uintptr_t stream_handle) {
  const int64_t wanted = route_workspace_bytes(params);
  const int64_t given = params.workspace == nullptr ? 0 : params.workspace_bytes;
  require(given >= wanted, "route: workspace must hold route_workspace_bytes", given);
  const RouteForwardArgs args{params, tiles_of(params)};
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_handle);
  switch (params.dtype) {
    case DType::float32: forward<simt::Float32>(args, stream); break;
    case DType::bfloat16: forward<simt::Bfloat16>(args, stream); break;
    case DType::float16: forward<simt::Float16>(args, stream); break;
  }
}

void route_backward(const RouteBackwardParams& params, std::uintptr_t stream_handle) {
  check_shape(params);
  if (params.tokens == 0) return;
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_handle);
  switch (params.dtype) {
    case DType::float32: backward<simt::Float32>(params, stream); break;
    case DType::bfloat16: backward<simt::Bfloat16>(params, stream); break;
    case DType::float16: backward<simt::Float16>(params, stream); break;
  }
}

}  // namespace tk::cuda
