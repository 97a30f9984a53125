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
inline constexpr int64_t kScalesAt = kLatent, kRopeAt = kLatent + 4 * (kLatent / kGroup);

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
template <class T> inline void read_quantised(const fp8* row, T* to) {
  for (int64_t g = 0; g < kLatent / kGroup; ++g) {
    float scale;
    memcpy(&scale, row + kScalesAt + 4 * g, 4);
    for (int64_t d = g * kGroup; d < (g + 1) * kGroup; d += W) store(to + d, load_e4m3((const uint8_t*)row + d) * scale);
  }
  read_latent((const bf16*)(row + kRopeAt), kRope, to + kLatent);
}
inline void read_latent(const fp8* row, int64_t, float* to) { read_quantised(row, to); }
inline void read_latent(const fp8* row, int64_t, bf16* to) { read_quantised(row, to); }

// ---- writing

// The byte of e4m3 in each lane, rounded to nearest even; above 464 and NaN: NaN.
inline vi to_e4m3(vf x) {
  const vi bits = as_int(x), a = bits & 0x7fffffff;
  const vi tiny = as_int(as_float(a) + 0x1p14f) - (141 << 23);  // adding 2^14 rounds at 2^-9
  const vi normal = (a - (120 << 23) + 0x7ffff + ((a >> 20) & 1)) >> 20;
  vi value = a < (121 << 23) ? tiny : normal;
  value = a >= (1087 << 20) ? splat((int32_t)0x7f) : value;  // 480
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
      top = a <= top ? top : a;  // a NaN comes in
      top = top != top ? splat(NAN) : top;
    }
    float amax = top[0];
    for (int i = 1; i < W; ++i) amax = top[i] <= amax ? amax : amax != amax ? amax : top[i];
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
