// A packed product (gemm.h) that runs step by step between other work.
//
//   GemmSteps<T> product;
//   product.begin(M, N, K, A, B, C, ldc)   C = A·Bᵀ, operands as Gemm<T>::gemm takes them; C has room for whole MR x NR tiles
//   product.tick()                         one step, if any is left
//   product.finish()                       the rest; C may be read now
//
// A step on AMX is four tile products, 64 cycles in which the vector units may execute 64 instructions for nothing: the caller
// ticks between the exponentials of what the last product gave. It needs kBuffers places for C in turn. Other products run in
// finish(): float ones use the vector units themselves. The order of summation is Gemm's.
#pragma once

#include "gemm.h"

namespace tk::TK_ISA {

template <class T> class GemmSteps {
 public:
  static constexpr int kBuffers = 1;
  void begin(int64_t M, int64_t N, int64_t K, const T* A, const T* B, float* C, int64_t ldc) { begun_ = {M, N, K, A, B, C, ldc}; }
  void tick() {}
  void finish() {
    const Product& x = begun_;
    Gemm<T>::gemm(x.M, x.N, x.K, x.A, x.B, x.C, x.ldc, false);
  }

 private:
  struct Product {
    int64_t M, N, K;
    const T *A, *B;
    float* C;
    int64_t ldc;
  } begun_;
};

#if defined(__AMX_BF16__)

template <> class GemmSteps<bf16> {
  using G = Gemm<bf16>;

 public:
  static constexpr int kBuffers = 2;
  void begin(int64_t M, int64_t N, int64_t K, const bf16* A, const bf16* B, float* C, int64_t ldc) {
    if (K == 0) return G::gemm(M, N, K, A, B, C, ldc, false);
    A_ = A, B_ = B, C_ = C, ldc_ = ldc;
    depth_ = G::padded_k(K), rows_ = round_up(M, G::MR), cols_ = round_up(N, G::NR);
    block_ = G::depth_of(N, K);
    lines_ = (32 * G::NR + cols_ - 1) / cols_;
    k_ = m_ = n_ = 0;
    fetch_next_panel();
    open();
  }
  // Inline: a call would cost the caller every constant it holds in a register.
  __attribute__((always_inline)) bool tick() {
    if (left_ == 0) return false;
    tile_fence();
    for (int64_t i = 0; i < lines_; ++i, ahead_ += 32) _mm_prefetch((const char*)ahead_, _MM_HINT_T1);
    const bf16 *a = a_, *b = b_;
    a_ += 2 * G::kTile, b_ += 2 * G::kTile;
    tile_load<4>(a, 64);
    tile_stream_load<6>(b, 64);
    tile_load<5>(a + G::kTile, 64);
    tile_stream_load<7>(b + G::kTile, 64);
    tile_dot<0, 4, 6>();
    tile_dot<2, 5, 6>();
    tile_dot<1, 4, 7>();
    tile_dot<3, 5, 7>();
    if (__builtin_expect(--left_ == 0, 0)) close();
    return true;
  }
  void finish() {
    while (tick()) {}
    tile_fence();
  }

 private:
  const bf16 *A_, *B_;
  float* C_;
  int64_t ldc_, depth_, rows_, cols_, block_;
  int64_t k_, m_, n_;                    // the tile being worked on
  const bf16 *a_, *b_, *ahead_;
  int64_t lines_, left_ = 0;             // lines fetched ahead and steps left

  // Into L2 meanwhile: A's panel behind this one, in the end that of the rows behind these.
  __attribute__((always_inline)) void fetch_next_panel() {
    const bool last = m_ + G::MR == rows_;
    ahead_ = !last ? A_ + (m_ + G::MR) * depth_ + k_ * G::MR
                   : k_ + block_ < depth_ ? A_ + (k_ + block_) * G::MR : A_ + rows_ * depth_;
  }
  __attribute__((always_inline)) void open() {
    left_ = least(block_, depth_ - k_) / G::KU;
    a_ = A_ + m_ * depth_ + k_ * G::MR, b_ = B_ + n_ * depth_ + k_ * G::NR;
    if (k_ == 0) {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
      return;
    }
    const float* c = C_ + m_ * ldc_ + n_;
    tile_load<0>(c, ldc_ * 4);
    tile_load<1>(c + 16, ldc_ * 4);
    tile_load<2>(c + 16 * ldc_, ldc_ * 4);
    tile_load<3>(c + 16 * ldc_ + 16, ldc_ * 4);
  }
  __attribute__((always_inline)) void close() {
    float* c = C_ + m_ * ldc_ + n_;
    tile_store<0>(c, ldc_ * 4);
    tile_store<1>(c + 16, ldc_ * 4);
    tile_store<2>(c + 16 * ldc_, ldc_ * 4);
    tile_store<3>(c + 16 * ldc_ + 16, ldc_ * 4);
    tile_fence();
    if ((n_ += G::NR) == cols_) {
      n_ = 0;
      if ((m_ += G::MR) == rows_) m_ = 0, k_ += block_;
      if (k_ >= depth_) return;
      fetch_next_panel();
    }
    open();
  }
};

#endif

}  // namespace tk::TK_ISA
