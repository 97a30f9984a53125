// Gradients of attention over selected keys, deterministic and without atomics.
//
//   p = gate e^(scale s - lse) / (sum of e^(scale s - lse)),  ds = scale (p (dout . v - delta) + p / gate dlse),  gate = 1 / (1 + e^(sink - lse))
//   dq = sum ds k,  dk[idx] += ds q,  dv[idx] += p dout,  dsink = -sum delta (1 - gate),  delta = dout . out
//
// Queries are taken kChunk at a time, in two passes. The first goes query by query: scores and probabilities once more (as forward), dq,
// and for every pair of a query and a key one row [ds of W heads | p of W heads]. The second sums what the pairs add to their keys, by
// the matrix [q; dout] of each query (sparse_pairs.h). Memory beside the results: the sums of one sequence in float, T (D + Dv), and the
// pairs of a chunk.
//
// B batch, H heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim, K slots, C columns of sums
#include "sparse_gather.h"
#include "sparse_kernels.h"
#include "sparse_pairs.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kRows = 256;                // heads worked on at a time
constexpr int64_t kChunkBytes = 16 << 20;     // of pairs

AttentionShape shape_of(const SparseShape& p) {
  AttentionShape s;
  s.scale = p.scale;
  return s;
}

template <class S> struct Backward {
  using T = Compute<S>;
  using Mm = Gemm<T>;
  using Block = LatentBlock<T>;
  static constexpr int64_t kPanel = Block::kPanel;
  static constexpr bool kExact = same_type<T, float>;

  const SparseBackwardParams& p;
  const KeyRows<S> keys{p, (const S*)p.k, p.k_stride}, values{p, (const S*)p.v, p.v_stride};
  const Transform f{shape_of(p)};
  const bool apart = p.v != nullptr;
  const int64_t H = p.heads, Hkv = p.kv_heads, G = H / Hkv, D = p.head_dim, Dv = p.value_dim, K = p.slots;
  const int64_t ldo = Block::ld_o(D), kp = Mm::padded_k(D), vp = Mm::padded_k(Dv), width = Block::width(D), value_width = Block::width(Dv);
  const int64_t padded = round_up(least(G, kRows), kPanel), halves = (G + W - 1) / W;
  const int64_t first_value = apart ? round_up(D, 32) : 0, C = round_up(D, 32) + (apart ? round_up(Dv, 32) : 0);
  const int64_t list_size = round_up(K + 1, 16), pair_rows = round_up(K, kLine) + kLine;  // products read past a query's last pair
  const int64_t chunk_most = kChunkBytes / (halves * pair_rows * 2 * W * (int64_t)sizeof(T));
  const int64_t chunk = chunk_most < 8 ? 8 : least(chunk_most, 128);

  // Scratch of one thread, in floats.
  int64_t copy_floats() const { return round_up(Block::kKeys * (width + (apart ? value_width : 0)), 16); }
  int64_t q_floats() const { return round_up(padded * (kp + vp), 16); }
  int64_t probs_floats() const { return padded / kPanel * Block::kProbs; }
  int64_t scratch_floats() const {
    const int64_t first = copy_floats() + q_floats() + probs_floats() + 4 * Block::kHalf + Block::kWork + 5 * padded + padded * ldo +
                          round_up(most(2 * W * C, list_size), 16);
    return round_up(most(first, kPairs * kSumColumns), 1024);
  }

  // x . y of Dv values; of floats in double, since what it is subtracted from nearly cancels it.
  float product_of(const S* x, const S* y) const {
    if constexpr (sizeof(S) == 4) {
      double sum = 0.0;
      for (int64_t d = 0; d < Dv; ++d) sum += (double)x[d] * y[d];
      return (float)sum;
    } else {
      vf sum = zero();
      for (int64_t d = 0; d < Dv; d += W) sum = fma(load_n(x + d, (int)least(W, Dv - d)), load_n(y + d, (int)least(W, Dv - d)), sum);
      return reduce_add(sum);
    }
  }
  static void scaled(const S* from, int64_t n, float factor, T* to) {
    for (int64_t d = 0; d < n; d += W) store_n(to + d, load_n(from + d, (int)least(W, n - d)) * factor, (int)least(W, n - d));
  }

  // What W heads of a query need beside their scores.
  struct Heads {
    const float *lse, *gate, *delta, *dlse;
    float* mass;  // sum of e^(scale s - lse) so far: 1 but for the rounding of lse (float)
  };
  // Half a panel: scores s and dout . v in dp, [keys, W] each -> pairs and the left operand of dq.
  void gradients(float* s, const float* dp, int64_t n, const Heads& x, T* pairs, T* left) const {
    vf mass = load(x.mass), lost = zero();
    const vf lse = load(x.lse), gate = load(x.gate), delta = load(x.delta), dlse = load(x.dlse), scale = splat(p.scale);
    for (int64_t k = 0; k < n; k += kLine) {
      vf ds[kLine], probs[kLine], sum[4] = {};
      const int64_t some = least(kLine, n - k);
      for (int64_t u = 0; u < kLine; ++u) {
        vf t = load(s + (k + u) * W);
        if (!f.plain) t = f.apply(t);
        const vf e = kExact ? exp(fms(t, splat(f.factor), lse)) : exp2_fast(fms(t, splat(f.c), lse));
        const vf g = e * (gate * (load(dp + (k + u) * W) - delta) + dlse) * scale;
        ds[u] = u < some ? g : zero(), probs[u] = e * gate;
        if (kExact && u < some) sum[u % 4] += e;
      }
      // With what the addition rounds off: one chain over 290 keys was wrong by more than lse is.
      const vf more = (sum[0] + sum[1]) + (sum[2] + sum[3]) - lost, now = mass + more;
      lost = (now - mass) - more, mass = now;
      put_pairs(ds, probs, some, pairs + k * 2 * W);
      put_left(ds, left + k * W);
    }
    store(x.mass, mass);
  }

  // The first pass for query t, sequence b, key head g.
  void query(int64_t t, int64_t b, int64_t g, int64_t place, const Pairs<T>& kept, float* scratch, float* delta) const {
    T *copy = (T*)scratch, *value_copy = copy + Block::kKeys * width;
    T *q = (T*)(scratch += copy_floats()), *dout = q + padded * kp;
    float* probs = scratch += q_floats();
    float *s = scratch += probs_floats(), *dp = s + 2 * Block::kHalf, *work = dp + 2 * Block::kHalf;
    float *lse = work + Block::kWork, *gate = lse + padded, *dots = gate + padded, *dlse = dots + padded, *mass = dlse + padded, *dq = mass + padded;
    T* rows = (T*)(dq + padded * ldo);

    int32_t* list = kept.lists + place * list_size;
    bool ascending;
    const int64_t count = named_keys(p.indices + (t * Hkv + g) * K, K, key_count(p, b), list, &ascending);
    if (!ascending) sort_keys(list, (int32_t*)rows, count);
    kept.counts[place] = count;

    for (int64_t head = 0; head < G; head += kRows) {
      const int64_t n = least(kRows, G - head), row = t * H + g * G + head;
      for (int64_t r = 0; r < n; r += kPanel) {
        const int64_t some = least(kPanel, n - r);
        Mm::pack_b((const S*)p.q + (row + r) * D, D, some, D, q + r * kp);
        Mm::pack_b((const S*)p.dout + (row + r) * Dv, Dv, some, Dv, dout + r * vp);
      }
      for (int64_t r = 0; r < padded; ++r) {
        lse[r] = gate[r] = dots[r] = dlse[r] = mass[r] = 0.0f;
        if (r >= n || p.lse[row + r] == -INFINITY) {
          if (r < n) delta[row + r] = 0.0f;
          continue;
        }
        const float plain = p.lse[row + r], dot = product_of((const S*)p.dout + (row + r) * Dv, (const S*)p.out + (row + r) * Dv);
        lse[r] = kExact ? plain : plain * kLog2e;
        gate[r] = p.sinks ? 1.0f / (1.0f + exp(splat(p.sinks[g * G + head + r] - plain))[0]) : 1.0f;
        dlse[r] = p.dlse ? p.dlse[row + r] : 0.0f;
        dots[r] = dot;
        delta[row + r] = dot;
      }
      bool sees[kRows / kPanel];
      for (bool& any : sees) any = true;
      GatherAhead<S> next;
      for (int64_t k = 0; k < count; k += Block::kKeys) {
        const int64_t keys_now = least(Block::kKeys, count - k), after = least(Block::kKeys, count - k - keys_now);
        typename Block::Keys lines[Block::kKeys / kLine], value_lines[Block::kKeys / kLine];
        const int64_t line_count = gather(keys, b, g, list + k, keys_now, D, width, copy, lines);
        if (apart) gather(values, b, g, list + k, keys_now, Dv, value_width, value_copy, value_lines);
        next = GatherAhead<S>(keys, apart ? &values : nullptr, {b, g, list + k + keys_now, after, key_count(p, b)}, D, Dv);
        next.spread(Block::beats(n, 2 * D, D));
        for (int64_t r = 0; r < n; r += kPanel) {
          const int64_t some = least(kPanel, n - r);
          Block::products(lines, line_count, some, D, q + r * kp, s, next);
          Block::products(apart ? value_lines : lines, line_count, some, Dv, dout + r * vp, dp, next);
          for (int64_t h = 0; h * W < some; ++h) {
            const int64_t half = (head + r) / W + h;
            gradients(s + h * Block::kHalf, dp + h * Block::kHalf, keys_now, {lse + r + h * W, gate + r + h * W, dots + r + h * W, dlse + r + h * W, mass + r + h * W},
                      kept.row(place, half, k),
                      (T*)(probs + r / kPanel * Block::kProbs) + h * Block::kKeys * W);
          }
        }
        Block::values(lines, line_count, n, sees, D, probs, dq, ldo, k == 0, work, next);
      }
      for (int64_t r = 0; r < n; ++r) {
        S* to = (S*)p.dq + (row + r) * D;
        if (count) Block::unfold(dq + r * ldo, D);
        mass[r] = kExact && count ? 1.0f / mass[r] : 1.0f;
        for (int64_t d = 0; d < D; d += W) store_n(to + d, count ? load(dq + r * ldo + d) * mass[r] : zero(), (int)least(W, D - d));
      }
      for (int64_t h = 0; h * W < n; ++h) {  // [q; dout] of W heads, with what their probabilities lack
        memset((void*)rows, 0, 2 * W * C * sizeof(T));
        for (int64_t i = 0; i < least(W, n - h * W); ++i) {
          const int64_t r = row + h * W + i;
          scaled((const S*)p.q + r * D, D, mass[h * W + i], rows + i * C);
          scaled((const S*)p.dout + r * Dv, Dv, mass[h * W + i], rows + (W + i) * C + first_value);
        }
        Mm::pack_b_t(rows, C, C, 2 * W, kept.matrix(place, head / W + h));
      }
    }
  }

  // Keys that have a gradient: of a cache all, those past its end too.
  int64_t keys_of(int64_t b) const { return p.cu_seqlens_k ? key_count(p, b) : p.k_len; }

  void run() const {
    const int64_t N = query_count(p), floats = scratch_floats();
    int64_t longest = 0;
    for (int64_t b = 0; b < p.batch; ++b) longest = most(longest, keys_of(b));
    Scratch<float> scratch(p.threads * floats), delta(N * H + 1), sums(longest * C + 1);
    Scratch<int32_t> lists(chunk * list_size);
    Scratch<int64_t> counts(chunk);
    Scratch<T> pairs(chunk * halves * pair_rows * 2 * W), across(chunk * halves * C * 2 * W);
    const Pairs<T> kept{list_size, halves, pair_rows, C, lists, counts, pairs, across};
    const int64_t parts = (C + kSumColumns - 1) / kSumColumns;
    for (int64_t b = 0; b < p.batch; ++b) {
      const SequenceRange x = sequence(p, b);
      const int64_t T_b = keys_of(b), first_key = p.cu_seqlens_k ? p.cu_seqlens_k[b] : b * p.k_len;
      for (int64_t g = 0; g < Hkv; ++g)
        for (int64_t done = 0; done == 0 || done < x.count; done += chunk) {
          const int64_t n = least(chunk, x.count - done);
          const bool last = done + chunk >= x.count;
          parallel_for(p.threads, n, [&](int64_t i, int thread) {
            query(x.first + done + i, b, g, i, kept, scratch + thread * floats, delta);
          });
          parallel_for(p.threads, (T_b + kSumKeys - 1) / kSumKeys * parts, [&](int64_t i, int thread) {
            const int64_t key = i / parts * kSumKeys, end = least(T_b, key + kSumKeys);
            const int64_t column = i % parts * kSumColumns, columns = least(kSumColumns, C - column);
            if (done == 0)
              for (int64_t j = key; j < end; ++j) memset(sums + j * C + column, 0, columns * sizeof(float));
            kept.collect(n, key, end, column, columns, scratch + thread * floats, sums);
            if (!last) return;
            for (int64_t j = key; j < end; ++j) {
              const int64_t row = (first_key + j) * Hkv + g;
              put_sums(sums + j * C, column, columns, (S*)p.dk + row * D, 0, D);
              if (apart) put_sums(sums + j * C, column, columns, (S*)p.dv + row * Dv, first_value, Dv);
            }
          });
        }
    }
    if (p.dsinks)
      parallel_for(1, H, [&](int64_t h, int) {
        double sum = 0.0;
        for (int64_t t = 0; t < N; ++t) {
          const float lse = p.lse[t * H + h];
          if (lse != -INFINITY) sum -= (double)delta[t * H + h] / (1.0 + ::exp((double)lse - p.sinks[h]));
        }
        p.dsinks[h] = (float)sum;
      });
  }
};

}  // namespace

void sparse_backward(const SparseBackwardParams& p) {
  switch (p.dtype) {
    case DType::float32: return Backward<float>{p}.run();
    case DType::bfloat16: return Backward<bf16>{p}.run();
    case DType::float16: return Backward<f16>{p}.run();
  }
}

}  // namespace tk::TK_ISA
