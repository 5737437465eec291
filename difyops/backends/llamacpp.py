"""llama.cpp for chat and ONNX Runtime for embeddings, behind difyops' own server."""

from __future__ import annotations

from difyops.backends import Backend, LlmSpec, Spec, own_server
from difyops.errors import UsageError


def build(spec: Spec) -> Backend:
    """Raises UsageError when `spec.config` or a model's file is not named."""
    return own_server("llamacpp", "difyops.serving", spec, _llm_fields)


def _llm_fields(llm: LlmSpec) -> dict[str, object]:
    if llm.path is None or llm.context is None:
        raise UsageError(f"model {llm.id}: llamacpp needs a GGUF file's path and a context")
    return {
        "id": llm.id,
        "path": str(llm.path),
        "context": llm.context,
        "parallel": llm.parallel,
        "threads": llm.threads,
        "tools": llm.tools,
    }
