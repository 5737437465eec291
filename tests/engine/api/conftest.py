"""A real server over a tiny random model, in this process: its engine can be looked at."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from difyops.engine import serve
from difyops.engine.api import create_app
from difyops.engine.config import EngineConfig
from difyops.engine.service import Service
from tests.engine import tiny

KEY = "sk-test-0123456789abcdef"
MODEL = "tiny"
HI = [{"role": "user", "content": "Say hello."}]
CONTEXT = 8192

#: Hermes' tool calls, and reasoning when it is asked for.
TEMPLATE = (
    tiny.CHAT_TEMPLATE.replace("Tools:", "Call by <tool_call>...</tool_call>. Tools:").replace(
        "{{ message.content or '' }}", "{{ message.content or '' }}{{ message.tool_calls or '' }}"
    )
    + "{% if think %}<think>\n{% elif false %}</think>{% endif %}"
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.checkpoint(tmp_path_factory.mktemp("api") / "model", context=CONTEXT)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def configuration(checkpoint: Path, **llm: Any) -> dict[str, Any]:
    fields = {"id": MODEL, "model": str(checkpoint), "slots": 4, "device": "cpu", "threads": 1}
    return {"host": "127.0.0.1", "port": 0, "api_key": KEY, "llm": fields | llm}


class Local:
    """A server in a thread."""

    def __init__(
        self, checkpoint: Path, embedding: dict[str, Any] | None = None, **llm: Any
    ) -> None:
        settings = configuration(checkpoint, **llm) | {"embedding": embedding}
        self.config = EngineConfig.model_validate(settings)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        until(lambda: hasattr(self, "server") and self.server.started, 20)
        assert self.service.llm is not None
        self.llm = self.service.llm
        self.engine = self.llm.engine

    async def _run(self) -> None:
        self.service = Service(self.config)
        await asyncio.to_thread(serve.load, self.service)
        self.service.ready = True
        app = create_app(self.service)
        self.server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        await self.server.serve(sockets=[self._socket])

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(10)
        self.engine.stop()

    def http(self, **settings: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, **settings)

    def free(self) -> bool:
        stats = self.engine.stats()
        return stats.free_slots == stats.slots and not stats.waiting


def until(check: Callable[[], Any], seconds: float, why: Callable[[], object] = str) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := check()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {why()}"
        time.sleep(0.005)
    return result


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[Local]:
    """The server that most tests share."""
    local = Local(checkpoint)
    yield local
    local.stop()


@pytest.fixture
def start(checkpoint: Path) -> Iterator[Callable[..., Local]]:
    """A server of one's own."""
    started: list[Local] = []

    def go(**llm: Any) -> Local:
        started.append(Local(checkpoint, **llm))
        return started[-1]

    yield go
    for local in started:
        local.stop()


@pytest.fixture
def http(server: Local) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client
    until(server.free, 5, server.engine.stats)


@pytest.fixture
def client(server: Local) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30
    ) as client:
        yield client
    until(server.free, 5, server.engine.stats)
