// The route kernels on the host shim against plain loops, for the sanitizers: exact-size buffers, every path.
//
//   route_host_test SEED GROUP ...       GROUP: rules, ties, replay, edges
//
// Prints "GROUP: n cases" and what is wrong; exit code 0: nothing. The rules' formulas are checked against the Python reference by
// tests/test_cuda_route_host.py; here choices on given scores, the sort, and sums that every rule must keep.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda_kernels.h"
#include "simt.cuh"

namespace {

using tk::DType;
using tk::MoeScore;
using Random = std::mt19937_64;

struct Case {
  const char* group;
  int64_t tokens, experts, top_k, groups, top_groups;
  MoeScore score;
  bool renormalize, group_max, biased, ties, replay;
  DType dtype = DType::float32;
};

void store(std::vector<unsigned char>& to, DType dtype, int64_t at, float x) {
  if (dtype == DType::float32) {
    std::memcpy(to.data() + 4 * at, &x, 4);
  } else {
    const uint16_t bits = dtype == DType::bfloat16 ? tk::simt::float_to_bfloat16(x) : tk::simt::float_to_float16(x);
    std::memcpy(to.data() + 2 * at, &bits, 2);
  }
}

float load(const std::vector<unsigned char>& from, DType dtype, int64_t at) {
  float x;
  uint16_t bits;
  if (dtype == DType::float32) std::memcpy(&x, from.data() + 4 * at, 4);
  else std::memcpy(&bits, from.data() + 2 * at, 2), x = dtype == DType::bfloat16 ? tk::simt::bfloat16_to_float(bits) : tk::simt::float16_to_float(bits);
  return x;
}

// Choices of one row on given scores: those of the best groups, highest first, ties to the lower number.
std::vector<int32_t> choices(const Case& c, const std::vector<float>& scores) {
  const int64_t size = c.experts / c.groups;
  std::vector<std::pair<float, int64_t>> of_group;
  for (int64_t g = 0; g < c.groups; ++g) {
    std::vector<float> own(scores.begin() + g * size, scores.begin() + (g + 1) * size);
    std::sort(own.rbegin(), own.rend());
    of_group.push_back({c.group_max || size == 1 ? own[0] : own[0] + own[1], g});
  }
  std::stable_sort(of_group.begin(), of_group.end(), [](auto& a, auto& b) { return a.first > b.first; });
  std::vector<int32_t> order;
  std::vector<char> kept(static_cast<std::size_t>(c.groups));
  for (int64_t i = 0; i < c.top_groups; ++i) kept[of_group[i].second] = 1;
  for (int64_t e = 0; e < c.experts; ++e) if (kept[e / size]) order.push_back(static_cast<int32_t>(e));
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  order.resize(static_cast<std::size_t>(c.top_k));
  return order;
}

// What is wrong with one case; empty: nothing.
std::string run(const Case& c, Random& random) {
  const int64_t N = c.tokens, E = c.experts, K = c.top_k, stride = E + 3, size = c.dtype == DType::float32 ? 4 : 2;
  std::normal_distribution<float> normal;
  std::vector<unsigned char> logits(static_cast<std::size_t>(N == 0 ? 0 : ((N - 1) * stride + E) * size)), dlogits(N * E * size);
  std::vector<float> bias(E), weights(N * K, NAN), dweights(N * K);
  std::vector<int32_t> chosen(N * K, -77), counts(E, -77), order(N * K, -77), offsets(E + 1, -77);
  for (float& b : bias) b = c.ties ? -static_cast<float>(random() % 3) - 5 : 0.2f * normal(random);
  for (float& d : dweights) d = normal(random);
  for (int64_t t = 0; t < N; ++t)
    for (int64_t e = 0; e < E; ++e) {
      float x = normal(random);
      if (c.ties) {
        const int value = static_cast<int>(random() % 4) - 2;
        x = value == 0 && random() % 2 ? -0.0f : static_cast<float>(value);
      }
      store(logits, c.dtype, t * stride + e, x);
    }
  if (c.replay) for (int32_t& e : chosen) e = static_cast<int32_t>(random() % (E + 3)) - 1;  // some of other ranks
  const std::vector<int32_t> given = chosen;

  tk::RouteForwardCudaParams f{};
  f.dtype = c.dtype, f.score = c.score, f.renormalize = c.renormalize, f.tokens = N, f.experts = E, f.top_k = K, f.scaling = 1.5f;
  f.logits = logits.data(), f.stride = stride, f.groups = c.groups, f.top_groups = c.top_groups, f.group_max = c.group_max;
  f.bias = c.biased ? bias.data() : nullptr, f.replay = c.replay, f.chosen = chosen.data(), f.weights = weights.data();
  f.counts = counts.data(), f.order = order.data(), f.offsets = offsets.data();
  std::vector<uint32_t> workspace(static_cast<std::size_t>(tk::cuda::route_workspace_bytes(f) / 4), 0x5a5a5a5a);
  f.workspace = workspace.data(), f.workspace_bytes = static_cast<int64_t>(4 * workspace.size());
  tk::cuda::route_forward(f, 0);
  tk::RouteBackwardParams b{};
  static_cast<tk::RouteShape&>(b) = f;
  b.chosen = chosen.data(), b.dweights = dweights.data(), b.dlogits = dlogits.data();
  tk::cuda::route_backward(b, 0);

  // ---- the choice, where it is on given scores
  if (c.replay && chosen != given) return "given experts changed";
  const bool raw = c.score == MoeScore::softmax_topk || c.score == MoeScore::sigmoid_topk;
  for (int64_t t = 0; t < N && !c.replay && raw; ++t) {
    std::vector<float> scores(E);
    for (int64_t e = 0; e < E; ++e) scores[e] = load(logits, c.dtype, t * stride + e) + (c.biased ? bias[e] : 0);
    const std::vector<int32_t> want = choices(c, scores);
    if (!std::equal(want.begin(), want.end(), chosen.begin() + t * K)) return "chose otherwise in row " + std::to_string(t);
  }
  // ---- weights and gradients
  for (int64_t t = 0; t < N; ++t) {
    double sum = 0, gradients = 0;
    int64_t here = 0;
    for (int64_t k = 0; k < K; ++k) {
      const int32_t e = chosen[t * K + k];
      const bool mine = e >= 0 && e < E;
      if (!mine && (!c.replay || weights[t * K + k] != 0)) return "an expert that is not here weighs";
      for (int64_t other = 0; other < k && !c.replay; ++other) if (chosen[t * K + other] == e) return "an expert chosen twice";
      sum += weights[t * K + k];
      here += mine;
    }
    if (!(sum >= 0)) return "weights are not numbers";
    if (here > 0 && c.renormalize && std::fabs(sum - 1.5) > 1e-5) return "weights do not sum to the scaling";
    for (int64_t e = 0; e < E; ++e) gradients += load(dlogits, c.dtype, t * E + e);
    const bool softmax = c.score == MoeScore::softmax || c.score == MoeScore::softmax_topk;
    if (!std::isfinite(gradients) || (softmax && !c.ties && c.dtype == DType::float32 && std::fabs(gradients) > 1e-4)) {
      if (c.score == MoeScore::softmax || c.renormalize || softmax) return "gradients of a softmax do not sum to 0";
    }
  }
  // ---- the sort
  std::vector<int32_t> want_counts(E + 1), want_order(N * K);
  const auto bin = [&](int32_t slot) { return chosen[slot] >= 0 && chosen[slot] < E ? chosen[slot] : static_cast<int32_t>(E); };
  for (int64_t slot = 0; slot < N * K; ++slot) want_order[slot] = static_cast<int32_t>(slot), ++want_counts[bin(static_cast<int32_t>(slot))];
  std::stable_sort(want_order.begin(), want_order.end(), [&](int32_t x, int32_t y) { return bin(x) < bin(y); });
  if (order != want_order) return "the order is not that of a stable sort";
  int32_t total = 0;
  for (int64_t e = 0; e <= E; ++e) {
    if (offsets[e] != total) return "an offset is wrong";
    if (e < E && counts[e] != want_counts[e]) return "a count is wrong";
    if (e < E) total += counts[e];
  }
  return "";
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (int score = 0; score < 5; ++score) {
    const MoeScore s = static_cast<MoeScore>(score);
    const DType dtype = static_cast<DType>(score % 3);
    cases.push_back({"rules", 11, 24, 4, 4, 2, s, true, false, true, false, false, dtype});
    cases.push_back({"rules", 5, 70, 3, 1, 1, s, false, false, score % 2 == 0, false, false});
    cases.push_back({"replay", 13, 20, 5, 1, 1, s, score % 2 == 0, false, false, false, true, dtype});
  }
  for (const bool biased : {false, true}) {
    cases.push_back({"ties", 9, 40, 7, 5, 3, MoeScore::softmax_topk, true, false, biased, true, false});
    cases.push_back({"ties", 6, 33, 33 > 32 ? 32 : 33, 1, 1, MoeScore::sigmoid_topk, true, false, biased, true, false});
    cases.push_back({"ties", 7, 36, 2, 12, 2, MoeScore::sigmoid_topk, false, true, biased, true, false, DType::bfloat16});
  }
  cases.push_back({"edges", 0, 6, 2, 1, 1, MoeScore::softmax, true, false, false, false, false});
  cases.push_back({"edges", 3, 1, 1, 1, 1, MoeScore::sigmoid, true, false, true, false, false});
  cases.push_back({"edges", 2, 1024, 32, 8, 4, MoeScore::softmax_topk, true, false, true, false, false});
  cases.push_back({"edges", 2, 385, 9, 77, 3, MoeScore::softmax_topk, true, false, false, false, false, DType::float16});
  cases.push_back({"edges", 2, 129, 1, 129, 1, MoeScore::sigmoid_topk, true, false, false, false, false});
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::printf("usage: route_host_test SEED GROUP ...\n");
    return 2;
  }
  Random random(std::strtoull(argv[1], nullptr, 10));
  int wrong = 0;
  for (int i = 2; i < argc; ++i) {
    const std::string group = argv[i];
    int ran = 0;
    for (const Case& c : all_cases()) {
      if (group != c.group) continue;
      const std::string what = run(c, random);
      ++ran;
      if (what.empty()) continue;
      ++wrong;
      std::printf("%s: tokens %lld experts %lld top_k %lld groups %lld of %lld score %d: %s\n", c.group, static_cast<long long>(c.tokens),
                  static_cast<long long>(c.experts), static_cast<long long>(c.top_k), static_cast<long long>(c.top_groups),
                  static_cast<long long>(c.groups), static_cast<int>(c.score), what.c_str());
    }
    std::printf("%s: %d cases\n", group.c_str(), ran);
    if (ran == 0) ++wrong;
  }
  std::printf("%d wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
