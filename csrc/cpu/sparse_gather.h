// The keys that a query's indices name: which they are, where they lie, and how they become a block of keys (mla_block.h).
//
// D values of a key, Dv of a value, K slots of a query.
#pragma once

#include "latent_cache.h"
#include "mla_dots.h"
#include "mla_tiles.h"
#include "sparse.h"

namespace tk::TK_ISA {

struct SequenceRange {
  int64_t b, first, count;  // a sequence, its first query among all, and how many it has
};

// Where keys (or values) of all sequences lie.
template <class Kv> struct KeyRows {
  const SparseShape& p;
  const Kv* base;
  const int64_t* stride;

  const Kv* row(int64_t b, int64_t g, int64_t j) const {
    const Kv* x = base + g * stride[2];
    if (p.block_table) return x + p.block_table[b * p.max_pages + j / p.page_size] * stride[0] + j % p.page_size * stride[1];
    return x + (p.cu_seqlens_k ? p.cu_seqlens_k[b] : 0) * stride[1] + b * stride[0] + j * stride[1];
  }
};

inline int64_t key_count(const SparseShape& p, int64_t b) {
  if (p.cu_seqlens_k) return p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b];
  return p.seqlens ? p.seqlens[b] : p.k_len;
}
inline int64_t query_count(const SparseShape& p) { return p.cu_seqlens_q ? p.cu_seqlens_q[p.batch] : p.batch * p.q_len; }
inline SequenceRange sequence(const SparseShape& p, int64_t b) {
  if (!p.cu_seqlens_q) return {b, b * p.q_len, p.q_len};
  return {b, p.cu_seqlens_q[b], p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b]};
}
// The sequence of query t.
inline int64_t sequence_of(const SparseShape& p, int64_t t) {
  if (!p.cu_seqlens_q) return t / p.q_len;
  int64_t low = 0, high = p.batch - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.cu_seqlens_q[middle + 1] > t) high = middle;
    else low = middle + 1;
  }
  return low;
}

// The slots that name one of n keys, in their order -> how many; *ascending: whether each is above the one before.
inline int64_t named_keys(const int32_t* slots, int64_t K, int64_t n, int32_t* list, bool* ascending) {
  int64_t count = 0;
  int32_t last = -1;
  bool sorted = true;
  for (int64_t i = 0; i < K; ++i) {
    const int32_t j = slots[i];
    list[count] = j;
    const bool in = j >= 0 && j < n;
    sorted &= !in | (j > last);
    last = in ? j : last;
    count += in;
  }
  *ascending = sorted;
  return count;
}

// Slots that name some of `limit` keys, or none.
struct Named {
  int64_t b, g;
  const int32_t* slots;
  int64_t count, limit;
};
// Rows of keys (and values, where they lie apart) on their way into L2 while others are worked on. A slot that names none fetches some key.
template <class Kv> class GatherAhead {
 public:
  GatherAhead() = default;
  GatherAhead(const KeyRows<Kv>& k, const KeyRows<Kv>* v, const Named& x, int64_t k_values, int64_t v_values)
      : k_(&k), v_(v), b_(x.b), g_(x.g), list_(x.slots), left_(x.limit > 0 ? x.count : 0), limit_(x.limit), k_bytes_(k_values * (int64_t)sizeof(Kv)), v_bytes_(v_values * (int64_t)sizeof(Kv)) {
    if (left_ > 0) begin(*k_, k_bytes_);
  }
  // So that everything is fetched in `calls` calls of beat().
  void spread(int64_t calls) { rate_ = left_ * ((k_bytes_ + 63) / 64 + (v_ ? (v_bytes_ + 63) / 64 : 0)) / (calls + 1) + 1; }
  __attribute__((always_inline)) void beat() {
    for (int64_t i = 0; i < rate_ && left_ > 0; ++i) {
      __builtin_prefetch(at_, 0, 2);
      at_ += 64;
      if (__builtin_expect(at_ >= end_, 0)) following();
    }
  }

 private:
  void begin(const KeyRows<Kv>& x, int64_t bytes) {
    at_ = (const char*)x.row(b_, g_, *list_ >= 0 && *list_ < limit_ ? *list_ : 0);
    end_ = at_ + bytes;
    at_ = (const char*)((uintptr_t)at_ & ~(uintptr_t)63);
  }
  void following() {
    value_ = !value_ && v_;
    if (value_) return begin(*v_, v_bytes_);
    ++list_;
    if (--left_ > 0) begin(*k_, k_bytes_);
  }
  const KeyRows<Kv>*k_ = nullptr, *v_ = nullptr;
  int64_t b_ = 0, g_ = 0;
  const int32_t* list_ = nullptr;
  int64_t left_ = 0, limit_ = 0, k_bytes_ = 0, v_bytes_ = 0, rate_ = 1;
  const char *at_ = nullptr, *end_ = nullptr;
  bool value_ = false;
};

// n named rows of `values` values -> lines, the last of them filled up with zeros: where the rows lie if Keys may be anywhere and they
// are of T and need no padding, else in `copy`, side by side, `width` values each.
template <class Kv, class T, class Keys>
inline int64_t gather(const KeyRows<Kv>& x, int64_t b, int64_t g, const int32_t* list, int64_t n, int64_t values, int64_t width, T* copy, Keys* lines) {
  const int64_t count = (n + kLine - 1) / kLine;
  if constexpr (same_type<Keys, Places<Kv>>) {
    if (width == values) {
      for (int64_t i = 0; i < n; ++i) lines[i / kLine].at[i % kLine] = x.row(b, g, list[i]);
      if (n < count * kLine) memset((void*)copy, 0, width * sizeof(T));
      for (int64_t i = n; i < count * kLine; ++i) lines[i / kLine].at[i % kLine] = copy;
      return count;
    }
  }
  for (int64_t i = 0; i < count; ++i) lay(copy + i * kLine * width, width, lines + i);
  for (int64_t i = 0; i < n; ++i, copy += width) {
    read_latent(x.row(b, g, list[i]), values, copy);
    if (width > values) memset((void*)(copy + values), 0, (width - values) * sizeof(T));
  }
  memset((void*)copy, 0, (count * kLine - n) * width * sizeof(T));
  return count;
}

}  // namespace tk::TK_ISA
