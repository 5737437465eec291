"""difyops' own engine for chat and ONNX Runtime for embeddings, in one process."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

from difyops.backends import Backend, Spec, capabilities, embedding_fields, reachable
from difyops.errors import UsageError
from difyops.secrets import Secret


def config_text(spec: Spec) -> str:
    """The JSON file that `python -m difyops.engine --config` reads. It holds the key: 0600.

    Raises UsageError for a spec without a model, or with a model whose files are not named.
    """
    llm, embedding = spec.llm, spec.embedding
    if llm is None and embedding is None:
        raise UsageError("model: native has nothing to serve", "name a model or an embedding")
    content: dict[str, Any] = {"host": spec.host, "port": spec.port}
    content["api_key"] = spec.api_key.reveal() if spec.api_key else None
    if llm is not None:
        if llm.path is None:
            raise UsageError(f"model {llm.id}: native needs the path of its files")
        content["llm"] = {
            "id": llm.id,
            "model": str(llm.path),
            "context": llm.context,
            "slots": llm.parallel,
            "threads": llm.threads,
            "sampling": dict(llm.sampling),
        }
    if embedding is not None:
        content["embedding"] = embedding_fields(embedding)
    return json.dumps(content, indent=2) + "\n"


def build(spec: Spec) -> Backend:
    """Raises UsageError when `spec.config` or a model's file is not named."""
    if spec.config is None:
        raise UsageError("native: no path for its configuration file")
    root = reachable(spec.host, spec.port)
    return Backend(
        name="native",
        command=(spec.python, "-m", "difyops.engine", "--config", str(spec.config)),
        base_url=f"{root}/v1",
        health_url=f"{root}/health",
        capabilities=capabilities(spec),
        files=MappingProxyType({spec.config: Secret(config_text(spec))}),
    )
