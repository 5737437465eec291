"""What drafts: its state is declared, kept and taken back like the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from difyops.engine import drafters
from difyops.engine.metrics import Metrics
from difyops.engine.models.decoder import Decoder, whole
from difyops.engine.models.mtp import MultiTokenPrediction, modules
from difyops.engine.request import Request
from difyops.engine.runner import Engine
from difyops.engine.state import StatePool
from tests.engine import tiny
from tests.engine.gates import error
from tests.engine.test_exact import Foreseen, Said, answers, asked, ended, running

CONTEXT = 192
#: Six modules in a row add to what rounding leaves of one.
EXACT = 1e-9
SOFTMAX, GATED_DELTA, DIAG = (
    [{"mixer": kind, **tiny.LAYERS[kind]}] for kind in ("softmax", "gated_delta", "diag")
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def made(**keys: Any) -> Decoder:
    return tiny.model("hybrid", dtype=torch.float64, context=CONTEXT, **keys)[0]


@pytest.mark.parametrize(
    ("kind", "keys"),
    [("mtp", {"mtp": SOFTMAX}), ("mtp", {"mtp": GATED_DELTA, "mtp_modules": 3}),
     ("medusa", {"medusa": 2}), ("ngram", {}), ("draft", {})],
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


class Watched(drafters.Mtp):
    """Notes its guesses, and makes others in their place: of those some come true."""

    def __init__(self, model: Decoder, said: Said) -> None:
        super().__init__(model, modules(model))
        #: Tokens, the guesses behind them, and what these are made of: [k, width].
        self.seen: list[tuple[list[int], list[int], Tensor]] = []
        self._others = Foreseen(self.most, said)
        self._made: list[Tensor] = []

    def draft(self, requests: Sequence[Request], slots: Tensor, pool: StatePool, k: int) -> Tensor:
        self._made.clear()
        guesses = super().draft(requests, slots, pool, k).tolist()
        made = torch.stack(self._made, dim=1)
        known = [list(request.tokens) for request in requests]
        self.seen += zip(known, guesses, made, strict=True)
        return self._others.draft(requests, slots, pool, k)

    def _run(self, *given: Any) -> Tensor:
        made = super()._run(*given)
        self._made.append(made[..., -1, :])
        return made


def reference(model: Decoder, tokens: list[int], guesses: list[int]) -> Tensor:
    """What the guesses behind `tokens` are made of, by the formula, over the whole sequence at
    once: [k, width]. Guess j follows the j - 1 before it; the model has not read the last token."""
    found, chain = [], modules(model)
    known = torch.tensor([tokens + guesses])
    inputs = model(known[:, : len(tokens) - 1])
    for ahead in range(1, len(guesses) + 1):
        depth = min(ahead, len(chain))
        made = through(
            chain[depth - 1], model.embed(known[:, depth:][:, : inputs.shape[1]]), inputs
        )
        found.append(made[0, -1])
        inputs = made if ahead < len(chain) else torch.cat((inputs, made[:, -1:]), dim=1)
    return torch.stack(found)


def through(module: MultiTokenPrediction, embedded: Tensor, hidden: Tensor) -> Tensor:
    """[1, T, width] both -> [1, T, width]."""
    both = module.pre_fc_norm_embedding(embedded), module.pre_fc_norm_hidden(hidden)
    x = module.fc(torch.cat(both, dim=-1))
    for block in module.blocks:
        x = block(x, whole, None)
    normed: Tensor = module.norm(x)
    return normed


@pytest.mark.parametrize(
    ("pattern", "count"),
    [(pattern, count) for pattern in (SOFTMAX, GATED_DELTA, DIAG) for count in (1, 2, 3)]
    + [(SOFTMAX, 6)],
    ids=lambda value: "+".join(e["mixer"] for e in value) if isinstance(value, list) else None,
)
def test_each_guess_is_that_of_its_module_over_the_whole_sequence(
    pattern: list[dict[str, Any]], count: int
) -> None:
    """Prompts read in odd parts, guesses that come true and that do not, kept states gone on with;
    and no token is another."""
    model = made(vocabulary=60, mtp=pattern, mtp_modules=count)
    plain = running(model)
    rows = torch.randint(60, (5, 130), generator=torch.Generator().manual_seed(3)).tolist()
    lengths = (3, 15, 63, 65, 129)
    wanted = [tuple(row[:length]) for row, length in zip(rows, lengths, strict=True)]
    said = dict(zip(wanted, answers(plain, asked(wanted, 14)), strict=True))
    # What goes on, in two ways at once, behind a prompt that was kept or its whole pages.
    longer = [(*wanted[2], 1, 2), (*wanted[2], 3), (*rows[3][:64], 5), (*rows[3][:64], 6, 7)]
    said |= dict(zip(longer, answers(plain, asked(longer, 14)), strict=True))
    ended(plain)
    drafter = Watched(model, said)
    engine = running(model, drafter, prefill_tokens=37, prefix_bytes=10**9, slots=4)
    for some in (wanted, wanted, longer):
        assert answers(engine, asked(some, 14)) == [said[prompt] for prompt in some]
    stats = engine.stats()
    assert stats.prefix is not None and stats.prefix.reused > 300
    assert all(0 < stats.counters.accepted[i] < stats.counters.drafted[i] for i in range(4))
    ended(engine)
    checked = [seen for seen in drafter.seen if len(seen[0]) > count]
    for tokens, guesses, found in checked:
        assert error(found, right := reference(model, tokens, guesses)) < EXACT, len(tokens)
        assert model.logits(right).argmax(-1).tolist() == guesses
    assert len(checked) > 40
