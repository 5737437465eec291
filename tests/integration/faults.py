"""What the fault tests share: a stand-in for a model, waiting, and proof that nothing was lost."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import psutil

from difyops import deployment as deployments
from difyops import plan, supervise
from difyops.core import Deployment
from difyops.plan import MARKER
from difyops.services import postgres, valkey

T = TypeVar("T")


def eventually(look: Callable[[], T], seconds: float = 20, every: float = 0.02) -> T:
    """The first true answer of `look`. An exception in it is a no."""
    deadline = time.monotonic() + seconds
    while True:
        problem: Exception | None = None
        try:
            if found := look():
                return found
        except Exception as error:
            problem = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {look.__name__}") from problem
        time.sleep(every)


class Server(ThreadingHTTPServer):
    """An HTTP server of the test on a free port. Use as a context manager."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.release = threading.Event()  # for handlers that are to be slow
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *about: object) -> None:
        self.release.set()
        self.shutdown()
        super().__exit__(*about)


class Quiet(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, body: bytes, kind: str = "application/json", code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class ModelStandIn(Quiet):
    """Not a model: as much of an OpenAI-shaped server as `up` and doctor ask."""

    def do_GET(self) -> None:
        if getattr(self.server, "loading", False):
            return self.answer(b'{"error": {"message": "loading"}}', code=503)
        self.answer(json.dumps({"object": "list", "data": [{"id": "stand-in"}]}).encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = {"content": "hello"}
        if not asked.get("stream"):
            return self.answer(json.dumps({"choices": [{"message": said}]}).encode())
        event = json.dumps({"choices": [{"delta": said}]})
        self.answer(f"data: {event}\n\ndata: [DONE]\n\n".encode(), "text/event-stream")


def without_model(url: str) -> dict[str, object]:
    """Settings of a deployment whose model is the stand-in at `url`."""
    return {
        "model": {"backend": "external", "name": "stand-in", "url": f"{url}/v1"},
        "embedding": None,
    }


# --- nothing lost ---------------------------------------------------------------------------------


def load(root: Path) -> Deployment:
    return deployments.load(root)


@contextmanager
def nothing_lost(root: Path) -> Iterator[None]:
    """A row and a key that are written before are there after."""
    word = f"{time.time_ns()}"
    deployment = load(root)
    with postgres.connect(deployment) as session:
        session.execute("create table if not exists kept (word text)")
        session.execute("insert into kept values (%s)", (word,))
    with valkey.client(deployment) as broker:
        # Ours syncs once a second, and a crash may take what is younger: not waited for here.
        broker.config_set("appendfsync", "always")
        broker.set(f"kept:{word}", word)
        broker.config_set("appendfsync", "everysec")
    yield
    deployment = load(root)
    with postgres.connect(deployment) as session:
        assert session.execute("select 1 from kept where word = %s", (word,)).fetchone()
    with valkey.client(deployment) as broker:
        assert broker.get(f"kept:{word}") == word


# --- processes ------------------------------------------------------------------------------------


def states(cli: Any) -> dict[str, supervise.State]:
    """What `status` says, by service; without starting a program each time."""
    deployment = load(cli.root)
    found = supervise.Supervisor(deployment).states(plan.build(deployment))
    return {state.name: state for state in found}


def supervisord(root: Path) -> int:
    return int((root / "run" / "supervisord.pid").read_text())


def left(root: Path) -> list[psutil.Process]:
    """Processes of a deployment, by its marker or by its path in their arguments; not our CLIs."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            marked = process.environ().get(MARKER) == str(root)
            if marked or (any(str(root) in w for w in words) and "difyops" not in words):
                found.append(process)
        except psutil.Error:
            continue
    return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def interrupted(child: Any, number: int = signal.SIGINT, seconds: float = 20) -> tuple[int, str]:
    """Send a signal to a CLI at work. -> its exit code and what it said."""
    os.kill(child.pid, number)
    _, said = child.communicate(timeout=seconds)
    return child.returncode, said
