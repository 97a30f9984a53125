// policy_loss: loss, metrics and the gradients to logprob, ref_logprob and entropy in one call (include/policy_loss.h).
// The mathematics of a token is include/policy_math.h; this file is the passes around it. B sequences, S tokens.
//
// Sequences are cut into blocks of kBlock tokens. Passes over all blocks, each a parallel loop:
//   1  the mask to bits, active tokens; sums a sequence's ratio, drift or rollout correction needs
//   2  (top_entropy) the entropy threshold by radix selection, the tokens at or above it
//   3  loss, metrics, gradients; where the ratio is the sequence's, the gradients past it and Σ slope
//   4  (ratio of the sequence) what the ratio adds to its tokens' gradients
// A block's sums are in double, lane by lane, and blocks are merged in order, so nothing depends on the thread count.
#include "policy_loss.h"

#include "grpo_kernels.h"
#include "parallel.h"
#include "policy_ops.h"
#include "radix_select.h"

namespace tk::TK_ISA {

namespace {

using Ops = VectorOps;
using policy::Level;
constexpr int64_t kBlock = 4096;      // tokens: with every tensor in use 128 KiB, in L2
constexpr int64_t kItem = 2 * kBlock; // tokens of a work item, so that short sequences do not make one each

struct Block {
  int64_t sequence, start, length;  // start: in its sequence
  int64_t place;                    // of its first token in contiguous [B, S] or [N]
  int64_t words;                    // of its first W mask bits
};

struct Partial {
  int64_t tokens = 0, bonus = 0, clipped_low = 0, clipped_high = 0;
  double log_ratio = 0, drift = 0, rollout = 0, log_weight = 0;  // pass 1
  double loss = 0, slope = 0, approx_kl = 0, ratio = 0, kl = 0, rollout_ratio = 0, kept = 0, entropy = 0, bonus_entropy = 0;
  float ratio_min = INFINITY, ratio_max = -INFINITY;
};

// W mask elements of `bytes` each as bits; n < W at the end of a row. keep: the bits of an element that count.
template <int bytes> inline uint32_t mask_bits(const void* mask, int64_t at, int n, uint64_t keep) {
  if constexpr (bytes == 1) {
    uint64_t x[2] = {0, 0};
    const uint8_t* p = (const uint8_t*)mask + at;
    if (n == W) memcpy(x, p, W);
    else memcpy(x, p, n);
#if defined(__AVX512F__)
    const __m128i all = _mm_set_epi64x((int64_t)x[1], (int64_t)x[0]);
    return (uint32_t)_mm_test_epi8_mask(all, all);
#else
    uint32_t bits = 0;
    for (int i = 0; i < (W + 7) / 8; ++i) {
      uint64_t y = x[i] | x[i] >> 4;
      y |= y >> 2;
      y = (y | y >> 1) & 0x0101010101010101u;
      bits |= (uint32_t)((y * 0x0102040810204080u) >> 56) << 8 * i;
    }
    return bits;
#endif
  }
  if (n == W && bytes == 4) {
    vi x;
    memcpy(&x, (const int32_t*)mask + at, sizeof x);
    return bits_of((x & (int32_t)keep) != 0);
  }
#if defined(__AVX512F__)
  if (n == W && bytes == 8) {
    const int64_t* p = (const int64_t*)mask + at;
    const __m512i all = _mm512_set1_epi64((int64_t)keep);
    return (uint32_t)_mm512_test_epi64_mask(_mm512_loadu_si512(p), all) |
           (uint32_t)_mm512_test_epi64_mask(_mm512_loadu_si512(p + 8), all) << 8;
  }
#endif
  uint32_t bits = 0;
  for (int i = 0; i < n; ++i) {
    uint64_t x = 0;
    memcpy(&x, (const char*)mask + (at + i) * bytes, bytes);  // little-endian
    bits |= (uint32_t)((x & keep) != 0) << i;
  }
  return bits;
}

// The mask bits of n tokens, W in a word; returns how many are set.
template <int bytes> int64_t pack_mask(const void* mask, int64_t at, int64_t n, bool is_float, uint16_t* words) {
  const uint64_t keep = is_float ? ~(uint64_t)0 >> (65 - 8 * bytes) : ~(uint64_t)0;  // a float's sign does not count
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += W) {
    const uint32_t bits = mask_bits<bytes>(mask, at + i, (int)least(W, n - i), keep);
    *words++ = (uint16_t)bits;
    count += count_bits(bits);
  }
  return count;
}
int64_t pack_mask(int bytes, const void* mask, int64_t at, int64_t n, bool is_float, uint16_t* words) {
  if (bytes == 1) return pack_mask<1>(mask, at, n, is_float, words);
  if (bytes == 2) return pack_mask<2>(mask, at, n, is_float, words);
  if (bytes == 4) return pack_mask<4>(mask, at, n, is_float, words);
  return pack_mask<8>(mask, at, n, is_float, words);
}

// Where the tokens of a block lie in each tensor.
struct Rows {
  const float *logprob, *old, *ref, *rollout, *entropy, *advantage;
  float a;  // the sequence's, where advantage is null
  Rows(const PolicyLossParams& p, const Block& b) {
    const auto at = [&](const float* x, int64_t stride) {
      return x ? x + (p.cu_seqlens ? b.place : b.sequence * stride + b.start) : nullptr;
    };
    logprob = at(p.logprob, p.logprob_stride);
    old = at(p.old_logprob, p.old_logprob_stride);
    ref = p.kl == policy::Kl::none ? nullptr : at(p.ref_logprob, p.ref_logprob_stride);
    rollout = at(p.rollout_logprob, p.rollout_logprob_stride);
    entropy = at(p.entropy, p.entropy_stride);
    advantage = p.advantage_per_token ? at(p.advantages, p.advantages_stride) : nullptr;
    a = p.advantage_per_token ? 0 : p.advantages[b.sequence * p.advantages_stride];
  }
  // n tokens from the i-th on, 0 where masked; plain: ref and rollout do not matter
  template <bool plain = false> policy::Token<Ops> token(int64_t i, int n, vi on) const {
    const auto get = [&](const float* x) { return select(on, load_n(x + i, n), zero()); };
    policy::Token<Ops> t;
    t.logprob = get(logprob);
    t.old = old ? get(old) : t.logprob;
    t.ref = !plain && ref ? get(ref) : zero();
    t.rollout = t.old;
    if (!plain && rollout) {
      const vf x = get(rollout);
      t.rollout = select(x != x, t.old, x);
    }
    t.advantage = advantage ? get(advantage) : splat(a);
    t.top = splat(1.0f);
    return t;
  }
};

class PolicyLoss {
 public:
  explicit PolicyLoss(const PolicyLossParams& p)
      : p_(p), o_(p), sums_(policy::needs_sequence_sums(p)),
        plain_(p.kl == policy::Kl::none && p.rollout == policy::Rollout::none && !p.off_policy && !p.entropy && !(p.top_entropy > 0)),
        count_(block_count(p)), blocks_(count_), partials_(count_),
        words_(lay_out()), factors_(p.sequences), weights_(p.sequences) {
    threads_ = (int)least(p.threads, 1 + places_ / kItem);
    group_ = count_ == 0 ? 1 : least(256, 1 + kItem * count_ / (places_ + 1));
  }

  void run() {
    for_blocks([&](int64_t i) { first_pass(i); });
    finish_sequences();
    if (p_.top_entropy > 0) select_top();
    else bonus_ = tokens_;
    for_blocks([&](int64_t i) { loss_pass(i); });
    if (p_.dlogprob && o_.level != Level::token) add_sequence_gradients();
    write_metrics();
  }

 private:
  static int64_t sequence_length(const PolicyLossParams& p, int64_t b) {
    return p.cu_seqlens ? p.cu_seqlens[b + 1] - p.cu_seqlens[b] : p.length;
  }
  static int64_t block_count(const PolicyLossParams& p) {
    int64_t count = 0;
    for (int64_t b = 0; b < p.sequences; ++b) count += (sequence_length(p, b) + kBlock - 1) / kBlock;
    return count;
  }
  // Fills the blocks; returns how many mask words they have.
  int64_t lay_out() {
    int64_t block = 0, words = 0;
    for (int64_t b = 0; b < p_.sequences; ++b) {
      const int64_t length = sequence_length(p_, b);
      for (int64_t start = 0; start < length; start += kBlock) {
        const int64_t n = least(kBlock, length - start);
        partials_[block] = Partial{};
        blocks_[block++] = {b, start, n, places_ + start, words};
        words += (n + W - 1) / W;
      }
      places_ += length;
    }
    return words;
  }

  template <class F> void for_blocks(const F& body) {
    parallel_for(threads_, (count_ + group_ - 1) / group_, [&](int64_t item, int) {
      for (int64_t i = item * group_; i < least(count_, (item + 1) * group_); ++i) body(i);
    });
  }

  // The mask as bits, and the sums of a sequence.
  void first_pass(int64_t index) {
    const Block b = blocks_[index];
    Partial& out = partials_[index];
    const uint16_t* words = words_ + b.words;
    out.tokens = pack_mask(p_.mask_bytes, p_.mask, p_.cu_seqlens ? b.place : b.sequence * p_.mask_stride + b.start, b.length,
                           p_.mask_is_float, words_ + b.words);
    if (!sums_) return;
    const policy::Options o = o_;
    const Rows rows(p_, b);
    const float log_low = o.rollout_low > 0 ? logf(o.rollout_low) : -INFINITY;
    const float log_high = o.rollout_high > 0 ? logf(o.rollout_high) : -INFINITY;
    Sum log_ratio, drift, rollout, log_weight;
    over_words(b, [&](int64_t i, int n) {
      const uint32_t bits = *words++;
      if (bits == 0) return;
      const vi on = lanes_of(bits);
      const policy::Token<Ops> t = rows.token(i, n, on);
      const policy::SequenceTerms<Ops> s = policy::sequence_terms<Ops>(t, o, log_low, log_high);
      log_ratio.add(s.log_ratio);  // masked lanes are 0 in these three
      drift.add(s.drift);
      rollout.add(s.rollout);
      if (o.form == policy::Form::vespo) log_weight.add(select(on, s.log_weight, zero()));
    }, [&] {
      log_ratio.flush();
      drift.flush();
      rollout.flush();
      log_weight.flush();
    });
    out.log_ratio = log_ratio.total();
    out.drift = drift.total();
    out.rollout = rollout.total();
    out.log_weight = log_weight.total();
  }

  // body(first token, how many) for every W tokens of a block; flush() after every Sum::kRun of them.
  template <class F, class G> static void over_words(const Block& b, const F& body, const G& flush) {
    for (int64_t start = 0; start < b.length; start += Sum::kRun * W) {
      const int64_t end = least(b.length, start + Sum::kRun * W);
      for (int64_t i = start; i < end; i += W) body(i, (int)least(W, b.length - i));
      flush();
    }
  }

  // body(sequence, first block, past its last block), in order.
  template <class F> void for_sequences(const F& body) {
    for (int64_t b = 0, block = 0; b < p_.sequences; ++b) {
      const int64_t first = block;
      while (block < count_ && blocks_[block].sequence == b) ++block;
      body(b, first, block);
    }
  }

  void finish_sequences() {
    for (int64_t i = 0; i < count_; ++i) tokens_ += partials_[i].tokens;
    const double given = p_.total > 0 ? p_.total : (double)tokens_, total = given < 1 ? 1 : given;
    for_sequences([&](int64_t b, int64_t first, int64_t last) {
      Partial s;
      for (int64_t i = first; i < last; ++i) {
        s.tokens += partials_[i].tokens;
        s.log_ratio += partials_[i].log_ratio;
        s.drift += partials_[i].drift;
        s.rollout += partials_[i].rollout;
        s.log_weight += partials_[i].log_weight;
      }
      factors_[b] = sums_ ? policy::finish_sequence(o_, s.log_ratio, s.drift, s.rollout, s.log_weight, s.tokens)
                          : policy::SequenceFactors{};
      weights_[b] = policy::sequence_weight(o_, s.tokens, p_.sequences, total);
    });
  }

  // body(W entropies, their lanes that are active) over a block.
  template <class F> void over_entropies(int64_t index, const F& body) const {
    const Block b = blocks_[index];
    const float* entropy = Rows(p_, b).entropy;
    const uint16_t* words = words_ + b.words;
    for (int64_t i = 0; i < b.length; i += W, ++words)
      if (*words) body(load_n(entropy + i, (int)least(W, b.length - i)), (uint32_t)*words);
  }

  // The entropy at the (1 - top_entropy) quantile of the active tokens, linear between neighbours, and how many reach it.
  void select_top() {
    const int64_t last = tokens_ > 0 ? tokens_ - 1 : 0;
    const double position = (1.0 - p_.top_entropy) * (double)last;
    const int64_t low = (int64_t)position;
    const float step = (float)(position - (double)low);
    float a, b;
    radix_select(threads_, count_, group_, low, least(low + 1, last), &a, &b,
                 [&](int64_t index, const auto& body) { over_entropies(index, body); });
    const float difference = b - a, rise = step * difference;
    threshold_ = a + rise;
    for_blocks([&](int64_t index) {
      int64_t count = 0;
      over_entropies(index, [&](vf x, uint32_t bits) { count += count_bits(bits & bits_of(x >= threshold_)); });
      partials_[index].bonus = count;
    });
    for (int64_t i = 0; i < count_; ++i) bonus_ += partials_[i].bonus;
  }

  // The loss pass with the form and (plain) the absence of every addition known to the compiler: a token's arithmetic is all it
  // costs, and options looked at in the loop were two fifths of it.
  void loss_pass(int64_t index) {
    using policy::Form;
    if (!plain_) return loss_pass<Form::clipped, false>(index);
    if (o_.form == Form::clipped) return loss_pass<Form::clipped, true>(index);
    if (o_.form == Form::cispo) return loss_pass<Form::cispo, true>(index);
    if (o_.form == Form::sapo) return loss_pass<Form::sapo, true>(index);
    if (o_.form == Form::vespo) return loss_pass<Form::vespo, true>(index);
    return loss_pass<Form::reinforce, true>(index);
  }
  template <policy::Form form, bool plain> void loss_pass(int64_t index) {
    if (o_.level == Level::token) loss_pass<form, plain, true>(index);
    else loss_pass<form, plain, false>(index);
  }

  // plain: o_.form is `form`, and there is no KL, rollout correction, off-policy mask or entropy. own_ratio: a token's own.
  template <policy::Form form, bool plain, bool own_ratio> void loss_pass(int64_t index) {
    const Block b = blocks_[index];
    policy::Options o = o_;
    if constexpr (own_ratio) o.level = Level::token;
    if constexpr (plain) {
      o.form = form;
      o.kl = policy::Kl::none;
      o.rollout = policy::Rollout::none;
      o.kl_correction = o.off_policy = 0;
    }
    const policy::SequenceFactors f = factors_[b.sequence];
    const Rows rows(p_, b);
    const vf weight = splat((float)weights_[b.sequence]);
    const vf dentropy = splat((float)(-p_.entropy_coef / (bonus_ > 0 ? (double)bonus_ : 1.0)));
    const bool top = p_.top_entropy > 0, masks_rollout = o.rollout != policy::Rollout::none;
    const bool clips = !plain || form == policy::Form::clipped || form == policy::Form::cispo;
    const float threshold = threshold_;
    const policy::ClipBounds clip = policy::clip_bounds(o);
    const vf low = splat(clip.low), high = splat(clip.high);
    float* const dlogprob = p_.dlogprob && (own_ratio || !past_ratio_is_zero()) ? p_.dlogprob + b.place : nullptr;
    float* const dref = p_.dref_logprob ? p_.dref_logprob + b.place : nullptr;
    float* const dent = p_.dentropy ? p_.dentropy + b.place : nullptr;
    const uint16_t* words = words_ + b.words;
    Sum loss, slope, approx_kl, ratio, kl, rollout_ratio, kept, entropy, bonus_entropy;
    vf least_ratio = splat(INFINITY), most_ratio = splat(-INFINITY);
    vi clipped_low = splat(0), clipped_high = splat(0);  // lane by lane

    over_words(b, [&](int64_t i, int n) {
      const uint32_t bits = *words++;
      if (bits == 0) {
        if (dlogprob) store_n(dlogprob + i, zero(), n);
        if (!plain && dref) store_n(dref + i, zero(), n);
        if (!plain && dent) store_n(dent + i, zero(), n);
        return;
      }
      const vi on = lanes_of(bits);
      const auto keep = [&](vf x) { return select(on, x, zero()); };
      policy::Token<Ops> t = rows.token<plain>(i, n, on);
      vi bonus = on;
      if (!plain && rows.entropy) {
        const vf h = keep(load_n(rows.entropy + i, n));
        entropy.add(h);
        if (top) {
          bonus &= h >= threshold;
          t.top = select(bonus, splat(1.0f), zero());
          bonus_entropy.add(select(bonus, h, zero()));
        }
      }
      const policy::TokenLoss<Ops> x = policy::token_loss<Ops>(t, f, o);
      loss.add(keep(x.loss));
      approx_kl.add(keep(x.approx_kl));
      if constexpr (own_ratio) {
        ratio.add(keep(x.ratio));
        least_ratio = min(least_ratio, select(on, x.ratio, splat(INFINITY)));
        most_ratio = max(most_ratio, select(on, x.ratio, splat(-INFINITY)));
        if (dlogprob) store_n(dlogprob + i, keep(weight * policy::token_gradient<Ops>(x)), n);
      } else {
        slope.add(keep(weight * x.slope));
        if (dlogprob) store_n(dlogprob + i, keep(weight * x.direct), n);
      }
      if (clips) {
        clipped_low -= on & (x.ratio < low) & (t.advantage < 0.0f);
        clipped_high -= on & (x.ratio > high) & (t.advantage > 0.0f);
      }
      if constexpr (!plain) {
        if (o.kl != policy::Kl::none) kl.add(keep(x.kl));
        if (masks_rollout) rollout_ratio.add(keep(x.rollout_ratio));
        if (o.off_policy) kept.add(keep(x.kept));
        if (dref) store_n(dref + i, keep(weight * x.dref), n);
        if (dent) store_n(dent + i, select(bonus, dentropy, zero()), n);
      }
    }, [&] {
      loss.flush();
      approx_kl.flush();
      if constexpr (own_ratio) ratio.flush();
      else slope.flush();
      if constexpr (!plain) {
        kl.flush();
        rollout_ratio.flush();
        kept.flush();
        entropy.flush();
        bonus_entropy.flush();
      }
    });

    Partial& out = partials_[index];
    out.loss = loss.total();
    out.slope = slope.total();
    out.approx_kl = approx_kl.total();
    out.ratio = ratio.total();
    out.kl = kl.total();
    out.rollout_ratio = rollout_ratio.total();
    out.kept = kept.total();
    out.entropy = entropy.total();
    out.bonus_entropy = top ? bonus_entropy.total() : out.entropy;
    for (int i = 0; i < W; ++i) {
      out.clipped_low += clipped_low[i];
      out.clipped_high += clipped_high[i];
    }
    if (own_ratio) {
      out.ratio_max = reduce_max(most_ratio);
      out.ratio_min = -reduce_max(-least_ratio);
    } else if (out.tokens > 0) {
      out.ratio = (double)f.ratio * (double)out.tokens;
      out.ratio_min = out.ratio_max = f.ratio;
    }
  }

  // Where the whole gradient goes through the sequence's ratio, the last pass writes it and the loss pass leaves it alone.
  bool past_ratio_is_zero() const {
    return o_.kl == policy::Kl::none && (o_.form == policy::Form::clipped || o_.form == policy::Form::sapo);
  }

  void add_sequence_gradients() {
    Scratch<float> g(p_.sequences);
    for_sequences([&](int64_t b, int64_t first, int64_t last) {
      double slope = 0;
      for (int64_t i = first; i < last; ++i) slope += partials_[i].slope;
      g[b] = (float)(slope * factors_[b].slope);
    });
    for_blocks([&](int64_t index) {
      const Block b = blocks_[index];
      const policy::Options o = o_;
      const Rows rows(p_, b);
      float* const dlogprob = p_.dlogprob + b.place;
      const uint16_t* words = words_ + b.words;
      const float slope = g[b.sequence];
      const bool alone = past_ratio_is_zero();
      for (int64_t i = 0; i < b.length; i += W) {
        const int n = (int)least(W, b.length - i);
        const uint32_t bits = *words++;
        if (bits == 0) {
          if (alone) store_n(dlogprob + i, zero(), n);
          continue;
        }
        const vi on = lanes_of(bits);
        const policy::Token<Ops> t = rows.token<true>(i, n, on);
        const vf more = select(on, policy::sequence_gradient<Ops>(t.logprob, t.old, slope, o), zero());
        store_n(dlogprob + i, alone ? more : load_n(dlogprob + i, n) + more, n);
      }
    });
  }

  void write_metrics() {
    Partial s;
    double loss = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const Partial& x = partials_[i];
      loss += weights_[blocks_[i].sequence] * x.loss;
      s.approx_kl += x.approx_kl;
      s.ratio += x.ratio;
      s.kl += x.kl;
      s.rollout_ratio += x.rollout_ratio;
      s.kept += x.kept;
      s.entropy += x.entropy;
      s.bonus_entropy += x.bonus_entropy;
      s.clipped_low += x.clipped_low;
      s.clipped_high += x.clipped_high;
      s.ratio_min = x.ratio_min < s.ratio_min ? x.ratio_min : s.ratio_min;
      s.ratio_max = x.ratio_max > s.ratio_max ? x.ratio_max : s.ratio_max;
    }
    if (isnan(s.ratio)) s.ratio_min = s.ratio_max = NAN;  // the extremes above pass NaN over
    const double count = tokens_ > 0 ? (double)tokens_ : 1.0;
    float* m = p_.metrics;
    m[kPolicyLoss] = (float)loss;
    if (p_.entropy_coef != 0) loss -= p_.entropy_coef * s.bonus_entropy / (bonus_ > 0 ? (double)bonus_ : 1.0);
    *p_.loss = (float)loss;
    m[kApproxKl] = (float)(s.approx_kl / count);
    m[kRatioMean] = (float)(s.ratio / count);
    m[kRatioMin] = s.ratio_min;
    m[kRatioMax] = s.ratio_max;
    m[kClipLow] = (float)((double)s.clipped_low / count);
    m[kClipHigh] = (float)((double)s.clipped_high / count);
    m[kClipFraction] = (float)((double)(s.clipped_low + s.clipped_high) / count);
    m[kTokens] = (float)tokens_;
    m[kKl] = (float)(s.kl / count);
    m[kRolloutRatio] = (float)(s.rollout_ratio / count);
    m[kOffPolicyKept] = (float)(s.kept / count);
    m[kEntropy] = (float)(s.entropy / count);
  }

  const PolicyLossParams& p_;
  const policy::Options& o_;
  const bool sums_, plain_;
  const int64_t count_;
  int64_t places_ = 0, tokens_ = 0, bonus_ = 0;
  Scratch<Block> blocks_;
  Scratch<Partial> partials_;
  Scratch<uint16_t> words_;                  // W mask bits each
  Scratch<policy::SequenceFactors> factors_; // [B]
  Scratch<double> weights_;                  // [B]
  float threshold_ = 0;
  int threads_ = 1;
  int64_t group_ = 1;  // blocks of a work item
};

}  // namespace

void policy_loss(const PolicyLossParams& p) { PolicyLoss(p).run(); }

}  // namespace tk::TK_ISA
