"""A real server process with real models, started once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from difyops import modelsource

KEY = "sk-test-0123456789abcdef"
CHAT, EMBED = "smollm2-135m", "minilm-l6"


def fetched(name: str, folder: Path) -> dict[str, Path]:
    """role -> path, fetched as difyops itself does; into DIFYOPS_TEST_CACHE if it is set."""
    cache = os.environ.get("DIFYOPS_TEST_CACHE")
    return modelsource.fetch_model(name, Path(cache) if cache else folder)


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """name -> role -> path."""
    folder = tmp_path_factory.mktemp("models")
    return {name: fetched(name, folder) for name in (CHAT, EMBED)}


def configuration(files: dict[str, dict[str, Path]], **llm: Any) -> dict[str, Any]:
    return {
        "host": "127.0.0.1",
        "port": 0,
        "api_key": KEY,
        "llm": {"id": CHAT, "path": str(files[CHAT]["weights"]), "context": 1024} | llm,
        "embedding": {
            "id": EMBED,
            "model": str(files[EMBED]["weights"]),
            "tokenizer": str(files[EMBED]["tokenizer"]),
            "max_tokens": 256,
        },
    }


class Running:
    """A server process; its log is collected as it comes."""

    def __init__(
        self, config: dict[str, Any], folder: Path, module: str = "difyops.serving"
    ) -> None:
        path = folder / "serving.json"
        path.write_text(json.dumps(config))
        path.chmod(0o600)
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--config", str(path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def url(self) -> str:
        def found() -> str | None:
            match = re.search(r"listening on (http://\S+)", self.log)
            return match[1] if match else None

        return until(found, 20, lambda: self.log)

    def ready(self) -> Running:
        def healthy() -> bool:
            assert self.process.poll() is None, self.log
            return httpx.get(f"{self.url()}/health", timeout=20).status_code == 200

        until(healthy, 60, lambda: self.log)
        return self

    def wait(self, seconds: float = 20) -> int:
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.wait()
        self._reader.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()


def until(check: Callable[[], Any], seconds: float, why: Callable[[], str] = str) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        if result := check():
            return result
        assert time.monotonic() < deadline, f"not within {seconds} s: {why()}"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], Running]]:
    """Start a server of one's own; it is stopped at the end of the test."""
    started: list[Running] = []

    def go(config: dict[str, Any]) -> Running:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Running(config, folder))
        return started[-1]

    yield go
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server(
    model_files: dict[str, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """The server that most tests share: 1024 tokens for each of 2 slots."""
    running = Running(configuration(model_files, parallel=2), tmp_path_factory.mktemp("server"))
    try:
        yield running.ready()
    finally:
        running.stop()


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with httpx.Client(base_url=server.url(), headers=headers, timeout=60) as client:
        yield client
