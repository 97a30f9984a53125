"""Every Triton kernel at every shipped configuration compiles for sm_80, sm_90 and sm_100: fits shared memory, spills nothing.

The default run takes Hopper at head dim 128; the full table is marked slow. The same kernels must really use Hopper's wgmma for
float16 and bfloat16, and IEEE float32 (no tf32) for float32.
"""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton_compile as aot
from thinkernel.kernels import configs

pytestmark = pytest.mark.skipif(configs.INTERPRET, reason="the interpreter replaces the compiler")

HALF, HALF16, FLOAT = torch.bfloat16, torch.float16, torch.float32
HEAD_DIMS = [(64, 64), (128, 128), (192, 128), (256, 256)]  # one for each width of the attention tables
ROW_KERNELS = (  # no matrix product in these
    "_rows_kernel", "_merge_kernel", "_logits_forward_kernel", "_logits_merge_kernel", "_logits_backward_kernel", "_sequence_kernel",
    "_token_kernel", "_sequence_ratio_kernel", "_metrics_kernel", "_groups_kernel", "_batch_kernel", "_append_kernel", "_gather_kernel",
    "_sum_kernel",
    "_row_kernel", "_part_kernel", "_finish_kernel", "_residual_kernel", "_collect_kernel",
    "_choose_kernel", "_means_kernel", "_mean_score_kernel", "_unions_kernel", "_block_sums_kernel", "_gates_kernel",
    "_gates_backward_kernel", "_route_kernel", "_route_backward_kernel", "_histogram_kernel", "_prefix_kernel", "_offsets_kernel",
    "_place_kernel", "_tiles_kernel", "_combine_kernel", "_db_kernel", "_ds_kernel",
)  # fmt: skip


def check(arch: str, dtype: torch.dtype, call: Callable[[], None]) -> list[aot.Compiled]:
    found = aot.compile_launches(arch, call)
    assert found
    for kernel in found:
        name = f"{kernel.kernel} {arch} {dtype}"
        assert kernel.stack == 0, f"{name}: {kernel.stack} bytes of stack, {kernel.registers} registers"
        assert kernel.shared <= configs.SHARED_MEMORY[arch], f"{name}: {kernel.shared} bytes of shared memory"
        assert "tf32" not in kernel.ptx, f"{name}: tf32 in the PTX"
        assert arch != "sm_100" or "trap;" not in kernel.ptx, f"{name}: traps, as what takes more than 512 columns of tensor memory"
        if arch == "sm_90" and dtype != FLOAT and kernel.kernel not in ROW_KERNELS:
            assert "wgmma" in kernel.ptx, f"{name}: no wgmma in the PTX"
    return found


def attention_calls(dtype: torch.dtype, D: int, Dv: int) -> dict[str, Callable[[], None]]:
    padding = torch.zeros(1, dtype=torch.int32)
    packed = dict(cu_seqlens_q=torch.tensor([0, 300, 512], dtype=torch.int32), cu_seqlens_k=torch.tensor([0, 700, 1024], dtype=torch.int32))
    everything = dict(window=(100, -1), softcap=20.0, sinks=torch.zeros(8), chunk=300)
    return {
        "forward": aot.attention_forward_call(dtype, D, Dv),
        "backward": aot.attention_backward_call(dtype, D, Dv, dlse=torch.zeros(1, 512, 8)),
        "decode": aot.attention_decode_call(dtype, D, Dv),
        "decode paged": aot.attention_decode_call(dtype, D, Dv, paged=True),
        "forward one split": aot.attention_forward_call(dtype, D, Dv, T=1000),
        "forward padded": aot.attention_forward_call(dtype, D, Dv, key_start=padding),
        "backward padded": aot.attention_backward_call(dtype, D, Dv, key_start=padding),
        "forward packed": aot.attention_forward_call(dtype, D, Dv, T=1024, **packed),
        "backward packed": aot.attention_backward_call(dtype, D, Dv, **packed),
        "forward packed everything": aot.attention_forward_call(dtype, D, Dv, T=2048, **packed, **everything),
        "backward packed everything": aot.attention_backward_call(dtype, D, Dv, **packed, dsinks=torch.zeros(8), **everything),
        "forward everything": aot.attention_forward_call(dtype, D, Dv, key_start=padding, **everything),
        "backward everything": aot.attention_backward_call(dtype, D, Dv, key_start=padding, dsinks=torch.zeros(8), **everything),
        "decode prefix": aot.attention_decode_call(dtype, D, Dv, prefix=2100),
        "decode prefix everything": aot.attention_decode_call(dtype, D, Dv, paged=True, prefix=2100, **everything),
        "decode everything": aot.attention_decode_call(dtype, D, Dv, paged=True, **everything),
    }


MLA_OPEN = {("sm_90", "decode FP8 prefix, paged False"): "one register spilled outside the loop of the prefix's tail"}


def mla_calls(dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    calls = {
        "decode": aot.mla_decode_call(dtype),
        "decode one split": aot.mla_decode_call(dtype, T=1000),
        "decode 128 heads, paged": aot.mla_decode_call(dtype, H=128, Sq=2, paged=True),
        "decode prefix": aot.mla_decode_call(dtype, prefix=2100),
        "decode prefix, paged": aot.mla_decode_call(dtype, prefix=2100, paged=True),
        "decode 256 + 64": aot.mla_decode_call(dtype, 256, 64, paged=True),
        "decode 128": aot.mla_decode_call(dtype, 128, 0),
        "decode 80 + 48": aot.mla_decode_call(dtype, 80, 48, prefix=2100),
        "cache": aot.latent_cache_calls(dtype, fp8=False, paged=True),
        "cache FP8": aot.latent_cache_calls(dtype, fp8=True, paged=True),
        "cache FP8, contiguous": aot.latent_cache_calls(dtype, fp8=True, paged=False),
    }
    for paged in (False, True):
        calls[f"decode FP8, paged {paged}"] = aot.mla_decode_call(dtype, fp8=True, paged=paged)
        calls[f"decode FP8 one split, paged {paged}"] = aot.mla_decode_call(dtype, fp8=True, paged=paged, T=1000)
        calls[f"decode FP8 prefix, paged {paged}"] = aot.mla_decode_call(dtype, fp8=True, paged=paged, prefix=2100)
    return calls


def sparse_calls(dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    sinks = torch.zeros(128)
    calls = {
        "latents": aot.sparse_call(dtype),
        "latents, packed, sinks": aot.sparse_call(dtype, packed=True, sinks=sinks),
        "latents, one split, 16 heads": aot.sparse_call(dtype, H=16, K=512, sinks=torch.zeros(16)),
        "latents, cache": aot.sparse_call(dtype, cache=True),
        "latents, pages": aot.sparse_call(dtype, paged=True),
        "latents, pages, one split": aot.sparse_call(dtype, paged=True, K=1000),
        "FP8": aot.sparse_call(dtype, fp8=True),
        "FP8, cache": aot.sparse_call(dtype, fp8=True, cache=True),
        "FP8, pages": aot.sparse_call(dtype, fp8=True, paged=True),
        "FP8, pages, one split": aot.sparse_call(dtype, fp8=True, paged=True, K=1000, sinks=sinks),
        "latents backward": aot.sparse_call(dtype, backward=True),
        "latents backward, packed, sinks": aot.sparse_call(dtype, backward=True, packed=True, sinks=sinks, dlse=torch.zeros(16, 128)),
        "latents backward, cache": aot.sparse_call(dtype, backward=True, cache=True, K=1000, H=16),
        "256 + 64": aot.sparse_call(dtype, 320, 256),
        "256 + 64 backward": aot.sparse_call(dtype, 320, 256, backward=True),
        "128 + 64, one width": aot.sparse_call(dtype, 192, 192, paged=True),
        "128 + 64, one width, backward": aot.sparse_call(dtype, 192, 192, backward=True),
    }
    for D, Dv in HEAD_DIMS:
        for H in (8, 128):
            calls[f"{H}/2 heads of {D}"] = aot.sparse_call(dtype, D, Dv, H=H, Hkv=2)
            calls[f"{H}/2 heads of {D}, backward"] = aot.sparse_call(dtype, D, Dv, H=H, Hkv=2, backward=True)
        calls[f"heads of {D}, packed, sinks"] = aot.sparse_call(dtype, D, Dv, Hkv=2, packed=True, sinks=sinks)
        calls[f"heads of {D}, packed, sinks, backward"] = aot.sparse_call(
            dtype, D, Dv, Hkv=2, backward=True, packed=True, sinks=sinks, dlse=torch.zeros(16, 128))
        calls[f"heads of {D}, pages, one split"] = aot.sparse_call(dtype, D, Dv, Hkv=2, paged=True, K=1000, sinks=sinks)
    return calls


def indexer_calls(dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Top-k, the indexer and its loss: DeepSeek-V3.2's sizes, GLM-5's heads, few heads, odd dims."""
    some = dict(B=1, S=64)
    calls = {
        "scores": aot.indexer_scores_call(dtype),
        "scores, 32 heads of 64": aot.indexer_scores_call(dtype, Hi=32, Di=64, causal=False),
        "scores, 5 heads of 200": aot.indexer_scores_call(dtype, Hi=5, Di=200),
        "selection": aot.indexer_topk_call(dtype),
        "selection, packed, FP8": aot.indexer_topk_call(dtype, packed=True, fp8=True, Hi=16),
        "selection, pages": aot.indexer_topk_call(dtype, paged=True, S=2),
        "selection, FP8 pages": aot.indexer_topk_call(dtype, paged=True, fp8=True, S=1),
        "loss": aot.indexer_loss_call(dtype, sparse=True, **some),
        "loss, lse, grouped heads": aot.indexer_loss_call(dtype, sparse=True, lse=True, H=32, Hkv=8, D=128, Hi=16, **some),
        "warm-up": aot.indexer_loss_call(dtype, **some),
        "warm-up, lse, grouped heads": aot.indexer_loss_call(dtype, lse=True, H=32, Hkv=8, D=128, Hi=16, **some),
        "warm-up, odd": aot.indexer_loss_call(dtype, H=5, D=100, Hi=3, Di=40, **some),
    }
    for rows, length in ((300, 8192), (2, 100_000), (300, 100)):
        calls[f"topk, {rows} of {length}"] = aot.topk_call(dtype, rows, length)
    return calls


def block_sparse_calls(dtype: torch.dtype, D: int, Dv: int) -> dict[str, Callable[[], None]]:
    """NSA at the paper's sizes; packed; from a cache; with a group of three, which fills no tile; MoBA."""
    forms = {
        "nsa": {}, "nsa packed": dict(packed=True), "nsa cache": dict(cache=True), "nsa three heads": dict(H=6, Hkv=2),
        "moba": dict(moba=True, H=8, block=512, slots=3), "moba packed": dict(moba=True, H=8, block=500, slots=12, packed=True),
    }
    calls = {f"{form} {name}": call for form, more in forms.items() for name, call in aot.block_sparse_calls(dtype, D, Dv, **more).items()}
    return {name: call for name, call in calls.items() if name != "nsa cache backward"} | {"gates": aot.branch_gates_calls(dtype, Dv)}


def product_calls(dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    return {
        "logprob forward": aot.logprob_forward_call(dtype),
        "logprob backward": aot.logprob_backward_call(dtype),
        "logprob forward, softcap": aot.logprob_forward_call(dtype, softcap=20.0),
        "logprob backward, softcap": aot.logprob_backward_call(dtype, softcap=20.0),
        "linear": aot.linear_call(dtype, 512),
        "linear, few rows": aot.linear_call(dtype, 16),
        "linear, transposed": aot.linear_call(dtype, 512, transposed=True),
    }


def row_calls(dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """logprob from given logits: a vocabulary of whole vectors, one of none, and one that leaves room for several rows."""
    calls = {}
    for V in (151936, 50257, 50):
        calls[f"forward, V = {V}"] = aot.logits_forward_call(dtype, V)
        calls[f"backward, V = {V}"] = aot.logits_backward_call(dtype, V)
    calls["forward, softcap"] = aot.logits_forward_call(dtype, softcap=20.0)
    calls["backward, softcap"] = aot.logits_backward_call(dtype, softcap=20.0)
    return calls


def batch_calls() -> dict[str, Callable[[], None]]:
    """policy_loss, each form with other options than the one before; group_advantages."""
    calls = {}
    for form in range(5):
        for level in range(1 if form == 3 else 3):
            calls[f"policy_loss, form {form}, level {level}"] = aot.policy_call(
                packed=(form + level) % 2 == 0, per_token=level == 1, everything=level == 2, form=form, level=level, kl=(form + level) % 4,
                rollout=2 if form == 3 else (form + 2 * level) % 5, kl_correction=level == 1, off_policy=form % 2 == 0,
                reduction=(form + level) % 3, ratio_low=0.8, ratio_high=1.2, log_ratio_clamp=20.0, beta=0.1)
    for rule in range(6):
        calls[f"advantages, rule {rule}"] = aot.advantages_call(n=1 + rule % 3, ids=rule % 2 == 1, normalize=rule)
    calls["advantages, GDPO"] = aot.advantages_call(n=3, ids=True, normalize_then_sum=True)
    return calls


def route_calls(dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    return {
        "softmax": aot.route_calls(dtype),
        "softmax, plain": aot.route_calls(dtype, E=384, renormalize=False),
        "gpt-oss, replay": aot.route_calls(dtype, E=128, K=4, score="softmax_topk", replay=True),
        "deepseek-v2": aot.route_calls(dtype, E=160, K=6, n_group=8, topk_group=3, group_score="max", renormalize=False),
        "deepseek-v3": aot.route_calls(dtype, score="sigmoid", bias=True, n_group=8, topk_group=4, scaling=2.5),
        "1024 experts": aot.route_calls(dtype, E=1024, K=32, score="sqrtsoftplus", bias=True),
    }


def experts_calls(dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    return {
        "swiglu": aot.experts_calls(dtype),
        "few tokens": aot.experts_calls(dtype, tokens=16),
        "gpt-oss": aot.experts_calls(dtype, activation="gpt_oss", layout="in_out", biases=True),
        "gpt-oss, out in, input": aot.experts_calls(dtype, activation="gpt_oss", weight_on="input", biases=True),
        "llama4": aot.experts_calls(dtype, layout="in_out", weight_on="input"),
        "geglu": aot.experts_calls(dtype, activation="geglu", biases=True),
        "geglu tanh, in out": aot.experts_calls(dtype, activation="geglu_tanh", layout="in_out"),
        "relu2": aot.experts_calls(dtype, activation="relu2"),
    }


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
@pytest.mark.parametrize("kind", ["half", "float"])
def test_decode_walks_the_keys_in_the_blocks_of_prefill(kind: str, arch: str) -> None:
    for w in configs.WIDTHS:
        levels = (configs.ATTENTION, configs.OPTIONS, configs.PACKED)
        tables = [level[kernel].get((arch, kind), {}) for level in levels for kernel in ("forward", "decode")]
        assert len({table[w].n for table in tables if w in table}) == 1, f"{arch} {kind} {w}"


@pytest.mark.parametrize("name", ["forward", "backward", "decode", "decode paged"])
def test_attention_on_hopper(name: str) -> None:
    check("sm_90", HALF, attention_calls(HALF, 128, 128)[name])


@pytest.mark.parametrize("name", ["logprob forward", "logprob backward", "linear"])
def test_products_on_hopper(name: str) -> None:
    check("sm_90", HALF, product_calls(HALF)[name])


def test_logprob_reads_and_writes_whole_vectors_on_hopper() -> None:
    forward, _ = check("sm_90", HALF, aot.logits_forward_call(HALF))
    (backward,) = check("sm_90", HALF, aot.logits_backward_call(HALF))
    assert "ld.global.v4.b32" in forward.ptx and "ld.global.v4.b32" in backward.ptx and "st.global.v4.b32" in backward.ptx


@pytest.mark.parametrize("name", ["policy_loss, form 0, level 1", "advantages, GDPO"])
def test_losses_on_hopper(name: str) -> None:
    check("sm_90", FLOAT, batch_calls()[name])


@pytest.mark.parametrize("D,Dv", [(128, 128), *(pytest.param(*d, marks=pytest.mark.slow) for d in ((64, 64), (192, 128), (256, 256)))])
def test_attention_with_descriptors_on_hopper(D: int, Dv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs.DESCRIPTORS, "sm_90", True)
    for name in ("forward", "forward packed"):
        (forward,) = check("sm_90", HALF, attention_calls(HALF, D, Dv)[name])
        assert "cp.async.bulk.tensor" in forward.ptx


@pytest.mark.parametrize("name", ["decode", "decode 128 heads, paged", "decode FP8, paged True", "cache", "cache FP8"])
def test_mla_on_hopper(name: str) -> None:
    check("sm_90", HALF, mla_calls(HALF)[name])


@pytest.mark.parametrize("name", ["latents", "FP8, pages", "latents backward"])
def test_sparse_attention_on_hopper(name: str) -> None:
    check("sm_90", HALF, sparse_calls(HALF)[name])


@pytest.mark.parametrize("name", ["scores", "topk, 300 of 8192"])
def test_indexer_on_hopper(name: str) -> None:
    check("sm_90", HALF, indexer_calls(HALF)[name])


@pytest.mark.parametrize("name", ["nsa choose", "nsa forward", "nsa backward", "gates"])
def test_native_sparse_on_hopper(name: str) -> None:
    check("sm_90", HALF, block_sparse_calls(HALF, 128, 128)[name])


def test_route_on_hopper() -> None:
    check("sm_90", HALF, route_calls(HALF)["deepseek-v3"])


def test_experts_on_hopper() -> None:
    check("sm_90", HALF, experts_calls(HALF)["swiglu"])


@pytest.mark.parametrize("name", ["forward", "decode"])
def test_attention_float32_has_no_tf32(name: str) -> None:
    check("sm_90", FLOAT, attention_calls(FLOAT, 64, 64)[name])


def test_linear_float32_has_no_tf32() -> None:
    check("sm_90", FLOAT, product_calls(FLOAT)["linear"])


@pytest.mark.slow
@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [HALF, FLOAT, HALF16], ids=str)
class TestEverything:
    @pytest.mark.parametrize("name", list(product_calls(HALF)))
    def test_products(self, name: str, arch: str, dtype: torch.dtype) -> None:
        check(arch, dtype, product_calls(dtype)[name])

    @pytest.mark.parametrize("name", list(row_calls(HALF)))
    def test_logprob(self, name: str, arch: str, dtype: torch.dtype) -> None:
        check(arch, dtype, row_calls(dtype)[name])

    @pytest.mark.parametrize("name", list(indexer_calls(HALF)))
    def test_indexer(self, name: str, arch: str, dtype: torch.dtype) -> None:
        check(arch, dtype, indexer_calls(dtype)[name])

    @pytest.mark.parametrize("name", list(mla_calls(HALF)))
    def test_mla(self, name: str, arch: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
        if (arch, name) in MLA_OPEN and dtype != FLOAT:
            request.applymarker(pytest.mark.xfail(reason=MLA_OPEN[arch, name], strict=True))
        check(arch, dtype, mla_calls(dtype)[name])

    @pytest.mark.parametrize("name", list(sparse_calls(HALF)))
    def test_sparse_attention(self, name: str, arch: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
        if arch == "sm_80" and dtype == FLOAT and name.startswith("latents backward"):
            request.applymarker(pytest.mark.xfail(reason="too much shared memory, which covers() names", strict=True))
        check(arch, dtype, sparse_calls(dtype)[name])

    @pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
    @pytest.mark.parametrize("name", list(block_sparse_calls(HALF, 64, 64)))
    def test_native_sparse(self, name: str, head_dims: tuple[int, int], arch: str, dtype: torch.dtype) -> None:
        check(arch, dtype, block_sparse_calls(dtype, *head_dims)[name])

    @pytest.mark.parametrize("name", list(route_calls(HALF)))
    def test_route(self, name: str, arch: str, dtype: torch.dtype) -> None:
        check(arch, dtype, route_calls(dtype)[name])

    @pytest.mark.parametrize("name", list(experts_calls(HALF)))
    def test_experts(self, name: str, arch: str, dtype: torch.dtype) -> None:
        check(arch, dtype, experts_calls(dtype)[name])

    @pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
    @pytest.mark.parametrize("name", list(attention_calls(HALF, 64, 64)))
    def test_attention(self, name: str, head_dims: tuple[int, int], arch: str, dtype: torch.dtype) -> None:
        check(arch, dtype, attention_calls(dtype, *head_dims)[name])


@pytest.mark.slow
@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
@pytest.mark.parametrize("name", list(batch_calls()))
def test_losses_and_advantages(name: str, arch: str) -> None:
    check(arch, FLOAT, batch_calls()[name])
