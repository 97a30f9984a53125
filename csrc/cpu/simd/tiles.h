// Tiles of bf16 products: eight registers of 16 rows of 64 bytes, AMX's or, for tests on other CPUs (TK_SOFT_TILES), in memory.
//
//   tile_zero<C>()                    tile_load<T>(p, bytes)           rows `bytes` apart; tile_stream_load passes L1 by
//   tile_dot<C, A, B>()   C += A B    tile_store<C>(p, bytes)
//   an operand A is 16 rows x 32 bf16, B [16 pairs of k][16 columns][2], an accumulator 16 x 16 float
//
// On AMX the kernel grants the tile state once per process (arch_prctl); each thread then configures its tiles when it
// enters a parallel region and releases them when it leaves (parallel.h does both).
// In memory a loaded tile is a pointer: what it points to must stay as it is until the last product with it.
#pragma once

#include "vec.h"

#if defined(__AMX_BF16__) && !defined(TK_SOFT_TILES)
#define TK_AMX_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tk::TK_ISA {

#if defined(TK_AMX_TILES)

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
  TileRegion(const TileRegion&) = delete;
  TileRegion& operator=(const TileRegion&) = delete;
};

#elif defined(TK_SOFT_TILES) && defined(__AVX512BF16__)

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
// As the instruction rounds: FMAs over the even values and over the odd ones, each from zero, and c + (even + odd).
template <int C, int A, int B> inline void tile_dot() {
  Tiles& x = *tiles;
  const __mmask16 columns = tile_columns(B);
  const vi high = splat((int32_t)0xffff0000);
  for (int r = 0; r < x.tall[A]; ++r) {
    vf even = zero(), odd = zero(), c = zero();
    for (int k = 0; k < x.bytes[A] / 4; ++k) {
      int32_t pair;
      memcpy(&pair, x.at[A] + r * x.step[A] + 4 * k, 4);
      const vi p = splat(pair), y = (vi)_mm512_maskz_loadu_epi32(columns, x.at[B] + k * x.step[B]);
      even = fma(as_float(p << 16), as_float(y << 16), even), odd = fma(as_float(p & high), as_float(y & high), odd);
    }
    if (x.state[C] == Tiles::kHere) memcpy(&c, x.sums[C][r], sizeof c);
    if (x.state[C] == Tiles::kElsewhere) c = (vf)_mm512_maskz_loadu_ps(columns, x.at[C] + r * x.step[C]);
    c += even + odd;
    memcpy(x.sums[C][r], &c, sizeof c);
  }
  x.state[C] = Tiles::kHere;
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

inline void tile_fence() {}
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
