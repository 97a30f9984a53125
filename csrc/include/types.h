// Types every params struct shares. No torch, no Python.
#pragma once
#include <cstdint>

namespace tk {

// Element types of the tensors that pointers in params structs refer to.
enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

}  // namespace tk
