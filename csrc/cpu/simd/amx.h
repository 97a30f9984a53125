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

}  // namespace tk::TK_ISA
