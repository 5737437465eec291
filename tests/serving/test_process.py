"""The life of the process: loading, failing, stopping; and its configuration."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from difyops.errors import PrerequisiteError, UsageError
from difyops.serving import config

from .conftest import CHAT, EMBED, KEY, Running, configuration, until

Start = Callable[[dict[str, Any]], Running]
Files = dict[str, dict[str, Path]]


def test_health_is_503_until_the_models_answer(start: Start, model_files: Files) -> None:
    server = start(configuration(model_files))
    seen: list[int] = []

    def healthy() -> bool:
        answer = httpx.get(f"{server.url()}/health", timeout=20)
        seen.append(answer.status_code)
        if answer.status_code == 503:
            early = httpx.get(
                f"{server.url()}/v1/models", headers={"Authorization": f"Bearer {KEY}"}
            )
            # It may have become ready between the two.
            assert early.status_code == 200 or early.json()["error"]["code"] == "model_loading"
        else:
            assert answer.json() == {"status": "ok", "models": [CHAT, EMBED]}
        return answer.status_code == 200

    until(healthy, 60, lambda: server.log)
    assert seen[0] == 503 and set(seen) == {503, 200}


def _stream(server: Running, lines: list[str], ended: list[object]) -> threading.Thread:
    body = {
        "model": CHAT,
        "messages": [{"role": "user", "content": "Count."}],
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": True,
    }

    def go() -> None:
        try:
            with httpx.stream(
                "POST",
                f"{server.url()}/v1/chat/completions",
                json=body,
                headers={"Authorization": f"Bearer {KEY}"},
                timeout=60,
            ) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
            ended.append("whole")
        except httpx.HTTPError as error:
            ended.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    until(lambda: len(lines) > 3, 20, lambda: server.log)
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_stream(start: Start, model_files: Files, number: int) -> None:
    server = start(configuration(model_files)).ready()
    engine = psutil.Process(server.process.pid).children()
    assert len(engine) == 1
    lines: list[str] = []
    ended: list[object] = []
    reader = _stream(server, lines, ended)
    began = time.monotonic()
    server.process.send_signal(number)
    assert server.wait() == 0, server.log
    assert time.monotonic() - began < 5
    reader.join(10)
    # The answer is cut, but its client is told so in the stream.
    assert ended == ["whole"] and "server_stopping" in lines[-2]
    assert not engine[0].is_running()
    assert "Traceback" not in server.log


def test_a_short_stream_is_finished_after_sigterm(start: Start, model_files: Files) -> None:
    server = start(configuration(model_files)).ready()
    body = {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    with httpx.stream(
        "POST",
        f"{server.url()}/v1/chat/completions",
        json=body | {"max_tokens": 60, "ignore_eos": True},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=60,
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.wait() == 0


def test_sigterm_while_loading(start: Start, model_files: Files) -> None:
    server = start(configuration(model_files))
    server.url()
    assert httpx.get(f"{server.url()}/health").status_code == 503
    server.process.send_signal(signal.SIGTERM)
    assert server.wait(5) == 0, server.log
    assert "Traceback" not in server.log


def _damage(kind: str, good: Path, bad: Path) -> None:
    if kind == "empty":
        bad.write_bytes(b"")
    elif kind == "noise":
        bad.write_bytes(b"\x00\x01\x02\x03" * 5000)
    else:
        with good.open("rb") as stream:
            bad.write_bytes(stream.read({"truncated": 40_000_000, "header": 2000}[kind]))


@pytest.mark.parametrize("kind", ["truncated", "header", "empty", "noise", "absent"])
def test_a_bad_gguf_is_one_clear_line_and_exit_3(
    start: Start, model_files: Files, tmp_path: Path, kind: str
) -> None:
    bad = tmp_path / "bad.gguf"
    if kind != "absent":
        _damage(kind, model_files[CHAT]["weights"], bad)
    server = start(configuration(model_files, path=str(bad)))
    assert server.wait() == 3
    wrong = [line for line in server.lines if "INFO" not in line]
    assert len(wrong) == 1, server.log
    assert "cannot load smollm2-135m" in wrong[0] and str(bad) in wrong[0]
    expected = {"truncated": "corrupted or incomplete", "noise": "magic", "absent": "no file"}
    assert expected.get(kind, "") in wrong[0]


@pytest.mark.parametrize("role", ["model", "tokenizer"])
def test_a_bad_embedding_file_is_exit_3(
    start: Start, model_files: Files, tmp_path: Path, role: str
) -> None:
    bad = tmp_path / "bad"
    bad.write_text("{}")
    settings = configuration(model_files)
    settings["embedding"][role] = str(bad)
    server = start(settings)
    assert server.wait() == 3
    wrong = [line for line in server.lines if "INFO" not in line]
    assert len(wrong) == 1 and str(bad) in wrong[0], server.log


def test_more_tokens_than_the_encoder_has_positions_is_exit_3(
    start: Start, model_files: Files
) -> None:
    settings = configuration(model_files)
    settings["embedding"]["max_tokens"] = 513
    assert start(settings).wait() == 3


def test_a_context_that_the_model_lacks_is_not_claimed(start: Start, model_files: Files) -> None:
    settings = configuration(model_files, context=20_000) | {"embedding": None, "api_key": None}
    server = start(settings).ready()
    (model,) = httpx.get(f"{server.url()}/v1/models").json()["data"]
    assert model["context_length"] == 8192
    assert "20000 tokens of context were asked for" in server.log


def test_an_engine_that_dies_ends_the_service(start: Start, model_files: Files) -> None:
    server = start(configuration(model_files)).ready()
    lines: list[str] = []
    ended: list[object] = []
    reader = _stream(server, lines, ended)
    psutil.Process(server.process.pid).children()[0].kill()
    assert server.wait() == 1
    reader.join(10)
    assert "engine_failed" in "\n".join(lines)
    assert "llama.cpp ended with status -9" in server.log


def test_the_engine_does_not_outlive_a_killed_server(start: Start, model_files: Files) -> None:
    server = start(configuration(model_files)).ready()
    (engine,) = psutil.Process(server.process.pid).children()
    server.process.kill()
    server.wait()
    gone = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    until(lambda: not engine.is_running() or engine.status() in gone, 5)


def test_the_engine_itself_wants_a_key_and_is_on_loopback(server: Running) -> None:
    (engine,) = psutil.Process(server.process.pid).children()
    (listener,) = [c for c in engine.net_connections() if c.status == psutil.CONN_LISTEN]
    assert listener.laddr.ip == "127.0.0.1"
    url = f"http://127.0.0.1:{listener.laddr.port}"
    assert httpx.get(f"{url}/slots").status_code == 401
    assert httpx.get(f"{url}/slots", headers={"Authorization": f"Bearer {KEY}"}).status_code == 401
    assert not any(KEY in part for part in [*engine.cmdline(), *engine.environ().values()])


def test_a_port_in_use_is_exit_3(start: Start, model_files: Files) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = start(configuration(model_files) | {"port": port})
        assert server.wait() == 3
    assert len(server.lines) == 1 and f"cannot listen on 127.0.0.1:{port}" in server.lines[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"llm": None, "embedding": None}, "at least one of llm and embedding"),
        ({"port": 70000}, "port"),
        ({"llm": {"id": "a", "path": "b", "context": 0}}, "llm.context"),
        ({"api_key": ""}, "api_key"),
        ({"api_key": ["very-secret"]}, "api_key"),
    ],
)
def test_configuration_errors_name_the_key(
    change: dict[str, Any], message: str, model_files: Files
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        config.parse(json.dumps(configuration(model_files) | change))
    assert "very-secret" not in str(caught.value)


def test_a_configuration_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text("{}")
    path.chmod(0o644)
    with pytest.raises(UsageError, match="can be read by others"):
        config.load(path)
    with pytest.raises(UsageError, match="No such file"):
        config.load(tmp_path / "none.json")


def test_a_missing_engine_names_the_extra(
    model_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    from difyops.serving import __main__

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = config.parse(json.dumps(configuration(model_files) | {"embedding": None}))
    with pytest.raises(PrerequisiteError, match="xllamacpp") as caught:
        __main__._require(settings)
    assert "difyops[demo]" in (caught.value.hint or "")


def test_a_wrong_configuration_is_exit_2(start: Start) -> None:
    server = start({"port": 1})
    assert server.wait() == 2
    assert len(server.lines) == 1 and "Traceback" not in server.log


def test_the_key_is_not_in_the_repr(model_files: Files) -> None:
    assert KEY not in repr(config.parse(json.dumps(configuration(model_files))))
