"""`difyops bench`: flags -> one call -> report."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from difyops.errors import EXIT_FAILED, UsageError

app = typer.Typer(
    help="Measure, beside others, on this machine.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def bench() -> None:
    """Measure, beside others, on this machine."""  # With one command alone Typer makes no group.


class Peer(StrEnum):
    llamacpp = "llamacpp"
    transformers = "transformers"


@app.command(
    epilog="Examples: difyops bench serve smollm2-135m --peer llamacpp --peer transformers | "
    "difyops bench serve --url http://127.0.0.1:8000/v1 --streams 1,8"
)
def serve(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Served by the native engine.")
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(
            help="A server that runs (…/v1); may be repeated. Their key, if they want one, is "
            "taken from DIFYOPS_MODEL_API_KEY, on this machine else from DIFYOPS_API_KEY."
        ),
    ] = None,
    peer: Annotated[
        list[Peer] | None,
        typer.Option(help="Load MODEL there, too: llamacpp or transformers; may be repeated."),
    ] = None,
    streams: Annotated[str, typer.Option(help="How many at a time, a row for each.")] = "1,8,32",
    tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=32, help="Of each prompt.")] = 128,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Of each server started here; without it: the CPUs less one."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Throughput, time to first token and inter-token latency of model servers, as ratios."""
    from difyops import report
    from difyops.bench import serve as serving
    from difyops.serving.process import default_threads

    wanted = serving.Wanted(
        model, tuple(dict.fromkeys(url or ())), tuple(dict.fromkeys(peer or ())), _numbers(streams),
        tokens, prompt_tokens, threads or default_threads(),
    )  # fmt: skip
    progress = report.Lines()
    try:
        found = serving.run(wanted, progress)
    finally:
        progress.close()
    if json:
        report.emit_json(found.as_json())
    else:
        report.benchmark(found)
    if not found.complete:
        raise typer.Exit(EXIT_FAILED)


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= 1024 for part in parts):
        raise UsageError(f"--streams: {text!r} is no list of numbers from 1 to 1024", "1,8,32")
    return [int(part) for part in dict.fromkeys(parts)]
