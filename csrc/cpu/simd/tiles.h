// Tiles of bf16 products: eight registers of 16 rows of 64 bytes, AMX's or, on the AVX-512-BF16 level, kept in memory.
//
//   tile_zero<C>()                    tile_load<T>(p, bytes)           rows `bytes` apart; tile_stream_load passes L1 by
//   tile_dot<C, A, B>()   C += A B    tile_store<C>(p, bytes)
//   an operand A is 16 rows x 32 bf16, B [16 pairs of k][16 columns][2], an accumulator 16 x 16 float
//
// On AMX the kernel grants the tile state once per process (arch_prctl); each thread then configures its tiles when it
// enters a parallel region and releases them when it leaves (parallel.h does both).
// Without AMX a loaded tile is a pointer: what it points to must stay as it is until the last product with it. gemm.h has
// products of its own there, with sums in registers.
// Both treat subnormals as zero and sum along pairs of k, but round elsewhere: a level's bits are its own.
#pragma once

#include "vec.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tk::TK_ISA {

#if defined(__AMX_BF16__)

inline bool amx_request_permission() {
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
  return granted;
}

// Of tile t: bytes[t] of each of tall[t] rows are in use.
inline void configure_tiles(const uint8_t* bytes, const uint8_t* tall) {
  alignas(64) uint8_t config[64] = {1};  // palette 1
  for (int t = 0; t < 8; ++t) config[16 + 2 * t] = bytes[t], config[48 + t] = tall[t];
  // Not the intrinsic: GCC 12's names eight bytes as its input and drops the other stores.
  asm volatile("ldtilecfg %0" ::"m"(config));
}

// The tile instructions do not say that they read or write memory: this puts the stores before it first.
inline void tile_fence() { asm volatile("" ::: "memory"); }

// The intrinsics are macros that take nothing but a digit.
template <int T> inline __attribute__((always_inline)) void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> inline __attribute__((always_inline)) void tile_load(const void* p, int64_t bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(bytes), "i"(T));
}
template <int T> inline __attribute__((always_inline)) void tile_stream_load(const void* p, int64_t bytes) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(bytes), "i"(T));
}
template <int T> inline __attribute__((always_inline)) void tile_store(void* p, int64_t bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(bytes), "i"(T) : "memory");
}
template <int C, int A, int B> inline __attribute__((always_inline)) void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

struct TileRegion {
  TileRegion() {
    amx_request_permission();
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;  // palette 1
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;  // bytes a row
      config[48 + t] = 16;      // rows
    }
    // Not the intrinsic: GCC 12's names eight bytes as its input and drops the other stores.
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileRegion() { _tile_release(); }
  static void whole() {
    constexpr uint8_t bytes[8] = {64, 64, 64, 64, 64, 64, 64, 64}, tall[8] = {16, 16, 16, 16, 16, 16, 16, 16};
    configure_tiles(bytes, tall);
  }
  TileRegion(const TileRegion&) = delete;
  TileRegion& operator=(const TileRegion&) = delete;
};

#elif defined(__AVX512BF16__)

// What tile registers hold here: an operand stays where it lies, so does a sum until the first product; then sums[T] has it.
struct Tiles {
  enum State : uint8_t { kZero, kElsewhere, kHere };
  alignas(64) float sums[8][16][16];
  const char* at[8];
  int64_t step[8];                    // bytes from row to row of what lies elsewhere
  uint8_t state[8], bytes[8], tall[8];
};
inline thread_local Tiles* tiles = nullptr;

inline void configure_tiles(const uint8_t* bytes, const uint8_t* tall) {
  for (int t = 0; t < 8; ++t) tiles->bytes[t] = bytes[t], tiles->tall[t] = tall[t];
}
inline void tile_fence() {}

template <int T> inline void tile_zero() { tiles->state[T] = Tiles::kZero; }
template <int T> inline void tile_load(const void* p, int64_t bytes) {
  Tiles& x = *tiles;
  x.at[T] = (const char*)p, x.step[T] = bytes, x.state[T] = Tiles::kElsewhere;
}
template <int T> inline void tile_stream_load(const void* p, int64_t bytes) { tile_load<T>(p, bytes); }

inline __mmask16 tile_columns(int t) { return (__mmask16)((1u << tiles->bytes[t] / 4) - 1); }
template <int T> inline void tile_store(void* p, int64_t bytes) {
  const Tiles& x = *tiles;
  const __mmask16 columns = tile_columns(T);
  for (int r = 0; r < x.tall[T]; ++r) {
    const __m512 row = x.state[T] == Tiles::kZero ? _mm512_setzero_ps()
                       : x.state[T] == Tiles::kHere ? _mm512_load_ps(x.sums[T][r])
                                                    : _mm512_maskz_loadu_ps(columns, x.at[T] + r * x.step[T]);
    _mm512_mask_storeu_ps((char*)p + r * bytes, columns, row);
  }
}
template <int C, int A, int B> inline void tile_dot() {
  Tiles& x = *tiles;
  const __mmask16 columns = tile_columns(B);
  const char *a = x.at[A], *b = x.at[B], *c = x.at[C];
  const int64_t a_step = x.step[A], b_step = x.step[B], c_step = x.step[C];
  const int rows = x.tall[A], pairs = x.bytes[A] / 4;
  __m512 sum[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) sum[r] = _mm512_setzero_ps();
  if (x.state[C] == Tiles::kHere) {
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) sum[r] = _mm512_load_ps(x.sums[C][r]);
  } else if (x.state[C] == Tiles::kElsewhere) {
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r)
      if (r < rows) sum[r] = _mm512_maskz_loadu_ps(columns, c + r * c_step);
  }
  // A row beyond the last one is the first row again: its sums are never stored.
  int64_t row[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) row[r] = r < rows ? r * a_step : 0;
  for (int k = 0; k < pairs; ++k, a += 4, b += b_step) {
    const __m512bh y = (__m512bh)_mm512_maskz_loadu_epi32(columns, b);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      int32_t pair;
      memcpy(&pair, a + row[r], 4);
      sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_set1_epi32(pair), y);
    }
  }
  x.state[C] = Tiles::kHere;
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) _mm512_store_ps(x.sums[C][r], sum[r]);
}

struct TileRegion {
  TileRegion() {
    tiles = &here_;
    memset((void*)&here_.bytes, 64, 8);
    memset((void*)&here_.tall, 16, 8);
  }
  ~TileRegion() { tiles = before_; }
  TileRegion(const TileRegion&) = delete;
  TileRegion& operator=(const TileRegion&) = delete;

 private:
  Tiles here_;
  Tiles* before_ = tiles;
};

#else

struct TileRegion {
  TileRegion() {}  // not trivial: no unused-variable warnings
};

#endif

#if defined(__AVX512BF16__)
// A row of results whose right operand was interleaved with unpacklo and unpackhi, its columns back in order: the first 16 of
// every 32 hold 0-3, 8-11, 16-19, 24-27, the others the rest. A last group of 32 is done whole.
inline void unpacked_columns(float* row, int64_t columns) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (float* x = row; x < row + columns; x += 32) {
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    _mm512_storeu_ps(x, _mm512_permutex2var_ps(a, low, b));
    _mm512_storeu_ps(x + 16, _mm512_permutex2var_ps(a, high, b));
  }
}
#endif

}  // namespace tk::TK_ISA
