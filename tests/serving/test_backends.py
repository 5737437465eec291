"""Backends are pure; the probe is run against the real server."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from difyops import backends
from difyops.backends import Capability, EmbeddingSpec, LlmSpec, Spec, probe
from difyops.errors import DifyopsError, UsageError
from difyops.secrets import Secret
from difyops.serving import config

from .conftest import CHAT, EMBED, KEY, Running

SPEC = Spec(
    llm=LlmSpec("a", Path("/m/a.gguf"), context=4096, parallel=3),
    embedding=EmbeddingSpec("e", Path("/m/e.onnx"), Path("/m/t.json"), max_tokens=256),
    api_key=Secret(KEY),
    config=Path("/d/etc/serving.json"),
    python="/venv/bin/python",
)


def test_llamacpp_is_a_command_a_file_and_urls() -> None:
    backend = backends.build("llamacpp", SPEC)
    assert backend.command == (
        "/venv/bin/python",
        *("-m", "difyops.serving", "--config", "/d/etc/serving.json"),
    )
    assert backend.health_url == "http://127.0.0.1:8090/health"
    assert backend.base_url == "http://127.0.0.1:8090/v1"
    assert backend.capabilities == {Capability.CHAT, Capability.EMBEDDINGS}
    assert KEY not in repr(backend)
    # The server itself accepts what is rendered.
    read = config.parse(backend.files[Path("/d/etc/serving.json")].reveal())
    assert read.llm is not None and read.embedding is not None and read.api_key is not None
    assert (read.llm.context, read.llm.parallel, read.embedding.max_tokens) == (4096, 3, 256)
    assert read.api_key.get_secret_value() == KEY


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:8090/v1"), ("::", "http://[::1]:8090/v1")],  # noqa: S104
)
def test_a_wildcard_is_reached_on_loopback(host: str, url: str) -> None:
    assert backends.build("llamacpp", replace(SPEC, host=host)).base_url == url


def test_llamacpp_without_a_key_or_a_chat_model() -> None:
    def config_text(spec: Spec) -> str:
        return backends.build("llamacpp", spec).files[Path("/d/etc/serving.json")].reveal()

    read = json.loads(config_text(replace(SPEC, api_key=None, llm=None)))
    assert read["api_key"] is None and "llm" not in read
    config.parse(json.dumps(read))
    with pytest.raises(UsageError, match="nothing to serve"):
        config_text(replace(SPEC, llm=None, embedding=None))


def test_external_starts_nothing() -> None:
    backend = backends.build("external", replace(SPEC, base_url="https://gpu-box/v1/"))
    assert (backend.command, dict(backend.files), backend.health_url) == ((), {}, None)
    assert backend.base_url == "https://gpu-box/v1"


@pytest.mark.parametrize("url", [None, "gpu-box:8000", "ftp://x/v1", "http://", "http://u:p@x/v1"])
def test_external_wants_a_plain_url(url: str | None) -> None:
    with pytest.raises(UsageError, match="external"):
        backends.build("external", replace(SPEC, base_url=url))


def test_unknown_backend() -> None:
    with pytest.raises(UsageError) as caught:
        backends.build("llama.cpp", SPEC)
    assert caught.value.hint == "did you mean llamacpp?"


def test_describe_and_chat(server: Running) -> None:
    base, key = f"{server.url()}/v1", Secret(KEY)
    chat, embedding = probe.describe(base, key)
    assert (chat.id, chat.context, chat.dimensions) == (CHAT, 1024, None)
    assert (embedding.id, embedding.context, embedding.dimensions) == (EMBED, 256, 384)
    answer = probe.chat_once(base, CHAT, key, max_tokens=12)
    assert answer.text.strip()
    assert 0 < answer.first_token < answer.seconds


def test_probe_errors(server: Running) -> None:
    base = f"{server.url()}/v1"
    with pytest.raises(DifyopsError, match="refuses the API key"):
        probe.describe(base, Secret("wrong"))
    with pytest.raises(DifyopsError, match=r"404.*model_x") as caught:
        probe.chat_once(base, "model_x", Secret(KEY))
    assert KEY not in caught.value.message
    with pytest.raises(DifyopsError, match="404"):
        probe.describe(server.url() + "/v2", Secret(KEY))
    with pytest.raises(DifyopsError, match="is not a list of models"):
        probe.describe(server.url() + "/health?x=", None)
    with pytest.raises(DifyopsError, match="cannot be reached"):
        probe.describe("http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("entry", "context"),
    [
        ({"context_length": 4, "max_model_len": 5}, 4),
        ({"max_model_len": 5, "meta": {"n_ctx_train": 6}}, 5),
        ({"meta": {"n_ctx_train": 6}}, 6),
        ({"meta": None, "context_length": None}, None),
        ({"context_length": True}, None),
        ({}, None),
    ],
)
def test_context_in_every_dialect(entry: dict[str, object], context: int | None) -> None:
    assert probe._context(entry) == context


def test_importing_is_cheap() -> None:
    """The CLI imports these at its start; none may load a client, an engine or a wheel."""
    heavy = ("requests", "httpx", "onnxruntime", "xllamacpp", "tokenizers", "numpy", "starlette")
    script = (
        "import sys, difyops.backends.llamacpp, difyops.backends.external, difyops.backends.probe,"
        f" difyops.catalog, difyops.modelsource; print([m for m in {heavy} if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.stdout.strip() == "[]", shown.stderr
