// The function table of one ISA level. Compiled once per level, TK_ISA names the namespace.
#include "kernels.h"

namespace tk {
namespace TK_ISA {

#define TK_STRING_(x) #x
#define TK_STRING(x) TK_STRING_(x)

const Kernels& table() {
  static const Kernels kernels{
      .level = TK_STRING(TK_ISA),
  };
  return kernels;
}

}  // namespace TK_ISA
}  // namespace tk
