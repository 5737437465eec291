"""`difyops bench spec` on a tiny model: the real engine, a micro load."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from torch import Tensor
from typer.testing import CliRunner

from difyops import report
from difyops.bench import plot, spec
from difyops.bench.commands import app
from difyops.bench.spec import Mode
from difyops.bench.spec_engine import Asked
from difyops.engine.models.decoder import Decoder
from difyops.engine.state import StatePool
from difyops.errors import PrerequisiteError, UsageError
from tests.engine import tiny

MTP = [{"mixer": "softmax", **tiny.LAYERS["softmax"]}]
PROMPTS = ("A slot is free or taken.", "One token for each sequence.", "Who is 1 2 3?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("spec") / "m", mtp=MTP, context=1024)


@pytest.fixture(scope="module")
def found(folder: Path) -> spec.Found:
    wanted = spec.Wanted(str(folder), (1, 3), 8, 3, 1, PROMPTS)
    return spec.run(wanted, report.Lines())


def test_the_table_of_a_run(found: spec.Found, capsys: pytest.CaptureFixture[str]) -> None:
    report.speculation(found)
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0][:3] == ["streams", "speculation", "tok/s"]
    named = [" ".join(line[1 : 2 if line[1] == "off" else 3]) for line in lines[1:23]]
    kinds = [f"{kind} {k}" for kind in ("mtp", "ngram") for k in (1, 2, 3, 4, "adaptive")]
    assert named == ["off", *kinds] * 2
    assert lines[1][-4:] == ["1.00", "1.000", "-", "6/6"]
    assert {line[-1] for line in lines[1:23]} == {"6/6"}
    assert {line[-1] for line in lines[25:28]} == {"yes"}
    # 20 modes beside off, 3 prompts in 2 rounds, and 3 turns.
    assert "exact: all 123 answers are those without speculation and cache" in printed


def test_what_is_counted(found: spec.Found) -> None:
    plain = json.loads(json.dumps(found.as_json()))
    assert plain["exact"] is True
    rows = {(r["streams"], r["mode"]): r for r in plain["speculation"]}
    assert len({r["tokens"] for r in rows.values()}) == 1
    for (_, mode), row in rows.items():
        if mode == "off":
            assert row["ratio"] == row["forwards_per_token"] == 1
            assert row["acceptance"] == []
        else:
            assert 0 < row["forwards_per_token"] <= 1
    # A random model repeats itself, and then its words are easily guessed.
    assert rows[1, "ngram 4"]["forwards_per_token"] < 1
    assert len(rows[3, "mtp 1"]["acceptance"]) == 1
    turns = plain["conversation"]["turns"]
    # Later turns reuse less: what a random model says is not written in the same tokens again.
    assert [t["kept"] > 0 for t in turns[:2]] == [False, True]
    assert turns[1]["kept"] < turns[1]["prompt_tokens"]


def test_an_answer_that_changes_is_said_and_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: what was accepted is not in the state as it should be."""
    right = Decoder.commit

    def commit(self: Decoder, pool: StatePool, slots: Tensor, accepted: Tensor) -> None:
        right(self, pool, slots, accepted)
        for tensor in pool.main.layers[0].slot.values():
            tensor[slots] *= 0.5

    monkeypatch.setattr(Decoder, "commit", commit)
    prompts = tmp_path / "prompts"
    prompts.write_text("\n\n".join(PROMPTS) + "\n")
    options = ["--threads", "1", "--tokens", "8", "--turns", "1", "--streams", "1"]
    done = CliRunner().invoke(app, ["spec", str(folder), *options, "--prompts", str(prompts)])
    assert done.exit_code == 1, done.output
    assert "NOT EXACT: mtp" in done.stdout
    assert done.stdout.splitlines()[1].split()[-1] == "6/6"  # off speculates nothing


def asked(tokens: list[int], **keys: object) -> Asked:
    base = Asked((tuple(tokens),), 2.0, 0.1, 9, 0, 1, 3, (3, 2, 0, 0), (2, 1, 0, 0))
    return dataclasses.replace(base, **keys)  # type: ignore[arg-type]


def test_the_arithmetic_of_a_row() -> None:
    rounds = [asked([1, 2, 3, 4, 5, 6]), asked([1, 2, 3, 4, 5, 7], passes=2)]
    row = spec.summary(1, Mode("mtp", 2), rounds, [(1, 2, 3, 4, 5, 6)])
    assert (row.tokens_per_second, row.forwards_per_token) == (3.0, 0.5)
    assert (row.acceptance, row.guesses) == ((4 / 6, 0.5), (6, 4))
    assert (row.same, row.answers, row.mode) == (1, 2, "mtp 2")


def test_what_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither \.png nor \.svg"):
        plot.check(tmp_path / "a.pdf")
    with pytest.raises(UsageError, match="no directory"):
        plot.check(tmp_path / "b" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PrerequisiteError) as missing:
        plot.check(tmp_path / "a.png")
    assert missing.value.hint == "pip install 'difyops[plot]'"


@pytest.mark.parametrize("suffix", plot.SUFFIXES)
def test_a_picture(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        spec.Row(streams, mode, 9, speed, 1.0, (), (), 1, 1)
        for streams in (1, 8)
        for mode, speed in (("off", 2.0), ("mtp 1", 3.0))
    ]
    turns = (spec.Turn(9, 0, 0.2, 0.2, True), spec.Turn(20, 9, 0.3, 0.2, True))
    wanted = spec.Wanted("m", (1, 8), 9, 2, 1)
    path = tmp_path / f"spec{suffix}"
    plot.draw(spec.Found(wanted, tuple(rows), turns, "float32", "cpu"), path)
    assert path.stat().st_size > 5000


def test_few_guesses_say_nothing() -> None:
    row = spec.Row(1, "mtp 3", 9, 2.0, 0.5, (0.75, 0.5, 1.0), (40, 20, 19), 2, 2)
    off = spec.Row(1, "off", 9, 2.0, 1.0, (), (), 1, 1)
    wanted = spec.Wanted("m", (1,), 9, 2, 1)
    found = spec.Found(wanted, (off, row), (), "float32", "cpu")
    assert spec.table(found)[2][5] == "75% 50%"
    said = found.remarks()
    assert said[0].endswith("float32 on cpu, 1 thread")
    assert "exact: all 2 answers" in said[3]


@pytest.mark.parametrize(
    ("prompt", "tokens", "said", "fix"),
    [
        ("a short one", "1020", "its answer 1020, and the model has 1024 for both", "--tokens "),
        ("long one " * 900, "4", "and the model has 1024 for it and its answer", "--prompts "),
    ],
)
def test_what_does_not_fit_says_which(
    prompt: str, tokens: str, said: str, fix: str, folder: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts"
    prompts.write_text(prompt)
    options = ["--threads", "1", "--tokens", tokens, "--prompts", str(prompts)]
    done = CliRunner().invoke(app, ["spec", str(folder), *options])
    assert isinstance(done.exception, UsageError)
    assert done.exception.message.startswith("the longest prompt has ")
    assert said in done.exception.message
    assert (done.exception.hint or "").startswith(fix)


def test_ctrl_c_says_that_nothing_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(spec, "_conversation", interrupted)
    monkeypatch.setattr(spec, "_speculation", lambda *_: [])
    done = CliRunner().invoke(app, ["spec", str(folder), "--threads", "1"])
    assert done.exit_code == 130
    assert "interrupted: nothing is reported" in done.stderr
    assert not done.stdout
