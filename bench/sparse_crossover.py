"""From which length on sparse attention beats dense attention, its indexer included: `bench/sparse.py --crossover`.

A chunk of S queries (the last of T) attends to all of T latents (mla_decode), or to the K that the indexer chooses (indexer_topk, then
sparse_attention). Interleaved, medians. Written to bench/results/sparse_crossover_cpu.json and docs/sparse_crossover.svg.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import thinkernel as tk
import torch
from attention import RESULTS, interleave

S, K, H, HI, DI, D, L, SCALE = 512, 2048, 16, 16, 128, 576, 512, 192**-0.5
LENGTHS = (4096, 6144, 8192, 12_288, 16_384, 32_768, 65_536)
FIGURE = Path(__file__).parent.parent / "docs" / "sparse_crossover.svg"


def measure(T: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Milliseconds: dense, indexer, sparse (without it), and the median ratio dense / (indexer + sparse)."""
    q, index_q, w = torch.randn(1, S, H, D).to(dtype), torch.randn(1, S, HI, DI).to(dtype), torch.randn(1, S, HI)
    kv, keys = torch.randn(1, T, D).to(dtype), torch.randn(1, T, DI).to(dtype)
    seqlens = torch.tensor([T], dtype=torch.int32)
    chosen = tk.indexer_topk(index_q, keys, w, top_k=K)
    times = interleave(
        {
            "dense": lambda: tk.mla_decode(q, kv, seqlens=seqlens, value_dim=L, scale=SCALE),
            "indexer": lambda: tk.indexer_topk(index_q, keys, w, top_k=K),
            "sparse": lambda: tk.sparse_attention(q, kv, chosen, value_dim=L, scale=SCALE),
        },
        repeats,
    )
    row = {"T": T} | {who: round(1e3 * statistics.median(found), 2) for who, found in times.items()}
    row["speedup"] = round(statistics.median(a / (b + c) for a, b, c in zip(*times.values())), 2)
    print(row, flush=True)
    return row


def crossing(rows: Sequence[dict[str, float]]) -> float | None:
    """The length at which both take the same time, by straight lines between the lengths measured."""
    for a, b in zip(rows, rows[1:]):
        before, after = (x["dense"] - x["indexer"] - x["sparse"] for x in (a, b))
        if before < 0 <= after:
            return a["T"] + (b["T"] - a["T"]) * before / (before - after)
    return None


def plot(rows: Sequence[dict[str, float]], title: str) -> None:
    """Milliseconds over T, both axes logarithmic, drawn as plain SVG: the bench then needs no plotting package."""
    from math import log2

    left, top, width, height = 62, 34, 460, 270
    T = [row["T"] for row in rows]
    series = {
        "dense (mla_decode)": ("#b24", [row["dense"] for row in rows]),
        "indexer + sparse attention": ("#246", [row["indexer"] + row["sparse"] for row in rows]),
        "indexer alone": ("#888", [row["indexer"] for row in rows]),
    }
    values = [y for _, ys in series.values() for y in ys]
    low, high = 2 ** int(log2(min(values))), 2 ** (int(log2(max(values))) + 1)
    x_of = lambda t: left + width * log2(t / T[0]) / log2(T[-1] / T[0])  # noqa: E731
    y_of = lambda ms: top + height * (1 - log2(ms / low) / log2(high / low))  # noqa: E731
    parts = [f'<text x="{left}" y="20" font-size="13">{title}</text>']
    ms = low
    while ms <= high:
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y_of(ms):.1f}" y2="{y_of(ms):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y_of(ms) + 4:.1f}" text-anchor="end">{ms} ms</text>')
        ms *= 2
    for t in (4096, 8192, 16_384, 32_768, 65_536):
        parts.append(f'<line x1="{x_of(t):.1f}" x2="{x_of(t):.1f}" y1="{top}" y2="{top + height}" stroke="#eee"/>')
        parts.append(f'<text x="{x_of(t):.1f}" y="{top + height + 17}" text-anchor="middle">{t // 1024}K</text>')
    for i, (name, (colour, ys)) in enumerate(series.items()):
        points = " ".join(f"{x_of(t):.1f},{y_of(y):.1f}" for t, y in zip(T, ys))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x_of(t):.1f}" cy="{y_of(y):.1f}" r="3" fill="{colour}"/>' for t, y in zip(T, ys)]
        parts.append(f'<text x="{left + 12}" y="{top + 18 + 16 * i}" fill="{colour}">{name}</text>')
    size = f'width="{left + width + 16}" height="{top + height + 30}"'
    body = "\n".join(parts)
    FIGURE.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def run(record: dict[str, object], repeats: int) -> None:
    rows = [measure(T, torch.bfloat16, repeats) for T in LENGTHS]
    meet = crossing(rows)
    shape = dict(S=S, K=K, H=H, latent=f"{D}/{L}", indexer=f"{HI} x {DI}", dtype="bfloat16", repeats=repeats)
    found = record | dict(shape=shape, crossover=None if meet is None else round(meet), milliseconds=rows)
    (RESULTS / "sparse_crossover_cpu.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(rows, f"{S} queries x {H} heads over T latents, {K} kept: they meet at {meet or 0:.0f} keys")
    print(f"they meet at {meet or 0:.0f} keys; written to {FIGURE} and {RESULTS}/sparse_crossover_cpu.json")
