// policy_loss: loss, metrics and the gradients to logprob, ref_logprob and entropy in one call (include/policy_loss.h).
// The mathematics of a token is include/policy_math.h; this file is the passes around it. B sequences, S tokens.
//
// Sequences are cut into blocks of kBlock tokens. Passes over the blocks of a sequence:
//   1  the mask to bits, active tokens
//   2  the sums that the sequence's ratio, drift or rollout correction needs
//   3  loss, metrics, gradients; where the ratio is the sequence's, the gradients past it and Σ slope
//   4  (ratio of the sequence) what the ratio adds to its tokens' gradients
// A thread takes a sequence through all of them while it is in its cache. Pass 1 goes over the whole batch before the rest
// where that needs the batch's active tokens or, in between, the entropy threshold of its top tokens (radix selection); and
// each pass does where sequences are too few or too long to share out.
// A block's sums are in double, lane by lane, and blocks are merged in order, so nothing depends on the thread count.
#include "policy_loss.h"

#include "grpo_kernels.h"
#include "parallel.h"
#include "policy_mask.h"
#include "policy_ops.h"
#include "radix_select.h"

namespace tk::TK_ISA {

namespace {

using Ops = VectorOps;
using V = Ops::V;
using M = Ops::M;
using policy::Level;
constexpr int64_t kBlock = 4096;      // tokens: with every tensor in use 128 KiB, in L2
constexpr int64_t kStream = 1 << 17;  // tokens from which on dlogprob passes the caches by: the call takes 15-30 % less
constexpr int64_t kItem = 2 * kBlock; // tokens of a work item, so that short sequences do not make one each

struct Block {
  int64_t sequence, start, length;  // start: in its sequence
  int64_t place;                    // of its first token in contiguous [B, S] or [N]
  int64_t words;                    // of its first W mask bits
};

struct Partial {
  int64_t tokens = 0, bonus = 0, clipped_low = 0, clipped_high = 0;
  double log_ratio = 0, drift = 0, rollout = 0, log_weight = 0;  // pass 2
  double loss = 0, slope = 0, approx_kl = 0, ratio = 0, kl = 0, rollout_ratio = 0, kept = 0, entropy = 0, bonus_entropy = 0;
  float ratio_min = INFINITY, ratio_max = -INFINITY;
};

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
  template <bool plain> policy::Token<Ops> token(int64_t i, int n, M on) const {
    const auto get = [&](const float* x) { return select(on, Ops::load(x + i, n), Ops::splat(0)); };
    policy::Token<Ops> t;
    t.logprob = get(logprob);
    t.old = old ? get(old) : t.logprob;
    t.ref = !plain && ref ? get(ref) : Ops::splat(0);
    t.rollout = t.old;
    if (!plain && rollout) {
      const V x = get(rollout);
      t.rollout = select(x != x, t.old, x);
    }
    t.advantage = advantage ? get(advantage) : Ops::splat(a);
    t.top = Ops::splat(1);
    return t;
  }
};

class PolicyLoss {
 public:
  explicit PolicyLoss(const PolicyLossParams& p)
      : p_(p), o_(p), sums_(policy::needs_sequence_sums(p)),
        plain_(p.kl == policy::Kl::none && p.rollout == policy::Rollout::none && !p.off_policy && !p.entropy && !(p.top_entropy > 0)),
        count_(block_count(p)), blocks_(count_), partials_(count_), first_(p.sequences + 1),
        words_(lay_out()), factors_(p.sequences), weights_(p.sequences) {
    threads_ = (int)least(p.threads, 1 + places_ / kItem);
    group_ = count_ == 0 ? 1 : least(256, 1 + kItem * count_ / (places_ + 1));
  }

  void run() {
    const bool ratio_gradients = p_.dlogprob && o_.level != Level::token;
    const bool batch_first = (o_.reduction == policy::Reduction::total && !(p_.total > 0)) || p_.entropy || p_.top_entropy > 0;
    if (batch_first) {
      for_blocks([&](int64_t i) { pack_pass(i); });
      count_tokens();
      if (p_.top_entropy > 0) select_top();
      else bonus_ = tokens_;
    }
    if (longest_ * 2 * threads_ <= places_) {
      for_sequences([&](int64_t b) {
        const auto each = [&](const auto& pass) {
          for (int64_t i = first_[b]; i < first_[b + 1]; ++i) pass(i);
        };
        if (!batch_first) each([&](int64_t i) { pack_pass(i); });
        if (sums_) each([&](int64_t i) { sums_pass(i); });
        finish_sequence(b);
        each([&](int64_t i) { loss_pass(i); });
        if (ratio_gradients) each([&, g = ratio_slope(b)](int64_t i) { ratio_gradient_pass(i, g); });
      });
    } else {
      if (!batch_first) for_blocks([&](int64_t i) { pack_pass(i); });
      if (sums_) for_blocks([&](int64_t i) { sums_pass(i); });
      for (int64_t b = 0; b < p_.sequences; ++b) finish_sequence(b);
      for_blocks([&](int64_t i) { loss_pass(i); });
      if (ratio_gradients) for_blocks([&](int64_t i) { ratio_gradient_pass(i, ratio_slope(blocks_[i].sequence)); });
    }
    if (!batch_first) {
      count_tokens();
      bonus_ = tokens_;
    }
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
      first_[b] = block;
      longest_ = longest_ > length ? longest_ : length;
      for (int64_t start = 0; start < length; start += kBlock) {
        const int64_t n = least(kBlock, length - start);
        partials_[block] = Partial{};
        blocks_[block++] = {b, start, n, places_ + start, words};
        words += (n + Ops::kWidth - 1) / Ops::kWidth * Ops::kWords;
      }
      places_ += length;
    }
    first_[p_.sequences] = block;
    return words;
  }

  template <class F> void for_blocks(const F& body) {
    parallel_for_near(threads_, (count_ + group_ - 1) / group_, [&](int64_t item, int) {
      for (int64_t i = item * group_; i < least(count_, (item + 1) * group_); ++i) body(i);
    });
  }

  // body(sequence), in items of about kItem tokens.
  template <class F> void for_sequences(const F& body) {
    const int64_t B = p_.sequences, group = least(256, 1 + kItem * B / (places_ + 1));
    parallel_for_near(threads_, (B + group - 1) / group, [&](int64_t item, int) {
      for (int64_t b = item * group; b < least(B, (item + 1) * group); ++b) body(b);
    });
  }

  void pack_pass(int64_t index) {
    const Block b = blocks_[index];
    partials_[index].tokens = pack_mask(p_.mask_bytes, p_.mask, p_.cu_seqlens ? b.place : b.sequence * p_.mask_stride + b.start,
                                        b.length, p_.mask_is_float, words_ + b.words);
  }

  void count_tokens() {
    for (int64_t i = 0; i < count_; ++i) tokens_ += partials_[i].tokens;
  }

  void sums_pass(int64_t index) {
    const Block b = blocks_[index];
    Partial& out = partials_[index];
    const uint16_t* words = words_ + b.words;
    const policy::Options o = o_;
    const Rows rows(p_, b);
    if (plain_) {  // one of the four sums, without the tensors that the others read
      const bool vespo = o.form == policy::Form::vespo;
      Sum sum;
      over_tokens(b, [&](int64_t i, int n) {
        const uint16_t* bits = words + i / W;
        if (Ops::none(bits)) return;
        const policy::Token<Ops> t = rows.token<true>(i, n, Ops::lanes(bits));
        sum.add(vespo ? policy::log_weight<Ops>(t) : policy::log_ratio<Ops>(t, o));
      }, [&] { sum.flush(); });
      (vespo ? out.log_weight : out.log_ratio) = sum.total();
      return;
    }
    const float log_low = o.rollout_low > 0 ? logf(o.rollout_low) : -INFINITY;
    const float log_high = o.rollout_high > 0 ? logf(o.rollout_high) : -INFINITY;
    Sum log_ratio, drift, rollout, log_weight;
    over_tokens(b, [&](int64_t i, int n) {
      const uint16_t* bits = words + i / W;
      if (Ops::none(bits)) return;
      const M on = Ops::lanes(bits);
      const policy::Token<Ops> t = rows.token<false>(i, n, on);
      const policy::SequenceTerms<Ops> s = policy::sequence_terms<Ops>(t, o, log_low, log_high);
      log_ratio.add(s.log_ratio);  // masked lanes are 0 in these three
      drift.add(s.drift);
      rollout.add(s.rollout);
      if (o.form == policy::Form::vespo) log_weight.add(select(on, s.log_weight, Ops::splat(0)));
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

  // body(first token, how many) for every kWidth tokens of a block; flush() after every Sum::kRun vectors.
  template <class F, class G> static void over_tokens(const Block& b, const F& body, const G& flush) {
    for (int64_t start = 0; start < b.length; start += Sum::kRun * W) {
      const int64_t end = least(b.length, start + Sum::kRun * W);
      for (int64_t i = start; i < end; i += Ops::kWidth) body(i, (int)least(Ops::kWidth, b.length - i));
      flush();
    }
  }

  void finish_sequence(int64_t b) {
    Partial s;
    for (int64_t i = first_[b]; i < first_[b + 1]; ++i) {
      s.tokens += partials_[i].tokens;
      s.log_ratio += partials_[i].log_ratio;
      s.drift += partials_[i].drift;
      s.rollout += partials_[i].rollout;
      s.log_weight += partials_[i].log_weight;
    }
    const double given = p_.total > 0 ? p_.total : (double)tokens_, total = given < 1 ? 1 : given;
    factors_[b] = sums_ ? policy::finish_sequence(o_, s.log_ratio, s.drift, s.rollout, s.log_weight, s.tokens)
                        : policy::SequenceFactors{};
    weights_[b] = policy::sequence_weight(o_, s.tokens, p_.sequences, total);
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
    const V weight = Ops::splat((float)weights_[b.sequence]), none = Ops::splat(0);
    const V dentropy = Ops::splat((float)(-p_.entropy_coef / (bonus_ > 0 ? (double)bonus_ : 1.0)));
    const bool top = p_.top_entropy > 0, masks_rollout = o.rollout != policy::Rollout::none;
    const bool clips = !plain || form == policy::Form::clipped || form == policy::Form::cispo;
    const float threshold = threshold_;
    const policy::ClipBounds clip = policy::clip_bounds(o);
    float* const dlogprob = p_.dlogprob && (own_ratio || !past_ratio_is_zero()) ? p_.dlogprob + b.place : nullptr;
    const bool streams = own_ratio && passes_caches(dlogprob);
    float* const dref = p_.dref_logprob ? p_.dref_logprob + b.place : nullptr;
    float* const dent = p_.dentropy ? p_.dentropy + b.place : nullptr;
    const uint16_t* words = words_ + b.words;
    const bool fetches = sums_ && rows.old;  // the tokens behind these, whose sums would wait for memory with nothing else to do
    const float *const next = rows.logprob + b.length, *const next_old = rows.old + b.length;
    Sum loss, slope, approx_kl, ratio, kl, rollout_ratio, kept, entropy, bonus_entropy;
    vf least_ratio = splat(INFINITY), most_ratio = splat(-INFINITY);
    int64_t clipped_low = 0, clipped_high = 0;

    over_tokens(b, [&](int64_t i, int n) {
      const uint16_t* bits = words + i / W;
      if (Ops::none(bits)) {
        if (dlogprob) Ops::store(dlogprob + i, none, n, streams);
        if (!plain && dref) Ops::store(dref + i, none, n);
        if (!plain && dent) Ops::store(dent + i, none, n);
        return;
      }
      if (fetches) {
        for (int k = 0; k < Ops::kWidth; k += 16) {
          __builtin_prefetch(next + i + k, 0, 2);
          __builtin_prefetch(next_old + i + k, 0, 2);
        }
      }
      const M on = Ops::lanes(bits);
      const auto keep = [&](V x) { return select(on, x, none); };
      policy::Token<Ops> t = rows.token<plain>(i, n, on);
      M bonus = on;
      if (!plain && rows.entropy) {
        const V h = keep(Ops::load(rows.entropy + i, n));
        entropy.add(h);
        if (top) {
          bonus = bonus & (h >= Ops::splat(threshold));
          t.top = select(bonus, Ops::splat(1), none);
          bonus_entropy.add(select(bonus, h, none));
        }
      }
      const policy::TokenLoss<Ops> x = policy::token_loss<Ops>(t, f, o);
      loss.add(keep(x.loss));
      approx_kl.add(keep(x.approx_kl));
      if constexpr (own_ratio) {
        ratio.add(keep(x.ratio));
        least_ratio = min(least_ratio, Ops::fold_min(select(on, x.ratio, Ops::splat(INFINITY))));
        most_ratio = max(most_ratio, Ops::fold_max(select(on, x.ratio, Ops::splat(-INFINITY))));
        if (dlogprob) Ops::store(dlogprob + i, keep(weight * policy::token_gradient<Ops>(x)), n, streams);
      } else {
        slope.add(keep(weight * x.slope));
        if (dlogprob) Ops::store(dlogprob + i, keep(weight * x.direct), n);
      }
      if (clips) {
        clipped_low += Ops::count(on & (x.ratio < Ops::splat(clip.low)) & (t.advantage < none));
        clipped_high += Ops::count(on & (x.ratio > Ops::splat(clip.high)) & (t.advantage > none));
      }
      if constexpr (!plain) {
        if (o.kl != policy::Kl::none) kl.add(keep(x.kl));
        if (masks_rollout) rollout_ratio.add(keep(x.rollout_ratio));
        if (o.off_policy) kept.add(keep(x.kept));
        if (dref) Ops::store(dref + i, keep(weight * x.dref), n);
        if (dent) Ops::store(dent + i, select(bonus, dentropy, none), n);
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
    if (streams) fence();
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
    out.clipped_low = clipped_low;
    out.clipped_high = clipped_high;
    if (own_ratio) {
      out.ratio_max = reduce_max(most_ratio);
      out.ratio_min = -reduce_max(-least_ratio);
    } else if (out.tokens > 0) {
      out.ratio = (double)f.ratio * (double)out.tokens;
      out.ratio_min = out.ratio_max = f.ratio;
    }
  }

  bool passes_caches(const float* gradient) const {
    return gradient && places_ >= kStream && (uintptr_t)gradient % (W * sizeof(float)) == 0;
  }

  // Where the whole gradient goes through the sequence's ratio, the last pass writes it and the loss pass leaves it alone.
  bool past_ratio_is_zero() const {
    return o_.kl == policy::Kl::none && (o_.form == policy::Form::clipped || o_.form == policy::Form::sapo);
  }

  // What d loss / d ratio of a sequence gives each of its tokens' log ratios.
  float ratio_slope(int64_t b) const {
    double slope = 0;
    for (int64_t i = first_[b]; i < first_[b + 1]; ++i) slope += partials_[i].slope;
    return (float)(slope * factors_[b].slope);
  }

  void ratio_gradient_pass(int64_t index, float slope) {
    const Block b = blocks_[index];
    const policy::Options o = o_;
    const Rows rows(p_, b);
    float* const dlogprob = p_.dlogprob + b.place;
    const uint16_t* words = words_ + b.words;
    const bool alone = past_ratio_is_zero(), streams = alone && passes_caches(dlogprob);
    const V none = Ops::splat(0);
    over_tokens(b, [&](int64_t i, int n) {
      const uint16_t* bits = words + i / W;
      if (Ops::none(bits)) {
        if (alone) Ops::store(dlogprob + i, none, n, streams);
        return;
      }
      const M on = Ops::lanes(bits);
      const policy::Token<Ops> t = rows.token<true>(i, n, on);
      const V more = select(on, policy::sequence_gradient<Ops>(t.logprob, t.old, slope, o), none);
      Ops::store(dlogprob + i, alone ? more : Ops::load(dlogprob + i, n) + more, n, streams);
    }, [] {});
    if (streams) fence();
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
  int64_t places_ = 0, longest_ = 0, tokens_ = 0, bonus_ = 0;
  Scratch<Block> blocks_;
  Scratch<Partial> partials_;
  Scratch<int64_t> first_;                   // of a sequence's blocks; [B + 1]
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
