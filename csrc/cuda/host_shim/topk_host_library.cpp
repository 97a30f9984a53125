// Top-k on the host shim with a C interface, so that tests can hold it against the Python reference.
#include <cstdint>
#include <vector>

#include "cuda_kernels.h"

// scores [N, L] of dtype (see types.h), rows row_stride apart; lengths [N] or null; values [N, k]; indices [N, k].
extern "C" void topk_on_host(const void* scores, const int32_t* lengths, void* values, int32_t* indices, int32_t dtype,
                             int64_t rows, int64_t length, int64_t row_stride, int64_t k, int64_t chunk) {
  tk::TopkParams params{};
  params.scores = scores;
  params.lengths = lengths;
  params.values = values;
  params.indices = indices;
  params.dtype = static_cast<tk::DType>(dtype);
  params.rows = rows;
  params.length = length;
  params.row_stride = row_stride;
  params.k = k;
  params.chunk = chunk;
  params.workspace_bytes = tk::cuda::topk_workspace_bytes(params);
  std::vector<int32_t> workspace(static_cast<std::size_t>((params.workspace_bytes + 3) / 4));
  params.workspace = workspace.empty() ? nullptr : workspace.data();
  tk::cuda::topk(params, 0);
}
