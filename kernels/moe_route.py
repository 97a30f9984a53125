"""route: scores, choice, weights and the slots sorted by expert, forward and backward.

Shapes: N tokens, E experts in G groups of E/G, K experts a token; a slot is a (token, k) pair, number token·K + k. A tile is
[ROWS, BLOCK_E] of logits, its experts in G (padded) runs of E/G (padded), so that neither E nor G has to be a power of two.

Rules: reference/moe.py. Keys are integers in the order of the floats they come from, NaN highest, so that ties go to the lower
number. Where the score rises with the logit and nothing is added to it, the logits themselves are the keys.

    softmax of the chosen    dz_k = w_k·(d_k − Σ w·d),  d = scaling·dweights
    softmax                  dz_e = p_e·(d_e − Σ p·d), over all E
    the others               dz = s'(z)·(d_k − Σ s·d / P) / P,  P = Σ s + 1e-20 (not renormalised: s'(z)·d_k)

The sort: a histogram of every block of slots, prefix sums over the blocks of each expert, and each slot's place from its rank
among its block's. Only integers are summed: the order is fixed, within an expert by slot. An expert outside [0, E) is not here: its
slot weighs 0, counts nowhere and comes last.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, configs_moe
from .primitives import convert, exact_exp, launch, logistic

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCORES = ("softmax", "softmax_topk", "sigmoid", "sigmoid_topk", "sqrtsoftplus")
SOFTMAX, SOFTMAX_TOPK, SIGMOID, SIGMOID_TOPK, SQRTSOFTPLUS = (tl.constexpr(i) for i in range(5))
OUT = tl.constexpr(-(2**31))  # below every number's key
LAST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _keys_of(x):
    """int32 in the order of the float32 x: −0 is 0, NaN is above everything."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & LAST), LAST)


@triton.jit
def _float_of(key):
    return (key ^ ((key >> 31) & LAST)).to(tl.float32, bitcast=True)


@triton.jit
def _sqrt_softplus(z):
    """√log(1 + e^z): e^(z/2) below −15; log1p(u) = 2·(s + s³/3 + …), s = u/(2 + u) ≤ 1/3, the last term kept 1e-9 of the first."""
    u = exact_exp(-tl.abs(z))
    s = tl.div_rn(u, 2.0 + u)
    q = s * s
    series = 1.0 / 13 + q * (1.0 / 15 + q * (1.0 / 17))
    series = 1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * series)))
    log1p = 2.0 * s + 2.0 * s * q * (1.0 / 3 + q * series)
    return tl.where(z < -15.0, exact_exp(z * 0.5), tl.sqrt_rn(tl.where(z > 0.0, z, 0.0) + log1p))


@triton.jit
def _score(z, SCORE: tl.constexpr):
    if SCORE == SQRTSOFTPLUS:
        s = _sqrt_softplus(z)
    else:
        s = logistic(z)
    return s


@triton.jit
def _slope(z, SCORE: tl.constexpr):
    """ds/dz."""
    if SCORE == SQRTSOFTPLUS:
        slope = tl.where(z < -15.0, 0.5 * exact_exp(z * 0.5), tl.div_rn(logistic(z), 2.0 * _sqrt_softplus(z)))
    else:
        slope = logistic(z) * logistic(-z)
    return slope


@triton.jit
def _row_softmax(z):
    """[ROWS, COLUMNS], −inf where nothing is -> the row's largest and Σ exp(z − largest), [ROWS, 1] each."""
    peak = tl.max(z, 1, keep_dims=True)
    return peak, tl.sum(exact_exp(z - peak), 1, keep_dims=True)


@triton.jit
def _weigh(z, peak, total, mine, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr):
    """Logits of the chosen [ROWS, BLOCK_K] -> their weights before scaling, and P [ROWS, 1]; peak, total: of the whole row."""
    if SCORE == SOFTMAX_TOPK or (SCORE == SOFTMAX and RENORMALIZE):
        z = tl.where(mine, z, float("-inf"))
        peak, total = _row_softmax(z)
        weights = tl.div_rn(exact_exp(z - peak), total)
    elif SCORE == SOFTMAX:
        weights = tl.div_rn(exact_exp(z - peak), total)
        total = tl.zeros_like(total) + 1.0
    else:
        weights = tl.where(mine, _score(z, SCORE), 0.0)
        total = tl.sum(weights, 1, keep_dims=True) + 1e-20
        if RENORMALIZE:
            weights = tl.div_rn(weights, total)
        else:
            total = tl.zeros_like(total) + 1.0
    return tl.where(mine, weights, 0.0), total


@triton.jit
def _choose(z, inside, expert, p_peak, p_total, bias_ptr, K, top_groups, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
            BLOCK_K: tl.constexpr, SCORE: tl.constexpr, BY_SCORE: tl.constexpr, BIAS: tl.constexpr, GROUPED: tl.constexpr,
            TOP2: tl.constexpr):
    """Logits [ROWS, GROUPS·SIZE] -> the K best experts [ROWS, BLOCK_K], best first."""
    BLOCK_E: tl.constexpr = GROUPS * SIZE
    if BY_SCORE and SCORE == SOFTMAX:
        z = tl.div_rn(exact_exp(z - p_peak), p_total)
    elif BY_SCORE:
        z = _score(z, SCORE)
    if BIAS:
        z += tl.load(bias_ptr + expert, mask=inside, other=0.0)
    keys = tl.where(inside, _keys_of(z), OUT)  # [ROWS, BLOCK_E]
    if GROUPED:
        cube = tl.reshape(keys, (ROWS, GROUPS, SIZE))
        best = tl.max(cube, 2)  # [ROWS, GROUPS]
        if TOP2:
            first = tl.argmax(cube, 2)
            rest = tl.where(tl.arange(0, SIZE)[None, None, :] == first[:, :, None], OUT, cube)
            second = tl.max(rest, 2)
            best = tl.where(best == OUT, OUT, _keys_of(_float_of(best) + _float_of(second)))
        kept = tl.zeros([ROWS, GROUPS], tl.int32)
        for _ in range(0, top_groups):
            at = tl.argmax(best, 1)
            here = tl.arange(0, GROUPS)[None, :] == at[:, None]
            kept = tl.where(here, 1, kept)
            best = tl.where(here, OUT, best)
        keys = tl.reshape(tl.where(kept[:, :, None] == 1, cube, OUT), (ROWS, BLOCK_E))
    place = tl.arange(0, BLOCK_E)[None, :]
    chosen = tl.zeros([ROWS, BLOCK_K], tl.int32)
    for k in range(0, K):
        at = tl.argmax(keys, 1)
        here = place == at[:, None]
        number = tl.sum(tl.where(here, expert, 0), 1)
        chosen = tl.where(tl.arange(0, BLOCK_K)[None, :] == k, number[:, None], chosen)
        keys = tl.where(here, OUT, keys)
    return chosen


@triton.jit(do_not_specialize=["N", "E", "K", "top_groups", "size"])
def _route_kernel(logits_ptr, bias_ptr, experts_ptr, weights_ptr, N, E, K, size, top_groups, stride_z, scaling,
                  ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK_K: tl.constexpr, SCORE: tl.constexpr,
                  RENORMALIZE: tl.constexpr, REPLAY: tl.constexpr, BY_SCORE: tl.constexpr, BIAS: tl.constexpr, GROUPED: tl.constexpr,
                  TOP2: tl.constexpr):
    """logits [N, E] -> experts [N, K] (REPLAY: given) and weights [N, K], ROWS tokens a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    logits_at = logits_ptr + row.to(tl.int64)[:, None] * stride_z
    live = (row < N)[:, None]
    DENSE: tl.constexpr = SCORE == SOFTMAX and (not RENORMALIZE or BY_SCORE)
    peak = tl.zeros([ROWS, 1], tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32) + 1.0
    if DENSE or not REPLAY:
        number = tl.arange(0, GROUPS * SIZE)[None, :]
        expert = number // SIZE * size + number % SIZE
        inside = (number % SIZE < size) & (expert < E)  # [1, BLOCK_E]
        z = tl.load(logits_at + expert, mask=live & inside, other=float("-inf")).to(tl.float32)
        if DENSE:
            peak, total = _row_softmax(tl.where(inside, z, float("-inf")))
    slot = row.to(tl.int64)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    real = live & (tl.arange(0, BLOCK_K)[None, :] < K)  # [ROWS, BLOCK_K]
    if REPLAY:
        chosen = tl.load(experts_ptr + slot, mask=real, other=-1)
    else:
        chosen = _choose(z, inside, expert, peak, total, bias_ptr, K, top_groups, ROWS, GROUPS, SIZE, BLOCK_K, SCORE, BY_SCORE, BIAS,
                         GROUPED, TOP2)
        tl.store(experts_ptr + slot, chosen, mask=real)
    mine = real & (chosen >= 0) & (chosen < E)
    z_chosen = tl.load(logits_at + chosen, mask=mine, other=0.0).to(tl.float32)
    weights, _ = _weigh(z_chosen, peak, total, mine, SCORE, RENORMALIZE)
    tl.store(weights_ptr + slot, weights * scaling, mask=real)


@triton.jit(do_not_specialize=["N", "E", "K"])
def _route_backward_kernel(logits_ptr, experts_ptr, dweights_ptr, dlogits_ptr, N, E, K, stride_z, scaling,
                           ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, SCORE: tl.constexpr,
                           RENORMALIZE: tl.constexpr):
    """dweights [N, K] -> dlogits [N, E], ROWS tokens a program; the slots of a token are added in k order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (row < N)[:, None]
    expert = tl.arange(0, BLOCK_E)[None, :]
    logits_at = logits_ptr + row.to(tl.int64)[:, None] * stride_z
    peak = tl.zeros([ROWS, 1], tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32) + 1.0
    DENSE: tl.constexpr = SCORE == SOFTMAX and not RENORMALIZE
    slot = row.to(tl.int64)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    real = live & (tl.arange(0, BLOCK_K)[None, :] < K)
    chosen = tl.load(experts_ptr + slot, mask=real, other=-1)
    mine = real & (chosen >= 0) & (chosen < E)
    d = tl.load(dweights_ptr + slot, mask=mine, other=0.0) * scaling
    z_chosen = tl.load(logits_at + chosen, mask=mine, other=0.0).to(tl.float32)
    if DENSE:
        z = tl.load(logits_at + expert, mask=live & (expert < E), other=float("-inf")).to(tl.float32)
        peak, total = _row_softmax(z)
    w, big_p = _weigh(z_chosen, peak, total, mine, SCORE, RENORMALIZE)
    if DENSE:
        slots_d = d
    elif SCORE == SOFTMAX_TOPK or SCORE == SOFTMAX:
        slots_d = w * (d - tl.sum(w * d, 1, keep_dims=True))
    elif RENORMALIZE:
        slots_d = tl.div_rn(d - tl.sum(w * d, 1, keep_dims=True), big_p) * _slope(z_chosen, SCORE)
    else:
        slots_d = d * _slope(z_chosen, SCORE)
    dz = tl.zeros([ROWS, BLOCK_E], tl.float32)
    for k in range(0, K):
        here = tl.arange(0, BLOCK_K)[None, :] == k
        number = tl.sum(tl.where(here & mine, chosen + 1, 0), 1) - 1  # -1: not here
        value = tl.sum(tl.where(here & mine, slots_d, 0.0), 1)
        dz += tl.where(expert == number[:, None], value[:, None], 0.0)
    if DENSE:
        p = tl.div_rn(exact_exp(z - peak), total)
        dz = p * (dz - tl.sum(w * d, 1, keep_dims=True))
    to = dlogits_ptr + row.to(tl.int64)[:, None] * E + expert
    tl.store(to, convert(dz, dlogits_ptr.dtype.element_ty), mask=live & (expert < E))


# ---- the slots sorted by expert


@triton.jit
def _expert_of(experts_ptr, slot, n_slots, E):
    """Experts of slots; those outside [0, E), and of slots that are not there, are E."""
    e = tl.load(experts_ptr + slot, mask=slot < n_slots, other=-1)
    return tl.where((e >= 0) & (e < E), e, E)


@triton.jit(do_not_specialize=["n_slots", "E"])
def _histogram_kernel(experts_ptr, table_ptr, n_slots, E, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """table [blocks, E + 1]: how many slots of the block each expert has."""
    block = tl.program_id(0)
    e = _expert_of(experts_ptr, block * BLOCK + tl.arange(0, BLOCK), n_slots, E)
    number = tl.arange(0, BINS)
    tl.store(table_ptr + block.to(tl.int64) * (E + 1) + number, tl.histogram(e, BINS), mask=number <= E)


@triton.jit(do_not_specialize=["blocks", "E"])
def _prefix_kernel(table_ptr, counts_ptr, blocks, E, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """table: each expert's slots in the blocks before; counts [E]."""
    expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    before = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, blocks, ROWS):
        block = first + tl.arange(0, ROWS)
        inside = (block < blocks)[:, None] & (expert <= E)[None, :]
        at = table_ptr + block.to(tl.int64)[:, None] * (E + 1) + expert[None, :]
        here = tl.load(at, mask=inside, other=0)
        tl.store(at, before[None, :] + tl.cumsum(here, 0) - here, mask=inside)
        before += tl.sum(here, 0)
    tl.store(counts_ptr + expert, before, mask=expert < E)


@triton.jit(do_not_specialize=["E"])
def _offsets_kernel(counts_ptr, offsets_ptr, E, BLOCK_E: tl.constexpr):
    expert = tl.arange(0, BLOCK_E)
    count = tl.load(counts_ptr + expert, mask=expert < E, other=0)
    tl.store(offsets_ptr + expert, tl.cumsum(count, 0) - count, mask=expert <= E)


@triton.jit(do_not_specialize=["n_slots", "E"])
def _place_kernel(experts_ptr, table_ptr, offsets_ptr, order_ptr, n_slots, E, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """order: every slot at its expert's offset, past those of the blocks before and those before it in its own."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    e = _expert_of(experts_ptr, slot, n_slots, E)
    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK, STEP):
        other = block * BLOCK + first + tl.arange(0, STEP)
        same = _expert_of(experts_ptr, other, n_slots, E)[None, :] == e[:, None]
        rank += tl.sum((same & (other[None, :] < slot[:, None])).to(tl.int32), 1)
    there = slot < n_slots
    place = tl.load(offsets_ptr + e, mask=there, other=0) + tl.load(table_ptr + block.to(tl.int64) * (E + 1) + e, mask=there, other=0)
    tl.store(order_ptr + place + rank, slot, mask=there)


def sort_slots(experts: Tensor, counts: Tensor, order: Tensor, offsets: Tensor) -> None:
    """experts [..] int32 -> counts [E], order [slots], offsets [E + 1], all int32."""
    E, n_slots, device = len(counts), experts.numel(), experts.device
    if n_slots == 0:
        counts.zero_()
        offsets.zero_()
        return
    block, bins = configs_moe.sort_block(), triton.next_power_of_2(E + 1)
    blocks = triton.cdiv(n_slots, block)
    table = torch.empty((blocks, E + 1), dtype=torch.int32, device=device)
    launch(_histogram_kernel, (blocks,), experts, table, n_slots, E, BLOCK=block, BINS=bins, warps=4, stages=1, device=device)
    launch(_prefix_kernel, (triton.cdiv(E + 1, 32),), table, counts, blocks, E, ROWS=64, COLUMNS=32, warps=4, stages=1, device=device)
    launch(_offsets_kernel, (1,), counts, offsets, E, BLOCK_E=bins, warps=4, stages=1, device=device)
    launch(
        _place_kernel, (blocks,), experts, table, offsets, order, n_slots, E, BLOCK=block, STEP=block if configs.INTERPRET else 32,
        warps=4, stages=1, device=device)


# ---- the ops


def covers(logits: Tensor, bias: Tensor | None = None) -> str | None:
    """Why route's kernels cannot take this call, naming the argument; None if they can."""
    if logits.dtype not in DTYPES:
        return f"logits: {logits.dtype} is not one of {DTYPES}"
    if bias is not None and bias.dtype == torch.float64:
        return "bias: it is added in float32, not float64"
    return None


def route_forward(
    logits: Tensor, bias: Tensor | None, experts: Tensor, weights: Tensor, counts: Tensor, order: Tensor, offsets: Tensor, *,
    score: str, n_group: int = 1, topk_group: int = 1, group_score: str = "top2", renormalize: bool = True, scaling: float = 1.0,
    replay: bool = False,
) -> None:
    """logits [N, E], bias [E] float32 -> experts [N, K] int32 (replay: given), weights [N, K] float32, counts [E], order [N·K],
    offsets [E + 1] int32."""
    (N, E), K, kind = logits.shape, experts.shape[1], SCORES.index(score)
    if N:
        grouped = n_group > topk_group and not replay
        groups = n_group if grouped else 1
        size = E // groups
        padded_groups, padded_size = triton.next_power_of_2(groups), triton.next_power_of_2(size)
        top2 = grouped and group_score == "top2" and size > 1
        rows = configs_moe.route_rows(padded_groups * padded_size)
        launch(
            _route_kernel, (triton.cdiv(N, rows),), logits, bias, experts, weights, N, E, K, size, topk_group, logits.stride(0),
            float(scaling), ROWS=rows, GROUPS=padded_groups, SIZE=padded_size, BLOCK_K=triton.next_power_of_2(K), SCORE=kind,
            RENORMALIZE=renormalize, REPLAY=replay, BY_SCORE=not replay and not score.endswith("_topk") and (bias is not None or top2),
            BIAS=bias is not None, GROUPED=grouped, TOP2=top2, warps=4, stages=1, device=logits.device)
    sort_slots(experts, counts, order, offsets)


def route_backward(
    logits: Tensor, experts: Tensor, dweights: Tensor, dlogits: Tensor, *, score: str, renormalize: bool, scaling: float
) -> None:
    """dweights [N, K] float32 -> dlogits [N, E]."""
    (N, E), K = logits.shape, experts.shape[1]
    if N == 0:
        return
    block = triton.next_power_of_2(E)
    rows = configs_moe.route_rows(2 * block)
    launch(
        _route_backward_kernel, (triton.cdiv(N, rows),), logits, experts, dweights, dlogits, N, E, K, logits.stride(0), float(scaling),
        ROWS=rows, BLOCK_E=block, BLOCK_K=triton.next_power_of_2(K), SCORE=SCORES.index(score), RENORMALIZE=renormalize,
        warps=4, stages=1, device=logits.device)
