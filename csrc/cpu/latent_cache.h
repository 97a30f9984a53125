// Cached latents: where a token lies, and how its values are read and written. Layout: csrc/include/mla.h.
//
// D values of a token. e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f is NaN, there is no infinity.
#pragma once

#include "mla.h"
#include "simd/gemm.h"

namespace tk::TK_ISA {

struct fp8 { uint8_t bits; };  // a byte of a quantised token

template <class A, class B> inline constexpr bool same_type = false;
template <class A> inline constexpr bool same_type<A, A> = true;

inline constexpr int64_t kLatent = 512, kRope = 64, kGroup = 128;  // values: quantised, in bfloat16, sharing one scale
inline constexpr int64_t kScalesAt = kLatent, kRopeAt = kLatent + 4 * (kLatent / kGroup), kTokenBytes = kRopeAt + 2 * kRope;

// The tokens of all sequences, those of a shared prefix first.
template <class Kv> struct Tokens {
  const LatentCacheParams& p;
  const Kv* kv;
  const Kv* prefix = nullptr;
  const MlaDecodeParams* shared = nullptr;  // with prefix
  int64_t prefix_length = 0;

  int64_t count(int64_t b) const { return prefix_length + p.seqlens[b]; }
  const Kv* row(int64_t b, int64_t j) const {
    if (j < prefix_length) return place(prefix, shared->prefix_stride, shared->prefix_table, shared->prefix_page_size, 0, j);
    return place(kv, p.kv_stride, p.block_table ? p.block_table + b * p.max_pages : nullptr, p.page_size, b, j - prefix_length);
  }
  // Tokens from j on, of those before `end`, that lie at the constant stride of step(j).
  int64_t run(int64_t j, int64_t end) const {
    int64_t page = p.block_table ? p.page_size : 0;
    if (j < prefix_length) end = least(end, prefix_length), page = shared->prefix_table ? shared->prefix_page_size : 0;
    else j -= prefix_length, end -= prefix_length;
    return page ? least(end - j, page - j % page) : end - j;
  }
  int64_t step(int64_t j) const { return j < prefix_length ? shared->prefix_stride[1] : p.kv_stride[1]; }

 private:
  static const Kv* place(const Kv* base, const int64_t* stride, const int32_t* table, int64_t page, int64_t b, int64_t j) {
    if (!table) return base + b * stride[0] + j * stride[1];
    return base + table[j / page] * stride[0] + j % page * stride[1];
  }
};

// Tokens of a sequence on their way into L2, in order, while others are worked on: kStreams places of kLine tokens at once, since
// the memory delivers several streams a core faster than one.
template <class Kv> class Ahead {
 public:
  static constexpr int64_t kStreams = 4, kRows = 8;  // rows of a stream before the next kStreams * kRows tokens
  Ahead() = default;
  Ahead(const Tokens<Kv>& tokens, int64_t b, int64_t first, int64_t n, int64_t values)
      : tokens_(&tokens), b_(b), first_(first), n_(n), bytes_(values * (int64_t)sizeof(Kv)) {
    left_ = (n + kStreams * kRows - 1) / (kStreams * kRows) * kRows;
    if (left_) place();
  }
  // So that everything is fetched in `calls` calls of beat(), each of which takes some lines of every stream.
  void spread(int64_t calls) { rate_ = left_ * ((bytes_ + 63) / 64) / (calls + 1) + 1; }
  __attribute__((always_inline)) void beat() {
    for (int64_t i = 0; i < rate_ && left_; ++i) {
#pragma GCC unroll 4
      for (int u = 0; u < kStreams; ++u) __builtin_prefetch(at_[u] + done_, 0, 2);
      if (__builtin_expect((done_ += 64) >= bytes_, 0)) {
        done_ = 0, ++row_;
        if (--left_) place();
      }
    }
  }

 private:
  void place() {
    const int64_t from = row_ / kRows * (kStreams * kRows) + row_ % kRows;
    for (int u = 0; u < kStreams; ++u) at_[u] = (const char*)tokens_->row(b_, first_ + least(n_ - 1, from + u * kRows));
  }
  const Tokens<Kv>* tokens_ = nullptr;
  int64_t b_ = 0, first_ = 0, n_ = 0, bytes_ = 0, left_ = 0, row_ = 0, done_ = 0, rate_ = 1;
  const char* at_[kStreams] = {};
};

// ---- reading: one token into T

template <class S> inline void read_latent(const S* row, int64_t D, float* to) {
  for (int64_t d = 0; d < D; d += W) store_n(to + d, load_n(row + d, (int)(D - d)), (int)(D - d));
}
inline void read_latent(const bf16* row, int64_t D, bf16* to) { memcpy((void*)to, row, D * sizeof(bf16)); }
inline void read_latent(const f16* row, int64_t D, f16* to) { memcpy((void*)to, row, D * sizeof(f16)); }

// W values of e4m3.
inline vf load_e4m3(const uint8_t* p) {
  typedef uint8_t vb __attribute__((vector_size(W)));
  vb bytes;
  memcpy(&bytes, p, W);
  const vi x = __builtin_convertvector(bytes, vi), magnitude = x & 0x7f;
  const vf normal = as_float((magnitude << 20) + (120 << 23)), tiny = __builtin_convertvector(magnitude, vf) * 0x1p-9f;
  vi value = as_int(select(magnitude < 8, tiny, normal));
  value = magnitude == 0x7f ? splat((int32_t)0x7fc00000) : value;
  return as_float(value | (x & 0x80) << 24);
}
// A group of kGroup values.
template <class T> inline void read_group(const uint8_t* x, float scale, T* to) {
  for (int64_t d = 0; d < kGroup; d += W) store(to + d, load_e4m3(x + d) * scale);
}
#if defined(__AVX512BW__)
inline void put_words(bf16* to, __m512i x) { _mm512_storeu_si512(to, x); }
inline void put_words(float* to, __m512i x) {
  _mm512_storeu_si512(to, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)), 16));
  _mm512_storeu_si512(to + 16, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1)), 16));
}
// The same in integers, 32 values of bfloat16 at a time: three bits of mantissa times a power of two. False, and nothing done,
// where the scale is none, a result would not be a normal number, or there is a NaN.
template <class T> inline bool read_group_fast(const uint8_t* x, float scale, T* to) {
  const uint32_t bits = float_to_bits(scale);
  const int32_t power = (int32_t)(bits >> 23) - 127;
  if ((bits & 0x807fffff) != 0 || power < -117 || power > 119) return false;
  const __m512i low7 = _mm512_set1_epi8(0x7f), eight = _mm512_set1_epi8(8), most = _mm512_set1_epi8(0x7e - 8);
  const __m512i first = _mm512_and_si512(_mm512_loadu_si512(x), low7), second = _mm512_and_si512(_mm512_loadu_si512(x + 64), low7);
  const __m512i shift = _mm512_set1_epi16((int16_t)(power * 128)), offset = _mm512_add_epi16(shift, _mm512_set1_epi16(120 * 128));
  // No exponent 0 (below eight), no NaN: nearly always, and half the work.
  if (!(_mm512_cmpgt_epu8_mask(_mm512_sub_epi8(first, eight), most) | _mm512_cmpgt_epu8_mask(_mm512_sub_epi8(second, eight), most))) {
    const __m512i kept = _mm512_set1_epi16((int16_t)0x87f0);
#pragma GCC unroll 4
    for (int64_t d = 0; d < kGroup; d += 32) {
      const __m512i word = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(x + d)));
      put_words(to + d, _mm512_add_epi16(_mm512_and_si512(_mm512_slli_epi16(word, 4), kept), offset));
    }
    return true;
  }
  if (_mm512_cmpeq_epi8_mask(first, low7) | _mm512_cmpeq_epi8_mask(second, low7)) return false;
  // Exponent 0: m 2^-9.
  const __m512i tiny = _mm512_mask_add_epi16(
      _mm512_setzero_si512(), 0xfe,
      _mm512_castsi128_si512(_mm_setr_epi16(0, 118 * 128, 119 * 128, 119 * 128 + 64, 120 * 128, 120 * 128 + 32, 120 * 128 + 64, 120 * 128 + 96)), shift);
#pragma GCC unroll 4
  for (int64_t d = 0; d < kGroup; d += 32) {
    const __m512i word = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(x + d)));
    const __m512i magnitude = _mm512_and_si512(word, _mm512_set1_epi16(0x7f));
    __m512i value = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), offset);
    value = _mm512_mask_permutexvar_epi16(value, _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8)), magnitude, tiny);
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(word, 8), _mm512_set1_epi16((int16_t)0x8000));
    put_words(to + d, _mm512_or_si512(value, sign));
  }
  return true;
}
#else
template <class T> inline bool read_group_fast(const uint8_t*, float, T*) { return false; }
#endif
template <class T> inline void read_quantised(const fp8* row, T* to) {
  for (int64_t g = 0; g < kLatent / kGroup; ++g) {
    float scale;
    memcpy(&scale, row + kScalesAt + 4 * g, 4);
    const uint8_t* x = (const uint8_t*)row + g * kGroup;
    if (!read_group_fast(x, scale, to + g * kGroup)) read_group(x, scale, to + g * kGroup);
  }
  read_latent((const bf16*)(row + kRopeAt), kRope, to + kLatent);
}
inline void read_latent(const fp8* row, int64_t, float* to) { read_quantised(row, to); }
inline void read_latent(const fp8* row, int64_t, bf16* to) { read_quantised(row, to); }

// ---- writing

// The byte of e4m3 in each lane, rounded to nearest even; what is larger than 448 becomes 448, NaN stays NaN.
inline vi to_e4m3(vf x) {
  const vi bits = as_int(x), a = as_int(min(abs(x), splat(448.0f)));
  const vi tiny = as_int(as_float(a) + 0x1p14f) - (141 << 23);  // adding 2^14 rounds at 2^-9
  const vi normal = (a - (120 << 23) + 0x7ffff + ((a >> 20) & 1)) >> 20;
  vi value = a < (121 << 23) ? tiny : normal;
  value = x != x ? splat((int32_t)0x7f) : value;
  return value | ((bits >> 24) & 0x80);
}
// 2^ceil(log2(max(amax / 448, 1e-4)))
inline float e4m3_scale(float amax) {
  float x = amax / 448.0f;
  x = x < 1e-4f ? 1e-4f : x;
  const uint32_t bits = float_to_bits(x);
  if (bits >= 0x7f800000) return 1.0f;  // infinite or NaN: the group holds such a value
  return bits_to_float((bits + 0x7fffff) & 0x7f800000);
}
template <class S> inline void write_latent(const S* latent, const S* rope, int64_t, int64_t, fp8* row) {
  for (int64_t g = 0; g < kLatent / kGroup; ++g) {
    const S* x = latent + g * kGroup;
    vf top = zero();
    for (int64_t d = 0; d < kGroup; d += W) {
      const vf a = abs(load(x + d));
      top = (a > top) | (a != a) ? a : top;  // a NaN comes in and stays
    }
    float amax = top[0];
    for (int i = 1; i < W; ++i) amax = top[i] > amax || top[i] != top[i] ? top[i] : amax;
    const float scale = e4m3_scale(amax), inverse = 1.0f / scale;
    memcpy((void*)(row + kScalesAt + 4 * g), &scale, 4);
    for (int64_t d = 0; d < kGroup; d += W) {
      typedef uint8_t vb __attribute__((vector_size(W)));
      const vb bytes = __builtin_convertvector((vu)to_e4m3(load(x + d) * inverse), vb);
      memcpy((void*)(row + g * kGroup + d), &bytes, W);
    }
  }
  for (int64_t d = 0; d < kRope; d += W) store((bf16*)(row + kRopeAt) + d, load(rope + d));
}
template <class S, class Kv> inline void convert(const S* from, int64_t count, Kv* to) {
  for (int64_t d = 0; d < count; d += W) store_n(to + d, load_n(from + d, (int)(count - d)), (int)(count - d));
}
template <class S, class Kv> inline void write_latent(const S* latent, const S* rope, int64_t latent_dim, int64_t rope_dim, Kv* row) {
  if constexpr (same_type<S, Kv>) {  // as they are, NaN bits too
    memcpy((void*)row, latent, latent_dim * sizeof(S));
    memcpy((void*)(row + latent_dim), rope, rope_dim * sizeof(S));
  } else {
    convert(latent, latent_dim, row);
    convert(rope, rope_dim, row + latent_dim);
  }
}

}  // namespace tk::TK_ISA
