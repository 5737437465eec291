"""Serving engines. An engine adapter is a command, an env, a health URL and capabilities.

Adding an engine is one file here and one line in `REGISTRY`. Adapters are pure: they start nothing
and write nothing.
"""

from __future__ import annotations

import difflib
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import cast

from difyops.errors import UsageError
from difyops.secrets import Secret


class Capability(StrEnum):
    """What a backend can answer, as Dify needs to know it."""

    CHAT = "chat"
    EMBEDDINGS = "embeddings"
    TOOLS = "tools"


@dataclass(frozen=True)
class LlmSpec:
    """A chat model to serve. `context` is tokens for each of the `parallel` requests at a time;
    None leaves it to the engine, which knows the model."""

    id: str
    path: Path | None
    context: int | None
    parallel: int = 1
    threads: int | None = None
    tools: bool = False
    sampling: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class EmbeddingSpec:
    """An embedding model to serve; `max_tokens` counts special tokens too."""

    id: str
    model: Path | None
    tokenizer: Path | None
    max_tokens: int


@dataclass(frozen=True)
class Spec:
    """What is asked of an engine, whichever it is.

    `config` is where the engine's own configuration file may lie (it holds the key: 0600);
    `base_url` is set when the engine runs elsewhere, and ends in `/v1`.
    """

    llm: LlmSpec | None = None
    embedding: EmbeddingSpec | None = None
    api_key: Secret | None = None
    host: str = "127.0.0.1"
    port: int = 8090
    config: Path | None = None
    python: str = sys.executable
    base_url: str | None = None


@dataclass(frozen=True)
class Backend:
    """How one engine is run and reached.

    An empty `command` means that nothing is started. `files` are to be written, 0600, before the
    start. `health_url` answers 200 when the models answer; None means that there is only
    `/v1/models` to ask. `base_url` ends in `/v1`.
    """

    name: str
    command: tuple[str, ...]
    base_url: str
    health_url: str | None
    capabilities: frozenset[Capability]
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    files: Mapping[Path, Secret] = field(default_factory=lambda: MappingProxyType({}))


#: engine name -> the module with its `build(Spec) -> Backend`.
REGISTRY: Mapping[str, str] = MappingProxyType(
    {
        "llamacpp": "difyops.backends.llamacpp",
        "native": "difyops.backends.native",
        "external": "difyops.backends.external",
    }
)


def build(name: str, spec: Spec) -> Backend:
    """The backend called `name` for `spec`.

    Raises UsageError for an unknown name, or a spec that the engine cannot serve.
    """
    if name not in REGISTRY:
        near = difflib.get_close_matches(name.lower(), REGISTRY, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"backends: {', '.join(sorted(REGISTRY))}"
        raise UsageError(f"no backend called {name!r}", hint)
    module = importlib.import_module(REGISTRY[name])
    return cast(Callable[[Spec], Backend], module.build)(spec)


def reachable(host: str, port: int) -> str:
    """Where a server that listens on `host` is reached from this machine, without a path."""
    # A wildcard is where to listen, not where to connect to.
    reach = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://{f'[{reach}]' if ':' in reach else reach}:{port}"


def own_server(
    name: str, module: str, spec: Spec, llm_fields: Callable[[LlmSpec], dict[str, object]]
) -> Backend:
    """The backend `name` as a server of ours, `python -m MODULE --config`.

    `llm_fields` is a chat model as its configuration file has it. Raises UsageError when
    `spec.config` or a model's file is not named.
    """
    if spec.config is None:
        raise UsageError(f"{name}: no path for its configuration file")
    root = reachable(spec.host, spec.port)
    return Backend(
        name=name,
        command=(spec.python, "-m", module, "--config", str(spec.config)),
        base_url=f"{root}/v1",
        health_url=f"{root}/health",
        capabilities=capabilities(spec),
        files=MappingProxyType({spec.config: Secret(_config_text(name, spec, llm_fields))}),
    )


def _config_text(name: str, spec: Spec, llm_fields: Callable[[LlmSpec], dict[str, object]]) -> str:
    """The JSON file that a server of ours reads. It holds the key: 0600."""
    if spec.llm is None and spec.embedding is None:
        raise UsageError(f"model: {name} has nothing to serve", "name a model or an embedding")
    content: dict[str, object] = {"host": spec.host, "port": spec.port}
    content["api_key"] = spec.api_key.reveal() if spec.api_key else None
    if spec.llm is not None:
        content["llm"] = llm_fields(spec.llm)
    if spec.embedding is not None:
        content["embedding"] = _embedding_fields(spec.embedding)
    return json.dumps(content, indent=2) + "\n"


def _embedding_fields(embedding: EmbeddingSpec) -> dict[str, object]:
    if embedding.model is None or embedding.tokenizer is None:
        raise UsageError(f"embedding {embedding.id}: the paths of its two files are needed")
    return {
        "id": embedding.id,
        "model": str(embedding.model),
        "tokenizer": str(embedding.tokenizer),
        "max_tokens": embedding.max_tokens,
    }


def capabilities(spec: Spec) -> frozenset[Capability]:
    """What a server of everything in `spec` can do."""
    found = set()
    if spec.llm is not None:
        found.add(Capability.CHAT)
        if spec.llm.tools:
            found.add(Capability.TOOLS)
    if spec.embedding is not None:
        found.add(Capability.EMBEDDINGS)
    return frozenset(found)
