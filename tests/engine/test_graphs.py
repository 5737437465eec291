"""What can be said of steps without a GPU; tests/gpu has the rest."""

from __future__ import annotations

import torch

from difyops.engine import graphs, kernels, sample
from difyops.engine.request import Request, SamplingParams
from tests.engine import tiny
from tests.engine.test_scheduler import NoText


def request(**params: float) -> Request:
    return Request([1, 2], SamplingParams(4, **{"temperature": 0.0, **params}), NoText())


def test_sizes_reach_the_largest_batch() -> None:
    assert graphs.sizes(1) == [1]
    assert graphs.sizes(16) == [1, 2, 4, 8, 16]
    assert graphs.sizes(20) == [1, 2, 4, 8, 16, 20]


def test_a_cpu_has_neither_graphs_nor_kernels() -> None:
    model = tiny.model("hybrid", dtype=torch.float32)[0]
    assert not graphs.possible(model)
    assert not kernels.usable(torch.device("cpu"), torch.float32)


def test_what_is_best_already_is_not_looked_for() -> None:
    logits = torch.zeros(4, 5)
    logits[1, 3] = 1
    asked = [request(), request(logit_bias={2: 9.0}), request(), request(temperature=1.0, seed=3)]
    chosen = sample.choose(logits, asked, [4, 3, graphs.BROKEN, 0])
    assert [getattr(one, "token", None) for one in chosen[:3]] == [4, 2, None]
    assert isinstance(chosen[2], ValueError)
    (drawn,) = sample.choose(logits[3:], asked[3:])
    assert getattr(chosen[3], "token", None) == getattr(drawn, "token", "none")
