"""What one server process of the native engine serves: a JSON file of mode 0600, or flags."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from difyops.errors import UsageError
from difyops.serving.config import (
    Config,
    ModelConfig,
    ServerConfig,
    first_error,
    read_private,
    validate,
)

#: What `speculate` may be.
SPECULATE = r"^(auto|off|mtp|medusa|ngram|draft:.+)$"


class SamplingConfig(Config):
    """What requests get that do not say; None is what the model's own files recommend."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)

    def given(self) -> dict[str, Any]:
        """The fields that say something."""
        return self.model_dump(exclude_none=True)


class LlmConfig(ModelConfig):
    """A language model. `model` is what sources.py resolves: a directory, a GGUF file, a catalog
    name, or `hf:`, `modelscope:` or `pypi:` and a name; downloads lie in `cache`.

    `speculate` names what guesses ahead (`draft:MODEL`: a smaller model); `prefix_cache` is how
    many bytes of states are kept for prompts that begin alike (None: an eighth of the free memory;
    0: none).

    `context` is tokens of one request (None: what the model was trained for), `slots` how many run
    at a time, `pages` bounds the keys and values of softmax layers over all of them (None for
    either: what the memory holds, see sizing.py; of a GPU's, `gpu_memory_utilization` is ours at
    most). `prefill_tokens` is how much of prompts one step reads (None: 512, on a GPU 8192).
    `state_dtype` is what recurrent states are kept in. `threads` is for a CPU (None: the CPUs less
    one).
    """

    model: str = Field(min_length=1)
    context: int | None = Field(default=None, ge=16)
    slots: int | None = Field(default=None, ge=1, le=4096)
    pages: int | None = Field(default=None, ge=1)
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    prefill_tokens: int | None = Field(default=None, ge=1)
    max_waiting: int = Field(default=256, ge=0)
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    state_dtype: Literal["auto", "bfloat16"] = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: int | None = Field(default=None, ge=1)
    cache: Path | None = None
    speculate: str = Field(default="auto", pattern=SPECULATE)
    prefix_cache: int | None = Field(default=None, ge=0)
    sampling: SamplingConfig = SamplingConfig()


class EngineConfig(ServerConfig):
    """What one process of the native engine serves."""

    llm: LlmConfig | None = None


def load(path: Path) -> EngineConfig:
    """Raises UsageError when the file is absent, readable by others, or wrong."""
    return validate(EngineConfig, read_private(path), path.name)


def from_flags(
    model: str,
    *,
    server: dict[str, Any],
    llm: dict[str, Any],
    embedding: dict[str, Any] | None = None,
) -> EngineConfig:
    """`server`, `llm` and `embedding` are fields of EngineConfig, LlmConfig and EmbeddingConfig;
    None is a flag not given.

    The model's id is the last part of its name without a suffix. Raises UsageError naming the
    field.
    """
    given = {key: value for key, value in llm.items() if value is not None}
    fields = {key: value for key, value in server.items() if value is not None}
    if embedding is not None:
        fields["embedding"] = embedding
    name = re.split(r"[/:]", model.rstrip("/"))[-1].removesuffix(".gguf")
    try:
        return EngineConfig.model_validate(
            fields | {"llm": {"id": name.partition("==")[0], "model": model} | given}
        )
    except ValidationError as error:
        raise UsageError(first_error(error)) from None
