// AMX tiles: permission, configuration, and the names of the tile registers in use.
//
// The kernel grants the tile state once per process (arch_prctl); each thread then configures its tiles when it
// enters a parallel region and releases them when it leaves (parallel.h does both). All eight tiles are 16 rows
// of 64 bytes: an operand tile is 16 x 32 bf16, an accumulator 16 x 16 float.
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

// GCC 12's tile loads do not say that they read memory: this makes the stores before it happen.
inline void tile_fence() { asm volatile("" ::: "memory"); }

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

#else

struct TileRegion {
  TileRegion() {}  // not trivial: no unused-variable warnings
};

#endif

#if defined(__AMX_BF16__)
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
