// Routing (include/moe.h): a row of logits is scored, chosen from and weighed in one pass, then the slots are sorted by expert.
//
// Rules: MATH section 4, reference/moe.py. Keys are integers in the order of the floats they come from, NaN highest, so that ties go
// to the lower number. Scores that rise with the logit are not needed to choose by: then the logits are the keys, and only the chosen
// scores are computed. The sort counts blocks of rows, so that its result depends on no thread.
//   backward: softmax of the chosen   dz_k = w_k (d_k - sum of w d),  d = scaling dw
//             softmax                 dz_e = p_e (d_e - sum of p d), over all E
//             the others              ds_k = (d_k - sum of d s / P) / P,  P = sum of s + 1e-20 (not renormalised: d_k),  dz = ds s'(z)
// N tokens, E experts, K experts a token, G groups of experts.
#include "moe_kernels.h"
#include "parallel.h"
#include "policy_ops.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kRows = 256;  // of a block
constexpr float kTiny = 1e-20f;

inline int64_t pad(int64_t n) { return (n + W - 1) / W * W; }

inline vi keys_of(vf x) {
  const vi bits = as_int(x + 0.0f);  // -0 is 0
  const vi ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return x != x ? splat((int32_t)0x7fffffff) : ordered;
}
constexpr int32_t kOut = INT32_MIN;  // below every number's key

inline vf root(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#else
  for (int i = 0; i < W; ++i) x[i] = sqrtf(x[i]);
  return x;
#endif
}
inline vf logistic(vf z) { return 1.0f / (1.0f + exp(-z)); }
inline vf soft_plus(vf z) {  // log(1 + e^z) = max(z, 0) + log1p(e^-|z|)
  const vf u = exp(-abs(z)), w = 1.0f + u;
  return max(zero(), z) + (log(w) + (u - (w - 1.0f)) / w);
}
inline vf root_soft_plus(vf z) {  // e^(z/2) where the logarithm would lose its digits
  const vf far = exp(z * 0.5f);
  return z < -15.0f ? far : root(soft_plus(z));
}
inline vf score_of(MoeScore score, vf z) { return score == MoeScore::sqrtsoftplus ? root_soft_plus(z) : logistic(z); }
// ds/dz
inline vf slope_of(MoeScore score, vf z) {
  if (score != MoeScore::sqrtsoftplus) return logistic(z) * logistic(-z);
  const vf far = 0.5f * exp(z * 0.5f);
  return z < -15.0f ? far : logistic(z) / (2.0f * root_soft_plus(z));
}

inline bool chosen_softmax(const RouteShape& p) {
  return p.score == MoeScore::softmax_topk || (p.score == MoeScore::softmax && p.renormalize);
}

inline vi higher(vi a, vi b) {
#if defined(__AVX512F__)
  return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
  return a > b ? a : b;
#endif
}
inline int32_t highest(vi x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)x);
#else
  int32_t top = x[0];
  for (int i = 1; i < W; ++i) top = top > x[i] ? top : x[i];
  return top;
#endif
}
inline vi keys_at(const int32_t* keys) {
  vi x;
  memcpy(&x, keys, sizeof x);
  return x;
}
inline int32_t highest(const int32_t* keys, int64_t n) {  // n a multiple of W
  vi best = splat(kOut);
  for (int64_t i = 0; i < n; i += W) best = higher(best, keys_at(keys + i));
  return highest(best);
}
// The two highest of n keys, a multiple of W.
inline void two_highest(const int32_t* keys, int64_t n, int32_t* best, int32_t* second) {
  vi first = splat(kOut), next = first;  // of each lane
  for (int64_t i = 0; i < n; i += W) {
    const vi x = keys_at(keys + i), low = first < x ? first : x;
    next = higher(next, low), first = higher(first, x);
  }
  *best = highest(first);
  const int32_t lane = __builtin_ctz(bits_of(first == *best));
  *second = highest(lane_index() == lane ? next : first);
}
inline int64_t first_of(const int32_t* keys, int32_t key) {  // which is there
#if defined(__AVX512F__)
  for (int64_t i = 0;; i += W) {
    const __mmask16 found = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(keys + i), _mm512_set1_epi32(key));
    if (found) return i + __builtin_ctz(found);
  }
#else
  int64_t i = 0;
  while (keys[i] != key) ++i;
  return i;
#endif
}
// The k best of n keys, a multiple of W, best first; they become kOut. By whole vectors: a load of one whose lane alone was just
// written waits for that store.
inline void take_best(int32_t* keys, int64_t n, int64_t k, int32_t* out) {
  for (int64_t i = 0; i < k; ++i) {
    const int64_t at = first_of(keys, highest(keys, n));
    out[i] = (int32_t)at;
    int32_t* const near = keys + at / W * W;
    const vi rest = lane_index() == (int32_t)(at % W) ? splat(kOut) : keys_at(near);
    memcpy(near, &rest, sizeof rest);
  }
}

inline float float_of(int32_t key) { return bits_to_float((uint32_t)(key ^ ((key >> 31) & 0x7fffffff))); }

// One thread's room: a row's logits, scores and keys.
struct Room {
  float *z, *s;
  int32_t *keys, *group, *group_keys, *kept;
  float *of_chosen, *of_scores;
  static int64_t floats(int64_t E, int64_t K, int64_t G) { return 4 * pad(E) + 3 * pad(G) + 2 * pad(K) + W; }
  Room(float* at, int64_t E, int64_t K, int64_t G)
      : z(at), s(z + pad(E)), keys((int32_t*)(s + pad(E))), group(keys + pad(E)), group_keys(group + pad(E)), kept(group_keys + pad(G)),
        of_chosen((float*)(kept + 2 * pad(G))), of_scores(of_chosen + pad(K)) {}
};

// softmax of x[0 .. n - 1] into p (which may be x); lanes beyond n become 0.
inline void softmax(const float* x, int64_t n, float* p) {
  vf top = splat(-INFINITY), sum = zero();
  for (int64_t i = 0; i < n; i += W) {
    const vf v = load_n(x + i, (int)(n - i < W ? n - i : W));
    top = max(top, lane_index() < (int32_t)(n - i) ? v : splat(-INFINITY));
  }
  const float m = reduce_max(top);
  for (int64_t i = 0; i < n; i += W) {
    const vf e = exp(load_n(x + i, (int)(n - i < W ? n - i : W)) - m);
    const vf real = lane_index() < (int32_t)(n - i) ? e : zero();
    sum += real;
    store(p + i, real);
  }
  const float total = reduce_add(sum);
  for (int64_t i = 0; i < n; i += W) store(p + i, load(p + i) / total);
}

// The weights of the chosen experts before scaling; the row's logits in z, and for plain softmax its probabilities in s.
inline void weigh(const RouteShape& p, const Room& x, const int32_t* chosen) {
  const int64_t K = p.top_k;
  for (int64_t k = 0; k < pad(K); ++k) x.of_chosen[k] = k < K ? x.z[chosen[k]] : 0;
  if (chosen_softmax(p)) return softmax(x.of_chosen, K, x.of_scores);
  if (p.score == MoeScore::softmax) {
    for (int64_t k = 0; k < pad(K); ++k) x.of_scores[k] = k < K ? x.s[chosen[k]] : 0;
    return;
  }
  vf sum = zero();
  for (int64_t k = 0; k < K; k += W) {
    const vf v = score_of(p.score, load(x.of_chosen + k)), real = lane_index() < (int32_t)(K - k) ? v : zero();
    sum += real;
    store(x.of_scores + k, real);
  }
  if (!p.renormalize) return;
  const float total = reduce_add(sum) + kTiny;
  for (int64_t k = 0; k < K; k += W) store(x.of_scores + k, load(x.of_scores + k) / total);
}

// The choice of one row whose logits lie in x.z.
inline void choose(const RouteForwardParams& p, const Room& x, int32_t* chosen) {
  const int64_t E = p.experts, size = E / p.groups, Ep = pad(E);
  const bool grouped = p.groups > 1 && p.top_groups < p.groups, by_score = p.bias || (grouped && !p.group_max);
  const bool raw = p.score == MoeScore::softmax_topk || p.score == MoeScore::sigmoid_topk;
  if (by_score && !raw && p.score != MoeScore::softmax)
    for (int64_t e = 0; e < E; e += W) store(x.s + e, score_of(p.score, load(x.z + e)));
  const float* from = by_score && !raw ? x.s : x.z;
  for (int64_t e = 0; e < Ep; e += W) {
    vf v = load(from + e);
    if (p.bias) v += load_n(p.bias + e, (int)(E - e < W ? E - e : W));
    const vi keys = lane_index() < (int32_t)(E - e) ? keys_of(v) : splat(kOut);
    memcpy(x.keys + e, &keys, sizeof keys);
  }
  if (grouped) {
    for (int64_t g = 0; g < pad(p.groups); ++g) x.group_keys[g] = kOut;
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t n = pad(size);
      const int32_t* keys = x.keys + g * size;
      if (n > size) {
        for (int64_t e = size; e < n; ++e) x.group[e] = kOut;
        memcpy(x.group, keys, size * sizeof(int32_t));
        keys = x.group;
      }
      int32_t best, second;
      two_highest(keys, n, &best, &second);
      if (!p.group_max && size > 1 && best != 0x7fffffff)
        best = second == 0x7fffffff ? second : keys_of(splat(float_of(best) + float_of(second)))[0];
      x.group_keys[g] = best;
    }
    take_best(x.group_keys, pad(p.groups), p.top_groups, x.kept);
    for (int64_t g = 0; g < p.groups; ++g) {
      bool kept = false;
      for (int64_t i = 0; i < p.top_groups; ++i) kept |= x.kept[i] == g;
      for (int64_t e = g * size; !kept && e < (g + 1) * size; ++e) x.keys[e] = kOut;
    }
  }
  take_best(x.keys, Ep, p.top_k, chosen);
}

template <class S> inline void load_row(const RouteShape& p, int64_t t, float* z) {
  const S* row = (const S*)p.logits + t * p.stride;
  for (int64_t e = 0; e < p.experts; e += W) store(z + e, load_n(row + e, (int)(p.experts - e < W ? p.experts - e : W)));
}

template <class S> void forward(const RouteForwardParams& p) {
  const int64_t N = p.tokens, E = p.experts, K = p.top_k, blocks = (N + kRows - 1) / kRows, room = Room::floats(E, K, p.groups);
  const int threads = N * E < (1 << 13) ? 1 : p.threads;
  Scratch<float> rooms(threads * room);
  Scratch<int32_t> places(blocks * E);  // [block, E]: counts, then where a block's first slot of an expert goes
  const bool grouped = p.groups > 1 && p.top_groups < p.groups;
  const bool probabilities = p.score == MoeScore::softmax && (!p.renormalize || (!p.replay && (p.bias || (grouped && !p.group_max))));
  parallel_for(threads, blocks, [&](int64_t block, int thread) {
    const Room x(rooms + thread * room, E, K, p.groups);
    int32_t* counts = places + block * E;
    memset(counts, 0, E * sizeof(int32_t));
    for (int64_t t = block * kRows; t < (N < (block + 1) * kRows ? N : (block + 1) * kRows); ++t) {
      int32_t* chosen = p.chosen + t * K;
      load_row<S>(p, t, x.z);
      if (probabilities) softmax(x.z, E, x.s);
      if (!p.replay) choose(p, x, chosen);
      weigh(p, x, chosen);
      for (int64_t k = 0; k < K; ++k) {
        p.weights[t * K + k] = x.of_scores[k] * p.scaling;
        ++counts[chosen[k]];
      }
    }
  });
  int32_t total = 0;
  for (int64_t e = 0; e < E; ++e) {
    p.offsets[e] = total;
    for (int64_t b = 0; b < blocks; ++b) {
      const int32_t count = places[b * E + e];
      places[b * E + e] = total;
      total += count;
    }
    p.counts[e] = total - p.offsets[e];
  }
  p.offsets[E] = total;
  parallel_for(threads, blocks, [&](int64_t block, int) {
    int32_t* next = places + block * E;
    const int64_t end = (N < (block + 1) * kRows ? N : (block + 1) * kRows) * K;
    for (int64_t slot = block * kRows * K; slot < end; ++slot) p.order[next[p.chosen[slot]]++] = (int32_t)slot;
  });
}

template <class S> void backward(const RouteBackwardParams& p) {
  const int64_t N = p.tokens, E = p.experts, K = p.top_k, room = Room::floats(E, K, 1);
  const int threads = N * E < (1 << 13) ? 1 : p.threads;
  Scratch<float> rooms(threads * room);
  const bool dense = p.score == MoeScore::softmax && !p.renormalize;
  parallel_for(threads, (N + kRows - 1) / kRows, [&](int64_t block, int thread) {
    const Room x(rooms + thread * room, E, K, 1);
    float* dz = (float*)x.keys;
    for (int64_t t = block * kRows; t < (N < (block + 1) * kRows ? N : (block + 1) * kRows); ++t) {
      const int32_t* chosen = p.chosen + t * K;
      const float* dw = p.dweights + t * K;
      for (int64_t e = 0; e < E; e += W) store(dz + e, zero());
      if (dense) {
        load_row<S>(p, t, x.z);
        softmax(x.z, E, x.s);
        float sum = 0;
        for (int64_t k = 0; k < K; ++k) {
          dz[chosen[k]] += p.scaling * dw[k];
          sum += x.s[chosen[k]] * (p.scaling * dw[k]);
        }
        for (int64_t e = 0; e < E; e += W) store(dz + e, load(x.s + e) * (load(dz + e) - sum));
      } else {
        const S* row = (const S*)p.logits + t * p.stride;
        for (int64_t k = 0; k < K; ++k) x.z[chosen[k]] = to_float(row[chosen[k]]);
        weigh(p, x, chosen);  // of_scores: w, or s / P
        vf sum = zero();
        for (int64_t k = 0; k < K; k += W) sum = fma(load(x.of_scores + k), load_n(dw + k, (int)(K - k < W ? K - k : W)), sum);
        const bool subtract = chosen_softmax(p) || p.renormalize;
        const float mean = subtract ? reduce_add(sum) : 0;
        float total = 1;
        if (!chosen_softmax(p) && p.renormalize) {
          vf s = zero();
          for (int64_t k = 0; k < K; k += W) {
            const vf v = score_of(p.score, load(x.of_chosen + k));
            s += lane_index() < (int32_t)(K - k) ? v : zero();
          }
          total = reduce_add(s) + kTiny;
        }
        for (int64_t k = 0; k < K; k += W) {
          const vf d = (load_n(dw + k, (int)(K - k < W ? K - k : W)) - mean) * p.scaling;
          const vf g = chosen_softmax(p) ? load(x.of_scores + k) * d : d / total * slope_of(p.score, load(x.of_chosen + k));
          float lanes[W];
          store(lanes, g);
          for (int64_t i = k; i < K && i < k + W; ++i) dz[chosen[i]] += lanes[i - k];
        }
      }
      S* to = (S*)p.dlogits + t * E;
      for (int64_t e = 0; e < E; e += W) store_n(to + e, load(dz + e), (int)(E - e < W ? E - e : W));
    }
  });
}

}  // namespace

void route_forward(const RouteForwardParams& p) {
  if (p.dtype == DType::float32) forward<float>(p);
  else if (p.dtype == DType::bfloat16) forward<bf16>(p);
  else forward<f16>(p);
}

void route_backward(const RouteBackwardParams& p) {
  if (p.dtype == DType::float32) backward<float>(p);
  else if (p.dtype == DType::bfloat16) backward<bf16>(p);
  else backward<f16>(p);
}

}  // namespace tk::TK_ISA
