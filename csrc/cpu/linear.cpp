// linear: y = x·Wᵀ + b and its gradients, batch-invariant (include/linear.h). N rows, I in, O out.
//
//   y[n, o]  = Σ_i x[n, i] W[o, i] + b[o]        along i as gemm.h says
//   dx[n, i] = Σ_o dy[n, o] W[o, i]              along o
//   dW[o, i] = Σ_n dy[n, o] x[n, i]              along the rows
//   db[o]    = Σ_n dy[n, o]                      rows in order, in double
#include "linear_kernels.h"

#include "matmul.h"

namespace tk::TK_ISA {

namespace {

template <class S> void forward(const LinearForwardParams& p) {
  matmul<Compute<S>>(p.threads, p.n, p.out, p.in, Rows<S>{(const S*)p.x, p.x_stride},
                     Rows<S>{(const S*)p.weight, p.weight_stride}, (const S*)p.bias, (S*)p.y, p.y_stride);
}

template <class S> void bias_gradient(const LinearBackwardParams& p) {
  const S* dy = (const S*)p.dy;
  parallel_for(p.threads, (p.out + W - 1) / W, [&](int64_t item, int) {
    const int64_t o = item * W;
    const int cols = (int)least(W, p.out - o);
    store_n((S*)p.dbias + o, sum_rows(dy + o, p.dy_stride, p.n, cols), cols);
  });
}

template <class S> void backward(const LinearBackwardParams& p) {
  using T = Compute<S>;
  const S* dy = (const S*)p.dy;
  if (p.dx)
    matmul<T>(p.threads, p.n, p.in, p.out, Rows<S>{dy, p.dy_stride}, Columns<S>{(const S*)p.weight, p.weight_stride},
              (const S*)nullptr, (S*)p.dx, p.in);
  if (p.dweight)
    matmul<T>(p.threads, p.out, p.in, p.n, Columns<S>{dy, p.dy_stride}, Columns<S>{(const S*)p.x, p.x_stride},
              (const S*)nullptr, (S*)p.dweight, p.in);
  if (p.dbias) bias_gradient<S>(p);
}

}  // namespace

void linear_forward(const LinearForwardParams& p) {
  if (p.dtype == DType::float32) forward<float>(p);
  else if (p.dtype == DType::bfloat16) forward<bf16>(p);
  else forward<f16>(p);
}

void linear_backward(const LinearBackwardParams& p) {
  if (p.dtype == DType::float32) backward<float>(p);
  else if (p.dtype == DType::bfloat16) backward<bf16>(p);
  else backward<f16>(p);
}

}  // namespace tk::TK_ISA
