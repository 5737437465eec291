"""`difyops tune`: flags -> one call -> report. What a command needs is imported when it runs."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from difyops.errors import UsageError

app = typer.Typer(
    help="Train small models on a machine's own documentation.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Data = Annotated[Path, typer.Argument(metavar="DATA", help="What `difyops tune data` wrote.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.")]


@app.command(epilog="Example: difyops tune data data --packages debs")
def data(
    out: Annotated[Path, typer.Argument(metavar="DATA", help="Where to write.")],
    packages: Annotated[
        Path, typer.Option(help="Where the .deb files lie, or are downloaded to (500 MB).")
    ] = Path("debs"),
    vocabulary: Annotated[int, typer.Option(help="Tokens of the tokenizer.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of the order of documents.")] = 0,
) -> None:
    """Make a tokenizer and files of tokens out of Debian's documentation packages."""
    from difyops import report
    from difyops.tune import data as making

    with report.Lines() as lines:
        facts = making.make(out, packages, vocabulary=vocabulary, seed=seed, tell=lines.note)
    for part in ("train", "heldout"):
        report.emit(
            f"{part}: {facts[part]['documents']:,} documents, {facts[part]['tokens']:,} tokens"
        )


@app.command(
    epilog="Examples: difyops tune pretrain hybrid data out | "
    "difyops tune pretrain my.json data out --tokens 50000000 --minutes 9"
)
def pretrain(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="hybrid, linear, softmax or transnormer, or the config.json of a native model.",
        ),
    ],
    data: Data,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Gets the checkpoint, and the model in OUT/model.")
    ],
    tokens: Annotated[int, typer.Option(min=1, help="To train on, in all.")] = 300_000_000,
    length: Annotated[int, typer.Option(min=2, help="Tokens of one sequence.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of one step.")] = 96,
    rate: Annotated[float, typer.Option(min=0, help="The highest learning rate.")] = 3e-3,
    mtp_weight: Annotated[float, typer.Option(min=0, help="Of the MTP modules' loss.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop then; the same command goes on later.")
    ] = None,
    device: Device = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Fuse operations; needs a C compiler.")
    ] = False,
) -> None:
    """Train a model of the native family. Ctrl-C stops it; the same command goes on."""
    from difyops import report
    from difyops.tune import card
    from difyops.tune.evaluate import evaluate, token_bytes
    from difyops.tune.pretrain import Plan, Trainer, read_tokens

    keys = _config(config)
    plan = Plan(
        tokens=tokens, length=length, batch=batch, rate=rate, mtp_weight=mtp_weight, seed=seed
    )
    train, held_out = (
        read_tokens(data / f"{part}.bin", int(keys["vocabulary"])) for part in ("train", "heldout")
    )
    place = _device(device)
    with report.Lines() as lines:
        trainer = Trainer(keys, plan, train, place)
        if trainer.resume(out):
            lines.note(f"goes on from step {trainer.step}")
        if compiled:
            trainer.compile()
        with _stop_after(minutes) as stop:
            done = trainer.train(lines.note, stop, out)
        if not done:
            lines.note(f"stopped at step {trainer.step} of {plan.steps}; the same command goes on")
        card.write_model(trainer, data, out / "model")
        rounded = trainer.result().float().to(place)
        sizes = token_bytes(data / "tokenizer.json")
        scores = evaluate(rounded, held_out, sizes, length=plan.length)
        card.write_card(Path(config).stem, trainer, data, scores, out / "model")
    report.emit("\n".join(f"{name}: {value}" for name, value in scores.lines()))


@app.command(name="eval", epilog="Example: difyops tune eval out/model data")
def evaluation(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A directory with a model.")],
    data: Data,
    length: Annotated[int, typer.Option(min=2, help="Tokens of one sequence.")] = 1024,
    device: Device = "auto",
) -> None:
    """Held-out loss, bits per byte and MTP acceptance of a model."""
    from difyops import report
    from difyops.engine.load import load
    from difyops.tune.evaluate import evaluate, token_bytes
    from difyops.tune.pretrain import read_tokens

    loaded = load(model, dtype="float32", device=_device(device))
    tokens = read_tokens(data / "heldout.bin", loaded.model.shape.vocabulary)
    sizes = token_bytes(model / "tokenizer.json")
    scores = evaluate(loaded.model, tokens, sizes, length=length)
    report.emit("\n".join(f"{name}: {value}" for name, value in scores.lines()))


def _config(name: str) -> dict[str, Any]:
    """A config that comes with difyops, or a file."""
    shipped = resources.files("difyops.tune").joinpath("configs", f"{name}.json")
    if name.isidentifier() and shipped.is_file():
        content: dict[str, Any] = json.loads(shipped.read_text(encoding="utf-8"))
        return content
    if not Path(name).is_file():
        raise UsageError(
            f"{name}: neither a config that comes with difyops nor a file",
            "hybrid, linear, softmax or transnormer",
        )
    from difyops.engine.layout import read_json

    return read_json(Path(name))


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _stop_after(minutes: float | None) -> Iterator[Callable[[], bool]]:
    """Says true once the time is up, or Ctrl-C or SIGTERM came: a step is never cut in two."""
    asked = []
    before = {
        number: signal.signal(number, lambda number, frame: asked.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    try:
        yield lambda: bool(asked) or time.monotonic() > end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
