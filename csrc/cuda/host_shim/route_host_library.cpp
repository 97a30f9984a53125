// The route kernels on the host shim with a C interface, so that tests can hold them, and the op's host code, against the reference.
// Params come as the bytes of the structs in csrc/include; tk_params_size lets the caller check its idea of their layout.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "cuda_kernels.h"

namespace {

template <class P>
P read(const void* bytes) {
  P params;
  std::memcpy(&params, bytes, sizeof(P));
  return params;
}

// Whether it ran; false where it refused its params.
template <class P>
bool runs(void (*function)(const P&, std::uintptr_t), const void* params) {
  try {
    function(read<P>(params), 0);
  } catch (const std::invalid_argument&) {
    return false;
  }
  return true;
}

}  // namespace

extern "C" int64_t tk_params_size(int32_t which) {
  const std::size_t sizes[] = {sizeof(tk::RouteForwardCudaParams), sizeof(tk::RouteBackwardParams)};
  return static_cast<int64_t>(sizes[which]);
}

extern "C" int64_t tk_route_workspace_bytes(const void* params) {
  return tk::cuda::route_workspace_bytes(read<tk::RouteForwardCudaParams>(params));
}

extern "C" bool tk_route_forward(const void* params) { return runs<tk::RouteForwardCudaParams>(tk::cuda::route_forward, params); }

extern "C" bool tk_route_backward(const void* params) { return runs<tk::RouteBackwardParams>(tk::cuda::route_backward, params); }
