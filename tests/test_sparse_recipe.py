"""The recipe from dense to sparse attention in small: the task, what each stage moves, what is measured, a run of a minute's part.

Shapes: B sequences, S tokens, K top-k.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from thinkernel.models import Transformer
from thinkernel.rl import sparse_recipe
from thinkernel.rl.sparse_recipe import RecipeConfig, model_config, selection_of, selections, split_parameters
from thinkernel.rl.tasks import recall

pytestmark = pytest.mark.filterwarnings("ignore:thinkernel. .* runs on the reference backend")
TINY = RecipeConfig(
    length=48, top_k=6, facts=5, layers=2, batch=2, short_length=24, short_steps=1, dense_steps=1, warm_up_steps=2, sparse_steps=2,
    held_out=4,
)


def tiny_model(config: RecipeConfig = TINY) -> Transformer:
    torch.manual_seed(0)
    return Transformer(model_config(config))


def changed(model: Transformer, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


# ---- the task


def test_every_question_is_answered_by_one_fact_of_the_first_half() -> None:
    tokens, targets = recall.make_batch(5, 64, 9, seed=3)
    again, other = (recall.make_batch(5, 64, 9, seed=seed).tokens for seed in (3, 4))
    assert torch.equal(tokens, again) and not torch.equal(tokens, other)
    assert (targets[:, :32] == -100).all() and (tokens >= recall.QUESTION).all() and (tokens < recall.VOCAB_SIZE).all()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        facts = [divmod(token - recall.FACT, recall.VALUES) for token in row if token >= recall.FACT]
        assert len(facts) == len(dict(facts)) == 9 and all(token < recall.FACT for token in row[32:])
        questions = [(token - recall.QUESTION, value) for token, value in zip(row, wanted, strict=True) if token < recall.FIRST_NOISE]
        assert len(questions) > 5 and all(dict(facts)[key] == value for key, value in questions)
        assert sum(value >= 0 for value in wanted) == len(questions)


@pytest.mark.parametrize("facts", [0, 17])
def test_the_task_names_what_it_takes(facts: int) -> None:
    with pytest.raises(ValueError, match=f"^facts: got {facts}"):
        recall.make_batch(1, 64, facts, seed=0)


# ---- what the stages move


def test_the_warm_up_moves_the_indexer_alone_and_its_recall_rises() -> None:
    config = dataclasses.replace(TINY, layers=1, indexer_learning_rate=1e-2, warm_up_steps=25)
    model = tiny_model(config)
    with torch.no_grad():  # attention that has preferences, as after training
        for attention, _ in sparse_recipe.sparse_layers(model):
            attention.q_b_proj.weight.mul_(4)
    batch = recall.make_batch(4, TINY.length, TINY.facts, seed=1)
    before, recalls = {k: v.clone() for k, v in model.state_dict().items()}, selections(model, batch.tokens, sparse=False)
    sparse_recipe.train_indexer(model, config)
    moved = changed(model, before)
    assert moved and all(".indexer." in name for name in moved)
    parts = {"q_proj.weight", "k_proj.weight", "k_norm.weight", "k_norm.bias", "weight_proj.weight"}
    assert {name.split(".indexer.")[1] for name in moved} == parts
    assert all(p.requires_grad for p in model.parameters())
    after = selections(model, batch.tokens, sparse=False)
    for old, new in zip(recalls, after, strict=True):
        assert new.best == old.best  # the attention is what it was
        assert new.recall > old.recall + 0.15 and new.mass > old.mass + 0.05


def test_dense_training_leaves_the_indexer_and_sparse_training_moves_all() -> None:
    for train, sparse in ((sparse_recipe.train_dense, None), (sparse_recipe.train_on, True), (sparse_recipe.train_on, False)):
        model = tiny_model()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        if sparse is None:
            train(model, TINY)
        else:
            train(model, TINY, sparse=sparse)
        moved = changed(model, before)
        assert any(".indexer." in name for name in moved) == bool(sparse)
        assert {"embedding.weight", "blocks.1.attention.o_proj.weight"} <= moved


def test_each_loss_reaches_its_own_parameters() -> None:
    """The indexer learns from the divergence alone, the main model from the language loss alone, in both stages."""
    model = tiny_model()
    batch = recall.make_batch(2, TINY.length, TINY.facts, seed=2)
    main, indexer = split_parameters(model)
    assert len(main) + len(indexer) == len(list(model.parameters()))
    for sparse in (True, False):
        loss, output = sparse_recipe.language_loss(model, batch, sparse=sparse, losses=True)
        of_indexer = torch.autograd.grad(loss, indexer, retain_graph=True, allow_unused=True)
        of_main = torch.autograd.grad(output.indexer_loss, main, retain_graph=True, allow_unused=True)
        assert all(g is None or not g.any() for g in (*of_indexer, *of_main))
        assert all(g.any() for g in torch.autograd.grad(output.indexer_loss, indexer))


# ---- what is measured


def test_selection_of_a_perfect_and_of_a_known_indexer() -> None:
    """Recall and mass against sets counted by hand, over an indexer whose choice is known."""
    model = tiny_model()
    attention = model.blocks[0].attention
    batch = recall.make_batch(2, TINY.length, TINY.facts, seed=5)
    with torch.no_grad():
        x = model.blocks[0].attention_norm(model.embedding(batch.tokens))
        rope = model.rope(torch.arange(TINY.length).expand(2, TINY.length))
        p = sparse_recipe.attention_probabilities(attention, x, rope)
        assert torch.allclose(p.sum(-1), torch.ones(2, TINY.length)) and (p.triu(1) == 0).all()
        dense = attention(x, rope, sparse=False)
        all_keys = copy.deepcopy(attention)
        all_keys.top_k = TINY.length
        assert torch.allclose(all_keys(x, rope), dense, atol=1e-5)  # the keys that p is about are those attended to
        _, chosen = attention(x, rope, return_indices=True)
    found, mass, best = [], [], []
    for b in range(2):
        for t in range(TINY.top_k, TINY.length):
            true = set(p[b, t].topk(TINY.top_k).indices.tolist())
            picked = set(chosen[b, t].tolist())
            found.append(len(true & picked) / TINY.top_k)
            mass.append(float(p[b, t, list(picked)].sum()))
            best.append(float(p[b, t, list(true)].sum()))
    selection = selection_of(attention, x, rope)
    for got, want in ((selection.recall, found), (selection.mass, mass), (selection.best, best)):
        assert got == pytest.approx(sum(want) / len(want), rel=1e-5)
    assert selection.mass <= selection.best


def test_a_run_is_written_and_repeats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = dataclasses.replace(TINY, warm_up_steps=1, sparse_steps=1, length=24, short_length=12, held_out=2)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(small).items()]
    records = []
    for name in ("a.json", "b.json"):
        threads = torch.get_num_threads()
        try:
            assert sparse_recipe.main([*options, "--json", str(tmp_path / name)]) == 0
        finally:
            torch.set_num_threads(threads)
        records.append(json.loads((tmp_path / name).read_text()))
    assert records[0]["stages"] == records[1]["stages"] and records[0]["config"] == dataclasses.asdict(small)
    assert [row["stage"] for row in records[0]["stages"]][-2:] == ["after sparse training", "control: dense throughout"]
    assert "true top keys found" in capsys.readouterr().out
