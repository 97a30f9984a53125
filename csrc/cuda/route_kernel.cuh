// Routing: experts are chosen from a row of logits and weighed, then the (token, k) slots are sorted by expert. Rules and formulas:
// MATH section 4, reference/moe.py; the backward's are those of csrc/cpu/moe_route.cpp.
//
//   N tokens · E experts (up to 1024) · K experts a token (up to 32) · G groups of E / G neighbouring experts · R rows a tile
//
// A warp works on a row. Lane l holds experts l, l + 32, … in registers, as unsigned keys of the order of what selects: −0 is +0,
// NaN is highest, what is out of the choice is 0. K times the highest key is found, of equal ones the lowest expert; lane k then
// keeps the k-th choice and weighs it. Groups are compared through block-shared memory: a lane scores a group, and a group stays
// when fewer than topk_group groups beat it.
//
// The sort is stable and its result independent of R. route_rows counts each tile's slots by expert (integer atomics, block-shared),
// route_prefix sums an expert's counts over the tiles, and route_order lets one warp place a tile's slots in sequence, 32 at a time:
// a lane's place among equal experts is the number of equal lanes below it. Slots of experts that are not here go to bin E, the last.
//
// The __syncwarp() without a number are those whose loss ThreadSanitizer cannot see on the host, where a reduction or match is a barrier too.
#pragma once
#include <cstdint>

#include "moe.h"
#include "simt.cuh"

namespace tk::cuda {

using simt::block_barrier;
using simt::kFullWarp;
using simt::warp_barrier;

constexpr int kMaxExperts = 1024, kMaxTopK = 32;
constexpr float kTiny = 1e-20f;
constexpr int32_t kNone = -1;

struct RouteTiles {
  int64_t rows;      // R
  int64_t tiles;     // ceil(N / R), at least 1
  uint32_t* counts;  // [E + 1, tiles], then the slots before a tile's own of the same expert
};

struct RouteForwardArgs {
  RouteForwardParams p;
  RouteTiles tiles;
};

// ---- keys and scores

__device__ __forceinline__ uint32_t route_key(float x) {
  if (x != x) return 0xffffffffu;
  x += 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;  // at least the key of −inf, 0x007fffff
}
__device__ __forceinline__ float float_of_key(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

__device__ __forceinline__ float logistic(float z) { return 1.0f / (1.0f + expf(-z)); }
__device__ __forceinline__ float root_soft_plus(float z) {  // e^(z/2) where the logarithm would lose its digits
  return z < -15.0f ? expf(0.5f * z) : sqrtf((z > 0.0f ? z : 0.0f) + log1pf(expf(z > 0.0f ? -z : z)));
}
__device__ __forceinline__ float score_of(MoeScore score, float z) {
  return score == MoeScore::sqrtsoftplus ? root_soft_plus(z) : logistic(z);
}
__device__ __forceinline__ float slope_of(MoeScore score, float z) {  // ds/dz
  if (score != MoeScore::sqrtsoftplus) return logistic(z) * logistic(-z);
  return z < -15.0f ? 0.5f * expf(0.5f * z) : logistic(z) / (2.0f * root_soft_plus(z));
}

// Weights are a softmax of the chosen logits alone.
__device__ __forceinline__ bool softmax_of_chosen(const RouteShape& p) {
  return p.score == MoeScore::softmax_topk || (p.score == MoeScore::softmax && p.renormalize);
}

// ---- a row in a warp: lane l's i-th value is that of expert 32 i + l

template <class Format, int PER>
__device__ __forceinline__ void load_row(const typename Format::Element* row, int experts, float (&z)[PER]) {
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int e = 32 * i + threadIdx.x % 32;
    z[i] = e < experts ? Format::load(row[e]) : -INFINITY;
  }
}

// What turns a logit of the row into its probability, e^(z − peak) / total.
struct Softmax {
  float peak, total;
};

template <int PER>
__device__ __forceinline__ Softmax softmax_of_row(const float (&z)[PER], int experts) {
  uint32_t highest = 0;
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const uint32_t key = 32 * i + static_cast<int>(threadIdx.x % 32) < experts ? route_key(z[i]) : 0;
    highest = key > highest ? key : highest;
  }
  const float peak = float_of_key(__reduce_max_sync(kFullWarp, highest));
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    if (32 * i + static_cast<int>(threadIdx.x % 32) < experts) sum += expf(z[i] - peak);
  }
  return {peak, simt::warp_sum(sum)};
}

// Lane k's choice before scaling, and the sum that the scores were divided by (1: they were not). z: of the choice; here: there is one.
struct Weight {
  float value, divisor;
};

__device__ __forceinline__ Weight weigh(const RouteShape& p, float z, bool here, const Softmax& row) {
  if (softmax_of_chosen(p)) {
    const float peak = float_of_key(__reduce_max_sync(kFullWarp, here ? route_key(z) : 0));
    const float e = here ? expf(z - peak) : 0.0f, total = simt::warp_sum(e);
    return {here ? e / total : 0.0f, 1.0f};
  }
  if (p.score == MoeScore::softmax) return {here ? expf(z - row.peak) / row.total : 0.0f, 1.0f};
  const float s = here ? score_of(p.score, z) : 0.0f;
  if (!p.renormalize) return {s, 1.0f};
  const float total = simt::warp_sum(s) + kTiny;
  return {s / total, total};
}

// ---- groups

// Takes the experts outside the topk_group best groups out of a warp's keys. keys [E]; group_keys [G].
__device__ __forceinline__ void keep_groups(const RouteForwardParams& p, uint32_t* keys, uint32_t* group_keys) {
  const int lane = threadIdx.x % 32, groups = static_cast<int>(p.groups), size = static_cast<int>(p.experts) / groups;
  warp_barrier<1>();  // all keys are there
  for (int g = lane; g < groups; g += 32) {
    uint32_t best = 0, second = 0;
    for (int j = 0, at = g % size; j < size; ++j, at = at + 1 == size ? 0 : at + 1) {  // lanes start apart: banks
      const uint32_t key = keys[g * size + at];
      if (key > best) {
        second = best;
        best = key;
      } else if (key > second) {
        second = key;
      }
    }
    if (!p.group_max && size > 1 && best != 0xffffffffu) best = route_key(float_of_key(best) + float_of_key(second));
    group_keys[g] = best;
  }
  warp_barrier<2>();  // all groups are scored
  for (int g = lane; g < groups; g += 32) {
    const uint32_t mine = group_keys[g];
    int beaten_by = 0;
    for (int other = 0; other < groups; ++other) {
      const uint32_t key = group_keys[other];
      beaten_by += key > mine || (key == mine && other < g);
    }
    if (beaten_by < p.top_groups) continue;
    for (int j = 0, at = g % size; j < size; ++j, at = at + 1 == size ? 0 : at + 1) keys[g * size + at] = 0;
  }
  warp_barrier<3>();  // what is out is out
}

// ---- forward

// One warp's block-shared room, where groups compete.
template <int PER>
struct RouteGroups {
  uint32_t keys[32 * PER];
  uint32_t group_keys[32 * PER];
};

// Lane k's choice; kNone from K on.
template <class Format, int PER>
__device__ __forceinline__ int32_t choose(const RouteForwardParams& p, const float (&z)[PER], const Softmax& row, RouteGroups<PER>& room) {
  const int lane = threadIdx.x % 32, experts = static_cast<int>(p.experts);
  const bool grouped = p.groups > 1 && p.top_groups < p.groups;
  // A score that rises with the logit need not be computed to choose by, unless something is added to it.
  const bool raw = p.score == MoeScore::softmax_topk || p.score == MoeScore::sigmoid_topk;
  const bool by_score = !raw && (p.bias != nullptr || (grouped && !p.group_max));
  uint32_t keys[PER];
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int e = 32 * i + lane;
    float x = z[i];
    if (by_score) x = p.score == MoeScore::softmax ? expf(x - row.peak) / row.total : score_of(p.score, x);
    if (p.bias != nullptr && e < experts) x += p.bias[e];
    keys[i] = e < experts ? route_key(x) : 0;
  }
  if (grouped) {
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      if (32 * i + lane < experts) room.keys[32 * i + lane] = keys[i];
    }
    keep_groups(p, room.keys, room.group_keys);
#pragma unroll
    for (int i = 0; i < PER; ++i) keys[i] = 32 * i + lane < experts ? room.keys[32 * i + lane] : 0;
    __syncwarp(kFullWarp);  // before the next row's keys
  }
  int32_t mine = kNone;
  uint32_t last = 0xffffffffu;  // the expert taken last: out of the choice from then on
  for (int k = 0; k < p.top_k; ++k) {
    uint32_t best = 0, at = 0xffffffffu;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const uint32_t e = 32 * i + lane;
      if (e == last) keys[i] = 0;
      if (keys[i] > best) {
        best = keys[i];
        at = e;
      }
    }
    const uint32_t highest = __reduce_max_sync(kFullWarp, best);
    last = __reduce_min_sync(kFullWarp, best == highest ? at : 0xffffffffu);
    if (lane == k) mine = static_cast<int32_t>(last);
  }
  return mine;
}

template <class Format, int PER, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, PER > 8 ? 4 : 8) route_rows(const RouteForwardArgs args) {
  using Element = typename Format::Element;
  struct Shared {
    uint32_t counts[32 * PER + 1];
    RouteGroups<PER> room[WARPS];
  };
  TK_SHARED(Shared, shared);
  const RouteForwardParams& p = args.p;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, experts = static_cast<int>(p.experts);
  for (int e = threadIdx.x; e <= experts; e += 32 * WARPS) shared.counts[e] = 0;
  block_barrier<4>();

  const bool grouped = p.groups > 1 && p.top_groups < p.groups;
  const bool probabilities = p.score == MoeScore::softmax &&
                             (!p.renormalize || (!p.replay && (p.bias != nullptr || (grouped && !p.group_max))));
  const int64_t first = blockIdx.x * args.tiles.rows;
  const int64_t end = first + args.tiles.rows < p.tokens ? first + args.tiles.rows : p.tokens;
  for (int64_t token = first + warp; token < end; token += WARPS) {
    const Element* logits = static_cast<const Element*>(p.logits) + token * p.stride;  // [E]
    Softmax row{0.0f, 1.0f};
    int32_t mine = kNone;
    if (probabilities || !p.replay) {
      float z[PER];
      load_row<Format>(logits, experts, z);
      if (probabilities) row = softmax_of_row(z, experts);
      if (!p.replay) mine = choose<Format>(p, z, row, shared.room[warp]);
    }
    const int64_t slot = token * p.top_k + lane;
    if (p.replay && lane < p.top_k) mine = p.chosen[slot];
    const bool here = lane < p.top_k && mine >= 0 && mine < experts;
    const float z = here ? Format::load(logits[mine]) : 0.0f;
    const Weight weight = weigh(p, z, here, row);
    if (lane < p.top_k) {
      p.weights[slot] = weight.value * p.scaling;
      if (!p.replay) p.chosen[slot] = mine;
      atomicAdd(&shared.counts[here ? mine : experts], 1u);
    }
  }
  block_barrier<5>();
  for (int e = threadIdx.x; e <= experts; e += 32 * WARPS) args.tiles.counts[e * args.tiles.tiles + blockIdx.x] = shared.counts[e];
}

// A warp an expert, and one for the slots whose expert is not here: its counts over the tiles become sums over the tiles before.
template <int WARPS>
__global__ void __launch_bounds__(32 * WARPS) route_prefix(const RouteForwardArgs args) {
  const int lane = threadIdx.x % 32;
  const int64_t e = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32, tiles = args.tiles.tiles;
  if (e > args.p.experts) return;
  uint32_t* counts = args.tiles.counts + e * tiles;  // [tiles]
  uint32_t before = 0;
  for (int64_t tile = 0; tile < tiles; tile += 32) {
    const uint32_t mine = tile + lane < tiles ? counts[tile + lane] : 0;
    const uint32_t inclusive = simt::warp_inclusive_sum(mine);
    if (tile + lane < tiles) counts[tile + lane] = before + inclusive - mine;
    before += __shfl_sync(kFullWarp, inclusive, 31);
  }
  if (lane == 0 && e < args.p.experts) args.p.counts[e] = static_cast<int32_t>(before);
}

// One warp a tile.
template <int PER>
__global__ void __launch_bounds__(32) route_order(const RouteForwardArgs args) {
  struct Shared {
    uint32_t next[32 * PER + 1];  // where the next slot of an expert goes
  };
  TK_SHARED(Shared, shared);
  const RouteForwardParams& p = args.p;
  const int lane = threadIdx.x, experts = static_cast<int>(p.experts);
  const int64_t tile = blockIdx.x;

  // ---- offsets, and this tile's part of them
  uint32_t offset = 0;
  for (int first = 0; first <= experts; first += 32) {
    const int e = first + lane;
    const uint32_t count = e < experts ? static_cast<uint32_t>(p.counts[e]) : 0;
    const uint32_t inclusive = simt::warp_inclusive_sum(count);
    const uint32_t mine = offset + inclusive - count;
    offset += __shfl_sync(kFullWarp, inclusive, 31);
    if (e > experts) continue;
    shared.next[e] = mine + args.tiles.counts[e * args.tiles.tiles + tile];
    if (tile == 0) p.offsets[e] = static_cast<int32_t>(mine);
  }
  __syncwarp(kFullWarp);  // every expert's place is there

  // ---- slots in sequence
  const int64_t rows_end = (tile + 1) * args.tiles.rows < p.tokens ? (tile + 1) * args.tiles.rows : p.tokens;
  const int64_t end = rows_end * p.top_k;
  for (int64_t slot = tile * args.tiles.rows * p.top_k + lane; slot - lane < end; slot += 32) {
    const bool inside = slot < end;
    const int32_t expert = inside ? p.chosen[slot] : 0;
    const uint32_t bin = !inside ? 0xffffffffu : expert >= 0 && expert < experts ? expert : experts;
    const uint32_t equal = __match_any_sync(kFullWarp, bin), below = equal & ((1u << lane) - 1);
    const uint32_t place = inside ? shared.next[bin] : 0;
    warp_barrier<6>();  // read by all
    if (inside && below == 0) shared.next[bin] = place + static_cast<uint32_t>(__popc(equal));
    if (inside) p.order[place + static_cast<uint32_t>(__popc(below))] = static_cast<int32_t>(slot);
    __syncwarp(kFullWarp);  // written, before the next slots read
  }
}

// ---- backward

template <class Format, int PER, int WARPS>
__global__ void __launch_bounds__(32 * WARPS) route_gradient(const RouteBackwardParams p) {
  using Element = typename Format::Element;
  const int lane = threadIdx.x % 32, experts = static_cast<int>(p.experts);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (token >= p.tokens) return;
  const Element* logits = static_cast<const Element*>(p.logits) + token * p.stride;  // [E]
  const bool dense = p.score == MoeScore::softmax && !p.renormalize;
  const int64_t slot = token * p.top_k + lane;
  const int32_t mine = lane < p.top_k ? p.chosen[slot] : kNone;
  const bool here = mine >= 0 && mine < experts;
  const float d = here ? p.dweights[slot] : 0.0f, z = here ? Format::load(logits[mine]) : 0.0f;

  // ---- lane k's gradient of its choice's logit; of the dense softmax of its probability
  float probability[PER];
  Softmax row{0.0f, 1.0f};
  if (dense) {
    load_row<Format>(logits, experts, probability);
    row = softmax_of_row(probability, experts);
#pragma unroll
    for (int i = 0; i < PER; ++i) probability[i] = expf(probability[i] - row.peak) / row.total;
  }
  const Weight weight = weigh(p, z, here, row);  // w, or s / P, or s
  float g, mean = 0.0f;
  if (dense) {
    g = p.scaling * d;
    mean = simt::warp_sum(weight.value * g);
  } else {
    if (softmax_of_chosen(p) || p.renormalize) mean = simt::warp_sum(weight.value * d);
    const float difference = (d - mean) * p.scaling;
    g = !here ? 0.0f : softmax_of_chosen(p) ? weight.value * difference : difference / weight.divisor * slope_of(p.score, z);
  }

  // ---- every expert's sum over its choices, in k order: given choices may repeat
  float dz[PER];
#pragma unroll
  for (int i = 0; i < PER; ++i) dz[i] = 0.0f;
  for (int k = 0; k < p.top_k; ++k) {
    const int32_t expert = static_cast<int32_t>(__shfl_sync(kFullWarp, static_cast<uint32_t>(mine), k));
    const float add = simt::shuffle(g, k);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      if (expert == 32 * i + lane) dz[i] += add;
    }
  }
  Element* out = static_cast<Element*>(p.dlogits) + token * experts;  // [E]
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int e = 32 * i + lane;
    if (e < experts) out[e] = Format::store(dense ? probability[i] * (dz[i] - mean) : dz[i]);
  }
}

}  // namespace tk::cuda
