"""The lightning indexer: dense scores and their backward, and scoring with selection, a chunk of queries at a time.

Shapes: B batch, S queries and T keys of a sequence, R rows (all queries of all sequences), Hi index heads, Di index dim, K slots of a
query, P pages. A tile has KEYS (or N) keys and COLUMNS (or M) pairs (query, head): QB queries of HB heads.

    I[t, s] = Σ_j w[t, j]·relu(q[t, j]·k[s])·k_scale[s], s up to the position of t                (DeepSeek-V3.2-Exp)
    dw[t, j] = Σ_s dI[t, s]·relu(z),  dz = dI·w·1[z > 0],  dq[t, j] = Σ_s dz·k[s],  dk[s] = Σ_t Σ_j dz·q[t, j],  z = q[t, j]·k[s]

A tile of keys stays while the queries pass by, and the heads of a query lie side by side as columns, so that their sum stays in the
tile; prefill and decode have the same tile, hence the same bits. SLOTS: key n of a query is the one that its slot n names.
indexer_topk keeps the scores of at most configs_sparse.workspace() bytes of queries: [S, T] scores never lie in memory at once.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs_sparse, topk
from .attention_tiles import e4m3_to_float, load_rows
from .primitives import convert, dot, launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIM = 256
FLOAT_DEPTH = tl.constexpr(32)  # float32 products go through registers: deeper ones spill
ALIGNED = 64  # rows: chunks of a sequence's queries begin at multiples, so that tiles hold the same queries whatever the chunk


@triton.jit
def relu(z):
    return tl.where(z <= 0, 0.0, z)  # NaN stays


@triton.jit
def columns(r, block, r_stop, H: tl.constexpr, COLUMNS: tl.constexpr, HB: tl.constexpr):
    """Column c of a tile is head block·HB + c % HB of row r + c // HB -> rows, heads, which of them exist."""
    c = tl.arange(0, COLUMNS)
    row = r + c // HB
    head = block * HB + c % HB
    return row, head, (row < r_stop) & (head < H)


@triton.jit
def add_product(acc, e, x):
    """acc + e·x with e (float32) rounded to x's type; float16 gets e scaled to at most 2, so that nothing underflows."""
    if x.dtype == tl.float16:
        size = tl.max(tl.abs(e)).to(tl.int32, bitcast=True) >> 23
        size = tl.where((size > 252) | (size < 2), 127, size)
        scale = ((254 - size) << 23).to(tl.float32, bitcast=True)
        part = dot((e * scale).to(tl.float16), x, tl.zeros(acc.shape, tl.float32))
        acc += part * (size << 23).to(tl.float32, bitcast=True)
    else:
        acc = dot(convert(e, x.dtype), x, acc)
    return acc


@triton.jit
def slot_keys(indices_ptr, row, n, slots, T):
    """The keys that slots n of a row name -> positions, which of them exist."""
    key = tl.load(indices_ptr + row.to(tl.int64) * slots + n, mask=n < slots, other=-1)
    return key, (key >= 0) & (key < T)


@triton.jit(do_not_specialize=["first_row", "last_row", "S", "T", "slots", "n_pages", "n_sequences"])
def _scores_kernel(q_ptr, k_ptr, w_ptr, out_ptr, lengths_ptr, indices_ptr, seqlens_ptr, table_ptr, k_scale_ptr, sequence_ptr, cu_q_ptr,
                   cu_k_ptr, first_row, last_row, S, T, slots, n_pages, n_sequences,
                   stride_kb, stride_ks, stride_out, stride_scale_b, stride_scale_s, stride_table,
                   H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, HB: tl.constexpr,
                   QUERIES: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, SEQLENS: tl.constexpr, PAGE: tl.constexpr,
                   FP8: tl.constexpr, SCALE: tl.constexpr, SLOTS: tl.constexpr, FILL: tl.constexpr, LENGTHS: tl.constexpr):
    """One program: QUERIES rows against KEYS keys of their sequences.

    FILL: invisible keys get −inf; otherwise they are left out as far as that saves work. LENGTHS: also how many keys each row sees.
    """
    QB: tl.constexpr = COLUMNS // HB
    row_blocks = tl.cdiv(last_row - first_row, QUERIES)
    row_first = first_row + (tl.program_id(0) % row_blocks) * QUERIES
    row_last = tl.minimum(row_first + QUERIES, last_row)
    n_first = (tl.program_id(0) // row_blocks) * KEYS
    n = n_first + tl.arange(0, KEYS)
    if PACKED:
        b_first = tl.load(sequence_ptr + row_first)
        b_last = tl.load(sequence_ptr + row_last - 1)
    else:
        b_first = row_first // S
        b_last = (row_last - 1) // S
    for b in range(b_first, b_last + 1):
        # Where the sequence lies.
        start = b * S
        queries = S
        keys = T
        k_base = k_ptr
        scale_base = k_scale_ptr
        if PACKED:
            start = tl.load(cu_q_ptr + b)
            queries = tl.load(cu_q_ptr + b + 1) - start
            k_start = tl.load(cu_k_ptr + b)
            keys = tl.load(cu_k_ptr + b + 1) - k_start
            k_base += k_start.to(tl.int64) * stride_ks
            if SCALE:
                scale_base += k_start.to(tl.int64) * stride_scale_s
        elif PAGE == 0:
            k_base += tl.cast(b, tl.int64) * stride_kb
            if SCALE:
                scale_base += tl.cast(b, tl.int64) * stride_scale_b
        if SEQLENS:
            keys = tl.minimum(tl.maximum(tl.load(seqlens_ptr + b), 0), T)
        offset = keys - queries - start  # a row's position is row + offset

        # Load the keys.
        there = n < keys
        key = n.to(tl.int64)
        at = key * stride_ks
        scale_at = key * stride_scale_s
        if SLOTS:
            named, there = slot_keys(indices_ptr, row_first, n, slots, T)
            at = named.to(tl.int64) * stride_ks
        if PAGE > 0:
            page = tl.load(table_ptr + tl.cast(b, tl.int64) * stride_table + n // PAGE, mask=there, other=-1)
            exists = there & (page >= 0) & (page < n_pages)
            at = page.to(tl.int64) * stride_kb + (n % PAGE) * stride_ks
            scale_at = page.to(tl.int64) * stride_scale_b + (n % PAGE) * stride_scale_s
        else:
            exists = there
        k = load_rows(k_base + at, exists, 0, BLOCK_D, D)  # [KEYS, D]
        if FP8:
            k = convert(e4m3_to_float(k), q_ptr.dtype.element_ty)
        if SCALE:
            scale = tl.load(scale_base + scale_at, mask=exists, other=0.0)

        # The rows of this sequence, QB at a time.
        r_first = tl.maximum(row_first, start)
        r_last = tl.minimum(row_last, start + queries)
        if LENGTHS:
            if n_first == 0:
                row = row_first + tl.arange(0, QUERIES)
                seen = keys + row * 0
                if CAUSAL:
                    seen = tl.minimum(tl.maximum(row + offset + 1, 0), keys)
                tl.store(lengths_ptr + row - first_row, seen, mask=(row >= r_first) & (row < r_last))
        if not FILL:
            if CAUSAL:
                r_first = tl.maximum(r_first, n_first - offset)  # the first that sees any of these keys
            r_first = tl.where(n_first < keys, r_first, r_last)
        for r in range(r_first, r_last, QB):
            acc = tl.zeros([KEYS, QB], tl.float32)
            for block in tl.static_range((H + HB - 1) // HB):
                row, head, live = columns(r, block, r_last, H, COLUMNS, HB)
                pair = row.to(tl.int64) * H + head
                q = load_rows(q_ptr + pair * D, live, 0, BLOCK_D, D)  # [COLUMNS, D]
                w = tl.load(w_ptr + pair, mask=live, other=0.0)
                z = dot(k, tl.trans(q), tl.zeros([KEYS, COLUMNS], tl.float32), FLOAT_DEPTH)
                acc += tl.sum(tl.reshape(relu(z) * w[None, :], (KEYS, QB, HB)), 2)
            if SCALE:
                acc *= scale[:, None]
            if PAGE > 0:
                acc = tl.where(exists[:, None], acc, float("-inf"))
            row = r + tl.arange(0, QB)
            inside = there[:, None] & (row < r_last)[None, :]
            if FILL:
                seen = there[:, None]
                if CAUSAL:
                    seen = seen & (n[:, None] <= (row + offset)[None, :])
                acc = tl.where(seen, acc, float("-inf"))
                inside = (n < (slots if SLOTS else keys))[:, None] & (row < r_last)[None, :]
            tl.store(out_ptr + (row - first_row).to(tl.int64)[None, :] * stride_out + n[:, None], acc, mask=inside)


@triton.jit(do_not_specialize=["first_row", "last_row", "S", "T", "slots"])
def _query_gradient_kernel(q_ptr, k_ptr, w_ptr, g_ptr, dloss_ptr, indices_ptr, dq_ptr, dw_ptr, first_row, last_row, S, T, slots,
                           stride_kb, stride_ks, stride_g,
                           H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HB: tl.constexpr,
                           CAUSAL: tl.constexpr, SLOTS: tl.constexpr, DLOSS: tl.constexpr):
    """One program: dq and dw of M / HB rows of one sequence, HB heads; dI = g [rows from first_row, T or K], times dloss [R] (DLOSS)."""
    QB: tl.constexpr = 1 if SLOTS else M // HB
    BLOCKS: tl.constexpr = (H + HB - 1) // HB
    per_sequence = tl.cdiv(tl.minimum(S, last_row - first_row), QB)
    tile = tl.program_id(0) // BLOCKS
    b = first_row // S + tile // per_sequence
    r = tl.maximum(first_row, b * S) + (tile % per_sequence) * QB
    r_stop = tl.minimum(tl.minimum(last_row, (b + 1) * S), r + QB)
    row, head, live = columns(r, tl.program_id(0) % BLOCKS, r_stop, H, M, HB)
    pair = row.to(tl.int64) * H + head
    q = load_rows(q_ptr + pair * D, live, 0, BLOCK_D, D)  # [M, D]
    k_ptr += tl.cast(b, tl.int64) * stride_kb
    g_at = g_ptr + (row - first_row).to(tl.int64) * stride_g
    last_seen = row - b * S + T - S  # [M]
    end = T
    if CAUSAL:
        end = tl.minimum(T, r_stop - 1 - b * S + T - S + 1)
    if SLOTS:
        end = slots
    dq = tl.zeros([M, BLOCK_D], tl.float32)
    dw = tl.zeros([M], tl.float32)
    for n_first in range(0, end, N):
        n = n_first + tl.arange(0, N)
        there = n < T
        key = n
        if SLOTS:
            key, there = slot_keys(indices_ptr, r, n, slots, T)
        k = load_rows(k_ptr + key.to(tl.int64) * stride_ks, there, 0, BLOCK_D, D)  # [N, D]
        seen = live[:, None] & there[None, :]
        if CAUSAL:
            seen = seen & (n[None, :] <= last_seen[:, None])
        g = tl.load(g_at[:, None] + n[None, :], mask=seen, other=0.0)
        z = dot(q, tl.trans(k), tl.zeros([M, N], tl.float32), FLOAT_DEPTH)
        dw += tl.sum(g * relu(z), 1)
        dq = add_product(dq, tl.where(z <= 0, 0.0, g), k)
    factor = tl.load(w_ptr + pair, mask=live, other=0.0)
    if DLOSS:
        dloss = tl.load(dloss_ptr + row, mask=live, other=0.0)
        dw *= dloss
        factor *= dloss
    column = tl.arange(0, BLOCK_D)
    tl.store(dq_ptr + pair[:, None] * D + column[None, :], convert(dq * factor[:, None], dq_ptr.dtype.element_ty),
             mask=live[:, None] & (column < D)[None, :])
    tl.store(dw_ptr + pair, dw, mask=live)


@triton.jit(do_not_specialize=["first_row", "last_row", "S", "T"])
def _key_gradient_kernel(q_ptr, k_ptr, w_ptr, g_ptr, dloss_ptr, dk_ptr, first_row, last_row, S, T, stride_kb, stride_ks, stride_g,
                         H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
                         HB: tl.constexpr, CAUSAL: tl.constexpr, DLOSS: tl.constexpr):
    """One program: dk [B, T, D] (float32, continued) of KEYS keys of one sequence, from its rows among first_row … last_row − 1."""
    QB: tl.constexpr = COLUMNS // HB
    blocks = tl.cdiv(T, KEYS)
    b = first_row // S + tl.program_id(0) // blocks
    n_first = (tl.program_id(0) % blocks) * KEYS
    n = n_first + tl.arange(0, KEYS)
    there = n < T
    k = load_rows(k_ptr + tl.cast(b, tl.int64) * stride_kb + n.to(tl.int64) * stride_ks, there, 0, BLOCK_D, D)  # [KEYS, D]
    column = tl.arange(0, BLOCK_D)
    dk_at = dk_ptr + (tl.cast(b, tl.int64) * T + n)[:, None] * D + column[None, :]
    inside = there[:, None] & (column < D)[None, :]
    acc = tl.load(dk_at, mask=inside, other=0.0)
    start = b * S
    r_first = tl.maximum(first_row, start)
    r_last = tl.minimum(last_row, start + S)
    if CAUSAL:  # whole tiles before the first row that sees these keys are left out
        r_first += tl.maximum(start + n_first - T + S - r_first, 0) // QB * QB
    for r in range(r_first, r_last, QB):
        for block in range((H + HB - 1) // HB):
            row, head, live = columns(r, block, r_last, H, COLUMNS, HB)
            pair = row.to(tl.int64) * H + head
            q = load_rows(q_ptr + pair * D, live, 0, BLOCK_D, D)  # [COLUMNS, D]
            factor = tl.load(w_ptr + pair, mask=live, other=0.0)
            if DLOSS:
                factor *= tl.load(dloss_ptr + row, mask=live, other=0.0)
            seen = live[None, :] & there[:, None]
            if CAUSAL:
                seen = seen & (n[:, None] <= (row - start + T - S)[None, :])
            g = tl.load(g_ptr + (row - first_row).to(tl.int64)[None, :] * stride_g + n[:, None], mask=seen, other=0.0)
            z = dot(k, tl.trans(q), tl.zeros([KEYS, COLUMNS], tl.float32), FLOAT_DEPTH)
            acc = add_product(acc, tl.where(z <= 0, 0.0, g * factor[None, :]), q)
    tl.store(dk_at, acc, mask=inside)


# ---- host ------------------------------------------------------------------------------------------------------


def covers(q: Tensor, k: Tensor, w: Tensor) -> str | None:
    """Why the kernels cannot take these index queries, keys and weights, naming the argument; None if they can."""
    if q.dtype not in DTYPES:
        return f"q: {q.dtype} is not one of {DTYPES}"
    if k.dtype not in (q.dtype, torch.float8_e4m3fn):
        return f"k: {k.dtype} is neither q's {q.dtype} nor float8_e4m3fn"
    if w.dtype == torch.float64:
        return "w: scores are weighed in float32, not float64"
    if q.shape[-1] > MAX_DIM:
        return f"q: an index dim of {q.shape[-1]} is over {MAX_DIM}"
    return None


def chunks(B: int, S: int, rows: int) -> Iterator[tuple[int, int]]:
    """Rows 0 … B·S − 1 in order -> (first, last + 1): whole sequences, or `rows` queries of one."""
    if rows >= S:
        step = max(rows // max(S, 1), 1) * S
        for first in range(0, B * S, max(step, 1)):
            yield first, min(first + step, B * S)
    else:
        step = max(rows // ALIGNED, 1) * ALIGNED
        for b in range(B):
            for first in range(b * S, (b + 1) * S, step):
                yield first, min(first + step, (b + 1) * S)


def head_block(heads: int, most: int) -> int:
    return min(triton.next_power_of_2(heads), most)


def block_dim(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def write_scores(q: Tensor, k: Tensor, w: Tensor, out: Tensor, rows: tuple[int, int], S: int, *, causal: bool,
                 lengths: Tensor | None = None, indices: Tensor | None = None, seqlens: Tensor | None = None,
                 block_table: Tensor | None = None, k_scale: Tensor | None = None,
                 packed: tuple[Tensor, Tensor, Tensor] | None = None, fill: bool = False) -> None:
    """Scores of rows first … last − 1 of q [R,Hi,Di], w [R,Hi] (contiguous, w float32) -> out [≥ last − first, ≥ T or K].

    k [B,T,Di], pages [P,page,Di] with block_table [B,max_pages], or with packed = (sequence of each row [R], cu_seqlens_q, cu_seqlens_k)
    [Nk,Di]; e4m3 as uint8. indices [R,K]: of the named keys alone. lengths [≥ last − first] takes how many keys each row sees.
    """
    (_, H, D), (first, last) = q.shape, rows
    page = 0 if block_table is None else k.shape[1]
    T = k.shape[-2] if block_table is None else block_table.shape[1] * page
    width = T if indices is None else indices.shape[1]
    tile = configs_sparse.indexer("scores", q.device, q.dtype, D, k.dtype == torch.uint8)
    queries = min(64, triton.next_power_of_2(S)) if indices is None else 1
    scale_strides = (0, 0) if k_scale is None else (0, k_scale.stride(0)) if k_scale.dim() == 1 else k_scale.stride()
    launch(
        _scores_kernel, (triton.cdiv(last - first, queries) * max(triton.cdiv(width, tile.n), 1),), q, k, w, out, lengths, indices, seqlens,
        block_table, k_scale, *(packed or (None, None, None)), first, last, S, T, width, k.shape[0], 0,
        0 if packed else k.stride(0), k.stride(-2), out.stride(0), *scale_strides, 0 if block_table is None else block_table.stride(0),
        H=H, D=D, BLOCK_D=block_dim(D), KEYS=tile.n, COLUMNS=tile.m, HB=head_block(H, tile.m), QUERIES=queries, CAUSAL=causal,
        PACKED=packed is not None, SEQLENS=seqlens is not None, PAGE=page, FP8=k.dtype == torch.uint8, SCALE=k_scale is not None,
        SLOTS=indices is not None, FILL=fill, LENGTHS=lengths is not None, warps=tile.warps, stages=tile.stages, device=q.device)


def query_gradients(q: Tensor, k: Tensor, w: Tensor, g: Tensor, dq: Tensor, dw: Tensor, rows: tuple[int, int], S: int, *, causal: bool,
                    dloss: Tensor | None = None, indices: Tensor | None = None) -> None:
    """dq [R,Hi,Di] and dw [R,Hi] float32 of rows first … last − 1, from g [≥ last − first, T] (or [.., K] with indices [R,K])."""
    (_, H, D), (first, last) = q.shape, rows
    tile = configs_sparse.indexer("query", q.device, q.dtype, D)
    hb = tile.m if indices is not None else head_block(H, tile.m)
    per = 1 if indices is not None else tile.m // hb
    tiles = triton.cdiv(last - first, S) * triton.cdiv(min(S, last - first), per)
    launch(
        _query_gradient_kernel, (tiles * triton.cdiv(H, hb),), q, k, w, g, dloss, indices, dq, dw, first, last, S, k.shape[1],
        0 if indices is None else indices.shape[1], *k.stride()[:2], g.stride(0),
        H=H, D=D, BLOCK_D=block_dim(D), M=tile.m, N=tile.n, HB=hb, CAUSAL=causal, SLOTS=indices is not None, DLOSS=dloss is not None,
        warps=tile.warps, stages=tile.stages, device=q.device)


def key_gradients(q: Tensor, k: Tensor, w: Tensor, g: Tensor, dk: Tensor, rows: tuple[int, int], S: int, *, causal: bool,
                  dloss: Tensor | None = None) -> None:
    """dk [B,T,Di] float32 += what rows first … last − 1 give, from g [≥ last − first, T]. rows: as `chunks` cuts them, in order."""
    (_, H, D), (first, last), T = q.shape, rows, k.shape[1]
    tile = configs_sparse.indexer("key", q.device, q.dtype, D)
    launch(
        _key_gradient_kernel, (triton.cdiv(last - first, S) * triton.cdiv(T, tile.n),), q, k, w, g, dloss, dk, first, last, S, T,
        *k.stride()[:2], g.stride(0), H=H, D=D, BLOCK_D=block_dim(D), KEYS=tile.n, COLUMNS=tile.m, HB=head_block(H, tile.m),
        CAUSAL=causal, DLOSS=dloss is not None, warps=tile.warps, stages=tile.stages, device=q.device)


def indexer_scores(q: Tensor, k: Tensor, w: Tensor, out: Tensor, *, causal: bool) -> None:
    """q [B,S,Hi,Di], k [B,T,Di], w [B,S,Hi] float32 -> out [B,S,T] float32; all but k contiguous."""
    (B, S), T = q.shape[:2], k.shape[1]
    if out.numel():
        write_scores(q.flatten(0, 1), k, w.flatten(0, 1), out.view(B * S, T), (0, B * S), S, causal=causal, fill=True)


def indexer_scores_backward(q: Tensor, k: Tensor, w: Tensor, dscores: Tensor, dq: Tensor, dk: Tensor, dw: Tensor, *, causal: bool) -> None:
    """dscores [B,S,T] float32 -> dq [B,S,Hi,Di], dk [B,T,Di] float32, zeroed before, dw [B,S,Hi] float32."""
    B, S = q.shape[:2]
    rows, flat = (0, B * S), [x.flatten(0, 1) for x in (q, w, dscores, dq, dw)]
    query_gradients(flat[0], k, flat[1], flat[2], flat[3], flat[4], rows, S, causal=causal)
    key_gradients(flat[0], k, flat[1], flat[2], dk, rows, S, causal=causal)


def indexer_topk(q: Tensor, k: Tensor, w: Tensor, indices: Tensor, *, causal: bool, cu_seqlens_q: Tensor | None = None,
                 cu_seqlens_k: Tensor | None = None, seqlens: Tensor | None = None, block_table: Tensor | None = None,
                 k_scale: Tensor | None = None) -> None:
    """The keys of each query -> indices int32 [.., top_k], given; arguments as in tk.indexer_topk, q, w (float32) and indices contiguous.

    Workspace: the scores of as many queries as fit configs_sparse.workspace() bytes (at least 64), and a length for each.
    """
    packed = None
    B, S = (1, q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], q.shape[1])
    if cu_seqlens_q is not None:
        row = torch.arange(S, dtype=torch.int32, device=q.device)
        sequence = torch.searchsorted(cu_seqlens_q[1:], row, right=True, out_int32=True).clamp_max(len(cu_seqlens_q) - 2)
        packed = sequence, cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    R, T = B * S, k.shape[-2] if block_table is None else block_table.shape[1] * k.shape[1]
    q, w, chosen = q.reshape(R, *q.shape[-2:]), w.reshape(R, -1), indices.view(R, -1)
    k = k.view(torch.uint8) if k.dtype == torch.float8_e4m3fn else k
    pieces = list(chunks(B, S, configs_sparse.workspace() // (4 * max(T, 1))))
    most = max(last - first for first, last in pieces)
    scores, lengths = torch.empty((most, T), device=q.device), torch.zeros(most, dtype=torch.int32, device=q.device)
    for first, last in pieces:
        if T:
            write_scores(q, k, w, scores, (first, last), S, causal=causal, lengths=lengths, seqlens=seqlens, block_table=block_table,
                         k_scale=k_scale, packed=packed)
        topk.select(scores[: last - first], lengths[: last - first], None, chosen[first:last])
