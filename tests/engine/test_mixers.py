"""Gates 1, 2 and 5 for every mixer, and that verify and commit are a step taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from difyops.engine.mixers import REGISTRY, RecurrentMixer
from tests.engine.gates import EXACT, KINDS, LENGTHS, Bench, error, tokens

NEAR = 1e-4


def test_every_registered_mixer_is_tested() -> None:
    assert {name for name, _ in KINDS.values()} == set(REGISTRY)


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_is_the_reference(kind: tuple[str, dict[str, Any]], length: int) -> None:
    bench, x = Bench.of(*kind), tokens(length)
    slot = bench.slot()
    assert error(bench.prefill({slot: x})[slot], bench.mixer.reference(x)) < EXACT


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, EXACT), (torch.float32, NEAR)])
def test_steps_are_the_prefill(
    kind: tuple[str, dict[str, Any]], length: int, dtype: torch.dtype, bound: float
) -> None:
    bench, x = Bench.of(*kind, dtype=dtype), tokens(length, dtype=dtype)
    whole, stepped = bench.slot(), bench.slot()
    parallel = bench.prefill({whole: x})[whole]
    one_by_one = torch.stack([bench.step({stepped: token})[stepped] for token in x])
    assert error(one_by_one, parallel) < bound


def test_prefill_goes_on_where_it_stopped(kind: tuple[str, dict[str, Any]]) -> None:
    """In uneven chunks, packed with other sequences, and ended by steps."""
    bench = Bench.of(*kind)
    a, b, c = tokens(300), tokens(190, seed=2), tokens(65, seed=3)
    sa, sb, sc = bench.slot(), bench.slot(), bench.slot()
    got: dict[int, list[torch.Tensor]] = {sa: [], sb: [], sc: []}
    plan = [{sa: (0, 64), sb: (0, 1)}, {sb: (1, 64), sa: (64, 65)}, {sc: (0, 65)},
            {sa: (65, 256), sb: (64, 190)}, {sa: (256, 290)}]  # fmt: skip
    source = {sa: a, sb: b, sc: c}
    for call in plan:
        out = bench.prefill({s: source[s][i:j] for s, (i, j) in call.items()})
        for slot, part in out.items():
            got[slot].append(part)
    for token in a[290:]:
        got[sa].append(bench.step({sa: token})[sa][None])
    for slot, x in source.items():
        assert error(torch.cat(got[slot]), bench.mixer.reference(x)) < EXACT


@pytest.mark.parametrize("before", [0, 1, 5, 63, 64, 70])
def test_a_rejected_draft_leaves_no_trace(kind: tuple[str, dict[str, Any]], before: int) -> None:
    bench = Bench.of(*kind)
    x, draft = tokens(before + 12), tokens(6, seed=9)
    slot, other = bench.slot(), bench.slot()
    if before:
        bench.prefill({slot: x[:before], other: x[:before]})
    wanted = bench.mixer.reference(x)
    at = before
    for accepted in (1, 3, 6, 0, 2):
        # The window holds `accepted` true tokens and then what is going to be thrown away.
        window = torch.cat((x[at : at + accepted], draft))[:6]
        out = bench.verify({slot: window, other: window.flip(0)})[slot]
        assert error(out[:accepted], wanted[at : at + accepted]) < EXACT
        bench.commit({other: 6 - accepted, slot: accepted})
        at += accepted
    once, again = (bench.verify({slot: draft})[slot] for _ in range(2))
    assert error(once, again) == 0
    assert at == before + 12
    last = tokens(3, seed=4)
    ends = [bench.step({slot: token})[slot] for token in last]
    assert error(torch.stack(ends), bench.mixer.reference(torch.cat((x, last)))[-3:]) < EXACT


def test_a_snapshot_goes_on_as_the_original(kind: tuple[str, dict[str, Any]]) -> None:
    bench, x, y = Bench.of(*kind), tokens(77), tokens(80, seed=5)
    slot = bench.slot()
    bench.prefill({slot: x})
    saved = bench.pool.snapshot(slot)
    first = torch.stack([bench.step({slot: token})[slot] for token in y])
    bench.pool.release(slot)
    slot = bench.slot()
    bench.prefill({slot: y})  # whoever had the slot in between
    bench.pool.restore(slot, saved)
    assert bench.pool.table.grow(slot, 650)
    bench.pool.sync()
    again = torch.stack([bench.step({slot: token})[slot] for token in y])
    assert error(again, first) == 0
    bench.pool.drop(saved)
    bench.pool.release(slot)
    bench.pool.check()


def test_state_bytes_are_the_predicted(kind: tuple[str, dict[str, Any]]) -> None:
    bench = Bench.of(*kind)
    spec = bench.mixer.state_spec()
    assert bench.pool.slot_bytes == spec.slot_bytes
    assert bench.pool.token_bytes == spec.token_bytes
    assert spec.slot_bytes + spec.token_bytes > 0


def test_sequences_do_not_touch_each_other(kind: tuple[str, dict[str, Any]]) -> None:
    bench, x, y = Bench.of(*kind), tokens(70), tokens(40, seed=8)
    a, b = bench.slot(), bench.slot()
    bench.prefill({a: x[:50], b: y[:10]})
    for i in range(20):
        out = bench.step({b: y[10 + i], a: x[50 + i]})
    assert error(out[a], bench.mixer.reference(x)[-1]) < EXACT
    assert error(out[b], bench.mixer.reference(y[:30])[-1]) < EXACT


def test_a_later_token_changes_nothing_before_it(kind: tuple[str, dict[str, Any]]) -> None:
    """Not even a huge one, and wherever it stands in its chunk."""
    bench, x = Bench.of(*kind), tokens(150)
    before = bench.prefill({bench.slot(): x})
    for at in (1, 33, 64, 149):
        changed = torch.cat((x[:at], 3000 * tokens(150 - at, seed=6)))
        slot = bench.slot()
        after = bench.prefill({slot: changed})[slot]
        assert error(after[:at], next(iter(before.values()))[:at]) < EXACT
        bench.pool.release(slot)


def test_tokens_behind_the_length_are_not_there(kind: tuple[str, dict[str, Any]]) -> None:
    bench, x, y = Bench.of(*kind), tokens(20), tokens(2 * 70, seed=7).view(2, 70, -1)
    if not isinstance(bench.mixer, RecurrentMixer):
        pytest.skip("it keeps tokens, and no state")
    a, b = bench.slot(), bench.slot()
    bench.prefill({a: x, b: x})
    slots = torch.tensor([a, b])
    inputs = bench.mixer.project(y, 20 + torch.arange(70).expand(2, -1))
    carry = bench.state.read(slots)
    _, after = bench.mixer.scan(inputs, carry, torch.tensor([0, 66]))
    short = {name: tensor[:, :66] for name, tensor in inputs.items()}
    _, wanted = bench.mixer.scan(short, carry, torch.tensor([66, 66]))
    for name, tensor in after.items():
        assert torch.equal(tensor[0], carry[name][0])
        assert error(tensor[1], wanted[name][1]) < EXACT


def test_what_a_page_held_before_is_not_read(kind: tuple[str, dict[str, Any]]) -> None:
    """Not even by way of a mask: 0 * nan is nan."""
    bench, x, y = Bench.of(*kind), tokens(30), tokens(9, seed=6)
    size = bench.pool.table.page_size
    for tensor in bench.state.token.values():
        tensor[size:] = float("nan")
    a, b = bench.slot(), bench.slot()
    bench.prefill({a: x[:20], b: y[:4]})
    for i in range(5):
        out = bench.step({a: x[20 + i], b: y[4 + i]})
    assert error(out[a], bench.mixer.reference(x[:25])[-1]) < EXACT
    assert error(out[b], bench.mixer.reference(y)[-1]) < EXACT
