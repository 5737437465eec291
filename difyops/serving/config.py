"""The server's configuration: one JSON file that only its owner can read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from difyops.errors import UsageError

ModelId = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^\S+$")]
Kind = TypeVar("Kind", bound=BaseModel)


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Config):
    """A model that clients call `id`."""

    id: ModelId


class EmbeddingConfig(ModelConfig):
    """An ONNX sentence encoder; `max_tokens` counts special tokens too."""

    model: Path
    tokenizer: Path
    max_tokens: int = Field(ge=3)
    threads: int | None = Field(default=None, ge=1)


class ServerConfig(Config):
    """What any server of ours is told; which `llm` it takes, a subclass says. Without `api_key`
    every client is let in."""

    host: str = "127.0.0.1"
    port: int = Field(ge=0, le=65535)
    api_key: SecretStr | None = None
    llm: ModelConfig | None = None
    embedding: EmbeddingConfig | None = None

    @model_validator(mode="after")
    def _serves_something(self) -> Self:
        if self.llm is None and self.embedding is None:
            raise ValueError("at least one of llm and embedding is needed")
        if self.llm and self.embedding and self.llm.id == self.embedding.id:
            raise ValueError("llm.id and embedding.id must differ")
        if self.api_key is not None and not self.api_key.get_secret_value():
            raise ValueError("api_key is empty; leave it out to let every client in")
        return self

    def ids(self) -> list[str]:
        """The models, as clients name them."""
        return [m.id for m in (self.llm, self.embedding) if m is not None]

    @property
    def key(self) -> str | None:
        return self.api_key.get_secret_value() if self.api_key is not None else None


class LlmConfig(ModelConfig):
    """A GGUF chat model. `context` is tokens for each of the `parallel` requests at a time.

    `threads` None means the CPUs this process may use, less one.
    """

    path: Path
    context: int = Field(ge=64)
    parallel: int = Field(default=1, ge=1, le=256)
    threads: int | None = Field(default=None, ge=1)
    tools: bool = False


class ServingConfig(ServerConfig):
    """What one process of difyops.serving serves."""

    llm: LlmConfig | None = None


def parse(text: str, name: str = "config") -> ServingConfig:
    """Validate JSON text. Raises UsageError with the key path; values are never quoted."""
    return validate(ServingConfig, text, name)


def load(path: Path) -> ServingConfig:
    """Read `path`. Raises UsageError when it is absent, readable by others, or wrong."""
    return parse(read_private(path), path.name)


def validate(kind: type[Kind], text: str, name: str) -> Kind:
    """JSON text as a `kind`. Raises UsageError with the key path; values are never quoted."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise UsageError(f"{name}: {first_error(error)}") from None


def first_error(error: ValidationError) -> str:
    """The key path and what is wrong there; never the value."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where + ': ' if where else ''}{first['msg']}"


def read_private(path: Path) -> str:
    """The text of a file that only its owner can read. Raises UsageError."""
    try:
        mode = path.stat().st_mode & 0o777
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    if mode & 0o077:
        raise UsageError(f"{path} can be read by others (mode {mode:04o})", f"chmod 600 {path}")
    return text
