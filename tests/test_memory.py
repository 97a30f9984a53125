"""Result buffers: memory that is kept when freed, and never given out while anything still reads it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

import pytest
import thinkernel as tk
import torch
from thinkernel.ops.dispatch import C
from thinkernel.ops.memory import KEPT, empty, poisoned_results

pytestmark = pytest.mark.skipif(C is None, reason="needs the C++ extension")
SHAPE = (64, 4096)  # 1 MiB


def test_memory_of_a_freed_result_is_taken_again() -> None:
    like = torch.zeros(1)
    first = empty(SHAPE, like)
    place = first.data_ptr()
    assert place % 64 == 0 and first.shape == SHAPE and first.dtype == torch.float32
    del first
    assert C.kept_bytes() >= 1 << 20
    assert empty(SHAPE, like).data_ptr() == place
    assert empty(SHAPE, like, torch.bfloat16).data_ptr() != place  # half as large: too much of it would lie idle


@pytest.mark.parametrize(
    "keep", [lambda x: x[3:5], lambda x: x.detach(), lambda x: x.untyped_storage(), lambda x: x.numpy(), lambda x: [x]]
)
def test_memory_in_use_is_left_alone(keep) -> None:
    like = torch.zeros(1)
    first = empty(SHAPE, like)
    place, held = first.data_ptr(), keep(first)
    del first
    others = [empty(SHAPE, like) for _ in range(8)]
    assert place not in [x.data_ptr() for x in others]
    assert len({x.data_ptr() for x in others}) == len(others)
    del held
    gc.collect()
    assert place in [empty(SHAPE, like).data_ptr() for _ in range(2)]


@pytest.mark.parametrize("nbytes", [0, 4, KEPT.start - 4, KEPT.start, KEPT.stop - 4, KEPT.stop])
def test_sizes_at_the_edges(nbytes: int) -> None:
    x = empty((nbytes // 4,), torch.zeros(1))
    assert x.nbytes == nbytes and x.fill_(1).sum() == nbytes // 4


def test_what_is_kept_is_bounded() -> None:
    like = torch.zeros(1)
    several = [empty((2 << 20,), like) for _ in range(12)]  # 96 MiB
    del several
    assert 0 < C.kept_bytes() <= 64 << 20


def test_keeping_is_switched_off_by_the_environment() -> None:
    program = (
        "import torch; from thinkernel.ops.memory import empty; from thinkernel.ops.dispatch import C\n"
        "x = empty((64, 4096), torch.zeros(1)); del x; print(C.kept_bytes())"
    )
    run = subprocess.run([sys.executable, "-c", program], env=os.environ | {"THINKERNEL_KEEP_MB": "0"}, capture_output=True, text=True)
    assert run.stdout == "0\n", run.stderr


def test_threads_never_share_a_buffer() -> None:
    like, wrong = torch.zeros(1), []

    def work(mark: int) -> None:
        for _ in range(300):
            x = empty((1 << 16,), like).fill_(mark)
            if not bool((x == mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_poison_reaches_kept_memory() -> None:
    like = torch.zeros(1)
    first = empty(SHAPE, like).zero_()
    del first
    with poisoned_results():
        assert empty(SHAPE, like).isnan().all()


def test_a_gradient_that_is_held_keeps_its_values() -> None:
    torch.manual_seed(0)
    logprob = (-torch.rand(64, 4096)).requires_grad_()
    call = dict(old_logprob=logprob.detach() - 0.1, advantages=torch.randn(64), mask=torch.ones(64, 4096, dtype=torch.bool))

    def gradient(scale: float) -> torch.Tensor:
        return torch.autograd.grad(scale * tk.policy_loss(logprob, **call)[0], logprob)[0]

    first = gradient(1.0)
    copy = first.clone()
    second = gradient(2.0)
    assert torch.equal(first, copy) and torch.equal(second, 2 * copy) and first.data_ptr() != second.data_ptr()
