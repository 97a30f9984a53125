// logprob from given logits: log-probability of the target and entropy, forward and backward. Formulas: csrc/cpu/grpo.cpp.
//
//   N = B·S rows · V vocabulary
//
// Forward: one block reads one row once. Thread t takes columns t·E, t·E + 1, … of every stretch of THREADS·E (E elements are
// sixteen bytes) and keeps max, sum and entropy sum online; the block merges the threads' in a fixed order. Which columns a thread
// takes depends on nothing but V, so neither does a bit of the result; a misaligned row only loads element by element.
// Backward: one block fills one piece of kPiece columns of one row. Rows whose target is ignored are not read.
#pragma once
#include "grpo.h"
#include "simt.cuh"

namespace tk::cuda {

constexpr int64_t kPiece = 16384;
constexpr float kLog2E = 1.44269504088896341f;

// exp by the hardware's exp2: off by up to |x| ulp, of a weight that is then e^x small.
__device__ __forceinline__ float weight_of(float x) { return exp2f(x * kLog2E); }

// E elements from column `first` on, as z; -inf past the end. capped: tanh(y / c) of each, with a softcap.
template <class Format, int E>
__device__ __forceinline__ void load_logits(const typename Format::Element* row, int64_t first, int64_t v, bool aligned,
                                            float inverse_temperature, float softcap, float (&z)[E], float (&capped)[E]) {
  using Element = typename Format::Element;
  struct alignas(16) Vector {
    Element x[E];
  };
  Vector vector;
  if (aligned && first + E <= v) {
    vector = *reinterpret_cast<const Vector*>(row + first);
  } else {
#pragma unroll
    for (int i = 0; i < E; ++i) vector.x[i] = first + i < v ? row[first + i] : Element{};
  }
#pragma unroll
  for (int i = 0; i < E; ++i) {
    float y = Format::load(vector.x[i]);
    capped[i] = 0.0f;
    if (softcap > 0) {
      capped[i] = tanhf(y / softcap);
      y = softcap * capped[i];
    }
    z[i] = first + i < v ? y * inverse_temperature : -INFINITY;
  }
}

// Over some columns of a row: the largest z, Σ exp(z − peak), Σ exp(z − peak)·(z − peak).
struct SoftmaxSums {
  double total, moment;
  float peak, unused;
};

__device__ __forceinline__ SoftmaxSums merge(const SoftmaxSums& a, const SoftmaxSums& b) {
  SoftmaxSums all{0, 0, b.peak > a.peak ? b.peak : a.peak, 0};
  const float base = all.peak == -INFINITY ? 0.0f : all.peak;
  const double lift_a = a.peak == -INFINITY ? 0.0 : static_cast<double>(a.peak) - base;
  const double lift_b = b.peak == -INFINITY ? 0.0 : static_cast<double>(b.peak) - base;
  const double decay_a = exp(lift_a), decay_b = exp(lift_b);
  all.total = decay_a * a.total + decay_b * b.total;
  all.moment = decay_a * (a.moment + lift_a * a.total) + decay_b * (b.moment + lift_b * b.total);
  return all;
}

template <class Args>
__device__ __forceinline__ const void* row_of(const Args& args, int64_t row, int64_t element_size) {
  const int64_t at = row / args.s * args.stride[0] + row % args.s * args.stride[1];
  return static_cast<const char*>(args.logits) + at * element_size;
}

template <class Args>
__device__ __forceinline__ bool counts(const Args& args, int64_t target) {
  return target >= 0 && target < args.v && target != args.ignore_index;
}

template <class Format, int THREADS>
__global__ void __launch_bounds__(THREADS) logprob_rows(const LogprobForwardParams args) {
  using Element = typename Format::Element;
  constexpr int E = 16 / sizeof(Element);
  struct Shared {
    SoftmaxSums slots[THREADS / 32];
  };
  TK_SHARED(Shared, shared);
  const int64_t row = blockIdx.x, target = args.target[row];
  if (!counts(args, target)) {
    if (threadIdx.x == 0) {
      args.logprob[row] = 0.0f;
      args.lse[row] = 0.0;
      if (args.entropy != nullptr) args.entropy[row] = 0.0f;
    }
    return;
  }
  const Element* logits = static_cast<const Element*>(row_of(args, row, sizeof(Element)));  // [V]
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  const float inverse_temperature = 1.0f / args.temperature;
  float peak = -INFINITY, total = 0.0f, moment = 0.0f;
  float z[E], capped[E];
  for (int64_t first = static_cast<int64_t>(threadIdx.x) * E; first < args.v; first += THREADS * E) {
    load_logits<Format, E>(logits, first, args.v, aligned, inverse_temperature, args.softcap, z, capped);
    float highest = peak;
#pragma unroll
    for (int i = 0; i < E; ++i) highest = z[i] > highest ? z[i] : highest;
    if (highest == -INFINITY) highest = 0.0f;  // nothing to see yet: any base will do
    if (highest > peak && peak > -INFINITY) {
      const float lift = peak - highest, decay = weight_of(lift);
      moment = decay * (moment + lift * total);
      total *= decay;
    }
    float sum = 0.0f, product = 0.0f;
#pragma unroll
    for (int i = 0; i < E; ++i) {
      const float shifted = z[i] - highest, weight = weight_of(shifted);
      sum += weight;
      product += weight > 0 ? weight * shifted : weight;
    }
    total += sum;
    moment += product;
    peak = total > 0 ? highest : total == 0 ? -INFINITY : highest;  // NaN: stays NaN through the sums
  }
  const SoftmaxSums all = simt::block_merge<THREADS>(
      shared.slots, SoftmaxSums{total, moment, peak, 0}, [](const SoftmaxSums& a, const SoftmaxSums& b) { return merge(a, b); });
  if (threadIdx.x != 0) return;
  float chosen = Format::load(logits[target]);
  if (args.softcap > 0) chosen = args.softcap * tanhf(chosen / args.softcap);
  chosen *= inverse_temperature;
  const double log_total = log(all.total);
  args.logprob[row] = static_cast<float>(static_cast<double>(chosen) - all.peak - log_total);
  args.lse[row] = all.peak + log_total;
  if (args.entropy != nullptr) args.entropy[row] = static_cast<float>(log_total - all.moment / all.total);
}

template <class Format, int THREADS>
__global__ void __launch_bounds__(THREADS) logprob_gradient(const LogprobBackwardParams args) {
  using Element = typename Format::Element;
  constexpr int E = 16 / sizeof(Element);
  struct alignas(16) Vector {
    Element x[E];
  };
  const int64_t pieces = (args.v + kPiece - 1) / kPiece;
  const int64_t row = blockIdx.x / pieces, start = blockIdx.x % pieces * kPiece;
  const int64_t end = start + kPiece < args.v ? start + kPiece : args.v;
  const int64_t target = args.target[row];
  const bool live = counts(args, target);
  const Element* logits = static_cast<const Element*>(row_of(args, row, sizeof(Element)));  // [V]
  Element* out = static_cast<Element*>(args.dlogits) + row * args.v;                       // [V]
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0, out_aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const float inverse_temperature = 1.0f / args.temperature;
  const double lse64 = live ? args.lse[row] : 0.0;
  const float lse = static_cast<float>(lse64), lse_rest = static_cast<float>(lse64 - lse);
  const float g = live ? args.dlogprob[row] : 0.0f;
  const bool with_entropy = live && args.dentropy != nullptr;
  const float g_entropy = with_entropy ? args.dentropy[row] : 0.0f, entropy = with_entropy ? args.entropy[row] : 0.0f;
  float z[E], capped[E];
  for (int64_t first = start + static_cast<int64_t>(threadIdx.x) * E; first < end; first += THREADS * E) {
    Vector vector{};
    if (live) {
      load_logits<Format, E>(logits, first, args.v, aligned, inverse_temperature, args.softcap, z, capped);
#pragma unroll
      for (int i = 0; i < E; ++i) {
        const float log_p = (z[i] - lse) - lse_rest, p = weight_of(log_p);
        float dz = g * (first + i == target ? 1.0f - p : -p);
        if (with_entropy) dz -= g_entropy * p * ((log_p < -1e30f ? -1e30f : log_p) + entropy);  // p·log p is 0 where p is
        vector.x[i] = Format::store(dz * (1.0f - capped[i] * capped[i]) * inverse_temperature);
      }
    }
    if (out_aligned && first + E <= args.v) {
      *reinterpret_cast<Vector*>(out + first) = vector;
    } else {
#pragma unroll
      for (int i = 0; i < E; ++i) {
        if (first + i < args.v) out[first + i] = vector.x[i];
      }
    }
  }
}

}  // namespace tk::cuda
