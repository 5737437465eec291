"""The models difyops knows by name: where their files come from and what the files can do.

The entries are data, in catalog.yaml; adding a model touches that file only. One more comes with
difyops itself, for its own engine.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from difyops.errors import UsageError
from difyops.text import bundled

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


#: Small enough to travel with difyops: name -> folder below models/. Only our own engine reads it.
_BUNDLED = {"tiny": "tiny-hybrid"}


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelFile(_Data):
    """One file of a model. `file` is its name on disk, `member` its path inside the source."""

    source: str
    member: str
    file: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    sha256: Sha256
    bytes: int = Field(gt=0)


class Llm(_Data):
    """A chat model in GGUF. `trained_context` is in tokens, as the file's metadata states it."""

    kind: Literal["llm"]
    title: str
    licence: str
    weights: ModelFile
    trained_context: int = Field(gt=0)
    tools: bool
    #: What its makers recommend; a GGUF has no place for it.
    sampling: dict[str, float] = Field(default_factory=dict)

    def files(self) -> dict[str, ModelFile]:
        """The files to fetch, by role."""
        return {"weights": self.weights}


class Embedding(_Data):
    """A sentence-embedding model in ONNX; `max_tokens` counts the special tokens too."""

    kind: Literal["embedding"]
    title: str
    licence: str
    weights: ModelFile
    tokenizer: ModelFile
    dimensions: int = Field(gt=0)
    max_tokens: int = Field(gt=2)

    def files(self) -> dict[str, ModelFile]:
        """The files to fetch, by role."""
        return {"weights": self.weights, "tokenizer": self.tokenizer}


Model = Annotated[Llm | Embedding, Field(discriminator="kind")]


class Catalog(_Data):
    models: dict[str, Model]


@cache
def load() -> Catalog:
    """The catalog that travels with difyops, read once."""
    # Imported here: a start of the CLI that needs no model does not pay for YAML.
    import yaml

    text = resources.files("difyops").joinpath("catalog.yaml").read_text(encoding="utf-8")
    return Catalog.model_validate(yaml.safe_load(text))


def names(kind: Literal["llm", "embedding"] | None = None) -> list[str]:
    """The known model names, sorted; of one kind when `kind` is given."""
    return sorted(n for n, model in load().models.items() if kind in (None, model.kind))


def bundled_names() -> list[str]:
    """The chat models that come with difyops, for `native`."""
    return sorted(_BUNDLED)


def bundled_folder(name: str) -> Path | None:
    """The directory of such a model; None for every other name."""
    return bundled("models") / _BUNDLED[name] if name in _BUNDLED else None


def get(name: str, kind: Literal["llm", "embedding"] | None = None) -> Llm | Embedding:
    """The entry called `name`.

    Raises UsageError, naming as the remedy the nearest known name (or all of them), those of
    `kind` if it is given.
    """
    models = load().models
    if name in models:
        return models[name]
    known = names(kind)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    what = {"llm": "chat models", "embedding": "embedding models", None: "known models"}[kind]
    hint = f"did you mean {near[0]}?" if near else f"{what}: {', '.join(known)}"
    raise UsageError(f"no model called {name!r} in the catalog", hint)


def get_llm(name: str) -> Llm:
    """The chat model called `name`; raises UsageError when it is unknown or of another kind."""
    model = get(name, "llm")
    if not isinstance(model, Llm):
        raise UsageError(
            f"{name} is an embedding model, not a chat model",
            f"chat models: {', '.join(names('llm'))}",
        )
    return model


def get_embedding(name: str) -> Embedding:
    """The embedding model called `name`; raises UsageError when unknown or of another kind."""
    model = get(name, "embedding")
    if not isinstance(model, Embedding):
        raise UsageError(
            f"{name} is a chat model, not an embedding model",
            f"embedding models: {', '.join(names('embedding'))}",
        )
    return model
