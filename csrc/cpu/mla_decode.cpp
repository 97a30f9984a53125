// Absorbed MLA decode: a few new queries, or a chunk of a prompt, over a latent cache, contiguous or paged.
//
// Keys are cut into splits of kLatentSplit from the sequence's first; a split's result (m, l, o) is computed block by block
// (mla_block.h) and splits are merged in order. An item of work is one split for all rows of a sequence, up to kRows: each
// latent comes from memory once, as key and as value of all heads. With items enough for all threads one item takes all
// splits of its rows, merging as it goes. The bits are the same: split boundaries and the order of merging never move.
//
// Shared prefix: its whole splits are the first splits of every sequence, computed once for the rows of all sequences.
//
// B batch, Sq new queries, H heads, D values of a latent, Dv of them its value, R = Sq H rows of a sequence, query by query.
#include "latent_cache.h"
#include "mla_kernels.h"
#include "mla_dots.h"
#include "mla_split.h"
#include "mla_tiles.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kLatentSplit = 1024;         // keys
constexpr int64_t kRows = 256;                 // rows of an item
constexpr int64_t kMostPartials = 64 << 20;    // floats of splits' results kept before they are merged

// What n rows have so far, of one split or of several.
struct State {
  float *m, *l, *o;  // [n], [n], [n, ldo]
};

AttentionShape shape_of(const MlaDecodeParams& p) {
  AttentionShape s;
  s.scale = p.scale;
  return s;
}

// S: queries and results, Kv: the cache
template <class S, class Kv> struct Mla {
  using Q = FastCompute<S>;
  using Block = LatentBlock<Q>;
  using T = typename Block::Value;
  using Keys = typename Block::Keys;
  using Mm = Gemm<Q>;
  static constexpr int64_t kPanel = Block::kPanel;

  const MlaDecodeParams& p;
  const Tokens<Kv> tokens;
  const Transform f{shape_of(p)};
  const int64_t Sq, H, D, Dv, R, ldo, kp;
  const int64_t shared;  // whole splits of the prefix

  explicit Mla(const MlaDecodeParams& p)
      : p(p), tokens{p, (const Kv*)p.kv, (const Kv*)p.prefix, &p, p.prefix ? p.prefix_length : 0}, Sq(p.q_len), H(p.heads),
        D(p.head_dim), Dv(p.value_dim), R(Sq * H), ldo(Block::ld_o(Dv)), kp(Mm::padded_k(D)),
        shared(p.batch > 1 ? tokens.prefix_length / kLatentSplit : 0) {}

  // Keys that a row of the whole batch sees.
  int64_t limit(int64_t row) const { return most(0, tokens.count(row / R) - Sq + row % R / H + 1); }
  // Splits of a sequence after the shared ones.
  int64_t splits(int64_t b) const { return most(0, (tokens.count(b) + kLatentSplit - 1) / kLatentSplit - shared); }

  int64_t token_size() const { return p.quantised ? kTokenBytes : D; }

  static int64_t state_floats(int64_t rows, int64_t ldo) { return round_up(rows, kPanel) * (2 + ldo); }
  static State state(float* base, int64_t rows) {
    const int64_t n = round_up(rows, kPanel);
    return {base, base + n, base + 2 * n};
  }
  static State after(const State& x, int64_t row, int64_t ldo) { return {x.m + row, x.l + row, x.o + row * ldo}; }

  // Scratch of one thread, in floats.
  int64_t copy_floats() const { return Block::kKeys * round_up(Block::width(D), 16); }
  int64_t scratch_floats() const {
    return round_up(copy_floats() + kRows / kPanel * Block::kProbs + Block::work_floats(kRows) + 2 * kRows + 2 * state_floats(kRows, ldo), 1024);
  }

  // `count` rows from `first` of the batch on, all of sequence b, or (shared keys) of any; q: their panels.
  struct Rows {
    int64_t first, count, b;
    const Q* q;
  };

  // A line of keys from `at` on where they lie, if they can be taken from there.
  bool find(int64_t b, int64_t at, int64_t end, T*, Line<T>* line) const {
    if (at + kLine > end || tokens.run(at, end) < kLine) return false;
    *line = {tokens.row(b, at), tokens.step(at)};
    return true;
  }
  bool find(int64_t b, int64_t at, int64_t end, T* zeros, Places<T>* line) const {
    int64_t k = 0;
    while (k < kLine && at + k < end) {
      const int64_t some = least(kLine - k, tokens.run(at + k, end)), step = tokens.step(at + k);
      const T* row = tokens.row(b, at + k);
      for (int64_t i = 0; i < some; ++i, row += step) line->at[k++] = row;
    }
    if (k < kLine) memset((void*)zeros, 0, Block::width(D) * sizeof(T));
    while (k < kLine) line->at[k++] = zeros;
    return true;
  }
  // Lines of keys [j, j + n) of sequence b, where they lie or copied.
  void stage(int64_t b, int64_t j, int64_t n, T* copy, Keys* lines, Ahead<Kv>& next) const {
    const int64_t width = Block::width(D), end = tokens.count(b);
    for (int64_t i = 0; i * kLine < n; ++i, copy += kLine * width) {
      const int64_t at = j + i * kLine;
      if constexpr (same_type<Kv, T>) {
        if (Block::takes(D) && find(b, at, end, copy, lines + i)) continue;
      }
      lay(copy, width, lines + i);
      for (int64_t k = 0; k < kLine; ++k) {
        T* to = copy + k * width;
        next.beat();
        const bool in = at + k < end;
        if (in) read_latent(tokens.row(b, at + k), D, to);
        memset((void*)(to + (in ? D : 0)), 0, (width - (in ? D : 0)) * sizeof(T));
      }
    }
  }

  // Where the next item begins, so that it is fetched at the end of this one; b < 0: nothing follows.
  struct Place {
    int64_t b = -1, key = 0;
  };

  // The first block from there on, of n keys at most.
  Ahead<Kv> fetch(const Place& from, int64_t n) const {
    if (from.b < 0) return {};
    n = least(least(n, Block::kKeys), tokens.count(from.b) - from.key);
    return n > 0 ? Ahead<Kv>(tokens, from.b, from.key, n, token_size()) : Ahead<Kv>();
  }

  // Split `index` of the rows' keys.
  void split(const Rows& x, int64_t index, float* scratch, const State& result, const Place& then) const {
    T* copy = (T*)scratch;
    float* probs = scratch + copy_floats();
    float* work = probs + kRows / kPanel * Block::kProbs;
    int32_t *limits = (int32_t*)(work + Block::work_floats(kRows)), *here = limits + kRows;
    const int64_t padded = round_up(x.count, kPanel);
    int64_t end = 0;
    for (int64_t r = 0; r < padded; ++r) {
      const int64_t seen = r < x.count ? most(0, least(kLatentSplit, limit(x.first + r) - index * kLatentSplit)) : 0;
      limits[r] = (int32_t)seen, end = most(end, seen);
      result.m[r] = -INFINITY, result.l[r] = 0.0f;
    }
    Ahead<Kv> next = fetch({x.b, index * kLatentSplit}, end);
    for (int64_t k = 0; k < end; k += Block::kKeys) {
      const int64_t n = least(Block::kKeys, end - k);
      Keys lines[Block::kKeys / kLine];
      const int64_t count = (n + kLine - 1) / kLine;
      next.spread(Block::beats_of_scores(x.count, D));  // what is left of this block, before the scores need it
      stage(x.b, index * kLatentSplit + k, n, copy, lines, next);
      bool sees[kRows / kPanel];
      for (int64_t r = 0; r < padded; ++r) {
        here[r] = limits[r] - (int32_t)k;
        sees[r / kPanel] = (r % kPanel && sees[r / kPanel]) || here[r] > 0;
      }
      Block::probabilities(f, lines, count, x.count, sees, D, x.q, kp, here, result.m, result.l, result.o, ldo, k == 0, probs, work, next);
      next = k + n < end ? fetch({x.b, index * kLatentSplit + k + n}, end - k - n) : fetch(then, Block::kKeys);
      next.spread(Block::beats_of_scores(x.count, D) + Block::beats(x.count, 0, Dv));
      Block::values(lines, count, x.count, sees, Dv, probs, result.o, ldo, k == 0, work, next);
    }
  }

  void clear(const State& x, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) x.m[r] = -INFINITY, x.l[r] = 0.0f;
  }
  void take_in(const State& x, const State& next, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r)
      if (next.m[r] != -INFINITY) merge_row(f, x.m + r, x.l + r, x.o + r * ldo, next.m[r], next.l[r], next.o + r * ldo, ldo);
  }
  void finish(const State& x, int64_t first, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      if (x.m[r] != -INFINITY) Block::unfold(x.o + r * ldo, Dv);
      finish_row(f, x.m[r], x.l[r], x.o + r * ldo, Dv, nullptr, (S*)p.out + (first + r) * Dv, p.lse + first + r);
    }
  }

  // Queries of `rows` rows from `first` on as right operands, a panel an item.
  int64_t panels(int64_t rows) const { return (rows + kPanel - 1) / kPanel; }
  void pack(int64_t first, int64_t rows, int64_t panel, Q* q) const {
    const int64_t r = panel * kPanel;
    Block::pack_queries((const S*)p.q + (first + r) * D, D, least(kPanel, rows - r), D, q + r * kp);
  }

  // The prefix's whole splits for the rows of all sequences, some at a time: what each has after them.
  void run_shared(float* scratch, int64_t floats, const State& result) const {
    const int64_t rows = p.batch * R, chunks = (rows + kRows - 1) / kRows;
    Scratch<Q> q(panels(rows) * kPanel * kp);
    parallel_for(p.threads, panels(rows), [&](int64_t i, int) { pack(0, rows, i, q); });
    clear(result, rows);
    const int64_t wave = least(shared, (4 * p.threads + chunks - 1) / chunks), apart = state_floats(kRows, ldo);
    Scratch<float> partials(wave * chunks * apart);
    for (int64_t done = 0; done < shared; done += wave) {
      const int64_t now = least(wave, shared - done);
      parallel_for(p.threads, now * chunks, [&](int64_t item, int thread) {
        const int64_t r = item % chunks * kRows;
        const int64_t following = done + (item + p.threads) / chunks;
        split({r, least(kRows, rows - r), 0, q + r * kp}, done + item / chunks, scratch + thread * floats,
              state(partials + item * apart, kRows), following < shared ? Place{0, following * kLatentSplit} : Place{});
      });
      parallel_for(p.threads, panels(rows), [&](int64_t i, int) {
        const int64_t r = i * kPanel, chunk = r / kRows;
        for (int64_t s = 0; s < now; ++s)
          take_in(after(result, r, ldo), after(state(partials + (s * chunks + chunk) * apart, kRows), r % kRows, ldo),
                  least(kPanel, rows - r));
      });
    }
  }

  void run() const {
    if (R == 0) return;
    const int64_t B = p.batch, floats = scratch_floats();
    Scratch<int64_t> before(B + 1);  // own splits of the sequences before b
    before[0] = 0;
    int64_t longest = 0;
    for (int64_t b = 0; b < B; ++b) before[b + 1] = before[b] + splits(b), longest = most(longest, splits(b));
    const int64_t total = before[B];
    int64_t rows = round_up(least(R, kRows), kPanel);  // of an item
    while (rows > kPanel && total * ((R + rows - 1) / rows) < p.threads) rows = round_up(rows / 2, kPanel);
    const int64_t chunks = (R + rows - 1) / rows, apart = state_floats(rows, ldo);
    const bool whole = longest * 4 * p.threads <= total * chunks || total * chunks * apart > kMostPartials;

    Scratch<float> scratch(p.threads * floats), shared_state(shared ? state_floats(B * R, ldo) : 0);
    const State prefix = state(shared_state, B * R);
    if (shared) run_shared(scratch, floats, prefix);
    Scratch<Q> packed(B * panels(R) * kPanel * kp);
    parallel_for(p.threads, B * panels(R), [&](int64_t i, int) {
      const int64_t b = i / panels(R);
      pack(b * R, R, i % panels(R), packed + b * panels(R) * kPanel * kp);
    });
    const auto rows_of = [&](int64_t b, int64_t chunk) {
      const int64_t r = chunk * rows;
      return Rows{b * R + r, least(rows, R - r), b, packed + (b * panels(R) * kPanel + r) * kp};
    };
    // Where rows stand before their own splits: in `x`, or where the prefix left them.
    const auto begin = [&](const State& x, int64_t first, int64_t n) {
      if (shared) return after(prefix, first, ldo);
      clear(x, n);
      return x;
    };

    if (whole)
      return parallel_for(p.threads, B * chunks, [&](int64_t item, int thread) {
        const Rows x = rows_of(item / chunks, item % chunks);
        float* mine = scratch + thread * floats;
        float* states = mine + floats - 2 * state_floats(kRows, ldo);
        const State part = state(states, kRows), sum = begin(state(states + state_floats(kRows, ldo), kRows), x.first, x.count);
        const int64_t following = (item + p.threads) / chunks, own = shared * kLatentSplit;
        for (int64_t s = 0; s < splits(x.b); ++s) {
          split(x, shared + s, mine, part, s + 1 < splits(x.b) ? Place{x.b, own + (s + 1) * kLatentSplit} : following < B ? Place{following, own} : Place{});
          take_in(sum, part, x.count);
        }
        finish(sum, x.first, x.count);
      });

    Scratch<float> partials(total * chunks * apart);
    const auto place = [&](int64_t item) {
      int64_t b = 0;
      while (before[b + 1] * chunks <= item) ++b;
      return Place{b, shared + (item - before[b] * chunks) / chunks};
    };
    parallel_for(p.threads, total * chunks, [&](int64_t item, int thread) {
      const Place here = place(item);
      Place then = item + p.threads < total * chunks ? place(item + p.threads) : Place{};  // threads take items in turn, about
      then.key *= kLatentSplit;
      split(rows_of(here.b, (item - before[here.b] * chunks) % chunks), here.key, scratch + thread * floats,
            state(partials + item * apart, rows), then);
    });
    constexpr int64_t kSome = 4;  // rows merged at a time
    const int64_t blocks = (R + kSome - 1) / kSome;
    parallel_for(p.threads, B * blocks, [&](int64_t item, int thread) {
      const int64_t b = item / blocks, r = item % blocks * kSome, n = least(kSome, R - r), chunk = r / rows;
      const State sum = begin(state(scratch + thread * floats, kPanel), b * R + r, n);
      for (int64_t s = 0; s < splits(b); ++s)
        take_in(sum, after(state(partials + (before[b] * chunks + s * chunks + chunk) * apart, rows), r % rows, ldo), n);
      finish(sum, b * R + r, n);
    });
  }
};

template <class S> void decode(const MlaDecodeParams& p) {
  if (p.quantised) return Mla<S, fp8>(p).run();
  Mla<S, S>(p).run();
}

}  // namespace

void mla_decode(const MlaDecodeParams& p) {
  switch (p.dtype) {
    case DType::float32: return decode<float>(p);
    case DType::bfloat16: return decode<bf16>(p);
    case DType::float16: return decode<f16>(p);
  }
}

}  // namespace tk::TK_ISA
