"""What the attention kernels share: the mask, the key ranges a tile has to visit, scores, and the online softmax.

Shapes: B batch, S queries, T keys, H query heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim; M, N the
rows and keys of a tile. A head dim is one power-of-two block, or two (192 = 128 + 64), so that little is padded.

Packed sequences ([N, H, D] with cu_seqlens [B + 1]) come as one row of the batch; a tile lies inside one sequence, and S, T
are that sequence's. Positions: query i sits at p = i + T − S. The canonical key blocks and splits count from the first valid key
(`key_start`), so a row's sums have one order whatever its neighbours, padding and tile are; a block that a row
does not see changes nothing in it (its weights are exactly 0 and the rescaling factor exactly 1).
"""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .primitives import convert, dot, load_tile, tanh

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def floor_divide(a, b):
    """⌊a / b⌋ for b > 0; the device's integer division truncates."""
    return tl.where(a >= 0, a // b, -((b - 1 - a) // b))


@triton.jit
def packed_tile(tile, cu_ptr, batch, ROWS: tl.constexpr):
    """Which sequence of a packed tensor tile number `tile` belongs to, and its first row there (past the end: an idle tile).

    Sequence i's tiles start at number ⌊(cu[i] + i·(ROWS − 1)) / ROWS⌋, which leaves it at least the ⌈length / ROWS⌉ that it needs:
    a closed form, so neither the host (that would wait for the GPU) nor the kernel has to add up tile counts.
    """
    before = 0
    for at in range(0, batch, 128):
        i = at + tl.arange(0, 128)
        first = (tl.load(cu_ptr + i, mask=i < batch, other=0).to(tl.int64) + i.to(tl.int64) * (ROWS - 1)) // ROWS
        before += tl.sum(((first <= tile) & (i < batch)).to(tl.int32), 0)
    sequence = tl.maximum(before - 1, 0)
    first = (tl.load(cu_ptr + sequence).to(tl.int64) + sequence.to(tl.int64) * (ROWS - 1)) // ROWS
    return sequence, (tile - first.to(tl.int32)) * ROWS


@triton.jit
def packed_rows(sequence, cu_ptr, rows):
    """A sequence's first row and its length, inside [0, rows) whatever cu_seqlens holds."""
    start = tl.minimum(tl.maximum(tl.load(cu_ptr + sequence), 0), rows)
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + sequence + 1), start), rows)
    return start, end - start


@triton.jit
def visible(p, j, key_start, key_end, left, right, chunk, LEFT: tl.constexpr, RIGHT: tl.constexpr, CHUNK: tl.constexpr):
    """Whether the query at position p sees key j ≥ key_start; p and j broadcast against each other."""
    if RIGHT:
        seen = j <= tl.minimum(p + right, key_end - 1)
    else:
        seen = (j < key_end) & (p == p)
    if LEFT:
        seen = seen & (j >= p - left)
    if CHUNK:
        seen = seen & (j - key_start >= chunk * floor_divide(p - key_start, chunk))
    return seen


@triton.jit
def key_blocks(p_first, p_last, key_start, key_end, left, right, chunk, BLOCK_N: tl.constexpr,
               LEFT: tl.constexpr, RIGHT: tl.constexpr, CHUNK: tl.constexpr):
    """Canonical blocks [first, last) that queries at p_first … p_last see, and [whole_first, whole_last) seen whole."""
    low = key_start
    whole_low = key_start
    high = key_end
    whole_high = key_end
    if RIGHT:
        high = tl.minimum(high, p_last + right + 1)
        whole_high = tl.minimum(whole_high, p_first + right + 1)
    if LEFT:
        low = tl.maximum(low, p_first - left)
        whole_low = tl.maximum(whole_low, p_last - left)
    if CHUNK:
        low = tl.maximum(low, key_start + chunk * floor_divide(p_first - key_start, chunk))
        whole_low = tl.maximum(whole_low, key_start + chunk * floor_divide(p_last - key_start, chunk))
    first = (low - key_start) // BLOCK_N
    last = tl.maximum((tl.maximum(high - key_start, 0) + BLOCK_N - 1) // BLOCK_N, first)
    whole_first = tl.minimum((whole_low - key_start + BLOCK_N - 1) // BLOCK_N, last)
    whole_last = tl.maximum(tl.minimum(tl.maximum(whole_high - key_start, 0) // BLOCK_N, last), whole_first)
    return first, last, whole_first, whole_last


@triton.jit
def capped(products, scale, softcap, SOFTCAP: tl.constexpr):
    """q·k -> itself and 1, or with a softcap c: s = c·tanh(scale·q·k / c) and its slope 1 − (s/c)²."""
    slope = 1.0
    if SOFTCAP:
        ratio = tanh(products * (scale / softcap))
        products = softcap * ratio
        slope = 1.0 - ratio * ratio
    return products, slope


@triton.jit
def cache_rows(j, end, cache, PAGE: tl.constexpr):
    """Where keys j ∈ [0, end) of a cache begin -> K addresses [N], V addresses [N], whether the key is there [N].

    cache: (k_base, v_base, stride_k, stride_v, table, stride_kp, stride_vp, n_pages), dense or (PAGE > 0) pages through `table`.
    A page number outside [0, n_pages) counts as empty.
    """
    k_base, v_base, stride_k, stride_v, table, stride_kp, stride_vp, n_pages = cache
    there = (j >= 0) & (j < end)
    row = j.to(tl.int64)
    k_at = k_base + row * stride_k
    v_at = v_base + row * stride_v
    if PAGE > 0:
        page = tl.load(table + j // PAGE, mask=there, other=-1)
        there = (page >= 0) & (page < n_pages)
        row = (j % PAGE).to(tl.int64)
        k_at = k_base + page.to(tl.int64) * stride_kp + row * stride_k
        v_at = v_base + page.to(tl.int64) * stride_vp + row * stride_v
    return k_at, v_at, there


@triton.jit
def load_rows(at, there, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FIRST … FIRST+COLUMNS−1 of the rows at these addresses; 0 where a row is not there and past WIDTH columns."""
    column = FIRST + tl.arange(0, COLUMNS)
    return tl.load(at[:, None] + column[None, :], mask=there[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def e4m3_to_float(byte):
    """float8 e4m3 (no infinities, 0x7f is NaN) as float32, exactly, by its bits: sm_80 has no such type."""
    bits = byte.to(tl.int32)
    small = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)
    # Multiplying by 2^120 moves the exponent's bias from 127 to 7.
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), small * 1.329227995784916e36)


@triton.jit
def load_fp8_rows(at, there, DTYPE: tl.constexpr):
    """Tokens of an FP8 latent cache (656 bytes: 512 e4m3, 4 float32 scales, 64 bfloat16) -> latents [N, 512], rotary keys [N, 64]."""
    byte = tl.load(at[:, None] + tl.arange(0, 512)[None, :], mask=there[:, None], other=0)
    scale_at = (at + 512).to(tl.pointer_type(tl.float32))
    scale = tl.load(scale_at[:, None] + tl.arange(0, 4)[None, :], mask=there[:, None], other=0.0)
    groups = tl.reshape(e4m3_to_float(byte), (byte.shape[0], 4, 128)) * scale[:, :, None]
    rope_at = (at + 528).to(tl.pointer_type(tl.bfloat16))
    rope = tl.load(rope_at[:, None] + tl.arange(0, 64)[None, :], mask=there[:, None], other=0.0)
    return convert(tl.reshape(groups, (byte.shape[0], 512)), DTYPE), convert(rope, DTYPE)


@triton.jit
def power(exponent, EXACT: tl.constexpr):
    """e^x (EXACT) or 2^x. Float32 keeps scores in natural units: multiplied by log2 e they are rounded once more, before
    differences are taken, and lse and gradients then err by 2e-7 of the score; float16 and bfloat16 do not see it."""
    if EXACT:
        exponent = exponent * LOG2E
    return tl.exp2(exponent)


@triton.jit
def merge(acc_a, total_a, peak_a, acc_b, total_b, peak_b, EXACT: tl.constexpr):
    """Adds the next split (b) to what came before (a). An empty side leaves the other's bits as they are."""
    peak = tl.maximum(peak_a, peak_b)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    w_a = power(peak_a - base, EXACT)
    w_b = power(peak_b - base, EXACT)
    # Written as explicit fused operations: prefill and decode must round alike.
    acc = tl.fma(acc_a, tl.broadcast_to(w_a[:, None], acc_a.shape), acc_b * w_b[:, None])
    return acc, tl.fma(total_a, w_a, total_b * w_b), peak


@triton.jit
def softmax_step(s, total, peak, factor, EXACT: tl.constexpr):
    """One block of scores s [M, N] in the online softmax -> weights [M, N], the factor for what was summed before, total, peak."""
    new_peak = tl.maximum(peak, tl.max(s, 1) * factor)
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen nothing: −inf − −inf
    weights = power(tl.fma(s, tl.full(s.shape, factor, tl.float32), tl.broadcast_to(-base[:, None], s.shape)), EXACT)
    decay = power(peak - base, EXACT)
    return weights, decay, total * decay + tl.sum(weights, 1), new_peak


@triton.jit
def attend(acc, total, peak, q, q_rest, p, block_first, block_last, whole_first, whole_last, key_start, key_end,
           cache, prefix, prefix_length, scale, softcap, left, right, chunk,
           N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr, BLOCK_DV: tl.constexpr,
           PER_SPLIT: tl.constexpr, PAGE: tl.constexpr, TAIL: tl.constexpr, PREFIX_PAGE: tl.constexpr,
           LEFT: tl.constexpr, RIGHT: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
           DESCRIPTORS: tl.constexpr = False, LATENT: tl.constexpr = False, FP8: tl.constexpr = False):
    """Online softmax over canonical key blocks [block_first, block_last): acc [M, Dv], total [M], peak [M]; peak in
    natural units for float32 (EXACT), in units of log 2 otherwise.

    Key j lies at row j − prefix_length of `cache` (see cache_rows). With TAIL the blocks reach back into the keys before that,
    which are rows j of `prefix`. DESCRIPTORS: the tiles come through tensor descriptors (on Hopper by TMA).
    LATENT: a key's first DV columns are its value, so the key tile of BLOCK_D = BLOCK_DV columns serves twice and the value addresses
    are not used; FP8: in the 656-byte layout.
    Blocks in [whole_first, whole_last) skip the mask. One loop with a branch, not a masked and an unmasked loop: two loops
    spill registers at the tile sizes that matter, and here both kinds of block run the very same operations, so which kind
    a block is never shows in a row's bits (nor does the fused multiply-add, written out for that reason).
    """
    k_base, v_base, stride_k, stride_v = cache[0], cache[1], cache[2], cache[3]
    EXACT: tl.constexpr = q.dtype == tl.float32
    GATHERED: tl.constexpr = TAIL or PAGE > 0 or FP8
    factor = scale
    if SOFTCAP:
        factor = 1.0
    if not EXACT:
        factor = factor * LOG2E
    if DESCRIPTORS:
        k_tiles = tl.make_tensor_descriptor(k_base, [key_end, D], [stride_k, 1], [N, BLOCK_D])
        v_tiles = tl.make_tensor_descriptor(v_base, [key_end, DV], [stride_v, 1], [N, BLOCK_DV])
        if REST_D > 0:
            k_rest_tiles = tl.make_tensor_descriptor(k_base, [key_end, D], [stride_k, 1], [N, REST_D])
    done = acc
    done_total = total
    done_peak = peak
    for block in range(block_first, block_last):
        start = key_start + block * N
        if PER_SPLIT > 0:
            if block % PER_SPLIT == 0:
                done, done_total, done_peak = merge(done, done_total, done_peak, acc, total, peak, EXACT)
                acc = tl.zeros_like(acc)
                total = tl.zeros_like(total)
                peak = tl.full(peak.shape, float("-inf"), tl.float32)
        j = start + tl.arange(0, N)
        at = (start - prefix_length).to(tl.int64)
        if GATHERED:
            k_at, v_at, there = cache_rows(j - prefix_length, key_end - prefix_length, cache, PAGE)
            if TAIL:
                k_tail, v_tail, there_tail = cache_rows(j, prefix_length, prefix, PREFIX_PAGE)
                k_at = tl.where(j < prefix_length, k_tail, k_at)
                v_at = tl.where(j < prefix_length, v_tail, v_at)
                there = tl.where(j < prefix_length, there_tail, there)
            if FP8:
                k, k_rest = load_fp8_rows(k_at, there, q.dtype)
            else:
                k = load_rows(k_at, there, 0, BLOCK_D, D)
        elif DESCRIPTORS:
            k = k_tiles.load([start, 0])
        else:
            k = load_tile(k_base + at * stride_k, stride_k, key_end - start, N, 0, BLOCK_D, D, WIDE)  # [N, D]
        s = dot(q, tl.trans(k), tl.zeros([q.shape[0], N], tl.float32))  # [M, N]
        if REST_D > 0:
            if FP8:
                pass  # came with k
            elif GATHERED:
                k_rest = load_rows(k_at, there, BLOCK_D, REST_D, D)
            elif DESCRIPTORS:
                k_rest = k_rest_tiles.load([start, BLOCK_D])
            else:
                k_rest = load_tile(k_base + at * stride_k, stride_k, key_end - start, N, BLOCK_D, REST_D, D, WIDE)
            s = dot(q_rest, tl.trans(k_rest), s)
        s, _ = capped(s, scale, softcap, SOFTCAP)
        if (block < whole_first) | (block >= whole_last):
            s = tl.where(visible(p[:, None], j[None, :], key_start, key_end, left, right, chunk, LEFT, RIGHT, CHUNK), s, float("-inf"))
        if GATHERED:
            s = tl.where(there[None, :], s, float("-inf"))
        weights, decay, total, peak = softmax_step(s, total, peak, factor, EXACT)
        if LATENT:
            v = k
        elif GATHERED:
            v = load_rows(v_at, there, 0, BLOCK_DV, DV)
        elif DESCRIPTORS:
            v = v_tiles.load([start, 0])
        else:
            v = load_tile(v_base + at * stride_v, stride_v, key_end - start, N, 0, BLOCK_DV, DV, WIDE)  # [N, Dv]
        acc = dot(weights.to(v.dtype), v, acc * decay[:, None])
    if PER_SPLIT > 0:
        acc, total, peak = merge(done, done_total, done_peak, acc, total, peak, EXACT)
    return acc, total, peak


@triton.jit
def finish(acc, total, peak, sink, SINKS: tl.constexpr, EXACT: tl.constexpr):
    """acc, total, peak -> out [M, Dv], lse [M] (without the sink); an empty row gives 0 and −inf."""
    empty = total == 0.0
    natural = peak
    if not EXACT:
        natural = peak * LN2
        sink = sink * LOG2E
    lse = tl.where(empty, float("-inf"), natural + tl.log(tl.where(empty, 1.0, total)))
    if SINKS:
        top = tl.maximum(peak, sink)
        top = tl.where(top == float("-inf"), 0.0, top)
        weight = power(peak - top, EXACT)
        acc = acc * weight[:, None]
        total = total * weight + power(sink - top, EXACT)
    out = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
    return out, lse


def mask_arguments(causal: bool, window: tuple[int, int] | None, chunk: int | None) -> tuple[tuple[int, int, int], dict[str, bool]]:
    """causal, window, chunk -> (left, right, chunk) and which of them count; causal is a right bound of 0."""
    left, right = window if window is not None else (-1, -1)
    if causal:
        right = 0 if right < 0 else min(right, 0)
    flags = {"LEFT": left >= 0, "RIGHT": right >= 0, "CHUNK": chunk is not None}
    return (max(left, 0), max(right, 0), chunk or 1), flags


def tiles(rows: int, block: int, cu_seqlens: Tensor | None) -> int:
    """Tiles of `block` rows that hold `rows` rows; for packed sequences the bound that `packed_tile` counts to."""
    if cu_seqlens is None:
        return triton.cdiv(rows, block)
    n_sequences = len(cu_seqlens) - 1
    return (rows + n_sequences * (block - 1)) // block if n_sequences > 0 else 0


def has_options(key_start: Tensor | None, window: tuple[int, int] | None, chunk: int | None, softcap: float | None,
                sinks: Tensor | None) -> bool:
    """Whether a call asks for more than plain or causal attention."""
    return any(x is not None for x in (key_start, window, chunk, sinks)) or bool(softcap)


def blocks(width: int) -> tuple[int, int]:
    """A head dim as one padded power-of-two block, or two where that pads less: 192 -> (128, 64), 80 -> (64, 16)."""
    whole = max(16, triton.next_power_of_2(width))
    head = whole // 2
    rest = max(16, triton.next_power_of_2(max(width - head, 1)))
    return (head, rest) if head >= 16 and rest < head else (whole, 0)
