"""`difyops bench`: flags -> one call -> report."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from difyops.errors import EXIT_FAILED, UsageError
from difyops.serve_command import Dtype

if TYPE_CHECKING:
    from difyops import report
    from difyops.bench import gpu as of_a_gpu
    from difyops.bench import serve as of_servers
    from difyops.bench import spec as of_speculation

Found = TypeVar("Found", "of_servers.Comparison", "of_speculation.Found", "of_a_gpu.Found")

app = typer.Typer(
    help="Measure, beside others, on this machine.", no_args_is_help=True, rich_markup_mode=None
)


class Peer(StrEnum):
    llamacpp = "llamacpp"
    transformers = "transformers"


class GpuPeer(StrEnum):
    transformers = "transformers"
    vllm = "vllm"


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
    with _progress() as progress:
        found = serving.run(wanted, progress)
    _emit(found, report.benchmark, json)
    if not found.complete:
        raise typer.Exit(EXIT_FAILED)


@app.command(
    epilog="Examples: difyops bench spec ~/models/qwen3.5-0.8b | "
    "difyops bench spec smollm2-135m --streams 1 --tokens 32 --json | "
    "difyops bench spec hf:Qwen/Qwen3.5-0.8B --plot spec.svg"
)
def spec(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for `difyops serve`.")],
    streams: Annotated[str, typer.Option(help="How many at a time, rows for each.")] = "1,8",
    tokens: Annotated[int, typer.Option(min=2, help="Of each answer, at most.")] = 64,
    turns: Annotated[int, typer.Option(min=1, help="Of the conversation.")] = 20,
    prompts: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Own prompts, one a line."),
    ] = None,
    draft: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A smaller model that guesses, too.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="On a CPU; without it: the CPUs less one.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A picture, too (.png or .svg); needs difyops[plot]."),
    ] = None,
) -> None:
    """What speculation and the prefix cache save, as ratios; fails if they change an answer."""
    from difyops import report
    from difyops.bench import plot as picture
    from difyops.bench import spec as speculating
    from difyops.serving.process import default_threads

    if plot is not None:
        picture.check(plot)
    wanted = speculating.Wanted(
        model, _numbers(streams), tokens, turns, threads or default_threads(),
        _lines(prompts) if prompts else speculating.PROMPTS, draft, device, dtype.value,
    )  # fmt: skip
    with _progress() as progress:
        found = speculating.run(wanted, progress)
    _emit(found, report.speculation, json)
    if plot is not None:
        picture.draw(found, plot)
    if not found.exact:
        raise typer.Exit(EXIT_FAILED)


@app.command(
    epilog="Examples: difyops bench gpu | "
    "difyops bench gpu --shape qwen3.5-0.8b --sequences 1,64 --part decode --profile | "
    "difyops bench gpu --part context --plot contexts.svg | "
    "difyops bench gpu --shape qwen3.5-0.8b --part decode,prompt --peer transformers --peer vllm"
)
def gpu(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="qwen3.5-0.8b, qwen3.5-9b, mamba2-1.3b, linear-1b, hybrid-1b or softmax-1b; may "
            "be repeated. Without it: qwen3.5-0.8b, mamba2-1.3b and linear-1b."
        ),
    ] = None,
    part: Annotated[
        str,
        typer.Option(
            help="What to measure, of eager, decode, engine, prompt, profile, http, peer, context, "
            "speculation, drift, agreement and load."
        ),
    ] = "decode,engine,prompt",
    sequences: Annotated[str, typer.Option(help="How many at a time, rows for each.")] = "1,64,256",
    profile: Annotated[
        bool, typer.Option("--profile", help="The kernels of a step and of a prompt, too.")
    ] = False,
    peer: Annotated[
        list[GpuPeer] | None,
        typer.Option(help="The same shape there, too: transformers or vllm; may be repeated."),
    ] = None,
    seconds: Annotated[int, typer.Option(min=1, help="How long the random load lasts.")] = 60,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    plot: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A picture, too (.png or .svg): of contexts where they are measured, else of "
            "shares of the limit; may be repeated. Needs difyops[plot].",
        ),
    ] = None,
) -> None:
    """The engine beside what the GPU's memory and arithmetic allow, and whether it is right there.
    Random weights."""
    from difyops import report
    from difyops.bench import gpu as measuring
    from difyops.bench import plot as picture
    from difyops.bench.gpu_model import Wanted

    for path in plot or ():
        picture.check(path)
    asked = [name.strip() for name in part.split(",")]
    asked += ["profile"] if profile else []
    asked += ["peer"] if peer else []
    usual = Wanted()
    wanted = Wanted(
        tuple(dict.fromkeys(shape or usual.shapes)),
        _numbers(sequences, "--sequences"),
        parts=tuple(dict.fromkeys(asked)),
        peers=tuple(dict.fromkeys(peer or usual.peers)),
        seconds=seconds,
    )
    # A limit on its time (timeout, a job's end) loses nothing that was measured.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _progress() as progress:
        found = measuring.run(wanted, progress)
    _emit(found, report.gpu, json)
    for path in plot or ():
        from difyops.bench import gpu_plot

        gpu_plot.draw(found, path)
    if not found.complete:
        raise typer.Exit(EXIT_FAILED)


@contextmanager
def _progress() -> Iterator[report.Lines]:
    """A line for each step, and one for Ctrl-C."""
    from difyops import report

    with report.Lines() as progress:
        try:
            yield progress
        except KeyboardInterrupt:
            progress.close()
            progress.note("interrupted: nothing is reported")
            raise


def _emit(found: Found, table: Callable[[Found], None], json: bool) -> None:
    from difyops import report

    if json:
        report.emit_json(found.as_json())
    else:
        table(found)


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _numbers(text: str, option: str = "--streams") -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= 1024 for part in parts):
        raise UsageError(f"{option}: {text!r} is no list of numbers from 1 to 1024", "1,8,32")
    return [int(part) for part in dict.fromkeys(parts)]
