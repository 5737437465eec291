"""`difyops bench gpu` as far as it goes without a GPU: shapes, limits, the table, what fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from difyops.bench import gpu, gpu_peer, gpu_plot
from difyops.bench import gpu_model as shapes
from difyops.bench.commands import app
from difyops.bench.gpu_model import SHAPES, Limits, Row, Subject, Wanted
from difyops.engine import models
from difyops.engine.models.decoder import Decoder
from difyops.errors import DifyopsError, PrerequisiteError, UsageError
from tests.engine import tiny

LIMITS = Limits(4e12, 8e14)
ROW = Row("a", "step", 2, 0.5, 4.0, 8.0)


class Told:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def started(self, name: str, log: Path | None = None) -> None: ...

    def detail(self, name: str, text: str) -> None: ...

    def finished(self, name: str, detail: str, seconds: float | None) -> None: ...

    def failed(self, name: str, message: str, seconds: float) -> None:
        self.failures.append(name)

    def note(self, text: str) -> None: ...


def on_paper(name: str) -> Decoder:
    """A shape without its memory."""
    with torch.device("meta"):
        return models.family(SHAPES[name]).build(SHAPES[name]).to(torch.bfloat16)


def parameters(name: str) -> int:
    return sum(weight.numel() for weight in on_paper(name).parameters())


@pytest.mark.parametrize(
    ("name", "billions"), [("qwen3.5-0.8b", 0.752), ("qwen3.5-9b", 8.95), ("mamba2-1.3b", 1.34)]
)
def test_a_shape_has_the_size_of_its_model(name: str, billions: float) -> None:
    assert parameters(name) / 1e9 == pytest.approx(billions, rel=0.01)


def test_contexts_are_compared_at_one_size() -> None:
    one = parameters("linear-1b")
    assert parameters("softmax-1b") == one
    assert parameters("hybrid-1b") == pytest.approx(one, rel=0.01)


def test_the_limit_of_a_step_counts_what_moves() -> None:
    model = on_paper("qwen3.5-0.8b")
    # 18 layers of 16 states of 128 x 128 in float32 and 3 inputs of the convolution, both ways;
    # 6 layers of keys and values, 2 heads of 256.
    state = 2 * 18 * (16 * 128 * 128 * 4 + 3 * 3 * 16 * 128 * 2)
    weights = shapes.weight_bytes(model)
    assert weights == 2 * parameters("qwen3.5-0.8b")  # tied: all of it is read
    for context in (512, 65536):
        each = state + context * 6 * 2 * 2 * 256 * 2
        assert shapes.sequence_bytes(model.state_specs(), context) == each
        wanted = 64 * 4e12 / (weights + 64 * each)
        assert shapes.step_limit(model, 64, LIMITS, context) == pytest.approx(wanted)


def test_an_embedding_of_its_own_is_not_read() -> None:
    model = on_paper("qwen3.5-9b")
    assert shapes.weight_bytes(model) == 2 * (parameters("qwen3.5-9b") - model.embed.weight.numel())


def test_the_limit_of_a_prompt_is_its_operations_or_its_weights() -> None:
    model = on_paper("qwen3.5-0.8b")
    inner = parameters("qwen3.5-0.8b") - model.embed.weight.numel()
    head = 2 * model.head.weight.numel()
    products = 6 * 8 * (256 + 256)
    for count in (16, 32768):
        operations = 2 * inner * count + head + products * count**2
        assert shapes.prompt_operations(model, count) == operations
    long = shapes.prompt_limit(model, 32768, LIMITS)
    assert long == pytest.approx(32768 / (operations / 8e14))
    short = shapes.prompt_limit(model, 16, LIMITS)
    assert short == pytest.approx(16 / (shapes.weight_bytes(model) / 4e12))


def test_what_only_guesses_is_no_part_of_a_step() -> None:
    softmax = [{"mixer": "softmax", **tiny.LAYERS["softmax"]}]
    plain, guessing = tiny.model("hybrid")[0], tiny.model("hybrid", mtp=softmax)[0]
    assert shapes.weight_bytes(plain) == shapes.weight_bytes(guessing)


def test_a_filled_pool_holds_what_was_asked_for() -> None:
    model = tiny.model("hybrid")[0]
    pool, slots = shapes.filled(model, 3, 40, 8)
    assert pool.lengths.tolist() == [0, 40, 40, 40]
    assert sorted(slots) == [1, 2, 3]
    model.step(torch.tensor([1, 2, 3]), pool, torch.tensor(slots))
    assert shapes.filled(model, 2, 0, 8)[0].lengths.tolist() == [0, 0, 0]


def test_the_table_and_what_programs_get() -> None:
    drift = Row("b", "bf16 states", 4096, note="0.1 at most", unit="tokens", facts={"most": 0.1})
    lost = Row("b", "http", None, note="no server", failed=True)
    found = gpu.Found("a GPU", LIMITS, (ROW, drift, lost))
    lines = gpu.table(found)
    assert lines[1] == ["a", "step", "2 sequences", "500.00", "4", "8", "50%", ""]
    assert lines[2] == ["b", "bf16 states", "4,096 tokens", "", "", "", "", "0.1 at most"]
    assert lines[3][-1] == "FAILED: no server"
    assert len({len(line) for line in lines}) == 1
    plain = json.loads(json.dumps(found.as_json()))
    assert (plain["version"], plain["complete"]) == (2, False)
    assert [row["share"] for row in plain["rows"]] == [0.5, None, None]
    assert plain["rows"][1]["facts"] == {"most": 0.1}


def test_what_fails_is_a_row_and_the_rest_goes_on() -> None:
    def part() -> Iterator[Row]:
        yield ROW
        raise DifyopsError("out of luck", "try again")

    def broken() -> Iterator[Row]:
        raise RuntimeError("CUDA error: an illegal memory access\nlong story")
        yield ROW

    told = Told()
    first, second = gpu._guarded("a", "decode", part, told)
    assert (first, second.note, second.failed) == (ROW, "out of luck", True)
    (only,) = gpu._guarded("a", "engine", broken, told)
    assert only.note == "RuntimeError: CUDA error: an illegal memory access"
    assert told.failures == ["a decode", "a engine"]


def test_it_says_what_it_needs() -> None:
    with pytest.raises(UsageError, match="--shape: 'big' is not one"):
        gpu.run(Wanted(("big",)), Told())
    with pytest.raises(UsageError, match="--part: 'decoding' is not one") as caught:
        gpu.run(Wanted(parts=("decode", "decoding")), Told())
    assert all(part in (caught.value.hint or "") for part in gpu.PARTS)
    if not torch.cuda.is_available():
        with pytest.raises(PrerequisiteError, match="no GPU"):
            gpu.run(Wanted(), Told())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Wanted]:
    """What the command asked for; nothing is measured."""
    wanted: list[Wanted] = []

    def run(asked: Wanted, progress: object) -> gpu.Found:
        wanted.append(asked)
        return gpu.Found("a GPU", LIMITS, (ROW,))

    monkeypatch.setattr(gpu, "run", run)
    return wanted


def test_the_command_without_options_is_short(asked: list[Wanted]) -> None:
    result = CliRunner().invoke(app, ["gpu"])
    assert result.exit_code == 0, result.output
    assert "500.00" in result.output
    assert asked == [Wanted(sequences=[1, 64, 256])]
    assert set(asked[0].parts) == {"decode", "engine", "prompt"}


def test_the_command_adds_what_flags_ask_for(asked: list[Wanted]) -> None:
    options = ["--shape", "qwen3.5-9b", "--sequences", "8", "--part", "decode, drift", "--profile",
               "--peer", "vllm", "--seconds", "5", "--json"]  # fmt: skip
    result = CliRunner().invoke(app, ["gpu", *options])
    assert json.loads(result.output)["device"] == "a GPU"
    (wanted,) = asked
    assert wanted.parts == ("decode", "drift", "profile", "peer")
    assert (wanted.shapes, wanted.peers, wanted.seconds) == (("qwen3.5-9b",), ("vllm",), 5)


def test_a_failed_part_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("a", "http", None, note="no server", failed=True)
    monkeypatch.setattr(gpu, "run", lambda *_: gpu.Found("a GPU", LIMITS, (ROW, row)))
    result = CliRunner().invoke(app, ["gpu"])
    assert result.exit_code == 1
    assert "FAILED: no server" in result.output


def test_a_peer_that_is_absent_or_knows_no_such_model_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.model("hybrid")[0]
    wanted = Wanted(peers=("vllm", "transformers"))
    monkeypatch.setattr(gpu_peer.importlib.util, "find_spec", {"transformers": 1}.get)
    rows = list(gpu_peer.peer(Subject("linear-1b", model, LIMITS, wanted)))
    assert [row.note for row in rows] == [
        "left out: vllm is not installed here",
        "left out: transformers knows no such model",
    ]
    assert not any(row.failed for row in rows)


def test_a_peer_is_asked_once_to_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[dict[str, Any]] = []

    def ask(order: dict[str, Any]) -> dict[str, Any]:
        orders.append(order)
        return {"seconds": 0.1 + 0.02 * order["tokens"]}

    subject = Subject("qwen3.5-0.8b", on_paper("qwen3.5-0.8b"), LIMITS, Wanted())
    row = gpu_peer._step(subject, "transformers", ask, 4, "transformers 5")
    assert row.seconds == pytest.approx(0.02)
    assert row.rate == pytest.approx(200)
    assert [order["tokens"] for order in orders] == [2, 1 + gpu_peer.ANSWER, 1]


@pytest.mark.parametrize("suffix", [".svg", ".png"])
@pytest.mark.parametrize("unit", ["context", "sequences"])
def test_the_pictures(tmp_path: Path, suffix: str, unit: str) -> None:
    pytest.importorskip("matplotlib")
    rows = tuple(
        Row(name, f"step at {number}", size, 0.001 * number, 100.0, 200.0, unit=unit,
            facts={"sequences": number, "context": size})
        for name in ("linear-1b", "softmax-1b") for number in (1, 16) for size in (1024, 65536)
    )  # fmt: skip
    path = tmp_path / f"curve{suffix}"
    gpu_plot.draw(gpu.Found("a GPU", LIMITS, rows), path)
    assert path.stat().st_size > 1000
