// Append of new tokens to a latent cache, and its gathering into a dense tensor. Formats: latent_cache.h.
#include "latent_cache.h"

#include "mla_kernels.h"
#include "parallel.h"

namespace tk::TK_ISA {
namespace {

// Tokens a thread takes at a time.
constexpr int64_t kTokens = 64;

template <class S, class Kv> void append(const LatentAppendParams& p) {
  const Tokens<Kv> tokens{p, (const Kv*)p.kv};
  const int64_t total = p.batch * p.q_len, items = (total + kTokens - 1) / kTokens;
  parallel_for(p.threads, items, [&](int64_t item, int) {
    for (int64_t i = item * kTokens; i < least(total, (item + 1) * kTokens); ++i) {
      const int64_t b = i / p.q_len, s = i % p.q_len, position = p.seqlens[b] - p.q_len + s;
      if (position < 0) continue;
      write_latent((const S*)p.latent + b * p.latent_stride[0] + s * p.latent_stride[1],
                   (const S*)p.rope + b * p.rope_stride[0] + s * p.rope_stride[1], p.latent_dim, p.rope_dim,
                   (Kv*)tokens.row(b, position));
    }
  });
}
template <class S> void append(const LatentAppendParams& p) {
  if (p.quantised) return append<S, fp8>(p);
  switch (p.dtype) {
    case DType::float32: return append<S, float>(p);
    case DType::bfloat16: return append<S, bf16>(p);
    case DType::float16: return append<S, f16>(p);
  }
}

template <class Kv, class To> void gather(const LatentGatherParams& p) {
  const Tokens<Kv> tokens{p, (const Kv*)p.kv};
  const int64_t total = p.batch * p.length, items = (total + kTokens - 1) / kTokens;
  parallel_for(p.threads, items, [&](int64_t item, int) {
    for (int64_t i = item * kTokens; i < least(total, (item + 1) * kTokens); ++i) {
      const int64_t b = i / p.length, j = i % p.length;
      To* to = (To*)p.out + i * p.head_dim;
      if (j < p.seqlens[b]) read_latent(tokens.row(b, j), p.head_dim, to);
      else memset((void*)to, 0, p.head_dim * sizeof(To));
    }
  });
}

}  // namespace

void append_latent(const LatentAppendParams& p) {
  switch (p.source) {
    case DType::float32: return append<float>(p);
    case DType::bfloat16: return append<bf16>(p);
    case DType::float16: return append<f16>(p);
  }
}

void gather_latent(const LatentGatherParams& p) {
  if (p.quantised) return gather<fp8, bf16>(p);
  switch (p.dtype) {
    case DType::float32: return gather<float, float>(p);
    case DType::bfloat16: return gather<bf16, bf16>(p);
    case DType::float16: return gather<f16, f16>(p);
  }
}

}  // namespace tk::TK_ISA
