"""llama.cpp for chat and ONNX Runtime for embeddings, behind difyops' own server."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

from difyops.backends import Backend, Spec, capabilities
from difyops.errors import UsageError
from difyops.secrets import Secret


def config_text(spec: Spec) -> str:
    """The JSON file that `python -m difyops.serving --config` reads. It holds the key: 0600.

    Raises UsageError for a spec without a model, or with a model whose files are not named.
    """
    llm, embedding = spec.llm, spec.embedding
    if llm is None and embedding is None:
        raise UsageError("model: llamacpp has nothing to serve", "name a model or an embedding")
    content: dict[str, Any] = {"host": spec.host, "port": spec.port}
    content["api_key"] = spec.api_key.reveal() if spec.api_key else None
    if llm is not None:
        if llm.path is None:
            raise UsageError(f"model {llm.id}: llamacpp needs the path of a GGUF file")
        content["llm"] = {
            "id": llm.id,
            "path": str(llm.path),
            "context": llm.context,
            "parallel": llm.parallel,
            "threads": llm.threads,
            "tools": llm.tools,
        }
    if embedding is not None:
        if embedding.model is None or embedding.tokenizer is None:
            raise UsageError(f"embedding {embedding.id}: the paths of its two files are needed")
        content["embedding"] = {
            "id": embedding.id,
            "model": str(embedding.model),
            "tokenizer": str(embedding.tokenizer),
            "max_tokens": embedding.max_tokens,
        }
    return json.dumps(content, indent=2) + "\n"


def build(spec: Spec) -> Backend:
    """Raises UsageError when `spec.config` or a model's file is not named."""
    if spec.config is None:
        raise UsageError("llamacpp: no path for its configuration file")
    # A wildcard is where to listen, not where to connect to.
    reach = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(spec.host, spec.host)  # noqa: S104
    root = f"http://{f'[{reach}]' if ':' in reach else reach}:{spec.port}"
    return Backend(
        name="llamacpp",
        command=(spec.python, "-m", "difyops.serving", "--config", str(spec.config)),
        base_url=f"{root}/v1",
        health_url=f"{root}/health",
        capabilities=capabilities(spec),
        files=MappingProxyType({spec.config: Secret(config_text(spec))}),
    )
