"""difyops' own engine for chat and ONNX Runtime for embeddings, in one process."""

from __future__ import annotations

from difyops.backends import Backend, LlmSpec, Spec, own_server
from difyops.errors import UsageError


def build(spec: Spec) -> Backend:
    """Raises UsageError when `spec.config` or a model's file is not named."""
    return own_server("native", "difyops.engine", spec, _llm_fields)


def _llm_fields(llm: LlmSpec) -> dict[str, object]:
    if llm.path is None:
        raise UsageError(f"model {llm.id}: native needs the path of its files")
    return {
        "id": llm.id,
        "model": str(llm.path),
        "context": llm.context,
        "slots": llm.parallel,
        "threads": llm.threads,
        "sampling": dict(llm.sampling),
    }
