"""Listen, load, warm up, serve; then end as the signals say.

`/health` answers before the models do: torch alone takes seconds to load.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from difyops.backends import reachable
from difyops.engine.config import EngineConfig, LlmConfig
from difyops.errors import (
    EXIT_CANNOT_START,
    EXIT_FAILED,
    EXIT_USAGE,
    DifyopsError,
    UsageError,
)
from difyops.loopback import is_loopback
from difyops.serving import process

if TYPE_CHECKING:
    from difyops.engine.service import Service
    from difyops.engine.stats import Stats

log = logging.getLogger("difyops.engine")

#: Seconds between two lines about the load, and between two looks at the engine's health.
STATUS_EVERY = 10
LOOK_EVERY = 0.25

T = TypeVar("T")


def serve(config: EngineConfig, opened: Callable[[Service], None] | None = None) -> int:
    """Serve until a signal comes. Returns the exit code; see __main__. `opened` puts the models
    into the service, in place of `load`.

    Raises PrerequisiteError when a package is missing or the port cannot be had.
    """
    needed = ["prometheus_client"]
    if config.llm is not None:
        needed += ["torch", "safetensors", "tokenizers", "llguidance", "gguf"]
    if config.embedding is not None:
        needed += ["onnxruntime", "tokenizers"]
    process.require(needed, "engine")
    if config.key is None and not is_loopback(config.host):
        log.warning("%s without an API key: whoever reaches it may use it", config.host)
    if config.llm is not None and opened is None:
        check(config.llm)
    with process.listen(config.host, config.port) as listener:
        code = asyncio.run(_serve(config, listener, opened))
    if _loader_runs():
        # Loading cannot be interrupted, and there is nothing to lose in it.
        logging.shutdown()
        os._exit(code)
    return code


def check(config: LlmConfig) -> None:
    """What can be known of the models without downloading or loading them. Raises DifyopsError."""
    _look(config, config.model, config.id, config.context)
    _, draft, name = config.speculate.partition(":")
    if draft:
        try:
            _look(config, name, name, None)
        except DifyopsError as error:
            raise type(error)(f"speculate: {error.message}", error.hint) from error


def _look(config: LlmConfig, model: str, name: str, context: int | None) -> None:
    from difyops import catalog
    from difyops.engine import headers, sources

    if model in catalog.names():
        entry = catalog.get_llm(model)  # or says that it is no chat model
        headers.check_context(context, name, entry.trained_context)
    elif not sources.is_download(model):
        path = sources.resolve(model, config.cache or sources.default_cache(), log.info)
        headers.look(path, name, context)


class _Server(process.Server):
    """Answers 503 to what is new after a signal, and ends once what runs has ended."""

    def __init__(self, service: Service) -> None:
        from difyops.engine.api import create_app

        super().__init__(create_app(service), service.stopping)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:  # asked a second time
            self._service.stopping.set()
        elif running := self._service.active:
            answers = "1 answer has" if running == 1 else f"{running} answers have"
            log.info("stopping: %s %.1f s to finish", answers, process.FINISH)
        else:
            log.info("stopping")
        self._service.draining = True
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        idle = not self._service.active or self._service.stopping.is_set()
        return await super().on_tick(counter) and idle


async def _serve(
    config: EngineConfig, listener: socket.socket, opened: Callable[[Service], None] | None = None
) -> int:
    from difyops.engine.service import Service

    service = Service(config)
    server = _Server(service)
    port = listener.getsockname()[1]
    log.info("listening on http://%s:%d", config.host, port)
    try:
        return await process.run(server, listener, _keep(service, server, port, opened or load))
    finally:
        if service.llm is not None:
            await asyncio.to_thread(service.llm.engine.stop)
        log.info("stopped")


async def _keep(
    service: Service, server: _Server, port: int, opened: Callable[[Service], None]
) -> int:
    """Load, then watch. Returns only when the service cannot go on, with the exit code."""
    began = time.monotonic()
    try:
        await _in_thread(lambda: opened(service))
    except DifyopsError as error:
        process.log_error(log, error)
        code = EXIT_USAGE if isinstance(error, UsageError) else EXIT_CANNOT_START
    except asyncio.CancelledError:
        raise
    except BaseException:  # a panic of Rust's is no Exception
        log.exception("loading failed")
        code = EXIT_CANNOT_START
    else:
        service.ready = True
        if service.embedder is not None:
            entry = service.describe()[-1]
            log.info("%s: %d tokens of context", entry["id"], entry["context_length"])
        log.info("ready after %.1f s", time.monotonic() - began)
        if service.llm is not None:
            key = " (with DIFYOPS_API_KEY set there, too)" if service.config.key else ""
            log.info(
                "ask it: difyops chat --url %s/v1%s", reachable(service.config.host, port), key
            )
        log.error("the engine ended: %s", await _watch(service))
        code = EXIT_FAILED
    service.ready = False
    service.stopping.set()
    server.should_exit = True
    return code


def load(service: Service) -> None:
    """Load and warm what the configuration names; blocking. Raises DifyopsError."""
    service.load_embedder()
    if (llm := service.config.llm) is not None:
        log.info("loading %s", _called(llm))
        from difyops.engine.opening import open_llm  # torch takes seconds

        service.llm = open_llm(llm)
        service.metrics.watch(service.llm.engine)


def _called(config: LlmConfig) -> str:
    """The model as a person knows it; a deployment's link has a name that says nothing."""
    link = Path(config.model)
    source = str(link.readlink()) if link.is_symlink() else config.model
    return config.id if source == config.id else f"{config.id} from {source}"


async def _watch(service: Service) -> str:
    """One line about the load now and then; returns when the engine has failed, with the reason."""
    if service.llm is None:
        for_ever: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await for_ever
    engine = service.llm.engine
    before = last = engine.stats()
    since = looked = time.monotonic()
    busy = 0.0  # seconds in which the engine made steps
    while engine.failure is None:
        await asyncio.sleep(LOOK_EVERY)
        now, moment = engine.stats(), time.monotonic()
        if now.counters.steps > last.counters.steps:
            busy += moment - looked
        last, looked = now, moment
        if moment - since < STATUS_EVERY:
            continue
        if busy:
            log.info("%s", status_line(before, now, busy))
        before, since, busy = now, moment, 0.0
    return engine.failure


def status_line(before: Stats, now: Stats, seconds: float) -> str:
    """What the engine did between two moments, in the `seconds` in which it made steps."""

    def rate(name: str) -> str:
        each = (getattr(now.counters, name) - getattr(before.counters, name)) / seconds
        return f"{each / 1000:.1f}k" if each >= 1000 else f"{each:.1f}"

    parts = [
        f"running {now.running}",
        f"waiting {now.waiting}",
        f"slots {now.slots - now.free_slots}/{now.slots}",
        f"decode {rate('generated_tokens')} tok/s",
        f"prefill {rate('prompt_tokens')} tok/s",
    ]
    if now.pages:
        parts.append(f"pages {(now.pages - now.free_pages) / now.pages:.0%}")
    drafted = sum(now.counters.drafted.values()) - sum(before.counters.drafted.values())
    if drafted:
        accepted = sum(now.counters.accepted.values()) - sum(before.counters.accepted.values())
        parts.append(f"guesses right {accepted / drafted:.0%}")
    if now.prefix is not None and before.prefix is not None:
        looked_up = now.prefix.looked_up - before.prefix.looked_up
        reused = now.prefix.reused - before.prefix.reused
        if looked_up:
            parts.append(f"prefix hits {reused / looked_up:.0%}")
    return "  ".join(parts)


_LOADER = "loader"


def _in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Like asyncio.to_thread, but the process may end before the thread does."""
    done: concurrent.futures.Future[T] = concurrent.futures.Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name=_LOADER, daemon=True).start()
    return asyncio.wrap_future(done)


def _loader_runs() -> bool:
    return any(thread.name == _LOADER for thread in threading.enumerate())
