// The k largest scores of each row, in ascending order of position.
//
//   N rows · L scores a row · k kept · C pieces of `chunk` scores a long row is cut into
//
// Radix select: a score's bits become an unsigned key of the same order, with −0.0 equal to +0.0 and NaN below −inf. Digits of
// at most 11 bits are decided from the top: a histogram of the next digit over the scores that agree with the digits so far,
// then a scan from the highest bin down to the one that holds the k-th largest. After the last digit (or as soon as a bin is
// kept whole) every score above the decided prefix is kept, and of those equal to it the `need` first ones. A prefix sum over
// the row in order of position then places each kept score: with G scores above and E equal before it, its slot is
// G + min(E, need). Nothing depends on the order in which threads run: the histogram's atomics add integers.
//
// One block works on one row, or on one piece of it. A long row with too few rows to fill the GPU is cut into C pieces; each
// yields its own k (any score among the row's k largest is among its piece's), and a second launch selects among the candidates
// [C·k], which stand in order of position, so that ties again go to the lower index. The result is the same either way.
#pragma once
#include <cstdint>

#include "simt.cuh"

namespace tk::cuda {

using simt::block_barrier;
using simt::kFullWarp;

// A floating-point format as its bits: the kernel compares keys and copies bits, it does no arithmetic on scores.
struct Float32 {
  using Bits = uint32_t;
  static constexpr uint32_t bits = 32, inf = 0x7f800000u;
};
struct Bfloat16 {
  using Bits = uint16_t;
  static constexpr uint32_t bits = 16, inf = 0x7f80u;
};
struct Float16 {
  using Bits = uint16_t;
  static constexpr uint32_t bits = 16, inf = 0x7c00u;
};

struct TopkArgs {
  const void* scores;      // [N, L]; of the second launch [N, C·k] candidates
  const int32_t* source;   // [N, C·k] each candidate's position in its row; null: scores are the rows themselves
  const int32_t* lengths;  // [N] or null
  void* values;            // [N, C, k]; of the only or second launch [N, k], null: not wanted
  int32_t* indices;        // [N, C, k]; of the only or second launch [N, k]
  int64_t row_stride;      // of scores and source, in elements
  int64_t length;          // L
  int64_t chunk;           // scores a piece; L when the row is in one piece
  int64_t pieces;          // blocks a row: C, or 1
  int64_t k;
};

constexpr int kDigitBits = 11;  // float32 in three passes, 16-bit formats in two; the histogram takes 8 KiB
constexpr int kBins = 1 << kDigitBits;
constexpr int kItems = 4;       // scores a thread places per tile: independent loads in flight

template <int THREADS>
struct TopkShared {
  uint32_t histogram[kBins];
  uint32_t warp_total[2][THREADS / 32];  // used in turn: the next tile's sum starts while this one is read
  uint32_t digit, need, count;
};

// Larger score, larger key; NaN is 0, below the key of −inf.
template <class Format>
__device__ __forceinline__ uint32_t order_key(typename Format::Bits score) {
  constexpr uint32_t sign = 1u << (Format::bits - 1);
  constexpr uint32_t all = sign | (sign - 1);
  const uint32_t magnitude = score & (sign - 1);
  if (magnitude > Format::inf) return 0;
  if (magnitude == 0) return sign;
  return score & sign ? ~static_cast<uint32_t>(score) & all : score | sign;
}

// Calls visit(score) for every score of a row, in no particular order, sixteen bytes at a time where aligned.
template <int THREADS, class Bits, class Visit>
__device__ __forceinline__ void for_each_score(const Bits* row, int64_t valid, Visit visit) {
  constexpr int kVector = 16 / sizeof(Bits);
  struct alignas(16) Vector {
    Bits score[kVector];
  };
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(Bits));
  int64_t head = misaligned == 0 ? 0 : kVector - misaligned;
  if (head > valid) head = valid;
  const int64_t vectors = (valid - head) / kVector;
  const int64_t tail = head + vectors * kVector;
  if (threadIdx.x < head) visit(row[threadIdx.x]);
  const Vector* aligned = reinterpret_cast<const Vector*>(row + head);
  for (int64_t i = threadIdx.x; i < vectors; i += THREADS) {
    const Vector vector = aligned[i];
#pragma unroll
    for (int j = 0; j < kVector; ++j) visit(vector.score[j]);
  }
  if (tail + threadIdx.x < valid) visit(row[tail + threadIdx.x]);
}

// The sum of `value` over the warps before this one, and over all; `value` is the same in all lanes.
// `turn` alternates between calls that no other barrier separates.
template <int THREADS>
__device__ __forceinline__ uint32_t sum_of_warps_before(TopkShared<THREADS>& shared, uint32_t value, int turn, uint32_t& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) shared.warp_total[turn][warp] = value;
  block_barrier<1>();
  const uint32_t mine = lane < THREADS / 32 ? shared.warp_total[turn][lane] : 0;
  const uint32_t inclusive = simt::warp_inclusive_sum(mine);
  total = __shfl_sync(kFullWarp, inclusive, 31);
  return __shfl_sync(kFullWarp, inclusive - mine, warp);
}

// Which scores are kept: those whose masked key is above prefix, and the first `need` of those equal to it.
struct Threshold {
  uint32_t prefix, mask, need;
};

template <class Format, int THREADS>
__device__ __forceinline__ Threshold find_threshold(TopkShared<THREADS>& shared, const typename Format::Bits* row,
                                                    int64_t valid, int64_t k) {
  Threshold threshold{0, 0, static_cast<uint32_t>(k)};
  if (valid <= k) return threshold;  // an empty mask: all scores are equal and the first k are kept
  constexpr int kBinsPerThread = kBins / THREADS;
  for (int low = Format::bits; low > 0;) {
    const int width = low < kDigitBits ? low : kDigitBits;
    low -= width;
    const uint32_t digit_mask = (1u << width) - 1;

    // ---- histogram of the digit, over scores that agree with the prefix
    for (int bin = threadIdx.x; bin < kBins; bin += THREADS) shared.histogram[bin] = 0;
    block_barrier<2>();
    for_each_score<THREADS>(row, valid, [&](typename Format::Bits score) {
      const uint32_t key = order_key<Format>(score);
      if ((key & threshold.mask) == threshold.prefix) atomicAdd(&shared.histogram[(key >> low) & digit_mask], 1u);
    });
    block_barrier<3>();

    // ---- the bin that holds the need-th largest: thread 0 owns the highest bins
    const int highest = kBins - 1 - threadIdx.x * kBinsPerThread;
    uint32_t mine = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) mine += shared.histogram[highest - i];
    const uint32_t inclusive = simt::warp_inclusive_sum(mine);
    uint32_t total;
    const uint32_t of_warp = __shfl_sync(kFullWarp, inclusive, 31);
    uint32_t above = sum_of_warps_before<THREADS>(shared, of_warp, 0, total) + inclusive - mine;
    if (above < threshold.need && threshold.need <= above + mine) {
      int bin = highest;
      while (above + shared.histogram[bin] < threshold.need) above += shared.histogram[bin--];
      shared.digit = bin;
      shared.need = threshold.need - above;
      shared.count = shared.histogram[bin];
    }
    block_barrier<4>();
    threshold.prefix |= shared.digit << low;
    threshold.mask |= digit_mask << low;
    threshold.need = shared.need;
    if (shared.count == threshold.need) break;  // the whole bin is kept: lower digits decide nothing
  }
  return threshold;
}

template <class Format, int THREADS>
__global__ void __launch_bounds__(THREADS) topk_rows(const TopkArgs args) {
  using Bits = typename Format::Bits;
  static_assert(THREADS % 32 == 0 && THREADS <= 1024 && kBins % THREADS == 0);
  TK_SHARED(TopkShared<THREADS>, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // ---- this block's row and piece
  const int64_t row = blockIdx.x / args.pieces, piece = blockIdx.x % args.pieces;
  int64_t valid = args.length;
  if (args.lengths != nullptr) {
    const int64_t given = args.lengths[row];
    valid = given < 0 ? 0 : given < valid ? given : valid;
  }
  const int64_t start = piece * args.chunk;
  if (args.source != nullptr) {
    // Full pieces left k candidates each, the last one what it had: together a dense prefix of [C·k].
    const int64_t rest = valid % args.chunk;
    valid = valid / args.chunk * args.k + (rest < args.k ? rest : args.k);
  } else {
    valid = valid - start < 0 ? 0 : valid - start < args.chunk ? valid - start : args.chunk;
  }
  const Bits* scores = static_cast<const Bits*>(args.scores) + row * args.row_stride + start;  // [valid]
  const int32_t* source = args.source == nullptr ? nullptr : args.source + row * args.row_stride;  // [valid]
  const int64_t out = static_cast<int64_t>(blockIdx.x) * args.k;
  Bits* values = args.values == nullptr ? nullptr : static_cast<Bits*>(args.values) + out;  // [k]
  int32_t* indices = args.indices + out;                                                    // [k]

  const Threshold threshold = find_threshold<Format, THREADS>(shared, scores, valid, args.k);

  // ---- place the kept scores, tile by tile; warp w owns the w-th run of 32·kItems scores of a tile
  constexpr int kTile = THREADS * kItems;
  static_assert(kTile < 1 << 16, "two counts of a tile travel in one word");
  const uint32_t lanes_below = (1u << lane) - 1;
  uint32_t above = 0, equal = 0, kept = 0;  // in the tiles so far
  int turn = 0;
  for (int64_t tile = 0; tile < valid && kept < args.k; tile += kTile) {
    const int64_t first = tile + warp * 32 * kItems + lane;
    Bits score[kItems];
    uint32_t is_above[kItems], is_equal[kItems];  // one bit a lane
    uint32_t count = 0;                           // of the warp's run: above in the high half, equal in the low
#pragma unroll
    for (int i = 0; i < kItems; ++i) score[i] = first + 32 * i < valid ? scores[first + 32 * i] : Bits{0};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool inside = first + 32 * i < valid;
      const uint32_t key = order_key<Format>(score[i]) & threshold.mask;
      is_above[i] = __ballot_sync(kFullWarp, inside && key > threshold.prefix);
      is_equal[i] = __ballot_sync(kFullWarp, inside && key == threshold.prefix);
      count += static_cast<uint32_t>(__popc(is_above[i])) << 16 | static_cast<uint32_t>(__popc(is_equal[i]));
    }
    uint32_t total;
    const uint32_t before = sum_of_warps_before<THREADS>(shared, count, turn, total);
    turn ^= 1;
    uint32_t run_above = above + (before >> 16), run_equal = equal + (before & 0xffffu);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t my_above = run_above + __popc(is_above[i] & lanes_below);
      const uint32_t my_equal = run_equal + __popc(is_equal[i] & lanes_below);
      if ((is_above[i] >> lane & 1) || ((is_equal[i] >> lane & 1) && my_equal < threshold.need)) {
        const uint32_t slot = my_above + (my_equal < threshold.need ? my_equal : threshold.need);
        const int64_t position = first + 32 * i;
        indices[slot] = source == nullptr ? static_cast<int32_t>(start + position) : source[position];
        if (values != nullptr) values[slot] = score[i];
      }
      run_above += __popc(is_above[i]);
      run_equal += __popc(is_equal[i]);
    }
    above += total >> 16;
    equal += total & 0xffffu;
    kept = above + (equal < threshold.need ? equal : threshold.need);
  }

  // ---- unused slots
  constexpr Bits minus_inf = static_cast<Bits>(1u << (Format::bits - 1) | Format::inf);
  for (int64_t slot = kept + threadIdx.x; slot < args.k; slot += THREADS) {
    indices[slot] = -1;
    if (values != nullptr) values[slot] = minus_inf;
  }
}

}  // namespace tk::cuda
