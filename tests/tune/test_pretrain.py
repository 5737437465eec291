"""Pre-training a micro model: it learns, stops and goes on, and what it leaves can be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from difyops.cli import app
from difyops.engine import drafters
from difyops.engine.load import load
from difyops.engine.models import native
from difyops.errors import PrerequisiteError, UsageError
from difyops.tune import data as making
from difyops.tune.card import card
from difyops.tune.corpus import Document, Section
from difyops.tune.evaluate import evaluate, token_bytes
from difyops.tune.pretrain import Plan, Trainer, Windows, fresh, logits, losses, read_tokens
from tests.engine import tiny

PLAN = Plan(tokens=12 * 4 * 32, length=32, batch=4, rate=5e-3, warmup=3)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def config(kind: str = "hybrid", vocabulary: int = 96, **keys: Any) -> dict[str, Any]:
    mtp = [{"mixer": "softmax", **tiny.LAYERS["softmax"]}]
    return tiny.config(kind, vocabulary=vocabulary, mtp=mtp, **keys)


def row(count: int = 4000, vocabulary: int = 96) -> np.ndarray[Any, Any]:
    """Tokens that follow one another by a rule, most of the time."""
    chance = np.random.default_rng(0)
    made = [1]
    for _ in range(count - 1):
        wild = chance.random() < 0.1
        made.append(int(chance.integers(vocabulary)) if wild else (3 * made[-1] + 1) % vocabulary)
    return np.array(made, dtype="<u2")


def never() -> bool:
    return False


def run(folder: Path, stops: list[int], **keys: Any) -> tuple[Trainer, list[str]]:
    """A run that is stopped after each of `stops` steps and taken up again by a new trainer."""
    said: list[str] = []
    for stop in [*stops, PLAN.steps]:
        trainer = Trainer(config(**keys), PLAN, row(), "cpu")
        trainer.resume(folder)
        done = trainer.train(said.append, lambda t=trainer, s=stop: t.step >= s, folder)
        assert done == (stop == PLAN.steps)
    return trainer, said


@pytest.mark.parametrize(("kind", "count"), [*((kind, 1) for kind in tiny.PATTERNS), ("hybrid", 3)])
def test_a_few_steps_lower_every_loss(kind: str, count: int, tmp_path: Path) -> None:
    trainer = Trainer(config(kind, mtp_modules=count), PLAN, row(), "cpu")
    batch = torch.from_numpy(row()[:360].astype(np.int64)).view(10, 36)[:, : 33 + count]
    before = losses(trainer.model, batch)
    assert trainer.train(lambda _: None, never, tmp_path)
    after = losses(trainer.model, batch)
    assert all(a < b - 0.1 for a, b in zip(after, before, strict=True))
    assert len(after) == 1 + count


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, said = run(tmp_path / "whole", [])
    parts, _ = run(tmp_path / "parts", [2, 7])
    assert said[-1].startswith("step 12/12  loss ")
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, parts.model.state_dict()[name]), name


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path, [])
    other = Trainer(config("softmax"), PLAN, row(5000), "cpu")
    with pytest.raises(UsageError, match="another config, data"):
        other.resume(tmp_path)


def test_windows_are_all_of_the_data_once_an_epoch_and_know_what_follows() -> None:
    plan = Plan(length=10, batch=3)
    windows = Windows(np.arange(10 * 10 + 2, dtype="<u2"), plan, torch.device("cpu"), 2)
    epochs = [torch.cat([windows.batch(3 * e + n) for n in range(3)]) for e in range(2)]
    for epoch in epochs:
        assert (epoch.diff() == 1).all() and epoch.shape == (9, 12)
        assert len(epoch[:, :10].unique()) == 90
    assert not torch.equal(*epochs)
    assert torch.equal(windows.batch(0), epochs[0][:3])
    with pytest.raises(UsageError, match="not one batch"):
        Windows(np.arange(20, dtype="<u2"), plan, torch.device("cpu"), 2)


@pytest.mark.parametrize("count", [1, 3])
def test_each_module_sees_one_token_more_and_predicts_one_further(count: int) -> None:
    """A token's own change is seen by a module one place before the module above it, or the model,
    sees it, and never by what predicts that token."""
    model = fresh(config(mtp_modules=count), 0).double()
    tokens = torch.arange(20 + count)[None] % 96
    changed = tokens.clone()
    changed[0, 10] = 50
    with torch.no_grad():
        pairs = zip(logits(model, tokens), logits(model, changed), strict=True)
        seen = [((a - b)[0].abs().amax(-1) > 1e-9).tolist() for a, b in pairs]
    assert seen == [[p >= 10 - depth for p in range(20)] for depth in range(1 + count)]


@pytest.mark.parametrize("count", [1, 3])
def test_evaluation_is_the_mean_over_the_text(count: int) -> None:
    keys = {"mtp": config()["mtp"], "mtp_modules": count, "vocabulary": 8}  # some guesses are true
    model = tiny.model("hybrid", dtype=torch.float64, **keys)[0]
    tokens, sizes = row(203, 8), torch.full((8,), 2)
    scores = evaluate(model, tokens, sizes, length=33, batch=2)
    with torch.no_grad():
        text = torch.from_numpy(tokens[: 6 * 33 + 1 + count].astype(np.int64))
        windows = text.unfold(0, 33 + 1 + count, 33)
        loss, *ahead = losses(model, windows)
        choices, *guesses = (made.argmax(-1).tolist() for made in logits(model, windows[:, :-1]))
    for depth, (guessed, share) in enumerate(zip(guesses, scores.acceptances, strict=True), 1):
        # The guess made at p stands for the place that the model fills at p + depth.
        came_true = [
            guess == choice
            for guessed_row, chosen in zip(guessed, choices, strict=True)
            for guess, choice in zip(guessed_row[:-depth], chosen[depth:], strict=True)
        ]
        assert 0 < sum(came_true) < len(came_true) == 6 * (33 - depth)
        assert share == pytest.approx(sum(came_true) / len(came_true))
    assert scores.tokens == 33 * len(windows) == 198
    assert scores.loss == pytest.approx(float(loss))
    assert scores.mtp_losses == pytest.approx([float(each) for each in ahead])
    assert [name for name, _ in scores.lines()][3:5] == [
        "loss of the second token, nats", "MTP acceptance, k = 1, greedy, on given text"
    ]  # fmt: skip
    assert scores.bits_per_byte == pytest.approx(float(loss) / 2 / np.log(2))
    assert scores.lines()[2][1].endswith(", at 2.00 bytes of this text a token")


def test_the_modules_loss_is_the_mean_over_their_depths(tmp_path: Path) -> None:
    """Gradients of a step, not clipped, are those of loss + weight * mean."""
    plan = Plan(tokens=4 * 32, length=32, batch=4, rate=0.0, warmup=0, clip=1e9, mtp_weight=0.7)
    trainer = Trainer(config(mtp_modules=3), plan, row(), "cpu")
    kept: dict[str, torch.Tensor] = {}
    trainer.model.embed.weight.register_hook(lambda grad: kept.update(got=grad.clone()))
    trainer.train(lambda _: None, never, tmp_path)
    model = fresh(config(mtp_modules=3), plan.seed)
    first, *deeper = losses(model, Windows(row(), plan, torch.device("cpu"), 4).batch(0))
    (first + 0.7 * (deeper[0] + deeper[1] + deeper[2]) / 3).backward()
    assert model.embed.weight.grad is not None
    assert torch.allclose(kept["got"], model.embed.weight.grad, atol=1e-7)


def test_sequences_too_short_for_the_modules_are_refused() -> None:
    with pytest.raises(UsageError, match="3 tokens are too short for mtp_modules: 3"):
        Trainer(config(mtp_modules=3), Plan(length=3, batch=4), row(), "cpu")


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    """A hundred small documents."""
    words = [
        "state",
        "token",
        "slot",
        "draft",
        "model",
        "verify",
        "commit",
        "layer",
        "head",
        "scan",
    ]

    def told(i: int, j: int) -> str:
        return f"The {words[(i + j) % 10]} of {i} is {words[(i * j) % 10]}, number {j}."

    return [
        Document(f"pkg/{i}", [Section(f"On {words[i % 10]}", [told(i, j) for j in range(8)])])
        for i in range(100)
    ]


@pytest.fixture(scope="module")
def data(corpus: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    words = making.tokenizer(map(making.text, corpus), 300)
    making.encode(words, corpus[:90]).tofile(folder / "train.bin")
    making.encode(words, corpus[90:]).tofile(folder / "heldout.bin")
    making.write_tokenizer(words, folder)
    part = {"documents": 90, "tokens": 9000, "bytes": 30000}
    facts = {
        "seed": 0,
        "vocabulary": 300,
        "train": part,
        "heldout": part,
        "packages": [
            {"package": "pkg", "version": "1", "licence": "MIT", "documents": 100, "bytes": 40000}
        ],
    }
    (folder / "data.json").write_text(json.dumps(facts))
    return folder


def test_from_the_command_line_to_a_model_that_is_served(data: Path, tmp_path: Path) -> None:
    keys = config(vocabulary=300)
    (tmp_path / "micro.json").write_text(json.dumps(keys))
    out = tmp_path / "out"
    arguments = [
        "tune", "pretrain", str(tmp_path / "micro.json"), str(data), str(out),
        "--tokens", "2000", "--length", "50", "--batch", "4", "--device", "cpu",
    ]  # fmt: skip
    stopped = CliRunner().invoke(app, [*arguments, "--minutes", "0"])
    assert stopped.exit_code == 0, stopped.output
    assert "stopped at step 0 of 10" in stopped.stderr
    trained = CliRunner().invoke(app, arguments)
    assert trained.exit_code == 0, trained.output
    assert "goes on from step 0" in trained.stderr

    loaded = load(out / "model")
    assert isinstance(drafters.choose("auto", loaded.model), drafters.Mtp)
    prompt = loaded.tokenizer.encode("The state")
    assert loaded.tokenizer.decode(prompt) == "The state"
    said = (out / "model" / "README.md").read_text()
    assert "| pkg | 1 | MIT | 100 | 40,000 |" in said and "tokens seen | 2,000" in said

    again = CliRunner().invoke(
        app, ["tune", "eval", str(out / "model"), str(data), "--length", "50", "--device", "cpu"]
    )
    assert again.exit_code == 0, again.output
    assert again.stdout == trained.stdout


def test_shipped_configs_are_of_one_size() -> None:
    sizes = {}
    for path in (Path(making.__file__).parent / "configs").glob("*.json"):
        model = native.build(json.loads(path.read_text()))
        sizes[path.stem] = sum(parameter.numel() for parameter in model.parameters())
    assert set(sizes) == {"hybrid", "linear", "softmax", "transnormer"}
    assert all(9.7e6 < size < 9.9e6 for size in sizes.values()), sizes


def test_tokens_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    row().tofile(tmp_path / "train.bin")
    assert len(read_tokens(tmp_path / "train.bin", 96)) == 4000
    with pytest.raises(PrerequisiteError, match="vocabulary of 95"):
        read_tokens(tmp_path / "train.bin", 95)
    with pytest.raises(PrerequisiteError, match="no such file"):
        read_tokens(tmp_path / "absent.bin", 95)


def test_bytes_of_tokens_add_up_to_the_text(data: Path, corpus: list[Document]) -> None:
    sizes = token_bytes(data / "tokenizer.json")
    tokens = read_tokens(data / "heldout.bin", 300)
    bare = sum(len(making.text(document).encode()) for document in corpus[90:])
    marks = sum(
        making.text(d).count(mark) * len(mark) for d in corpus[90:] for mark in making.SPECIAL
    )
    assert int(sizes[torch.from_numpy(tokens.astype(np.int64))].sum()) == bare - marks


def test_the_card_says_when_a_run_was_stopped(data: Path) -> None:
    trainer = Trainer(config(vocabulary=300), PLAN, read_tokens(data / "train.bin", 300), "cpu")
    facts = json.loads((data / "data.json").read_text())
    scores = evaluate(trainer.model, row(200), torch.ones(96, dtype=torch.int64), length=20)
    assert "stopped; 1,536 were planned" in card("micro", trainer, facts, scores)
