"""What every server process of ours does: listen, end on a signal, say why it cannot start."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Iterable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from difyops.errors import DifyopsError, PrerequisiteError

#: Seconds after SIGTERM: running requests are first left to finish, then end with an error that
#: says why, and at the very last are cancelled. With the rest of the shutdown it stays below five.
FINISH = 3.5
CANCEL = 4


class Server(uvicorn.Server):
    """uvicorn, but a signal that asked for the end is not raised again after it: the exit is 0.

    `stopping` is set when the time to finish is over.
    """

    def __init__(self, app: Starlette, stopping: asyncio.Event) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                lifespan="off",  # we have none; a second Ctrl-C would leave its traceback
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=CANCEL,
            )
        )
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


async def run(server: Server, listener: socket.socket, keep: Coroutine[Any, Any, int]) -> int:
    """Serve while `keep` loads and watches. -> the exit code: 0 after a signal, else what `keep`
    returned when it made `server` exit."""
    keeper = asyncio.create_task(keep)
    try:
        await server.serve(sockets=[listener])
        # It is done only if it was the one that ended the service.
        return keeper.result() if keeper.done() else 0
    finally:
        keeper.cancel()
        await asyncio.wait((keeper,))


def log_to_stderr() -> None:
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    # httpx logs each request it makes, at INFO; uvicorn says how it starts and stops.
    for noisy in ("httpx", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def log_error(log: logging.Logger, error: DifyopsError) -> None:
    log.error("%s%s", error.message, f" ({error.hint})" if error.hint else "")


def default_threads() -> int:
    """The CPUs this process may run on, less one.

    The threads of ggml and of torch wait for each other in a spin. When anything else (Dify itself)
    takes one of their CPUs, they all stand still for its time slice: on two busy CPUs, two threads
    of ggml made 3 tokens a second where one made 40, and those of torch a fifth of what one made.
    """
    return max(1, len(os.sched_getaffinity(0)) - 1)


def require(packages: Iterable[str], extra: str) -> None:
    """Raises PrerequisiteError naming the packages that are missing, and difyops' extra."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise PrerequisiteError(
            f"not installed: {', '.join(missing)}", f"pip install 'difyops[{extra}]'"
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises PrerequisiteError when the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        taken = error.errno == errno.EADDRINUSE
        raise PrerequisiteError(
            f"cannot listen on {host}:{port}: {why}",
            f"--port 0 takes any that is free; or stop what listens on {port}" if taken else None,
        ) from error
