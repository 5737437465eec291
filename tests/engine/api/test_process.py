"""The life of the process: loading, failing, stopping; its configuration and what it logs."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from difyops.engine import config, opening, serve
from difyops.engine.prefix import Usage
from difyops.engine.request import Request, SamplingParams
from difyops.engine.slots import IntegrityError
from difyops.engine.stats import Counters, Stats
from difyops.errors import PrerequisiteError, UsageError
from tests.serving.conftest import Running

from .conftest import CONTEXT, HI, KEY, MODEL, configuration, until

KEYED = {"Authorization": f"Bearer {KEY}"}
Launch = Callable[[dict[str, Any]], Running]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    started: list[Running] = []

    def go(settings: dict[str, Any]) -> Running:
        folder = tmp_path / f"run{len(started)}"
        folder.mkdir()
        started.append(Running(settings, folder, "difyops.engine"))
        return started[-1]

    yield go
    for server in started:
        server.stop()


def _stream(server: Running, tokens: int, lines: list[str]) -> threading.Thread:
    body = {
        "model": MODEL, "messages": HI, "max_tokens": tokens, "ignore_eos": True, "stream": True,
    }  # fmt: skip

    def go() -> None:
        with httpx.stream(
            "POST", f"{server.url()}/v1/chat/completions", json=body, headers=KEYED, timeout=60
        ) as answer:
            for line in answer.iter_lines():
                lines.append(line)

    thread = threading.Thread(target=go)
    thread.start()
    return thread


def test_from_loading_to_sigterm_during_streams(launch: Launch, checkpoint: Path) -> None:
    server = launch(configuration(checkpoint))
    seen = [httpx.get(f"{server.url()}/health").status_code]
    early = httpx.get(f"{server.url()}/v1/models", headers=KEYED)
    assert early.status_code == 503 and early.json()["error"]["code"] == "model_loading"
    assert "retry-after" in early.headers
    server.ready()
    assert seen == [503]

    lines: dict[int, list[str]] = {40: [], CONTEXT - 200: []}
    threads = [_stream(server, tokens, got) for tokens, got in lines.items()]
    until(lambda: all(lines.values()), 20, lambda: server.log)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    url = server.url()

    def refused() -> bool:
        answer = httpx.post(f"{url}/v1/chat/completions", json={}, headers=KEYED)
        return answer.status_code == 503 and answer.json()["error"]["code"] == "server_stopping"

    until(refused, 2, lambda: server.log)
    assert httpx.get(f"{url}/health").json() == {"status": "stopping"}
    assert server.wait() == 0, server.log
    assert time.monotonic() - began < 6
    for thread in threads:
        thread.join(10)
    short, long = ([line for line in got if line] for got in lines.values())
    assert short[-1] == "data: [DONE]"
    assert "server_stopping" in long[-1] and "[DONE]" not in "".join(long)
    assert "Traceback" not in server.log and KEY not in server.log


def test_sigterm_while_loading(launch: Launch, checkpoint: Path) -> None:
    server = launch(configuration(checkpoint))
    server.url()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait(5) == 0, server.log
    assert "Traceback" not in server.log


def test_what_is_never_ready_is_exit_3(launch: Launch, checkpoint: Path, tmp_path: Path) -> None:
    bad = tmp_path / "model"
    shutil.copytree(checkpoint, bad)
    (weights,) = bad.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    server = launch(configuration(bad))
    assert server.wait() == 3, server.log
    (wrong,) = [line for line in server.lines if "INFO" not in line]
    assert "ERROR" in wrong and weights.name in wrong


def test_a_port_in_use_is_exit_3_and_a_wrong_configuration_2(
    launch: Launch, checkpoint: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = launch(configuration(checkpoint) | {"port": port})
        wrong = launch({"port": 1})
        assert server.wait() == 3
        assert "cannot listen" in server.log and len(server.lines) == 1
        assert wrong.wait() == 2 and len(wrong.lines) == 1


def _serve_here(settings: dict[str, Any]) -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return asyncio.run(serve._serve(config.EngineConfig.model_validate(settings), listener))


def test_an_engine_that_dies_is_exit_1(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = opening.open_llm

    def doomed(settings: config.LlmConfig) -> Any:
        llm = real(settings)

        def check() -> None:
            raise IntegrityError("planted")

        llm.engine.pool.check = check  # type: ignore[method-assign]
        llm.engine.cancel(Request([1], SamplingParams(max_tokens=1), llm.tokenizer.stream()))
        return llm

    monkeypatch.setattr(opening, "open_llm", doomed)
    assert _serve_here(configuration(checkpoint)) == 1
    assert "the engine ended: IntegrityError: planted" in caplog.text


def test_a_model_that_nobody_knows_is_exit_2(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert _serve_here(configuration(checkpoint, model="no-such-model")) == 2
    assert "no-such-model" in caplog.text


def test_the_status_line_is_written_under_load(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serve, "STATUS_EVERY", 0.2)
    monkeypatch.setattr(serve, "LOOK_EVERY", 0.05)
    caplog.set_level("INFO")
    real = opening.open_llm

    def busy(settings: config.LlmConfig) -> Any:
        llm = real(settings)
        request = Request([1], SamplingParams(max_tokens=300), llm.tokenizer.stream())
        done = threading.Event()
        llm.engine.submit(request, lambda output: done.set() if output.finish else None)
        threading.Thread(
            target=lambda: (done.wait(20), signal.raise_signal(signal.SIGTERM))
        ).start()
        return llm

    monkeypatch.setattr(opening, "open_llm", busy)
    assert _serve_here(configuration(checkpoint)) == 0
    pattern = r"running \d  waiting 0  slots \d/4  decode [\d.]+k? tok/s  prefill [\d.]+k? tok/s"
    assert re.search(pattern, caplog.text)


def test_the_status_line_says_what_guesses_and_kept_prefixes_did() -> None:
    def stats(drafted: dict[int, int], accepted: dict[int, int], usage: Usage | None) -> Stats:
        counters = Counters(drafted=drafted, accepted=accepted)
        return Stats(1, 0, 4, 3, 0, 0, 0, 9, 0, 36, counters, usage, 1)

    before = stats({0: 90, 1: 50}, {0: 10}, Usage(1000, 100))
    now = stats({0: 96, 1: 54}, {0: 15, 1: 2}, Usage(1200, 250))
    assert serve.status_line(before, now, 2).endswith("  guesses right 70%  prefix hits 75%")
    for idle in (before, stats({0: 90, 1: 50}, {0: 10}, None)):
        line = serve.status_line(idle, idle, 2)
        assert "guesses" not in line and "prefix" not in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"llm": None}, "at least one of llm and embedding"),
        ({"port": 70000}, "port"),
        ({"llm": {"id": "a", "model": "b", "slots": 0}}, "llm.slots"),
        ({"llm": {"id": "a", "model": "b", "device": "tpu"}}, "llm.device"),
        ({"api_key": ""}, "api_key"),
        ({"api_key": ["very-secret"]}, "api_key"),
    ],
)
def test_configuration_errors_name_the_key(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(configuration(tmp_path) | change))
    path.chmod(0o600)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        config.load(path)
    assert "very-secret" not in str(caught.value)
    path.chmod(0o640)
    with pytest.raises(UsageError, match="can be read by others"):
        config.load(path)


def test_flags_make_a_configuration() -> None:
    made = config.from_flags(
        "hf:Qwen/Qwen3.5-0.8B", server={"port": 8090, "host": None}, llm={"slots": 3, "id": None}
    )
    assert made.llm is not None and made.host == "127.0.0.1"
    assert (made.llm.id, made.llm.slots) == ("Qwen3.5-0.8B", 3)
    assert config.from_flags("a/b.gguf", server={"port": 1}, llm={}).ids() == ["b"]
    with pytest.raises(UsageError, match=r"llm\.slots"):
        config.from_flags("x", server={"port": 1}, llm={"slots": 0})


def test_a_missing_package_names_the_extra(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = config.EngineConfig.model_validate(configuration(checkpoint))
    with pytest.raises(PrerequisiteError, match="torch") as caught:
        serve.serve(settings)
    assert "difyops[engine]" in (caught.value.hint or "")
