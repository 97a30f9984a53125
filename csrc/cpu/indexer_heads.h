// Products of queries' heads with a block of keys, heads down and keys across, so that what happens head by head runs key by key in
// the lanes: I[s] = sum_h w[h] relu(q[h] . k[s]) and m[s] = sum_h e^(scale q[h] . k[s] - lse[h]).
//
// A query has `heads` rows; as many queries as fill `least_rows` of them are a unit, whose products lie side by side.
#pragma once

#include "latent_cache.h"
#include "parallel.h"
#include "simd/gemm_split.h"

namespace tk::TK_ISA {

inline constexpr int64_t kKeyBlock = 256;
inline constexpr int64_t kLdc = kKeyBlock + 16;  // row stride of a block's products: no power of two

template <class T> struct HeadRows {
  using Mm = Gemm<T>;
  int64_t heads, dim, unit, rows;  // unit: queries; rows: of their heads, with those that fill a panel

  HeadRows(int64_t heads, int64_t dim, int64_t least_rows = Mm::MR)
      : heads(heads), dim(dim), unit(heads >= least_rows ? 1 : least_rows / heads), rows(round_up(unit * heads, Mm::MR)) {}
  int64_t panel() const { return Mm::size_a(rows, dim); }
  int64_t size(int64_t queries) const { return (queries + unit - 1) / unit * panel(); }
  int64_t product_size() const { return rows * kLdc; }
  int64_t copy_size() const { return unit * heads * dim; }

  // n queries, the first heads of which lie `step` apart; copy: [copy_size()], used where a query has more heads than these.
  template <class S> void pack(const S* q, int64_t step, int64_t n, S* copy, T* to) const {
    for (int64_t r = 0; r < n; r += unit, to += panel()) {
      const int64_t some = least(unit, n - r);
      const S* from = q + r * step;
      if (step != heads * dim) {
        for (int64_t i = 0; i < some; ++i) memcpy((void*)(copy + i * heads * dim), from + i * step, heads * dim * sizeof(S));
        from = copy;
      }
      Mm::pack_a(from, dim, some * heads, dim, to);
    }
  }
  // Products of the unit that begins at query r, `some` queries, with n packed keys -> [rows, kLdc].
  void multiply(const T* q, int64_t r, int64_t some, const T* keys, int64_t n, float* product) const {
    const int64_t height = same_type<T, float> ? some * heads : round_up(some * heads, Mm::MR);
    Mm::gemm(height, round_up(n, Mm::NR), dim, q + r / unit * panel(), keys, product, kLdc, false);
  }
};

// Four vectors of scores of a query, whose products z [heads, kLdc] begin at their first key.
__attribute__((always_inline)) inline void weigh(const float* z, const float* w, int64_t heads, vf* sum) {
#pragma GCC unroll 4
  for (int u = 0; u < 4; ++u) sum[u] = zero();
  for (int64_t h = 0; h < heads; ++h, z += kLdc) {
    const vf weight = splat(w[h]);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) sum[u] = fma(weight, max(zero(), load(z + u * W)), sum[u]);
  }
}

}  // namespace tk::TK_ISA
