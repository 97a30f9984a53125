"""tk.grpo_loss as the composition of its parts, and the modules LinearLogProb and GRPOLoss.

Shapes: B sequences of up to S tokens (packed: N tokens), D hidden, V vocabulary.
"""

from __future__ import annotations

import pytest
import thinkernel as tk
import torch
from thinkernel import nn
from thinkernel.reference.policy_loss import LOSS_TYPES
from thinkernel.testing.compare import assert_bitwise, check

B, S, D, V = 4, 7, 24, 83
LENGTHS = torch.tensor([7, 1, 0, 4])
pytestmark = pytest.mark.filterwarnings("ignore:thinkernel. policy_loss runs on the reference:RuntimeWarning")


def batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape, scale=1.0: (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)
    return {
        "hidden": draw(B, S, D).requires_grad_(), "weight": draw(V, D, scale=D**-0.5).requires_grad_(),
        "target": torch.randint(V, (B, S), generator=g), "old": -4 + draw(B, S, scale=0.3), "advantages": draw(B),
        "mask": (torch.arange(S) < LENGTHS.unsqueeze(1)).float(), "ref": -4 + draw(B, S, scale=0.3),
        "rollout": -4 + draw(B, S, scale=0.3), "bias": draw(V).requires_grad_(),
    }  # fmt: skip


def options_for(loss_type: str, x: dict[str, torch.Tensor]) -> dict:
    o = dict(loss_type=loss_type, beta=0.1, ref_logprob=x["ref"], entropy_coef=0.02, max_completion_length=9, num_items_in_batch=31.0)
    if loss_type == "cispo":
        o["epsilon_high"] = 2.0
    if loss_type in ("grpo", "vespo", "dapo"):
        o |= dict(rollout_logprob=x["rollout"], rollout_correction="token_truncate", off_policy_threshold=0.3)
    if loss_type in ("bnpo", "sapo"):
        o |= dict(top_entropy=0.5, kl_correction=True)
    return o


def pack(x: torch.Tensor) -> torch.Tensor:
    """[B, S, ...] -> [N, ...]."""
    return x[torch.arange(S) < LENGTHS.unsqueeze(1)]


def packed_call(x: dict[str, torch.Tensor], o: dict) -> tuple[list, dict]:
    cu = torch.cat([torch.zeros(1, dtype=torch.long), LENGTHS.cumsum(0)]).int()
    o = {name: pack(value) if name.endswith("_logprob") else value for name, value in o.items()} | {"cu_seqlens": cu}
    return [pack(x["hidden"]), x["weight"], pack(x["target"]), pack(x["old"]), x["advantages"], pack(x["mask"])], o


HEAD = dict(temperature=0.7, softcap=20.0)


def leaves(x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [x["hidden"], x["weight"], x["bias"]]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_grpo_loss_is_its_parts(loss_type: str, packed: bool) -> None:
    """Bit for bit: loss, metrics, gradients of hidden, weight and bias."""
    x = batch(LOSS_TYPES.index(loss_type))
    args, o = [x[n] for n in ("hidden", "weight", "target", "old", "advantages", "mask")], options_for(loss_type, x)
    if packed:
        args, o = packed_call(x, o)
    hidden, weight, target, old, advantages, mask = args
    whole, metrics = tk.grpo_loss(*args, bias=x["bias"], **HEAD, **o)
    lp, ent = tk.linear_logprob(hidden, weight, target.masked_fill(mask == 0, -100), bias=x["bias"], **HEAD)
    parts, parts_metrics = tk.policy_loss(lp, old, advantages, mask, entropy=ent, **o)
    assert_bitwise(whole, parts)
    assert metrics.keys() == parts_metrics.keys() and "entropy" in metrics
    for name in metrics:
        assert_bitwise(metrics[name], parts_metrics[name], name)
    for a, b in zip(torch.autograd.grad(whole, leaves(x), retain_graph=True), torch.autograd.grad(parts, leaves(x))):
        assert_bitwise(a, b)
        assert b.any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_packed_is_padded(loss_type: str) -> None:
    """The same tokens packed: the same loss, metrics and gradients, by the rule (float64 reference, padded, the truth)."""
    runs = []
    for dtype, packed in ((torch.float32, True), (torch.float64, False), (torch.float32, False)):
        x = batch(LOSS_TYPES.index(loss_type), dtype)
        args, o = [x[n] for n in ("hidden", "weight", "target", "old", "advantages", "mask")], options_for(loss_type, x)
        if packed:
            args, o = packed_call(x, o)
        with tk.use_backend("auto" if packed else "reference"):
            loss, metrics = tk.grpo_loss(*args, bias=x["bias"], **HEAD, **o)
            runs.append((loss, metrics, torch.autograd.grad(loss, leaves(x))))
    (loss, metrics, gradients), (exact, exact_metrics, exact_gradients), (torch_loss, _, torch_gradients) = runs
    # The loss is a sum that may cancel: its error is measured against the size of one term, 1e-6 of it.
    assert abs(float(loss - exact)) <= 2e-6 * max(1.0, abs(float(exact)))
    assert metrics.keys() == exact_metrics.keys()
    for name in metrics:
        assert float(metrics[name]) == pytest.approx(float(exact_metrics[name]), rel=1e-5, abs=1e-6), name
    for name, a, want, baseline in zip(("hidden", "weight", "bias"), gradients, exact_gradients, torch_gradients):
        check(a, want, baseline, name=f"gradient of {name}")


# ---- LinearLogProb


class Tied(torch.nn.Module):
    """An embedding, something in between, and a head on the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(V, D)
        self.middle = torch.nn.Linear(D, D)
        self.head = nn.LinearLogProb(D, V)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(torch.tanh(self.middle(self.embedding(tokens))), targets)


def test_head_tied_to_an_embedding() -> None:
    """One parameter, one gradient: what reaches it from below and from the head is summed."""
    torch.manual_seed(3)
    model, tokens = Tied(), torch.randint(V, (B, S + 1))
    assert [name for name, _ in model.named_parameters()] == ["embedding.weight", "middle.weight", "middle.bias"]

    def gradients(dtype: torch.dtype, head: bool) -> list[torch.Tensor]:
        model.to(dtype).zero_grad()
        if head:
            lp, ent = model(tokens[:, :-1], tokens[:, 1:])
        else:
            hidden = torch.tanh(model.middle(model.embedding(tokens[:, :-1])))
            log_p = (hidden @ model.embedding.weight.T).log_softmax(-1)
            lp, ent = log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
        (lp.sum() - 0.3 * ent.sum()).backward()
        return [p.grad.clone() for p in model.parameters()]

    runs = gradients(torch.float32, True), gradients(torch.float64, False), gradients(torch.float32, False)
    for (name, _), out, ref64, baseline in zip(model.named_parameters(), *runs):
        check(out, ref64, baseline, name=name)
    logits = model.float()(tokens)
    assert logits.shape == (B, S + 1, V)


def test_head_packed_is_padded() -> None:
    torch.manual_seed(4)
    head, x = nn.LinearLogProb(D, V, bias=True, softcap=5.0), batch(5)
    lp, ent = head(x["hidden"], x["target"].masked_fill(x["mask"] == 0, -100), temperature=0.6)
    packed = head(pack(x["hidden"]), pack(x["target"]), temperature=0.6)
    for padded, rows in zip((lp, ent), packed):
        assert_bitwise(pack(padded), rows)
        assert not padded[x["mask"] == 0].any()
    assert head(x["hidden"], x["target"], entropy=False)[1] is None


def test_head_hands_every_option_on(monkeypatch) -> None:
    seen = {}
    monkeypatch.setattr("thinkernel.nn.grpo.linear_logprob", lambda hidden, weight, target, **options: seen.update(options))
    group = object()
    head = nn.LinearLogProb(D, V, bias=True, softcap=4.0, keep_logits=True, group=group)
    head(torch.randn(3, D), torch.zeros(3, dtype=torch.long), temperature=0.5, entropy=False, ignore_index=-1)
    assert seen == dict(bias=head.bias, temperature=0.5, softcap=4.0, ignore_index=-1, entropy=False, keep_logits=True, group=group)
    assert repr(head) == "LinearLogProb(24, 83, bias=True, softcap=4.0, keep_logits=True)"


# ---- GRPOLoss


def test_loss_from_hidden_is_head_then_loss() -> None:
    """The two forms of the module, bit for bit, and the function itself."""
    torch.manual_seed(6)
    x = batch(6)
    head = nn.LinearLogProb(D, V, softcap=6.0)
    loss_of = nn.GRPOLoss(loss_type="dapo", epsilon_high=0.28, entropy_coef=0.01)
    target = x["target"].masked_fill(x["mask"] == 0, -100)
    lp, ent = head(x["hidden"], target, temperature=0.9)
    apart, _ = loss_of(lp, x["old"], x["advantages"], x["mask"], entropy=ent, beta=0.1, ref_logprob=x["ref"])
    args = [x["hidden"], head.weight, x["target"], x["old"], x["advantages"], x["mask"]]
    whole, metrics = loss_of.from_hidden(*args, temperature=0.9, softcap=6.0, beta=0.1, ref_logprob=x["ref"])
    function, _ = tk.grpo_loss(
        *args, temperature=0.9, softcap=6.0, beta=0.1, ref_logprob=x["ref"], loss_type="dapo", epsilon_high=0.28, entropy_coef=0.01
    )
    assert_bitwise(apart, whole)
    assert_bitwise(function, whole)
    assert all(not value.requires_grad for value in metrics.values())
    apart_gradients, whole_gradients = (torch.autograd.grad(loss, [x["hidden"], head.weight], retain_graph=True) for loss in (apart, whole))
    for a, b in zip(apart_gradients, whole_gradients):
        assert_bitwise(a, b)


def test_loss_options() -> None:
    """An option given in a call counts for that call; one that does not exist is named at once."""
    x = batch(7)
    args = (x["old"] + 0.5, x["old"], x["advantages"], x["mask"])
    narrow, wide = nn.GRPOLoss(epsilon=0.1), nn.GRPOLoss(epsilon=0.9)
    assert_bitwise(narrow(*args, epsilon=0.9)[0], wide(*args)[0])
    assert not torch.equal(narrow(*args)[0], wide(*args)[0])
    on_policy, _ = wide(x["old"], None, *args[2:])
    assert_bitwise(on_policy, wide(x["old"], x["old"], *args[2:])[0])
    with pytest.raises(TypeError, match="epsilom: not an option of policy_loss"):
        nn.GRPOLoss(epsilom=0.1)
    with pytest.raises(TypeError, match="temperature: not an option of policy_loss"):
        narrow(*args, temperature=0.5)
