"""`difyops size`: what a model takes while it is served, before it is downloaded or loaded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from difyops.errors import UsageError
from difyops.serve_command import Dtype, StateDtype, bytes_of

EPILOG = (
    "Examples: difyops size ~/models/qwen3.5-0.8b --memory 24GiB | "
    "difyops size config.json --memory 80GiB --context 32768 --json"
)


def size(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model's directory, or its config.json.")
    ],
    memory: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Of the GPU, such as 24GiB: says what fits into it."),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="The share of it that may be taken.")
    ] = 0.9,
    context: Annotated[
        int | None, typer.Option(min=16, help="Tokens of one request; without it: the model's.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Requests at a time; without it: what fits, to 256.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights. auto: bfloat16.")] = Dtype.auto,
    state_dtype: Annotated[StateDtype, typer.Option(help="Of recurrent states.")] = StateDtype.auto,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """What serving a model takes: weights, each sequence's state, keys and values, and what fits.

    For the native engine on a GPU; it plans with the same numbers.
    """
    from difyops import report
    from difyops.engine import load, sizing
    from difyops.engine.layout import read_json

    file = model / "config.json" if model.is_dir() else model
    if not file.is_file() or file.suffix != ".json":
        raise UsageError(
            f"size: {model} is neither a model's directory nor a config.json",
            "of a model that is not here yet, its config.json is enough",
        )
    found = sizing.of_config(
        read_json(file),
        dtype=load.DTYPES["bfloat16" if dtype is Dtype.auto else dtype.value],
        states_in=None if state_dtype is StateDtype.auto else load.DTYPES[state_dtype.value],
        context=context,
    )
    plan = None
    if memory is not None:
        budget = int(bytes_of(memory, "--memory") * gpu_memory_utilization)
        plan = sizing.plan(
            found.needs, budget - sizing.OVERHEAD, slots=slots, vocabulary=found.vocabulary
        )
    if json:
        said: dict[str, Any] = {"version": 1, **asdict(found)}
        report.emit_json(said | {"plan": asdict(plan) if plan else None})
    else:
        report.size(found, plan)
