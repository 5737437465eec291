"""`python -m difyops.serving --config FILE`: listen, load, serve until told to stop.

Exit codes: 0 stopped by a signal, 1 an engine died in service, 2 a wrong configuration,
3 never became ready.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from difyops.errors import EXIT_CANNOT_START, EXIT_FAILED, DifyopsError, PrerequisiteError
from difyops.serving.app import Models, create_app
from difyops.serving.config import ServingConfig, load

log = logging.getLogger("difyops.serving")

#: Seconds after SIGTERM: running requests are first left to finish, then end with an error that
#: says why, and at the very last are cancelled. With the rest of the shutdown it stays below five.
FINISH = 3.5
CANCEL = 4


class _Server(uvicorn.Server):
    """uvicorn, but a signal that asked for the end is not raised again after it: the exit is 0."""

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        asyncio.get_running_loop().call_later(FINISH, self._stopping.set)
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m difyops.serving", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="a JSON file of mode 0600")
    arguments = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    # httpx logs each request it makes, at INFO; uvicorn says how it starts and stops.
    for noisy in ("httpx", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        config = load(arguments.config)
        _require(config)
        with _listen(config) as listener:
            return asyncio.run(_serve(config, listener))
    except DifyopsError as error:
        log.error("%s%s", error.message, f" ({error.hint})" if error.hint else "")
        return error.exit_code


def _require(config: ServingConfig) -> None:
    needed = ["xllamacpp"] if config.llm is not None else []
    needed += ["onnxruntime", "tokenizers"] if config.embedding is not None else []
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise PrerequisiteError(
            f"not installed: {', '.join(missing)}", "pip install 'difyops[demo]'"
        )


def _listen(config: ServingConfig) -> socket.socket:
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((config.host, config.port), family=family, backlog=512)
    except OSError as error:
        raise PrerequisiteError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror or error}"
        ) from error


async def _serve(config: ServingConfig, listener: socket.socket) -> int:
    models = Models(config)
    server = _Server(
        uvicorn.Config(
            create_app(models),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=CANCEL,
        ),
        models.stopping,
    )
    log.info("listening on http://%s:%d", config.host, listener.getsockname()[1])
    keeper = asyncio.create_task(_keep(models, server))
    try:
        await server.serve(sockets=[listener])
        # The keeper has an exit code only if it was the one that ended the service.
        return keeper.result() if keeper.done() else 0
    finally:
        keeper.cancel()
        await asyncio.wait((keeper,))
        await models.close()


async def _keep(models: Models, server: uvicorn.Server) -> int:
    """Load, then watch. Returns only when the service cannot go on, with the exit code."""
    began = time.monotonic()
    try:
        await models.load()
    except DifyopsError as error:
        log.error("%s", error.message)
        server.should_exit = True
        return EXIT_CANNOT_START
    except Exception:
        log.exception("loading failed")
        server.should_exit = True
        return EXIT_CANNOT_START
    for entry in models.describe():
        log.info("%s: %d tokens of context", entry["id"], entry["context_length"])
    llm, llama = models.config.llm, models.llama
    if llm is not None and llama is not None and llama.context < llm.context:
        log.warning("%s: %d tokens of context were asked for", llm.id, llm.context)
    log.info("ready after %.1f s", time.monotonic() - began)
    if llama is None:
        await asyncio.Event().wait()
    else:
        log.error("%s", await llama.wait())
    models.ready = False
    server.should_exit = True
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
