// The grpo kernels on the host shim against plain double loops, for the sanitizers: every form of access, exact-size buffers.
//
//   grpo_host_test SEED GROUP ...       GROUP: logprob, policy, advantages
//
// Prints "GROUP: n cases" and the number of wrong ones; exit code 0: none. Loss formulas are checked against the Python reference
// by tests/test_cuda_grpo_host.py; here two runs must agree bit for bit and the plain rules must come out.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda_kernels.h"
#include "simt.cuh"

namespace {

using Random = std::mt19937_64;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

float normal(Random& random) { return std::normal_distribution<float>()(random); }

bool close(double got, double want, double slack) { return std::fabs(got - want) <= slack * (1 + std::fabs(want)); }

int report(bool fine, const char* what) {
  if (!fine) std::printf("wrong: %s\n", what);
  return fine ? 0 : 1;
}

// ---- logprob

int logprob_case(Random& random, int64_t rows, int64_t v, tk::DType dtype, float softcap, int64_t offset) {
  const int64_t stride = v + 3, size = dtype == tk::DType::float32 ? 4 : 2;
  std::vector<unsigned char> logits(static_cast<std::size_t>((rows * stride + offset) * size)), dlogits(rows * v * size);
  std::vector<double> y(rows * v), lse(rows);
  std::vector<float> logprob(rows), entropy(rows), g(rows), h(rows);
  std::vector<int64_t> target(rows);
  for (int64_t r = 0; r < rows; ++r) {
    target[r] = r % 4 == 3 ? -100 : static_cast<int64_t>(random() % static_cast<uint64_t>(v));
    g[r] = normal(random), h[r] = normal(random);
    for (int64_t c = 0; c < v; ++c) {
      const float x = r % 4 == 3 ? kNan : 3 * normal(random);  // an ignored row is not read
      unsigned char* const to = logits.data() + (r * stride + offset + c) * size;
      if (dtype == tk::DType::float32) {
        std::memcpy(to, &x, 4);
        y[r * v + c] = x;
      } else {
        const bool b = dtype == tk::DType::bfloat16;
        const uint16_t bits = b ? tk::simt::float_to_bfloat16(x) : tk::simt::float_to_float16(x);
        std::memcpy(to, &bits, 2);
        y[r * v + c] = b ? tk::simt::bfloat16_to_float(bits) : tk::simt::float16_to_float(bits);
      }
    }
  }
  tk::LogprobForwardParams f{};
  f.dtype = dtype, f.b = 1, f.s = rows, f.v = v, f.logits = logits.data() + offset * size, f.stride[1] = stride;
  f.target = target.data(), f.ignore_index = -100, f.temperature = 0.8f, f.softcap = softcap;
  f.logprob = logprob.data(), f.entropy = entropy.data(), f.lse = lse.data();
  tk::cuda::logprob_forward(f, 0);
  tk::LogprobBackwardParams b{};
  b.dtype = dtype, b.b = 1, b.s = rows, b.v = v, b.logits = f.logits, b.stride[1] = stride, b.target = f.target;
  b.ignore_index = -100, b.temperature = 0.8f, b.softcap = softcap, b.dlogprob = g.data(), b.dentropy = h.data();
  b.lse = lse.data(), b.entropy = entropy.data(), b.dlogits = dlogits.data();
  tk::cuda::logprob_backward(b, 0);
  bool fine = true;
  const double unit = dtype == tk::DType::float32 ? 3e-6 : dtype == tk::DType::float16 ? 1e-3 : 8e-3;
  for (int64_t r = 0; r < rows; ++r) {
    const bool live = target[r] >= 0;
    double peak = -INFINITY, total = 0, mean = 0;
    std::vector<double> z(v), slope(v, 1.0);
    for (int64_t c = 0; c < v; ++c) {
      const double capped = softcap > 0 ? std::tanh(y[r * v + c] / softcap) : 0;
      z[c] = (softcap > 0 ? softcap * capped : y[r * v + c]) / 0.8f;
      slope[c] = 1 - capped * capped;
      peak = std::fmax(peak, z[c]);
    }
    for (double x : z) total += std::exp(x - peak);
    const double log_sum = peak + std::log(total);
    for (double x : z) mean += std::exp(x - log_sum) * x;
    const double ent = log_sum - mean;
    fine &= live ? close(logprob[r], z[target[r]] - log_sum, 1e-6) && close(entropy[r], ent, 2e-6) && close(lse[r], log_sum, 1e-6)
                 : logprob[r] == 0 && entropy[r] == 0 && lse[r] == 0;
    for (int64_t c = 0; c < v; ++c) {
      const unsigned char* const from = dlogits.data() + (r * v + c) * size;
      uint16_t bits;
      float got;
      if (size == 4) std::memcpy(&got, from, 4);
      else std::memcpy(&bits, from, 2), got = dtype == tk::DType::bfloat16 ? tk::simt::bfloat16_to_float(bits) : tk::simt::float16_to_float(bits);
      const double p = std::exp(z[c] - log_sum);
      const double want = (g[r] * ((c == target[r]) - p) - h[r] * p * (z[c] - log_sum + ent)) * slope[c] / 0.8f;
      fine &= live ? std::fabs(got - want) <= unit * (0.1 + std::fabs(want)) : got == 0;
    }
  }
  return report(fine, "logprob");
}

// ---- policy_loss

struct Results {
  float loss;
  std::vector<float> metrics, dlogprob, dentropy, dref;
};

Results policy(Random random, const tk::policy::Options& options, const std::vector<int64_t>& cu, int64_t length, bool per_token) {
  const int64_t sequences = static_cast<int64_t>(cu.size()) - 1;
  const int64_t tokens = length > 0 ? sequences * length : cu.back();
  std::vector<float> logprob(tokens), old(tokens), ref(tokens), rollout(tokens), entropy(tokens);
  std::vector<float> advantages(per_token ? tokens : sequences);
  std::vector<uint8_t> mask(tokens), top(tokens);
  for (float& a : advantages) a = normal(random);
  for (int64_t i = 0; i < tokens; ++i) {
    mask[i] = random() % 5 != 0, top[i] = random() % 3 != 0;
    logprob[i] = -std::fabs(normal(random));
    old[i] = logprob[i] + 0.2f * normal(random), ref[i] = logprob[i] + 0.2f * normal(random);
    rollout[i] = random() % 7 == 0 ? kNan : old[i] + 0.1f * normal(random);
    entropy[i] = std::fabs(normal(random));
    if (!mask[i]) logprob[i] = old[i] = ref[i] = entropy[i] = kNan;  // never to matter
  }
  Results r{0, std::vector<float>(tk::kPolicyMetrics), std::vector<float>(tokens), std::vector<float>(tokens), std::vector<float>(tokens)};
  tk::PolicyLossCudaParams p{};
  static_cast<tk::policy::Options&>(p) = options;
  p.sequences = sequences, p.length = length, p.tokens = tokens, p.cu_seqlens = length > 0 ? nullptr : cu.data();
  p.logprob = logprob.data(), p.old_logprob = old.data(), p.ref_logprob = ref.data(), p.rollout_logprob = rollout.data();
  p.entropy = entropy.data(), p.advantages = advantages.data(), p.mask = mask.data(), p.top = top.data();
  p.logprob_stride = p.old_logprob_stride = p.ref_logprob_stride = p.rollout_logprob_stride = p.entropy_stride = p.mask_stride = length;
  p.advantages_stride = per_token ? length : 1, p.advantage_per_token = per_token, p.entropy_coef = 0.01;
  p.loss = &r.loss, p.metrics = r.metrics.data(), p.dlogprob = r.dlogprob.data(), p.dentropy = r.dentropy.data();
  p.dref_logprob = r.dref.data();
  p.workspace_bytes = tk::cuda::policy_loss_workspace_bytes(p);
  std::vector<double> workspace(static_cast<std::size_t>((p.workspace_bytes + 7) / 8));
  p.workspace = workspace.data();
  tk::cuda::policy_loss(p, 0);
  return r;
}

int policy_case(Random& random, const tk::policy::Options& options, const std::vector<int64_t>& cu, int64_t length, bool per_token) {
  const Random same = random;
  random.discard(1);
  const Results a = policy(same, options, cu, length, per_token), b = policy(same, options, cu, length, per_token);
  bool fine = std::isfinite(a.loss) && std::memcmp(&a.loss, &b.loss, 4) == 0;
  for (const auto& [x, y] : {std::pair{&a.metrics, &b.metrics}, {&a.dlogprob, &b.dlogprob}, {&a.dentropy, &b.dentropy}, {&a.dref, &b.dref}}) {
    fine &= std::memcmp(x->data(), y->data(), x->size() * 4) == 0;
    if (x != &a.metrics) {
      for (float value : *x) fine &= std::isfinite(value);
    }
  }
  return report(fine, "policy_loss");
}

// ---- group_advantages

int advantages_case(Random& random, int64_t groups, int64_t size, int64_t n, int32_t normalize, bool sum_last) {
  const int64_t R = groups * size;
  std::vector<float> rewards(R * n), weights(n, 1.0f), counts(R, 2.0f), advantages(R);
  std::vector<uint8_t> zero(R);
  std::vector<double> scratch(2 * R);
  std::vector<int64_t> order(R), ends(R);
  for (float& x : rewards) x = random() % 9 == 0 ? kNan : normal(random);
  for (int64_t i = 0; i < size * n; ++i) rewards[i] = 0.1f;
  for (int64_t i = 0; i < R; ++i) order[i] = R - 1 - i, ends[i] = (i / size + 1) * size;
  tk::GroupAdvantagesCudaParams p{};
  p.samples = R, p.rewards_each = n, p.rewards = rewards.data(), p.weights = weights.data(), p.token_counts = counts.data();
  p.normalize = normalize, p.normalize_then_sum = sum_last, p.eps = 1e-6, p.advantages = advantages.data(), p.zero_variance = zero.data();
  p.order = order.data(), p.ends = ends.data(), p.scratch = scratch.data();
  tk::cuda::group_advantages(p, 0);
  bool fine = true;
  double sum = 0;
  for (int64_t i = 0; i < R; ++i) {
    fine &= std::isfinite(advantages[i]) && (i >= size || (advantages[i] == 0 && zero[i] == 1));
    sum += advantages[i];
  }
  if (normalize == 1 && !sum_last) fine &= std::fabs(sum) < 1e-4;  // centred within every group
  std::vector<float> again(R);
  p.order = p.ends = nullptr, p.group_size = size, p.advantages = again.data();  // neighbours: the same groups
  tk::cuda::group_advantages(p, 0);
  for (int64_t i = 0; i < R; ++i) fine &= close(again[i], advantages[i], 1e-6);
  return report(fine, "group_advantages");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::printf("usage: grpo_host_test SEED GROUP ...\n");
    return 2;
  }
  Random random(std::strtoull(argv[1], nullptr, 10));
  int wrong = 0;
  for (int i = 2; i < argc; ++i) {
    const std::string group = argv[i];
    int ran = 0;
    if (group == "logprob") {
      for (const tk::DType dtype : {tk::DType::float32, tk::DType::bfloat16, tk::DType::float16}) {
        for (const int64_t v : {1, 7, 600, 1031}) {
          wrong += logprob_case(random, 4, v, dtype, v == 7 ? 4.0f : 0.0f, v % 3);
          ++ran;
        }
      }
      wrong += logprob_case(random, 1, 20000, tk::DType::bfloat16, 0, 0);  // two pieces backward
      ++ran;
    }
    if (group == "policy") {
      using tk::policy::Form, tk::policy::Kl, tk::policy::Level, tk::policy::Reduction, tk::policy::Rollout;
      for (int form = 0; form < 5; ++form) {
        for (int level = 0; level < (form == 3 ? 1 : 3); ++level) {
          tk::policy::Options o{};
          o.form = Form(form), o.level = Level(level), o.reduction = Reduction((form + level) % 3), o.kl = Kl((form + level) % 4);
          o.rollout = form == 3 ? Rollout::token_mask : Rollout((form + 2 * level) % 5), o.kl_correction = level == 1, o.off_policy = form % 2;
          o.ratio_low = 0.8f, o.ratio_high = 1.2f, o.log_ratio_clamp = 20, o.beta = 0.1f, o.rollout_low = 0.5f, o.rollout_high = 1.5f;
          wrong += policy_case(random, o, {0, 150, 150, 151, 280, 460}, 0, level == 2);
          wrong += policy_case(random, o, {0, 0, 0}, 130, level == 1);
          ran += 2;
        }
      }
    }
    if (group == "advantages") {
      for (int32_t normalize = 0; normalize < 6; ++normalize) {
        wrong += advantages_case(random, 5, 7, 2, normalize, false) + advantages_case(random, 2, 40, 2, normalize, normalize == 0);
        ran += 2;
      }
    }
    std::printf("%s: %d cases\n", group.c_str(), ran);
    if (ran == 0) ++wrong;
  }
  std::printf("%d wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
