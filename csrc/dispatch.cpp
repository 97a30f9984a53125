// Chooses the ISA level at run time: the highest that cpuid and the operating system allow, or THINKERNEL_ISA.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

#if defined(TK_X86)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tk {

namespace baseline { const Kernels& table(); }
#if defined(TK_X86)
namespace avx2 { const Kernels& table(); }
namespace avx512 { const Kernels& table(); }
namespace avx512_bf16 { const Kernels& table(); }
namespace amx { const Kernels& table(); }
#endif

namespace {

#if defined(TK_X86)
// Leaf 7 subleaf 1, EAX: bit 5 AVX512-BF16.
bool cpu_has_avx512_bf16() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}

// Leaf 7 subleaf 0, EDX: bit 22 AMX-BF16, bit 24 AMX-TILE.
bool cpu_has_amx_bf16() {
#if defined(TK_SOFT_TILES)
  return true;
#endif
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (!(edx >> 22 & 1) || !(edx >> 24 & 1)) return false;
  // Linux hands out the tile state (component 18) per process, on request: ARCH_REQ_XCOMP_PERM.
  constexpr int arch_req_xcomp_perm = 0x1023, xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xtiledata) == 0;
}
#endif

struct Levels {
  std::vector<const Kernels*> tables;
  std::vector<const char*> names;
  Levels() {
    tables.push_back(&baseline::table());
#if defined(TK_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      tables.push_back(&avx2::table());
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        tables.push_back(&avx512::table());
        if (cpu_has_avx512_bf16()) {
          tables.push_back(&avx512_bf16::table());
          if (cpu_has_amx_bf16()) tables.push_back(&amx::table());
        }
      }
    }
#endif
    for (const Kernels* table : tables) names.push_back(table->level);
    names.push_back(nullptr);
  }
};

const Levels& levels() {
  static const Levels found;
  return found;
}

const Kernels& find(const std::string& level) {
  std::string known;
  for (const Kernels* table : levels().tables) {
    if (level == table->level) return *table;
    known += known.empty() ? table->level : std::string(", ") + table->level;
  }
  throw std::runtime_error("ISA level '" + level + "' is not available here; this CPU and build have: " + known);
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_acquire);
  if (table == nullptr) {
    const char* forced = std::getenv("THINKERNEL_ISA");
    table = forced != nullptr && *forced != '\0' ? &find(forced) : levels().tables.back();
    chosen.store(table, std::memory_order_release);
  }
  return *table;
}

const char* const* isa_levels() { return levels().names.data(); }

void set_isa(const char* level) { chosen.store(&find(level), std::memory_order_release); }

}  // namespace tk
