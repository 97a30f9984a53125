// Top-k on the host shim against a sort, over inputs chosen to break it. Exit code 1 and a line for each wrong row.
//
//   topk_host_test SEED GROUP ...     groups: patterns lengths edges pieces long hundred_thousand million
//
// N rows · L scores a row · k kept. Rows lie `stride` apart, and what lies between and behind them is +inf: a score read past
// a row's end or past its length would win and show.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_kernels.h"

namespace {

using tk::DType;

enum class Pattern { normal, ties, constant, minus_inf, specials, ascending, descending, low_digits };

struct Case {
  const char* group;
  DType dtype;
  Pattern pattern;
  int64_t rows, length, k, gap;  // stride = length + gap
  int64_t chunk = 0;
  bool lengths = false;
  bool values = true;
};

int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

uint32_t infinity(DType dtype) {
  return dtype == DType::float32 ? 0x7f800000u : dtype == DType::bfloat16 ? 0x7f80u : 0x7c00u;
}
uint32_t sign_of(DType dtype) { return dtype == DType::float32 ? 0x80000000u : 0x8000u; }

// The value of a score's bits, the slow and plain way, apart from the kernel's view of them.
double value_of(DType dtype, uint32_t bits) {
  const int mantissa_bits = dtype == DType::float32 ? 23 : dtype == DType::bfloat16 ? 7 : 10;
  const int exponent_bits = dtype == DType::float16 ? 5 : 8;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const double mantissa = static_cast<double>(bits & ((1u << mantissa_bits) - 1)) / (1u << mantissa_bits);
  double value;
  if (exponent == (1 << exponent_bits) - 1) {
    value = mantissa != 0 ? std::nan("") : INFINITY;
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - bias);
  } else {
    value = std::ldexp(1 + mantissa, exponent - bias);
  }
  return bits & sign_of(dtype) ? -value : value;
}

uint32_t load(const unsigned char* buffer, DType dtype, int64_t index) {
  if (dtype == DType::float32) {
    uint32_t bits;
    std::memcpy(&bits, buffer + 4 * index, 4);
    return bits;
  }
  uint16_t bits;
  std::memcpy(&bits, buffer + 2 * index, 2);
  return bits;
}

void store(unsigned char* buffer, DType dtype, int64_t index, uint32_t bits) {
  if (dtype == DType::float32) {
    std::memcpy(buffer + 4 * index, &bits, 4);
  } else {
    const uint16_t half = static_cast<uint16_t>(bits);
    std::memcpy(buffer + 2 * index, &half, 2);
  }
}

// A normal draw cut to the format's upper bits: every bit pattern it yields is a valid score.
uint32_t cut_to(DType dtype, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == DType::float32) return bits;
  if (dtype == DType::bfloat16) return bits >> 16;
  const int exponent = static_cast<int>(bits >> 23 & 0xff) - 127 + 15;
  if (exponent <= 0) return bits >> 16 & 0x8000u;
  if (exponent >= 31) return (bits >> 16 & 0x8000u) | 0x7bffu;
  return (bits >> 16 & 0x8000u) | static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 0x3ffu);
}

uint32_t draw(const Case& c, int64_t index, std::mt19937_64& random) {
  const uint32_t inf = infinity(c.dtype), sign = sign_of(c.dtype), one = cut_to(c.dtype, 1.0f);
  std::normal_distribution<float> normal;
  switch (c.pattern) {
    case Pattern::normal: return cut_to(c.dtype, normal(random));
    case Pattern::ties: return cut_to(c.dtype, static_cast<float>(static_cast<int>(random() % 5) - 2));
    case Pattern::constant: return cut_to(c.dtype, 0.75f);
    case Pattern::minus_inf: return random() % 4 == 0 ? cut_to(c.dtype, normal(random)) : sign | inf;
    case Pattern::specials: {
      const uint32_t choices[] = {0, sign, inf, sign | inf, inf | 1, sign | inf | 1, sign | (sign - 1), sign - 1,
                                  1, sign | 1, inf - 1, sign | (inf - 1), one, sign | one};
      return choices[random() % (sizeof(choices) / sizeof(choices[0]))];
    }
    case Pattern::ascending: return one + static_cast<uint32_t>(index) / 3;
    case Pattern::descending: return inf - 1 - static_cast<uint32_t>(index) / 3;
    case Pattern::low_digits: return one | static_cast<uint32_t>(random() % 7);  // all digits agree but the last
  }
  return 0;
}

// Runs one case; the number of wrong rows.
int run(const Case& c, std::mt19937_64& random) {
  const int64_t size = size_of(c.dtype), stride = c.length + c.gap;
  const int64_t elements = c.rows == 0 ? 0 : (c.rows - 1) * stride + c.length;
  std::vector<unsigned char> scores(static_cast<size_t>(elements * size));  // [N, L], rows stride apart
  std::vector<int32_t> lengths(static_cast<size_t>(c.rows));                // [N]
  for (int64_t i = 0; i < elements; ++i) store(scores.data(), c.dtype, i, infinity(c.dtype));
  for (int64_t row = 0; row < c.rows; ++row) {
    int64_t valid = c.length;
    if (c.lengths) {
      const int64_t choices[] = {0, 1, c.k - 1, c.k, c.k + 1, c.length, c.length + 5, -3,
                                 static_cast<int64_t>(random() % static_cast<uint64_t>(c.length + 1))};
      const int64_t chosen = row < 8 ? choices[row] : choices[8];
      lengths[row] = static_cast<int32_t>(chosen);
      valid = std::clamp<int64_t>(chosen, 0, c.length);
    }
    for (int64_t i = 0; i < valid; ++i) store(scores.data(), c.dtype, row * stride + i, draw(c, i, random));
  }
  std::vector<unsigned char> values(static_cast<size_t>(c.rows * c.k * size), 0x5a);  // [N, k]
  std::vector<int32_t> indices(static_cast<size_t>(c.rows * c.k), -77);               // [N, k]
  tk::TopkParams params{};
  params.scores = scores.data();
  params.lengths = c.lengths ? lengths.data() : nullptr;
  params.values = c.values ? values.data() : nullptr;
  params.indices = indices.data();
  params.dtype = c.dtype;
  params.rows = c.rows;
  params.length = c.length;
  params.row_stride = stride;
  params.k = c.k;
  params.chunk = c.chunk;
  params.workspace_bytes = tk::cuda::topk_workspace_bytes(params);
  std::vector<int32_t> workspace(static_cast<size_t>((params.workspace_bytes + 3) / 4), 0x5a5a5a5a);
  params.workspace = workspace.empty() ? nullptr : workspace.data();
  tk::cuda::topk(params, 0);

  int wrong = 0;
  for (int64_t row = 0; row < c.rows; ++row) {
    const int64_t valid = c.lengths ? std::clamp<int64_t>(lengths[row], 0, c.length) : c.length;
    std::vector<double> value(static_cast<size_t>(valid));
    std::vector<int32_t> order(static_cast<size_t>(valid));
    for (int64_t i = 0; i < valid; ++i) {
      value[i] = value_of(c.dtype, load(scores.data(), c.dtype, row * stride + i));
      order[i] = static_cast<int32_t>(i);
    }
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      if (std::isnan(value[a]) || std::isnan(value[b])) return !std::isnan(value[a]) && std::isnan(value[b]);
      return value[a] > value[b];
    });
    order.resize(static_cast<size_t>(std::min(valid, c.k)));
    std::sort(order.begin(), order.end());
    for (int64_t slot = 0; slot < c.k; ++slot) {
      const bool used = slot < static_cast<int64_t>(order.size());
      const int32_t index = used ? order[slot] : -1;
      const uint32_t bits = used ? load(scores.data(), c.dtype, row * stride + index) : sign_of(c.dtype) | infinity(c.dtype);
      const uint32_t got = c.values ? load(values.data(), c.dtype, row * c.k + slot) : bits;
      if (indices[row * c.k + slot] != index || got != bits) {
        std::printf("%s: dtype %d pattern %d rows %lld length %lld k %lld gap %lld chunk %lld: row %lld (valid %lld) slot %lld: "
                    "index %d bits %x, expected %d %x\n",
                    c.group, static_cast<int>(c.dtype), static_cast<int>(c.pattern), static_cast<long long>(c.rows),
                    static_cast<long long>(c.length), static_cast<long long>(c.k), static_cast<long long>(c.gap),
                    static_cast<long long>(c.chunk), static_cast<long long>(row), static_cast<long long>(valid),
                    static_cast<long long>(slot), indices[row * c.k + slot], got, index, bits);
        ++wrong;
        break;
      }
    }
  }
  return wrong;
}

std::vector<Case> all_cases() {
  const DType dtypes[] = {DType::float32, DType::bfloat16, DType::float16};
  const Pattern patterns[] = {Pattern::normal,   Pattern::ties,      Pattern::constant,   Pattern::minus_inf,
                              Pattern::specials, Pattern::ascending, Pattern::descending, Pattern::low_digits};
  std::vector<Case> cases;
  for (const DType dtype : dtypes) {
    for (const Pattern pattern : patterns) {
      cases.push_back({"patterns", dtype, pattern, 2, 509, 37, 0});
      cases.push_back({"patterns", dtype, pattern, 1, 257, 256, 3});
    }
    // Every length around k, rows at every alignment, what lies beyond a length unread.
    cases.push_back({"lengths", dtype, Pattern::ties, 11, 67, 13, 1, 0, true});
    cases.push_back({"lengths", dtype, Pattern::specials, 10, 300, 64, 5, 0, true});
    cases.push_back({"edges", dtype, Pattern::normal, 3, 1, 1, 0});
    cases.push_back({"edges", dtype, Pattern::normal, 2, 1, 5, 2});
    cases.push_back({"edges", dtype, Pattern::normal, 2, 0, 4, 1});
    cases.push_back({"edges", dtype, Pattern::normal, 0, 16, 4, 0});
    cases.push_back({"edges", dtype, Pattern::normal, 3, 16, 0, 0});
    cases.push_back({"edges", dtype, Pattern::specials, 2, 31, 100, 0});
    cases.push_back({"edges", dtype, Pattern::ties, 2, 1021, 1, 0});
    cases.push_back({"edges", dtype, Pattern::normal, 2, 131, 7, 0, 0, false, false});
    // Pieces of a row, selected apart and then together: the same result.
    cases.push_back({"pieces", dtype, Pattern::ties, 2, 1000, 50, 3, 128});
    cases.push_back({"pieces", dtype, Pattern::specials, 9, 211, 17, 1, 64, true});
    cases.push_back({"pieces", dtype, Pattern::low_digits, 1, 640, 64, 0, 64});
  }
  cases.push_back({"long", DType::float32, Pattern::normal, 1, 7919, 2048, 1});
  cases.push_back({"long", DType::bfloat16, Pattern::normal, 1, 6007, 512, 3});
  cases.push_back({"long", DType::float32, Pattern::low_digits, 1, 5003, 1000, 0, 2048});
  cases.push_back({"hundred_thousand", DType::float32, Pattern::normal, 1, 100003, 2048, 1});  // long enough for pieces of its own accord
  cases.push_back({"million", DType::float32, Pattern::normal, 1, 1000003, 2048, 0});
  cases.push_back({"million", DType::float16, Pattern::ties, 1, 1000003, 2048, 1});
  return cases;
}

// Sizes that must be refused before anything runs; the number that were not.
int refusals() {
  int accepted = 0;
  const auto refuse = [&](const char* name, auto change) {
    int32_t index = 0;
    tk::TopkParams params{};
    params.indices = &index;
    params.rows = params.length = params.k = params.row_stride = 1;
    change(params);
    try {
      tk::cuda::topk(params, 0);
    } catch (const std::invalid_argument&) {
      return;
    }
    std::printf("refusals: %s was accepted\n", name);
    ++accepted;
  };
  refuse("negative rows", [](tk::TopkParams& p) { p.rows = -1; });
  refuse("negative length", [](tk::TopkParams& p) { p.length = -1; });
  refuse("length of 2^31", [](tk::TopkParams& p) { p.length = int64_t{1} << 31; });
  refuse("negative k", [](tk::TopkParams& p) { p.k = -1; });
  refuse("unknown dtype", [](tk::TopkParams& p) { p.dtype = static_cast<DType>(3); });
  refuse("chunk below k", [](tk::TopkParams& p) { p.length = 100, p.k = 20, p.chunk = 10; });
  refuse("no workspace", [](tk::TopkParams& p) { p.length = 100, p.k = 5, p.chunk = 10; });
  refuse("too many pieces", [](tk::TopkParams& p) { p.rows = int64_t{1} << 30, p.length = 100, p.k = 5, p.chunk = 10; });
  return accepted;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::printf("usage: topk_host_test SEED GROUP ...\n");
    return 2;
  }
  std::mt19937_64 random(std::strtoull(argv[1], nullptr, 10));
  int wrong = 0;
  for (int i = 2; i < argc; ++i) {
    const std::string group = argv[i];
    if (group == "edges") wrong += refusals();
    int ran = 0;
    for (const Case& c : all_cases()) {
      if (group != c.group) continue;
      wrong += run(c, random);
      ++ran;
    }
    std::printf("%s: %d cases\n", group.c_str(), ran);
    if (ran == 0) ++wrong;
  }
  std::printf("%d wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
