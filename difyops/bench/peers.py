"""The servers of a comparison: each is started, measured like the others, and always stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

import httpx

from difyops.bench.load import FEWEST_WORDS, HttpServer, Round, prompt, sample
from difyops.errors import DifyopsError, PrerequisiteError
from difyops.openai_client import Endpoint, Message, Refused, chat_models, connection, key_for
from difyops.secrets import Secret

#: Seconds until a server that was started must be ready.
PATIENCE = 300.0
_ENGINE = "difyops[engine]"
_DEMO = "difyops[demo]"


class Target(Protocol):
    """What is measured."""

    @property
    def name(self) -> str: ...

    def measure(self, prompts: Sequence[list[Message]], streams: int, tokens: int) -> Round: ...


@contextmanager
def native(model: str, threads: int, slots: int) -> Iterator[Target]:
    """`difyops serve MODEL` on a free port, with a slot for each stream."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    key = Secret(secrets.token_urlsafe(32))
    command = [sys.executable, "-m", "difyops", "serve", model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--threads", str(threads), "--slots", str(slots)]
    with process(command, {"DIFYOPS_API_KEY": key.reveal()}) as (child, log):
        healthy(f"http://127.0.0.1:{port}/health", child, log)
        yield _ending_late("native", key, f"http://127.0.0.1:{port}/v1")


@contextmanager
def running(url: str) -> Iterator[Target]:
    """A server that somebody else started, and its only chat model; the key is key_for's."""
    yield _ending_late(url, key_for(url), url)


def _ending_late(name: str, key: Secret | None, url: str) -> Target:
    """The model's own end of an answer is switched off where the server knows how to (`ignore_eos`,
    an extension that OpenAI's API does not have)."""
    base = url.rstrip("/")
    with httpx.Client(**connection(base, key)) as client:
        models = chat_models(client, base)
    if len(models) != 1:
        raise DifyopsError(f"{base} has {len(models)} chat models, and not one")
    endpoint = Endpoint(base, models[0], key)
    server = HttpServer(name, endpoint, {"ignore_eos": True})
    try:
        server.measure([prompt(FEWEST_WORDS, 0)], 1, 1)
    except Refused as error:
        if error.status not in (400, 422):
            raise
        return HttpServer(name, endpoint, {})
    return server


@contextmanager
def llamacpp(weights: Path, threads: int, streams: int, context: int) -> Iterator[Target]:
    """llama.cpp's own server with a slot of `context` tokens for each stream."""
    from difyops.serving.llama_child import Orders

    if weights.suffix != ".gguf":
        raise PrerequisiteError(f"llama.cpp reads GGUF files, which {weights} is not")
    _require("xllamacpp", _DEMO)
    key = secrets.token_urlsafe(32)
    orders = Orders(
        path=str(weights), alias="bench", api_key=key, context=context, parallel=streams,
        threads=threads,
    )  # fmt: skip
    with worker("difyops.serving.llama_child", {}) as ask:
        endpoint = Endpoint(f"{ask(orders)['address']}/v1", "bench", Secret(key))
        # The others have no cached prompt either.
        yield HttpServer("llamacpp", endpoint, {"ignore_eos": True, "cache_prompt": False})


@contextmanager
def transformers(weights: Path, threads: int) -> Iterator[Target]:
    """`generate` of transformers, in float32, with static batches of as many prompts as streams."""
    from difyops.bench.transformers_child import Orders

    for module in ("torch", "transformers", *(["gguf"] if weights.is_file() else [])):
        _require(module, "transformers" if module == "transformers" else _ENGINE)
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    with worker("difyops.bench.transformers_child", environment) as ask:
        ask(Orders(weights=str(weights), threads=threads))
        yield _Batches(ask)


class _Batches:
    name = "transformers"

    def __init__(self, ask: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self._ask = ask

    def measure(self, prompts: Sequence[list[Message]], streams: int, tokens: int) -> Round:
        began = time.perf_counter()
        samples = []
        for start in range(0, len(prompts), streams):
            batch = prompts[start : start + streams]
            found = self._ask({"prompts": batch, "tokens": tokens})
            moments = found["moments"]
            samples += [sample(0.0, moments, len(moments), n) for n in found["prompt_tokens"]]
        return Round(tuple(samples), time.perf_counter() - began)


def weights_of(model: str, tell: Callable[[str], None]) -> Path:
    """The file or directory that peers load: the same that `difyops serve` does, from its cache.

    Raises UsageError and PrerequisiteError as `sources.resolve` does.
    """
    # Imported here: measuring servers that run needs nothing of the engine.
    from difyops.engine import sources

    return sources.resolve(model, sources.default_cache(), tell).absolute()


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise PrerequisiteError(f"{module} is not installed", f"pip install '{package}'")


@contextmanager
def worker(
    module: str, environment: Mapping[str, str]
) -> Iterator[Callable[[Mapping[str, Any]], dict[str, Any]]]:
    """`python -m module`, which answers JSON lines. -> a function from an order to its answer,
    that raises DifyopsError when the process says what is wrong, or ends."""
    with process([sys.executable, "-m", module], environment, pipes=True) as (child, log):

        def ask(order: Mapping[str, Any]) -> dict[str, Any]:
            if child.stdin is None or child.stdout is None:
                raise DifyopsError(f"{module} was started without pipes")
            with suppress(BrokenPipeError):
                child.stdin.write(json.dumps(order) + "\n")
                child.stdin.flush()
            line = child.stdout.readline()
            if not line:
                raise DifyopsError(f"{module} ended: {_last_line(log)}")
            found: dict[str, Any] = json.loads(line)
            if "error" in found:
                raise DifyopsError(found["error"])
            return found

        yield ask


@contextmanager
def process(
    command: list[str], environment: Mapping[str, str], *, pipes: bool = False
) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """A child and its log. Ctrl-C reaches only us, who then stop it."""
    pipe = subprocess.PIPE if pipes else subprocess.DEVNULL
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe if pipes else log,
            stderr=log,
            text=True,
            env={**os.environ, **environment},
            process_group=0,
        ) as child,
    ):
        try:
            yield child, log
        finally:
            if child.stdin:  # llama.cpp's child knows no other sign
                with suppress(BrokenPipeError):
                    child.stdin.close()
            child.terminate()
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()


def healthy(url: str, child: subprocess.Popen[str], log: IO[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise PrerequisiteError(f"difyops serve ended ({child.returncode}): {_last_line(log)}")
        with suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise PrerequisiteError(f"difyops serve is not ready after {PATIENCE:.0f} s: {_last_line(log)}")


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip(" \n│") for line in log if line.strip(" \n│─╭╮╰╯")]
    return lines[-1][:300] if lines else "it said nothing"
