// Gradients of attention over chosen blocks of keys, without atomics.
//
//   p = e^(scale s - lse),  ds = p (dout . v - delta),  delta = dout . out
//   dq = scale sum ds k,  dk = scale sum ds q,  dv = sum p dout
//
// Two passes, so that each sum has one owner and any number of threads can work: chunks of queries walk the blocks they named and
// sum dq in L2; pieces of blocks walk the rows that named them and sum dk and dv in L2. Scores and dout . v are computed in both,
// seven products instead of five. In either a unit is kRows scattered rows, copied side by side, against a piece of keys, rows down.
//
// Order of sums: dq of a row over pieces in ascending order, dk and dv over rows in ascending order (query, then head), kRows of
// them at a time from a block's first one.
//
// B batch, S queries, T keys, H query heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim
#include "block_sparse_lists.h"
#include "sparse_kernels.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kChunkRows = 1024;
constexpr int64_t kPackedBytes = 256 << 20;  // packed keys held at a time
constexpr int64_t kPiece = 256, kLdp = kPiece + 16;  // keys; row stride of a unit's scores

// What each row of a unit needs: keys [0, hi) of the piece are seen.
struct RowTerms {
  const int32_t* hi;
  const float *lse, *delta;
};

// Scores s and dp = dout . v of n rows -> p and ds, as the left operands that the three products of a type want.
template <class T> struct Middle;

template <> struct Middle<float> {
  using Mm = Gemm<float>;
  static constexpr int64_t kRows = 60;
  static constexpr int64_t kFloats = 0;
  explicit Middle(float*) {}
  void elements(const Transform& f, int64_t n, int64_t keys, const RowTerms& x, float* s, float* dp) const {
    for (int64_t r = 0; r < n; ++r) {
      const vf lse = splat(x.lse[r]), delta = splat(x.delta[r]), factor = splat(f.factor);
      float *p = s + r * kLdp, *d = dp + r * kLdp;
      for (int64_t k = 0; k < keys; k += W) {
        const vf t = f.plain ? load(p + k) : f.apply(load(p + k));
        const vi in = lane_index() + (int32_t)k < x.hi[r];
        const vf e = select(in, exp(fms(t, factor, lse)), zero());
        store(p + k, e);
        store(d + k, select(in, e * (load(d + k) - delta), zero()));
      }
    }
  }
  // c [n, N] = ds k
  void rows_product(int64_t n, int64_t N, int64_t keys, const float* ds, const float* k, float* c) const {
    Mm::gemm_panels<kLdp, 1>(n, N, keys, ds, Mm::MR * kLdp, k, Mm::NR * keys, c, N, false);
  }
  void turn(int64_t, int64_t) const {}
  // c [keys, N] += x^T y, x = p or ds [n, keys]
  void keys_product(int64_t keys, int64_t N, int64_t n, const float* x, bool, const float* y, float* c) const {
    Mm::gemm_panels<1, kLdp>(keys, N, n, x, Mm::MR, y, Mm::NR * n, c, N, true);
  }
};

#if defined(__AVX512BF16__)
template <> struct Middle<bf16> {
  using Mm = Gemm<bf16>;
  static constexpr int64_t kRows = 64, kPanel = 32 * kPiece;  // elements of 32 rows
  static constexpr int64_t kFloats = 2 * kRows * kPiece;
  bf16 *p_left, *ds_left, *p_down, *ds_down;  // [kRows, kPiece] and [kPiece, kRows] left operands
  explicit Middle(float* base) : p_left((bf16*)base), ds_left(p_left + kRows * kPiece), p_down(ds_left + kRows * kPiece), ds_down(p_down + kRows * kPiece) {}

  void elements(const Transform& f, int64_t n, int64_t keys, const RowTerms& x, const float* s, const float* dp) const {
    const vf c = splat(f.c);
    for (int64_t r = 0; r < round_up(n, 32); ++r) {
      bf16 *p = p_left + r / 32 * kPanel + r % 32 * 32, *d = ds_left + r / 32 * kPanel + r % 32 * 32;
      const int64_t hi = r < n ? x.hi[r] : 0;
      const vf lse = splat(r < n ? x.lse[r] * kLog2e : 0.0f), delta = splat(r < n ? x.delta[r] : 0.0f);
      int64_t k = 0;
      for (; k < hi; k += 32) {
        vf t[2] = {load(s + r * kLdp + k), load(s + r * kLdp + k + 16)}, ds[2];
        if (!f.plain) t[0] = f.apply(t[0]), t[1] = f.apply(t[1]);
        for (int u = 0; u < 2; ++u) t[u] = fms(t[u], c, lse);
        exp2_fast<2, 5>(t);
        for (int u = 0; u < 2; ++u) ds[u] = t[u] * (load(dp + r * kLdp + k + u * 16) - delta);
        if (k + 32 > hi)
          for (int u = 0; u < 2; ++u) {
            const vi in = lane_index() + (int32_t)(k + u * 16) < (int32_t)hi;
            t[u] = select(in, t[u], zero()), ds[u] = select(in, ds[u], zero());
          }
        Mm::store_a(p + k * 32, t[0], t[1]);
        Mm::store_a(d + k * 32, ds[0], ds[1]);
      }
      for (; k < keys; k += 32) Mm::store_a(p + k * 32, zero(), zero()), Mm::store_a(d + k * 32, zero(), zero());
    }
  }
  void rows_product(int64_t n, int64_t N, int64_t keys, const float*, const bf16* k, float* c) const {
    Mm::gemm_panels(round_up(n, 32), N, keys, ds_left, kPanel, k, Mm::NR * Mm::padded_k(keys), c, N, false);
  }
  void turn(int64_t n, int64_t keys) const {
    for (int64_t k = 0; k < keys; k += 32)
      for (int64_t r = 0; r < n; r += 32) {
        const int64_t from = r / 32 * kPanel + k * 32, to = k * kRows + r * 32;
        Mm::transpose_a(p_left + from, p_down + to);
        Mm::transpose_a(ds_left + from, ds_down + to);
      }
  }
  void keys_product(int64_t keys, int64_t N, int64_t n, const float*, bool of_p, const bf16* y, float* c) const {
    Mm::gemm_panels(round_up(keys, 32), N, n, of_p ? p_down : ds_down, 32 * kRows, y, Mm::NR * Mm::padded_k(n), c, N, true);
  }
};
#endif

template <class St> struct Backward {
  using T = Compute<St>;
  using Mm = Gemm<T>;
  using Elements = Middle<T>;
  static constexpr int64_t kRows = Elements::kRows, kPadded = 64;

  const BlockSparseBackwardParams& p;
  const int64_t H = p.heads, Hkv = p.kv_heads, G = H / Hkv, D = p.head_dim, Dv = p.value_dim, U = p.choosing / Hkv;
  const int64_t ldk = round_up(D, Mm::NR), ldv = round_up(Dv, Mm::NR);
  const int64_t piece = least(kPiece, p.block), pieces = (p.block + piece - 1) / piece;  // keys; of a block
  const int64_t across_keys = round_up(piece, kLine);
  const int64_t k_across = Mm::size_b(across_keys, D), v_across = Mm::size_b(across_keys, Dv), k_down = Mm::size_b(D, piece);
  const int64_t packed_size = k_across + v_across + k_down;  // of a piece
  const Transform f{p};
  int64_t chunk = most(1, kChunkRows / G);  // queries

  // ---- one unit

  struct Mine {  // scratch of one thread
    float *s, *dp, *middle, *sums;  // sums: dq of a unit, or dk and dv of a piece
    St *q, *dout;                   // [kRows, D], [kRows, Dv] side by side
    T *q_left, *dout_left, *q_down, *dout_down, *keys;
    float *state;                   // dq of a chunk
    int32_t* list;
  };
  int64_t t_floats(int64_t count) const { return round_up(count * (int64_t)sizeof(T), 64) / 4; }
  int64_t floats(int64_t longest) const {
    return round_up(2 * kPadded * kLdp + Elements::kFloats + round_up(kPiece, 32) * (ldk + ldv) + 2 * round_up(kPadded * most(D, Dv), 16) +
                    t_floats(Mm::size_a(kPadded, D)) + t_floats(Mm::size_a(kPadded, Dv)) + t_floats(Mm::size_b(D, kPadded)) +
                    t_floats(Mm::size_b(Dv, kPadded)) + t_floats(packed_size) + chunk * G * ldk + BlockLists::size(longest, chunk * U, p.slots), 1024);
  }
  Mine mine(float* x) const {
    Mine m;
    const auto take = [&](int64_t n) {
      float* at = x;
      x += round_up(n, 16);
      return at;
    };
    m.s = take(kPadded * kLdp), m.dp = take(kPadded * kLdp), m.middle = take(Elements::kFloats);
    m.sums = take(round_up(kPiece, 32) * (ldk + ldv));
    m.q = (St*)take(kPadded * most(D, Dv)), m.dout = (St*)take(kPadded * most(D, Dv));
    m.q_left = (T*)take(t_floats(Mm::size_a(kPadded, D))), m.dout_left = (T*)take(t_floats(Mm::size_a(kPadded, Dv)));
    m.q_down = (T*)take(t_floats(Mm::size_b(D, kPadded))), m.dout_down = (T*)take(t_floats(Mm::size_b(Dv, kPadded)));
    m.keys = (T*)take(t_floats(packed_size));
    m.state = take(chunk * G * ldk);
    m.list = (int32_t*)x;
    return m;
  }

  void pack_keys(const BlockSequence& x, int64_t g, int64_t first, int64_t n, bool down, T* to) const {
    const St *k = at<St>(p.k, p.k_stride, x.b, x.k + first, g), *v = at<St>(p.v, p.v_stride, x.b, x.k + first, g);
    Mm::pack_b(k, p.k_stride[1], n, D, to);
    Mm::pack_b(v, p.v_stride[1], n, Dv, to + k_across);
    if (down) Mm::pack_b_t(k, p.k_stride[1], D, n, to + k_across + v_across);
  }

  // p and ds of rows (of the chunk that begins with query t0) against keys [first, first + keys) -> whether any row sees one.
  bool unit(const BlockSequence& x, int64_t g, int64_t t0, const int32_t* rows, int64_t n, int64_t first, int64_t keys, bool fresh, bool down,
            const T* packed, const float* delta, const Mine& m, const Elements& middle) const {
    int32_t hi[kRows], top = 0;
    float lse[kRows], dots[kRows];
    for (int64_t i = 0; i < n; ++i) {
      hi[i] = (int32_t)most(0, least(keys, x.position(t0 + rows[i] / G) + 1 - first));
      top = hi[i] > top ? hi[i] : top;
    }
    if (!top) return false;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = t0 + rows[i] / G, h = g * G + rows[i] % G, row = (x.row + t) * H + h;
      lse[i] = p.lse[row], dots[i] = delta[row];
      if (!fresh) continue;
      memcpy((void*)(m.q + i * D), at<St>(p.q, p.q_stride, x.b, x.q + t, h), D * sizeof(St));
      memcpy((void*)(m.dout + i * Dv), (const St*)p.dout + row * Dv, Dv * sizeof(St));
    }
    if (fresh) {
      Mm::pack_a(m.q, D, n, D, m.q_left);
      Mm::pack_a(m.dout, Dv, n, Dv, m.dout_left);
      if (down) Mm::pack_b_t(m.q, D, D, n, m.q_down), Mm::pack_b_t(m.dout, Dv, Dv, n, m.dout_down);
    }
    const int64_t M = sizeof(T) == 2 ? round_up(n, 32) : n, N = round_up(keys, kLine);
    Mm::gemm(M, N, D, m.q_left, packed, m.s, kLdp, false);
    Mm::gemm(M, N, Dv, m.dout_left, packed + k_across, m.dp, kLdp, false);
    middle.elements(f, n, N, {hi, lse, dots}, m.s, m.dp);
    return true;
  }

  // ---- the passes

  void queries(const BlockSequence& x, int64_t g, int64_t t0, const T* packed, const float* delta, const Mine& m) const {
    const int64_t t1 = least(x.S, t0 + chunk);
    const Elements middle(m.middle);
    const BlockLists lists = BlockLists::make(p, x, g, t0, t1, m.list);
    memset((void*)m.state, 0, (t1 - t0) * G * ldk * sizeof(float));
    for (int64_t j = 0; j < count_blocks(p, x); ++j)
      for (int64_t from = 0, all = lists.count(j); from < all; from += kRows) {
        const int64_t n = least(kRows, all - from);
        int32_t rows[kRows];
        lists.take(j, from, n, rows);
        for (int64_t i = 0, first = j * p.block; first < block_end(p, x, j); ++i, first += piece) {
          const int64_t keys = least(piece, block_end(p, x, j) - first);
          const T* mine = packed + (j * pieces + i) * packed_size;
          if (!unit(x, g, t0, rows, n, first, keys, i == 0, false, mine, delta, m, middle)) break;
          middle.rows_product(n, ldk, keys, m.dp, mine + k_across + v_across, m.sums);
          for (int64_t r = 0; r < n; ++r)
            for (int64_t d = 0; d < ldk; d += W) {
              float* to = m.state + rows[r] * ldk + d;
              store(to, load(to) + load(m.sums + r * ldk + d));
            }
        }
      }
    for (int64_t r = 0; r < (t1 - t0) * G; ++r)
      write_row(m.state + r * ldk, p.scale, D, (St*)p.dq + ((x.row + t0 + r / G) * H + g * G + r % G) * D);
  }

  void keys(const BlockSequence& x, int64_t b, int64_t g, int64_t j, int64_t i, const BlockLists& lists, const float* delta, const Mine& m) const {
    const int64_t first = j * p.block + i * piece, n_keys = least(piece, block_end(p, x, j) - first);
    if (n_keys <= 0) return;
    const Elements middle(m.middle);
    float *dk = m.sums, *dv = dk + round_up(kPiece, 32) * ldk;
    memset((void*)dk, 0, round_up(n_keys, 32) * ldk * sizeof(float));
    memset((void*)dv, 0, round_up(n_keys, 32) * ldv * sizeof(float));
    pack_keys(x, g, first, n_keys, false, m.keys);
    for (int64_t from = 0, all = lists.count(j); from < all; from += kRows) {
      const int64_t n = least(kRows, all - from);
      int32_t rows[kRows];
      lists.take(j, from, n, rows);
      if (!unit(x, g, 0, rows, n, first, n_keys, true, true, m.keys, delta, m, middle)) continue;
      middle.turn(n, n_keys);
      middle.keys_product(n_keys, ldv, n, m.s, true, m.dout_down, dv);
      middle.keys_product(n_keys, ldk, n, m.dp, false, m.q_down, dk);
    }
    const int64_t key = p.cu_seqlens ? x.k : b * p.k_len;
    for (int64_t r = 0; r < n_keys; ++r) {
      const int64_t row = (key + first + r) * Hkv + g;
      write_row(dk + r * ldk, p.scale, D, (St*)p.dk + row * D);
      write_row(dv + r * ldv, 1.0f, Dv, (St*)p.dv + row * Dv);
    }
  }
  static void write_row(const float* x, float factor, int64_t n, St* out) {
    for (int64_t d = 0; d < n; d += W) store_n(out + d, load(x + d) * factor, (int)least(W, n - d));
  }

  // dout . out; of floats in double, since what it is subtracted from nearly cancels it.
  float dot(const St* x, const St* y) const {
    if constexpr (sizeof(St) == 4) {
      typedef double vd __attribute__((vector_size(W * 8)));
      vd sum = {};
      for (int64_t d = 0; d < Dv; d += W) {
        const int n = (int)least(W, Dv - d);
        sum += __builtin_convertvector(load_n(x + d, n), vd) * __builtin_convertvector(load_n(y + d, n), vd);
      }
      double total = 0.0;
      for (int i = 0; i < W; ++i) total += sum[i];
      return (float)total;
    } else {
      vf sum = zero();
      for (int64_t d = 0; d < Dv; d += W) sum = fma(load_n(x + d, (int)least(W, Dv - d)), load_n(y + d, (int)least(W, Dv - d)), sum);
      return reduce_add(sum);
    }
  }

  void run() {
    const int64_t pairs = p.batch * Hkv;
    int64_t longest = 0, total = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const BlockSequence x = block_sequence(p, b);
      longest = most(longest, count_blocks(p, x)), total += x.S;
    }
    if (pairs == 0) return;
    while (chunk > 16 && total * Hkv / chunk < 8 * p.threads) chunk /= 2;
    const int64_t rows = total * H, thread_floats = floats(longest);
    Scratch<float> scratch(p.threads * thread_floats), delta(rows + 1);
    const auto of = [&](int thread) { return mine(scratch + thread * thread_floats); };
    constexpr int64_t kSome = 4096;
    parallel_for(p.threads, (rows + kSome - 1) / kSome, [&](int64_t i, int) {
      for (int64_t r = i * kSome; r < least(rows, (i + 1) * kSome); ++r) delta[r] = dot((const St*)p.dout + r * Dv, (const St*)p.out + r * Dv);
    });

    Scratch<int64_t> packs(pairs + 1), items(pairs + 1), places(pairs + 1);  // where a pair's blocks, chunks and lists begin
    for (int64_t from = 0, to; from < pairs; from = to) {
      int64_t blocks = 0, chunks = 0, ints = 0;
      for (to = from; to < pairs; ++to) {
        const BlockSequence x = block_sequence(p, to / Hkv);
        if (to > from && (blocks + count_blocks(p, x)) * pieces * packed_size * (int64_t)sizeof(T) > kPackedBytes) break;
        packs[to] = blocks, items[to] = chunks, places[to] = ints;
        blocks += count_blocks(p, x), chunks += (x.S + chunk - 1) / chunk, ints += BlockLists::size(count_blocks(p, x), x.S * U, p.slots);
      }
      packs[to] = blocks, items[to] = chunks;
      Scratch<T> packed(blocks * pieces * packed_size);
      Scratch<int32_t> memory(ints);
      Scratch<BlockLists> lists(to - from);
      const auto pair_of = [&](const int64_t* begins, int64_t i) {
        int64_t pair = from;
        while (begins[pair + 1] <= i) ++pair;
        return pair;
      };
      parallel_for(p.threads, to - from, [&](int64_t i, int) {
        const BlockSequence x = block_sequence(p, (from + i) / Hkv);
        lists[i] = BlockLists::make(p, x, (from + i) % Hkv, 0, x.S, memory + places[from + i]);
      });
      parallel_for(p.threads, blocks, [&](int64_t i, int) {
        const int64_t pair = pair_of(packs, i), j = i - packs[pair];
        const BlockSequence x = block_sequence(p, pair / Hkv);
        for (int64_t u = 0, first = j * p.block; first < block_end(p, x, j); ++u, first += piece)
          pack_keys(x, pair % Hkv, first, least(piece, block_end(p, x, j) - first), true, packed + (i * pieces + u) * packed_size);
      });
      parallel_for(p.threads, chunks, [&](int64_t i, int thread) {
        const int64_t pair = pair_of(items, chunks - 1 - i), c = chunks - 1 - i - items[pair];
        queries(block_sequence(p, pair / Hkv), pair % Hkv, c * chunk, packed + packs[pair] * pieces * packed_size, delta, of(thread));
      });
      parallel_for(p.threads, blocks * pieces, [&](int64_t i, int thread) {
        const int64_t pair = pair_of(packs, i / pieces), j = i / pieces - packs[pair];
        keys(block_sequence(p, pair / Hkv), pair / Hkv, pair % Hkv, j, i % pieces, lists[pair - from], delta, of(thread));
      });
    }
  }
};

}  // namespace

void block_sparse_backward(const BlockSparseBackwardParams& p) {
  switch (p.dtype) {
    case DType::float32: return Backward<float>{p}.run();
    case DType::bfloat16: return Backward<bf16>{p}.run();
    case DType::float16: return Backward<f16>{p}.run();
  }
}

}  // namespace tk::TK_ISA
