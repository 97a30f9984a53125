// Attention over selected keys: s = scale q . k[idx], o = softmax(s) v[idx], lse; slots that name no key count for nothing.
//
// A block of named keys is what a block of a latent cache is (mla_block.h), for all heads that share it, while the rows of the next
// block are on their way into L2. Keys are taken from where they lie; AMX's tiles want them at one stride, so for those they are copied
// side by side, as are keys of another type. Keys are cut into splits of kSparseSplit from the first named one, and splits are merged in
// order. With queries enough for all threads an item of work is all splits of a query, else one; the bits are the same.
//
// B batch, H heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim, K slots
#include "sparse_gather.h"
#include "sparse_kernels.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kSparseSplit = 512;  // keys
constexpr int64_t kRows = 256;         // heads of an item

struct State {
  float *m, *l, *o;  // [n], [n], [n, ldo]
};

AttentionShape shape_of(const SparseShape& p) {
  AttentionShape s;
  s.scale = p.scale;
  return s;
}

template <class S, class Kv> struct Forward {
  using T = Compute<S>;
  using Mm = Gemm<T>;
  using Block = LatentBlock<T>;
  static constexpr int64_t kPanel = Block::kPanel;

  const SparseForwardParams& p;
  const KeyRows<Kv> keys{p, (const Kv*)p.k, p.k_stride}, values{p, (const Kv*)p.v, p.v_stride};
  const Transform f{shape_of(p)};
  const bool apart = p.v != nullptr;
  const int64_t H = p.heads, Hkv = p.kv_heads, G = H / Hkv, D = p.head_dim, Dv = p.value_dim, K = p.slots;
  const int64_t ldo = Block::ld_o(Dv), kp = Mm::padded_k(D), width = Block::width(D), value_width = Block::width(Dv);
  const int64_t rows = least(G, kRows), chunks = (G + rows - 1) / rows;  // of an item; of a group
  const int64_t token = p.quantised ? kTokenBytes : D;

  int64_t padded() const { return round_up(rows, kPanel); }
  int64_t state_floats() const { return round_up(padded() * (2 + ldo), 16); }
  State state(float* x) const { return {x, x + padded(), x + 2 * padded()}; }

  // Scratch of one thread, in floats.
  int64_t copy_floats() const { return round_up(Block::kKeys * (width + (apart ? value_width : 0)), 16); }
  int64_t q_floats() const { return round_up(padded() * kp, 16); }
  int64_t probs_floats() const { return padded() / kPanel * Block::kProbs; }
  int64_t scratch_floats() const {
    return round_up(copy_floats() + q_floats() + probs_floats() + Block::kWork + 2 * state_floats() + round_up(K + 1, 16), 1024);
  }
  struct Mine {
    T *copy, *value_copy, *q;
    float *probs, *work;
    State part, sum;
    int32_t* list;
  };
  Mine mine(float* x) const {
    Mine m;
    m.copy = (T*)x, m.value_copy = m.copy + Block::kKeys * width, x += copy_floats();
    m.q = (T*)x, x += q_floats();
    m.probs = x, x += probs_floats();
    m.work = x, x += Block::kWork;
    m.part = state(x), m.sum = state(x + state_floats()), x += 2 * state_floats();
    m.list = (int32_t*)x;
    return m;
  }

  struct Item {
    int64_t t, b, g, head, rows;  // query, its sequence, key head, first query head, how many
  };
  Item item(int64_t i) const {
    const int64_t chunk = i % chunks, g = i / chunks % Hkv, t = i / chunks / Hkv;
    return {t, sequence_of(p, t), g, g * G + chunk * rows, least(rows, G - chunk * rows)};
  }
  int64_t prepare(const Item& x, const Mine& m) const {
    for (int64_t r = 0; r < x.rows; r += kPanel)
      Mm::pack_b((const S*)p.q + (x.t * H + x.head + r) * D, D, least(kPanel, x.rows - r), D, m.q + r * kp);
    bool ascending;
    return named_keys(p.indices + (x.t * Hkv + x.g) * K, K, key_count(p, x.b), m.list, &ascending);
  }

  // A block of slots from `slot` on of item i, which comes next; nothing where there is none.
  Named opening(int64_t i, int64_t items, int64_t slot) const {
    if (i >= items) return {};
    const Item x = item(i);
    return {x.b, x.g, p.indices + (x.t * Hkv + x.g) * K + slot, most(0, least(Block::kKeys, K - slot)), key_count(p, x.b)};
  }

  // Named keys [from, from + n) of the item's list, at most a split of them; `count` is how many there are in all. then: fetched at
  // the end of the last of them.
  void split(const Item& x, const Mine& m, int64_t from, int64_t n, int64_t count, const State& result, const Named& then) const {
    const auto ahead = [&](int64_t first) {
      const int64_t some = most(0, least(Block::kKeys, count - first));
      const Named next = some ? Named{x.b, x.g, m.list + first, some, key_count(p, x.b)} : then;
      return GatherAhead<Kv>(keys, apart ? &values : nullptr, next, token, Dv);
    };
    for (int64_t r = 0; r < padded(); ++r) result.m[r] = -INFINITY, result.l[r] = 0.0f;
    bool sees[kRows / kPanel];
    for (bool& any : sees) any = true;
    for (int64_t k = 0; k < n; k += Block::kKeys) {
      const int64_t some = least(Block::kKeys, n - k);
      const int32_t* list = m.list + from + k;
      typename Block::Keys lines[Block::kKeys / kLine], value_lines[Block::kKeys / kLine];
      const int64_t line_count = gather(keys, x.b, x.g, list, some, D, width, m.copy, lines);
      if (apart) gather(values, x.b, x.g, list, some, Dv, value_width, m.value_copy, value_lines);
      alignas(64) int32_t limit[kPanel];
      for (int32_t& l : limit) l = (int32_t)some;
      GatherAhead<Kv> next = ahead(from + k + some);
      next.spread(Block::beats(x.rows, D, Dv));
      for (int64_t r = 0; r < x.rows; r += kPanel)
        Block::probabilities(f, lines, line_count, least(kPanel, x.rows - r), D, m.q + r * kp, limit, result.m + r, result.l + r,
                             result.o + r * ldo, ldo, k == 0, m.probs + r / kPanel * Block::kProbs, m.work, next);
      Block::values(apart ? value_lines : lines, line_count, x.rows, sees, Dv, m.probs, result.o, ldo, k == 0, m.work, next);
    }
  }
  void take_in(const State& sum, const State& part, int64_t n) const {
    for (int64_t r = 0; r < n; ++r)
      if (part.m[r] != -INFINITY) merge_row(f, sum.m + r, sum.l + r, sum.o + r * ldo, part.m[r], part.l[r], part.o + r * ldo, ldo);
  }
  void finish(const Item& x, const State& sum, int64_t from, int64_t n) const {
    for (int64_t r = from; r < from + n; ++r) {
      const int64_t row = x.t * H + x.head + r;
      if (sum.m[r] != -INFINITY) Block::unfold(sum.o + r * ldo, Dv);
      finish_row(f, sum.m[r], sum.l[r], sum.o + r * ldo, Dv, p.sinks ? p.sinks + x.head + r : nullptr, (S*)p.out + row * Dv, p.lse + row);
    }
  }

  void run() const {
    const int64_t items = query_count(p) * Hkv * chunks, splits = (K + kSparseSplit - 1) / kSparseSplit, floats = scratch_floats();
    if (items == 0) return;
    const bool whole = splits <= 1 || items >= 4 * p.threads;
    Scratch<float> scratch(p.threads * floats);
    if (whole)
      return parallel_for(p.threads, items, [&](int64_t i, int thread) {
        const Mine m = mine(scratch + thread * floats);
        const Item x = item(i);
        const int64_t count = prepare(x, m);
        for (int64_t r = 0; r < x.rows; ++r) m.sum.m[r] = -INFINITY, m.sum.l[r] = 0.0f;
        for (int64_t k = 0; k < count; k += kSparseSplit) {
          split(x, m, k, least(kSparseSplit, count - k), count, m.part, opening(i + p.threads, items, 0));
          take_in(m.sum, m.part, x.rows);
        }
        finish(x, m.sum, 0, x.rows);
      });

    Scratch<float> partials(items * splits * state_floats());
    const auto partial = [&](int64_t i, int64_t s) { return state(partials + (i * splits + s) * state_floats()); };
    parallel_for(p.threads, items * splits, [&](int64_t i, int thread) {
      const Mine m = mine(scratch + thread * floats);
      const Item x = item(i / splits);
      const int64_t from = i % splits * kSparseSplit, count = prepare(x, m), end = least(count, from + kSparseSplit);
      const int64_t later = i + p.threads;  // threads take items in turn, about
      split(x, m, from, most(0, end - from), end, partial(i / splits, i % splits), opening(later / splits, items, later % splits * kSparseSplit));
    });
    constexpr int64_t kSome = 4;  // rows merged at a time
    const int64_t blocks = (rows + kSome - 1) / kSome;
    parallel_for(p.threads, items * blocks, [&](int64_t i, int thread) {
      const Item x = item(i / blocks);
      const int64_t r = i % blocks * kSome, n = least(kSome, x.rows - r);
      if (n <= 0) return;
      const State all = mine(scratch + thread * floats).sum, sum{all.m + r, all.l + r, all.o + r * ldo};
      for (int64_t j = 0; j < n; ++j) sum.m[j] = -INFINITY, sum.l[j] = 0.0f;
      for (int64_t s = 0; s < splits; ++s) {
        const State part = partial(i / blocks, s);
        take_in(sum, {part.m + r, part.l + r, part.o + r * ldo}, n);
      }
      finish(x, all, r, n);
    });
  }
};

template <class S> void forward(const SparseForwardParams& p) {
  if (p.quantised) return Forward<S, fp8>{p}.run();
  Forward<S, S>{p}.run();
}

}  // namespace

void sparse_forward(const SparseForwardParams& p) {
  switch (p.dtype) {
    case DType::float32: return forward<float>(p);
    case DType::bfloat16: return forward<bf16>(p);
    case DType::float16: return forward<f16>(p);
  }
}

}  // namespace tk::TK_ISA
