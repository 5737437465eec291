"""What drafts: its state is declared, kept and taken back like the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from difyops.engine import drafters
from difyops.engine.metrics import Metrics
from difyops.engine.models.decoder import Decoder
from difyops.engine.runner import Engine
from tests.engine import tiny

CONTEXT = 192
SOFTMAX = [{"mixer": "softmax", **tiny.LAYERS["softmax"]}]
GATED_DELTA = [{"mixer": "gated_delta", **tiny.LAYERS["gated_delta"]}]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def made(**keys: Any) -> Decoder:
    return tiny.model("hybrid", dtype=torch.float64, context=CONTEXT, **keys)[0]


@pytest.mark.parametrize(
    ("kind", "keys"),
    [("mtp", {"mtp": SOFTMAX}), ("mtp", {"mtp": GATED_DELTA}), ("medusa", {"medusa": 2}),
     ("ngram", {}), ("draft", {})],
)  # fmt: skip
def test_bytes_of_a_slot_are_the_predicted_ones(kind: str, keys: dict[str, Any]) -> None:
    model, small = made(**keys), tiny.model("mamba2", context=CONTEXT)[0]
    engine = Engine(model, slots=3, context=CONTEXT, drafter=drafters.choose(kind, model, small))
    metrics = Metrics()
    metrics.watch(engine)
    lines = metrics.text().decode().splitlines()
    seen = dict(line.split() for line in lines if line.startswith("difyops_state_bytes_per"))
    allocated = float(seen["difyops_state_bytes_per_slot"])
    assert float(seen["difyops_state_bytes_per_slot_predicted"]) == allocated > 0
    own = sum(spec.slot_bytes for spec in model.state_specs())
    assert (allocated > own) is (kind != "ngram")
    assert engine.stats().token_bytes == sum(spec.token_bytes for spec in engine.state_specs())
