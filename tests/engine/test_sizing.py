"""What a model takes, as computed, beside what is allocated; tests/gpu has a GPU's memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from difyops.cli import app
from difyops.engine import drafters, sizing
from difyops.engine.runner import Engine
from difyops.engine.sizing import Needs
from difyops.errors import PrerequisiteError, UsageError
from tests.engine import tiny
from tests.engine.test_exact import answers, asked, ended, prompts

MIB = 1 << 20
HYBRID = Needs(weights=100 * MIB, slot=MIB, page=MIB // 10, work=50 * MIB, full=40)
PURE = Needs(weights=100 * MIB, slot=MIB, page=0, work=50 * MIB, full=0)


@pytest.mark.parametrize("kind", tiny.PATTERNS)
def test_what_is_computed_is_what_is_allocated(kind: str) -> None:
    model = tiny.model(kind, dtype=torch.float32)[0]
    drafter = drafters.choose("auto", model)
    assert drafter is not None
    engine = Engine(model, slots=5, context=100, pages=40, drafter=drafter)
    found = sizing.needs(model, drafter, context=100, prefill_tokens=64)
    assert found.weights == sum(weight.nbytes for weight in model.parameters())
    assert bool(found.full) == bool(engine.pool.table.pages)
    pages = engine.pool.table.pages
    states = engine.pool.bytes + engine.pool.main.layers[0].table.nbytes * bool(pages)
    # What a step's scores lie in is the graphs', and is not there on a CPU.
    scores = (1 + drafter.most) * (model.shape.vocabulary + model.shape.width) * 4 * 6
    assert found.kept(5, pages) - found.weights - scores == states


def test_what_is_given_is_kept() -> None:
    chosen = sizing.plan(HYBRID, 400 * MIB, slots=7, pages=60, prefix=5 * MIB)
    assert (chosen.slots, chosen.pages, chosen.prefix_bytes) == (7, 60, 5 * MIB)
    assert chosen.total <= 400 * MIB


@pytest.mark.parametrize("budget", [200 * MIB, 400 * MIB, 10_000 * MIB])
@pytest.mark.parametrize("needs", [HYBRID, PURE])
def test_a_plan_fits_and_leaves_little(needs: Needs, budget: int) -> None:
    chosen = sizing.plan(needs, budget)
    used = needs.kept(chosen.slots, chosen.pages) + needs.work + chosen.prefix_bytes
    assert used <= budget
    if chosen.slots < sizing.MOST_SLOTS:
        assert budget - used < 2 * (needs.slot + needs.page)
    assert chosen.pages >= needs.full


def test_what_does_not_fit_is_said_with_what_would() -> None:
    with pytest.raises(PrerequisiteError, match=r"100 MiB of weights .* do not fit into 120 MiB"):
        sizing.plan(PURE, 120 * MIB)
    with pytest.raises(PrerequisiteError) as error:
        sizing.plan(PURE, 200 * MIB, slots=100)
    fits = int((error.value.hint or "").split()[0])
    assert sizing.plan(PURE, 200 * MIB, slots=fits).slots == fits
    with pytest.raises(PrerequisiteError):
        sizing.plan(PURE, 200 * MIB, slots=fits + 1)
    with pytest.raises(PrerequisiteError) as error:
        sizing.plan(HYBRID, 155 * MIB)
    assert "a context of" in str(error.value.hint)


def test_states_in_bfloat16_take_half_and_still_answer() -> None:
    texts = prompts(6)
    model = tiny.model("linear", dtype=torch.float32)[0]
    wide = sum(spec.slot_bytes for spec in model.state_specs())
    model.states_in = torch.bfloat16
    narrow = sum(spec.slot_bytes for spec in model.state_specs())
    sums = 2 * 2 * 6 * 4  # of the keys: two layers, two heads, six dimensions, in float32
    assert narrow - sums == (wide - sums) // 2
    engine = Engine(model, slots=3, context=64, prefix_bytes=1 << 20)
    engine.start()
    assert engine.stats().slot_bytes == narrow
    requests = asked(texts)
    first = answers(engine, requests)
    assert all(first)
    ended(engine)


def test_size_prints_what_fits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.model("hybrid")[1]))
    said = CliRunner().invoke(app, ["size", str(tmp_path), "--memory", "2GiB"])
    assert said.exit_code == 0, said.output
    assert "fits: 256 sequences" in said.output and "weights" in said.output
    said = CliRunner().invoke(app, ["size", str(tmp_path), "--memory", "2GiB", "--json"])
    found = json.loads(said.output)
    assert found["plan"]["slots"] == 256 and found["needs"]["full"] > 0
    assert CliRunner().invoke(app, ["size", str(tmp_path), "--json"]).exit_code == 0


def test_size_refuses_what_is_no_model(tmp_path: Path) -> None:
    for wrong in (tmp_path, tmp_path / "none.gguf"):
        said = CliRunner().invoke(app, ["size", str(wrong)])
        assert isinstance(said.exception, UsageError)
