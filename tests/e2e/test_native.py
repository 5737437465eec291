"""The native engine behind a real Dify: changed to, used, killed, and changed back.

The deployment is left as it was found: up, healthy, on llama.cpp.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import yaml

from difyops import knowledge, proof, wire
from difyops.backends import probe
from difyops.console import BearerConsole, ServiceApi
from difyops.core import Deployment
from tests.e2e.test_source_mode import doctor, states, wait
from tests.integration.conftest import Cli


def set_backend(cli: Cli, name: str) -> None:
    """Edit difyops.yaml as a person would, and bring it up; only the model server is restarted."""
    path = cli.root / "difyops.yaml"
    content = yaml.safe_load(path.read_text())
    content["model"]["backend"] = name
    path.write_text(yaml.safe_dump(content))
    before = states(cli)
    up = cli("up", "--source", timeout=400)
    assert up.returncode == 0, up.stderr
    assert "model: its configuration changed, restarting it" in up.stderr
    assert "Proved    chat answered" in up.stdout
    after = states(cli)
    assert [n for n in after if after[n]["pid"] != before[n]["pid"]] == ["model"]
    assert {c["id"]: c["evidence"] for c in doctor(cli).values() if c["status"] != "ok"} == {}


@contextmanager
def on_native(cli: Cli) -> Iterator[None]:
    try:
        set_backend(cli, "native")
        yield
    finally:
        set_backend(cli, "llamacpp")


def test_dify_answers_from_the_native_engine(cli: Cli, dify: Deployment) -> None:
    with on_native(cli):
        server = psutil.Process(states(cli)["model"]["pid"])
        assert "difyops.engine" in server.cmdline()
        target = proof.target(dify)
        assert (target.llm.context, target.llm.tools) == (4096, False)
        chat_blocking_and_streaming(dify)
        find_passage(dify)
        assert json.loads(cli("chat", "--json", "--max-tokens", "9", "--once", "Hello").stdout)[
            "answer"
        ].strip()

        os.kill(server.pid, signal.SIGKILL)
        wait(lambda: states(cli)["model"]["pid"] not in (None, server.pid))
        wait(lambda: states(cli)["model"]["state"] == "running", 120, lambda: states(cli)["model"])
        wait(lambda: doctor(cli)["chat.end-to-end"]["status"] == "ok", 180, lambda: doctor(cli))
        assert states(cli)["model"]["restarts"] == 1
        chat_blocking_and_streaming(dify)
    assert "difyops.serving" in psutil.Process(states(cli)["model"]["pid"]).cmdline()
    chat_blocking_and_streaming(dify)


def chat_blocking_and_streaming(dify: Deployment) -> None:
    target = proof.target(dify)
    with ServiceApi(target.base_url, wire.existing(target).api_key) as service:
        reply = service.chat("Name a colour.", user="somebody")
        assert reply.answer.strip()
        assert reply.completion_tokens > 0
        events = list(service.chat_stream("What is two plus two?", user="somebody"))
    assert [e.event for e in events][-1] == "message_end"
    assert "error" not in [e.event for e in events]
    assert sum(e.event == "message" for e in events) > 1


def find_passage(dify: Deployment) -> None:
    """Dify searches with embeddings of the same process, of the model that it indexed with."""
    target = proof.target(dify)
    assert target.embedding is not None
    assert target.embedding.endpoint_url == target.llm.endpoint_url
    names = {
        m.id: m.dimensions for m in probe.describe(target.llm.endpoint_url, target.llm.api_key)
    }
    assert names == {target.llm.name: None, target.embedding.name: 384}
    with BearerConsole(target.base_url) as console:
        console.login(target.admin_email, target.admin_password)
        found = knowledge.prove_knowledge(console, target.embedding.name, print_nothing)
    assert found.passage == knowledge.RIGHT
    assert found.change == "same"


def print_nothing(step: str, text: str) -> None:
    pass
