// NSA's sum of branches, one read of each: o = sum over c of g_c o_c;  do_c = g_c do,  dg_c = do . o_c.
#include "branch_gates.h"

#include "branch_kernels.h"
#include "parallel.h"
#include "simd/gemm.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kSome = 512;  // rows of an item

template <class F> void each_row(const BranchGatesParams& p, const F& body) {
  parallel_for(p.threads, (p.rows + kSome - 1) / kSome, [&](int64_t i, int) {
    for (int64_t r = i * kSome; r < least(p.rows, (i + 1) * kSome); ++r) body(r);
  });
}

template <class S> void forward(const BranchGatesParams& p) {
  const int64_t Dv = p.value_dim;
  const S* from[3] = {(const S*)p.branch0, (const S*)p.branch1, (const S*)p.branch2};
  each_row(p, [&](int64_t r) {
    const float one[3] = {1.0f, 1.0f, 1.0f}, *gates = p.gates ? p.gates + r * 3 : one;
    for (int64_t d = 0; d < Dv; d += W) {
      const int n = (int)least(W, Dv - d);
      vf sum = load_n(from[0] + r * Dv + d, n) * gates[0];
      for (int c = 1; c < 3; ++c) sum = fma(load_n(from[c] + r * Dv + d, n), splat(gates[c]), sum);
      store_n((S*)p.out + r * Dv + d, sum, n);
    }
  });
}

template <class S> void backward(const BranchGatesParams& p) {
  const int64_t Dv = p.value_dim, branch = p.rows * Dv;
  const S* from[3] = {(const S*)p.branch0, (const S*)p.branch1, (const S*)p.branch2};
  each_row(p, [&](int64_t r) {
    const S* dout = (const S*)p.dout + r * Dv;
    S* to = (S*)p.dbranches + r * Dv;
    vf dot[3] = {zero(), zero(), zero()};
    for (int64_t d = 0; d < Dv; d += W) {
      const int n = (int)least(W, Dv - d);
      const vf g = load_n(dout + d, n);
      for (int c = 0; c < 3; ++c) {
        dot[c] = fma(load_n(from[c] + r * Dv + d, n), g, dot[c]);
        store_n(to + c * branch + d, g * p.gates[r * 3 + c], n);
      }
    }
    for (int c = 0; c < 3; ++c) p.dgates[r * 3 + c] = reduce_add(dot[c]);
  });
}

template <class S> void run(const BranchGatesParams& p) {
  if (p.out) return forward<S>(p);
  backward<S>(p);
}

}  // namespace

void branch_gates(const BranchGatesParams& p) {
  switch (p.dtype) {
    case DType::float32: return run<float>(p);
    case DType::bfloat16: return run<bf16>(p);
    case DType::float16: return run<f16>(p);
  }
}

}  // namespace tk::TK_ISA
